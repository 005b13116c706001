"""Host memory that processes of one machine have in common, so that weights are there once and not once a process."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from wan.detail import tell_detail
from wan.device.parallel import Group
from wan.files import write_json
from wan.settings import LoraFile
from wan.version import __version__

log = logging.getLogger(__name__)
_TELLS = 5.0  # seconds between two words of one who waits


class SharedMemory:
    """Some bytes that the processes of a team on a machine map together; the first of them fills it, see `done`.

    It has no name and no file: it is gone when the last process that maps it has let go. All may change it alike
    later. Where it cannot be had (not on Linux, or processes that do not see each other) `memory` is None in all.
    """

    def __init__(self, machine: Group) -> None:
        self.machine = machine
        self.memory: Tensor | None = None
        self.fills = machine.index == 0

    def open(self, size: int) -> None:
        """Have so many bytes; all of them call it."""
        handle = os.memfd_create("wan") if self.fills and hasattr(os, "memfd_create") else -1
        pid, number = self.machine.gather(torch.tensor([os.getpid(), handle]))[0].tolist()
        try:
            if number >= 0:
                path = f"/proc/{pid}/fd/{number}"
                if self.fills:
                    os.ftruncate(handle, size)
                # none of its bytes is taken until it is written
                self.memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError):  # of another container, for instance; all of them ask below
            self.memory = None
        finally:
            everyone = self.agree(self.memory is not None)
            if handle >= 0:
                os.close(handle)
        if not everyone:
            self.memory = None

    def agree(self, answer: bool) -> bool:
        """Whether all processes answer yes. None goes on before all have answered."""
        return all(bool(one) for one in self.machine.gather(torch.tensor([answer])))

    def done(self) -> None:
        """Wait until the first process has filled it."""
        self.agree(True)


class CommonMemory:
    """Some bytes that processes of this user and machine map together, by a name that says all of what is in them.

    They need not know of each other. Who comes first fills the bytes and calls `done`, and the others wait until then;
    nobody changes them after that. They have no file and are gone when the last process that maps them has let go.
    Where they cannot be had (not on Linux, or processes that do not see each other) `memory` is None, and each process
    has its own.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.memory: Tensor | None = None
        self.fills = True
        self._lock: FileLock | None = None

    def open(self, size: int) -> None:
        """Have so many bytes. Waits while another process fills them."""
        home = _home()
        if home is None:
            return
        self._note = home / f"{self.name}.json"  # which processes have it open
        self._lock = FileLock(home / f"{self.name}.lock", fallback_to_soft=False, thread_local=False)
        try:
            _wait_for(self._lock)
        except OSError as error:  # no locks in that place
            log.warning("%s cannot be locked (%s), so this process holds its weights by itself", home, error)
            return
        try:
            handle = self._opened(size)
            self.fills = handle is None
            if handle is None:
                handle = os.memfd_create("wan")
                os.ftruncate(handle, size)
            self.memory, self._mine = _mapped(handle, size), _facts(handle)
        except (OSError, ValueError) as error:
            log.warning("no memory in common with other processes (%s): this one holds its weights by itself", error)
            self.memory, self.fills = None, True
            self.close()
            return
        if not self.fills:
            self.done()

    @property
    def is_visible(self) -> bool:
        """Whether it is there, and other processes can open it."""
        return self.memory is not None and _is_open(*self._mine)

    def done(self) -> None:
        """Let the other processes have what is in it."""
        if self.memory is not None and self._lock is not None and self._lock.is_locked:
            with suppress(OSError):  # that disk is full, and then others read it for themselves
                write_json(self._note, {"open": [*self._others(), self._mine]})
        self.close()

    def close(self) -> None:
        """Let another process fill it, if this one has not."""
        if self._lock is not None:
            self._lock.release()

    def _others(self) -> list[Sequence[int]]:
        """The processes that have it open, and where."""
        try:
            noted = json.loads(self._note.read_text(encoding="ascii"))["open"]
            return [one for one in noted if _is_open(*one)]
        except (OSError, ValueError, TypeError, KeyError):  # nobody has written one, or a machine stopped amid it
            return []

    def _opened(self, size: int) -> int | None:
        """A handle of it, by way of a process that has it open."""
        for pid, number, *file in self._others():
            with suppress(OSError):  # it has just ended
                handle = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
                seen = os.fstat(handle)  # the number may have become another file's
                if [seen.st_dev, seen.st_ino] == file and seen.st_size == size:
                    return handle
                os.close(handle)
        return None


@dataclass(frozen=True)
class CommonLayers:
    """Which models have their layers in common with other processes of this machine: those of which all is the same.

    `files` are those of each model, by name, and `numbers` is what becomes of theirs, as JSON.
    """

    files: Mapping[str, Sequence[Path]]
    numbers: Any

    def memory(self, name: str, loras: Iterable[LoraFile]) -> CommonMemory:
        """Where those of a model with these LoRAs lie."""
        states = [*map(_state_of, self.files[name]), *((_state_of(one.path), one.strength) for one in loras)]
        code = [__version__, sys.prefix]  # libraries say in which order parameters lie
        facts = json.dumps([_space(), code, name, self.numbers, states])
        return CommonMemory(hashlib.sha256(facts.encode()).hexdigest()[:32])


def sharers(asked: int, why_not: str = "") -> int:
    """How many processes hold the layers of models in common: as many as asked, or 1 where they cannot.

    `why_not` is a reason that their weights have.
    """
    if asked == 1:
        return 1
    if not why_not:
        with closing(CommonMemory("probe")) as probe:
            probe.open(mmap.PAGESIZE)
            if probe.is_visible:
                return asked
        why_not = "this machine does not do it"
    log.warning("`share_weights`: this process holds its weights by itself, for %s", why_not)
    return 1


def _state_of(file: Path) -> tuple[str, int, int, int, int]:
    """What tells a file from what it was and from others; a container may have another one in the same place."""
    seen = file.stat()
    return str(file.resolve()), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def _space() -> tuple[str, int]:
    """What tells processes that see each other from those of other machines and containers, which may see the notes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # then nobody sees another one's memory
        return "", os.getpid()


def _wait_for(lock: FileLock) -> None:
    """Keep other processes out; waits while one of them fills what they have in common."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        while not lock.is_locked:
            tell_detail("another process is reading it")  # again and again: who is silent is taken for dead
            with suppress(Timeout):
                lock.acquire(timeout=_TELLS)


def _home() -> Path | None:
    """A folder of this user alone for notes; None where there can be none, or no memory without a file."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        user = os.stat("/proc/self").st_uid
        folder = Path(tempfile.gettempdir()) / f"wan-{user}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        seen = folder.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(seen.st_mode) and seen.st_uid == user and not seen.st_mode & 0o077
    return folder if is_ours else None


def _mapped(handle: int, size: int) -> Tensor:
    """What a handle is of; it stays open, for other processes, while the memory is in use."""
    pages = mmap.mmap(handle, size)
    weakref.finalize(pages, os.close, handle).atexit = False
    return torch.frombuffer(pages, dtype=torch.uint8)


def _facts(handle: int) -> tuple[int, int, int, int]:
    """Process and handle, and what tells it from another that gets these numbers later."""
    seen = os.fstat(handle)
    return os.getpid(), handle, seen.st_dev, seen.st_ino


def _is_open(pid: int, number: int, device: int, inode: int) -> bool:
    try:
        seen = os.stat(f"/proc/{pid}/fd/{number}")
    except OSError:
        return False
    return (seen.st_dev, seen.st_ino) == (device, inode)
