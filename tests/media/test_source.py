"""What a file's header is believed, and which pictures of it are shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, features

from tests.support.media_samples import CORPUS, add_audio, add_video, encode, number, numbered
from wan import files, media
from wan.errors import UserError
from wan.media import VideoError, source
from wan.media.source import Pictures, exact_rate, fraction, inspect, keyframes_before


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    files._say.cache_clear()


def film_of(**values: Any) -> Any:
    """What reading asks of a file: ten pictures a second from 5 s on, where a player counts from 4 s."""
    plain: dict[str, Any] = {"path": "a.mp4", "format": "mov,mp4", "start": 5.0, "zero": 4.0, "end": 15.0}
    plain |= {"duration": 10.0, "fps": Fraction(10), "until": None, "has_alpha_stream": False}
    return SimpleNamespace(**(plain | values))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (23.976, "24000/1001"),
        (23.98, "24000/1001"),  # as it is often written
        (59.94, "60000/1001"),
        (119.88, "120000/1001"),
        (23.96, "599/25"),
        (24, "24"),
        (24.5, "49/2"),
        (0.5, "1/2"),
        (1000, "1000"),
        (Fraction(30000, 1001), "30000/1001"),
        (1 / 3, "1/3"),
    ],
)
def test_rates_near_the_television_ones_become_exact(given: float, meant: str) -> None:
    assert exact_rate(given) == Fraction(meant)


@pytest.mark.parametrize("fps", [0, -1, 1000.1, float("nan"), float("inf")])
def test_rates_that_are_none_are_refused(fps: float) -> None:
    with pytest.raises(UserError, match=f"up to 1000, {fps} is not"):
        exact_rate(fps)


@pytest.mark.parametrize(
    ("average", "guessed", "rate"),
    [
        (Fraction(25), Fraction(50), "25"),
        (None, Fraction(50), "50"),
        (Fraction(301), Fraction(50), "50"),
        (Fraction(300), Fraction(50), "120"),
        (Fraction(121), None, "120"),
        (Fraction(120), None, "120"),
        (Fraction(1, 2), None, "1"),
        (Fraction(90000), Fraction(90000), "24"),
        (None, None, "24"),
    ],
)
def test_a_rate_is_believed_within_reason(average: Fraction | None, guessed: Fraction | None, rate: str) -> None:
    stream: Any = SimpleNamespace(average_rate=average, guessed_rate=guessed)
    assert source._believable_rate(stream) == Fraction(rate)


def test_an_aspect_of_pixels_is_believed_within_reason() -> None:
    for ratio in (Fraction(1, 10), Fraction(4, 3), Fraction(10)):
        assert source._believable_aspect(ratio) == ratio
    for ratio in (Fraction(0), Fraction(1, 11), Fraction(11)):
        assert source._believable_aspect(ratio) == 1


def test_a_fraction_that_is_not_set_is_the_missing_one() -> None:
    assert fraction(Fraction(2, 3)) == Fraction(2, 3) and fraction(None) == 0
    assert fraction(None, Fraction(1, 90000)) == Fraction(1, 90000)


def test_the_header_of_a_file_is_read_with_its_clock(tmp_path: Path) -> None:
    encode(tmp_path / "a.ts", range(48, 96), (64, 36))
    opened = inspect(tmp_path / "a.ts")
    assert opened.zero == pytest.approx(opened.start, abs=1e-3) and opened.start > 1
    assert opened.end == pytest.approx(opened.start + 2, abs=0.05)
    assert opened.length == opened.duration == pytest.approx(2, abs=0.05)
    encode(tmp_path / "a.mkv", range(24, 72), (64, 36))
    late = inspect(tmp_path / "a.mkv")
    assert (late.start, late.fps, late.has_audio, late.until) == (1.0, Fraction(24), False, None)
    assert not late.has_alpha_stream
    assert late.end == pytest.approx(3, abs=0.05)  # the header says 3, from 0 on
    assert late.length == late.duration == pytest.approx(2, abs=0.05)
    encode(tmp_path / "a.h264", range(24), (64, 36))
    assert inspect(tmp_path / "a.h264").end is None  # it cannot be searched


@pytest.mark.parametrize("name", ["a.mkv", "a.nut"])
def test_a_film_whose_pictures_begin_late_has_the_length_of_its_pictures(name: str, tmp_path: Path) -> None:
    encode(tmp_path / name, range(1440, 1536), (320, 180))
    opened = inspect(tmp_path / name)
    assert (opened.zero, opened.start) == (60, 60) and opened.duration == pytest.approx(4, abs=0.05)
    with pytest.raises(VideoError, match=r"it ends at (4.0|3.9)\d s; give an earlier moment"):
        media.read_last_frame(tmp_path / name, until=5.0)
    assert number(np.asarray(media.read_last_frame(tmp_path / name, until=1.0))) == 1464


@pytest.mark.parametrize(
    ("name", "writer", "begins", "lasts", "expected"),
    [
        ("matroska,webm", {"ENCODER": "Lavf62.3.100"}, 5, 8, True),
        ("asf", {"encoder": "Lavf62.3.100"}, 5, 8, True),
        ("matroska,webm", {"encoder": "libebml v1.4.5 + libmatroska v1.7.1"}, 5, 8, False),
        ("matroska,webm", {}, 5, 8, False),
        ("matroska,webm", {"ENCODER": "Lavf62.3.100"}, 8, 8, False),  # another's, with a tag of its source
        ("mov,mp4", {"encoder": "Lavf62.3.100"}, 5, 8, False),
    ],
)
def test_the_writer_of_a_file_says_from_where_its_length_counts(
    name: str, writer: dict[str, str], begins: int, lasts: int, expected: bool
) -> None:
    times = {"start_time": begins, "duration": lasts}
    container: Any = SimpleNamespace(format=SimpleNamespace(name=name), metadata=writer, **times)
    assert source._counts_from_zero(container) is expected


@pytest.mark.parametrize(
    ("given", "until", "end", "duration"),
    [
        ({}, 3.0, 7.0, 2.0),
        ({}, 0.5, 4.5, 0.0),  # before the first picture
        ({}, 99.0, 15.0, 10.0),
        ({}, 0.0, 4.0, 0.0),
        ({"format": "mpegts"}, 3.0, None, 2.0),  # whose clock may jump
        ({"end": None, "duration": None}, 3.0, None, None),
    ],
)
def test_a_moment_limits_what_is_read(
    given: dict[str, Any],
    until: float,
    end: float | None,
    duration: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = inspect(CORPUS / "h264_faststart.mp4")
    values = {key: value for key, value in vars(film_of(**given)).items() if key != "path"}
    monkeypatch.setattr(source, "_inspect", lambda name: replace(plain, **values))
    opened = inspect(CORPUS / "h264_faststart.mp4", until)
    assert (opened.until, opened.end, opened.duration) == (until + 4, end, duration)
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(VideoError, match=f"{wrong} is no moment of it; give seconds from its beginning"):
            inspect(CORPUS / "h264_faststart.mp4", wrong)


@pytest.mark.parametrize(
    ("times", "limit", "shown", "cut"),
    [
        ([5.0, 5.1, 5.2, 5.3], 5.2, 3, True),
        ([5.0, 5.1, 5.2], 5.2, 3, False),
        ([5.0, 5.1, 5.2009, 5.4], 5.2, 3, True),  # moments are given in thousandths
        ([5.0, 5.1, 5.2012], 5.2, 2, True),
        ([5.0, 5.1, 1.0, 1.1, 1.2], 5.25, 3, True),  # 5.0, 5.1, a frame later, and on from there
        ([None, None, None, None], 5.25, 3, True),  # a frame time each, from the file's start on
        ([5.0, None, 5.2, 5.3], 5.15, 2, True),
        ([5.5, 5.6], 5.2, 0, True),
    ],
)
def test_pictures_are_shown_up_to_a_moment(times: list[float | None], limit: float, shown: int, cut: bool) -> None:
    pictures = Pictures(film_of())
    frames: Any = (SimpleNamespace(time=time) for time in times)
    assert [frame.time for frame in pictures._up_to(frames, limit)] == times[:shown]
    assert pictures.was_cut is cut


def test_every_pass_over_the_pictures_counts_its_own_errors() -> None:
    pictures = Pictures(inspect(CORPUS / "h264_faststart.mp4", 1.0))
    pictures.errors = pictures.late_errors = 5
    first = [frame.time for frame in pictures]
    assert pictures.was_cut and (pictures.errors, pictures.late_errors) == (0, 0)
    assert len(first) == len(list(pictures)) > 10
    damaged = Pictures(inspect(CORPUS / "trunc_moov_front.mp4"))
    assert (damaged.errors, damaged.late_errors, damaged.was_cut) == (0, 0, False)
    list(damaged)
    assert damaged.errors > 0


def test_a_complaint_counts_until_a_keyframe_and_for_good() -> None:
    pictures = Pictures(film_of())
    pictures._complain()
    pictures._complain()
    assert (pictures.errors, pictures.late_errors) == (2, 2)


def test_the_keyframe_before_a_moment_is_that_of_the_file_s_index(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = add_video(container, "libx264", 10, (64, 36), options={"g": "10", "bf": "0", "sc_threshold": "0"})
        for count, picture in enumerate(numbered(range(30), 64, 36)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = count, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    opened = inspect(path)
    assert keyframes_before(opened, [0.0, 0.95, 1.0, 1.5, 2.0, 2.85]) == [0, 0, 1, 1, 2, 2]
    assert keyframes_before(opened, [9.0]) == [None]  # the index does not reach so far
    at_two = Pictures(opened, 2.5)
    assert [number(frame.to_ndarray(format="rgb24")) for frame in at_two] == list(range(20, 30))
    (tmp_path / "none.ts").write_bytes((CORPUS / "mpegts.ts").read_bytes())
    assert keyframes_before(inspect(tmp_path / "none.ts"), [1.5]) == [None]


@pytest.mark.parametrize(
    ("dispositions", "index"),
    [
        ((0, 0), 0),
        ((0, Disposition.default), 1),
        ((Disposition.default, Disposition.default), 0),
        ((Disposition.attached_pic, 0), 1),
        ((Disposition.still_image | Disposition.default, 0), 1),
        ((Disposition.timed_thumbnails, 0), 1),
    ],
)
def test_of_several_streams_of_pictures_the_film_is_read(dispositions: tuple[Any, Any], index: int) -> None:
    context = SimpleNamespace(width=64, height=36)
    streams: list[Any] = [
        SimpleNamespace(index=at, disposition=Disposition(one), codec_context=context)
        for at, one in enumerate(dispositions)
    ]

    class Streams(SimpleNamespace):
        def best(self, kind: str) -> Any:
            return streams[0]

    container: Any = SimpleNamespace(format=SimpleNamespace(name="matroska,webm"), streams=Streams(video=streams))
    assert source._picture_stream("a.mkv", container) is streams[index]
    streams[index].codec_context = None
    with pytest.raises(VideoError, match="FFmpeg has no decoder for it; convert it to H.264 mp4"):
        source._picture_stream("a.mkv", container)
    container.format.name = "hls"
    with pytest.raises(VideoError, match=r"it is a text or a playlist \(hls\)"):
        source._picture_stream("a.mkv", container)


def test_a_film_that_is_not_the_first_of_equals_is_the_one_that_ffmpeg_likes_best() -> None:
    context = SimpleNamespace(width=64, height=36)
    streams: list[Any] = [
        SimpleNamespace(index=at, disposition=Disposition(0), codec_context=context) for at in range(3)
    ]

    class Streams(SimpleNamespace):
        def best(self, kind: str) -> Any:
            return streams[2]

    container: Any = SimpleNamespace(format=SimpleNamespace(name="matroska,webm"), streams=Streams(video=streams))
    assert source._picture_stream("a.mkv", container) is streams[2]
    container.streams.video = []
    with pytest.raises(VideoError, match="there is no video stream in it; give a file with pictures"):
        source._picture_stream("a.mkv", container)


def test_pictures_may_have_as_many_pixels_as_8192_squared() -> None:
    assert source.MOST_PIXELS == 8192 * 8192
    source._check_pixels("a.mp4", 8192, 8192)
    source._check_pixels("a.mp4", 2**26, 1)
    with pytest.raises(VideoError, match="its pictures have 8193 x 8192 pixels; make them smaller, to at most 8192"):
        source._check_pixels("a.mp4", 8193, 8192)


def test_a_picture_file_may_have_as_many_pixels_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(source, "MOST_PIXELS", 1200)
    with source.open_picture(str(tmp_path / "a.png")) as image:
        assert image.size == (40, 30)
    monkeypatch.setattr(source, "MOST_PIXELS", 1199)
    with pytest.raises(UserError, match="it has 40 x 30 pixels; make it smaller, at most 8192 x 8192"):
        source.open_picture(str(tmp_path / "a.png"))


def animation(path: Path, durations: list[int], **options: Any) -> None:
    images = [Image.fromarray(picture) for picture in numbered(range(len(durations)), 64, 36)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, lossless=True, **options)


@pytest.mark.parametrize(
    ("durations", "fps", "seconds"),
    [([100, 100, 100], "10", 0.3), ([40] * 4, "25", 0.16), ([3000, 3000], "1", 6.0), ([5, 5, 5, 5], "120", 0.02)],
)
def test_an_animation_by_pillow_has_the_rate_and_the_times_of_its_pictures(
    durations: list[int], fps: str, seconds: float, tmp_path: Path
) -> None:
    animation(tmp_path / "a.webp", durations)
    opened = inspect(tmp_path / "a.webp")
    assert (opened.format, opened.index, opened.start, opened.end, opened.zero) == ("webp", 0, 0, None, 0)
    assert opened.fps == Fraction(fps) and opened.duration == opened.length == pytest.approx(seconds)
    assert (opened.has_audio, opened.has_alpha_stream, opened.sample_aspect_ratio) == (False, False, Fraction(1))
    shown = list(Pictures(opened))
    assert [number(frame.to_ndarray(format="rgb24")) for frame in shown] == list(range(len(durations)))
    moments = np.cumsum([0, *durations[:-1]]) / 1000
    assert [frame.time for frame in shown] == pytest.approx(list(moments))
    assert [frame.duration for frame in shown] == durations


def test_a_still_by_pillow_has_no_length(tmp_path: Path) -> None:
    Image.new("RGB", (64, 36), "red").save(tmp_path / "a.webp")
    opened = inspect(tmp_path / "a.webp")
    assert (opened.duration, opened.length, opened.fps) == (None, None, Fraction(24))
    assert len(list(Pictures(opened))) == 1
    data = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "half.webp").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"the animation is damaged \(.*\); export it again"):
        inspect(tmp_path / "half.webp")


def test_pillow_reads_webp_and_transparent_avif_only(tmp_path: Path) -> None:
    for name, head, told in (
        ("a.webp", b"RIFF\0\0\0\0WEBP", True),
        ("a.avi", b"RIFF\0\0\0\0AVI ", False),
        ("a.mp4", b"\0\0\0 ftypisom", False),
        ("short", b"RI", False),
    ):
        (tmp_path / name).write_bytes(head)
        assert source._is_for_pillow(str(tmp_path / name)) is told
    if features.check("avif"):
        for mode in ("RGB", "RGBA"):
            Image.new(mode, (64, 36), (200, 40, 40, 128)[: len(mode)]).save(tmp_path / f"{mode}.avif")
            assert source._is_for_pillow(str(tmp_path / f"{mode}.avif")) is (mode == "RGBA")
    (tmp_path / "bad.avif").write_bytes(b"\0\0\0 ftypavif" + bytes(30))
    assert not source._is_for_pillow(str(tmp_path / "bad.avif"))


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name, words in (
        ("none", "no such file or directory; give the name of a video file"),
        ("a\0b", "(embedded null byte|stat: embedded null character in path); give the name of a video file"),
        (".", "it is a folder; give the name of a video file in it"),
        ("pipe", "it is a pipe or a device; save it as a file first"),
        ("empty", "the file is empty; download or export it again"),
    ):
        with pytest.raises(VideoError, match=words):
            source._checked_path(tmp_path / name if "\0" not in name else name)


def test_a_stream_with_sound_is_known(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        track, video = add_audio(container, "aac", 48000), add_video(container, "libx264", 24, (64, 36))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), "s16", "mono")
        samples.sample_rate, samples.pts, samples.time_base = 48000, 0, Fraction(1, 48000)
        container.mux([*track.encode(samples), *track.encode(None)])
        for picture in numbered(range(12), 64, 36):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")))
        container.mux(video.encode(None))
    opened = inspect(tmp_path / "a.mp4")
    assert opened.has_audio and opened.index == 1
    assert opened.duration == pytest.approx(0.5)  # that of the pictures
    assert opened.length == pytest.approx(1, abs=0.05) and opened.end == pytest.approx(1, abs=0.05)


def test_another_decoder_is_taken_for_a_second_stream_of_transparency_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []

    def create(name: str, mode: str) -> Any:
        made.append(name)
        if name == "libvpx":
            raise av.codec.codec.UnknownCodecError(name)
        return name

    monkeypatch.setattr(source, "CodecContext", SimpleNamespace(create=create))
    for codec, alpha, decoder in (
        ("vp9", True, "libvpx-vp9"),
        ("vp9", False, None),
        ("h264", True, None),
        ("vp8", True, None),  # an FFmpeg without it
    ):
        context = SimpleNamespace(name=codec)
        stream: Any = SimpleNamespace(codec_context=context)
        kept: Any = Pictures(film_of(has_alpha_stream=alpha))._decoder(stream)
        assert kept == (decoder or context)
    assert made == ["libvpx-vp9", "libvpx"]
    assert len(caplog.records) == 1 and "transparency is ignored" in caplog.text


def test_a_seek_that_fails_is_as_good_as_none() -> None:
    asked: list[int] = []

    class Container:
        def seek(self, stamp: int, *, stream: Any) -> None:
            asked.append(stamp)
            if stamp > 1000:
                raise av.error.PermissionError(1, "Operation not permitted")

    stream: Any = SimpleNamespace(time_base=Fraction(1, 100))
    container: Any = Container()
    assert Pictures._seek(container, stream, 2.5) and not Pictures._seek(container, stream, 20)
    stream.time_base = None
    Pictures._seek(container, stream, 0.0005)
    assert asked == [250, 2000, 500]


class Demuxed:
    """A file whose packets and pictures are told here."""

    def __init__(self, packets: list[Any]) -> None:
        self.packets = packets
        self.stream = SimpleNamespace(time_base=Fraction(1, 10), codec_context=self)
        self.streams = [self.stream]
        self.name, self.thread_type, self.options = "h264", "", dict[str, str]()

    def demux(self, stream: Any) -> Iterator[Any]:
        yield from self.packets

    def decode(self, packet: Any) -> list[Any]:
        if packet is None:
            return [SimpleNamespace(is_corrupt=False, name="flushed", time_base=None)]
        if packet.name == "bad":
            raise av.error.InvalidDataError(1, "Invalid data")
        return [SimpleNamespace(is_corrupt=packet.name == "torn", name=packet.name, time_base=None)]

    def close(self) -> None: ...


def packet(name: str, *, corrupt: bool = False, key: bool = False, size: int = 9) -> Any:
    return SimpleNamespace(name=name, is_corrupt=corrupt, is_keyframe=key, size=size)


@pytest.mark.parametrize(
    ("packets", "careful", "shown", "errors", "late"),
    [
        ([packet("a", key=True), packet("b")], False, ["a", "b", "flushed"], 0, 0),
        ([packet("a", key=True), packet("bad"), packet("b")], False, ["a", "b", "flushed"], 1, 1),
        ([packet("a", key=True), packet("bad"), packet("b", key=True)], False, ["a", "b", "flushed"], 1, 0),
        ([packet("a", corrupt=True), packet("b")], False, ["a", "b", "flushed"], 1, 1),
        ([packet("a", corrupt=True), packet("b")], True, ["b", "flushed"], 1, 1),
        ([packet("torn"), packet("b")], False, ["b", "flushed"], 0, 0),
        ([packet("a"), packet("b", size=0), packet("c")], False, ["a", "flushed"], 0, 0),
    ],
)
def test_what_is_damaged_is_counted_since_the_last_keyframe(
    packets: list[Any], careful: bool, shown: list[str], errors: int, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Demuxed(packets)
    monkeypatch.setattr(source, "open_video", lambda path: opened)
    pictures = Pictures(film_of(index=0), threads="SLICE", careful=careful)
    seen: Any = list(pictures)
    assert [frame.name for frame in seen] == shown and {frame.time_base for frame in seen} == {Fraction(1, 10)}
    assert (pictures.errors, pictures.late_errors) == (errors, late)
    assert opened.thread_type == "SLICE" and opened.options["max_pixels"] == str(8192 * 8192)
    assert ("err_detect" in opened.options) is careful
