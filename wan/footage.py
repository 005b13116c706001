"""What can be continued: a video file, and the picture of any footage that a clip can hold on to."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from wan import media
from wan.types import Footage, Frame, UInt8Array, from_uint8


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

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """Frames spread over the file, or over its last `seconds`, as `Footage.samples`."""
        if seconds is None:
            return media.sample_frames(self.path, count, reader=self.reader, until=self.until)
        return media.read_tail(self.path, count, Fraction(max(count - 1, 1)) / Fraction(seconds), self.until)

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The file's last frames at `fps`, whatever its own rate is, as `Footage.tail`."""
        return from_uint8(media.read_tail(self.path, count, fps, self.until))


def choose_anchor(footage: Footage) -> Frame:
    """The sharpest frame from between three seconds and one second before the end, or the first of shorter footage."""
    frames = footage.samples(13, 3.0)
    early = frames[: max(len(frames) - 4, 1)]
    return Image.fromarray(max(early, key=_sharpness))


def _sharpness(frame: UInt8Array) -> float:
    """The mean squared step between neighbouring pixels."""
    luma = frame.astype(np.float32).mean(axis=-1)
    return float(np.square(np.diff(luma, axis=0)).mean() + np.square(np.diff(luma, axis=1)).mean())
