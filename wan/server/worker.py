"""The process that owns the models: makes one chain after the other, as it is told, and says how far it is.

A server has one of them, a batch one for each GPU or group of GPUs. Lines of JSON come in on stdin and go out on
stdout. It ends when stdin does, so that it never outlives who started it; what it was making goes on from there in the
next one. With `asks` it asks a captioner that others share. Where a launcher's environment says that it is one of
several, all get the same lines; the first answers.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from filelock import FileLock

from wan.commands.progress import Progress
from wan.device.ranks import World
from wan.device.watch import Ended
from wan.errors import InUse, UserError
from wan.options import Settings
from wan.server.questions import Questions
from wan.server.tickets import DONE, PAUSED
from wan.server.wire import CHECKED, owner_settings, settings_of_chain
from wan.types import Step

if TYPE_CHECKING:
    from wan.chain.finished_clip import FinishedClip
    from wan.commands.job import Job
    from wan.continuation import VideoContinuation

LOCK = ".worker.lock"
_OFTEN = 0.1  # seconds between two words about a step
_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}

Send = Callable[..., None]


class Cancelled(KeyboardInterrupt):
    """The chain is not wanted any more."""


class Models:
    """The pipeline of this process, kept from chain to chain of one checkpoint."""

    def __init__(self, ask: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None) -> None:
        self._ask = ask  # a captioner that others share
        self._opened: VideoContinuation | None = None
        self._key: object = None

    def open(self, job: Job) -> VideoContinuation:
        """The pipeline, which asks the VLM what this chain asks it. That of another checkpoint is let go."""
        key = job.models_key
        if self._opened is None or self._key != key:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            self._opened, self._key = job.open_continuation(), key
            if self._ask is not None:
                self._opened.vlm.share(self._ask)
        self._opened.vlm.question, self._opened.vlm.fallback = job.settings.vlm_question, job.settings.vlm_fallback
        return self._opened


class Telling(Progress):
    """Tells the server what a command would draw on a terminal."""

    def __init__(self, send: Send, cancelled: threading.Event, clips: int) -> None:
        super().__init__("", clips, quiet=True)
        self._send, self._cancelled = send, cancelled
        self._clip, self._told = 0, 0.0

    def finish_clips(self, count: int) -> None:
        super().finish_clips(count)
        self._send("there", done=count, count=self.clips)

    def begin(self, title: str, seed: int | None = None) -> None:
        super().begin(title, seed)
        self._clip = int(title.removeprefix("clip ").partition("/")[0] or 0)
        self._send("clip_started", clip=self._clip, count=self.clips, seed=seed)

    def stage(self, name: str) -> None:
        if name != self._stage:
            self._send("stage", clip=self._clip, stage=name)
        super().stage(name)

    def finish(self, clip: FinishedClip) -> None:
        super().finish(clip)
        self._send("clip_finished", clip=clip.number, count=self.clips, seam=clip.record.get("seam"))

    def __call__(self, step: Step) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        super().__call__(step)
        if step.prompt is not None:
            self._send("prompt", clip=self._clip, prompt=step.prompt)
        elif (now := time.monotonic()) - self._told >= _OFTEN or step.index in (0, step.total):
            self._told = now
            self._send("step", clip=self._clip, stage=step.stage, step=step.index, steps=step.total)


class _Warnings(logging.Handler):
    """Sends warnings to the server."""

    def __init__(self, send: Send) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("warning", message=" ".join(record.getMessage().replace("`", "").split()))


def make(models: Models, settings: Settings, watch: Callable[[str, int, bool], Progress]) -> str:
    """Make a chain, or what is missing of it; returns the state that it is in then."""
    from wan.commands.continuous import Chain
    from wan.commands.job import Job

    shown = list[Progress]()

    def watching(title: str, clips: int, quiet: bool) -> Progress:
        shown.append(watch(title, clips, quiet))
        return shown[-1]

    job = Job.read("continuous", settings)
    finished = sum(1 for _ in Chain(job, pipeline=models.open(job), watch=watching))
    return DONE if finished == shown[-1].clips else PAUSED


def check(models: Models, settings: Settings) -> dict[str, Any]:
    """What a chain would be, when all was checked that making it checks, as JSON values. Raises UserError."""
    from wan.commands.continuous import Chain
    from wan.commands.job import Job

    job = Job.read("continuous", settings)
    chain = Chain(job, pipeline=models.open(job))
    return dataclasses.asdict(chain.estimate()) | {"status": chain.status}


def main() -> int:
    """Work until stdin ends; returns the exit code."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is printed is for the log
    first = json.loads(sys.stdin.readline())
    world, root = World.read(os.environ), first.get("root")
    owner, orders = owner_settings(first["settings"]), queue.Queue[dict[str, Any]]()
    cancelled, now = threading.Event(), {"id": ""}
    writing = threading.Lock()

    def send(event: str, **more: Any) -> None:
        with writing:
            _write(out, {"event": event, "id": now["id"], **more})

    def go_on() -> None:
        if cancelled.is_set():
            raise Cancelled

    questions = Questions(send, go_on)
    threading.Thread(target=_listen, args=(orders, questions, cancelled, now), daemon=True).start()
    # the one of a server that was killed may still be there for a moment
    with nullcontext() if root is None or not world.is_first else FileLock(Path(root) / LOCK):
        logging.root.addHandler(_Warnings(send))
        models = Models(questions.ask if first.get("asks") and world.is_first else None)
        send("ready", pid=os.getpid())
        while True:
            order = orders.get()
            cancelled.clear()
            now["id"] = order["id"]
            settings = settings_of_chain(owner, order["settings"])
            if "port" in order:
                os.environ["MASTER_PORT"] = str(order["port"])
            if not world.is_first:
                try:
                    if not order.get("check"):
                        follow(models, settings)
                except UserError as error:  # the first process says it, or has said what this one ends by
                    logging.getLogger(__name__).info("%s", error)
                    return 1
            elif not _work(models, settings, send, cancelled, only_check=bool(order.get("check"))):
                return 1
            now["id"] = ""


