"""What a clip's record says of how it was made."""

from __future__ import annotations

from fractions import Fraction
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

from wan.chain.plan import Plan
from wan.commands.clip_record import Recorder, versions
from wan.configs import WAN_CONFIGS
from wan.options import Settings
from wan.settings import Context, Sampling, StepCache
from wan.types import Clip, Generation, Geometry, KnownFrames, Request

SAMPLING = Sampling(4, 3.0, (1.5, 2.5), "euler", (0.25, 0.75), StepCache("first_block", 0.1))
GEOMETRY = Geometry(17, 32, 64, (4, 16, 16))


def made(sampling: Sampling = SAMPLING, known: KnownFrames | None = None, **more: Any) -> Generation:
    request = Request("a boat", "blurred", known or KnownFrames(), GEOMETRY, sampling, 7, motion_amplitude=1.2)
    return Generation(Clip(torch.zeros(17, 32, 64, 3), Fraction(24)), torch.zeros(48, 5, 2, 4), request, **more)


def describe(generation: Generation, plan: Plan | None = None, config: Any = None, **settings: Any) -> dict[str, Any]:
    row = config or WAN_CONFIGS["v2v-5B" if plan else "ti2v-5B"]
    command: Any = "continuous" if plan else "generate"
    return Recorder(command, Settings(**settings), row, offload=False).describe(generation, "films/a.mp4", plan)


def test_a_record_says_what_was_used_and_what_it_took() -> None:
    record = describe(made(seconds={"sample": 1.23456}, peak_gib=2.34567, notes={"fallback": "it was silent"}))
    expected = {
        "prompt": "a boat",
        "negative_prompt": "blurred",
        "seed": 7,
        "width": 64,
        "height": 32,
        "frame_num": 17,
        "fps": "24",
        "task": "ti2v-5B",
        "size": WAN_CONFIGS["ti2v-5B"].sizes[0],
        "sample_solver": "euler",
        "sample_steps": 4,
        "sample_shift": 3.0,
        "sample_guide_scale": [1.5, 2.5],
        "guidance_interval": [0.25, 0.75],
        "cache": "first_block:0.1",
        "precision": None,
        "vae_dtype": "float32",
        "offload_model": False,
        "motion_amplitude": 1.2,
        "seconds": {"sample": 1.235},
        "peak_gpu_gib": 2.346,
        "fallback": "it was silent",
    }
    assert {name: record.get(name, "absent") for name in expected} == expected
    assert record["end_image"] is False and record["peak_host_gib"] > 0 and record["source"].endswith("a.mp4")
    assert not {"seam", "dropped", "memory", "continuation", "cut", "vlm_path"} & record.keys()


def test_what_was_not_used_is_said_to_be_off() -> None:
    record = describe(made(Sampling(4, 3.0, (1.5, 2.5)), KnownFrames(end=torch.zeros(3, 32, 64))))
    assert (record["cache"], record["guidance_interval"], record["end_image"]) == ("off", None, True)
    assert record["peak_gpu_gib"] is None
    alone = Recorder("generate", Settings(), WAN_CONFIGS["ti2v-5B"], offload=True).describe(made(), None)
    assert alone["source"] is None and alone["offload_model"] is True


def test_dtypes_and_sizes_are_those_that_were_asked_for_or_chosen() -> None:
    row = WAN_CONFIGS["ti2v-5B"].variant(low_precision="fp8", vae_dtype="float16", param_dtype="float32")
    record = describe(made(), config=row, size="704*1280", precision="bf16")
    assert (record["precision"], record["vae_dtype"], record["param_dtype"]) == ("fp8", "float16", "float32")
    assert record["size"] == "704*1280"
    assert describe(made(), precision="bf16")["precision"] == "bf16"


@pytest.mark.parametrize(("prompt", "vlm"), [(None, "vlm"), ("x", None)])
def test_a_continuation_s_record_says_what_its_plan_chose(prompt: str | None, vlm: str | None) -> None:
    plan = Plan(
        GEOMETRY,
        SAMPLING,
        "",
        prompt,
        prefix="continue video",
        num_segments=3,
        context=Context("tail", 9),
        discard=4,
        drift_correction=0.5,
        colour_carry=0.25,
    )
    memory = {"seen": ["a"]}
    generation = made(context_frames=5, dropped=5, prompt_memory=memory, score_seam=lambda: {"score": 0.5})
    record = describe(generation, plan, video="films/a.mp4", vlm_path="vlm", num_segments=8)
    expected = {
        "custom_prompt": "continue video",
        "prompt_mode": "describe",
        "vlm_path": vlm,
        "vlm_url": None,
        "num_segments": 3,
        "continuation": "tail",
        "context_frames": 5,  # of the footage there were no more
        "cut": False,
        "discard": 4,
        "drift_correction": 0.5,
        "colour_carry": 0.25,
        "seam": {"score": 0.5},
        "dropped": 5,
        "memory": memory,
    }
    assert {name: record.get(name, "absent") for name in expected} == expected
    assert "memory" not in describe(made(), plan)


def test_versions_are_of_all_that_can_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = versions()
    assert installed["torch"] == torch.__version__ and "unknown" not in installed.values()
    assert {"wan-continue", "python", "diffusers", "transformers", "av", "pillow", "numpy"} < installed.keys()

    def version(name: str) -> str:
        if name == "av":
            raise PackageNotFoundError
        return "1"

    monkeypatch.setattr("wan.commands.clip_record.version", version)
    assert versions()["av"] == "unknown" and versions()["numpy"] == "1"
