"""The commands from the outside: flags in, exit code out; what the user can put right is one line."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from wan.commands.lines import Lines, hush, in_flags, note, tell
from wan.device.peers import Ended
from wan.device.watch import is_collective
from wan.errors import UserError

if TYPE_CHECKING:
    from wan.commands.job import Job
    from wan.options import Command, Settings

OK, USER = 0, 2
_STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_LONGEST_LINE = 500  # characters of an error, so that a terminal shows all of it
SERVER_PACKAGES = (
    "fastapi",
    "multipart",
    "prometheus_client",
    "python_multipart",
    "sse_starlette",
    "starlette",
    "uvicorn",
)
OTHERS_WAIT = 10.0  # seconds; a launcher ends the others at once when the first has failed


def generate_main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """`generate.py`: returns the exit code. `own_process`: nothing else is in this process, see `leave_out_unused`."""

    def command(given: Sequence[str] | None) -> None:
        with _job("generate", _settings("generate", given), own_process) as job:
            if not job.world.is_first:
                job.follow()
                return
            from wan.commands.generate import generate

            generate(job)

    return run(command, argv)


def continuous_main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """`generate_continuous.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        settings = _settings("continuous", given)
        if settings.prune is not None:
            from wan.commands.prune import prune

            prune(Path(settings.prune))
            return
        with _job("continuous", settings, own_process) as job:
            if not job.world.is_first:
                job.follow()
                return
            from wan.commands.continuous import continue_video

            continue_video(job)

    return run(command, argv)


def generate_program() -> NoReturn:
    """`wan-generate`: ends the process."""
    _leave(generate_main(own_process=True))


def continuous_program() -> NoReturn:
    """`wan-continuous`: ends the process."""
    _leave(continuous_main(own_process=True))


def _leave(code: int) -> NoReturn:
    """End the process at once. All is written by now, and Python would take seconds to take its modules apart.

    A debugger, a profiler or a prompt still has something to do, and so has a launcher's process with the others. Where
    it fails they have been told, and what waits for them in other threads cannot be taken apart.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # nobody reads it any more, see `say`
                stream.flush()
    others = ("WORLD_SIZE" in os.environ and not code) or bool(multiprocessing.active_children())
    if others or sys.gettrace() or sys.getprofile() or sys.flags.interactive or hasattr(sys, "ps1"):
        sys.exit(code)
    os._exit(code)


def batch_program() -> NoReturn:
    """`wan-batch`: ends the process. What is left of Ray, whose head may have gone, would hold up its end."""
    _leave(batch_main())


def serve_main(argv: Sequence[str] | None = None) -> int:
    """`wan-serve`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        settings = _settings("serve", given)
        try:
            from wan.server.main import serve
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in SERVER_PACKAGES:
                raise
            raise UserError(f'wan-serve needs {error.name}: in your clone, pip install -e ".[serve]"') from error
        serve(settings)

    return run(command, argv)


def batch_main(argv: Sequence[str] | None = None) -> int:
    """`generate_batch.py`: returns the exit code."""

    def command(given: Sequence[str] | None) -> None:
        settings = _settings("batch", given)
        from wan.batch.run import make_batch

        try:
            make_batch(settings)
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UserError('a batch needs Ray: in your clone, pip install -e ".[cluster]"') from error

    return run(command, argv)


def _settings(command: Command, argv: Sequence[str] | None) -> Settings:
    """What the flags say. Each import comes after what the one before it can refuse."""
    from wan.commands.flags import parse

    settings = parse(command, argv)
    tell(settings)
    return settings


@contextmanager
def _job(command: Command, settings: Settings, own_process: bool) -> Iterator[Job]:
    """What that means for the files it names, whose weights are read from now on."""
    from wan.commands import start
    from wan.commands.job import Job
    from wan.device.host import usable_cores

    if own_process:
        start.take_cores(os.environ, usable_cores())
        start.leave_out_unused(settings)
        start.find_packages_late()
    job = Job.read(command, settings)
    start.check_early(job)
    start.check_budget(job)
    reading = start.read_ahead(job)
    try:
        yield job
    finally:
        if reading is not None:
            reading.stop()


def run(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """The command's exit code: 2 and one line for what the user can put right, 128 + N when stopped by the signal N.

    A bug keeps its traceback, which makes Python exit with 1.
    """
    lines = Lines()
    logging.root.addHandler(lines)
    first = os.environ.get("RANK", "0") in ("", "0")
    stopped: list[int] = []
    if not first:
        lines.setLevel(logging.ERROR)
    try:
        with _stopping(stopped):
            command(argv)
        return OK
    except UserError as error:
        if first:
            return _fail(error.marked)
        if isinstance(error, Ended):
            return USER
        # what is wrong for all processes the first one says, and then it or the launcher ends this one
        time.sleep(OTHERS_WAIT)
        return _fail(f"process {os.environ['RANK']} on {platform.node()}: {error.marked}")
    except OSError as error:
        if error.errno is None:  # no system call's
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space or choose another folder" if full else "look at the disk, or choose another folder"
        return _fail(f"{error.strerror}: {error.filename or 'while writing'}; {advice}")
    except KeyboardInterrupt:
        if first:
            print("interrupted", file=sys.stderr)
        return 128 + (stopped[-1] if stopped else signal.SIGINT)
    except RuntimeError as error:
        if not first and is_collective(error):
            return USER  # its cause is in another process, which is told of there
        if not _out_of_memory(error):
            raise
        # outside of a clip, whose own line says what the estimate found
        return _fail(f"out of GPU memory ({str(error).splitlines()[0]}); free some of it, or give `vram` auto")
    finally:
        hush()
        logging.root.removeHandler(lines)


@contextmanager
def _stopping(stopped: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP stop as Ctrl-C does, which joins what is finished; one that is ignored (nohup) stays so.

    `stopped` gets their numbers: a library, as Ray does, may raise another KeyboardInterrupt in place of this one.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str) -> int:
    line = " ".join(in_flags(message).split())
    shown = f"error: {line}"
    print(shown if len(shown) <= _LONGEST_LINE else f"{shown[: _LONGEST_LINE - 3]}...", file=sys.stderr)
    note(line)
    return USER


def _out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # without it nothing was on a GPU
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
