"""Tiny checkpoints run on the kernels that real ones run on, which are ten times quicker; to be imported for that.

On a CPU, PyTorch gives a convolution over time to oneDNN only where channels x frames x height is over 20,480 (its
`use_mkldnn`), as in every layer of the released VAEs. Those of the tiny ones go to a kernel of PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional

_functional: Any = torch.nn.functional
_mkldnn: Any = torch.backends.mkldnn
_conv3d = _functional.conv3d


def _triple(value: Any) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)


def _conv3d_of_real_sizes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    on_cpu = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not on_cpu or torch.compiler.is_compiling() or x.ndim != 5 or isinstance(padding, str):
        return _conv3d(x, weight, bias, stride, padding, dilation, groups)
    return torch.mkldnn_convolution(x, weight, bias, _triple(padding), _triple(stride), _triple(dilation), groups)


if _mkldnn.is_available():
    _functional.conv3d = _conv3d_of_real_sizes


@contextmanager
def pytorch_s_choice() -> Iterator[None]:
    """In the block convolutions run on the kernels that PyTorch itself chooses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_functional, "conv3d", _conv3d)
        yield


@pytest.fixture
def pytorch_s_kernels() -> Iterator[None]:
    """For a test that compares what it computes, bit for bit, with what a program of its own has computed."""
    with pytorch_s_choice():
        yield
