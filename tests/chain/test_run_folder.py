"""The owners of a run's folder, each built by itself."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan.chain.draft import ClipDraft, discard
from wan.chain.elsewhere import ClipsElsewhere
from wan.chain.fingerprint import fingerprint
from wan.chain.finished_clip import REDONE, FinishedClip, Told, prune, read_clip, write_clip
from wan.chain.joined_video import JoinedVideo
from wan.chain.lock import FolderLock
from wan.chain.run import ChainRun
from wan.chain.run_folder import RunFolder
from wan.chain.run_record import RunRecord
from wan.chain.writer import ClipWriter
from wan.chain.written import Written
from wan.errors import InUse, UserError
from wan.files import file_digest
from wan.options import Settings
from wan.prompting import ClipPrompt
from wan.types import Clip, Generation, Sampled

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
        (OSError(errno.EACCES, "Permission denied"), False),
    ],
)
def test_a_folder_that_cannot_be_locked_says_whether_the_lock_may_be_left_out(
    error: OSError, may_go_without: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(self: Any, **_: Any) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with pytest.raises(UserError, match=rf"cannot be locked \({error.strerror}\); give another folder") as refused:
        FolderLock(tmp_path).acquire()
    assert ("no_lock" in str(refused.value)) == may_go_without


def test_a_file_system_without_locks_is_one_to_filelock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match="Function not implemented.*no_lock"):
        FolderLock(tmp_path).acquire()


def test_a_file_is_the_run_s_as_long_as_it_is_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return path.read_text()

    monkeypatch.setattr("wan.chain.written.file_digest", digest)
    (file := tmp_path / "joined.mp4").write_text("old")
    os.utime(file, ns=(1, 1))
    written = Written(RunFolder(tmp_path), {"written": {"joined.mp4": ["old"]}})
    assert written.keep("report.html") is None and not read
    assert written.keep("joined.mp4") == written.keep("joined.mp4") == "old" and len(read) == 1, "it is read once"
    written.announce("joined.mp4", "new")
    assert written.as_json() == {"written": {"joined.mp4": ["new", "old"]}}, "a run that is killed now leaves either"
    for text, stamp in (("new", 2), ("old", 3)):
        file.write_text(text)
        os.utime(file, ns=(stamp, stamp))
        assert written.keep("joined.mp4") == text
    written.announce("joined.mp4", "old")
    assert written.as_json() == {"written": {"joined.mp4": ["old"]}}
    file.write_text("cut")  # of the same size
    os.utime(file, ns=(4, 4))
    assert written.keep("joined.mp4") is None and not file.exists()
    assert "is not what was written; it moves to redone/" in caplog.text
    written.announce("joined.mp4", "newer")
    assert written.as_json() == {"written": {"joined.mp4": ["newer"]}}


@pytest.mark.parametrize(
    ("before", "kept"),
    [({}, False), ({"written": {}}, False), ({"status": "finished"}, True), ({"written": {"a.txt": ["other"]}}, False)],
)
def test_of_a_run_that_noted_nothing_each_file_counts_as_written(
    before: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert (Written(RunFolder(tmp_path), before).keep("a.txt") is not None) == kept


class Joining(JoinedVideo):
    """Writes what it would join."""

    def _join(self, new: Path, clips: Any, fades: Any, complete: bool, base_seed: int) -> None:
        new.write_bytes(f"{[clip.fingerprint for clip in clips]} {list(fades)} {complete}".encode())


def joining(folder: Path, before: dict[str, Any] | None = None, **settings: Any) -> JoinedVideo:
    run = RunFolder(folder)
    given = Settings(video="a.mp4", **settings)
    return Joining(given, run, Written(run, before or {}), "source", before or {})


def renewed(video: JoinedVideo, *clips: str, fades: Sequence[int] = (), complete: bool = False) -> list[str]:
    parts: Any = [SimpleNamespace(fingerprint=one) for one in clips]
    video.renew(parts, fades or [0] * len(clips), complete=complete, base_seed=3, announce=lambda: None)
    return list(video.made_of)


def test_a_joined_video_is_known_by_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "end.mp4").write_bytes(b"an end")
    end = file_digest(tmp_path / "end.mp4")
    assert renewed(joining(tmp_path / "0")) == [] and not (tmp_path / "0").exists()
    into = {"include_source": True, "until": str(tmp_path / "end.mp4")}
    cases: list[tuple[dict[str, Any], bool, list[str]]] = [
        ({}, True, ["a", "b fade 4"]),
        ({"include_source": True}, True, ["source", "a", "b fade 4"]),
        (into, True, ["source", "a", "b fade 4", end]),
        (into, False, ["source", "a", "b fade 4"]),
    ]
    for number, (settings, complete, parts) in enumerate(cases, 1):
        (home := tmp_path / str(number)).mkdir()
        assert renewed(joining(home, **settings), "a", "b", fades=(0, 4), complete=complete) == parts
        assert [file.name for file in home.iterdir()] == ["joined.mp4"]


def test_a_joined_video_replaces_its_own_beginning_and_sets_another_aside(tmp_path: Path) -> None:
    file, redone = tmp_path / "joined.mp4", tmp_path / REDONE
    video = joining(tmp_path)
    assert video.as_json() == {"joined": None, "joined_of": []} and video.path == file
    renewed(video, "a")
    first = file.stat().st_mtime_ns
    renewed(video, "a")
    assert file.stat().st_mtime_ns == first, "it is there"
    assert renewed(video, "a", "b") == ["a", "b"] and not redone.exists()
    assert video.as_json() == {"joined": "joined.mp4", "joined_of": ["a", "b"]}
    renewed(video, "a", "c")
    assert len(list(redone.iterdir())) == 1
    file.write_bytes(b"cut by somebody")
    renewed(video, "a", "c")
    assert len(list(redone.iterdir())) == 2 and b"cut" not in file.read_bytes()


def test_of_a_run_before_a_joined_video_is_what_was_noted(tmp_path: Path) -> None:
    clips = [{"fingerprint": "a"}, {"fingerprint": "b"}]
    for before, made_of in (
        ({"joined_of": ["x"], "joined": None, "clips": clips}, ["x"]),
        ({"joined": None, "clips": clips}, []),
        ({"joined": "joined.mp4", "clips": clips}, ["a", "b"]),  # as 0.1.0 did
        ({"joined": "joined.mp4", "clips": clips, "arguments": {"include_source": True}}, ["source", "a", "b"]),
        ({"joined": "joined.mp4", "clips": clips, "arguments": {"include_source": False}}, ["a", "b"]),
        ({"joined": "joined.mp4", "arguments": None}, []),
    ):
        assert joining(tmp_path, before).made_of == made_of


@pytest.mark.parametrize(("dropped", "left_out"), [(1, 0), (0, 0), (5, 5)])
def test_the_source_s_last_frame_is_shown_once(
    dropped: int, left_out: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[Any] = []
    monkeypatch.setattr("wan.media.join_videos", lambda *what, **how: joined.append((what, how)))
    clips: Any = [SimpleNamespace(video=Path(f"{n}.mp4"), dropped=dropped) for n in (1, 2)]
    for silent in (False, True):
        run = RunFolder(tmp_path)
        settings = Settings(video="a.mp4", no_video_metadata=silent)
        JoinedVideo(settings, run, Written(run, {}), "source", {})._join(Path("new"), clips, [0, 4], True, 3)
    (videos, new), how = joined[0]
    assert [video.name for video in videos] == ["1.mp4", "2.mp4"] and new == Path("new")
    assert how == {
        "drops": [left_out, dropped],
        "fades": [0, 4],
        "metadata": {"clips": ["1.mp4", "2.mp4"], "base_seed": 3},
    }
    assert joined[1][1]["metadata"] is None


def test_a_draft_is_of_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    settings = {"prompt": "a boat", "guidance": (1.0, 2.0)}
    draft = ClipDraft(tmp_path, 3, settings)
    assert (draft.find(7), draft.prompt, draft.handed) == (None, None, None)
    sampled = Sampled(torch.ones(4, 2, 3, 3), {"sample": 2.0}, 1.5, {"note": "x"})
    prompt = ClipPrompt("a boat", {"seen": ["a"]}, {})
    handed = torch.rand(2, 4, 4, 3)
    draft.keep(7, sampled, prompt, handed)
    again = ClipDraft(tmp_path, 3, json.loads(json.dumps(settings)))
    for one in (draft, again):
        kept: Any = one.find(7)
        assert torch.equal(kept.latents, sampled.latents)
        assert (kept.seconds, kept.peak_gib, kept.notes) == ({"sample": 2.0}, 1.5, {"note": "x"})
        assert one.prompt == prompt and one.find(8) is None
        assert one.handed is not None and torch.equal(one.handed, handed)
    for other in (ClipDraft(tmp_path, 3, {**settings, "prompt": "fog"}), ClipDraft(tmp_path, 4, settings)):
        assert (other.find(7), other.prompt, other.handed) == (None, None, None)
    draft.keep(8, sampled, prompt, None)
    ClipDraft(tmp_path, 13, settings).keep(7, sampled, prompt, None)
    discard(tmp_path, 3)
    assert [file.name for file in tmp_path.iterdir()] == [".draft_13_7.safetensors"], "those of clip 3 alone"
    discard(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_is_damaged_is_none(tmp_path: Path) -> None:
    draft = ClipDraft(tmp_path, 3, {"prompt": "x"})
    draft.keep(7, Sampled(torch.ones(4, 2, 3, 3), {}, None, {}), ClipPrompt("x", {}, {}), torch.zeros(1, 2, 2, 3))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-4] + bytes([1, 2, 3, 4]), whole.replace(b'\\"x\\"', b'\\"y\\"', 1), b""):
        assert damaged != whole
        file.write_bytes(damaged)
        assert draft.find(7) is None
    file.write_bytes(whole)
    assert draft.find(7) is not None


def test_a_clip_is_written_while_the_next_is_made_and_an_error_is_raised_once() -> None:
    saved: list[Any] = []
    gate = threading.Event()

    def save(made: Any) -> None:
        gate.wait(10)
        if made == "bad":
            raise OSError("disk full")
        saved.append(made)

    made: Any = "one"
    bad: Any = "bad"
    writer = ClipWriter(save)
    assert (writer.number, writer.made, writer.settle()) == (None, None, None)
    writer.check()
    writer.write(4, made, lambda: saved.append("then"))
    assert (writer.number, writer.made, saved) == (4, made, [])
    writer.check()  # which does not wait
    assert writer.number == 4
    gate.set()
    writer.wait()
    assert saved == ["one", "then"] and writer.number is None
    writer.write(5, bad, lambda: saved.append("no"))
    with pytest.raises(OSError, match="disk full"):
        writer.wait()
    writer.wait()
    writer.write(6, bad, lambda: None)
    deadline = time.monotonic() + 10
    with pytest.raises(OSError, match="disk full"):
        while time.monotonic() < deadline:
            writer.check()
    writer.write(7, bad, lambda: None)
    assert writer.settle() == "clip 7 could not be written: disk full" and writer.number is None
    writer.write(8, made, lambda: None)
    assert writer.settle() is None and saved == ["one", "then", "one"]


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


def going(tmp_path: Path, finished: dict[int, Any], count: int = 4, **more: Any) -> tuple[ChainRun, Any]:
    """A run of so many clips of which some are finished, and its inventory."""
    inventory: Any = SimpleNamespace(
        settings=SimpleNamespace(keep_state="all", video="a.mp4", no_video_metadata=False),
        folder=RunFolder(tmp_path),
        source_digest="",
        clips=finished,
        count=count,
        first_missing=next(number for number in range(1, count + 2) if number not in finished),
        plans=[f"plan {number}" for number in range(1, count + 1)],
        wanted={number: {"number": number} for number in range(1, count + 1)},
        digits=2,
        **more,
    )
    source: Any = "source"
    described: Any = lambda made, source, plan: (made, source, plan)  # noqa: E731
    return ChainRun(inventory, source, described), inventory


def test_each_clip_goes_on_from_the_one_before_it_in_memory_or_on_disk(tmp_path: Path) -> None:
    first, second = (SimpleNamespace(record={"memory": memory}) for memory in ({"seen": [1]}, None))
    run, inventory = going(tmp_path, {1: first, 2: second})
    before: list[Any] = [run.before(number) for number in (1, 2, 3)]
    assert before == ["source", first, second]
    assert run.to_make == 3 and run.prompt_memory == {}
    del inventory.clips[2]
    assert run.to_make == 2 and run.prompt_memory == {"seen": [1]}
    made: Any = SimpleNamespace(prompt_memory={"seen": [2]})
    gate = threading.Event()
    run.writer._save = lambda made: gate.wait(10)  # type: ignore[assignment]
    run.writer.write(2, made, lambda: None)
    assert run.before(3) is made and run.before(2) is first
    assert run.to_make == 3 and run.prompt_memory == {"seen": [2]}
    gate.set()
    run.writer.wait()
    inventory.clips |= {2: second, 3: second, 4: second}
    assert run.to_make == 5, "nothing is missing"


def test_a_run_that_writes_a_clip_makes_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, inventory = going(tmp_path, {1: "first"})
    written: list[Any] = []

    def write(number: int, made: Any, then: Callable[[], None]) -> None:
        written.append((number, made))
        then()

    monkeypatch.setattr(run.writer, "write", write)
    inventory.clips[2] = "second"
    assert not run.record.makes_clips
    made: Any = "made"
    run.write(made, written.append)
    assert run.record.makes_clips and written == [(2, "made"), "second"]


@pytest.mark.parametrize("silent", [False, True])
def test_a_clip_is_told_with_its_plan_and_the_next_one_s(
    silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: Any = SimpleNamespace(video=Path("1.mp4"))
    run, inventory = going(tmp_path, {1: first})
    inventory.settings.no_video_metadata = silent
    asked: list[Any] = []
    monkeypatch.setattr("wan.chain.run.tell", lambda *what, **how: asked.append((what, how)))
    made: Any = "made"
    for number in (1, 2, 4):
        run._told_of(number, made)
    assert [what[1] for what, _ in asked] == [["plan 1", "plan 2"], ["plan 2", "plan 3"], ["plan 4"]]
    assert [how["before"] for _, how in asked] == [None, first, None]
    assert {how["source"] for _, how in asked} == {"source"} and {how["metadata"] for _, how in asked} == {not silent}
    assert [how["describe"]("plan") for _, how in asked[:2]] == [("made", "a.mp4", "plan"), ("made", "1.mp4", "plan")]


@pytest.mark.parametrize("keep_state", ["all", "last"])
def test_a_clip_that_is_saved_is_joined_and_older_states_are_left_out(
    keep_state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, inventory = going(tmp_path, {1: "first", 2: "second"})
    inventory.settings.keep_state = keep_state
    steps: list[Any] = []

    def add(number: int, clip: Any) -> None:
        steps.append(("add", number))
        inventory.clips[number] = clip

    def save(*what: Any) -> str:
        steps.append(("save", *what))
        return "third"

    inventory.add = add
    monkeypatch.setattr(run, "_told_of", lambda number, made: f"told {number}")
    monkeypatch.setattr(run.folder, "save", save)
    monkeypatch.setattr(run, "_renew_joined", lambda: steps.append("join"))
    monkeypatch.setattr("wan.chain.run.prune", lambda clip: steps.append(("prune", clip)))
    made: Any = "made"
    run.save(made)
    saved = [("save", 3, 2, "made", {"number": 3}, "told 3"), ("add", 3), "join"]
    assert steps == saved + ([("prune", "first")] if keep_state == "last" else [])


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_drafts_go_when_a_run_is_finished(status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, inventory = going(tmp_path, {})
    reported: list[str] = []
    monkeypatch.setattr(run, "_renew_joined", lambda: tmp_path / "joined.mp4")
    monkeypatch.setattr(run, "report", reported.append)
    (tmp_path / ".draft_1_7.safetensors").touch()
    assert run.finish(status) == tmp_path / "joined.mp4" and reported == [status]
    assert (tmp_path / ".draft_1_7.safetensors").exists() == (status == "stopped")


def test_the_clips_up_to_the_first_that_is_missing_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: Any = SimpleNamespace(fades=lambda count: [0] * count)
    joined: list[Any] = []
    for finished, complete in (({1: "a", 2: "b", 4: "d"}, False), ({1: "a", 2: "b", 3: "c", 4: "d"}, True)):
        run, inventory = going(tmp_path, finished, script=script, seeds=SimpleNamespace(base=7))
        monkeypatch.setattr(run.joined, "renew", lambda *what, **how: joined.append((what, how)))
        run._renew_joined()
        (clips, fades), how = joined[-1]
        assert clips == (["a", "b", "c", "d"] if complete else ["a", "b"]) and fades == [0] * len(clips)
        assert how["complete"] == complete and how["base_seed"] == 7
