"""A finished clip is what was written, or it is made again; and what was sampled is not sampled twice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.commands import Seen
from tests.support.golden import DATA, small_checkpoints
from wan import cli
from wan.chain.run_folder import RunFolder
from wan.files import write_text
from wan.pipeline import Pipeline

pytestmark = pytest.mark.slow

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


def flip(file: Path, at: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)


@pytest.mark.parametrize("suffix", [".safetensors", ".mp4"])
def test_one_flipped_bit_is_found_named_and_the_clip_made_again(
    command: Callable[..., Seen], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--num_videos 3").code == 0
    folder = command("--num_videos 3").folder
    (file,) = folder.glob(f"video_02_*{suffix}")
    whole, kept = file.read_bytes(), {path.name: path.read_bytes() for path in folder.glob("video_0[13]*")}
    for place in random.Random(suffix).sample(range(8 * len(whole)), 20):
        file.write_bytes(whole)
        flip(file, place)
        assert list(RunFolder(folder).clips()) == [1, 3], place
    seen = command("--num_videos 3")
    assert seen.code == 0 and [request.seed for request in seen.requests] == [4]
    if suffix == ".mp4":
        assert file.read_bytes() == whole  # the same again, and so what follows it stays
    assert {path.name: path.read_bytes() for path in folder.glob("video_0[13]*")} == kept
    assert (folder / "redone" / file.name).read_bytes() != whole


def test_what_is_wrong_is_said_before_anything_is_made(
    command: Callable[..., Seen], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = command("--num_videos 4").folder
    (folder / "video_01_seed3.mp4").write_bytes(b"no video any more")
    (folder / "video_02_seed4.safetensors").unlink()
    (folder / "video_03_seed5.json").write_text("{")
    dry = command("--num_videos 4 --dry_run")
    for line in (
        "clip 1 is made again: video_01_seed3.mp4 is not what was written",
        "clip 2 is made again: video_02_seed4.safetensors is not there",
        "clip 3 is made again: its record video_03_seed5.json is none",
    ):
        assert line in dry.output
    assert not dry.requests
    seen = command("--num_videos 4")
    assert seen.code == 0 and [request.seed for request in seen.requests] == [3, 4, 5]


def test_the_state_of_another_clip_is_not_gone_on_from(command: Callable[..., Seen]) -> None:
    folder = command("").folder
    one, other = folder / "video_01_seed3.safetensors", folder / "video_02_seed4.safetensors"
    one.write_bytes(other.read_bytes())
    assert [request.seed for request in command("").requests] == [3]


# --- clips of 0.1.0, whose records have no digests


def strip(folder: Path) -> None:
    for path in folder.glob("video_*.json"):
        record = json.loads(path.read_text())
        record.pop("digests")
        write_text(path, json.dumps(record))


def test_a_record_without_digests_counts_and_gets_them_when_the_run_next_writes(command: Callable[..., Seen]) -> None:
    folder = command("").folder
    written = {path.name: json.loads(path.read_text()) for path in folder.glob("video_*.json")}
    strip(folder)
    assert command("--dry_run").code == 0
    assert all("digests" not in json.loads(path.read_text()) for path in folder.glob("video_*.json"))
    assert not command("").requests
    assert {path.name: json.loads(path.read_text()) for path in folder.glob("video_*.json")} == written


@pytest.mark.parametrize("fault", ["nan", "size", "mp4"])
def test_one_that_is_visibly_broken_is_made_again_too(command: Callable[..., Seen], fault: str) -> None:
    folder = command("").folder
    strip(folder)
    state = folder / "video_01_seed3.safetensors"
    tensors, header = load_file(state), _metadata(state)
    if fault == "mp4":
        video = state.with_suffix(".mp4")
        video.write_bytes(video.read_bytes()[:100])
    else:
        tail = tensors["tail"]
        tensors["tail"] = tail[:, :16].contiguous() if fault == "size" else tail.clone().fill_(float("nan"))
        save_file(tensors, state, header)
    assert [request.seed for request in command("").requests] == [3]


def _metadata(state: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(state, framework="pt") as opened:
        return dict(opened.metadata())


# --- the order of worth


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    small_checkpoints(tmp_path)
    return tmp_path / "ti2v"


def chain(checkpoint: Path, folder: Path, *more: str) -> int:
    flags = ["--ckpt_dir", str(checkpoint), "--video", str(VIDEO), "--prompt", "x", "--num_videos", "2"]
    return cli.continuous_main([*flags, "--frame_num", "5", "--base_seed", "3", "--output_dir", str(folder), *more])


class Stop(Exception):
    pass


def stopped(*_: Any, **__: Any) -> None:
    raise Stop


def seeds_sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of what is sampled from now on."""
    sampled: list[int] = []
    sample = Pipeline._sample

    def counted(self: Pipeline, request: Any, *rest: Any) -> Any:
        sampled.append(request.seed)
        return sample(self, request, *rest)

    monkeypatch.setattr(Pipeline, "_sample", counted)
    return sampled


@pytest.mark.parametrize("more", [(), ("--best_of", "2"), ("--drift_correction", "0.9")])
def test_after_sampling_nothing_is_sampled_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    assert chain(checkpoint, tmp_path / "whole", *more) == 0

    with monkeypatch.context() as broken, pytest.raises(Stop):
        broken.setattr("wan.vae.vae.WanVAE.decode", stopped)
        chain(checkpoint, tmp_path / "run", *more)
    assert list((tmp_path / "run").glob(".draft_1_*")) and not list((tmp_path / "run").glob("video_*"))
    sampled = seeds_sampled(monkeypatch)
    assert chain(checkpoint, tmp_path / "run", *more) == 0
    assert 3 not in sampled and 4 in sampled
    for one in sorted((tmp_path / "whole").glob("video_*.safetensors")):
        tensors, expected = load_file(tmp_path / "run" / one.name), load_file(one)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    record = json.loads(next((tmp_path / "run").glob("video_01_*.json")).read_text())
    assert record["seconds"]["sample"] > 0 and record["prompt"] == "continue video x"
    assert not list((tmp_path / "run").glob(".draft*"))


def test_a_draft_of_other_settings_or_a_damaged_one_is_none(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("wan.vae.vae.WanVAE.decode", stopped)
        with pytest.raises(Stop):
            chain(checkpoint, tmp_path / "run")
    (draft,) = (tmp_path / "run").glob(".draft_1_*")
    whole = draft.read_bytes()
    sampled = seeds_sampled(monkeypatch)
    assert chain(checkpoint, tmp_path / "run", "--sample_shift", "3") == 0
    assert sampled == [3, 4]
    for at in random.Random(0).sample(range(64, 8 * len(whole)), 3):
        sampled.clear()
        folder = tmp_path / f"run_{at}"
        folder.mkdir()
        (folder / draft.name).write_bytes(whole)
        flip(folder / draft.name, at)
        assert chain(checkpoint, folder) == 0
        assert sampled == [3, 4]


# --- temporary names


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    for name in (".run.json.part", ".run.json.00000000.part"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "run.json", "ours")
    assert victim.read_text() == "theirs" and (tmp_path / "run.json").read_text() == "ours"
    assert not (tmp_path / "run.json").is_symlink()


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.files.publish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "run.json", "ours")
    assert list(tmp_path.iterdir()) == []
