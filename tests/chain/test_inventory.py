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


def test_a_clip_whose_predecessor_was_pruned_is_made_again_from_where_that_goes(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    prompts = ("a", "b", "c", "d", "e")

    def refusal(pruned: tuple[int, ...], present: tuple[int, ...], cuts: tuple[int, ...] = ()) -> str:
        script = script_of(*prompts, cuts=cuts)
        wanted = Inventory(settings, script, folder_of(tmp_path, {})).wanted
        folder = folder_of(tmp_path, {number: wanted[number] for number in present})
        for number in pruned:
            folder.clips()[number].is_pruned = True
        try:
            Inventory(settings, script, folder)
        except UserError as error:
            return str(error)
        return ""

    assert refusal((1, 2), (1, 2, 3)) == "", "clip 3 is whole"
    assert "clip 4 would be made after clip 3, whose frames were left out" in refusal((1, 2, 3), (1, 2, 3))
    assert "redo 1 makes the chain again from there" in refusal((1, 2, 3), (1, 2, 3))
    assert "redo 3 makes the chain again from there" in refusal((1, 3), (1, 2, 3))  # after clip 2, which is whole
    assert "redo 2 makes the chain again from there" in refusal((1, 2, 3), (1, 2, 3), cuts=(2,))
    assert "redo 2 makes" in refusal((1, 2, 3), (1, 2, 3), cuts=(2, 5)), "the cut after it helps nobody"
    assert refusal((1, 2, 3), (1, 2, 3), cuts=(4,)) == "", "a cut needs nothing of what is before"


def test_a_clip_that_is_to_be_made_again_must_be_there(tmp_path: Path) -> None:
    script, settings = script_of("a", "b", "c"), settings_of(tmp_path)
    wanted = Inventory(settings, script, folder_of(tmp_path, {})).wanted
    with pytest.raises(UserError, match=r"redo 3: .* holds clips 1 to 2"):
        Inventory(settings_of(tmp_path, redo=3), script, folder_of(tmp_path, {n: wanted[n] for n in (1, 2)}))
    with pytest.raises(UserError, match="redo 3 is beyond num_videos 2"):
        Inventory(settings_of(tmp_path, redo=3), script_of("a", "b"), folder_of(tmp_path, wanted))
    damaged = folder_of(tmp_path, {1: wanted[1]})
    damaged.faults = {2: "it is damaged", 4: "it is damaged too"}
    inventory = Inventory(settings_of(tmp_path, redo=2), script, damaged)
    assert inventory.damaged == ["clip 2 is made again: it is damaged"] and inventory.first_missing == 2
    again = Inventory(settings_of(tmp_path, redo=2), script, folder_of(tmp_path, wanted))
    assert list(again.clips) == [1] and [change.number for change in again.again] == [2, 3] and not again.remade


def test_numbers_in_names_have_as_many_digits_as_the_last(tmp_path: Path) -> None:
    for count, digits in ((1, 2), (99, 2), (100, 3)):
        assert Inventory(settings_of(tmp_path), script_of(*["x"] * count), folder_of(tmp_path, {})).digits == digits


def test_the_source_is_the_video_up_to_where_it_is_continued_from(tmp_path: Path) -> None:
    whole = Inventory(settings_of(tmp_path), script_of("a"), folder_of(tmp_path, {})).source_digest
    part = Inventory(settings_of(tmp_path, from_=1.5), script_of("a"), folder_of(tmp_path, {})).source_digest
    assert part == f"{whole} to 1.5 s"


def test_a_folder_of_another_video_is_left_alone(tmp_path: Path) -> None:
    script, folder = script_of("a"), tmp_path / "out"
    wanted = Inventory(settings_of(tmp_path), script, folder_of(folder, {})).wanted
    other = wanted[1] | {"parent": "another video"}
    (tmp_path / "out_in").mkdir()  # the name that would be advised
    with pytest.raises(UserError, match=r"holds a run of another video .*output_dir .*out_in_2 makes this one"):
        Inventory(settings_of(tmp_path), script, folder_of(folder, {1: other}))


def test_clips_before_the_one_that_is_begun_stay_what_they_are(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    inventory = Inventory(settings, script_of("a", "b", "c"), folder_of(tmp_path, {}))
    before = dict(inventory.wanted)
    inventory.follow(script_of("x", "y", "z"), begun=2)
    assert inventory.wanted[1] == before[1] and inventory.wanted[2] == before[2]
    assert inventory.wanted[3]["prompt"] == "z" and inventory.wanted[3]["parent"] == before[3]["parent"]
