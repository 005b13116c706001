"""A checkpoint folder -> weights by part. Official or diffusers layout, told apart by their files; strict keys.

Nothing here reads a tensor until a model is filled: opening a folder looks at file lists and headers only, so that a
wrong folder, a missing shard or a truncated file is said in one line before any loading starts.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from wan.configs import ModelConfig
from wan.errors import UserError
from wan.options import EXPERT_OF_DIT
from wan.weights.hub import unreachable
from wan.weights.single_file import SUFFIXES, check_expert, has_vocabulary, open_denoiser, open_part
from wan.weights.tensors import Shape, Weights, open_safetensors

# The folders of one part, in repositories of quantised models and in ComfyUI's own.
_FOLDERS = {"vae": ("vae",), "text_encoder": ("text_encoders", "text_encoder", "clip")}
_WORD = {"vae": "vae", "text_encoder": "t5"}

VLM_NAME = "InternVL3_5-8B"
VLM_HUB_ID = f"OpenGVLab/{VLM_NAME}"


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
    if "://" in str(name):
        raise UserError(f"{name} is an address; give a folder, or a hub id such as Wan-AI/Wan2.2-TI2V-5B")
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
        checkpoint = _open_diffusers(folder, experts, files)
    else:
        checkpoint = _open_official(folder, experts, names, files)
    widths = {name: _patch_embedding(weights)[0] for name, weights in checkpoint.experts.items()}
    if len(set(widths.values())) > 1:
        listed = " and ".join(f"{checkpoint.experts[name].path} of {width}" for name, width in widths.items())
        raise UserError(f"the experts are of different widths, {listed}; give two of one model")
    for name, weights in checkpoint.experts.items():
        channels = _patch_embedding(weights)[1]
        if channels == in_channels:
            continue
        if name in files:
            raise UserError(
                f"{weights.path} takes {channels} input channels, {kind_of(experts, in_channels)} is expected; "
                "give the file of that model"
            )
        raise UserError(
            f"{folder}: {name} is {kind_of(len(checkpoint.experts), channels)}, expected "
            f"{kind_of(experts, in_channels)}; give that checkpoint or the task that fits this one"
        )
    _check_vae(checkpoint)
    return checkpoint


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
            holds = kind_of(*identify(folder, names))
        except UserError:
            listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6])
            holds = f"no Wan2.2 checkpoint (files: {listed or 'none'})"
        complete = [part for part in wanted if part not in missing]
        if complete:
            settings = {parts[expert]: name for name, expert in EXPERT_OF_DIT.items() if expert in parts}
            raise UserError(
                f"{folder}: {complete[0]} is there and {missing[0]} is not, the download is not complete; run it again "
                f"(it goes on where it stopped), or give that expert's file with `{settings[missing[0]]}`"
            )
        where = " and ".join(part for part in missing if part != ".") or "the folder itself"
        raise UserError(f"{folder}: expected diffusion_pytorch_model*.safetensors in {where}, found {holds}")
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
            taken = " and ".join(settings[expert] for expert in settings if expert in parts)
            raise UserError(f"{setting} is not for this model, which takes {taken}")


def _open_named(file: Path, part: str, files: Mapping[str, Path]) -> Weights:
    """A part from its own file, by its official name, that name as safetensors, or the names of other publishers."""
    if part in files:
        return open_part(files[part], part)
    candidates, word = _named(file, part), _WORD[part]
    if len(candidates) > 1:
        raise UserError(
            f"{file.parent}: {' and '.join(one.name for one in candidates[:3])} may each be the {word.upper()}; "
            f"name one with `{word}`"
        )
    if not candidates:
        raise UserError(
            f"{file.parent}: expected {file.name}, found no such file, nor one as .safetensors; name it with `{word}`"
        )
    return open_part(candidates[0], part)


def _named(file: Path, part: str) -> list[Path]:
    """The files that a part may be: the one of its official name, that name as safetensors, or what bears its word."""
    for name in (file, file.with_suffix(".safetensors")):
        if name.is_file():
            return [name]
    folders = [file.parent, *(one for one in file.parent.iterdir() if one.name.lower() in _FOLDERS[part])]
    ends = {end for end in SUFFIXES[part] if end != ".pth"}
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
    parts = {part for part, place in places.items() if list((folder / place).glob("diffusion_pytorch_model*"))}
    parts |= {part for part in ("vae", "text_encoder") if _named(folder / getattr(names, part), part)}
    return parts | ({"tokenizer"} if (folder / names.tokenizer).is_dir() else set())


def _check_vae(checkpoint: Checkpoint) -> None:
    """Raise UserError for a VAE whose pixels or latents are not those of the denoisers."""

    def side(weights: Weights, names: Sequence[str], axis: int) -> int:
        return next((weights.shapes[name][axis] for name in names if name in weights.shapes), 0)

    vae = checkpoint.vae
    into = side(vae, ("encoder.conv1.weight", "encoder.conv_in.weight"), 1)
    out = side(vae, ("decoder.head.2.weight", "decoder.conv_out.weight"), 0)
    if into != out:
        raise UserError(
            f"{vae.path} takes {into} channels and makes {out}, as VAEs that enlarge do; give the one that belongs to "
            "the model"
        )
    latents = side(vae, ("conv2.weight", "post_quant_conv.weight"), 0)
    for weights in checkpoint.experts.values():
        rows = side(weights, ("head.head.weight", "proj_out.weight"), 0)
        expected = rows // math.prod(_patch_embedding(weights)[2:])
        if latents and expected and latents != expected:
            raise UserError(
                f"{vae.path} has {latents} latent channels, the denoiser {weights.path} has {expected}; give the VAE "
                "that belongs to it"
            )


def _patch_embedding(weights: Weights) -> Shape:
    shape = weights.shapes.get("patch_embedding.weight")
    if shape is None or len(shape) != 5:
        raise UserError(f"{weights.path} is no Wan denoiser: it has no patch_embedding.weight with five dimensions")
    return shape
