"""A checkpoint folder -> weights by part. Official or diffusers layout, told apart by their files; strict keys.

A denoiser may also come from one file by itself, as quantized ones are published: safetensors with scaled fp8, GGUF.

Nothing here reads a tensor until a model is filled: opening a folder looks at file lists and headers only, so that a
wrong folder, a missing shard or a truncated file is said in one line before any loading starts.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan.device.streaming import in_one_buffer
from wan.errors import UserError
from wan.files import read_json
from wan.options import EXPERT_OF_DIT
from wan.weights.hub import unreachable
from wan.weights.prefetch import ReadAhead
from wan.weights.quantized import (
    FLOAT8,
    GGUF_TYPES,
    PLAIN_TYPES,
    QuantizedLinear,
    QuantizedTensor,
    dequantize,
    open_gguf,
    read_gguf,
)

Shape = tuple[int, ...]

# What may stand before the names in a denoiser's own file.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# What the fp8 files of ComfyUI, its converters and lightx2v hold beside the weights: the factor of a weight; and what
# is for products in fp8 alone (the scale of the inputs) or repeats what the dtypes say.
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = re.compile(r"(?:.*\.)?scaled_fp8|.*\.(?:scale_input|input_scale|comfy_quant)")
_EXPERT = re.compile(r"(?<![a-z])(high|low)(?:noise|(?![a-z]))")
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

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which the files hold each tensor that is plain there."""
        found: dict[str, torch.dtype] = {}
        for file in self.files:
            if file.suffix == ".pth":
                found |= {name: tensor.dtype for name, tensor in _read_pth(file).items()}
            elif file.suffix.lower() == ".safetensors":
                found |= {
                    name: PLAIN_TYPES[kind] for name, kind in _safetensors_dtypes(file).items() if kind in PLAIN_TYPES
                }
        return {key: found[name] for key in self.shapes if (name := self.prefix + key) in found}

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Every tensor in turn, mapped from its file while the next file is read; one file is open at a time."""
        with ReadAhead(self.files) as ahead:
            yield from self.read(self.shapes, ahead)

    def read(
        self, keys: Container[str], ahead: ReadAhead | None = None
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Those of the tensors that are named, in the order of the files; what is quantized there stays so."""
        key_of = {self.prefix + key: key for key in self.shapes if key in keys}
        scale_of = {name: self.scales[key] for name, key in key_of.items() if key in self.scales}
        beside = self.files if scale_of else ()
        scales = {name: dequantize(value) for file in beside for name, value in _read(file, set(scale_of.values()))}
        for number, file in enumerate(self.files):
            if ahead is not None:
                ahead.begin(number)
            for name, value in _read(file, key_of):
                if isinstance(value, Tensor) and (name in scale_of or value.dtype in FLOAT8):
                    value = QuantizedTensor(value, scales[scale_of[name]] if name in scale_of else None)
                yield key_of[name], value


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder. `experts` is {"model": …} or {"low_noise_model": …, "high_noise_model": …}."""

    folder: Path
    experts: Mapping[str, Weights]
    vae: Weights
    text_encoder: Weights
    tokenizer: Path


@dataclass(frozen=True)
class Names:
    """What the parts are called in the official layout."""

    low_noise: str = "low_noise_model"
    high_noise: str = "high_noise_model"
    vae: str = "Wan2.1_VAE.pth"
    text_encoder: str = "models_t5_umt5-xxl-enc-bf16.pth"
    tokenizer: str = "google/umt5-xxl"


def resolve_folder(name: str | Path, denoisers: Container[str] = ()) -> Path:
    """A folder as it is; a hub id ("owner/name") through the hub's client and cache. Raises UserError.

    `denoisers` are those of the experts that come from elsewhere and are not downloaded.
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
    spared = [pattern for expert, patterns in places.items() if expert in denoisers for pattern in patterns]
    try:
        return Path(snapshot_download(str(name), ignore_patterns=spared or None))
    except unreachable() as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is no folder here, and as a hub id it cannot be downloaded: {reason}") from error


def open_checkpoint(
    folder: Path, *, in_channels: int, experts: int, names: Names, files: Mapping[str, Path] = MappingProxyType({})
) -> Checkpoint:
    """The checkpoint in `folder`, checked to be whole and to be the model that is asked for.

    `in_channels` are the denoiser's input channels, `experts` 1 or 2. `files` are denoisers, by expert, that come from
    a file of their own in place of the folder's. Raises UserError that names the folder or file, what was expected
    and what was found.
    """
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
    return found


