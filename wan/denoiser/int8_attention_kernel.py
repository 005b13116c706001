"""Attention in 8 bits (int8 queries and keys, e4m3 values): our own kernel. It needs Triton, and a GPU to run.

Queries are scaled by row and keys by block, keys after their mean over tokens is taken away, which moves every score
of a query by the same number and so changes no softmax (source: SageAttention, arXiv 2410.02367). Values are scaled by
channel. The softmax's numerators, at most 1, are multiplied by 2**8 so that small ones are not lost (source:
SageAttention2, arXiv 2411.10958, where it is 448). Maxima, sums and the output are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Tiles:
    """How the work is cut; a sweep (`benchmarks.attention`) chose the default."""

    rows: int = 64  # queries of a program
    columns: int = 128  # keys of a step, a power of two up to `PADDED_TO`
    warps: int = 4
    stages: int = 3
    summed_exactly_after: int | None = None  # products that tensor cores may sum by themselves, at most `columns`
    by_descriptor: bool = True  # tiles are fetched by the tensor memory accelerator
    specialised: bool = False  # warps that fetch beside warps that compute
    integers: bool = True  # queries and keys as int8 rather than e4m3


DEFAULT = Tiles()
PADDED_TO = 256


@torch.library.custom_op("wan::attention8", mutates_args=())
def attention8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of queries, keys and values bf16 [B, L, heads, head_dim] -> bf16 of that shape.

    head_dim is a power of two from 16 to 256. On Gaussian numbers the result is 4e-2 (relative L2) from exact
    arithmetic.
    """
    return attend_in_int8(query, key, value, DEFAULT)


