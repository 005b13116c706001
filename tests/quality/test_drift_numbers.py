"""How drift is told from light and followed through a clip, with changes of tones that are written down here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wan.errors import UserError
from wan.quality import correction
from wan.quality.correction import _Drift, _falling, _powers, _Tones, _track, _trend, _trust

ONES = _Tones(np.eye(10) / 10)  # of a change that is alike in all numbers the size is that number


def steady(size: float, trend: float = 0.0, erratic: float = 0.0) -> _Drift:
    """A growth over 24 frames that comes to `size` in the last, after a trend per frame, with so much beside it."""
    coefficients = np.zeros((3, 10))
    coefficients[0] = size
    return _Drift(np.arange(24.0), np.zeros(10), coefficients, np.full((4, 10), erratic), np.full(10, trend))


def test_between_two_bars_it_falls_straight_down() -> None:
    assert [_falling(value, 2, 4) for value in (-9, 2, 2.5, 3, 4, 9)] == [1, 1, 0.75, 0.5, 0, 0]


def test_growth_that_is_small_smooth_and_new_is_drift() -> None:
    small = correction.PLAUSIBLE / 2
    assert steady(small).growth_share(ONES) == 1
    assert steady(correction.PLAUSIBLE).largest(ONES) == pytest.approx(correction.PLAUSIBLE)
    middle = (correction.PLAUSIBLE + correction.IMPLAUSIBLE) / 2
    assert steady(middle).growth_share(ONES) == pytest.approx(0.5)  # half too large for drift
    for share, expected in ((1.0, correction.UNEXPECTED), (0.0, correction.EXPECTED)):
        # what was there before the seam would come to this part of it by itself
        assert steady(small, trend=expected * small / 24).growth_share(ONES) == pytest.approx(share)
    half = (correction.UNEXPECTED + correction.EXPECTED) / 2
    assert steady(small, trend=half * small / 24).growth_share(ONES) == pytest.approx(0.5)
    assert steady(small, trend=-small / 24).growth_share(ONES) == 1  # it turns back
    size = max(small, 0.01)
    half = (correction.SMOOTH + correction.ERRATIC) / 2
    assert steady(small, erratic=half * size).growth_share(ONES) == pytest.approx(0.5)
    assert steady(0.001, erratic=half * 0.01).growth_share(ONES) == pytest.approx(0.5)  # of a hundredth at least


def test_growth_begins_with_the_first_new_frame() -> None:
    drift = dataclasses.replace(steady(0.24), times=np.arange(9.0, 33.0))
    assert drift.growth(8)[0] == pytest.approx(0) and drift.growth(9)[0] == pytest.approx(0.01)
    assert drift.growth(32)[0] == pytest.approx(0.24)


def test_a_steady_growth_after_a_step_is_fitted_as_both() -> None:
    times = np.arange(5.0, 29.0)
    changes = np.full((24, 10), 0.03) + np.outer(np.arange(1, 25) * 0.002, np.ones(10))
    drift = _Drift.fit(times, changes, np.zeros(10))
    assert drift.step == pytest.approx(np.full(10, 0.03))
    assert drift.growth(28) == pytest.approx(np.full(10, 0.048), abs=1e-3)
    assert np.abs(drift.erratic).max() < 1e-3
    few = _Drift.fit(times[:6], changes[:6], np.zeros(10))
    assert few.step == pytest.approx(changes[0])  # too few frames to tell what has grown in the first


def test_measurements_far_from_the_others_are_not_trusted() -> None:
    weights = _trust(np.array([0.0, 1.0, 1.0, 1.0, 2.35, 4.7, 99.0]))
    assert weights[0] == pytest.approx(1) and weights[5:] == pytest.approx(0, abs=1e-6)
    assert weights[4] == pytest.approx((1 - 0.25) ** 2, abs=1e-4)


def follow(monkeypatch: pytest.MonkeyPatch, shares: Sequence[tuple[int, int, float]]) -> None:
    """Pictures are their numbers, a change is how far apart they are; pairs that can be followed less are named."""
    lost = {(first, second): share for first, second, share in shares}
    monkeypatch.setattr("wan.quality.correction._View.of", lambda picture: picture)
    monkeypatch.setattr(
        "wan.quality.correction._change",
        lambda first, second: (np.full(10, float(second - first)), lost.get((int(first), int(second)), 1.0)),
    )


def numbers(changes: Sequence[npt.NDArray[Any]]) -> list[float]:
    return [float(change[0]) for change in changes]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_picture_that_is_left_behind_is_followed_by_way_of_another(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pictures: list[torch.Tensor] = [torch.tensor(float(number)) for number in range(6)]

    def tracked(*shares: tuple[int, int, float]) -> list[float]:
        follow(monkeypatch, shares)
        return numbers(_track(pictures[0], pictures[1:]))

    all_of_them = [1, 2, 3, 4, 5]
    assert tracked() == all_of_them
    keep, lost = correction._KEEP, correction._LOST
    assert tracked((0, 3, keep - 0.01)) == all_of_them  # from 2 on
    assert tracked((0, 3, keep - 0.01), (2, 4, lost - 0.01)) == all_of_them  # and from 3
    assert tracked((0, 3, lost - 0.01), (2, 3, lost - 0.01)) == [1, 2]  # a cut
    assert tracked((0, 1, lost - 0.01)) == []
    assert tracked((0, 1, keep - 0.01)) == all_of_them  # there is nothing nearer


def test_the_trend_before_a_seam_is_a_change_per_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, [])
    frames = 0.5 * torch.arange(40.0)
    assert _trend(frames) == pytest.approx(np.full(10, 0.5)) and _trend(frames[: correction._TREND])[0] == 0.5
    assert not _trend(frames[: correction._TREND - 1]).any()
    last = len(frames) - 1
    monkeypatch.setattr("wan.quality.correction._track", lambda start, some: [np.ones(10)] * (len(some) - 1))
    assert not _trend(frames).any() and last == 39  # a cut


def test_a_change_of_tones_is_told_in_powers_of_the_colour() -> None:
    rng = np.random.default_rng(0)
    change, colours = rng.normal(0, 0.1, 10), rng.random((50, 3))
    linear, constant, curve = _powers(change)
    told = colours @ linear.T + constant + colours**2 * curve
    assert told == pytest.approx(correction._basis(colours) @ change)


def test_a_tone_change_moves_each_channel_by_ten_numbers() -> None:
    colour = np.array([[0.7, 0.4, 0.5]])
    basis = correction._basis(colour)
    assert basis.shape == (1, 3, 10)
    grey = 0.2126 * 0.7 + 0.7152 * 0.4 + 0.0722 * 0.5
    expected = np.zeros((3, 10))
    for channel, level in enumerate((0.2, -0.1, 0.0)):
        expected[channel, [channel, 3 + channel, 6 + channel]] = 1, level, level**2
        expected[channel, 9] = colour[0, channel] - grey
    assert basis[0] == pytest.approx(expected, abs=1e-6)


def test_the_size_of_a_tone_change_is_what_it_does_to_a_picture() -> None:
    tones = _Tones.of(torch.zeros(96, 128, 3))  # mid grey, on which only offsets show
    offset = np.r_[[0.1] * 3, [0.0] * 7]
    assert tones.size(offset) == pytest.approx(0.1, rel=1e-5)
    assert tones.size(np.r_[0.3, [0.0] * 9]) == pytest.approx(0.3 / np.sqrt(3), rel=1e-5)  # of one channel
    assert tones.size(np.zeros(10)) == pytest.approx(1e-9) and tones.size(np.r_[[0.0] * 3, [9.0] * 7]) < 1e-4
    bright = _Tones.of(torch.full((96, 128, 3), 0.5))
    assert bright.size(np.r_[[0.0] * 3, [0.2] * 3, [0.0] * 4]) == pytest.approx(0.05, rel=1e-5)  # a gain from 0.5 on
    assert bright.product(offset, np.r_[[0.2] * 3, [0.0] * 7]) == pytest.approx(0.02, rel=1e-5)


def textured(seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.uniform(0.25, 0.75, (12, 16, 3)), np.ones((8, 8, 1)))
    return torch.from_numpy(blocks.astype(np.float32)) * 2 - 1


def test_a_tone_change_between_two_pictures_is_measured() -> None:
    first = textured()
    change = np.array([0.02, -0.01, 0.0, 0.05, 0.0, -0.04, 0.0, 0.03, 0.0, 0.06])
    rgb = (first.numpy() + 1) / 2
    second = rgb + (correction._basis(rgb.reshape(-1, 3)) @ change).reshape(rgb.shape)
    views = [correction._View.of(one) for one in (first, torch.from_numpy(second * 2 - 1))]
    measured, share = correction._change(*views)
    assert share > 0.9
    # it is told at the mean of both, so that it is a little different
    assert _Tones.of(first).size(measured - change) < 0.1 * _Tones.of(first).size(change)
    back, _ = correction._change(*reversed(views))
    assert _Tones.of(first).size(measured + back) < 0.05 * _Tones.of(first).size(change)
    same, share = correction._change(views[0], views[0])
    assert np.abs(same).max() < 1e-6 and share > 0.9


def test_what_is_black_or_white_tells_nothing_of_tones() -> None:
    for level in (-1.0, -0.985, 0.985, 1.0):
        dark = correction._View.of(torch.full((96, 128, 3), level))
        change, share = correction._change(dark, dark)
        assert not change.any() and share == 0
    grey = correction._View.of(torch.full((96, 128, 3), 0.97))
    assert correction._change(grey, grey)[1] == 1
    partly = textured()
    partly[:, :96] = -1.0  # what is left is enough
    view = correction._View.of(partly)
    assert correction._change(view, view)[1] > 0.5
    partly[:, :120] = -1.0  # what is left is not
    view = correction._View.of(partly)
    assert correction._change(view, view)[1] == 0


def test_a_picture_of_something_else_is_not_followed() -> None:
    one, other = correction._View.of(textured(0)), correction._View.of(textured(1))
    assert correction._change(one, other)[1] < correction._KEEP


def corrected(
    monkeypatch: pytest.MonkeyPatch,
    change: npt.NDArray[Any],
    growth: float = 0.0,
    *,
    known: int = 2,
    strength: float = 0.9,
    trend: float = 0.0,
    level: float = 0.0,
) -> torch.Tensor:
    """How far a clip of 30 frames is moved, whose tones are found to change by that and by growing offsets."""
    asked: list[list[int]] = []
    count = 30 - known

    def track(start: torch.Tensor, frames: Sequence[torch.Tensor]) -> list[npt.NDArray[Any]]:
        asked.append([round(float(frame[0, 0, 0]) * 1e4) for frame in frames])
        offsets = np.r_[[1.0] * 3, [0.0] * 7]
        return [change + growth * (time - known + 1) / count * offsets for time in asked[-1]]

    monkeypatch.setattr(correction, "_track", track)
    monkeypatch.setattr(correction, "_trend", lambda condition: np.r_[[trend] * 3, [0.0] * 7])
    frames = torch.full((30, 64, 64, 3), level) + (torch.arange(30) / 1e4)[:, None, None, None]
    frames[:, 0, 0, 0] = torch.arange(30) / 1e4
    made = correction.correct_drift(frames, frames[-1:], known=known, strength=strength)
    assert asked[0][0] == known and asked[0][-1] == 29 and len(asked[0]) == min(count, 21)
    return (frames - made)[:, 8, 8]


OFFSETS = np.r_[[1.0] * 3, [0.0] * 7]


def test_a_step_is_taken_out_whole_from_the_first_new_frame_on(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = corrected(monkeypatch, 0.02 * OFFSETS)
    assert not moved[:2].any()
    assert moved[2:].numpy() == pytest.approx(np.full((28, 3), 0.04), abs=1e-5)  # of a range of 2
    moved = corrected(monkeypatch, 0.02 * OFFSETS, known=0)
    assert moved.numpy() == pytest.approx(np.full((30, 3), 0.04), abs=1e-5)
    moved = corrected(monkeypatch, np.r_[0.02, -0.02, [0.0] * 8])
    assert moved[2:].numpy() == pytest.approx(np.tile([0.04, -0.04, 0], (28, 1)), abs=1e-5)


@pytest.mark.parametrize("strength", [0.9, 0.5, 1.0])
def test_what_grows_is_taken_out_by_its_strength(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = corrected(monkeypatch, 0.01 * OFFSETS, 0.03, strength=strength)[2:, 0]
    wanted = 2 * (0.01 + strength * 0.03 * np.arange(1, 29) / 28)
    assert moved.numpy() == pytest.approx(wanted, abs=1e-3)


def test_more_than_a_tenth_of_the_range_is_never_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert corrected(monkeypatch, 0.099 * OFFSETS)[2:].numpy() == pytest.approx(np.full((28, 3), 0.198), abs=1e-4)
    assert corrected(monkeypatch, 0.3 * OFFSETS)[2:].numpy() == pytest.approx(np.full((28, 3), 0.2), abs=1e-4)


@pytest.mark.parametrize(
    ("step", "growth", "trend", "is_left"),
    [
        (0.0029, 0.0, 0.0, True),  # too small to be seen
        (0.0031, 0.0, 0.0, False),
        (0.0, 0.0032, 0.0, True),  # times 0.9
        (0.0, 0.0036, 0.0, False),
        (0.0, 0.05, 0.05 / 28 * 0.3, False),
        (0.0, 0.05, 0.05 / 28 * 0.75, True),  # the light was going there
        (0.0, 0.11, 0.0, True),  # a change of light
    ],
)
def test_what_is_small_or_looks_like_light_is_left(
    step: float, growth: float, trend: float, is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = corrected(monkeypatch, step * OFFSETS, growth, trend=trend)
    assert bool(moved.any()) is not is_left


def test_known_frames_are_among_those_of_the_clip() -> None:
    frames = torch.zeros(5, 64, 64, 3)
    for clip, condition in ((frames[0], frames), (frames, frames[0]), (frames, frames[:, :32])):
        with pytest.raises(UserError, match="must be float frames|must have one size, not 64x64 and 64x32"):
            correction.correct_drift(clip, condition, known=1)
    for known in (-1, 5, 6):
        with pytest.raises(UserError, match=f"known must be from 0 to 4 with 5 frames; {known} is not"):
            correction.correct_drift(frames, frames, known=known)
    for strength in (-0.1, 1.1):
        with pytest.raises(UserError, match="drift_correction"):
            correction.correct_drift(frames, frames, known=1, strength=strength)


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_change_is_taken_out_at_the_mean_of_before_and_after(by_torch: bool) -> None:
    without = correction._without_by_torch if by_torch else correction._without
    rng = np.random.default_rng(0)
    rgb, change = rng.uniform(0.3, 0.7, (64, 3)), rng.normal(0, 0.03, 10)

    def added(colours: npt.NDArray[Any]) -> npt.NDArray[Any]:
        moved: npt.NDArray[Any] = correction._basis(colours) @ change
        return moved

    frame = torch.from_numpy((rgb * 2 - 1).reshape(8, 8, 3).astype(np.float32))
    seen = (without(frame, change).numpy().reshape(-1, 3) + 1) / 2
    assert seen == pytest.approx(rgb - added(rgb - added(rgb) / 2), abs=1e-5)


@pytest.mark.parametrize("by_torch", [False, True])
def test_only_what_a_change_pushes_out_of_the_range_is_clamped(by_torch: bool) -> None:
    without = correction._without_by_torch if by_torch else correction._without
    levels = torch.tensor([-1.3, -1.0, -0.95, 0.0, 0.95, 1.0, 1.3])[:, None, None].expand(-1, 1, 3)
    brighter, darker = (without(levels, sign * 0.1 * OFFSETS)[:, 0, 0].tolist() for sign in (-1, 1))
    assert brighter == pytest.approx([-1.1, -0.8, -0.75, 0.2, 1, 1, 1.3], abs=1e-6)
    assert darker == pytest.approx([-1.3, -1, -1, -0.2, 0.75, 0.8, 1.1], abs=1e-6)
    assert without(levels.half(), 0.1 * OFFSETS).dtype == torch.float16


def test_a_flash_at_the_start_leaves_no_step_and_counts_for_nothing() -> None:
    times = np.arange(12.0)
    changes = np.full((12, 10), 0.0)
    changes[:3] = 0.05
    drift = _Drift.fit(times, changes, np.zeros(10))
    assert not drift.step.any() and np.abs(drift.growth(11)).max() < 1e-3
    changes[:3] = 0.003  # a hundredth over all ten numbers, too faint for one
    assert _Drift.fit(times, changes, np.zeros(10)).step == pytest.approx(np.full(10, 0.003))
    changes[:] = 0.03  # half of it stays: a step
    changes[:3] = 0.05
    assert _Drift.fit(times, changes, np.zeros(10)).step == pytest.approx(np.full(10, 0.05))


def test_growth_may_be_steady_speed_up_or_be_soon_over() -> None:
    curves = _Drift._curves(np.array([2.0, 11.0]), np.array([1.0, 2.0, 6.0, 11.0]))
    share = np.array([0, 0.1, 0.5, 1])
    assert curves == pytest.approx(np.stack([share, share**2, 1 - np.exp(-8 * share)], 1))
