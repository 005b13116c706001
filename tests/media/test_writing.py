"""What is written shows the same colours everywhere, appears whole or not at all, and joins frame by frame."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from tests.data.corpus import vidmark
from tests.support.golden import ROOT
from tests.support.media_samples import (
    CORPUS,
    beeps,
    beeps_in,
    bias,
    moment_of,
    natural,
    number,
    numbered,
    recording,
    restless,
)
from wan import media
from wan.errors import UserError
from wan.media import rewrite_video, rewriting, writing
from wan.media.colour import to_rgb
from wan.media.source import Pictures, exact_rate, inspect, open_video

pytestmark = pytest.mark.slow

CUT = frozenset({0, 1})


def decoded(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def top_level_boxes(path: Path) -> list[str]:
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        names.append(name.decode())
        at += size
    return names


def test_a_written_video_is_tagged_and_reads_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    media.write_video(path, numbered(range(9), 1280, 720), 24)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.color_primaries, stream.color_trc, stream.colorspace, stream.color_range) == (1, 1, 1, 1)
        assert (stream.codec_context.name, stream.profile, stream.pix_fmt) == ("h264", "High", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(24), 9)
        assert "comment" not in container.metadata
    boxes = top_level_boxes(path)
    assert boxes.index("moov") < boxes.index("mdat")
    assert b"colrnclx\x00\x01\x00\x01\x00\x01\x00" in path.read_bytes()
    mark = vidmark.read(np.asarray(media.read_last_frame(path)))
    assert mark is not None
    assert mark["index"] == 8
    assert max(vidmark.patch_error(mark["patches"], [colour for _, colour in vidmark.PATCHES])) <= 3
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_natural_picture_keeps_its_brightness(tmp_path: Path) -> None:
    picture = natural()
    media.write_video(tmp_path / "clip.mp4", [picture] * 3, 16)
    assert bias(media.read_last_frame(tmp_path / "clip.mp4"), picture) < 0.1


def test_eight_generations_do_not_drift(tmp_path: Path) -> None:
    first = picture = natural(640, 368)
    for generation in range(8):
        path = tmp_path / f"{generation}.mp4"
        media.write_video(path, [picture] * 2, 16)
        picture = np.asarray(media.read_last_frame(path))
    assert bias(picture, first) < 0.3


@pytest.mark.parametrize("fps", [16, 24, 23.976, 29.97, Fraction(25, 2)])
def test_frame_times_are_exact(fps: Fraction | float, tmp_path: Path) -> None:
    media.write_video(tmp_path / "clip.mp4", numbered(range(40), 64, 36), fps)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        times = [moment_of(frame.pts, stream.time_base) for frame in container.decode(stream)]
    assert times == [Fraction(k) / exact_rate(fps) for k in range(40)]


@pytest.mark.parametrize(
    ("given", "meant"), [(23.976, "24000/1001"), (29.97, "30000/1001"), (16.0, "16"), (12.5, "25/2")]
)
def test_rates_near_the_television_ones_become_exact(given: float, meant: str) -> None:
    assert exact_rate(given) == Fraction(meant)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 90000])
def test_impossible_rates_are_refused(fps: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fps"):
        media.write_video(tmp_path / "clip.mp4", numbered(range(2)), fps)


def test_metadata_survives_in_the_comment(tmp_path: Path) -> None:
    told = {"prompt": "a cat 🐈\n走 " + "x" * 3000, "seed": 2**63 - 1, "steps": 40}
    media.write_video(tmp_path / "clip.mp4", numbered(range(2)), 16, metadata=told)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert json.loads(container.metadata["comment"]) == told
        assert "a cat 🐈" in container.metadata["comment"]  # as a player shows it


def psnr(path: Path, frames: list[npt.NDArray[Any]]) -> float:
    with av.open(str(path)) as container:
        errors = [
            np.mean((picture.to_ndarray(format="rgb24").astype(float) - frame) ** 2)
            for picture, frame in zip(container.decode(video=0), frames, strict=True)
        ]
    return float(10 * np.log10(255**2 / np.mean(errors)))


@pytest.mark.parametrize("size", [(832, 480), (480, 832), (160, 96), (320, 192)])
def test_the_same_frames_give_the_same_file(size: tuple[int, int], tmp_path: Path) -> None:
    """Without x264's cpu-independent, eight files of 160x96 are five different ones."""
    frames, seen = list(restless(*size)), set()
    for _ in range(4):
        media.write_video(tmp_path / "clip.mp4", frames, 16, keyframes=CUT, metadata={"seed": 1})
        seen.add((tmp_path / "clip.mp4").read_bytes())
    assert len(seen) == 1
    assert psnr(tmp_path / "clip.mp4", frames) > 39  # of RGB with noise, whose colour is kept at half the size
    assert len(seen.pop()) < 0.045 * 33 * size[0] * size[1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="keeps a process to one core")
