"""One way to read what others wrote: of a size, a depth and a shape, or one line that says what is not.

A checkpoint, a folder that was edited by hand and a server are all of unknown origin. JSON is measured before anybody
looks into it: a list in a list in a list would end in Python's own stack, a number of a thousand digits in an overflow.
"""

from __future__ import annotations

import gc
import json
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from wan.errors import UserError
from wan.files import something_else, unreadable

MOST_BYTES = 16 << 20  # of a file, where its reader says nothing else
DEEPEST = 40  # lists and objects in one another
LONGEST_NUMBER = 40  # digits of a whole number; the largest seed has 19

Shape = TypeVar("Shape")


def parse_json(text: str | bytes, source: str) -> Any:
    """The value of a JSON text; `source` names it in the message. Raises UserError."""
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise UserError(f"{source} cannot be read as JSON: it is nested more than {DEEPEST} deep") from error
    except json.JSONDecodeError as error:
        # what has one line may be a line of a file, which is named by who reads that
        line = f"line {error.lineno} " if "\n" in error.doc else ""
        raise UserError(f"{source} cannot be read as JSON: {error.msg}: {line}column {error.colno}") from error
    except ValueError as error:
        raise UserError(f"{source} cannot be read as JSON: {error}") from error
    level, depth = [value], 0
    while level := [one for holder in level if isinstance(holder, dict | list) for one in _items(holder)]:
        depth += 1
        if depth > DEEPEST:
            raise UserError(f"{source} cannot be read as JSON: it is nested more than {DEEPEST} deep")
    return value


def _items(holder: dict[str, Any] | list[Any]) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else holder


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_bytes(path: Path, most: int = MOST_BYTES, advice: str = "remove it, or put the file back") -> bytes:
    """A file's bytes, of which there may be `most`. Raises UserError, also for a pipe, which would never end.

    `advice` is for what is no file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no file; {advice}")
        if status.st_size > most:
            raise UserError(f"{path} is larger than {most >> 20} MiB; is it the right file?")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    content = read_bytes(path, most)
    try:
        value = parse_json(content, str(path))
    except UserError as error:
        raise something_else(path, text=True) or error from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a JSON object, it is a {type(value).__name__}")
    return value


def shards(index: dict[str, Any], path: Path) -> list[str]:
    """The files that the index of a model in shards names, which lie beside it. Raises UserError."""
    names = sorted(set(fit(dict[str, str], index.get("weight_map"), f"weight_map in {path}").values()))
    if odd := next((name for name in names if Path(name).name != name or len(name) > 200), None):
        raise UserError(f"{path} names {odd[:100]!r}, which is no file beside it; download it again")
    if not names:
        raise UserError(f"{path} names no weights; download it again")
    return names


@contextmanager
def parsing(source: str | Path, advice: str) -> Iterator[None]:
    """Around a library that reads foreign bytes, or what was made of their sizes: all that it raises is one line.

    For a file of weights, which is given as a path, that line tells what the file is instead.

    Such libraries document none of their errors, and tokenizers ends in a panic, which is no Exception.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(source, Path):
            raise unreadable(source, error) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{source} cannot be read, it may be truncated or damaged; {advice} ({reason})") from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the cyclic garbage collector, which takes up to a third of the time that making many objects takes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def count_numbered(names: Iterable[str], prefix: str, source: str) -> int:
    """How many modules a list has whose tensors are `prefix` and a number, from 0 without a gap. Raises UserError."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    if odd := numbers - {str(number) for number in range(len(numbers))}:
        name = re.sub(r"[^\w]", "?", min(odd))[:40]
        raise UserError(
            f"{source} is damaged: {prefix}{name} is not one of {len(numbers)} counted from 0; download it again"
        )
    return len(numbers)


def fit(shape: type[Shape], value: Any, source: str) -> Shape:
    """The value as a `shape`, which is anything that pydantic knows. Raises UserError that names the first misfit."""
    from pydantic import ValidationError

    try:
        return cast(Shape, _adapter(cast(Any, shape)).validate_python(value, strict=True))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        fault = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{source}: {place[:100]} is not as it must be ({fault[:200]})") from error


@cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)
