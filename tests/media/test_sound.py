"""The sound of a source is kept with its pictures, whatever it is made of, or left out with one line."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from tests.support.media_samples import CORPUS, add_audio, add_video, beeps, beeps_in, moment_of, number, numbered
from wan import files, media
from wan.media import assembly, sound
from wan.timeline import Part, Timeline


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    files._say.cache_clear()


def film(
    path: Path,
    tracks: Sequence[tuple[str, npt.NDArray[Any], int, str]],
    *,
    first: int = 0,
    kind: str | None = None,
    gap: tuple[float, float] = (9, 9),
) -> None:
    """Three seconds, or less where the sound is shorter, of numbered pictures from `first` on, at 24 a second.

    A track is codec, int16 [n], sample rate, layout; packets that begin within `gap` are left out.
    """
    seconds = min((len(levels) / rate for _, levels, rate, _ in tracks), default=3.0)
    with av.open(str(path), "w", format=kind) as container:
        video = container.add_stream("libx264", rate=24, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 64, 36, "yuv420p"
        heard = []
        for codec, _, rate, layout in tracks:
            stream = add_audio(container, codec, rate, layout)
            stream.disposition = av.stream.Disposition.default
            heard.append(stream)
        packets = []
        for at, picture in enumerate(numbered(range(first, first + round(24 * seconds)), 64, 36), first):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 24)
            packets += video.encode(frame)
        packets += video.encode(None)
        for stream, (_, levels, rate, layout) in zip(heard, tracks, strict=True):
            for start in range(0, len(levels), 1024):
                part = levels[start : start + 1024]
                many = part.repeat(av.AudioLayout(layout).nb_channels)[None]
                sound = av.AudioFrame.from_ndarray(many, "s16", layout)
                sound.sample_rate, sound.pts = rate, start + round(first / 24 * rate)
                sound.time_base = Fraction(1, rate)
                packets += stream.encode(sound)
            packets += stream.encode(None)
        for packet in sorted(packets, key=lambda packet: moment_of(packet.dts, packet.time_base)):
            if packet.stream is video or not gap[0] <= moment_of(packet.pts, packet.time_base) < gap[1]:
                container.mux(packet)


def joined(path: Path) -> Path:
    """The film with one clip of 8 new pictures."""
    clip, out = path.with_name("clip.mp4"), path.with_name("joined.mp4")
    media.write_video(clip, numbered(range(1000, 1009), 64, 36), 24, keyframes=frozenset({0, 1}))
    media.assemble(path, [clip], out, drops=[1])
    with av.open(str(out)) as container:
        shown = [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert shown == [*range(len(shown) - 8), *range(1001, 1009)]
    return out


def codec_of(path: Path) -> str:
    track = media.find_sound(path)
    assert track is not None
    return track.codec


TWO = beeps(3, [1.0, 2.0])


def unknown(path: Path) -> None:
    """Make the last track one of a format that FFmpeg knows no decoder for, as Apple's spatial sound."""
    data = path.read_bytes()
    last = data.rindex(b"trak")
    path.write_bytes(data[:last] + data[last:].replace(b"mp4a", b"apac").replace(b"esds", b"free"))


def scrambled(path: Path) -> None:
    """An AAC track whose packets are noise, as of a film with copy protection."""
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(container.streams[2]) if packet.size]
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    for at, size in spans:
        assert at is not None
        data[at : at + size] = rng.bytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [unknown, scrambled])
