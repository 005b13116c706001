"""Our own GPU kernels for the attention of one token to a static cache. Importing it needs Triton.

With a mask PyTorch's kernels want keys and values copied for every query head, or give each head one multiprocessor.
What comes before it is some twenty kernels of a microsecond or two there, and one here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 128  # that one program looks at
_LEAST = 16  # rows of a product


def attend_with_one_query(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Query [1, H, 1, D], keys and values [1, K, L, D], `seen` bool [1, 1, 1, L] -> [1, 1, H, D].

    H is a multiple of K, D a power of two from 16 up. Sums are in float32. Keys are shared out among programs, whose
    results are then put together as in Flash-Decoding (Dao et al. 2023).
    """
    _, heads, _, dim = query.shape
    _, shared, length, _ = key.shape
    parts = triton.cdiv(length, _KEYS)
    mixed = torch.empty(parts, heads, dim, dtype=torch.float32, device=query.device)
    most, total = torch.empty(2, parts, heads, dtype=torch.float32, device=query.device)
    out = torch.empty(1, 1, heads, dim, dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current device
        _attend_part[(shared, parts)](
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            seen.contiguous().view(torch.uint8),
            mixed,
            most,
            total,
            length,
            scale,
            HEADS=heads,
            GROUP=heads // shared,
            ROWS=max(_LEAST, triton.next_power_of_2(heads // shared)),
            KEYS=_KEYS,
            DIM=dim,
            num_warps=4,
        )
        _put_together[(heads,)](
            out, mixed, most, total, parts, HEADS=heads, PARTS=triton.next_power_of_2(parts), DIM=dim, num_warps=4
        )
    return out


def place_one_token(
    projected: Tensor,
    turn: tuple[Tensor, Tensor],
    position: Tensor,
    key: Tensor,
    value: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """The query [1, H, 1, D] of a token, whose key and value are put at `position` [1, 1] of the cache's [1, K, L, D].

    `projected` [1, 1, (H + 2 K) D] are its query, key and value, `turn` cosine and sine [1, 1, D] of its rotary
    embedding, `norms` the weights [D] for query and key. Numbers are rounded to their dtype where the library does so.
    """
    _, shared, length, dim = key.shape
    heads = projected.shape[-1] // dim - 2 * shared
    query = torch.empty(1, heads, 1, dim, dtype=projected.dtype, device=projected.device)
    cosine, sine = turn
    of_query, of_key = (projected, projected) if norms is None else norms  # not read without
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _place[(heads + 2 * shared,)](
            projected.contiguous(),
            cosine.contiguous(),
            sine.contiguous(),
            position,
            query,
            key,
            value,
            of_query,
            of_key,
            length,
            epsilon,
            HEADS=heads,
            SHARED=shared,
            DIM=dim,
            NORMS=norms is not None,
            num_warps=1,
        )
    return query


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    projected,
    cosine,
    sine,
    position,
    query,
    key,
    value,
    of_query,
    of_key,
    length,
    epsilon,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    DIM: tl.constexpr,
    NORMS: tl.constexpr,
):
    """One head of the query, the keys or the values."""
    head, numbers = tl.program_id(0), tl.arange(0, DIM)
    across = (numbers + DIM // 2) % DIM
    kind = projected.dtype.element_ty
    row = tl.load(projected + head * DIM + numbers)
    at = tl.load(position)
    if head >= HEADS + SHARED:
        tl.store(value + ((head - HEADS - SHARED) * length + at) * DIM + numbers, row)
    else:
        half = tl.load(projected + head * DIM + across)
        if NORMS:
            wide = row.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / DIM + epsilon)
            is_query = head < HEADS
            weight = tl.where(is_query, tl.load(of_query + numbers), tl.load(of_key + numbers)).to(tl.float32)
            opposite = tl.where(is_query, tl.load(of_query + across), tl.load(of_key + across)).to(tl.float32)
            row = (wide * scale * weight).to(kind)
            half = (half.to(tl.float32) * scale * opposite).to(kind)
        straight = (row.to(tl.float32) * tl.load(cosine + numbers).to(tl.float32)).to(kind)
        sign = tl.where(numbers < DIM // 2, -1.0, 1.0)
        crossed = (half.to(tl.float32) * sign * tl.load(sine + numbers).to(tl.float32)).to(kind)
        turned = (straight.to(tl.float32) + crossed.to(tl.float32)).to(kind)
        if head < HEADS:
            tl.store(query + head * DIM + numbers, turned)
        else:
            tl.store(key + ((head - HEADS) * length + at) * DIM + numbers, turned)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_part(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    seen,
    mixed,
    most,
    total,
    length,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """A group of heads with the keys they share, on one part of the keys: mixed values, largest score, sum."""
    shared, part = tl.program_id(0), tl.program_id(1)
    rows, columns, numbers = tl.arange(0, ROWS), part * KEYS + tl.arange(0, KEYS), tl.arange(0, DIM)
    is_row = rows < GROUP
    head = shared * GROUP + rows
    asked = tl.load(query + head[:, None] * DIM + numbers[None], mask=is_row[:, None], other=0.0)
    inside = columns < length
    places = (shared * length + columns)[:, None] * DIM + numbers[None]
    keys = tl.load(key + places, mask=inside[:, None], other=0.0)
    allowed = tl.load(seen + columns, mask=inside, other=0) != 0
    scores = tl.where(allowed[None], tl.dot(asked, tl.trans(keys), input_precision="ieee") * scale, float("-inf"))
    largest = tl.max(scores, axis=1)
    weights = tl.exp(scores - tl.where(largest == float("-inf"), 0.0, largest)[:, None])  # a part may see nothing
    values = tl.load(value + places, mask=inside[:, None], other=0.0)
    mixture = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    row = part * HEADS + head
    tl.store(mixed + row[:, None] * DIM + numbers[None], mixture, mask=is_row[:, None])
    tl.store(most + row, largest, mask=is_row)
    tl.store(total + row, tl.sum(weights, axis=1), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _put_together(out, mixed, most, total, parts, HEADS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The attention of one head from its parts."""
    head, part, numbers = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, DIM)
    is_part = part < parts
    row = part * HEADS + head
    largest = tl.load(most + row, mask=is_part, other=float("-inf"))
    share = tl.exp(largest - tl.max(largest, axis=0))
    sums = tl.sum(share * tl.load(total + row, mask=is_part, other=0.0), axis=0)
    mixtures = tl.load(mixed + row[:, None] * DIM + numbers[None], mask=is_part[:, None], other=0.0)
    tl.store(out + head * DIM + numbers, tl.sum(mixtures * share[:, None], axis=0) / sums)
