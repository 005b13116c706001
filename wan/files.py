"""Files as they are written and named: whole or not at all, with digests, and with names that are text."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from wan.errors import UserError

log = logging.getLogger(__name__)
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows


def file_digest(path: Path) -> str:
    """A short digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def digest_of(data: bytes) -> str:
    """That of a file of these bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def sampled_digest(path: Path) -> str:
    """A short digest of a large file: its size and its first, middle and last MiB."""
    size, block = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as opened:
        for start in (0, size // 2, max(size - block, 0)):
            opened.seek(start)
            digest.update(opened.read(block))
    return digest.hexdigest()[:16]


def fits_windows(name: str) -> bool:
    """Whether a file or a folder of Windows may have this name."""
    return not (name.endswith((".", " ")) or _DEVICE.fullmatch(name) or any(letter in '/\\<>:"|?*' for letter in name))


def numbered(name: str) -> Iterator[str]:
    """The name, then the same with _2, _3 and so on after it, to choose the first that is free."""
    return itertools.chain((name,), (f"{name}_{number}" for number in itertools.count(2)))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file that is there whole or not at all."""
    write_bytes(path, as_json(value))


def write_text(path: Path, text: str) -> None:
    """A text file that is there whole or not at all."""
    write_bytes(path, as_text(text))


def as_json(value: Mapping[str, Any]) -> bytes:
    """What a JSON file holds."""
    return as_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def as_text(text: str) -> bytes:
    """What a text file holds. What of a file's name is no UTF-8 is written as backslashes."""
    return text.encode("utf-8", "backslashreplace")


def write_bytes(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    part = reserve(path)
    try:
        part.write_bytes(data)
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)  # it has its final name


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system knows no such names; whole or not at all."""
    part = reserve(target)
    try:
        part.unlink()
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        publish(part, target)
    finally:
        part.unlink(missing_ok=True)  # it has its final name


def reserve(path: Path) -> Path:
    """Make an empty temporary file beside `path`, of a name that nobody can have put there before."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return part


def publish(part: Path, path: Path) -> None:
    """Give a complete file its name; it is on the disk before that, so that no crash leaves an empty one.

    Raises UserError where the system does not replace a file that is open.
    """
    with part.open("r+b") as opened:  # Windows flushes only what may be written to
        os.fsync(opened.fileno())
    with releasing(path, "write"):
        os.replace(part, path)


@contextmanager
def releasing(path: Path, what: str) -> Iterator[None]:
    """In the block a file is replaced, moved or removed. Raises UserError where the system does not, as it is open."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"cannot {what} {os.fspath(path)!r}: {error.strerror}; close it where it is open, or give another name"
        ) from error


def readable(path: str | Path) -> str:
    """A path as text: bytes of a file's name that are no UTF-8 become backslashes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def say_once(path: str | os.PathLike[str], message: str, level: int = logging.WARNING) -> None:
    """Log one line about a file, the first time that it is said."""
    _say(level, f"{os.fspath(path)!r}: {message}")  # a name may hold a newline or bytes that are no text


@lru_cache(maxsize=1024)
def _say(level: int, line: str) -> None:
    log.log(level, "%s", line)


def unreadable(file: Path, error: BaseException) -> UserError:
    """Why a file of weights cannot be read, told from how it begins."""
    if isinstance(error, PermissionError):
        return UserError(f"{file} may not be read by this user; change its permissions")
    if other := something_else(file):
        return other
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{file} cannot be read, it may be truncated or damaged; download it again ({reason})")


_FORMATS = (  # how files of weights begin
    (re.compile(rb"GGUF"), "GGUF", ".gguf"),
    (re.compile(rb"PK\x03\x04"), "PyTorch", ".pth"),
    (re.compile(rb".{6}\0\0\{\"", re.DOTALL), "safetensors", ".safetensors"),
)


def something_else(file: Path, *, text: bool = False) -> UserError | None:
    """What a file is that was to be downloaded, if that is seen from how it begins; weights are no `text`."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(512)
    except PermissionError:
        return UserError(f"{file} may not be read by this user; change its permissions")
    except OSError:
        return None
    head = begin.strip()
    if head.lower().startswith(b"version https://git-lfs"):
        return UserError(
            f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` there or download it again"
        )
    if head.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return UserError(f"{file} is a web page that was saved under this name; download the file itself")
    if text:
        return None
    others = {suffix for *_, suffix in _FORMATS}  # what .pt and .ckpt hold, they do not say
    for begins, kind, suffix in _FORMATS:
        if begins.match(begin) and file.suffix.lower() in others - {suffix}:
            return UserError(f"{file} is a {kind} file by its contents; give it a name that ends in {suffix}")
    if head and head.isascii() and (words := " ".join(head.decode().split())).isprintable():
        return UserError(f"{file} is a text ({words[:60]!r}) that was saved under this name; download the file itself")
    return None
