"""The numbers of a seam, from steps between frames that are written down here, so that a reader can work them out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wan.errors import UserError
from wan.quality import SeamScore, measure_look, metrics, score_seam
from wan.quality.metrics import (
    STILL,
    _Change,
    _flash,
    _jump,
    _motion_change,
    _own_speed_ratio,
    _speed_ratios,
    _steps,
    _turn,
)

ROUNDING = 0.25 / 255


def step(
    change: float = 0.1, speed: float = 2.0, motion: tuple[float, float] = (1.0, 0.0), lab: Sequence[float] = (0, 0, 0)
) -> _Change:
    return _Change(change, speed, np.broadcast_to(np.array(motion), (3, 5, 2)), np.array(lab, float))


def changes(values: Iterable[float]) -> list[_Change]:
    return [step(change=value) for value in values]


def fast(*values: float) -> list[_Change]:
    return [step(speed=value) for value in values]


def seam(**values: object) -> SeamScore:
    plain: dict[str, Any] = {"jump_ratio": 1.0, "duplicate": False, "speed_ratio": 1.0, "later_speed_ratio": None}
    plain |= {"velocity_change": None, "colour_shift": (0, 0, 0), "colour_step": 0.0, "flash": 0.0}
    return SeamScore(**(plain | {"fidelity_db": None, "warnings": ()} | values))


def test_the_usual_change_is_that_of_eight_steps_before_and_of_some_that_come_soon_after() -> None:
    old, new = changes(range(1, 14)), changes(range(14, 29))
    # the middle one of 6 to 13 and 17 to 21
    assert _jump(old, step(change=24, speed=0), new)[0] == (24 + ROUNDING) / (12 + ROUNDING)
    old, new = fast(*range(1, 14)), fast(*range(14, 29))
    assert _jump(old, step(speed=24), new)[0] == (24 + STILL) / (12 + STILL)
    assert _jump([], step(change=0.4), changes([0.1, 0.2, 0.3]))[0] == (0.4 + ROUNDING) / (0.2 + ROUNDING)
    assert _jump([], step(change=0.4), [])[0] == 1


def test_a_way_that_is_usual_does_not_hide_how_little_changes() -> None:
    usual = [step()] * 8
    little = (0.05 + ROUNDING) / (0.1 + ROUNDING)
    assert _jump(usual, step(change=0.05, speed=2.9), usual)[0] == little  # 3.2 / 2.3 of the usual way
    assert _jump(usual, step(change=0.05, speed=3.0), usual)[0] == 3.3 / 2.3


def test_a_repeated_frame_is_a_duplicate_where_none_is_repeated_before() -> None:
    usual = [step()] * 12
    assert _jump(usual, step(change=0.02), usual)[1] and not _jump(usual, step(change=0.03), usual)[1]
    assert not _jump(changes((0.0, 0.1) * 6), step(change=0.0), usual)[1]
    assert _jump(changes([0.0] + [0.1] * 11), step(change=0.0), usual)[1]  # it did once; that is no habit
    assert _jump([], step(change=0.0), usual)[1]


def test_speeds_are_compared_over_six_steps() -> None:
    old = fast(*range(1, 13))  # 9.5 in the last six
    new = fast(*range(1, 12))  # 3.5 in the first six, 8.5 in the last
    assert _speed_ratios(old, new) == (3.5 / 9.5, 8.5 / 9.5)
    assert _speed_ratios(old, new[:10]) == (3.5 / 9.5, None)  # too few to tell of later ones
    assert _speed_ratios(old, []) == _speed_ratios([], new) == (None, None)
    assert _speed_ratios(fast(*[STILL] * 6), new) == (None, None)
    assert _speed_ratios(fast(*[2 * STILL] * 6), fast(4 * STILL)) == (2, None)


def test_how_much_faster_footage_becomes_by_itself_is_told_from_three_steps_on_each_side() -> None:
    assert (
        _own_speed_ratio(fast(1, 1, 1, 2, 2, 2)) == _own_speed_ratio(fast(2, 2, 2, 1, 1, 1)) == pytest.approx(2.3 / 1.3)
    )
    assert _own_speed_ratio(fast(1, 1, 1, 2, 2)) == 1
    # 1, 1, 1 | 1, 1, 4 and 1, 1, 1 | 1, 4, 4 and 1, 1, 1 | 4, 4, 4: the middle one
    assert _own_speed_ratio(fast(1, 1, 1, 1, 1, 4, 4, 4)) == pytest.approx(3.3 / 1.3)


@pytest.mark.parametrize(
    ("was", "now", "change", "cosine"),
    [
        ((1, 0), (1, 0), 0, 1),
        ((1, 0), (0, 1), math.sqrt(2), 0),
        ((2, 0), (-1, 0), 1.5, -1),
        ((0.2, 0), (-0.2, 0), 1.6, -1),  # as a part of a quarter of a pixel at least
        ((0.09, 0), (-1, 0), 4.36, 1),  # what hardly moves has no direction
        ((1, 0), (-0.09, 0), 1.09, 1),
    ],
)
def test_motion_is_compared_in_size_and_direction(
    was: tuple[float, float], now: tuple[float, float], change: float, cosine: float
) -> None:
    (old, new), other = (step(motion=motion).motion for motion in (was, now)), step(motion=(9, 9)).motion
    assert _motion_change([other, *[old] * 3], [*[new] * 3, other]) == pytest.approx((change, cosine))


def test_a_turn_counts_beyond_what_the_footage_does_by_itself() -> None:
    right, down = step(motion=(1, 0)), step(motion=(0, 1))
    assert _turn([right] * 12, [down] * 3) == pytest.approx((math.sqrt(2), 0))
    # three to the right, whatever comes between, three down: it turns as much itself
    assert _turn([*[right] * 3, step(motion=(9, 9)), *[down] * 3], [right] * 3) == pytest.approx((0, 0))
    assert _turn([right] * 6, [down] * 3) == pytest.approx((math.sqrt(2), 0))  # too few to tell
    assert _turn([], [down]) == _turn([right], []) == (None, 1)


@pytest.mark.parametrize(
    ("lightness", "flash"),
    [
        ([2, 0, 0, 0, 0, 0, 0, 0, -2, 0, 0], 2),
        ([-3, 3, 0, 0, 0, 0, 0, 0, 0], 3),
        ([2, 0, 0, 0, 0, 0, 0, 0, 0], 0),  # a step that stays
        ([2, 0, 0, 0, 0, 0, 0, 0, 2], 0),  # on the way
        ([3, 0, 0, -2], 2),  # of few frames the last has the later level
        ([0] * 8 + [3, -3, 0, 0, 0], 0),  # only the first eight frames can flash
        ([1, 0, 0, 0, 0, 0, 0, 0, -0.2, -0.2, -0.2, -0.2, -0.2, -9], 0.6),  # and five after them are the later level
    ],
)
def test_a_flash_leaves_the_level_before_and_the_later_one(lightness: list[float], flash: float) -> None:
    assert _flash([step(lab=(value, 0, 0)) for value in lightness]) == pytest.approx(flash)


def test_each_term_is_one_where_a_viewer_begins_to_notice() -> None:
    nothing = dict.fromkeys(("jump", "speed", "turn", "colour", "flash"), 0.0)
    assert seam().terms == nothing and seam().score == 0
    for values, term, size in (
        ({"jump_ratio": 2.0}, "jump", 1),
        ({"jump_ratio": 8.0}, "jump", 3),
        ({"jump_ratio": 0.25}, "jump", 1),
        ({"jump_ratio": 0.0}, "jump", math.log(1000, 4)),
        ({"jump_ratio": 2.0**7}, "jump", 6),  # no more than that
        ({"speed_ratio": 3.0}, "speed", 1),
        ({"speed_ratio": 1 / 3}, "speed", 1),
        ({"speed_ratio": 0.0}, "speed", 6),
        ({"speed_ratio": None, "later_speed_ratio": 9.0}, "speed", 1),
        ({"speed_ratio": 9.0, "own_speed_ratio": 3.0}, "speed", 1),
        ({"speed_ratio": 2.0, "own_speed_ratio": 4.0}, "speed", 0),
        ({"velocity_change": 1.2}, "turn", 1),
        ({"colour_step": 1.5}, "colour", 1),
        ({"flash": 1.5}, "flash", 1),
    ):
        assert seam(**values).terms == pytest.approx(nothing | {term: size}), values
    assert seam(colour_step=4.5, flash=6.0).score == pytest.approx(5)


RIGHT, UP, BACK = (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0)


@pytest.mark.parametrize(
    ("at", "new", "warnings"),
    [
        ({}, {}, ()),
        ({"change": 0.19}, {}, ()),
        ({"change": 0.21}, {}, ("jump",)),
        ({"change": 0.02}, {}, ("duplicate",)),
        ({}, {"speed": 0.38}, ("freeze",)),
        ({}, {"speed": 0.42}, ("slow start",)),
        ({}, {"speed": 1.38}, ("slow start",)),
        ({}, {"speed": 1.42}, ()),
        ({}, {"speed": 2.78}, ()),
        ({}, {"speed": 2.82}, ("fast start",)),
        ({}, {"motion": BACK}, ("reversed motion",)),
        ({}, {"motion": UP}, ("turn",)),
        ({}, {"motion": (0.6, -0.8)}, ()),
        ({}, {"motion": UP, "speed": 0.3}, ("freeze",)),  # what stands still does not turn
        ({"lab": (0, 1.6, 0)}, {}, ("colour step",)),
        ({"lab": (0, 1.4, 0)}, {}, ()),
        ({"lab": (0, 2.0, 0)}, {"lab": (0, 0, 0)}, ("colour step",)),
    ],
)
def test_a_warning_names_what_is_past_its_bar(
    at: dict[str, object], new: dict[str, object], warnings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [step()] * 12 + [step(**at)] + [step(**new)] * 15  # type: ignore[arg-type]
    monkeypatch.setattr(metrics, "_steps", lambda frames: made[: len(list(frames)) - 1])
    assert score_seam(torch.zeros(13, 8, 8, 3), torch.zeros(16, 8, 8, 3)).warnings == warnings


def test_footage_that_changes_its_speed_by_itself_may_do_so_at_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    old = fast(1, 1, 1, 2, 2, 2)  # 1.77 times faster; 1.5 in all
    for speed, warnings in ((0.61, ()), (0.57, ("slow start",)), (3.7, ()), (3.74, ("fast start",))):
        made = [*old, step(speed=1.5), *fast(speed)]
        monkeypatch.setattr(metrics, "_steps", lambda frames, made=made: made)
        score = score_seam(torch.zeros(7, 8, 8, 3), torch.zeros(2, 8, 8, 3))
        assert score.own_speed_ratio == pytest.approx(2.3 / 1.3) and score.warnings == warnings


def test_a_step_of_colour_is_measured_against_the_three_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    trend = [step(lab=(9, 9, 9)), *(step(lab=(value, 0, 1)) for value in (1, 2, 3))]
    for made, before, after in (
        ([*trend, step(lab=(6, 2, 1)), step()], 5, 2),
        ([step(lab=(6, 2, 1)), *trend], 1, 5),  # there are none; so those after
    ):
        monkeypatch.setattr(metrics, "_steps", lambda frames, made=made: made)
        score = score_seam(torch.zeros(before, 8, 8, 3), torch.zeros(after, 8, 8, 3))
        assert score.colour_shift == (4, 2, 0) and score.colour_step == pytest.approx(math.sqrt(20))


def test_the_quarters_of_a_clip_are_measured_apart() -> None:
    levels = torch.linspace(-0.8, 0.8, 12)
    frames = levels[:, None, None, None].expand(12, 16, 16, 3)
    each = [measure_look(frames[index : index + 1]).whole.lightness for index in range(12)]
    look = measure_look(frames)
    assert look.whole.lightness == pytest.approx(np.mean(each), abs=1e-4)
    assert look.first.lightness == pytest.approx(np.mean(each[:3]), abs=1e-4)
    assert look.last.lightness == pytest.approx(np.mean(each[9:]), abs=1e-4)
    assert measure_look(frames[:3]).last.lightness == pytest.approx(each[2], abs=1e-4)


def test_the_look_of_a_picture_half_red_and_half_black_is_known() -> None:
    picture = torch.full((1, 416, 416, 3), -1.0)
    picture[:, :, :208, 0] = 1
    look = measure_look(picture).whole
    # red is 53.24, 80.09, 67.20 in Lab
    assert (look.lightness, look.a, look.b) == pytest.approx((26.62, 40.05, 33.6), abs=0.1)
    assert look.contrast == pytest.approx(26.62, abs=0.1) and look.chroma == pytest.approx(52.27, abs=0.1)
    assert look.saturation == pytest.approx(0.5, abs=0.01) and look.clipped == 1
    assert look.colourfulness == pytest.approx(1.3 * 255 * math.hypot(0.5, 0.25), rel=0.01)
    assert look.noise == 0


def test_a_channel_is_clipped_at_either_end() -> None:
    level = torch.tensor([0.5, 0.5, 254.5, 3.0, 252.0, 128.0, 128.0, 128.0]) / 127.5 - 1
    picture = torch.zeros(1, 16, 8, 3)
    picture[..., 1] = level
    assert measure_look(picture).whole.clipped == 3 / 8


def test_light_that_changes_everywhere_alike_is_no_change_of_the_picture() -> None:
    grey = torch.zeros(1, 416, 416, 3)
    half = grey.clone()
    half[:, :, :208] = 0.2
    (lighter,) = _steps([grey[0], grey[0] + 0.2])
    (parted,) = _steps([grey[0], half[0]])
    assert lighter.change == pytest.approx(0, abs=1e-3)
    assert parted.change == pytest.approx(0.05, abs=1e-3)  # a range of 2 is 1 here, and the mean is left out
    assert lighter.shift[0] > 1 > abs(lighter.shift[1])


def test_the_colour_of_a_seam_shifts_by_what_is_beyond_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, at = step(lab=(1, 2, 3)), step(lab=(2, 4, 5))
    monkeypatch.setattr(metrics, "_steps", lambda _: [usual] * 4 + [at] + [usual] * 4)
    score = score_seam(torch.zeros(5, 8, 8, 3), torch.zeros(5, 8, 8, 3))
    assert score.colour_shift == (1, 2, 2) and score.colour_step == 3


def test_the_look_of_an_edge_is_known() -> None:
    """Two halves of 100 and 200 levels, beside or above each other."""
    levels = torch.full((416, 416), 100.0)
    levels[:, 208:] = 200
    for picture in (levels, levels.T):
        look = measure_look((picture / 127.5 - 1)[None, :, :, None].expand(1, -1, -1, 3)).whole
        # Laplacian of 100 and -100 on two lines of 416; Sobel of 400 on both
        assert look.sharpness == pytest.approx(2 * 100**2 / 416, rel=1e-3)
        assert look.tenengrad == pytest.approx(2 * 400**2 / 416, rel=1e-3)
        assert (look.chroma, look.saturation, look.colourfulness) == pytest.approx((0, 0, 0), abs=0.05)
        assert look.clipped == look.noise == 0


def test_the_yellow_and_blue_of_a_picture_count_for_its_colour() -> None:
    picture = torch.full((1, 416, 416, 3), -1.0)
    picture[:, :, :104] = torch.tensor([1.0, 1.0, -1.0])  # a quarter yellow, the rest black
    look = measure_look(picture).whole
    assert look.colourfulness == pytest.approx(255 * (math.sqrt(3) / 4 + 0.3 * 0.25), rel=0.01)
    assert look.saturation == pytest.approx(0.25, abs=0.01)


def test_what_moves_in_a_clip_is_measured_on_sixteen_pairs_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def flow(first: Any, second: Any) -> npt.NDArray[Any]:
        asked.append(round(float(second.rgb.mean() - first.rgb.mean()) * 1000))
        field = np.zeros((416, 208, 2), np.float32)
        field[:208, :, 0] = 0.31
        field[208:, :, 1] = -0.29
        field[:42, :, 0] = 4.0  # 42 lines of 416 are more than a tenth
        return field

    monkeypatch.setattr(metrics, "flow", flow)
    looked: list[float] = []

    def look_at(frame: torch.Tensor) -> list[float]:
        looked.append(float(frame.mean()))
        return [0.0] * 12

    monkeypatch.setattr(metrics, "_look", look_at)
    levels = torch.linspace(-0.5, 0.5, 101)[:, None, None, None].expand(101, 64, 64, 3)
    look = measure_look(levels)
    assert look.moving == 0.5 and look.speed == pytest.approx(4)
    assert len(asked) == 16 and set(asked) == {5}  # neighbours
    assert len(looked) == 32 and (looked[0], looked[-1]) == pytest.approx((-0.5, 0.5))
    assert measure_look(levels[:2]).moving == 0.5 and len(asked) == 17


def lab_of(lightness: npt.NDArray[Any]) -> Any:
    return type("Frame", (), {"lab": np.stack([lightness, lightness * 0, lightness * 0], -1).astype(np.float32)})()


@pytest.mark.parametrize(
    ("share", "jump", "shift"),
    [
        (0.0, 0.0, 5.0),
        (0.4, 11.9, 5.0),
        (0.4, 40.0, 5.0),  # what changes by itself is left out
        (0.6, 40.0, 45.0),
    ],
)
def test_colours_shift_by_what_most_pixels_do(share: float, jump: float, shift: float) -> None:
    first = np.full((40, 40), 30.0)
    second = first + 5
    second[: round(40 * share)] += jump
    field = np.zeros((40, 40, 2), np.float32)
    seen = metrics._lab_shift(lab_of(first), lab_of(second), field)
    assert seen == pytest.approx([shift, 0, 0], abs=0.01)


def test_where_no_pixels_agree_the_colours_shift_by_their_mean() -> None:
    first, second = np.zeros((100, 40)), np.linspace(0, 99, 100)[:, None].repeat(40, 1) ** 2 / 99
    field = np.zeros((100, 40, 2), np.float32)
    near = np.abs(second[::2] - np.median(second[::2])) < 12
    assert near.mean() < 0.3  # so few are as the one in the middle
    seen = metrics._lab_shift(lab_of(first), lab_of(second), field)
    assert seen == pytest.approx([second.mean(), 0, 0], abs=0.1)
    field[:, :, 0] = 25.0  # and of what can be followed are few
    seen = metrics._lab_shift(lab_of(first), lab_of(first + np.r_[0:5].repeat(8)[None]), field)
    assert seen == pytest.approx([3.5, 0, 0], abs=0.01)
    field[:, :, 0] = 30.0  # a quarter
    seen = metrics._lab_shift(lab_of(first), lab_of(first + np.r_[0:5].repeat(8)[None]), field)
    assert seen == pytest.approx([2, 0, 0], abs=0.01)


def test_the_motion_of_a_step_is_told_in_a_coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    field = np.zeros((104, 208, 2), np.float32)
    field[..., 0], field[:, :104, 1] = 1.5, -2
    monkeypatch.setattr(metrics, "flow", lambda first, second: field)
    grey = torch.zeros(104, 208, 3)
    (one,) = _steps([grey, grey])
    assert one.motion.shape == (3, 5, 2) and one.speed == pytest.approx(5)  # of a picture 416 wide
    assert np.allclose(one.motion[..., 0], 3) and np.allclose(one.motion[:, :, 1], [-4, -4, -2, 0, 0], atol=0.1)


def test_a_seam_is_measured_on_thirteen_frames_before_and_sixteen_after(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def steps(frames: Iterable[torch.Tensor]) -> list[_Change]:
        seen[:] = [float(frame[0, 0, 0]) for frame in frames]
        return [step()] * (len(seen) - 1)

    monkeypatch.setattr(metrics, "_steps", steps)
    frames = (torch.arange(60) / 100)[:, None, None, None].expand(60, 8, 8, 3)
    score_seam(frames[:30], frames[30:])
    assert seen == pytest.approx([at / 100 for at in range(17, 46)])


@pytest.mark.parametrize(("psnr", "warned"), [(25.9, True), (26.1, False), (120.0, False)])
def test_a_rendering_that_differs_from_the_known_frames_is_warned_of(
    psnr: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_steps", lambda _: [step()] * 9)
    known = torch.zeros(2, 8, 8, 3)
    rendered = known + 2 * 10 ** (-psnr / 20)  # of a range of 2
    frames = torch.zeros(5, 8, 8, 3)
    score = score_seam(frames, frames, known=known, rendered=rendered)
    assert score.fidelity_db == pytest.approx(min(psnr, 100), abs=0.01)
    assert score.warnings == (("start differs",) if warned else ())
    assert score_seam(frames, frames, known=known).fidelity_db is None
    assert score_seam(frames, frames, rendered=known).fidelity_db is None
    with pytest.raises(UserError, match="must be as many, not 2 and 1"):
        score_seam(frames, frames, known=known, rendered=rendered[:1])
    with pytest.raises(UserError, match="must have one size, not 8x8 and 4x8"):
        score_seam(frames, frames, known=known, rendered=rendered[:, :, :4])
    for wrong in ({"known": known[0], "rendered": rendered}, {"known": known, "rendered": rendered[0]}):
        with pytest.raises(UserError, match="must be float frames"):
            score_seam(frames, frames, **wrong)


def test_a_score_as_json_has_its_terms() -> None:
    told = seam(colour_step=1.5, colour_shift=(1, 2, 3), warnings=("jump",)).as_json()
    assert (told["score"], told["terms"]["colour"]) == (1, 1)
    assert (told["colour_shift"], told["warnings"], told["own_speed_ratio"]) == ([1, 2, 3], ["jump"], 1.0)
    look = measure_look(torch.zeros(2, 64, 64, 3)).as_json()
    assert (look["lightness"], look["moving"]) == (pytest.approx(53.4, abs=0.1), 0)
    assert look["first"]["lightness"] == look["last"]["lightness"] == pytest.approx(53.4, abs=0.1)


def test_a_slow_start_is_told_from_a_freeze_by_the_slowest_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [step()] * 12
    for soon, later, warnings in (
        (2.0, 0.38, ("freeze",)),
        (2.0, 0.42, ()),
        (1.0, 0.38, ("freeze", "slow start")),
        (0.38, 2.0, ("freeze",)),
    ):
        made = [*old, step(), *fast(*[soon] * 9, *[later] * 6)]
        monkeypatch.setattr(metrics, "_steps", lambda _, made=made: made)
        assert score_seam(torch.zeros(13, 8, 8, 3), torch.zeros(16, 8, 8, 3)).warnings == warnings
