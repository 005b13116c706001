"""The sound of a video file on its way into an mp4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from typing import TypeAlias, cast

from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from wan.media.source import fraction, open_video

AudioPacket: TypeAlias = "Packet[AudioStream]"  # generic for the type checker only

COPIED = frozenset(
    {"aac", "ac3", "alac", "eac3", "mp3", "mp3float", "opus", "libopus"}
)  # what players take in an mp4; the rest becomes AAC


class Sound:
    """The main audio stream of a file, from `start` to `end` seconds on that file's clock; `start` becomes 0.

    Whole packets are kept or left out, so that nothing moves against the pictures; a packet is 20 to 100 ms.
    """

    def __init__(self, path: str, start: float, end: float) -> None:
        self.path, self.start, self.end = path, start, end
        self._packets: Iterator[AudioPacket] = iter(())
        self._waiting: AudioPacket | None = None
        self._output: OutputContainer | None = None

    def open(self, output: OutputContainer) -> None:
        """Add a stream to a file that has no packets yet."""
        with closing(open_video(self.path)) as container:
            source = _stream_of(container)
            copied = source.codec_context.name in COPIED
            if copied:
                stream = output.add_stream_from_template(source)
            else:
                context = source.codec_context
                stream = output.add_stream("aac", rate=min(context.sample_rate, 48000))
                stream.codec_context.layout = "mono" if context.channels == 1 else "stereo"
        self._output = output
        self._packets = self._copied(stream) if copied else self._encoded(stream)
        self._waiting = next(self._packets, None)

    def mux_until(self, seconds: float | None) -> None:
        """Pass on the packets up to a moment of the output, all of them for None."""
        assert self._output is not None
        while self._waiting is not None:
            stamp, tick = self._waiting.pts, self._waiting.time_base
            if seconds is not None and stamp is not None and stamp * fraction(tick) > seconds:
                return
            self._output.mux(self._waiting)
            self._waiting = next(self._packets, None)

    def _copied(self, stream: AudioStream) -> Iterator[AudioPacket]:
        with closing(open_video(self.path)) as container:
            source = _stream_of(container)
            tick = fraction(source.time_base)
            offset = round(self.start / tick)
            for packet in container.demux(source):
                if packet.pts is None or packet.size == 0 or packet.pts < offset:
                    continue
                if packet.pts * tick >= self.end:
                    return
                packet.pts -= offset
                packet.dts = packet.pts
                packet.stream = stream
                yield packet

    def _encoded(self, stream: AudioStream) -> Iterator[AudioPacket]:
        with closing(open_video(self.path)) as container:
            source = _stream_of(container)
            rate = source.codec_context.sample_rate
            for frame in container.decode(source):
                if frame.time is None or frame.time < self.start:
                    continue
                if frame.time >= self.end:
                    break
                # the encoder loses frames whose clock is coarser than a sample
                frame.pts, frame.time_base = round((frame.time - self.start) * rate), Fraction(1, rate)
                yield from stream.encode(frame)
            yield from stream.encode(None)


def _stream_of(container: InputContainer) -> AudioStream:
    return cast(AudioStream, container.streams.best("audio"))
