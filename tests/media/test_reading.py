"""Every kind of video file gives its exact last frame and evenly spread frames, or one clear line."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from av.video.frame import VideoFrame
from PIL import Image

from tests.data.corpus import make_paths, vidmark
from tests.support.media_samples import CORPUS, FILES, READABLE, encode, number, numbered
from wan import files, media
from wan.errors import UserError
from wan.media import VideoError, colour, decord_reader, reading, source
from wan.media.light import tone_map
from wan.media.reading import _check_moment

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    files._say.cache_clear()


def by_name(entry: dict[str, Any]) -> str:
    return str(entry["file"])


@pytest.mark.parametrize("entry", FILES, ids=by_name)
def test_last_frame_of_every_kind_of_file(entry: dict[str, Any]) -> None:
    began = time.monotonic()
    if entry["expect"] == "error":
        for read in (media.read_last_frame, media.sample_frames, media.probe):
            with pytest.raises(VideoError) as caught:
                read(CORPUS / entry["file"])
            assert "\n" not in str(caught.value)
            assert entry["file"] in str(caught.value)
    else:
        picture = media.read_last_frame(CORPUS / entry["file"])
        assert picture.mode == "RGB"
        mark = vidmark.read(np.asarray(picture))
        assert mark is not None
        assert mark["id"] == entry["stream_id"]
        assert mark["index"] in entry["acceptable_last"]
        assert mark["orientation"] == "upright"
        assert picture.size == (entry["display_width"], entry["display_height"])
        errors = vidmark.patch_error(mark["patches"], entry["patches"])
        seen = [error for patch, error in enumerate(errors) if patch not in entry.get("transparent_patches", [])]
        assert max(seen) <= entry["patch_tolerance"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("entry", READABLE, ids=by_name)
def test_sampled_frames_are_the_middles_of_equal_slices(entry: dict[str, Any]) -> None:
    count, first = entry["n_frames"], entry["first_index"]
    if entry.get("vfr"):
        expected = [8, 22, 27, 33, 38, 38, 38, 38]  # by time: frame 38 stays for 2 s
    else:
        expected = [first + (2 * slice_ + 1) * count // 16 for slice_ in range(8)]
    frames = media.sample_frames(CORPUS / entry["file"])
    assert frames.dtype == np.uint8
    assert frames.shape == (8, entry["display_height"], entry["display_width"], 3)
    seen = [number(frame) for frame in frames]
    if entry["file"] == "corrupt_middle.mp4":
        del seen[3], expected[3]  # the damage itself: a picture, but not a readable one
    # Next to damage a decoder may keep one picture more or less.
    assert np.abs(np.subtract(seen, expected)).max() <= entry.get("damaged", False)


@pytest.mark.parametrize("entry", READABLE, ids=by_name)
def test_probe_tells_displayed_size_rate_and_sound(entry: dict[str, Any]) -> None:
    info = media.probe(CORPUS / entry["file"])
    assert (info.width, info.height) == (entry["display_width"], entry["display_height"])
    assert info.has_audio is entry.get("has_audio", False)
    assert 1 <= info.fps <= 120
    if entry["fps"] is not None:
        assert info.fps == Fraction(entry["fps"])


def test_frames_can_be_made_smaller_while_reading() -> None:
    assert media.sample_frames(CORPUS / "sar_4_3.mp4", 2, max_side=160).shape == (2, 90, 160, 3)
    assert media.sample_frames(CORPUS / "rot90.mp4", 1, max_side=64).shape == (1, 64, 36, 3)
    assert media.sample_frames(CORPUS / "vp9.webm", 1, max_side=4000).shape == (1, 180, 320, 3)


@pytest.fixture(scope="module")
def odd_paths(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, str]]:
    return make_paths.make(str(tmp_path_factory.mktemp("paths")), CORPUS / "h264_faststart.mp4")


def test_odd_names_are_read_and_what_is_no_file_is_refused_at_once(odd_paths: list[tuple[str, str, str]]) -> None:
    assert len(odd_paths) > 10
    for path, expect, why in odd_paths:
        began = time.monotonic()
        if expect == "ok":
            assert number(media.read_last_frame(path)) == 59, why
        else:
            with pytest.raises(VideoError) as caught:
                media.read_last_frame(path)
            assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXTINF:1,\nh264_faststart.mp4\n", "ffconcat version 1.0\nfile h264_faststart.mp4\n", "\x1b[31mred\n"],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.txt"])
def test_playlists_and_texts_are_no_videos(text: str, name: str, tmp_path: Path) -> None:
    shutil.copy(CORPUS / "h264_faststart.mp4", tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(VideoError):
        media.read_last_frame(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "word"),
    [("hdr_pq.mp4", "HDR"), ("vp9_alpha.webm", "transparen"), ("trunc_moov_front.mp4", "damaged")],
)
def test_what_cannot_be_shown_as_it_is_is_said_once(file: str, word: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        media.read_last_frame(CORPUS / file)
        media.sample_frames(CORPUS / file, 2)
    assert len([record for record in caplog.records if word in record.message and file in record.message]) == 1


def test_ordinary_files_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    for file in ("h264_opengop.mp4", "mpegts.ts", "edit_end_trim.mov", "anim.gif", "interlaced_tff.mp4", "mpeg4.avi"):
        media.read_last_frame(CORPUS / file)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("sizes", [((320, 192), (160, 96)), ((320, 192), (320, 192))], ids=["another size", "one size"])
def test_files_that_were_put_together_are_not_damaged(
    sizes: tuple[tuple[int, int], tuple[int, int]], codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A transport stream counts its packets. Where another one begins the count jumps: FFmpeg calls that corrupt."""
    encode(tmp_path / "a", range(36), sizes[0], codec=codec, kind="mpegts")
    encode(tmp_path / "b", range(36, 72), sizes[1], codec=codec, kind="mpegts")
    path = tmp_path / "ab.ts"
    path.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    last = media.read_last_frame(path)
    assert (number(last), last.size) == (71, sizes[1])
    assert [number(frame) for frame in media.read_tail(path, 3, 24)] == [69, 70, 71]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_transport_stream_that_lost_a_packet_near_its_end_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encode(tmp_path / "a.ts", range(48), (320, 192))
    data = (tmp_path / "a.ts").read_bytes()
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    pictures = [at for at, packet in enumerate(packets) if packet[1] & 0x1F == 1 and packet[2] == 0]  # 0x100
    del packets[pictures[-3]]
    (tmp_path / "lost.ts").write_bytes(b"".join(packets))
    media.read_last_frame(tmp_path / "lost.ts")
    assert [record for record in caplog.records if "damaged near its end" in record.message]


