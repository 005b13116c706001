"""Where the lines of a command go: to stderr beside the bars, and to a log file. Needs neither PyTorch nor tqdm."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from wan.errors import UserError, spell
from wan.options import Settings

PROGRESS = "wan.commands.progress"  # the logger of what a command says while it works
STAGE, CLIP = logging.DEBUG, logging.INFO  # its levels: lines of a stage, and those of a clip
_NO_LOGS = (".mp4", ".json", ".safetensors", ".html", ".webp")  # a command writes such files itself
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


class Lines(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 takes none
    """Log lines on stderr, with settings spelled as flags, that do not land in a bar's line."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(InFlags())

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:  # it was closed before we began
            return
        if (tqdm := sys.modules.get("tqdm")) is None:
            super().emit(record)
        else:
            tqdm.tqdm.write(self.format(record), file=sys.stderr)


class InFlags(logging.Formatter):
    """Settings as flags, after the time if that is wanted; only warnings and errors say what they are."""

    def __init__(self, *, timed: bool = False) -> None:
        super().__init__()
        self.timed = timed

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno > CLIP else ""
        time = f"{self.formatTime(record)} " if self.timed else ""
        return f"{time}{level}{in_flags(super().format(record))}"


def in_flags(message: str) -> str:
    """A message with its settings spelled as flags."""
    from wan.commands.flags import spell_flag

    return spell(message, spell_flag)


def tell(settings: Settings) -> None:
    """Let a command say what the settings want of it: a line a clip, off a terminal a line a stage too.

    With `quiet` warnings and errors alone; `log_file` gets everything, with the time. Raises UserError.
    """
    level = logging.WARNING if settings.quiet else CLIP if sys.stderr is not None and sys.stderr.isatty() else STAGE
    for handler in logging.root.handlers:
        if isinstance(handler, Lines):
            handler.setLevel(level)
    if settings.log_file is not None:
        logging.root.addHandler(_file(Path(settings.log_file).expanduser()))
        level = STAGE
    logging.getLogger(PROGRESS).setLevel(level)


def hush() -> None:
    """Close the log file, and forget what the settings wanted."""
    for handler in [one for one in logging.root.handlers if isinstance(one, _LogFile)]:
        logging.root.removeHandler(handler)
        handler.close()
    logging.getLogger(PROGRESS).setLevel(logging.NOTSET)


def note(error: str) -> None:
    """Write the line of an error to the log file too."""
    for handler in logging.root.handlers:
        if isinstance(handler, _LogFile):
            handler.handle(logging.LogRecord(PROGRESS, logging.ERROR, "", 0, error, None, None))


class _LogFile(logging.FileHandler):
    """The file of `log_file`."""


def _file(path: Path) -> _LogFile:
    if path.suffix.lower() in _NO_LOGS:
        raise UserError(f"`log_file` {path} is the name of something else than a log; give one such as run.log")
    try:
        if path.is_file() and path.stat().st_size and not _STAMP.match(path.read_bytes()[:40].decode(errors="replace")):
            raise UserError(f"`log_file` {path} is there and is no log; give another name")
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"`log_file` {path} cannot be written: {error.strerror}; give another name") from error
    handler.setFormatter(InFlags(timed=True))
    return handler
