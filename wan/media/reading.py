"""What the models see of a video file: its exact last picture, and a few pictures spread over its length."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from wan.errors import UserError
from wan.files import say_once
from wan.media import decord_reader
from wan.media.colour import deinterlace, has_alpha, is_hdr, orientation, to_rgb, upright_size, wide_primaries
from wan.media.source import Picture, Pictures, Source, VideoError, fraction, inspect, keyframes_before

READERS = ("auto", "pyav", "decord")

FIELDS = 3  # pictures that deinterlacing the last one needs
_SOON = 2e-3  # seconds; Matroska rounds time stamps to thousandths
_SHORT_SECONDS = 20.0  # up to here decoding everything costs less than searching


@dataclass(frozen=True)
class Ending:
    """The end of a file: the pass that shows it, when each of its pictures appears, and the last few of them.

    `clock` is in seconds, ascending, 0 for the last picture; `pictures` may be gone through again. `stay` is for how
    long the file says that the last picture is shown, 0 where it says nothing.
    """

    pictures: Pictures
    clock: list[float]
    last: list[VideoFrame]
    stay: float


@dataclass(frozen=True)
class VideoInfo:
    """Size as displayed (upright, square pixels), frames per second, seconds (None: the file does not say), sound.

    `fps` is the average rate, kept within 1 to 120; 24 where the file gives none that can be believed.
    """

    width: int
    height: int
    fps: Fraction
    duration: float | None
    has_audio: bool


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """What a video file is, from its header and its first picture. Raises VideoError."""
    source = inspect(path)
    width, height = upright_size(first_frame(source), source)
    return VideoInfo(width, height, source.fps, source.duration, source.has_audio)


def read_last_frame(path: str | os.PathLike[str], until: float | None = None) -> Image.Image:
    """The last displayed frame of a video as an RGB image, upright, with square pixels. Raises VideoError.

    `until`, here and in all that follows, is the last moment of the file that is used, in seconds as a player counts.
    Only the end of the file is decoded where it can be searched. A damaged end gives its last clean picture, with a
    warning.
    """
    source = inspect(path, until)
    return Image.fromarray(to_rgb(deinterlace(find_ending(source).last), source))


def read_first_frame(path: str | os.PathLike[str]) -> Image.Image:
    """The first displayed frame of a video, as `read_last_frame`. Raises VideoError."""
    source = inspect(path)
    return Image.fromarray(to_rgb(deinterlace([first_frame(source)]), source))


def read_tail(path: str | os.PathLike[str], count: int, fps: Fraction | float, until: float | None = None) -> Picture:
    """The last frames of a video at another rate, uint8 [n, H, W, 3], oldest first; the last is `read_last_frame`'s.

    The frame before it is what is on screen 1/fps seconds before the last one appears, and so on, up to `count`; fewer
    where the video is shorter. Only the end is decoded where the file can be searched. Raises VideoError.
    """
    if count < 1 or fps <= 0:
        raise ValueError(f"count and fps must be positive: {count}, {fps}")
    source = inspect(path, until)
    moments = [-step / float(fps) for step in range(count - 1, -1, -1)]
    ending = find_ending(source, -moments[0])
    numbers = [bisect_right(ending.clock, moment + _SOON) - 1 for moment in moments]
    wanted = [number for number in numbers if number >= 0]  # the others are before the first picture
    needed, recent, shown = set(wanted), deque[VideoFrame](maxlen=FIELDS), {}
    # a second pass, so that memory holds only what is asked for, however many pictures there are between
    for number, frame in enumerate(ending.pictures):
        recent.append(frame)
        if number in needed:
            shown[number] = to_rgb(deinterlace(recent), source)
    height, width = shown[wanted[-1]].shape[:2]
    return np.stack([_resize(shown[number], width, height) for number in wanted])


def sample_frames(
    path: str | os.PathLike[str],
    n: int = 8,
    *,
    reader: str = "auto",
    max_side: int | None = None,
    until: float | None = None,
) -> Picture:
    """uint8 [n, H, W, 3]: what is on screen in the middle of each of `n` equal slices of time, like the last frame.

    A video of fewer frames repeats them. `reader` is one of READERS; "auto" is "pyav". decord runs in a process of its
    own, and PyAV takes over with a warning where it fails or where its pictures would be wrong. `max_side` limits the
    longer side in pixels. Raises VideoError, and UserError when decord is asked for and not installed.
    """
    if reader not in READERS:
        raise UserError(f"video_reader must be one of {', '.join(READERS)}; {reader!r} is not")
    if n < 1 or (max_side is not None and max_side < 1):
        raise ValueError(f"n and max_side must be at least 1: {n}, {max_side}")
    source = inspect(path, until)
    if reader == "decord":
        frames = _sample_with_decord(source, n, max_side)
        if frames is not None:
            return frames
    chosen = _search(source, n) if source.end is not None and (source.duration or 0) > _SHORT_SECONDS else None
    pictures = [to_rgb(deinterlace([frame]), source, max_side=max_side) for frame in chosen or _scan(source, n)]
    height, width = pictures[0].shape[:2]
    return np.stack([_resize(picture, width, height) for picture in pictures])


def first_frame(source: Source) -> VideoFrame:
    for frame in Pictures(source):
        return frame
    raise _without_pictures(source)


def _without_pictures(source: Source) -> VideoError:
    if source.until is not None:
        problem = f"it shows no picture up to {source.until - source.zero:g} s"
        return VideoError(source.path, problem, "give a later moment")
    return VideoError(source.path, "no picture in it can be decoded", "download or export it again")


def find_ending(source: Source, span: float = 0.0) -> Ending:
    """The end of a file, at least `span` seconds of it if it has them; infinity is the whole file. Raises VideoError.

    Frame threads lose pictures next to an error, so anything wrong is read again without them; where the end is still
    wrong then, it is read a third time without concealment.
    """
    ending = _pass(source, span)
    if ending.pictures.errors:
        ending = _pass(source, span, threads="SLICE")
    if ending.pictures.late_errors:
        clean = _pass(source, span, threads="SLICE", careful=True)
        used = "its last clean picture is used" if clean.last else "the last picture may show it"
        say_once(source.path, f"the video is damaged near its end; {used}")
        ending = clean if clean.last else ending
    if not ending.last:
        raise _without_pictures(source)
    _check_moment(source, ending)
    return ending


def _check_moment(source: Source, ending: Ending) -> None:
    """Raise VideoError where the file ends before the moment up to which it is to be used."""
    if source.until is None or ending.pictures.was_cut:
        return
    last = ending.last[-1].time
    shown = source.start - ending.clock[0] if last is None else last
    end = max(source.length or 0.0, shown - source.zero + max(ending.stay, float(1 / source.fps)))
    if source.until - source.zero > end + _SOON:
        raise VideoError(source.path, f"it ends at {end:.2f} s", "give an earlier moment")


def _pass(source: Source, span: float, *, threads: str = "AUTO", careful: bool = False) -> Ending:
    """The first pass from ever earlier that shows any picture, and `span` seconds of them."""
    for start in _starts(source, span):
        pictures = Pictures(source, start, threads=threads, careful=careful)
        # A picture is last by the order of output: time stamps may wrap, and counts in headers are often wrong.
        times, last = [], deque[VideoFrame](maxlen=FIELDS)
        for frame in pictures:
            times.append(frame.time)
            last.append(frame)
        ending = Ending(pictures, _clock(times, source.fps), list(last), _stay(source, pictures, list(last)))
        if last and ending.clock[0] <= -span:
            break
    return ending


def _clock(times: Sequence[float | None], fps: Fraction) -> list[float]:
    """Ascending, 0 for the last picture. Where a time is missing or runs backwards, a frame time is taken."""
    clock = [0.0]
    for after, here in pairwise(reversed(times)):
        step = after - here if after is not None and here is not None else 0.0
        clock.append(clock[-1] - (step if step > 0 else float(1 / fps)))
    return clock[::-1]


def _stay(source: Source, pictures: Pictures, last: Sequence[VideoFrame]) -> float:
    """How long the last picture is shown: as its packet says, or the file's header where no packet says anything.

    The header of a file that is cut short still speaks of all of it, so it counts only where nothing is wrong. Where
    there is sound, it may be the sound's length. An mp4's edit list may end before the packet does.
    """
    if not last:
        return 0.0
    stated = float((last[-1].duration or 0) * fraction(last[-1].time_base))
    if source.duration is None or last[-1].time is None:
        return stated
    left = source.start + source.duration - last[-1].time
    if stated:
        return min(stated, left) if left > 0 and "mp4" in source.format.split(",") else stated
    return 0.0 if source.has_audio or pictures.errors else max(left, 0.0)


def _starts(source: Source, span: float) -> Iterator[float | None]:
    """Where to start decoding to see the end: from its very last keyframe to ever earlier, None is the beginning."""
    if source.end is not None:
        yield from _earlier(source.end - span, source.start)
    yield None


def _earlier(moment: float, limit: float) -> Iterator[float]:
    back, step = 0.0, 0.5
    while moment - back > limit:
        yield moment - back
        back, step = back + step, step * 3


def _scan(source: Source, n: int) -> list[VideoFrame]:
    """Decode everything twice, for the times and for the pictures, so that memory does not grow with the length."""
    times = [frame.time for frame in Pictures(source)]
    if not times:
        raise _without_pictures(source)
    if None in times or any(b <= a for a, b in zip(times, times[1:], strict=False)):
        times = [float(number) for number in range(len(times))]  # raw streams have no clock, wrapped ones no order
    wanted = [bisect_right(times, moment) - 1 for moment in _moments(times[0], _scan_end(times), n)]
    needed = set(wanted)
    pictures = {number: frame for number, frame in enumerate(Pictures(source)) if number in needed}
    if not pictures:
        raise _without_pictures(source)
    return [
        pictures.get(number, pictures[max(pictures)]) for number in wanted
    ]  # damage may cost a picture in one pass only


def _scan_end(times: list[float]) -> float:
    """When the last picture goes: it is taken to stay as long as the others do on average."""
    return times[-1] + (times[-1] - times[0]) / max(len(times) - 1, 1) if len(times) > 1 else times[0] + 1.0


def _moments(start: float, end: float, n: int) -> list[float]:
    return [start + (end - start) * (2 * slice_ + 1) / (2 * n) for slice_ in range(n)]


def _search(source: Source, n: int) -> list[VideoFrame] | None:
    """The pictures of a long file by jumping from keyframe to keyframe; None when its pictures have no times."""
    moments = _moments(source.start, source.start + (source.duration or 0.0), n)
    frames = iter(Pictures(source))
    shown, ahead = None, next(frames, None)
    chosen, jumps_help = [], True
    for moment, keyframe in zip(moments, keyframes_before(source, moments), strict=True):
        here = source.start if shown is None else shown.time
        # Without an index (MPEG-TS) one has to try; where trying fails, the rest is decoded in one go.
        if jumps_help if keyframe is None else keyframe > here:
            landed = _jump(source, here, moment)
            jumps_help = landed is not None
            frames, ahead = landed or (frames, ahead)
        while ahead is not None and (shown is None or ahead.time is None or ahead.time <= moment):
            if ahead.time is None:
                return None
            shown, ahead = ahead, next(frames, None)
        if shown is None:
            return None
        chosen.append(shown)
    return chosen


def _jump(source: Source, here: float, moment: float) -> tuple[Iterator[VideoFrame], VideoFrame] | None:
    """Pictures from a keyframe later than `here` and not later than `moment`, with the first one; None without any."""
    for start in _earlier(moment, here):
        frames = iter(Pictures(source, start))
        first = next(frames, None)
        if first is not None and first.time is not None and first.time <= moment:
            return (frames, first) if first.time > here else None
    return None


def _sample_with_decord(source: Source, n: int, max_side: int | None) -> Picture | None:
    first = first_frame(source)
    transpose, mirror, flip = orientation(first)
    beyond = {
        "a part of a file": source.until is not None,
        "MPEG-TS": "mpegts" in source.format,
        "HDR": is_hdr(first),
        "wide colour": wide_primaries(first, source) is not None,
        "transparency": has_alpha(first),
        "stretched pixels": source.sample_aspect_ratio != 1,
        "a mirrored picture": transpose ^ mirror ^ flip,
    }
    reason = next((what for what, applies in beyond.items() if applies), None)
    if reason:
        decord_reader.require()
        say_once(source.path, f"decord gets {reason} wrong; PyAV reads the frames")
        return None
    frames = decord_reader.read(source.path, n)
    if isinstance(frames, str):
        say_once(source.path, f"decord {frames}; PyAV reads the frames")
        return None
    width, height = upright_size(first, source)
    scale = min(1, max_side / max(width, height)) if max_side else 1
    return np.stack([_resize(frame, max(1, round(width * scale)), max(1, round(height * scale))) for frame in frames])


def _resize(picture: Picture, width: int, height: int) -> Picture:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
