"""Pictures for the media tests: the corpus with its truth, frames that carry their number, and a natural one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.container import OutputContainer

from tests.data.corpus import vidmark
from tests.support.golden import DATA

CORPUS = DATA / "corpus"
FILES: list[dict[str, Any]] = json.loads((CORPUS / "manifest.json").read_text(encoding="utf-8"))["files"]
READABLE = [entry for entry in FILES if entry["expect"] == "ok"]


def numbered(numbers: Sequence[int], width: int = 320, height: int = 180) -> Iterator[npt.NDArray[Any]]:
    """Frames that show their number and eight colours."""
    return (vidmark.render(width, height, number, 1) for number in numbers)


def number(picture: Any) -> int:
    """The number that a picture shows; -1 when it cannot be read."""
    mark = vidmark.read(np.asarray(picture))
    return int(mark["index"]) if mark else -1


def natural(width: int = 1280, height: int = 720, seed: int = 0) -> npt.NDArray[Any]:
    """A cloud with the statistics of a photo (detail falls with frequency, faster in colour), uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).clip(1 / max(width, height))

    def field(falloff: float) -> npt.NDArray[Any]:
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        values = np.fft.irfft2(frequency**-falloff * phases, (height, width))
        scaled: npt.NDArray[Any] = (values - values.mean()) / values.std()
        return scaled

    grey, warm, cool = 32 * field(1.6), field(2), field(2)
    colours = np.stack([grey + 14 * warm, grey - 7 * warm - 3 * cool, grey + 16 * cool], -1)
    picture: npt.NDArray[Any] = np.rint(128 + colours).clip(0, 255).astype(np.uint8)
    return picture


def restless(width: int, height: int, count: int = 33) -> Iterator[npt.NDArray[Any]]:
    """A pan over a cloud with noise: x264 has to weigh every macroblock."""
    wide, rng = natural(width + 2 * count, height + count), np.random.default_rng(0)
    for step in range(count):
        view = wide[step : step + height, 2 * step : 2 * step + width]
        yield np.rint(view + 1.5 * rng.standard_normal(view.shape)).clip(0, 255).astype(np.uint8)


def bias(got: Any, expected: npt.NDArray[Any]) -> float:
    """The largest mean error of the three channels, in levels."""
    return float(np.abs((np.asarray(got, np.float64) - expected).mean((0, 1))).max())


def add_video(
    container: OutputContainer,
    codec: str,
    rate: int,
    size: tuple[int, int],
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> av.VideoStream:
    """A new video stream of a file, `size` width and height."""
    stream = container.add_stream(codec, rate=rate, options=options)
    assert isinstance(stream, av.VideoStream)
    stream.width, stream.height = size
    stream.pix_fmt = pixels
    return stream


def add_audio(container: OutputContainer, codec: str, rate: int, layout: str = "mono") -> av.AudioStream:
    """A new audio stream of a file."""
    stream = container.add_stream(codec, rate=rate)
    assert isinstance(stream, av.AudioStream)
    stream.layout = layout
    return stream


def moment_of(stamp: int | None, tick: Fraction | None) -> Fraction:
    """The second of a time stamp, which PyAV says may be missing."""
    assert stamp is not None and tick is not None
    return stamp * tick


def encode(
    path: Path, numbers: Sequence[int], size: tuple[int, int], *, codec: str = "libx264", kind: str | None = None
) -> None:
    """Numbered frames at 24 frames per second, the first of which appears at its number."""
    with av.open(str(path), "w", format=kind) as container:
        stream = add_video(container, codec, rate=24, size=size)
        for count, picture in zip(numbers, numbered(numbers, *size), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = count, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def beeps(seconds: float, at: Sequence[float], rate: int = 48000) -> npt.NDArray[Any]:
    """A tenth of a second of a tone at each moment, int16 [n]."""
    moments = np.arange(round(seconds * rate)) / rate
    loud = np.any([(moments >= begin) & (moments < begin + 0.1) for begin in at], axis=0)
    levels: npt.NDArray[Any] = (np.sin(2 * np.pi * 880 * moments) * 20000 * loud).astype(np.int16)
    return levels


def recording(
    path: Path,
    moments: Sequence[float],
    *,
    last: float = 0.0,
    sound: npt.NDArray[Any] | None = None,
    video: str = "libx264",
    audio: str = "aac",
    size: tuple[int, int] = (64, 36),
) -> None:
    """Numbered pictures that appear at `moments`, as a recorder of a screen makes them.

    The last one's packet says `last` seconds, 0 leaves it to the encoder; `sound` has 48,000 samples a second.
    """
    with av.open(str(path), "w") as container:
        options = {"bf": "0"} if video == "libx264" else {}
        stream = add_video(container, video, rate=30, size=size, options=options)
        stream.codec_context.time_base = Fraction(1, 1000)
        heard = None
        if sound is not None:
            heard = add_audio(container, audio, rate=48000)
        packets: list[av.Packet[Any]] = []
        for moment, picture in zip(moments, numbered(range(len(moments)), *size), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = round(moment * 1000), Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if last:
            tick = packets[-1].time_base
            assert tick is not None
            packets[-1].duration = round(last / tick)
        if heard is not None and sound is not None:
            for start in range(0, len(sound), 1024):
                part = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], "s16", "mono")
                part.sample_rate, part.pts, part.time_base = 48000, start, Fraction(1, 48000)
                packets += heard.encode(part)
            packets += heard.encode(None)
        for packet in sorted(packets, key=lambda packet: moment_of(packet.dts, packet.time_base)):
            container.mux(packet)


def samples(path: Path) -> npt.NDArray[Any]:
    """The sound of a file, float32 [n] at 48,000 a second, from its beginning on."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("flt", "mono", 48000)
        parts = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([part.to_ndarray().ravel() for part in parts])


def beeps_in(path: Path) -> list[float]:
    """The moments at which a tone begins after a silence, by the file's clock."""
    times, before = [], -1.0
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("flt", "mono", None)
        for frame in container.decode(audio=0):
            begin = frame.time
            assert begin is not None
            for part in resampler.resample(frame):
                for at in np.flatnonzero(np.abs(part.to_ndarray().ravel()) > 0.2) / part.sample_rate + begin:
                    if at - before > 0.05:
                        times.append(float(at))
                    before = at
    return times
