"""What a batch says while it works: a line a worker and the throughput on a terminal, a line now and then off one."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from tqdm.utils import disp_len

from wan.batch.schedule import Task
from wan.commands.lines import PROGRESS
from wan.commands.progress import counted
from wan.detail import span
from wan.server.live import SAMPLE

told = logging.getLogger(PROGRESS)

MOST_LINES = 32  # of workers on a terminal
LINE_SECONDS = 60.0  # from one line to the next off a terminal
_COLUMNS = 80  # of a terminal that does not say
_SHORTEST = 12  # columns of a name


class Table:
    """The tasks of a batch, or of its checks, while they are worked on."""

    def __init__(self, title: str, tasks: Sequence[Task], quiet: bool) -> None:
        self.title, self.tasks = title, tasks
        self.drawn = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bars: list[tqdm[Any]] = []
        self._began = self._shown_at = time.monotonic()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars:
            bar.close()

    def show(self, lives: Mapping[int, tuple[Task, Mapping[str, Any]]]) -> None:
        """How things stand: what each worker is at, by its number."""
        if not self.drawn:
            if self.title == "make" and time.monotonic() - self._shown_at >= LINE_SECONDS:
                self._shown_at = time.monotonic()
                told.info(self.summary())
            return
        columns = _columns()
        lines = [line_of(worker, *live, columns=columns) for worker, live in sorted(lives.items())[:MOST_LINES]]
        if len(lives) > MOST_LINES:
            lines.append(f"and {len(lives) - MOST_LINES} more workers")
        lines.append(self.summary())
        for place in range(max(len(lines), len(self._bars))):
            if place == len(self._bars):
                bars: dict[str, Any] = {"bar_format": "{desc}", "dynamic_ncols": True, "leave": False}
                self._bars.append(tqdm(position=place, file=sys.stderr, **bars))
            self._bars[place].set_description_str(lines[place] if place < len(lines) else "")

    def summary(self) -> str:
        """The whole in one line, with the throughput of this command."""
        over = sum(task.is_over for task in self.tasks)
        if self.title == "check":
            return f"checked {over} of {len(self.tasks)} rows"
        made, missing = sum(task.made for task in self.tasks), sum(task.missing for task in self.tasks)
        line = f"{over} of {len(self.tasks)} chains, {made} of {missing} clips"
        seconds = time.monotonic() - self._began
        if made and seconds:
            rest = max(0, missing - made)
            line += f", {3600 * made / seconds:.1f} clips an hour, about {span(rest * seconds / made)} left"
        if elsewhere := sum(task.elsewhere for task in self.tasks):
            line += f", {counted(elsewhere, 'chain')} made by another run"
        return line


def line_of(worker: int, task: Task, live: Mapping[str, Any], columns: int = _COLUMNS) -> str:
    """A worker's line, in which a long name leaves room for how far it is."""
    line = ""
    if live.get("clip"):
        line += f", clip {live['clip']}/{live['count'] or task.clips} {live['stage']}"
        if live["steps"] and live["stage"] == SAMPLE:
            line += f" {live['step']}/{live['steps']}"
        if live["seconds_left"] is not None:
            line += f", {span(live['seconds_left'])} left"
    begin = f"worker {worker}: "
    return begin + shorten(task.row.name, max(_SHORTEST, columns - 1 - disp_len(begin + line))) + line


def shorten(text: str, columns: int) -> str:
    """A text of one line, cut in its middle if it takes more columns."""
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while disp_len(f"{head}…{tail}") > columns and disp_len(text) > columns:
        head, tail = (head[:-1], tail) if len(head) >= len(tail) else (head, tail[1:])
    return text if len(head) + len(tail) == len(text) else f"{head}…{tail}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except (OSError, ValueError):  # a stand-in for stderr, which has no size
        return _COLUMNS
