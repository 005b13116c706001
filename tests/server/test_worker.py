"""A server's process: which pipeline it keeps, and what it tells while a clip is made."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan.device.peers import Ended
from wan.errors import InUse, UserError
from wan.options import Settings
from wan.server import worker
from wan.server.live import Live
from wan.server.tickets import DONE, PAUSED
from wan.server.worker import Behind, Cancelled, KeptPipeline, Telling
from wan.types import Step


def test_a_pipeline_stays_for_chains_of_its_models_and_goes_for_others() -> None:
    told = list[str]()

    def job(key: str, question: str) -> Any:
        def opened(**share: int) -> Any:
            told.append(f"open {key}{share or ''}")
            vlm = SimpleNamespace(share=lambda ask: told.append(f"share {ask}"), question=None, fallback=None)
            return SimpleNamespace(vlm=vlm, close=lambda: told.append(f"close {key}"))

        settings = SimpleNamespace(vlm_question=question, vlm_fallback=key == "b")
        return SimpleNamespace(models_key=key, open_continuation=opened, settings=settings)

    kept: Any = KeptPipeline("asking")  # type: ignore[arg-type]
    first = kept.open(job("a", "what?"))
    assert kept.open(job("a", "who?")) is first and first.vlm.question == "who?" and first.vlm.fallback is False
    second = kept.open(job("b", "why?"))
    assert second is not first and second.vlm.question == "why?" and second.vlm.fallback is True
    assert told == ["open a", "share asking", "close a", "open b", "share asking"]
    kept.share = {"host_memory": 5}  # of the machine, which is not the settings'
    assert kept.open(job("b", "why?")) is not second
    assert told[5:] == ["close b", "open b{'host_memory': 5}", "share asking"]


def test_a_prompt_is_told_at_once_and_steps_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    told, cancelled = list[tuple[str, Any]](), threading.Event()
    monkeypatch.setattr("wan.server.worker.time.monotonic", lambda: 1000.0)
    telling = Telling(lambda event, **more: told.append((event, more)), cancelled, 2, Behind())
    telling.begin("clip 2/2", seed=5)
    for step in (
        Step(0, 4, "sample", prompt="A dog runs."),
        Step(1, 4, "sample"),  # the first for long
        Step(2, 4, "sample"),  # no time has gone by
        Step(4, 4, "sample"),
        Step(4, 4, "sample", detail="shard 2 of 6"),
    ):
        telling(step)
    steps = [more["step"] for event, more in told if event == "step"]
    assert [more for event, more in told if event == "prompt"] == [{"clip": 2, "prompt": "A dog runs."}]
    assert steps == [1, 4]
    cancelled.set()
    with pytest.raises(Cancelled):
        telling(Step(0, 4, "sample"))


# --- a chain


class Sent:
    """What a worker says, and of which chain."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **more: Any) -> None:
        self.events.append((event, more))

    @property
    def end(self) -> dict[str, Any]:
        event, more = self.events[-1]
        assert event == "end"
        return more


def telling(sent: Sent, behind: Any = None) -> Telling:
    return Telling(sent, threading.Event(), 4, behind or Behind())


def test_a_clip_is_told_from_its_beginning_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, waits = Sent(), list[str]()
    behind: Any = SimpleNamespace(wait=lambda: waits.append("wait"))
    one = telling(sent, behind)
    one.finish_clips(2)
    one.begin("clip 3/4", 7)
    for stage in ("load", "load", "sample", "write", "write"):
        one.stage(stage)
        assert waits == ["wait"] * (stage == "write") * (1 + (len(waits) > 1))
    clip: Any = SimpleNamespace(number=3, record={"seam": {"score": 1.0}}, path=Path("a.mp4"), seconds={}, seed=7)
    monkeypatch.setattr("wan.commands.progress.Progress.finish", lambda self, clip: None)
    one.finish(clip)
    assert sent.events == [
        ("there", {"done": 2, "count": 4}),
        ("clip_started", {"clip": 3, "count": 4, "seed": 7}),
        *(("stage", {"clip": 3, "stage": stage, "step": 0}) for stage in ("load", "sample", "write")),
        ("clip_finished", {"clip": 3, "count": 4, "seam": {"score": 1.0}}),
    ]
    one.begin("")  # of no clip
    assert sent.events[-1] == ("clip_started", {"clip": 0, "count": 4, "seed": None})


