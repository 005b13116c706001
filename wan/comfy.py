"""ComfyUI's folder of models -> the files of a model's parts, by their names and their shapes."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wan.denoiser.headers import check_denoiser, infer_config
from wan.errors import UserError
from wan.files import readable
from wan.options import EXPERT_OF_DIT, PART_OF_FILE
from wan.text.umt5 import TextEncoder
from wan.weights.checkpoint import kind_of
from wan.weights.single_file import experts_named, has_vocabulary, open_denoiser, open_part
from wan.weights.tensors import Weights, stored_types

HIGH, LOW = "high_noise_model", "low_noise_model"
# ComfyUI's folders of a part, and where checkpoints lie that hold several parts.
_FOLDERS = {
    "denoiser": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
}
_BUNDLES = "checkpoints"
_SETTING = {part: name for name, part in (*EXPERT_OF_DIT.items(), *PART_OF_FILE.items())}
_WORDS = {
    "model": "denoiser",
    HIGH: "high-noise expert",
    LOW: "low-noise expert",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "tokenizer": "tokenizer",
}
# By these words in a name it is worth saying why a file is not taken.
_OURS = {"denoiser": "wan", "vae": "wan", "text_encoder": "t5"}
# What the names of the released models' files are made of; any other word says that it is somebody's own.
_FORMATS = (
    r"(?:b|fp?)(?:f?16|32|8)|float(?:8|16|32)|e4m3(?:fn)?|e5m2|(?:mixed|learned)?[ _-]?scaled|mixed"
    r"|(?:ud[ _-])?i?q\d(?:_[01klmsx]+|_nl|_xs)*"
)
_EXPERT_WORDS = r"(?:high|low)[ ._-]*(?:noise)?|noise"
_RELEASED = {
    "denoiser": rf"wan[ ._-]?2?[ ._-]?2?|ti2v|[it]2v|a?14b|5b|{_EXPERT_WORDS}|model|diffusion|transformer|unet",
    "vae": r"wan[ ._-]?2?[ ._-]?[12]?|vae|diffusion[ _-]pytorch[ _-]model",
    "text_encoder": r"models|u?mt5|t5|xxl|enc(?:oder)?|wan|google",
}
_PACKERS = r"comfy(?:ui)?|kj|gguf"
_OLDER = re.compile(r"wan[ ._-]?2[ ._-]?1")
# Of files with as many bits the one that is nearer to what is computed in.
_NEARER = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Found:
    """A part's file, and why it is the one."""

    part: str
    file: Path
    line: str


@dataclass(frozen=True)
class _File:
    path: Path
    shown: str  # its name below the folder
    weights: Weights
    size: int  # a denoiser's input channels, a VAE's latent channels, or the width of a text encoder's embeddings
    bits: float  # of a weight
    type: str  # in which most of its weights are stored
    own_words: tuple[str, ...]  # what its name says beside what the released models' files say
    expert: str = ""

    @property
    def rank(self) -> tuple[float, int]:
        nearer = _NEARER.index(self.type) if self.type in _NEARER else len(_NEARER)
        return self.bits, -nearer

    @property
    def format(self) -> str:
        """Its name without the words of an expert: the same for both files of a pair."""
        return re.sub(rf"[ ._-]*(?:{_EXPERT_WORDS})[ ._-]*", "-", self.path.stem.lower())


