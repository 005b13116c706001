"""How long the stages of a clip take, and who hears of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from wan.detail import heard_by
from wan.device.hardware import synchronize
from wan.types import OnStep, Step


class Stopwatch:
    """Seconds per named stage; the GPU is waited for, so that each stage is charged its own work.

    A stage inside another, such as a model that is loaded between two steps, is not charged to that. `on_step` hears of
    every stage that begins or goes on, and of what is done in it.
    """

    def __init__(self, device: torch.device, steps: int, on_step: OnStep | None = None, done: int = 0) -> None:
        self.device = device
        self.steps = steps
        self.on_step: OnStep | None = None if on_step is None else self._hear
        self.seconds: dict[str, float] = {}
        self._told = on_step
        self._done = done  # solver steps
        self._stage = ""  # that goes on
        self._inside = 0.0  # seconds of the stages inside it

    def _hear(self, step: Step) -> None:
        self._done = step.index
        if self._told is not None:
            self._told(step)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._enter(name)
        outer, before = self._stage, self._inside
        self._stage, self._inside = name, 0.0
        start = time.perf_counter()
        with heard_by(detail_to(self._told, lambda: self._done, self.steps, name)):
            yield
        synchronize(self.device)
        taken = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._inside
        self._stage, self._inside = outer, before + taken
        if outer:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        if self._told is not None:
            self._told(Step(self._done, self.steps, name))


def detail_to(on_step: OnStep | None, done: Callable[[], int], steps: int, stage: str) -> Callable[[str], None] | None:
    """What tells `on_step` of details in a stage."""
    if on_step is None:
        return None
    return lambda detail: on_step(Step(done(), steps, stage, detail=detail))
