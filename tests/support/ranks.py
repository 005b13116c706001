"""Several processes as a launcher starts them, from a process that has the libraries imported already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


class Ranks:
    """Runs a function in so many processes, each with the environment that torchrun gives it."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")

    def __enter__(self) -> Ranks:
        self.context.set_forkserver_preload(["tests.support.preloaded"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def run(self, work: Callable[..., Any], size: int, *given: Any, seconds: float = 240) -> list[Any]:
        """What `work(rank, size, *given)` returns in each process."""
        pipes, running = self.start(work, size, *given)
        results = []
        try:
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(seconds), f"process {rank} of {size} is not done after {seconds} s"
                good, value = pipe.recv()
                assert good, value
                results.append(pickle.loads(value))
        finally:
            for process in running:
                process.join(0 if len(results) < size else 30)
                process.kill()
        return results

    def codes(
        self,
        work: Callable[..., Any],
        size: int,
        *given: Any,
        meanwhile: Callable[[list[int]], None] = lambda pids: None,
        seconds: float = 60,
    ) -> list[int | None]:
        """How each process ends, as `multiprocessing` has exit codes; None where it does not. `meanwhile` is given
        their ids."""
        pipes, running = self.start(work, size, *given)
        try:
            meanwhile([int(process.pid or 0) for process in running])
            until = time.monotonic() + seconds
            for process in running:
                process.join(max(0, until - time.monotonic()))
            return [process.exitcode for process in running]
        finally:
            for process in running:
                process.kill()

    def start(self, work: Callable[..., Any], size: int, *given: Any) -> tuple[list[Connection], list[Any]]:
        """The processes, and a pipe from each of them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes, running = [], []
        for rank in range(size):
            ours, theirs = self.context.Pipe()
            launched = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            launched |= {"MASTER_PORT": port}
            environment = {name: str(value) for name, value in launched.items()}
            process = self.context.Process(target=_work, args=(theirs, environment, work, rank, size, given))
            process.start()
            theirs.close()
            pipes.append(ours)
            running.append(process)
        return pipes, running


def _work(
    pipe: Connection, environment: Mapping[str, str], work: Callable[..., Any], rank: int, size: int, given: Any
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        pipe.send((True, pickle.dumps(work(rank, size, *given))))  # a tensor itself would go through shared memory
    except BaseException:
        pipe.send((False, f"process {rank} of {size}: {traceback.format_exc()}"))
        raise


def command(rank: int, size: int, main: str, words: list[str], folder: str) -> tuple[int, str]:
    """The exit code of a command in one of the processes, and what it printed."""
    from wan import cli

    output = Path(folder) / f".output_{rank}"
    with output.open("w") as file:
        sys.stdout = sys.stderr = file
        code = getattr(cli, main)(words)
    return code, output.read_text()


def faulty_command(rank: int, size: int, words: list[str], folder: str, who: int, stage: str, do: str) -> int:
    """`generate_continuous.py`, in which process `who` is killed, raises or hangs in a stage of the second clip."""
    from wan.chain.run_folder import RunFolder
    from wan.denoiser.model import WanModel
    from wan.device.parallel import Team

    where: dict[
        str, tuple[Any, str, int]
    ] = {  # what is called there, and how many times before it is the second clip's
        "load": (WanModel, "from_weights", 0),
        "sample": (WanModel, "forward", 3),
        "wait": (Team, "hear", 4),
        "write": (RunFolder, "save", 1),
    }
    home, name, before = where[stage]
    works = getattr(home, name)
    calls = [0]

    def breaks(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] <= before:
            return works(*given, **more)
        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif do == "hang":
            time.sleep(600)
        raise ValueError("a bug")

    if rank == who:
        setattr(home, name, breaks)
    code, _ = command(rank, size, "continuous_main", words, folder)
    sys.exit(code)
