"""Keeps one worker at work: gives it the chain that has waited longest, hears how far it is, and replaces it.

Where several GPUs make a chain together it has a process for each of them.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan.server.errors import public
from wan.server.live import Audience
from wan.server.metrics import Metrics
from wan.server.processes import Processes
from wan.server.tickets import DONE, FAILED, MAKING, PAUSED, Queue, Ticket

log = logging.getLogger(__name__)

WORKER: Sequence[str] = (sys.executable, "-m", "wan.server.worker")
MOST_ATTEMPTS = 3  # that one chain may take a worker down without finishing a clip
SHORTEST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two workers that end at once
_END_SECONDS = 5.0  # until a worker that was told to end is killed


class Supervisor:
    """Owns the worker's processes, of which there are `ranks`.

    `settings` are the server's, as JSON values, and `order_of` gives what the worker is told of a ticket.
    """

    def __init__(
        self,
        queue: Queue,
        root: Path,
        settings: Mapping[str, Any],
        order_of: Callable[[Ticket], Mapping[str, Any]],
        metrics: Metrics,
        command: Sequence[str] = WORKER,
        ranks: int = 1,
    ) -> None:
        self.queue, self.root, self.settings, self.order_of = queue, root, settings, order_of
        self.metrics, self.command, self.ranks = metrics, command, ranks
        self.state = "starting"
        self.making: str | None = None
        self.audience = Audience()
        self._processes: Processes | None = None
        self._wake = asyncio.Event()
        self._unwanted: set[str] = set()
        self._gone: dict[str, asyncio.Event] = {}

    # --- what others call

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    async def cancel(self, name: str) -> None:
        """Return when the worker has nothing to do with a chain any more."""
        if self.making != name:
            return
        self._unwanted.add(name)
        gone = self._gone.setdefault(name, asyncio.Event())
        self._say({"cancel": name})
        try:
            await asyncio.wait_for(gone.wait(), 30)
        except asyncio.TimeoutError:  # loading a model, say: nothing there asks whether it is wanted
            await self.end_worker()
            await gone.wait()
        finally:
            self._gone.pop(name, None)

    async def end_worker(self) -> None:
        """Kill the worker."""
        if self._processes is not None:
            self._processes.kill()

    # --- the worker

    async def run(self) -> None:
        """Keep a worker at work for ever."""
        wait = SHORTEST_WAIT
        while True:
            began = time.monotonic()
            try:
                await self._one_worker()
            except asyncio.CancelledError:
                await self.end_worker()
                raise
            except (OSError, ValueError, ConnectionError):
                log.exception("the worker cannot be talked to")
            self.state = "starting"
            await self._lost()
            self.metrics.workers.inc()
            wait = SHORTEST_WAIT if time.monotonic() - began > 60 else min(wait * 2, LONGEST_WAIT)
            await asyncio.sleep(wait)

    async def _one_worker(self) -> None:
        processes = self._processes = await Processes.start(self.command, self.ranks)
        self._say({"settings": dict(self.settings), "root": str(self.root)})
        giving = asyncio.create_task(self._give())
        try:
            while (message := await processes.hear()) is not None:
                if not await self._heard(message):
                    break
        finally:
            giving.cancel()
            await processes.end(_END_SECONDS)

    def _say(self, order: Mapping[str, Any]) -> None:
        if self._processes is not None:
            self._processes.say(order)

    async def _give(self) -> None:
        """Give the worker the next chain whenever it has none."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self.state != "idle" or (ticket := self.queue.next()) is None:
                continue
            self.state, self.making = "busy", ticket.id
            self.audience.begin(ticket.id)
            self.queue.change(ticket.id, state=MAKING, attempts=ticket.attempts + 1)
            self.audience.tell(ticket.id, "state", state=MAKING)
            self._say({"id": ticket.id, "settings": dict(self.order_of(ticket))})

    async def _heard(self, message: dict[str, Any]) -> bool:
        """Take note of what the worker says; whether it is still good for another chain."""
        event, name = message.pop("event"), message.pop("id", "")
        if event == "ready":
            self.state = "idle"
            self.wake()
            return True
        if not name or name != self.making:
            return True
        live = self.audience.of(name)
        if event == "warning":
            message["message"] = public(message["message"])
        live.hear(event, message)
        if event == "step":
            self.metrics.steps.inc()
        elif event in ("there", "clip_finished"):
            if event == "clip_finished":
                self.metrics.clips.inc()
            done = message["done"] if event == "there" else message["clip"]
            await self._keep(name, done=done, attempts=1)
        elif event == "end":
            state, error = message["state"], message.get("error")
            if error is not None and error["code"] == "worker_lost":
                log.error("%s", error["message"])  # which says what to do with a command; here others take their place
                return False
            alone = self.ranks == 1
            # processes that share a chain end together when one leaves it
            await self._ended(name, state, error, is_idle=alone or state in (DONE, PAUSED))
            return alone or state in (DONE, PAUSED)
        self.audience.tell(name, event, **message)
        return True

    async def _ended(self, name: str, state: str, error: Mapping[str, Any] | None, *, is_idle: bool) -> None:
        gone = name in self._unwanted
        if not gone:
            await self._finish(name, state, error)
        self._unwanted.discard(name)
        self.making = None
        self.state = "idle" if is_idle else "starting"
        if name in self._gone:
            self._gone[name].set()
        self.wake()

    async def _finish(self, name: str, state: str, error: Mapping[str, Any] | None) -> None:
        ticket = self.queue[name]
        if ticket.again and state != FAILED:
            self.queue.wait_again(name)
            self.audience.tell(name, "state", state="queued")
            return
        done: dict[str, Any] = {"done": ticket.count} if state == DONE else {}
        if error is not None:
            error = {**error, "message": public(str(error["message"]))}
        ended = None if state == PAUSED else int(time.time())
        await self._keep(name, state=state, error=error, completed_at=ended, again=False, **done)
        self.metrics.chains.labels(state).inc()
        self.audience.tell(name, "state", state=state, error=error)

    async def _keep(self, name: str, **values: Any) -> Ticket | None:
        """Write to the queue, however long its disk is full."""
        while True:
            try:
                return self.queue.change(name, **values)
            except sqlite3.OperationalError:
                log.exception("the queue cannot be written to; trying again")
                await asyncio.sleep(5)
            except KeyError:  # it was removed
                return None

    async def _lost(self) -> None:
        """What the worker was making waits again, unless it takes down one worker after the other."""
        name, self.making = self.making, None
        if name is None:
            return
        if name in self._unwanted:
            self._unwanted.discard(name)
        else:
            try:
                ticket = self.queue[name]
            except KeyError:
                ticket = None
            if ticket is not None and ticket.attempts >= MOST_ATTEMPTS:
                message = f"the process that makes videos ended {ticket.attempts} times while it made this one"
                await self._finish(name, FAILED, {"code": "worker_lost", "message": message})
            elif ticket is not None:
                await self._keep(name, state="queued", queued_at=0)
                self.audience.tell(name, "state", state="queued")
        if name in self._gone:
            self._gone[name].set()
        self.wake()
