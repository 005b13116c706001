"""The tensors of a model in their files: names and shapes from the headers, and reading. safetensors, .pth, GGUF."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan.errors import UserError
from wan.files import unreadable
from wan.foreign import parsing, read_json, shards
from wan.weights.prefetch import ReadAhead
from wan.weights.quantized import (
    FLOAT8,
    PLAIN_TYPES,
    QuantizedTensor,
    dequantize,
    open_gguf,
    read_gguf,
)

Shape = tuple[int, ...]
_DISTILLED = re.compile(r"rapid|lightning|lightx2v|distill|turbo|(?<![a-z0-9])[48][ _-]?steps?(?![a-z])")


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
        dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            if file.suffix == ".pth":
                dtypes |= {name: tensor.dtype for name, tensor in _read_pth(file).items()}
            elif file.suffix.lower() == ".safetensors":
                dtypes |= {
                    name: PLAIN_TYPES[kind] for name, kind in safetensors_dtypes(file).items() if kind in PLAIN_TYPES
                }
        return {key: dtypes[name] for key in self.shapes if (name := self.prefix + key) in dtypes}

    @property
    def is_distilled(self) -> bool:
        """Whether the name of a denoiser's own file says that it needs few steps and no guidance."""
        return self.path.is_file() and _DISTILLED.search(self.path.name.lower()) is not None

    def place_of(self, key: str) -> str:
        """The file in which a tensor is, with the expert that it is for; for messages."""
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
        key_of = {self.prefix + key: key for key in self.shapes if key in keys}
        scale_of = {name: self.scales[key] for name, key in key_of.items() if key in self.scales}
        beside = self.files if scale_of else ()
        scales = {
            name: dequantize(value) for file in beside for name, value in read_tensors(file, set(scale_of.values()))
        }
        for number, file in enumerate(self.files):
            if ahead is not None:
                ahead.begin(number)
            for name, value in read_tensors(file, key_of):
                if isinstance(value, Tensor) and (name in scale_of or value.dtype in FLOAT8):
                    value = QuantizedTensor(value, scales[scale_of[name]] if name in scale_of else None)
                yield key_of[name], value


def listing(what: str, keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    if not ordered:
        return ""
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{what} {', '.join(ordered[:3])}{more}"


def stored_types(weights: Weights) -> dict[str, str]:
    """How each tensor is stored in a GGUF or safetensors file, in the words of its format."""
    kinds: dict[str, str] = {}
    for file in weights.files:
        kinds |= open_gguf(file).types if file.suffix.lower() == ".gguf" else safetensors_dtypes(file)
    return {key: kinds[weights.prefix + key] for key in weights.shapes}


def open_safetensors(folder: Path, stem: str) -> Weights:
    """A folder of `stem.safetensors`, or of shards with their index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        index_json = read_json(index)
        files = tuple(folder / name for name in shards(index_json, index))
        listed = index_json["weight_map"]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{folder}: {len(absent)} of {len(files)} shards are missing ({', '.join(absent[:3])})")
    elif single.is_file():
        listed, files = None, (single,)
    else:
        raise UserError(f"{folder}: expected {single.name} or {index.name}, found neither")
    shapes = {key: shape for file in files for key, shape in safetensors_shapes(file)}
    if listed is not None and shapes.keys() != listed.keys():
        difference = listing("in one only", shapes.keys() ^ listed.keys())
        raise UserError(f"{folder}: the shards and {index.name} disagree ({difference})")
    config = folder / "config.json"
    return Weights(folder, files, shapes, read_json(config) if config.is_file() else {})


def open_file(file: Path) -> Weights:
    """One safetensors file by itself; its `config` is what the header says in words. Raises UserError."""
    shapes = dict(safetensors_shapes(file))
    with safe_open(file, framework="pt") as opened:
        return Weights(file, (file,), shapes, opened.metadata() or {})


def open_pth(file: Path) -> Weights:
    if not file.is_file():
        raise UserError(f"{file.parent}: expected {file.name}, found no such file")
    return Weights(file, (file,), {key: tuple(tensor.shape) for key, tensor in _read_pth(file).items()}, {})


def _read_pth(file: Path) -> dict[str, Tensor]:
    """A state dict, mapped from the file; nothing in it is executed."""
    with parsing(file, "download it again"):
        # only the zip format, torch's own since 1.6, can be mapped
        mapped = zipfile.is_zipfile(file)
        if mapped:
            _check_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{file} is not a state dict of tensors")
    for name, value in state.items():
        # strides of 0 make any size of a single number, and filling a model with that takes all memory
        if not isinstance(name, str) or value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{file} is damaged: {str(name)[:100]} is larger than its bytes; download it again")
    return state


def _check_zip(file: Path) -> None:
    """Raise UserError for one that is larger inside than outside: torch compresses nothing, and would unpack it all."""
    with zipfile.ZipFile(file) as opened:
        inside = sum(one.file_size for one in opened.infolist())
    if inside > file.stat().st_size:
        raise UserError(f"{file} is compressed, as no weights are, and would take {inside} bytes; download it again")


def safetensors_shapes(file: Path) -> Iterator[tuple[str, Shape]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield key, tuple(opened.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def safetensors_dtypes(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118


def read_tensors(file: Path, names: Container[str]) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The named tensors of a file of any kind."""
    if file.suffix == ".pth":
        return ((name, tensor) for name, tensor in _read_pth(file).items() if name in names)
    return read_gguf(file, names) if file.suffix.lower() == ".gguf" else _read_safetensors(file, names)


def _read_safetensors(file: Path, keys: Container[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            if key in keys:
                yield key, opened.get_tensor(key)
