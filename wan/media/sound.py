"""The sound of a video file on its way into an mp4."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, TypeAlias, cast

import av
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition

from wan.files import say_once
from wan.media.source import Source, fraction, inspect, open_video

AudioPacket: TypeAlias = "Packet[AudioStream]"  # generic for the type checker only
Samples: TypeAlias = npt.NDArray[np.float32]  # [channels, n]

# By FFmpeg's names for the format: what players take in an mp4. The rest becomes AAC.
COPIED = frozenset({"aac", "ac3", "alac", "eac3", "mp3", "opus"})
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_PREROLL = 0.1  # seconds: a decoder needs what comes before the first sound; the file says that it is not played
_TRIAL = 100  # packets, two seconds or so, that tell whether a track can be decoded
_RESTART = 0.5  # seconds by which no clock runs backwards unless it begins again
_LOOSE = 0.04  # seconds: clocks of containers are that rough, and lips are seen to move with the sound up to there
_NOT_MAIN = Disposition.comment | Disposition.hearing_impaired | Disposition.visual_impaired | Disposition.lyrics


class SoundError(Exception):
    """A sound that turned out not to fit into an mp4 on the way."""


@dataclass(frozen=True)
class SoundTrack:
    """The sound track of a video file that is kept: a stream of it that can be decoded."""

    path: str
    index: int  # among all streams of the file
    number: int  # among its sound tracks, from 1
    count: int
    codec: str
    rate: int
    channels: int

    def __str__(self) -> str:
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"track {self.number} of {self.count}, {self.codec}, {self.rate} Hz, {channels}"


def find_sound(path: str | os.PathLike[str]) -> SoundTrack | None:
    """The sound track that `assemble` keeps of a video: the main one of those that can be decoded; None without any.

    Only the beginning of a track is decoded. A track that is passed over is said, and so is a sound that is lost.
    Raises VideoError.
    """
    return choose_track(inspect(path))


def choose_track(source: Source) -> SoundTrack | None:
    """As `find_sound`, of a file whose header is known."""
    if not source.has_audio:
        return None
    with closing(open_video(source.path)) as container:
        streams = container.streams.audio
        best = container.streams.best("audio", container.streams[source.index])
        order = sorted(
            range(len(streams)),
            key=lambda at: (
                streams[at] != best,
                bool(streams[at].disposition & _NOT_MAIN),
                not streams[at].disposition & Disposition.default,
            ),
        )
        tracks = [(at, streams[at].index, _codec(streams[at])) for at in order]
    passed = []
    for at, index, codec in tracks:
        heard = None if codec is None else _try(source.path, index)
        if heard is None:
            passed.append(f"track {at + 1} ({codec or 'a format without a decoder'})")
            continue
        if passed:
            say_once(source.path, f"sound {', '.join(passed)} cannot be decoded; track {at + 1} ({codec}) is used")
        return SoundTrack(source.path, index, at + 1, len(tracks), str(codec), heard.sample_rate, _channels(heard))
    say_once(source.path, f"its sound is left out: {', '.join(passed)} cannot be decoded; convert it to AAC to keep it")
    return None


@dataclass(frozen=True)
class Hearing:
    """What decoding a whole track tells. Times are in seconds on the file's clock."""

    start: float
    end: float
    rate: int  # the highest
    channels: int  # the most
    is_steady: bool  # one format throughout, and a clock that never runs backwards


def listen(track: SoundTrack) -> Hearing | None:
    """Decode a track from beginning to end; None when nothing of it can be heard."""
    formats: set[tuple[int, str]] = set()
    channels, steady = 1, True
    start = end = before = None
    for packet, frames in _timed(track):
        if packet.size:
            steady &= packet.pts is not None and (before is None or packet.pts > before)
            before = packet.pts if packet.pts is not None else before
        for moment, frame in frames:
            formats.add((frame.sample_rate, frame.layout.name))
            channels = max(channels, _channels(frame))
            begin = end if moment is None else moment
            start = begin if start is None else start
            end = (begin or 0.0) + frame.samples / frame.sample_rate
    if start is None or end is None:
        return None
    return Hearing(start, end, max(rate for rate, _ in formats), channels, steady and len(formats) == 1)


