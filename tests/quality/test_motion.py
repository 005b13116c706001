"""Motion facts say what was filmed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.quality_footage import Path, Scene, pan, still, to_and_fro, to_frames
from wan.errors import UserError
from wan.quality import Motion, measure_motion
from wan.quality.motion import _STILL, _compass, _FrameMotion, _step, _unit
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


def told(monkeypatch: pytest.MonkeyPatch, *steps: _FrameMotion, fps: float = 10.0) -> Motion:
    """The motion of a clip 416 wide with these steps from frame to frame."""
    coming = iter(steps)
    monkeypatch.setattr("wan.quality.motion._step", lambda first, second: next(coming))
    monkeypatch.setattr("wan.quality.motion.MeasuredFrame.of", lambda frame: frame)
    return measure_motion(torch.zeros(len(steps) + 1, 208, 416, 3), fps)


def frame(
    camera: tuple[float, float] = (0, 0),
    growth: float = 0.0,
    moving: float = 0.0,
    vectors: Sequence[tuple[float, float]] = (),
    pixels: float = 2.0,
    followed: bool = True,
) -> _FrameMotion:
    return _FrameMotion(
        followed, np.array(camera, float), growth, moving, np.array(vectors, float).reshape(-1, 2), pixels
    )


def test_the_camera_goes_against_the_background_from_a_third_of_a_pixel_on(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [frame((at, 0)) for at in (-9.0, 4.16, 99.0)]  # the middle one counts
    assert told(monkeypatch, *steps).pan == pytest.approx((-0.1, 0))
    assert told(monkeypatch, frame((0, 0.31))).pan == pytest.approx((0, -0.31 * 10 / 416))
    assert told(monkeypatch, frame((0, 0.29))).pan == (0, 0)
    assert told(monkeypatch, frame((0, 2.08)), fps=20).pan == pytest.approx((0, -0.1))


def test_a_picture_grows_from_a_third_of_a_pixel_at_its_edge_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for growth, zoom in ((0.00145, 0.0145), (-0.00145, -0.0145), (0.00143, 0), (-0.00143, 0)):
        assert told(monkeypatch, frame(growth=growth)).zoom == pytest.approx(zoom)


def test_what_moves_is_a_hundredth_of_the_picture_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    motion = told(monkeypatch, frame(moving=0.02, vectors=[(4.16, 0)]), frame())
    assert motion.direction == (1, 0) and (motion.speed, motion.moving) == pytest.approx((0.1, 0.01))
    motion = told(monkeypatch, frame(moving=0.0199, vectors=[(4.16, 0)]), frame())
    assert (motion.direction, motion.speed, motion.moving) == ((0, 0), 0, 0)


def test_faster_parts_count_for_more_and_parts_that_part_have_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    # weighted by their lengths 3 and 1: (9 - 1) / 4 of a mean length of 10 / 4
    motion = told(monkeypatch, frame(moving=0.5, vectors=[(0, 3), (0, -1)]))
    assert motion.direction == (0, 1) and motion.speed == pytest.approx(2 * 10 / 416)
    # (4 - 2.25) / 3.5 = 0.5 of 6.25 / 3.5 = 1.79, less than 0.4 of it
    motion = told(monkeypatch, frame(moving=0.5, vectors=[(2, 0), (-1.5, 0)]))
    assert (motion.direction, motion.speed, motion.moving) == ((0, 0), 0, 0.5)


def test_steps_that_cannot_be_followed_count_for_how_much_changes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = frame((99, 99), 1.0, 1.0, pixels=8.0, followed=False)
    motion = told(monkeypatch, lost, frame((4.16, 0), pixels=4.0))
    assert motion.pixels == 6 and motion.pan == pytest.approx((-0.1, 0)) and motion.moving == 0
    motion = told(monkeypatch, lost, lost)
    assert motion == Motion((0.0, 0.0), 0.0, 0.0, (0.0, 0.0), 0.0, 8.0)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({}, "nothing moves by itself; the camera is still"),
        ({"moving": 0.3}, "what moves goes in different directions; the camera is still"),
        (
            {"moving": 0.3, "speed": 0.126, "direction": (-1, 1)},
            "the main motion goes down to the left at about 13 % of the width per second, in about 30 % of the "
            "picture; the camera is still",
        ),
        (
            {"moving": 0.049, "speed": 0.001, "direction": (0, -1)},
            "the main motion goes up at about 1 % of the width per second, in a small part of the picture; the camera "
            "is still",
        ),
        (
            {"moving": 0.05, "speed": 0.5, "direction": (1, 0)},
            "the main motion goes right at about 50 % of the width per second, in about 5 % of the picture; the camera "
            "is still",
        ),
        (
            {"pan": (0.03, -0.04), "zoom": -0.1},
            "nothing moves by itself; the camera moves up to the right at about 5 % of the width per second and draws "
            "back",
        ),
        ({"zoom": 0.1}, "nothing moves by itself; the camera comes nearer"),
    ],
)
def test_facts_are_told_in_one_sentence(facts: dict[str, Any], sentence: str) -> None:
    still = Motion((0.0, 0.0), 0.0, 0.0, (0.0, 0.0), 0.0, 5.0)
    assert dataclasses.replace(still, **facts).sentence() == sentence


def stepped(
    monkeypatch: pytest.MonkeyPatch, flow: npt.NDArray[Any], textured: npt.NDArray[Any] | None = None, scale: float = 2
) -> _FrameMotion:
    """What is read from this flow [h, w, 2] over a picture with texture, everywhere or in these places."""
    grey = np.random.default_rng(0).integers(0, 256, flow.shape[:2]).astype(np.uint8)
    if textured is not None:
        grey[~textured] = 100
    assert scale == 416 / max(flow.shape[:2])
    monkeypatch.setattr("wan.quality.motion.flow", lambda first, second: flow.astype(np.float32))
    picture: Any = SimpleNamespace(grey=grey)
    return _step(picture, picture)


def moving_by(x: float, y: float) -> npt.NDArray[Any]:
    flow = np.zeros((104, 208, 2))
    flow[...] = x, y
    return flow


def test_the_background_s_motion_is_the_camera_s(monkeypatch: pytest.MonkeyPatch) -> None:
    one = stepped(monkeypatch, moving_by(1.5, -2))
    assert one.followed and one.camera == pytest.approx([3, -4], abs=1e-3) and one.pixels == pytest.approx(5)
    assert one.growth == pytest.approx(0, abs=1e-5) and one.moving == len(one.vectors) == 0
    y, x = np.mgrid[:104, :208]
    one = stepped(monkeypatch, np.stack([x, y], -1) * 0.01)  # grows from its upper left corner
    assert one.growth == pytest.approx(0.01, abs=1e-4)
    assert one.camera == pytest.approx([2.08, 1.04], abs=0.01)  # where its middle goes
    turned = np.stack([-(y - 52), x - 104], -1) * 0.02
    one = stepped(monkeypatch, turned)  # turns about its middle
    assert one.camera == pytest.approx([0, 0], abs=0.01)
    assert one.growth == pytest.approx(np.hypot(1, 0.02) - 1, abs=1e-4)


@pytest.mark.parametrize(
    ("camera", "subject", "moves"),
    [
        ((0, 0), (0, 0.3), False),  # 0.6 pixels of a picture 416 wide
        ((0, 0), (0, 0.5), True),
        ((4, 0), (4, 0.9), False),  # a quarter of the camera's speed is none
        ((4, 0), (4, 1.1), True),
        ((0, 0), (3, -2), True),
    ],
)
def test_what_moves_against_the_background_moves_by_itself(
    camera: tuple[float, float], subject: tuple[float, float], moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = moving_by(*camera)
    flow[24:48, 40:80] = subject  # 3 of 13 rows of measured points, 5 of 26 columns
    one = stepped(monkeypatch, flow)
    assert one.followed and one.camera == pytest.approx(np.multiply(camera, 2), abs=0.05)
    assert one.moving == pytest.approx(15 / 338 if moves else 0)
    assert len(one.vectors) == (15 if moves else 0)
    if moves:
        assert one.vectors == pytest.approx(np.tile(2 * np.subtract(subject, camera), (15, 1)), abs=0.05)


def test_a_picture_without_texture_cannot_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    none = np.zeros((104, 208), bool)
    one = stepped(monkeypatch, moving_by(3, 4), none)
    assert not one.followed and one.moving == one.growth == 0 and one.pixels == pytest.approx(10)
    assert one.camera.tolist() == [0, 0] and one.vectors.shape == (0, 2)
    few, enough = none.copy(), none.copy()
    few[0:24, 0:32] = True  # 3 x 4 points and those next to them
    enough[0:32, 0:32] = True
    assert stepped(monkeypatch, moving_by(3, 4), enough).followed
    few[:, :] = False
    few[0:16, 0:24] = True
    assert not stepped(monkeypatch, moving_by(3, 4), few).followed
    # what moves where nothing can be seen is not counted
    flow = moving_by(0, 0)
    flow[:, 104:] = 5, 0
    left = none.copy()
    left[:, :96] = True
    one = stepped(monkeypatch, flow, left)
    assert one.followed and one.moving == 0


@pytest.mark.parametrize(("share", "followed"), [(0.5, True), (0.2, False)])
def test_a_background_is_what_a_third_agrees_on(share: float, followed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = np.random.default_rng(0).uniform(-40, 40, (104, 208, 2))
    flow[:, : round(208 * share)] = 2, 0
    one = stepped(monkeypatch, flow)
    assert one.followed is followed
    if followed:
        assert one.camera == pytest.approx([4, 0], abs=0.1)


def test_speeds_are_shares_of_the_width_of_a_tall_picture_too(monkeypatch: pytest.MonkeyPatch) -> None:
    coming = iter([frame((2.08, 0))])
    monkeypatch.setattr("wan.quality.motion._step", lambda first, second: next(coming))
    monkeypatch.setattr("wan.quality.motion.MeasuredFrame.of", lambda picture: picture)
    assert measure_motion(torch.zeros(2, 832, 416, 3), 10).pan == pytest.approx((-0.1, 0))


def test_twelve_pairs_of_neighbours_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[tuple[int, int]] = []

    def step(first: torch.Tensor, second: torch.Tensor) -> _FrameMotion:
        pairs.append((int(first[0, 0, 0]), int(second[0, 0, 0])))
        return frame()

    monkeypatch.setattr("wan.quality.motion._step", step)
    monkeypatch.setattr("wan.quality.motion.MeasuredFrame.of", lambda picture: picture)
    clip = torch.arange(30.0)[:, None, None, None].expand(30, 64, 64, 3)
    measure_motion(clip, 16)
    assert len(pairs) == 12 and (pairs[0], pairs[-1]) == ((0, 1), (28, 29))
    assert all(second == first + 1 for first, second in pairs)
    pairs.clear()
    measure_motion(clip[:3], 16)
    assert pairs == [(0, 1), (1, 2)]


def test_directions_have_their_names() -> None:
    turns = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    names = [
        "right",
        "down to the right",
        "down",
        "down to the left",
        "left",
        "up to the left",
        "up",
        "up to the right",
    ]
    assert [_compass(turn) for turn in turns] == names
    assert _compass((10, 4)) == "right" and _compass((10, 5)) == "down to the right"
    assert _unit(np.array([3.0, -4.0])) == pytest.approx((0.6, -0.8)) and _unit(np.zeros(2)) == (0, 0)
