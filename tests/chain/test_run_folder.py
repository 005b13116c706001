"""The owners of a run's folder, each built by itself."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan.chain.elsewhere import ClipsElsewhere
from wan.chain.fingerprint import fingerprint
from wan.chain.finished_clip import REDONE, FinishedClip, Told, prune, read_clip, write_clip
from wan.chain.lock import FolderLock
from wan.chain.run import ChainRun
from wan.chain.run_folder import RunFolder
from wan.chain.run_record import RunRecord
from wan.chain.written import Written
from wan.errors import InUse, UserError
from wan.options import Settings
from wan.types import Clip, Generation

SETTINGS = {"width": 32, "height": 32, "seed": 7}


def clip(stem: Path) -> Path:
    """A clip of five frames on disk; returns its record."""
    stem.parent.mkdir(exist_ok=True)
    request: Any = SimpleNamespace(seed=7)
    made = Generation(Clip(torch.zeros(5, 32, 32, 3), Fraction(24)), torch.zeros(4, 2, 4, 4), request)
    record = {"seed": 7, "prompt": "a boat", "fps": "24", "frame_num": 5, "dropped": 1}
    write_clip(stem, made, SETTINGS, Told(lambda: record, (2, None), [b"a jpeg"], metadata=False))
    return stem.with_suffix(".json")


def test_a_clip_is_read_as_it_was_written_and_not_once_a_file_has_changed(tmp_path: Path) -> None:
    path = clip(tmp_path / "video_03_seed7")
    one = read_clip(path)
    assert isinstance(one, FinishedClip) and (one.number, one.dropped, one.settings) == (3, 1, SETTINGS)
    assert one.tail(2, Fraction(24)).shape == (2, 32, 32, 3) and one.motion.shape == (4, 1, 4, 4)
    assert one.sheet == [b"a jpeg"] and one.samples(2).shape == (2, 32, 32, 3)
    one.video.write_bytes(one.video.read_bytes()[:-1])
    fault = read_clip(path)
    assert not isinstance(fault, FinishedClip)
    assert (fault.number, fault.reason) == (3, "video_03_seed7.mp4 is not what was written")


def test_a_clip_that_was_replaced_is_known_by_its_fingerprint_while_it_is_whole(tmp_path: Path) -> None:
    elsewhere, digest = ClipsElsewhere(tmp_path), fingerprint(SETTINGS)
    assert elsewhere.find(digest) is None
    moved = elsewhere.set_clip_aside(clip(tmp_path / "video_03_seed7"))
    again = elsewhere.set_clip_aside(clip(tmp_path / "video_03_seed7"))  # under a name that is free
    assert moved.parent == again.parent == tmp_path / REDONE and moved != again
    assert sorted(file.name for file in tmp_path.iterdir()) == [REDONE] and len(elsewhere.replaced()) == 2
    for record in sorted((moved, again)):
        one = elsewhere.find(digest)
        assert one is not None and one.record_path == record
        assert prune(one) > 0  # nothing can go on from it now
    assert elsewhere.find(digest) is None and elsewhere.find("another") is None


@pytest.mark.parametrize("refused", ["rename", "unlink"])
def test_a_clip_that_another_program_holds_open_is_one_line_and_stays(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows does it: what is open is neither moved nor removed."""
    record = clip(tmp_path / "video_03_seed7")
    files = sorted(tmp_path.iterdir())

    works = getattr(Path, refused)

    def refuse(path: Path, *args: Any, **more: Any) -> None:
        if path in files:
            raise PermissionError(13, "The process cannot access the file", os.fspath(path))
        works(path, *args, **more)

    elsewhere = ClipsElsewhere(tmp_path)
    with monkeypatch.context() as windows:
        windows.setattr(Path, refused, refuse)
        with pytest.raises(UserError) as caught:
            elsewhere.set_aside(files) if refused == "rename" else elsewhere.set_clip_aside(record)
    message = r"cannot move '.*video_03_seed7\.\w+': The process cannot access the file; close it where it is open"
    assert re.match(message, str(caught.value)) and "\n" not in str(caught.value)
    assert sorted(path for path in tmp_path.iterdir() if path.is_file()) == files
    assert isinstance(read_clip(record), FinishedClip)
    elsewhere.set_clip_aside(record)  # once it is closed
    assert sorted(file.name for file in tmp_path.iterdir()) == [REDONE]


def test_a_folder_has_one_lock_which_others_get_once_it_is_let_go(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(InUse, match="in use by another run"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_lock_is_of_the_process_whatever_thread_lets_it_go(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    thread = threading.Thread(target=first.release)
    thread.start()
    thread.join()
    second.acquire()
    second.release()


@pytest.mark.parametrize(
    ("error", "may_go_without"),
    [
        (OSError(errno.ENOLCK, "No locks available"), True),
        (OSError(errno.ENOSYS, "Function not implemented"), True),
        (OSError(errno.EOPNOTSUPP, "Operation not supported"), True),
        (NotImplementedError("no flock"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
    ],
)
def test_a_folder_that_cannot_be_locked_says_whether_the_lock_may_be_left_out(
    error: Exception, may_go_without: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(self: Any, **_: Any) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    reason = getattr(error, "strerror", None) or error
    with pytest.raises(UserError, match=rf"cannot be locked \({reason}\); give another folder") as refused:
        FolderLock(tmp_path).acquire()
    assert ("no_lock" in str(refused.value)) == may_go_without


def test_a_run_that_makes_nothing_leaves_the_time_of_those_that_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    folder = RunFolder(tmp_path)
    record = RunRecord(Settings(ckpt_dir="x", video="films/a.mp4"), folder, Written(folder, {}), 12.5)
    now = 102.0
    record.write("running", [], 2, {"base_seed": 3})
    assert folder.run["seconds"] == 12.5 and folder.run["clips_asked"] == 2 and folder.run["base_seed"] == 3
    record.makes_clips = True
    record.write("finished", [], 2, {"base_seed": 3})
    assert folder.run["seconds"] == 14.5 and folder.run["arguments"]["video"] == "films/a.mp4"
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.parametrize(
    ("clips", "pruned"),
    [([], []), ([1, 2], []), ([1, 2, 3], [1]), ([1, 2, 3, 4, 5], [1, 2, 3]), ([1, 2, 4, 5, 6], [1, 4]), ([1, 6], [])],
)
def test_the_state_of_the_last_two_clips_and_of_those_before_a_gap_is_kept(
    clips: list[int], pruned: list[int], tmp_path: Path
) -> None:
    finished: Any = dict.fromkeys(clips)
    assert list(RunFolder(tmp_path).to_prune(finished)) == pruned


@pytest.mark.parametrize("moves", [True, False])
def test_a_run_that_goes_on_is_told_again_when_its_clips_have_come_to_their_place(
    moves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    steps = {name: lambda name=name: told.append(name) for name in ("give_up", "seal", "put_in_place")}
    settings, folder = SimpleNamespace(keep_state="all"), RunFolder(tmp_path)
    inventory: Any = SimpleNamespace(settings=settings, folder=folder, source_digest="", elsewhere=moves, **steps)
    nothing: Any = None
    run = ChainRun(inventory, nothing, nothing)
    monkeypatch.setattr(run, "report", told.append)
    run.begin()
    assert told == ["give_up", "seal", "running", *(["put_in_place", "running"] if moves else [])]
