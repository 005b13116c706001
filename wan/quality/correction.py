"""Drift of exposure, contrast, colour and saturation in a clip: measured along the motion, and taken out again."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from wan.detail import tell_detail
from wan.errors import UserError
from wan.options import check
from wan.quality.vision import LUMA, Array, MeasuredFrame, checked, flow, follow, luma, opencv, same_size, spread

# The size of a tone change is the root mean square of what it does to the picture; 0.01 of the range is about 1 L*.
NOTHING = 0.003  # too small to be seen, or to be told from the noise of a real clip
PLAUSIBLE, IMPLAUSIBLE = 0.06, 0.1  # growth within a clip: surely a drift, surely a change of light
MOST = 0.1  # that is ever taken out: a gain of about 0.8 or 1.25
UNEXPECTED, EXPECTED = 0.4, 0.7  # share of the growth that merely goes on with what the light did before the seam
SMOOTH, ERRATIC = 0.08, 0.14  # share of the growth that no smooth curve follows: a lamp, a door, lightning

_SAMPLES = 21  # frames of a clip that are measured
_BLUR = 3.0  # pixels
_KEEP, _LOST = 0.5, 0.2  # share of the picture that is still followed: take a new reference; it is another shot
_RIDGE = 3e-5  # holds what the colours at hand say nothing about, as saturation in a grey scene
_FLASH = 3  # of the measured frames that a flash at the start of a clip may spoil
_TREND = 5  # frames before the seam that show where the light was going
_AT_ONCE = 4  # whole frames that are corrected beside each other: each takes ten times its size meanwhile
_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


def correct_drift(
    frames: Tensor, condition: Tensor, *, known: int, strength: float = 0.9, device: torch.device = _CPU
) -> Tensor:
    """A clip without the drift of its tones since the clip before.

    `frames`: the clip, float32 [T, H, W, 3] in [-1, 1], whose first `known` frames repeat the clip before (they come
    back as they are). `condition`: the end of the clip before as it is shown, oldest first, [n, H, W, 3]; the last of
    them comes right before `frames[known]`. One is enough to measure against, 17 or more show where the light was
    going. Returns a new tensor, or `frames` itself when nothing is to be done.

    Pixels are followed through their motion from the last frame of `condition`, and one change of tones for the whole
    picture is fitted to them at some 20 moments: offset, gain and curve of each channel, and saturation. What comes
    into the picture or leaves it does not count. A smooth curve through these is taken out: the step at the seam
    whole, since no light changes so, and what grows after it by `strength` in (0, 1]; 0 switches it off. So the first
    new frame continues the last frame before it, and the next clip can be made and corrected from the corrected end.
    Pixels leave [-1, 1] no further than they did. A `device` that is a GPU does this last part, with other roundings
    than the CPU's: the pictures differ by less than 1e-5. Everything else runs on as many of the CPU's threads as
    PyTorch may use, and how many those are changes nothing.

    It is left alone when the picture cannot be followed (a cut), and what grows is left alone when it looks like light:
    it goes on with the trend of `condition`, it is larger than drift, or it is not smooth. What cannot be told apart: a
    light that begins to change after the seam, smoothly, alike everywhere and by less than about 8 L*; it is taken for
    drift. So is an exposure that a camera sets anew. A drift that was in the source before the seam is taken for light.

    Raises UserError.
    """
    same_size(checked(frames, "frames"), checked(condition, "condition"))
    check("drift_correction", strength)
    if not 0 <= known < len(frames):
        raise UserError(f"known must be from 0 to {len(frames) - 1} with {len(frames)} frames; {known} is not")
    if strength == 0:
        return frames
    times = [known + index for index in spread(len(frames) - known, _SAMPLES)]
    changes = _track(condition[-1], [frames[time] for time in times])
    if len(changes) < len(times):
        log.info("no drift correction: the picture cannot be followed to frame %d", times[len(changes)])
        return frames
    tones = _Tones.of(condition[-1])
    drift = _Drift.fit(np.array(times), np.array(changes), _trend(condition))
    growth = strength * drift.growth_share(tones)
    if max(tones.size(drift.step), growth * drift.largest(tones)) < NOTHING:
        return frames
    corrected = frames.clone()

    def correct(time: int) -> None:
        change = drift.step + growth * drift.growth(time)
        change = change * min(1.0, MOST / tones.size(change))
        if device.type == "cpu":
            corrected[time] = _without(frames[time], change)
        else:
            corrected[time] = _without_by_torch(frames[time].to(device), change)

    with ThreadPoolExecutor(min(torch.get_num_threads(), _AT_ONCE)) as threads:
        for done, _ in enumerate(threads.map(correct, range(known, len(frames))), known + 1):
            tell_detail(f"{done} of {len(frames)} frames")
    return corrected


# A tone change is 10 numbers: for each of R, G, B an offset, a gain and a curve, and a saturation for all.
# It is the difference of two pictures as a function of their mean, which favours neither: noise in both, fitted as if
# it were in one, would look like a loss of contrast, and add up from frame to frame.


def _basis(rgb: Array) -> Array:
    """Colours [n, 3] -> [n, 3, 10]: what each number of a tone change adds to each channel."""
    basis = np.zeros((len(rgb), 3, 10))
    level = rgb - 0.5
    for channel in range(3):
        basis[:, channel, channel] = 1
        basis[:, channel, 3 + channel] = level[:, channel]
        basis[:, channel, 6 + channel] = level[:, channel] ** 2
    basis[:, :, 9] = rgb - luma(rgb)[:, None]
    return basis


@dataclass(frozen=True)
class _View:
    """A frame for the flow, and without its detail for the colours: what the flow misses by a pixel then weighs little,
    and warping costs no contrast."""

    sharp: MeasuredFrame
    soft: Array  # RGB float32 [h, w, 3] in [0, 1]

    @classmethod
    def of(cls, frame: Tensor) -> _View:
        picture = MeasuredFrame.of(frame)
        return cls(picture, opencv().GaussianBlur(picture.rgb, (0, 0), _BLUR))


def _change(first: _View, second: _View) -> tuple[Array, float]:
    """The tone change from one picture to another [10], and the share of the picture that could be followed."""
    cv2 = opencv()
    field = flow(first.sharp, second.sharp)
    back, inside = follow(flow(second.sharp, first.sharp), field)
    same = inside & (np.hypot(*(field + back).transpose(2, 0, 1)) < 1)  # there and back again
    arrived, _ = follow(second.soft, field)
    difference, middle = arrived - first.soft, (arrived + first.soft) / 2
    darkest, brightest = np.minimum(arrived, first.soft).min(axis=-1), np.maximum(arrived, first.soft).max(axis=-1)
    told = same & (darkest > 0.01) & (brightest < 0.99)  # a channel at its limit hides what changed
    valid = cv2.erode(told.astype(np.uint8), np.ones((9, 9), np.uint8))[::4, ::4] > 0
    share = float(same.mean())
    if valid.sum() < 64:
        return np.zeros(10), 0.0
    colours, target = middle[::4, ::4][valid], difference[::4, ::4][valid].astype(float)
    basis = _basis(colours)
    weights: Array = np.ones(len(colours))
    for _ in range(4):  # what changes by itself, as a face that turns to the light, drops out
        weighted = basis * weights[:, None, None]
        normal = np.einsum("ncp,ncq->pq", weighted, basis) / weights.sum() + _RIDGE * np.eye(10)
        change = np.linalg.solve(normal, np.einsum("ncp,nc->p", weighted, target) / weights.sum())
        weights = _trust(np.linalg.norm(target - basis @ change, axis=1))
    return change, share


def _track(start: Tensor, frames: Iterable[Tensor]) -> list[Array]:
    """The tone change from `start` to each frame, through as few references as the motion allows; ends at a cut."""
    changes: list[Array] = []
    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as threads:
        reference, *pictures = threads.map(_View.of, [start, *frames])
        last = reference
        before: Array = np.zeros(10)
        total = before
        while len(changes) < len(pictures):
            some = pictures[len(changes) :][:count]
            for picture, (change, share) in zip(some, threads.map(partial(_change, reference), some), strict=True):
                if share < _KEEP and last is not reference:
                    reference, before = last, total
                    break  # what comes is measured again, from there
                if share < _LOST:
                    return changes
                last, total = picture, before + change
                changes.append(total)
    return changes


def _trust(errors: Array) -> Array:
    """Weights of measurements by their errors: full where small, none beyond a few times the usual (Tukey)."""
    weights: Array = np.clip(1 - (errors / (4.7 * np.median(errors) + 1e-4)) ** 2, 0, None) ** 2 + 1e-9
    return weights


def _least_squares(design: Array, changes: Array, weights: Array) -> Array:
    """Coefficients [n, 10] of the curves `design` [t, n]; a little ridge, since few frames do not tell them apart."""
    weighted = design * weights[:, None]
    solution: Array = np.linalg.solve(weighted.T @ design + 1e-4 * np.eye(design.shape[1]), weighted.T @ changes)
    return solution


def _trend(condition: Tensor) -> Array:
    """The tone change per frame before the seam [10]; zeros when too few frames or a cut show none."""
    if len(condition) < _TREND:
        return np.zeros(10)
    times = [len(condition) - 1 - index for index in spread(len(condition), 5)]
    changes = _track(condition[-1], [condition[time] for time in times[1:]])  # back in time
    if len(changes) < len(times) - 1:
        return np.zeros(10)
    ages = np.array([times[0] - time for time in times[1:]], float)
    rate: Array = -(ages @ np.array(changes)) / (ages @ ages)
    return rate


@dataclass(frozen=True)
class _Tones:
    """How much a tone change does to a picture: `weights` [10, 10] is a scalar product of tone changes."""

    weights: Array

    @classmethod
    def of(cls, frame: Tensor) -> _Tones:
        basis = _basis(_View.of(frame).soft[::8, ::8].reshape(-1, 3)).reshape(-1, 10)
        return cls(basis.T @ basis / len(basis))

    def product(self, one: Array, other: Array) -> float:
        product: float = (one @ self.weights @ other).item()
        return product

    def size(self, change: Array) -> float:
        """Root mean square of what it does, in shares of the range; never quite 0."""
        return math.sqrt(max(self.product(change, change), 1e-18))


@dataclass(frozen=True)
class _Drift:
    """The tone change over a clip: a step at the seam and what grows after it."""

    times: Array
    step: Array  # [10]
    coefficients: Array  # [3, 10] of the curves of growth
    erratic: Array  # [n, 10] what the curves do not follow
    trend: Array  # [10] per frame, before the seam

    @classmethod
    def fit(cls, times: Array, changes: Array, trend: Array) -> _Drift:
        curves, believed, step = cls._curves(times, times), np.ones(len(times)), changes[0]
        if len(times) > 2 * _FLASH:
            step = step - (changes[1] - changes[0]) / (times[1] - times[0])  # it has grown for one frame already
            believed[0] = 20.0  # no step is to be left at the seam, or made there
            beyond = (changes[0] - changes[_FLASH:].mean(axis=0)) @ changes[0]
            if beyond > 0.5 * (changes[0] @ changes[0]) > 0.5 * 0.01**2:
                step, believed[:_FLASH] = np.zeros(10), 0  # a flash: soon it is as it was
        coefficients = _least_squares(curves, changes - step, believed)
        for _ in range(5):
            error = np.linalg.norm(changes - step - curves @ coefficients, axis=1)
            coefficients = _least_squares(curves, changes - step, believed * _trust(error))
        return cls(times, step, coefficients, changes - step - curves @ coefficients, trend)

    @staticmethod
    def _curves(times: Array, at: Array) -> Array:
        """Steady, speeding up, and soon over; all 0 in the last frame before the seam."""
        share = (at - times[0] + 1) / (times[-1] - times[0] + 1)
        return np.stack([share, share**2, 1 - np.exp(-8 * share)], axis=-1)

    def growth(self, time: float) -> Array:
        grown: Array = self._curves(self.times, np.array(time)) @ self.coefficients
        return grown

    def largest(self, tones: _Tones) -> float:
        return max(tones.size(self.growth(time)) for time in self.times)

    def growth_share(self, tones: _Tones) -> float:
        """How surely the growth is drift, from 0 (it looks like light) to 1."""
        size, end = self.largest(tones), self.growth(self.times[-1])
        going_on = self.trend * (self.times[-1] - self.times[0] + 1)
        expected = tones.product(going_on, end) / tones.size(end) ** 2
        erratic = math.sqrt(np.mean([tones.size(error) ** 2 for error in self.erratic])) / max(size, 0.01)
        return min(
            _falling(size, PLAUSIBLE, IMPLAUSIBLE),
            _falling(expected, UNEXPECTED, EXPECTED),
            _falling(erratic, SMOOTH, ERRATIC),
        )


def _falling(value: float, full: float, none: float) -> float:
    """1 up to `full`, 0 from `none`, in between straight down."""
    return float(np.clip((none - value) / (none - full), 0, 1))


def _powers(change: Array) -> tuple[Array, Array, Array]:
    """A tone change as a polynomial in powers of RGB itself: a matrix [3, 3], a constant [3] and factors of squares."""
    offset, gain, curve, saturation = change[:3], change[3:6], change[6:9], change[9]
    return np.diag(gain - curve) + saturation * (np.eye(3) - LUMA), offset - gain / 2 + curve / 4, curve


def _without(frame: Tensor, change: Array) -> Tensor:
    """A frame [H, W, 3] in [-1, 1] before a tone change; only what that pushes out of the range is clamped."""
    cv2 = opencv()
    linear, constant, curve = _powers(change)
    affine, square = np.column_stack([linear, constant]), np.diag(curve)  # OpenCV multiplies pixels by a matrix at once

    def added(rgb: Array) -> Array:
        total: Array = cv2.transform(rgb, affine) + cv2.transform(rgb * rgb, square)
        return total

    pixels: Array = frame.detach().float().cpu().numpy()
    rgb = (pixels + 1) / 2
    moved = pixels - 2 * added(rgb - added(rgb) / 2)  # the change belongs to the mean of before and after
    kept = np.minimum(np.maximum(moved, np.minimum(pixels, -1)), np.maximum(pixels, 1))
    return torch.from_numpy(kept).to(frame)


def _without_by_torch(frame: Tensor, change: Array) -> Tensor:
    """The same where the frame is."""
    linear, constant, curve = (torch.from_numpy(part).to(frame.device, torch.float32) for part in _powers(change))

    def added(rgb: Tensor) -> Tensor:
        # no matrix product, which a GPU may be told to round to ten bits
        return (rgb[..., None, :] * linear).sum(-1) + constant + rgb * rgb * curve

    pixels = frame.float()
    rgb = (pixels + 1) / 2
    moved = pixels - 2 * added(rgb - added(rgb) / 2)
    return moved.maximum(pixels.clamp(max=-1)).minimum(pixels.clamp(min=1)).to(frame.dtype)
