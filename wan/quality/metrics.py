"""Numbers for what a viewer notices at a seam, and for how a clip looks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
from torch import Tensor

from wan.errors import UserError
from wan.quality.vision import (
    LONG_SIDE,
    Array,
    MeasuredFrame,
    checked,
    flow,
    follow,
    luma,
    opencv,
    same_size,
    speeds,
    spread,
    top_speed,
    unit_range,
)

# Where a viewer begins to notice: a term of the score is 1 there. `python -m benchmarks.seams` says how well these and
# the report's threshold tell cut footage from footage that goes on.
VISIBLE_JUMP = 2.0  # times the usual change from frame to frame
VISIBLE_DUPLICATE = 0.25  # of the usual change
VISIBLE_SPEED = 3.0  # times faster or slower; footage from which something leaves slows down by as much
VISIBLE_TURN = 1.2  # of the speed before; motion at a right angle to it is 1.4
VISIBLE_COLOUR = 1.5  # Lab units
VISIBLE_FLASH = 1.5  # L* units

GOOD_SPEED = (0.7, 1.4)
MILD = ("slow start", "fast start", "turn")  # warnings of what footage also does by itself; the score weighs them
FROZEN = 0.2  # of the speed before
REVERSED = -0.3  # cosine of the motion after with the motion before
STILL = 0.3  # pixels per frame of a picture 416 wide; below, a ratio of speeds is noise
FAITHFUL_DB = 26.0  # known frames come back from the VAE at 30 dB and more
_ROUNDING = 0.25 / 255  # a change from frame to frame that means nothing
_WORST = 6.0  # no term counts for more, so that one defect beyond measure leaves the others readable
_NEAR = 3  # steps on either side of a moment in which things are still in their place
_MOST_FRAMES = 32  # that the look of a clip is measured on


@dataclass(frozen=True)
class SeamScore:
    """How visible a seam is. Ratios are 1 where nothing can be seen, everything else is 0.

    `jump_ratio`: change at the seam / usual change, or the way moved at the seam / usual way where that is more.
    `duplicate`: the first new frame repeats the one before it. `speed_ratio`: speed in the 6 steps after the seam / in
    the 6 before, None when nothing moved; `later_speed_ratio`: the same for the last 6 steps, when at least 12 frames
    follow; `own_speed_ratio`: how many times faster or slower the footage before the seam usually becomes by itself.
    `velocity_change`: how far the motion after the seam differs from that before, as a part of it, beyond what is usual
    before the seam.
    `colour_shift`: signed (L, a, b) step at the seam beyond the trend, of pixels followed through their motion;
    `colour_step`: its length. `flash`: how far L* leaves both the level before and the level after, in the first 8 new
    frames. `fidelity_db`: PSNR of the clip's own rendering of the known frames, at most 100, None when not given.
    """

    jump_ratio: float
    duplicate: bool
    speed_ratio: float | None
    later_speed_ratio: float | None
    velocity_change: float | None
    colour_shift: tuple[float, float, float]
    colour_step: float
    flash: float
    fidelity_db: float | None
    warnings: tuple[str, ...]
    own_speed_ratio: float = 1.0

    @property
    def terms(self) -> dict[str, float]:
        """The parts of the score, each 1 where a viewer begins to notice it, 6 at most."""
        threshold = VISIBLE_JUMP if self.jump_ratio > 1 else VISIBLE_DUPLICATE
        speed = max(_apart(self.speed_ratio), _apart(self.later_speed_ratio) / 2)  # later it may slow down by itself
        parts = {
            "jump": math.log(max(self.jump_ratio, 1e-3)) / math.log(threshold),
            "speed": max(0.0, speed - _apart(self.own_speed_ratio)),
            "turn": (self.velocity_change or 0.0) / VISIBLE_TURN,
            "colour": self.colour_step / VISIBLE_COLOUR,
            "flash": self.flash / VISIBLE_FLASH,
        }
        return {name: min(part, _WORST) for name, part in parts.items()}

    @property
    def score(self) -> float:
        """Lower is better: 0 is seamless, 1 one defect that just shows. The root of the sum of the squared `terms`.

        A picture that freezes has the smoothest seam of all, and scores badly by its speed.
        """
        return math.sqrt(sum(part**2 for part in self.terms.values()))

    def as_json(self) -> dict[str, Any]:
        """Every field, the score and its terms, as JSON values."""
        return {
            **asdict(self),
            "colour_shift": list(self.colour_shift),
            "warnings": list(self.warnings),
            "score": self.score,
            "terms": self.terms,
        }


@dataclass(frozen=True)
class LookPart:
    """Means over frames. `lightness`, `a`, `b`: Lab; `contrast`: deviation of L*; `chroma`: mean distance from grey.

    `saturation` as in HSV, `clipped` share of pixels with a black or white channel, `colourfulness` after Hasler and
    Süsstrunk (0 to about 110). At the frames' own size, on luma in [0, 255]: `sharpness` variance of the Laplacian,
    `tenengrad` mean squared gradient, `high_frequency` share of the energy above a quarter of the sampling rate,
    `noise` sigma.
    """

    lightness: float
    a: float
    b: float
    contrast: float
    chroma: float
    saturation: float
    clipped: float
    colourfulness: float
    sharpness: float
    tenengrad: float
    high_frequency: float
    noise: float

    def as_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


@dataclass(frozen=True)
class Look:
    """How a clip looks: over all of it, over its first and over its last quarter, and how much moves in it.

    `moving`: share of pixels that move by more than 0.3 pixels per frame; `speed`: mean of the fastest tenth, pixels
    per frame; both for a picture 416 pixels wide, and None for a single frame. Sharp and steady
    is easily had by standing still, so they belong next to the rest.
    """

    whole: LookPart
    first: LookPart
    last: LookPart
    moving: float | None
    speed: float | None

    def as_json(self) -> dict[str, Any]:
        """The values of the whole clip and its motion flat, `first` and `last` as objects."""
        return {
            **self.whole.as_json(),
            "moving": self.moving,
            "speed": self.speed,
            "first": self.first.as_json(),
            "last": self.last.as_json(),
        }


def score_seam(
    before: Tensor, after: Tensor, *, known: Tensor | None = None, rendered: Tensor | None = None
) -> SeamScore:
    """Score the seam between the end of one clip and the first new frames of the next, as they are shown.

    `before`, `after`: float32 [T, H, W, 3] in [-1, 1] at one rate; the last 13 and the first 16 are looked at, and
    fewer answer fewer questions. `known`, `rendered`: the true known frames and the clip's own rendering of them,
    [k, H, W, 3]. Raises UserError.
    """
    same_size(checked(before, "before"), checked(after, "after"))
    before, after = before[-13:], after[:16]
    steps = list(_steps(chain(before, after)))
    old, at, new = steps[: len(before) - 1], steps[len(before) - 1], steps[len(before) :]
    jump, duplicate = _jump(old, at, new)
    speed, later = _speed_ratios(old, new)
    change, cosine = _turn(old, new)
    shift = at.shift - np.median([step.shift for step in (old or new)[-3:] or [at]], axis=0)
    score = SeamScore(
        jump_ratio=jump,
        duplicate=duplicate,
        speed_ratio=speed,
        later_speed_ratio=later,
        velocity_change=change,
        colour_shift=(float(shift[0]), float(shift[1]), float(shift[2])),
        colour_step=float(np.linalg.norm(shift)),
        flash=_flash([at, *new]),
        fidelity_db=None if known is None or rendered is None else _fidelity_db(known, rendered),
        warnings=(),
        own_speed_ratio=_own_speed_ratio(old),
    )
    slowest = min(value for value in (speed, later, 1.0) if value is not None)
    seen = {
        "jump": jump > VISIBLE_JUMP,
        "duplicate": duplicate,
        "freeze": slowest < FROZEN,
        "slow start": speed is not None and FROZEN <= speed < GOOD_SPEED[0] / score.own_speed_ratio,
        "fast start": speed is not None and speed > GOOD_SPEED[1] * score.own_speed_ratio,
        "reversed motion": cosine < REVERSED,
        "turn": cosine >= REVERSED and slowest >= FROZEN and score.terms["turn"] > 1,
        "colour step": score.terms["colour"] > 1,
        "flash": score.terms["flash"] > 1,
        "start differs": score.fidelity_db is not None and score.fidelity_db < FAITHFUL_DB,
    }
    return replace(score, warnings=tuple(word for word, true in seen.items() if true))


def measure_look(frames: Tensor) -> Look:
    """Look of a clip float32 [T, H, W, 3] in [-1, 1], of at most 32 of its frames. Raises UserError."""
    checked(frames, "frames")
    chosen = spread(len(frames), _MOST_FRAMES)
    values = np.array([_look(frames[index]) for index in chosen])
    quarter = max(1, len(chosen) // 4)
    fields_ = [flow(*pair) for pair in _neighbours(frames)]
    return Look(
        whole=LookPart(*values.mean(axis=0).tolist()),
        first=LookPart(*values[:quarter].mean(axis=0).tolist()),
        last=LookPart(*values[-quarter:].mean(axis=0).tolist()),
        moving=float(np.mean([(speeds(field) > STILL).mean() for field in fields_])) if fields_ else None,
        speed=float(np.mean([top_speed(field) for field in fields_])) if fields_ else None,
    )


@dataclass(frozen=True)
class _Change:
    """From one frame to the next: mean change of RGB beyond that of its mean, speed, coarse flow [3, 5, 2], and
    Lab shift of followed pixels."""

    change: float
    speed: float
    motion: Array
    shift: Array


def _steps(frames: Iterable[Tensor]) -> Iterator[_Change]:
    cv2 = opencv()
    for first, second in pairwise(MeasuredFrame.of(frame) for frame in frames):
        field = flow(first, second)
        scale = LONG_SIDE / max(field.shape[:2])
        change = second.rgb - first.rgb
        yield _Change(
            change=float(np.abs(change - change.mean(axis=(0, 1))).mean()),
            speed=top_speed(field),
            motion=cv2.resize(field, (5, 3), interpolation=cv2.INTER_AREA) * scale,
            shift=_lab_shift(first, second, field),
        )


def _lab_shift(first: MeasuredFrame, second: MeasuredFrame, field: Array) -> Array:
    """Median change (L, a, b) of the pixels that can be followed; where few can, of the picture's mean."""
    arrived, inside = follow(second.lab, field)
    change, inside = (arrived - first.lab)[::2, ::2], inside[::2, ::2]
    lightness = change[..., 0]
    same = inside & (np.abs(lightness - np.median(lightness)) < 12)
    if same.mean() < 0.3:
        mean: Array = second.lab.mean(axis=(0, 1)) - first.lab.mean(axis=(0, 1))
        return mean
    median: Array = np.median(change[same], axis=0)
    return median


