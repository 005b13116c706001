"""A checkpoint folder -> weights by part. Official or diffusers layout, told apart by their files; strict keys.

A denoiser may also come from one file by itself, as quantized ones are published: safetensors with scaled fp8, GGUF.

Nothing here reads a tensor until a model is filled: opening a folder looks at file lists and headers only, so that a
wrong folder, a missing shard or a truncated file is said in one line before any loading starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from wan.configs import ModelConfig
from wan.detail import tell_detail
from wan.errors import UserError
from wan.files import unreadable
from wan.foreign import read_json, shards
from wan.options import EXPERT_OF_DIT
from wan.weights.gguf_files import GGUF_TYPES, open_gguf, read_gguf_fields
from wan.weights.hub import unreachable
from wan.weights.prefetch import ReadAhead
from wan.weights.pth import OtherPickleError, StoredTensor, pth_header

if TYPE_CHECKING:
    from torch import Tensor

    from wan.weights.quantized import QuantizedTensor

Shape = tuple[int, ...]

VLM_NAME = "InternVL3_5-8B"
VLM_HUB_ID = f"OpenGVLab/{VLM_NAME}"

VOCABULARY = "spiece_model"  # sentencepiece's model as a tensor, in ComfyUI's text encoders
VOCABULARY_OF_GGUF = tuple(
    f"tokenizer.ggml.{name}" for name in ("model", "tokens", "scores", "token_type", "precompiled_charsmap")
)
# What may stand before the names of each part in a file of its own, or in one that holds several parts (ComfyUI).
_PREFIXES = {
    "denoiser": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae.", "model."),
    "text_encoder": ("text_encoders.umt5xxl.transformer.", "cond_stage_model.transformer.", "transformer."),
}
# By which tensor a part is known; official and library's names.
_KNOWN_BY = {
    "denoiser": ("patch_embedding.weight",),
    "vae": ("decoder.conv1.weight", "decoder.conv_in.weight"),
    "text_encoder": ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight", "token_embd.weight"),
}
# The folders of one part, in repositories of quantised models and in ComfyUI's own.
_FOLDERS = {"vae": ("vae",), "text_encoder": ("text_encoders", "text_encoder", "clip")}
_WORD = {"vae": "vae", "text_encoder": "t5"}
_SUFFIXES = {"vae": (".safetensors", ".pth"), "text_encoder": (".safetensors", ".pth", ".gguf")}
# What the fp8 files of ComfyUI, its converters and lightx2v hold beside the weights: the factor of a weight; and what
# is for products in fp8 alone (the scale of the inputs) or repeats what the dtypes say.
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = re.compile(r"(?:.*\.)?(?:scaled_fp8|spiece_model)|.*\.(?:scale_input|input_scale|comfy_quant)")
# Other words after high or low, as in low_poly and high-kick, say something else.
_EXPERT = re.compile(
    r"(?<![a-z])(high|low)(?=[ _.-]*(?:noise|expert|model|lora|rank|wan|svi|lightx2v|lightning|distill|rapid|scaled"
    r"|comfy|pro(?![a-z])|steps?(?![a-z])|epoch|[ait]2v|a?14b|fp\d|bf16|i?q\d|[evr]?\d|$))"
)
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # dtypes of safetensors and GGUF files
_DISTILLED = re.compile(r"rapid|lightning|lightx2v|distill|turbo|(?<![a-z0-9])[48][ _-]?steps?(?![a-z])")
_RELEASED_HEAD = 128  # the width of an attention head in every released model (source: the official configs)


@dataclass(frozen=True)
class Weights:
    """The tensors of one model: the files that hold them, and their shapes, read from headers."""

    path: Path  # the folder or file to name in messages
    files: tuple[Path, ...]
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]  # the config.json beside them, or what the header of a single file says; may be empty
    expert: str = ""  # which of a checkpoint's experts they are
    prefix: str = ""  # what stands before the keys in the file
    scales: Mapping[str, str] = field(default_factory=dict)  # the name in the file of a key's scale

    def stored_dtypes(self) -> dict[str, str]:
        """The name of the dtype in which the files hold each tensor that is plain there."""
        found: dict[str, str] = {}
        for file in self.files:
            if file.suffix == ".pth":
                found |= {name: tensor.dtype for name, tensor in _pth_tensors(file).items()}
            elif file.suffix.lower() == ".safetensors":
                found |= {name: _PLAIN[kind] for name, kind in _safetensors_dtypes(file).items() if kind in _PLAIN}
        return {key: found[name] for key in self.shapes if (name := self.prefix + key) in found}

    @property
    def is_distilled(self) -> bool:
        """Whether the name of a denoiser's own file says that it needs few steps and no guidance."""
        return self.path.is_file() and _DISTILLED.search(self.path.name.lower()) is not None

    def place_of(self, key: str) -> str:
        """The file in which a tensor is, with the expert that it is for; for messages."""
        from wan.weights.tensors import read_tensors

        name = self.prefix + key
        file = next(file for file in self.files if any(read_tensors(file, {name})))
        return f"{file} ({self.expert})" if self.expert else str(file)

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Every tensor in turn, mapped from its file while the next file is read; one file is open at a time."""
        with ReadAhead(self.files) as ahead:
            yield from self.read(self.shapes, ahead)

    def read(
        self, keys: Container[str], ahead: ReadAhead | None = None
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Those of the tensors that are named, in the order of the files; what is quantized there stays so."""
        from wan.weights.tensors import read_quantized, read_tensors

        key_of = {self.prefix + key: key for key in self.shapes if key in keys}
        scale_of = {name: self.scales[key] for name, key in key_of.items() if key in self.scales}
        beside = self.files if scale_of else ()
        scales = {name: value for file in beside for name, value in read_tensors(file, set(scale_of.values()))}
        for number, file in enumerate(self.files):
            if ahead is not None:
                ahead.begin(number)
                if len(self.files) > 1:
                    tell_detail(f"shard {number + 1} of {len(self.files)}")
            for name, value in read_quantized(file, key_of, {name: scales[key] for name, key in scale_of.items()}):
                yield key_of[name], value


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder. `experts` is {"model": …} or {"low_noise_model": …, "high_noise_model": …}."""

    folder: Path
    experts: Mapping[str, Weights]
    vae: Weights
    text_encoder: Weights
    tokenizer: Path  # its folder, or a text encoder's file that carries it

    @property
    def parts(self) -> list[tuple[str, Weights]]:
        """The models by name, in the order in which a clip uses them: high noise first."""
        return [("text_encoder", self.text_encoder), ("vae", self.vae), *sorted(self.experts.items())]

    @property
    def single(self) -> bool:
        """Whether one denoiser serves both experts."""
        return len(self.experts) == 2 and len({weights.path for weights in self.experts.values()}) == 1


@dataclass(frozen=True)
class Names:
    """What the parts are called in the official layout."""

    low_noise: str = "low_noise_model"
    high_noise: str = "high_noise_model"
    vae: str = "Wan2.1_VAE.pth"
    text_encoder: str = "models_t5_umt5-xxl-enc-bf16.pth"
    tokenizer: str = "google/umt5-xxl"

    @classmethod
    def of(cls, config: ModelConfig) -> Names:
        """Those of a model."""
        return cls(
            low_noise=config.low_noise_checkpoint,
            high_noise=config.high_noise_checkpoint,
            vae=config.vae_checkpoint,
            text_encoder=config.t5_checkpoint,
            tokenizer=config.t5_tokenizer,
        )


def resolve_folder(name: str | Path, files: Container[str] = ()) -> Path:
    """A folder as it is; a hub id ("owner/name") through the hub's client and cache. Raises UserError.

    `files` are the experts, "vae" and "text_encoder" that come from elsewhere and are not downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; a checkpoint is a folder (or a hub id such as Wan-AI/Wan2.2-TI2V-5B)")
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0].startswith((".", "~")):
        raise UserError(f"checkpoint folder {name} does not exist")
    from huggingface_hub import snapshot_download

    places = {
        "model": ("diffusion_pytorch_model*", "transformer/*.safetensors"),
        "high_noise_model": ("high_noise_model/*.safetensors", "transformer/*.safetensors"),
        "low_noise_model": ("low_noise_model/*.safetensors", "transformer_2/*.safetensors"),
    }
    places["vae"] = ("*VAE.pth", "vae/*.safetensors")
    places["text_encoder"] = ("models_t5*.pth", "text_encoder/*.safetensors")
    spared = [pattern for part, patterns in places.items() if part in files for pattern in patterns]
    try:
        return Path(snapshot_download(str(name), ignore_patterns=spared or None))
    except unreachable() as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is no folder here, and as a hub id it cannot be downloaded: {reason}") from error


