"""How a command ends: its exit code, what it says then, and its own process."""

from __future__ import annotations

import errno
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan import cli
from wan.device.peers import Ended
from wan.errors import UserError


def end(error: BaseException | None) -> int:
    """The exit code of a command that ends so."""

    def command(argv: Any) -> None:
        logging.getLogger("wan.x").warning("a warning")
        logging.getLogger("wan.x").error("an error")
        if error is not None:
            raise error

    return cli.run(command, [])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("`vram` is\nsmall"), 2, "error: --vram is small\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.mp4"),
            2,
            "error: No space left on device: a.mp4; free space or choose another folder\n",
        ),
        (OSError(errno.EDQUOT, "Quota", "a"), 2, "error: Quota: a; free space or choose another folder\n"),
        (OSError(errno.EFBIG, "Too large", "a"), 2, "error: Too large: a; free space or choose another folder\n"),
        (OSError(errno.EIO, "I/O"), 2, "error: I/O: while writing; look at the disk, or choose another folder\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried much"),
            2,
            "error: out of GPU memory (CUDA out of memory.); free some of it, or give --vram auto\n",
        ),
    ],
)
@pytest.mark.parametrize("rank", [None, "", "0"])
def test_the_first_process_says_how_it_ends(
    error: BaseException | None,
    code: int,
    line: str,
    rank: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    handlers = list(logging.root.handlers)
    assert end(error) == code and logging.root.handlers == handlers
    assert capsys.readouterr().err == "WARNING: a warning\nERROR: an error\n" + line


@pytest.mark.parametrize("error", [OSError("no system call's"), RuntimeError("a bug"), ValueError("a bug")])
def test_a_bug_is_raised(error: Exception) -> None:
    handlers = list(logging.root.handlers)
    with pytest.raises(type(error), match=str(error)):
        end(error)
    assert logging.root.handlers == handlers


def test_other_processes_leave_it_to_the_first_to_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr("platform.node", lambda: "host")
    monkeypatch.setattr(cli, "is_collective", lambda error: "collective" in str(error))
    monkeypatch.setenv("RANK", "3")
    for error, code, printed in (
        (Ended("another has ended"), 2, ""),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("of a collective"), 2, ""),
        (UserError("`vram` is small"), 2, "error: process 3 on host: --vram is small\n"),
    ):
        assert end(error) == code
        assert capsys.readouterr().err == "ERROR: an error\n" + printed
    assert waited == [10.0]  # the launcher, or the first, may end this one meanwhile
    with pytest.raises(RuntimeError, match="a bug"):
        end(RuntimeError("a bug"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="of a collective"):
        end(RuntimeError("of a collective"))


@pytest.mark.parametrize(("length", "whole"), [(493, True), (494, False)])
def test_a_line_fits_on_a_terminal(length: int, whole: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(UserError("x" * length)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == ("error: " + "x" * 493 if whole else "error: " + "x" * 490 + "...") and len(line) == 500


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_command_as_ctrl_c_does(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: Any) -> None:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    before = signal.getsignal(number)
    assert cli.run(command, []) == 128 + number and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.run(lambda argv: signal.raise_signal(signal.SIGHUP), []) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_may_run_in_another_thread() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.run(lambda argv: None, [])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the process would have ended at once; nothing else holds it."""
    codes: list[int] = []

    def end(given: int) -> None:
        codes.append(given)
        raise SystemExit("at once")

    monkeypatch.setattr(os, "_exit", end)
    for name in ("gettrace", "getprofile"):
        monkeypatch.setattr(sys, name, lambda: None)
    monkeypatch.setattr(sys, "flags", SimpleNamespace(interactive=0))
    monkeypatch.delattr(sys, "ps1", raising=False)
    monkeypatch.setattr(multiprocessing, "active_children", list)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return codes


@pytest.mark.parametrize(("code", "launched", "at_once"), [(0, False, True), (0, True, False), (2, True, True)])
def test_a_launched_process_is_taken_apart_only_where_all_is_well(
    code: int, launched: bool, at_once: bool, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        cli._leave(code)
    assert ends == ([code] if at_once else []) and (at_once or left.value.code == code)


@pytest.mark.parametrize("holds", ["gettrace", "getprofile", "flags", "ps1", "children"])
def test_who_still_has_something_to_do_is_not_cut_off(
    holds: str, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if holds == "children":
        monkeypatch.setattr(multiprocessing, "active_children", lambda: ["a process"])
    elif holds == "flags":
        monkeypatch.setattr(sys, "flags", SimpleNamespace(interactive=1))
    else:
        monkeypatch.setattr(sys, holds, lambda: "a debugger", raising=False)
    with pytest.raises(SystemExit) as left:
        cli._leave(2)
    assert ends == [] and left.value.code == 2


def test_what_was_written_is_on_its_way_when_a_process_ends(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    class Stream(io.StringIO):
        def __init__(self, name: str, error: Exception | None = None) -> None:
            super().__init__()
            self.kind, self.error = name, error

        def flush(self) -> None:
            flushed.append(self.kind)
            if self.error is not None:
                raise self.error

    shut: list[int] = []
    monkeypatch.setattr(logging, "shutdown", lambda: shut.append(1))
    for stdout in (None, Stream("out"), Stream("out", BrokenPipeError()), Stream("out", ValueError("closed"))):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            patched.setattr(sys, "stderr", Stream("err"))
            with pytest.raises(SystemExit):
                cli._leave(0)
    assert flushed == ["err", *["out", "err"] * 3] and ends == [0] * 4 and len(shut) == 4
