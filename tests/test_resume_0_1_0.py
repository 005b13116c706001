"""Folders that 0.1.0 made are gone on with: nothing in them is made again, and new clips are fingerprinted as its were.

`data/run_0_1_0/make.py` made them at commit 6c2e86f, with small models and inputs that lie beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.golden import DATA
from wan import cli
from wan.captioner import EndpointCaptioner
from wan.chain.fingerprint import fingerprint
from wan.chain.finished_clip import FinishedClip
from wan.chain.report import render_report
from wan.chain.run_folder import RunFolder

pytestmark = pytest.mark.slow

MADE = DATA / "run_0_1_0"


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


FLAGS: Mapping[str, list[str]] = {name: run["flags"] for name, run in read(MADE / "runs.json").items()}
FINGERPRINTS = read(MADE / "fingerprints.json")
COUNTS = {name: len(clips) for name, clips in FINGERPRINTS.items()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it all, as the current folder: the flags and the storyboards name their files from there."""
    home = Path(shutil.copytree(MADE, tmp_path / "home"))
    monkeypatch.chdir(home)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # clips of a CPU are another run on a GPU
    monkeypatch.setattr("wan.pipeline.check_precision", lambda *_: None)  # 0.1.0 computed in fp8 on a CPU
    monkeypatch.setattr("wan.commands.start.has_gpu_driver", lambda: True)
    caption = "A red square slides to the right. The camera stays static."
    monkeypatch.setattr(EndpointCaptioner, "describe", lambda *_, **__: caption)
    (tmp_path / "decord.py").touch()  # enough to be asked for; PyAV reads what it cannot
    monkeypatch.syspath_prepend(str(tmp_path))
    return home