def open_checkpoint(
    folder: Path, *, in_channels: int, experts: int, names: Names, files: Mapping[str, Path] = MappingProxyType({})
) -> Checkpoint:
    """The checkpoint in `folder`, checked to be whole and to be the model that is asked for.

    `in_channels` are the denoiser's input channels, `experts` 1 or 2. `files` are denoisers, by expert, and "vae" and
    "text_encoder", that come from a file of their own in place of the folder's; a "model" serves both of two experts.
    A "tokenizer" is a folder, or a text encoder's file that carries it.
    Raises UserError that names the folder or file, what was expected and what was found.
    """
    single = files.get("model") if experts == 2 else None
    if single is not None and not files.keys() & {"high_noise_model", "low_noise_model"}:
        both = dict.fromkeys(("high_noise_model", "low_noise_model"), single)
        files = {name: file for name, file in files.items() if name != "model"} | both
    if (folder / "model_index.json").is_file():
        found = _open_diffusers(folder, experts, files)
    else:
        found = _open_official(folder, experts, names, files)
    widths = {name: _patch_embedding(weights)[0] for name, weights in found.experts.items()}
    if len(set(widths.values())) > 1:
        said = " and ".join(f"{found.experts[name].path} of {width}" for name, width in widths.items())
        raise UserError(f"the experts are of different widths, {said}; give two of one model")
    for name, weights in found.experts.items():
        channels = _patch_embedding(weights)[1]
        if channels == in_channels:
            continue
        if name in files:
            raise UserError(
                f"{weights.path} takes {channels} input channels, {kind_of(experts, in_channels)} is expected; "
                "give the file of that model"
            )
        raise UserError(
            f"{folder}: {name} is {kind_of(len(found.experts), channels)}, expected "
            f"{kind_of(experts, in_channels)}; give that checkpoint or the task that fits this one"
        )
    _check_vae(found)
    return found


