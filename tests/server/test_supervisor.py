"""What the supervisor makes of its worker's words, with a worker that only says them."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.server.metrics import Metrics
from wan.server.supervisor import MOST_ATTEMPTS, Supervisor
from wan.server.tickets import DONE, DRAFT, FAILED, MAKING, PAUSED, QUEUED, STATES, Queue, Ticket, new_id


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path / "queue.sqlite3")
    yield queue
    queue.close()


def supervisor(queue: Queue, ranks: int = 1) -> tuple[Supervisor, list[Any]]:
    """One that makes chain a, and what it tells listeners."""
    host = Supervisor(queue, Path(), {}, lambda ticket: {"of": ticket.id}, Metrics(), ranks=ranks)
    host.state, host.making = "busy", "a"
    told = list[Any]()
    tell = host.audience.tell

    def telling(name: str, event: str, **more: Any) -> None:
        told.append((name, event, more))
        tell(name, event, **more)

    host.audience.tell = telling  # type: ignore[method-assign]
    return host, told


def count(host: Supervisor, name: str, **labels: str) -> float:
    return host.metrics.registry.get_sample_value(name, labels) or 0.0


def hear(host: Supervisor, **message: Any) -> bool:
    return asyncio.run(host._heard(message))


def test_a_finished_clip_is_kept_counted_and_told(queue: Queue) -> None:
    queue.add(Ticket("a", state=MAKING, count=3, attempts=2))
    host, told = supervisor(queue)
    assert hear(host, event="there", id="a", done=1, count=3)
    assert (queue["a"].done, queue["a"].attempts) == (1, 1) and count(host, "wan_clips_total") == 0
    assert hear(host, event="step", id="a", step=2, steps=4)
    assert hear(host, event="clip_finished", id="a", clip=2, count=3)
    assert queue["a"].done == 2 and count(host, "wan_clips_total") == count(host, "wan_step_reports_total") == 1
    assert [event for _, event, _ in told] == ["there", "step", "clip_finished"]
    assert host.audience.of("a").share == 0.5


def test_words_about_another_chain_change_nothing(queue: Queue) -> None:
    queue.add(Ticket("a", state=MAKING, count=3))
    host, told = supervisor(queue)
    for name in ("b", ""):
        assert hear(host, event="clip_finished", id=name, clip=2)
    assert queue["a"].done == 0 and not told and count(host, "wan_clips_total") == 0
    assert hear(host, event="ready") and host.state == "idle" and host._wake.is_set()


@pytest.mark.parametrize(
    ("state", "error", "done", "has_ended"),
    [(DONE, None, 3, True), (PAUSED, None, 1, False), (FAILED, {"code": "x", "message": "it broke"}, 1, True)],
)
def test_a_chain_ends_as_its_worker_says(queue: Queue, state: str, error: Any, done: int, has_ended: bool) -> None:
    queue.add(Ticket("a", state=MAKING, count=3, done=1))
    host, told = supervisor(queue)
    assert hear(host, event="end", id="a", state=state, error=error)
    ticket = queue["a"]
    assert (ticket.state, ticket.done, ticket.error) == (state, done, error)
    assert (ticket.completed_at is not None) is has_ended
    assert (host.state, host.making) == ("idle", None) and host._wake.is_set()
    assert count(host, "wan_chains_ended_total", state=state) == 1
    assert told[0] == ("a", "state", {"state": state, "error": error})


def test_a_chain_that_was_changed_waits_again_unless_it_failed(queue: Queue) -> None:
    for state, then in ((DONE, QUEUED), (PAUSED, QUEUED), (FAILED, FAILED)):
        queue.add(Ticket("a", state=MAKING, count=3, again=True))
        host, _ = supervisor(queue)
        hear(host, event="end", id="a", state=state, error=None)
        assert queue["a"].state == then and not queue["a"].again
        queue.remove("a")


@pytest.mark.parametrize(
    ("ranks", "state", "stays"),
    [(1, FAILED, True), (1, "cancelled", True), (2, DONE, True), (2, PAUSED, True), (2, FAILED, False)],
)
def test_processes_that_share_a_chain_end_with_one_that_fails(
    queue: Queue, ranks: int, state: str, stays: bool
) -> None:
    queue.add(Ticket("a", state=MAKING))
    host, _ = supervisor(queue, ranks)
    assert hear(host, event="end", id="a", state=state, error=None) is stays
    assert host.state == ("idle" if stays else "starting")


def test_a_worker_that_lost_a_process_is_replaced_and_its_chain_is_not_failed(queue: Queue) -> None:
    queue.add(Ticket("a", state=MAKING))
    host, _ = supervisor(queue, 2)
    assert not hear(host, event="end", id="a", state=FAILED, error={"code": "worker_lost", "message": "gone"})
    assert queue["a"].state == MAKING and host.making == "a"


def test_a_chain_whose_worker_is_lost_comes_first_until_it_has_taken_down_three(queue: Queue) -> None:
    queue.add(Ticket("b"))
    queue.add(Ticket("a", state=MAKING, attempts=MOST_ATTEMPTS - 1))
    host, told = supervisor(queue)
    asyncio.run(host._lost())
    following = queue.next()
    assert following is not None and following.id == "a" and host.making is None
    assert told == [("a", "state", {"state": QUEUED})] and host._wake.is_set()
    queue.change("a", state=MAKING, attempts=MOST_ATTEMPTS)
    host.making = "a"
    asyncio.run(host._lost())
    assert queue["a"].state == FAILED and (queue["a"].error or {})["code"] == "worker_lost"
    asyncio.run(host._lost())  # it made nothing
    host.making = "removed"
    asyncio.run(host._lost())
    assert host.making is None


def test_a_chain_that_nobody_wants_is_neither_kept_nor_made_again(queue: Queue) -> None:
    for lose in (True, False):
        queue.add(Ticket("a", state=MAKING, count=3))
        host, told = supervisor(queue)
        host._unwanted.add("a")
        if lose:
            asyncio.run(host._lost())
        else:
            hear(host, event="end", id="a", state="cancelled", error=None)
        assert queue["a"].state == MAKING and not host._unwanted and host.making is None
        assert not [event for _, event, _ in told if event == "state"]
        queue.remove("a")


def test_an_idle_worker_gets_what_waited_longest(queue: Queue) -> None:
    for name in ("a", "b"):
        queue.add(Ticket(name, attempts=1))
    host, told = supervisor(queue)
    orders = list[Any]()
    host._say = orders.append  # type: ignore[method-assign,assignment]
    host.making = None

    async def give(*states: str) -> None:
        giving = asyncio.create_task(host._give())
        for state in states:
            host.state = state
            host.wake()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        giving.cancel()

    asyncio.run(give("starting", "busy"))
    assert not orders
    asyncio.run(give("idle"))
    assert orders == [{"id": "a", "settings": {"of": "a"}}]
    assert host.state == "busy" and host.making is not None
    assert (queue["a"].state, queue["a"].attempts, queue["b"].state) == (MAKING, 2, QUEUED)
    assert told == [("a", "state", {"state": MAKING})]
    queue.change("b", state=PAUSED)
    asyncio.run(give("idle"))
    assert len(orders) == 1 and host.state == "idle"


def test_workers_that_end_at_once_are_replaced_more_and_more_slowly(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = supervisor(queue)
    clock, waits = [0.0], list[float]()
    lives = iter([0, 1, 60, 9, 9, 9, 9, 61, 9])

    async def one_worker() -> None:
        clock[0] += next(lives)
        if len(waits) == 2:
            raise ConnectionResetError("it hung up")

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 9:
            raise asyncio.CancelledError

    host._one_worker = one_worker  # type: ignore[method-assign]
    monkeypatch.setattr("wan.server.supervisor.time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 0))
    monkeypatch.setattr("wan.server.supervisor.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(host.run())
    assert waits == [1, 2, 4, 8, 16, 30, 30, 0.5, 1] and count(host, "wan_workers_lost_total") == 9
    assert host.state == "starting"


def test_a_worker_is_told_the_settings_and_ended_when_it_is_good_for_no_more(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.add(Ticket("a", state=MAKING))
    host, _ = supervisor(queue, 2)
    lost = {"event": "end", "id": "a", "state": FAILED, "error": {"code": "worker_lost", "message": "gone"}}
    words, done = [{"event": "step", "id": "b"}, lost, {"event": "ready"}], list[Any]()

    class Worker:
        async def hear(self) -> Any:
            return words.pop(0) if words else None

        async def end(self, seconds: float) -> None:
            done.append(seconds)

        def say(self, order: Any) -> None:
            done.append(order)

    async def start(command: Any, ranks: int) -> Any:
        done.append(ranks)
        return Worker()

    monkeypatch.setattr("wan.server.supervisor.Processes.start", start)
    asyncio.run(host._one_worker())
    assert done == [2, {"settings": {}, "root": "."}, 5.0] and words == [{"event": "ready"}]
    asyncio.run(host._one_worker())  # one that ends by itself
    assert not words and done[-1] == 5.0 and host.state == "idle"


def test_drafts_are_not_listed_and_each_state_is_counted(queue: Queue) -> None:
    for number, state in enumerate((*STATES, QUEUED)):
        queue.add(Ticket(str(number), state=state))
    assert queue.counts() == dict.fromkeys(STATES, 1) | {QUEUED: 2}
    listed: Callable[..., list[str]] = lambda **words: [one.id for one in queue.all(**words)]  # noqa: E731
    assert DRAFT not in {one.state for one in queue.all()}
    assert listed() == ["6", "5", "4", "3", "2", "1"] and listed(drafts=True)[-1] == "0"
    assert listed(newest_first=False, limit=2) == ["1", "2"]
    assert listed(after="4") == ["3", "2", "1"] and listed(after="4", newest_first=False) == ["5", "6"]
    with pytest.raises(KeyError):
        queue.all(after="none")


def test_a_chain_is_cancelled_when_the_worker_has_left_it(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.add(Ticket("a", state=MAKING))
    host, _ = supervisor(queue)
    orders = list[Any]()
    monkeypatch.setattr(host, "_say", orders.append)

    async def work() -> None:
        await asyncio.wait_for(host.cancel("b"), 1)  # which nobody makes
        assert orders == []
        cancelling = asyncio.create_task(host.cancel("a"))
        await asyncio.sleep(0)
        assert orders == [{"cancel": "a"}] and not cancelling.done()
        await host._heard({"event": "end", "id": "a", "state": "cancelled"})
        await asyncio.wait_for(cancelling, 5)
        assert host._gone == {} and host.making is None and queue["a"].state == MAKING

    asyncio.run(work())


def test_a_worker_that_does_not_hear_is_ended_for_a_chain_that_nobody_wants(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.add(Ticket("a", state=MAKING))
    host, _ = supervisor(queue)
    ends, waits = list[str](), list[float]()
    wait_for = asyncio.wait_for

    async def at_once(waiting: Any, seconds: float) -> Any:
        waits.append(seconds)
        return await wait_for(waiting, 0.001)

    async def end_worker() -> None:
        ends.append("end")
        await host._lost()

    monkeypatch.setattr("wan.server.supervisor.asyncio.wait_for", at_once)
    monkeypatch.setattr(host, "end_worker", end_worker)
    asyncio.run(host.cancel("a"))
    assert ends == ["end"] and waits == [30] and host._gone == {} and host._unwanted == set()


def test_a_supervisor_that_ends_ends_its_worker(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _ = supervisor(queue)
    kills = list[str]()
    asyncio.run(host.end_worker())  # there is none yet
    host._processes = SimpleNamespace(kill=lambda: kills.append("kill"))  # type: ignore[assignment]

    async def one_worker() -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(host, "_one_worker", one_worker)

    async def work() -> None:
        running = asyncio.create_task(host.run())
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(work())
    assert kills == ["kill"] and count(host, "wan_workers_lost_total") == 0


def test_what_the_worker_was_given_is_made_known_without_paths(queue: Queue) -> None:
    queue.add(Ticket("a", state=MAKING, count=3))
    host, told = supervisor(queue)
    hear(host, event="warning", id="a", message="/srv/x/a.mp4 is dark")
    assert told == [("a", "warning", {"message": "a.mp4 is dark"})] and host.audience.of("a").warnings == [
        "a.mp4 is dark"
    ]
    hear(host, event="end", id="a", state=FAILED, error={"code": "x", "message": "/srv/x/a.mp4 is gone"})
    assert queue["a"].error == {"code": "x", "message": "a.mp4 is gone"}
    assert host.audience.of("a").events[-1]["event"] == "state"  # and its end is told once


def test_a_queue_whose_disk_is_full_is_tried_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.add(Ticket("a", state=MAKING))
    host, _ = supervisor(queue)
    change, waits = queue.change, list[float]()

    def full(name: str, **values: Any) -> Ticket:
        if len(waits) < 2:
            raise sqlite3.OperationalError("database or disk is full")
        return change(name, **values)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(queue, "change", full)
    monkeypatch.setattr("wan.server.supervisor.asyncio.sleep", sleep)
    kept = asyncio.run(host._keep("a", done=1))
    assert kept is not None and kept.done == 1 and waits == [5, 5]
    assert asyncio.run(host._keep("removed", done=1)) is None


def test_a_row_keeps_what_it_is_given(queue: Queue) -> None:
    ticket = Ticket(
        *("a", FAILED, 1, 2.0, 3, "m", "A boat.", "boat.mp4", 4.5, "8x8", {"take": [[1, 2]]}, "source.mp4"),
        *(True, "b", "c", 5, 4, 3, True, 2, {"code": "x", "message": "y"}),
    )
    added = queue.add(ticket)
    assert added == dataclasses.replace(ticket, created_at=added.created_at, queued_at=added.queued_at)
    assert added.created_at == int(added.queued_at) and abs(time.time() - added.queued_at) < 60
    changed = queue.change("a", again=False, error=None, settings={"prompt": "x"}, still=False)
    assert (changed.again, changed.error, changed.settings, changed.still) == (False, None, {"prompt": "x"}, False)
    waiting = queue.wait_again("a")
    assert (waiting.state, waiting.completed_at, waiting.attempts, waiting.again) == (QUEUED, None, 0, False)
    assert waiting.queued_at > added.queued_at and waiting.done == 4
    with pytest.raises(KeyError):
        queue.change("none", done=1)
    assert new_id() != new_id() and queue.secret() == queue.secret() and len(queue.secret()) == 32
    plain = Ticket("b")
    assert (plain.state, plain.count, plain.done, plain.base, plain.still, plain.again) == (
        QUEUED,
        1,
        0,
        0,
        False,
        False,
    )
    assert (plain.attempts, plain.seconds, plain.completed_at, plain.error) == (0, 0.0, None, None)