def test_dolby_vision_without_a_standard_picture_is_refused(tmp_path: Path) -> None:
    frame = reading.first_frame(source.inspect(CORPUS / "mpeg4.avi"))  # no colour tags either
    tagged = source.inspect(CORPUS / "mpeg4.avi")
    object.__setattr__(tagged, "codec_tag", "dvh1")
    with pytest.raises(VideoError, match="Dolby Vision"):
        colour.to_rgb(frame, tagged)


def test_orientation_without_side_data_agrees_with_the_display_matrix() -> None:
    class Unreadable:  # what PyAV does for MJPEG with EXIF
        def __init__(self, rotation: int) -> None:
            self.rotation = rotation

        @property
        def side_data(self) -> list[Any]:
            raise ValueError("31 is not a valid Type")

    for file in ("rot90.mp4", "rot270.mov", "h264_faststart.mp4"):
        frame = reading.first_frame(source.inspect(CORPUS / file))
        assert colour.orientation(Unreadable(frame.rotation)) == colour.orientation(frame)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["pq", "hlg"])
def test_tone_mapping_gives_back_colours_of_a_standard_screen(kind: str) -> None:
    colours = np.array([[[208, 32, 32], [32, 176, 48], [40, 40, 40], [180, 180, 180], [0, 0, 0]]], np.uint8)
    signal = np.rint(vidmark.to_hdr(colours, kind) * 65535).astype(np.uint16)
    mapped = tone_map(signal, {"pq": 16, "hlg": 18}[kind])
    assert np.abs(mapped.astype(int) - colours).max() <= 3
    bright = tone_map(np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None].repeat(3, 2), 16)
    assert (np.diff(bright[0, :, 0].astype(int)) >= 0).all()


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 s at 30 fps whose frames show their own numbers."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    media.write_video(path, numbered(range(3600), 64, 36), 30)
    return path


