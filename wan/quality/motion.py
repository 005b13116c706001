"""The motion at the end of a clip as facts for a prompt: what goes where, and what the camera does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor

from wan.errors import UserError
from wan.quality.vision import LONG_SIDE, Array, MeasuredFrame, checked, flow, opencv, spread, top_speed

_STILL = 0.3  # pixels per frame of a picture 416 wide that count as no motion
_PAIRS = 12  # of neighbouring frames that are looked at


@dataclass(frozen=True)
class Motion:
    """Speeds are fractions of the picture's width per second, x to the right and y down.

    `moving`: share of the picture that moves against the background, 0 when it is under a hundredth. `direction`,
    `speed`: of its mean motion; 0 when that has no direction. `pan`: the way the camera turns or travels (the
    background goes the other way); `zoom`: growth of the picture per second, positive when the camera comes nearer.
    `pixels`: mean speed of the fastest tenth, background included, in pixels per frame of a picture 416 wide.
    """

    direction: tuple[float, float]
    speed: float
    moving: float
    pan: tuple[float, float]
    zoom: float
    pixels: float

    @property
    def still(self) -> bool:
        """Nothing moves: neither the camera nor anything in the picture."""
        return self.pixels < _STILL

    def sentence(self) -> str:
        """The facts in words for a prompt."""
        if self.still:
            return "almost nothing moves; the camera is still"
        subject = "nothing moves by itself" if not self.moving else "what moves goes in different directions"
        if self.speed:
            part = "a small part" if self.moving < 0.05 else f"about {_percent(self.moving)} %"
            subject = (
                f"the main motion goes {_compass(self.direction)} at about {_percent(self.speed)} % of the width "
                f"per second, in {part} of the picture"
            )
        moves = []
        if any(self.pan):
            moves.append(
                f"moves {_compass(self.pan)} at about {_percent(math.hypot(*self.pan))} % of the width per second"
            )
        if self.zoom:
            moves.append("comes nearer" if self.zoom > 0 else "draws back")
        return f"{subject}; the camera {' and '.join(moves) or 'is still'}"


def measure_motion(frames: Tensor, fps: Fraction | float) -> Motion:
    """Motion in frames float32 [T, H, W, 3] in [-1, 1], all of one shot, best the last second or two of a clip.

    The background is what most of the picture's texture agrees on, so a subject that fills the picture counts as one.
    Raises UserError.
    """
    if not fps > 0:
        raise UserError(f"fps must be above 0; {fps} is not")
    count = len(checked(frames, "frames"))
    steps = [_step(MeasuredFrame.of(frames[i]), MeasuredFrame.of(frames[i + 1])) for i in spread(count - 1, _PAIRS)]
    width = frames.shape[2] / max(frames.shape[1:3]) * LONG_SIDE
    followed = [step for step in steps if step.followed]
    pixels = float(np.mean([step.pixels for step in steps])) if steps else 0.0
    if not followed:
        return Motion((0.0, 0.0), 0.0, 0.0, (0.0, 0.0), 0.0, pixels)
    camera = np.median([step.camera for step in followed], axis=0)
    growth = float(np.median([step.growth for step in followed]))
    moving = float(np.mean([step.moving for step in followed]))
    vectors = np.concatenate([step.vectors for step in followed])
    main = np.zeros(2)
    if moving >= 0.01:
        lengths = np.hypot(*vectors.T)
        faster = lengths / lengths.sum()  # flow tapers off at the edge of what moves
        mean = faster @ vectors
        if np.hypot(*mean) > 0.4 * (faster @ lengths):  # else to and fro, or apart
            main = mean
    per_second = float(fps) / width
    pan = -camera * per_second if np.hypot(*camera) >= _STILL else np.zeros(2)
    return Motion(
        direction=_unit(main),
        speed=float(np.hypot(*main)) * per_second,
        moving=moving if moving >= 0.01 else 0.0,
        pan=(float(pan[0]), float(pan[1])),
        zoom=growth * float(fps) if abs(growth) * LONG_SIDE / 2 >= _STILL else 0.0,
        pixels=pixels,
    )


@dataclass(frozen=True)
class _FrameMotion:
    """From one frame to the next, in pixels of a picture 416 wide; `vectors` [n, 2] of what moves by itself."""

    followed: bool
    camera: Array
    growth: float
    moving: float
    vectors: Array
    pixels: float


def _step(first: MeasuredFrame, second: MeasuredFrame) -> _FrameMotion:
    cv2 = opencv()
    field = flow(first, second)
    height, width = field.shape[:2]
    scale = LONG_SIDE / max(height, width)
    y, x = (side.ravel() for side in np.mgrid[4:height:8, 4:width:8])
    points, vectors = np.stack([x, y], axis=1).astype(np.float32) * scale, field[y, x] * scale
    # Flow means nothing where there is no texture.
    detail = cv2.blur(np.abs(cv2.Laplacian(first.grey, cv2.CV_32F)), (9, 9))[y, x]
    textured = detail > 1.0
    pixels = top_speed(field)
    if textured.sum() >= 16:
        known, moved = points[textured], points[textured] + vectors[textured]
        fit, agree = cv2.estimateAffinePartial2D(known, moved, method=cv2.RANSAC, ransacReprojThreshold=0.7)
        if fit is not None and agree.mean() > 0.3:
            residual = vectors - (points @ fit[:, :2].T + fit[:, 2] - points)
            centre = np.array([width, height]) * scale / 2
            camera = fit[:, :2] @ centre + fit[:, 2] - centre
            by_itself = textured & (np.hypot(*residual.T) > max(0.7, 0.25 * float(np.hypot(*camera))))
            growth = math.hypot(fit[0, 0], fit[1, 0]) - 1
            return _FrameMotion(True, camera, growth, float(by_itself.mean()), residual[by_itself], pixels)
    return _FrameMotion(False, np.zeros(2), 0.0, 0.0, np.zeros((0, 2)), pixels)


def _unit(vector: Array) -> tuple[float, float]:
    length = float(np.hypot(*vector))
    return (float(vector[0]) / length, float(vector[1]) / length) if length else (0.0, 0.0)


def _compass(vector: Sequence[float]) -> str:
    """The nearest of eight directions, in words."""
    names = (
        "right",
        "down to the right",
        "down",
        "down to the left",
        "left",
        "up to the left",
        "up",
        "up to the right",
    )
    return names[round(math.atan2(vector[1], vector[0]) / (math.pi / 4)) % 8]


def _percent(share: float) -> int:
    return max(1, round(share * 100))
