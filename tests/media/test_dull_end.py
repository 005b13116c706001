"""A video that ends in black or at a standstill is known for it, and can be used up to its last lively frame."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.support.media_samples import CORPUS, READABLE, beeps, beeps_in, natural, number, numbered, recording
from wan import media
from wan.footage import VideoFile, choose_anchor
from wan.media import DullEnd, VideoError, dull_end, find_dull_end

pytestmark = pytest.mark.slow

RATE = 24
SIZE = (160, 96)


def moving(count: int) -> list[npt.NDArray[Any]]:
    return list(numbered(range(count), *SIZE))


def panning(count: int, step: int = 2) -> list[npt.NDArray[Any]]:
    """A camera over a photo, with a sensor's noise."""
    wide, rng = natural(SIZE[0] + step * count, SIZE[1]), np.random.default_rng(1)
    views = [wide[:, step * at : step * at + SIZE[0]] + rng.standard_normal((*SIZE[::-1], 3)) for at in range(count)]
    return [np.rint(view).clip(0, 255).astype(np.uint8) for view in views]


def plain(colour: tuple[int, int, int], count: int) -> list[npt.NDArray[Any]]:
    return [np.full((*SIZE[::-1], 3), colour, np.uint8)] * count


def card(count: int) -> list[npt.NDArray[Any]]:
    return [natural(*SIZE, seed=9)] * count


def write(path: Path, pictures: Sequence[npt.NDArray[Any]]) -> Path:
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
def test_a_cut_to_something_dull_is_found_to_the_frame(end: list[npt.NDArray[Any]], kind: str, tmp_path: Path) -> None:
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
    pictures: list[npt.NDArray[Any]], kind: str, tmp_path: Path
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


def look_of(
    count: int = 3,
    *,
    unlike: Sequence[float] | None = None,
    steps: Sequence[float] | None = None,
    contrast: Sequence[float] | None = None,
    to_last: Sequence[float] | None = None,
    brightness: float = 90.0,
    rate: float = 10,
) -> Any:
    plain = [0.0] * count
    clock = [(at - count + 1) / rate for at in range(count)]
    return dull_end._Look(
        clock,
        list(contrast or [40.0] * count),
        [brightness] * count,
        list(steps or plain),
        list(to_last or [30.0] * (count - 1) + [0.0]),
        list(unlike or plain),
    )


def test_the_run_at_the_end_begins_after_the_last_picture_that_is_not_like_it() -> None:
    look = look_of(5, contrast=[1, 40, 3.4, 3.5, 40], to_last=[0, 3.4, 3.5, 3.4, 0])
    assert dull_end._begins(look, is_blank=False) == 3
    look.contrast[:] = [1, 40, 3.4, 3.4, 3.4]
    assert dull_end._begins(look, is_blank=True) == 2
    look.contrast[1] = 3.5  # is not flat
    assert dull_end._begins(look, is_blank=True) == 2
    look.contrast[:2] = 3.0, 3.4
    assert dull_end._begins(look, is_blank=True) == 0


@pytest.mark.parametrize(
    ("unlike", "begins", "lively"),
    [
        ([50, 50, 50, 50, 50, 0, 0], 5, 4),  # a cut
        ([50, 50, 50, 50, 25, 0, 0], 5, 4),
        ([50, 50, 50, 50, 24.9, 0, 0], 5, 3),  # the last one has begun to fade
        ([50, 50, 50, 50, 40, 30, 20, 10, 0, 0], 8, 3),
        ([50, 50, 50, 50, 49, 48, 47, 20, 0, 0], 8, 4),  # 50 / 49 is no change
        ([50, 50, 50, 50, 48.5, 47, 20, 0, 0], 7, 3),  # 50 / 48.5 is one
        ([60, 50, 40, 30, 20, 10, 0, 0], 6, 0),
        ([30, 60, 50, 40, 30, 20, 10, 0], 7, 1),
    ],
)
def test_a_fade_begins_where_the_light_begins_to_change(unlike: list[float], begins: int, lively: int) -> None:
    assert dull_end._before_fade(look_of(len(unlike), unlike=unlike), begins) == lively


def test_no_fade_is_looked_for_longer_than_four_seconds() -> None:
    unlike = [100.0 * 0.9**at for at in range(60)] + [0.0]
    assert dull_end._before_fade(look_of(61, unlike=unlike), 60) == 20
    # what is brighter than now counts for a cut within 24 pictures only
    far = [90.0] + [10.0] * 24 + [9.0, 0.0]
    assert dull_end._before_fade(look_of(len(far), unlike=far), 26) == 25
    near = [90.0, 90.0] + [10.0] * 22 + [9.0, 0.0]
    assert dull_end._before_fade(look_of(len(near), unlike=near), 25) < 24