def _jump(old: Sequence[_Change], at: _Change, new: Sequence[_Change]) -> tuple[float, bool]:
    """How much more than usual happens at the seam, and whether it repeats a frame where none else is repeated."""
    usual = [*old[-8:], *new[3:8]] or new or [at]
    change = float(np.median([step.change for step in usual]))
    speed = float(np.median([step.speed for step in usual]))
    changed = (at.change + _ROUNDING) / (change + _ROUNDING)
    moved = (at.speed + STILL) / (speed + STILL)  # in busy texture a leap changes hardly more than a step
    on_twos = bool(old) and float(np.quantile([step.change for step in old], 0.3)) < VISIBLE_DUPLICATE * change
    return max(changed, moved) if max(changed, moved) > 1.4 else changed, changed < VISIBLE_DUPLICATE and not on_twos


def _speed_ratios(old: Sequence[_Change], new: Sequence[_Change]) -> tuple[float | None, float | None]:
    usual = float(np.mean([step.speed for step in old[-6:]])) if old else 0.0
    if usual <= STILL or not new:
        return None, None
    soon = float(np.mean([step.speed for step in new[:6]])) / usual
    later = float(np.mean([step.speed for step in new[-6:]])) / usual if len(new) >= 11 else None
    return soon, later


def _own_speed_ratio(old: Sequence[_Change]) -> float:
    """How many times faster or slower the footage before the seam usually becomes within a few steps, 1 or more."""
    speed = [step.speed + STILL for step in old]
    sides = [(np.mean(speed[at - _NEAR : at]), np.mean(speed[at : at + _NEAR])) for at in _inner(len(old) + 1)]
    return float(np.median([max(two) / min(two) for two in sides])) if sides else 1.0


