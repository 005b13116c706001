"""The lock of a run's folder: of the system, so that it goes with the process."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import FileLock, Timeout

from wan.errors import InUse, UserError

LOCK = ".lock"  # an empty file that stays
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # of file systems that know none


class FolderLock:
    """Keeps other runs out of a folder that is there, while it is held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(
            folder / LOCK,
            fallback_to_soft=False,  # a file in the place of a lock would outlast a kill
            thread_local=False,  # the thread that opens the folder may not be the one that closes it
        )

    def acquire(self) -> None:
        """Raise InUse where another run holds it, and UserError where the folder cannot be locked."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise InUse(f"{self.folder} is in use by another run; wait for it, or give another folder") from error
        except OSError as error:
            reason = error.strerror or error
            # where files can be written, and only locks are missing
            without = ", or `no_lock` if no other run uses it" if error.errno in _NO_LOCKS else ""
            raise UserError(f"{self.folder} cannot be locked ({reason}); give another folder{without}") from error

    def release(self) -> None:
        """Let other runs in."""
        self._lock.release()