def test_a_machine_with_fewer_cores_gives_the_same_file(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[2])])\n"
        "from tests.support.media_samples import restless; from wan.media import write_video\n"
        "write_video(sys.argv[1], restless(320, 192), 16)"
    )
    for cores in (1, len(os.sched_getaffinity(0))):
        command = [sys.executable, "-c", code, str(tmp_path / f"{cores}.mp4"), str(cores)]
        subprocess.run(command, check=True, cwd=ROOT)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_odd_sides_lose_one_row_and_column(tmp_path: Path) -> None:
    picture = natural(161, 91)
    media.write_video(tmp_path / "clip.mp4", [picture] * 2, 16)
    read = np.asarray(media.read_last_frame(tmp_path / "clip.mp4"))
    assert read.shape == (90, 160, 3)
    assert np.abs(read.astype(int) - picture[:90, :160]).mean() < 6


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)],
        [np.zeros((8, 8, 3), np.float32)],
        [np.zeros((8, 8), np.uint8)],
        [np.zeros((1, 8, 3), np.uint8)],
    ],
    ids=["none", "two sizes", "floats", "grey", "one row"],
)
def test_frames_that_are_none_leave_nothing_behind(frames: list[npt.NDArray[Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frame"):
        media.write_video(tmp_path / "clip.mp4", frames, 16)
    assert os.listdir(tmp_path) == []


def test_an_error_while_frames_are_made_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    def failing() -> Iterator[npt.NDArray[Any]]:
        yield from numbered(range(3))
        raise KeyboardInterrupt

    media.write_video(tmp_path / "clip.mp4", numbered([7]), 16)
    with pytest.raises(KeyboardInterrupt):
        media.write_video(tmp_path / "clip.mp4", failing(), 16)
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert number(media.read_last_frame(tmp_path / "clip.mp4")) == 7


def test_a_video_that_another_program_holds_open_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows does it, which also flushes no file that was opened for reading."""

    def refuse(source: str, target: Path) -> None:
        raise PermissionError(13, "Permission denied", os.fspath(target))

    def flush(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size)  # an error for a file that cannot be written to

    monkeypatch.setattr(os, "fsync", flush)
    media.write_video(tmp_path / "clip.mp4", numbered([7]), 16)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="close it where it is open"):
        media.write_video(tmp_path / "clip.mp4", numbered([8]), 16)
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert number(media.read_last_frame(tmp_path / "clip.mp4")) == 7


@pytest.mark.parametrize(
    "name", ["clip.avi", "clip", "none/clip.mp4", "folder.mp4", "x" * 252 + ".mp4", "file/clip.mp4"]
)
def test_names_that_cannot_be_written_are_refused_before_any_frame_is_made(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    made: list[npt.NDArray[Any]] = []

    def frames() -> Iterator[npt.NDArray[Any]]:
        for frame in numbered(range(2)):
            made.append(frame)
            yield frame

    with pytest.raises(UserError) as caught:
        media.write_video(tmp_path / name, frames(), 16)
    assert "\n" not in str(caught.value)
    assert made == []
    with pytest.raises(UserError):
        media.check_output(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


@pytest.mark.parametrize("name", ["видео 你好 🎬.mp4", "a:b.mp4", "http:x.mp4", "100%d.mp4", "-i.MP4", "new\nline.mp4"])
def test_odd_names_are_written(name: str, tmp_path: Path) -> None:
    media.check_output(tmp_path / name)
    media.write_video(tmp_path / name, numbered([3]), 16)
    assert os.listdir(tmp_path) == [name]
    assert number(media.read_last_frame(tmp_path / name)) == 3


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(60))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="free some space"):
            media.write_video(tmp_path / "clip.mp4", noise, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_video_under_the_name(tmp_path: Path) -> None:
    code = (
        "import sys, itertools, numpy as np; from wan.media import write_video\n"
        "write_video(sys.argv[1], (np.full((64, 64, 3), i % 256, np.uint8) for i in itertools.count()), 16)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "clip.mp4")])
    deadline = time.monotonic() + 20
    while not any(part.stat().st_size for part in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from wan.media import write_video\n"
        "write_video(sys.argv[1], (np.full((720, 1280, 3), i, np.uint8) for i in range(150)), 16)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "clip.mp4")]
    peak_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak_kib < 300 * 1024  # the frames together are 395 MiB


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    """Three clips, each of which begins with the last frame of the one before, as a chain makes them."""
    paths = [tmp_path / f"clip_{index}.mp4" for index in range(3)]
    for index, path in enumerate(paths):
        media.write_video(path, numbered(range(32 * index, 32 * index + 33)), 23.976, keyframes=CUT)
    return paths


def test_joined_clips_show_every_frame_once_at_equal_distances(clips: list[Path], tmp_path: Path) -> None:
    assert media.join_videos(clips, tmp_path / "joined.mp4", metadata={"clips": 3}) == 97
    assert decoded(tmp_path / "joined.mp4") == list(range(97))
    with av.open(str(tmp_path / "joined.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(24000, 1001)
        assert (stream.color_primaries, stream.color_trc, stream.colorspace, stream.color_range) == (1, 1, 1, 1)
        assert json.loads(container.metadata["comment"]) == {"clips": 3}
        packets = [packet for packet in container.demux(stream) if packet.size]
        tick = stream.time_base
    shown = [moment_of(packet.pts, tick) for packet in packets]
    coded = [moment_of(packet.dts, tick) for packet in packets]
    assert sorted(shown) == [Fraction(1001 * k, 24000) for k in range(97)]
    assert {after - before for before, after in pairwise(coded)} == {Fraction(1001, 24000)}
    assert all(decoding <= showing for decoding, showing in zip(coded, shown, strict=True))
    assert number(media.read_last_frame(tmp_path / "joined.mp4")) == 96
    boxes = top_level_boxes(tmp_path / "joined.mp4")
    assert boxes.index("moov") < boxes.index("mdat")


def test_joining_reads_each_packet_of_each_clip_as_often_however_many_there_are(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counting(path: str) -> Any:
        opened.append(Path(path).name)
        return open_video(path)

    monkeypatch.setattr("wan.media.writing.open_video", counting)
    monkeypatch.setattr("wan.media.writing.write_video", None)  # nothing is encoded again
    for count in (3, 6, 24):
        opened.clear()
        assert media.join_videos(clips[1:2] * count, tmp_path / "joined.mp4") == 32 * count + 1
        assert opened.count("clip_1.mp4") == 2 * count  # to look at it, and to copy it
        assert len(opened) <= 2 * count + 1  # and the result, which is looked at


def test_joining_changes_no_pixel(clips: list[Path], tmp_path: Path) -> None:
    media.join_videos(clips, tmp_path / "joined.mp4")
    together, single = list[npt.NDArray[Any]](), list[npt.NDArray[Any]]()
    for paths, pictures in (([tmp_path / "joined.mp4"], together), (clips, single)):
        for index, path in enumerate(paths):
            with av.open(str(path)) as container:
                frames = [frame.to_ndarray() for frame in container.decode(video=0)]
            pictures += frames[1 if index else 0 :]
    assert all((a == b).all() for a, b in zip(together, single, strict=True))


def test_clips_without_a_common_frame_are_joined_whole(clips: list[Path], tmp_path: Path) -> None:
    assert media.join_videos(clips[:2], tmp_path / "joined.mp4", drops=[0, 0]) == 66
    assert decoded(tmp_path / "joined.mp4") == [*range(33), *range(32, 65)]


def test_a_joined_video_can_be_joined_again_and_over_itself(clips: list[Path], tmp_path: Path) -> None:
    media.join_videos(clips[:2], tmp_path / "joined.mp4")
    assert media.join_videos([tmp_path / "joined.mp4", clips[2]], tmp_path / "joined.mp4") == 97
    assert decoded(tmp_path / "joined.mp4") == list(range(97))


def test_a_single_clip_is_a_join_too(clips: list[Path], tmp_path: Path) -> None:
    assert media.join_videos(clips[:1], tmp_path / "joined.mp4") == 33


def test_clips_that_cannot_be_cut_where_they_should_are_encoded_once_more(clips: list[Path], tmp_path: Path) -> None:
    media.write_video(tmp_path / "plain.mp4", numbered(range(28, 61)), 23.976)  # no keyframe at frame 5
    joined = tmp_path / "joined.mp4"
    assert media.join_videos([clips[0], tmp_path / "plain.mp4"], joined, drops=[0, 5], metadata={"clips": 2}) == 61
    assert decoded(joined) == list(range(61))
    with av.open(str(joined)) as container:
        assert container.streams.video[0].average_rate == Fraction(24000, 1001)
        assert json.loads(container.metadata["comment"]) == {"clips": 2}


def test_more_frames_than_there_are_cannot_be_left_out(clips: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without its first 33 frames"):
        media.join_videos(clips, tmp_path / "joined.mp4", drops=[0, 33, 1])


@pytest.mark.parametrize(
    ("size", "fps", "words"),
    [((320, 192), 23.976, ["height 192 against 180"]), ((160, 180), 24, ["width 160 against 320", "fps 24 against"])],
)
def test_clips_that_differ_are_refused_with_the_differences(
    size: tuple[int, int], fps: float, words: list[str], clips: list[Path], tmp_path: Path
) -> None:
    media.write_video(tmp_path / "other.mp4", numbered(range(5), *size), fps, keyframes=CUT)
    with pytest.raises(UserError) as caught:
        media.join_videos([*clips, tmp_path / "other.mp4"], tmp_path / "joined.mp4")
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "joined.mp4").exists()


@pytest.mark.parametrize(
    "file", ["vfr.mp4", "vp9.webm", "audio_longer.mp4", "text.mp4", "raw_annexb.h264", "anim.webp"]
)
def test_files_of_another_make_are_refused(file: str, clips: list[Path], tmp_path: Path) -> None:
    for parts in ([clips[0], CORPUS / file], [CORPUS / file, clips[0]]):
        with pytest.raises(UserError) as caught:
            media.join_videos(parts, tmp_path / "joined.mp4")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "joined.mp4").exists()


def test_nothing_to_join_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no videos"):
        media.join_videos([], tmp_path / "joined.mp4")


@pytest.mark.parametrize("keyed", [True, False])
def test_a_fade_mixes_the_frames_around_a_cut_and_leaves_the_others_alone(keyed: bool, tmp_path: Path) -> None:
    paths, shown = [], []
    for level in (40, 200, 90):
        frames = np.full((20, 32, 48, 3), level, np.uint8)
        frames[:, :, :24] += np.arange(20, dtype=np.uint8)[:, None, None, None]
        paths.append(tmp_path / f"{level}.mp4")
        media.write_video(paths[-1], frames, 16, keyframes=frozenset({0, 4, 16} if keyed else {0}))
        shown.append(rgb_of(paths[-1]))
    joined = tmp_path / "joined.mp4"
    assert media.join_videos(paths, joined, drops=[0, 0, 0], fades=[0, 4, 4]) == 20 + 16 + 16
    faded = rgb_of(joined)
    assert not list(tmp_path.glob(".*"))
    whole = [(slice(0, 16), shown[0][:16]), (slice(20, 32), shown[1][4:16]), (slice(36, 52), shown[2][4:])]
    for place, before in whole:
        apart = np.abs(faded[place].astype(int) - before)
        assert apart.max() == 0 if keyed else apart.max() <= 6
    for first, (end, begin) in ((16, (shown[0][16:], shown[1][:4])), (32, (shown[1][16:], shown[2][:4]))):
        for step in range(4):
            share = (step + 1) / 5
            wanted = (1 - share) * end[step] + share * begin[step]
            assert np.abs(faded[first + step] - wanted).mean() < 2


def rgb_of(path: Path) -> npt.NDArray[Any]:
    """All pictures uint8 [T, H, W, 3]."""
    source = inspect(str(path))
    return np.stack([to_rgb(frame, source) for frame in Pictures(source)])


def test_a_name_that_is_too_long_for_a_while_is_not_the_folders_fault(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"File name too long; give a shorter name, which for a time has some letters more$"
    ):
        media.write_video(tmp_path / f"{'a' * 250}.mp4", np.zeros((1, 16, 16, 3), np.uint8), 8)


def part_of(
    path: str, numbers: Sequence[int], keys: set[int], drop: int = 0, stop: int | None = None, **made: Any
) -> Any:
    plain: dict[str, Any] = {"codec": "h264", "width": 64, "height": 36, "pixels": "yuv420p", "fps": Fraction(16)}
    plain |= {"colour": (1, 1, 1, 1), "sample_aspect_ratio": Fraction(1), "encoder_settings": b"a", "streams": 1}
    form = writing._Format(**(plain | made))
    return writing._Part(path, form, list(numbers), frozenset(keys), drop, len(numbers) if stop is None else stop)


@pytest.mark.parametrize(
    ("drop", "stop", "can"),
    [(0, 9, True), (4, 9, True), (1, 9, False), (0, 4, True), (0, 5, False), (4, 8, True), (3, 4, False)],
)
def test_a_clip_can_be_cut_at_keyframes_and_at_its_end(drop: int, stop: int, can: bool) -> None:
    part = part_of("a.mp4", range(9), {0, 4, 8}, drop, stop)
    assert part.can_be_cut is can
    assert part.can_be_copied_after(part_of("b.mp4", range(9), {0})) is can


@pytest.mark.parametrize(
    "made", [{"codec": "hevc"}, {"pixels": "yuv444p"}, {"colour": (1, 1, 1, 2)}, {"encoder_settings": b"b"}]
)
def test_clips_of_another_make_are_encoded_again_but_fit(made: dict[str, Any]) -> None:
    first, other = part_of("a.mp4", range(9), {0}), part_of("b.mp4", range(9), {0}, **made)
    other.check_fits(first)
    assert not other.can_be_copied_after(first) and first.can_be_copied_after(first)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"width": 96}, "different width 96 against 64;"),
        ({"fps": Fraction(24)}, "different fps 24 against 16;"),
        ({"sample_aspect_ratio": Fraction(4, 3)}, "different sample aspect ratio 4/3 against 1;"),
        ({"streams": 2, "height": 54}, "different height 54 against 36, streams 2 against 1;"),
    ],
)
def test_clips_that_do_not_fit_are_told_by_their_differences(made: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"cannot join 'b.mp4' to 'a.mp4': {words} write both with the same settings"):
        part_of("b.mp4", range(9), {0}, **made).check_fits(part_of("a.mp4", range(9), {0}))


def test_a_clip_is_known_by_its_packets(clips: list[Path], tmp_path: Path) -> None:
    part = writing._Part.read(clips[0], 1)
    assert (part.drop, part.stop, sorted(part.numbers)) == (1, 33, list(range(33)))
    assert part.keys == {0, 1}
    assert (part.format.width, part.format.height, part.format.fps) == (320, 180, Fraction(24000, 1001))
    assert (part.format.codec, part.format.streams, part.format.sample_aspect_ratio) == ("h264", 1, Fraction(1))
    assert writing._Part.read(clips[0], 32, 33).drop == 32
    with pytest.raises(UserError, match="without its first 33 frames: it has 33"):
        writing._Part.read(clips[0], 33)
    with pytest.raises(UserError, match="it is no mp4 file; only clips of equal make can be joined"):
        writing._Part.read(CORPUS / "vp9.webm", 0)
    with pytest.raises(UserError, match="its frames are not evenly spaced from 0 on; write it again"):
        writing._Part.read(CORPUS / "vfr.mp4", 0)


def test_a_blend_shows_neither_whole() -> None:
    ends, begins = ([np.full((2, 2, 3), level, np.uint8)] * 3 for level in (100, 200))
    assert [int(one[0, 0, 0]) for one in writing._blend(ends, begins, 3)] == [125, 150, 175]
    half = writing._blend([np.array([[[0, 1, 255]]], np.uint8)], [np.array([[[1, 4, 254]]], np.uint8)], 1)
    assert next(half).tolist() == [[[0, 2, 254]]]  # 0.5, 2.5 and 254.5 to even


@pytest.mark.parametrize(
    ("drops", "fades", "keys", "pieces"),
    [
        ([0, 1], [0, 0], {0, 1}, [("a", 0, 9), ("b", 1, 9)]),
        # the last two of the one with the second and third of the other
        ([0, 1], [0, 2], {0, 3, 7}, [("a", 0, 7), ("mixed", [7, 8], [1, 2]), ("b", 3, 9)]),
        ([0, 0], [0, 2], {0, 7}, [("a", 0, 7), ("mixed", [7, 8], [0, 1]), ("again", [2, 3, 4, 5, 6, 7, 8])]),
        (
            [0, 0, 0],
            [0, 2, 2],
            {0, 2, 7},
            [("a", 0, 7), ("mixed", [7, 8], [0, 1]), ("b", 2, 7), ("mixed", [7, 8], [0, 1]), ("c", 2, 9)],
        ),
    ],
)
def test_faded_clips_are_pieces_and_what_is_mixed_of_their_ends(
    drops: list[int],
    fades: list[int],
    keys: set[int],
    pieces: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    made: dict[str, Any] = {}

    def read(path: str, drop: int, stop: int | None = None) -> Any:
        return part_of(path, range(9), keys, drop, stop)

    def write(path: str, frames: Any, fps: Fraction) -> int:
        Path(path).touch()
        made[path] = frames if isinstance(frames, tuple) else ("again", list(frames))
        assert fps == 16
        return 1

    monkeypatch.setattr(writing._Part, "read", read)
    monkeypatch.setattr(writing._Part, "pictures", lambda self: iter(range(self.drop, self.stop)))
    monkeypatch.setattr(writing, "_blend", lambda ends, begins, count: ("mixed", list(ends), list(begins)))
    monkeypatch.setattr(writing, "write_video", write)
    with writing._faded("abc"[: len(drops)], drops, fades, str(tmp_path / "out.mp4")) as listed:
        shown: list[Any] = []
        for path, drop, stop in listed:
            if path in made:
                assert (
                    Path(path).name
                    == f".out.mp4.{len([one for one in shown if one[0] in ('mixed', 'again')])}.piece.mp4"
                )
                assert (drop, stop) == (0, None)
                shown.append(made[path])
            else:
                shown.append((path, drop, stop))
        assert shown == pieces
    assert not list(tmp_path.iterdir())


def test_frames_have_even_sides_of_two_pixels_at_least() -> None:
    assert writing._even_size(np.zeros((2, 3, 3), np.uint8)) == (2, 2)
    assert writing._even_size(np.zeros((5, 8, 3), np.uint8)) == (8, 4)
    for shape in ((1, 8, 3), (8, 1, 3), (8, 8, 4), (8, 8), (1, 8, 8, 3)):
        with pytest.raises(ValueError, match="of 2 pixels or more"):
            writing._even_size(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("count", "size", "until", "words"),
    [
        (3, (64, 36), None, None),
        (2, (64, 36), None, r"reads back as 3 frames of \(64, 36\), not 2 of \(64, 36\)"),
        (3, (36, 64), None, r"not 3 of \(36, 64\)"),
        (3, (64, 36), 0.5, "reads back until None s, not 0.5 s"),
    ],
)
def test_what_was_written_is_read_back(
    count: int, size: tuple[int, int], until: float | None, words: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    media.write_video(path, numbered(range(3), 64, 36), 16)
    if words is None:
        writing._verify(str(path), count, size, until)
    else:
        with pytest.raises(RuntimeError, match=words):
            writing._verify(str(path), count, size, until)


@pytest.mark.parametrize(
    ("last", "until", "same"),
    [
        (0.5, 0.5, True),
        (0.5, 0.59, True),
        (0.5, 0.41, True),
        (0.5, 0.61, False),
        (0.5, 0.39, False),
        (0.5, None, False),
    ],
)
def test_the_sound_that_was_written_is_read_back_to_its_last_packet(
    last: float, until: float | None, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packet(kind: str, pts: float | None, size: int = 9) -> Any:
        stamp = None if pts is None else round(pts * 1000)
        return SimpleNamespace(stream=SimpleNamespace(type=kind), pts=stamp, size=size, time_base=Fraction(1, 1000))

    packets = [packet("video", 0.0), packet("audio", last), packet("audio", None), packet("video", 9.0)]
    packets += [packet("audio", 5.0, 0), packet("video", 5.0, 0)]  # the ends
    opened = SimpleNamespace(demux=lambda: packets, close=lambda: None)
    monkeypatch.setattr(writing, "open_video", lambda path: opened)
    monkeypatch.setattr(writing, "read_last_frame", lambda path: SimpleNamespace(size=(64, 36)))
    if same:
        writing._verify("a.mp4", 2, (64, 36), until)
    else:
        with pytest.raises(RuntimeError, match="the sound of 'a.mp4' reads back until 0.5 s"):
            writing._verify("a.mp4", 2, (64, 36), until)


@pytest.mark.parametrize("number_", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_full_is_told_from_one_that_fails(number_: int, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(UserError, match="free some space"), writing._published(path):
        raise OSError(number_, os.strerror(number_))
    with pytest.raises(OSError, match="Input/output"), writing._published(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not list(tmp_path.iterdir())
    with writing._published(path) as temporary:
        Path(temporary).write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_a_name_that_cannot_be_written_is_told_with_the_reason(tmp_path: Path) -> None:
    for name, words in (
        ("a.avi", "only mp4 files are written, give a name that ends in .mp4"),
        (".mp4/x", "only mp4 files are written"),
        ("none/a.mp4", "No such file or directory; give a folder that can be written to"),
    ):
        with pytest.raises(UserError, match=words):
            media.check_output(tmp_path / name)
    media.check_output(tmp_path / "A.MP4")
    assert not list(tmp_path.iterdir())


def test_sound_is_passed_on_with_the_pictures(clips: list[Path], tmp_path: Path) -> None:
    """Each packet of it when its moment is written, and what is left at the end; packets of pictures in between."""

    class Told:
        last = None

        def __init__(self) -> None:
            self.moments: list[float] = []

        def open(self, output: Any) -> None:
            assert len(output.streams.video) == 1

        def mux_until(self, output: Any, seconds: float) -> None:
            self.moments.append(seconds)

    told: Any = Told()
    media.write_video(tmp_path / "a.mp4", numbered(range(3), 64, 36), 16, sound=told)
    assert told.moments == [0, 1 / 16, 2 / 16, float("inf")]
    told = Told()
    media.join_videos(clips[:2], tmp_path / "joined.mp4", sound=told)
    moments = [pytest.approx(number * 1001 / 24000) for number in range(65)]
    assert told.moments == [*moments, float("inf")]


def test_clips_whose_frames_are_decoded_out_of_order_are_joined_too(tmp_path: Path) -> None:
    """A steady pan has B-frames, which flickering numbers have not."""
    paths = [tmp_path / f"{index}.mp4" for index in range(2)]
    shown = []
    for path, first in zip(paths, (0, 12), strict=True):
        media.write_video(path, list(restless(160, 96, 25))[first : first + 13], 16, keyframes=CUT)
        numbers = writing._Part.read(path, 0).numbers
        assert numbers != sorted(numbers)
        shown.append(rgb_of(path))
    assert media.join_videos(paths, tmp_path / "joined.mp4") == 25
    assert np.array_equal(rgb_of(tmp_path / "joined.mp4"), np.concatenate([shown[0], shown[1][1:]]))
    with av.open(str(tmp_path / "joined.mp4")) as container:
        stream = container.streams.video[0]
        stamps = [(packet.pts, packet.dts) for packet in container.demux(stream) if packet.size]
        tick = stream.time_base
    assert all(moment_of(coded, tick) <= moment_of(seen, tick) for seen, coded in stamps)
    coded = [moment_of(one, tick) for _, one in stamps]
    assert {after - before for before, after in pairwise(coded)} == {Fraction(1, 16)}
    assert sorted(moment_of(seen, tick) for seen, _ in stamps) == [Fraction(at, 16) for at in range(25)]
    assert any(moment_of(one, tick) == moment_of(other, tick) for one, other in stamps)  # no later than needed


def test_a_rewritten_video_keeps_its_rate_and_all_of_its_sound(tmp_path: Path) -> None:
    recording(tmp_path / "a.mp4", [at / 30 for at in range(30)], sound=beeps(1.0, [0.2, 0.8]), size=(64, 36))
    count = rewrite_video(
        tmp_path / "a.mp4",
        tmp_path / "b.mp4",
        lambda picture: picture.repeat(2, 0).repeat(2, 1),
        metadata={"seed": 1},
    )
    assert count == 30 and decoded(tmp_path / "b.mp4") == list(range(30))
    info = media.probe(tmp_path / "b.mp4")
    assert (info.width, info.height, info.has_audio) == (128, 72, True)
    assert info.fps == media.probe(tmp_path / "a.mp4").fps
    assert beeps_in(tmp_path / "b.mp4") == pytest.approx([0.2, 0.8], abs=0.03)
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert json.loads(container.metadata["comment"]) == {"seed": 1}
    media.write_video(tmp_path / "silent.mp4", numbered(range(3), 64, 36), 16)
    assert rewrite_video(tmp_path / "silent.mp4", tmp_path / "b.mp4", lambda picture: picture) == 3
    assert not media.probe(tmp_path / "b.mp4").has_audio


@pytest.mark.parametrize(("first", "start"), [(2.0, 2.0), (0.0, 0.0), (None, 1.5)])
def test_the_sound_of_a_rewritten_video_begins_with_its_pictures(
    first: float | None, start: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = SimpleNamespace(start=1.5)
    hearing: Any = SimpleNamespace(end=9.0)
    monkeypatch.setattr(rewriting, "choose_track", lambda source: "track")
    monkeypatch.setattr(rewriting, "listen", lambda track: hearing)
    monkeypatch.setattr(rewriting, "first_frame", lambda source: SimpleNamespace(time=first))
    whole: Any = rewriting._whole_sound(source)
    assert (whole.start, whole.end, whole.track, whole.hearing) == (start, 9, "track", hearing)
    monkeypatch.setattr(rewriting, "listen", lambda track: None)
    assert rewriting._whole_sound(source) is None


def test_every_part_needs_its_number_of_frames_to_leave_out(clips: list[Path], tmp_path: Path) -> None:
    for drops, fades in (([0], ()), ([0, 1, 1], ()), ([0, 1], [0, 2, 2])):
        with pytest.raises(ValueError, match="zip"):
            media.join_videos(clips[:2], tmp_path / "joined.mp4", drops=drops, fades=fades)
    with pytest.raises(ValueError, match="zip"):
        list(writing._blend([np.zeros((2, 2, 3), np.uint8)], [], 1))
    assert not (tmp_path / "joined.mp4").exists()


def test_a_clip_that_changes_while_it_is_copied_is_not_joined(clips: list[Path], tmp_path: Path) -> None:
    part = writing._Part.read(clips[0], 0)
    shorter = replace(part, numbers=part.numbers[:-1], stop=part.stop - 1)
    with pytest.raises(ValueError, match="zip"):
        writing._join([shorter], tmp_path / "joined.mp4", None, None)
    assert not (tmp_path / "joined.mp4").exists()
