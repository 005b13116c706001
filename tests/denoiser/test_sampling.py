"""The loop, with fakes for models and scheduler."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.denoiser.conditioning import TextOnly
from wan.denoiser.sampling import Expert, plan_stages, sample
from wan.denoiser.schedule import build_scheduler
from wan.denoiser.timetable import timesteps_of
from wan.device.placement import Placement
from wan.errors import UserError
from wan.settings import Sampling
from wan.types import Geometry, Step, TextContext

CPU = Placement(torch.device("cpu"))
CONTEXT = TextContext(torch.ones(1, 512, 1), torch.zeros(1, 512, 1))


class Fake(nn.Module):
    """Answers with the text's value; remembers the timesteps it was asked for. Its text keys are the text."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, float]] = []

    def text_keys(self, text: Tensor, keep: bool) -> Tensor:
        return text

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.asked.append((int(t), float(text[0, 0, 0])))
        return (torch.full_like(latents, float(text[0, 0, 0])),)


class Adds:
    """A solver that adds the flow."""

    def step(self, output: Tensor, t: Tensor, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (latents + output,)


def expert(name: str, model: Any, guidance: float, lowest: float) -> Expert:
    """An expert with a fake for its model."""
    return Expert(name, name, lambda: model, guidance, lowest)


def stages_of(*experts: Expert) -> Any:
    return plan_stages(torch.tensor([999, 950, 900, 899, 10]), experts)


def test_each_expert_gets_its_share_of_the_schedule_and_its_guidance() -> None:
    high, low = Fake(), Fake()
    steps: list[Step] = []
    stages = stages_of(expert("high", high, 3.0, 900), expert("low", low, 2.0, 0))
    made = sample(torch.zeros(1, 1, 1, 1), stages, Adds(), TextOnly(), CONTEXT, CPU, steps.append)  # type: ignore[arg-type]
    assert [t for t, _ in high.asked[::2]] == [999, 950, 900] and [t for t, _ in low.asked[::2]] == [899, 10]
    # flow = 0 + guidance * (1 - 0)
    assert made.item() == 3 * 3.0 + 2 * 2.0
    assert [(step.index, step.total, step.stage) for step in steps] == [
        *((index, 5, "high") for index in (1, 2, 3)),
        *((index, 5, "low") for index in (4, 5)),
    ]


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 12.0])
def test_timesteps_are_told_without_a_scheduler(solver: str, shift: float) -> None:
    for steps, train in itertools.product((1, 3, 4, 20, 40, 77), (1000, 500)):
        sampling = Sampling(steps, shift, (1.0, 1.0), solver)
        expected = build_scheduler(sampling, torch.device("cpu"), train).timesteps.tolist()
        assert list(timesteps_of(sampling, train)) == expected


def test_guidance_1_needs_no_second_forward() -> None:
    model = Fake()
    sample(torch.zeros(1, 1, 1, 1), stages_of(expert("", model, 1.0, 0)), Adds(), TextOnly(), CONTEXT, CPU)  # type: ignore[arg-type]
    assert [text for _, text in model.asked] == [1.0] * 5


def test_an_expert_without_timesteps_is_never_moved() -> None:
    low = expert("low", Fake(), 1.0, 0)
    assert [
        stage.expert for stage in plan_stages(torch.tensor([500, 100]), [expert("high", Fake(), 1.0, 900), low])
    ] == [low]


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (80, 64, 64, "frame_num must be 4n[+]1: 80 is not, 77 and 81 are"),
        (0, 64, 64, "frame_num must be 4n[+]1: 0 is not, 1 and 5 are"),
        (81, 60, 64, "height must be a positive multiple of 16 pixels, 60 is not"),
        (81, 64, 0, "width must be a positive multiple of 16 pixels, 0 is not"),
    ],
)
def test_a_geometry_that_exists_is_valid(frames: int, height: int, width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Geometry(frames, height, width, (4, 8, 8))


def test_geometry_counts_latents_and_tokens() -> None:
    # the token counts of gpu benchmarks: 14B 480p and 5B 704p
    assert Geometry(81, 480, 832, (4, 8, 8)).latent == (21, 60, 104)
    assert Geometry(81, 480, 832, (4, 8, 8)).tokens == 32760
    assert Geometry(121, 704, 1280, (4, 16, 16)).tokens == 27280


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 5.0, (1.0, 1.0), "unipc"), "sample_steps must be at least 1"),
        ((4, 0.0, (1.0, 1.0), "unipc"), "sample_shift must be a positive number"),
        ((4, float("nan"), (1.0, 1.0), "unipc"), "sample_shift must be a positive number"),
        ((4, 5.0, (float("inf"), 1.0), "unipc"), "sample_guide_scale must be finite"),
        ((4, 5.0, (1.0, 1.0), "heun"), "sample_solver must be one of unipc, dpm"),
    ],
)
def test_sampling_that_exists_is_valid(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(*values)
