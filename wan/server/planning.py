"""What a chain would be, worked out by `wan.server.plan` in a process of its own, one at a time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from wan.options import Settings
from wan.server.errors import ApiError
from wan.server.processes import kill
from wan.server.wire import as_json

_TURN = asyncio.Semaphore(1)


async def plan_of(owner: Settings, order: Mapping[str, Any]) -> list[str]:
    """The lines of the plan of a chain, by the server's settings and what the worker would be told. Raises ApiError."""
    question = {"owner": as_json(owner), "settings": dict(order)}
    async with _TURN:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "wan.server.plan"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(json.dumps(question).encode()), 180)
        except asyncio.TimeoutError as error:  # no TimeoutError before Python 3.11
            raise ApiError("the plan takes too long", status=503) from error
        finally:
            if process.returncode is None:
                kill(process)
                await process.wait()
    lines = out.decode(errors="replace").splitlines()
    if process.returncode == 2 and lines:
        raise ApiError(lines[-1])
    if process.returncode:
        raise ApiError("the plan cannot be made, which the server's log explains", status=500)
    return [line.replace(f", in {order['output_dir']}", "") for line in lines]
