"""A checkpoint folder -> weights by part. Official or diffusers layout, told apart by their files; strict keys.

Nothing here reads a tensor until a model is filled: opening a folder looks at file lists and headers only, so that a
wrong folder, a missing shard or a truncated file is said in one line before any loading starts.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The tensors of one model: the files that hold them, and their shapes, read from headers."""

    path: Path  # the folder or file to name in messages
    files: tuple[Path, ...]
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]  # the config.json beside them, or what the header of a single file says; may be empty
    expert: str = ""  # which of a checkpoint's experts they are

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in turn, mapped from its file; at most one file is open at a time."""
        return self.read(self.shapes)

    def read(self, keys: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """Those of the tensors that are named, in the order of the files."""
        for file in self.files:
            if file.suffix == ".pth":
                yield from ((key, tensor) for key, tensor in _read_pth(file).items() if key in keys)
            else:
                yield from _read_safetensors(file, keys)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder. `experts` is {"model": …} or {"low_noise_model": …, "high_noise_model": …}."""

    folder: Path
    layout: str  # "official" or "diffusers"
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


def resolve_folder(name: str | Path) -> Path:
    """A folder as it is; a hub id ("owner/name") through the hub's client and cache. Raises UserError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; a checkpoint is a folder (or a hub id such as Wan-AI/Wan2.2-TI2V-5B)")
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0].startswith((".", "~")):
        raise UserError(f"checkpoint folder {name} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # a connection that breaks is an error of the HTTP library, whose name depends on the hub library's version
    transport: Any = next((base for base in HfHubHTTPError.__bases__ if base is not OSError), OSError)
    try:
        return Path(snapshot_download(str(name)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, transport) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is no folder here, and as a hub id it cannot be downloaded: {reason}") from error


def open_checkpoint(folder: Path, *, in_channels: int, experts: int, names: Names) -> Checkpoint:
    """The checkpoint in `folder`, checked to be whole and to be the model that is asked for.

    `in_channels` are the denoiser's input channels, `experts` 1 or 2. Raises UserError that names the folder, what
    was expected and what was found.
    """
    if (folder / "model_index.json").is_file():
        found = _open_diffusers(folder, experts)
    else:
        found = _open_official(folder, experts, names)
    for name, weights in found.experts.items():
        channels = _patch_embedding(weights)[1]
        if channels != in_channels:
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


def fill(
    model: nn.Module,
    weights: Weights,
    source_of: Mapping[str, str],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    *,
    rounding: torch.dtype | None = None,
) -> None:
    """Put the weights into a model that was built without memory, tensor by tensor, straight in their final dtype.

    `source_of` maps each parameter of the model to its key in the files, `dtype_of` says its dtype. `rounding` rounds
    every value through that dtype first. Host memory never holds more than the model and one file.
    Raises UserError for missing and extra keys and for wrong shapes.
    """
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
    name_of: dict[str, str] = {}
    for name, key in source_of.items():
        name_of.setdefault(key, name)  # a tied tensor has two names; the caller ties the second
    for key, tensor in weights.tensors():
        name = name_of[key]
        value = torch.empty(tensor.shape, dtype=dtype_of(name), device=device)
        value.copy_(tensor if rounding is None else tensor.to(rounding))
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


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


def _open_official(folder: Path, experts: int, names: Names) -> Checkpoint:
    parts = (
        {"low_noise_model": names.low_noise, "high_noise_model": names.high_noise} if experts == 2 else {"model": "."}
    )
    missing = [part for part in parts.values() if not list((folder / part).glob("diffusion_pytorch_model*"))]
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
        "official",
        _open_experts(folder, parts),
        _open_pth(folder / names.vae),
        _open_pth(folder / names.text_encoder),
        tokenizer,
    )


def _open_diffusers(folder: Path, experts: int) -> Checkpoint:
    # There, `transformer` is the high-noise expert and `transformer_2` the low-noise one.
    if experts == 2:
        parts = {"low_noise_model": "transformer_2", "high_noise_model": "transformer"}
    else:
        parts = {"model": "transformer"}
    wanted = [*parts.values(), "vae", "text_encoder", "tokenizer"]
    missing = [part for part in wanted if not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"{folder} (diffusers layout): expected the folders {', '.join(wanted)}, missing {', '.join(missing)}"
        )
    if experts == 1 and list((folder / "transformer_2").glob("*.safetensors")):
        raise UserError(f"{folder}: expected one expert, found two (transformer and transformer_2)")
    return Checkpoint(
        folder,
        "diffusers",
        _open_experts(folder, parts),
        open_safetensors(folder / "vae", "diffusion_pytorch_model"),
        open_safetensors(folder / "text_encoder", "model"),
        folder / "tokenizer",
    )


def _open_experts(folder: Path, parts: Mapping[str, str]) -> dict[str, Weights]:
    opened = {name: open_safetensors(folder / part, "diffusion_pytorch_model") for name, part in parts.items()}
    return {name: replace(weights, expert=name) for name, weights in opened.items()}


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


def sampled_digest(path: Path) -> str:
    """A short digest of a large file's size and its first, middle and last MiB: tells fine-tunes apart."""
    size, block = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as opened:
        for start in (0, size // 2, max(size - block, 0)):
            opened.seek(start)
            digest.update(opened.read(block))
    return digest.hexdigest()[:16]


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


def _read_safetensors(file: Path, keys: Container[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            if key in keys:
                yield key, opened.get_tensor(key)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must be a JSON object")
    return value


def _patch_embedding(weights: Weights) -> Shape:
    shape = weights.shapes.get("patch_embedding.weight")
    if shape is None or len(shape) != 5:
        raise UserError(f"{weights.path} is no Wan denoiser: it has no patch_embedding.weight with five dimensions")
    return shape
