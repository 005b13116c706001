"""Our own GPU kernels for steps bound by memory: one pass where PyTorch makes several. Importing it needs Triton.

Tensors [1, C, T, H, W] are laid out channels last, so that the C numbers of a place are a row in memory. Sums are in
float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers that one program holds
_LAYOUT = torch.channels_last_3d


def norm_silu(out: Tensor, x: Tensor, bias: Tensor | None, gamma: Tensor) -> None:
    """RMS norm over the channels of x + bias [C], times gamma [C] and the root of C, then SiLU; written into out."""
    _rows(_norm_silu, out, out, x, gamma if bias is None else bias, gamma, out.shape[1] ** 0.5, BIAS=bias is not None)


def add(x: Tensor, other: Tensor, bias: Tensor) -> None:
    """x += other + bias [C]."""
    _rows(_add, x, x, other, bias)


def add_upsampled(x: Tensor, low: Tensor, frames: int, sides: int) -> None:
    """x += low with each place repeated over `frames` frames and `sides` x `sides` places.

    Channels are spread over the repeats as in the VAE 2.2 (source: the official code's DupUp3D). Where x has fewer
    frames than that makes, those left out are the first.
    """
    _, channels, length, height, width = x.shape
    left_out = low.shape[2] * frames - length
    repeats = channels * frames * sides**2 // low.shape[1]
    sizes = (length, height, width, low.shape[1], left_out, repeats)
    _rows(_add_upsampled, x, x, low, *sizes, FRAMES=frames, SIDES=sides)


def double_sides(x: Tensor) -> Tensor:
    """[1, C, T, H, W] -> [1, C, T, 2H, 2W], each place four times."""
    _, channels, length, height, width = x.shape
    shape = (1, channels, length, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAYOUT)
    _rows(_double_sides, x, out, x, width)
    return out


def _rows(kernel: Any, places: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the places of a tensor, each a row of C numbers; the first argument is what it writes."""
    assert arguments[0].is_contiguous(memory_format=_LAYOUT)
    tensors = [value.contiguous(memory_format=_LAYOUT) if _is_clip(value) else value for value in arguments]
    channels = places.shape[1]
    count = places.numel() // channels
    width = triton.next_power_of_2(channels)
    rows = max(1, _TILE // width)
    with torch.cuda.device_of(places):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current device
        kernel[(triton.cdiv(count, rows),)](*tensors, count, channels, ROWS=rows, WIDTH=width, **constants)


def _is_clip(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 5


@triton.jit  # type: ignore[untyped-decorator]
def _tile(count, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: a chunk of a clip has more than 2**31 numbers
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    return row, column, (row < count) & (column < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_silu(out, x, bias, gamma, root, count, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _tile(count, channels, ROWS, WIDTH)
    value = tl.load(x + row * channels + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    scale = tl.load(gamma + column, mask=column < channels, other=0.0).to(tl.float32) * root
    norm = tl.maximum(tl.sqrt(tl.sum(value * value, 1)), 1e-12)[:, None]
    value = value / norm * scale
    tl.store(out + row * channels + column, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add(x, other, bias, count, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _tile(count, channels, ROWS, WIDTH)
    at = row * channels + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    value += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_upsampled(  # type: ignore[no-untyped-def]
    x, low, length, height, width, low_channels, left_out, repeats, count, channels,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, FRAMES: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(count, channels, ROWS, WIDTH)
    across, down, frame = row % width, row // width % height, row // (width * height) + left_out
    part = (frame % FRAMES * SIDES + down % SIDES) * SIDES + across % SIDES
    place = (frame // FRAMES * (height // SIDES) + down // SIDES) * (width // SIDES) + across // SIDES
    source = place * low_channels + (column * (FRAMES * SIDES * SIDES) + part) // repeats
    value = tl.load(x + row * channels + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(low + source, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + row * channels + column, value.to(x.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _double_sides(out, x, width, count, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _tile(count, channels, ROWS, WIDTH)
    value = tl.load(x + row * channels + column, mask=inside, other=0.0)
    corner = row // width * 4 * width + row % width * 2
    for part in tl.static_range(4):
        place = corner + part % 2 + part // 2 * 2 * width
        tl.store(out + place * channels + column, value, mask=inside)
