"""The files that a run renews, by the digests of what it wrote: what somebody has changed is never replaced."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.chain.finished_clip import REDONE
from wan.chain.run_folder import RunFolder
from wan.files import file_digest

log = logging.getLogger(__name__)


class Written:
    """What such files of a folder may be; `before` is what run.json says of the run so far.

    A run says what a file will be before it gives it that name: one that was killed leaves either that or what was
    there before. Of a run of a release that noted nothing, each file counts as written; where the record was removed,
    none does.
    """

    def __init__(self, folder: RunFolder, before: Mapping[str, Any]) -> None:
        self._folder = folder
        self._knows_all = not before or "written" in before
        self._digests: dict[str, list[str]] = {name: list(some) for name, some in before.get("written", {}).items()}
        self._seen: dict[str, tuple[tuple[int, int], str]] = {}  # as a file was when it was last read

    def as_json(self) -> dict[str, Any]:
        """What run.json says of it: the digests that each file may have."""
        return {"written": dict(self._digests)}  # a preview may come in while this is saved

    def keep(self, name: str) -> str | None:
        """The digest of a file that is there as it was written; one that was changed moves to `redone/`."""
        path = self._folder.path / name
        if not path.exists():
            return None
        digest = self._digest(path)
        if digest in self._digests.get(name, ()) or not (self._knows_all or name in self._digests):
            return digest
        log.warning("%s is not what was written; it moves to %s/", path, REDONE)
        self._folder.set_aside(name)
        return None

    def announce(self, name: str, digest: str) -> None:
        """Note what a file is about to be; it may still be what it is."""
        now = self.keep(name)
        self._digests[name] = [digest] if now in (None, digest) else [digest, str(now)]

    def _digest(self, path: Path) -> str:
        """Of the file as it is, read only where it is another than before."""
        stat = path.stat()
        state = stat.st_size, stat.st_mtime_ns
        if path.name not in self._seen or self._seen[path.name][0] != state:
            self._seen[path.name] = state, file_digest(path)
        return self._seen[path.name][1]
