"""A source video and the clips that go on from it -> one video with the source's own frames and sound."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from wan.errors import UserError
from wan.files import say_once
from wan.media.colour import deinterlace, to_rgb, upright_size
from wan.media.reading import FIELDS, find_ending, first_frame
from wan.media.sound import Hearing, Sound, SoundError, SoundsInTurn, SoundTrack, choose_track, listen
from wan.media.source import Picture, Pictures, Source, exact_rate, inspect
from wan.media.writing import PIECE, join_videos, write_video
from wan.pictures import cover
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
    """The source's own pictures, then the clips without their first `drops` frames; returns the frame count.

    See `Assembly`. Raises UserError.
    """
    return Assembly(source, path, until=until).renew(clips, drops, metadata)


class Assembly:
    """A joined video that begins with its source and grows clip by clip; each picture is encoded once.

    The rate is `shared_rate`; nothing changes speed, and every picture of the source is shown as long as it was. The
    last one is held for as long as the file says; a still, one of a recording that shows a picture when something
    changes, and one of which the file says nothing are held until the sound ends. The source is scaled to cover the
    clips' size and cropped around its centre; its sound (`find_sound`) is kept where its pictures are. With `until` the
    source ends at that moment. The clips may lead `into` another video, of which the same holds, and whose first
    picture the last clip ends with. One picture is in memory at a time.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        until: float | None = None,
        into: str | os.PathLike[str] | None = None,
    ) -> None:
        self.source, self.path, self.until, self.into = source, path, until, into
        self._joined: list[tuple[str, int, int, int]] = []  # what is in the file after the source
        self._begin: _Begin | None = None
        self._end: _Begin | None = None  # what the clips lead into
        self._parts: list[Part] = []

    def renew(
        self,
        clips: Sequence[str | os.PathLike[str]],
        drops: Sequence[int],
        metadata: Mapping[str, Any] | None = None,
        *,
        complete: bool = False,
        to: str | os.PathLike[str] | None = None,
    ) -> int:
        """Write the video of the source and these clips; returns the frame count. Raises UserError.

        With `complete` they are all clips, and what they lead into follows. With `to` the file is written under that
        name, and the caller gives it its own before the next clip.

        What it was before stays as it is encoded, if the clips begin with those that were in it.
        """
        wanted = [_seen(clip, drop) for clip, drop in zip(clips, drops, strict=True)]
        into = self.into if complete else None
        if into is not None:
            wanted.append(_seen(into, 1))
        following = [inspect(clip) for clip in clips]
        sizes = [upright_size(first_frame(clip), clip) for clip in following]
        for clip, size in zip(following, sizes, strict=True):
            if size != sizes[0]:
                raise UserError(
                    f"cannot join {clip.path!r}: its size differs from that of the first clip; make it again"
                )
        if self._begin is None or wanted[: len(self._joined)] != self._joined or not os.path.exists(self.path):
            self._joined, self._end = [], None if self.into is None else _Begin.read(self.into, None)
            self._begin = _Begin.read(self.source, self.until)
            self._parts = [self._begin.part]
        begin, joined = self._begin, len(self._joined)
        for clip, drop in zip(following[joined:], drops[joined:], strict=True):
            self._parts.append(Part(sum(1 for _ in Pictures(clip)), clip.fps, drop))
        files = [(begin.source, begin.pictures), *((clip, Pictures(clip)) for clip in following)]
        if into is not None and self._end is not None:
            files.append((self._end.source, self._end.pictures))
            if len(self._parts) < len(files):
                # its first picture is the last clip's last
                self._parts.append(replace(self._end.part, drop=min(1, self._end.part.frames - 1)))
        fastest = max(following[0].fps, self._end.part.fps if self._end is not None else Fraction(0))
        timeline = Timeline(self._parts, shared_rate(begin.part.fps, fastest))
        new = range(joined + 1 if joined else 0, len(self._parts))
        home, name = os.path.split(os.fspath(self.path))
        pieces = [os.path.join(home, f".{name}.{index}{PIECE}") for index in new]
        try:
            for index, piece in zip(new, pieces, strict=True):
                shown = (frame for frame in timeline.frames() if frame[0] == index)
                write_video(piece, _shown(shown, files, sizes[0]), timeline.rate)
            parts = [*([os.fspath(self.path)] if joined else []), *pieces]
            count = self._join(parts, to or self.path, self._sound(timeline, into is not None), metadata)
        finally:
            for piece in pieces:
                with suppress(FileNotFoundError):
                    os.unlink(piece)
        self._joined = wanted
        return count

    def _sound(self, timeline: Timeline, complete: bool) -> Sound | None:
        """That of the source, and of what the clips lead into where that is there."""
        assert self._begin is not None
        first = self._begin.sound(float(timeline.starts[1]))
        if not complete or self._end is None:
            return first
        moment = timeline.starts[-1]
        skipped = float(self._end.part.moment(timeline.parts[-1].drop))
        second = self._end.sound(float(timeline.count / timeline.rate - moment), skipped)
        if second is None:
            return first
        return SoundsInTurn([*([] if first is None else [(0.0, first)]), (float(moment), second)])

    def _join(
        self,
        parts: Sequence[str],
        path: str | os.PathLike[str],
        sound: Sound | None,
        metadata: Mapping[str, Any] | None,
    ) -> int:
        drops = [0] * len(parts)
        try:
            return join_videos(parts, path, drops=drops, metadata=metadata, sound=sound)
        except SoundError as error:
            say_once(
                os.fspath(self.source),
                f"its sound is left out: it does not fit into an mp4 ({error}); convert it to AAC to keep it",
            )
            return join_videos(parts, path, drops=drops, metadata=metadata, sound=None)