def kind_of(experts: int, channels: int) -> str:
    """What a denoiser with this many experts and input channels is called."""
    known = {(2, 36): "I2V-A14B", (2, 16): "T2V-A14B", (1, 48): "TI2V-5B"}
    return f"{known.get((experts, channels), 'an unknown model')} ({experts} expert(s), {channels} input channels)"


def identify(folder: Path, names: Names) -> tuple[int, int]:
    """(experts, input channels) of the checkpoint in `folder`. Raises UserError when it holds no Wan denoiser."""
    diffusers = (folder / "model_index.json").is_file()
    candidates = (
        ((2, "transformer_2"), (1, "transformer"))
        if diffusers
        else ((2, names.low_noise), (2, names.high_noise), (1, "."))
    )
    for experts, part in candidates:
        if list((folder / part).glob("diffusion_pytorch_model*.safetensors*")):
            return experts, _patch_embedding(open_safetensors(folder / part, "diffusion_pytorch_model"))[1]
    raise UserError(
        f"{folder} holds no Wan2.2 checkpoint: neither {names.low_noise}/ nor diffusion_pytorch_model files"
    )


def default_vlm(checkpoint: Path) -> str:
    """The folder InternVL3_5-8B in or beside the checkpoint folder, else the hub id."""
    # beside a link to the checkpoint, and beside the checkpoint itself
    for folder in (checkpoint, checkpoint.absolute().parent, checkpoint.resolve().parent):
        if (folder / VLM_NAME).is_dir():
            return str(folder / VLM_NAME)
    return VLM_HUB_ID


