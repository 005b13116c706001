"""A worker's next chain begins while the files of the last one are written: what that changes, and what it may not."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.batch.test_run import MADE, NOTHING, Crew, Event, at_once, failed, make, tasks_of
from tests.support.commands import Seen, command, world
from wan.batch.hand import LOST, WRITING, Hand
from wan.batch.run import Batch
from wan.batch.schedule import WAITING, Schedule
from wan.chain.run_folder import RunFolder
from wan.commands.continuous import Chain
from wan.errors import InUse
from wan.options import Settings
from wan.server import worker
from wan.server.tickets import DONE, FAILED

__all__ = ["at_once", "command", "world"]  # fixtures


# --- a chain


def test_the_rest_of_a_chain_may_be_another_thread_s_and_holds_the_folder_until_all_is_written(
    command: Callable[..., Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "run"
    settings = Settings(video="source.mp4", ckpt_dir="ti2v", prompt="on", num_videos=2, output_dir=str(home))
    go_on, save = threading.Event(), RunFolder.save
    slow = lambda *given: (given[1] == 1 or go_on.wait(20), save(*given))[1]  # noqa: E731
    monkeypatch.setattr(RunFolder, "save", slow)
    chain = Chain(settings)
    steps = chain.steps()
    assert [clip and clip.number for clip in (next(steps), next(steps))] == [1, None]
    with pytest.raises(InUse), RunFolder(home):
        pass
    left = list[Any]()
    rest = threading.Thread(target=lambda: left.extend(steps))
    rest.start()
    with pytest.raises(InUse), RunFolder(home):
        pass
    go_on.set()
    rest.join()
    assert [clip.number for clip in left] == [2] and chain.joined == home / "joined.mp4" and chain.status == "finished"
    with RunFolder(home) as free:
        assert list(free.clips()) == [1, 2]


# --- the process


class Chains:
    """In place of `Chain`: whose files are written when they may be, or cannot be."""

    full = False

    def __init__(self, job: Any, *, watch: Callable[[str, int, bool], Any], **_: Any) -> None:
        self.watch = watch

    def steps(self) -> Iterator[Any]:
        with self.watch("", 1, True) as progress:
            progress.begin("clip 1/1", 7)
            progress.stage("write")
            yield None
            if Chains.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield "a clip"


@pytest.mark.parametrize("full", [False, True])
def test_a_failure_of_the_writing_is_that_chain_s(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.commands.continuous.Chain", Chains)
    monkeypatch.setattr("wan.commands.job.Job.read", lambda *_: None)
    monkeypatch.setattr(Chains, "full", full)
    events_sent, behind = list[tuple[str, str, Any]](), worker.Behind()
    models: Any = type("Models", (), {"open": lambda *_: None})()

    def send(event: str, **more: Any) -> None:
        error = more.get("error") or {}
        events_sent.append((worker._chain.get(), event, error.get("code") or more.get("state")))

    for name in ("a", "b"):
        token = worker._chain.set(name)
        assert worker._work(models, Settings(), send, threading.Event(), behind, ahead=True)
        worker._chain.reset(token)
    behind.wait()
    end = "disk_full" if full else DONE
    for name in ("a", "b"):
        events = [one[1:] for one in events_sent if one[0] == name and one[1] != "stage"]
        assert events[0] == ("clip_started", None) and sorted(events[1:], key=str) == [("end", end), ("made", None)]
    # one at most is behind: the end of the first is told before the second is made
    assert events_sent.index(("a", "end", end)) < events_sent.index(("b", "made", None))


def test_what_ends_the_process_waits_for_the_chain_before(monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[str]()
    behind, go_on = worker.Behind(), threading.Event()
    behind.begin(lambda: go_on.wait(10) and written.append("a"))  # type: ignore[func-returns-value]

    def breaks(*_: Any) -> str:
        threading.Timer(0.05, go_on.set).start()
        raise KeyError("a bug")

    monkeypatch.setattr(worker, "make", breaks)
    ends = list[Any]()
    send = lambda event, **more: ends.append((list(written), more["error"]["code"]))  # noqa: E731
    assert not worker._work(worker.KeptPipeline(), Settings(), send, threading.Event(), behind, ahead=True)
    assert ends == [(["a"], "internal")]


# --- the hand

AHEAD = """
import json, sys
def say(event, **more): print(json.dumps({"event": event, **more}), flush=True)
sys.stdin.readline()
say("ready")
before = None
for line in sys.stdin:
    order = json.loads(line)
    if "cancel" in order: continue
    name = order["id"]
    say("clip_started", id=name, clip=1, count=1, seed=1)
    if before:
        say("clip_finished", id=before, clip=1, count=1, seam=None)
        say("end", id=before, state="completed")
    if name == "dies": sys.exit(3)
    if name == "babbles": print("what?", flush=True); continue
    say("made", id=name)
    before = name
