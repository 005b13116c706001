"""Which chain is made next and what becomes of those that fail, with workers that only say that they make something."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm.utils import disp_len

from wan.batch import run as run_module
from wan.batch.places import Places
from wan.batch.report import Report
from wan.batch.rows import BadRow, Row
from wan.batch.run import Batch, _check_report, outline
from wan.batch.schedule import STOPPED, WAITING, Schedule, Task
from wan.batch.table import Table, line_of, shorten
from wan.errors import UserError
from wan.options import Settings
from wan.server.tickets import DONE, FAILED, PAUSED
from wan.server.wire import CHECKED

FOUND = {"clips": 2, "missing": 2, "work": 2.0, "seconds": 7200.0, "measured": False, "disk_bytes": 2.0**30}
MADE = {"done": 2, "count": 2, "made": 2}
NOTHING = {"done": 0, "count": 2, "made": 0}


def failed(code: str, message: str = "x", why: str | None = None) -> dict[str, Any]:
    return {"state": FAILED, "error": {"code": code, "message": message}, "why": why, **NOTHING}


class Event:
    def __init__(self, kind: str, worker: int, message: Mapping[str, Any]) -> None:
        self.kind, self.worker, self.message = kind, worker, message


class Crew:
    """Workers that answer at once; `answer` says what they make of a chain, None is that they die."""

    gpus_per_job, dashboard = 1, ""

    def __init__(self, answer: Callable[[str, int], Mapping[str, Any] | None], size: int = 2) -> None:
        self.answer, self.places = answer, Places(size, size, uses_gpus=False)
        self.events: list[Event] = []
        self.given: list[tuple[int, str]] = []
        self.opened: Counter[int] = Counter()
        self.dropped: list[int] = []
        self.checks: set[str] = set()

    def open(self, worker: int) -> None:
        self.opened[worker] += 1
        self.events.append(Event("ready", worker, {"node": "here"}))

    def give(self, worker: int, order: Mapping[str, Any]) -> None:
        name = order["id"]
        if order["check"]:
            self.checks.add(name)
            answer: Mapping[str, Any] | None = {"state": CHECKED, "found": FOUND | {"status": ""}, **NOTHING}
        else:
            self.given.append((worker, name))
            answer = self.answer(name, sum(other == name for _, other in self.given))
        self.events.append(
            Event("lost", worker, {"reason": "died"}) if answer is None else Event("ended", worker, answer)
        )

    def wait(self, seconds: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def drop(self, worker: int) -> None:
        self.dropped.append(worker)

    def stop(self, seconds: float) -> list[Event]:
        return self.wait(0)


def tasks_of(*names: str, **settings: Any) -> list[Task]:
    return [
        Task(Row(name, f"list, line {n}", Settings(output_dir=f"runs/{name}", **settings)))
        for n, name in enumerate(names)
    ]


def make(crew: Crew, tasks: Sequence[Task], report: Report | None = None, **settings: Any) -> Batch:
    batch = Batch(Settings(quiet=True, **settings), crew, tasks, report)  # type: ignore[arg-type]
    batch.check()
    batch.make()
    return batch


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting before a chain is tried again."""
    monkeypatch.setattr("wan.batch.schedule.LONGEST_WAIT", 0.0)
    monkeypatch.setattr("wan.batch.schedule.IN_USE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)


def test_a_chain_whose_worker_dies_is_made_by_another_and_none_twice() -> None:
    dice = random.Random(1)
    crew = Crew(lambda name, count: None if dice.random() < 0.2 else {"state": DONE, **MADE}, size=8)
    tasks = tasks_of(*(f"job {n}" for n in range(300)))
    make(crew, tasks, max_failures=100)
    assert {task.state for task in tasks} == {DONE}
    lost = sum(task.lost for task in tasks)
    assert lost > 30 and len(crew.given) == 300 + lost
    assert sum(crew.opened.values()) <= 8 + lost


def test_failures_are_bounded_and_a_clip_that_was_finished_begins_their_count_anew() -> None:
    def answer(name: str, count: int) -> Mapping[str, Any] | None:
        if name == "poisoned":
            return None
        if count < 6:  # each time one more clip
            return {
                "state": "lost",
                "error": {"code": "worker_lost", "message": "signal 9"},
                "made": 1,
                "done": count,
                "count": 6,
            }
        return {"state": DONE, "done": 6, "count": 6, "made": 1}

    tasks = tasks_of("poisoned", "long")
    crew = Crew(answer)
    batch = make(crew, tasks)
    assert [(task.state, task.lost) for task in tasks] == [(FAILED, 3), (DONE, 5)]
    assert tasks[0].reason == "died" and tasks[1].made == 6
    assert [name for _, name in crew.given].count("poisoned") == 3
    assert {one.row.name for one in batch.made} == {"poisoned", "long"}


def test_what_the_user_can_put_right_is_not_tried_again_and_costs_no_worker() -> None:
    crew = Crew(
        lambda name, count: failed("invalid_request", "no such file") if name == "bad" else {"state": DONE, **MADE}, 1
    )
    tasks = tasks_of("bad", "good")
    make(crew, tasks)
    assert [task.state for task in tasks] == [FAILED, DONE] and tasks[0].reason == "no such file"
    assert crew.dropped == [] and crew.opened[0] == 1 and len(crew.given) == 2


@pytest.mark.parametrize(
    ("code", "reason"),
    [("out_of_memory", "x"), ("internal", "KeyError: 'a'"), ("disk_full", "x"), ("worker_lost", "x")],
)
def test_other_failures_are_tried_again_and_the_reason_is_kept(code: str, reason: str) -> None:
    crew = Crew(lambda name, count: failed(code, why="KeyError: 'a'") if count < 3 else {"state": DONE, **MADE}, 1)
    tasks = tasks_of("a")
    make(crew, tasks)
    assert (tasks[0].state, tasks[0].lost) == (DONE, 2)
    assert crew.dropped == ([] if code == "disk_full" else [0, 0])
    crew = Crew(lambda name, count: failed(code, why="KeyError: 'a'"), 1)
    tasks = tasks_of("a")
    make(crew, tasks, max_failures=2)
    assert (tasks[0].state, tasks[0].reason, len(crew.given)) == (FAILED, reason, 2)


def test_a_folder_in_which_another_run_works_is_waited_for() -> None:
    crew = Crew(lambda name, count: failed("in_use") if count < 9 else {"state": DONE, **NOTHING}, 1)
    tasks = tasks_of("a")
    make(crew, tasks)
    assert (tasks[0].state, tasks[0].lost, tasks[0].elsewhere, tasks[0].made) == (DONE, 0, False, 0)


def test_a_chain_that_its_folder_stops_stays_so() -> None:
    tasks = tasks_of("a")
    make(Crew(lambda name, count: {"state": PAUSED, **NOTHING}), tasks)
    assert tasks[0].state == STOPPED


def test_workers_that_never_start_end_the_batch() -> None:
    crew = Crew(lambda name, count: None)
    crew.open = lambda worker: crew.events.append(Event("lost", worker, {"reason": "no CUDA"}))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no worker can start: no CUDA"):
        make(crew, tasks_of("a"))


def test_a_worker_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(tasks := tasks_of("a", "b"), 3)
    live = {"done": 0, "count": 2, "made": 0, "silent": 5.0, "clip_seconds": 50.0}
    task = tasks[0]
    task.missing, task.work = 2, 2.0
    assert schedule.too_slow(task, live, 4.0) == "its worker said nothing for 5 s"
    assert schedule.too_slow(task, live, 10.0) is None  # nothing tells yet how long a clip takes
    schedule._rates += [10.0, 12.0, 11.0]
    assert schedule.too_slow(task, live, 10.0) == "its worker took 50 s for a clip that takes 11 s"
    assert (
        schedule.too_slow(task, live, 60.0) is None and schedule.too_slow(task, live | {"clip_seconds": 40}, 10) is None
    )

    hangs = Crew(lambda name, count: None if count == 0 else {"state": DONE, **MADE}, 1)
    give = hangs.give

    def hang_once(worker: int, order: Mapping[str, Any]) -> None:
        if order["check"] or hangs.given:
            give(worker, order)
        else:
            hangs.given.append((worker, order["id"]))
            hangs.events.append(Event("seen", worker, live | {"id": order["id"]}))

    hangs.give = hang_once  # type: ignore[method-assign]
    tasks = tasks_of("a")
    make(hangs, tasks, patience=1.0)
    assert (tasks[0].state, tasks[0].lost, hangs.dropped, hangs.opened[0]) == (DONE, 1, [0], 2)


def test_chains_with_the_same_weights_follow_each_other() -> None:
    names = [f"{lora}{n}" for n in range(3) for lora in "xyz"]
    tasks = [Task(Row(name, name, Settings(lora=(name[0],), output_dir=name))) for name in names]
    crew = Crew(lambda name, count: {"state": DONE, **MADE}, 1)
    make(crew, tasks)
    made = "".join(name[0] for _, name in crew.given)
    assert re.fullmatch(r"(x{3}|y{3}|z{3}){3}", made), made
    # two workers begin with different ones
    schedule = Schedule(
        tasks := [Task(Row(name, name, Settings(lora=(name[0],), output_dir=name))) for name in names], 3
    )
    first = schedule.next()
    assert first is not None
    schedule.begin(first, 0)
    second = schedule.next()
    assert second is not None and second.key != first.key and second.key[:-1] == first.key[:-1]
    assert schedule.next(first.key).key == first.key  # type: ignore[union-attr]


def test_what_is_finished_is_not_given_to_anybody() -> None:
    crew = Crew(lambda name, count: pytest.fail("it is finished"))
    give = crew.give

    def checked(worker: int, order: Mapping[str, Any]) -> None:
        assert order["check"]
        give(worker, order)
        crew.events[-1].message = {"state": CHECKED, "found": FOUND | {"missing": 0, "status": "finished"}, **NOTHING}

    crew.give = checked  # type: ignore[method-assign]
    tasks = tasks_of("a", "b")
    batch = make(crew, tasks)
    assert {task.state for task in tasks} == {DONE} and batch.made == [] and crew.checks == {"a", "b"}


def test_a_batch_that_is_left_says_how_to_go_on(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    tasks = tasks_of("a", "b")
    crew = Crew(lambda name, count: {"state": "cancelled", "done": 1, "count": 2, "made": 1})
    report = Report(tmp_path, Settings(videos="list"), ())
    batch = Batch(Settings(quiet=True), crew, tasks, report)  # type: ignore[arg-type]
    batch.check()
    for task in tasks:
        task.state = WAITING
    schedule = batch._schedule = Schedule(tasks, 3)
    batch.made = tasks
    batch._hear(schedule, "ready", 0, {"node": "here"})
    batch._give(schedule, check=False)
    with caplog.at_level(logging.WARNING):
        batch.leave()
    assert "0 of 2 chains are finished; the same command goes on with the others" in caplog.text
    assert tasks[0].done == 1 and {task.state for task in tasks} == {WAITING}
    assert '"clips_finished": 1' in (tmp_path / "batch.jsonl").read_text(encoding="utf-8")


def test_a_long_name_leaves_room_for_how_far_a_worker_is() -> None:
    live = {"clip": 2, "count": 3, "stage": "denoise", "step": 4, "steps": 40, "seconds_left": 61.0}
    for name in ("a long name " * 9, "長い名前" * 20, "short"):
        line = line_of(3, tasks_of(name)[0], live, 80)
        assert disp_len(line) <= 79 and line.endswith(", clip 2/3 denoise 4/40, 61 s left")
        assert line.startswith(f"worker 3: {name[:4]}") and ("…" in line) == (name != "short")
    assert shorten("abcdef", 4) == "a…ef" and shorten("abcdef", 6) == "abcdef"


def test_a_dry_run_adds_up_clips_hours_and_disk() -> None:
    crew, tasks = Crew(lambda name, count: None), tasks_of("a", "b")
    Batch(Settings(quiet=True), crew, tasks, None).check()  # type: ignore[arg-type]
    lines = outline(tasks, [BadRow("l, line 3", "x")], 4)
    assert lines[1].split() == ["2", "2", "2.0", "h", "1.0", "GiB", "a"]
    assert lines[3].startswith("2 chains with 4 clips, 4 to make: about 4.0 GPU hours of sampling (on H200s")
    assert (
        lines[3].endswith("2.0 GiB of disk") and lines[4] == "about 60 min on 4 GPUs" and "1 row left out" in lines[5]
    )


def test_rows_that_cannot_be_made_are_said_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "l.csv").write_text("video,seed\na.mp4,x\nb.mp4,1\nc.mp4,y\n", encoding="utf-8")
    given = Settings(videos="l.csv", ckpt_dir="m", output_dir="runs/{name}")
    with pytest.raises(UserError, match="2 rows of videos l.csv cannot be made; nothing was begun"):
        run_module.make_batch(given)
    assert "l.csv, line 2: `base_seed` must be a whole number" in caplog.text and "line 4" in caplog.text
    assert not (tmp_path / "runs").exists()


def test_the_report_escapes_what_anybody_wrote_and_leads_to_the_chains(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    task = tasks_of("a")[0]
    task.row = Row("b & c", f"{evil}, line 1", Settings(output_dir=str(tmp_path / "runs/b & c#?"), video=evil))
    task.state, task.done, task.clips, task.reason, task.lost = FAILED, 1, 2, evil, 3
    task.attention, task.picture, task.warnings = [{"clip": 2, "score": 2.5, "warnings": [evil]}], "QUJD", [evil]
    given = Settings(videos=evil, vlm_url="http://me:secret@host/v1", output_dir="runs/{name}")
    report = Report(tmp_path / "runs", given, [BadRow("x", evil)])
    report.write([task], {}, status="running")
    page = (tmp_path / "runs/batch.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6
    assert 'href="b%20%26%20c%23%3F/report.html#clip-2"' in page and "data:image/jpeg;base64,QUJD" in page
    assert "secret" not in page and "--vlm_url http://host/v1 --output_dir" in page
    assert "script-src 'none'" in page and 'http-equiv="refresh"' in page
    lines = [json.loads(line) for line in (tmp_path / "runs/batch.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["state"] for line in lines] == [FAILED, "bad"] and lines[0]["reason"] == evil
    report.write([task], {}, status="finished")
    assert 'http-equiv="refresh"' not in (tmp_path / "runs/batch.html").read_text(encoding="utf-8")


def test_models_are_kept_for_chains_of_one_checkpoint() -> None:
    from wan.server.worker import KeptPipeline

    closed: list[str] = []

    class Job:
        def __init__(self, key: str, question: str) -> None:
            self.models_key, self.settings = key, Settings(vlm_question=question)

        def open_continuation(self) -> Any:
            key = self.models_key
            vlm = type("Vlm", (), {})()
            return type("Pipeline", (), {"vlm": vlm, "close": lambda self: closed.append(key)})()

    models: Any = KeptPipeline()
    first = models.open(Job("5B", "Why?"))
    assert models.open(Job("5B", "How?")) is first and first.vlm.question == "How?" and closed == []
    assert models.open(Job("A14B", "Why?")) is not first and closed == ["5B"]


def test_the_last_line_of_a_table_tells_the_pace_of_this_command(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("wan.batch.table.time", SimpleNamespace(monotonic=lambda: now))
    tasks = tasks_of("a", "b")
    table = Table("make", tasks, quiet=True)
    for task, made in zip(tasks, (3, 1), strict=True):
        task.made, task.missing = made, 4
    now += 1800
    assert table.summary() == "0 of 2 chains, 4 of 8 clips, 8.0 clips an hour, about 30 min left"


@pytest.mark.parametrize(
    ("quiet", "terminal", "drawn"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_a_table_is_drawn_on_a_terminal(
    quiet: bool, terminal: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(errors, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", errors)
    assert Table("make", [], quiet).drawn == drawn
    monkeypatch.setattr(sys, "stderr", None)
    assert not Table("make", [], quiet).drawn


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("batch.jsonl", '{"video": "a.mp4", "name": "sea"}\n'),  # a list, say
        ("batch.jsonl", "notes\n"),
        ("batch.jsonl", "[1]\n"),
        ("batch.html", "<!DOCTYPE html>\n<p>notes of generate_batch.py"),
    ],
)
def test_a_file_that_no_batch_made_is_not_replaced_by_the_report(name: str, text: str, tmp_path: Path) -> None:
    report = Report(tmp_path, Settings(ckpt_dir="x", videos="films"), [BadRow("line 1", "no video")])
    report.write([], {}, status="running")
    _check_report(tmp_path, [])  # of the batch before
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name} would be overwritten, and no batch made it; move it"):
        _check_report(tmp_path, [])
    assert (tmp_path / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["batch.html", "batch.jsonl"])
def test_a_report_that_somebody_changed_gets_another_name(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, bad = Settings(ckpt_dir="x", videos="films"), [BadRow("line 1", 'no "video"'), BadRow("line 2", "é\udc80")]
    for report in (Report(tmp_path, given, bad), Report(tmp_path, given, bad[:1]), Report(tmp_path, given, ())):
        report.write([], {}, status="running")  # those of other commands, and without a row
        report.write([], {}, status="running")
    Report(tmp_path, given, bad).write([], {}, status="finished")
    assert not caplog.text and sorted(os.listdir(tmp_path)) == ["batch.html", "batch.jsonl"]
    path = tmp_path / name
    for kept in (f"batch_changed{path.suffix}", f"batch_changed_2{path.suffix}"):
        mine = path.read_bytes().replace(b"line 1", b"line one", 1)
        path.write_bytes(mine)
        _check_report(tmp_path, [])
        Report(tmp_path, given, bad).write([], {}, status="running")
        assert (tmp_path / kept).read_bytes() == mine and b"line 1" in path.read_bytes()
        assert f"{path} is not what was written; it is {kept} from now on" in caplog.text
    assert len(os.listdir(tmp_path)) == 4
