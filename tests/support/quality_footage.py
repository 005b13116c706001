"""Footage whose motion and light are known: a camera over a picture, and shapes that move by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

Path = Callable[[float], tuple[float, float]]  # frame number -> offset in pixels


def still(_: float) -> tuple[float, float]:
    return 0.0, 0.0


def pan(vx: float, vy: float = 0.0) -> Path:
    """Goes away for good."""
    return lambda t: (vx * t, vy * t)


def to_and_fro(reach: float, period: float) -> Path:
    """Comes back after `period` frames."""
    return lambda t: (reach * math.sin(2 * math.pi * t / period), 0.0)


class Scene:
    """`camera` moves the view over the picture, `shapes` moves three discs against the picture."""

    def __init__(
        self, seed: int, camera: Path = still, shapes: Path | None = None, size: tuple[int, int] = (192, 108)
    ) -> None:
        random = np.random.default_rng(seed)
        self.camera, self.shapes, (self.width, self.height) = camera, shapes, size
        self.picture = _natural(random, 512)
        self.discs = [
            (random.uniform(0.15, 0.85, 2) * size, size[1] * random.uniform(0.12, 0.2), _natural(random, 256))
            for _ in range(3)
        ]

    def at(self, time: float, zoom: float = 1.0) -> np.ndarray[Any, Any]:
        """The view at a frame number, which may lie between frames: float32 [H, W, 3] in [0, 1]."""
        dx, dy = self.camera(time)
        view = _look_up(self.picture, dx, dy, self.width, self.height, zoom)
        if self.shapes:
            sx, sy = self.shapes(time)
            y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
            for (cx, cy), radius, texture in self.discs:
                cx, cy = (cx + sx - dx) % self.width, (cy + sy - dy) % self.height
                alpha = np.clip(radius - np.hypot(x - cx, y - cy), 0, 1)[..., None]
                view = view * (1 - alpha) + alpha * _look_up(texture, -cx, -cy, self.width, self.height, 1.0)
        return view

    def clip(self, times: Iterable[float]) -> Tensor:
        """Frames at these times, float32 [T, H, W, 3] in [-1, 1]."""
        return to_frames([self.at(time) for time in times])


def to_frames(pictures: Iterable[np.ndarray[Any, Any]]) -> Tensor:
    """RGB in [0, 1] -> float32 [T, H, W, 3] in [-1, 1], without rounding to levels."""
    return torch.from_numpy(np.clip(np.stack(list(pictures)), 0, 1).astype(np.float32)) * 2 - 1


def unit(frames: Tensor) -> np.ndarray[Any, Any]:
    """Frames in [-1, 1] -> RGB in [0, 1]."""
    return (frames.numpy() + 1) / 2


def lab(frames: Tensor) -> np.ndarray[Any, Any]:
    """Lab of every pixel, float32 [T, H, W, 3]."""
    return np.stack([cv2.cvtColor(picture, cv2.COLOR_RGB2LAB) for picture in unit(frames)])


def _natural(random: np.random.Generator, side: int) -> np.ndarray[Any, Any]:
    """A picture with a 1/f spectrum and muted colours that repeats at its borders, with two pixels more all around."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    planes = []
    for amount in (0.17, 0.05, 0.05):  # luma and two opponent colours
        spectrum = np.exp(2j * np.pi * random.random(frequency.shape)) / frequency
        plane = np.fft.irfft2(spectrum, (side, side))
        planes.append(amount * plane / plane.std())
    y, u, v = planes
    mean = 0.45 + random.uniform(-0.06, 0.06, 3)
    rgb = np.clip(np.stack([y + u, y - 0.4 * u - 0.2 * v, y + v], axis=-1) + mean, 0.02, 0.98).astype(np.float32)
    return cv2.copyMakeBorder(rgb, 2, 2, 2, 2, cv2.BORDER_WRAP)


def _look_up(
    picture: np.ndarray[Any, Any], dx: float, dy: float, width: int, height: int, zoom: float
) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    side = picture.shape[0] - 4
    x = np.mod((x - width / 2) / zoom + width / 2 + dx, side).astype(np.float32) + 2
    y = np.mod((y - height / 2) / zoom + height / 2 + dy, side).astype(np.float32) + 2
    return cv2.remap(picture, x, y, cv2.INTER_CUBIC)
