"""Seam scores tell planted defects from clean footage, and the look of a clip follows what was done to it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.support.quality_footage import Scene, pan, still, to_and_fro, to_frames, unit
from wan.errors import UserError
from wan.quality import LookPart, SeamScore, measure_look, score_seam
from wan.quality.metrics import _high_frequency, _noise
from wan.quality.vision import follow

pytestmark = pytest.mark.slow

OLD, NEW = 9, 12  # frames before and after the seam
AFTER = range(OLD, OLD + NEW)
SCENES = {
    "pan": lambda seed: Scene(seed, pan(1.4, 0.4)),
    "pan and shapes": lambda seed: Scene(seed, pan(0.9), pan(-0.9, 0.6)),
    "shapes before a still camera": lambda seed: Scene(seed, still, pan(1.5, -0.6)),
}
CASES = [(name, seed) for seed, name in enumerate(SCENES)]


@cache
def scene(name: str, seed: int) -> Scene:
    return SCENES[name](seed)


@cache
def before(name: str, seed: int) -> Tensor:
    return scene(name, seed).clip(range(OLD))


@cache
def clean(name: str, seed: int) -> SeamScore:
    return score_seam(before(name, seed), scene(name, seed).clip(AFTER))


def colour_step(view: Scene) -> Tensor:
    return view.clip(AFTER) + torch.tensor([0.05, 0.02, -0.03])


def flash(view: Scene) -> Tensor:
    after = view.clip(AFTER)
    after[2:4] += 0.12
    return after


DEFECTS: dict[str, Callable[[Scene], Tensor]] = {
    "jump": lambda view: view.clip(time + 8 for time in AFTER),
    "duplicate": lambda view: view.clip(time - 1 for time in AFTER),
    "freeze": lambda view: view.clip([OLD - 1] * NEW),
    "slow start": lambda view: view.clip(OLD - 1 + np.cumsum(np.minimum(1, np.arange(1, NEW + 1) / 8))),
    "reversed motion": lambda view: view.clip(2 * OLD - 2 - time for time in AFTER),
    "colour step": colour_step,
    "flash": flash,
}


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_clean_footage_scores_low_and_warns_of_nothing(name: str, seed: int) -> None:
    score = clean(name, seed)
    assert score.warnings == ()
    assert score.score < 0.6
    assert 0.7 < score.jump_ratio < 1.4
    assert score.colour_step < 0.2


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_planted_defect_ranks_worse_than_clean_footage_and_is_named(name: str, seed: int, defect: str) -> None:
    score = score_seam(before(name, seed), DEFECTS[defect](scene(name, seed)))
    assert defect in score.warnings
    assert score.score > clean(name, seed).score + 0.8


def test_a_turn_by_a_right_angle_is_a_turn_and_nothing_else() -> None:
    last = OLD - 1
    frames = Scene(0, lambda time: (1.4 * min(time, last), 1.4 * max(time - last, 0))).clip(range(OLD + NEW))
    assert score_seam(frames[:OLD], frames[OLD:]).warnings == ("turn",)
    assert "turn" not in score_seam(frames[:OLD], frames[last:OLD].expand(NEW, -1, -1, -1)).warnings


def test_motion_that_dies_later_is_a_freeze_too() -> None:
    view = scene("pan", 0)
    score = score_seam(before("pan", 0), view.clip(min(time, OLD + 5) for time in AFTER))
    assert "freeze" in score.warnings
    assert score.score > 2


def test_light_that_changes_steadily_and_noise_are_no_defects() -> None:
    frames = scene("pan", 0).clip(range(OLD + NEW))
    dusk = frames - torch.linspace(0, 0.3, OLD + NEW)[:, None, None, None]
    noisy = frames + 0.03 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    for footage in (dusk, noisy):
        assert score_seam(footage[:OLD], footage[OLD:]).warnings == ()


def test_a_picture_that_always_stood_still_is_no_freeze() -> None:
    frames = Scene(0).clip([0] * (OLD + NEW))
    score = score_seam(frames[:OLD], frames[OLD:])
    assert (score.warnings, score.speed_ratio, score.score) == ((), None, 0)


def test_footage_drawn_on_twos_has_no_duplicates_of_its_own() -> None:
    repeated = 0
    for phase in (0, 1):
        frames = scene("pan", 0).clip((time + phase) // 2 * 2 for time in range(OLD + NEW))
        for seam in range(OLD - 2, OLD + 2):  # with an even or an odd number of repeated frames before
            repeated += torch.equal(frames[seam - 1], frames[seam])
            assert "duplicate" not in score_seam(frames[:seam], frames[seam:]).warnings
    assert repeated == 4  # so that half of the seams do repeat a frame


def test_few_frames_answer_fewer_questions() -> None:
    frames = scene("pan", 0).clip(range(10))
    lone = score_seam(frames[:1], frames[1:2])
    assert (lone.speed_ratio, lone.velocity_change, lone.fidelity_db, lone.score) == (None, None, None, 0)
    assert score_seam(frames[:1], frames[1:]).warnings == ()


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (96, 256)])
def test_any_size_can_be_scored(size: tuple[int, int]) -> None:
    frames = Scene(0, pan(1), size=size).clip(range(12))
    assert score_seam(frames[:6], frames[6:]).warnings == ()


def test_fidelity_is_the_psnr_of_the_known_frames() -> None:
    frames = scene("pan", 0).clip(range(6))
    known = frames[1:3]
    exact = score_seam(frames[:3], frames[3:], known=known, rendered=known)
    off = score_seam(frames[:3], frames[3:], known=known, rendered=known + 0.2)
    assert exact.fidelity_db == 100
    assert off.fidelity_db == pytest.approx(20, abs=0.01)
    assert "start differs" in off.warnings


def test_scores_and_looks_are_json() -> None:
    frames = scene("pan", 0).clip(range(6))
    for values in (score_seam(frames[:3], frames[3:]).as_json(), measure_look(frames).as_json()):
        assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_the_look_follows_what_was_done_to_a_clip() -> None:
    frames = scene("pan", 0).clip(range(8))
    plain = measure_look(frames).whole

    def changed(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> LookPart:
        return measure_look(to_frames(change(picture) for picture in unit(frames))).whole

    noise = np.random.default_rng(0).normal(0, 5 / 255, frames.shape[1:])
    blurred = changed(lambda picture: cv2.GaussianBlur(picture, (0, 0), 1.5))
    grey = changed(lambda picture: picture.mean(axis=-1, keepdims=True).repeat(3, axis=-1))
    noisy = changed(lambda picture: picture + noise)
    bright = changed(lambda picture: picture * 3)
    assert blurred.sharpness < 0.5 * plain.sharpness
    assert blurred.tenengrad < plain.tenengrad
    assert blurred.high_frequency < plain.high_frequency
    assert grey.chroma < 0.5 and grey.saturation < 0.01 and grey.colourfulness < 1
    # Luma is a weighted mean of three independent channels.
    assert noisy.noise == pytest.approx(math.hypot(plain.noise, 5 * math.hypot(0.2126, 0.7152, 0.0722)), rel=0.15)
    assert bright.clipped > plain.clipped
    assert bright.lightness > plain.lightness


def test_drift_inside_a_clip_shows_between_its_quarters() -> None:
    frames = Scene(0).clip([0] * 12)
    look = measure_look(frames * torch.linspace(1, 1.3, 12)[:, None, None, None])
    assert look.last.contrast > 1.15 * look.first.contrast
    assert look.first.contrast < look.whole.contrast < look.last.contrast


def test_standing_still_shows_next_to_the_look() -> None:
    moving, frozen = (measure_look(Scene(0, path).clip(range(5))) for path in (to_and_fro(20, 20), still))
    assert moving.moving is not None and moving.speed is not None
    assert moving.moving > 0.9 and moving.speed > 3
    assert frozen.moving == frozen.speed == 0
    assert measure_look(Scene(0).clip([0])).moving is None


def test_frames_that_cannot_be_measured_are_refused_in_one_line() -> None:
    frames = torch.zeros(3, 64, 64, 3)
    for wrong in (frames[0], frames[:0], frames.permute(0, 3, 1, 2), frames.to(torch.uint8)):
        with pytest.raises(UserError, match="frames"):
            measure_look(wrong)
    with pytest.raises(UserError, match="64x64 and 32x64"):
        score_seam(frames, frames[:, :, :32])


def test_without_opencv_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        measure_look(torch.zeros(2, 64, 64, 3))


def test_a_picture_that_is_pulled_back_is_inside_up_to_its_edges() -> None:
    picture, field = np.random.default_rng(0).random((6, 8, 3), np.float32), np.zeros((6, 8, 2), np.float32)
    pulled, inside = follow(picture, field)
    assert inside.all() and np.allclose(pulled, picture, atol=1e-6)
    field[:] = 0.5, -0.5
    inside = follow(picture, field)[1]
    assert inside[1:, :-1].all() and not inside[0].any() and not inside[:, -1].any()


def test_the_last_line_of_an_odd_picture_is_not_needed_for_its_noise() -> None:
    grey = np.random.default_rng(0).normal(0, 0.1, (65, 97))
    assert _noise(grey) == _noise(grey[:64, :96]) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("width", [32, 33])
def test_fine_detail_is_a_share_of_the_whole_spectrum(width: int) -> None:
    grey = np.random.default_rng(0).random((24, width))
    windowed = (grey - grey.mean()) * np.hanning(24)[:, None] * np.hanning(width)[None]
    power = np.abs(np.fft.fft2(windowed)) ** 2
    far = np.hypot(np.fft.fftfreq(24)[:, None], np.fft.fftfreq(width)[None]) > 0.25
    assert _high_frequency(grey) == pytest.approx(power[far].sum() / power.sum(), rel=1e-9)
