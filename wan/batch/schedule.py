"""Which chain is made next, by whom, and what becomes of one that failed. Knows neither Ray nor models."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wan.batch.hand import LOST
from wan.batch.rows import Row
from wan.commands.inputs import model_settings
from wan.options import EXPERT_OF_LORA, Settings
from wan.server.tickets import DONE, FAILED, PAUSED
from wan.server.wire import CHECKED

WAITING, MAKING, STOPPED = "waiting", "making", "stopped"
IN_USE_SECONDS = 5.0  # until a folder in which another run is at work is looked at again
LONGEST_WAIT = 60.0  # seconds until a chain that failed is tried again
SLOWER = 4  # times what other clips took by their work: then a worker hangs
_FEWEST = 3  # clips that tell how long one takes


@dataclass
class Task:
    """A row on its way: what is known of its chain, and who makes it."""

    row: Row
    state: str = WAITING
    worker: int | None = None
    clips: int = 0  # that are asked for
    done: int = 0
    missing: int = 0  # when it was checked, as all that follows: see `wan.chain.dry_run.Estimate`
    work: float = 0.0
    seconds: float = 0.0
    measured: bool = False
    disk_bytes: float = 0.0
    finished_before: bool = False
    failures: int = 0  # since its last finished clip
    lost: int = 0  # all of them
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    attention: Sequence[Mapping[str, Any]] = ()
    picture: str | None = None
    video_seconds: float = 0.0
    made: int = 0  # clips by this command, and those before its worker began
    made_before: int = 0
    not_before: float = 0.0
    began: float = 0.0
    elsewhere: bool = False  # another run is at work in its folder
    beside: bool = False  # its worker has another one in hand, too

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for chains whose weights are the same; those of one checkpoint differ in the last part."""
        settings = self.row.settings
        return *model_settings(settings), loras_of(settings)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is done for it."""
        return self.state in (DONE, FAILED, STOPPED, CHECKED)


def loras_of(settings: Settings) -> tuple[tuple[str, ...], ...]:
    """The LoRAs of a chain."""
    return tuple(getattr(settings, name) for name in EXPERT_OF_LORA)


def _names_loras(storyboard: str | None) -> bool:
    """Whether a storyboard's clips may have other LoRAs, as far as its text tells."""
    if storyboard is None:
        return False
    try:
        return "lora" in Path(storyboard).read_text(encoding="utf-8", errors="replace")
    except OSError:  # the check of its row says what is wrong
        return False


