"""How drift is told from light and followed through a clip, with changes of tones that are written down here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

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


def numbers(changes: Sequence[np.ndarray]) -> list[float]:
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
