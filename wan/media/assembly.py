"""A source video and the clips that go on from it -> one video with the source's own frames and sound."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from wan.errors import UserError
from wan.media.colour import deinterlace, to_rgb
from wan.media.sound import Sound
from wan.media.source import Picture, Pictures, Source, inspect
from wan.media.writing import write_video
from wan.timeline import Part, Timeline, shared_rate


def assemble(
    source: str | os.PathLike[str],
    clips: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    drops: Sequence[int],
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Encode the source's own pictures, then the clips without their first `drops` frames; returns the frame count.

    The rate is `shared_rate`; nothing changes speed, and every picture of the source is shown as long as it was. The
    source is scaled to cover the clips' size and cropped around its centre; its sound is kept where its pictures are.
    One picture is in memory at a time. Raises UserError.
    """
    opened = [inspect(clip) for clip in clips]
    first = next(_pictures(opened[0]))
    size = first.shape[1], first.shape[0]
    begin = inspect(source)
    timeline, start = _timeline(begin, opened, drops)

    def shown() -> Iterator[Picture]:
        streams = [_fitted(begin, size), *(_pictures(clip) for clip in opened)]
        here, numbers, picture = -1, iter(()), None  # type: int, Iterator[tuple[int, Picture]], Picture | None
        number = -1
        for part, wanted in timeline.frames():
            if part != here:
                here, numbers, number = part, iter(enumerate(streams[part])), -1
            while number < wanted:
                # a damaged source may lose a picture in one pass only: the one before stays
                number, picture = next(numbers, (wanted, picture))
            assert picture is not None
            if picture.shape != first.shape:
                raise UserError(f"cannot join {opened[part - 1].path!r}: its size differs from that of the first clip")
            yield picture

    sound = None
    if begin.has_audio:
        sound = Sound(begin.path, start, start + float(timeline.ends[0] / timeline.rate))
    return write_video(path, shown(), timeline.rate, metadata=metadata, sound=sound)


def _timeline(source: Source, clips: Sequence[Source], drops: Sequence[int]) -> tuple[Timeline, float]:
    """Where each picture goes, and when the source's first one appears on the source's clock."""
    times = [frame.time for frame in Pictures(source)]
    if not times or None in times or any(b <= a for a, b in zip(times, times[1:], strict=False)):
        moments = None  # raw streams have no clock, wrapped ones no order
    else:
        moments = [Fraction(time - times[0]).limit_denominator(10**6) for time in times]
    parts = [Part(max(len(times), 1), source.fps, 0, moments)]
    for clip, drop in zip(clips, drops, strict=True):
        parts.append(Part(sum(1 for _ in Pictures(clip)), clip.fps, drop))
    start = float(times[0]) if moments is not None else float(source.start)
    return Timeline(parts, shared_rate(source.fps, clips[0].fps)), start


def _pictures(source: Source) -> Iterator[Picture]:
    for frame in Pictures(source):
        yield to_rgb(frame, source)


def _fitted(source: Source, size: tuple[int, int]) -> Iterator[Picture]:
    """The pictures of a source, scaled to cover a size and cropped around the centre."""
    width, height = size
    for frame in Pictures(source):
        image = Image.fromarray(to_rgb(deinterlace([frame]), source))
        if image.size != size:
            scale = max(width / image.width, height / image.height)
            wide, high = width / scale, height / scale
            left, top = (image.width - wide) / 2, (image.height - high) / 2
            box = (left, top, left + wide, top + high)
            image = image.resize(size, Image.Resampling.LANCZOS, box=box)
        yield np.asarray(image)
