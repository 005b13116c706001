"""Our own GPU kernel for the attention of one token to a static cache. Importing it needs Triton.

With a mask PyTorch's kernels want keys and values copied for every query head, or give each head one multiprocessor.
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
