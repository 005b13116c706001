"""What the supervisor makes of its worker's words, with a worker that only says them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.server.metrics import Metrics
from wan.server.supervisor import MOST_ATTEMPTS, Supervisor
from wan.server.tickets import DONE, DRAFT, FAILED, MAKING, PAUSED, QUEUED, STATES, Queue, Ticket


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
