"""Kinds of settings: how a word of the command line becomes a value, which values there are, and how one is written."""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
from dataclasses import dataclass
from numbers import Integral
from numbers import Real as Number
from pathlib import PureWindowsPath
from typing import Any

from wan.configs import parse_size
from wan.errors import UserError
from wan.files import fits_windows, readable
from wan.public import public_path, public_url, without_login

LARGEST_SEED = 2**63 - 1
MOST_CLIPS = 10_000
MOST_GIB = 4096  # more than a machine has
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.")


class Unfit(Exception):
    """A value that a kind does not take. The message follows the setting's name."""


@dataclass(frozen=True)
class Kind:
    """Text, the plainest kind: how a word of the command line becomes a value, and which values there are."""

    metavar: str | None = None

    @property
    def local(self) -> bool:
        """Whether a value names something of this machine, so that no remote client may choose it."""
        return False

    def read(self, text: str) -> Any:
        """The value that a word means. Raises Unfit."""
        return text

    def check(self, value: Any) -> None:
        """Raise Unfit for a value that is not in range."""
        if any("\ud800" <= char <= "\udfff" for char in str(value)):
            raise Unfit("is not valid UTF-8; set the terminal to UTF-8 or type it again")

    def write(self, value: Any) -> list[str]:
        """The words that mean a value."""
        return [str(value)]

    def public(self, value: Any) -> Any:
        """A value as JSON, for files that may be handed on: without secrets, and without folders of this machine."""
        return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Words(Kind):
    """Text that says something."""

    def check(self, value: Any) -> None:
        super().check(value)
        if not str(value).strip():
            raise Unfit("is empty; write something or leave it out")


@dataclass(frozen=True)
class Name(Words):
    """A name, which is not one of the numbers that clips have anyway."""

    def check(self, value: Any) -> None:
        super().check(value)
        if str(value).isdecimal():
            raise Unfit(f"must not be a number, {value!r} is; write a word")


