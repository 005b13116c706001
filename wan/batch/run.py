"""A batch from its list to its report: all rows are checked, then made, and what stopped or failed is said."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.batch.hand import LOST, UPLOAD, WRITING
from wan.batch.report import Report, is_report
from wan.batch.rows import DATA, PAGE, BadRow, read_rows, report_folder
from wan.batch.schedule import STOPPED, WAITING, Schedule, Task
from wan.batch.table import Table
from wan.commands.flags import NAME
from wan.commands.lines import PROGRESS
from wan.commands.progress import counted, say
from wan.detail import span
from wan.errors import UserError
from wan.foreign import read_json
from wan.options import Settings
from wan.server.tickets import DONE, FAILED
from wan.server.wire import CHECKED, as_json

if TYPE_CHECKING:
    from wan.batch.crew import Crew

log = logging.getLogger(__name__)
told = logging.getLogger(PROGRESS)

STOP_SECONDS = 20.0  # for workers to leave what they make and join what is finished
WAIT_SECONDS = 0.5
MOST_ALIKE = 3  # bad rows that have a line each
MOST_FALSE_STARTS = 3  # of workers in a row: then something is wrong with all of them


def make_batch(settings: Settings) -> None:
    """Make what is missing of a batch, or with `dry_run` say what that is. Raises UserError."""
    rows, bad = read_rows(settings)
    folder = report_folder(settings)
    _check_report(folder)
    if settings.upload is not None:
        from wan.batch.upload import check_place

        check_place(settings.upload.replace(NAME, "name"))
    if not rows and not settings.skip_bad:
        _refuse(bad, settings)
    from wan.batch.crew import Crew, Gone  # which needs Ray

    tasks = [Task(row) for row in rows]
    crew = Crew(settings)
    batch = Batch(settings, crew, tasks, None if settings.dry_run else Report(folder, settings, tuple(bad)))
    try:
        told.info("the workers start, which takes some seconds")
        if crew.dashboard:
            told.info("Ray's dashboard: http://%s", crew.dashboard)
        batch.check()
        bad += [BadRow(task.row.where, task.reason, task.row.number) for task in tasks if task.state == FAILED]
        # only now, so that those that the list itself shows and those that workers see are said at once
        bad.sort(key=lambda one: one.number)
        _refuse(bad, settings)
        if settings.dry_run:
            say(*outline(tasks, bad, crew.places.size * crew.gpus_per_job if crew.places.uses_gpus else 0))
            return
        batch.leave_out(bad)
        batch.make()
    except BaseException as error:
        if isinstance(error, Exception) and not crew.is_connected:
            error = Gone(
                f"the Ray cluster at {settings.address} has gone, or its client server has; finished clips are kept, "
                "and the same command goes on when it is there again"
            )
        if (isinstance(error, Gone) or not isinstance(error, UserError)) and not settings.dry_run:
            batch.leave()
        raise error
    finally:
        crew.close()
    if failed := _count(batch.made, FAILED):
        raise UserError(
            f"{failed} of {counted(len(batch.made), 'chain')} failed, {folder / PAGE} says why; the same command tries "
            f"{'it' if failed == 1 else 'them'} again"
        )
    if stopped := _count(tasks, STOPPED):
        told.warning(
            "%s stopped by a file in the chain's folder; the same command makes the rest", counted(stopped, "chain")
        )
    say(str(folder / PAGE))


class Batch:
    """The tasks of a batch and its workers; brings the two together."""

    def __init__(self, settings: Settings, crew: Crew, tasks: Sequence[Task], report: Report | None) -> None:
        self.settings, self.crew, self.tasks, self.report = settings, crew, tasks, report
        self.made: Sequence[Task] = ()  # those that passed their check and were not finished
        self.lives: dict[int, Mapping[str, Any]] = {}
        self.nodes: dict[int, str] = {}
        self._at: dict[int, Task] = {}  # what each worker does
        self._written: dict[int, Task] = {}  # and what it writes meanwhile
        self._unfit: set[int] = set()  # workers that are replaced when that is written
        self._like: dict[int, tuple[Any, ...]] = {}  # the weights that it has
        self._idle: set[int] = set()
        self._opened: set[int] = set()
        self._false_starts = 0
        self._checks = False
        self._schedule = Schedule((), 1)

    def check(self) -> None:
        """Check every task, as making it does before its first clip. Raises UserError for a store out of reach."""
        self._checks = True
        self._work(Schedule(self.tasks, self.settings.max_failures), "check", lambda task: None)
        self._checks = False

    def leave_out(self, bad: Sequence[BadRow]) -> None:
        """Go on without the tasks that failed their check. The report names them with all rows that cannot be made."""
        self.tasks = [task for task in self.tasks if task.state != FAILED]
        if self.report is not None:
            self.report.bad = bad

    def make(self) -> None:
        """Make all that passed the check and is not finished."""
        for task in self.tasks:
            if task.state == CHECKED:
                task.state, task.failures, task.reason = WAITING, 0, ""
        self.made = [task for task in self.tasks if task.state == WAITING]
        finished = _count(self.tasks, DONE)
        if finished:
            told.info("%d of %d chains are finished already", finished, len(self.tasks))
        self._work(Schedule(self.made, self.settings.max_failures, done_of=done_of), "make", self._say)

    def leave(self) -> None:
        """Stop in the middle, and say how to go on."""
        for event in self.crew.stop(STOP_SECONDS):
            if event.kind == "ended" and event.worker in self._at:
                task = self._at.pop(event.worker)
                if event.message["state"] == WRITING:
                    self._written[event.worker] = task
                else:
                    self._schedule.end(task, event.message)
            elif event.kind == "written" and event.worker in self._written:
                self._schedule.end(self._written.pop(event.worker), event.message)
        for task in (*self._at.values(), *self._written.values()):
            task.state, task.worker = WAITING, None
        # while rows are checked, the report of the last time is the better one
        if self.report is not None and self.made:
            self.report.write(self.tasks, {}, status="stopped")
        told.warning(
            "%d of %d chains are finished; the same command goes on with the others",
            _count(self.tasks, DONE),
            len(self.tasks),
        )

    def _work(self, schedule: Schedule, title: str, over: Callable[[Task], None]) -> None:
        """Let the workers do what is scheduled; `over` is told of each task with which that is done."""
        self._schedule = schedule
        with Table(title, schedule.tasks, self.settings.quiet) as table:
            while not schedule.is_over:
                self._give(schedule, check=title == "check")
                for event in self.crew.wait(WAIT_SECONDS):
                    for task in self._hear(schedule, event.kind, event.worker, event.message):
                        if task.is_over:
                            over(task)
                for task in self._replace_slow(schedule):
                    if task.is_over:
                        over(task)
                table.show({worker: (task, self.lives.get(worker, {})) for worker, task in self._busy.items()})
                if self.report is not None and title == "make":
                    self.report.renew(self.tasks, self._places())
        if self.report is not None and title == "make":
            self.report.write(self.tasks, self._places(), status="finished")

    @property
    def _busy(self) -> dict[int, Task]:
        """What each worker does, or else writes."""
        return self._written | self._at

    def _places(self) -> dict[int, str]:
        return {worker: self.nodes.get(worker, "") for worker in self._busy}

    def _give(self, schedule: Schedule, *, check: bool) -> None:
        for worker in sorted(self._idle, key=lambda one: (one in self._written, one)):
            written = self._written.get(worker)
            if written is not None and written.lost:  # see `Schedule.next`
                continue
            task = schedule.next(self._like.get(worker), beside=written is not None)
            if task is None:  # nor is there one for the others: those who write come last, and may begin no more
                break
            self._idle.discard(worker)
            self._at[worker], self._like[worker] = task, task.key
            self.lives.pop(worker, None)
            schedule.begin(task, worker, written)
            order = {"id": task.row.name, "settings": as_json(task.row.settings), "check": check, "ahead": not check}
            order["kinds"] = schedule.kinds
            if self.settings.upload is not None:
                order["upload"] = self.settings.upload.replace(NAME, task.row.name)
            self.crew.give(worker, order)
        at_work = {id(task) for task in (*self._at.values(), *self._written.values())}
        waiting = sum(not task.is_over and id(task) not in at_work for task in schedule.tasks)
        for worker in range(self.crew.places.size):
            if worker not in self._opened and waiting > len(self._opened - self._at.keys() - self._idle):
                self._opened.add(worker)
                self.crew.open(worker)

    def _hear(self, schedule: Schedule, kind: str, worker: int, message: Mapping[str, Any]) -> list[Task]:
        """Take in an event; the tasks that it is about."""
        task, written = self._at.get(worker), self._written.get(worker)
        if kind == "ready":
            self._false_starts = 0
            self.nodes[worker] = message["node"]
            self._idle.add(worker)
        elif kind == "seen":
            one = self._busy.get(worker)
            if one is not None and message["id"] == one.row.name:
                self.lives[worker] = message
                schedule.see(one, message)
        elif kind in ("ended", "written"):
            self._end(schedule, kind, worker, message)
        elif task is None and written is None:
            self._lose(worker)
            self._false_starts += 1
            if self._false_starts >= MOST_FALSE_STARTS * self.crew.places.size:
                raise UserError(f"no worker can start: {message['reason']}")
            log.warning("worker %d could not start: %s", worker, message["reason"])
        else:
            self._fail(schedule, worker, str(message["reason"]))
        return [one for one in (task, written) if one is not None]

    def _end(self, schedule: Schedule, kind: str, worker: int, message: Mapping[str, Any]) -> None:
        """A worker is done with what it made, or with what it wrote meanwhile."""
        tasks, other = (self._at, self._written) if kind == "ended" else (self._written, self._at)
        if worker not in tasks:  # it was lost with the other one a moment ago
            return
        task = tasks.pop(worker)
        if message["state"] == WRITING:
            self._written[worker] = task
            schedule.see(task, message)
            if worker not in self._unfit:
                self._idle.add(worker)
            return
        schedule.end(task, message)
        if message["state"] in (FAILED, LOST) and not task.elsewhere:
            _say_again(task)
        code = (message.get("error") or {}).get("code")
        if self._checks and task.state == FAILED and code == UPLOAD:  # no row's fault, and the same for each of them
            raise UserError(f"{task.reason}; nothing was begun")
        if message["state"] == LOST:
            self.crew.drop(worker)
            self._fail(schedule, worker, str(message["error"]["message"]))
            return
        if worker in other:
            other[worker].beside = False
        if message["state"] not in (DONE, CHECKED) and not _is_fit(message, self.crew.gpus_per_job):
            self._unfit.add(worker)
        if worker in self._unfit:
            if worker not in other:
                self._lose(worker)
                self.crew.drop(worker)
            else:
                self._idle.discard(worker)
        elif kind == "ended":
            self._idle.add(worker)

    def _replace_slow(self, schedule: Schedule) -> list[Task]:
        """The tasks of workers that hang, which are lost."""
        lost = []
        for worker, task in self._busy.items():
            live = self.lives.get(worker)
            if live and (why := schedule.too_slow(task, live, self.settings.patience)):
                self.crew.drop(worker)
                lost += self._fail(schedule, worker, why)
        return lost

    def _fail(self, schedule: Schedule, worker: int, why: str) -> list[Task]:
        """A worker is lost, with all that it had in hand, which is returned."""
        self._lose(worker)
        lost = [tasks.pop(worker) for tasks in (self._written, self._at) if worker in tasks]
        for task in lost:
            schedule.fail(task, why)
            _say_again(task)
        return lost

    def _lose(self, worker: int) -> None:
        """Forget a worker, whose place another takes."""
        self._opened.discard(worker)
        self._idle.discard(worker)
        self._unfit.discard(worker)
        self._like.pop(worker, None)
        self.lives.pop(worker, None)

    def _say(self, task: Task) -> None:
        count = f"{sum(one.is_over for one in self.made)}/{len(self.made)} {task.row.name}"
        if task.state == DONE:
            seen = f", {counted(len(task.attention), 'seam')} to look at" if task.attention else ""
            told.info("%s: %s in %s%s", count, counted(task.clips, "clip"), task.row.folder, seen)
        else:
            told.warning("%s %s: %s", count, task.state, task.reason)


def _say_again(task: Task) -> None:
    """That it failed, where another worker tries again: nothing else tells of that before the report."""
    if task.state == WAITING:
        log.warning("%s: %s; it is tried again", task.row.name, task.reason)


def done_of(task: Task) -> int:
    """The finished clips of a chain, as its folder has them where it can be seen from here."""
    try:
        return int(read_json(task.row.folder / "run.json").get("clips_finished") or 0)
    except (UserError, TypeError, ValueError):
        return 0


def outline(tasks: Sequence[Task], bad: Sequence[BadRow], gpus: int) -> list[str]:
    """The lines of `dry_run`."""
    lines = [f"{'clips':>6} {'to make':>8} {'GPU time':>9} {'disk':>9}  chain"]
    for task in tasks:
        if task.state != FAILED:
            sizes = f"{task.clips:>6} {task.missing:>8} {span(task.seconds):>9} {_gib(task.disk_bytes):>9}"
            lines.append(f"{sizes}  {task.row.name}")
    fit = [task for task in tasks if task.state != FAILED]
    seconds, missing = sum(task.seconds for task in fit), sum(task.missing for task in fit)
    measured = all(task.measured or not task.missing for task in fit)
    basis = "as finished clips took" if measured else "on H200s, where no clip tells yet"
    disk = _gib(sum(task.disk_bytes for task in fit))
    lines.append(
        f"{counted(len(fit), 'chain')} with {counted(sum(task.clips for task in fit), 'clip')}, {missing} to make: "
        f"about {seconds / 3600:.1f} GPU hours of sampling ({basis}) and {disk} of disk"
    )
    if gpus > 1 and seconds:
        lines.append(f"about {span(seconds / gpus)} on {gpus} GPUs")
    if bad:
        lines.append(f"{counted(len(bad), 'row')} left out, which cannot be made")
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**29 else f"{size / 2**20:.0f} MiB"


def _count(tasks: Sequence[Task], state: str) -> int:
    return sum(task.state == state for task in tasks)


def _is_fit(outcome: Mapping[str, Any], gpus: int) -> bool:
    """Whether a worker whose chain was not made is good for another."""
    code = (outcome.get("error") or {}).get("code")
    if code == UPLOAD:  # the chain itself is made
        return True
    # where several processes share a chain, the others may still wait for the first
    return gpus == 1 and code in ("invalid_request", "in_use", "disk_full", "input_output", None)


def _refuse(bad: Sequence[BadRow], settings: Settings) -> None:
    """Say which rows cannot be made. Raises UserError unless they are to be left out."""
    for line in in_lines(bad):
        told.log(logging.WARNING if settings.skip_bad else logging.ERROR, "%s", line)
    if bad and not settings.skip_bad:
        rows, them = ("a row", "it") if len(bad) == 1 else (f"{len(bad)} rows", "them")
        raise UserError(
            f"{rows} of `videos` {settings.videos} cannot be made; nothing was begun (`skip_bad` leaves {them} out)"
        )


def in_lines(bad: Sequence[BadRow]) -> Iterator[str]:
    """A line for each row, or one for many that follow each other and are bad alike, as by a misspelled folder."""
    numbered = enumerate(bad)
    for (reason, _), group in itertools.groupby(numbered, lambda one: (one[1].reason, one[1].number - one[0])):
        alike = [row for _, row in group]
        if len(alike) > MOST_ALIKE:
            yield f"{alike[0].where}, to {alike[-1].where}, {len(alike)} rows: {reason}"
        else:
            yield from map(str, alike)


def _check_report(folder: Path) -> None:
    """Raise UserError where the report cannot be written, or would replace what no batch has made."""
    for name in (PAGE, DATA):
        path = folder / name
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file, and the report needs that name; give `report_dir`")
        if path.exists() and not is_report(path):
            raise UserError(f"{path} would be overwritten, and no batch made it; move it, or give `report_dir`")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`report_dir` {folder} is a file; give a folder")
