"""What a command says while it works: on a terminal, off one, with --quiet and in a log file."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.commands import Seen
from tests.support.golden import DATA, ROOT, small_checkpoints
from wan.commands.lines import STAGE
from wan.commands.progress import Progress, counted, say
from wan.detail import span, tell_detail
from wan.stopwatch import Stopwatch
from wan.types import Step


def test_off_a_terminal_each_clip_and_stage_has_its_line(command: Callable[..., Seen]) -> None:
    seen = command("")
    lines = seen.stderr.splitlines()
    assert re.fullmatch(
        r"v2v-5B with ti2v: PyTorch starts, (?:\d\.\d GB|\d+ MB) of weights are read meanwhile", lines[0]
    )
    assert lines[1] == "clip 1/2 seed 3"
    for number in (1, 2):
        assert f"clip {number}/2 prompt: continue video A red square slides to the right." in lines
        assert any(re.fullmatch(rf"clip {number}/2 caption: \d+\.\d s", line) for line in lines)
        seam = r" seam [\d.]+( \([\w ,]+\))?"
        file = re.escape(f"{seen.folder}/video_0{number}_seed{number + 2}.mp4")
        done = rf"clip {number}/2 finished( in [\d.]+ s,)?{seam}: {file}"
        assert any(re.fullmatch(done, line) for line in lines), lines
    assert any(re.fullmatch(r"clip 1/2: about \d+ (s|min) left", line) for line in lines)
    assert seen.output == f"{seen.folder}/joined.mp4\n"  # the result alone is on stdout
    assert "2 of 2 clips are finished already" in command("").stderr


def test_quiet_says_nothing_but_warnings(command: Callable[..., Seen], tmp_path: Path) -> None:
    assert command("--quiet").stderr == ""
    (tmp_path / "story.yaml").write_text("- one\n- two\n- three\n")
    told = command(f"--quiet --storyboard {tmp_path / 'story.yaml'} --output_dir {tmp_path / 'other'}").stderr
    assert told == "WARNING: the storyboard has 3 clips, --num_videos makes the first 2 of them\n"


def test_a_log_file_has_everything_with_its_time_and_grows(command: Callable[..., Seen], tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert command(f"--quiet --log_file {log}").stderr == ""
    first = log.read_text()
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (clip \d/2|v2v-5B with)", line) for line in first.splitlines()
    )
    assert " clip 2/2 finished" in first and " clip 1/2 caption: " in first
    assert command(f"--quiet --log_file {log} --sample_steps 3").code == 2
    assert log.read_text().startswith(first)
    assert re.search(r"ERROR: 2 finished clips of .* would be made again", log.read_text())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("story.yaml", "is there and is no log"),
        ("no/where.log", "cannot be written"),
        ("out.mp4", "is the name of something else than a log"),
        ("run.JSON", "is the name of something else than a log"),
    ],
)
def test_a_log_file_that_is_none_is_refused(command: Callable[..., Seen], name: str, message: str) -> None:
    seen = command(f"--log_file {name}")
    assert seen.code == 2 and message in seen.output and not seen.requests
    assert not Path(name).exists() or name == "story.yaml"


@pytest.mark.slow
def test_on_a_terminal_lines_do_not_land_in_bars(tmp_path: Path) -> None:
    small_checkpoints(tmp_path)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    flags = ["--ckpt_dir", "ti2v", "--video", str(DATA / "corpus" / "h264_faststart.mp4"), "--prompt", "a boat turns"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate_continuous.py"), *flags, "--num_videos", "2", "--frame_num", "5"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=60) == 0
    # what stands on each line of the screen when it is left
    lines = [
        line.split("\r")[-1]
        for line in re.sub(r"\x1b\[[A-Z]|\x1b\[\d*K", "", shown.decode()).replace("\r\n", "\n").split("\n")
    ]
    assert "chain" in shown.decode() and "step" in shown.decode()
    assert any(re.match(r"clip 1/2 prompt: continue video a boat turns\s*$", line) for line in lines), lines
    assert any(re.match(r"clip 2/2 finished in [\d.]+ s, seam .*video_02_seed\d+\.mp4\s*$", line) for line in lines), (
        lines
    )
    assert not any(re.search(r"load: [\d.]+ s$", line) for line in lines)  # the bars say that


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_say_what_goes_on_inside_a_stage_each_second_and_start_where_a_run_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wan.commands.progress.TICK", 0.02)
    monkeypatch.setattr(sys, "stderr", shown := _Terminal())
    with Progress("", clips=12) as progress:
        progress.finish_clips(9)
        assert progress.chain is not None
        told = progress.chain.format_dict
        assert (told["initial"], told["n"]) == (9, 9)  # so that the rate is that of this run's clips
        progress.begin("clip 10/12")
        progress(Step(0, 4, "load"))
        progress(Step(0, 4, "load", detail="shard 2 of 6"))
        before = shown.getvalue().count("clip 10/12 load: shard 2 of 6")
        deadline = time.monotonic() + 10
        while shown.getvalue().count("clip 10/12 load: shard 2 of 6") < before + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert shown.getvalue().count("clip 10/12 load: shard 2 of 6") >= before + 3


class _Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("wan.commands.progress.time", self)

    def perf_counter(self) -> float:
        return self.now


def finished(number: int, **record: Any) -> Any:
    return SimpleNamespace(number=number, record=record, video=Path(f"{number}.mp4"))


def test_lines_count_clips_steps_and_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = _Clock(monkeypatch)
    caplog.set_level("DEBUG", "wan.commands.progress")
    with Progress("", clips=5, quiet=True) as progress:
        progress.finish_clips(0)
        assert not caplog.messages
        progress.finish_clips(2)
        progress.begin("clip 3/5", 0)  # a seed like any other
        progress(Step(0, 4, "load"))
        clock.now += 2
        progress(Step(0, 4, "load", detail="shard 2 of 6"))
        progress(Step(0, 4, "caption", prompt="it \n sails"))
        clock.now += 1
        for index in range(5):
            progress(Step(index, 4, "sample", torch.zeros(1) if index else None))
            clock.now += 1 if index else 0
        progress.stage("write")
        clock.now += 0.5
        progress.finish(finished(3, seconds={"a": 1.0, "b": 2.25}, seam={"score": 0.5, "warnings": ["flash", "turn"]}))
        clock.now += 1.5
        progress.begin("clip 4/5")
        progress.finish(finished(4, seam={"score": 1.0}))
        progress.rest()
        progress.take_back()
        progress.finish(finished(4, seconds=None, seam=None))
        progress.finish(finished(5))
    assert caplog.messages == [
        "2 of 5 clips are finished already",
        "clip 3/5 seed 0",
        "clip 3/5 prompt: it sails",
        "clip 3/5 load: 3.0 s",
        "clip 3/5 sample: 4 steps, 4.0 s",
        "clip 3/5 finished in 3.2 s, seam 0.50 (flash, turn): 3.mp4",
        "clip 3/5: about 15 s left",  # two clips as long as the one of this run, 7.5 s
        "clip 3/5 write: 2.0 s",
        "clip 4/5 finished seam 1.00: 4.mp4",
        "clip 4/5: about 4 s left",  # one clip, at two in 9 s
        "clip 4/5 finished: 4.mp4",
        "clip 4/5: about 4 s left",
        "clip 5/5 finished: 5.mp4",
    ]
    levels = {record.getMessage().split(":")[0]: record.levelname for record in caplog.records}
    assert levels["clip 3/5 sample"] == levels["clip 3/5 write"] == "DEBUG" and levels["clip 3/5 seed 0"] == "INFO"


def test_a_bar_shows_the_clip_its_stage_and_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Terminal())
    with Progress("", clips=3) as progress:
        progress.finish_clips(1)
        assert progress.chain is not None and progress.chain.pos == 0 and progress.bar is None
        progress(Step(0, 9, "load"))  # of no clip
        progress.begin("clip 2/3")
        bar: Any = progress.bar
        assert (abs(bar.pos), bar.leave, bar.disable) == (1, False, False) and bar.dynamic_ncols  # as wide as it is now
        progress(Step(0, 9, "load", detail="shard 1 of 2"))
        assert (bar.desc, bar.total) == ("clip 2/3 load: shard 1 of 2: ", None)
        bar.start_t -= 100  # loading took long
        progress(Step(0, 9, "sample"))
        assert bar.format_dict["elapsed"] < 50, "time left is counted from the first step"
        bar.start_t -= 100
        for index in (1, 4):
            progress(Step(index, 9, "sample", torch.zeros(1)))
        progress(Step(4, 9, "decode"))
        assert (bar.n, bar.total, bar.desc) == (4, 9, "clip 2/3 decode: ") and bar.format_dict["elapsed"] > 50
        progress.finish(finished(2))
        assert (progress.chain.n, progress.chain.total) == (2, 3)
        progress.clips = 4  # the storyboard has grown
        progress.finish(finished(3))
        assert (progress.chain.n, progress.chain.total) == (3, 4)
        progress.take_back()
        assert (progress.chain.n, progress.done) == (2, 1)
        progress.begin("clip 3/4")
        assert progress.bar is not bar and bar.disable  # which is closed
    bars: Any = (progress.bar, progress.chain)
    assert all(one.disable for one in bars)
    with Progress("out.mp4") as single:
        assert single.chain is None and single.bar is not None
        assert (single.bar.desc, single.bar.pos, single.bar.leave) == ("out.mp4", 0, True)


@pytest.mark.parametrize(("terminal", "notebook", "quiet", "shown"), [
    (True, False, False, True),
    (True, False, True, False),
    (False, False, False, False),
    (False, True, False, True),
    (False, True, True, False),
    (None, False, False, False),
])  # fmt: skip
def test_bars_are_for_terminals_and_notebooks_that_are_not_to_be_quiet(
    terminal: bool | None, notebook: bool, quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {True: _Terminal(), False: io.StringIO(), None: None}
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", streams[terminal])
        progress = Progress("out.mp4", quiet=quiet)
        progress.begin("out.mp4")
        assert progress.bar is not None and progress.bar.disable is not shown
        progress.bar.close()


def test_bars_rest_while_somebody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.commands.progress.TICK", 0.01)
    monkeypatch.setattr(sys, "stderr", shown := _Terminal())
    with Progress("", clips=2) as progress:
        progress.begin("clip 1/2")
        progress.rest()
        time.sleep(0.05)  # a drawing that has begun
        before = len(shown.getvalue())
        time.sleep(0.1)
        assert len(shown.getvalue()) == before
        progress.begin("clip 2/2")
        deadline = time.monotonic() + 10
        while shown.getvalue().count("clip 2/2") < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert shown.getvalue().count("clip 2/2") >= 4
    threads = [one for one in threading.enumerate() if one.name.endswith("(_tick)")]
    for one in threads:
        one.join(10)
    assert not any(one.is_alive() for one in threads)


@pytest.mark.parametrize(("encoding", "written"), [("ascii", "caf\\xe9 a\n"), ("utf-8", "café a\n")])
def test_a_result_is_said_with_the_characters_that_a_terminal_has(
    encoding: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    say("café a")
    assert raw.getvalue().decode() == written
    monkeypatch.setattr(sys, "stdout", None)
    say("nobody")


def test_a_result_that_nobody_reads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    say("a")
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_a_word_is_counted() -> None:
    assert [counted(number, "clip") for number in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]


def test_a_stage_inside_another_is_charged_once_and_says_its_details() -> None:
    heard: list[Step] = []
    watch = Stopwatch(torch.device("cpu"), 4, heard.append)
    with watch.stage("sample"):
        assert watch.on_step is not None
        watch.on_step(Step(2, 4, "high noise", torch.zeros(1)))
        with watch.stage("load"):
            time.sleep(0.2)
            tell_detail("shard 1 of 2")
    tell_detail("nobody listens")
    assert watch.seconds["load"] >= 0.2 > watch.seconds["sample"]
    stages = [(step.index, step.stage, step.detail) for step in heard]
    assert stages[2:] == [(2, "load", ""), (2, "load", "shard 1 of 2"), (2, "sample", "")]  # which goes on


@pytest.mark.parametrize("loads", [False, True])
def test_each_denoiser_is_charged_its_own_steps(loads: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("wan.commands.progress.time.perf_counter", lambda: now[0])
    caplog.set_level(STAGE)
    with Progress("a") as progress:
        caplog.clear()

        def after(seconds: float, *step: Any) -> None:
            now[0] += seconds
            progress(Step(*step))

        after(0, 0, 3, "sample")
        after(5, 1, 3, "high noise", torch.zeros(1))
        after(4, 2, 3, "high noise", torch.zeros(1))
        if loads:
            after(0, 2, 3, "load")
            after(20, 2, 3, "sample")
        after(3, 3, 3, "low noise", torch.zeros(1))
        after(1, 3, 3, "decode")
    lines = ["a high noise: 2 steps, 9.0 s", *["a load: 20.0 s"] * loads, "a low noise: 1 step, 4.0 s"]
    assert [record.getMessage() for record in caplog.records if "decode" not in record.getMessage()] == lines


def test_a_length_of_time_is_in_words() -> None:
    seconds = (0.4, 119.4, 120, 7199, 7200, 9000)
    assert [span(one) for one in seconds] == ["0 s", "119 s", "2 min", "120 min", "2.0 h", "2.5 h"]