def _turn(old: Sequence[_Change], new: Sequence[_Change]) -> tuple[float | None, float]:
    """Difference of the coarse motion before and after / the motion before, beyond what is usual within `old`, and the
    cosine between the two."""
    if not old or not new:
        return None, 1.0
    before, after = ([step.motion for step in part] for part in (old, new))
    usual = [_motion_change(before[:at], before[at + 1 :])[0] for at in _inner(len(old))]
    change, cosine = _motion_change(before, after)
    return max(0.0, change - float(np.median(usual or [0.0]))), cosine


def _inner(steps: int) -> range:
    """The steps that have enough others on both sides to be compared."""
    return range(_NEAR, steps - _NEAR)


def _motion_change(old: Sequence[Array], new: Sequence[Array]) -> tuple[float, float]:
    """Difference of the coarse motion just before and just after / that before, and the cosine between the two."""
    was, now = (np.mean(part, axis=0) for part in (old[-_NEAR:], new[:_NEAR]))
    size_was, size_now = float(np.linalg.norm(was)), float(np.linalg.norm(now))
    cells = math.sqrt(was.shape[0] * was.shape[1])
    change = float(np.linalg.norm(now - was)) / max(size_was, 0.25 * cells)
    moving = min(size_was, size_now) > 0.1 * cells
    return change, float((was * now).sum()) / (size_was * size_now) if moving else 1.0