def kind_of(experts: int, channels: int) -> str:
    """What a denoiser with this many experts and input channels is called."""
    known = {(2, 36): "I2V-A14B", (2, 16): "T2V-A14B", (1, 48): "TI2V-5B"}
    return f"{known.get((experts, channels), 'an unknown model')} ({experts} expert(s), {channels} input channels)"


def identify(folder: Path, names: Names) -> tuple[int, int]:
    """(experts, input channels) of the checkpoint in `folder`. Raises UserError when it holds no Wan denoiser."""
    diffusers = (folder / "model_index.json").is_file()
    candidates = ("transformer_2", "transformer") if diffusers else (names.low_noise, ".")
    for experts, part in zip((2, 1), candidates, strict=True):
        if list((folder / part).glob("diffusion_pytorch_model*.safetensors*")):
            return experts, _patch_embedding(open_safetensors(folder / part, "diffusion_pytorch_model"))[1]
    raise UserError(
        f"{folder} holds no Wan2.2 checkpoint: neither {names.low_noise}/ nor diffusion_pytorch_model files"
    )


def check_fit(model: nn.Module, weights: Weights, source_of: Mapping[str, str]) -> None:
    """Raise UserError for missing and extra keys and for wrong shapes; no tensor is read."""
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = [
        _listing("missing", [_name_in_file(name, source_of) for name in target.keys() - source_of.keys()]),
        _listing("missing", [key for key in source_of.values() if key not in weights.shapes]),
        _listing("unexpected", [key for name, key in source_of.items() if name not in target]),
        _listing("unexpected", weights.shapes.keys() - set(source_of.values())),
        _listing(
            "wrong shape",
            [
                f"{key} {weights.shapes[key]} instead of {target[name]}"
                for name, key in source_of.items()
                if key in weights.shapes and name in target and weights.shapes[key] != target[name]
            ],
        ),
    ]
    if any(problems):
        raise UserError(f"{weights.path} does not fit the model: {'; '.join(filter(None, problems))}")


def identify_files(files: Mapping[str, Path]) -> tuple[int, int]:
    """(experts, input channels) of denoisers in files of their own, by expert. Raises UserError."""
    channels = {_patch_embedding(open_denoiser(file))[1] for file in files.values()}
    if len(channels) > 1:
        raise UserError(f"{' and '.join(map(str, files.values()))} are not of one model; give two of one model")
    return (1 if "model" in files else 2), channels.pop()


