"""Chains with everything that holds them together, through the command line and on tiny checkpoints."""

from __future__ import annotations

import errno
import gc
import json
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.golden import DATA, small_checkpoints
from tests.support.media_samples import number, numbered
from tests.support.tiny_checkpoint import InternVL, write_internvl
from wan import WanV2V5B, cli, media
from wan.chain.run import ChainRun
from wan.chain.run_folder import RunFolder
from wan.options import OPTIONS
from wan.types import Generation, Request
from wan.weights.tensors import open_safetensors

pytestmark = pytest.mark.slow

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    small_checkpoints(folder, frame_num=13)
    write_internvl(folder / "InternVL3_5-8B", InternVL())
    for side in ("high", "low"):
        weights = open_safetensors(folder / "i2v" / f"{side}_noise_model", "diffusion_pytorch_model")
        rows, columns = weights.shapes["blocks.0.self_attn.q.weight"]
        tensors = {
            "blocks.0.self_attn.q.lora_A.default.weight": torch.randn(2, columns) / 9,
            "blocks.0.self_attn.q.lora_B.default.weight": torch.randn(rows, 2) / 9,
        }
        save_file(tensors, folder / f"SVI_v2.0_pro_{side}_noise.safetensors")
    return folder


def chain(checkpoints: Path, output: Path, *more: str, name: str = "ti2v", video: Path = VIDEO, count: int = 2) -> int:
    flags = ["--ckpt_dir", str(checkpoints / name), "--video", str(video), "--output_dir", str(output)]
    flags += ["--num_videos", str(count)] if count else []
    return cli.continuous_main([*flags, "--frame_num", "13", "--base_seed", "10", *more])


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("video_*.json"))]


def states(output: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(output.glob("video_*.safetensors"))]


def same(one: Path, other: Path) -> bool:
    pairs = zip(states(one), states(other), strict=True)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


PROMPT = ("--prompt", "it goes on")


@pytest.mark.parametrize(("name", "known"), [("ti2v", 5), ("ti2v", 9), ("i2v", 5)])
def test_a_tail_chain_joins_without_what_is_repeated_and_resumes(
    name: str, known: int, checkpoints: Path, tmp_path: Path
) -> None:
    flags = [*PROMPT, "--continuation", "tail", "--context_frames", str(known)]
    assert chain(checkpoints, tmp_path / "whole", *flags, name=name) == 0
    assert frames_in(tmp_path / "whole" / "joined.mp4") == 2 * (13 - known)
    assert [record["dropped"] for record in records(tmp_path / "whole")] == [known, known]
    for count in (1, 2):
        assert chain(checkpoints, tmp_path / "parts", *flags, name=name, count=count) == 0
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_an_svi_chain_runs_with_its_loras_and_resumes(checkpoints: Path, tmp_path: Path) -> None:
    flags = [*PROMPT, "--continuation", "svi2pro"]
    flags += ["--lora_high", str(checkpoints / "SVI_v2.0_pro_high_noise.safetensors")]
    flags += ["--lora_low", str(checkpoints / "SVI_v2.0_pro_low_noise.safetensors:0.8")]
    assert chain(checkpoints, tmp_path / "whole", *flags, name="i2v") == 0
    assert frames_in(tmp_path / "whole" / "joined.mp4") == 2 * (13 - 5)
    loras = records(tmp_path / "whole")[0]["loras"]
    assert loras["low_noise_model"][0]["strength"] == 0.8 and loras["high_noise_model"][0]["matched"] == 1
    for count in (1, 2):
        assert chain(checkpoints, tmp_path / "parts", *flags, name="i2v", count=count) == 0
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_after_a_cut_svi_holds_on_to_the_new_shot(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan.video2video import WanV2V

    anchors: list[torch.Tensor] = []
    run = WanV2V.run

    def watched(self: WanV2V, request: Request, **more: Any) -> Generation:
        assert isinstance(request.known.anchor, torch.Tensor)
        anchors.append(request.known.anchor)
        return run(self, request, **more)

    monkeypatch.setattr(WanV2V, "run", watched)
    Image.fromarray(np.full((64, 96, 3), 99, np.uint8)).save(tmp_path / "night.png")
    story = board(tmp_path / "story.json", "one", {"prompt": "two", "cut": "night.png"}, "three")
    flags = ["--storyboard", story, "--continuation", "svi2pro"]
    flags += ["--lora_high", str(checkpoints / "SVI_v2.0_pro_high_noise.safetensors")]
    flags += ["--lora_low", str(checkpoints / "SVI_v2.0_pro_low_noise.safetensors")]
    assert chain(checkpoints, tmp_path / "run", *flags, name="i2v", count=0) == 0
    assert torch.equal(anchors[1], anchors[2]) and not torch.equal(anchors[0], anchors[1])
    assert [record["dropped"] for record in records(tmp_path / "run")] == [5, 0, 5]


@pytest.mark.parametrize("mode", ["describe", "continue"])
def test_a_described_chain_resumes_with_the_frames_and_the_memory_that_were_kept(
    mode: str, checkpoints: Path, tmp_path: Path
) -> None:
    assert chain(checkpoints, tmp_path / "whole", "--prompt_mode", mode, count=3) == 0
    for count in (1, 2, 3):
        assert chain(checkpoints, tmp_path / "parts", "--prompt_mode", mode, count=count) == 0
    assert same(tmp_path / "whole", tmp_path / "parts")
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        assert one["prompt"] == other["prompt"] and one["answers"] and one["answers"] == other["answers"]
        if mode == "continue":
            assert one["memory"] == other["memory"] and one["memory"]["identity"] == whole[0]["memory"]["identity"]


def test_other_frames_than_were_kept_come_from_the_clips_file(checkpoints: Path, tmp_path: Path) -> None:
    story = board(tmp_path / "story.json", "one", "two")
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, count=0) == 0
    (clip,) = (clip for number, clip in RunFolder(tmp_path / "run").clips().items() if number == 1)
    kept = load_file(clip.state)["samples"].numpy()
    assert np.array_equal(clip.samples(8), kept) and clip.samples(3).shape == (3, *kept.shape[1:])
    # the mp4 is compressed, noise more than anything: alike is enough
    assert np.abs(clip.samples(3)[1].astype(int) - media.sample_frames(clip.video, 3)[1]).max() == 0
    board(tmp_path / "story.json", "one", {})
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, "--num_segments", "3", count=0) == 0


