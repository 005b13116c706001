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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm.utils import disp_len

from wan.batch import run as run_module
from wan.batch.crew import Gone
from wan.batch.hand import UPLOAD, WRITING
from wan.batch.places import Places
from wan.batch.report import Report, is_as_written, is_report, sealed
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

    gpus_per_job, dashboard, is_connected = 1, "", True

    def __init__(self, answer: Callable[[str, int], Mapping[str, Any] | None], size: int = 2) -> None:
        self.answer, self.places = answer, Places(size, size, uses_gpus=False)
        self.events: list[Event] = []
        self.given: list[tuple[int, str]] = []
        self.opened: Counter[int] = Counter()
        self.dropped: list[int] = []
        self.checks: set[str] = set()
        self.orders: list[Mapping[str, Any]] = []
        self.closed = 0

    def open(self, worker: int) -> None:
        self.opened[worker] += 1
        self.events.append(Event("ready", worker, {"node": "here"}))

    def give(self, worker: int, order: Mapping[str, Any]) -> None:
        name = order["id"]
        self.orders.append(order)
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
        assert seconds <= 0.5  # so that a table is drawn twice a second
        events, self.events = self.events, []
        return events

    def drop(self, worker: int) -> None:
        self.dropped.append(worker)

    def stop(self, seconds: float) -> list[Event]:
        return self.wait(0)

    def close(self) -> None:
        self.closed += 1


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
def test_other_failures_are_tried_again_and_the_reason_is_kept(
    code: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    crew = Crew(lambda name, count: failed(code, why="KeyError: 'a'") if count < 3 else {"state": DONE, **MADE}, 1)
    tasks = tasks_of("a")
    make(crew, tasks)
    assert (tasks[0].state, tasks[0].lost) == (DONE, 2)
    assert caplog.messages == [f"a: {reason}; it is tried again"] * 2
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


@pytest.mark.parametrize(
    ("most", "line"),
    [
        (3, "a: its worker said nothing for 5 s; it is tried again"),
        (1, "1/1 a failed: its worker said nothing for 5 s"),
    ],
)
def test_a_worker_that_hangs_is_replaced(most: int, line: str, caplog: pytest.LogCaptureFixture) -> None:
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
    make(hangs, tasks, patience=1.0, max_failures=most)
    state, opened = (DONE, 2) if most > 1 else (FAILED, 1)
    assert (tasks[0].state, tasks[0].lost, hangs.dropped, hangs.opened[0]) == (state, 1, [0], opened)
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING] == [line]


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
    live = {"clip": 2, "count": 3, "stage": "sample", "step": 4, "steps": 40, "seconds_left": 61.0}
    for name in ("a long name " * 9, "長い名前" * 20, "short"):
        line = line_of(3, tasks_of(name)[0], live, 80)
        assert disp_len(line) <= 79 and line.endswith(", clip 2/3 sample 4/40, 61 s left")
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
    _check_report(tmp_path)  # of the batch before
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name} would be overwritten, and no batch made it; move it"):
        _check_report(tmp_path)
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
        _check_report(tmp_path)
        Report(tmp_path, given, bad).write([], {}, status="running")
        assert (tmp_path / kept).read_bytes() == mine and b"line 1" in path.read_bytes()
        assert f"{path} is not what was written; it is {kept} from now on" in caplog.text
    assert len(os.listdir(tmp_path)) == 4


# --- the whole command


