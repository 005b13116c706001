"""Files are read ahead whole, each part once, as far as they may be and no further."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from wan.weights import prefetch
from wan.weights.prefetch import ReadAhead


class Told:
    """A file of so many bytes that tells where it is read."""

    def __init__(self, size: int, *, seeks: bool = True) -> None:
        self.size, self.at, self.seeks = size, 0, seeks
        self.read: list[tuple[int, int]] = []

    def open(self, mode: str, buffering: int) -> Told:
        assert (mode, buffering) == ("rb", 0)
        return self

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def seek(self, at: int) -> int:
        self.at = at if self.seeks else 0
        return self.at

    def readinto(self, buffer: bytearray) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        if count:
            self.read.append((self.at, count))
        return count


@pytest.mark.parametrize(
    ("size", "parts"),
    [
        (0, []),
        (5, [(0, 5)]),
        (10, [(0, 10)]),
        (11, [(0, 10), (10, 1)]),
        (95, [(at, min(10, 95 - at)) for at in range(0, 95, 10)]),
    ],
)
def test_readers_share_out_the_chunks_of_a_file(
    size: int, parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "CHUNK", 10)
    read: list[tuple[int, int]] = []
    for first in range(4):
        file: Any = Told(size)
        ReadAhead([file])._read(first)
        assert file.read == [part for part in parts if part[0] // 10 % 4 == first]
        read += file.read
    assert sorted(read) == parts
    stuck: Any = Told(size, seeks=False)
    ReadAhead([stuck])._read(1)
    assert not stuck.read


def test_chunks_are_of_eight_mebibytes_and_four_readers_read_them() -> None:
    assert prefetch.CHUNK == 8 << 20 and len(ReadAhead([]).threads) == 4
    assert all(thread.daemon for thread in ReadAhead([]).threads)


def test_a_file_that_cannot_be_read_is_left_to_others(tmp_path: Path) -> None:
    after: Any = Told(5)
    files: Any = [tmp_path / "none", tmp_path, after]
    ReadAhead(files, 9)._read(0)
    assert after.read == [(0, 5)]


@pytest.mark.parametrize("distance", [0, 1, 3])
def test_no_file_is_read_further_ahead_than_the_distance(distance: int) -> None:
    files: Any = [Told(5) for _ in range(6)]
    ahead = ReadAhead(files, distance)
    reader = threading.Thread(target=ahead._read, args=(0,), daemon=True)
    reader.start()

    def settled(count: int) -> bool:
        for _ in range(2000):
            if sum(len(file.read) for file in files) >= count:
                break
            reader.join(0.001)
        reader.join(0.02)  # for one more, which there must not be
        return [len(file.read) for file in files] == [1] * count + [0] * (6 - count)

    assert settled(distance + 1)
    ahead.begin(2)
    assert settled(min(6, distance + 3))
    ahead.begin(1)  # no step back
    assert settled(min(6, distance + 3))
    ahead.stop()
    reader.join(5)
    assert not reader.is_alive() and ahead.over
    late: Any = Told(5)
    over = ReadAhead([late], 9)
    over.stop()
    over._read(0)
    assert not late.read