def test_the_best_candidate_is_kept_and_a_resumed_run_keeps_the_same(checkpoints: Path, tmp_path: Path) -> None:
    flags = [*PROMPT, "--best_of", "2"]
    assert chain(checkpoints, tmp_path / "whole", *flags) == 0
    for record in records(tmp_path / "whole"):
        scores = {one["seed"]: one["score"] for one in record["candidates"]}
        assert len(scores) == 2 and record["seam"]["score"] == scores[record["seed"]] == min(scores.values())
    for count in (1, 2):
        assert chain(checkpoints, tmp_path / "parts", *flags, count=count) == 0
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_the_corrected_frames_are_what_is_shown_kept_and_gone_on_from(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise cannot be followed, so a correction that can be seen stands in; the real one has tests of its own."""
    asked: list[tuple[int, int, float]] = []

    def paler(
        frames: torch.Tensor, condition: torch.Tensor, *, known: int, strength: float, device: torch.device
    ) -> torch.Tensor:
        asked.append((len(condition), known, strength))
        return frames / 2

    monkeypatch.setattr("wan.candidates.correct_drift", paler)
    assert chain(checkpoints, tmp_path / "plain", *PROMPT) == 0 and not asked
    assert chain(checkpoints, tmp_path / "paler", *PROMPT, "--drift_correction", "0.5") == 0
    assert asked == [(17, 1, 0.5), (13, 1, 0.5)]
    (first, second), (paler_first, paler_second) = states(tmp_path / "plain"), states(tmp_path / "paler")
    assert torch.equal(first["latents"], paler_first["latents"])  # the first clip was sampled alike
    assert torch.equal(first["tail"] / 2, paler_first["tail"])
    assert not torch.equal(second["latents"], paler_second["latents"])
    assert [record["drift_correction"] for record in records(tmp_path / "paler")] == [0.5, 0.5]


# The source in the joined video


def test_the_source_and_its_sound_come_first_when_asked_for(checkpoints: Path, tmp_path: Path) -> None:
    source = DATA / "corpus" / "audio_longer.mp4"
    assert chain(checkpoints, tmp_path / "run", *PROMPT, "--include_source", video=source) == 0
    info, before = media.probe(tmp_path / "run" / "joined.mp4"), media.probe(source)
    assert info.fps == before.fps and info.has_audio and (info.width, info.height) != (before.width, before.height)
    expected = (30 - 1) / 30 + (1 + 24) / 24 - 1 / 24 + 1 / 24
    assert info.duration == pytest.approx(expected, abs=1 / 30)
    first = media.sample_frames(tmp_path / "run" / "joined.mp4", 60)[0]
    assert number(first) in (-1, 0)  # its marker may be cropped, its colours are there
    assert np.abs(first.astype(int).mean() - media.sample_frames(source, 30)[0].astype(int).mean()) < 12


def test_what_a_clip_is_conditioned_on_has_the_models_rate(checkpoints: Path, tmp_path: Path) -> None:
    media.write_video(tmp_path / "fast.mp4", numbered(range(48), 96, 64), 48)
    assert chain(checkpoints, tmp_path / "run", *PROMPT, "--context_frames", "5", video=tmp_path / "fast.mp4") == 0
    seen = [number(frame) for frame in media.read_tail(tmp_path / "fast.mp4", 5, Fraction(24))]
    assert seen == [39, 41, 43, 45, 47]
    assert records(tmp_path / "run")[0]["continuation"] == "tail"


# Storyboards


def board(path: Path, *clips: Any) -> str:
    path.write_text(json.dumps({"clips": list(clips)}), encoding="utf-8")
    return str(path)


def test_a_storyboard_says_what_is_different_in_which_clip(checkpoints: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((80, 60, 3), 99, np.uint8)).save(tmp_path / "night.png")
    story = board(
        tmp_path / "story.json",
        "the first",
        {"prompt": "the second", "seed": 500, "frames": 17, "steps": 1, "guidance": 1.0, "context": 9},
        {"prompt": "the third", "cut": "night.png"},
        {"prompt": "the fourth", "cut": True},
    )
    flags = ["--storyboard", story]
    assert chain(checkpoints, tmp_path / "run", *flags, count=0) == 0
    first, second, third, fourth = records(tmp_path / "run")
    assert [one["prompt"] for one in (first, second)] == ["continue video the first", "continue video the second"]
    assert (second["seed"], second["frame_num"], second["sample_steps"]) == (500, 17, 1)
    assert second["sample_guide_scale"] == [1, 1] and (second["continuation"], second["dropped"]) == ("tail", 9)
    assert [one["dropped"] for one in (first, third, fourth)] == [1, 0, 0] and third["seam"] is None
    assert frames_in(tmp_path / "run" / "joined.mp4") == 13 + 8 + 13 + 13
    # a new shot does not depend on what comes before it
    assert chain(checkpoints, tmp_path / "run", *flags, "--redo", "2", count=0) == 0
    moved = sorted(path.name[:8] for path in (tmp_path / "run" / "redone").glob("*.mp4"))
    assert moved == ["joined.m", "video_02"]


def test_a_shot_of_text_alone_has_its_own_prompt_whatever_the_vlm_is_asked(checkpoints: Path, tmp_path: Path) -> None:
    story = board(tmp_path / "story.json", {"prompt": "a harbour at night", "cut": True})
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, "--prompt_mode", "continue", count=0) == 0
    assert records(tmp_path / "run")[0]["prompt"] == "continue video a harbour at night"


def test_a_source_that_is_too_short_for_the_context_says_so(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    media.write_video(tmp_path / "short.mp4", numbered(range(4), 96, 64), 24)
    flags = [*PROMPT, "--context_frames", "9"]
    assert chain(checkpoints, tmp_path / "run", *flags, video=tmp_path / "short.mp4", count=2) == 0
    assert [(one["context_frames"], one["dropped"]) for one in records(tmp_path / "run")] == [(1, 1), (9, 9)]
    assert "too short for 9 known frames: 1" in caplog.text


def test_a_changed_scene_makes_only_what_follows_again(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = ["one", "two", "three"]
    story = board(tmp_path / "story.json", *clips)
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, count=0) == 0
    before = {path.name: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").glob("video_*.mp4"))}
    capsys.readouterr()
    board(tmp_path / "story.json", "one", "another", "three")
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, count=0) == 2
    assert "2 finished clips of" in capsys.readouterr().err
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, "--yes", count=0) == 0
    assert "clip 2: its prompt changed\nclip 3 continues clip 2\n" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").glob("video_*.mp4"))}
    assert [name for name in after if after[name] == before.get(name)] == [min(before)]
    assert len(list((tmp_path / "run" / "redone").glob("video_*.mp4"))) == 2
    assert [one["prompt"].split()[-1] for one in records(tmp_path / "run")] == ["one", "another", "three"]

    board(tmp_path / "story.json", "the beginning", "another", "three")
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, count=0) == 2
    assert "clip 1: its prompt changed; clips 2 to 3 follow from clip 1" in capsys.readouterr().err
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, "--redo", "1", count=0) == 0
    assert records(tmp_path / "run")[0]["prompt"] == "continue video the beginning"


def test_what_is_kept_after_a_redo_still_follows_the_storyboard(checkpoints: Path, tmp_path: Path) -> None:
    story, run = board(tmp_path / "story.json", "one", "two", "three"), tmp_path / "run"
    flags = ["--storyboard", story]
    assert chain(checkpoints, run, *flags, count=0) == 0
    assert chain(checkpoints, run, *flags, "--redo", "1", "--keep_following", count=0) == 0
    drawn = records(run)[0]["seed"]
    assert drawn != 10 and not list((run / "redone").glob("video_02*"))
    board(tmp_path / "story.json", "one", "two", "another")
    assert chain(checkpoints, run, *flags, count=0) == 0
    assert [one["prompt"].split()[-1] for one in records(run)] == ["one", "two", "another"]
    assert records(run)[0]["seed"] == drawn and not list((run / "redone").glob("video_02*"))
    board(tmp_path / "story.json", "one", "changed", "another")  # and so does what follows from what was kept
    assert chain(checkpoints, run, *flags, "--yes", count=0) == 0
    assert len(list((run / "redone").glob("video_03*.mp4"))) == 2
    board(tmp_path / "story.json", {"prompt": "one", "seed": 77}, "two", "another")
    assert (
        chain(checkpoints, run, *flags, "--redo", "1", "--yes", count=0) == 0
    )  # the old settings of clip 1 are given up
    assert records(run)[0]["seed"] != 77
    board(tmp_path / "story.json", {"prompt": "one", "seed": 78}, "two", "another")
    assert chain(checkpoints, run, *flags, count=0) == 2  # its seed is another now, and all follows from it


def test_a_dry_run_prints_the_plan_and_makes_nothing(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.denoiser.model.WanModel.from_weights", lambda *_, **__: pytest.fail("a model was loaded"))
    story = board(tmp_path / "story.json", "the boat turns", {"seed": 77, "context": 5})
    assert chain(checkpoints, tmp_path / "run", "--storyboard", story, "--dry_run", count=4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 clips of 96x64 at 24 frames per second")
    assert lines[2].split()[:5] == ["1", "13", "12", "0.00", "10"] and lines[2].endswith(
        "continue video the boat turns"
    )
    assert lines[3].split()[:7] == ["2", "13", "8", "0.50", "77", "tail", "5"] and "description by the VLM" in lines[3]
    assert lines[6].startswith("1.83 s of new video; 4 of 4 clips") and "of disk" in lines[7] and "H200" in lines[8]
    assert lines[9].startswith("about 1.") and "GiB of GPU memory (encoding " in lines[9]
    flags = ("--storyboard", story, "--dry_run", "--offload_model", "False")
    assert chain(checkpoints, tmp_path / "run", *flags, count=4) == 0
    assert "GiB of GPU memory (all models at once), beside the VLM" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_which_sound_of_the_source_is_kept(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for video, sound in ((DATA / "corpus" / "audio_longer.mp4", "track 1 of 1, aac, "), (VIDEO, "none")):
        flags = (*PROMPT, "--include_source", "--dry_run")
        assert chain(checkpoints, tmp_path / "run", *flags, video=video) == 0
        assert f"sound of the source: {sound}" in capsys.readouterr().out
    assert chain(checkpoints, tmp_path / "run", *PROMPT, "--dry_run") == 0
    assert "sound of" not in capsys.readouterr().out


# A clip is written while the next one is made


def test_a_clip_is_written_while_the_next_one_is_made(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, save, extend = threading.Event(), ChainRun.save, WanV2V5B.extend
    order: list[str] = []

    def waiting(self: Any, made: Any) -> None:
        if self.inventory.first_missing == 1:
            assert begun.wait(60)  # which a writer in the way of the next clip would never see
        save(self, made)
        order.append(f"written {self.inventory.first_missing - 1}")

    def beginning(self: Any, footage: Any, seed: int, plan: Any, *more: Any, **named: Any) -> Any:
        order.append(f"begun {plan.number}")
        if plan.number == 2:
            begun.set()
        return extend(self, footage, seed, plan, *more, **named)

    monkeypatch.setattr(ChainRun, "save", waiting)
    monkeypatch.setattr(WanV2V5B, "extend", beginning)
    assert chain(checkpoints, tmp_path / "run", *PROMPT, count=3) == 0
    assert order.index("begun 2") < order.index("written 1") < order.index("written 2") < order.index("written 3")
    assert frames_in(tmp_path / "run" / "joined.mp4") == 37


def test_a_clip_that_cannot_be_written_stops_the_run_at_the_next_step(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, steps = ChainRun.save, list[int]()
    failed = threading.Event()

    def failing(self: Any, made: Any) -> None:
        if self.inventory.first_missing == 2:
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, made)

    extend = WanV2V5B.extend

    def watched(self: Any, footage: Any, seed: int, plan: Any, on_step: Any, **more: Any) -> Any:
        def step(done: Any) -> None:
            if plan.number == 3:
                assert failed.wait(60)
                time.sleep(0.2)
                steps.append(done.index)
            on_step(done)

        return extend(self, footage, seed, plan, step, **more)

    with monkeypatch.context() as patches:
        patches.setattr(ChainRun, "save", failing)
        patches.setattr(WanV2V5B, "extend", watched)
        assert chain(checkpoints, tmp_path / "run", *PROMPT, count=4) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "1 of 4 clips are finished" in error
    assert error.count("No space left") == 1 and len(steps) == 1
    assert chain(checkpoints, tmp_path / "run", *PROMPT, count=4) == 0


def test_ctrl_c_waits_for_the_clip_that_is_being_written(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, extend = ChainRun.save, WanV2V5B.extend

    def slow(self: Any, made: Any) -> None:
        time.sleep(0.5)
        save(self, made)

    def stopped(self: Any, footage: Any, seed: int, plan: Any, *more: Any, **named: Any) -> Any:
        if plan.number == 2:
            raise KeyboardInterrupt
        return extend(self, footage, seed, plan, *more, **named)

    monkeypatch.setattr(ChainRun, "save", slow)
    monkeypatch.setattr(WanV2V5B, "extend", stopped)
    assert chain(checkpoints, tmp_path / "run", *PROMPT, count=3) == 130
    assert "1 of 3 clips are finished" in capsys.readouterr().err
    assert frames_in(tmp_path / "run" / "joined.mp4") == 13


# The report, and memory


def test_every_run_writes_a_report_of_what_is_there(checkpoints: Path, tmp_path: Path) -> None:
    assert chain(checkpoints, tmp_path / "run", *PROMPT) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert page.count("data:image/jpeg;base64,") >= 16 and "it goes on" in page
    assert "://" not in page
    assert len(data["clips"]) == 2
    of_the_model = {"negative_prompt", "width", "height", "fps", "param_dtype", "t5_dtype"}
    known = {one.record for one in OPTIONS.values()} | of_the_model
    assert {*data["common"], *data["clips"][0]["settings"], *data["clips"][1]["settings"]} <= known
    for record in records(tmp_path / "run"):
        assert record["seam"]["score"] >= 0 and record["look"]["sharpness"] > 0


def test_memory_does_not_grow_with_the_number_of_clips(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a clip is saved, the frames of no other but the one before it are in memory."""
    alive: list[int] = []
    save = ChainRun.save

    def counting(self: Any, made: Any) -> None:
        gc.collect()
        size = made.clip.frames.numel()
        alive.append(sum(1 for one in gc.get_objects() if type(one) is torch.Tensor and one.numel() == size))
        save(self, made)

    monkeypatch.setattr(ChainRun, "save", counting)
    # longer than the tail that a seam is judged by
    assert chain(checkpoints, tmp_path / "run", *PROMPT, "--frame_num", "21", count=6) == 0
    assert len(alive) == 6 and max(alive[2:]) <= alive[1] <= alive[0] + 2
