"""When a chain that failed is tried again, and which one a worker gets, with a clock that stands still."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.batch import table as table_module
from wan.batch.rows import Row
from wan.batch.schedule import MAKING, STOPPED, WAITING, Schedule, Task
from wan.batch.table import MOST_LINES, Table, line_of, shorten
from wan.options import Settings
from wan.server.tickets import DONE, FAILED, PAUSED
from wan.server.wire import CHECKED

NOTHING: dict[str, Any] = {"done": 0, "count": 4, "made": 0}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def tasks_of(*names: str) -> list[Task]:
    return [Task(Row(name, name, Settings(lora=(name[0],), output_dir=name))) for name in names]


def failed(code: str) -> dict[str, Any]:
    return {"state": FAILED, "error": {"code": code, "message": "x"}, **NOTHING}


def test_sets_of_weights_are_counted_with_those_of_storyboards(tmp_path: Path) -> None:
    for name, text in (("plain", "clips:\n- {prompt: a}"), ("other", "clips:\n- {lora: fog.safetensors}")):
        (tmp_path / name).write_text(text, encoding="utf-8")

    def kinds(*storyboards: str) -> int:
        rows = [Row(one, one, Settings(storyboard=str(tmp_path / one), output_dir=one)) for one in storyboards]
        return Schedule([*tasks_of("a1", "a2", "b"), *map(Task, rows)], 1).kinds

    assert kinds() == 2 and kinds("plain") == 3 and kinds("plain", "other", "gone") == 4


def test_a_chain_that_failed_waits_twice_as_long_each_time_and_a_minute_at_most() -> None:
    clock, (task,) = Clock(), tasks_of("a")
    schedule = Schedule([task], 99, now=clock)
    for seconds in (2, 4, 8, 16, 32, 60, 60):
        schedule.begin(task, 0)
        schedule.end(task, failed("internal"))
        assert (task.state, task.worker, task.not_before) == (WAITING, None, clock.now + seconds)
        clock.now += seconds - 0.1
        assert schedule.next() is None and not schedule.is_over
        clock.now += 0.1
        assert schedule.next() is task
    assert task.failures == task.lost == 7


def test_a_chain_whose_worker_is_lost_does_not_wait() -> None:
    clock, (task,) = Clock(), tasks_of("a")
    schedule = Schedule([task], 2, now=clock)
    schedule.begin(task, 3)
    assert (task.state, task.worker, task.began) == (MAKING, 3, 1000)
    schedule.fail(task, "it died")
    assert (task.state, task.reason) == (WAITING, "it died") and schedule.next() is task
    schedule.fail(task, "it died")
    assert task.state == FAILED and schedule.is_over


def test_of_two_that_one_worker_had_in_hand_neither_is_blamed() -> None:
    (first, second), clock = tasks_of("a", "b"), Clock()
    schedule = Schedule([first, second], 1, now=clock)
    schedule.begin(first, 0)
    assert not first.beside
    schedule.begin(second, 0, first)
    assert first.beside and second.beside
    for task in (first, second):
        schedule.fail(task, "it died")
        assert (task.state, task.failures, task.lost) == (WAITING, 0, 1)
    assert schedule.next(beside=True) is None and schedule.next() is not None  # each is tried alone
    schedule.begin(first, 0)
    schedule.fail(first, "it died")
    assert first.state == FAILED


def test_what_fails_by_itself_counts_whatever_else_its_worker_has() -> None:
    (first, second), clock = tasks_of("a", "b"), Clock()
    schedule = Schedule([first, second], 1, now=clock)
    schedule.begin(first, 0)
    schedule.begin(second, 0, first)
    schedule.end(second, failed("internal"))
    assert (second.state, second.failures) == (FAILED, 1)


def test_a_folder_in_use_is_looked_at_again_after_five_seconds() -> None:
    clock, (task,) = Clock(), tasks_of("a")
    schedule = Schedule([task], 1, now=clock)
    schedule.begin(task, 0)
    schedule.end(task, failed("in_use"))
    assert (task.state, task.elsewhere, task.not_before, task.failures) == (WAITING, True, 1005, 0)
    schedule.begin(task, 0)
    assert not task.elsewhere


def test_a_chain_with_weights_at_hand_comes_first_then_one_of_the_same_checkpoint() -> None:
    x, y = tasks_of("x", "y")
    others = [Task(Row(name, name, Settings(ckpt_dir="elsewhere", output_dir=name))) for name in ("z1", "z2")]
    schedule = Schedule([*others, x, y], 1, now=Clock())
    assert schedule.next(y.key) is y
    y.state = DONE
    assert schedule.next(y.key) is x  # other LoRAs are changed sooner than a checkpoint
    assert schedule.next(others[0].key) is others[0]
    assert schedule.next() is others[0]  # where most is to do
    for worker, task in enumerate(others):
        schedule.begin(task, worker)
    assert schedule.next() is x


def test_what_most_others_are_at_work_on_waits_for_them() -> None:
    tasks = tasks_of("x1", "x2", "x3", "y1", "y2")
    schedule = Schedule(tasks, 1, now=Clock())
    assert schedule.next() is tasks[0]
    schedule.begin(tasks[0], 0)
    assert schedule.next() is tasks[3]  # two of y, and two of x that share with one at work


def test_how_long_clips_take_is_told_by_their_work() -> None:
    clock, tasks = Clock(), tasks_of("a", "b")
    schedule = Schedule(tasks, 3, now=clock)
    for task, work in zip(tasks, (8.0, 16.0), strict=True):
        task.work, task.missing = work, 4
        schedule.begin(task, 0)
    clock.now += 60
    schedule.end(tasks[0], {"state": "cancelled", "done": 3, "count": 4, "made": 3})
    assert schedule._rates == [10.0]  # 20 s for a clip of 2 units
    assert (tasks[0].state, tasks[0].made, tasks[0].done) == (WAITING, 3, 3)
    schedule.begin(tasks[0], 0)
    schedule.see(tasks[0], {"made": 1, "done": 4, "count": 4})
    assert (tasks[0].made, tasks[0].done) == (4, 4)
    live = {"silent": 0.0, "clip_seconds": 161.0}
    assert schedule.too_slow(tasks[1], live, 100) is None
    schedule._rates += [10.0, 10.0]
    assert schedule.too_slow(tasks[1], live, 100) == "its worker took 161 s for a clip that takes 40 s"
    assert schedule.too_slow(tasks[1], live | {"clip_seconds": 160.0}, 100) is None
    assert schedule.too_slow(tasks[1], live, 161) is None and schedule.too_slow(tasks[1], live, 160.9)
    assert schedule.too_slow(tasks[1], {"silent": 9.0, "clip_seconds": None}, 9) is None
    tasks[1].missing = 0
    assert schedule.too_slow(tasks[1], live, 100) is None


def test_a_finished_clip_begins_the_count_of_failures_anew() -> None:
    (task,) = tasks_of("a")
    schedule = Schedule([task], 3, done_of=lambda task: 2, now=Clock())
    task.failures, task.done = 2, 1
    schedule.fail(task, "it died")  # its folder has one clip more
    assert (task.done, task.failures, task.state) == (2, 1, WAITING)
    schedule.see(task, {"made": 0, "done": 2, "count": 0})
    assert (task.done, task.failures) == (2, 1)
    task.clips = 5
    schedule.see(task, {"made": 0, "done": 1, "count": 0})
    assert (task.done, task.clips) == (2, 5)  # what is not told stays


@pytest.mark.parametrize(
    ("missing", "status", "uploaded", "state"),
    [
        (0, "finished", {}, DONE),
        (0, "finished", {"uploaded": True}, DONE),
        (0, "finished", {"uploaded": False}, CHECKED),
        (0, "running", {}, CHECKED),
        (1, "finished", {}, CHECKED),
    ],
)
def test_a_chain_is_finished_when_all_of_it_is_where_it_belongs(
    missing: int, status: str, uploaded: dict[str, bool], state: str
) -> None:
    (task,) = tasks_of("a")
    schedule = Schedule([task], 1, now=Clock())
    estimate = {"clips": 4, "missing": missing, "work": 2.0, "seconds": 9.0, "measured": True, "disk_bytes": 5.0}
    schedule.end(task, {"state": CHECKED, "found": estimate | {"status": status} | uploaded})
    assert (task.state, task.finished_before) == (state, state == DONE)
    assert (task.clips, task.missing, task.done) == (4, missing, 4 - missing)
    assert (task.work, task.seconds, task.measured, task.disk_bytes) == (2.0, 9.0, True, 5.0)


def test_a_worker_s_line_says_how_far_it_is() -> None:
    (task,) = tasks_of("a")
    task.clips = 7
    live = {"clip": 2, "count": 4, "stage": "sample", "step": 3, "steps": 8, "seconds_left": 120.0}
    assert line_of(5, task, live) == "worker 5: a, clip 2/4 sample 3/8, 2 min left"
    assert line_of(5, task, live | {"count": 0, "steps": 0, "seconds_left": None}) == "worker 5: a, clip 2/7 sample"
    assert line_of(5, task, live | {"stage": "decode", "seconds_left": None}) == "worker 5: a, clip 2/4 decode"
    assert line_of(5, task, {}) == "worker 5: a"
    task.row = Row("name" * 50, "", task.row.settings)
    assert len(line_of(5, task, live, 60)) == 59


def test_a_table_tells_of_checks_and_of_what_others_make(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tasks_of("a", "b", "c")
    tasks[0].state, tasks[1].elsewhere = DONE, True
    assert Table("check", tasks, True).summary() == "checked 1 of 3 rows"
    assert Table("make", tasks, True).summary() == "1 of 3 chains, 0 of 0 clips, 1 chain made by another run"


def test_a_terminal_has_a_line_for_each_of_so_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()

    class Bar:
        def __init__(self, *, position: int, **_: Any) -> None:
            self.position = position
            lines.append("")

        def set_description_str(self, line: str) -> None:
            lines[self.position] = line

        def close(self) -> None:
            lines[self.position] = "closed"

    monkeypatch.setattr("wan.batch.table.tqdm", Bar)
    (task,) = tasks_of("a")
    with Table("make", [task], True) as table:
        table.drawn = True
        table.show({number: (task, {}) for number in range(MOST_LINES + 2)})
        assert len(lines) == MOST_LINES + 2
        assert (lines[0], lines[31], lines[32]) == ("worker 0: a", "worker 31: a", "and 2 more workers")
        assert lines[-1] == "0 of 1 chains, 0 of 0 clips"
        table.show({1: (task, {}), 0: (task, {})})
        assert lines[:3] == ["worker 0: a", "worker 1: a", "0 of 1 chains, 0 of 0 clips"]
        assert set(lines[3:]) == {""}
        table.show({number: (task, {}) for number in range(MOST_LINES)})
        assert lines[32] == "0 of 1 chains, 0 of 0 clips"
    assert set(lines) == {"closed"}


def test_all_that_a_worker_says_of_its_chain_is_kept() -> None:
    clock, (task,) = Clock(), tasks_of("a")
    schedule = Schedule([task], 3, now=clock)
    task.work, task.missing, task.reason = 4.0, 2, "it failed before"
    schedule.begin(task, 5)
    seen: dict[str, Any] = {"attention": [{"clip": 2}], "picture": "QUJD", "video_seconds": 6.5, "warnings": ["dark"]}
    schedule.end(task, {"state": "cancelled", "done": 1, "count": 2, "made": 1} | seen)
    kept = (task.attention, task.picture, task.video_seconds, task.warnings)
    assert kept == ([{"clip": 2}], "QUJD", 6.5, ["dark"]) and (task.state, task.worker) == (WAITING, None)
    assert task.reason == "it failed before"
    schedule.begin(task, 5)
    nothing: dict[str, Any] = {"attention": [], "picture": None, "video_seconds": 0.0, "warnings": []}
    schedule.end(task, {"state": DONE, "done": 2, "count": 2, "made": 1} | nothing)  # what was seen stays
    assert (task.attention, task.picture, task.video_seconds, task.warnings) == kept
    assert (task.state, task.reason, task.worker, task.made) == (DONE, "", None, 2) and schedule.is_over


def test_what_takes_no_work_tells_nothing_of_how_long_clips_take() -> None:
    clock, (task,) = Clock(), tasks_of("a")
    schedule = Schedule([task], 3, now=clock)
    schedule.begin(task, 0)
    schedule.end(task, {"state": DONE, "done": 2, "count": 2, "made": 2})  # a chain of clips that were there
    assert schedule._rates == []
    task.work, task.missing = 4.0, 2
    schedule.begin(task, 0)
    schedule.end(task, {"state": "cancelled", "done": 0, "count": 2, "made": 0})
    assert schedule._rates == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [("internal", "KeyError: 'a'"), ("input_output", "KeyError: 'a'"), ("out_of_memory", "x"), ("upload", "x")],
)
def test_a_failure_is_told_by_what_helps(code: str, reason: str) -> None:
    (task,) = tasks_of("a")
    schedule = Schedule([task], 3, now=Clock())
    schedule.begin(task, 0)
    schedule.end(task, failed(code) | {"why": "KeyError: 'a'"})
    assert (task.state, task.reason, task.failures) == (WAITING, reason, 1)
    schedule.begin(task, 0)
    schedule.end(task, failed(code))  # which says no more
    assert task.reason == "x"


def test_a_chain_whose_process_ended_does_not_wait_and_one_that_failed_does() -> None:
    clock, (task,) = Clock(), tasks_of("a")
    schedule = Schedule([task], 5, now=clock)
    for state, seconds in (("lost", 0.0), (FAILED, 4.0)):  # twice failed
        schedule.begin(task, 0)
        schedule.end(task, failed("worker_lost") | {"state": state})
        assert (task.state, task.not_before) == (WAITING, clock.now + seconds)
        clock.now += 10


def test_what_can_be_put_right_fails_at_once_and_a_stop_is_no_failure() -> None:
    first, second = tasks_of("a", "b")
    schedule = Schedule([first, second], 9, now=Clock())
    schedule.end(first, failed("invalid_request") | {"error": {"code": "invalid_request", "message": "no such file"}})
    assert (first.state, first.reason, first.failures) == (FAILED, "no such file", 0)
    schedule.end(second, {"state": PAUSED, **NOTHING})
    assert (second.state, second.reason) == (STOPPED, "the file stop in its folder asked for that")
    assert schedule.is_over and schedule.next() is None


def test_only_what_is_not_over_is_scheduled() -> None:
    tasks = tasks_of(*"abcdef")
    for task, state in zip(tasks, (DONE, FAILED, STOPPED, CHECKED, MAKING, WAITING), strict=True):
        task.state = state
    schedule = Schedule(tasks, 1, now=Clock())
    assert schedule.tasks == tasks[4:] and schedule.next() is tasks[5] and not schedule.is_over
    tasks[5].state = FAILED
    assert schedule.next() is None and not schedule.is_over
    assert Schedule((), 1).is_over


def test_chains_of_one_checkpoint_follow_each_other_whatever_the_list_s_order() -> None:
    names = ("x1", "y1", "x2", "y2")
    tasks = [Task(Row(name, name, Settings(ckpt_dir=name[0], output_dir=name))) for name in names]
    assert [task.row.name for task in Schedule(tasks, 1).tasks] == ["x1", "x2", "y1", "y2"]
    assert tasks[0].key is tasks[2].key and tasks[0].key != tasks[1].key


def test_the_median_clip_tells_how_long_one_takes() -> None:
    (task,) = tasks_of("a")
    task.work, task.missing = 6.0, 2
    schedule = Schedule([task], 3, now=Clock())
    schedule._rates += [1.0, 10.0]
    live: dict[str, Any] = {"silent": 0.0, "clip_seconds": 500.0}
    assert schedule.too_slow(task, live, 1) is None  # two are too few
    schedule._rates += [100.0]
    assert schedule.too_slow(task, live, 1) == "its worker took 500 s for a clip that takes 30 s"
    assert schedule.too_slow(task, live | {"clip_seconds": 120.0}, 1) is None
    assert schedule.too_slow(task, live | {"silent": 1.5}, 1) == "its worker said nothing for 2 s"


def test_off_a_terminal_a_line_a_minute_tells_of_chains_and_none_of_checks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr("wan.batch.table.time", SimpleNamespace(monotonic=clock))
    caplog.set_level("INFO")
    tasks = tasks_of("a", "b")
    tasks[0].state = DONE
    with Table("make", tasks, quiet=True) as make, Table("check", tasks, quiet=True) as check:
        for seconds, lines in ((59.9, 0), (0.1, 1), (59.9, 1), (0.1, 2)):
            clock.now += seconds
            make.show({})
            check.show({})
            assert caplog.messages == ["1 of 2 chains, 0 of 0 clips"] * lines


def test_the_pace_is_that_of_the_clips_that_this_command_made(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, (task,) = Clock(), tasks_of("a")
    monkeypatch.setattr("wan.batch.table.time", SimpleNamespace(monotonic=clock))
    table = Table("make", [task], quiet=True)
    task.missing, task.made = 4, 5  # one was made again
    assert table.summary() == "0 of 1 chains, 5 of 4 clips"  # no time has gone by
    clock.now += 7200
    assert table.summary() == "0 of 1 chains, 5 of 4 clips, 2.5 clips an hour, about 0 s left"
    task.made = 1
    assert table.summary() == "0 of 1 chains, 1 of 4 clips, 0.5 clips an hour, about 6.0 h left"


def test_a_terminal_that_does_not_say_how_wide_it_is_has_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def fileno(self) -> int:
            return 77

    monkeypatch.setattr(sys, "stderr", Terminal())
    for columns, width in ((120, 120), (0, 80)):
        monkeypatch.setattr(
            os, "get_terminal_size", lambda number, at=columns: {77: SimpleNamespace(columns=at)}[number]
        )
        assert table_module._columns() == width
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # which has no number
    assert table_module._columns() == 80


def test_a_name_keeps_some_columns_however_long_the_rest_is() -> None:
    (task,) = tasks_of("a")
    task.row = Row("abcdefghijklmnopqrst", "", task.row.settings)
    live = {"clip": 2, "count": 4, "stage": "sample", "step": 3, "steps": 8, "seconds_left": 120.0}
    assert line_of(0, task, live, columns=30) == "worker 0: abcde…opqrst, clip 2/4 sample 3/8, 2 min left"
    assert line_of(0, task, {}, columns=31) == "worker 0: abcdefghijklmnopqrst"
    assert line_of(0, task, {}, columns=30) == "worker 0: abcdefghi…lmnopqrst"


@pytest.mark.parametrize(
    ("columns", "text"), [(7, "abcdefg"), (6, "ab…efg"), (5, "ab…fg"), (4, "a…fg"), (3, "a…g"), (2, "…g"), (1, "…")]
)
def test_a_text_is_cut_in_its_middle(columns: int, text: str) -> None:
    assert shorten("abcdefg", columns) == text
