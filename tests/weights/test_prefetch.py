"""Files are read ahead whole, each part once, as far as they may be and no further."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from wan.weights import prefetch
from wan.weights.prefetch import ReadAhead, ReadingProcess


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


def _within(seconds: float, is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.005)
    return is_so()


def _is_read(pipe: Path, by: list[int] | None = None) -> bool:
    """Whether somebody has opened a named pipe to read from it; `by` gets its other end, which is closed without."""
    try:
        end = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    if by is None:
        os.close(end)
    else:
        by.append(end)
    return True


PARENT = """
import sys, time
from pathlib import Path
from wan.weights.prefetch import ReadingProcess
reading = ReadingProcess([Path(sys.argv[1])])
print(reading._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_a_process_reads_packages_and_then_files_until_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, weights = tmp_path / "package", tmp_path / "weights"
    (package / "deep").mkdir(parents=True)
    code, library = package / "deep" / "a.py", package / "library.so"
    for pipe in (code, library, weights):
        os.mkfifo(pipe)
    (package / "none.py").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(prefetch, "_folders", lambda names: [str(package)] if "torch" in names else [])
    monkeypatch.delitem(sys.modules, "torch")
    reading = ReadingProcess([weights])
    monkeypatch.undo()
    assert reading._process.stdin is not None
    held = os.dup(reading._process.stdin.fileno())  # as a fork of this process has it
    late = threading.Timer(10, os.close, [held])
    try:
        ends: list[int] = []
        assert _within(10, lambda: _is_read(code, ends))
        os.kill(reading._process.pid, signal.SIGINT)  # Ctrl-C changes nothing
        time.sleep(0.2)
        assert not _is_read(weights)
        for end in ends:
            os.close(end)
        assert _within(10, lambda: _is_read(weights)) and not _is_read(library)
    finally:
        late.start()
        reading.stop()
        late.cancel()
    os.close(held)  # which is open, since nothing waited for it
    assert reading._process.returncode is not None


def test_weights_do_not_wait_for_code_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    done, read = threading.Event(), list[Any]()

    def takes_long(folders: list[str]) -> None:
        read.append(folders)
        done.wait(60)

    monkeypatch.setattr(prefetch, "HEAD_START", 0.05)
    monkeypatch.setattr(prefetch, "_read_code", takes_long)
    monkeypatch.setattr(ReadAhead, "start", lambda self: read.append((self.files, self.distance)))
    prefetch._follow('{"packages": ["p"], "files": ["a", "b"]}')
    done.set()
    assert read == [["p"], ([Path("a"), Path("b")], 2)]


def test_a_reading_process_that_is_told_nothing_says_nothing() -> None:
    words = [sys.executable, "-I", "-S", prefetch.__file__]
    ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def test_a_reading_process_that_cannot_begin_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefetch, "__file__", "no_such_file.py")
    reading = ReadingProcess([Path("a" * 200)] * 1000)  # more than a pipe holds
    reading.stop()
    assert reading._process.returncode and "no_such_file.py" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_a_reading_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "weights")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        reader = int(parent.stdout.readline())
        os.kill(reader, 0)
        parent.send_signal(signal.SIGKILL)

    def is_over() -> bool:
        with suppress(FileNotFoundError):
            if Path(f"/proc/{reader}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return True
        try:
            os.kill(reader, 0)
        except ProcessLookupError:
            return True
        return False

    assert _within(10, is_over)


def test_packages_that_are_left_out_or_absent_have_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sympy", None)
    assert prefetch._folders(["sympy", "no_such_package", "json"]) == [str(Path(os.__file__).parent / "json")]