class Sound:
    """A sound track from `start` to `end` seconds on its file's clock, on its way into an mp4; `start` becomes 0.

    Nothing moves against the pictures. It is copied where an mp4 may hold it as it is, else it becomes AAC, in one
    format throughout, silent where the track has gaps. `last` is the time of the last packet that was passed on, in
    seconds of the output; None when there was none. Raises SoundError where that does not succeed.
    """

    def __init__(self, track: SoundTrack, hearing: Hearing, start: float, end: float) -> None:
        self.track, self.hearing, self.start, self.end = track, hearing, start, end
        self.last: float | None = None
        self._packets: Iterator[AudioPacket] = iter(())
        self._waiting: AudioPacket | None = None

    def open(self, output: OutputContainer) -> None:
        """Add a stream to a file that has no packets yet."""
        if self.track.codec in COPIED and self.hearing.is_steady and _fits(self.track):
            with closing(open_video(self.track.path)) as container:
                self._packets = self._copied(output.add_stream_from_template(_stream(container, self.track)))
        else:
            self._packets = self._encoded(_add_aac(output, self.hearing.rate, self.hearing.channels))
        self._waiting = self._next()

    def mux_until(self, output: OutputContainer, seconds: float) -> None:
        """Pass on the packets up to a moment of the output."""
        while self._waiting is not None:
            moment = float((self._waiting.pts or 0) * fraction(self._waiting.time_base))
            if moment > seconds:
                return
            try:
                output.mux(self._waiting)
            except av.error.ArgumentError as error:  # any other is the disk's
                raise SoundError(str(error)) from error
            self.last = moment
            self._waiting = self._next()

    def _next(self) -> AudioPacket | None:
        try:
            return next(self._packets, None)
        except (av.FFmpegError, ValueError) as error:
            raise SoundError(str(error)) from error

    def _copied(self, stream: AudioStream) -> Iterator[AudioPacket]:
        with closing(open_video(self.track.path)) as container:
            source = _stream(container, self.track)
            for packet in _demux(container, source):
                if packet.size and self._is_within(packet):
                    packet.pts = packet.dts = (packet.pts or 0) - round(self.start / fraction(packet.time_base))
                    packet.stream = stream
                    yield packet

    def _encoded(self, stream: AudioStream) -> Iterator[AudioPacket]:
        rate, layout = stream.codec_context.sample_rate, stream.codec_context.layout.name
        written = 0
        for samples in self._placed(rate, layout):
            frame = AudioFrame.from_ndarray(samples, "fltp", layout)
            # in samples: the encoder loses frames whose clock is coarser
            frame.sample_rate, frame.pts, frame.time_base = rate, written, Fraction(1, rate)
            written += samples.shape[1]
            yield from stream.encode(frame)
        yield from stream.encode(None)

    def _placed(self, rate: int, layout: str) -> Iterator[Samples]:
        """The sound without gaps or overlaps from 0 on: each piece is where its time says, to `_LOOSE` seconds."""
        written, limit, loose = 0, round((self.end - self.start) * rate), round(_LOOSE * rate)
        for moment, samples in self._resampled(rate, layout):
            where = written if moment is None else round((moment - self.start) * rate)
            if written and abs(where - written) <= loose:
                where = written
            if where >= limit:
                return
            early = max(written - where, 0)
            samples = samples[:, early : limit - where]
            while samples.shape[1] and written < where:
                silence = np.zeros((samples.shape[0], min(where - written, rate)), np.float32)
                written += silence.shape[1]
                yield silence
            if samples.shape[1]:
                written += samples.shape[1]
                yield np.ascontiguousarray(samples)

    def _resampled(self, rate: int, layout: str) -> Iterator[tuple[float | None, Samples]]:
        """The track in one format, with the moment of each piece; None goes on from the piece before."""
        resampler, now = None, None
        for _, frames in _timed(self.track):
            for moment, frame in frames:
                kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                if resampler is None or kind != now:
                    yield from _flushed(resampler)
                    resampler, now = AudioResampler("fltp", layout, rate), kind
                frame.pts = None
                for piece in resampler.resample(frame):
                    yield moment, cast(Samples, piece.to_ndarray())
                    moment = None
        yield from _flushed(resampler)

    def _is_within(self, packet: AudioPacket) -> bool:
        if packet.pts is None:
            return False
        tick = fraction(packet.time_base)
        length = float((packet.duration or 0) * tick)
        begin = float(packet.pts * tick)
        return begin + length > self.start - _PREROLL and begin + length / 2 < self.end


