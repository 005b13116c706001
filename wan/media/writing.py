"""Frames -> an mp4 that shows the same colours everywhere, and clips -> one mp4 without encoding anything again."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from wan.errors import UserError
from wan.files import publish, reserve
from wan.media.colour import FULL, LIMITED, SWS_FLAGS, to_rgb
from wan.media.light import BT709
from wan.media.reading import read_last_frame
from wan.media.sound import Sound
from wan.media.source import Picture, Pictures, exact_rate, fraction, inspect, open_video

# crf 17 is past what eyes tell apart; forced-idr makes a keyframe that was asked for one where a file can be cut; half
# the usual look-ahead costs nothing that can be seen and saves 80 MB at 720p. cpu-independent keeps x264's macroblock
# tree out of its assembler, which gives other numbers from call to call.
_X264 = {
    "crf": "17",
    "preset": "medium",
    "profile": "high",
    "forced-idr": "1",
    "rc-lookahead": "20",
    "x264-params": "cpu-independent=1",
}
PIECE = ".piece.mp4"  # how the names of files end that are there only while a video is written
_X264_THREADS = 4  # a number of x264's own choice follows the machine's cores, and the pictures follow the number
_FASTSTART = {"movflags": "+faststart"}  # the index goes first: the video plays while it downloads
_PACKET_SECONDS = 0.1  # of sound at the most
_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise UserError when no video can be written under this name: to be asked before hours of work."""
    os.unlink(_reserve(path))


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[Picture],
    fps: Fraction | float,
    *,
    keyframes: frozenset[int] = frozenset({0}),
    metadata: Mapping[str, Any] | None = None,
    sound: Sound | None = None,
) -> int:
    """Encode uint8 [H, W, 3] RGB frames of one size, taken one by one, as H.264 mp4 with BT.709 colours.

    An odd side loses its last row or column. `keyframes` are numbers of frames at which the file can be cut; `metadata`
    is kept as JSON in the comment tag; `sound` begins with the first frame. The file appears under its name only when
    it is complete and was read back. Returns the number of frames. Raises UserError where it cannot be written,
    ValueError for frames that are none.
    """
    rate = exact_rate(fps)
    with _published(path) as temporary:
        count, size = 0, (0, 0)
        with _mp4(temporary, metadata) as container:
            stream: VideoStream | None = None
            converter = VideoReformatter()
            for array in frames:
                if stream is None:
                    size = _even_size(array)
                    stream = _add_h264(container, size, rate)
                    shape = array.shape
                    if sound is not None:
                        sound.open(container)
                if array.shape != shape or array.dtype != np.uint8:
                    raise ValueError(f"frame {count} is {array.dtype} {array.shape}, not uint8 {shape}")
                frame = _to_yuv(converter, array[: size[1], : size[0]])
                frame.pts, frame.time_base = count, 1 / rate
                if count in keyframes:
                    frame.pict_type = PictureType.I
                container.mux(stream.encode(frame))
                if sound is not None:
                    sound.mux_until(container, float(count / rate))
                count += 1
            if stream is None:
                raise ValueError("there are no frames to write")
            container.mux(stream.encode(None))
            if sound is not None:
                sound.mux_until(container, math.inf)
        _verify(temporary, count, size, sound.last if sound is not None else None)
    return count


def join_videos(
    parts: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    drops: Sequence[int] | None = None,
    fades: Sequence[int] = (),
    metadata: Mapping[str, Any] | None = None,
    sound: Sound | None = None,
) -> int:
    """Put mp4 clips of one size and rate end to end; returns the number of frames.

    With `sound`, which begins with the first frame, that of the clips themselves is left out.

    `drops` says how many leading frames of each part are left out: none of the first and one of the others by default.
    `fades` says over how many frames each part fades in from the last ones of the part before, 0 for not at all: these
    frames are encoded anew, and so is a part that has no keyframe where they end. Nothing else is encoded again where
    every part begins with a keyframe then and was written with the same settings, as `write_video` does. Raises
    UserError, before anything is written, when the parts do not fit together.
    """
    if not parts:
        raise ValueError("there are no videos to join")
    if drops is None:
        drops = [0] + [1] * (len(parts) - 1)
    if any(fades):
        with _faded(parts, drops, fades, os.fspath(path)) as pieces:
            return _join([_Part.read(*piece) for piece in pieces], path, metadata, sound)
    return _join([_Part.read(part, drop) for part, drop in zip(parts, drops, strict=True)], path, metadata, sound)


