"""A video file as something that can be continued."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from torch import Tensor

from wan.media.decord_reader import check_last_frame_with_decord
from wan.media.reading import read_last_frame, read_tail, sample_frames
from wan.types import Frame, UInt8Array, from_uint8


class VideoFile:
    """A video file as `Footage`. Opening it reads its last frame; raises UserError when it has none."""

    def __init__(self, path: str | Path, reader: str = "auto") -> None:
        self.path = Path(path)
        self.reader = reader
        image = read_last_frame(self.path)
        if reader == "decord":
            check_last_frame_with_decord(self.path, image)
        self.last: Frame = image
        self.motion: Tensor | None = None  # the latents of a file are not known

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """Frames spread over the file, or over its last `seconds`, as `Footage.samples`."""
        if seconds is None:
            return sample_frames(self.path, count, reader=self.reader)
        return read_tail(self.path, count, Fraction(max(count - 1, 1)) / Fraction(seconds))

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The file's last frames at `fps`, whatever its own rate is, as `Footage.tail`."""
        return from_uint8(read_tail(self.path, count, fps))
