"""What works on one GPU, or on a group of GPUs of one machine: the processes that own its models, and what they say.

A `Hand` is the class of a Ray actor and knows no Ray. The process itself is the server's, `wan.server.worker`.
"""

from __future__ import annotations

import asyncio
import base64
import os
import platform
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wan
from wan.device.host import GIB, host_bytes, host_free_bytes, usable_cores
from wan.server.folders import ChainFolder
from wan.server.live import Live
from wan.server.processes import Processes
from wan.server.tickets import DONE, FAILED

LOST, UPLOAD = "lost", "upload"
WRITING = "writing"  # a chain that is computed, whose files are still written and uploaded
_KEPT_WARNINGS = 5
_LEAVE_SECONDS = 5.0  # for a process to end that has said its last word
_ALL_OF_IT = 0.9  # of the host's memory are for the workers of a node together


@dataclass
class _Work:
    """An order on its way, and what its process has said of it."""

    order: Mapping[str, Any]
    made: asyncio.Future[Any]  # when only its files are still to be written
    ended: asyncio.Future[Any]
    live: Live = field(default_factory=Live)
    done: int = 0
    count: int = 0
    clips_made: int = 0
    clip_began: float | None = None

    @property
    def folder(self) -> Path:
        return Path(self.order["settings"]["output_dir"])

    def hear(self, event: str, message: dict[str, Any]) -> None:
        """Take in what the process says of it."""
        self.live.hear(event, message)
        if event == "there":
            self.done, self.count = message["done"], message["count"]
        elif event == "clip_started":
            self.clip_began = time.monotonic()
        elif event == "clip_finished":
            self.done, self.count = message["clip"], message["count"]
            self.clips_made += 1
        elif event == "made":
            self.made.set_result(None)
        elif event == "end":
            self.ended.set_result(message)


