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


def test_colours_are_means_and_deviations_in_shares_of_the_range() -> None:
    # half red, half black: luma 0.2126 or 0
    frames = torch.full((2, 4, 8, 3), -1.0)
    frames[:, :, :4, 0] = 1
    expected = [0.1063, -0.1063, 0.3937, 0.1063, ((0.1063**2 + 0.3937**2) / 2) ** 0.5]
    assert measure_colours(frames).tolist() == pytest.approx(expected, abs=1e-6)
    assert measure_colours(torch.full((1, 2, 2, 3), 0.5)).tolist() == pytest.approx([0.75, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("wanted", "now", "gain"),
    [(0.21, 0.2, 1.05), (0.19, 0.2, 0.95), (0.3, 0.2, 1.06), (0.1, 0.2, 0.94), (0.0009, 0.2, 1), (0.2, 0.0009, 1)],
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_contrast_and_saturation_grow_by_what_is_between_but_not_from_grey(
    wanted: float, now: float, gain: float, strength: float
) -> None:
    one, other = torch.tensor([0.5, 0, 0, wanted, 0.3]), torch.tensor([0.5, 0, 0, now, 0.3])
    grade = Grade.towards(one, other, strength)
    assert (grade.middle, grade.saturation) == (0.5, 1) and not grade.offset.any()
    assert grade.contrast == pytest.approx(1 + (gain - 1) * strength)
    one, other = one[[0, 1, 2, 4, 3]], other[[0, 1, 2, 4, 3]]
    grade = Grade.towards(one, other, strength)
    assert grade.contrast == 1 and grade.saturation == pytest.approx(1 + (gain - 1) * strength)
    assert grade.is_nothing is (gain == 1)


def test_what_saturation_moves_is_not_moved_twice() -> None:
    now, wanted = torch.tensor([0.5, 0.1, -0.2, 0.2, 0.2]), torch.tensor([0.51, 0.1, -0.2, 0.2, 0.21])
    grade = Grade.towards(wanted, now, 1.0)
    assert grade.offset.tolist() == pytest.approx([0.01, -0.005, 0.01])
    assert Grade.towards(wanted, now, 0.5).offset.tolist() == pytest.approx([0.005, -0.0025, 0.005])
    far = Grade.towards(torch.tensor([0.9, -0.9, 0, 0.2, 0.2]), torch.tensor([0.5, 0, 0, 0.2, 0.2]), 0.5)
    assert far.offset.tolist() == pytest.approx([3 / 255, -3 / 255, 0])


def test_a_grade_is_nothing_only_where_it_changes_nothing() -> None:
    none = torch.zeros(3)
    assert Grade(0.5, none, 1.0, 1.0).is_nothing
    for grade in (Grade(0.5, none, 1.01, 1.0), Grade(0.5, none, 1.0, 1.01), Grade(0.5, none, 1.01, 1.01)):
        assert not grade.is_nothing
    assert not Grade(0.5, torch.tensor([0.0, 0.01, 0.0]), 1.0, 1.0).is_nothing


def test_a_grade_turns_contrast_around_its_middle_and_clamps() -> None:
    def seen(grade: Grade, *rgb: float) -> list[float]:
        frame = torch.tensor(rgb)[:, None, None].expand(3, 2, 2) * 2 - 1
        return [float(value) for value in (grade(frame)[:, 0, 0] + 1) / 2]

    none = torch.zeros(3)
    assert seen(Grade(0.4, none, 1.5, 1.0), 0.6, 0.6, 0.6) == pytest.approx([0.7] * 3, abs=1e-6)
    assert seen(Grade(0.4, none, 1.5, 1.0), 0.4, 0.4, 0.4) == pytest.approx([0.4] * 3, abs=1e-6)
    luma = 0.2126 * 0.6 + 0.7152 * 0.4 + 0.0722 * 0.5
    wanted = [luma + 1.2 * (value - luma) for value in (0.6, 0.4, 0.5)]
    assert seen(Grade(0.4, none, 1.0, 1.2), 0.6, 0.4, 0.5) == pytest.approx(wanted, abs=1e-6)
    assert seen(Grade(0.4, torch.tensor([0.1, 0, 0]), 1.0, 1.0), 0.6, 0.95, 0.0) == pytest.approx(
        [0.7, 1, 0.1], abs=1e-6
    )
    assert seen(Grade(0.4, torch.tensor([-0.1, 0, 0]), 1.0, 1.0), 0.6, 0.5, 0.0) == pytest.approx(
        [0.5, 0.4, 0], abs=1e-6
    )
    blue = seen(Grade(0.4, torch.tensor([0, 0.1, 0]), 1.0, 1.0), 0.5, 0.5, 0.5)
    assert blue == pytest.approx([0.5, 0.5 - 0.0722 * 0.1 / 0.7152, 0.6], abs=1e-6)  # of the same luma