def test_a_step_is_told_when_it_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [1000.0], Sent()
    monkeypatch.setattr("wan.server.worker.time.monotonic", lambda: now[0])
    one = telling(sent)
    one.begin("clip 1/4")
    for at, step, is_told in (
        (1000.0, Step(3, 9, "sample"), True),
        (1000.09, Step(4, 9, "sample"), False),
        (1000.11, Step(5, 9, "sample"), True),
        (1000.11, Step(0, 9, "sample"), True),
        (1000.11, Step(0, 9, "sample", detail="shard 1 of 2"), False),
        (1000.11, Step(9, 9, "sample"), True),
        (1000.2, Step(5, 9, "sample", detail="x"), False),
        (1000.22, Step(5, 9, "sample", detail="x"), True),
    ):
        now[0], before = at, len(sent.events)
        one(step)
        told = [("step", {"clip": 1, "stage": "sample", "step": step.index, "steps": 9})] * is_told
        assert [event for event in sent.events[before:] if event[0] != "stage"] == told, step


def test_steps_of_all_experts_are_one_stage_of_which_the_time_left_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now, live, lefts = [1000.0], Live(), list[float | None]()
    for module in ("worker", "live"):
        monkeypatch.setattr(f"wan.server.{module}.time.monotonic", lambda: now[0])
    one = Telling(lambda event, **more: live.hear(event, more), threading.Event(), 4, Behind())
    one.begin("clip 1/4")
    latents = torch.zeros(1)
    for stage, step in (
        ("load", Step(0, 6, "load")),
        ("sample", Step(0, 6, "sample")),
        ("sample", Step(1, 6, "high noise", latents)),
        ("sample", Step(2, 6, "high noise", latents)),
        ("load", Step(2, 6, "load")),
        ("sample", Step(2, 6, "sample")),
        ("sample", Step(3, 6, "low noise", latents)),  # after which it is known again how long one takes
        ("sample", Step(4, 6, "low noise", latents)),
        ("decode", Step(6, 6, "decode")),
    ):
        now[0] += 3.0
        one(step)
        lefts.append(live.seconds_left)
        assert (live.stage, live.step) == (stage, step.index)
    assert lefts == [None, None, 15.0, 12.0, None, None, 9.0, 6.0, None]


def test_a_warning_is_one_line_without_marks() -> None:
    sent, log = Sent(), logging.getLogger("test_worker")
    handler = worker._Warnings(sent)
    log.addHandler(handler)
    try:
        log.info("nothing")
        log.warning("`prompt` is\n  %s", "long")
        log.error("so it is")
    finally:
        log.removeHandler(handler)
    assert sent.events == [("warning", {"message": "prompt is long"}), ("warning", {"message": "so it is"})]


def test_what_is_written_behind_is_one_chain_at_a_time_and_of_its_own() -> None:
    behind, go_on, done = Behind(), threading.Event(), list[str]()
    behind.wait()  # there is nothing yet

    def write(name: str) -> None:
        assert go_on.wait(10)
        done.append(f"{name} of {worker._chain.get()}, {threading.current_thread().daemon}")

    token = worker._chain.set("a chain")
    behind.begin(lambda: write("a"))
    worker._chain.reset(token)
    assert done == []
    go_on.set()
    behind.begin(lambda: done.append("b"))
    assert done[0] == "a of a chain, True"
    behind.wait()
    behind.wait()
    assert done[1:] == ["b"]


class Errors:
    OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.mark.parametrize(
    ("error", "state", "code", "message", "why", "good"),
    [
        (Cancelled(), "cancelled", None, None, None, True),
        (
            Ended("process 1 has died"),
            "failed",
            "worker_lost",
            "process 1 has died",
            "Ended: process 1 has died",
            False,
        ),
        (InUse("it is in use"), "failed", "in_use", "it is in use", None, True),
        (UserError("no such file"), "failed", "invalid_request", "no such file", "UserError: no such file", True),
        (
            OSError(errno.EDQUOT, "Quota exceeded"),
            *("failed", "disk_full", "Quota exceeded; free space on the disk of the server"),
            *(f"OSError: [Errno {errno.EDQUOT}] Quota exceeded", True),
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            *("failed", "input_output", "Input/output error; look at the disk of the server"),
            *(f"OSError: [Errno {errno.EIO}] Input/output error", True),
        ),
        (
            OSError("a library's own"),
            *("failed", "internal", "the server has an error, which its log tells", "OSError: a library's own", False),
        ),
        (
            Errors.OutOfMemoryError("CUDA"),
            *("failed", "out_of_memory", "out of GPU memory", "OutOfMemoryError: CUDA", False),
        ),
        (
            KeyError("a"),
            *("failed", "internal", "the server has an error, which its log tells", "KeyError: 'a'", False),
        ),
    ],
)
def test_how_a_chain_failed_is_told_and_whether_its_process_is_good_for_more(
    error: BaseException, state: str, code: str | None, message: str | None, why: str | None, good: bool
) -> None:
    sent = Sent()

    def work() -> None:
        raise error

    assert worker._end(sent, work) is good
    expected: dict[str, Any] = {"state": state}
    if code is not None:
        expected |= {"error": {"code": code, "message": message}, "why": why}
    assert sent.end == expected and len(sent.events) == 1


