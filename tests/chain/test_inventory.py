"""Which clips of a script a folder holds, without a run: `Inventory` on a folder that is a value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.chain.changes import Change
from wan.chain.fingerprint import fingerprint
from wan.chain.inventory import Inventory
from wan.chain.script import Script
from wan.errors import UserError
from wan.options import Settings


def settings_of(tmp_path: Path, **values: Any) -> Settings:
    video = tmp_path / "in.mp4"
    video.write_bytes(b"a video")
    return Settings(video=str(video), base_seed=7, **values)


def script_of(*prompts: str, cuts: tuple[int, ...] = ()) -> Script:
    """Clips with these prompts, of which those of these numbers are cuts."""
    plans: Any = [
        SimpleNamespace(is_cut=number in cuts, best_of=1, prompt=prompt) for number, prompt in enumerate(prompts, 1)
    ]
    wanted = [{"task": "t", "checkpoint": "c", "width": 8, "height": 8, "prompt": prompt} for prompt in prompts]
    return Script((), plans, wanted)


def folder_of(path: Path, clips: Mapping[int, Mapping[str, Any]], elsewhere: Any = None) -> Any:
    """A folder in which these clips are finished, by what they were made with."""
    finished = {
        number: SimpleNamespace(
            number=number, settings=dict(settings), fingerprint=fingerprint(settings), is_pruned=False, video=path
        )
        for number, settings in clips.items()
    }
    nowhere = SimpleNamespace(find=lambda digest: elsewhere)
    return SimpleNamespace(path=path, run={}, faults={}, clips=lambda: finished, elsewhere=nowhere)


def test_a_clip_counts_if_it_and_all_before_it_are_what_is_asked_for(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    new = Inventory(settings, script_of("a", "b", "c"), folder_of(tmp_path, {}))
    assert new.first_missing == 1 and len(new.missing) == new.count == 3 and not new.changes
    assert [new.wanted[number]["seed"] for number in (1, 2, 3)] == [7, 8, 9]
    assert new.wanted[2]["parent"] == fingerprint(new.wanted[1]) and new.wanted[1]["parent"] == new.source_digest

    same = Inventory(settings, script_of("a", "b", "c"), folder_of(tmp_path, {n: new.wanted[n] for n in (1, 2)}))
    assert same.first_missing == 3 and [plan.prompt for plan in same.missing] == ["c"] and not same.again

    other = Inventory(settings, script_of("a", "x", "c"), folder_of(tmp_path, new.wanted))
    assert list(other.clips) == [1] and other.first_missing == 2
    assert other.again == [Change(2, ("its prompt changed",), 2), Change(3, (), 2)] == other.remade
    other.give_up()
    assert other.again and not other.remade  # it was agreed to


def test_nothing_follows_from_what_is_before_a_cut(tmp_path: Path) -> None:
    script, settings = script_of("a", "b", "c", cuts=(2,)), settings_of(tmp_path)
    before = Inventory(settings, script, folder_of(tmp_path, {}))
    assert before.wanted[2]["parent"] is None
    changed = script_of("x", "b", "c", cuts=(2,))
    after = Inventory(settings, changed, folder_of(tmp_path, before.wanted))
    assert list(after.clips) == [2, 3] and [change.number for change in after.again] == [1]


def test_a_clip_that_lies_elsewhere_is_not_made(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    wanted = Inventory(settings, script_of("a"), folder_of(tmp_path, {})).wanted[1]
    lies: Any = SimpleNamespace(fingerprint=fingerprint(wanted), is_pruned=False, video=tmp_path / "redone/01.mp4")
    inventory = Inventory(settings, script_of("a"), folder_of(tmp_path, {}, elsewhere=lies))
    assert inventory.elsewhere == inventory.clips == {1: lies} and not inventory.missing
    assert inventory.moved == ["clip 1 is there already: it is redone/01.mp4"]


def test_clips_that_there_are_not_cannot_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"take 3=1 is beyond num_videos 2"):
        Inventory(settings_of(tmp_path, take=((3, 1),)), script_of("a", "b"), folder_of(tmp_path, {}))
    with pytest.raises(UserError, match=r"redo 1: .* holds no finished clip"):
        Inventory(settings_of(tmp_path, redo=1), script_of("a", "b"), folder_of(tmp_path, {}))
