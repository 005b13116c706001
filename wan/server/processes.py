"""The processes of a worker: one, or one for each of several GPUs of this machine, which make each chain together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import psutil

_LINE = 1 << 31  # bytes of one that a process may say, which may hold 256 frames for a captioner
_TAIL = 30  # lines of what a process says to its log, of which the last tells why it ended
_LAST_WORD = 60.0  # seconds in which the first process says what became of the others


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


class Processes:
    """Processes that get the same lines, of which the first answers. They end with the first of them that does.

    `last_word`: seconds in which the first one may still say what became of another. `tail`: the last lines of their
    logs, where those are kept.
    """

    def __init__(self, processes: Sequence[asyncio.subprocess.Process], last_word: float = _LAST_WORD) -> None:
        self.processes, self.last_word = processes, last_word
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._works = False
        self._reading = [asyncio.create_task(self._keep_tail(one.stderr)) for one in processes if one.stderr]

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        ranks: int,
        *,
        variables: Mapping[str, str] = MappingProxyType({}),
        folder: str | None = None,
        keeps_tail: bool = False,
        last_word: float = _LAST_WORD,
    ) -> Processes:
        """Start them, in a folder and with more variables. What the others than the first say is for nobody.

        Raises OSError.
        """
        processes: list[asyncio.subprocess.Process] = []
        try:
            for rank in range(ranks):
                processes.append(
                    await asyncio.create_subprocess_exec(
                        *command,
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.DEVNULL if rank else asyncio.subprocess.PIPE,
                        stderr=asyncio.subprocess.PIPE if keeps_tail else None,
                        limit=_LINE,
                        cwd=folder,
                        env=without_launcher(os.environ) | dict(variables) | rank_environment(rank, ranks),
                        start_new_session=sys.platform != "win32",  # Ctrl-C is for the command, which ends this
                    )
                )
        except OSError:
            cls(processes).kill()
            raise
        return cls(processes, last_word)

    async def _keep_tail(self, log: asyncio.StreamReader) -> None:
        while line := await log.readline():
            text = line.decode(errors="replace").rstrip()
            self.tail.append(text)
            sys.stderr.write(f"{text}\n")

    def say(self, order: Mapping[str, Any], *, to_all: bool = True) -> None:
        """Send a line to all, or to the first. An order gets the port at which they meet for it: nobody is left there
        from the one before."""
        if len(self.processes) > 1 and "id" in order:
            order = {**order, "port": free_port()}
        self._works |= "id" in order
        for process in self.processes if to_all else self.processes[:1]:
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
                await asyncio.wait([line], timeout=self.last_word)
            if not line.done() or not line.result():
                return None
            message: dict[str, Any] = json.loads(line.result())
            self._works &= message.get("event") != "end"
            return message
        finally:
            for one in (line, *ends):
                one.cancel()

    async def why(self, seconds: float) -> str:
        """Why they have ended. Those that have not within so many seconds are killed."""
        waits = [asyncio.ensure_future(process.wait()) for process in self.processes]
        # one that has closed its stdout and lives on is ended, too
        done, _ = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        code = next((wait.result() for wait in waits if wait in done and wait.result()), 0)
        for wait in waits:
            wait.cancel()
        await self.end(0)
        if code < 0:
            return f"the process that makes videos was ended by signal {-code}"
        last = next((line for line in reversed(self.tail) if line.strip()), "")
        return f"the process that makes videos ended with {code}" + (f": {last.strip()[:300]}" if last else "")

    async def end(self, seconds: float) -> None:
        """Let them end, and kill those that have not within so many seconds."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()  # which ends it
        waits = [asyncio.ensure_future(process.wait()) for process in self.processes]
        await asyncio.wait(waits, timeout=seconds)
        self.kill()
        await asyncio.gather(*waits)
        await asyncio.gather(*self._reading, return_exceptions=True)

    def kill(self) -> None:
        """Kill them."""
        for process in self.processes:
            kill(process)


def kill(process: asyncio.subprocess.Process) -> None:
    """Kill a process that has not ended. `Process.kill` may fetch the exit code of one that has, which is lost then."""
    if process.returncode is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).kill()
