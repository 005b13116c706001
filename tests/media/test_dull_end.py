"""A video that ends in black or at a standstill is known for it, and can be used up to its last lively frame."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.media_samples import CORPUS, READABLE, beeps, beeps_in, natural, number, numbered, recording
from wan import media
from wan.footage import VideoFile, choose_anchor
from wan.media import VideoError, dull_end, find_dull_end

pytestmark = pytest.mark.slow

RATE = 24
SIZE = (160, 96)


def moving(count: int) -> list[np.ndarray]:
    return list(numbered(range(count), *SIZE))


def panning(count: int, step: int = 2) -> list[np.ndarray]:
    """A camera over a photo, with a sensor's noise."""
    wide, rng = natural(SIZE[0] + step * count, SIZE[1]), np.random.default_rng(1)
    views = [wide[:, step * at : step * at + SIZE[0]] + rng.standard_normal((*SIZE[::-1], 3)) for at in range(count)]
    return [np.rint(view).clip(0, 255).astype(np.uint8) for view in views]


def plain(colour: tuple[int, int, int], count: int) -> list[np.ndarray]:
    return [np.full((*SIZE[::-1], 3), colour, np.uint8)] * count


def card(count: int) -> list[np.ndarray]:
    return [natural(*SIZE, seed=9)] * count


def write(path: Path, pictures: Sequence[np.ndarray]) -> Path:
    media.write_video(path, pictures, RATE)
    return path


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (plain((0, 0, 0), 36), "black"),
        (plain((0, 0, 0), 1), "black"),
        (plain((255, 255, 255), 36), "one colour"),
        (plain((20, 40, 200), 36), "one colour"),
        (card(48), "still"),
        (card(48) + plain((0, 0, 0), 24), "black"),
        (plain((0, 0, 0), 240), "black"),
    ],
    ids=["black", "one black frame", "white", "blue", "a card", "a card, then black", "ten seconds of black"],
)
def test_a_cut_to_something_dull_is_found_to_the_frame(end: list[np.ndarray], kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [*panning(60), *end])
    dull = find_dull_end(path)
    assert dull is not None and dull.kind == kind
    assert dull.last_lively == pytest.approx(59 / RATE, abs=1e-3)
    assert dull.seconds == pytest.approx(len(end) / RATE, abs=0.05)
    assert f"last {len(end) / RATE:.1f} s" in str(dull)


@pytest.mark.parametrize("target", [0, 255])
@pytest.mark.parametrize("length", [12, 36])
def test_a_fade_is_left_before_it_is_seen(length: int, target: int, tmp_path: Path) -> None:
    pictures = panning(60 + length)
    for at in range(length):
        share = (at + 1) / length
        pictures[60 + at] = np.rint(pictures[60 + at] * (1 - share) + target * share).astype(np.uint8)
    dull = find_dull_end(write(tmp_path / "a.mp4", pictures + plain((target,) * 3, 6)))
    assert dull is not None and dull.last_lively is not None
    assert 59 - 12 <= dull.last_lively * RATE <= 59 + 0.15 * length


def test_motion_that_comes_to_rest_is_left_where_it_rests(tmp_path: Path) -> None:
    pictures = panning(60)
    dull = find_dull_end(write(tmp_path / "a.mp4", pictures + [pictures[-1]] * 72))
    assert dull is not None and dull.kind == "still"
    assert dull.last_lively == pytest.approx(59 / RATE, abs=1e-3) and dull.seconds == pytest.approx(3.04, abs=0.1)


def test_noise_is_no_motion(tmp_path: Path) -> None:
    rng, pictures = np.random.default_rng(0), panning(60)
    still = [pictures[-1] + 2 * rng.standard_normal(pictures[-1].shape) for _ in range(72)]
    noisy = [np.rint(picture).clip(0, 255).astype(np.uint8) for picture in still]
    dull = find_dull_end(write(tmp_path / "a.mp4", pictures + noisy))
    assert dull is not None and dull.kind == "still"
    assert dull.last_lively == pytest.approx(59 / RATE, abs=0.05)


@pytest.mark.parametrize("step", [1, 2])
def test_a_video_that_moves_to_its_end_is_not_dull(step: int, tmp_path: Path) -> None:
    assert find_dull_end(write(tmp_path / "a.mp4", panning(72, step))) is None


