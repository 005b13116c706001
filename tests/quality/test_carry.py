"""Colours are led back to what they were, by no more than a drift."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.quality_footage import Scene, pan
from wan.quality.carry import MOST_GAIN, MOST_LEVELS, Grade, measure_colours

FRAMES = Scene(3, pan(1.0)).clip(range(5))


def graded(frames: Tensor, grade: Grade) -> Tensor:
    return torch.stack([grade(frame.permute(2, 0, 1)).permute(1, 2, 0) for frame in frames])


def drifted(frames: Tensor, *, contrast: float = 1.0, saturation: float = 1.0, levels: float = 0.0) -> Tensor:
    """The frames as a model would hand them on: all around the middle of the range, and away from its ends."""
    unit = (frames + 1) / 2 * 0.6 + 0.2
    luma = (unit @ torch.tensor([0.2126, 0.7152, 0.0722]))[..., None]
    unit = (luma - luma.mean()) * contrast + luma.mean() + (unit - luma) * saturation + levels / 255
    return unit * 2 - 1


def test_the_same_colours_are_left_alone() -> None:
    colours = measure_colours(FRAMES)
    grade = Grade.towards(colours, colours, 1.0)
    assert grade.is_nothing and torch.allclose(graded(FRAMES, grade), FRAMES, atol=1e-5)
    grey = measure_colours(torch.zeros(1, 8, 8, 3))
    assert Grade.towards(grey, grey, 1.0).is_nothing


@pytest.mark.parametrize(
    "drift", [{"contrast": 1.05}, {"saturation": 0.95}, {"levels": 4.0}, {"contrast": 0.96, "saturation": 1.05}]
)
def test_a_small_drift_is_undone(drift: dict[str, float]) -> None:
    true, now = drifted(FRAMES), drifted(FRAMES, **drift)
    grade = Grade.towards(measure_colours(true), measure_colours(now), 1.0)
    left = (graded(now, grade) - true).abs().mean()
    assert left < 0.05 * (now - true).abs().mean()
    half = graded(now, Grade.towards(measure_colours(true), measure_colours(now), 0.5))
    assert float((half - true).abs().mean()) == pytest.approx(float((now - true).abs().mean()) / 2, rel=0.1)


def test_another_scene_is_led_no_further_than_a_drift_goes() -> None:
    true, now = measure_colours(drifted(FRAMES)), measure_colours(drifted(FRAMES, levels=60, contrast=1.3))
    grade = Grade.towards(true, now, 1.0)
    assert float(grade.offset[0]) == pytest.approx(-MOST_LEVELS) and grade.contrast == pytest.approx(1 - MOST_GAIN)
