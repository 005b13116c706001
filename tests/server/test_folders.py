"""The folder of a chain as clients see it, with files that are written here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from wan.server.folders import ChainFolder, stamp


@pytest.fixture
def folder(tmp_path: Path) -> ChainFolder:
    """A chain of three clips of which two are finished, with files of both."""
    folder = ChainFolder(tmp_path / "a")
    folder.run.mkdir(parents=True)
    clips = [{"number": number, "file": f"clip_{number}.mp4", "prompt": f"p{number}"} for number in (1, 2)]
    (folder.run / "report.json").write_text(json.dumps({"clips": clips}))
    for number in (1, 2):
        for suffix in (".mp4", ".json"):
            (folder.run / f"clip_{number}{suffix}").write_text(f"{number}{suffix}")
        sheet = {f"sheet.{at}": np.frombuffer(bytes([number, at]), np.uint8) for at in range(2)}
        save_file(sheet | {"latents": np.zeros(1)}, folder.run / f"clip_{number}.safetensors")
    return folder


def test_a_finished_clip_has_its_facts_its_video_and_its_seam(folder: ChainFolder) -> None:
    assert folder.made(2)["prompt"] == "p2" and folder.made(3) == {}
    assert folder.video(2) == folder.run / "clip_2.mp4" and folder.video(3) is None
    assert folder.version(1) == stamp(folder.run / "clip_1.mp4") > 0 and folder.version(3) is None
    assert folder.seam(2) == [b"\x02\x00", b"\x02\x01"] and folder.seam(3) == []
    (folder.run / "clip_2.safetensors").write_bytes(b"x")
    assert folder.seam(2) == []


def test_a_report_is_read_again_when_it_is_another(folder: ChainFolder) -> None:
    first = folder.report()
    assert folder.report() is first
    (folder.run / "report.json").write_text('{"clips": [{"number": 7}]}')
    assert folder.made(7) == {"number": 7} and folder.made(1) == {}
    (folder.run / "report.json").unlink()
    assert folder.report() == {} and folder.made(7) == {} and folder.status() == {}


@pytest.mark.parametrize("name", ["../clip_1.mp4", "clip_1.json", "missing.mp4", ""])
def test_a_name_in_a_report_leads_to_a_video_of_its_folder_only(name: str, folder: ChainFolder) -> None:
    (folder.path / "clip_1.mp4").write_text("outside")
    (folder.run / "report.json").write_text(json.dumps({"clips": [{"number": 1, "file": name}]}))
    assert folder.video(1) is None


def test_takes_are_those_that_are_whole(folder: ChainFolder) -> None:
    def take(clip: str, take: str, *suffixes: str) -> None:
        (folder.run / "takes" / clip).mkdir(parents=True, exist_ok=True)
        for suffix in suffixes:
            (folder.run / "takes" / clip / f"take_{take}_seed5{suffix}").touch()

    take("3", "1", ".json", ".mp4")
    take("3", "2", ".json", ".mp4")
    take("3", "3", ".json")
    take("3", "x", ".json", ".mp4")
    take("y", "1", ".json", ".mp4")
    takes = folder.run / "takes/3"
    assert folder.all_takes() == {3: {1: takes / "take_1_seed5.mp4", 2: takes / "take_2_seed5.mp4"}}
    assert list(folder.takes(3)) == [1, 2] and folder.takes(4) == {}


@pytest.mark.parametrize(("count", "taken"), [(0, 0), (1, 1), (2, 2), (5, 2)])
def test_clips_are_taken_over_as_far_as_they_are_finished(
    count: int, taken: int, folder: ChainFolder, tmp_path: Path
) -> None:
    other = ChainFolder(tmp_path / "b")
    assert other.take_clips_of(folder, count) == taken
    names = {f"clip_{number}{suffix}" for number in range(1, taken + 1) for suffix in (".mp4", ".json", ".safetensors")}
    assert {path.name for path in other.run.iterdir()} == names


def test_clips_after_one_that_is_missing_are_not_taken_over(folder: ChainFolder, tmp_path: Path) -> None:
    (folder.run / "clip_1.mp4").unlink()
    other = ChainFolder(tmp_path / "b")
    assert other.take_clips_of(folder, 2) == 0 and not list(other.run.iterdir())


def test_a_run_is_asked_to_stop_and_may_go_on(tmp_path: Path) -> None:
    ChainFolder(tmp_path / "new").ask_to_stop()  # before there is anything of it
    assert (tmp_path / "new/run/stop").exists()
    folder = ChainFolder(tmp_path / "a", tmp_path / "elsewhere")
    folder.ask_to_stop()
    assert (tmp_path / "elsewhere/stop").exists()
    folder.ask_to_stop()
    folder.forget_stop()
    folder.forget_stop()
    assert not (tmp_path / "elsewhere/stop").exists()


def test_what_changes_is_seen(folder: ChainFolder) -> None:
    before = folder.stamps
    assert before[1:] == (0, 0, 0) and before[0] > 0
    folder.write_clips([{"prompt": "x"}])
    assert folder.read_clips() == [{"prompt": "x"}]
    folder.joined.touch()
    (folder.run / "takes").mkdir()
    assert [old != new for old, new in zip(before, folder.stamps, strict=True)] == [False, True, True, True]
