"""Drift is taken out along the motion; light, cuts and clean footage are left alone."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.quality_footage import Path, Scene, lab, pan, to_and_fro, to_frames, unit
from wan.detail import heard_by
from wan.errors import UserError
from wan.quality import correct_drift, correction, score_seam

pytestmark = pytest.mark.slow

OLD, NEW = 17, 25
RAMP = np.arange(NEW) / (NEW - 1)
GROWTH = {"step": np.r_[0, np.ones(NEW - 1)], "ramp": RAMP, "soon over": 1 - np.exp(-np.arange(NEW) / 5)}


@cache
def footage(seed: int) -> tuple[Tensor, Tensor]:
    """The end of a clip, and the next one whose first frame repeats its last."""
    paths: tuple[Path, Path] = [(pan(1.4, 0.4), pan(-0.8, 0.5)), (to_and_fro(30, 50), pan(0.8, 0.3))][seed % 2]
    frames = Scene(seed, *paths).clip(range(OLD + NEW - 1))
    return frames[:OLD], frames[OLD - 1 :]


def drifted(frames: Tensor, kind: str, amounts: np.ndarray[Any, Any]) -> Tensor:
    """A drift of about 5 % where the amount is 1."""
    pictures = []
    for rgb, amount in zip(unit(frames), amounts, strict=True):
        grey = (rgb @ [0.2126, 0.7152, 0.0722])[..., None]
        pictures.append(
            {
                "gain": rgb * (1 + 0.08 * amount),
                "darkening": rgb * (1 - 0.08 * amount),
                "gamma": rgb ** (1 - 0.12 * amount),
                "saturation": grey + (rgb - grey) * (1 + 0.2 * amount),
                "contrast": 0.45 + (rgb - 0.45) * (1 + 0.08 * amount),
                "warmth": rgb * (1 + amount * np.array([0.05, 0, -0.06])),
            }[kind]
        )
    return to_frames(pictures)


def error(frames: Tensor, truth: Tensor) -> float:
    """Mean Lab distance of the pixels."""
    return float(np.linalg.norm(lab(frames) - lab(truth), axis=-1).mean())


KINDS = ("gain", "darkening", "gamma", "saturation", "contrast", "warmth")


@pytest.mark.parametrize(
    ("kind", "growth"),
    [*((kind, "step") for kind in KINDS), *((kind, "ramp") for kind in KINDS), ("gamma", "soon over")],
)
def test_four_fifths_of_a_drift_go_and_the_seam_gets_no_step(kind: str, growth: str) -> None:
    before, clean = footage((len(kind) + len(growth)) % 4)
    clip = drifted(clean, kind, GROWTH[growth])
    corrected = correct_drift(clip, before, known=1)
    assert error(corrected[1:], clean[1:]) < 0.2 * error(clip[1:], clean[1:])
    drifting, seam = (score_seam(before[-6:], frames[1:8]).colour_step for frames in (clip, corrected))
    assert seam < max(0.15, 0.1 * drifting)
    assert torch.equal(corrected[0], clip[0])


def test_a_clip_without_drift_comes_back_bit_for_bit() -> None:
    for seed in (0, 1):
        before, clean = footage(seed)
        noise = 0.03 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        for clip in (clean, clean + noise):
            assert correct_drift(clip, before, known=1, strength=1) is clip


def test_strength_zero_does_nothing_and_less_strength_leaves_more_of_what_grows() -> None:
    before, clean = footage(0)
    clip = drifted(clean, "gain", RAMP)
    assert correct_drift(clip, before, known=1, strength=0) is clip
    left = [error(correct_drift(clip, before, known=1, strength=s), clean) for s in (0.3, 0.6, 1.0)]
    assert left[0] > left[1] > left[2]
    assert left[0] == pytest.approx(0.7 * error(clip, clean), rel=0.1)


def lit(frames: Tensor, dusk: np.ndarray[Any, Any]) -> Tensor:
    """The sun goes down: darker, and blue first."""
    light = 1 - np.asarray(dusk)[:, None, None, None] * [0.25, 0.35, 0.5]
    return to_frames(unit(frames) * light)


@pytest.mark.parametrize("depth", [0.15, 0.3, 0.6, 1.0])
def test_a_sunset_that_has_begun_before_the_seam_goes_on(depth: float) -> None:
    before, clean = footage(0)
    frames = lit(torch.cat([before, clean[1:]]), depth * np.linspace(0, 1, OLD + NEW - 1))
    clip = frames[OLD - 1 :]
    assert correct_drift(clip, frames[:OLD], known=1) is clip


@pytest.mark.parametrize(
    "dusk",
    [
        RAMP,
        0.4 * (RAMP > 0.6),
        np.where((RAMP > 0.4) & (RAMP < 0.5), -0.6, 0),
        np.where((RAMP > 0) & (RAMP < 0.1), -0.6, 0),
    ],
    ids=["night falls", "a lamp goes out", "lightning", "a flash at the start"],
)
def test_light_that_changes_more_or_faster_than_drift_is_left_alone(dusk: np.ndarray[Any, Any]) -> None:
    before, clean = footage(0)
    clip = lit(clean, dusk)
    assert correct_drift(clip, before, known=1) is clip


@pytest.mark.parametrize("first", [1, 12])
def test_a_cut_is_left_alone(first: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wan")
    before, clean = footage(0)
    clip = torch.cat([clean[:first], Scene(7, pan(1)).clip(range(NEW - first)) * 0.9])
    assert correct_drift(clip, before, known=1) is clip
    assert "no drift correction: the picture cannot be followed to frame " in caplog.text


def test_a_drift_is_found_behind_noise() -> None:
    before, clean = footage(0)
    noise = 0.03 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    clip = drifted(clean, "contrast", RAMP)
    corrected = correct_drift(clip + noise, before, known=1) - noise
    assert error(corrected, clean) < 0.3 * error(clip, clean)


def test_the_correction_is_bounded_and_clamps_only_what_it_moves() -> None:
    before, clean = footage(0)
    clip = clean + 0.5  # of a range of 2, and out of it in places
    corrected = correct_drift(clip, before, known=1, strength=1)
    moved = (clip - corrected)[1:]
    assert moved.square().mean().sqrt() / 2 == pytest.approx(correction.MOST, rel=0.1)
    assert corrected.max() <= clip.max() and corrected.min() >= min(-1.0, float(clip.min()))
    assert torch.equal(correct_drift(clean * 1.5, before * 1.5, known=1), clean * 1.5)


def test_several_known_frames_stay_and_the_drift_counts_from_the_last() -> None:
    before, clean = footage(0)
    clip = torch.cat([before[-4:], drifted(clean[1:], "gain", RAMP[1:])])
    told: list[str] = []
    with heard_by(told.append):
        corrected = correct_drift(clip, before, known=4)
    assert [told[0], told[-1]] == ["5 of 28 frames", "28 of 28 frames"]
    assert torch.equal(corrected[:4], clip[:4])
    assert error(corrected[4:], clean[1:]) < 0.2 * error(clip[4:], clean[1:])


def test_threads_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    # so fast that the first frame is soon out of sight, and then a cut
    frames = [*Scene(3, pan(24, 1), pan(1)).clip(range(6)), *Scene(7, pan(1)).clip(range(1))]

    def tracked(threads: int) -> list[Any]:
        monkeypatch.setattr("torch.get_num_threads", lambda: threads)
        return correction._track(frames[0], frames[1:])

    alone = tracked(1)
    assert len(alone) == 5 and np.array_equal(alone, tracked(4))
    direct, _ = correction._change(*map(correction._View.of, (frames[0], frames[5])))
    assert not np.array_equal(alone[-1], direct)  # another frame was measured against on the way


def test_a_gpu_takes_out_what_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before, clean = footage(0)
    clip = drifted(clean, "warmth", RAMP) * 1.3  # out of the range in places
    change = np.random.default_rng(0).normal(0, 0.05, 10)
    torch.testing.assert_close(
        correction._without_by_torch(clip[-1], change), correction._without(clip[-1], change), atol=1e-5, rtol=0
    )
    asked: list[torch.device] = []

    def on_gpu(frame: Tensor, change: Any) -> Tensor:
        asked.append(frame.device)
        return torch.zeros(frame.shape)

    monkeypatch.setattr(correction, "_without_by_torch", on_gpu)
    corrected = correct_drift(clip, before, known=1, device=torch.device("meta"))  # stands for a GPU
    assert asked == [torch.device("meta")] * (NEW - 1)
    assert torch.equal(corrected[:1], clip[:1]) and not corrected[1:].any()


@pytest.mark.gpu
def test_on_a_gpu_a_clip_is_corrected_as_on_the_cpu() -> None:
    before, clean = footage(0)
    clip = drifted(clean, "warmth", RAMP)
    here, on_gpu = (correct_drift(clip, before, known=1, device=torch.device(name)) for name in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, here, atol=1e-5, rtol=0)


def lab_drift(frames: Tensor, amounts: np.ndarray[Any, Any]) -> Tensor:
    """What a clip does to its first frame's tones: contrast +3 %, chroma +5 %, b +0.8 where the amount is 1."""
    values = lab(frames)
    amounts = amounts[:, None, None]
    values[..., 0] = 50 + (values[..., 0] - 50) * (1 + 0.03 * amounts)
    values[..., 1:] *= 1 + 0.05 * amounts[..., None]
    values[..., 2] += 0.8 * amounts
    return to_frames(cv2.cvtColor(picture, cv2.COLOR_LAB2RGB) for picture in values)


