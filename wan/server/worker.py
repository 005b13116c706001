"""The process that owns the models: makes one chain after the other, as it is told, and says how far it is.

A server has one of them, a batch one for each GPU or group of GPUs. Lines of JSON come in on stdin and go out on
stdout. It ends when stdin does, so that it never outlives who started it; what it was making goes on from there in the
next one. An order with `ahead` is "made" as soon as only its files are to be written: then the next order may come,
and "end" is said of the first when they are. With `asks` it asks a captioner that others share. Where a launcher's
environment says that it is one of several, all get the same lines; the first answers.
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
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from filelock import FileLock

from wan.commands.progress import Progress
from wan.device.peers import Ended
from wan.device.ranks import World
from wan.errors import InUse, UserError
from wan.options import Settings
from wan.server.live import SAMPLE
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

_chain = ContextVar[str]("chain")  # whose thread this is; unset in those that belong to no chain


class Cancelled(KeyboardInterrupt):
    """The chain is not wanted any more."""


class KeptPipeline:
    """The pipeline of this process, kept from chain to chain of one checkpoint."""

    def __init__(self, ask: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None) -> None:
        self._ask = ask  # a captioner that others share
        self.share: Mapping[str, Any] = {}  # of the machine, where others work beside this process
        self._opened: VideoContinuation | None = None
        self._key: object = None

    def open(self, job: Job) -> VideoContinuation:
        """The pipeline, which asks the VLM what this chain asks it. That of another checkpoint is let go."""
        key = job.models_key, self.share
        if self._opened is None or self._key != key:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            self._opened, self._key = job.open_continuation(**self.share), key
            if self._ask is not None:
                self._opened.vlm.share(self._ask)
        self._opened.vlm.question, self._opened.vlm.fallback = job.settings.vlm_question, job.settings.vlm_fallback
        return self._opened


class Behind:
    """Writes what is left of a chain while the next one is made."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, work: Callable[[], object]) -> None:
        """Begin with a chain's files, when those of the one before are written. `work` raises nothing."""
        self.wait()
        self._thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class Telling(Progress):
    """Tells the server what a command would draw on a terminal."""

    def __init__(self, send: Send, cancelled: threading.Event, clips: int, behind: Behind) -> None:
        super().__init__("", clips, quiet=True)
        self._send, self._cancelled, self._behind = send, cancelled, behind
        self._clip, self._step, self._told = 0, 0, 0.0

    def finish_clips(self, count: int) -> None:
        super().finish_clips(count)
        self._send("there", done=count, count=self.clips)

    def begin(self, title: str, seed: int | None = None) -> None:
        super().begin(title, seed)
        self._clip = int(title.removeprefix("clip ").partition("/")[0] or 0)
        self._step = 0
        self._send("clip_started", clip=self._clip, count=self.clips, seed=seed)

    def stage(self, name: str) -> None:
        if name != self._stage:
            self._send("stage", clip=self._clip, stage=name, step=self._step)
        super().stage(name)
        if name == "write":  # so that the frames of one clip at most wait beside those that are made
            self._behind.wait()

    def finish(self, clip: FinishedClip) -> None:
        super().finish(clip)
        self._send("clip_finished", clip=clip.number, count=self.clips, seam=clip.record.get("seam"))

    def __call__(self, step: Step) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        if step.latents is not None:  # by an expert, whose name is for the log of one command
            step = dataclasses.replace(step, stage=SAMPLE)
        self._step = step.index
        super().__call__(step)
        if step.prompt is not None:
            self._send("prompt", clip=self._clip, prompt=step.prompt)
        elif (now := time.monotonic()) - self._told >= _OFTEN or (step.index in (0, step.total) and not step.detail):
            self._told = now
            self._send("step", clip=self._clip, stage=step.stage, step=step.index, steps=step.total)


class _Warnings(logging.Handler):
    """Sends warnings to the server."""

    def __init__(self, send: Send) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("warning", message=" ".join(record.getMessage().replace("`", "").split()))


def make(
    kept: KeptPipeline,
    settings: Settings,
    watch: Callable[[str, int, bool], Progress],
    write_later: Callable[[Callable[[], str]], None] | None = None,
) -> str | None:
    """Make a chain, or what is missing of it; returns the state that it is in then, `DONE` or `PAUSED`.

    Where only files are left to write, and there is a `write_later`, that is given the rest as a function, which
    returns the state; then this returns None.
    """
    from wan.commands.continuous import Chain
    from wan.commands.job import Job

    shown = list[Progress]()

    def watching(title: str, clips: int, quiet: bool) -> Progress:
        shown.append(watch(title, clips, quiet))
        return shown[-1]

    job = Job.read("continuous", settings)
    steps = Chain(job, pipeline=kept.open(job), watch=watching).steps()
    finished = 0

    def rest() -> str:
        return DONE if finished + sum(clip is not None for clip in steps) == shown[-1].clips else PAUSED

    for clip in steps:
        if clip is not None:
            finished += 1
        elif write_later is not None:
            write_later(rest)
            return None
    return rest()