def test_a_small_thing_that_moves_is_motion(tmp_path: Path) -> None:
    pictures = []
    for at in range(72):
        picture = natural(*SIZE)
        picture[40:52, 20 + at : 32 + at] = (220, 30, 30)
        pictures.append(picture)
    assert find_dull_end(write(tmp_path / "a.mp4", pictures)) is None


def test_a_night_scene_is_not_black(tmp_path: Path) -> None:
    night = [np.rint(picture * 0.2).astype(np.uint8) for picture in panning(48)]
    assert find_dull_end(write(tmp_path / "a.mp4", night)) is None


@pytest.mark.parametrize(
    ("pictures", "kind"), [(card(60), "still"), (plain((0, 0, 0), 60), "black")], ids=["still", "black"]
)
def test_a_video_that_is_dull_throughout_has_no_lively_frame(
    pictures: list[np.ndarray], kind: str, tmp_path: Path
) -> None:
    dull = find_dull_end(write(tmp_path / "a.mp4", pictures))
    assert dull is not None and (dull.kind, dull.last_lively) == (kind, None)
    assert dull.seconds == pytest.approx(2.5, abs=0.05)


def test_a_show_of_stills_has_no_lively_frame(tmp_path: Path) -> None:
    stills = [picture for seed in range(8) for picture in [natural(*SIZE, seed=seed)] * 36]
    dull = find_dull_end(write(tmp_path / "a.mp4", stills))
    assert dull is not None and (dull.kind, dull.last_lively) == ("still", None)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_last_picture_that_is_held_is_a_standstill(name: str, tmp_path: Path) -> None:
    video = "libvpx-vp9" if name == "a.webm" else "libx264"
    recording(tmp_path / name, [at / 30 for at in range(31)], last=4.0, video=video)
    dull = find_dull_end(tmp_path / name)
    assert dull is not None and (dull.kind, dull.last_lively) == ("still", 1.0)
    assert dull.seconds == pytest.approx(4, abs=0.01)


def remux(path: Path, kind: str) -> Path:
    target = path.with_suffix(f".{kind}")
    with av.open(str(path)) as read, av.open(str(target), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = stream
                written.mux(packet)
    return target


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "flv", "h264", "gif", "webp"])
def test_the_last_lively_frame_is_the_last_one_up_to_its_moment(kind: str, tmp_path: Path) -> None:
    pictures = moving(40) + plain((0, 0, 0), 20)
    path = tmp_path / "a.mp4"
    if kind in ("gif", "webp"):
        path = tmp_path / f"a.{kind}"
        images = [Image.fromarray(picture) for picture in pictures]
        images[0].save(path, save_all=True, append_images=images[1:], duration=40, lossless=True, optimize=False)
    else:
        write(path, pictures)
        path = path if kind == "mp4" else remux(path, kind)
    dull = find_dull_end(path)
    assert dull is not None and dull.kind == "black" and dull.last_lively is not None
    assert number(media.read_last_frame(path, dull.last_lively)) == 39
    assert find_dull_end(path, dull.last_lively) is None


def test_moments_count_from_where_a_player_does(tmp_path: Path) -> None:
    """A transport stream's clock begins anywhere, and jumps where two were put together."""
    one = remux(write(tmp_path / "one.mp4", moving(24)), "ts").read_bytes()
    two = remux(write(tmp_path / "two.mp4", list(numbered(range(24, 48), *SIZE)) + plain((0, 0, 0), 12)), "ts")
    (tmp_path / "both.ts").write_bytes(one + two.read_bytes())
    dull = find_dull_end(tmp_path / "both.ts")
    assert dull is not None and dull.last_lively is not None
    assert number(media.read_last_frame(tmp_path / "both.ts", dull.last_lively)) == 47
    assert number(media.read_last_frame(tmp_path / "both.ts", 0.5)) == 12


EVEN = [file for file in READABLE if file["n_frames"] >= 8 and not file.get("vfr") and not file.get("damaged")]


