"""How a person leads a chain while it runs: files in its folder, a signal, a look at each clip."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from wan.chain.run_folder import PAUSE, STOP
from wan.commands.lines import PROGRESS
from wan.errors import UserError

log = logging.getLogger(PROGRESS)

Answer: TypeAlias = "Literal['yes', 'again', 'edit', 'stop']"
_ANSWERS: tuple[Answer, ...] = ("yes", "again", "edit", "stop")
_LOOK = 0.5  # seconds from one look at the files to the next, in a pause


class Steering:
    """What a run is asked between two clips: to stop, by a file, SIGUSR1 or `stop`, or to wait, by a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stop = threading.Event()

    def check(self) -> None:
        """Raise UserError for a file that would stop the run before it has begun."""
        if (file := self.folder / STOP).exists():
            raise UserError(f"{file} asks a run to stop; remove it to go on")

    def stop(self) -> None:
        """Stop after the clip that is being made."""
        self._stop.set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGUSR1, where there is such a signal, stops the run after the clip that is being made."""
        number = getattr(signal, "SIGUSR1", None)
        if number is None or threading.current_thread() is not threading.main_thread():  # only that one gets signals
            yield
            return

        def heard(*_: object) -> None:
            self.stop()
            log.info("stopping after this clip")

        before = signal.signal(number, heard)
        try:
            yield
        finally:
            # a run may end in another thread; the handler of the next one in this process then takes this one's place
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, before)

    def goes_on(self) -> bool:
        """Whether to make another clip; in a pause it waits. The file that stops a run is removed."""
        paused = self.folder / PAUSE
        if paused.exists() and not self._stops():
            log.info("paused; remove %s to go on", paused)
            while paused.exists() and not self._stops():
                time.sleep(_LOOK)
            log.info("going on")
        if not self._stops():
            return True
        (self.folder / STOP).unlink(missing_ok=True)
        return False

    def _stops(self) -> bool:
        return self._stop.is_set() or (self.folder / STOP).is_file()


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def ask(question: str) -> str | None:
    """The answer of a person, None where nobody can give one any more."""
    print(question, end=" ", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    return answer.strip() if answer else None


def confirm(question: str) -> bool:
    """Whether a person says yes."""
    return (ask(f"{question} [y/N]") or "").lower() in ("y", "yes")


def review(title: str) -> Answer:
    """What is to become of a clip that was shown; asked until the answer is one."""
    while True:
        reply = ask(f"{title}: yes, again, edit the prompt, stop? [y/a/e/s]")
        if reply is None:
            return "stop"
        for answer in _ANSWERS:
            if reply and answer.startswith(reply.lower()):
                return answer