class SoundsInTurn(Sound):
    """Sounds one after the other as one AAC track, each from its moment of the output in seconds; silent between them.

    None begins before the one before it ends.
    """

    def __init__(self, placed: Sequence[tuple[float, Sound]]) -> None:
        self._sounds = placed
        self.last = None
        self._packets = iter(())
        self._waiting = None

    def open(self, output: OutputContainer) -> None:
        heard = [sound.hearing for _, sound in self._sounds]
        stream = _add_aac(output, max(one.rate for one in heard), max(one.channels for one in heard))
        self._packets = self._encoded(stream)
        self._waiting = self._next()

    def _placed(self, rate: int, layout: str) -> Iterator[Samples]:
        written = 0
        for moment, sound in self._sounds:
            while written < (begin := round(moment * rate)):
                silence = np.zeros((1 if layout == "mono" else 2, min(begin - written, rate)), np.float32)
                written += silence.shape[1]
                yield silence
            for samples in sound._placed(rate, layout):
                written += samples.shape[1]
                yield samples


def _add_aac(output: OutputContainer, rate: int, channels: int) -> AudioStream:
    """A stream for sound of at most so many samples a second and channels."""
    stream = output.add_stream("aac", rate=next((one for one in _AAC_RATES if one >= rate), _AAC_RATES[-1]))
    stream.codec_context.layout = "mono" if channels == 1 else "stereo"
    return stream


def _flushed(resampler: AudioResampler | None) -> Iterator[tuple[None, Samples]]:
    if resampler is not None:
        for piece in resampler.resample(None):
            yield None, cast(Samples, piece.to_ndarray())


def _codec(stream: AudioStream) -> str | None:
    """FFmpeg's name for the format; None where it has no decoder, for which PyAV leaves the context out."""
    context = cast(Any, stream.codec_context)
    return None if context is None else str(context.codec.canonical_name)


def _channels(frame: AudioFrame) -> int:
    return int(frame.layout.nb_channels)


def _try(path: str, index: int) -> AudioFrame | None:
    """The first frame of a track; None where most of its beginning cannot be decoded, as of one that is encrypted."""
    packets = errors = 0
    first: AudioFrame | None = None
    with closing(open_video(path)) as container:
        stream = cast(AudioStream, container.streams[index])
        for packet in islice(_demux(container, stream), _TRIAL):
            packets += 1
            try:
                frames = stream.decode(packet)
            except av.FFmpegError:
                errors += 1
                continue
            first = next(iter(frames), None) if first is None else first
    return first if 2 * errors <= packets else None


def _fits(track: SoundTrack) -> bool:
    """Whether an mp4 may hold the track as it is. FFmpeg alone knows its rules: MP3 below 16 kHz, say, is refused."""
    try:
        with closing(open_video(track.path)) as container, av.open(io.BytesIO(), "w", format="mp4") as output:
            source = _stream(container, track)
            stream = output.add_stream_from_template(source)
            packets = (packet for packet in _demux(container, source) if packet.size)
            for packet in islice(packets, _TRIAL):
                packet.stream = stream
                output.mux(packet)
    except (av.FFmpegError, ValueError):
        return False
    return True


def _stream(container: InputContainer, track: SoundTrack) -> AudioStream:
    return cast(AudioStream, container.streams[track.index])


def _timed(track: SoundTrack) -> Iterator[tuple[AudioPacket, list[tuple[float | None, AudioFrame]]]]:
    """As `_decoded`, each frame with its moment, which goes on where two put-together files restart the clock."""
    end, shift = None, 0.0
    for packet, frames in _decoded(track):
        timed: list[tuple[float | None, AudioFrame]] = []
        for frame in frames:
            moment = None if frame.time is None else frame.time + shift
            if moment is not None and end is not None and moment < end - _RESTART:
                shift += end - moment
                moment = end
            begin = end if moment is None else moment
            end = None if begin is None else begin + frame.samples / frame.sample_rate
            timed.append((moment, frame))
        yield packet, timed


def _decoded(track: SoundTrack) -> Iterator[tuple[AudioPacket, list[AudioFrame]]]:
    """Every packet of a track with what it decodes to, the last of them empty; nothing for one that is damaged."""
    with closing(open_video(track.path)) as container:
        stream = _stream(container, track)
        for packet in _demux(container, stream):
            try:
                frames = stream.decode(packet)
            except av.FFmpegError:
                say_once(track.path, "its sound is damaged in places and is silent there")
                frames = []
            yield packet, frames


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