def test_long_videos_are_read_at_a_few_places_only(long_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0

    class Counting(source.Pictures):
        def __iter__(self) -> Any:
            nonlocal decoded
            for frame in super().__iter__():
                decoded += 1
                yield frame

    monkeypatch.setattr(reading, "Pictures", Counting)
    assert number(media.read_last_frame(long_video)) == 3599
    assert decoded <= 250
    frames = media.sample_frames(long_video, 4)
    assert [number(frame) for frame in frames] == [450, 1350, 2250, 3150]
    assert decoded <= 250 + 4 * 252


def test_long_transport_streams_without_an_index_are_sampled_exactly(long_video: Path, tmp_path: Path) -> None:
    import av

    with av.open(str(long_video)) as read, av.open(str(tmp_path / "long.ts"), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = stream
                written.mux(packet)
    assert number(media.read_last_frame(tmp_path / "long.ts")) == 3599
    shown = [number(frame) for frame in media.sample_frames(tmp_path / "long.ts", 4)]
    assert np.abs(np.subtract(shown, [450, 1350, 2250, 3150])).max() <= 1


def test_reading_a_video_does_not_load_the_model_libraries() -> None:
    code = "import sys, wan.media; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_decord_names_the_extra_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decord_reader, "find_spec", lambda name: None)
    path = CORPUS / "h264_faststart.mp4"
    assert len(media.sample_frames(path, 2, reader="auto")) == 2
    with pytest.raises(UserError, match=r'pip install -e "\.\[decord\]"'):
        media.sample_frames(path, 2, reader="decord")
    with pytest.raises(UserError, match=r"\[decord\]"):
        media.check_last_frame_with_decord(path, media.read_last_frame(path))
    with pytest.raises(UserError, match="auto, pyav, decord"):
        media.sample_frames(path, 2, reader="opencv")


def fake_decord(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str, limit: float = 20.0) -> None:
    """Put `body` in the place of decord's VideoReader constructor; it runs in the child process."""
    (folder / "decord.py").write_text(
        "import time, numpy as np\nclass Batch:\n    def __init__(self, a): self.asnumpy = lambda: a\n"
        f"class VideoReader:\n    def __init__(self, path, num_threads):\n        {body}\n"
        "    def __len__(self): return 60\n"
        "    def get_batch(self, w): return Batch(np.stack([np.full((180, 320, 3), 4 * i, np.uint8) for i in w]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(decord_reader, "find_spec", lambda name: object())
    monkeypatch.setattr(decord_reader, "LIMIT_SECONDS", limit)


def test_decord_samples_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_decord(monkeypatch, tmp_path, "pass")
    frames = media.sample_frames(CORPUS / "h264_faststart.mp4", 8, reader="decord")
    assert (frames[:, 0, 0, 0] // 4).tolist() == [3, 11, 18, 26, 33, 41, 48, 56]
    assert media.sample_frames(CORPUS / "h264_faststart.mp4", 1, reader="decord", max_side=32).shape == (1, 18, 32, 3)


@pytest.mark.parametrize(
    ("body", "word"),
    [("time.sleep(60)", "did not finish"), ("import os; os.abort()", "failed with code"), ("1 / 0", "zero")],
)
def test_a_decord_that_hangs_or_fails_is_ended_and_pyav_takes_over(
    body: str, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_decord(monkeypatch, tmp_path, body, limit=1.0)
    path = CORPUS / "h264_faststart.mp4"
    began = time.monotonic()
    frames = media.sample_frames(path, 8, reader="decord")
    assert [number(frame) for frame in frames] == [3, 11, 18, 26, 33, 41, 48, 56]
    assert word in (media.check_last_frame_with_decord(path, media.read_last_frame(path)) or "")
    assert time.monotonic() - began < 10
    assert all("\n" not in record.message for record in caplog.records)
    assert any(word in record.message for record in caplog.records)


def test_another_last_frame_from_decord_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_decord(monkeypatch, tmp_path, "pass")
    path = CORPUS / "h264_faststart.mp4"
    assert "another last frame" in (media.check_last_frame_with_decord(path, media.read_last_frame(path)) or "")
    assert media.check_last_frame_with_decord(path, Image.new("RGB", (320, 180), (236, 236, 236))) is None


@pytest.mark.parametrize("file", ["mpegts.ts", "flip_v.mp4", "sar_4_3.mp4", "hdr_pq.mp4", "vp9_alpha.webm"])
def test_decord_is_not_asked_about_what_it_gets_wrong(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_decord(monkeypatch, tmp_path, "1 / 0")
    frames = media.sample_frames(CORPUS / file, 4, reader="decord")
    assert (frames == media.sample_frames(CORPUS / file, 4)).all()
    assert any("PyAV reads the frames" in record.message for record in caplog.records)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    shutil.copy(CORPUS / "h264_faststart.mp4", tmp_path / "secret.mp4")
    (tmp_path / "secret.mp4").chmod(0)
    with pytest.raises(VideoError, match="permission denied"):
        media.read_last_frame(tmp_path / "secret.mp4")


@pytest.mark.parametrize("entry", READABLE, ids=by_name)
def test_the_tail_goes_back_from_the_last_frame_in_even_time(entry: dict[str, Any]) -> None:
    path = CORPUS / entry["file"]
    count, first, last = entry["n_frames"], entry["first_index"], media.read_last_frame(path)
    rate = Fraction(entry["fps"]) if entry.get("fps") else media.probe(path).fps
    every = media.read_tail(path, 9, rate)
    assert np.array_equal(every[-1], np.asarray(last)) and len(every) == min(9, count)
    if entry.get("vfr") or entry.get("damaged"):
        return  # below, and: the damage decides
    final = number(last)
    assert [number(frame) for frame in every] == list(range(max(first, final - 8), final + 1))
    half = media.read_tail(path, 5, rate / 2)
    assert [number(frame) for frame in half] == [n for n in range(final - 8, final + 1, 2) if n >= first]


def test_the_tail_of_a_video_with_uneven_times_is_what_was_on_screen() -> None:
    """Frame 38 of vfr.mp4 stays for two seconds before the last one."""
    seen = [number(frame) for frame in media.read_tail(CORPUS / "vfr.mp4", 5, 2)]
    assert seen[-1] == 39 and seen[1:4] == [38, 38, 38]


@pytest.mark.parametrize(("source", "model"), [(30, 16), (60, 24), (25, 16), (24, 24), (50, 16), (10, 24)])
def test_the_tail_is_resampled_without_changing_speed(source: int, model: int, tmp_path: Path) -> None:
    media.write_video(tmp_path / "clip.mp4", numbered(range(80), 128, 72), source)
    seen = [number(frame) for frame in media.read_tail(tmp_path / "clip.mp4", 17, model)]
    expected = [int(79 - step * source / model + 1e-3) for step in range(16, -1, -1)]
    assert seen == [int(np.floor(79 - step * source / model + 1e-3)) for step in range(16, -1, -1)] == expected


def test_a_short_video_gives_the_frames_that_it_has(tmp_path: Path) -> None:
    media.write_video(tmp_path / "clip.mp4", numbered(range(3), 128, 72), 16)
    assert [number(frame) for frame in media.read_tail(tmp_path / "clip.mp4", 9, 16)] == [0, 1, 2]
    with pytest.raises(ValueError, match="positive"):
        media.read_tail(tmp_path / "clip.mp4", 0, 16)


@pytest.mark.parametrize(
    "fps", [Fraction(24000, 1001), Fraction(24), Fraction(30000, 1001), Fraction(60), Fraction(120)]
)
@pytest.mark.parametrize("kind", ["mkv", "ts", "flv"])
def test_rounded_time_stamps_neither_skip_nor_repeat_a_frame_of_the_tail(
    kind: str, fps: Fraction, tmp_path: Path
) -> None:
    import av

    media.write_video(tmp_path / "a.mp4", numbered(range(40), 64, 36), fps)
    with av.open(str(tmp_path / "a.mp4")) as read, av.open(str(tmp_path / f"a.{kind}"), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = stream
                written.mux(packet)
    assert [number(frame) for frame in media.read_tail(tmp_path / f"a.{kind}", 17, fps)] == list(range(23, 40))


def test_an_interlaced_tail_is_deinterlaced_like_the_last_frame() -> None:
    path = CORPUS / "interlaced_tff.mp4"
    tail = media.read_tail(path, 3, 25)
    assert np.array_equal(tail[-1], np.asarray(media.read_last_frame(path)))
    assert [number(frame) for frame in tail] == [42, 43, 44]


def test_pictures_that_were_converted_do_not_stay_in_memory() -> None:
    opened = source.inspect(CORPUS / "rot90.mp4")
    gc.collect()
    gc.disable()
    try:
        for frame in source.Pictures(opened):
            colour.to_rgb(frame, opened)
        kept = [item for item in gc.get_objects() if type(item) is VideoFrame and item.width > 16]
    finally:
        gc.enable()
    assert len(kept) <= 2


def test_the_moment_of_the_last_picture_counts() -> None:
    pictures = SimpleNamespace(was_cut=False)
    last = [SimpleNamespace(time=time) for time in (1.0, 2.0, 9.0)]
    source: Any = SimpleNamespace(path="a.mp4", until=8.5, zero=0.0, start=0.0, length=None, fps=10)
    ending: Any = SimpleNamespace(pictures=pictures, last=last, stay=0.1, clock=[0.0])
    _check_moment(source, ending)
    source.until = 12.0
    with pytest.raises(UserError, match=r"it ends at 9.10 s"):
        _check_moment(source, ending)


@pytest.mark.parametrize(("helps", "jumps"), [(True, 4), (False, 1)])
def test_where_a_jump_leads_nowhere_the_rest_is_read_in_one_go(
    helps: bool, jumps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = [SimpleNamespace(time=float(second)) for second in range(8)]
    tried = list[float]()

    def jump(source: Any, here: float, moment: float) -> Any:
        tried.append(moment)
        at = int(moment)
        return (iter(film[at + 1 :]), film[at]) if helps else None

    monkeypatch.setattr(reading, "Pictures", lambda source: film)
    monkeypatch.setattr(reading, "keyframes_before", lambda source, moments: [None] * len(moments))
    monkeypatch.setattr(reading, "_jump", jump)
    chosen = reading._search(SimpleNamespace(start=0.0, duration=8.0), 4)  # type: ignore[arg-type]
    assert [frame.time for frame in chosen or []] == [1, 3, 5, 7] and len(tried) == jumps


@pytest.mark.parametrize(
    ("times", "clock"),
    [
        ([5.0, 5.1, 5.3], [-0.3, -0.2, 0.0]),
        ([None, None, None], [-0.2, -0.1, 0.0]),
        ([5.0, None, 5.3], [-0.2, -0.1, 0.0]),
        ([9.0, 5.1, 5.3], [-0.3, -0.2, 0.0]),  # runs backwards
        ([5.3, 5.3, 5.4], [-0.2, -0.1, 0.0]),  # stands still
        ([7.0], [0.0]),
    ],
)
def test_an_ending_s_clock_counts_back_from_its_last_picture(times: list[float | None], clock: list[float]) -> None:
    assert reading._clock(times, Fraction(10)) == pytest.approx(clock)


def film_of(**values: Any) -> Any:
    plain: dict[str, Any] = {"path": "a.mp4", "format": "mov,mp4,m4a", "start": 5.0, "zero": 4.0, "end": 15.0}
    plain |= {"duration": 10.0, "fps": Fraction(10), "until": None, "has_audio": False, "length": 11.0}
    return SimpleNamespace(**(plain | values))


def picture_at(time: float | None, duration: int | None = None) -> Any:
    return SimpleNamespace(time=time, duration=duration, time_base=Fraction(1, 10))


@pytest.mark.parametrize(
    ("values", "time", "duration", "stay"),
    [
        ({}, 14.0, 5, 0.5),
        ({}, 14.0, 20, 1.0),  # an edit list ends before the packet does
        ({"format": "matroska,webm"}, 14.0, 20, 2.0),
        ({}, 15.0, 5, 0.5),
        ({}, 16.0, 5, 0.5),
        ({}, 14.0, None, 1.0),  # the header's, where no packet says anything
        ({}, 16.0, None, 0.0),
        ({"has_audio": True}, 14.0, None, 0.0),  # it may be the sound's
        ({"duration": None}, 14.0, 5, 0.5),
        ({"duration": None}, 14.0, None, 0.0),
        ({}, None, 5, 0.5),
    ],
)
def test_a_last_picture_stays_as_its_packet_says_or_the_header(
    values: dict[str, Any], time: float | None, duration: int | None, stay: float
) -> None:
    whole: Any = SimpleNamespace(errors=0)
    film = film_of(**values)
    assert reading._stay(film, whole, [picture_at(1.0, 99), picture_at(time, duration)]) == pytest.approx(stay)
    assert reading._stay(film, whole, []) == 0
    if duration is None:  # the header of a damaged file still speaks of all of it
        whole.errors = 1
        assert reading._stay(film, whole, [picture_at(time, duration)]) == 0


def test_the_end_is_looked_for_from_ever_earlier() -> None:
    assert list(reading._earlier(10.0, 0.0)) == [10, 9.5, 8, 3.5]
    assert list(reading._earlier(10.0, 8.0)) == [10, 9.5]
    assert list(reading._earlier(3.0, 3.0)) == []
    assert list(reading._starts(film_of(), 2.0)) == [13, 12.5, 11, 6.5, None]
    assert list(reading._starts(film_of(end=None), 2.0)) == [None]


def test_moments_are_the_middles_of_equal_slices() -> None:
    assert reading._moments(2.0, 10.0, 4) == [3, 5, 7, 9]
    assert reading._moments(0.0, 1.0, 1) == [0.5]
    assert reading._scan_end([5.0]) == 6 and reading._scan_end([5.0, 5.1, 5.4]) == pytest.approx(5.6)
    assert reading._scan_end([5.0, 7.0]) == 9


class Passes:
    """What each pass over the film shows, by where it begins: pictures, errors, and errors near its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shown: dict[Any, Any]) -> None:
        self.begun: list[Any] = []

        def pictures(source: Any, start: float | None = None, *, threads: str = "AUTO", careful: bool = False) -> Any:
            self.begun.append((start, threads, careful))
            times, errors, late = shown.get((threads, careful), shown.get(start, ([], 0, 0)))

            class Shown(list[Any]):
                pass

            made = Shown(picture_at(time, 1) for time in times)
            vars(made).update(errors=errors, late_errors=late, was_cut=False)
            return made

        monkeypatch.setattr(reading, "Pictures", pictures)


def test_a_pass_begins_as_early_as_its_span_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {14.0: ([], 0, 0), 13.5: ([14.8, 14.9], 0, 0), 12.0: ([12.0, 13.5, 14.0, 14.9], 0, 0)}
    passes = Passes(monkeypatch, shown)
    ending = reading.find_ending(film_of(), 1.0)
    assert [start for start, _, _ in passes.begun] == [14.0, 13.5, 12.0]
    assert ending.clock == pytest.approx([-2.9, -1.4, -0.9, 0]) and ending.stay == pytest.approx(0.1)
    assert [frame.time for frame in ending.last] == [13.5, 14.0, 14.9]
    passes.begun.clear()
    reading.find_ending(film_of(end=14.5), 0.5)  # 13.5 s are reached in the second one, by all that is asked for
    assert [start for start, _, _ in passes.begun] == [14.0, 13.5, 12.0]


@pytest.mark.parametrize(
    ("shown", "begun", "last", "words"),
    [
        ({("AUTO", False): ([5.0, 5.1], 0, 0)}, [("AUTO", False)], 5.1, ""),
        (
            {("AUTO", False): ([5.0], 1, 1), ("SLICE", False): ([5.0, 5.1], 1, 0)},
            [("AUTO", False), ("SLICE", False)],
            5.1,
            "",
        ),
        (
            {("AUTO", False): ([5.0], 1, 1), ("SLICE", False): ([5.0, 5.1], 1, 1), ("SLICE", True): ([5.0], 1, 1)},
            [("AUTO", False), ("SLICE", False), ("SLICE", True)],
            5.0,
            "its last clean picture is used",
        ),
        (
            {("AUTO", False): ([5.0], 1, 1), ("SLICE", False): ([5.0, 5.1], 1, 1), ("SLICE", True): ([], 1, 1)},
            [("AUTO", False), ("SLICE", False), ("SLICE", True)],
            5.1,
            "the last picture may show it",
        ),
    ],
)
def test_a_damaged_end_is_read_again_more_carefully(
    shown: dict[Any, Any],
    begun: list[Any],
    last: float,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    passes = Passes(monkeypatch, shown)
    ending = reading.find_ending(film_of(end=None))
    assert [(threads, careful) for _, threads, careful in passes.begun] == begun
    assert ending.last[-1].time == last
    assert len(caplog.records) == bool(words) and words in caplog.text


def test_a_file_without_pictures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    Passes(monkeypatch, {})
    for read in (reading.find_ending, reading.first_frame, lambda film: reading._scan(film, 1)):
        with pytest.raises(VideoError, match="no picture in it can be decoded; download or export it again"):
            read(film_of())
        with pytest.raises(VideoError, match=r"it shows no picture up to 2.5 s; give a later moment"):
            read(film_of(until=6.5))


@pytest.mark.parametrize(
    ("values", "last", "stay", "end"),
    [
        ({"until": 15.0}, 14.9, 0.0, None),
        ({"until": 15.002}, 14.9, 0.0, None),  # time stamps are thousandths
        ({"until": 15.003}, 14.9, 0.0, "11.00"),
        ({"until": 16.0, "length": 12.0}, 14.9, 0.0, None),
        ({"until": 16.0, "length": None}, 15.0, 1.0, None),
        ({"until": 16.0, "length": None}, 15.0, 0.5, "11.50"),
        ({"until": 15.1, "length": None}, 15.0, 0.0, None),  # a frame's time at least
        ({"until": 15.2, "length": None}, 15.0, 0.0, "11.10"),
        ({"until": 7.1, "length": None}, None, 0.0, None),  # two seconds of pictures without times
        ({"until": 7.2, "length": None}, None, 0.0, "3.10"),
    ],
)
def test_a_moment_after_the_end_is_refused_with_the_end(
    values: dict[str, Any], last: float | None, stay: float, end: str | None
) -> None:
    ending: Any = SimpleNamespace(
        pictures=SimpleNamespace(was_cut=False), last=[picture_at(last)], stay=stay, clock=[-2.0, 0.0]
    )
    if end is None:
        _check_moment(film_of(**values), ending)
    else:
        with pytest.raises(VideoError, match=f"it ends at {end} s; give an earlier moment"):
            _check_moment(film_of(**values), ending)
        ending.pictures.was_cut = True  # so there is something after it
        _check_moment(film_of(**values), ending)


@pytest.mark.parametrize(
    ("times", "count", "chosen"),
    [
        ([0.0, 1.0, 2.0, 3.0], 2, [1, 3]),
        ([0.0, 1.0, 2.0, 3.0], 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        ([0.0, 0.1, 0.2, 9.9], 2, [2, 3]),
        ([0.0, None, 2.0, 9.0], 4, [0, 1, 2, 3]),  # without a clock they count alike
        ([5.0, 6.0, 1.0, 2.0], 4, [0, 1, 2, 3]),
        ([5.0, 5.0, 9.0, 9.5], 4, [0, 1, 2, 3]),
        ([7.0], 3, [0, 0, 0]),
    ],
)
def test_a_scan_takes_what_is_on_screen_at_its_moments(
    times: list[float | None], count: int, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    film = [SimpleNamespace(time=time, at=at) for at, time in enumerate(times)]
    monkeypatch.setattr(reading, "Pictures", lambda source: film)
    assert [frame.at for frame in reading._scan(film_of(), count)] == chosen  # type: ignore[attr-defined]


def test_a_picture_that_a_second_pass_lacks_is_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    film = [SimpleNamespace(time=float(at), at=at) for at in range(4)]
    passes = iter([film, film[:2]])
    monkeypatch.setattr(reading, "Pictures", lambda source: next(passes))
    assert [frame.at for frame in reading._scan(film_of(), 4)] == [0, 1, 1, 1]  # type: ignore[attr-defined]


def test_a_jump_lands_after_here_and_before_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []
    keyframes = [0.0, 4.0, 9.7]

    def pictures(source: Any, start: float) -> Any:
        begun.append(start)
        return iter([SimpleNamespace(time=min(time for time in [*keyframes, 99.0] if time >= start - 0.2))])

    monkeypatch.setattr(reading, "Pictures", pictures)
    landed = reading._jump(film_of(), 2.0, 9.8)
    assert landed is not None and landed[1].time == 9.7 and begun == [9.8]
    begun.clear()
    landed = reading._jump(film_of(), 2.0, 9.4)  # the first attempts land behind it
    assert landed is not None and landed[1].time == 4.0 and begun == pytest.approx([9.4, 8.9, 7.4, 2.9])
    keyframes[1] = 2.0
    assert reading._jump(film_of(), 2.0, 4.0) is None  # no further than here
    keyframes[1] = 3.5
    landed = reading._jump(film_of(), 2.0, 4.0)
    assert landed is not None and landed[1].time == 3.5
    assert reading._jump(film_of(), 5.0, 5.0) is None


@pytest.mark.parametrize(
    ("keyframes", "jumps"),
    [([1.0, 3.0, 5.0, 7.0], [1.0, 3.0, 5.0, 7.0]), ([0.0, 0.0, 5.0, 5.0], [5.0]), ([0.0, 0.0, 0.0, 3.0], [])],
)
def test_a_search_jumps_where_a_keyframe_is_ahead(
    keyframes: list[float], jumps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    film = [SimpleNamespace(time=float(second)) for second in range(8)]
    tried = list[float]()

    def jump(source: Any, here: float, moment: float) -> Any:
        tried.append(moment)
        return iter(film[int(moment) + 1 :]), film[int(moment)]

    monkeypatch.setattr(reading, "Pictures", lambda source: film)
    monkeypatch.setattr(reading, "keyframes_before", lambda source, moments: keyframes)
    monkeypatch.setattr(reading, "_jump", jump)
    chosen = reading._search(SimpleNamespace(start=0.0, duration=8.0), 4)  # type: ignore[arg-type]
    assert [frame.time for frame in chosen or []] == [1, 3, 5, 7] and tried == jumps


def test_a_search_gives_up_where_pictures_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "keyframes_before", lambda source, moments: [0.0] * len(moments))
    film: Any = SimpleNamespace(start=0.0, duration=8.0)
    for shown in ([SimpleNamespace(time=None)], [SimpleNamespace(time=0.0), SimpleNamespace(time=None)], []):
        monkeypatch.setattr(reading, "Pictures", lambda source, shown=shown: shown)
        assert reading._search(film, 4) is None


@pytest.mark.parametrize(
    ("duration", "end", "searched"), [(20.0, 20.0, False), (20.1, 20.1, True), (None, 20.1, False), (30.0, None, False)]
)
def test_a_long_file_is_searched_where_it_can_be(
    duration: float | None, end: float | None, searched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = np.zeros((4, 8, 3), np.uint8)
    asked: list[str] = []

    def ask(way: str, answer: Any) -> Any:
        asked.append(way)
        return answer

    monkeypatch.setattr(reading, "inspect", lambda path, until: film_of(duration=duration, end=end))
    monkeypatch.setattr(reading, "_search", lambda source, n: ask("search", None))
    monkeypatch.setattr(reading, "_scan", lambda source, n: ask("scan", ["frame"] * n))
    monkeypatch.setattr(reading, "deinterlace", lambda frames: frames[-1])
    monkeypatch.setattr(reading, "to_rgb", lambda frame, source, max_side: pictures)
    assert media.sample_frames("a.mp4", 3).shape == (3, 4, 8, 3)
    assert asked == (["search", "scan"] if searched else ["scan"])
    for wrong in ({"n": 0}, {"max_side": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            media.sample_frames("a.mp4", **wrong)  # type: ignore[arg-type]
    assert len(media.sample_frames("a.mp4", 1, max_side=1)) == 1
    assert len(media.sample_frames("a.mp4")) == 8
    for count, fps in ((0, 16), (1, 0), (-1, 16), (1, -1)):
        with pytest.raises(ValueError, match="count and fps must be positive"):
            media.read_tail("a.mp4", count, fps)


def test_pictures_of_another_size_take_that_of_the_first() -> None:
    picture = np.full((4, 8, 3), 7, np.uint8)
    assert reading._resize(picture, 8, 4) is picture
    assert reading._resize(picture, 4, 8).shape == (8, 4, 3) and (reading._resize(picture, 4, 8) == 7).all()
    assert reading._resize(picture, 8, 5).shape == (5, 8, 3) and reading._resize(picture, 9, 4).shape == (4, 9, 3)


@pytest.mark.parametrize(
    ("values", "frame", "reason"),
    [
        ({}, {}, None),
        ({"until": 5.0}, {}, "a part of a file"),
        ({"format": "mpegts"}, {}, "MPEG-TS"),
        ({}, {"color_trc": 16}, "HDR"),
        ({}, {"color_primaries": 12}, "wide colour"),
        ({}, {"format": SimpleNamespace(name="pal8", components=[])}, "transparency"),
        ({"sample_aspect_ratio": Fraction(4, 3)}, {}, "stretched pixels"),
        ({}, {"turn": (-1, 0, 0, 1)}, "a mirrored picture"),
        ({}, {"turn": (0, 1, -1, 0)}, None),
        ({}, {"turn": (-1, 0, 0, -1)}, None),
        ({}, {"turn": (0, 1, 1, 0)}, "a mirrored picture"),
    ],
)
def test_decord_reads_what_it_reads_right(
    values: dict[str, Any],
    frame: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    a, b, c, d = (65536 * one for one in frame.pop("turn", (1, 0, 0, 1)))
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], np.int32).tobytes()
    plain: dict[str, Any] = {"color_trc": 1, "color_primaries": 1, "width": 8, "height": 4}
    plain |= {"side_data": {"DISPLAYMATRIX": matrix}, "format": SimpleNamespace(name="yuv420p", components=[])}
    first = SimpleNamespace(**(plain | frame))
    required: list[int] = []
    monkeypatch.setattr(reading, "first_frame", lambda source: first)
    monkeypatch.setattr(decord_reader, "require", lambda: required.append(1))
    monkeypatch.setattr(decord_reader, "read", lambda path, n: np.zeros((n, 8, 16, 3), np.uint8))
    film = film_of(**({"sample_aspect_ratio": Fraction(1)} | values))
    frames = reading._sample_with_decord(film, 2, None)
    if reason is None:
        height, width = (8, 4) if a == 0 else (4, 8)
        assert frames is not None and frames.shape == (2, height, width, 3) and not caplog.records
        small = reading._sample_with_decord(film, 1, 2)
        assert small is not None and small.shape == ((1, 2, 1, 3) if a == 0 else (1, 1, 2, 3))
        tiny = reading._sample_with_decord(film, 1, 1)
        assert tiny is not None and tiny.shape == (1, 1, 1, 3)
        large = reading._sample_with_decord(film, 1, 99)
        assert large is not None and large.shape == (1, height, width, 3)
    else:
        assert frames is None and required == [1]  # who asks for it is to have it all the same
        assert [record.message.partition(": ")[2] for record in caplog.records] == [
            f"decord gets {reason} wrong; PyAV reads the frames"
        ]


def test_decord_s_last_frame_may_differ_by_what_converters_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decord_reader, "require", lambda: None)
    ours = Image.new("RGB", (8, 4), (100, 100, 100))
    for level, shape, same in ((105, (4, 8), True), (106, (4, 8), False), (94, (4, 8), False), (100, (8, 4), False)):
        theirs = np.full((1, *shape, 3), level, np.uint8)
        monkeypatch.setattr(decord_reader, "read", lambda name, count, theirs=theirs: theirs if count == 0 else None)
        assert (media.check_last_frame_with_decord("a.mp4", ours) is None) is same
    monkeypatch.setattr(decord_reader, "read", lambda name, count: "did not finish")
    assert media.check_last_frame_with_decord("a.mp4", ours) == "decord did not finish; PyAV's last frame is kept"


@pytest.mark.parametrize(
    ("code", "error", "told"),
    [(3, "a\nboom\n", "failed with code 3 (boom)"), (-6, "", "failed with code -6 (nothing)")],
)
def test_what_decord_s_process_says_last_is_told(
    code: int, error: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ended(command: list[str], **options: Any) -> Any:
        asked.append((command[-2:], options["timeout"]))
        return SimpleNamespace(returncode=code, stderr=error.encode(), stdout=b"")

    monkeypatch.setattr(decord_reader, "require", lambda: None)
    monkeypatch.setattr(subprocess, "run", ended)
    assert decord_reader.read("a.mp4", 8) == told and asked == [(["a.mp4", "8"], 20.0)]


def test_a_file_is_probed_by_its_first_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    film = film_of(has_audio=True, sample_aspect_ratio=Fraction(1))
    monkeypatch.setattr(reading, "inspect", lambda path: film)
    turned = np.array([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30], np.int32).tobytes()
    first = SimpleNamespace(width=8, height=4, side_data={"DISPLAYMATRIX": turned})
    monkeypatch.setattr(reading, "first_frame", lambda source: first)
    assert media.probe("a.mp4") == media.VideoInfo(4, 8, Fraction(10), 10.0, True)


def test_the_first_picture_is_the_first() -> None:
    assert number(media.read_first_frame(CORPUS / "h264_faststart.mp4")) == 0
    with pytest.raises(ValueError, match="count and fps must be positive"):
        media.read_tail(CORPUS / "h264_faststart.mp4", 1, 0)
