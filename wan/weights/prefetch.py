"""Files that are about to be mapped, read before: a disk brings single pages at half of its speed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

CHUNK = 8 * 2**20


class ReadAhead:
    """Brings files into the system's cache in the background, in their order, for as long as the `with` block lasts.

    `distance`: how many files it may be ahead of the one that `begin` named last, so that what is read and not used
    yet never fills a host's memory.
    """

    def __init__(self, files: Sequence[Path], distance: int = 1) -> None:
        self.files = files
        self.allowed = threading.Semaphore(1 + distance)
        self.begun = 0
        self.over = False
        self.thread = threading.Thread(target=self._read, daemon=True)

    def begin(self, number: int) -> None:
        """Say that the file of this number, counted from 0, is in use now."""
        for _ in range(self.begun, number):
            self.allowed.release()
        self.begun = max(self.begun, number)

    def __enter__(self) -> ReadAhead:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over = True
        self.allowed.release()
        self.thread.join()

    def _read(self) -> None:
        buffer = bytearray(CHUNK)
        for path in self.files:
            self.allowed.acquire()
            if self.over:
                return
            # a file that cannot be read is for those to report who need what is in it
            with suppress(OSError), path.open("rb", buffering=0) as file:
                while not self.over and file.readinto(buffer):
                    pass
