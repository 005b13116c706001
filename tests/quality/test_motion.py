"""Motion facts say what was filmed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tests.support.quality_footage import Path, Scene, pan, still, to_and_fro, to_frames
from wan.errors import UserError
from wan.quality import Motion, measure_motion
from wan.quality.motion import _STILL
from wan.quality.vision import spread


def motion(camera: Path = still, shapes: Path | None = None) -> Motion:
    return measure_motion(Scene(0, camera, shapes, (256, 144)).clip(range(9)), 16)


@pytest.mark.parametrize(
    ("velocity", "words"),
    [((2, 0), "right"), ((-2, 0), "left"), ((0, 2), "down"), ((0, -2), "up"), ((2, -2), "up to the right")],
)
def test_a_subject_is_seen_to_go_its_way(velocity: tuple[float, float], words: str) -> None:
    measured = motion(shapes=pan(*velocity))
    assert (measured.pan, measured.zoom, measured.still) == ((0.0, 0.0), 0.0, False)
    assert measured.sentence().startswith(f"the main motion goes {words} at")
    assert measured.speed == pytest.approx((velocity[0] ** 2 + velocity[1] ** 2) ** 0.5 * 16 / 256, rel=0.3)
    assert measured.sentence().endswith("the camera is still")


def test_a_pan_is_the_cameras_and_no_subjects() -> None:
    measured = motion(pan(1.6))
    assert measured.pan == pytest.approx((0.1, 0), abs=0.01)
    assert measured.moving == 0
    assert measured.sentence() == (
        "nothing moves by itself; the camera moves right at about 10 % of the width per second"
    )


def test_a_subject_that_the_camera_follows_moves_against_the_background() -> None:
    measured = motion(pan(2), pan(2))
    assert "goes right" in measured.sentence() and "camera moves right" in measured.sentence()


@pytest.mark.parametrize(("factor", "words"), [(1.01, "comes nearer"), (0.99, "draws back")])
def test_a_zoom_is_told_from_a_pan(factor: float, words: str) -> None:
    view = Scene(0)
    measured = measure_motion(to_frames(view.at(0, factor**time) for time in range(9)), 16)
    assert measured.zoom == pytest.approx((factor - 1) * 16, rel=0.2)
    assert measured.pan == (0, 0)
    assert words in measured.sentence()


def test_motion_to_and_fro_has_no_direction() -> None:
    measured = motion(shapes=to_and_fro(4, 8))
    assert measured.speed == 0 and measured.moving > 0
    assert measured.sentence() == "what moves goes in different directions; the camera is still"


def test_nothing_moves_in_a_still_or_in_a_single_frame() -> None:
    for frames in (Scene(0).clip([0] * 5), Scene(0).clip([0]), torch.zeros(4, 64, 64, 3)):
        measured = measure_motion(frames, 16)
        assert measured.still
        assert measured.sentence() == "almost nothing moves; the camera is still"
        assert json.dumps(dataclasses.asdict(measured), allow_nan=False)


def test_a_rate_must_be_above_zero() -> None:
    with pytest.raises(UserError, match="fps"):
        measure_motion(torch.zeros(4, 64, 64, 3), 0)


def test_a_camera_is_followed_past_frames_in_which_nothing_can_be() -> None:
    clip = Scene(0, pan(2), None, (256, 144)).clip(range(4))
    faded = torch.cat([torch.zeros(6, *clip.shape[1:]), clip])
    assert measure_motion(faded, 16).pan == pytest.approx(measure_motion(clip, 16).pan, rel=0.2)


def test_frames_are_spread_over_a_clip_with_its_ends() -> None:
    assert list(spread(1, 1)) == [0] and list(spread(4, 4)) == [0, 1, 2, 3]
    assert list(spread(9, 3)) == [0, 4, 8]


def test_what_moves_less_than_can_be_seen_is_still() -> None:
    at_rest = dataclasses.replace(motion(), pixels=_STILL)
    assert not at_rest.still and dataclasses.replace(at_rest, pixels=0.99 * _STILL).still
