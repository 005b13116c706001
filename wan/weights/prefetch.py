"""Files that are about to be mapped, read before: a disk brings single pages at half of its speed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from wan.device.host import host_free_bytes

CHUNK = 8 * 2**20
READERS = 4  # a disk that is far away, as of a rented machine, gives its rate to several requests at a time


class ReadAhead:
    """Brings files into the system's cache in the background, in their order, for as long as the `with` block lasts.

    `distance`: how many files it may be ahead of the one that `begin` named last, so that what is read and not used
    yet never fills a host's memory.
    """

    def __init__(self, files: Sequence[Path], distance: int = 1) -> None:
        self.files = files
        self.distance = distance
        self.over = False
        self._last = distance  # the number of the last file that may be read
        self._turn = threading.Condition()
        self.threads = [threading.Thread(target=self._read, args=(n,), daemon=True) for n in range(READERS)]

    def begin(self, number: int) -> None:
        """Say that the file of this number, counted from 0, is in use now."""
        with self._turn:
            self._last = max(self._last, number + self.distance)
            self._turn.notify_all()

    def start(self) -> None:
        """Begin to read."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Read no more; what is being read ends by itself."""
        with self._turn:
            self.over = True
            self._turn.notify_all()

    def __enter__(self) -> ReadAhead:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        for thread in self.threads:
            thread.join()

    def _read(self, first: int) -> None:
        """Every so many chunks of each file, from this one."""
        buffer = bytearray(CHUNK)
        for number, path in enumerate(self.files):
            with self._turn:
                self._turn.wait_for(lambda number=number: self.over or number <= self._last)  # type: ignore[misc]
            if self.over:
                return
            # a file that cannot be read is for those to report who need what is in it
            with suppress(OSError), path.open("rb", buffering=0) as file:
                at = first * CHUNK
                while not self.over and file.seek(at) == at and file.readinto(buffer):
                    at += READERS * CHUNK


def that_fit(files: Iterable[Path], limit: int | None = None) -> list[Path]:
    """The first files that together take at most half of what is free of the host's memory, and of a limit in bytes.

    The other half is for the models that are made of them.
    """
    free = host_free_bytes() if limit is None else min(limit, host_free_bytes())
    fitting, size = [], 0
    for file in files:
        try:
            size += file.stat().st_size
        except OSError:  # for those to report who need it
            continue
        if size > free / 2:
            break
        fitting.append(file)
    return fitting