def load_into(
    model: nn.Module,
    weights: Weights,
    source_of: Mapping[str, str],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    *,
    rounding: torch.dtype | None = None,
    stays_quantized: Callable[[str], bool] = lambda name: False,
    layers: str = "",
    mapped: bool = False,
) -> None:
    """Put the weights into a model that was built without memory, tensor by tensor, straight in their final dtype.

    `source_of` maps each parameter of the model to its key in the files, `dtype_of` says its dtype. `rounding` rounds
    every value through that dtype first. What is quantized in the file is expanded, but for the weights of
    linear layers that `stays_quantized` names. Each of the modules in the list `layers` gets one host buffer, as
    offloading wants it; `mapped` leaves in the file instead what it holds in its final dtype. Host memory never holds
    more than the model and one file.
    Raises UserError for missing and extra keys and for wrong shapes.
    """
    check_fit(model, weights, source_of)
    name_of: dict[str, str] = {}
    for name, key in source_of.items():
        name_of.setdefault(key, name)  # a tied tensor has two names; the caller ties the second
    mapped = mapped and device.type == "cpu" and rounding is None
    places = _places(model, layers, dtype_of) if layers and device.type == "cpu" and not mapped else {}
    for key, tensor in weights.tensors():
        name = name_of[key]
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if (
            isinstance(tensor, QuantizedTensor)
            and isinstance(module, nn.Linear)
            and leaf == "weight"
            and stays_quantized(name)
        ):
            model.set_submodule(owner, QuantizedLinear(module, tensor, dtype_of(name), device))
            continue
        tensor = dequantize(tensor)
        if mapped and tensor.dtype == dtype_of(name):
            value = tensor.view(weights.shapes[key])
        else:
            place = places.pop(name, None)
            value = torch.empty(weights.shapes[key], dtype=dtype_of(name), device=device) if place is None else place
            value.copy_((tensor if rounding is None else tensor.to(rounding)).view(value.shape))
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def _places(model: nn.Module, layers: str, dtype_of: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
    """Memory for the parameters of each layer, by name. Pages that nothing is written to are never taken."""
    places: dict[str, Tensor] = {}
    for number, layer in model.get_submodule(layers).named_children():
        names = {f"{layers}.{number}.{name}": parameter for name, parameter in layer.named_parameters()}
        like = [torch.empty(parameter.shape, dtype=dtype_of(name), device="meta") for name, parameter in names.items()]
        places |= dict(zip(names, in_one_buffer(like), strict=True))
    return places


def _name_in_file(name: str, source_of: Mapping[str, str]) -> str:
    """What a missing parameter would be called in the file, told from the same one of another block."""
    block = re.match(r"blocks\.\d+", name)
    if block is None:
        return name
    here = block[0]
    twins = (key for other, key in source_of.items() if re.sub(r"^blocks\.\d+", here, other) == name)
    return next((re.sub(r"^blocks\.\d+", here, key) for key in twins), name)


def _listing(what: str, keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    if not ordered:
        return ""
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{what} {', '.join(ordered[:3])}{more}"


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
        where = " and ".join(part for part in missing if part != ".") or "the folder itself"
        raise UserError(f"{folder}: expected diffusion_pytorch_model*.safetensors in {where}, found {found}")
    tokenizer = folder / names.tokenizer
    if not tokenizer.is_dir():
        raise UserError(f"{folder}: expected the tokenizer folder {names.tokenizer}, found none")
    return Checkpoint(
        folder,
        _open_experts(folder, parts, files),
        _open_pth(folder / names.vae),
        _open_pth(folder / names.text_encoder),
        tokenizer,
    )


def _open_diffusers(folder: Path, experts: int, files: Mapping[str, Path]) -> Checkpoint:
    # There, `transformer` is the high-noise expert and `transformer_2` the low-noise one.
    if experts == 2:
        parts = {"low_noise_model": "transformer_2", "high_noise_model": "transformer"}
    else:
        parts = {"model": "transformer"}
    _check_names(files, parts)
    wanted = [part for expert, part in parts.items() if expert not in files] + ["vae", "text_encoder", "tokenizer"]
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
        open_safetensors(folder / "vae", "diffusion_pytorch_model"),
        open_safetensors(folder / "text_encoder", "model"),
        folder / "tokenizer",
    )


def _open_experts(folder: Path, parts: Mapping[str, str], files: Mapping[str, Path]) -> dict[str, Weights]:
    opened = {}
    for name, part in parts.items():
        if name in files:
            check_expert("", files[name], name, "dit")
            opened[name] = open_denoiser(files[name], folder / part)
        else:
            opened[name] = open_safetensors(folder / part, "diffusion_pytorch_model")
    if len(set(map(Path.resolve, files.values()))) < len(files):
        raise UserError(f"{files['high_noise_model']} is given for both experts; give each its own file")
    return {name: replace(weights, expert=name) for name, weights in opened.items()}


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
    said = set(_EXPERT.findall(path.name.lower()))
    if asked in ("high", "low") and len(said) == 1 and asked not in said:
        word = said.pop()
        raise UserError(
            f"{what}{path} is for the {word}-noise expert by its name, and is given for {asked} noise; "
            f"give it with `{setting}_{word}`, or rename it if that is not meant"
        )


def open_denoiser(file: Path, beside: Path | None = None) -> Weights:
    """A denoiser from one file: GGUF, or safetensors in fp8 with or without scales, or in any float.

    Its names are the official ones or diffusers', with or without the prefix of ComfyUI. `beside` is the folder whose
    config.json says what no shape tells; without one the heads are as wide as in the released models. Raises
    UserError for a file that is broken, is no Wan denoiser, or is of another size than the configuration.
    """
    if not file.is_file():
        raise UserError(f"{file} {'is a folder; name the file in it' if file.is_dir() else 'does not exist'}")
    suffix = file.suffix.lower()
    if suffix not in (".gguf", ".safetensors"):
        raise UserError(f"{file} is no .gguf or .safetensors file; a denoiser of its own is one of them")
    if suffix == ".gguf":
        header = open_gguf(file)
        shapes, what = dict(header.shapes), f"a GGUF file of the architecture {header.architecture}"
        kinds = {name: kind for name, kind in header.types.items() if kind not in (*GGUF_TYPES, *PLAIN_TYPES)}
        scales, known = {}, ", ".join(GGUF_TYPES)
    else:
        shapes, dtypes = dict(_safetensors_shapes(file)), _safetensors_dtypes(file)
        shapes, what = {name: shape for name, shape in shapes.items() if not _BESIDE.fullmatch(name)}, "a file"
        scales = {name: name.removesuffix(end) + ".weight" for end in _SCALES for name in shapes if name.endswith(end)}
        scales = {key: name for name, key in scales.items() if key in shapes}
        for key, name in scales.items():
            if math.prod(shapes.pop(name)) not in (1, *shapes[key][:1]):
                raise UserError(f"{file}: {name} is no scale of a tensor or of its rows; give scaled fp8 or GGUF")
        floats = (*PLAIN_TYPES, "F8_E4M3", "F8_E5M2")
        kinds = {name: dtypes[name] for name in shapes if dtypes[name] not in floats}
        known = "scaled fp8"
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in shapes)), "")
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
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
    scales = {key.removeprefix(prefix): name for key, name in scales.items()}
    return Weights(file, (file,), shapes, config, prefix=prefix, scales=scales)


