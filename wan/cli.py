"""Both commands from the outside: flags in, exit code out; what the user can put right is one line."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence

from wan.errors import UserError

OK, USER, INTERRUPTED = 0, 2, 130


def generate_main(argv: Sequence[str] | None = None) -> int:
    """`generate.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        from wan.commands.generate import generate  # inside, so that Ctrl-C while importing is an interruption

        generate(given)

    return run(command, argv)


def continuous_main(argv: Sequence[str] | None = None) -> int:
    """`generate_continuous.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        from wan.commands.continuous import continue_video

        continue_video(given)

    return run(command, argv)


def run(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """The command's exit code: 2 and one line for what the user can put right, 130 when interrupted.

    A bug keeps its traceback, which makes Python exit with 1.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        command(argv)
        return OK
    except UserError as error:
        return _fail(str(error))
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
        return _fail(
            f"out of GPU memory ({str(error).splitlines()[0]}); "
            "try --offload_model True, --t5_cpu, --vlm_device cpu, a smaller --size or a smaller --frame_num"
        )


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USER


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
