"""What a pipeline is built from."""

from __future__ import annotations

from typing import Any

import pytest

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