@dataclass(frozen=True)
class Local(Kind):
    """A path, an address, a device or a command: something that only the owner of the machine may choose."""

    @property
    def local(self) -> bool:
        return True

    def read(self, text: str) -> Any:
        """A shell expands a ~ only at the beginning of a word, so not in SETTING=~/file."""
        return os.path.expanduser(text)

    def check(self, value: Any) -> None:
        """Paths may hold any bytes but zeros."""
        for text in [value] if isinstance(value, str) else value if isinstance(value, tuple) else ():
            longest = max(text.split("/"), key=_bytes)
            if _bytes(longest) > LONGEST_NAME or _bytes(text) > LONGEST_PATH:
                raise Unfit(
                    f"is too long ({longest[:40]!r}...): file systems take names of {LONGEST_NAME} bytes, in "
                    f"paths of {LONGEST_PATH}"
                )
            if "\0" in text:
                raise Unfit("holds a zero byte, which no path has")
            if text.startswith("~") and os.path.expanduser(text) == text:
                raise Unfit(f"{text!r} is of a user that is not there; write ./{text} for a file of that name")

    def public(self, value: Any) -> Any:
        return public_path(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Encoded(Local):
    """A file or a folder with a name in UTF-8: the libraries that read weights open no other."""

    def check(self, value: Any) -> None:
        super().check(value)
        try:
            for text in map(str, value) if isinstance(value, tuple | list) else (str(value),):
                text.encode()
        except UnicodeEncodeError as error:
            raise Unfit(f"{readable(text)} is not valid UTF-8; give another name") from error


@dataclass(frozen=True)
class Output(Encoded):
    """A file or a folder to write, whose name stands in records, in the list for FFmpeg and on the terminal."""

    def check(self, value: Any) -> None:
        super().check(value)
        if os.name != "nt":
            return
        # what follows a colon would go into a stream that no program shows, and what has a device's name to the device
        for part in PureWindowsPath(value).parts[bool(PureWindowsPath(value).anchor) :]:
            if part != ".." and not fits_windows(part):
                raise Unfit(
                    f'has {part[:60]!r} in it, which no file of Windows is called; leave out < > : " | ? *, '
                    "end without a dot or a space, and take no device's name"
                )


@dataclass(frozen=True)
class Picture(Local):
    """A picture file."""


@dataclass(frozen=True)
class PictureFolder(Local):
    """A folder of picture files."""


@dataclass(frozen=True)
class Cut(Picture):
    """A picture file, or True for a shot of text alone."""


FRAMES = "{frames}"


def words_in(command: str) -> list[str]:
    """The words of a command line as this system reads it: on Windows a backslash is a letter like any other."""
    if os.name == "nt":
        return [word.strip('"') for word in shlex.split(command, posix=False)]
    return shlex.split(command)


@dataclass(frozen=True)
class Program(Words):
    """A command line of this machine, in which {frames} stands for a folder of pictures."""

    @property
    def local(self) -> bool:
        return True

    def check(self, value: Any) -> None:
        super().check(value)
        if FRAMES not in value:
            raise Unfit(f"must hold {FRAMES}, for the folder of the pictures: restore.sh {FRAMES}, say")
        try:
            words = words_in(value)
        except ValueError as error:
            raise Unfit(f"cannot be taken apart: {error}") from error
        if FRAMES in words[0] or "\0" in value:
            raise Unfit("must begin with a program, and hold no zero byte")

    def public(self, value: Any) -> Any:
        """Only the program: what it is told may be secret."""
        return value and f"{os.path.basename(words_in(value)[0])} {FRAMES}"


@dataclass(frozen=True)
class Video(Local):
    """A video file."""


@dataclass(frozen=True)
class Address(Local):
    """An http or https address."""

    def check(self, value: Any) -> None:
        if public_url(str(value)) is None:  # which is not quoted: there may be a password in it
            raise Unfit("must begin with http:// or https:// and a host: http://127.0.0.1:8000/v1, say")

    def public(self, value: Any) -> Any:
        return value and public_url(value)


@dataclass(frozen=True)
class Place(Local):
    """A folder of a store that fsspec knows."""

    def check(self, value: Any) -> None:
        if not _SCHEME.match(str(value)):
            raise Unfit("must begin with a scheme: s3://bucket/runs/{name} or file:///mnt/runs/{name}, say")
        super().check(value)

    def public(self, value: Any) -> Any:
        return value and without_login(value)


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names."""

    names: tuple[str, ...] = ()

    def check(self, value: Any) -> None:
        if value not in self.names:
            close = difflib.get_close_matches(str(value)[:40], self.names, 1, cutoff=0.5)
            advice = f"; did you mean {close[0]}?" if close else ""
            raise Unfit(f"must be one of {', '.join(self.names)}; {value!r} is not{advice}")


def _check_whole(value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise Unfit(f"must be a whole number, {value!r} is not")


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def _are_two_numbers(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `low` to `high`, of which `reason` says why there are no more."""

    low: int = 1
    high: int = MOST_CLIPS
    reason: str = ""

    def read(self, text: str) -> int:
        try:
            return int(text)
        except ValueError as error:
            raise Unfit(f"must be a whole number, {text[:40]!r} is not") from error

    def check(self, value: Any) -> None:
        _check_whole(value)
        if value < self.low:
            raise Unfit(f"must be at least {self.low}, {value} is not")
        if value > self.high:
            raise Unfit(f"must be at most {self.high}, {value} is not{self.reason}")


@dataclass(frozen=True)
class Seed(Whole):
    """A seed; a negative one draws another."""

    def check(self, value: Any) -> None:
        _check_whole(value)
        if value > LARGEST_SEED:
            raise Unfit(f"{value} is too large; the largest seed is 2**63-1")


@dataclass(frozen=True)
class SeedOfClip(Seed):
    """A seed that is no draw."""

    low: int = 0
    high: int = LARGEST_SEED

    def check(self, value: Any) -> None:
        super().check(value)
        if value < 0:
            raise Unfit(f"must be a whole number from 0 to 2**63-1, {value} is not")


@dataclass(frozen=True)
class Frames(Whole):
    """Frames of a clip: 4n+1."""

    fewest_in_chain: int = 5  # with one frame a clip would only repeat the one before

    def check(self, value: Any) -> None:
        super().check(value)
        if (value - 1) % 4:
            low = (value - 1) // 4 * 4 + 1
            raise Unfit(f"must be 4n+1: {value} is not, {low} and {low + 4} are")


@dataclass(frozen=True)
class Among(Whole):
    """One of some whole numbers."""

    numbers: tuple[int, ...] = ()

    def check(self, value: Any) -> None:
        _check_whole(value)
        if value not in self.numbers:
            *most, last = map(str, self.numbers)
            raise Unfit(f"must be {', '.join(most)} or {last}; {value} is not")


@dataclass(frozen=True)
class Real(Kind):
    """A number from `low` to `high`; `reason` says why not more, and `above` leaves `low` itself out."""

    low: float = 0
    high: float = 1
    reason: str = ""
    above: bool = False

    def read(self, text: str) -> float:
        try:
            return float(text)
        except ValueError as error:
            raise Unfit(f"must be a number, {text[:40]!r} is not") from error

    def check(self, value: Any) -> None:
        if self.above and not (_is_number(value) and math.isfinite(value) and value > self.low):
            raise Unfit(f"must be a positive number, {value} is not")
        if not (_is_number(value) and self.low <= value <= self.high):
            raise Unfit(f"must be from {self.low:g} to {self.high:g}, {value} is not{self.reason}")


@dataclass(frozen=True)
class Strength(Real):
    """How much of something, from `low` for none. Its flag alone, or `true` in a list, means `unsaid`; `false` none."""

    unsaid: float = 1.0


@dataclass(frozen=True)
class Switch(Kind):
    """On when its flag is there."""

    def check(self, value: Any) -> None:
        if not isinstance(value, bool):
            raise Unfit(f"must be true or false, {value!r} is not")


@dataclass(frozen=True)
class YesNo(Switch):
    """Wan2.2's str2bool."""

    def read(self, text: str) -> bool:
        if text.lower() in ("yes", "true", "t", "y", "1"):
            return True
        if text.lower() in ("no", "false", "f", "n", "0"):
            return False
        raise Unfit(f"must be true or false, {text[:40]!r} is not")


@dataclass(frozen=True)
class Size(Kind):
    """width*height in pixels; which sizes there are, the model says."""

    def check(self, value: Any) -> None:
        try:
            parse_size(value)
        except UserError as error:
            raise Unfit(str(error).removeprefix("size ")) from error


@dataclass(frozen=True)
class Gib(Kind):
    """GiB of memory, or "auto"."""

    def read(self, text: str) -> float | str:
        try:
            return text if text == "auto" else float(text)
        except ValueError as error:
            raise self._unfit(text) from error

    def check(self, value: Any) -> None:
        if value != "auto" and not (_is_number(value) and 1 <= value <= MOST_GIB):
            raise self._unfit(value)

    def _unfit(self, value: Any) -> Unfit:
        advice = f"must be auto or a number of GiB from 1 to {MOST_GIB}, for instance 12"
        return Unfit(f"{advice}; {str(value)[:40]!r} is not")

    def write(self, value: Any) -> list[str]:
        return [value if isinstance(value, str) else f"{value:g}"]


@dataclass(frozen=True)
class Count(Whole):
    """A whole number, or "auto"."""

    high: int = 4096
    reason: str = "; no machine has more"

    def read(self, text: str) -> Any:
        try:
            return text if text == "auto" else int(text)
        except ValueError as error:
            raise Unfit(f"must be a whole number or auto, {text[:40]!r} is not") from error

    def check(self, value: Any) -> None:
        if value != "auto":
            super().check(value)


@dataclass(frozen=True)
class Guidance(Kind):
    """(low noise, high noise), written LOW,HIGH or as one number for both, up to `high` of either sign."""

    high: float = 1000
    reason: str = "; of the picture nothing is left by then"

    def read(self, text: str) -> tuple[float, float]:
        try:
            scales = [float(part) for part in text.split(",")]
        except ValueError:
            scales = []
        if len(scales) not in (1, 2):
            raise Unfit(f"must be one number or LOW,HIGH, {text[:40]!r} is not")
        return scales[0], scales[-1]

    def check(self, value: Any) -> None:
        if not _are_two_numbers(value):
            raise Unfit(f"must be two numbers, of low and of high noise; {value!r} is not")
        if not all(math.isfinite(scale) for scale in value):
            raise Unfit(f"must be finite, {','.join(f'{scale:g}' for scale in value)} is not")
        if any(abs(scale) > self.high for scale in value):
            shown = ",".join(f"{scale:g}" for scale in value)
            raise Unfit(f"must be from -{self.high:g} to {self.high:g}, {shown} is not{self.reason}")

    def write(self, value: Any) -> list[str]:
        return [",".join(repr(scale) for scale in value)]


@dataclass(frozen=True)
class Interval(Kind):
    """The lowest and the highest sigma."""

    def check(self, value: Any) -> None:
        if not _are_two_numbers(value):
            raise Unfit(f"must be two sigmas, {value!r} is not")
        low, high = value
        if not 0 <= low < high <= 1:
            raise Unfit(f"must be two sigmas 0 <= LOW < HIGH <= 1, {low:g} {high:g} are not")

    def write(self, value: Any) -> list[str]:
        return [repr(sigma) for sigma in value]


def _check_once(pairs: Any) -> None:
    """Raise Unfit unless the first of each pair is the number of a clip, and none is there twice."""
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise Unfit("must be pairs that begin with the number of a clip")
    numbers = [number for number, _ in pairs]
    for number in numbers:
        Whole().check(number)
        if numbers.count(number) > 1:
            raise Unfit(f"{number} is there twice; leave one of them out")


@dataclass(frozen=True)
class PromptFor(Kind):
    """Pairs of a clip's number and its prompt, each in two words."""

    def read(self, text: Any) -> tuple[tuple[int, str], ...]:
        return tuple((Whole().read(number), prompt) for number, prompt in text)

    def check(self, value: Any) -> None:
        _check_once(value)
        for _, prompt in value:
            Words().check(prompt)

    def write(self, value: Any) -> list[str]:
        return [str(one) for one in value]

    def public(self, value: Any) -> Any:
        return [list(pair) for pair in value]


@dataclass(frozen=True)
class TakeOf(Kind):
    """Pairs of a clip's number and that of one of its takes, each written K=N."""

    def read(self, text: Any) -> tuple[tuple[int, int], ...]:
        takes = []
        for word in text:
            number, equals, take = word.partition("=")
            if not equals:
                raise Unfit(f"must be K=N, clip and take; {word[:40]!r} is not")
            takes.append((Whole().read(number), Whole().read(take)))
        return tuple(takes)

    def check(self, value: Any) -> None:
        _check_once(value)
        for _, take in value:
            Whole().check(take)

    def write(self, value: Any) -> list[str]:
        return [f"{number}={take}" for number, take in value]

    def public(self, value: Any) -> Any:
        return [list(pair) for pair in value]


@dataclass(frozen=True)
class Files(Encoded):
    """Files, each PATH or PATH:STRENGTH."""

    def write(self, value: Any) -> list[str]:
        return list(value)

    def public(self, value: Any) -> Any:
        return [public_path(file) for file in value]


_ON_OFF = {"true": True, "on": True, "false": False, "off": False}


def read_plain(kind: Kind, value: Any) -> Any:
    """What a value means as JSON, a form or a cell of a table writes it. Raises Unfit."""
    is_text = type(kind) is Kind or (isinstance(kind, Words | Local | Size) and not isinstance(kind, Files))
    if isinstance(value, str):
        if isinstance(kind, Size):
            value = value.replace("x", "*")
        if isinstance(kind, Interval):
            value = tuple(Real().read(word) for word in value.replace(",", " ").split())
        elif isinstance(kind, Switch) or (isinstance(kind, Strength) and value.lower() in _ON_OFF):
            value = _ON_OFF.get(value.lower(), value)
        elif isinstance(kind, TakeOf):
            value = kind.read(value.split())
        elif isinstance(kind, PromptFor):
            raise Unfit("must be pairs of a clip and its prompt")
        elif isinstance(kind, Files):
            value = (value,)
        elif type(kind) is not Kind:
            value = kind.read(value)
    elif isinstance(value, dict) or is_text:
        raise Unfit("must be text" if is_text else "must be a plain value")
    elif isinstance(kind, Files) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise Unfit("must be texts")
    elif isinstance(value, list):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    elif isinstance(kind, Guidance) and _is_number(value):
        value = (value, value)
    if isinstance(kind, Strength) and isinstance(value, bool):
        value = kind.unsaid if value else kind.low
    try:
        kind.check(value)
    except OverflowError as error:  # a whole number of JSON that no float holds
        raise Unfit(f"cannot be as large as {str(value)[:40]}…") from error
    return value


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
