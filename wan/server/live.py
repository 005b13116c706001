"""How far chains are, from what the worker says while it makes them, and who hears of that."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT = 200  # events of a chain that a client which comes back may ask for
SAMPLE = "sample"  # the stage of all solver steps, whichever expert takes them
_BEHIND = 500  # events that a client may be behind before it is let go


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
        return taken / done * (self.steps - self.step) if done > 0 and self.stage == SAMPLE else None

    def hear(self, event: str, values: Mapping[str, Any]) -> None:
        """Take in what the worker says."""
        if event == "clip_started":
            self.clip, self.stage, self.step, self.steps, self.prompt = values["clip"], "", 0, 0, ""
            self.before = 0
        elif event == "stage":
            self.stage, self.since, self.before = values["stage"], time.monotonic(), values["step"]
        elif event == "step":
            self.step, self.steps = values["step"], values["steps"]
        elif event == "prompt":
            self.prompt = values["prompt"]
        elif event == "warning":
            self.warnings.append(values["message"])


class Audience:
    """Those who listen to chains, and what is known of each chain that was begun."""

    def __init__(self) -> None:
        self._lives: dict[str, Live] = {}
        self._count = 0  # of all events

    def get(self, name: str) -> Live | None:
        """What is known of a chain; None where nobody has begun or heard it."""
        return self._lives.get(name)

    def of(self, name: str) -> Live:
        """The same, of a chain that somebody begins or hears."""
        return self._lives.setdefault(name, Live())

    def begin(self, name: str) -> None:
        """A chain is made from here on; those who listen to it stay."""
        before = self._lives.get(name)
        self._lives[name] = Live() if before is None else Live(listeners=before.listeners)

    def tell(self, name: str, event: str, **more: Any) -> None:
        """Tell those who listen to a chain."""
        self._count += 1
        message = {"id": self._count, "event": event, **more}
        live = self.of(name)
        live.events.append(message)
        for listener in list(live.listeners):
            try:
                listener.put_nowait(message)
            except asyncio.QueueFull:
                live.listeners.discard(listener)
                with contextlib.suppress(asyncio.QueueEmpty):
                    listener.get_nowait()
                listener.put_nowait(None)

    async def listen(self, name: str, after: int = 0) -> AsyncIterator[dict[str, Any]]:
        """The events of a chain from now on, and those after number `after` that are still known."""
        live = self.of(name)
        listener: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_BEHIND)
        for missed in live.events if after else ():
            if missed["id"] > after:
                listener.put_nowait(missed)
        live.listeners.add(listener)
        try:
            while (message := await listener.get()) is not None:
                yield message
        finally:
            live.listeners.discard(listener)

    def forget(self, name: str) -> None:
        """Let those who listen to a chain go, for it is no more."""
        live = self._lives.pop(name, None)
        for listener in live.listeners if live else ():
            while listener.full():
                listener.get_nowait()
            listener.put_nowait(None)

    def close(self) -> None:
        """Let all go, for the server ends."""
        for name in list(self._lives):
            self.forget(name)
