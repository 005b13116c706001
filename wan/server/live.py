"""How far a chain is, from what the worker says while it makes it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT = 200  # events of a chain that a client which comes back may ask for


@dataclass
class Live:
    """What is known of a chain beside its row and its folder: how far the clip is that is being made."""

    clip: int = 0
    stage: str = ""
    step: int = 0
    steps: int = 0
    prompt: str = ""
    since: float = 0.0  # when its stage began
    before: int = 0  # steps that were done by then: models load in the middle of them
    warnings: list[str] = field(default_factory=list)
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    listeners: set[asyncio.Queue[dict[str, Any] | None]] = field(default_factory=set)

    @property
    def share(self) -> float:
        """The share of the clip's steps that are done."""
        return min(self.step / self.steps, 1.0) if self.steps else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Of the clip's steps, as those of this stage took so far."""
        done, taken = self.step - self.before, time.monotonic() - self.since
        return taken / done * (self.steps - self.step) if done > 0 and self.stage == "sample" else None

    def hear(self, event: str, values: Mapping[str, Any]) -> None:
        """Take in what the worker says."""
        if event == "clip_started":
            self.clip, self.stage, self.step, self.steps, self.prompt = values["clip"], "", 0, 0, ""
            self.before = 0
        elif event == "stage":
            self.stage, self.since, self.before = values["stage"], time.monotonic(), self.step
        elif event == "step":
            self.step, self.steps = values["step"], values["steps"]
        elif event == "prompt":
            self.prompt = values["prompt"]
        elif event == "warning":
            self.warnings.append(values["message"])