def listing(what: str, keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    if not ordered:
        return ""
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{what} {', '.join(ordered[:3])}{more}"


def identify_files(files: Mapping[str, Path]) -> tuple[int, int]:
    """(experts, input channels) of denoisers in files of their own, by expert. Raises UserError."""
    channels = {_patch_embedding(open_denoiser(file))[1] for file in files.values()}
    if len(channels) > 1:
        raise UserError(f"{' and '.join(map(str, files.values()))} are not of one model; give two of one model")
    return (1 if "model" in files else 2), channels.pop()


def _open_official(folder: Path, experts: int, names: Names, files: Mapping[str, Path]) -> Checkpoint:
    parts = (
        {"low_noise_model": names.low_noise, "high_noise_model": names.high_noise} if experts == 2 else {"model": "."}
    )
    _check_names(files, parts)
    wanted = [part for expert, part in parts.items() if expert not in files]
    missing = [part for part in wanted if not list((folder / part).glob("diffusion_pytorch_model*"))]
    if missing:
        try:
            found = kind_of(*identify(folder, names))
        except UserError:
            listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6])
            found = f"no Wan2.2 checkpoint (files: {listed or 'none'})"
        there = [part for part in wanted if part not in missing]
        if there:
            settings = {parts[expert]: name for name, expert in EXPERT_OF_DIT.items() if expert in parts}
            raise UserError(
                f"{folder}: {there[0]} is there and {missing[0]} is not, the download is not complete; run it again "
                f"(it goes on where it stopped), or give that expert's file with `{settings[missing[0]]}`"
            )
        where = " and ".join(part for part in missing if part != ".") or "the folder itself"
        raise UserError(f"{folder}: expected diffusion_pytorch_model*.safetensors in {where}, found {found}")
    opened = _open_experts(folder, parts, files)
    vae = _open_named(folder / names.vae, "vae", files)
    text_encoder = _open_named(folder / names.text_encoder, "text_encoder", files)
    tokenizer = files.get("tokenizer", folder / names.tokenizer)
    if not tokenizer.exists():
        if not has_vocabulary(text_encoder.path):
            raise UserError(
                f"{folder}: expected the tokenizer folder {names.tokenizer}, found none, and {text_encoder.path.name} "
                "does not carry one"
            )
        tokenizer = text_encoder.path
    return Checkpoint(folder, opened, vae, text_encoder, tokenizer)


def _open_diffusers(folder: Path, experts: int, files: Mapping[str, Path]) -> Checkpoint:
    # There, `transformer` is the high-noise expert and `transformer_2` the low-noise one.
    if experts == 2:
        parts = {"low_noise_model": "transformer_2", "high_noise_model": "transformer"}
    else:
        parts = {"model": "transformer"}
    _check_names(files, parts)
    wanted = [part for expert, part in parts.items() if expert not in files]
    wanted += [part for part in ("vae", "text_encoder", "tokenizer") if part not in files]
    missing = [part for part in wanted if not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"{folder} (diffusers layout): expected the folders {', '.join(wanted)}, missing {', '.join(missing)}"
        )
    if experts == 1 and list((folder / "transformer_2").glob("*.safetensors")):
        raise UserError(f"{folder}: expected one expert, found two (transformer and transformer_2)")
    return Checkpoint(
        folder,
        _open_experts(folder, parts, files),
        open_part(files["vae"], "vae")
        if "vae" in files
        else open_safetensors(folder / "vae", "diffusion_pytorch_model"),
        open_part(files["text_encoder"], "text_encoder")
        if "text_encoder" in files
        else open_safetensors(folder / "text_encoder", "model"),
        files.get("tokenizer", folder / "tokenizer"),
    )


def _open_experts(folder: Path, parts: Mapping[str, str], files: Mapping[str, Path]) -> dict[str, Weights]:
    opened = {}
    given = [files[name] for name in parts if name in files]
    single = len(given) == 2 and given[0] is given[1]
    for name, part in parts.items():
        if name in files:
            if not single:
                check_expert("", files[name], name, "dit")
            opened[name] = open_denoiser(files[name], folder / part)
        else:
            opened[name] = open_safetensors(folder / part, "diffusion_pytorch_model")
    if not single and len(set(map(Path.resolve, given))) < len(given):
        raise UserError(f"{files['high_noise_model']} is given for both experts; give each its own file")
    return {name: replace(weights, expert="" if single else name) for name, weights in opened.items()}


def _check_names(files: Container[str], parts: Container[str]) -> None:
    settings = {expert: f"`{name}`" for name, expert in EXPERT_OF_DIT.items()}
    for name, setting in settings.items():
        if name in files and name not in parts:
            there = " and ".join(settings[expert] for expert in settings if expert in parts)
            raise UserError(f"{setting} is not for this model, which takes {there}")


