"""What every measurement starts from: small pictures, their colours, and the flow between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wan.errors import UserError

Array: TypeAlias = npt.NDArray[Any]

LONG_SIDE = 416  # pixels; flow is counted in pixels of a picture with this long side, whatever the clip's size
LUMA: Array = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
_SHORTEST = 64  # pixels of a side below which the flow has too few scales to work with


def opencv() -> Any:
    """OpenCV, which only measuring needs. Raises UserError."""
    try:
        import cv2
    except ImportError as error:
        raise UserError("measuring clips needs OpenCV: pip install opencv-python-headless") from error
    return cv2


@dataclass(frozen=True)
class MeasuredFrame:
    """A frame as it is measured: `rgb` float32 [h, w, 3] in [0, 1], the long side at most 416 pixels."""

    rgb: Array

    @classmethod
    def of(cls, frame: Tensor) -> MeasuredFrame:
        """A frame float32 [H, W, 3] in [-1, 1] -> its picture; area averages when it shrinks."""
        pixels: Array = frame.detach().float().cpu().numpy()
        height, width = pixels.shape[:2]
        scale = min(1.0, LONG_SIDE / max(height, width))
        size = (max(round(width * scale), _SHORTEST), max(round(height * scale), _SHORTEST))
        if size != (width, height):
            cv2 = opencv()
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        return cls(unit_range(pixels))

    @cached_property
    def lab(self) -> Array:
        """CIE Lab float32 [h, w, 3], L in [0, 100]."""
        cv2 = opencv()
        lab: Array = cv2.cvtColor(self.rgb, cv2.COLOR_RGB2LAB)
        return lab

    @cached_property
    def grey(self) -> Array:
        """Luma uint8 [h, w]."""
        levels: Array = np.rint(luma(self.rgb) * 255).astype(np.uint8)
        return levels


def flow(first: MeasuredFrame, second: MeasuredFrame) -> Array:
    """Where each point of `first` went in `second`: float32 [h, w, 2] in pixels of these pictures."""
    cv2 = opencv()
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    field: Array = search.calc(first.grey, second.grey, None)
    return field


def speeds(field: Array) -> Array:
    """Length of each flow vector [h, w], in pixels of a picture whose long side is 416."""
    lengths: Array = np.hypot(field[..., 0], field[..., 1]) * (LONG_SIDE / max(field.shape[:2]))
    return lengths


def top_speed(field: Array) -> float:
    """Mean speed of the fastest tenth of the picture: a small subject before a still background counts, too."""
    lengths = speeds(field).ravel()
    return float(np.partition(lengths, -(lengths.size // 10))[-(lengths.size // 10) :].mean())


def follow(picture: Array, field: Array) -> tuple[Array, Array]:
    """`picture` [h, w, C] pulled back along the flow, and where that is inside of it (bool [h, w])."""
    cv2 = opencv()
    height, width = field.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x + field[..., 0], y + field[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return cv2.remap(picture, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE), inside


def luma(rgb: Array) -> Array:
    """Gamma-coded RGB [..., 3] -> BT.709 luma [...]."""
    weighted: Array = rgb @ LUMA
    return weighted


def unit_range(pixels: Array) -> Array:
    """Pixels in [-1, 1] -> float32 in [0, 1], NaN as mid grey."""
    levels: Array = np.nan_to_num(pixels * np.float32(0.5) + np.float32(0.5), nan=0.5)
    return np.clip(levels, 0, 1, out=levels)


def checked(frames: Tensor, what: str) -> Tensor:
    """The frames, when they are [T, H, W, 3] floats with at least one frame. Raises UserError."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.is_floating_point() or 0 in frames.shape:
        shape = f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        raise UserError(f"{what} must be float frames [T, H, W, 3] in [-1, 1], not {shape}")
    return frames


def same_size(one: Tensor, other: Tensor) -> None:
    """Refuse frames [T, H, W, 3] of two sizes with a UserError."""
    if one.shape[1:] != other.shape[1:]:
        sizes = " and ".join(f"{part.shape[2]}x{part.shape[1]}" for part in (one, other))
        raise UserError(f"frames that are compared must have one size, not {sizes}; resize one of them first")


def spread(count: int, most: int) -> Sequence[int]:
    """At most `most` indices out of `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return range(count)
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]
