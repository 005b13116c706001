"""The processes of a worker: one, or one for each of several GPUs of this machine, which make each chain together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_LINE = 1 << 24  # bytes of one that a process may say


def rank_environment(rank: int, ranks: int) -> dict[str, str]:
    """What a launcher would tell a process that is one of several on this machine; nothing where it is alone.

    The port is another one for each chain, which its order names: see `free_port`.
    """
    if ranks == 1:
        return {}
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what torchrun tells its own processes: theirs is another meeting."""
    kinds = ("LOCAL_", "GROUP_", "ROLE_", "")
    theirs = {f"{kind}{name}" for kind in kinds for name in ("RANK", "WORLD_SIZE", "NAME")}
    theirs = theirs - {"NAME", "LOCAL_NAME"} | {"MASTER_ADDR", "MASTER_PORT"}
    return {
        name: value
        for name, value in environment.items()
        if name not in theirs and not name.startswith("TORCHELASTIC_")
    }


def free_port() -> int:
    """A port of this machine where nobody is left from a chain before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Group:
    """Processes that get the same lines, of which the first answers. They end with the first of them that does."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self.processes = processes
        self._works = False

    @classmethod
    async def start(cls, command: Sequence[str], ranks: int) -> Group:
        """Start them. What the others than the first say is for nobody. Raises OSError."""
        processes: list[asyncio.subprocess.Process] = []
        try:
            for rank in range(ranks):
                processes.append(
                    await asyncio.create_subprocess_exec(
                        *command,
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.DEVNULL if rank else asyncio.subprocess.PIPE,
                        limit=_LINE,
                        env=without_launcher(os.environ) | rank_environment(rank, ranks),
                        start_new_session=sys.platform != "win32",  # Ctrl-C is for the server, which ends this
                    )
                )
        except OSError:
            cls(processes).kill()
            raise
        return cls(processes)

    def say(self, order: Mapping[str, Any]) -> None:
        """Send a line to all. An order gets the port at which they meet for it."""
        if len(self.processes) > 1 and "id" in order:
            order = {**order, "port": free_port()}
        self._works |= "id" in order
        for process in self.processes:
            if process.stdin is not None and not process.stdin.is_closing():
                process.stdin.write(json.dumps(order).encode() + b"\n")

    async def hear(self) -> dict[str, Any] | None:
        """The next word of the first; None when any of them has ended, and all that the first had to say was heard."""
        stdout = self.processes[0].stdout
        assert stdout is not None
        line = asyncio.ensure_future(stdout.readline())
        ends = [asyncio.ensure_future(process.wait()) for process in self.processes[1:]]
        try:
            await asyncio.wait([line, *ends], return_when=asyncio.FIRST_COMPLETED)
            if not line.done() and self._works:  # the first hears of that end by itself, and has a word on it
                await asyncio.wait([line], timeout=_LAST_WORD)
            if not line.done() or not line.result():
                return None
            message: dict[str, Any] = json.loads(line.result())
            self._works &= message.get("event") != "end"
            return message
        finally:
            for one in (line, *ends):
                one.cancel()

    async def end(self, seconds: float) -> None:
        """Let them end, and kill those that have not within so many seconds."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()  # which ends it
        waits = [asyncio.ensure_future(process.wait()) for process in self.processes]
        await asyncio.wait(waits, timeout=seconds)
        self.kill()
        await asyncio.gather(*waits)

    def kill(self) -> None:
        """Kill them."""
        for process in self.processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()


_LAST_WORD = 60.0  # seconds in which the first process says what became of the others
