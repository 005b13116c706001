"""Who hears how far a chain is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from wan.server import live
from wan.server.live import Audience


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
