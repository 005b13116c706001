"""Who hears how far a chain is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from wan.server import live
from wan.server.live import Audience, Live


async def heard(audience: Audience, after: int = 0) -> list[dict[str, Any]]:
    return [event async for event in audience.listen("a", after)]


def test_who_comes_back_hears_what_was_missed_and_who_listens_stays_when_a_chain_begins_again() -> None:
    async def work() -> None:
        audience = Audience()
        audience.tell("a", "state", state="queued")
        audience.tell("b", "state", state="queued")
        audience.tell("a", "state", state="making")
        late, back = asyncio.create_task(heard(audience)), asyncio.create_task(heard(audience, after=1))
        await asyncio.sleep(0)
        audience.begin("a")
        audience.tell("a", "step", step=1)
        audience.close()
        assert [event["id"] for event in await late] == [4]
        assert [event["id"] for event in await back] == [3, 4]
        assert audience.get("a") is None

    asyncio.run(work())


def test_who_is_too_far_behind_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_BEHIND", 3)

    async def work() -> None:
        audience = Audience()
        slow = asyncio.create_task(heard(audience))
        await asyncio.sleep(0)
        for number in range(5):  # it has no turn meanwhile
            audience.tell("a", "step", step=number)
        assert [event["step"] for event in await asyncio.wait_for(slow, 5)] == [1, 2]
        assert not audience.of("a").listeners

    asyncio.run(work())


def test_what_a_worker_says_of_a_clip_is_kept_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now, one = [100.0], Live()
    monkeypatch.setattr("wan.server.live.time.monotonic", lambda: now[0])
    assert (one.share, one.seconds_left) == (0.0, None)
    for event, values in (
        ("clip_started", {"clip": 2}),
        ("prompt", {"prompt": "A boat."}),
        ("stage", {"stage": "sample", "step": 0}),
        ("step", {"step": 0, "steps": 8}),
        ("warning", {"message": "dark"}),
        ("another", {}),
    ):
        one.hear(event, values)
    assert (one.clip, one.prompt, one.stage, one.step, one.steps, one.warnings) == (
        2,
        "A boat.",
        "sample",
        0,
        8,
        ["dark"],
    )
    assert (one.share, one.seconds_left) == (0.0, None)  # no step is done
    now[0] += 3
    one.hear("step", {"step": 2, "steps": 8})
    assert (one.share, one.seconds_left) == (0.25, 9.0)
    one.hear("step", {"step": 9, "steps": 8})
    assert one.share == 1.0
    one.hear("stage", {"stage": "write", "step": 9})
    assert one.seconds_left is None
    one.hear("clip_started", {"clip": 3})
    assert (one.clip, one.prompt, one.stage, one.step, one.steps, one.before) == (3, "", "", 0, 0, 0)
    assert one.warnings == ["dark"]


def test_a_chain_that_begins_again_forgets_what_was_known() -> None:
    audience = Audience()
    assert audience.get("a") is None
    audience.of("a").hear("warning", {"message": "dark"})
    before = audience.of("a").listeners
    audience.begin("a")
    assert audience.of("a").warnings == [] and audience.of("a").listeners is before
    audience.begin("b")
    assert audience.get("b") == Live()


def test_of_a_chain_that_is_no_more_all_hear_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_BEHIND", 2)

    async def work() -> None:
        audience = Audience()
        slow, other = asyncio.create_task(heard(audience)), asyncio.create_task(heard(audience))
        await asyncio.sleep(0)
        for number in range(2):
            audience.tell("a", "step", step=number)
        audience.forget("a")  # it is behind by all that it may
        audience.forget("a")
        for one in (slow, other):
            assert [event["step"] for event in await asyncio.wait_for(one, 5)] == [1]

    asyncio.run(work())


def test_so_many_events_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    audience = Audience()
    for number in range(live.KEPT + 5):
        audience.tell("a", "step", step=number)
    assert [one["step"] for one in audience.of("a").events] == list(range(5, live.KEPT + 5))

    async def back(after: int) -> list[int]:
        reading = asyncio.create_task(heard(audience, after))
        await asyncio.sleep(0)
        audience.close()
        return [event["id"] for event in await reading]

    assert asyncio.run(back(203)) == [204, 205]
    assert live.KEPT == 200 and live._BEHIND == 500
