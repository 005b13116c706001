"""The tensors of a file of weights, of any kind, mapped where that can be."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wan.errors import UserError
from wan.foreign import parsing
from wan.weights.pth import check_zip
from wan.weights.quantized import FLOAT8, QuantizedTensor, dequantize, read_gguf


def read_tensors(file: Path, names: Container[str]) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The named tensors of a file of any kind."""
    if file.suffix == ".pth":
        return ((name, tensor) for name, tensor in read_pth(file).items() if name in names)
    return read_gguf(file, names) if file.suffix.lower() == ".gguf" else _read_safetensors(file, names)


def _read_safetensors(file: Path, keys: Container[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            if key in keys:
                yield key, opened.get_tensor(key)


def read_quantized(
    file: Path, names: Container[str], scales: Mapping[str, Tensor | QuantizedTensor]
) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The named tensors, those in fp8 or with one of the `scales`, which stand under their names, as they are held."""
    for name, value in read_tensors(file, names):
        if isinstance(value, Tensor) and (name in scales or value.dtype in FLOAT8):
            scale = scales.get(name)
            yield name, QuantizedTensor(value, None if scale is None else dequantize(scale))
        else:
            yield name, value


def read_pth(file: Path) -> dict[str, Tensor]:
    """A state dict, mapped from the file; nothing in it is executed."""
    state = _load(file)
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{file} is not a state dict of tensors")
    for name, value in state.items():
        _check_bytes(file, name, value)
    return state


def read_state(file: Path) -> dict[str, Any]:
    """All tensors of a .safetensors or .pth file of another make, as it has them; nothing in it is executed.

    A trainer may have put them into dicts under names of its own ("params_ema"), next to numbers that are no weights.
    """
    if file.suffix.lower() == ".safetensors":
        with parsing(file, "download it again"), safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    state = _load(file)
    if not isinstance(state, dict):
        raise UserError(f"{file} is not a state dict of tensors")
    level = list(state.items())
    while level:
        for name, value in level:
            if isinstance(value, Tensor):
                _check_bytes(file, name, value)
        level = [item for _, value in level if isinstance(value, dict) for item in value.items()]
    return state


def _load(file: Path) -> Any:
    with parsing(file, "download it again"):
        # only the zip format, torch's own since 1.6, can be mapped
        mapped = zipfile.is_zipfile(file)
        if mapped:
            check_zip(file)
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except (pickle.UnpicklingError, RuntimeError) as error:
            if "weights_only" not in str(error):
                raise
            # its advice is to run whatever code the file holds
            raise ValueError("it is no file of tensors alone") from error


def _check_bytes(file: Path, name: object, value: Tensor) -> None:
    """Raise UserError for a tensor of more numbers than are there."""
    # strides of 0 make any size of a single number, and filling a model with that takes all memory
    if not isinstance(name, str) or value.nbytes > value.untyped_storage().nbytes():
        raise UserError(f"{file} is damaged: {str(name)[:100]} is larger than its bytes; download it again")
