"""The head of a .pth file: which tensors it holds, told without PyTorch, whose import takes seconds."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan.errors import UserError

_MOST_BYTES = 16 << 20  # of the pickle; that of UMT5 has 30 thousand
_ITEMS = {"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8}
_ITEMS |= {"IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}
_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}


class OtherPickleError(Exception):
    """The file holds more than plain tensors, and PyTorch is to look at it."""


@dataclass(frozen=True)
class StoredTensor:
    """The shape of a tensor, and its dtype by name, "" for one that no weights have."""

    shape: tuple[int, ...]
    dtype: str


def check_zip(file: Path) -> None:
    """Raise UserError for one that is larger inside than outside: torch compresses nothing, and would unpack it all."""
    with zipfile.ZipFile(file) as opened:
        inside = sum(one.file_size for one in opened.infolist())
    if inside > file.stat().st_size:
        raise UserError(f"{file} is compressed, as no weights are, and would take {inside} bytes; download it again")


def pth_header(file: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a state dict by name; nothing in the file is executed.

    Raises OtherPickleError for what is not the usual form: PyTorch reads it then, or says what is wrong with it.
    """
    if not zipfile.is_zipfile(file):
        raise OtherPickleError
    try:
        check_zip(file)
        with zipfile.ZipFile(file) as opened:
            sizes = {one.filename: one.file_size for one in opened.infolist()}
            name = next(name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1)
            if sizes[name] > _MOST_BYTES:
                raise OtherPickleError
            state = _Reader(opened.read(name), name.partition("/")[0], sizes).load()
    except (OtherPickleError, UserError):
        raise
    except Exception as error:  # what a damaged pickle raises is open
        raise OtherPickleError from error
    tensors = isinstance(state, dict) and all(isinstance(one, StoredTensor) for one in state.values())
    if not tensors or not state or not all(isinstance(name, str) for name in state):
        raise OtherPickleError
    return dict(state)


class _Storage:
    def __init__(self, kind: str) -> None:
        self.kind = kind


def _tensor(stored: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> StoredTensor:
    kind, count = stored
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # strides of 0 make any size of a single number
    if min(shape, default=1) < 0 or min(stride, default=1) < 0 or max(math.prod(shape), last + 1) > count:
        raise OtherPickleError
    return StoredTensor(tuple(map(int, shape)), _DTYPES.get(kind, ""))


class _Reader(pickle.Unpickler):
    """Knows the names that a state dict consists of, and no other."""

    def __init__(self, data: bytes, root: str, sizes: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(data))
        self._root, self._sizes = root, sizes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _ITEMS:
            return _Storage(name)
        raise OtherPickleError

    def persistent_load(self, pid: Any) -> tuple[str, int]:
        word, storage, key, _, count = pid
        if word != "storage" or self._sizes[f"{self._root}/data/{key}"] != count * _ITEMS[storage.kind]:
            raise OtherPickleError
        return storage.kind, count
