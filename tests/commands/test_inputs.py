"""What a pipeline is built from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Seen
from wan.batch.rows import Row
from wan.batch.schedule import Task
from wan.commands.inputs import model_settings
from wan.options import Settings

OTHER: dict[str, Any] = {
    "task": "v2v-5B",
    "ckpt_dir": "a",
    "comfy_dir": "b",
    "dit": "c",
    "dit_high": "d",
    "dit_low": "e",
    "vae": "f",
    "t5": "g",
    "precision": "fp8",
    "vae_dtype": "float16",
    "convert_model_dtype": True,
    "t5_cpu": True,
    "t5_fsdp": True,
    "dit_fsdp": True,
    "compile": "off",
    "vram": 8.0,
    "host_memory": 64.0,
    "vlm_path": "h",
    "vlm_url": "http://i/v1",
    "vlm_device": "cpu",
    "vlm_trust_remote_code": True,
    "video_reader": "pyav",
}


@pytest.mark.parametrize("name", OTHER)
def test_another_value_of_what_a_pipeline_is_built_from_is_another_pipeline(name: str) -> None:
    assert model_settings(Settings(**{name: OTHER[name]})) != model_settings(Settings())


def test_what_is_not_built_in_leaves_the_pipeline_alone() -> None:
    other: dict[str, Any] = {
        "prompt": "x",
        "base_seed": 3,
        "sample_steps": 7,
        "size": "832*480",
        "vlm_question": "?",
        "lora": ("a",),
    }
    assert model_settings(Settings(**other)) == model_settings(Settings())


def test_chains_of_a_batch_share_models_by_the_same_rule() -> None:
    keys = {Task(Row("x", "x", Settings(**{name: OTHER[name]}))).key for name in OTHER}
    assert len(keys) == len(OTHER)
    plain, with_lora = (Task(Row("x", "x", Settings(lora=lora))).key for lora in ((), ("a",)))
    assert plain != with_lora and plain[:-1] == with_lora[:-1] == model_settings(Settings())


def test_what_a_storyboard_says_of_every_clip_the_command_need_not_have(
    command: Callable[..., Seen], tmp_path: Path
) -> None:
    story, lora = tmp_path / "story.yaml", Path("light.safetensors").absolute()
    story.write_text(f"- {{prompt: it sails, lora: {lora}}}\n- {{prompt: it sinks, lora: {lora}}}\n")
    words = f"--storyboard {story} --preset turbo --vlm_path {tmp_path / 'no'}"
    seen = command(words)
    assert seen.code == 0 and len(seen.requests) == 2
    for more, message in (
        (f"--num_videos 3 --output_dir {tmp_path}/3", "there is no VLM folder"),
        (f"--num_videos 3 --output_dir {tmp_path}/3 --prompt x", "--preset turbo needs --lora FILE"),
    ):
        seen = command(f"{words} {more}")  # of the third it says nothing
        assert seen.code == 2 and not seen.requests and message in seen.output
    story.write_text(f"- {{prompt: it sails, lora: {lora}}}\n- {{prompt: it sinks}}\n")
    seen = command(f"{words} --output_dir {tmp_path}/4")
    assert seen.code == 2 and f"{story}, line 2: --preset turbo needs --lora FILE" in seen.output


@pytest.mark.parametrize("given", ["--until other.mp4", "--end_images ends", "--end_image red.png"])
def test_an_end_that_leaves_no_frames_names_the_flag_that_was_given(command: Callable[..., Seen], given: str) -> None:
    seen = command(f"{given} --frame_num 5")
    assert seen.code == 2 and not seen.requests
    assert f"{given.split()[0]}: a clip with 1 known frame must have 9 or more, 5 is fewer" in seen.output
