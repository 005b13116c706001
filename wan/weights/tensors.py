"""The tensors of a model in their files: names and shapes from the headers, and reading. safetensors, .pth, GGUF."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from wan.detail import tell_detail
from wan.errors import UserError
from wan.files import unreadable
from wan.foreign import read_json, shards
from wan.weights.gguf_files import open_gguf
from wan.weights.prefetch import ReadAhead
from wan.weights.pth import OtherPickleError, StoredTensor, pth_header

if TYPE_CHECKING:
    from torch import Tensor

    from wan.weights.quantized import QuantizedTensor

Shape = tuple[int, ...]
# The dtypes in which weights may be held, as safetensors and PyTorch name them.
FLOATS = {
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"),
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
}
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # dtypes of safetensors and GGUF files
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

    def stored_dtypes(self) -> dict[str, str]:
        """The name of the dtype in which the files hold each tensor that is plain there."""
        dtypes: dict[str, str] = {}
        for file in self.files:
            if file.suffix == ".pth":
                dtypes |= {name: tensor.dtype for name, tensor in _pth_tensors(file).items()}
            elif file.suffix.lower() == ".safetensors":
                dtypes |= {name: PLAIN[kind] for name, kind in safetensors_dtypes(file).items() if kind in PLAIN}
        plain = (key for key in self.shapes if key not in self.scales)
        return {key: dtypes[name] for key in plain if (name := self.prefix + key) in dtypes}

    @property
    def is_distilled(self) -> bool:
        """Whether the name of a denoiser's own file says that it needs few steps and no guidance."""
        return self.path.is_file() and _DISTILLED.search(self.path.name.lower()) is not None

    def place_of(self, key: str) -> str:
        """The file in which a tensor is, with the expert that it is for; for messages."""
        from wan.weights.reading import read_tensors

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
        from wan.weights.reading import read_quantized, read_tensors

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


def listing(what: str, keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    if not ordered:
        return ""
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{what} {', '.join(ordered[:3])}{more}"


def check_shapes(target: Mapping[str, Shape], weights: Weights, source_of: Mapping[str, str]) -> None:
    """Raise UserError for missing and extra keys and for wrong shapes; no tensor is read.

    `target` has the shape of each parameter of the model, `source_of` its key in the files.
    """
    problems = [
        listing("missing", [_name_in_file(name, source_of) for name in target.keys() - source_of.keys()]),
        listing("missing", [key for key in source_of.values() if key not in weights.shapes]),
        listing("unexpected", [key for name, key in source_of.items() if name not in target]),
        listing("unexpected", weights.shapes.keys() - set(source_of.values())),
        listing(
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


def _name_in_file(name: str, source_of: Mapping[str, str]) -> str:
    """What a missing parameter would be called in the file, told from the same one of another block."""
    block = re.match(r"blocks\.\d+", name)
    if block is None:
        return name
    here = block[0]
    twins = (key for other, key in source_of.items() if re.sub(r"^blocks\.\d+", here, other) == name)
    return next((re.sub(r"^blocks\.\d+", here, key) for key in twins), name)


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
    elif os.path.lexists(single):
        what = "is no file" if single.exists() else "is a link that leads nowhere"
        raise UserError(f"{single} {what}; download it again")
    else:
        raise UserError(f"{folder}: expected {single.name} or {index.name}, found neither")
    shapes: dict[str, Shape] = {}
    for file in files:
        here = dict(safetensors_shapes(file))
        if twice := here.keys() & shapes.keys():
            raise UserError(f"{folder}: {file.name} has what another shard has too ({listing('twice', twice)})")
        shapes |= here
        _check_dtypes(file, safetensors_dtypes(file))
    if listed is not None and shapes.keys() != listed.keys():
        difference = listing("in one only", shapes.keys() ^ listed.keys())
        raise UserError(f"{folder}: the shards and {index.name} disagree ({difference})")
    config = folder / "config.json"
    return Weights(folder, files, shapes, read_json(config) if config.is_file() else {})


def open_file(file: Path) -> Weights:
    """One safetensors file by itself; its `config` is what the header says in words. Raises UserError."""
    shapes = dict(safetensors_shapes(file))
    with safe_open(file, framework="numpy") as opened:
        return Weights(file, (file,), shapes, opened.metadata() or {})


def open_pth(file: Path) -> Weights:
    if not file.is_file():
        raise UserError(f"{file.parent}: expected {file.name}, found no such file")
    tensors = _pth_tensors(file)
    _check_dtypes(file, {key: one.dtype for key, one in tensors.items()})
    return Weights(file, (file,), {key: one.shape for key, one in tensors.items()}, {})


def _check_dtypes(file: Path, dtypes: Mapping[str, str]) -> None:
    """Raise UserError for what no model is kept in: whole numbers, complex ones, and rarer floats."""
    for key, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise UserError(f"{file}: {key} holds {dtype or 'whole'} numbers, which are no weights; download it again")


def _pth_tensors(file: Path) -> Mapping[str, StoredTensor]:
    try:
        return pth_header(file)
    except OtherPickleError:
        from wan.weights.reading import read_pth

        state = read_pth(file).items()
        return {key: StoredTensor(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in state}


def safetensors_shapes(file: Path) -> Iterator[tuple[str, Shape]]:
    try:
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield key, tuple(opened.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def safetensors_dtypes(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as opened:
        return {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
