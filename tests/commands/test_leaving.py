"""How a command's own process ends."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest

from wan import cli


@pytest.mark.parametrize(("code", "launched", "at_once"), [(0, False, True), (0, True, False), (2, True, True)])
def test_a_launched_process_is_taken_apart_only_where_all_is_well(
    code: int, launched: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[str, int]] = []

    def end(given: int) -> None:
        ends.append(("at once", given))
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    for name in ("gettrace", "getprofile"):
        monkeypatch.setattr(sys, name, lambda: None)
    monkeypatch.setattr(multiprocessing, "active_children", list)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        cli._leave(code)
    assert ends == ([("at once", code)] if at_once else []) and (at_once or left.value.code == code)
