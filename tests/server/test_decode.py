"""What is made of a client's file, and how a file that was made to hurt ends."""

from __future__ import annotations

import asyncio
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.served import SHAPES
from wan import media
from wan.errors import UserError
from wan.server import decode as module
from wan.server.decode import decode, main
from wan.server.errors import ApiError


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are for a process of its own."""
    monkeypatch.setattr(module, "_limit", lambda: None)


def facts(capsys: pytest.CaptureFixture[str], what: str, file: Path, picture: Path) -> Any:
    assert main([what, str(file), str(picture)]) == 0
    return json.loads(capsys.readouterr().out)


def test_footage_is_told_with_its_last_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = facts(capsys, "inspect", SHAPES, tmp_path / "a.png")
    info = media.probe(SHAPES)
    assert told == {
        "kind": "video",
        "width": 160,
        "height": 96,
        "seconds": info.duration,
        "fps": float(info.fps),
    }
    with Image.open(tmp_path / "a.png") as last:
        assert np.array_equal(np.array(last), np.array(media.read_last_frame(SHAPES)))


def test_a_picture_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 20), (9, 99, 199)).save(tmp_path / "a.bmp")
    told = facts(capsys, "inspect", tmp_path / "a.bmp", tmp_path / "a.png")
    assert told == {"kind": "picture", "width": 30, "height": 20, "seconds": 0.0, "fps": 0.0}
    with Image.open(tmp_path / "a.png") as written:
        assert (written.format, written.size, written.getpixel((29, 19))) == ("PNG", (30, 20), (9, 99, 199))


def test_a_file_that_is_neither_is_told_without_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("no video")
    told = facts(capsys, "inspect", tmp_path / "a.txt", tmp_path / "a.png")
    assert told == {"error": "the file is neither a video nor a picture that can be read"}
    told = facts(capsys, "thumbnail", tmp_path / "a.txt", tmp_path / "a.png")
    assert "the file" in told["error"] and str(tmp_path) not in told["error"]


@pytest.mark.parametrize(
    ("width", "height", "seconds", "fits"),
    [
        (8192, 8192, 6 * 3600, True),
        (8193, 8192, 1, False),
        (160, 96, 6 * 3600 + 1, False),
        (160, 96, None, True),
    ],
)
def test_footage_may_be_so_large_and_so_long(
    width: int, height: int, seconds: int | None, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    duration = None if seconds is None else Fraction(seconds)
    monkeypatch.setattr(
        media, "probe", lambda _: SimpleNamespace(width=width, height=height, duration=duration, fps=Fraction(24))
    )
    monkeypatch.setattr(media, "read_last_frame", lambda _: Image.new("RGB", (8, 8)))
    if fits:
        assert module._inspect(SHAPES, tmp_path / "a.png")["seconds"] == seconds
    else:
        with pytest.raises(UserError, match="the video is too large or too long"):
            module._inspect(SHAPES, tmp_path / "a.png")
        assert not (tmp_path / "a.png").exists()


def test_a_picture_may_be_so_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    for most, fits in ((600, True), (599, False)):
        monkeypatch.setattr(module, "MOST_PIXELS", most)
        if fits:
            module._inspect(tmp_path / "a.png", tmp_path / "b.png")
            (tmp_path / "b.png").unlink()
        else:
            with pytest.raises(UserError, match="the picture is too large"):
                module._inspect(tmp_path / "a.png", tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_a_sprite_sheet_goes_from_left_to_right_and_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def frames(file: Path, count: int, max_side: int) -> Any:
        asked.append((file, count, max_side))
        return np.stack([np.full((16, 32, 3), 10 * number, np.uint8) for number in range(shown)])

    monkeypatch.setattr(media, "sample_frames", frames)
    for shown, rows in ((20, 4), (7, 2), (5, 1)):
        assert module._spritesheet(SHAPES, tmp_path / "a.jpg") == {"width": 160, "height": 16 * rows}
        with Image.open(tmp_path / "a.jpg") as sheet:
            assert sheet.format == "JPEG" and sheet.size == (160, 16 * rows)
            for number in range(shown):
                at = (number % 5 * 32 + 16, number // 5 * 16 + 8)
                assert sheet.getpixel(at) == (10 * number,) * 3
    assert asked == [(SHAPES, 20, 320)] * 3


def test_a_thumbnail_is_a_small_picture_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._thumbnail(SHAPES, tmp_path / "a.webp") == {"width": 160, "height": 96}
    with Image.open(tmp_path / "a.webp") as picture:
        first = media.sample_frames(SHAPES, 1)[0]
        assert picture.format == "WEBP" and np.abs(np.array(picture).astype(int) - first).mean() < 8
    asked = list[Any]()

    def frames(file: Path, count: int, max_side: int) -> Any:
        asked.append((count, max_side))
        return np.zeros((1, 8, 8, 3), np.uint8)

    monkeypatch.setattr(media, "sample_frames", frames)
    module._thumbnail(SHAPES, tmp_path / "a.webp")
    assert asked == [(1, 640)]


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_CPU"), reason="the system has no such limits")
@pytest.mark.parametrize(("hard", "limit"), [(-1, None), (5, 5), (1 << 60, None)])
def test_its_process_may_use_so_much(hard: int, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    used = dict[Any, Any]()

    class Process:
        def nice(self, level: int) -> None:
            used["nice"] = level

        def rlimit(self, what: int, limits: Any = None) -> Any:
            if limits is not None:
                used[what] = limits
            return 1, hard

    monkeypatch.setattr(psutil, "Process", Process)
    module._limit()
    wanted = {psutil.RLIMIT_CPU: 120, psutil.RLIMIT_AS: 8 << 30, psutil.RLIMIT_CORE: 0}
    each = {what: min(one, limit) if limit is not None else one for what, one in wanted.items()}
    assert used == {"nice": 19} | {what: (one, one) for what, one in each.items()}


class Program:
    """Stands for the process: what it prints, and whether it hangs."""

    def __init__(self, printed: bytes, *, hangs: bool = False) -> None:
        self.printed, self.hangs, self.calls = printed, hangs, list[Any]()
        self.returncode: int | None = None

    async def start(self, *words: str, **_: Any) -> Program:
        self.calls.append(words)
        return self

    async def communicate(self) -> tuple[bytes, None]:
        if self.hangs:
            await asyncio.sleep(60)
        self.returncode = 0
        return self.printed, None

    def kill(self) -> None:
        self.calls.append("kill")

    async def wait(self) -> None:
        self.calls.append("wait")


def run(program: Program, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(asyncio, "create_subprocess_exec", program.start)
    monkeypatch.setattr(module, "kill", Program.kill)
    return asyncio.run(decode("inspect", Path("a file"), Path("a picture")))


def test_a_file_is_looked_at_by_a_program_whose_last_line_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program(b'a warning\n{"kind": "video"}\n')
    assert run(program, monkeypatch) == {"kind": "video"}
    assert program.calls == [(sys.executable, "-m", "wan.server.decode", "inspect", "a file", "a picture")]
    with pytest.raises(ApiError, match=r"^a\.mp4 is broken$"):
        run(Program(b'{"error": "a.mp4 is broken"}\n'), monkeypatch)
    with pytest.raises(ApiError) as wrong:
        run(Program(b'{"error": "/srv/x/a.mp4 is broken"}\n'), monkeypatch)
    assert str(wrong.value) == "a.mp4 is broken"
    for printed in (b"", b"Killed\n"):
        with pytest.raises(ApiError, match="it is damaged, or needs too much memory"):
            run(Program(printed), monkeypatch)


def test_a_program_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)
    program = Program(b"", hangs=True)
    with pytest.raises(ApiError, match="the file takes too long to read; send a shorter or smaller one"):
        run(program, monkeypatch)
    assert program.calls[1:] == ["kill", "wait"]


def test_two_files_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, most = [0], [0]

    class Slow(Program):
        async def communicate(self) -> tuple[bytes, None]:
            now[0] += 1
            most[0] = max(most[0], now[0])
            await asyncio.sleep(0.005)
            now[0] -= 1
            self.returncode = 0
            return b"{}", None

    async def start(*_: str, **__: Any) -> Program:
        return Slow(b"")

    async def all_of_them() -> None:
        await asyncio.gather(*(decode("inspect", Path("a"), Path("b")) for _ in range(6)))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(module, "_turns", asyncio.Semaphore(module._turns._value))
    asyncio.run(all_of_them())
    assert most == [2]
