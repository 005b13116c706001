"""A server of several GPUs: one worker of as many processes, which make each chain together. On CPUs, through gloo."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.support.served import QUICK, Served, serving
from wan.server import supervisor
from wan.server.metrics import Metrics
from wan.server.supervisor import Supervisor
from wan.server.tickets import DONE, Queue, Ticket, new_id

# Each process writes what it was told; the second one dies in its first chain, and the first one tells of it.
TWO = """import json, os, pathlib, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
json.loads(sys.stdin.readline())
if rank == "0":
    print(json.dumps({"event": "ready"}), flush=True)
order = json.loads(sys.stdin.readline())
number = len(list(folder.glob(f"told_{rank}_*")))
told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {"port": order["port"]}
(folder / f"told_{rank}_{number}").write_text(json.dumps(told))
if number == 0:
    if rank == "1":
        os.kill(os.getpid(), 9)
    time.sleep(0.3)
    error = {"code": "worker_lost", "message": "process 1 on here has died"}
    print(json.dumps({"event": "end", "id": order["id"], "state": "failed", "error": error}), flush=True)
    sys.exit(1)
if rank == "0":
    print(json.dumps({"event": "end", "id": order["id"], "state": "completed"}), flush=True)
sys.stdin.readline()"""


def test_a_process_that_is_lost_takes_the_others_along_and_new_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "SHORTEST_WAIT", 0.01)
    queue = Queue(tmp_path / "queue.sqlite3")
    ticket = queue.add(Ticket(new_id()))
    command = (sys.executable, "-c", TWO, str(tmp_path))
    over = Supervisor(queue, tmp_path, {}, lambda ticket: {}, Metrics(), command, ranks=2)

    async def run() -> None:
        over.wake()
        task = asyncio.create_task(over.run())
        while queue[ticket.id].state != DONE:
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert [one.message for one in caplog.records if one.levelname == "ERROR"] == ["process 1 on here has died"]
    told = [[json.loads((tmp_path / f"told_{rank}_{number}").read_text()) for rank in (0, 1)] for number in (0, 1)]
    for first, second in told:
        assert (first["RANK"], second["RANK"]) == ("0", "1") and first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
        assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1") and first["port"] == second["port"] > 0
    assert told[0][0]["port"] != told[1][0]["port"], "nobody of the chain before is left there"


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "wan.server")
ASKED = {"prompt": "A green circle moves left.", "model": "wan2.2-ti2v-5b", "seconds": "1", "base_seed": 7}


def made(server: Served, name: str) -> list[Any]:
    files = sorted((server.folder / "jobs" / name / "run").glob("video_*.safetensors"))
    return [load_file(file)["latents"] for file in files]


def workers(server: Served) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in children if "wan.server.worker" in " ".join(one.cmdline())]


@pytest.mark.slow
@pytest.mark.rare
def test_a_video_is_made_on_two_processes_and_a_killed_one_costs_no_more_than_time(
    server: Served, tmp_path: Path
) -> None:
    alone = server.ask("/v1/videos", "POST", ASKED)[1]["id"]
    flags = (*QUICK, "--collective_timeout", "20")
    with serving(tmp_path / "out", *flags, program=TORCHRUN) as two:
        together = two.ask("/v1/videos", "POST", ASKED)[1]["id"]
        two.wait(together, "completed")
        running = workers(two)
        assert len(running) == 2
        second = next(one for one in running if one.environ()["RANK"] == "1")
        after = two.ask("/v1/videos", "POST", ASKED)[1]["id"]
        end = time.monotonic() + 60
        while not (two.ask(f"/v1/chains/{after}")[1]["now"] or {}).get("stage") and time.monotonic() < end:
            time.sleep(0.05)
        second.send_signal(signal.SIGKILL)
        two.wait(after, "completed")
        running = workers(two)
        assert len(running) == 2 and second not in running
        os.kill(two.process.pid, signal.SIGINT)  # Ctrl-C, which torchrun hands on
        assert two.process.wait(60) is not None
    psutil.wait_procs(running, timeout=20)
    assert not any(one.is_running() for one in running)
    server.wait(alone, "completed")
    expected = made(server, alone)
    assert expected
    for video in (made(two, together), made(two, after)):
        for one, other in zip(expected, video, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()
