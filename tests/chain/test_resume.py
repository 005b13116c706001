"""Chains that are stopped, gone on with, and made again in part."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.golden import DATA, GOLDEN, ROOT
from wan import cli
from wan.chain.lock import LOCK
from wan.chain.run_folder import RunFolder

pytestmark = pytest.mark.slow

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "ti2v"
    shutil.copytree(GOLDEN / "5b" / "ckpt", folder)
    declared = {"sizes": ["96*64"], "frame_num": 5, "sample_steps": 2, "param_dtype": "float32", "t5_dtype": "float32"}
    (folder / "wan_config.json").write_text(json.dumps(declared))
    return folder


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(checkpoint, folder) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of three clips."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def run(checkpoint: Path, folder: Path, *more: str, video: Path = VIDEO, seed: int = 3, count: int = 3) -> int:
    flags = [
        "--ckpt_dir",
        str(checkpoint),
        "--video",
        str(video),
        "--output_dir",
        str(folder),
        "--prompt",
        "it goes on",
    ]
    flags += ["--num_videos", str(count), "--frame_num", "5", "--base_seed", str(seed), *more]
    return cli.continuous_main(flags)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("video_*.mp4"))}


def state(folder: Path, number: int) -> dict[str, torch.Tensor]:
    (path,) = folder.glob(f"video_{number:02d}_*.safetensors")
    return load_file(path)


def frames_in(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_killed_at_every_boundary_and_at_random_a_chain_ends_as_if_nothing_had_happened(
    checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.support.kill_runs", str(checkpoint), str(VIDEO), str(tmp_path), "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["kills"] >= 12 and result["copies"] >= 30 and result["events"] >= 50


def test_a_state_is_lossless(folder: Path) -> None:
    clips = RunFolder(folder).clips()
    assert list(clips) == [1, 2, 3]
    tensors = state(folder, 3)
    assert tensors["latents"].dtype == tensors["tail"].dtype == torch.float32
    assert tensors["tail"].shape == (5, 64, 64 * 3 // 2, 3) and tensors["samples"].shape[0] == 8
    assert torch.equal(clips[3].last, tensors["tail"][-1].permute(2, 0, 1))


def test_a_finished_run_is_not_made_again(checkpoint: Path, folder: Path) -> None:
    before = stamps(folder)
    assert run(checkpoint, folder) == 0
    assert stamps(folder) == before


def test_more_clips_go_on_from_the_last(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    before = stamps(folder)
    assert run(checkpoint, folder, count=4) == 0
    assert {name: stamp for name, stamp in stamps(folder).items() if name in before} == before
    assert run(checkpoint, tmp_path / "whole", count=4) == 0
    assert all(torch.equal(value, state(tmp_path / "whole", 4)[key]) for key, value in state(folder, 4).items())
    assert frames_in(folder / "joined.mp4") == frames_in(tmp_path / "whole" / "joined.mp4") == 17


@pytest.mark.parametrize("damage", ["truncated state", "lost state", "lost mp4", "broken record"])
def test_a_damaged_clip_is_made_again_and_nothing_before_it(
    checkpoint: Path, folder: Path, finished: Path, damage: str
) -> None:
    before = stamps(folder)
    (path,) = folder.glob("video_02_*.safetensors")
    if damage == "truncated state":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "broken record":
        path.with_suffix(".json").write_text("{")
    else:
        (path if damage == "lost state" else path.with_suffix(".mp4")).unlink()
    assert run(checkpoint, folder) == 0
    after = stamps(folder)
    # clip 3 was made from the same clip 2, which comes out the same again
    changed = [name[:8] for name in after if after[name] != before.get(name)]
    assert changed == ["video_02"]
    for number in (1, 2, 3):
        assert all(torch.equal(value, state(finished, number)[key]) for key, value in state(folder, number).items())


def test_redo_makes_a_clip_again_with_another_seed_and_what_follows_from_it(checkpoint: Path, folder: Path) -> None:
    before = stamps(folder)
    assert run(checkpoint, folder, "--redo", "2") == 0
    after = stamps(folder)
    names = sorted(after)
    assert [name.split("_seed")[0] for name in names] == ["video_01", "video_02", "video_03"]
    assert names[1] != "video_02_seed4.mp4" and names[2] == "video_03_seed5.mp4"
    assert after[names[0]] == before[names[0]] and after[names[2]] != before[names[2]]
    # nothing that was finished is lost
    assert {path.name for path in (folder / "redone").glob("video_*.mp4")} == {
        "video_02_seed4.mp4",
        "video_03_seed5.mp4",
    }
    # and the new seed stays when the same command without --redo is given
    assert run(checkpoint, folder) == 0
    assert stamps(folder) == after


def test_redo_can_keep_what_follows(checkpoint: Path, folder: Path) -> None:
    before = stamps(folder)
    assert run(checkpoint, folder, "--redo", "2", "--keep_following") == 0
    after = stamps(folder)
    assert after["video_01_seed3.mp4"] == before["video_01_seed3.mp4"]
    assert after["video_03_seed5.mp4"] == before["video_03_seed5.mp4"]
    assert "video_02_seed4.mp4" not in after
    assert run(checkpoint, folder) == 0
    assert stamps(folder) == after


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (["--sample_steps", "3"], {}, "(clips 1 to 3: --sample_steps 2, now 3): give --yes for that"),
        (
            ["--sample_guide_scale", "2"],
            {},
            "(clips 1 to 3: --sample_guide_scale [5.0, 5.0], now [2.0, 2.0])",
        ),
        ([], {"seed": 9}, "clip 1: its seed 3, now 9; clip 2: its seed 4, now 10"),
        (
            [],
            {"video": DATA / "corpus" / "fps_2997.mkv"},
            "holds a run of another video or another --from: the same command with --output_dir {folder}_fps_2997",
        ),
        (["--redo", "7"], {}, "--redo 7: {folder} holds clips 1 to 3"),
        (["--redo", "3"], {"count": 2}, "--redo 3 is beyond --num_videos 2"),
    ],
)
def test_another_run_is_refused_and_nothing_is_touched(
    checkpoint: Path, folder: Path, more: list[str], options: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[Path, Any]:
        # some versions of filelock empty the file of the lock, which is empty, when they take it
        return {path: path.stat().st_mtime_ns if path.name != LOCK else path.read_bytes() for path in folder.iterdir()}

    before = files()
    assert run(checkpoint, folder, *more, **options) == 2
    assert message.format(folder=folder) in capsys.readouterr().err
    assert files() == before


def test_another_checkpoint_of_the_same_size_is_another_run(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "fine_tuned"))
    for file in other.glob("*.safetensors"):
        tensors = {name: tensor * 1.3 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert run(other, folder, count=4) == 2
    error = capsys.readouterr().err
    assert "another checkpoint" in error and "--redo" not in error


def test_files_of_others_are_left_alone(checkpoint: Path, folder: Path) -> None:
    (folder / ".mine.mp4.abcd1234.part").touch()
    assert run(checkpoint, folder) == 0
    assert (folder / ".mine.mp4.abcd1234.part").exists()


def test_a_drawn_seed_is_kept_by_the_run_that_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    assert run(checkpoint, tmp_path / "run", seed=-1, count=1) == 0
    assert run(checkpoint, tmp_path / "run", seed=-1, count=2) == 0
    first, second = sorted(stamps(tmp_path / "run"))
    assert int(second.split("_seed")[1][:-4]) == int(first.split("_seed")[1][:-4]) + 1


def test_two_runs_in_one_folder_are_refused(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(folder):
        assert run(checkpoint, folder) == 2
        assert f"{folder} is in use by another run" in capsys.readouterr().err
    assert run(checkpoint, folder) == 0


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(
    checkpoint: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = Path.write_bytes
    saved: list[Path] = []

    def full_at_the_second(path: Path, data: bytes) -> int:
        nonlocal saved
        saved += [path] if path.name.startswith(".video_") and ".safetensors" in path.name else []
        if len(saved) == 2 and path == saved[-1]:
            original(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_at_the_second)
    assert run(checkpoint, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "1 of 3 clips are finished" in error and "No space left on device" in error
    assert run(checkpoint, tmp_path / "run") == 0
    assert frames_in(tmp_path / "run" / "joined.mp4") == 13
    for number in (1, 2, 3):
        again = state(tmp_path / "run", number)
        assert all(torch.equal(value, again[key]) for key, value in state(finished, number).items())
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".lock"]
