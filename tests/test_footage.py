"""Which frames of footage a clip goes on from and a captioner sees, by their numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wan.errors import UserError
from wan.footage import ChangedEnd, FramesInMemory, VideoFile, choose_anchor


def numbered(count: int, fps: float = 16) -> FramesInMemory:
    return FramesInMemory(np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8), fps)


def numbers(frames: Any) -> list[int]:
    return [int(number) for number in frames[:, 0, 0, 0]]


def test_samples_are_spread_over_all_frames_or_over_the_last_seconds() -> None:
    frames = numbered(65)
    assert numbers(frames.samples(1, 2.0)) == [64]
    assert numbers(frames.samples(3, 2.0)) == [32, 48, 64]
    assert numbers(frames.samples(5, 4.0)) == [0, 16, 32, 48, 64]
    assert numbers(frames.samples(4, 6.0)) == [0, 32, 64]  # of more seconds than there are
    assert len(numbers(frames.samples(4))) == 4


def test_a_tail_at_another_rate_has_what_was_on_screen() -> None:
    tail = numbered(10, 24).tail(3, Fraction(16))  # at 9, 7.5 and 6
    assert [round(float(frame[0, 0, 0] + 1) * 127.5) for frame in tail] == [6, 7, 9]
    assert len(numbered(3).tail(9, Fraction(16))) == 3


def test_frames_in_memory_keep_their_rate_exactly() -> None:
    assert numbered(2, 23.976).fps == Fraction(2997, 125) and numbered(2, Fraction(24000, 1001) / 1).fps > 23.97  # type: ignore[arg-type]
    assert numbered(2).motion is None and numbered(2).colours is None
    pictures = FramesInMemory([Image.new("L", (3, 2), 5), Image.new("RGB", (3, 2), (5, 5, 5))], 1)
    assert pictures.frames.shape == (2, 2, 3, 3) and (pictures.frames == 5).all()
    assert np.array_equal(np.asarray(pictures.last), pictures.frames[-1])


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((0, 2, 3, 3), np.uint8), 16, "at least one"),
        (np.zeros((2, 2, 3), np.uint8), 16, "frames must be uint8"),
        (np.zeros((2, 2, 3, 4), np.uint8), 16, "frames must be uint8"),
        ([Image.new("RGB", (3, 2)), Image.new("RGB", (2, 3))], 16, "pictures of one size"),
        (np.zeros((2, 2, 3, 3), np.float32), 16, "these are float32"),
        (np.zeros((2, 2, 3, 3), np.uint8), 0, "fps must be a positive number"),
        (np.zeros((2, 2, 3, 3), np.uint8), float("nan"), "fps must be a positive number"),
    ],
)
def test_what_is_no_footage_is_refused(frames: Any, fps: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FramesInMemory(frames, fps)


def test_an_end_that_was_changed_is_what_a_clip_goes_on_from_and_not_what_is_described() -> None:
    before, end = numbered(30), torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 3)
    changed = ChangedEnd(before, end)
    assert torch.as_tensor(changed.last).shape == (3, 2, 3) and float(torch.as_tensor(changed.last)[0, 0, 0]) == 3
    assert numbers(changed.tail(2, Fraction(16))) == [2, 3] and len(changed.tail(9, Fraction(16))) == 4
    assert numbers(changed.samples(2, 1.0)) == [13, 29] and changed.motion is None


def test_an_anchor_is_the_sharpest_frame_that_is_not_of_the_last_second() -> None:
    class Looked:
        def __init__(self, sharp: dict[int, int], count: int = 13) -> None:
            self.frames = np.zeros((count, 8, 8, 3), np.uint8)
            for number, contrast in sharp.items():
                self.frames[number, ::2] = contrast
                self.frames[number, 0, 0] = number  # which one it is

        def samples(self, count: int, seconds: float | None = None) -> Any:
            assert (count, seconds) == (13, 3.0)
            return self.frames

    def chosen(sharp: dict[int, int], count: int = 13) -> int:
        return int(np.asarray(choose_anchor(Looked(sharp, count)))[0, 0, 0])  # type: ignore[arg-type]

    assert chosen({3: 100, 8: 200, 9: 255}) == 8 and chosen({3: 200, 8: 100}) == 3
    assert chosen({0: 10, 1: 200}, 5) == 0 and chosen({0: 10, 1: 200}, 6) == 1  # of few frames the first
    columns = Looked({2: 20})
    columns.frames[4, :, ::2] = 200
    columns.frames[4, 0, 0] = 4
    assert int(np.asarray(choose_anchor(columns))[0, 0, 0]) == 4  # type: ignore[arg-type]


def test_a_file_is_asked_for_the_right_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def note(name: str, result: Any) -> None:
        def noted(path: Any, *words: Any, **more: Any) -> Any:
            asked.append((name, *words, more))
            return result

        monkeypatch.setattr(f"wan.media.{name}", noted)

    note("read_last_frame", Image.new("RGB", (3, 2)))
    note("check_last_frame_with_decord", None)
    note("sample_frames", np.zeros((2, 2, 3, 3), np.uint8))
    note("read_tail", np.zeros((2, 2, 3, 3), np.uint8))
    file = VideoFile("a.mp4", "decord")
    assert [name for name, *_ in asked] == ["read_last_frame", "check_last_frame_with_decord"]
    file = VideoFile("a.mp4", "decord", 7.5)
    assert asked[2:] == [("read_last_frame", 7.5, {})]
    VideoFile("a.mp4", "pyav")
    assert len(asked) == 4
    del asked[:]
    file.samples(8)
    file.samples(9, 2.0)
    file.samples(1, 2.0)
    file.tail(9, Fraction(16))
    assert asked == [
        ("sample_frames", 8, {"reader": "decord", "until": 7.5}),
        ("read_tail", 9, Fraction(4), 7.5, {}),
        ("read_tail", 1, Fraction(1, 2), 7.5, {}),
        ("read_tail", 9, Fraction(16), 7.5, {}),
    ]
