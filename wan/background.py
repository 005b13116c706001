"""Models that a thread loads while another computes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from threading import Thread
from traceback import clear_frames
from typing import Any

from wan.detail import heard_by, tell_detail

LOOKS = 0.2  # seconds between two looks at what a thread is at


class _Coming(Future[Any]):
    """A model that comes in a thread."""

    detail: str | None = None  # what the thread is at

    @property
    def has_failed(self) -> bool:
        return self.done() and self.exception() is not None


class BackgroundLoader:
    """Loads models by name in threads, each for the first who takes it.

    `load` makes the model of a name and is called in a thread. Whoever waits for the model hears what it tells; a model
    that was forgotten meanwhile is loaded no further than that. One that failed may be loaded again.
    """

    def __init__(self, load: Callable[[str], Any]) -> None:
        self._load = load
        self._coming: dict[str, _Coming] = {}

    @contextmanager
    def loading(self, names: Collection[str]) -> Iterator[Callable[[], None]]:
        """Load these, in their order, while the block computes. What the block is given raises what went wrong so far.

        What has begun when the block ends goes on, for whoever wants it next.
        """
        self._coming = {name: one for name, one in self._coming.items() if not one.has_failed}
        coming = {name: _Coming() for name in names if name not in self._coming}
        self._coming |= coming
        Thread(target=self._run, args=(coming,), name="loading", daemon=True).start()
        try:
            yield self._check
        finally:
            for name, one in coming.items():
                if one.cancel() and self._coming.get(name) is one:
                    del self._coming[name]

    def take(self, name: str) -> Any:
        """The model of a name, for which this waits; None where no thread loads it, or where that failed."""
        if (coming := self._coming.get(name)) is None:
            return None
        while not wait([coming], LOOKS).done:
            if coming.detail is not None:
                tell_detail(coming.detail)
        self._coming.pop(name, None)
        return None if coming.has_failed else coming.result()

    def has(self, name: str) -> bool:
        """Whether the model of a name can be taken at once."""
        coming = self._coming.get(name)
        return coming is not None and coming.done() and not coming.has_failed

    def forget(self, name: str) -> None:
        """Load a model no further, or let it go; one that has begun ends at its next shard."""
        if (coming := self._coming.pop(name, None)) is not None:
            coming.cancel()

    def _check(self) -> None:
        for coming in list(self._coming.values()):
            if coming.done():
                coming.result()

    def _run(self, coming: Mapping[str, _Coming]) -> None:
        """What a thread does."""
        for name, one in coming.items():
            if not one.set_running_or_notify_cancel():
                continue
            try:
                one.set_result(self._read(name, one))
            except BaseException as error:  # raised again where the model is used, or by `_check`
                clear_frames(error.__traceback__)  # which hold what was read, and the next try needs that memory
                gc.collect()
                one.set_exception(error)

    def _read(self, name: str, coming: _Coming) -> Any:
        def hear(detail: str | None = None) -> None:
            if self._coming.get(name) is not coming:
                raise CancelledError(f"{name} was forgotten while it came")
            coming.detail = detail

        with heard_by(hear):
            model = self._load(name)
        hear()
        return model