def run(name: str, *more: str) -> int:
    return cli.continuous_main([*FLAGS[name], "--output_dir", name, *more])


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Name, time and bytes of all that belongs to clips, those that were made again included.

    A record is what it says, but for the digests that it gets.
    """
    contents = {}
    for path in sorted(folder.rglob("video_*")):
        content = (path.stat().st_mtime_ns, path.read_bytes())
        if path.suffix == ".json":
            record = {key: value for key, value in json.loads(content[1]).items() if key != "digests"}
            content = (0, json.dumps(record).encode())
        contents[str(path.relative_to(folder))] = content
    return contents


def of(number: int, contents: Mapping[str, tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    """The files of one clip as it is now."""
    return {name: what for name, what in contents.items() if name.startswith(f"video_{number:02d}_")}


def redone(contents: Mapping[str, tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    """The files of clips that were replaced."""
    return {name: what for name, what in contents.items() if name.startswith("redone")}


def settings_of(clip: FinishedClip) -> dict[str, Any]:
    """What a clip was made with, but for its seed and its predecessor."""
    return {key: value for key, value in clip.settings.items() if key not in ("seed", "parent")}


@pytest.mark.parametrize("name", FLAGS)
def test_the_clips_are_read_with_the_fingerprints_that_0_1_0_gave_them(home: Path, name: str) -> None:
    clips = RunFolder(home / name).clips()
    assert list(clips) == list(range(1, COUNTS[name] + 1))
    for clip in clips.values():
        made = FINGERPRINTS[name][clip.video.name]
        assert clip.settings == made["settings"]
        assert clip.record["fingerprint"] == clip.fingerprint == fingerprint(made["settings"]) == made["fingerprint"]


@pytest.mark.parametrize("name", FLAGS)
def test_a_finished_folder_is_not_made_again(home: Path, name: str) -> None:
    before, run_before = files(home / name), read(home / name / "run.json")
    assert run(name) == 0
    assert files(home / name) == before
    run_after = read(home / name / "run.json")
    for key in ("status", "clips_finished", "base_seed", "seeds", "redone_over", "accepted", "joined"):
        assert run_after[key] == run_before[key]


@pytest.mark.parametrize("name", FLAGS)
def test_one_more_clip_is_the_only_one_that_is_made(home: Path, name: str) -> None:
    before, old = files(home / name), RunFolder(home / name).clips()
    more = COUNTS[name] + 1
    assert run(name, "--num_videos", str(more)) == 0
    after = files(home / name)
    assert {file: what for file, what in after.items() if file in before} == before
    assert after.keys() - before.keys() == of(more, after).keys() and len(of(more, after)) == 3
    new = RunFolder(home / name).clips()[more]
    assert new.settings["parent"] == old[more - 1].fingerprint
    assert new.settings["seed"] == read(home / name / "run.json")["base_seed"] + more - 1
    if "--storyboard" not in FLAGS[name]:  # where nothing else is said of it
        assert settings_of(new) == settings_of(old[1])


@pytest.mark.parametrize(
    ("name", "more", "again"),
    [
        ("storyboard_5b", ["--redo", "1"], [1]),  # a cut follows
        ("storyboard_5b", ["--redo", "2"], [2, 3]),  # the cut itself, and what goes on from it
        ("tail_14b", ["--redo", "2"], [2, 3]),
        ("tail_14b", ["--redo", "2", "--keep_following"], [2]),
        ("continue_14b", ["--redo", "1"], [1, 2]),
        ("svi_14b", ["--redo", "1"], [1, 2]),
    ],
)
def test_redo_makes_that_clip_and_what_follows_from_it_again(
    home: Path, name: str, more: list[str], again: list[int]
) -> None:
    before, old = files(home / name), RunFolder(home / name).clips()
    assert run(name, *more) == 0
    after, new = files(home / name), RunFolder(home / name).clips()
    assert {file: after.get(file) for file in before if file.startswith("redone")} == redone(before)
    for number in range(1, COUNTS[name] + 1):
        if number not in again:
            assert of(number, after) == of(number, before)
            continue
        was = set(of(number, before).values())
        assert was.isdisjoint(of(number, after).values()) and was <= set(redone(after).values())
        # what 0.1.0 wrote of a clip is written again, key by key
        assert settings_of(new[number]) == settings_of(old[number])
        assert new[number].settings.keys() == old[number].settings.keys()
    redo = again[0]
    assert new[redo].settings["parent"] == old[redo].settings["parent"]
    assert new[redo].settings["seed"] == read(home / name / "run.json")["seeds"][str(redo)]
    assert run(name) == 0
    assert files(home / name) == after


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("storyboard_5b", ["--sample_solver", "euler"], "solver 'dpm++', now 'euler'"),
        ("storyboard_5b", ["--cache", "taylorseer:3"], "cache 'taylorseer:2', now 'taylorseer:3'"),
        ("tail_14b", ["--vlm_question", "Who is it?"], "vlm_question 'What is there?', now 'Who is it?'"),
        ("tail_14b", ["--drift_correction", "0.5"], "drift_correction 0.9, now 0.5"),
        ("continue_14b", ["--num_segments", "3"], "num_segments 2, now 3"),
        ("continue_14b", ["--video", "tail_14b/joined.mp4"], "another video"),
        ("svi_14b", ["--vae_dtype", "float32"], "another wan_config.json"),
        ("svi_14b", ["--dit_low", "i2v/other.safetensors"], "another checkpoint"),
    ],
)
def test_other_settings_than_those_of_0_1_0_are_still_another_run(
    home: Path, name: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(home / "i2v/low_noise_model/diffusion_pytorch_model.safetensors", home / "i2v/other.safetensors")
    before = files(home / name)
    assert run(name, *more) == 2
    assert message in capsys.readouterr().err
    assert files(home / name) == before


RENAMED = {"frames": "frame_num", "checkpoint": "ckpt_dir", "low_precision": "precision", "vlm": "vlm_path"}


@pytest.mark.parametrize("name", FLAGS)
def test_the_report_reads_the_records_as_0_1_0_did(home: Path, name: str) -> None:
    told = read(home / name / "report.json")
    clips = RunFolder(home / name).clips()
    records = [{"file": clip.video.name} | dict(clip.record) for clip in clips.values()]
    page, facts = render_report(read(home / name / "run.json"), records, [clip.sheet for clip in clips.values()])
    for key in ("status", "clips_finished", "clips_asked", "base_seed", "joined", "run_seconds", "video_seconds"):
        assert facts[key] == told[key]
    assert facts["attention"] == told["attention"] and facts["drift"] == told["drift"]
    assert facts["versions"] == told["versions"]
    for facts_of_clip, clip in zip(facts["clips"], told["clips"], strict=True):
        assert {key: facts_of_clip.get(key) for key in clip if key not in ("settings", "redo")} == {
            key: value for key, value in clip.items() if key not in ("settings", "redo")
        }
    own_settings = (
        (now["settings"], then["settings"]) for now, then in zip(facts["clips"], told["clips"], strict=True)
    )
    for now, then in [(facts["common"], told["common"]), *own_settings]:
        # a setting may go by another name now, and has its value there
        now["vlm_path"] = now.get("vlm_path") or now.get("vlm_url")
        named = {key: value for key, value in then.items() if key != "dit_files"}
        assert {key: now.get(RENAMED.get(key, key)) for key in named} == named
        assert now.get("dit_high") == then.get("dit_files", {}).get("high_noise_model")
    assert all(record["prompt"].split(". ")[0] in page for record in records)


def test_a_resumed_folder_has_a_report_again(home: Path) -> None:
    told = read(home / "tail_14b" / "report.json")
    assert not (home / "tail_14b" / "report.html").exists()
    assert run("tail_14b") == 0
    assert (home / "tail_14b" / "report.html").is_file()
    facts = read(home / "tail_14b" / "report.json")
    for key in ("number", "file", "start", "length", "prompt", "seed", "seam", "look", "candidates", "answers"):
        assert [clip[key] for clip in facts["clips"]] == [clip[key] for clip in told["clips"]]