def check(kept: KeptPipeline, settings: Settings) -> dict[str, Any]:
    """What a chain would be, when all was checked that making it checks, as JSON values. Raises UserError."""
    from wan.commands.continuous import Chain
    from wan.commands.job import Job

    job = Job.read("continuous", settings)
    chain = Chain(job, pipeline=kept.open(job))
    return dataclasses.asdict(chain.estimate()) | {"status": chain.status}


def main() -> int:
    """Work until stdin ends; returns the exit code."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is printed is for the log
    first = json.loads(sys.stdin.readline())
    world, root = World.read(os.environ), first.get("root")
    owner, orders = owner_settings(first["settings"]), queue.Queue[dict[str, Any]]()
    cancels, now = dict[str, threading.Event](), {"id": ""}
    writing, behind = threading.Lock(), Behind()

    def send(event: str, **more: Any) -> None:
        with writing:
            _write(out, {"event": event, "id": _chain.get(now["id"]), **more})

    def go_on() -> None:
        if cancels[now["id"]].is_set():
            raise Cancelled

    questions = Questions(send, go_on)
    threading.Thread(target=_listen, args=(orders, questions, cancels), daemon=True).start()
    # the one of a server that was killed may still be there for a moment
    with nullcontext() if root is None or not world.is_first else FileLock(Path(root) / LOCK):
        logging.root.addHandler(_Warnings(send))
        kept = KeptPipeline(questions.ask if first.get("asks") and world.is_first else None)
        send("ready", pid=os.getpid())
        while True:
            order = orders.get()
            now["id"] = order["id"]
            of_chain = _chain.set(order["id"])
            settings = settings_of_chain(owner, order["settings"])
            kept.share = order.get("share", {})
            if "port" in order:
                os.environ["MASTER_PORT"] = str(order["port"])
            if not world.is_first:
                try:
                    if not order.get("check"):
                        follow(kept, settings)
                except UserError as error:  # the first process says it, or has said what this one ends by
                    logging.getLogger(__name__).info("%s", error)
                    return 1
            else:
                only_check, ahead = bool(order.get("check")), bool(order.get("ahead"))
                if not _work(kept, settings, send, cancels[order["id"]], behind, only_check, ahead):
                    return 1
            del cancels[order["id"]]
            now["id"] = ""
            _chain.reset(of_chain)


def follow(kept: KeptPipeline, settings: Settings) -> None:
    """In any process of several but the first: make this one's shares of a chain."""
    from wan.commands.job import Job

    job = Job.read("continuous", settings)
    job.follow(kept.open(job))


def _work(
    kept: KeptPipeline,
    settings: Settings,
    send: Send,
    cancelled: threading.Event,
    behind: Behind,
    only_check: bool = False,
    ahead: bool = False,
) -> bool:
    """Make a chain, or check it, and say what came of it; whether this process is still good for another."""

    def work() -> dict[str, Any] | None:
        def watch(title: str, clips: int, quiet: bool) -> Progress:
            return Telling(send, cancelled, clips, behind)

        if only_check:
            return {"state": CHECKED, "found": check(kept, settings)}
        try:
            state = make(kept, settings, watch, write_later if ahead else None)
        except BaseException:
            behind.wait()  # this process may be ended for it, and the chain before has nothing to do with that
            raise
        return None if state is None else {"state": state}

    def write_later(rest: Callable[[], str]) -> None:
        behind.begin(lambda: _end(send, lambda: {"state": rest()}))
        send("made")

    return _end(send, work)


def _end(send: Send, work: Callable[[], dict[str, Any] | None]) -> bool:
    """Do some work and say what came of its chain, unless it is None; whether this process is still good for more."""

    def failed(code: str, message: str, cause: BaseException | None = None) -> None:
        # the cause is for who started this process, and not for clients
        why = None if cause is None else f"{type(cause).__name__}: {cause}"
        send("end", state="failed", error={"code": code, "message": message}, why=why)

    try:
        if (ended := work()) is not None:
            send("end", **ended)
    except Cancelled:
        send("end", state="cancelled")
    except Ended as error:  # another process of this chain has failed, so this one's end is no word on the chain
        failed("worker_lost", str(error), error)
        return False
    except InUse as error:
        failed("in_use", str(error))
    except UserError as error:
        failed("invalid_request", str(error), error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # a system call's
            full = error.errno in _FULL
            failed(
                "disk_full" if full else "input_output",
                f"{error.strerror}; {'free space on' if full else 'look at'} the disk of the server",
                error,
            )
            return True
        traceback.print_exc()
        memory = "OutOfMemory" in type(error).__name__
        failed(
            "out_of_memory" if memory else "internal",
            "out of GPU memory" if memory else "the server has an error, which its log tells",
            error,
        )
        return False
    return True


def _listen(orders: queue.Queue[dict[str, Any]], questions: Questions, cancels: dict[str, threading.Event]) -> None:
    """Take orders from stdin; its end is the end of this process. `cancels` are those of orders that are not over."""
    for line in sys.stdin:
        order = json.loads(line)
        if "answer" in order:
            questions.hear(order)
        elif (name := order.get("cancel")) is None:
            cancels[order["id"]] = threading.Event()
            orders.put(order)
        elif (cancelled := cancels.get(name)) is not None:
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