def open_safetensors(folder: Path, stem: str) -> Weights:
    """A folder of `stem.safetensors`, or of shards with their index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{index} has no weight_map; download it again")
        files = tuple(folder / name for name in sorted(set(listed.values())))
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{folder}: {len(absent)} of {len(files)} shards are missing ({', '.join(absent[:3])})")
    elif single.is_file():
        listed, files = None, (single,)
    else:
        raise UserError(f"{folder}: expected {single.name} or {index.name}, found neither")
    shapes = {key: shape for file in files for key, shape in _safetensors_shapes(file)}
    if listed is not None and shapes.keys() != listed.keys():
        difference = _listing("in one only", shapes.keys() ^ listed.keys())
        raise UserError(f"{folder}: the shards and {index.name} disagree ({difference})")
    config = folder / "config.json"
    return Weights(folder, files, shapes, read_json(config) if config.is_file() else {})


def open_file(file: Path) -> Weights:
    """One safetensors file by itself; its `config` is what the header says in words. Raises UserError."""
    shapes = dict(_safetensors_shapes(file))
    with safe_open(file, framework="pt") as opened:
        return Weights(file, (file,), shapes, opened.metadata() or {})


def _open_pth(file: Path) -> Weights:
    if not file.is_file():
        raise UserError(f"{file.parent}: expected {file.name}, found no such file")
    return Weights(file, (file,), {key: tuple(tensor.shape) for key, tensor in _read_pth(file).items()}, {})


def _read_pth(file: Path) -> dict[str, Tensor]:
    """A state dict, mapped from the file; nothing in it is executed."""
    try:
        # only the zip format, torch's own since 1.6, can be mapped
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file} cannot be read, it may be truncated; download it again ({reason})") from error
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{file} is not a state dict of tensors")
    return state


def _safetensors_shapes(file: Path) -> Iterator[tuple[str, Shape]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield key, tuple(opened.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read, it may be truncated; download it again ({error})") from error


def _safetensors_dtypes(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118


def _read(file: Path, names: Container[str]) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The named tensors of a file of any kind."""
    if file.suffix == ".pth":
        return ((name, tensor) for name, tensor in _read_pth(file).items() if name in names)
    return read_gguf(file, names) if file.suffix.lower() == ".gguf" else _read_safetensors(file, names)


def _read_safetensors(file: Path, keys: Container[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            if key in keys:
                yield key, opened.get_tensor(key)


def _patch_embedding(weights: Weights) -> Shape:
    shape = weights.shapes.get("patch_embedding.weight")
    if shape is None or len(shape) != 5:
        raise UserError(f"{weights.path} is no Wan denoiser: it has no patch_embedding.weight with five dimensions")
    return shape
