"""Both commands from the outside: flags in, exit code out; what the user can put right is one line."""

from __future__ import annotations

import errno
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from wan.errors import UserError, spell

if TYPE_CHECKING:
    from wan.commands.job import Job
    from wan.options import Command

OK, USER, INTERRUPTED = 0, 2, 130
OTHERS_WAIT = 10.0  # seconds; a launcher ends the others at once when the first has failed


def generate_main(argv: Sequence[str] | None = None) -> int:
    """`generate.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        job = _job("generate", given)
        if not job.world.is_first:
            job.follow()
            return
        from wan.commands.generate import generate

        generate(job)

    return run(command, argv)


def continuous_main(argv: Sequence[str] | None = None) -> int:
    """`generate_continuous.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        job = _job("continuous", given)
        if not job.world.is_first:
            job.follow()
            return
        from wan.commands.continuous import continue_video

        continue_video(job)

    return run(command, argv)


def _job(command: Command, argv: Sequence[str] | None) -> Job:
    """The flags, and what they mean: each import comes after what the one before it can refuse."""
    from wan.commands.flags import parse

    settings = parse(command, argv)
    from wan.commands.job import Job

    return Job.read(command, settings)


def run(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """The command's exit code: 2 and one line for what the user can put right, 130 when interrupted.

    A bug keeps its traceback, which makes Python exit with 1.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_InFlags("%(levelname)s: %(message)s"))
    first = os.environ.get("RANK", "0") in ("", "0")
    logging.basicConfig(handlers=[handler], level=logging.WARNING if first else logging.ERROR)
    try:
        command(argv)
        return OK
    except UserError as error:
        if first:
            return _fail(error.marked)
        # what is wrong for all processes the first one says, and then the launcher ends this one
        time.sleep(OTHERS_WAIT)
        return _fail(f"process {os.environ['RANK']} on {platform.node()}: {error.marked}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _fail(f"{error.strerror}: {error.filename or 'while writing'}; free space or choose another folder")
    except KeyboardInterrupt:
        if first:
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return _fail(
            f"out of GPU memory ({str(error).splitlines()[0]}); "
            "try `offload_model` True, `t5_cpu`, `vlm_device` cpu, a smaller `size` or a smaller `frame_num`"
        )


class _InFlags(logging.Formatter):
    """Log lines with settings spelled as flags."""

    def format(self, record: logging.LogRecord) -> str:
        return _in_flags(super().format(record))


def _in_flags(message: str) -> str:
    from wan.commands.flags import spell_flag

    return spell(message, spell_flag)


def _fail(message: str) -> int:
    print(f"error: {' '.join(_in_flags(message).split())}", file=sys.stderr)
    return USER


def _out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # without it nothing was on a GPU
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