@attention8.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def attend_in_int8(query: Tensor, key: Tensor, value: Tensor, tiles: Tiles) -> Tensor:
    """`attention8` with work cut in a given way."""
    batch, length, heads, dim = query.shape
    keys = key.shape[1]
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current device
        form = torch.int8 if tiles.integers else FORMAT
        query8, query_scale = _by_row(query, None, 1, form)
        key8, key_scale = _by_row(key, key.sum(1, dtype=torch.float32) / keys, tiles.columns, form)
        value8, value_scale = _by_channel(value)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        inputs = (query8, key8, value8)
        if tiles.by_descriptor:
            from triton.tools.tensor_descriptor import TensorDescriptor

            shapes = ([tiles.rows, dim], [tiles.columns, dim], [dim, tiles.columns])
            flat = [tensor.flatten(0, 1) for tensor in inputs]
            inputs = tuple(
                TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), shape)
                for tensor, shape in zip(flat, shapes, strict=True)
            )
        _attend_kernel[(triton.cdiv(length, tiles.rows), batch * heads)](
            *inputs, query_scale, key_scale, value_scale, out, length, keys, query8.shape[1], key8.shape[1], heads,
            (dim**-0.5) * 1.4426950408889634,
            out.stride(0), out.stride(1), out.stride(2),
            DIM=dim, ROWS=tiles.rows, COLUMNS=tiles.columns, TMA=tiles.by_descriptor, SPECIALISED=tiles.specialised,
            IMPRECISE=tiles.summed_exactly_after, STAGES=tiles.stages,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def _padded(length: int) -> int:
    return -(-length // PADDED_TO) * PADDED_TO


def _by_row(x: Tensor, mean: Tensor | None, rows: int, form: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, L, heads, D] -> 8 bits [B * heads, padded L, D], and a scale for each so many rows of them."""
    batch, length, heads, dim = x.shape
    padded = _padded(length)
    out = torch.empty(batch * heads, padded, dim, dtype=form, device=x.device)
    scale = torch.empty(batch * heads, padded // rows, dtype=torch.float32, device=x.device)
    assert x.stride(3) == 1
    tile = max(rows, 64)
    _quantise_rows[(padded // tile, batch * heads)](
        x, x if mean is None else mean.contiguous(), out, scale, length, padded, heads, *x.stride()[:3],
        127.0 if form == torch.int8 else LARGEST,
        DIM=dim, ROWS=tile, EACH=rows == 1, CENTRED=mean is not None, INTEGER=form == torch.int8, num_warps=8,
    )  # fmt: skip
    return out, scale


def _by_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L, heads, D] -> 8 bits, transposed [B * heads, D, padded L] with tokens as `_as_they_lie`, and the scale of
    each channel [B * heads, D]."""
    batch, length, heads, dim = x.shape
    padded = _padded(length)
    out = torch.empty(batch * heads, dim, padded, dtype=FORMAT, device=x.device)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1).float()
    scale = (largest / LARGEST).clamp_min(1e-12).flatten(0, 1).contiguous()
    assert x.stride(3) == 1
    _quantise_transposed[(padded // 128, batch * heads)](
        x, out, scale, length, padded, heads, *x.stride()[:3], DIM=dim, ROWS=128, num_warps=8
    )
    return out, scale


@triton.jit  # type: ignore[untyped-decorator]
def _place(x, heads, stride_b, stride_l, stride_h, length, DIM: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile of this program of a tensor [B, L, heads, D], zeros behind its end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    start = x + (pair // heads).to(tl.int64) * stride_b + (pair % heads) * stride_h
    at = row[:, None].to(tl.int64) * stride_l + tl.arange(0, DIM)[None, :]
    return tl.load(start + at, mask=row[:, None] < length, other=0.0).to(tl.float32), row, pair.to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _quantise_rows(  # type: ignore[no-untyped-def]
    x, mean, out, scale, length, padded, heads, stride_b, stride_l, stride_h, largest,
    DIM: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, CENTRED: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    value, row, pair = _place(x, heads, stride_b, stride_l, stride_h, length, DIM, ROWS)
    column = tl.arange(0, DIM)
    if CENTRED:
        value = tl.where(row[:, None] < length, value - tl.load(mean + pair * DIM + column)[None, :], 0.0)
    factor = tl.max(tl.abs(value), 1)
    if EACH:
        factor = tl.maximum(factor / largest, 1e-12)
        tl.store(scale + pair * padded + row, factor)
        value = value / factor[:, None]
    else:
        whole = tl.maximum(tl.max(factor, 0) / largest, 1e-12)
        tl.store(scale + pair * (padded // ROWS) + tl.program_id(0), whole)
        value = value / whole
    if INTEGER:
        value = tl.floor(value + 0.5)
    at = (pair * padded + row[:, None]) * DIM + column[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _quantise_transposed(  # type: ignore[no-untyped-def]
    x, out, scale, length, padded, heads, stride_b, stride_l, stride_h, DIM: tl.constexpr, ROWS: tl.constexpr
):
    value, row, pair = _place(x, heads, stride_b, stride_l, stride_h, length, DIM, ROWS)
    column = tl.arange(0, DIM)
    value = value / tl.load(scale + pair * DIM + column)[None, :]
    at = (pair * DIM + column[:, None]) * padded + row[None, :]
    tl.store(out + at, _as_they_lie(tl.trans(value).to(out.dtype.element_ty), DIM, ROWS))


@triton.jit  # type: ignore[untyped-decorator]
def _as_they_lie(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns in another order: out of sixteen 0, 1, 8, 9, 2, 3, 10, 11 and so on.

    A product of tensor cores leaves each thread two neighbours of every eight columns, and an operand in 8 bits takes
    four neighbours. So weights and values come in an order in which no thread needs what another one has.
    """
    parts = tl.reshape(x, [ROWS, COLUMNS // 16, 2, 4, 2])
    return tl.reshape(tl.permute(parts, [0, 1, 3, 2, 4]), [ROWS, COLUMNS])


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    tile, key, value, key_scale, root, best, total, sums, step, pair, keys, key_padded,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    IMPRECISE: tl.constexpr,
):  # fmt: skip
    """Queries' largest score, and the sums of their weights and of weighted values, after one more block of keys."""
    start = step * COLUMNS
    column = tl.arange(0, COLUMNS)
    if TMA:
        some_keys = key.load([pair * key_padded + start, 0])
        some_values = value.load([pair * DIM, start])
    else:
        dims, wide = tl.arange(0, DIM), pair.to(tl.int64)
        some_keys = tl.load(key + (wide * key_padded + start + column[:, None]) * DIM + dims[None, :])
        some_values = tl.load(value + (wide * DIM + dims[:, None]) * key_padded + start + column[None, :])
    factor = root * tl.load(key_scale + step)
    scores = tl.dot(tile, tl.trans(some_keys))
    zero: tl.constexpr = 12582912.0 if scores.dtype == tl.int32 else 0.0
    if scores.dtype == tl.int32:
        # The bits of `zero` and an integer are those of `zero + integer` in float32: exact below 2**22 (these are at
        # most 127 * 127 * DIM), and an addition measured faster than a conversion.
        scores = (scores + 0x4B400000).to(tl.float32, bitcast=True)
    if MASKED:
        scores = tl.where(start + column[None, :] < keys, scores, -float("inf"))
    largest = tl.maximum(best, (tl.max(scores, 1) - zero) * factor)
    weights = tl.math.exp2(scores * factor[:, None] - (largest + (zero * factor - 8.0))[:, None])
    fade = tl.math.exp2(best - largest)
    total = total * fade + tl.sum(weights, 1)
    sums = sums * fade[:, None]
    weights = _as_they_lie(weights.to(some_values.dtype), ROWS, COLUMNS)
    sums = tl.dot(weights, tl.trans(some_values), sums, max_num_imprecise_acc=IMPRECISE)
    return largest, total, sums


@triton.jit  # type: ignore[untyped-decorator]
def _attend_kernel(  # type: ignore[no-untyped-def]
    query, key, value, query_scale, key_scale, value_scale, out, length, keys, query_padded, key_padded, heads, root,
    stride_b, stride_l, stride_h,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, SPECIALISED: tl.constexpr,
    IMPRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, pair = tl.program_id(0), tl.program_id(1)
    row, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    wide = pair.to(tl.int64)
    if TMA:
        tile = query.load([pair * query_padded + block * ROWS, 0])
    else:
        tile = tl.load(query + (wide * query_padded + block * ROWS + row[:, None]) * DIM + dims[None, :])
    root = root * tl.load(query_scale + wide * query_padded + block * ROWS + row)
    key_scale += wide * (key_padded // COLUMNS)

    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    whole = keys // COLUMNS
    for step in tl.range(0, whole, num_stages=STAGES, warp_specialize=SPECIALISED):
        best, total, sums = _step(
            tile, key, value, key_scale, root, best, total, sums, step, pair, keys, key_padded,
            DIM, ROWS, COLUMNS, TMA, False, IMPRECISE,
        )  # fmt: skip
    if whole * COLUMNS < keys:
        best, total, sums = _step(
            tile, key, value, key_scale, root, best, total, sums, whole, pair, keys, key_padded,
            DIM, ROWS, COLUMNS, TMA, True, IMPRECISE,
        )  # fmt: skip
    sums = sums / total[:, None] * tl.load(value_scale + wide * DIM + dims)[None, :]
    place = block * ROWS + row
    start_out = out + (pair // heads).to(tl.int64) * stride_b + (pair % heads) * stride_h
    at = place[:, None].to(tl.int64) * stride_l + dims[None, :]
    tl.store(start_out + at, sums.to(out.dtype.element_ty), mask=place[:, None] < length)
