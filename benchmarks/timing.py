"""Seconds of a call or of a block of code, with the GPU waited for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from wan.device.hardware import synchronize


class Timer:
    """Measures its `with` block: `seconds` are there when it ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Timer:
        synchronize(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._start


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 1, warm: int = 0) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm` ones that do not count."""
    taken = []
    for _ in range(warm + repeats):
        with Timer(device) as watch:
            call()
        taken.append(watch.seconds)
    return taken[warm:]


def slowest(value: float, device: torch.device) -> float:
    """The largest number of all ranks."""
    number = torch.tensor(value, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return float(number)


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time of some work that all ranks do together, of the slowest of them."""
    taken: list[float] = []
    for _ in range(repeats):
        dist.barrier()
        taken += timed(work, device)
    return slowest(1000 * statistics.median(taken), device)