class ComfyFolder:
    """ComfyUI's folder `models`, whose files are looked at when a part of them is asked for; no tensor is read.

    Sub folders and links are followed. `configs` are folders whose config.json may say how many heads a denoiser has;
    without one they are as wide as in the released models. Raises UserError for a folder that is none of ComfyUI's.
    """

    def __init__(self, folder: Path, configs: Sequence[Path] = ()) -> None:
        known = {name for names in _FOLDERS.values() for name in names} | {_BUNDLES}
        roots = [root for root in (folder, folder / "models") if any((root / name).is_dir() for name in known)]
        if not roots:
            is_file = "is a file" if folder.exists() else "does not exist"
            lack = "has none of the folders" if folder.is_dir() else f"{is_file}; name the folder with"
            raise UserError(f"`comfy_dir` {folder} {lack} {', '.join(sorted(known - {_BUNDLES}))}")
        self.root = roots[0]
        self._configs = [one / part for one in (self.root, *configs) for part in (".", HIGH, LOW, "transformer")]
        self._unfit: dict[str, list[str]] = {}  # why the files that bear our name are not taken, by part

    def kinds(self) -> dict[tuple[int, int], _File]:
        """(experts, input channels) of the models whose denoisers are all there, with one file of each."""
        files_by_kind: dict[tuple[int, int], _File] = {}
        for channels in sorted({file.size for file in self._denoisers}):
            files = [file for file in self._denoisers if file.size == channels]
            if channels == 48:
                files_by_kind[1, channels] = files[0]
            elif {"high", "low"} <= {file.expert for file in files} or any(not file.expert for file in files):
                files_by_kind[2, channels] = files[0]
        return files_by_kind

    def kind(self, continues: bool) -> tuple[int, int]:
        """That of the one model that is there; one that continues videos, where that is wanted. Raises UserError."""
        kinds = self.kinds()
        fit = {kind: file for kind, file in kinds.items() if not continues or kind != (2, 16)}
        if len(fit) == 1:
            return next(iter(fit))
        if fit:
            files = " and ".join(f"{file.shown} of {kind_of(*kind)}" for kind, file in fit.items())
            raise UserError(f"`comfy_dir` {self.root} holds {files}; say which is meant with `task`")
        raise self._missing("denoiser", "denoiser of I2V-A14B or TI2V-5B")

    def find(self, parts: Collection[str], channels: int, latents: int, distilled: bool = False) -> Iterator[Found]:
        """The files of these parts ("model" or experts, "vae", "text_encoder", "tokenizer"), of one model.

        `channels` are the denoiser's input channels, `latents` the VAE's. `distilled`: denoisers of few steps are
        wanted rather than others. Raises UserError that lists the files where there is none, or a real choice.
        """
        width = None
        experts = [part for part in ("model", HIGH, LOW) if part in parts]
        if experts:
            files = [file for file in self._denoisers if file.size == channels]
            for part, file, why in self._experts(experts, files, kind_of(2 - ("model" in parts), channels), distilled):
                width = infer_config(file.weights)["text_dim"]
                yield self._chosen(part, file, why)
        if "vae" in parts:
            fit = [file for file in self._vaes if file.size == latents]
            file, why = self._choose("vae", fit, f"VAE of {latents} latent channels")
            yield self._chosen("vae", file, why)
        encoders = [file for file in self._encoders if width in (None, file.size)]
        encoder = None
        if "text_encoder" in parts:
            encoder, why = self._choose("text_encoder", encoders, "text encoder (UMT5-XXL)")
            yield self._chosen("text_encoder", encoder, why)
        if "tokenizer" in parts:
            yield self._tokenizer(encoder, encoders)

    def _experts(
        self, parts: Sequence[str], files: Sequence[_File], kind: str, distilled: bool
    ) -> Iterator[tuple[str, _File, str]]:
        if any(file.weights.is_distilled == distilled for file in files):
            files = [file for file in files if file.weights.is_distilled == distilled]
        if parts == ["model"]:
            yield "model", *self._choose("model", files, kind)
            return
        by_expert = {part: [file for file in files if f"{file.expert}_noise_model" == part] for part in parts}
        whole = [file for file in files if not file.expert]
        if not all(by_expert.values()):
            if not whole or len(parts) < 2:
                missing = next(part for part in parts if not by_expert[part])
                raise self._missing("denoiser", f"{_WORDS[missing]} of {kind}")
            yield "model", *self._choose("model", whole, kind)
            return
        groups = [{file.own_words for file in of_expert} for of_expert in by_expert.values()]
        if shared := set.intersection(*groups):
            by_expert = {part: [one for one in of if one.own_words in shared] for part, of in by_expert.items()}
        formats = set.intersection(*({file.format for file in of_expert} for of_expert in by_expert.values()))
        for part, of_expert in by_expert.items():
            pairs = [file for file in of_expert if file.format in formats]
            yield part, *self._choose(part, pairs or of_expert, kind, among=len(of_expert))

    def _choose(self, part: str, files: Sequence[_File], what: str, among: int = 0) -> tuple[_File, str]:
        """The file that is meant, and why. Raises UserError."""
        if not files:
            raise self._missing(part if part in _FOLDERS else "denoiser", what)
        fit = [file for file in files if not file.own_words] or list(files)
        if len({file.own_words for file in fit}) == 1:
            best = max(file.rank for file in fit)
            fit = [file for file in fit if file.rank == best]
        if len(fit) > 1:
            shown = ", ".join(file.shown for file in fit[:4]) + (" and more" if len(fit) > 4 else "")
            raise UserError(
                f"`comfy_dir` {self.root}: {shown} may each be the {_WORDS[part]}; name one with `{_SETTING[part]}`"
            )
        count = max(among, len(files))
        return fit[0], "" if count == 1 else f", of {count} that fit the one nearest to the released weights"

    def _chosen(self, part: str, file: _File, why: str) -> Found:
        both = " for both experts" if part == "model" and file.size != 48 else ""
        distilled = ", distilled by its name" if file.weights.is_distilled else ""
        return Found(part, file.path, f"`comfy_dir`: {_WORDS[part]}{both} {file.shown}{why}{distilled}")

    def _tokenizer(self, encoder: _File | None, encoders: Sequence[_File]) -> Found:
        for file in ([encoder] if encoder else []) + sorted(encoders, key=lambda one: one.path):
            if has_vocabulary(file.path):
                return Found("tokenizer", file.path, f"`comfy_dir`: tokenizer in {file.shown}")
        raise UserError(
            f"`comfy_dir` {self.root}: no text encoder carries its tokenizer, as Comfy-Org's and city96's do; give "
            "`ckpt_dir` with the folder google/umt5-xxl of a Wan2.2 checkpoint"
        )

    def _missing(self, part: str, what: str) -> UserError:
        looked = ", ".join((*_FOLDERS[part], _BUNDLES))
        unfit = self._unfit.get(part, [])
        why = f"; {unfit[0]}" + (f" (and {len(unfit) - 1} more do not fit)" if unfit[1:] else "") if unfit else ""
        return UserError(f"`comfy_dir` {self.root}: no {what} in {looked}{why}")

    @cached_property
    def _denoisers(self) -> list[_File]:
        def check(weights: Weights) -> int:
            check_denoiser(weights)
            return int(infer_config(weights)["in_channels"])

        def opened(file: Path) -> Weights:
            beside = next((folder for folder in self._configs if (folder / "config.json").is_file()), None)
            return open_denoiser(file, beside)

        files = self._files("denoiser", opened, check)
        return [file for file in files if not _OLDER.search(file.path.name.lower())]

    @cached_property
    def _vaes(self) -> list[_File]:
        from wan.vae.vae import WanVAE

        # other models' VAEs have these shapes, too, and only their names tell
        files = self._files("vae", lambda file: open_part(file, "vae"), WanVAE.check)
        return [file for file in files if not file.own_words or "wan" in file.shown.lower()]

    @cached_property
    def _encoders(self) -> list[_File]:
        return self._files("text_encoder", lambda file: open_part(file, "text_encoder"), TextEncoder.check)

    def _files(self, part: str, opened: Callable[[Path], Weights], check: Callable[[Weights], int]) -> list[_File]:
        """The files that fit a part; those of several parts only where there is no other."""
        for folders in (_FOLDERS[part], (_BUNDLES,)):
            described = []
            for path in self._walk(folders):
                try:
                    weights = opened(path)
                    size = check(weights)
                except UserError as error:
                    if _OURS[part] in path.name.lower():
                        self._unfit.setdefault(part, []).append(error.marked)
                    continue
                described.append(self._described(part, path, weights, size))
            if described:
                return described
        return []

    def _described(self, part: str, path: Path, weights: Weights, size: int) -> _File:
        types = Counter[str]()
        for key, kind in stored_types(weights).items():
            types[kind] += math.prod(weights.shapes[key])
        bits = round(8 * path.stat().st_size / max(1, types.total()), 1)
        plain = re.sub(rf"{_RELEASED[part]}|{_FORMATS}|{_PACKERS}", " ", path.stem.lower())
        own_words = tuple(sorted(set(re.findall(r"[^\W_]+", plain))))
        shown = path.relative_to(self.root)
        expert = next((one for name in (path.stem, *map(str, shown.parts[-2::-1])) if (one := _expert(name))), "")
        common = types.most_common(1)
        return _File(path, readable(shown), weights, size, bits, common[0][0] if common else "", own_words, expert)

    def _walk(self, folders: Sequence[str]) -> Iterator[Path]:
        seen: set[Path] = set()
        for folder in folders:
            for place, below, names in os.walk(self.root / folder, followlinks=True):
                if (real := Path(place).resolve()) in seen:
                    below.clear()  # a link back
                    continue
                seen.add(real)
                below.sort()
                for path in (Path(place, name) for name in sorted(names)):
                    is_file = path.suffix.lower() in (".safetensors", ".gguf") and path.is_file()
                    if is_file and (real := path.resolve()) not in seen:
                        seen.add(real)
                        yield path


def _expert(name: str) -> str:
    """ "high" or "low", where a name says one of them."""
    experts = experts_named(name)
    return experts.pop() if len(experts) == 1 else ""


def as_settings(parts: Sequence[Found]) -> dict[str, Any]:
    """What was found, by the settings that name it; a tokenizer has none."""
    return {_SETTING[one.part]: str(one.file) for one in parts if one.part in _SETTING}