class Command:
    """`make_batch` with workers that are made up, for videos a, b and c."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in "abc":
            (folder / f"{name}.mp4").touch()
        self.crew = Crew(lambda name, count: {"state": DONE, **MADE})
        self.joined = list[Settings]()
        monkeypatch.setattr("wan.batch.crew.Crew", self.join)

    def join(self, settings: Settings) -> Crew:
        self.joined.append(settings)
        return self.crew

    def __call__(self, **settings: Any) -> None:
        given: dict[str, Any] = {"videos": "*.mp4", "ckpt_dir": "m", "output_dir": "runs/{name}", "quiet": True}
        run_module.make_batch(Settings(**given | settings))


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Command:
    caplog.set_level(logging.INFO)
    return Command(tmp_path, monkeypatch)


def states_of(folder: Path) -> list[str]:
    return [json.loads(line)["state"] for line in (folder / "batch.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_batch_is_checked_made_and_reported(
    batch: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    batch.crew.dashboard = "127.0.0.1:8265"
    batch()
    orders = batch.crew.orders
    assert [(one["id"], one["check"], one["ahead"]) for one in orders[:3]] == [(name, True, False) for name in "abc"]
    assert [(one["id"], one["check"], one["ahead"]) for one in orders[3:]] == [(name, False, True) for name in "abc"]
    assert all("upload" not in one for one in orders)
    assert orders[0]["settings"] == {
        "video": str(tmp_path / "a.mp4"),
        "ckpt_dir": "m",
        "output_dir": str(tmp_path / "runs/a"),
    }
    assert states_of(tmp_path / "runs") == [DONE] * 3 and batch.crew.closed == 1
    page = (tmp_path / "runs/batch.html").read_text(encoding="utf-8")
    assert ">finished</span>" in page and "6 of 6, 6 of them by this command" in page
    assert capsys.readouterr().out == f"{tmp_path / 'runs/batch.html'}\n"
    assert caplog.messages[:2] == [
        "the workers start, which takes some seconds",
        "Ray's dashboard: http://127.0.0.1:8265",
    ]
    assert f"3/3 c: 2 clips in {tmp_path / 'runs/c'}" in caplog.messages and len(caplog.messages) == 5
    assert batch.joined[0].output_dir == "runs/{name}"


def test_each_chain_has_a_place_of_its_own_to_go_to(batch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = list[str]()
    monkeypatch.setattr("wan.batch.upload.check_place", looked.append)
    batch(upload="memory://store/{name}/x")
    assert looked == ["memory://store/name/x"]
    assert {(one["id"], one["upload"]) for one in batch.crew.orders} == {
        (one, f"memory://store/{one}/x") for one in "abc"
    }


@pytest.mark.parametrize(("gpus", "line"), [(0, None), (2, "about 90 min on 4 GPUs")])
def test_a_dry_run_makes_nothing(
    gpus: int, line: str | None, batch: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.crew.places, batch.crew.gpus_per_job = Places(2, 2, uses_gpus=gpus > 0), max(gpus, 1)
    batch(dry_run=True, gpus_per_job=max(gpus, 1))
    lines = capsys.readouterr().out.splitlines()
    assert [one.split()[-1] for one in lines[1:4]] == ["a", "b", "c"] and lines[4].startswith("3 chains with 6 clips")
    assert lines[5:] == ([line] if line else [])
    assert batch.crew.given == [] and not (tmp_path / "runs").exists() and batch.crew.closed == 1


def test_chains_that_failed_are_an_error_that_says_where_to_look(batch: Command, tmp_path: Path) -> None:
    page = tmp_path / "runs/batch.html"
    batch.crew.answer = lambda name, count: failed("invalid_request") if name == "a" else {"state": DONE, **MADE}
    with pytest.raises(UserError) as refused:
        batch()
    assert str(refused.value) == f"1 of 3 chains failed, {page} says why; the same command tries it again"
    batch.crew.answer = lambda name, count: failed("invalid_request") if name != "b" else {"state": DONE, **MADE}
    with pytest.raises(UserError) as refused:
        batch()
    assert str(refused.value) == f"2 of 3 chains failed, {page} says why; the same command tries them again"
    assert states_of(tmp_path / "runs") == [FAILED, DONE, FAILED] and batch.crew.closed == 2


def test_chains_that_a_file_stopped_are_worth_a_line(batch: Command, caplog: pytest.LogCaptureFixture) -> None:
    batch.crew.answer = lambda name, count: {"state": PAUSED if name == "b" else DONE, **MADE}
    batch()
    assert "b stopped: the file stop in its folder asked for that" in caplog.text
    assert "1 chain stopped by a file in the chain's folder; the same command makes the rest" in caplog.messages


def unfit(crew: Crew, *names: str) -> None:
    """Let the check of these chains fail."""
    give = crew.give

    def giving(worker: int, order: Mapping[str, Any]) -> None:
        give(worker, order)
        if order["check"] and order["id"] in names:
            crew.events[-1].message = failed("invalid_request", "no such LoRA")

    crew.give = giving  # type: ignore[method-assign]


def test_a_row_that_fails_its_check_ends_the_batch_unless_it_is_to_be_left_out(
    batch: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    unfit(batch.crew, "b")
    with pytest.raises(UserError, match=r"^a row of videos \*\.mp4 .* nothing was begun \(skip_bad leaves it out\)"):
        batch()
    errors = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert errors == ["b.mp4: no such LoRA"]
    assert batch.crew.given == [] and batch.crew.closed == 1 and not (tmp_path / "runs").exists()
    assert "are finished; the same command" not in caplog.text
    batch(skip_bad=True)
    assert [name for _, name in batch.crew.given] == ["a", "c"]
    assert [one.levelno for one in caplog.records if "no such LoRA" in one.message] == [logging.ERROR, logging.WARNING]
    assert states_of(tmp_path / "runs") == [DONE, DONE, "bad"]
    page = (tmp_path / "runs/batch.html").read_text(encoding="utf-8")
    assert "<dd>2 completed</dd>" in page and page.count("left out</span>") == 1
    capsys.readouterr()
    batch(skip_bad=True, dry_run=True)
    assert capsys.readouterr().out.endswith("1 row left out, which cannot be made\n")


def test_rows_that_cannot_be_made_are_said_at_once_whoever_sees_it(
    batch: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfit(batch.crew, "a", "c")
    (tmp_path / "l.csv").write_text("video,seed\na.mp4,1\nb.mp4,x\nc.mp4,2\nb.mp4,3\nb.mp4,4\n", encoding="utf-8")
    with pytest.raises(UserError, match="^4 rows of videos l.csv cannot be made; nothing was begun"):
        batch(videos="l.csv")
    lines = [
        "l.csv, line 2: no such LoRA",
        "l.csv, line 3: `base_seed` must be a whole number, 'x' is not",
        "l.csv, line 4: no such LoRA",
        f"l.csv, line 6: its folder {tmp_path / 'runs/b'} is that of l.csv, line 5, too; give one of them another name",
    ]
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR] == lines
    assert batch.crew.given == [] and batch.crew.closed == 1 and not (tmp_path / "runs").exists()
    caplog.clear()
    batch(videos="l.csv", skip_bad=True)
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING] == lines
    assert [name for _, name in batch.crew.given] == ["b"]


def test_no_workers_start_for_a_list_of_bad_rows(batch: Command, caplog: pytest.LogCaptureFixture) -> None:
    Path("l.csv").write_text("video,seed\na.mp4,x\nb.mp4,y\n", encoding="utf-8")
    with pytest.raises(UserError, match="^2 rows of videos l.csv cannot be made"):
        batch(videos="l.csv")
    assert "l.csv, line 2: `base_seed`" in caplog.text and "line 3" in caplog.text and batch.joined == []
    caplog.clear()
    batch(videos="l.csv", skip_bad=True)
    assert caplog.text.count("l.csv, line 2: `base_seed`") == 1 and batch.crew.given == []


def test_a_batch_that_is_interrupted_keeps_what_it_has(
    batch: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(name: str, count: int) -> Mapping[str, Any]:
        if name == "c":
            raise KeyboardInterrupt
        return {"state": DONE, **MADE}

    batch.crew.answer = answer
    with pytest.raises(KeyboardInterrupt):
        batch()
    assert "2 of 3 chains are finished; the same command goes on with the others" in caplog.messages
    assert states_of(tmp_path / "runs") == [DONE, DONE, WAITING] and batch.crew.closed == 1
    assert ">stopped</span>" in (tmp_path / "runs/batch.html").read_text(encoding="utf-8")


def test_a_dry_run_that_is_interrupted_says_nothing_of_chains(batch: Command, caplog: pytest.LogCaptureFixture) -> None:
    def wait(seconds: float) -> list[Event]:
        raise KeyboardInterrupt

    batch.crew.wait = wait  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        batch(dry_run=True)
    assert "are finished" not in caplog.text and batch.crew.closed == 1


@pytest.mark.parametrize("connected", [True, False])
def test_an_error_of_a_client_whose_cluster_has_gone_says_that(
    connected: bool, batch: Command, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(name: str, count: int) -> Mapping[str, Any]:
        batch.crew.is_connected = connected
        raise ConnectionError("the channel is closed")

    batch.crew.answer = answer
    with pytest.raises(ConnectionError if connected else Gone, match="channel" if connected else "goes on when it is"):
        batch(address="ray://10.0.0.1:10001")
    assert "0 of 3 chains are finished; the same command goes on with the others" in caplog.messages


def test_a_cluster_that_has_gone_leaves_the_batch_as_it_is(batch: Command, caplog: pytest.LogCaptureFixture) -> None:
    def answer(name: str, count: int) -> Mapping[str, Any]:
        raise Gone("the head has gone")

    batch.crew.answer = answer
    with pytest.raises(Gone, match="the head has gone"):
        batch()
    assert "0 of 3 chains are finished; the same command goes on with the others" in caplog.messages


def test_what_is_finished_already_is_said_and_counts(
    batch: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    give = batch.crew.give

    def giving(worker: int, order: Mapping[str, Any]) -> None:
        give(worker, order)
        if order["id"] == "a":
            batch.crew.events[-1].message["found"].update(missing=0, status="finished")

    batch.crew.give = giving  # type: ignore[method-assign]
    batch()
    assert "1 of 3 chains are finished already" in caplog.messages
    assert [line for line in caplog.messages if "clips in" in line] == [
        f"{number}/2 {name}: 2 clips in {tmp_path / 'runs' / name}" for number, name in ((1, "b"), (2, "c"))
    ]
    assert states_of(tmp_path / "runs") == [DONE] * 3


def test_seams_to_look_at_are_counted_in_a_chain_s_line(batch: Command, caplog: pytest.LogCaptureFixture) -> None:
    seams = [{"clip": 2, "score": 2.0, "warnings": []}, {"clip": 3, "score": 3.0, "warnings": []}]
    batch.crew.answer = lambda name, count: {"state": DONE, "attention": seams[: "abc".index(name)], **MADE}
    batch()
    lines = [line.partition(" in ")[2].partition(",")[2] for line in caplog.messages if "clips in" in line]
    assert sorted(lines) == ["", " 1 seam to look at", " 2 seams to look at"]


def test_only_as_many_workers_are_started_as_there_is_work_for() -> None:
    crew = Crew(lambda name, count: {"state": DONE, **MADE}, size=8)
    make(crew, tasks_of("a", "b"))
    assert crew.opened == {0: 1, 1: 1}
    crew = Crew(lambda name, count: {"state": DONE, **MADE}, size=2)
    make(crew, tasks_of(*"abcdef"))
    assert crew.opened == {0: 1, 1: 1}


def test_workers_that_take_long_to_start_are_enough_for_what_waits() -> None:
    crew = Crew(lambda name, count: {"state": DONE, **MADE}, size=8)
    crew.open = lambda worker: crew.opened.update([worker])  # type: ignore[method-assign]
    tasks = tasks_of(*"abc")
    batch = Batch(Settings(quiet=True), crew, tasks, None)  # type: ignore[arg-type]
    schedule = Schedule(tasks, 3)
    for _ in range(3):
        batch._give(schedule, check=False)
    assert crew.opened == {0: 1, 1: 1, 2: 1}
    batch._hear(schedule, "ready", 1, {"node": "here"})
    batch._give(schedule, check=False)
    assert crew.given == [(1, "a")] and sum(crew.opened.values()) == 3 and batch._places() == {1: "here"}


def test_false_starts_are_counted_in_a_row() -> None:
    crew = Crew(lambda name, count: {"state": DONE, **MADE}, size=1)
    starts = iter([False, False, True])

    def opened(worker: int) -> None:
        message = {"node": "here"} if next(starts, False) else {"reason": "no CUDA"}
        crew.opened[worker] += 1
        crew.events.append(Event("ready" if "node" in message else "lost", worker, message))

    crew.open = opened  # type: ignore[method-assign]
    make(crew, tasks_of("a"))
    assert crew.opened == {0: 3}
    starts = iter([])
    with pytest.raises(UserError, match="no worker can start: no CUDA"):
        make(crew, tasks_of("a"))
    assert crew.opened == {0: 6}  # three times
    starts = iter([False, False, True, False, False, True])  # a batch of two, whose worker dies in the first
    crew.answer = lambda name, count: None if (name, count) == ("b", 1) else {"state": DONE, **MADE}
    make(crew, tasks_of("b", "c"))
    assert crew.opened == {0: 12}


@pytest.mark.parametrize(
    ("gpus", "outcome", "fit"),
    [
        (1, failed("invalid_request"), True),
        (2, failed("invalid_request"), False),  # others may wait for the first
        (1, failed("input_output"), True),
        (1, failed("internal"), False),
        (1, {"state": PAUSED, **NOTHING}, True),
        (2, {"state": PAUSED, **NOTHING}, False),
        (2, failed(UPLOAD), True),
        (2, {"state": DONE, **MADE}, True),
    ],
)
def test_a_worker_is_replaced_where_it_may_be_spoilt(gpus: int, outcome: Mapping[str, Any], fit: bool) -> None:
    crew = Crew(lambda name, count: outcome if (name, count) == ("a", 1) else {"state": DONE, **MADE}, 1)
    crew.gpus_per_job = gpus
    make(crew, tasks_of("a", "b"))
    assert (crew.dropped, crew.opened[0]) == (([], 1) if fit else ([0], 2))


def test_only_what_a_worker_says_of_its_own_chain_is_shown() -> None:
    crew, tasks = Crew(lambda name, count: {"state": DONE, **MADE}), tasks_of("a", "b")
    batch = Batch(Settings(quiet=True), crew, tasks, None)  # type: ignore[arg-type]
    schedule = Schedule(tasks, 3)
    batch._hear(schedule, "ready", 0, {"node": "here"})
    batch._give(schedule, check=False)
    live = {"id": "a", "made": 1, "done": 1, "count": 2}
    assert batch._hear(schedule, "seen", 0, live | {"id": "b"}) == [tasks[0]] and batch.lives == {}
    assert batch._hear(schedule, "seen", 1, live) == [] and batch.lives == {}
    assert batch._hear(schedule, "seen", 0, live) == [tasks[0]] and batch.lives == {0: live} and tasks[0].made == 1
    assert batch._hear(schedule, "ended", 0, {"state": DONE, **MADE}) == [tasks[0]]
    batch._give(schedule, check=False)
    assert crew.given[-1] == (0, "b") and batch.lives == {}  # which was of the chain before


def test_how_many_clips_a_folder_has_is_read_where_it_can_be_seen(tmp_path: Path) -> None:
    (task,) = tasks_of("a")
    assert run_module.done_of(task) == 0
    task.row.folder.mkdir(parents=True)
    for text, done in (('{"clips_finished": 3}', 3), ("{}", 0), ('{"clips_finished": "x"}', 0), ("{", 0), ("[]", 0)):
        (task.row.folder / "run.json").write_text(text, encoding="utf-8")
        assert run_module.done_of(task) == done, text


def test_clips_that_a_folder_has_begin_the_count_of_failures_anew(tmp_path: Path) -> None:
    (task,) = tasks_of("a")
    task.row.folder.mkdir(parents=True)

    def answer(name: str, count: int) -> Mapping[str, Any] | None:
        if count == 3:  # the worker finished a clip, and died before it said so
            (task.row.folder / "run.json").write_text('{"clips_finished": 1}', encoding="utf-8")
        return None

    crew = Crew(answer, 1)
    make(crew, [task])
    assert (task.state, task.lost, task.done) == (FAILED, 5, 1)


def test_a_dry_run_says_on_what_its_hours_rest() -> None:
    tasks = tasks_of("a", "b", "c")
    for task, measured in zip(tasks, (True, True, False), strict=True):
        task.clips, task.missing, task.seconds, task.disk_bytes, task.measured = 2, 2, 60.0, 2.0**29, measured
    lines = outline(tasks, [], 1)
    assert lines[-1].startswith("3 chains with 6 clips, 6 to make: about 0.1 GPU hours of sampling (on H200s")
    assert lines[1].split() == ["2", "2", "60", "s", "512", "MiB", "a"] and lines[-1].endswith("and 1.5 GiB of disk")
    tasks[2].missing = 0  # it takes no time
    assert "(as finished clips took)" in outline(tasks, [], 1)[-1]
    tasks[1].state = FAILED
    lines = outline(tasks, [BadRow("l", "x"), BadRow("l", "x")], 2)
    assert [line.split()[-1] for line in lines[1:3]] == ["a", "c"]
    assert lines[3].startswith("2 chains with 4 clips, 2 to make:") and lines[4] == "about 60 s on 2 GPUs"
    assert lines[5:] == ["2 rows left out, which cannot be made"]
    for task in tasks:
        task.seconds = 0.0
    assert "on 2 GPUs" not in str(outline(tasks, [], 2))


def test_a_report_needs_names_that_nothing_else_has(tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").mkdir()
    with pytest.raises(UserError, match=r"batch.jsonl is no file, and the report needs that name"):
        _check_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"report_dir .*file is a file; give a folder"):
        _check_report(tmp_path / "file")
    _check_report(tmp_path / "nowhere")


# --- the report


def chain(folder: Path, name: str, **values: Any) -> Task:
    task = Task(Row(name, f"list, {name}", Settings(output_dir=str(folder / name), video=f"/films/{name}.mp4")))
    for key, value in values.items():
        setattr(task, key, value)
    return task


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batch.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_row_of_the_report_says_how_a_chain_is(tmp_path: Path) -> None:
    seam = {"clip": 2, "score": 2.5, "warnings": []}
    task = chain(tmp_path / "runs", "a", state="making", worker=3, clips=5, done=3, made=2, video_seconds=4.56789)
    task.lost, task.failures, task.reason, task.warnings, task.attention = 4, 1, "it died", ["dark"], (seam,)
    report = Report(tmp_path / "reports", Settings(videos="films"), [BadRow("list, line 7", "no video")])
    report.write([task, chain(tmp_path, "b", worker=9, elsewhere=True)], {3: "here"}, status="running")
    first, second, bad = rows_in(tmp_path / "reports")
    assert first == {
        "name": "a",
        "where": "list, a",
        "video": "a.mp4",
        "folder": "../runs/a",
        "state": "making",
        "elsewhere": False,
        "clips": 5,
        "clips_finished": 3,
        "clips_made_now": 2,
        "video_seconds": 4.568,
        "failures": 4,
        "reason": "it died",
        "warnings": ["dark"],
        "attention": [seam],
        "worker": 3,
        "machine": "here",
    }
    assert (second["worker"], second["machine"], second["elsewhere"]) == (9, None, True)
    del bad["digest"]
    assert bad == {"where": "list, line 7", "state": "bad", "reason": "no video"}
    Report(tmp_path, Settings(videos="films"), ()).write([chain(tmp_path, "c")], {3: "here"}, status="running")
    assert rows_in(tmp_path)[0]["machine"] is None and rows_in(tmp_path)[0]["folder"] == "c"


def test_the_page_adds_up_and_shows_the_worst_seams_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.batch.report.MOST_SEAMS", 3)
    monkeypatch.setattr("wan.batch.report.MOST_PICTURES", 1)
    now = [1000.0]
    monkeypatch.setattr("wan.batch.report.time", SimpleNamespace(monotonic=lambda: now[0]))
    tasks = [
        chain(tmp_path, name, state=state, clips=5, done=3, made=2, picture=f"QUJ{name}", video_seconds=2.25)
        for name, state in (("a", DONE), ("b", FAILED), ("c", DONE))
    ]
    tasks[1].reason = "it is broken"
    for task, scores in zip(tasks, ((2.5, None), (3.5,), (1.75, 4.0)), strict=True):
        task.attention = [{"clip": 2, "score": score, "warnings": []} for score in scores]
    report = Report(tmp_path, Settings(videos="films"), ())
    report.write(tasks, {}, status="running")
    page = (tmp_path / "batch.html").read_text(encoding="utf-8")
    assert "not known yet" in page  # no time has gone by
    now[0] += 1800.0
    report.write(tasks, {}, status="running")
    page = (tmp_path / "batch.html").read_text(encoding="utf-8")
    assert "9 of 15, 6 of them by this command" in page and "12.0 clips an hour" in page and "6.8 s" in page
    assert "2 completed, 1 failed" in page and "2 of 3 chains, running" in page
    assert re.findall(r"score ([\d.]+)|not measured", page) == ["4.00", "3.50", "2.50"] and "and 2 more" in page
    assert page.count("QUJ") == 1 and "QUJa" in page and page.count('class="visible">it is broken') >= 1
    assert 'href="a/report.html' in page and 'href="a/joined.mp4"' in page
    assert "python generate_batch.py --videos films" in page.replace("&#39;", "'")
    for task in tasks:
        task.made, task.attention = 0, ()
    report.write(tasks, {}, status="running")
    page = (tmp_path / "batch.html").read_text(encoding="utf-8")
    assert "not known yet" in page and "more</p>" not in page


def test_a_report_is_renewed_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, took, written = [1000.0], [0.0], list[str]()
    monkeypatch.setattr("wan.batch.report.time", SimpleNamespace(monotonic=lambda: now[0]))
    report = Report(tmp_path, Settings(videos="films"), ())
    write_text = report._replace

    def slowly(name: str, text: str) -> None:
        now[0] += took[0] / 2
        written.append(name)
        write_text(name, text)

    monkeypatch.setattr(report, "_replace", slowly)
    for at, took[0], count in (
        (1000.0, 0.0, 1),
        (1004.9, 0.0, 1),
        (1005.0, 1.0, 2),
        (1055.9, 0.0, 2),
        (1056.0, 0.0, 3),
    ):
        now[0] = at  # after a second of writing it is left alone for fifty
        report.renew([], {})
        assert len(written) == 2 * count


@pytest.mark.parametrize(
    ("name", "text", "is_one"),
    [
        ("batch.jsonl", "", True),  # of a batch without a row
        ("batch.jsonl", '{"where": "x", "state": "bad"}\n', True),
        ("batch.jsonl", '{"where": "x"}\n', False),
        ("batch.jsonl", "\n", False),
        ("batch.html", "script-src 'none' generate_batch.py", True),
        ("batch.html", "script-src 'none'", False),
        ("batch.html", "", False),
    ],
)
def test_a_report_is_known_by_what_is_in_it(name: str, text: str, is_one: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert is_report(tmp_path / name) is is_one


def test_a_report_is_sealed_by_a_digest() -> None:
    for name, text in (("batch.html", "<p>x</p>"), ("batch.jsonl", '{"a": 1}\n{"b": 2}\n'), ("batch.jsonl", "")):
        written = sealed(name, text)
        assert is_as_written(name, written) and (text == "" or "digest" in written)
        assert not text or not is_as_written(name, written.replace(text[1], "9", 1))
        assert is_as_written(name, text) is (text == "")
    assert json.loads(sealed("batch.jsonl", '{"a": 1}\n{"b": 2}\n').splitlines()[1])["b"] == 2


# --- a batch that is left


@pytest.mark.parametrize("made", [True, False])
def test_what_workers_say_while_a_batch_is_left_is_kept(
    made: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crew, tasks = Crew(lambda name, count: {"state": "cancelled", **MADE}, size=3), tasks_of("a", "b", "c", "d")
    report = Report(tmp_path, Settings(videos="list"), ())
    batch = Batch(Settings(quiet=True), crew, tasks, report)  # type: ignore[arg-type]
    schedule = batch._schedule = Schedule(tasks, 3)
    batch.made = tasks if made else ()
    for worker in range(3):
        batch._hear(schedule, "ready", worker, {"node": "here"})
    batch._give(schedule, check=False)
    waits = list[float]()

    def stop(seconds: float) -> list[Event]:
        waits.append(seconds)
        return [
            Event("seen", 0, {}),
            Event("ended", 7, {"state": DONE, **MADE}),  # of nobody
            Event("written", 0, {"state": DONE, **MADE}),  # of nothing
            Event("ended", 0, {"state": WRITING, **NOTHING}),
            Event("written", 0, {"state": DONE, **MADE}),
            Event("ended", 1, {"state": WRITING, **NOTHING}),  # for which the time is too short
        ]

    crew.stop = stop  # type: ignore[method-assign]
    batch.leave()
    assert [(task.state, task.worker) for task in tasks] == [(DONE, None)] + [(WAITING, None)] * 3 and waits == [20.0]
    assert "1 of 4 chains are finished; the same command goes on with the others" in caplog.text
    assert (tmp_path / "batch.jsonl").exists() is made
    assert not made or ">stopped</span>" in (tmp_path / "batch.html").read_text(encoding="utf-8")


def test_many_rows_that_follow_each_other_and_are_bad_alike_have_one_line() -> None:
    bad = [BadRow(f"l.csv, line {line}", "no folder x", line) for line in (2, 3, 4, 5, 8, 9, 10)]
    bad[5] = replace(bad[5], reason="no video")
    ends = ["l.csv, line 8: no folder x", "l.csv, line 9: no video", "l.csv, line 10: no folder x"]
    assert list(run_module.in_lines(bad)) == ["l.csv, line 2, to l.csv, line 5, 4 rows: no folder x", *ends]
    assert list(run_module.in_lines(bad[1:])) == [*(f"l.csv, line {line}: no folder x" for line in (3, 4, 5)), *ends]
    assert list(run_module.in_lines([])) == []