@pytest.mark.parametrize(
    ("camera", "growth"),
    [(to_and_fro(30, 64), "step"), (pan(1, 0.3), "ramp")],
    ids=["scene returns, drift in steps", "scene pans away, drift grows"],
)
def test_a_chain_of_twelve_clips_keeps_its_tones(camera: Path, growth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view, length, clips = Scene(3, camera, pan(0.6, 0.3), size=(160, 96)), 9, 12
    amounts = np.linspace(0, 1, length) if growth == "ramp" else np.r_[0, np.ones(length - 1)]
    taken_out: list[Any] = []
    without = correction._without

    def watched(frame: Tensor, change: Any) -> Tensor:
        taken_out.append(change)
        return without(frame, change)

    monkeypatch.setattr(correction, "_without", watched)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # so that the last one is that of the last frame
    tones: list[Any] = []  # what separates the shown frames from the truth at the end of each clip
    shown = view.clip(range(-16, 1))
    for index in range(clips):
        start = index * (length - 1)
        truth = view.clip(range(start, start + length))
        made = truth
        for change in tones:  # the model goes on from what it is shown, and drifts from there
            if change is None:
                made = lab_drift(made, np.ones(length))
            else:
                made = torch.stack([without(frame, change) for frame in made])
        made = lab_drift(made, amounts)
        taken_out.clear()
        corrected = correct_drift(made, shown, known=1)
        tones += [None, *taken_out[-1:]]
        assert score_seam(shown[-5:], corrected[1:6]).colour_step < 0.2
        shown = corrected
    alone = truth[-1:]
    for _ in range(clips):
        alone = lab_drift(alone, np.ones(1))

    def off(frames: Tensor) -> float:
        return float(np.linalg.norm((lab(frames) - lab(truth[-1:])).mean(axis=(1, 2))))

    assert off(alone) > 10
    assert off(shown[-1:]) < 0.2 * off(alone)


def test_arguments_out_of_range_are_refused_in_one_line() -> None:
    frames = torch.zeros(5, 64, 64, 3)
    with pytest.raises(UserError, match="drift_correction"):
        correct_drift(frames, frames, known=1, strength=1.5)
    with pytest.raises(UserError, match="known must be from 0 to 4"):
        correct_drift(frames, frames, known=5)
    with pytest.raises(UserError, match="64x64 and 32x64"):
        correct_drift(frames, frames[:, :, :32], known=1)


def test_frames_that_do_not_drift_with_the_others_are_not_believed() -> None:
    times = np.arange(25.0)
    share = (times + 1) / 25
    truth = share[:, None] * 0.2 * np.ones(10)
    changes = 0.3 + truth
    changes[8:11] += 1.0  # a flash
    drift = correction._Drift.fit(times, changes, np.zeros(10))
    assert np.abs(drift.growth(24.0) - truth[-1]).max() < 0.02


@pytest.mark.parametrize(("frames", "told"), [(6, False), (7, True)])
def test_a_flash_is_told_from_a_step_where_more_frames_are_without_it(frames: int, told: bool) -> None:
    changes = np.zeros((frames, 10))
    changes[:3] = 0.3
    step = correction._Drift.fit(np.arange(float(frames)), changes, np.zeros(10)).step
    assert np.array_equal(step, np.zeros(10) if told else changes[0])
