"""Storage without locks: what a batch says there, and what two commands do that are told to do without."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import states
from tests.batch.test_run import NOTHING, Crew, make, tasks_of
from tests.support.commands import Seen, command, world
from wan.chain.run_folder import RunFolder
from wan.commands.continuous import Chain
from wan.errors import UserError
from wan.options import Settings
from wan.server import worker
from wan.server.tickets import FAILED

__all__ = ["command", "world"]  # fixtures


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP"], autouse=True)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    number = getattr(errno, request.param)

    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    return os.strerror(number)


def settings_of(folder: Path, **more: Any) -> Settings:
    return Settings(
        video="source.mp4", ckpt_dir="ti2v", prompt="on", num_videos=2, frame_num=9, output_dir=str(folder), **more
    )


def test_a_chain_is_refused_in_a_line_and_not_tried_again(
    command: Callable[..., Seen], without_locks: str, tmp_path: Path
) -> None:
    ends = list[dict[str, Any]]()
    send = lambda event, **more: ends.append(more)  # noqa: E731
    models = worker.KeptPipeline()
    good = worker._work(models, settings_of(tmp_path / "a"), send, threading.Event(), worker.Behind(), ahead=True)
    assert good and ends[-1]["state"] == FAILED and not list((tmp_path / "a").glob("video_*"))
    line = ends[-1]["error"]["message"]
    assert line == (
        f"{tmp_path / 'a'} cannot be locked ({without_locks}); give another folder, or no_lock if no other run uses it"
    )
    crew, tasks = Crew(lambda name, count: ends[-1] | NOTHING, 1), tasks_of("a")
    make(crew, tasks)
    assert (tasks[0].state, tasks[0].reason, len(crew.given), crew.dropped) == (FAILED, line, 1, [])


def test_two_commands_with_no_lock_may_spoil_each_other_s_work_and_one_alone_puts_it_right(
    command: Callable[..., Seen], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path / "a", no_lock=True, base_seed=3, yes=True)
    one = Chain(settings).steps()
    assert next(one) is not None  # its first clip is there, its second one is being written

    def other() -> None:
        for _ in Chain(settings):
            pass

    for run in (other, lambda: list(one)):
        # each may find a file gone that the other one has moved away; neither makes a bug of that
        with contextlib.suppress(UserError, OSError):
            run()
    assert [clip.number for clip in Chain(settings)] == [1, 2]
    with RunFolder(tmp_path / "a", lock=False) as folder:
        assert list(folder.clips()) == [1, 2] and not folder.faults
    assert len(list(Chain(settings_of(tmp_path / "b", no_lock=True, base_seed=3)))) == 2
    assert states(tmp_path / "a") == states(tmp_path / "b")