def check_expert(what: str, path: Path, expert: str, setting: str) -> None:
    """Raise UserError for a file whose name says high or low, and not both, and says the wrong one.

    `what` goes before the path in the message; `setting` is the one that ends in _high or _low.
    """
    asked = expert.removesuffix("_noise_model")
    said = experts_named(path.stem)
    if asked in ("high", "low") and len(said) == 1 and asked not in said:
        word = said.pop()
        raise UserError(
            f"{what}{path} is for the {word}-noise expert by its name, and is given for {asked} noise; "
            f"give it with `{setting}_{word}`, or rename it if that is not meant"
        )


def experts_named(name: str) -> set[str]:
    """Which of "high" and "low" a name says of experts."""
    return set(_EXPERT.findall(name.lower()))


def stored_types(weights: Weights) -> dict[str, str]:
    """How each tensor is stored in a GGUF or safetensors file, in the words of its format."""
    found: dict[str, str] = {}
    for file in weights.files:
        found |= open_gguf(file).types if file.suffix.lower() == ".gguf" else _safetensors_dtypes(file)
    return {key: found[weights.prefix + key] for key in weights.shapes}


def open_denoiser(file: Path, beside: Path | None = None) -> Weights:
    """A denoiser from one file: GGUF, or safetensors in fp8 with or without scales, or in any float.

    Its names are the official ones or diffusers', with or without the prefix of ComfyUI. `beside` is the folder whose
    config.json says what no shape tells; without one the heads are as wide as in the released models. Raises
    UserError for a file that is broken, is no Wan denoiser, or is of another size than the configuration.
    """
    weights, kinds, what, known = _open_single(file, "denoiser", (".gguf", ".safetensors"))
    shapes = _with_lost_dimensions(weights.shapes)
    if len(shapes.get("patch_embedding.weight", ())) != 5:
        raise UserError(f"{file} is no Wan denoiser: {what} without a patch_embedding.weight of five dimensions")
    if kinds:
        name, kind = next(iter(kinds.items()))
        raise UserError(f"{file}: {name} is stored as {kind}, which cannot be read; there is {known}")
    config = read_json(beside / "config.json") if beside and (beside / "config.json").is_file() else {}
    width = shapes["patch_embedding.weight"][0]
    there = config.get("dim", width)
    if there != width:
        raise UserError(f"{file} is of a model of width {width}, {beside} is of one of width {there}; give one for it")
    if not config.keys() & {"num_heads", "num_attention_heads"}:
        if width % _RELEASED_HEAD and beside is not None:
            raise UserError(f"{file} does not say how many heads there are; put its model's config.json into {beside}")
        config = {**config, "num_heads": width // _RELEASED_HEAD}
    return replace(weights, shapes=shapes, config=config)


def open_part(file: Path, part: str) -> Weights:
    """The "vae" or "text_encoder" from a file of its own: .pth, safetensors in any float or in fp8 with scales.

    A text encoder may be GGUF, too. Of a file that holds several parts, this one. Raises UserError.
    """
    word = {"vae": "VAE", "text_encoder": "text encoder"}[part]
    if file.suffix.lower() == ".pth":
        weights, kinds, known = _open_pth(file), dict[str, str](), ""
    else:
        weights, kinds, _, known = _open_single(file, part, _SUFFIXES[part])
    if not any(name in weights.shapes for name in _KNOWN_BY[part]):
        raise UserError(f"{file} is no {word} of Wan: it has no {_KNOWN_BY[part][0]}")
    if kinds:
        name, kind = next(iter(kinds.items()))
        raise UserError(f"{file}: {name} is stored as {kind}, which cannot be read; there is {known}")
    beside = file.with_name("config.json")  # of diffusers, which has the statistics of the latents
    if file.stem == "diffusion_pytorch_model" and beside.is_file():
        return replace(weights, config=read_json(beside))
    return weights


def _open_single(file: Path, part: str, suffixes: Sequence[str]) -> tuple[Weights, dict[str, str], str, str]:
    """One part from one file; what of it is stored in a form that cannot be read, what the file is, and what can be."""
    if not file.is_file():
        raise UserError(f"{file} {'is a folder; name the file in it' if file.is_dir() else 'does not exist'}")
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        whose = {"denoiser": "a denoiser", "vae": "a VAE", "text_encoder": "a text encoder"}[part]
        raise UserError(f"{file} is no {' or '.join(suffixes)} file; {whose} of its own is one of them")
    if suffix == ".gguf":
        header = open_gguf(file)
        shapes, what = dict(header.shapes), f"a GGUF file of the architecture {header.architecture}"
        kinds, readable = dict(header.types), (*GGUF_TYPES, *_PLAIN)
        scales, known = {}, ", ".join(GGUF_TYPES)
    else:
        shapes, kinds = dict(_safetensors_shapes(file)), _safetensors_dtypes(file)
        shapes, what = {name: shape for name, shape in shapes.items() if not _BESIDE.fullmatch(name)}, "a file"
        scales = {name: name.removesuffix(end) + ".weight" for end in _SCALES for name in shapes if name.endswith(end)}
        scales = {key: name for name, key in scales.items() if key in shapes}
        for key, name in scales.items():
            if math.prod(shapes.pop(name)) not in (1, *shapes[key][:1]):
                raise UserError(f"{file}: {name} is no scale of a tensor or of its rows; give scaled fp8 or GGUF")
        readable, known = (*_PLAIN, "F8_E4M3", "F8_E5M2"), "scaled fp8"
    found = (prefix for prefix in _PREFIXES[part] if any(prefix + name in shapes for name in _KNOWN_BY[part]))
    prefix = next(found, "")
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    kinds = {name: kind for name, kind in kinds.items() if name.removeprefix(prefix) in shapes and kind not in readable}
    scales = {key.removeprefix(prefix): name for key, name in scales.items() if key.startswith(prefix)}
    return Weights(file, (file,), shapes, {}, prefix=prefix, scales=scales), kinds, what, known


def _with_lost_dimensions(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a denoiser as the model has them; writers of GGUF drop a leading 1 or fold dimensions."""
    found = {
        name: (1, *shape) if len(shape) == 2 and name.endswith(("modulation", "scale_shift_table")) else shape
        for name, shape in shapes.items()
    }
    patch, width = shapes.get("patch_embedding.weight", ()), shapes.get("patch_embedding.bias", (0,))[0]
    if len(patch) == 4 and width and patch[0] % width == 0:  # stable-diffusion.cpp: [D * channels, 1, 2, 2]
        found["patch_embedding.weight"] = (width, patch[0] // width, *patch[1:])
    return found


def _open_named(file: Path, part: str, files: Mapping[str, Path]) -> Weights:
    """A part from its own file, by its official name, that name as safetensors, or the names of other publishers."""
    if part in files:
        return open_part(files[part], part)
    found, word = _named(file, part), _WORD[part]
    if len(found) > 1:
        raise UserError(
            f"{file.parent}: {' and '.join(one.name for one in found[:3])} may each be the {word.upper()}; "
            f"name one with `{word}`"
        )
    if not found:
        raise UserError(
            f"{file.parent}: expected {file.name}, found no such file, nor one as .safetensors; name it with `{word}`"
        )
    return open_part(found[0], part)


def _named(file: Path, part: str) -> list[Path]:
    """The files that a part may be: the one of its official name, that name as safetensors, or what bears its word."""
    for own in (file, file.with_suffix(".safetensors")):
        if own.is_file():
            return [own]
    folders = [file.parent, *(one for one in file.parent.iterdir() if one.name.lower() in _FOLDERS[part])]
    ends = {end for end in _SUFFIXES[part] if end != ".pth"}
    return [
        one
        for folder in folders
        for one in sorted(folder.iterdir() if folder.is_dir() else ())
        if one.suffix.lower() in ends and _WORD[part] in one.name.lower()
    ]


def parts_in(folder: Path, names: Names) -> set[str]:
    """Which parts a folder holds, by its file names: experts, "vae", "text_encoder" and "tokenizer"."""
    if (folder / "model_index.json").is_file():
        two = (folder / "transformer_2").is_dir()
        places = {"high_noise_model" if two else "model": "transformer", "low_noise_model": "transformer_2"}
        places |= {part: part for part in ("vae", "text_encoder", "tokenizer")}
        return {part for part, place in places.items() if (folder / place).is_dir()}
    places = {"model": ".", "low_noise_model": names.low_noise, "high_noise_model": names.high_noise}
    found = {part for part, place in places.items() if list((folder / place).glob("diffusion_pytorch_model*"))}
    found |= {part for part in ("vae", "text_encoder") if _named(folder / getattr(names, part), part)}
    return found | ({"tokenizer"} if (folder / names.tokenizer).is_dir() else set())


def _check_vae(found: Checkpoint) -> None:
    """Raise UserError for a VAE whose pixels or latents are not those of the denoisers."""

    def side(weights: Weights, names: Sequence[str], axis: int) -> int:
        return next((weights.shapes[name][axis] for name in names if name in weights.shapes), 0)

    vae = found.vae
    into = side(vae, ("encoder.conv1.weight", "encoder.conv_in.weight"), 1)
    out = side(vae, ("decoder.head.2.weight", "decoder.conv_out.weight"), 0)
    if into != out:
        raise UserError(
            f"{vae.path} takes {into} channels and makes {out}, as VAEs that enlarge do; give the one that belongs to "
            "the model"
        )
    latents = side(vae, ("conv2.weight", "post_quant_conv.weight"), 0)
    for weights in found.experts.values():
        rows = side(weights, ("head.head.weight", "proj_out.weight"), 0)
        expected = rows // math.prod(_patch_embedding(weights)[2:])
        if latents and expected and latents != expected:
            raise UserError(
                f"{vae.path} has {latents} latent channels, the denoiser {weights.path} has {expected}; give the VAE "
                "that belongs to it"
            )


def has_vocabulary(file: Path) -> bool:
    """Whether a text encoder's file carries its vocabulary; only the head is read. Raises UserError."""
    if file.suffix.lower() == ".gguf":
        return read_gguf_fields(file, VOCABULARY_OF_GGUF[:1]) == ["t5"]
    if file.suffix.lower() != ".safetensors":
        return False
    return any(name == VOCABULARY for name, _ in _safetensors_shapes(file))


def open_safetensors(folder: Path, stem: str) -> Weights:
    """A folder of `stem.safetensors`, or of shards with their index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        said = read_json(index)
        files = tuple(folder / name for name in shards(said, index))
        listed = said["weight_map"]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{folder}: {len(absent)} of {len(files)} shards are missing ({', '.join(absent[:3])})")
    elif single.is_file():
        listed, files = None, (single,)
    else:
        raise UserError(f"{folder}: expected {single.name} or {index.name}, found neither")
    shapes = {key: shape for file in files for key, shape in _safetensors_shapes(file)}
    if listed is not None and shapes.keys() != listed.keys():
        difference = listing("in one only", shapes.keys() ^ listed.keys())
        raise UserError(f"{folder}: the shards and {index.name} disagree ({difference})")
    config = folder / "config.json"
    return Weights(folder, files, shapes, read_json(config) if config.is_file() else {})


def open_file(file: Path) -> Weights:
    """One safetensors file by itself; its `config` is what the header says in words. Raises UserError."""
    shapes = dict(_safetensors_shapes(file))
    with safe_open(file, framework="numpy") as opened:
        return Weights(file, (file,), shapes, opened.metadata() or {})


def _open_pth(file: Path) -> Weights:
    if not file.is_file():
        raise UserError(f"{file.parent}: expected {file.name}, found no such file")
    return Weights(file, (file,), {key: one.shape for key, one in _pth_tensors(file).items()}, {})


def _pth_tensors(file: Path) -> Mapping[str, StoredTensor]:
    try:
        return pth_header(file)
    except OtherPickleError:
        from wan.weights.tensors import read_pth

        found = read_pth(file).items()
        return {key: StoredTensor(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in found}


def _safetensors_shapes(file: Path) -> Iterator[tuple[str, Shape]]:
    try:
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield key, tuple(opened.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def _safetensors_dtypes(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as opened:
        return {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118


def _patch_embedding(weights: Weights) -> Shape:
    shape = weights.shapes.get("patch_embedding.weight")
    if shape is None or len(shape) != 5:
        raise UserError(f"{weights.path} is no Wan denoiser: it has no patch_embedding.weight with five dimensions")
    return shape
