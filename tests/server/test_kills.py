"""Kills and load, in short; `python -m benchmarks.serve` has the long ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.serve import kill, load

pytestmark = [pytest.mark.slow, pytest.mark.rare]


def test_killed_servers_and_workers_finish_what_was_asked_for_once(tmp_path: Path) -> None:
    result = kill(4, tmp_path, clips=2, step=0.05)
    assert result == {"kills": 4, "ends": ["completed"] * 3, "bit_equal": True, "made_twice": 0, "left": []}


def test_no_request_is_lost_and_a_client_that_vanishes_leaves_nothing(tmp_path: Path) -> None:
    result = asyncio.run(load(10, 12, 4, tmp_path / "out"))
    assert (result["lost"], result["left"]) == (0, 0), result["first_lost"]
    assert result["gets"] > 30 and result["uploads"] > 0
