"""The shell around a command: signals, closed streams, names that no file system takes, errors of the system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Seen
from tests.support.golden import ROOT
from wan import cli, media
from wan.chain.run_folder import RunFolder
from wan.chain.writer import ClipWriter
from wan.cli import generate_main
from wan.commands import generate
from wan.commands.job import Job
from wan.commands.progress import say
from wan.configs import WAN_CONFIGS
from wan.options import Settings
from wan.pipeline import Pipeline

# --- values that are refused before anything loads


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--frame_num 4097", "--frame_num must be at most 4093, 4097 is not; the models tell 1024 latent frames apart"),
        ("--sample_steps 1000000000", "must be at most 1000, 1000000000 is not; the models tell 1000 noise levels"),
        ("--num_videos 10000000", "must be at most 10000, 10000000 is not; start another chain from its end"),
        ("--num_segments 1000000000", "must be at most 256"),
        ("--redo 1000000000", "must be at most 10000"),
        ("--best_of 1000000000", "must be at most 1000"),
        ("--output_dir " + "x" * 256, "--output_dir is too long ('xxxx"),
        ("--output_dir " + "x/" * 2048, "file systems take names of 255 bytes, in paths of 4095"),
        ("--output_dir " + "漢" * 86, "--output_dir is too long"),
        ("--ckpt_dir " + "x" * 256, "--ckpt_dir is too long"),
        ("--vlm_path " + "x" * 256, "--vlm_path is too long"),
        ("--lora " + "x" * 256, "--lora is too long"),
        ("--end_image " + "x" * 256, "--end_image is too long"),
        ("--storyboard " + "x" * 256, "--storyboard is too long"),
        ("--output_dir /proc/x", "--output_dir /proc/x cannot be written to"),
        ("--output_dir ~nouser/x", "'~nouser/x' is of a user that is not there; write ./~nouser/x"),
        ("--ckpt_dir ~nouser/x", "is of a user that is not there"),
        ("--output_dir caf\udce9", "caf\\xe9 is not valid UTF-8; give another name"),
    ],
)
def test_a_value_that_would_end_in_a_crash_or_a_hang_is_refused(
    command: Callable[..., Seen], words: str, message: str
) -> None:
    seen = command(words)
    assert seen.code == 2 and seen.output.splitlines()[-1].startswith("error: ") and seen.output.count("\n") <= 2
    assert message in seen.output and seen.pipeline is None


def test_the_frames_of_a_storyboard_have_the_same_limit(command: Callable[..., Seen], world: Path) -> None:
    (world / "long.json").write_text('[{"frames": 9997}]')
    seen = command("--storyboard long.json")
    assert (seen.code, "frames must be a whole number from 5 to 4093, 9997 is not" in seen.output) == (2, True)


@pytest.mark.parametrize("name", ["x" * 252 + ".mp4", "~nouser/x.mp4", "caf\udce9.mp4", "/proc/x.mp4"])
def test_a_name_that_cannot_be_written_is_refused_before_anything_loads(
    name: str, command: Callable[..., Seen]
) -> None:
    seen = command(f"--save_file {name}", generate=True)
    assert seen.code == 2 and seen.output.count("\n") == 1 and seen.pipeline is None


@pytest.mark.parametrize("letter", ["a", "é", "漢", "𠀀"])
def test_a_default_name_is_cut_by_bytes(letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(prompt=letter * 80)
    job = Job("generate", settings, tmp_path, WAN_CONFIGS["v2v-14B"], (1280, 704), None)  # type: ignore[arg-type]
    target: Path = vars(generate)["_target"](job)
    media.check_output(target)
    assert letter in target.name


def test_an_error_line_ends_at_500_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_main(["--ckpt_dir", "x", "--video", "y" * 200 + "/" + "z" * 200 + "/" + "a" * 200 + ".mp4"]) == 2
    error = capsys.readouterr().err
    assert len(error) <= 501 and error.endswith("...\n")


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_stops_as_ctrl_c_does(
    command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    sampled: Any = Pipeline.run

    def stopped_at_the_second(self: Any, request: Any, **options: Any) -> Any:
        if request.seed == 4:
            signal.raise_signal(number)
        return sampled(self, request, **options)

    monkeypatch.setattr(Pipeline, "run", stopped_at_the_second)
    before = signal.getsignal(number)
    seen = command("")
    assert seen.code == code
    assert signal.getsignal(number) is before
    run = json.loads((seen.folder / "run.json").read_text())
    assert (run["status"], run["clips_finished"], run["joined"]) == ("interrupted", 1, "joined.mp4")


def test_a_signal_that_is_ignored_stays_so(command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: Any = Pipeline.run

    def hung_up(self: Any, *given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return sampled(self, *given, **options)

    monkeypatch.setattr(Pipeline, "run", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert command("").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_waits_for_what_is_being_written() -> None:
    begun, go_on = threading.Event(), threading.Event()
    written: list[int] = []

    def save(made: Any) -> None:
        begun.set()
        go_on.wait(10)
        written.append(1)

    writer = ClipWriter(save)
    writer.write(1, None, lambda: None)  # type: ignore[arg-type]
    begun.wait(10)

    def press() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.05)
        go_on.set()

    threading.Timer(0.05, press).start()
    assert writer.settle() is None
    assert written == [1]


# --- the system


@pytest.mark.parametrize("name", ["EIO", "ENOENT", "ESTALE", "ENAMETOOLONG", "EFBIG", "ENOSPC", "EROFS", "EMFILE"])
def test_an_error_of_the_system_is_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(errno, name)

    def fails(_: Any) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    assert cli.run(fails, []) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {os.strerror(number)}: some/file; ") and error.count("\n") == 1


def test_an_error_that_no_system_call_made_is_a_bug() -> None:
    def fails(_: Any) -> None:
        raise OSError("no number")

    with pytest.raises(OSError, match="no number"):
        cli.run(fails, [])


def test_a_file_system_without_locks_is_said_and_can_be_used(
    command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    seen = command("")
    assert seen.code == 2 and "cannot be locked (No locks available)" in seen.output and "--no_lock" in seen.output
    assert command("--no_lock").code == 0


def test_a_lock_that_fails_for_another_reason_is_not_said_to_be_one_to_do_without(
    command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "flock", full)
    seen = command("")
    assert seen.code == 2 and "cannot be locked (No space left on device); give another folder" in seen.output
    assert "no_lock" not in seen.output


def test_without_a_lock_a_folder_in_use_is_opened(tmp_path: Path) -> None:
    with RunFolder(tmp_path), RunFolder(tmp_path, lock=False) as folder:
        assert folder.clips() == {}


# --- standard output


def in_a_shell(redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "from wan.commands.progress import say; say('a', 'caf\\xe9 \\u6f22'); print('x', end='')"
    command = f'{sys.executable} -c "{program}" {redirection}'
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "| true", "2>&-"])
def test_a_closed_or_full_output_is_no_error_after_success(redirection: str) -> None:
    done = in_a_shell(f"{redirection}")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_output_without_the_character_gets_its_number() -> None:
    done = in_a_shell("", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (0, "a\ncaf\\xe9 \\u6f22\nx")


def test_saying_to_nobody_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    say("a")
