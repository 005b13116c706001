"""Seconds of a call, with the GPU waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from wan.device.hardware import synchronize


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 1, warm: int = 0) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm` ones that do not count."""
    taken = []
    for _ in range(warm + repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return taken[warm:]
