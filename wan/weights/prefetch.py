"""Files that are about to be mapped, read before: a disk brings single pages at half of its speed.

As a program of its own (`ReadingProcess`) it needs Python alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

PACKAGES = ("torch", "transformers", "diffusers", "sympy", "triton")  # that a command imports, in about that order
CODE = (".py", ".pyc")
HEAD_START = 5.0  # seconds; about 3 were enough where files came at 1.5 GB/s
SMALL_READERS = 16  # of files of some kB, each of which waits for the disk twice
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


class ReadingProcess:
    """Brings code that is to be imported, and then files, into the system's cache, from now until `stop`.

    It is a process of its own: threads would wait for Python's lock after each piece, which an import gives up every
    5 ms. Code has a head start, since a disk that is busy with weights lets thousands of small files wait; where it
    takes long, as on a hard disk, the weights come beside it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        packages = [] if "torch" in sys.modules else _folders(PACKAGES)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the command, which stops this
        )
        assert self._process.stdin is not None
        order = {"packages": packages, "files": [str(file.absolute()) for file in files]}
        with suppress(OSError):  # it has ended, and said why
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """Read no more."""
        self._process.kill()  # it would not hear of the end of its input where a fork of this process has that, too
        self._process.communicate()


def _folders(packages: Iterable[str]) -> list[str]:
    """Where packages are that are installed; they are not imported."""
    specs = map(find_spec, packages)
    return [folder for spec in specs if spec is not None for folder in spec.submodule_search_locations or ()]


def _read_code(folders: Iterable[str]) -> None:
    """Read the code of packages, which an import reads in small pieces."""
    with ThreadPoolExecutor(SMALL_READERS) as pool:
        for folder in folders:
            for at, _, names in os.walk(folder):
                for name in names:
                    if name.endswith(CODE):
                        pool.submit(Path(at, name).read_bytes)  # one that cannot be read is for the import to report


def _follow(order: str) -> None:
    """What the process does."""
    wanted = json.loads(order)
    code = threading.Thread(target=_read_code, args=(wanted["packages"],), daemon=True)
    code.start()
    code.join(HEAD_START)
    files = [Path(file) for file in wanted["files"]]
    ReadAhead(files, len(files)).start()


def that_fit(files: Iterable[Path], limit: int | None = None) -> list[Path]:
    """The first files that together take at most half of what is free of the host's memory, and of a limit in bytes.

    The other half is for the models that are made of them.
    """
    from wan.device.host import host_free_bytes

    free = host_free_bytes() if limit is None else min(limit, host_free_bytes())
    chosen, size = [], 0
    for file in files:
        try:
            size += file.stat().st_size
        except OSError:  # for those to report who need it
            continue
        if size > free / 2:
            break
        chosen.append(file)
    return chosen


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows Ctrl-C is for all processes of a console
    if order := sys.stdin.readline():  # else whoever started this has ended before it could say anything
        threading.Thread(target=_follow, args=(order,), daemon=True).start()
    sys.stdin.read()  # ends with whoever started this
    os._exit(0)