def test_of_several_tracks_one_that_can_be_decoded_is_kept(
    spoil: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.mov"
    film(path, [("aac", TWO, 48000, "mono"), ("aac", beeps(3, [0.2]), 48000, "5.1")])
    assert str(media.find_sound(path)) == "track 2 of 2, aac, 48000 Hz, 6 channels"  # the main one, by its channels
    spoil(path)
    assert str(media.find_sound(path)) == "track 1 of 2, aac, 48000 Hz, mono"
    assert beeps_in(joined(path)) == pytest.approx([1, 2], abs=0.03)
    assert len([record for record in caplog.records if "track 1 (aac) is used" in record.message]) == 1


def test_a_sound_that_cannot_be_decoded_is_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.mov"
    film(path, [("aac", TWO, 48000, "mono")])
    unknown(path)
    assert media.find_sound(path) is None
    assert not media.probe(joined(path)).has_audio
    assert len([record for record in caplog.records if "its sound is left out" in record.message]) == 1


@pytest.mark.parametrize("codec", ["mp2", "aac", "ac3", "libmp3lame"])
@pytest.mark.parametrize("second", [(48000, "stereo"), (44100, "stereo"), (48000, "mono")])
def test_channels_and_rate_may_change(codec: str, second: tuple[int, str], tmp_path: Path) -> None:
    """As a recorder of broadcasts writes it: the format is in each packet, and the file's header knows the first."""
    first, rate, layout = beeps(1.5, [1.0], 44100), *second
    film(tmp_path / "1", [(codec, first, 44100, "mono")], kind="mpegts")
    film(tmp_path / "2", [(codec, beeps(1.5, [0.5], rate), rate, layout)], kind="mpegts", first=36)
    path = tmp_path / "a.ts"
    path.write_bytes((tmp_path / "1").read_bytes() + (tmp_path / "2").read_bytes())
    out = joined(path)
    assert beeps_in(out) == pytest.approx([1, 2], abs=0.05)
    with av.open(str(out)) as container:
        assert container.streams.audio[0].layout.name == layout


@pytest.mark.parametrize(
    ("name", "codec", "rate", "becomes"),
    [
        ("a.mkv", "libmp3lame", 8000, "aac"),
        ("a.mkv", "libmp3lame", 11025, "aac"),
        ("a.mkv", "libmp3lame", 16000, "mp3"),
        ("a.mkv", "libopus", 48000, "opus"),
        ("a.mkv", "alac", 44100, "alac"),
        ("a.avi", "adpcm_ima_wav", 22050, "aac"),
        ("a.avi", "pcm_alaw", 8000, "aac"),
        ("a.mkv", "flac", 96000, "aac"),
        ("a.mkv", "eac3", 48000, "eac3"),
    ],
)
def test_what_an_mp4_may_hold_is_copied_and_the_rest_is_encoded_again(
    name: str, codec: str, rate: int, becomes: str, tmp_path: Path
) -> None:
    film(tmp_path / name, [(codec, beeps(3, [1.0, 2.0], rate), rate, "mono")])
    out = joined(tmp_path / name)
    assert codec_of(out) == becomes
    assert beeps_in(out) == pytest.approx([1, 2], abs=0.05)


@pytest.mark.parametrize(("codec", "becomes"), [("aac", "aac"), ("pcm_s16le", "aac"), ("libmp3lame", "mp3")])
def test_what_follows_a_gap_in_the_sound_stays_in_its_place(codec: str, becomes: str, tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", [(codec, TWO, 48000, "mono")], gap=(1.3, 1.8))
    out = joined(tmp_path / "a.mkv")
    assert codec_of(out) == becomes
    assert beeps_in(out) == pytest.approx([1, 2], abs=0.05)


def test_sound_whose_clock_begins_again_goes_on(tmp_path: Path) -> None:
    """Two files that were put together as they are."""
    film(tmp_path / "1", [("aac", beeps(1.5, [1.0]), 48000, "mono")], kind="mpegts")
    film(tmp_path / "2", [("aac", beeps(1.5, [0.5]), 48000, "mono")], kind="mpegts")
    path = tmp_path / "a.ts"
    path.write_bytes((tmp_path / "1").read_bytes() + (tmp_path / "2").read_bytes())
    clip = tmp_path / "clip.mp4"
    media.write_video(clip, numbered(range(1000, 1009), 64, 36), 24, keyframes=frozenset({0, 1}))
    media.assemble(path, [clip], tmp_path / "joined.mp4", drops=[1])
    assert beeps_in(tmp_path / "joined.mp4") == pytest.approx([1, 2], abs=0.1)


def test_sound_before_the_first_picture_is_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a recording of a browser, whose microphone is ready before its camera."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video, track = add_video(container, "libx264", 24, (64, 36)), add_audio(container, "aac", 48000)
        packets = []
        for count, picture in enumerate(numbered(range(24), 64, 36)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = 24 + count, Fraction(1, 24)
            packets += video.encode(frame)
        levels = av.AudioFrame.from_ndarray(beeps(2, [0.5, 1.5])[None], "s16", "mono")
        levels.sample_rate, levels.pts, levels.time_base = 48000, 0, Fraction(1, 48000)
        packets += [*video.encode(None), *track.encode(levels), *track.encode(None)]
        container.mux(sorted(packets, key=lambda packet: moment_of(packet.dts, packet.time_base)))
    assert beeps_in(joined(tmp_path / "a.mkv")) == pytest.approx([0.5], abs=0.05)
    assert "the first 1.0 s of its sound, before its first picture, are left out" in caplog.text


def test_a_sound_that_fails_on_the_way_does_not_cost_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(sound.Sound):
        def _next(self) -> sound.AudioPacket | None:
            if self.last is not None and self.last > 1:
                raise sound.SoundError("Invalid argument")
            return super()._next()

    monkeypatch.setattr(assembly, "Sound", Failing)
    film(tmp_path / "a.mp4", [("aac", TWO, 48000, "mono")])
    assert not media.probe(joined(tmp_path / "a.mp4")).has_audio
    assert len([record for record in caplog.records if "its sound is left out" in record.message]) == 1


def test_a_file_without_sound_has_none_to_be_missed(caplog: pytest.LogCaptureFixture) -> None:
    assert media.find_sound(CORPUS / "h264_faststart.mp4") is None
    assert not caplog.records


@pytest.mark.parametrize("silent", ["", "first", "last"])
def test_a_bridge_keeps_the_pictures_and_the_sound_of_both_videos_where_they_belong(
    silent: str, tmp_path: Path
) -> None:
    first, last, out = (tmp_path / f"{name}.mp4" for name in ("first", "last", "joined"))
    film(first, [] if silent == "first" else [("aac", beeps(3, [1.0, 2.0], 44100), 44100, "mono")])
    film(last, [] if silent == "last" else [("aac", beeps(3, [0.5, 2.5]), 48000, "stereo")])
    seconds = [sum(1 for _ in pictures_of(path)) / 24 for path in (first, last)]
    clip = tmp_path / "clip.mp4"
    media.write_video(clip, numbered([*range(1000, 1012), 0], 64, 36), 24, keyframes=frozenset({0, 1}))
    joined = media.Assembly(first, out, into=last)
    joined.renew([clip], [1])  # the last clip is not there yet
    begun = [] if silent == "first" else [1.0, 2.0]
    assert len(pictures_of(out)) == round(24 * seconds[0]) + 12
    count = joined.renew([clip, clip], [1, 1], complete=True)
    shown = pictures_of(out)
    assert count == len(shown) == round(24 * seconds[0]) + 24 + round(24 * seconds[1]) - 1
    # the last clip ends with the first picture of what it leads into, which is shown once
    assert shown[-round(24 * seconds[1]) :] == list(range(round(24 * seconds[1])))
    moment = seconds[0] + 1 - 1 / 24
    expected = begun if silent == "last" else [*begun, moment + 0.5, moment + 2.5]
    assert beeps_in(out) == pytest.approx(expected, abs=0.04)


def pictures_of(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_a_joined_video_is_heard_to_the_end_of_its_sound(tmp_path: Path) -> None:
    heard, clip, out = (tmp_path / f"{name}.mp4" for name in ("heard", "clip", "joined"))
    film(heard, [("aac", beeps(3, [1.0, 2.9]), 48000, "mono")])
    media.write_video(clip, numbered(range(24), 64, 36), 24)
    track = media.find_sound(heard)
    assert track is not None
    hearing = sound.listen(track)
    assert hearing is not None
    media.join_videos([clip], out, sound=sound.Sound(track, hearing, hearing.start, hearing.end))
    kept, whole = (sound.listen(one) for path in (out, heard) if (one := media.find_sound(path)))
    assert kept is not None and whole is not None
    assert kept.end - kept.start == pytest.approx(whole.end - whole.start, abs=0.03)


def test_a_track_of_which_nothing_is_heard_is_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video, track = add_video(container, "libx264", 24, (64, 36)), add_audio(container, "aac", 48000)
        levels = av.AudioFrame.from_ndarray(beeps(1, [0.5])[None], "s16", "mono")
        levels.sample_rate, levels.pts, levels.time_base = 48000, 0, Fraction(1, 48000)
        for picture in numbered(range(24), 64, 36):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")))
        container.mux([*video.encode(None), *track.encode(levels), *track.encode(None)])
    begin = assembly._Begin.read(path, None)
    assert begin.sound(0.5) is not None and begin.sound(0.5, skipped=2) is None
    assert replace(begin, hearing=None).sound(0.5) is None and replace(begin, track=None).sound(0.5) is None


def test_the_sound_of_what_follows_ends_with_its_pictures() -> None:
    asked: list[Any] = []
    joined: Any = media.Assembly("a.mp4", "b.mp4", into="c.mp4")
    follows = Part(24, Fraction(24), drop=1)
    joined._begin = SimpleNamespace(sound=asked.append)
    joined._end = SimpleNamespace(sound=lambda *words: asked.append(words), part=follows)
    timeline = Timeline([Part(48, Fraction(24)), Part(24, Fraction(24)), follows], Fraction(24))
    assert joined._sound(timeline, True) is None
    assert asked == [2.0, (pytest.approx(23 / 24), pytest.approx(1 / 24))]


def test_packets_are_copied_from_just_before_the_begin_to_the_end() -> None:
    unused: Any = None
    one = sound.Sound(unused, unused, 10.0, 11.0)

    def within(begin: float | None) -> bool:
        packet: Any = SimpleNamespace(
            pts=None if begin is None else round(1000 * begin), duration=100, time_base=Fraction(1, 1000)
        )
        return one._is_within(packet)

    assert [within(begin) for begin in (None, 0, 10, 10.9, 10.96, 20)] == [False, False, True, True, False, False]


def about(seconds: float) -> Any:
    return pytest.approx(seconds)


def track_of(**values: Any) -> sound.SoundTrack:
    plain: dict[str, Any] = {"path": "a.mkv", "index": 1, "number": 1, "count": 1, "codec": "aac", "rate": 48000}
    return sound.SoundTrack(**(plain | {"channels": 1} | values))


def heard_frame(time: float | None, samples: int, rate: int = 1000, channels: int = 1) -> Any:
    layout = SimpleNamespace(name={1: "mono", 2: "stereo"}[channels], nb_channels=channels)
    return SimpleNamespace(time=time, samples=samples, sample_rate=rate, layout=layout)


def test_a_track_is_named_by_its_channels() -> None:
    names = [str(track_of(channels=channels)) for channels in (1, 2, 6)]
    assert [name.rpartition(", ")[2] for name in names] == ["mono", "stereo", "6 channels"]


@pytest.mark.parametrize(
    ("frames", "moments"),
    [
        ([(0.0, 100), (0.1, 100), (0.2, 50)], [0.0, 0.1, 0.2]),
        ([(1.0, 100), (None, 100), (1.2, 50)], [1.0, None, 1.2]),
        ([(None, 100), (2.0, 100)], [None, 2.0]),
        ([(5.0, 100), (0.0, 100), (0.1, 100)], [5.0, 5.1, 5.2]),  # begins again: goes on from where it was
        ([(5.0, 100), (4.7, 100), (5.2, 100)], [5.0, 4.7, 5.2]),  # no clock is exact
        ([(5.0, 100), (4.61, 100)], [5.0, 4.61]),
        ([(5.0, 100), (4.59, 100)], [5.0, 5.1]),
        ([(5.0, 100), (9.0, 100)], [5.0, 9.0]),  # a gap
        ([(5.0, 500), (0.0, 500), (0.5, 500), (0.0, 500), (0.5, 500)], [5.0, 5.5, 6.0, 6.5, 7.0]),
        ([(5.0, 100), (None, 900), (5.4, 100)], [5.0, None, 6.0]),
    ],
)
def test_a_clock_of_sound_that_begins_again_goes_on(
    frames: list[tuple[float | None, int]], moments: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [(None, [heard_frame(*one)]) for one in frames]
    monkeypatch.setattr(sound, "_decoded", lambda track: iter(made))
    timed = [moment for _, some in sound._timed(track_of()) for moment, _ in some]
    assert [moment is None for moment in timed] == [moment is None for moment in moments]
    assert [moment for moment in timed if moment is not None] == pytest.approx(
        [moment for moment in moments if moment is not None]
    )


def packet_at(pts: int | None, size: int = 9) -> Any:
    return SimpleNamespace(pts=pts, size=size)


@pytest.mark.parametrize(
    ("stamps", "steady"),
    [([0, 1, 2], True), ([0, 2, 1], False), ([0, 1, 1], False), ([0, None, 1], False), ([-3, 0, 5], True)],
)
def test_a_track_is_steady_where_its_clock_never_runs_backwards(
    stamps: list[int | None], steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = [(packet_at(stamp), [(0.1 * at, heard_frame(None, 100))]) for at, stamp in enumerate(stamps)]
    timed.append((packet_at(None, 0), []))  # the flush at the end has no stamp
    monkeypatch.setattr(sound, "_timed", lambda track: iter(timed))
    heard = sound.listen(track_of())
    assert heard == sound.Hearing(0.0, about(0.3), 1000, 1, steady)


def test_what_is_heard_of_a_track_is_its_most_channels_and_its_highest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def listened(*frames: Any) -> sound.Hearing | None:
        timed = [(packet_at(at), [one]) for at, one in enumerate(frames)]
        monkeypatch.setattr(sound, "_timed", lambda track: iter(timed))
        return sound.listen(track_of())

    loud, deep = (2.0, heard_frame(None, 100, channels=2)), (2.1, heard_frame(None, 400, 2000))
    assert listened(loud, deep) == sound.Hearing(2.0, about(2.3), 2000, 2, False)
    assert listened(loud) == sound.Hearing(2.0, about(2.1), 1000, 2, True)
    # a piece without a moment goes on from the one before, or begins at 0
    assert listened(loud, (None, heard_frame(None, 100, channels=2))) == sound.Hearing(2.0, about(2.2), 1000, 2, True)
    assert listened() is None
    assert listened((None, heard_frame(None, 100))) is None  # at no moment


def placed(pieces: list[tuple[float | None, int]], start: float = 10.0, end: float = 12.0) -> list[list[float]]:
    """The samples at 100 a second; those of the n-th piece are n."""
    one = sound.Sound(track_of(), sound.Hearing(0, 99, 100, 2, False), start, end)
    made = [(moment, np.full((2, count), at, np.float32)) for at, (moment, count) in enumerate(pieces, 1)]
    vars(one)["_resampled"] = lambda rate, layout: iter(made)
    return [part[0].tolist() for part in one._placed(100, "stereo")]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(10.0, 3), (10.03, 2)], [[1] * 3, [2] * 2]),
        ([(10.0, 3), (None, 2)], [[1] * 3, [2] * 2]),
        ([(9.98, 5), (None, 2)], [[1] * 3, [2] * 2]),  # what is before the begin is left out
        ([(9.9, 5), (None, 2)], [[2] * 2]),
        ([(10.02, 3)], [[0] * 2, [1] * 3]),  # at the begin a gap is one
        ([(10.0, 3), (10.07, 2)], [[1] * 3, [2] * 2]),  # clocks are that rough
        ([(10.0, 3), (10.08, 2)], [[1] * 3, [0] * 5, [2] * 2]),
        ([(10.0, 9), (10.05, 9)], [[1] * 9, [2] * 9]),
        ([(10.0, 9), (10.04, 9)], [[1] * 9, [2] * 4]),  # an overlap is heard once
        ([(10.0, 3), (11.98, 9)], [[1] * 3, [0] * 100, [0] * 95, [2] * 2]),  # up to the end
        ([(10.0, 199), (None, 9)], [[1] * 199, [2]]),
        ([(10.0, 200), (None, 9)], [[1] * 200]),
        ([(12.0, 9)], []),
        ([(8.0, 100), (10.0, 5)], [[2] * 5]),
    ],
)
def test_each_piece_of_sound_is_where_its_time_says(
    pieces: list[tuple[float | None, int]], expected: list[list[float]]
) -> None:
    assert placed(pieces) == expected


def test_nothing_is_read_after_the_end_of_what_is_shown() -> None:
    def pieces() -> Any:
        yield 10.0, np.zeros((1, 100), np.float32)
        yield 12.0, np.zeros((1, 100), np.float32)
        raise AssertionError

    one = sound.Sound(track_of(), sound.Hearing(0, 99, 100, 1, False), 10.0, 11.5)
    vars(one)["_resampled"] = lambda rate, layout: pieces()
    assert [part.shape for part in one._placed(100, "mono")] == [(1, 100)]


def test_sounds_in_turn_are_silent_between_each_other() -> None:
    def of(level: float, *counts: int) -> Any:
        return SimpleNamespace(
            _placed=lambda rate, layout: (
                np.full((1 if layout == "mono" else 2, count), level, np.float32) for count in counts
            )
        )

    for layout, channels in (("mono", 1), ("stereo", 2)):
        parts = list(sound.SoundsInTurn([(0.05, of(1, 3, 2)), (1.5, of(2, 4))])._placed(100, layout))
        assert [(part.shape, part[0, 0]) for part in parts] == [
            ((channels, 5), 0),
            ((channels, 3), 1),
            ((channels, 2), 1),
            ((channels, 100), 0),
            ((channels, 40), 0),
            ((channels, 4), 2),
        ]


@pytest.mark.parametrize(
    ("rate", "channels", "made"),
    [
        (48000, 1, (48000, "mono")),
        (44100, 2, (44100, "stereo")),
        (44101, 6, (48000, "stereo")),
        (96000, 2, (48000, "stereo")),
        (6000, 1, (8000, "mono")),
        (8001, 1, (11025, "mono")),
        (11026, 1, (12000, "mono")),
        (12001, 1, (16000, "mono")),
        (16001, 1, (22050, "mono")),
        (22051, 1, (24000, "mono")),
        (24001, 1, (32000, "mono")),
        (32001, 1, (44100, "mono")),
    ],
)
def test_new_sound_has_the_next_rate_that_aac_knows(rate: int, channels: int, made: tuple[int, str]) -> None:
    with av.open(io.BytesIO(), "w", format="mp4") as output:
        stream = sound._add_aac(output, rate, channels)
        assert (stream.codec_context.sample_rate, stream.codec_context.layout.name) == made


def test_sounds_in_turn_have_the_most_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def add_aac(output: Any, rate: int, channels: int) -> Any:
        asked.append((rate, channels))
        return None

    monkeypatch.setattr(sound, "_add_aac", add_aac)
    heard = [sound.Hearing(0, 1, 44100, 2, True), sound.Hearing(0, 1, 48000, 1, True)]
    both = sound.SoundsInTurn([(0.0, sound.Sound(track_of(), one, 0, 1)) for one in heard])
    vars(both)["_encoded"] = lambda stream: iter([packet_at(5)])
    output: Any = None
    both.open(output)
    assert asked == [(48000, 2)] and both._waiting == packet_at(5) and both.last is None


class Muxed:
    def __init__(self, error: Exception | None = None) -> None:
        self.packets: list[Any] = []
        self.error = error

    def mux(self, packet: Any) -> None:
        if self.error is not None:
            raise self.error
        self.packets.append(packet)


def waiting(*stamps: int) -> sound.Sound:
    one = sound.Sound(track_of(), sound.Hearing(0, 9, 100, 1, True), 0, 9)
    packets: Any = [SimpleNamespace(pts=stamp, time_base=Fraction(1, 10)) for stamp in stamps]
    one._packets = iter(packets)
    one._waiting = one._next()
    return one


def test_packets_are_passed_on_up_to_the_moment_that_is_written() -> None:
    one, output = waiting(0, 4, 5, 6, 9), Muxed()
    written: Any = output
    one.mux_until(written, -1.0)
    assert not output.packets and one.last is None
    one.mux_until(written, 0.5)
    assert [packet.pts for packet in output.packets] == [0, 4, 5] and one.last == 0.5
    one.mux_until(written, 9.9)
    assert len(output.packets) == 5 and one.last == 0.9
    one.mux_until(written, 99.0)
    assert len(output.packets) == 5


def test_only_what_the_sound_does_wrong_is_its_fault() -> None:
    refused: Any = Muxed(av.error.ArgumentError(22, "Invalid argument"))
    with pytest.raises(sound.SoundError, match="Invalid argument"):
        waiting(0).mux_until(refused, 1.0)
    full: Any = Muxed(av.error.OSError(28, "No space left on device"))
    with pytest.raises(av.error.OSError):
        waiting(0).mux_until(full, 1.0)


@pytest.mark.parametrize("error", [av.error.InvalidDataError(1, "Invalid data"), ValueError("no layout")])
def test_a_sound_that_cannot_be_made_is_an_error_of_the_sound(error: Exception) -> None:
    def failing() -> Any:
        raise error
        yield

    one = waiting(0)
    one._packets = failing()
    with pytest.raises(sound.SoundError):
        one._next()


def stream_of(index: int, flags: Any = 0, codec: str | None = "aac") -> Any:
    context = None if codec is None else SimpleNamespace(codec=SimpleNamespace(canonical_name=codec))
    return SimpleNamespace(index=index, disposition=av.stream.Disposition(flags), codec_context=context)


DEFAULT, COMMENT = av.stream.Disposition.default, av.stream.Disposition.comment


@pytest.mark.parametrize(
    ("streams", "best", "tried"),
    [
        ([stream_of(1), stream_of(2), stream_of(3)], 1, [2, 1, 3]),
        ([stream_of(1), stream_of(2), stream_of(3, DEFAULT)], 0, [1, 3, 2]),
        ([stream_of(1), stream_of(2, DEFAULT | COMMENT), stream_of(3)], 0, [1, 3, 2]),
        ([stream_of(1), stream_of(2, av.stream.Disposition.hearing_impaired), stream_of(3)], 0, [1, 3, 2]),
        ([stream_of(1), stream_of(2, av.stream.Disposition.visual_impaired), stream_of(3)], 0, [1, 3, 2]),
        ([stream_of(1), stream_of(2, av.stream.Disposition.lyrics), stream_of(3)], 0, [1, 3, 2]),
        ([stream_of(1, codec=None), stream_of(2)], 0, [2]),
    ],
)
def test_tracks_are_tried_in_the_order_in_which_they_are_likely_meant(
    streams: list[Any],
    best: int,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[Any] = []

    class Streams(list[Any]):
        audio = streams

        def best(self, kind: str, related: Any) -> Any:
            assert (kind, related) == ("audio", "pictures")
            return streams[best]

    opened = SimpleNamespace(streams=Streams(["pictures"]), close=lambda: None)
    monkeypatch.setattr(sound, "open_video", lambda path: opened)
    last = heard_frame(0.0, 9, 44100, 2)

    def attempt(path: str, index: int) -> Any:
        asked.append(index)
        return last if len(asked) == len(tried) else None

    monkeypatch.setattr(sound, "_try", attempt)
    source: Any = SimpleNamespace(path="a.mkv", index=0, has_audio=True)
    track = sound.choose_track(source)
    assert asked == tried
    number_ = next(at for at, one in enumerate(streams, 1) if one.index == tried[-1])
    assert track == track_of(index=tried[-1], number=number_, count=len(streams), rate=44100, channels=2)
    assert len(caplog.records) == (len(streams) > 1 and (len(tried) > 1 or streams[0].codec_context is None))
    source.has_audio = False
    assert sound.choose_track(source) is None


def test_a_track_without_a_decoder_is_said_to_have_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Streams(list[Any]):
        audio = (stream_of(1, codec=None), stream_of(2, codec="wmav2"))

        def best(self, kind: str, related: Any) -> Any:
            return None

    opened = SimpleNamespace(streams=Streams(["pictures"]), close=lambda: None)
    monkeypatch.setattr(sound, "open_video", lambda path: opened)
    monkeypatch.setattr(sound, "_try", lambda path, index: None)
    source: Any = SimpleNamespace(path="a.mkv", index=0, has_audio=True)
    assert sound.choose_track(source) is None
    words = "its sound is left out: track 1 (a format without a decoder), track 2 (wmav2) cannot be decoded"
    assert words in caplog.text


@pytest.mark.parametrize(
    ("good", "bad", "first"), [(5, 0, 0), (5, 5, 0), (5, 6, None), (0, 1, None), (100, 200, 0), (49, 60, None)]
)
def test_a_track_of_which_most_cannot_be_decoded_is_none(
    good: int, bad: int, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first hundred packets."""

    class Stream:
        def decode(self, packet: int) -> list[int]:
            if packet >= good:
                raise av.error.InvalidDataError(1, "Invalid data")
            return [packet]

    opened = SimpleNamespace(streams=[Stream()], close=lambda: None)
    monkeypatch.setattr(sound, "open_video", lambda path: opened)
    monkeypatch.setattr(sound, "_demux", lambda container, stream: iter(range(good + bad)))
    heard: Any = sound._try("a.mkv", 0)
    assert heard == first


def test_reading_ends_where_a_file_is_broken() -> None:
    class Broken:
        def demux(self, stream: Any) -> Any:
            yield 1
            yield 2
            raise av.error.InvalidDataError(1, "Invalid data")

    container: Any = Broken()
    stream: Any = None
    packets: Any = list(sound._demux(container, stream))
    assert packets == [1, 2]


def test_copied_packets_begin_with_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    one = sound.Sound(track_of(), sound.Hearing(0.0, 3.0, 48000, 1, True), 1.0, 2.0)
    stream: Any = "stream"
    packets = [
        SimpleNamespace(pts=pts, duration=1024, time_base=Fraction(1, 48000), size=9) for pts in range(0, 144000, 1024)
    ]
    opened = SimpleNamespace(streams=[None, "track"], close=lambda: None)
    monkeypatch.setattr(sound, "open_video", lambda path: opened)
    monkeypatch.setattr(sound, "_demux", lambda container, source: iter(packets))
    copied: Any = list(one._copied(stream))
    # a tenth of a second early, so that a decoder is warm, and no more than half a packet late
    assert -0.1 - 1024 / 48000 < copied[0].pts / 48000 < -0.1 + 1e-9
    assert 1 - 1.5 * 1024 / 48000 <= copied[-1].pts / 48000 < 1 - 512 / 48000
    assert all(packet.pts == packet.dts and packet.stream == "stream" for packet in copied)


@pytest.mark.parametrize(
    ("codec", "steady", "fits", "copied"),
    [
        ("aac", True, True, True),
        ("aac", False, True, False),
        ("aac", True, False, False),
        ("vorbis", True, True, False),
        *((codec, True, True, True) for codec in ("ac3", "alac", "eac3", "mp3", "opus")),
    ],
)
def test_a_track_is_copied_where_all_agrees(
    codec: str, steady: bool, fits: bool, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sound.Sound(track_of(codec=codec), sound.Hearing(0, 9, 44100, 2, steady), 0, 9)
    monkeypatch.setattr(sound, "_fits", lambda track: fits)
    monkeypatch.setattr(sound, "open_video", lambda path: SimpleNamespace(streams=[0, "template"], close=lambda: None))
    monkeypatch.setattr(sound, "_add_aac", lambda output, rate, channels: (rate, channels))
    vars(one)["_copied"] = lambda stream: iter([f"copied from {stream}"])
    vars(one)["_encoded"] = lambda stream: iter([f"encoded at {stream}"])
    output: Any = SimpleNamespace(add_stream_from_template=lambda template: template)
    one.open(output)
    expected: Any = "copied from template" if copied else "encoded at (44100, 2)"
    assert one._waiting == expected


def test_damage_in_a_sound_is_silence_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stream:
        def decode(self, packet: int) -> list[int]:
            if packet % 2:
                raise av.error.InvalidDataError(1, "Invalid data")
            return [packet]

    opened = SimpleNamespace(streams=[None, Stream()], close=lambda: None)
    monkeypatch.setattr(sound, "open_video", lambda path: opened)
    monkeypatch.setattr(sound, "_demux", lambda container, stream: iter(range(4)))
    decoded: Any = list(sound._decoded(track_of()))
    assert decoded == [(0, [0]), (1, []), (2, [2]), (3, [])]
    assert len(caplog.records) == 1 and "damaged in places and is silent there" in caplog.text
