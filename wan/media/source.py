"""A video file: checked before FFmpeg sees it, its picture stream chosen, its pictures decoded in display order."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias, cast

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import CodecContext
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from wan.errors import UserError
from wan.files import say_once

Picture: TypeAlias = npt.NDArray[np.uint8]  # [H, W, 3] RGB, or [n, H, W, 3]

MOST_PIXELS = 2**26  # of a picture, 8192 x 8192; a file of some kilobytes can hold a thousand times as many
LARGEST = "at most 8192 x 8192"
FALLBACK_FPS = Fraction(24)  # where a file gives no believable rate
_ROUNDED = 1e-3  # seconds: moments are given in thousandths
_MICROSECOND = Fraction(1, 1_000_000)  # FFmpeg's clock where a stream has none
_NOT_A_FILM = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# These demuxers cannot seek, or only pretend to: reading starts at the first picture.
_SEQUENTIAL = frozenset({"h264", "hevc", "vvc", "m4v", "mpegvideo", "av1", "obu", "gif", "apng", "mjpeg", "image2"})
_LENGTH_FROM_ZERO = frozenset({"matroska", "webm", "nut", "asf"})
_BY_PILLOW = frozenset({"webp", "avif"})
# Without these two FFmpeg would play a text as coloured letters, and open whatever else a playlist names.
_REFUSED = frozenset({"tty", "concat", "hls", "dash", "sdp", "rtsp"})
# Until PyAV 18 a title that is not UTF-8 is an exception at open; PyAV 19 replaces it and has no such argument.
_OPEN: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


# FFmpeg's own decoders of these two ignore transparency.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class VideoError(UserError):
    """A video file that cannot be read. One line: the file, what was found, what to do."""

    def __init__(self, path: str | os.PathLike[str], problem: str, advice: str) -> None:
        super().__init__(f"cannot read video {_show(path)}: {problem}; {advice}")


@dataclass(frozen=True)
class Source:
    """What the header of a readable video file says. Times are in seconds on the file's own clock.

    With `until`, the file is taken to end there: pictures that appear later are never shown.
    """

    path: str
    format: str  # FFmpeg's demuxer name
    index: int  # the picture stream
    start: float
    end: float | None  # None: unknown, or the file cannot be searched, so reading starts at the first picture
    duration: float | None
    fps: Fraction
    sample_aspect_ratio: Fraction  # width of one stored pixel over its height
    has_audio: bool
    has_alpha_stream: bool  # WebM keeps transparency in a second picture
    codec_tag: str
    zero: float = 0.0  # where a player starts to count
    length: float | None = None  # of the whole file, as a player counts; None: unknown
    until: float | None = None


def fraction(value: Any, missing: Fraction = Fraction(0)) -> Fraction:
    """A rational of PyAV, which from version 19 on has a class of its own, or `missing` where FFmpeg has not set it."""
    return Fraction(value.numerator, value.denominator) if value else missing


def exact_rate(fps: Fraction | float) -> Fraction:
    """Frames per second as a fraction in lowest terms; values near 23.976, 29.97, 59.94 ... become n*1000/1001.

    Raises UserError when `fps` is not a number between 0 and 1000.
    """
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise UserError(f"fps must be a number above 0 and up to 1000, {fps} is not")
    whole = Fraction(fps).limit_denominator(1001)
    film = Fraction(round(fps) * 1000, 1001)
    return film if whole.denominator != 1 and abs(whole - film) < film / 4000 else whole


def inspect(path: str | os.PathLike[str], until: float | None = None) -> Source:
    """Check that `path` is a video file and read its header. Raises VideoError; never blocks on a pipe or a network.

    `until`, in seconds as a player counts, is the last moment of it that is used.
    """
    name = _checked_path(path)
    source = _inspect_by_pillow(name) if _is_for_pillow(name) else _inspect(name)
    if until is None:
        return source
    if not (math.isfinite(until) and until >= 0):
        raise VideoError(path, f"{until} is no moment of it", "give seconds from its beginning")
    limit = source.zero + until
    # the clock of a transport stream may jump where two were put together, so only counting from the beginning is sure
    end = None if source.end is None or "mpegts" in source.format else min(source.end, limit)
    duration = None if source.duration is None else max(min(source.duration, limit - source.start), 0.0)
    return replace(source, until=limit, end=end, duration=duration)


def _inspect(name: str) -> Source:
    with closing(open_video(name)) as container:
        stream = _picture_stream(name, container)
        tick = fraction(stream.time_base, _MICROSECOND)
        start, zero = (stream.start_time or 0) * tick, (container.start_time or 0) * _MICROSECOND
        from_zero = _counts_from_zero(container)
        ends = []
        if stream.duration:
            ends.append((0 if from_zero else start) + stream.duration * tick)
        if container.duration:
            ends.append((0 if from_zero else zero) + container.duration * _MICROSECOND)
        formats = container.format.name.split(",")
        searchable = _SEQUENTIAL.isdisjoint(formats) and not formats[0].endswith("_pipe")
        return Source(
            path=name,
            format=container.format.name,
            index=stream.index,
            start=float(start),
            end=float(max(ends)) if ends and searchable else None,
            # by the pictures' own end before the container's
            duration=float(ends[0] - start) if ends and ends[0] > start else None,
            fps=_believable_rate(stream),
            sample_aspect_ratio=_believable_aspect(fraction(stream.sample_aspect_ratio)),
            has_audio=bool(container.streams.audio),
            has_alpha_stream=stream.metadata.get("alpha_mode") == "1",
            codec_tag=stream.codec_tag,
            zero=float(zero),
            length=float(max(ends) - zero) if ends else None,
        )


def _counts_from_zero(container: InputContainer) -> bool:
    """Whether a header's length counts from 0 on the file's clock, also where the first picture comes later.

    FFmpeg writes it like that into some formats, and reads it as if it counted from the first picture, as others do.
    """
    writer = {key.lower(): value for key, value in container.metadata.items()}.get("encoder", "")
    from_zero = writer.startswith("Lavf") and not _LENGTH_FROM_ZERO.isdisjoint(container.format.name.split(","))
    # the name of the writer may have come along from the file that another program made this from
    return from_zero and (container.duration or 0) > (container.start_time or 0)


def open_video(path: str) -> InputContainer:
    """Open a checked path, whatever its name looks like. Raises VideoError."""
    # `file:` keeps a name such as "http:x.mp4" from being taken for a protocol, the whitelist keeps playlists offline.
    try:
        return cast(InputContainer, av.open("file:" + path, "r", options={"protocol_whitelist": "file"}, **_OPEN))
    except (av.FFmpegError, UnicodeError) as error:
        problem = f"it is no video that FFmpeg knows, or a part of it is missing ({getattr(error, 'strerror', error)})"
        raise VideoError(path, problem, "download it again, or convert it to mp4") from error


class Pictures:
    """One pass over the displayed pictures of a file, from the keyframe before `start` (None: the first) to the end.

    Every pass opens the file anew, because some demuxers are not the same after a seek. `errors` counts what the
    demuxer and the decoder complained about in the last one, `late_errors` those since the last keyframe: what is wrong
    before that does not touch the end, such as the seam of two files that were put together. `careful` leaves out what
    may be damaged. `was_cut` tells whether pictures were left out because of the source's `until`.
    """

    def __init__(
        self, source: Source, start: float | None = None, *, threads: str = "AUTO", careful: bool = False
    ) -> None:
        self.errors = self.late_errors = 0
        self.was_cut = False
        self._source = source
        self._start = start
        self._threads = threads
        self._careful = careful

    def __iter__(self) -> Iterator[VideoFrame]:
        self.errors = self.late_errors = 0
        self.was_cut = False
        pictures = self._by_pillow() if self._source.format in _BY_PILLOW else self._decode()
        return pictures if self._source.until is None else self._up_to(pictures, self._source.until)

    def _up_to(self, pictures: Generator[VideoFrame], limit: float) -> Iterator[VideoFrame]:
        """The pictures that appear until then, by a clock that runs on where the file's jumps back or says nothing."""
        now: float | None = None
        before: float | None = None
        with closing(pictures):
            for frame in pictures:
                step = None if before is None or frame.time is None else frame.time - before
                if now is None:
                    now = self._source.start if frame.time is None else frame.time
                else:
                    now += step if step is not None and step > 0 else float(1 / self._source.fps)
                if now > limit + _ROUNDED:
                    self.was_cut = True
                    return
                before = frame.time
                yield frame

    def _decode(self) -> Generator[VideoFrame]:
        with closing(open_video(self._source.path)) as container:
            stream = cast(VideoStream, container.streams[self._source.index])
            tick = fraction(stream.time_base, _MICROSECOND)
            decoder = self._decoder(stream)
            decoder.thread_type = self._threads
            # a later picture may be larger than the header says
            decoder.options = {"max_pixels": str(MOST_PIXELS)}
            if self._careful:
                decoder.options |= {"err_detect": "crccheck+bitstream+buffer+explode"}
            if self._start is not None and not self._seek(container, stream, self._start):
                return
            packets = container.demux(stream)
            at_end = False
            while not at_end:
                try:
                    packet = next(packets, None)
                except av.FFmpegError:
                    self._complain()
                    packet = None  # what the decoder still holds is shown all the same
                at_end = packet is None or packet.size == 0
                if packet is not None and packet.is_corrupt:
                    self._complain()
                    if self._careful:
                        continue
                elif packet is not None and packet.is_keyframe:
                    self.late_errors = 0
                try:
                    frames = decoder.decode(None if at_end else packet)
                except av.FFmpegError:
                    self._complain()
                    continue
                for frame in frames:
                    if not frame.is_corrupt:
                        frame.time_base = tick  # PyAV leaves it out of what the flush at the end gives
                        yield frame

    def _decoder(self, stream: VideoStream) -> VideoCodecContext:
        """FFmpeg's usual decoder, or the one that knows transparency."""
        other = _ALPHA_DECODERS.get(stream.codec_context.name) if self._source.has_alpha_stream else None
        if other is None:
            return stream.codec_context
        try:
            return cast(VideoCodecContext, CodecContext.create(other, "r"))
        except av.codec.codec.UnknownCodecError:  # another build of FFmpeg
            say_once(self._source.path, "the video is transparent in places; transparency is ignored")
            return stream.codec_context

    def _complain(self) -> None:
        self.errors += 1
        self.late_errors += 1

    @staticmethod
    def _seek(container: InputContainer, stream: VideoStream, seconds: float) -> bool:
        try:
            container.seek(int(seconds / fraction(stream.time_base, _MICROSECOND)), stream=stream)
        except av.FFmpegError:
            return False  # as good as a seek behind the last keyframe: the caller starts earlier
        return True

    def _by_pillow(self) -> Generator[VideoFrame]:
        with open_picture(self._source.path) as image:
            for number in range(getattr(image, "n_frames", 1)):
                try:
                    image.seek(number)
                    pixels = np.asarray(image.convert("RGBA"))
                except (OSError, EOFError):
                    self._complain()
                    return
                frame = VideoFrame.from_ndarray(pixels, "rgba")
                frame.pts, frame.time_base = image.info.get("timestamp", 0), Fraction(1, 1000)
                frame.duration = image.info.get("duration", 0)
                yield frame