def follow(models: Models, settings: Settings) -> None:
    """In any process of several but the first: make this one's shares of a chain."""
    from wan.commands.job import Job

    job = Job.read("continuous", settings)
    job.follow(models.open(job))


def _work(
    models: Models, settings: Settings, send: Send, cancelled: threading.Event, *, only_check: bool = False
) -> bool:
    """Make a chain, or check it, and say what came of it; whether this process is still good for another."""

    def failed(code: str, message: str, cause: BaseException | None = None) -> None:
        # the cause is for who started this process, and not for clients
        why = None if cause is None else f"{type(cause).__name__}: {cause}"
        send("end", state="failed", error={"code": code, "message": message}, why=why)

    try:
        if only_check:
            send("end", state=CHECKED, found=check(models, settings))
            return True
        state = make(models, settings, lambda title, clips, quiet: Telling(send, cancelled, clips))
        send("end", state=state)
    except Cancelled:
        send("end", state="cancelled")
    except Ended as error:  # another process of this chain has failed, so this one's end is no word on the chain
        failed("worker_lost", str(error), error)
        return False
    except InUse as error:
        failed("in_use", str(error))
    except UserError as error:
        failed("invalid_request", str(error), error)
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in _FULL
        failed(
            "disk_full" if full else "input_output",
            f"{error.strerror}; {'free space on' if full else 'look at'} the disk of the server",
            error,
        )
    except Exception as error:
        traceback.print_exc()
        memory = "OutOfMemory" in type(error).__name__
        failed(
            "out_of_memory" if memory else "internal",
            "out of GPU memory" if memory else "the server has an error, which its log tells",
            error,
        )
        return False
    return True


def _listen(
    orders: queue.Queue[dict[str, Any]], questions: Questions, cancelled: threading.Event, now: Mapping[str, str]
) -> None:
    """Take orders from stdin; its end is the end of this process."""
    for line in sys.stdin:
        order = json.loads(line)
        if "answer" in order:
            questions.hear(order)
        elif (name := order.get("cancel")) is None:
            orders.put(order)
        elif name == now["id"]:
            cancelled.set()
    os._exit(0)


def _write(out: TextIO, message: Mapping[str, Any]) -> None:
    try:
        out.write(json.dumps(message) + "\n")
        out.flush()
    except OSError:  # nobody is there any more
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
