"""What a worker's Hand tells its processes, hears of them and hands on, with processes that are made up."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import wan.batch.hand as module
from tests.support.golden import ROOT
from wan.batch.hand import LOST, UPLOAD, WRITING, Hand
from wan.batch.upload import UploadError
from wan.server.tickets import DONE, FAILED
from wan.server.wire import CHECKED

GIB = 1 << 30


class Group:
    """Stands for the processes: what they are told, and what the first of them says."""

    def __init__(self, *, starts: bool = True) -> None:
        self.told, self.to_all, self.ended = list[dict[str, Any]](), list[bool](), list[float]()
        self.words = asyncio.Queue[Any]()
        self.processes = [SimpleNamespace(pid=11), SimpleNamespace(pid=12)]
        self.command: Any = None
        self.words.put_nowait({"event": "ready"} if starts else None)

    async def start(self, *command: Any, **more: Any) -> Group:
        self.command = command, more
        return self

    def say(self, order: Mapping[str, Any], *, to_all: bool = True) -> None:
        self.told.append(dict(order))
        self.to_all.append(to_all)

    async def hear(self) -> Any:
        message = await self.words.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def why(self, seconds: float) -> str:
        return f"it ended within {seconds} s"

    async def end(self, seconds: float) -> None:
        self.ended.append(seconds)

    async def speak(self, name: str, *messages: tuple[str, dict[str, Any]]) -> None:
        """Let the first process say something of a chain, and the hand hear it."""
        for event, values in messages:
            self.words.put_nowait({"event": event, "id": name, **values})
        await turns()


async def turns() -> None:
    for _ in range(9):
        await asyncio.sleep(0)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "host_bytes", lambda: 100 * GIB)
    monkeypatch.setattr(module, "host_free_bytes", lambda: 80 * GIB)
    monkeypatch.setattr(module, "usable_cores", lambda: 12)
    return clock


def working(
    work: Callable[[Hand, Group], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
    captioner: Any = None,
    ranks: int = 1,
    siblings: int = 1,
) -> None:
    """Run something with a hand that has started, and its group."""

    async def run() -> None:
        group = Group()
        monkeypatch.setattr("wan.batch.hand.Processes.start", group.start)
        hand = Hand(("a", "command"), ranks, siblings, os.getcwd(), None, captioner)
        await hand.start()
        group.told.clear()
        group.to_all.clear()
        await asyncio.wait_for(work(hand, group), 10)

    asyncio.run(run())


def order(name: str, folder: Path = Path("nowhere"), **more: Any) -> dict[str, Any]:
    return {"id": name, "settings": {"output_dir": str(folder)}, **more}


async def begin(hand: Hand, given: Mapping[str, Any]) -> asyncio.Task[dict[str, Any]]:
    doing = asyncio.create_task(hand.do(given))
    await turns()
    return doing


CLIPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("there", {"done": 1, "count": 4}),
    ("clip_started", {"clip": 2, "count": 4, "seed": 1}),
    ("clip_finished", {"clip": 2, "count": 4, "seam": None}),
    ("clip_started", {"clip": 3, "count": 4, "seed": 1}),
)


@pytest.mark.parametrize(
    ("threads", "ranks", "siblings", "each"),
    [(None, 1, 1, "12"), (None, 2, 3, "2"), (None, 5, 3, "1"), ("7", 2, 3, "7")],
)
def test_processes_are_started_with_their_share_of_the_cores_where_the_command_was_given(
    threads: str | None,
    ranks: int,
    siblings: int,
    each: str,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    async def start(folder: Path, captioner: Any = None) -> tuple[Any, Group]:
        group = Group()
        monkeypatch.setattr("wan.batch.hand.Processes.start", group.start)
        return await Hand(("a", "command"), ranks, siblings, str(folder), threads, captioner).start(), group

    monkeypatch.setenv("PYTHONPATH", "mine")
    ready, group = asyncio.run(start(tmp_path))
    assert ready == {"node": platform.node(), "pids": [11, 12]}
    variables = {"OMP_NUM_THREADS": each, "PYTHONPATH": f"{ROOT}{os.pathsep}mine"}
    given = {"variables": variables, "folder": str(tmp_path), "keeps_tail": True, "last_word": 0}
    assert group.command == ((("a", "command"), ranks), given) and group.told == [{"settings": {}, "asks": False}]
    monkeypatch.delenv("PYTHONPATH")
    _, group = asyncio.run(start(tmp_path / "of another machine", captioner="one"))
    assert group.command[1]["folder"] is None and group.command[1]["variables"]["PYTHONPATH"] == str(ROOT)
    assert group.told == [{"settings": {}, "asks": True}]


def test_processes_that_cannot_start_say_why(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start() -> Any:
        group = Group(starts=False)
        monkeypatch.setattr("wan.batch.hand.Processes.start", group.start)
        return await Hand(("a",), 1, 1, os.getcwd(), None).start()

    assert asyncio.run(start()) == {"error": "it ended within 5.0 s"}


@pytest.mark.parametrize(
    ("ranks", "siblings", "free", "share"),
    [(1, 1, 80, None), (1, 3, 80, 30.0), (3, 1, 80, 30.0), (2, 3, 80, 15.0), (1, 3, 12.3456, 12.35), (2, 3, 0.5, 1.0)],
)
def test_hands_of_a_machine_share_its_memory(
    ranks: int, siblings: int, free: float, share: float | None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "host_free_bytes", lambda: int(free * GIB))

    async def work(hand: Hand, group: Group) -> None:
        mine = order("b")
        mine["settings"]["host_memory"] = 5
        for given in (order("a"), mine):
            doing = await begin(hand, given)
            await group.speak(given["id"], ("end", {"state": "cancelled"}))
            await doing
        shares = [told["share"].get("host_memory") for told in group.told]
        assert shares == [share, None] and "host_memory" not in group.told[0]["settings"]
        assert group.told[1]["settings"]["host_memory"] == 5 and group.told[0]["settings"]["output_dir"] == "nowhere"

    working(work, monkeypatch, ranks=ranks, siblings=siblings)


@pytest.mark.parametrize(
    ("ranks", "siblings", "kinds", "told"),
    [(1, 1, 1, None), (1, 8, 1, 8), (1, 8, 3, 2), (1, 8, 5, None), (1, 2, 9, None), (2, 4, 1, None), (1, 4, None, 4)],
)
def test_hands_of_a_machine_have_weights_in_common_unless_each_may_have_others(
    ranks: int, siblings: int, kinds: int | None, told: int | None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(hand: Hand, group: Group) -> None:
        given, mine = order("a"), order("b")
        mine["settings"]["share_weights"] = 1
        for one in (given, mine):
            doing = await begin(hand, one if kinds is None else {**one, "kinds": kinds})
            await group.speak(one["id"], ("end", {"state": "cancelled"}))
            await doing
        assert [one["share"].get("share_weights") for one in group.told] == [told, None]
        rounded = order("c")
        rounded["settings"]["precision"] = "fp8"  # each process has its own then
        doing = await begin(hand, rounded)
        await group.speak("c", ("end", {"state": "cancelled"}))
        await doing
        assert "share_weights" not in group.told[-1]["share"]

    working(work, monkeypatch, ranks=ranks, siblings=siblings)


def test_it_is_told_how_far_a_chain_is(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(hand: Hand, group: Group) -> None:
        assert await hand.look() == {"id": None}
        doing = await begin(hand, order("a"))
        clock.now = 107.0
        look = await hand.look()
        assert (look["id"], look["done"], look["made"], look["silent"], look["clip_seconds"]) == ("a", 0, 0, 7.0, None)
        await group.speak("a", *CLIPS, ("stage", {"stage": "sample", "step": 1}), ("step", {"step": 3, "steps": 8}))
        clock.now = 110.0
        look = await hand.look()
        assert (look["done"], look["count"], look["made"], look["clip"]) == (2, 4, 1, 3)
        assert (look["stage"], look["step"], look["steps"]) == ("sample", 3, 8) and look["seconds_left"] is not None
        assert (look["silent"], look["clip_seconds"]) == (3.0, 3.0)
        await group.speak("another", ("clip_finished", {"clip": 4, "count": 4}))  # of which nobody knows
        assert ((await hand.look())["done"], (await hand.look())["silent"]) == (2, 0.0)
        await group.speak("a", *[("warning", {"message": str(number)}) for number in range(7)])
        await group.speak("a", ("end", {"state": "cancelled"}))
        ended = await doing
        assert (ended["state"], ended["done"], ended["count"], ended["made"]) == ("cancelled", 2, 4, 1)
        assert ended["warnings"] == ["2", "3", "4", "5", "6"] and await hand.look() == {"id": None}
        doing = await begin(hand, order("b"))  # whose counts are its own
        assert ((await hand.look())["made"], (await hand.look())["clip"]) == (0, 0)
        clock.now = 200.0
        doing.cancel()

    working(work, monkeypatch)


def test_a_chain_is_written_while_the_next_one_is_made(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(hand: Hand, group: Group) -> None:
        doing = await begin(hand, order("a"))
        await group.speak("a", *CLIPS, ("made", {}))
        assert await doing == {"state": WRITING, "done": 2, "count": 4, "made": 1}
        writing = asyncio.create_task(hand.written())
        look = await hand.look()
        assert (look["id"], look["clip_seconds"]) == ("a", None)  # no clip is being made
        doing = await begin(hand, order("b"))
        assert (await hand.look())["id"] == "b" and not writing.done()
        await hand.stop()
        assert group.told[-2:] == [{"cancel": "a"}, {"cancel": "b"}]
        await group.speak("b", ("made", {}))
        assert not doing.done()  # one at most is behind
        await group.speak("a", ("end", {"state": DONE}))
        assert (await writing)["state"] == DONE and (await doing)["state"] == WRITING
        assert (await hand.look())["id"] == "b"
        await group.speak("b", ("end", {"state": FAILED}))
        assert (await hand.written())["state"] == FAILED and await hand.look() == {"id": None}

    working(work, monkeypatch)


def test_an_order_after_the_end_of_the_processes_is_lost_at_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(hand: Hand, group: Group) -> None:
        doing = await begin(hand, order("a"))
        group.words.put_nowait(None)
        lost = {"state": LOST, "error": {"code": "worker_lost", "message": "it ended within 5.0 s"}}
        assert {name: (await doing)[name] for name in lost} == lost
        again = await hand.do(order("b"))
        assert {name: again[name] for name in lost} == lost and not group.ended

    working(work, monkeypatch)


def test_what_cannot_be_understood_ends_the_processes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(hand: Hand, group: Group) -> None:
        first = await begin(hand, order("a"))
        await group.speak("a", ("made", {}), ("end", {"state": DONE}))
        second = await begin(hand, order("b"))
        group.words.put_nowait({"event": "clip_finished", "id": "b"})  # which clip?
        message = "the process that makes videos was ended, for it said: KeyError: 'clip'"
        assert (await second)["error"] == {"code": "worker_lost", "message": message} and group.ended == [0]
        assert (await first)["state"] == WRITING and (await hand.written())["state"] == DONE

    working(work, monkeypatch)


def test_an_answer_goes_to_the_process_that_asked(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def captioner(asked: Any) -> Any:
        clock.now += 30
        return {"text": asked["what"]}

    async def work(hand: Hand, group: Group) -> None:
        doing = await begin(hand, order("a"))
        await group.speak("a", ("ask", {"number": 7, "asked": {"what": "boat"}}))
        assert group.told[1:] == [{"number": 7, "answer": {"text": "boat"}}] and group.to_all == [True, False]
        assert (await hand.look())["silent"] == 0.0  # a captioner that is busy is no process that hangs
        doing.cancel()

    working(work, monkeypatch, captioner)


def test_before_it_has_processes_there_is_nobody_to_stop_or_to_end(clock: Clock) -> None:
    hand = Hand(("a",), 1, 1, os.getcwd(), None)
    asyncio.run(hand.stop())
    asyncio.run(hand.end())


def estimate(missing: int) -> dict[str, Any]:
    return {"clips": 2, "missing": missing}


@pytest.mark.parametrize(
    ("end", "check", "uploads", "looks"),
    [
        ({"state": DONE}, False, "upload", True),
        ({"state": FAILED}, False, None, True),
        ({"state": "cancelled"}, False, None, True),
        ({"state": CHECKED, "found": estimate(0)}, True, "look", True),
        ({"state": CHECKED, "found": estimate(1)}, True, "look", True),
        ({"state": CHECKED, "found": estimate(2)}, True, "look", False),  # none of its clips is there
        ({"state": FAILED}, True, None, False),
    ],
)
def test_what_is_made_is_uploaded_and_a_check_looks_what_is_there(
    end: dict[str, Any],
    check: bool,
    uploads: str | None,
    looks: bool,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    done = list[Any]()

    def upload(folder: Path, place: str, heard: Callable[[], None]) -> None:
        clock.now += 50
        heard()
        done.append(("upload", folder, place))

    def is_uploaded(folder: Path, place: str) -> bool:
        done.append(("look", folder, place))
        return True

    monkeypatch.setattr("wan.batch.upload.upload", upload)
    monkeypatch.setattr("wan.batch.upload.is_uploaded", is_uploaded)

    async def work(hand: Hand, group: Group) -> None:
        for place in ("memory://a", None):
            given = order("a", tmp_path) | {"check": check} | ({"upload": place} if place else {})
            doing = await begin(hand, given)
            await group.speak("a", ("end", end))
            ended = await doing
            assert ended["state"] == end["state"] and ("attention" in ended) is looks
            assert ended.get("found") == (
                end["found"] | ({"uploaded": True} if place else {}) if "found" in end else None
            )
            assert done == ([(uploads, tmp_path, "memory://a")] if uploads else []) and hand._heard == clock.now

    working(work, monkeypatch)


def test_an_upload_that_fails_fails_the_chain(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def upload(*_: Any) -> None:
        raise UploadError("it is full there")

    monkeypatch.setattr("wan.batch.upload.upload", upload)

    async def work(hand: Hand, group: Group) -> None:
        doing = await begin(hand, order("a", tmp_path, upload="memory://a"))
        await group.speak("a", *CLIPS, ("end", {"state": DONE}))
        ended = await doing
        assert (ended["state"], ended["error"]) == (FAILED, {"code": UPLOAD, "message": "it is full there"})
        assert (ended["made"], ended["video_seconds"]) == (1, 0.0)

    working(work, monkeypatch)


def test_there_is_to_see_of_a_chain_its_seams_and_the_last_picture(tmp_path: Path) -> None:
    assert module._seen(tmp_path) == {"attention": [], "picture": None, "video_seconds": 0.0}
    clips = [{"number": number, "file": f"clip_{number}.mp4"} for number in (1, 2)]
    report = {"clips": clips, "attention": [{"clip": 2}], "video_seconds": 6.5}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    for number in (1, 2):
        (tmp_path / f"clip_{number}.mp4").touch()
        sheet = {f"sheet.{at}": np.frombuffer(bytes([number, at]), np.uint8) for at in range(2)}
        save_file(sheet, tmp_path / f"clip_{number}.safetensors")
    picture = base64.b64encode(b"\x02\x01").decode()
    assert module._seen(tmp_path) == {"attention": [{"clip": 2}], "picture": picture, "video_seconds": 6.5}