def keyframes_before(source: Source, moments: Sequence[float]) -> list[float | None]:
    """For each moment the keyframe time at or before it, by the file's index; None where the index does not reach."""
    with closing(open_video(source.path)) as container:
        stream = container.streams[source.index]
        tick, entries = fraction(stream.time_base, _MICROSECOND), stream.index_entries
        reach = entries[len(entries) - 1].timestamp if len(entries) else -1
        times: list[float | None] = []
        for moment in moments:
            stamp = int(moment / tick)
            number = entries.search_timestamp(stamp) if stamp <= reach else -1
            times.append(float(entries[number].timestamp * tick) if number >= 0 else None)
        return times


def open_picture(path: str) -> Image.Image:
    """A picture file, of which nothing is decoded yet. Raises UserError for one that is too large, or Pillow's errors.

    Pillow's own limit is a warning first, and three times as high.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise UserError(
                f"cannot read image {path!r}: it has too many pixels; make it smaller, {LARGEST}"
            ) from error
    if image.width * image.height > MOST_PIXELS:
        image.close()
        problem = f"it has {image.width} x {image.height} pixels"
        raise UserError(f"cannot read image {path!r}: {problem}; make it smaller, {LARGEST}")
    return image


def _show(path: str | os.PathLike[str]) -> str:
    return repr(os.fspath(path))  # a name may hold a newline or bytes that are no text


def _checked_path(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    try:
        status = os.stat(name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise VideoError(path, reason[0].lower() + reason[1:], "give the name of a video file") from error
    except ValueError as error:  # a NUL in the name
        raise VideoError(path, str(error), "give the name of a video file") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(path, "it is a folder", "give the name of a video file in it")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise VideoError(path, "it is a pipe or a device", "save it as a file first")
    if status.st_size == 0:
        raise VideoError(path, "the file is empty", "download or export it again")
    if not os.access(name, os.R_OK):
        raise VideoError(path, "permission denied", "make it readable (chmod +r)")
    return name


def _picture_stream(path: str, container: InputContainer) -> VideoStream:
    if not _REFUSED.isdisjoint(container.format.name.split(",")):
        raise VideoError(path, f"it is a text or a playlist ({container.format.name})", "give the video file itself")
    streams = [stream for stream in container.streams.video if not stream.disposition & _NOT_A_FILM]
    if not streams:
        raise VideoError(path, "there is no video stream in it", "give a file with pictures")
    default = [stream for stream in streams if stream.disposition & Disposition.default]
    best = container.streams.best("video")
    chosen = default[0] if len(default) == 1 else next((s for s in streams if s == best), streams[0])
    # PyAV leaves the context out for codecs that FFmpeg only knows by name.
    if cast(Any, chosen.codec_context) is None:
        raise VideoError(path, "FFmpeg has no decoder for it", "convert it to H.264 mp4")
    _check_pixels(path, chosen.codec_context.width, chosen.codec_context.height)
    return chosen


def _check_pixels(path: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise VideoError(path, f"its pictures have {width} x {height} pixels", f"make them smaller, to {LARGEST}")


def _believable_rate(stream: VideoStream) -> Fraction:
    """Within 1 to 120; more than 300 (a container's clock, not a rate) or nothing at all counts as unknown."""
    for rate in (fraction(stream.average_rate), fraction(stream.guessed_rate)):
        if 0 < rate <= 300:
            return exact_rate(min(max(rate, Fraction(1)), Fraction(120)))
    return FALLBACK_FPS


def _believable_aspect(ratio: Fraction) -> Fraction:
    return ratio if Fraction(1, 10) <= ratio <= 10 else Fraction(1)


def _is_for_pillow(path: str) -> bool:
    """FFmpeg reads animated WebP only since version 9, and AVIF without its transparency."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] == b"RIFF":
        return head[8:] == b"WEBP"
    if head[4:] not in (b"ftypavif", b"ftypavis"):
        return False
    try:
        with open_picture(path) as image:
            return image.mode == "RGBA"
    except OSError:  # a Pillow that does not know AVIF: FFmpeg shows what it can
        return False


def _inspect_by_pillow(path: str) -> Source:
    milliseconds = 0
    try:
        with open_picture(path) as image:
            kind = str(image.format).lower()
            count = getattr(image, "n_frames", 1)
            for number in range(count):
                image.seek(number)
                image.load()
                milliseconds += image.info.get("duration", 0)
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise VideoError(path, f"the animation is damaged ({error})", "export it again") from error
    rate = Fraction(count * 1000, milliseconds) if milliseconds else FALLBACK_FPS
    return Source(
        path=path,
        format=kind,
        index=0,
        start=0.0,
        end=None,
        duration=milliseconds / 1000 or None,
        fps=exact_rate(min(max(rate, Fraction(1)), Fraction(120))),
        sample_aspect_ratio=Fraction(1),
        has_audio=False,
        has_alpha_stream=False,
        codec_tag="",
        length=milliseconds / 1000 or None,
    )