"""


def hand_of(orders: list[str], folder: Path) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        one = Hand((sys.executable, "-c", AHEAD), 1, 1, os.getcwd(), "1")
        await one.start()
        results = list[dict[str, Any]]()
        behind: asyncio.Task[dict[str, Any]] | None = None
        for name in orders:
            order = {"id": name, "settings": {"output_dir": str(folder / name)}, "ahead": True}
            results.append(await asyncio.wait_for(one.do(order), 20))
            if behind is not None:
                results.append(await asyncio.wait_for(behind, 20))
            behind = asyncio.create_task(one.written())
            await asyncio.sleep(0)
        await one.end()
        if behind is not None and results[-2:][0]["state"] == WRITING:
            results.append(await asyncio.wait_for(behind, 20))
        return results

    return asyncio.run(work())


def test_a_hand_takes_the_next_order_when_a_chain_is_made(tmp_path: Path) -> None:
    results = hand_of(["a", "b"], tmp_path)
    assert [one["state"] for one in results] == [WRITING, WRITING, DONE, LOST]
    assert results[2]["made"] == 1 and results[2]["done"] == 1


@pytest.mark.parametrize("name", ["dies", "babbles"])
def test_a_process_that_ends_ends_what_it_makes_and_not_what_it_has_written(name: str, tmp_path: Path) -> None:
    results = hand_of(["a", name], tmp_path)
    assert [one["state"] for one in results] == [WRITING, LOST, DONE]
    why = results[1]["error"]["message"]
    assert why.startswith("the process that makes videos ended with 3" if name == "dies" else "the process") and (
        name == "dies" or "JSONDecodeError" in why
    )


# --- the batch


class Writing(Crew):
    """Workers whose chains are written when another one was made, or there is nothing else to do."""

    def __init__(self, answer: Callable[[str, int], Mapping[str, Any] | None], size: int = 1) -> None:
        super().__init__(answer, size)
        self.orders: list[Mapping[str, Any]] = []
        self.behind: dict[int, tuple[str, Mapping[str, Any] | None]] = {}
        self.most = 0

    def give(self, worker: int, order: Mapping[str, Any]) -> None:
        if order["check"]:
            assert not order["ahead"]
            super().give(worker, order)
            return
        assert order["ahead"]
        name = order["id"]
        self.given.append((worker, name))
        self.most = max(self.most, sum(one == worker for one in self.behind) + 1)
        answer = self.answer(name, sum(other == name for _, other in self.given))
        if answer is None:  # the process dies with both
            self.events.append(Event("ended", worker, {"state": LOST, "error": {"message": "died"}, **NOTHING}))
            if self.behind.pop(worker, None):
                self.events.append(Event("written", worker, {"state": LOST, "error": {"message": "died"}, **NOTHING}))
            return
        if answer["state"] == FAILED and not answer.get("late"):
            self.events.append(Event("ended", worker, answer))
            return
        self._write(worker)
        self.behind[worker] = name, answer
        self.events.append(Event("ended", worker, {"state": WRITING, **NOTHING}))

    def _write(self, worker: int) -> None:
        if (one := self.behind.pop(worker, None)) is not None:
            self.events.append(Event("written", worker, one[1] or {}))

    def wait(self, seconds: float) -> list[Event]:
        if not self.events:
            for worker in list(self.behind):
                self._write(worker)
        return super().wait(seconds)

    def drop(self, worker: int) -> None:
        self.behind.pop(worker, None)
        super().drop(worker)

    def stop(self, seconds: float) -> list[Event]:
        return [*self.wait(0), *self.wait(0)]


def test_workers_are_given_the_next_chain_while_one_is_written() -> None:
    crew = Writing(lambda name, count: {"state": DONE, **MADE}, size=2)
    tasks = tasks_of(*(f"job {n}" for n in range(20)))
    make(crew, tasks)
    assert {task.state for task in tasks} == {DONE} and len(crew.given) == 20 and crew.most == 2
    assert all(task.made == 2 and task.worker is None for task in tasks) and crew.dropped == []


@pytest.mark.parametrize("max_failures", [1, 3])
def test_a_chain_that_kills_its_worker_does_not_cost_the_one_before_it(max_failures: int) -> None:
    crew = Writing(lambda name, count: None if name == "poison" else {"state": DONE, **MADE})
    tasks = tasks_of("a", "poison", "b", "c")
    make(crew, tasks, max_failures=max_failures)
    states = {task.row.name: (task.state, task.failures) for task in tasks}
    assert states == {"a": (DONE, 0), "poison": (FAILED, max_failures), "b": (DONE, 0), "c": (DONE, 0)}
    # with two in hand nobody knows whose fault it was; from then on both are made alone
    assert [name for _, name in crew.given].count("poison") == max_failures + 1
    assert [name for _, name in crew.given].count("a") == 2


def test_a_failure_while_the_last_one_is_written_waits_with_the_worker_s_end() -> None:
    crew = Writing(lambda name, count: failed("internal") if (name, count) == ("b", 1) else {"state": DONE, **MADE})
    tasks = tasks_of("a", "b")
    make(crew, tasks)
    assert [(task.state, task.lost) for task in tasks] == [(DONE, 0), (DONE, 1)] and crew.dropped == [0]
    assert [name for _, name in crew.given] == ["a", "b", "b"]


def test_a_chain_that_could_not_be_written_is_tried_again_alone() -> None:
    crew = Writing(
        lambda name, count: (
            failed("disk_full") | {"late": True} if count == 1 and name == "a" else {"state": DONE, **MADE}
        )
    )
    tasks = tasks_of("a", "b", "c")
    make(crew, tasks)
    assert [(task.state, task.lost) for task in tasks] == [(DONE, 1), (DONE, 0), (DONE, 0)] and crew.dropped == []


def test_a_batch_that_is_left_keeps_what_was_being_written() -> None:
    crew = Writing(lambda name, count: {"state": DONE, **MADE})
    tasks = tasks_of("a", "b")
    batch = Batch(Settings(quiet=True), crew, tasks, None)  # type: ignore[arg-type]
    batch.check()
    for task in tasks:
        task.state = WAITING
    schedule = batch._schedule = Schedule(tasks, 3)
    batch._give(schedule, check=False)
    for event in crew.wait(0):
        batch._hear(schedule, event.kind, event.worker, event.message)
    assert list(batch._written) == [0]
    batch._give(schedule, check=False)
    batch.leave()
    assert [task.state for task in tasks] == [DONE, DONE]


def test_a_worker_that_writes_for_ever_is_replaced() -> None:
    crew = Writing(lambda name, count: {"state": DONE, **MADE})
    wait, opened = crew.wait, crew.opened

    def hangs(seconds: float) -> list[Event]:
        if opened[0] == 1 and crew.behind and not crew.events:
            live = {"id": "a", "silent": 99.0, "clip_seconds": None, **NOTHING}
            return [Event("seen", 0, live)]
        return wait(seconds)

    crew.wait = hangs  # type: ignore[method-assign]
    tasks = tasks_of("a")
    make(crew, tasks, patience=60.0)
    assert (tasks[0].state, tasks[0].lost, crew.dropped, opened[0]) == (DONE, 1, [0], 2)
