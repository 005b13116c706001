"""Decoded picture -> what a viewer sees: RGB for a standard screen, upright, square pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from wan.media.source import Picture, Source, VideoError, say_once

# swscale: bicubic, full chroma in and out, accurate rounding. Its faster default darkens every picture by a level, and
# a chain of clips adds that up. Plain numbers, because PyAV's names for them differ between versions.
SWS_FLAGS = 4 | 0x2000 | 0x4000 | 0x40000
_POINT = 0x10  # no interpolation at all
BT709 = 1
LIMITED, FULL = 1, 2

_SWS_MATRIX = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # H.273 matrix coefficients -> swscale's numbers
_UNSPECIFIED = frozenset({2, 3})
_RGB = 0
_PQ, _HLG = 16, 18
_DOLBY_VISION_TAGS = frozenset({"dvh1", "dvhe", "dva1", "dvav", "dav1"})
_REFERENCE_WHITE_NITS = 203.0  # BT.2408: where HDR puts the white of a standard screen
_BT2020_TO_709 = np.array(
    [[1.6604910, -0.5876411, -0.0728499], [-0.1245505, 1.1328999, -0.0083494], [-0.0181508, -0.1005789, 1.1187297]],
    np.float32,
)


def is_hdr(frame: VideoFrame) -> bool:
    """Whether the picture is PQ or HLG coded and is tone mapped on the way to RGB."""
    return frame.color_trc in (_PQ, _HLG)


def to_rgb(frame: VideoFrame, source: Source, *, max_side: int | None = None) -> Picture:
    """A decoded picture -> uint8 [H, W, 3] sRGB, upright, square pixels, the longer side at most `max_side` pixels."""
    width, height = _displayed_size(frame, source, max_side)
    _refuse_dolby_vision(frame, source)
    _warn_about_alpha(frame, source)
    deep = is_hdr(frame)
    converted = VideoReformatter().reformat(
        frame,
        width=width,
        height=height,
        format="rgb48le" if deep else "rgb24",
        interpolation=SWS_FLAGS,
        src_colorspace=_matrix(frame, source),
        src_color_range=_range(frame),
        dst_color_range=FULL,
        threads=1,  # swscale's thread pool would dead-lock a process forked later
    )
    pixels: npt.NDArray[Any] = np.asarray(converted.to_ndarray())
    if deep:
        name = "PQ" if frame.color_trc == _PQ else "HLG"
        say_once(source.path, f"HDR ({name}) video is tone mapped; convert it to SDR yourself for full control")
        pixels = tone_map(pixels, frame.color_trc)
    # PyAV keeps a frame whose side data was looked at until the next garbage collection: hundreds of MB of them
    tiny = VideoReformatter().reformat(frame, width=16, height=16, interpolation=_POINT, threads=1)
    return np.ascontiguousarray(_turn(pixels, orientation(tiny)))


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


def tone_map(signal: npt.NDArray[np.uint16], transfer: int) -> Picture:
    """BT.2020 PQ (16) or HLG (18) signal uint16 [H, W, 3] -> sRGB uint8; the white of a standard screen stays white."""
    light = (_PQ_LIGHT if transfer == _PQ else _HLG_LIGHT)[signal]  # float32
    if transfer == _HLG:  # the display of a 1000 nit mastering room: system gamma 1.2 on luminance
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (np.maximum(luminance, 1e-6) ** np.float32(0.2))[..., None] * (1000 / _REFERENCE_WHITE_NITS)
    light = np.maximum(light @ _BT2020_TO_709.T, 0)
    # Highlights bend towards 1 by the largest channel, so that their hue stays.
    knee = np.float32(0.8)
    peak = np.maximum(light.max(-1, keepdims=True), 1e-6)
    bent = knee + (1 - knee) * -np.expm1(-(np.maximum(peak, knee) - knee) / (1 - knee))
    light *= np.where(peak > knee, bent / peak, 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-6) ** np.float32(1 / 2.4) - 0.055)
    return cast(Picture, np.rint(srgb * 255).clip(0, 255).astype(np.uint8))


def _pq_light() -> npt.NDArray[np.float32]:
    """PQ code value of 16 bits -> light, 1 = reference white (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.linspace(0, 1, 65536) ** (1 / m2)
    nits = 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return np.asarray(nits / _REFERENCE_WHITE_NITS, np.float32)


def _hlg_light() -> npt.NDArray[np.float32]:
    """HLG code value of 16 bits -> scene light in [0, 1] (ARIB STD-B67)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.linspace(0, 1, 65536)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


_PQ_LIGHT, _HLG_LIGHT = _pq_light(), _hlg_light()


def _turn(pixels: Picture, steps: tuple[bool, bool, bool]) -> Picture:
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
    return FULL if frame.format.is_rgb or name.startswith(("gray", "pal", "mono")) else LIMITED


def _refuse_dolby_vision(frame: VideoFrame, source: Source) -> None:
    # Profile 5 has no standard picture underneath: FFmpeg shows it green and violet, and it has no colour tags.
    tagged = source.codec_tag in _DOLBY_VISION_TAGS
    if frame.colorspace == 15 or (tagged and frame.colorspace in _UNSPECIFIED and frame.color_trc in _UNSPECIFIED):
        raise VideoError(source.path, "it is Dolby Vision without a standard picture", "export it as SDR or HDR10")


def _warn_about_alpha(frame: VideoFrame, source: Source) -> None:
    transparent = source.has_alpha_stream
    if not transparent and any(component.is_alpha for component in frame.format.components):
        pixels = VideoReformatter().reformat(frame, format="rgba", threads=1).to_ndarray()
        transparent = bool(pixels[..., 3].min() < 255)
    if transparent:
        say_once(source.path, "the video is transparent in places; transparency is ignored")
