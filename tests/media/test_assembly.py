"""How long a source's last picture stays, at which rate it is shown, and what of its sound is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from tests.support.media_samples import number, numbered
from wan import files, media
from wan.errors import UserError
from wan.media import assembly
from wan.media.assembly import _Begin
from wan.media.sound import Hearing, SoundError
from wan.timeline import Part


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    files._say.cache_clear()


def hearing(start: float, end: float) -> Hearing:
    return Hearing(start, end, 48000, 1, True)


@pytest.mark.parametrize(
    ("stated", "heard", "until", "stay"),
    [
        (0.15, None, None, 0),  # a picture of a film
        (0.16, None, None, 0.16),
        (4.0, None, None, 4.0),
        (0.0, (0.0, 11.9), None, 1.9),
        (0.0, (0.0, 11.0), None, 0),  # a loose end of sound
        (1.0, (0.0, 12.0), None, 1.0),
        (1.0, (0.0, 12.1), None, 2.1),
        (0.0, (10.1, 14.0), None, 4.0),
        (0.0, (10.15, 14.0), None, 0),  # begins only after the picture
        (2.0, (11.9, 14.0), None, 4.0),
        (2.0, (12.0, 14.0), None, 2.0),
        (0.0, (0.0, 14.0), 11.5, 1.5),
        (0.0, (0.0, 14.0), 11.0, 0),
        (0.5, (0.0, 14.0), 11.0, 0.5),
        (4.0, None, 11.5, 1.5),
        (4.0, None, 10.1, 0),
        (4.0, None, 9.0, 0),
    ],
)
def test_a_last_picture_is_held_as_the_file_says_or_as_its_sound_goes_on(
    stated: float,
    heard: tuple[float, float] | None,
    until: float | None,
    stay: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source: Any = SimpleNamespace(path="a.mp4", until=until)
    track = None if heard is None else hearing(*heard)
    assert assembly._stay(source, 10.0, stated, track) == pytest.approx(stay)
    by_sound = track is not None and stay > stated
    assert len(caplog.records) == by_sound
    if track is not None and by_sound:
        assert f"its last picture is held for {track.end - 10:.1f} s, as long as its sound goes on" in caplog.text


def at(*steps: float) -> list[Fraction]:
    """Moments with these distances, from 0 on."""
    return [Fraction(0), *(Fraction(float(one)).limit_denominator(10**6) for one in np.cumsum(steps))]


@pytest.mark.parametrize(
    ("moments", "rate"),
    [
        (at(), 10),
        (at(*[0.1] * 9), 10),
        (at(*[0.1] * 4, 0.149, 0.051, *[0.1] * 3), 10),  # to half a frame
        (at(*[0.04] * 50), 25),  # whatever the header says
        (at(*[1 / 29.97] * 50), Fraction(30000, 1001)),
    ],
)
def test_pictures_where_an_even_rate_puts_them_have_that_rate(moments: Sequence[Fraction], rate: Fraction) -> None:
    source: Any = SimpleNamespace(fps=Fraction(10))
    assert assembly._part(source, moments) == Part(len(moments), Fraction(rate))


@pytest.mark.parametrize(
    ("steps", "rate"),
    [
        ([0.1] * 4 + [0.2, 0.0001] + [0.1] * 14, 10),  # a twentieth may be quicker
        ([0.1] * 4 + [0.2, 0.0001] + [0.1] * 13, 120),
        ([1 / 30] * 5 + [0.5, 2.0], 30),
        ([3.0, 9.0, 3.0, 3.5], 1),
        ([0.001, 0.5, 0.001, 0.4], 120),
    ],
)
def test_uneven_pictures_are_shown_at_the_rate_of_their_quick_stretches(steps: list[float], rate: int) -> None:
    source: Any = SimpleNamespace(fps=Fraction(10))
    moments = at(*steps)
    assert assembly._part(source, moments) == Part(len(moments), Fraction(rate), 0, moments)


def begin(heard: Hearing | None, *, until: float | None = None) -> _Begin:
    source: Any = SimpleNamespace(path="a.mp4", until=until)
    nothing: Any = object()
    return _Begin(source, nothing, Part(24, Fraction(24)), 10.0, nothing, heard)


def test_a_source_s_sound_is_kept_where_its_pictures_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    one = begin(hearing(9.8, 15.2)).sound(5.0)
    assert one is not None and (one.start, one.end) == (10, 15)
    assert not caplog.records
    one = begin(hearing(9.5, 17.0)).sound(5.0)
    assert one is not None
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "the last 2.0 s of its sound, after its last picture, are left out",
        "the first 0.5 s of its sound, before its first picture, are left out",
    ]
    one = begin(hearing(9.5, 17.0)).sound(5.0, 2.0)
    assert one is not None and (one.start, one.end) == (12, 17)
    caplog.clear()
    assert begin(hearing(10.0, 17.0), until=15.0).sound(5.0) is not None and not caplog.records  # as was asked for
    for heard in (hearing(15.0, 17.0), hearing(8.0, 10.0), None):
        assert begin(heard).sound(5.0) is None
    assert begin(hearing(14.9, 17.0)).sound(5.0) and begin(hearing(8.0, 10.1)).sound(5.0)


def clip(path: Path, numbers: Sequence[int], fps: float = 16, size: tuple[int, int] = (64, 36)) -> Path:
    media.write_video(path, numbered(numbers, *size), fps, keyframes=frozenset({0, 1}))
    return path


def numbers_in(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_a_joined_video_grows_by_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = clip(tmp_path / "source.mp4", range(4))
    first, second = clip(tmp_path / "1.mp4", range(100, 105)), clip(tmp_path / "2.mp4", range(200, 205))
    written: list[str] = []
    write = media.write_video

    def counting(path: str, *words: Any) -> int:
        written.append(Path(path).name)
        return write(path, *words)

    monkeypatch.setattr(assembly, "write_video", counting)
    joined = media.Assembly(source, tmp_path / "joined.mp4")
    assert joined.renew([first], [1]) == 8
    assert written == [".joined.mp4.0.piece.mp4", ".joined.mp4.1.piece.mp4"]
    assert joined.renew([first, second], [1, 1], to=tmp_path / "new.mp4") == 12
    assert written[2:] == [".joined.mp4.2.piece.mp4"]
    assert numbers_in(tmp_path / "new.mp4") == [0, 1, 2, 3, 101, 102, 103, 104, 201, 202, 203, 204]
    assert numbers_in(tmp_path / "joined.mp4") == [0, 1, 2, 3, 101, 102, 103, 104]
    (tmp_path / "new.mp4").rename(tmp_path / "joined.mp4")
    written.clear()
    clip(second, range(300, 306))  # another under the same name
    assert joined.renew([first, second], [1, 1]) == 13 and len(written) == 3
    written.clear()
    assert joined.renew([first, second], [1, 2]) == 12 and len(written) == 3  # another drop
    written.clear()
    (tmp_path / "joined.mp4").unlink()
    assert joined.renew([first, second], [1, 2]) == 12 and len(written) == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_clip_of_another_size_is_named(tmp_path: Path) -> None:
    source, first = clip(tmp_path / "source.mp4", range(4)), clip(tmp_path / "1.mp4", range(5))
    other = clip(tmp_path / "2.mp4", range(5), size=(96, 54))
    with pytest.raises(UserError, match=r"cannot join '.*2\.mp4': its size differs from that of the first clip"):
        media.assemble(source, [first, other], tmp_path / "joined.mp4", drops=[1, 1])
    assert not (tmp_path / "joined.mp4").exists()


@pytest.mark.parametrize(("fps", "shown"), [(8, 1), (16, 1), (48, 3)])
def test_a_bridge_to_a_quicker_video_has_its_rate(fps: float, shown: int, tmp_path: Path) -> None:
    source, made = clip(tmp_path / "source.mp4", range(4)), clip(tmp_path / "1.mp4", range(100, 105))
    last = clip(tmp_path / "last.mp4", range(200, 206), fps)
    joined = media.Assembly(source, tmp_path / "joined.mp4", into=last)
    joined.renew([made], [1], complete=True)
    every = numbers_in(tmp_path / "joined.mp4")
    assert media.probe(tmp_path / "joined.mp4").fps == 16 * shown
    assert [every.count(one) for one in (0, 1, 2, 3, 101, 102, 103)] == [shown] * 7
    assert every.count(200) == 0 and every[-1] == 205  # the last clip ends with what is the first picture there
    assert [every.count(one) for one in range(201, 205)] == [max(1, 16 * shown // int(fps))] * 4


def test_a_bridge_to_a_still_keeps_its_only_picture(tmp_path: Path) -> None:
    source, made = clip(tmp_path / "source.mp4", range(4)), clip(tmp_path / "1.mp4", range(100, 105))
    still = clip(tmp_path / "still.mp4", [200])
    joined = media.Assembly(source, tmp_path / "joined.mp4", into=still)
    joined.renew([made], [1], complete=True)
    assert numbers_in(tmp_path / "joined.mp4") == [0, 1, 2, 3, 101, 102, 103, 104, 200]


def test_a_picture_that_is_shown_again_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []

    def to_rgb(frame: int, source: Any) -> npt.NDArray[Any]:
        converted.append(frame)
        return np.full((4, 8, 3), frame, np.uint8)

    monkeypatch.setattr(assembly, "to_rgb", to_rgb)
    monkeypatch.setattr(assembly, "deinterlace", lambda recent: recent[-1])
    files_: Any = [(None, range(10, 15)), (None, range(20, 22))]
    wanted = [(0, 0), (0, 0), (0, 2), (0, 4), (1, 1), (1, 1), (1, 3)]
    shown = [int(one[0, 0, 0]) for one in assembly._shown(wanted, files_, (8, 4))]
    assert shown == [10, 10, 12, 14, 21, 21, 21]  # damage may cost a picture: the last one stays
    assert converted == [10, 12, 14, 21, 21]
    (cut,) = assembly._shown([(0, 0)], files_, (4, 4))
    assert cut.shape == (4, 4, 3)


def test_a_field_is_made_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def deinterlace(recent: Any) -> int:
        seen.append(list(recent))
        return int(recent[-1])

    monkeypatch.setattr(assembly, "deinterlace", deinterlace)
    monkeypatch.setattr(assembly, "to_rgb", lambda frame, source: np.zeros((4, 8, 3), np.uint8))
    list(assembly._shown([(0, 0), (0, 4), (1, 1)], [(None, range(10, 15)), (None, range(20, 22))], (8, 4)))  # type: ignore[list-item]
    assert seen == [[10], [12, 13, 14], [20, 21]]


def test_a_source_is_known_by_its_first_picture_and_its_whole_length(tmp_path: Path) -> None:
    one = _Begin.read(clip(tmp_path / "a.mp4", range(6)), None)
    assert (one.start, one.part, one.track, one.hearing) == (0.0, Part(6, Fraction(16)), None, None)
    assert _Begin.read(tmp_path / "a.mp4", 2 / 16).part.frames == 3


@pytest.mark.parametrize(
    ("stated", "frames", "is_open"), [(0.0, 3, True), (2.0, 3, False), (2.0, 1, True), (2.0, 4, True)]
)
def test_sound_holds_a_picture_of_which_the_file_says_nothing_a_still_and_a_recording(
    stated: float, frames: int, is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {1: [0.0], 3: [-0.2, -0.1, 0.0], 4: [-3.0, -2.9, -2.8, 0.0]}[frames]
    source = SimpleNamespace(path="a.mp4", until=None, fps=Fraction(10), start=5.0)
    monkeypatch.setattr(assembly, "inspect", lambda file, until: source)
    asked: list[float] = []

    def find_ending(source: Any, span: float) -> Any:
        asked.append(span)
        return SimpleNamespace(clock=clock, stay=stated, pictures=None)

    monkeypatch.setattr(assembly, "find_ending", find_ending)
    monkeypatch.setattr(assembly, "first_frame", lambda source: SimpleNamespace(time=7.0))
    monkeypatch.setattr(assembly, "choose_track", lambda source: "track")
    heard = hearing(0.0, 7.0 - clock[0] + 6)
    monkeypatch.setattr(assembly, "listen", lambda track: heard)
    one: Any = _Begin.read("a.mp4", None)
    assert one.part.stay == (6 if is_open else 2) and one.part.frames == frames and asked == [math.inf]
    assert (one.start, one.track, one.hearing) == (7.0, "track", heard)
    monkeypatch.setattr(assembly, "first_frame", lambda source: SimpleNamespace(time=None))
    assert _Begin.read("a.mp4", None).start == 5.0


def test_a_file_that_changes_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    before = assembly._seen(path, 1)
    assert before == assembly._seen(path, 1) != assembly._seen(path, 2)
    assert before[:3] == (str(path), 1, 3) and before[3] == path.stat().st_mtime_ns


def test_a_sound_that_does_not_fit_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def join_videos(parts: Any, path: Any, *, drops: Any, metadata: Any, sound: Any) -> int:
        asked.append((parts, path, drops, metadata, sound))
        if sound is not None:
            raise SoundError("Invalid argument")
        return 7

    monkeypatch.setattr(assembly, "join_videos", join_videos)
    joined = media.Assembly("a.mp4", "b.mp4")
    sound: Any = object()
    assert joined._join(["x", "y"], "b.mp4", sound, {"a": 1}) == 7
    assert asked == [(["x", "y"], "b.mp4", [0, 0], {"a": 1}, one) for one in (sound, None)]
    assert "does not fit into an mp4 (Invalid argument); convert it to AAC to keep it" in caplog.text


@pytest.mark.parametrize("complete", [True, False])
def test_the_sound_of_both_ends_of_a_bridge_is_placed(complete: bool) -> None:
    from wan.timeline import Timeline

    joined = media.Assembly("a.mp4", "b.mp4", into="c.mp4")
    follows = Part(24, Fraction(24), drop=1)
    first, second = replace(begin(hearing(10.0, 99.0), until=1.0)), begin(hearing(10.0, 99.0), until=1.0)
    joined._begin, joined._end = first, replace(second, part=follows)
    parts = [Part(48, Fraction(24)), Part(24, Fraction(24)), follows]
    heard: Any = joined._sound(Timeline(parts, Fraction(24)), complete)
    if not complete:
        assert (heard.start, heard.end) == (10, 12)
        return
    placed = [(moment, one.start, one.end) for moment, one in heard._sounds]
    assert placed == [(0.0, 10, 12), (3.0, pytest.approx(10 + 1 / 24), pytest.approx(11))]
    joined._begin = replace(first, hearing=None)
    heard = joined._sound(Timeline(parts, Fraction(24)), complete)
    assert [moment for moment, _ in heard._sounds] == [3.0]
    joined._end = None
    assert joined._sound(Timeline(parts, Fraction(24)), complete) is None


def test_every_clip_needs_its_number_of_frames_to_leave_out(tmp_path: Path) -> None:
    source, first = clip(tmp_path / "source.mp4", range(4)), clip(tmp_path / "1.mp4", range(5))
    for drops in ([], [1, 1]):
        with pytest.raises(ValueError, match="zip"):
            media.assemble(source, [first], tmp_path / "joined.mp4", drops=drops)