@pytest.mark.parametrize(
    ("steps", "begins", "lively"),
    [
        ([0, 2, 2, 2, 9.5, 0, 0], 4, 4),
        ([0, 2, 2, 2, 9.6, 0, 0], 4, 3),  # three times the usual step and more: a cut
        ([0, 9.6, 0, 0], 1, 1),  # nothing to compare with
        ([0, 2, 9.6, 0, 0], 2, 1),
        ([0, *[9] * 3, *[2] * 12, 9.6, 0], 16, 15),  # the twelve before it count
        ([0, *[9] * 8, *[2] * 6, 9.6, 0], 15, 15),
        ([99, 2, 2, 9.6, 0], 3, 2),
    ],
)
def test_a_standstill_that_was_cut_to_begins_before_the_cut(steps: list[float], begins: int, lively: int) -> None:
    assert dull_end._before_rest(look_of(len(steps), steps=steps), begins) == lively


def test_a_difference_is_that_of_the_cell_that_differs_most() -> None:
    one = np.zeros((96, 96, 3), np.uint8)
    other = one.copy()
    other[4:8, 8:12, 1] = 7  # one cell
    other[20:22, 20:22] = 20  # a quarter of a cell
    cells = dull_end._cells(one)
    assert cells.shape == (24, 24, 3)
    assert dull_end._difference(cells, dull_end._cells(other)) == 7
    assert dull_end._difference(cells, cells[:-1]) == float("inf")
    assert dull_end._cells(np.full((2, 9, 3), 5, np.uint8)).shape == (1, 2, 3)
    assert (dull_end._cells(other)[5, 5] == 5).all()
    wide = np.arange(9, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    assert dull_end._cells(wide)[0, :, 0].tolist() == [1.5, 5.5]  # what is left over is left out


def ending_of(look: Any, stay: float = 0.0) -> Any:
    return SimpleNamespace(clock=look.clock, stay=stay, last=[SimpleNamespace(time=9.0)])


FILM: Any = SimpleNamespace(path="a.mp4", until=None, fps=Fraction(10), format="mp4", start=0.0, zero=2.0)


@pytest.mark.parametrize(
    ("look", "stay", "until", "expected"),
    [
        (look_of(40), 0.0, None, None),
        (look_of(40), 0.9, None, None),
        (look_of(40), 1.0, None, ("still", 1.0, 7.0)),
        (look_of(40), 1.0, 9.0, None),  # what comes later is not used
        (look_of(40, to_last=[30] * 30 + [0] * 10), 0.0, None, ("still", 1.0, 6.1)),
        (look_of(40, to_last=[30] * 31 + [0] * 9), 0.0, None, None),  # a pause
        (look_of(40, contrast=[40] * 35 + [1] * 5, unlike=[50] * 35 + [0] * 5), 0.0, None, ("one colour", 0.5, 6.5)),
        (look_of(40, contrast=[40] * 39 + [1], unlike=[50] * 39 + [0]), 0.0, None, ("one colour", 0.1, 6.9)),
        (look_of(9, contrast=[1] * 9), 0.0, None, ("one colour", 0.9, None)),
        (look_of(9, contrast=[1] * 9, brightness=24.0), 0.0, None, ("one colour", 0.9, None)),
        (look_of(9, contrast=[1] * 9, brightness=23.9), 0.0, None, ("black", 0.9, None)),
        (look_of(9, contrast=[40] * 8 + [3.5]), 0.0, None, None),
        (look_of(9, contrast=[3.4] * 9, brightness=1.0), 2.0, None, ("black", 2.8, None)),
    ],
)
def test_an_end_is_dull_by_its_pictures(
    look: Any,
    stay: float,
    until: float | None,
    expected: tuple[str, float, float | None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dull_end, "find_ending", lambda source, span: ending_of(look, stay))
    monkeypatch.setattr(dull_end, "_look", lambda ending, source: look)
    source: Any = SimpleNamespace(**(vars(FILM) | {"until": until}))
    dull: Any = dull_end._find(source)
    assert (dull and (dull.kind, pytest.approx(dull.seconds), dull.last_lively)) == expected


def test_as_much_of_the_end_is_looked_at_as_is_dull(monkeypatch: pytest.MonkeyPatch) -> None:
    """A film of 600 s whose end is dull from a moment on."""

    def spans(dull: float, is_blank: bool) -> list[float]:
        asked: list[float] = []

        def find_ending(source: Any, span: float) -> Any:
            asked.append(span)
            return ending_of(SimpleNamespace(clock=[max(-span, -599.9) - 0.05, -0.05, 0.0]))

        def look(ending: Any, source: Any) -> Any:
            first = ending.clock[0]
            clock = [float(one) for one in np.linspace(first, 0, round(-first * 10) + 1)]
            flat = [1.0 if is_blank and time >= -dull else 40.0 for time in clock]
            to_last = [0.0 if time >= -dull else 30.0 for time in clock]
            nothing = [0.0] * len(clock)
            return dull_end._Look(clock, flat, nothing, nothing, to_last, nothing)

        monkeypatch.setattr(dull_end, "find_ending", find_ending)
        monkeypatch.setattr(dull_end, "_look", look)
        assert dull_end._find(FILM) is not None
        return asked

    assert spans(2.0, is_blank=False) == [1, 4]
    assert spans(2.0, is_blank=True) == [1, 4, 16]  # with room for a fade
    assert spans(5.0, is_blank=False) == [1, 4, 16]
    assert spans(300.0, is_blank=False) == [1, 4, 16, 64, 256, float("inf")]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], None),
        ([("black", 1.0, None)], ("black", 1.0, None)),
        ([("black", 1.0, 9.0)], ("black", 1.0, 9.0)),
        ([("black", 1.0, 9.0), ("still", 2.0, 7.0)], ("black", 3.0, 7.0)),
        ([("black", 1.0, 9.0), ("still", 9.0, None)], ("black", 10.0, None)),
        ([("still", 1.0, 9.0)] * 4, ("still", 4.0, 9.0)),
        ([("still", 1.0, 9.0)] * 5, ("still", 5.0, None)),  # a show of stills
    ],
)
def test_what_is_dull_before_a_dull_end_belongs_to_it(
    layers: list[tuple[str, float, float | None]],
    expected: tuple[str, float, float | None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coming, asked = iter(layers), list[float | None]()
    monkeypatch.setattr(dull_end, "inspect", lambda path, until: asked.append(until))
    monkeypatch.setattr(dull_end, "_find", lambda source: next((DullEnd(*one) for one in coming), None))
    dull = find_dull_end("a.mp4", 12.0)
    assert (dull and (dull.kind, dull.seconds, dull.last_lively)) == expected
    assert asked == [12.0, *(one[2] for one in layers if one[2] is not None)][:5]


def test_a_dull_end_is_told_with_its_length() -> None:
    assert str(DullEnd("still", 1.24, 2.0)) == "it stands still for its last 1.2 s"
    assert str(DullEnd("one colour", 0.5, None)) == "it is one colour for its last 0.5 s"


def test_a_moment_is_told_as_a_player_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def whole(source: Any, span: float) -> Any:
        asked.append(span)
        return SimpleNamespace(clock=[-6.0, 0.0])

    monkeypatch.setattr(dull_end, "find_ending", whole)
    ending: Any = SimpleNamespace(last=[SimpleNamespace(time=9.0)])
    assert dull_end._moment(FILM, ending, -1.5) == 5.5 and not asked
    broadcast: Any = SimpleNamespace(**(vars(FILM) | {"format": "mpegts", "start": 3.0}))
    assert dull_end._moment(broadcast, ending, -1.5) == 5.5 and asked == [float("inf")]
    broadcast.start = 4.0
    assert dull_end._moment(broadcast, ending, -1.5) == 6.5
    ending.last[0].time = None
    assert dull_end._moment(FILM, ending, -1.5) == 2.5  # from its start at 0 s on


def test_a_picture_is_looked_at_by_its_light_and_its_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(left: int, right: int) -> npt.NDArray[Any]:
        picture = np.full((8, 8, 3), left, np.uint8)
        picture[:, 4:, 0] = right
        return picture

    pictures = [shown(90, 90), shown(60, 120), shown(60, 60)]
    asked: list[Any] = []

    def to_rgb(frame: int, source: Any, *, max_side: int) -> npt.NDArray[Any]:
        asked.append(max_side)
        return pictures[frame]

    monkeypatch.setattr(dull_end, "to_rgb", to_rgb)
    ending: Any = SimpleNamespace(clock=[-0.1, 0.0], last=[2], pictures=[0, 1, 2])
    look = dull_end._look(ending, FILM)
    assert look.clock == [-0.1, 0.0]  # of a picture more in this pass the clock knows nothing
    assert look.contrast == [30, 0] and look.brightness == [70, 60]
    assert look.steps == [30, 60] and look.to_last == [60, 0] and look.unlike == [10, 0]
    assert set(asked) == {96}
    ending.clock = [-0.3, -0.2, -0.1, 0.0]
    look = dull_end._look(ending, FILM)
    assert look.clock == [-0.2, -0.1, 0.0] and look.steps == [0, 30, 60] and look.contrast == [0, 30, 0]
