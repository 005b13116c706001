"""The two commands on tiny checkpoints: every file they write, and what they leave when they are stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from generate import EXAMPLE_PROMPT
from tests.support.commands import Seen
from tests.support.golden import DATA, GOLDEN, ROOT, small_checkpoints
from tests.support.tiny_checkpoint import InternVL, write_internvl
from wan import cli, media
from wan.commands.progress import Progress
from wan.options import settings_of
from wan.pipeline import Pipeline
from wan.public import public_path
from wan.types import Step, to_uint8

pytestmark = pytest.mark.slow

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoints as folders that declare small sizes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    small_checkpoints(folder)
    for name in ("i2v", "ti2v"):
        write_internvl(folder / name / "InternVL3_5-8B", InternVL())
    return folder


def record_of(target: Path) -> dict[str, Any]:
    return dict(json.loads(target.with_suffix(".json").read_text(encoding="utf-8")))


def frames_of(path: Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def comment_of(path: Path) -> Any:
    with av.open(str(path)) as container:
        return json.loads(container.metadata["comment"]) if "comment" in container.metadata else None


@pytest.mark.parametrize("name", ["i2v", "ti2v"])
def test_generate_continues_a_video_with_its_description(
    name: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.mp4"
    flags = ["--ckpt_dir", str(checkpoints / name), "--video", str(VIDEO), "--save_file", str(target)]
    assert cli.generate_main([*flags, "--base_seed", "3", "--frame_num", "9"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{target}\n" and f"out.mp4 prompt: {record_of(target)['prompt']}" in output.err
    assert len(frames_of(target)) == 9
    record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    assert comment_of(target) == settings_of(record)
    assert record["task"] == {"i2v": "v2v-14B", "ti2v": "v2v-5B"}[name]
    assert record["seed"] == 3 and record["frame_num"] == 9 and record["sample_steps"] == 2
    assert record["prompt"] and record["negative_prompt"].startswith("色调")
    assert {"caption", "prepare", "text", "encode", "load", "sample", "decode"} == set(record["seconds"])
    assert record["versions"]["torch"] == torch.__version__


def test_with_a_prompt_no_vlm_is_loaded(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.prompting.open_captioner", lambda *_, **__: pytest.fail("a VLM was opened"))
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt_dir", str(checkpoints / "ti2v"), "--video", str(VIDEO), "--prompt", "A cat playing"]
    assert cli.generate_main([*flags, "--no_video_metadata", "--vae_dtype", "float16"]) == 0
    (target,) = tmp_path.glob("v2v-5B_96x64_h264_faststart_*.mp4")
    assert comment_of(target) is None
    record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["prompt"] == "A cat playing" and record["vae_dtype"] == "float16"


def test_the_tasks_of_wan_itself(checkpoints: Path, tmp_path: Path) -> None:
    prompt = ["--prompt", "a boat", "--sample_guide_scale"]
    for name, image, task in (("i2v", "14b", "i2v-A14B"), ("ti2v", "5b", "ti2v-5B"), ("ti2v", None, "ti2v-5B")):
        target = tmp_path / f"{task}_{image}.mp4"
        flags = ["--ckpt_dir", str(checkpoints / name), "--task", task, "--save_file", str(target), *prompt]
        guidance = [2.0, 3.0] if name == "i2v" else [2.0, 2.0]
        flags += ["2,3" if name == "i2v" else "2"]
        flags += ["--image", str(GOLDEN / image / "image.png")] if image else []
        assert cli.generate_main(flags) == 0
        assert len(frames_of(target)) == 5
        record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        assert record["task"] == task and record["sample_guide_scale"] == guidance and "vlm" not in record


def test_a_prompt_that_is_too_long_is_said(checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--ckpt_dir", str(checkpoints / "ti2v"), "--task", "ti2v-5B", "--prompt", "walk " * 900]
    assert cli.generate_main([*flags, "--save_file", str(tmp_path / "out.mp4")]) == 0
    assert "tokens and the text encoder takes 512: its end is cut off" in caplog.text


@pytest.mark.parametrize(
    ("world", "message"), [("8", "WORLD_SIZE is 8 without RANK, LOCAL_RANK"), ("abc", "WORLD_SIZE='abc' is no number")]
)
def test_a_launcher_s_environment_must_be_whole(
    world: str, message: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert cli.generate_main(["--ckpt_dir", str(checkpoints / "ti2v"), "--video", str(VIDEO), "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err


def run_chain(checkpoints: Path, output: Path, *more: str, count: int = 3) -> int:
    flags = ["--ckpt_dir", str(checkpoints / "ti2v"), "--video", str(VIDEO), "--output_dir", str(output)]
    flags += ["--num_videos", str(count), "--frame_num", "5", "--base_seed", "10", *more]
    return cli.continuous_main(flags)


def test_a_chain_writes_clips_joined_video_prompts_and_records(checkpoints: Path, tmp_path: Path) -> None:
    output = tmp_path / "chain"
    assert run_chain(checkpoints, output) == 0
    clips = sorted(output.glob("video_*.mp4"))
    assert [clip.name for clip in clips] == [f"video_0{n}_seed{n + 9}.mp4" for n in (1, 2, 3)]
    assert all(len(frames_of(clip)) == 5 for clip in clips)
    # each clip begins with the last frame of the one before, which is not shown twice
    joined = frames_of(output / "joined.mp4")
    parts = [frames_of(clip) for clip in clips]
    assert len(joined) == 13
    assert all(np.array_equal(*pair) for pair in zip(joined, parts[0] + parts[1][1:] + parts[2][1:], strict=True))

    log = (output / "prompts_log.txt").read_text(encoding="utf-8").splitlines()
    assert len(log) == 3 and all("continue video " in line for line in log)
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished" and run["clips_finished"] == 3 and run["base_seed"] == 10
    assert [clip["seed"] for clip in run["clips"]] == [10, 11, 12]
    assert [clip["source"] for clip in run["clips"]] == [public_path(path) for path in (VIDEO, clips[0], clips[1])]
    for clip, record in zip(clips, run["clips"], strict=True):
        written = json.loads(clip.with_suffix(".json").read_text(encoding="utf-8"))
        assert {"file": clip.name} | written == record and comment_of(clip) == settings_of(written)


def test_clips_of_a_chain_are_no_longer_than_the_checkpoint_declares(checkpoints: Path, tmp_path: Path) -> None:
    flags = ["--ckpt_dir", str(checkpoints / "ti2v"), "--video", str(VIDEO), "--prompt", "x", "--num_videos", "1"]
    assert cli.continuous_main([*flags, "--output_dir", str(tmp_path / "chain")]) == 0
    assert len(frames_of(tmp_path / "chain/joined.mp4")) == 5


def test_models_load_once_for_a_chain(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wan.denoiser.model import WanModel

    loads: list[Any] = []
    original = WanModel.from_weights.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, *args: Any, **options: Any) -> Any:
        loads.append(1)
        return original(cls, *args, **options)

    monkeypatch.setattr(WanModel, "from_weights", classmethod(counting))
    assert run_chain(checkpoints, tmp_path / "chain", "--prompt", "it goes on", count=2) == 0
    assert len(loads) == 1


def test_the_next_clip_starts_from_memory_not_from_the_mp4(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan.wan22video2video5B import WanV2V5B

    seen: list[Any] = []
    original = WanV2V5B.run

    def spy(self: Any, request: Any, **options: Any) -> Any:
        made = original(self, request, **options)
        seen.append((request.known.leading[0], made.clip.last))
        return made

    monkeypatch.setattr(WanV2V5B, "run", spy)
    assert run_chain(checkpoints, tmp_path / "chain", "--prompt", "x", count=2) == 0
    assert torch.equal(seen[1][0], seen[0][1])
    clip = min((tmp_path / "chain").glob("video_01*.mp4"))
    # what the mp4 holds is another, compressed picture
    assert not np.array_equal(np.asarray(media.read_last_frame(clip)), to_uint8(seen[0][1].permute(1, 2, 0)))


def test_an_interrupted_chain_keeps_what_is_finished_and_the_same_command_goes_on(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wan.wan22video2video5B import WanV2V5B

    original = WanV2V5B.run

    def interrupted(self: Any, request: Any, **options: Any) -> Any:
        if request.seed == 12:
            raise KeyboardInterrupt
        return original(self, request, **options)

    monkeypatch.setattr(WanV2V5B, "run", interrupted)
    output = tmp_path / "chain"
    assert run_chain(checkpoints, output, "--prompt", "it goes on") == 130
    lines = capsys.readouterr().err.splitlines()
    last = [f"2 of 3 clips are finished in {output}", "the same command goes on from there", "interrupted"]
    assert lines[-3:] == last
    assert len(frames_of(output / "joined.mp4")) == 9
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"

    before = {path: path.stat().st_mtime_ns for path in output.glob("video_0[12]*")}
    monkeypatch.setattr(WanV2V5B, "run", original)
    assert run_chain(checkpoints, output, "--prompt", "it goes on") == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("video_0[12]*")} == before
    assert len(frames_of(output / "joined.mp4")) == 13
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_chain_that_fails_in_its_first_clip_leaves_a_folder_that_can_be_used_again(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    from wan.wan22video2video5B import WanV2V5B

    output = tmp_path / "chain"
    with monkeypatch.context() as patch:
        patch.setattr(WanV2V5B, "run", out_of_memory)
        assert run_chain(checkpoints, output, "--prompt", "x", count=1) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: out of GPU memory (CUDA out of memory. Tried")
    assert run_chain(checkpoints, output, "--prompt", "x", count=1) == 0


def test_a_full_disk_is_an_error_and_never_finished(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "x.mp4")

    monkeypatch.setattr(media, "write_video", full)
    target = tmp_path / "out.mp4"
    flags = ["--ckpt_dir", str(checkpoints / "ti2v"), "--video", str(VIDEO), "--prompt", "x"]
    assert cli.generate_main([*flags, "--save_file", str(target)]) == 2
    assert "No space left on device: x.mp4; free space" in capsys.readouterr().err
    assert not target.exists() and not target.with_suffix(".json").exists()


@pytest.mark.parametrize("generate", [True, False])
def test_memory_is_given_back_while_the_last_clip_is_written(
    generate: bool, command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, seen_closed = threading.Event(), list[bool]()
    write, close = media.write_video, Pipeline.close

    def writing(*arguments: Any, **options: Any) -> None:
        seen_closed.append(closed.wait(0.1 if not generate and not seen_closed else 20))
        write(*arguments, **options)

    def closing(pipeline: Pipeline) -> None:
        close(pipeline)
        closed.set()

    monkeypatch.setattr(media, "write_video", writing)
    monkeypatch.setattr(Pipeline, "close", closing)
    assert command("", generate=generate).code == 0
    assert seen_closed == ([True] if generate else [False, True])


def test_a_command_ends_at_once_with_its_code_and_all_that_it_said() -> None:
    code = "import atexit, sys, time\natexit.register(time.sleep, 60)\nfrom wan.cli import generate_program\n"
    code += "sys.argv = ['generate.py', '--ckpt_dir', 'x', '--video', 'nowhere.mp4']\nprint('kept')\ngenerate_program()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=55)
    assert done.returncode == 2 and done.stdout == "kept\n"
    assert done.stderr.startswith("error: cannot read video 'nowhere.mp4'")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(bug, [])


def test_the_bars_say_clip_stage_and_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("", clips=2) as progress:
        progress.begin("clip 1/2")
        progress(Step(0, 4, "encode"))
        progress(Step(3, 4, "high noise", torch.zeros(1)))
        assert progress.bar is not None and (progress.bar.n, progress.bar.total) == (3, 4)
        progress.finish_clips(1)
        assert progress.chain is not None and progress.chain.n == 1
    shown = capsys.readouterr().err
    assert "clip 1/2 encode" in shown and "clip 1/2 high noise" in shown and "chain" in shown


def test_off_a_terminal_there_are_no_bars_but_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("clip.mp4") as progress:
        progress(Step(0, 4, "encode"))
        progress(Step(4, 4, "denoise", torch.zeros(1)))
    assert capsys.readouterr().err == ""


def test_ctrl_c_from_a_terminal_ends_with_130(checkpoints: Path, tmp_path: Path) -> None:
    flags = ["--ckpt_dir", str(checkpoints / "ti2v"), "--video", str(VIDEO), "--output_dir", str(tmp_path / "chain")]
    flags += ["--num_videos", "500", "--frame_num", "5", "--prompt", "x", "--base_seed", "0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate_continuous.py"), *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    try:
        deadline = time.monotonic() + 240
        while len(list((tmp_path / "chain").glob("video_*.json"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, error
    finished = sorted((tmp_path / "chain").glob("video_*.mp4"))
    assert f"{len(finished)} of 500 clips are finished" in error and "the same command goes on" in error
    assert len(frames_of(tmp_path / "chain" / "joined.mp4")) == 4 * len(finished) + 1
    assert {path.name[:7] for path in (tmp_path / "chain").glob(".*")} <= {".draft_", ".lock"}


@pytest.mark.parametrize("script", ["generate.py", "generate_continuous.py"])
def test_help_is_quick_and_complete(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--ckpt_dir" in done.stdout and "--vlm_device" in done.stdout


@pytest.mark.parametrize(
    ("name", "task"), [("ti2v", None), ("ti2v", "ti2v-5B"), ("ti2v", "v2v-5B"), ("i2v", "i2v-A14B"), ("i2v", "v2v-14B")]
)
def test_a_task_without_prompt_and_input_makes_its_example(
    name: str, task: str | None, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "out.mp4"
    flags = ["--ckpt_dir", str(checkpoints / name), "--save_file", str(target), *(["--task", task] if task else [])]
    assert cli.generate_main(flags) == 0
    record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    example = EXAMPLE_PROMPT[task or "ti2v-5B"]
    assert record["prompt"] == example["prompt"] and record["task"] == (task or "ti2v-5B")
    file = example.get("video") or example.get("image")
    assert record["source"] == (public_path(ROOT / file) if file else None)
    assert f"this runs the example of {task or 'ti2v-5B'}" in caplog.text


def test_equal_runs_write_equal_files(checkpoints: Path, tmp_path: Path) -> None:
    """Also in other folders, from a checkpoint in another place."""
    other = Path(shutil.copytree(checkpoints, tmp_path / "elsewhere"))
    for name, home in (("one", checkpoints), ("two", other)):
        assert run_chain(home, tmp_path / name, "--prompt", "it goes on", count=2) == 0
    files = [path.name for path in sorted((tmp_path / "one").glob("*.mp4"))]
    assert files == ["joined.mp4", "video_01_seed10.mp4", "video_02_seed11.mp4"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    comment = json.dumps(comment_of(tmp_path / "one" / "video_01_seed10.mp4"))
    assert str(tmp_path) not in comment and str(checkpoints) not in comment and "seconds" not in comment
