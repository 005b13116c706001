"""Several processes as a launcher starts them, from a process that has the libraries imported already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

PRELOADED = ["torch", "torch.distributed", "diffusers", "transformers", "wan.cli", "wan.pipeline", "wan.commands.job"]
PRELOADED += ["wan.commands.generate", "wan.commands.continuous", "wan.continuation", "wan.video2video", __name__]


class Ranks:
    """Runs a function in so many processes, each with the environment that torchrun gives it."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")

    def __enter__(self) -> Ranks:
        self.context.set_forkserver_preload(PRELOADED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def run(self, work: Callable[..., Any], size: int, *given: Any, seconds: float = 240) -> list[Any]:
        """What `work(rank, size, *given)` returns in each process."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes, running = [], []
        for rank in range(size):
            here, there = self.context.Pipe()
            launched = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            launched |= {"MASTER_PORT": port}
            environment = {name: str(value) for name, value in launched.items()}
            process = self.context.Process(target=_work, args=(there, environment, work, rank, size, given))
            process.start()
            there.close()
            pipes.append(here)
            running.append(process)
        found = []
        try:
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(seconds), f"process {rank} of {size} is not done after {seconds} s"
                good, value = pipe.recv()
                assert good, value
                found.append(pickle.loads(value))
        finally:
            for process in running:
                process.join(0 if len(found) < size else 30)
                process.kill()
        return found


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

    said = Path(folder) / f".said_{rank}"
    with said.open("w") as file:
        sys.stdout = sys.stderr = file
        code = getattr(cli, main)(words)
    return code, said.read_text()
