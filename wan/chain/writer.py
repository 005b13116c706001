"""A clip goes on disk while the next one is made."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from wan.types import Generation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    number: int
    made: Generation
    done: Future[None]


class ClipWriter:
    """Writes one clip at a time, in order, on a thread of its own; `save` puts one on disk.

    An error of `save` is raised by the `wait` or `check` that follows.
    """

    def __init__(self, save: Callable[[Generation], None]) -> None:
        self._save = save
        self._thread = ThreadPoolExecutor(1, "writer")
        self._pending: _Pending | None = None

    @property
    def number(self) -> int | None:
        """The clip that is being written."""
        return self._pending.number if self._pending else None

    @property
    def made(self) -> Generation | None:
        """What is being written."""
        return self._pending.made if self._pending else None

    def write(self, number: int, made: Generation, then: Callable[[], None]) -> None:
        """Begin to write a clip and call `then` when it is done; the one before is waited for."""
        self.wait()

        def work() -> None:
            self._save(made)
            then()

        # who hears what is said meanwhile can tell of which run it is
        self._pending = _Pending(number, made, self._thread.submit(contextvars.copy_context().run, work))

    def wait(self) -> None:
        """Until what is being written is on disk."""
        if self._pending is not None:
            try:
                self._pending.done.result()
            except Exception:
                self._pending = None
                raise
            self._pending = None

    def check(self) -> None:
        """Raise the error of a clip that could not be written, without waiting for one that still may be."""
        if self._pending is not None and self._pending.done.done():
            self.wait()

    def settle(self) -> str | None:
        """Wait for what is being written when something else went wrong; an error in it is only said."""
        pending = self._pending
        while pending is not None:
            try:
                error = pending.done.exception()
                break
            except KeyboardInterrupt:  # the folder is ours, and locked, until nobody writes to it any more
                log.warning("clip %d is still being written; the run stops after that", pending.number)
        self._pending = None
        return None if pending is None or error is None else f"clip {pending.number} could not be written: {error}"