def _join(
    plans: list[_Part], path: str | os.PathLike[str], metadata: Mapping[str, Any] | None, sound: Sound | None
) -> int:
    if sound is not None:
        plans = [replace(plan, format=replace(plan.format, streams=1)) for plan in plans]
    for plan in plans[1:]:
        plan.check_fits(plans[0])
    tick = 1 / plans[0].format.fps
    if not all(plan.can_be_copied_after(plans[0]) for plan in plans):
        frames = (picture for plan in plans for picture in plan.pictures())
        return write_video(path, frames, plans[0].format.fps, metadata=metadata, sound=sound)
    # Frames are decoded ahead of their display by a constant delay, the same on both sides of a seam.
    delay = max(max(order - number for order, number in enumerate(plan.numbers)) for plan in plans)
    with _published(path) as temporary:
        written = 0
        with _mp4(temporary, metadata) as container:
            stream: VideoStream | None = None
            for plan in plans:
                with closing(open_video(plan.path)) as clip:
                    template = clip.streams.video[0]
                    if stream is None:
                        stream = container.add_stream_from_template(template)
                        stream.time_base = tick
                        if sound is not None:
                            sound.open(container)
                    packets = (packet for packet in clip.demux(template) if packet.size)
                    for order, (number, packet) in enumerate(zip(plan.numbers, packets, strict=True)):
                        if not plan.drop <= number < plan.stop:
                            continue
                        packet.stream, packet.time_base = stream, tick
                        packet.pts = written + number - plan.drop
                        packet.dts = written + order - plan.drop - delay
                        packet.duration = 1
                        container.mux(packet)
                        if sound is not None:
                            sound.mux_until(container, float((written + order - plan.drop) * tick))
                written += plan.stop - plan.drop
            if sound is not None:
                sound.mux_until(container, math.inf)
        size = plans[0].format.width, plans[0].format.height
        _verify(temporary, written, size, None if sound is None else sound.last)
    return written


@contextmanager
def _faded(
    parts: Sequence[str | os.PathLike[str]], drops: Sequence[int], fades: Sequence[int], path: str
) -> Iterator[list[tuple[str, int, int | None]]]:
    """What is put end to end of parts that fade into one another: files, with the frames that each begins and ends at.

    Files that are made for it lie beside `path` and go with the block.
    """
    home, name = os.path.split(path)
    made: list[str] = []

    def piece(frames: Iterable[Picture], fps: Fraction) -> tuple[str, int, None]:
        made.append(os.path.join(home, f".{name}.{len(made)}{PIECE}"))
        write_video(made[-1], frames, fps)
        return made[-1], 0, None

    try:
        pieces: list[tuple[str, int, int | None]] = []
        before: _Part | None = None
        for index, (part, drop, fade) in enumerate(zip(parts, drops, fades, strict=True)):
            following = fades[index + 1] if index + 1 < len(fades) else 0
            here = _Part.read(part, drop + fade)
            here = replace(here, stop=len(here.numbers) - following)
            if fade:
                assert before is not None  # there is nothing to fade from
                ends = replace(before, drop=before.stop, stop=len(before.numbers)).pictures()
                begins = replace(here, drop=drop, stop=drop + fade).pictures()
                pieces.append(piece(_blend(ends, begins, fade), here.format.fps))
            if here.can_be_cut:
                pieces.append((here.path, here.drop, here.stop))
            else:
                pieces.append(piece(here.pictures(), here.format.fps))
            before = here
        yield pieces
    finally:
        for file in made:
            with suppress(FileNotFoundError):
                os.unlink(file)


def _blend(ends: Iterable[Picture], begins: Iterable[Picture], count: int) -> Iterator[Picture]:
    """Pictures uint8 [H, W, 3] on the way from the one to the other, of which neither is shown whole."""
    for number, (end, begin) in enumerate(zip(ends, begins, strict=True), 1):
        share = number / (count + 1)
        yield np.rint((1 - share) * end.astype(np.float32) + share * begin.astype(np.float32)).astype(np.uint8)


_MUST_AGREE = ("width", "height", "fps", "sample_aspect_ratio", "streams")  # the rest can be made equal by encoding


@dataclass(frozen=True)
class _Format:
    """What must be equal for two clips to share one stream."""

    codec: str
    width: int
    height: int
    pixels: str | None
    fps: Fraction
    colour: tuple[int, int, int, int]
    sample_aspect_ratio: Fraction
    encoder_settings: bytes | None
    streams: int


