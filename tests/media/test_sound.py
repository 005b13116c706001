"""The sound of a source is kept with its pictures, whatever it is made of, or left out with one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.media_samples import CORPUS, add_audio, add_video, beeps, beeps_in, moment_of, number, numbered
from wan import files, media
from wan.media import assembly, sound


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    files._say.cache_clear()


def film(
    path: Path,
    tracks: Sequence[tuple[str, np.ndarray, int, str]],
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
