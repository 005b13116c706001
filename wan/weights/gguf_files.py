"""The head of a GGUF file: its tensors, and what else it says. Needs no PyTorch."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from wan.errors import UserError
from wan.foreign import parsing

# Those that diffusers can expand; the others (IQ1 to IQ3, TQ, FP4) are rare for video models.
GGUF_TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS")
_LONG, _MOST_ITEMS = 1 << 10, 1 << 21  # items of an array in the head of a GGUF file
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufHeader:
    """What the head of a GGUF file says."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]


def open_gguf(file: Path) -> GgufHeader:
    """The head of a GGUF file, which is checked to be whole. Raises UserError."""
    gguf, reader = gguf_reader(file)
    with parsing(file, "download it again"):
        return _header(gguf, reader)


def _header(gguf: ModuleType, reader: Any) -> GgufHeader:
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    for name in shapes:  # converters that cannot write five dimensions flatten, and say so (ComfyUI-GGUF)
        field = reader.get_field(f"comfy.gguf.orig_shape.{name}")
        if field is not None:
            shapes[name] = tuple(map(int, field.contents()))
    architecture = reader.get_field("general.architecture")
    types = {tensor.name: gguf.GGMLQuantizationType(tensor.tensor_type).name for tensor in reader.tensors}
    return GgufHeader("unnamed" if architecture is None else str(architecture.contents()), shapes, types)


def read_gguf_fields(file: Path, names: Sequence[str]) -> list[Any]:
    """What the head of a GGUF file says under these names, arrays as lists; None where it says nothing."""
    _, reader = gguf_reader(file)
    with parsing(file, "download it again"):
        return [_contents(reader.get_field(name)) for name in names]


def _contents(field: Any) -> Any:
    if field is None:
        return None
    long = len(field.data) == 1 and field.parts[field.data[0]].size > 1 and len(field.types) == 2
    return field.parts[field.data[0]].tolist() if long else field.contents()


def gguf_reader(file: Path) -> tuple[ModuleType, Any]:
    """The package and its reader of a file. Raises UserError."""
    gguf = _gguf(file)
    with parsing(file, "download it again"):
        return gguf, _reader_class(gguf)(file)


@cache
def _reader_class(gguf: ModuleType) -> Any:
    array, string = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined, misc]
        """Takes a long array in one piece: a vocabulary, element by element, takes the library half a minute."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != array or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
            if count < _LONG or (kind != string and kind not in self.gguf_scalar_to_np):
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            if count > _MOST_ITEMS:
                raise ValueError(f"an array of {count} items")
            if kind != string:
                whole = self._get(start, self.gguf_scalar_to_np[kind], count)
                if len(whole) < count:
                    raise ValueError("its head is cut off")
                return 12 + whole.nbytes, [whole], [0], [array, kind]
            view, at, texts = memoryview(self.data), start, np.empty(count, object)
            for number in range(count):
                (length,) = _LENGTH.unpack_from(view, at)
                texts[number] = bytes(view[at + 8 : at + 8 + length]).decode("utf-8", "replace")
                at += 8 + length
            return at - orig_offs, [texts], [0], [array, kind]

    return Reader


def _gguf(file: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f'{file}: GGUF files need the gguf package: pip install -e ".[gguf]" in the project') from error
    return gguf
