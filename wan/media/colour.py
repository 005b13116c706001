"""Decoded picture -> what a viewer sees: RGB for a standard screen, upright, square pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

from wan.files import say_once
from wan.media.light import BT709, HLG, PQ, WIDE, narrow, tone_map
from wan.media.source import Picture, Source, VideoError
from wan.pictures import levels, over_white

# swscale: bicubic, full chroma in and out, accurate rounding. Its faster default darkens every picture by a level, and
# a chain of clips adds that up. Plain numbers, because PyAV's names for them differ between versions.
SWS_FLAGS = 4 | 0x2000 | 0x4000 | 0x40000
_POINT = 0x10  # no interpolation at all
_FORMATS = {  # of 16 bits a channel, with transparency
    (False, False): "rgb24",
    (False, True): "rgba",
    (True, False): "rgb48le",
    (True, True): "rgba64le",
}
LIMITED, FULL = 1, 2

_SWS_MATRIX = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # H.273 matrix coefficients -> swscale's, H.273's as well
_UNSAID = 2
_UNSPECIFIED = frozenset({_UNSAID, 3})
_RGB = 0
_DOLBY_VISION_TAGS = frozenset({"dvh1", "dvhe", "dva1", "dvav", "dav1"})
_NOT_FOR_SCREENS = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "those of digital cinema"}  # H.273
_NEAR_BT709 = frozenset({0, 1, 2, 3, 5, 6, 7, 22})  # or not said


def is_hdr(frame: VideoFrame) -> bool:
    """Whether the picture is PQ or HLG coded and is tone mapped on the way to RGB."""
    return frame.color_trc in (PQ, HLG)


def has_alpha(frame: VideoFrame) -> bool:
    """Whether the picture may be transparent in places."""
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def to_rgb(frame: VideoFrame, source: Source, *, max_side: int | None = None) -> Picture:
    """A decoded picture -> uint8 [H, W, 3] sRGB, upright, square pixels, the longer side at most `max_side` pixels.

    What is transparent becomes white.
    """
    size = _displayed_size(frame, source, max_side)
    _refuse_dolby_vision(frame, source)
    if frame.format.name.startswith("grayf32"):  # swscale takes these for limited range
        frame = VideoFrame.from_ndarray(levels(frame.to_ndarray()).repeat(3, axis=-1), "rgb24")
    wide = wide_primaries(frame, source)
    deep = is_hdr(frame) or wide is not None
    clear = has_alpha(frame)
    pixels = _convert(frame, source, _FORMATS[deep, clear], None if clear else size)
    pixels, opacity = pixels[..., :3], pixels[..., 3:]
    if is_hdr(frame):
        curve = "PQ" if frame.color_trc == PQ else "HLG"
        say_once(source.path, f"HDR ({curve}) video is tone mapped; convert it to SDR yourself for full control")
        pixels = tone_map(pixels, frame.color_trc, frame.color_primaries)
    elif wide is not None:
        say_once(source.path, f"its {WIDE[wide][0]} colours are converted to BT.709")
        pixels = narrow(pixels, wide, frame.color_trc)
    if frame.color_trc in _NOT_FOR_SCREENS:
        coded = _NOT_FOR_SCREENS[frame.color_trc]
        say_once(source.path, f"its tones are {coded} and are taken for BT.709's; convert it to BT.709 yourself")
    if clear:
        pixels = over_white(pixels, opacity, source.path)
        if size != (frame.width, frame.height):  # after that, or colours that nobody sees bleed into what is seen
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(_upright(pixels, orientation(_tiny(frame))))


def _tiny(frame: VideoFrame) -> VideoFrame:
    """A frame of the same side data: PyAV keeps one whose side data was looked at until the next garbage collection."""
    try:
        return VideoReformatter().reformat(frame, width=16, height=16, interpolation=_POINT, threads=1)
    except av.FFmpegError:  # a few formats can be converted but not scaled
        return frame


def _convert(frame: VideoFrame, source: Source, form: str, size: tuple[int, int] | None) -> npt.NDArray[Any]:
    width, height = size or (frame.width, frame.height)
    matrix, coded = _matrix(frame, source), _range(frame)
    tags = frame.colorspace, frame.color_trc, frame.color_primaries
    # PyAV 17 goes by these, not by `src_colorspace`, and refuses tones and primaries that count for nothing here
    frame.colorspace, frame.color_trc, frame.color_primaries = matrix, _UNSAID, _UNSAID
    try:
        converted = VideoReformatter().reformat(
            frame,
            width=width,
            height=height,
            format=form,
            interpolation=SWS_FLAGS,
            src_colorspace=matrix,
            src_color_range=coded,
            dst_color_range=FULL,
            threads=1,  # swscale's thread pool would dead-lock a process forked later
        )
    finally:
        frame.colorspace, frame.color_trc, frame.color_primaries = tags
    pixels: npt.NDArray[Any] = np.asarray(converted.to_ndarray())
    return pixels


def upright_size(frame: VideoFrame, source: Source) -> tuple[int, int]:
    """Width and height of `to_rgb(frame, source)`, without converting anything."""
    width, height = _displayed_size(frame, source, None)
    return (height, width) if orientation(frame)[0] else (width, height)


def deinterlace(frames: Sequence[VideoFrame]) -> VideoFrame:
    """The last of a few successive pictures (three are enough) with its two fields made one."""
    if not frames[-1].interlaced_frame:
        return frames[-1]
    last = frames[-1]
    same = [f for f in frames if (f.width, f.height, f.format.name) == (last.width, last.height, last.format.name)]
    graph = Graph()
    tick = last.time_base
    buffer = graph.add_buffer(width=last.width, height=last.height, format=last.format, time_base=tick)
    graph.link_nodes(
        buffer, graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"), graph.add("buffersink")
    ).configure()
    for frame in same:
        graph.vpush(frame)
    graph.vpush(None)
    result = last
    while True:
        try:
            result = graph.vpull()
        except (av.error.EOFError, av.error.BlockingIOError):
            return result


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then mirror left-right, then top-bottom) that shows the picture upright, from its display matrix."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know every type: MJPEG with EXIF has one
        turns = round(frame.rotation / 90) % 4  # counter-clockwise
        return ((False, False, False), (True, False, True), (False, True, True), (True, True, False))[turns]
    if matrix is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y, as nine int32: a b u c d v x y w
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def _upright(pixels: Picture, steps: tuple[bool, bool, bool]) -> Picture:
    transpose, mirror, flip = steps
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    return pixels[:: -1 if flip else 1, :: -1 if mirror else 1]


def _displayed_size(frame: VideoFrame, source: Source, max_side: int | None) -> tuple[int, int]:
    """Width and height before turning: the short side is stretched to square pixels, nothing is thrown away."""
    ratio = source.sample_aspect_ratio
    wide = ratio > 1
    width, height = frame.width * (ratio if wide else 1), frame.height / (1 if wide else ratio)
    scale = min(1, max_side / max(width, height)) if max_side else 1
    return max(1, round(width * scale)), max(1, round(height * scale))


def _matrix(frame: VideoFrame, source: Source) -> int:
    stored = frame.colorspace
    if stored == _RGB or frame.format.is_rgb:
        return BT709  # not used: there is nothing to convert
    if stored in _UNSPECIFIED:
        if is_hdr(frame):
            return _SWS_MATRIX[9]
        large = frame.width >= 1280 or frame.height > 576  # what players and browsers assume
        say_once(source.path, f"no colour tags: taken for BT.{'709' if large else '601'}", logging.INFO)
        return _SWS_MATRIX[1 if large else 6]
    if stored not in _SWS_MATRIX:
        raise VideoError(
            source.path, f"its colour matrix (H.273 number {stored}) is not supported", "convert it to BT.709"
        )
    return _SWS_MATRIX[stored]


def _range(frame: VideoFrame) -> int:
    name = frame.format.name
    if name.startswith("yuvj"):
        return FULL
    if frame.color_range in (LIMITED, FULL):
        return frame.color_range
    return FULL if frame.format.is_rgb or name.startswith(("gray", "ya8", "ya16", "pal", "mono")) else LIMITED


def _refuse_dolby_vision(frame: VideoFrame, source: Source) -> None:
    # Profile 5 has no standard picture underneath: FFmpeg shows it green and violet, and it has no colour tags.
    tagged = source.codec_tag in _DOLBY_VISION_TAGS
    if frame.colorspace == 15 or (tagged and frame.colorspace in _UNSPECIFIED and frame.color_trc in _UNSPECIFIED):
        raise VideoError(source.path, "it is Dolby Vision without a standard picture", "export it as SDR or HDR10")


def wide_primaries(frame: VideoFrame, source: Source) -> int | None:
    """The H.273 number of a picture's primaries, where BT.709's would show other colours."""
    primaries = frame.color_primaries
    if primaries in WIDE:
        return int(primaries)
    if primaries not in _NEAR_BT709:
        say_once(source.path, f"its colour primaries (H.273 number {primaries}) are taken for BT.709's")
    return None
