"""A finished chain's files to an object store, or to any other place that fsspec knows.

`uploaded.json` beside them names each with its size and digest, and says last that they are all there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from wan.errors import UserError
from wan.files import file_digest
from wan.public import without_login

LIST = "uploaded.json"
# stores without folders; s3fs would create a bucket for one, and with a name that was mistyped, too
_BUCKETS = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "cos", "tos"))


class UploadError(Exception):
    """An upload that failed, in a line. The files here are as they were."""


def check_place(url: str) -> None:
    """Raise UserError for a place that cannot be used from here, before anything is made."""
    try:
        fsspec.core.url_to_fs(url)
    except Exception as error:  # each library's own
        raise UserError(f"`upload` {without_login(url)} cannot be used ({_line(error)})") from error


def is_uploaded(folder: Path, url: str) -> bool:
    """Whether all files of a folder are there, by their names and sizes. Raises UploadError."""
    try:
        place = _Place(url)
        listed = place.list()
        sizes = {name: path.stat().st_size for name, path in _files(folder)}
        is_listed = {name: one["bytes"] for name, one in listed["files"].items()} == sizes
        # a file may have been taken away or cut there since
        return bool(listed["complete"]) and is_listed and all(place.size(name) == sizes[name] for name in sizes)
    except Exception as error:
        raise UploadError(f"the upload to {without_login(url)} cannot be looked at ({_line(error)})") from error


def upload(folder: Path, url: str, heard: Callable[[], None] = lambda: None) -> None:
    """Bring what is not there yet; `heard` is called after each file. Raises UploadError."""
    try:
        place = _Place(url)
        before = place.list()["files"]
        wanted = {name: {"bytes": path.stat().st_size, "digest": file_digest(path)} for name, path in _files(folder)}
        same = {name: one for name, one in before.items() if wanted.get(name) == one}
        whole = {name: one for name, one in same.items() if place.size(name) == one["bytes"]}
        place.say(whole, complete=False)
        for name, path in _files(folder):
            if name in whole:
                continue
            place.put(path, name)
            if (size := place.size(name)) != wanted[name]["bytes"]:
                raise OSError(f"{name} has {size} of {wanted[name]['bytes']} bytes there")
            whole[name] = wanted[name]
            place.say(whole, complete=False)
            heard()
        place.say(whole, complete=True)
    except Exception as error:
        raise UploadError(f"its upload to {without_login(url)} failed ({_line(error)})") from error


class _Place:
    """A folder of a file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.files, self.root = fsspec.core.url_to_fs(url)
        self.files.invalidate_cache()  # others may have been at work there

    def list(self) -> dict[str, Any]:
        """What was uploaded, as the list there says."""
        try:
            listed = json.loads(self.files.cat_file(self._path(LIST)))
        except FileNotFoundError as error:
            if type(error.__cause__).__name__ == "NoSuchBucket":  # of botocore: nothing can be brought there
                raise
            return {"complete": False, "files": {}}
        return {"complete": listed["complete"], "files": listed["files"]}

    def say(self, files: Mapping[str, Any], *, complete: bool) -> None:
        """Write that list."""
        text = json.dumps({"complete": complete, "files": files}, indent=1)
        self._make_folder(self.root)
        self.files.pipe_file(self._path(LIST), text.encode())

    def put(self, path: Path, name: str) -> None:
        """Bring a file there."""
        target = self._path(name)
        self._make_folder(target.rpartition("/")[0])
        self.files.put_file(str(path), target)

    def size(self, name: str) -> int | None:
        """Bytes of a file there, None if it is not."""
        self.files.invalidate_cache()
        try:
            return int(self.files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def _make_folder(self, path: str) -> None:
        names = self.files.protocol
        if _BUCKETS.isdisjoint((names,) if isinstance(names, str) else names):
            self.files.makedirs(path, exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Those of a chain by their names in its folder, without its lock and other hidden ones."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