@pytest.mark.parametrize("entry", EVEN, ids=lambda entry: entry["file"])
def test_every_kind_of_file_can_be_used_up_to_a_moment(entry: dict[str, Any]) -> None:
    path, count = CORPUS / entry["file"], entry["n_frames"]
    begin = media.source.inspect(path)
    fps = float(entry["fps"] and Fraction(entry["fps"]) or begin.fps)
    first = next(iter(media.source.Pictures(begin)))
    offset = 0.0 if first.time is None else first.time - begin.zero
    wanted = count // 2
    until = round(offset + wanted / fps, 3)
    last = media.read_last_frame(path, until)
    assert number(last) == entry["first_index"] + wanted
    tail = media.read_tail(path, 3, Fraction(fps).limit_denominator(1001), until)
    assert [number(frame) for frame in tail] == [entry["first_index"] + wanted - back for back in (2, 1, 0)]
    seen = [number(frame) for frame in media.sample_frames(path, 4, until=until)]
    assert seen == sorted(seen) and seen[-1] <= entry["first_index"] + wanted
    assert np.abs(np.subtract(seen, entry["first_index"] + (wanted + 1) * np.array([1, 3, 5, 7]) / 8)).max() <= 1.1


def test_a_moment_that_is_not_in_the_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(48))
    assert number(media.read_last_frame(path, 2.0)) == 47
    for moment, words in ((2.1, "it ends at 2.00 s"), (-1.0, "no moment"), (float("nan"), "no moment")):
        with pytest.raises(VideoError, match=words) as caught:
            media.read_last_frame(path, moment)
        assert "\n" not in str(caught.value)
    recording(tmp_path / "late.mp4", [1.0, 1.5, 2.0], sound=beeps(3, [0.1]))
    with pytest.raises(VideoError, match=r"shows no picture up to 0.5 s"):
        media.read_last_frame(tmp_path / "late.mp4", 0.5)


def test_footage_up_to_a_moment_knows_nothing_after_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(40) + plain((0, 0, 0), 20))
    footage = VideoFile(path, until=39 / RATE)
    assert number(footage.last) == 39
    assert number(((footage.tail(5, Fraction(RATE))[0] + 1) * 127.5).round().numpy()) == 35
    assert [number(frame) for frame in footage.samples(4)] == [5, 15, 25, 35]
    assert max(number(frame) for frame in footage.samples(5, 1.0)) == 39
    assert number(choose_anchor(footage)) in range(40)


def test_a_source_is_joined_up_to_its_moment(tmp_path: Path) -> None:
    recording(tmp_path / "a.mp4", [at / 30 for at in range(31)], last=4.0, sound=beeps(5, [0.5, 2.5, 4.0]))
    clip = tmp_path / "clip.mp4"
    media.write_video(clip, numbered(range(1000, 1009), 64, 36), 16, keyframes=frozenset({0, 1}))
    for until, begins, heard in ((0.8, 0.8 + 1 / 16, [0.5]), (3.0, 3.0, [0.5, 2.5])):
        media.assemble(tmp_path / "a.mp4", [clip], tmp_path / "joined.mp4", drops=[1], until=until)
        with av.open(str(tmp_path / "joined.mp4")) as container:
            shown = [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert shown.index(1001) / 30 == pytest.approx(begins, abs=0.04)
        assert shown[shown.index(1001) - 1] == min(round(until * 30), 30)
        assert beeps_in(tmp_path / "joined.mp4") == pytest.approx(heard, abs=0.03)


def test_pictures_of_the_same_moment_do_not_stop_the_clock() -> None:
    begin = media.source.inspect(CORPUS / "h264_faststart.mp4")
    frames: list[Any] = [SimpleNamespace(time=begin.start) for _ in range(9)]
    pictures = media.source.Pictures(begin)
    shown = list(pictures._up_to((one for one in frames), begin.start + 2.5 / float(begin.fps)))
    assert len(shown) == 3 and pictures.was_cut


def test_the_last_picture_of_a_damaged_file_may_be_another_in_each_pass() -> None:
    steps = [0.0, 9.0, 9.0]
    look = dull_end._Look([-0.2, -0.1, 0.0], [40.0] * 3, [90.0] * 3, steps, [30.0, 20.0, 10.0], [9.0, 8.0, 7.0])
    assert dull_end._begins(look, is_blank=False) == 2