def _flash(steps: Sequence[_Change]) -> float:
    """How far L* of followed pixels leaves both the level before the seam and the later one, on the same side."""
    level = np.cumsum([step.shift[0] for step in steps])
    early, later = level[:8], float(np.median(level[8:13])) if len(level) > 8 else float(level[-1])
    out = np.minimum(np.abs(early), np.abs(early - later)) * (np.sign(early) == np.sign(early - later))
    return float(out.max())


def _fidelity_db(known: Tensor, rendered: Tensor) -> float:
    same_size(checked(known, "known"), checked(rendered, "rendered"))
    if len(known) != len(rendered):
        raise UserError(f"known and rendered frames must be as many, not {len(known)} and {len(rendered)}")
    error = float((known.float() - rendered.float()).square().mean()) / 4  # of a range of 2
    return min(100.0, -10 * math.log10(error)) if error > 0 else 100.0


def _apart(ratio: float | None) -> float:
    """How far a ratio of speeds is from 1; 1 where a viewer begins to notice."""
    return 0.0 if ratio is None else abs(math.log(max(ratio, 1e-3))) / math.log(VISIBLE_SPEED)


def _neighbours(frames: Tensor) -> Iterator[tuple[MeasuredFrame, MeasuredFrame]]:
    """Pairs of neighbouring frames, at most 16, spread over the clip."""
    for index in spread(len(frames) - 1, 16):
        yield MeasuredFrame.of(frames[index]), MeasuredFrame.of(frames[index + 1])


def _look(frame: Tensor) -> list[float]:
    """The values of `LookPart` for one frame [H, W, 3], in order."""
    cv2 = opencv()
    picture = MeasuredFrame.of(frame)
    rgb, lab = picture.rgb, picture.lab
    red_green, yellow_blue = rgb[..., 0] - rgb[..., 1], (rgb[..., 0] + rgb[..., 1]) / 2 - rgb[..., 2]
    highest, lowest = rgb.max(axis=-1), rgb.min(axis=-1)
    whole = unit_range(frame.detach().float().cpu().numpy())
    grey = luma(whole) * 255
    return [
        *lab.mean(axis=(0, 1)).tolist(),
        float(lab[..., 0].std()),
        float(np.hypot(lab[..., 1], lab[..., 2]).mean()),
        float(((highest - lowest) / np.maximum(highest, 1e-6)).mean()),
        float(((whole < 1 / 255) | (whole > 254 / 255)).any(axis=-1).mean()),
        255 * (math.hypot(red_green.std(), yellow_blue.std()) + 0.3 * math.hypot(red_green.mean(), yellow_blue.mean())),
        float(cv2.Laplacian(grey, cv2.CV_32F).var()),
        float((cv2.Sobel(grey, cv2.CV_32F, 1, 0) ** 2 + cv2.Sobel(grey, cv2.CV_32F, 0, 1) ** 2).mean()),
        _high_frequency(grey),
        _noise(grey),
    ]


def _high_frequency(grey: Array) -> float:
    """Share of the energy, the mean left out, at more than a quarter of the sampling rate."""
    height, width = grey.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None]  # the edges of the picture are no detail
    power = np.abs(np.fft.rfft2((grey - grey.mean()) * window)) ** 2
    power[:, 1 : (width + 1) // 2] *= 2  # the half of the spectrum that rfft2 leaves out
    far = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) > 0.25
    return float(power[far].sum() / max(power.sum(), 1e-9))


def _noise(grey: Array) -> float:
    """Sigma of the noise, by the median of the diagonal Haar details: edges are few, noise is everywhere."""
    height, width = (side // 2 * 2 for side in grey.shape)
    even, odd = grey[:height:2, :width], grey[1:height:2, :width]
    detail = (even[:, ::2] - even[:, 1::2] - odd[:, ::2] + odd[:, 1::2]) / 2
    return float(np.median(np.abs(detail))) / 0.6745
