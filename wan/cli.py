"""Both commands from the outside: flags in, exit code out; what the user can put right is one line."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from wan.commands.lines import Lines, hush, in_flags, note, tell
from wan.errors import UserError

if TYPE_CHECKING:
    from wan.commands.job import Job
    from wan.options import Command

OK, USER, INTERRUPTED = 0, 2, 130


def generate_main(argv: Sequence[str] | None = None) -> int:
    """`generate.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        job = _job("generate", given)
        from wan.commands.generate import generate

        generate(job)

    return run(command, argv)


def continuous_main(argv: Sequence[str] | None = None) -> int:
    """`generate_continuous.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        job = _job("continuous", given)
        from wan.commands.continuous import continue_video

        continue_video(job)

    return run(command, argv)


def _job(command: Command, argv: Sequence[str] | None) -> Job:
    """The flags, and what they mean: each import comes after what the one before it can refuse."""
    from wan.commands.flags import parse

    settings = parse(command, argv)
    tell(settings)
    from wan.commands.job import Job

    return Job.read(command, settings)


def run(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """The command's exit code: 2 and one line for what the user can put right, 130 when interrupted.

    A bug keeps its traceback, which makes Python exit with 1.
    """
    lines = Lines()
    logging.root.addHandler(lines)
    try:
        command(argv)
        return OK
    except UserError as error:
        return _fail(error.marked)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _fail(f"{error.strerror}: {error.filename or 'while writing'}; free space or choose another folder")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        # outside of a clip, whose own line says what the estimate found
        return _fail(f"out of GPU memory ({str(error).splitlines()[0]}); free some of it, or give `vram` auto")
    finally:
        hush()
        logging.root.removeHandler(lines)


def _fail(message: str) -> int:
    line = " ".join(in_flags(message).split())
    print(f"error: {line}", file=sys.stderr)
    note(line)
    return USER


def _out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # without it nothing was on a GPU
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
