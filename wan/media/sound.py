"""The sound of a video file on its way into an mp4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from typing import TypeAlias, cast

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from wan.media.source import fraction, open_video, say_once

AudioPacket: TypeAlias = "Packet[AudioStream]"  # generic for the type checker only

# By FFmpeg's names for the format: what players take in an mp4. The rest becomes AAC.
COPIED = frozenset({"aac", "ac3", "alac", "eac3", "mp3", "opus"})
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_PREROLL = 0.1  # seconds: a decoder needs what comes before the first sound; the file says that it is not played


class Sound:
    """The main audio stream of a file, from `start` to `end` seconds on that file's clock; `start` becomes 0.

    Nothing moves against the pictures. The end is that of a packet, about 20 ms, the nearest. `last` is the time of the
    last packet that was passed on, in seconds of the output; None when there was none.
    """

    def __init__(self, path: str, start: float, end: float) -> None:
        self.path, self.start, self.end = path, start, end
        self.last: float | None = None
        self._packets: Iterator[AudioPacket] = iter(())
        self._waiting: AudioPacket | None = None

    def open(self, output: OutputContainer) -> None:
        """Add a stream to a file that has no packets yet."""
        with closing(open_video(self.path)) as container:
            source = _stream_of(container)
            context = source.codec_context
            if context.codec.canonical_name in COPIED:
                self._packets = self._copied(output.add_stream_from_template(source))
            else:
                rate = next((rate for rate in _AAC_RATES if rate >= context.sample_rate), _AAC_RATES[-1])
                stream = output.add_stream("aac", rate=rate)
                stream.codec_context.layout = "mono" if context.channels == 1 else "stereo"
                self._packets = self._encoded(stream)
        self._waiting = next(self._packets, None)

    def mux_until(self, output: OutputContainer, seconds: float) -> None:
        """Pass on the packets up to a moment of the output."""
        while self._waiting is not None:
            moment = float((self._waiting.pts or 0) * fraction(self._waiting.time_base))
            if moment > seconds:
                return
            output.mux(self._waiting)
            self.last = moment
            self._waiting = next(self._packets, None)

    def _copied(self, stream: AudioStream) -> Iterator[AudioPacket]:
        with closing(open_video(self.path)) as container:
            source = _stream_of(container)
            for packet in _demux(container, source):
                if packet.size and self._is_within(packet):
                    packet.pts = packet.dts = (packet.pts or 0) - round(self.start / fraction(packet.time_base))
                    packet.stream = stream
                    yield packet

    def _encoded(self, stream: AudioStream) -> Iterator[AudioPacket]:
        with closing(open_video(self.path)) as container:
            source = _stream_of(container)
            rate = source.codec_context.sample_rate
            for packet in _demux(container, source):
                try:
                    frames = source.decode(packet)
                except av.FFmpegError:
                    say_once(self.path, "its sound is damaged in places and is silent there")
                    continue
                for frame in frames:
                    if self._is_within(frame):
                        # in samples: the encoder loses frames whose clock is coarser
                        frame.pts, frame.time_base = round(((frame.time or 0.0) - self.start) * rate), Fraction(1, rate)
                        yield from stream.encode(frame)
            yield from stream.encode(None)

    def _is_within(self, piece: AudioPacket | AudioFrame) -> bool:
        if piece.pts is None:
            return False
        tick = fraction(piece.time_base)
        length = float((piece.duration or 0) * tick)
        begin = float(piece.pts * tick)
        return begin + length > self.start - _PREROLL and begin + length / 2 < self.end


def _stream_of(container: InputContainer) -> AudioStream:
    return cast(AudioStream, container.streams.best("audio"))


def _demux(container: InputContainer, stream: AudioStream) -> Iterator[AudioPacket]:
    """Every packet up to the end or to where the file is broken."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        if packet is None:
            return
        yield packet