def _seen(file: str | os.PathLike[str], drop: int) -> tuple[str, int, int, int]:
    """A file as it is now: another may come under the same name."""
    stat = os.stat(file)
    return os.fspath(file), drop, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class _Begin:
    """What is known of a source before the first clip is joined to it."""

    source: Source
    pictures: Pictures
    part: Part
    start: float  # of its first picture on the file's clock
    track: SoundTrack | None
    hearing: Hearing | None

    @classmethod
    def read(cls, file: str | os.PathLike[str], until: float | None) -> _Begin:
        source = inspect(file, until)
        whole = find_ending(source, math.inf)
        first = first_frame(source).time
        start = source.start if first is None else first
        last = start - whole.clock[0]
        track = choose_track(source)
        hearing = listen(track) if track is not None else None
        part = _part(source, [Fraction(time - whole.clock[0]).limit_denominator(10**6) for time in whole.clock])
        is_open = not whole.stay or part.frames == 1 or part.moments is not None
        stay = _stay(source, last, whole.stay, hearing if is_open else None)
        part = replace(part, stay=Fraction(stay).limit_denominator(10**6))
        return cls(source, whole.pictures, part, start, track, hearing)

    def sound(self, seconds: float, skipped: float = 0.0) -> Sound | None:
        """Its sound as far as its pictures are shown, which is for so long; a new one for each file that is written.

        `skipped`: seconds of its pictures that are not.
        """
        start = self.start + skipped
        end = start + seconds
        if self.track is None or self.hearing is None or self.hearing.start >= end or self.hearing.end <= start:
            return None
        if self.source.until is None and self.hearing.end - end > _AUDIBLE:
            lost = self.hearing.end - end
            say_once(self.source.path, f"the last {lost:.1f} s of its sound, after its last picture, are left out")
        if (early := self.start - self.hearing.start) > _AUDIBLE:
            say_once(self.source.path, f"the first {early:.1f} s of its sound, before its first picture, are left out")
        return Sound(self.track, self.hearing, start, end)


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


def _shown(
    shown: Iterable[tuple[int, int]], files: Sequence[tuple[Source, Pictures]], size: tuple[int, int]
) -> Iterator[Picture]:
    """The picture for each output frame, which is told by its file and its number there.

    One that is shown again is not decoded or converted again.
    """
    here = (-1, -1)
    for index, wanted in shown:
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
