"""Which timestep is for which expert, and how many forwards that makes, without PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wan.settings import Sampling, StepCache


@functools.lru_cache(maxsize=64)
def timesteps_of(sampling: Sampling, train_timesteps: int = 1000) -> tuple[float, ...]:
    """The timesteps of a clip, falling: those of its `build_scheduler`, see there."""
    first = float(np.float32(1 - 1 / train_timesteps)) if sampling.solver == "unipc" else 1.0
    base: npt.NDArray[np.floating[Any]] = np.linspace(first, 0, sampling.steps + 1)[:-1]
    if sampling.solver == "euler":
        base = base.astype(np.float32)
    times = sampling.shift * base / (1 + (sampling.shift - 1) * base) * train_timesteps
    return tuple((times if sampling.solver == "euler" else times.astype(np.int64)).tolist())


def share_out(timesteps: Sequence[float], lowest: Sequence[float]) -> list[list[float]]:
    """The timesteps of each expert, out of falling ones; `lowest` are those that the experts still work at.

    Experts go from high noise to low, and a timestep is for the first that works at it. A14B: the high-noise expert
    works from boundary * 1000 up.
    """
    shares, rest = [], list(timesteps)
    for limit in lowest:
        mine = [t for t in rest if t >= limit]
        shares.append(mine)
        rest = rest[len(mine) :]
    return shares


def step_shares(sampling: Sampling, lowest: Sequence[float], train_timesteps: int) -> list[tuple[int, int]]:
    """The steps of each expert, from high noise to low, and how many of them have guidance's second forward."""
    low, high = sampling.guidance
    scales = [high, low] if len(lowest) > 1 else [low]
    shares = share_out(timesteps_of(sampling, train_timesteps), lowest)
    return [
        (len(share), 0 if scale == 1 else sum(sampling.guides(t / train_timesteps) for t in share))
        for share, scale in zip(shares, scales, strict=True)
    ]


def forwards(shares: Sequence[tuple[int, int]], cache: StepCache | None) -> float:
    """How many forwards of all experts together a clip takes, with a cache about."""
    return sum(
        (1 + guided / steps) * (steps if cache is None else cache.computed(steps)) for steps, guided in shares if steps
    )
