"""A source video and the clips that go on from it -> one video with the source's own frames and sound."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from wan.errors import UserError
from wan.media.colour import deinterlace, to_rgb, upright_size
from wan.media.image import cover
from wan.media.reading import FIELDS, find_ending, first_frame
from wan.media.sound import Hearing, Sound, SoundError, choose_track, listen
from wan.media.source import Picture, Pictures, Source, exact_rate, inspect, say_once
from wan.media.writing import write_video
from wan.timeline import Part, Timeline, shared_rate

_FRAME = 0.15  # seconds; a last picture that stays no longer is one of a film, and the clip takes over at its own pace
_LOOSE_END = 1.0  # seconds of sound after the pictures that are an untidy end; more of it goes with a held picture
_AUDIBLE = 0.3


def assemble(
    source: str | os.PathLike[str],
    clips: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    drops: Sequence[int],
    metadata: Mapping[str, Any] | None = None,
    until: float | None = None,
) -> int:
    """Encode the source's own pictures, then the clips without their first `drops` frames; returns the frame count.

    The rate is `shared_rate`; nothing changes speed, and every picture of the source is shown as long as it was. The
    last one is held for as long as the file says; a still, one of a recording that shows a picture when something
    changes, and one of which the file says nothing are held until the sound ends. The source is scaled to cover the
    clips' size and cropped around its centre; its sound (`find_sound`) is kept where its pictures are. With `until` the
    source ends at that moment. One picture is in memory at a time. Raises UserError.
    """
    begin, following = inspect(source, until), [inspect(clip) for clip in clips]
    sizes = [upright_size(first_frame(clip), clip) for clip in following]
    for clip, size in zip(following, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(f"cannot join {clip.path!r}: its size differs from that of the first clip; make it again")
    whole = find_ending(begin, math.inf)
    first = first_frame(begin).time
    start = begin.start if first is None else first
    last = start - whole.clock[0]
    track = choose_track(begin)
    hearing = listen(track) if track is not None else None
    part = _part(begin, [Fraction(time - whole.clock[0]).limit_denominator(10**6) for time in whole.clock])
    is_open = not whole.stay or part.frames == 1 or part.moments is not None
    stay = _stay(begin, last, whole.stay, hearing if is_open else None)
    parts = [replace(part, stay=Fraction(stay).limit_denominator(10**6))]
    for clip, drop in zip(following, drops, strict=True):
        parts.append(Part(sum(1 for _ in Pictures(clip)), clip.fps, drop))
    timeline = Timeline(parts, shared_rate(parts[0].fps, parts[1].fps))
    end = start + float(timeline.starts[1])
    sound = None
    if track is not None and hearing is not None and hearing.start < end and hearing.end > start:
        sound = Sound(track, hearing, start, end)
        if until is None and hearing.end - end > _AUDIBLE:
            say_once(
                begin.path, f"the last {hearing.end - end:.1f} s of its sound, after its last picture, are left out"
            )

    def write(sound: Sound | None) -> int:
        files = [(begin, whole.pictures), *((clip, Pictures(clip)) for clip in following)]
        return write_video(path, _shown(timeline, files, sizes[0]), timeline.rate, metadata=metadata, sound=sound)

    try:
        return write(sound)
    except SoundError as error:
        say_once(
            begin.path, f"its sound is left out: it does not fit into an mp4 ({error}); convert it to AAC to keep it"
        )
        return write(None)


def _stay(source: Source, last: float, stated: float, hearing: Hearing | None) -> float:
    """For how long the last picture is held, 0 for no longer than any other.

    `hearing` is of a sound that may say so where the file says less.
    """
    most = math.inf if source.until is None else max(source.until - last, 0.0)
    heard = hearing.end - last if hearing is not None and hearing.start < last + max(stated, _FRAME) else 0.0
    if min(heard, most) > stated + _LOOSE_END:
        say_once(source.path, f"its last picture is held for {heard:.1f} s, as long as its sound goes on")
        return min(heard, most)
    return min(stated, most) if min(stated, most) > _FRAME else 0.0


def _part(source: Source, moments: Sequence[Fraction]) -> Part:
    """The source on a timeline: at an even rate if its pictures are where that rate puts them, to half a frame."""
    span = moments[-1] or 1 / source.fps
    for rate in (source.fps, exact_rate((len(moments) - 1) / span) if len(moments) > 1 else source.fps):
        if all(abs(moment * rate - number) < Fraction(1, 2) for number, moment in enumerate(moments)):
            return Part(len(moments), rate)
    # Uneven, as a phone's or a recording of a screen: the rate of its quick stretches, so that they lose nothing.
    steps = sorted(after - here for here, after in zip(moments, moments[1:], strict=False))
    quick = round(1 / steps[len(steps) // 20])
    return Part(len(moments), Fraction(min(max(quick, 1), 120)), 0, moments)


def _shown(timeline: Timeline, files: Sequence[tuple[Source, Pictures]], size: tuple[int, int]) -> Iterator[Picture]:
    """The picture for each output frame; one that is shown again is not decoded or converted again."""
    here = (-1, -1)
    for index, wanted in timeline.frames():
        if index != here[0]:
            source, pictures = files[index]
            frames, here, recent = iter(pictures), (index, -1), deque[VideoFrame](maxlen=FIELDS)
        if here[1] < wanted:
            while here[1] < wanted:
                recent.extend(islice(frames, 1))  # damage may cost a picture in one pass only: the last one stays then
                here = (index, here[1] + 1)
            picture = to_rgb(deinterlace(recent), source)
            if picture.shape[1::-1] != size:
                picture = np.asarray(cover(Image.fromarray(picture), *size))
        yield picture
