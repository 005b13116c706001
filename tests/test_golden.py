"""Oracle: the numbers that the official Wan2.2 code computed with the golden checkpoints, in float32 on CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.support.golden import GOLDEN
from tests.support.small_convolutions import pytorch_s_choice
from wan.denoiser.schedule import build_scheduler
from wan.image2video import preprocess as preprocess_14b
from wan.settings import Sampling
from wan.sizes import best_size, exact_size, official_size
from wan.text.umt5 import clean
from wan.textimage2video import preprocess as preprocess_5b
from wan.types import Generation


@pytest.fixture(scope="module", autouse=True)
def _as_it_is() -> Iterator[None]:
    """The product as it is, with no kernel chosen for tests."""
    with pytorch_s_choice():
        yield


RUNS = [
    ("5b", "main"),
    ("5b", "dpmpp"),
    ("5b", "steps20"),
    ("5b", "t2v"),
    ("14b", "main"),
    ("14b", "dpmpp"),
    ("14b", "steps20"),
]


@pytest.fixture
def pipeline(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue({"5b": "ti2v", "14b": "i2v"}[request.param])


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def largest(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).abs().max())


def expected(family: str, name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / family / "expected" / f"{name}.safetensors")


@pytest.mark.parametrize(("pipeline", "family"), [("5b", "5b"), ("14b", "14b")], indirect=["pipeline"])
def test_words_are_exact_and_their_embeddings_within_2e_5(pipeline: Any, family: str, golden: dict[str, Any]) -> None:
    wanted = expected(family, "text")
    cleaned = json.loads((GOLDEN / family / "expected" / "cleaned_prompts.json").read_text(encoding="utf-8"))
    cleaned = cleaned["prompts"] if isinstance(cleaned, dict) else cleaned
    for index, prompt in enumerate(golden["prompts"]):
        assert clean(prompt) == cleaned[index]
        ids, mask = pipeline.tokenizer(prompt)
        assert torch.equal(ids[0], wanted["ids"][index].long())
        assert torch.equal(mask[0], wanted["mask"][index].long())
        rows = pipeline.text_encoder(prompt)[0]
        valid = len(wanted[f"context_{index}"])
        # bit for bit on the processor that made them; others sum in another order
        assert largest(rows[:valid], wanted[f"context_{index}"]) < 2e-5
        assert rows.shape[0] == 512 and not rows[valid:].any()
    ids, _ = pipeline.tokenizer(pipeline.config.sample_neg_prompt)
    assert torch.equal(ids, wanted["default_negative_ids"].long())


@pytest.mark.parametrize(("pipeline", "family"), [("5b", "5b"), ("14b", "14b")], indirect=["pipeline"])
def test_vae_is_within_1e_4(pipeline: Any, family: str) -> None:
    wanted = expected(family, "vae")
    for frames in (key.removeprefix("video_") for key in wanted if key.startswith("video_")):
        assert largest(pipeline.vae.encode([wanted[f"video_{frames}"].float()])[0], wanted[f"latent_{frames}"]) < 1e-4
        assert largest(pipeline.vae.decode([wanted[f"latent_{frames}"]])[0], wanted[f"decoded_{frames}"]) < 1e-4


def test_5b_denoiser_is_within_2e_5(ti2v: Any) -> None:
    wanted = expected("5b", "dit")
    text = torch.nn.functional.pad(wanted["context"], (0, 0, 0, 512 - len(wanted["context"])))[None]
    for key, reference in wanted.items():
        if not key.startswith("out_"):
            continue
        _, known, t = key.split("_")
        timestep = torch.full((3, 6), float(t[1:]))
        timestep[: {"uniform": 0, "firstframe0": 1, "twoframes0": 2}[known]] = 0
        with torch.no_grad():
            output = ti2v.model(wanted["x"][None], timestep.flatten()[None], text, return_dict=False)[0][0]
        assert relative(output, reference) < 2e-5, key


def test_14b_denoisers_are_within_2e_5(i2v: Any) -> None:
    wanted = expected("14b", "dit")
    text = torch.nn.functional.pad(wanted["context"], (0, 0, 0, 512 - len(wanted["context"])))[None]
    for name, model, t in (("high_noise", i2v.high_noise_model, 937), ("low_noise", i2v.low_noise_model, 613)):
        placed = torch.cat([wanted["x"], wanted["y"]])[None]
        with torch.no_grad():
            output = model(placed, torch.tensor([t]), text, return_dict=False)[0][0]
        assert relative(output, wanted[f"out_{name}_t{t}"]) < 2e-5


@pytest.mark.parametrize(
    "name", sorted({key.rsplit(".", 1)[0] for key in load_file(GOLDEN / "schedulers.safetensors")})
)
def test_sigma_tables_are_exact_and_trajectories_follow(name: str) -> None:
    tables = {
        key.rsplit(".", 1)[1]: value
        for key, value in load_file(GOLDEN / "schedulers.safetensors").items()
        if key.rsplit(".", 1)[0] == name
    }
    solver, steps, shift = name.split("_")
    sampling = Sampling(int(steps[5:]), float(shift[5:]), (1, 1), {"unipc": "unipc", "dpmpp": "dpm++"}[solver])

    def trajectory(dtype: torch.dtype) -> Tensor:
        scheduler: Any = build_scheduler(sampling, torch.device("cpu"))
        assert torch.equal(scheduler.sigmas, tables["sigmas"])
        assert torch.equal(scheduler.timesteps, tables["timesteps"])
        scheduler.sigmas = scheduler.sigmas.to(dtype)
        sample, samples = tables["x0"].to(dtype), []
        for t, output in zip(scheduler.timesteps, tables["model_outputs"], strict=True):
            sample = scheduler.step(output.to(dtype), t, sample, return_dict=False)[0]
            samples.append(sample)
        return torch.stack(samples)

    # processors round differently, by more than 1e-6 in 50 steps; in float64 that is the same on each of them
    exact = trajectory(torch.float64)
    official = largest(tables["samples"].double(), exact)
    assert exact.dtype == torch.float64 and official < 3e-6
    assert largest(trajectory(torch.float32).double(), exact) < max(1e-6, 2 * official)


def test_sizes_are_exact() -> None:
    for case in json.loads((GOLDEN / "sizes.json").read_text(encoding="utf-8")):
        width, height = case["image_wh"]
        assert list(official_size(width, height, case["max_area"])) == case["i2v_a14b_wh"]
        assert list(best_size(width, height, case["max_area"])) == case["ti2v_5b_wh"]


def test_a_continuation_keeps_a_size_that_the_official_float_arithmetic_loses() -> None:
    assert official_size(832, 480, 832 * 480) == (832, 464)
    assert exact_size(832, 480, 832 * 480) == (832, 480)


@pytest.mark.parametrize(
    ("pipeline", "family", "run"), [(family, family, run) for family, run in RUNS], indirect=["pipeline"]
)
def test_whole_runs_make_the_official_video(
    pipeline: Any, family: str, run: str, golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(family, f"pipeline_{run}")
    spec = golden["families"][family]["runs"][run]
    call = {key: tuple(value) if isinstance(value, list) else value for key, value in spec["call"].items()}
    if run != "t2v":
        call["img"] = Image.open(GOLDEN / family / "image.png").convert("RGB")
    negative = "" if spec["n_prompt_index"] == "" else golden["prompts"][spec["n_prompt_index"]]
    made: list[Generation] = []
    steps: list[Tensor] = []
    original = pipeline.run

    def spy(request: Any, **options: Any) -> Generation:
        made.append(original(request, **options | {"on_step": lambda step: steps.append(step.latents)}))
        return made[0]

    monkeypatch.setattr(pipeline, "run", spy)
    video = pipeline.generate(golden["prompts"][spec["prompt_index"]], n_prompt=negative, **call)

    assert list(video.shape) == spec["video_shape"]
    assert relative(made[0].latents, wanted["latent_final"]) < 1e-4
    if "video" in wanted:
        assert largest(video, wanted["video"]) < 1e-3
        taken = [latents for latents in steps if latents is not None]
        for latents, reference in zip(taken, wanted["latents"], strict=True):
            # the official code puts the known frame back after each step, ours when the model is fed
            known = 1 if family == "5b" and run != "t2v" else 0
            assert relative(latents[:, known:], reference[:, known:]) < 1e-4
    else:
        assert largest(video[:, -1], wanted["video_frame_last"]) < 1e-3


@pytest.mark.parametrize(("family", "preprocess"), [("5b", preprocess_5b), ("14b", preprocess_14b)])
def test_the_first_frame_is_prepared_as_officially(family: str, preprocess: Any) -> None:
    image = Image.open(GOLDEN / family / "image.png").convert("RGB")
    for run in ("main", "dpmpp"):
        reference = expected(family, f"pipeline_{run}")["image_pre"][:, 0]
        assert largest(preprocess(image, reference.shape[2], reference.shape[1]), reference) < 1e-6


def test_a_float_frame_is_prepared_like_the_image_it_was() -> None:
    image = Image.open(GOLDEN / "5b" / "image.png").convert("RGB")
    frame = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    assert largest(preprocess_14b(frame, 96, 64), preprocess_14b(image, 96, 64)) < 1e-6
    # Pillow rounds and clips an 8-bit image between its two passes
    difference = (preprocess_5b(frame, 96, 64) - preprocess_5b(image, 96, 64)).abs()
    assert difference.mean() < 1 / 127.5
    assert torch.equal(preprocess_5b(frame, 150, 110), frame)