class Hand:
    """Owns `ranks` processes that make one chain after the other.

    `siblings` is how many hands a machine has, which share its memory and cores; `command` starts a process; `folder`
    is where the command was given, `threads` its OMP_NUM_THREADS. `captioner` answers what the processes ask of one.
    """

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        siblings: int,
        folder: str,
        threads: str | None,
        captioner: Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> None:
        self.command, self.ranks, self.siblings = command, ranks, siblings
        self.folder, self.threads, self.captioner = folder, threads, captioner
        self._heard = time.monotonic()
        self._works: dict[str, _Work] = {}  # the last of which is being made, and one at most is written
        self._behind: asyncio.Task[dict[str, Any]] | None = None
        self._processes: Processes | None = None
        self._asking: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        # this may be in place of one that ended, beside others that have taken their shares
        share = min(host_free_bytes(), int(_ALL_OF_IT * host_bytes()) // (siblings * ranks)) / GIB
        self._share = max(1.0, round(share, 2))

    async def start(self) -> dict[str, Any]:
        """Start the processes; says where, or what went wrong."""
        # Ray sets OMP_NUM_THREADS to 1 for whoever asks for no cores
        threads = self.threads or str(max(1, usable_cores() // (self.siblings * self.ranks)))
        path = os.pathsep.join(filter(None, (str(Path(wan.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        processes = self._processes = await Processes.start(
            self.command,
            self.ranks,
            variables={"OMP_NUM_THREADS": threads, "PYTHONPATH": path},
            folder=self.folder if os.path.isdir(self.folder) else None,
            keeps_tail=True,  # stderr is Ray's log of the actor
            last_word=0,
        )
        processes.say({"settings": {}, "asks": self.captioner is not None})
        if await processes.hear() is None:
            return {"error": await processes.why(_LEAVE_SECONDS)}
        self._hearing = asyncio.create_task(self._hear_all(processes))
        return {"node": platform.node(), "pids": [process.pid for process in processes.processes]}

    async def do(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Make or check a chain; what came of it, and what there is to see of it.

        With `ahead` in the order this returns as soon as the chain is computed, with `WRITING`: then `written` has the
        rest, and the next order may come.
        """
        assert self._processes is not None  # it was started
        loop = asyncio.get_running_loop()
        work = self._works[order["id"]] = _Work(order, loop.create_future(), loop.create_future())
        self._heard = time.monotonic()
        self._processes.say(self._with_share(order))
        if self._hearing is None or self._hearing.done():  # the process ended after its last chain
            self._lose_all(await self._processes.why(_LEAVE_SECONDS))
        await asyncio.wait([work.made, work.ended], return_when=asyncio.FIRST_COMPLETED)
        if not work.made.done():
            return await self._finish(work)
        if self._behind is not None:
            await asyncio.wait([self._behind])
        self._behind = asyncio.create_task(self._finish(work))
        return {"state": WRITING, "done": work.done, "count": work.count, "made": work.clips_made}

    async def written(self) -> dict[str, Any]:
        """What came of the chain that was being written when the last order ended."""
        assert self._behind is not None
        return await self._behind

    async def _finish(self, work: _Work) -> dict[str, Any]:
        """When its process is done with a chain: upload it, and gather what there is to see."""
        order = work.order
        end: dict[str, Any] = await work.ended
        progress: dict[str, Any] = {"done": work.done, "count": work.count, "made": work.clips_made}
        progress["warnings"] = work.live.warnings[-_KEPT_WARNINGS:]
        estimate, place = end.get("found"), order.get("upload")
        if place and (end["state"] == DONE or estimate is not None):
            end |= await asyncio.to_thread(self._upload, work.folder, place, estimate)
        if not order.get("check") or (estimate is not None and estimate["missing"] < estimate["clips"]):
            end |= await asyncio.to_thread(_seen, work.folder)
        self._works.pop(order["id"], None)
        return progress | end

    def _upload(self, folder: Path, place: str, estimate: Mapping[str, Any] | None) -> dict[str, Any]:
        """Bring a finished chain to its place, or for a check see whether it is there; what that changes of its end."""
        from wan.batch.upload import UploadError, is_uploaded, upload  # which not every batch needs

        try:
            if estimate is not None:
                return {"found": {**estimate, "uploaded": is_uploaded(folder, place)}}
            upload(folder, place, self._hear)
        except UploadError as error:
            return {"state": FAILED, "error": {"code": UPLOAD, "message": str(error)}}
        return {}

    def _hear(self) -> None:
        self._heard = time.monotonic()

    def _with_share(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        """The order with this hand's share of the machine's memory, and of the weights that all of them have in it.

        It stands beside the settings, which a chain writes down for who goes on with it alone. `kinds` of an order is
        how many sets of weights and LoRAs the batch has; at worst each is in use somewhere.
        """
        settings, share = order["settings"], dict[str, float]()
        if self.siblings * self.ranks > 1 and "host_memory" not in settings:
            share["host_memory"] = self._share
        alike = self.siblings // min(self.siblings, max(1, order.get("kinds", 1)))
        can = hasattr(os, "memfd_create") and self.ranks == 1 and "precision" not in settings
        if alike > 1 and can and "share_weights" not in settings:
            share["share_weights"] = alike
        return {**order, "share": share}

    async def _hear_all(self, processes: Processes) -> None:
        """Hear the first process to its end, which is that of all that it had in hand."""
        try:
            while (message := await processes.hear()) is not None:
                self._hear()
                event, work = message.pop("event"), self._works.get(message.get("id", ""))
                if work is None:
                    continue
                if event == "ask":
                    self._asking = asyncio.create_task(self._answer(processes, message["number"], message["asked"]))
                else:
                    work.hear(event, message)
            why = await processes.why(_LEAVE_SECONDS)
        except Exception as error:  # it said what cannot be understood; whoever waits for its word hears of that
            await self.end()
            why = f"the process that makes videos was ended, for it said: {type(error).__name__}: {error}"
        self._lose_all(why)

    def _lose_all(self, why: str) -> None:
        for work in self._works.values():
            if not work.ended.done():
                work.ended.set_result({"state": LOST, "error": {"code": "worker_lost", "message": why}})

    async def _answer(self, processes: Processes, number: int, asked: Mapping[str, Any]) -> None:
        assert self.captioner is not None  # the process was told whether it may ask
        answer = await self.captioner(asked)
        self._hear()
        processes.say({"number": number, "answer": answer}, to_all=False)

    async def look(self) -> dict[str, Any]:
        """How far it is with what it makes, else with what it writes. Durations are by this machine's own clock."""
        now, work = time.monotonic(), next(reversed(self._works.values()), None)
        if work is None:
            return {"id": None}
        began, live = work.clip_began, work.live
        return {
            "id": work.order["id"],
            "done": work.done,
            "count": work.count,
            "made": work.clips_made,
            "clip": live.clip,
            "stage": live.stage,
            "step": live.step,
            "steps": live.steps,
            "seconds_left": live.seconds_left,
            "silent": now - self._heard,
            "clip_seconds": None if began is None or work.made.done() else now - began,
        }

    async def stop(self) -> None:
        """Let it leave what it makes; finished clips are joined, and what is only written is written."""
        if self._processes is not None:
            for name in self._works:
                self._processes.say({"cancel": name})

    async def end(self) -> None:
        """Kill the processes."""
        if self._processes is not None:
            await self._processes.end(0)


def _seen(path: Path) -> dict[str, Any]:
    """What there is to see of a chain: its seams to look at, and a picture as the text of a JPEG."""
    folder = ChainFolder(path, path)
    report = folder.report()
    numbers = [clip.get("number") for clip in report.get("clips", ())]
    jpegs = folder.seam(numbers[-1]) if numbers else []
    return {
        "attention": report.get("attention") or [],
        "picture": base64.b64encode(jpegs[-1]).decode() if jpegs else None,
        "video_seconds": report.get("video_seconds") or 0.0,
    }
