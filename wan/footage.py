"""What can be continued: a video file, frames in memory, and the picture of either that a clip can hold on to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from wan import media
from wan.errors import UserError
from wan.types import Footage, Frame, UInt8Array, frame_indices, from_uint8


class VideoFile:
    """A video file as `Footage`. Opening it reads its last frame; raises UserError when it has none.

    With `until`, in seconds as a player counts, the file is taken to end at that moment.
    """

    def __init__(self, path: str | Path, reader: str = "auto", until: float | None = None) -> None:
        self.path = Path(path)
        self.reader = reader
        self.until = until
        image = media.read_last_frame(self.path, until)
        if reader == "decord" and until is None:  # which knows no more than the end
            media.check_last_frame_with_decord(self.path, image)
        self.last: Frame = image
        self.motion: Tensor | None = None  # the latents of a file are not known
        self.colours: Tensor | None = None  # nor is a first clip

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """Frames spread over the file, or over its last `seconds`, as `Footage.samples`."""
        if seconds is None:
            return media.sample_frames(self.path, count, reader=self.reader, until=self.until)
        return media.read_tail(self.path, count, Fraction(max(count - 1, 1)) / Fraction(seconds), self.until)

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The file's last frames at `fps`, whatever its own rate is, as `Footage.tail`."""
        return from_uint8(media.read_tail(self.path, count, fps, self.until))


class FramesInMemory:
    """Frames uint8 [T, H, W, 3] RGB, or a list of pictures of one size, as `Footage` at `fps` frames per second.

    Raises UserError for what are no such frames.
    """

    def __init__(self, frames: UInt8Array | Sequence[Image.Image], fps: Fraction | float) -> None:
        pictures = [np.asarray(one.convert("RGB")) if isinstance(one, Image.Image) else one for one in frames]
        shapes = {np.shape(picture) for picture in pictures}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[2] != 3:
            raise UserError("frames must be uint8 [T, H, W, 3] or pictures of one size, at least one")
        self.frames = np.stack(pictures)
        if self.frames.dtype != np.uint8:
            raise UserError(f"frames must be uint8 from 0 to 255, these are {self.frames.dtype}")
        if not fps > 0:
            raise UserError(f"`fps` must be a positive number, {fps} is not")
        self.fps = Fraction(fps).limit_denominator(10**6)
        self.last: Frame = Image.fromarray(self.frames[-1])
        self.motion: Tensor | None = None  # the latents of frames are not known
        self.colours: Tensor | None = None  # nor is a first clip

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """Frames spread over them, or over their last `seconds`, as `Footage.samples`."""
        if seconds is None:
            return self.frames[frame_indices(len(self.frames), count)]
        return self._last(count, Fraction(max(count - 1, 1)) / Fraction(seconds))

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The last frames at `fps`, whatever their own rate is, as `Footage.tail`."""
        return from_uint8(self._last(count, fps))

    def _last(self, count: int, fps: Fraction) -> UInt8Array:
        """Up to `count` frames at a rate: what is on screen 1/fps seconds before the last one appears, and so on."""
        numbers = [len(self.frames) - 1 - math.ceil(step * self.fps / fps) for step in range(count - 1, -1, -1)]
        return self.frames[[number for number in numbers if number >= 0]]


class ChangedEnd:
    """Footage whose last frames were changed since it was made: float32 [n, H, W, 3] in [-1, 1], all that is asked for.

    What a captioner sees of it is as it was, and its latents are not known.
    """

    def __init__(self, footage: Footage, frames: Tensor) -> None:
        self.frames = frames
        self.samples, self.colours = footage.samples, footage.colours
        self.last: Frame = frames[-1].permute(2, 0, 1).contiguous()
        self.motion: Tensor | None = None

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The last frames, up to `count` and no more than there are."""
        return self.frames[-count:].clone()


def choose_anchor(footage: Footage) -> Frame:
    """The sharpest frame from between three seconds and one second before the end, or the first of shorter footage."""
    frames = footage.samples(13, 3.0)
    early = frames[: max(len(frames) - 4, 1)]
    return Image.fromarray(max(early, key=_sharpness))


def _sharpness(frame: UInt8Array) -> float:
    """The mean squared step between neighbouring pixels."""
    luma = frame.astype(np.float32).mean(axis=-1)
    return float(np.square(np.diff(luma, axis=0)).mean() + np.square(np.diff(luma, axis=1)).mean())
