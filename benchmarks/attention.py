#!/usr/bin/env python3
"""Speed and error of 8-bit attention by how its work is cut, with the exact bf16 kernels in the same run.

    python -m benchmarks.attention [--shapes 32760x40 75600x40 27280x24] [--variants N]

TFLOP/s with quantizing included. Errors of 64 queries against float64: relative L2, and how much of itself the result
keeps (1: no bias), on Gaussian numbers and on keys with a large common part and rows that stand out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_size import DEVICE, commit
from benchmarks.timing import timed
from wan.denoiser.attention_backends import kernels_there
from wan.denoiser.int8_attention_kernel import Tiles, attend_in_int8

VARIANTS = [
    Tiles(),
    Tiles(integers=False),
    Tiles(128, 64),
    Tiles(128, 128, 8),
    Tiles(summed_exactly_after=128),
    Tiles(64, 64, 4, 4),
    Tiles(128, 128, 8, by_descriptor=False),
    Tiles(128, 256, 8, 2),
    Tiles(128, 128, 8, 2, specialised=True),
]


def inputs(tokens: int, heads: int, real_like: bool) -> Tensor:
    """Queries, keys and values bf16 [3, 1, L, heads, 128]."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = torch.randn(3, 1, tokens, heads, 128, device="cuda", generator=generator)
    if real_like:
        made[1] += 5 * torch.randn(1, 1, heads, 128, device="cuda", generator=generator)
        made[:, :, ::97] *= 4
    return made.bfloat16()


def errors(mixed: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[float, float]:
    rows = torch.linspace(0, query.shape[1] - 1, 64, device=query.device).long()
    wrong = norm = kept = 0.0
    for head in range(0, query.shape[2], 8):
        scores = query[0, rows, head].double() @ key[0, :, head].double().T * query.shape[3] ** -0.5
        exact = scores.softmax(-1) @ value[0, :, head].double()
        ours = mixed[0, rows, head].double()
        wrong += float((ours - exact).square().sum())
        norm += float(exact.square().sum())
        kept += float((ours * exact).sum())
    return round((wrong / norm) ** 0.5, 5), round(kept / norm, 5)


def candidates(count: int) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    yield from kernels_there().items()
    for tiles in VARIANTS[:count]:
        yield str(tiles), partial(attend_in_int8, tiles=tiles)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32760x40", "75600x40", "27280x24"], help="tokens x heads")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="only the first so many")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        tokens, heads = map(int, shape.split("x"))
        gaussian, real = (inputs(tokens, heads, real_like) for real_like in (False, True))
        for name, attention in candidates(args.variants):
            row: dict[str, Any] = {"shape": shape, "kernel": name}
            try:
                taken = min(timed(partial(attention, *gaussian), DEVICE, 3, warm=1))
                row["tflops"] = round(4 * tokens**2 * heads * 128 / taken / 1e12, 1)
                row["error, kept"] = errors(attention(*gaussian), *gaussian)
                row["real-like"] = errors(attention(*real), *real)
            except Exception as error:  # a cut that this machine or this Triton cannot do is a result
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            rows.append(row)
            print(row, flush=True)
    print(
        json.dumps({"commit": commit(), "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0), "rows": rows})
    )


if __name__ == "__main__":
    main()