class Schedule:
    """The tasks of a batch, or of its checks. `done_of` tells how many clips a chain's folder has, if it is seen."""

    def __init__(
        self,
        tasks: Sequence[Task],
        max_failures: int,
        *,
        done_of: Callable[[Task], int] = lambda task: task.done,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tasks = sorted((task for task in tasks if not task.is_over), key=lambda task: repr(task.key))
        known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for task in self.tasks:  # equal keys are one object, which is told by its id
            task.key = known.setdefault(task.key, task.key)
        # sets of weights with LoRAs, which clips may have of their own
        self.kinds = len(known) + sum(_names_loras(task.row.settings.storyboard) for task in self.tasks)
        self.max_failures, self.done_of, self.now = max_failures, done_of, now
        self._rates: list[float] = []  # seconds a unit of work of clips that were finished

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return all(task.is_over for task in self.tasks)

    def next(self, like: tuple[Any, ...] | None = None, *, beside: bool = False) -> Task | None:
        """The chain to make now, one with the weights `like` those that a worker has if there is one.

        One that has failed is made alone, and not `beside` another: what fails once more is its own fault.
        """
        now = self.now()
        ready = [task for task in self.tasks if task.state == WAITING and task.not_before <= now]
        if beside:
            ready = [task for task in ready if not task.lost]
        if not ready:
            return None
        alike = [task for task in ready if like is not None and task.key == like]
        alike = alike or [task for task in ready if like is not None and task.key[:-1] == like[:-1]]
        if alike:
            return alike[0]
        # not what others are at work on, as long as there is something else
        most = Counter(id(task.key) for task in ready)
        busy = Counter(id(task.key) for task in self.tasks if task.state == MAKING)
        best = max(most, key=lambda key: most[key] / (1 + busy[key]))
        return next(task for task in ready if id(task.key) == best)

    def begin(self, task: Task, worker: int, beside: Task | None = None) -> None:
        """A worker was given it, `beside` one whose files it writes."""
        task.state, task.worker, task.began, task.elsewhere = MAKING, worker, self.now(), False
        task.made_before, task.beside = task.made, beside is not None
        if beside is not None:
            beside.beside = True

    def see(self, task: Task, live: Mapping[str, Any]) -> None:
        """A worker says how far it is."""
        task.made = task.made_before + live["made"]
        self._progress(task, live["done"], live["count"])

    def too_slow(self, task: Task, live: Mapping[str, Any], patience: float) -> str | None:
        """Why its worker is to be replaced, if it is."""
        if live["silent"] > patience:
            return f"its worker said nothing for {live['silent']:.0f} s"
        spent = live["clip_seconds"]
        if spent is None or task.missing == 0 or len(self._rates) < _FEWEST:
            return None
        usual = statistics.median(self._rates) * task.work / task.missing
        if spent > max(patience, SLOWER * usual):
            return f"its worker took {spent:.0f} s for a clip that takes {usual:.0f} s"
        return None

    def end(self, task: Task, result: Mapping[str, Any]) -> None:
        """What its worker made of it."""
        state, error = result["state"], result.get("error") or {}
        if state != CHECKED:
            self.see(task, result)
            if (made := result["made"]) and task.work:
                self._rates.append((self.now() - task.began) / made / (task.work / task.missing))
        for name in ("attention", "picture", "video_seconds"):
            if result.get(name):
                setattr(task, name, result[name])
        task.worker, task.warnings = None, list(result.get("warnings") or task.warnings)
        if state == CHECKED:
            self._take(task, result["found"])
        elif state == DONE:
            task.state, task.reason = DONE, ""
        elif state == PAUSED:
            task.state, task.reason = STOPPED, "the file stop in its folder asked for that"
        elif state == FAILED and error.get("code") == "in_use":
            task.state, task.elsewhere, task.not_before = WAITING, True, self.now() + IN_USE_SECONDS
        elif state == FAILED and error.get("code") == "invalid_request":
            task.state, task.reason = FAILED, str(error["message"])
        elif state in (FAILED, LOST):
            why = result.get("why") if error.get("code") in ("internal", "input_output") else None
            self.fail(task, str(why or error.get("message")), wait=state == FAILED)
        else:  # it was told to leave it
            task.state = WAITING

    def fail(self, task: Task, reason: str, *, wait: bool = False) -> None:
        """It failed with its worker, or `wait`s a little before the next one tries.

        Where its worker had another one in hand, which of them is to blame is not known, and it does not count.
        """
        self._progress(task, max(task.done, self.done_of(task)), task.clips)
        task.worker, task.reason = None, reason
        task.failures, task.lost = task.failures + (wait or not task.beside), task.lost + 1
        task.state = FAILED if task.failures >= self.max_failures else WAITING
        task.not_before = self.now() + (min(2.0**task.failures, LONGEST_WAIT) if wait else 0.0)

    def _progress(self, task: Task, done: int, count: int) -> None:
        if done > task.done:
            task.failures = 0
        task.done, task.clips = max(task.done, done), count or task.clips

    def _take(self, task: Task, estimate: Mapping[str, Any]) -> None:
        """What a check found."""
        task.clips, task.missing = estimate["clips"], estimate["missing"]
        task.work, task.seconds, task.measured = estimate["work"], estimate["seconds"], estimate["measured"]
        task.disk_bytes, task.done = estimate["disk_bytes"], estimate["clips"] - estimate["missing"]
        is_made = estimate["missing"] == 0 and estimate["status"] == "finished"
        task.finished_before = is_made and estimate.get("uploaded", True)
        task.state = DONE if task.finished_before else CHECKED