@dataclass(frozen=True)
class _Part:
    path: str
    format: _Format
    numbers: list[int]  # display numbers of the frames in the order of decoding
    keys: frozenset[int]  # those that are keyframes
    drop: int  # frames left out at the beginning
    stop: int  # the frame after the last that is shown

    @classmethod
    def read(cls, path: str | os.PathLike[str], drop: int, stop: int | None = None) -> _Part:
        source = inspect(path)
        if "mp4" not in source.format.split(","):
            raise UserError(f"cannot join {source.path!r}: it is no mp4 file; only clips of equal make can be joined")
        with closing(open_video(source.path)) as container:
            stream = cast(VideoStream, container.streams[source.index])
            context = stream.codec_context
            made = _Format(
                codec=context.name,
                width=stream.width,
                height=stream.height,
                pixels=stream.pix_fmt,
                fps=fraction(stream.average_rate),
                colour=(stream.color_primaries, stream.color_trc, stream.colorspace, stream.color_range),
                sample_aspect_ratio=source.sample_aspect_ratio,
                encoder_settings=context.extradata,
                streams=len(container.streams),
            )
            stamps = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
            step = fraction(stream.time_base) * made.fps
        numbers = [round(pts * step) if pts is not None else -1 for pts, _ in stamps]
        if sorted(numbers) != list(range(len(numbers))) or not numbers:
            raise UserError(f"cannot join {source.path!r}: its frames are not evenly spaced from 0 on; write it again")
        if drop >= len(numbers):
            raise UserError(f"cannot join {source.path!r} without its first {drop} frames: it has {len(numbers)}")
        keys = frozenset(number for number, (_, key) in zip(numbers, stamps, strict=True) if key)
        return cls(source.path, made, numbers, keys, drop, len(numbers) if stop is None else stop)

    @property
    def can_be_cut(self) -> bool:
        """Whether a decoder can begin with its first frame, and needs nothing of what comes after its last."""
        return self.drop in self.keys and (self.stop in self.keys or self.stop == len(self.numbers))

    def check_fits(self, first: _Part) -> None:
        pairs = [(name, getattr(self.format, name), getattr(first.format, name)) for name in _MUST_AGREE]
        different = [
            f"{name.replace('_', ' ')} {ours} against {theirs}" for name, ours, theirs in pairs if ours != theirs
        ]
        if different:
            raise UserError(
                f"cannot join {self.path!r} to {first.path!r}: different {', '.join(different)}; "
                "write both with the same settings"
            )

    def can_be_copied_after(self, first: _Part) -> bool:
        return self.can_be_cut and self.format == first.format

    def pictures(self) -> Iterator[Picture]:
        source = inspect(self.path)
        return (to_rgb(frame, source) for frame in islice(Pictures(source), self.drop, self.stop))


@contextmanager
def _published(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary name beside `path`; it becomes `path` when the body succeeds, and nothing stays when it fails."""
    temporary = _reserve(path)
    try:
        yield temporary
        publish(Path(temporary), Path(path))
    except (OSError, av.FFmpegError) as error:
        if error.errno in _FULL_DISK:
            raise UserError(f"cannot write {os.fspath(path)!r}: {error.strerror}; free some space") from error
        raise
    finally:
        with suppress(FileNotFoundError):  # it has its final name
            os.unlink(temporary)


def _reserve(path: str | os.PathLike[str]) -> str:
    """Make the empty temporary file for `path`. Raises UserError: FFmpeg's own errors would come late and say less."""
    name = os.fspath(path)
    if not name.lower().endswith(".mp4"):
        raise UserError(f"cannot write {name!r}: only mp4 files are written, give a name that ends in .mp4")
    if os.path.isdir(name):
        raise UserError(f"cannot write {name!r}: it is a folder, give another name")
    try:
        return os.fspath(reserve(Path(name)))
    except OSError as error:
        long = "give a shorter name, which for a time has some letters more"
        advice = long if error.errno == errno.ENAMETOOLONG else "give a folder that can be written to"
        raise UserError(f"cannot write {name!r}: {error.strerror}; {advice}") from error


@contextmanager
def _mp4(path: str, metadata: Mapping[str, Any] | None) -> Iterator[OutputContainer]:
    with av.open("file:" + path, "w", format="mp4", options=_FASTSTART) as container:
        if metadata is not None:
            text = json.dumps(dict(metadata), ensure_ascii=False)
            container.metadata["comment"] = text.encode("utf-8", "backslashreplace").decode()
        yield container


def _add_h264(container: OutputContainer, size: tuple[int, int], rate: Fraction) -> VideoStream:
    stream = container.add_stream("libx264", rate=rate, options=_X264)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.thread_count = _X264_THREADS
    # Without tags a player guesses the colours, and guesses differently above and below 720 lines.
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED
    return stream


def _even_size(array: Picture) -> tuple[int, int]:
    if array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < 2:
        raise ValueError(f"a frame must be uint8 [H, W, 3] of 2 pixels or more, not {array.shape}")
    return array.shape[1] // 2 * 2, array.shape[0] // 2 * 2


def _to_yuv(converter: VideoReformatter, array: Picture) -> VideoFrame:
    return converter.reformat(
        VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24"),
        format="yuv420p",
        interpolation=SWS_FLAGS,
        src_color_range=FULL,
        dst_colorspace=BT709,
        dst_color_range=LIMITED,
        threads=1,  # swscale's thread pool would dead-lock a process forked later
    )


def _verify(path: str, count: int, size: tuple[int, int], sound_until: float | None = None) -> None:
    """Read back what was written. A difference is no user's fault."""
    with closing(open_video(path)) as container:
        read, heard = 0, None
        for packet in container.demux():
            if packet.size and packet.stream.type == "video":
                read += 1
            elif packet.size and packet.pts is not None:
                heard = float(packet.pts * fraction(packet.time_base))
    shown = read_last_frame(path).size
    if (read, shown) != (count, size):
        raise RuntimeError(f"{path!r} reads back as {read} frames of {shown}, not {count} of {size}")
    if (heard is None) != (sound_until is None) or abs((heard or 0) - (sound_until or 0)) > _PACKET_SECONDS:
        raise RuntimeError(f"the sound of {path!r} reads back until {heard} s, not {sound_until} s")