def test_the_end_of_a_chain_is_told_once() -> None:
    sent = Sent()
    assert worker._end(sent, lambda: {"state": DONE, "more": 1}) and sent.end == {"state": DONE, "more": 1}
    sent.events.clear()
    assert worker._end(sent, lambda: None) and not sent.events  # it is still written


class Chain:
    """Stands for the chain of the commands: gives `clips`, of which None is that only files are left."""

    clips: Sequence[Any] = ()
    count, status = 2, "finished"

    def __init__(self, job: Any, pipeline: Any, watch: Any = None) -> None:
        assert (job, pipeline) == ("a job", "a pipeline")
        self.watch = watch

    def steps(self) -> Any:
        self.watch("title", self.count, True)
        yield from self.clips

    def estimate(self) -> Any:
        return Estimate(5, 3)


@dataclass(frozen=True)
class Estimate:
    clips: int
    missing: int


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of pipelines one that is none."""
    reads = list[Any]()

    def read(*words: Any) -> str:
        reads.append(words)
        return "a job"

    monkeypatch.setattr("wan.commands.continuous.Chain", Chain)
    monkeypatch.setattr("wan.commands.job.Job.read", read)
    kept: Any = SimpleNamespace(open=lambda job: "a pipeline", reads=reads)
    return kept


@pytest.mark.parametrize(
    ("clips", "state"), [(("a", "b"), DONE), (("a",), PAUSED), (("a", None, "b"), DONE), (("a", None), PAUSED)]
)
@pytest.mark.parametrize("ahead", [True, False])
def test_a_chain_is_finished_when_all_of_its_clips_are(
    clips: Sequence[Any], state: str, ahead: bool, commands: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chain, "clips", clips)
    later, watched = list[Any](), list[Any]()
    settings = Settings(prompt="x")

    def watch(title: str, clips: int, quiet: bool) -> Any:
        watched.append((title, clips, quiet))
        return SimpleNamespace(clips=clips)

    made = worker.make(commands, settings, watch, later.append if ahead else None)
    if ahead and None in clips:
        assert made is None and later[0]() == state
    else:
        assert made == state and not later
    assert watched == [("title", 2, True)] and commands.reads == [("continuous", settings)]


def test_a_check_tells_what_a_chain_would_be(commands: Any) -> None:
    estimate = {"clips": 5, "missing": 3, "status": "finished"}
    assert worker.check(commands, Settings()) == estimate
    sent = Sent()
    assert worker._work(commands, Settings(), sent, threading.Event(), Behind(), only_check=True)
    assert sent.events == [("end", {"state": "checked", "found": estimate})]


@pytest.mark.parametrize(("ahead", "events"), [(True, ["made", "end"]), (False, ["end"])])
def test_a_chain_is_told_as_made_before_it_is_written(
    ahead: bool, events: list[str], commands: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chain, "clips", ("a", None, "b"))
    sent, behind = Sent(), Behind()
    assert worker._work(commands, Settings(), sent, threading.Event(), behind, ahead=ahead)
    behind.wait()
    assert sorted(event for event, _ in sent.events) == sorted(events)
    assert dict(sent.events)["end"] == {"state": DONE}


def test_a_chain_is_made_with_the_word_that_cancels_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, cancelled = Sent(), threading.Event()

    def make(kept: Any, settings: Any, watch: Any, write_later: Any) -> str:
        progress = watch("title", 3, False)
        progress.begin("clip 2/3")
        cancelled.set()
        progress(Step(1, 2, "sample"))
        raise AssertionError

    monkeypatch.setattr(worker, "make", make)
    assert worker._work(KeptPipeline(), Settings(), sent, cancelled, Behind())
    assert sent.events == [("clip_started", {"clip": 2, "count": 3, "seed": None}), ("end", {"state": "cancelled"})]


def test_another_process_makes_its_share(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = list[Any]()
    job = SimpleNamespace(follow=followed.append)
    monkeypatch.setattr("wan.commands.job.Job.read", lambda kind, settings: job)
    worker.follow(commands, Settings())
    assert followed == ["a pipeline"]


# --- the process


class Left(BaseException):
    """In place of the end of this process."""


class Process:
    """`main` with what it is told; what it says, and what it did with each order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.patch, self.folder, self.works = monkeypatch, tmp_path, list[Any]()
        self.good: Any = True

    def __call__(self, first: dict[str, Any], *orders: Any, rank: int = 0) -> tuple[int, list[dict[str, Any]]]:
        out = self.folder / "out"
        out.touch()
        pipe = os.open(out, os.O_WRONLY | os.O_TRUNC)
        lines = [json.dumps(one) + "\n" for one in (first, *orders)]
        given = iter(lines)

        class Stdin:
            def readline(self) -> str:
                return next(given)

            def __iter__(self) -> Any:
                yield from given
                threading.Event().wait()  # the end of stdin is that of the process

        def work(kept: Any, settings: Any, send: Any, cancelled: Any, behind: Any, check: bool, ahead: bool) -> Any:
            send("stage", stage="load")
            self.works.append((settings, cancelled.is_set(), check, ahead, os.environ.get("MASTER_PORT")))
            return self.good if len(self.works) == 3 + len(orders) else True

        def follow(kept: Any, settings: Any) -> None:
            self.works.append(settings)
            if settings.prompt == "bad":
                raise UserError("no such file")

        with self.patch.context() as patch:
            patch.setattr(sys, "stdin", Stdin())
            patch.setattr(os, "dup", lambda number: pipe if number == 1 else -1)
            patch.setattr(os, "dup2", lambda *numbers: self.works.append(numbers))
            patch.setattr(worker, "_work", work)
            patch.setattr(worker, "follow", follow)
            patch.setattr("wan.server.worker.World.read", lambda _: SimpleNamespace(is_first=rank == 0))
            patch.setattr(worker, "KeptPipeline", self._kept)
            patch.setattr(logging.root, "addHandler", lambda handler: self.works.append(handler))
            patch.setenv("MASTER_PORT", "1")
            code = worker.main()
        assert self.works[0] == (2, 1)  # what libraries print is for the log
        assert isinstance(self.works[1], worker._Warnings)
        return code, [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    def _kept(self, ask: Any) -> Any:
        self.works.append(("kept", ask))
        return SimpleNamespace()


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Process:
    return Process(monkeypatch, tmp_path)


def test_a_process_works_on_one_order_after_the_other(process: Process, tmp_path: Path) -> None:
    process.good = False
    code, events = process(
        {"settings": {"ckpt_dir": "m", "sample_steps": 5}, "root": str(tmp_path)},
        {"id": "a", "settings": {"prompt": "x"}},
        {"id": "b", "settings": {"sample_steps": 9}, "check": True, "port": 77},
        {"id": "c", "settings": {}, "ahead": True},
    )
    assert code == 1 and (tmp_path / worker.LOCK).exists()
    assert events == [
        {"event": "ready", "id": "", "pid": os.getpid()},
        *({"event": "stage", "id": name, "stage": "load"} for name in "abc"),
    ]
    settings = Settings(ckpt_dir="m", sample_steps=5)
    assert process.works[2:] == [
        ("kept", None),
        (dataclasses.replace(settings, prompt="x"), False, False, False, "1"),
        (dataclasses.replace(settings, sample_steps=9), False, True, False, "77"),
        (settings, False, False, True, "77"),
    ]


@pytest.mark.parametrize(("rank", "asks", "asked"), [(0, True, True), (0, False, False), (1, True, False)])
def test_the_first_process_asks_and_the_others_follow(
    rank: int, asks: bool, asked: bool, process: Process, tmp_path: Path
) -> None:
    process.good = False
    orders = [{"id": name, "settings": {"prompt": name}, "check": name == "check"} for name in ("check", "good", "bad")]
    code, events = process({"settings": {}, "asks": asks, "root": str(tmp_path)}, *orders, rank=rank)
    assert code == 1 and (process.works[2][1] is not None) is asked
    assert (tmp_path / worker.LOCK).exists() is (rank == 0)
    if rank:
        assert [one.prompt for one in process.works[3:]] == ["good", "bad"]  # a check is the first one's
        assert [one["event"] for one in events] == ["ready"]
    else:
        assert len(process.works) == 6


def test_a_process_hears_orders_answers_and_what_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    orders, cancels, heard = queue.Queue[Any](), dict[str, threading.Event](), list[Any]()
    lines = [
        {"id": "a", "settings": {}},
        {"id": "b", "settings": {}},
        {"cancel": "b"},
        {"cancel": "gone"},
        {"number": 1, "answer": {"text": "x"}},
    ]
    monkeypatch.setattr(sys, "stdin", [json.dumps(line) + "\n" for line in lines])

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    questions: Any = SimpleNamespace(hear=heard.append)
    with pytest.raises(Left) as left:  # with its stdin
        worker._listen(orders, questions, cancels)
    assert left.value.args == (0,) and heard == [lines[4]]
    assert [orders.get(), orders.get(), orders.empty()] == [lines[0], lines[1], True]
    assert {name: event.is_set() for name, event in cancels.items()} == {"a": False, "b": True}


def test_a_process_whose_server_has_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1
            if self.flushed == 2:
                raise BrokenPipeError

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    out = Pipe()
    worker._write(out, {"event": "ready"})
    assert out.getvalue() == '{"event": "ready"}\n' and out.flushed == 1
    with pytest.raises(Left) as left:
        worker._write(out, {"event": "end"})
    assert left.value.args == (0,)
