"""A server of several GPUs: one worker of as many processes, which make each chain together. On CPUs, through gloo."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.support.served import QUICK, Served, serving
from wan.server import supervisor
from wan.server.metrics import Metrics
from wan.server.processes import Processes, free_port, kill, rank_environment, without_launcher
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


def test_a_process_of_several_is_told_its_place_and_one_alone_nothing() -> None:
    assert rank_environment(0, 1) == {}
    assert rank_environment(1, 3) == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def test_what_torchrun_tells_is_for_its_own_processes() -> None:
    theirs: tuple[str, ...] = (
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
    )
    theirs += ("ROLE_WORLD_SIZE", "GROUP_NAME", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    others = ("NAME", "LOCAL_NAME", "PATH", "MY_TORCHELASTIC_X", "CUDA_VISIBLE_DEVICES")
    assert without_launcher(dict.fromkeys((*theirs, *others), "x")) == dict.fromkeys(others, "x")


def test_a_free_port_is_free() -> None:
    port = free_port()
    with socket.socket() as one:
        one.bind(("127.0.0.1", port))
    assert 1024 <= port < 65536


# Says what it hears, and does what it is told.
ECHO = """import json, os, sys
told = {"rank": os.environ.get("RANK"), "more": os.environ.get("MORE"), "at": os.getcwd()}
print(json.dumps({"event": "ready", **told}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "exit" in order and order["rank"] == os.environ.get("RANK", "0"):
        print(*order.get("say", ["", "first", " last ", ""]), sep="\\n", file=sys.stderr, flush=True)
        os._exit(order["exit"])
    print(json.dumps({"event": order.get("event", "heard"), "order": order}), flush=True)
"""


def talk(work: Any, ranks: int = 1, **more: Any) -> None:
    async def run() -> None:
        processes = await Processes.start((sys.executable, "-c", ECHO), ranks, **more)
        try:
            await asyncio.wait_for(work(processes), 20)
        finally:
            await processes.end(0)

    asyncio.run(run())


def test_processes_hear_what_all_are_told_and_the_first_answers(tmp_path: Path) -> None:
    async def work(processes: Processes) -> None:
        ready = await processes.hear()
        assert ready == {"event": "ready", "rank": "0", "more": "x", "at": str(tmp_path)}
        processes.say({"cancel": "a"})
        processes.say({"answer": 1}, to_all=False)
        assert [(await processes.hear() or {})["order"] for _ in range(2)] == [{"cancel": "a"}, {"answer": 1}]
        processes.say({"id": "a"})
        order = (await processes.hear() or {})["order"]
        assert set(order) == {"id", "port"} and order["port"] > 0
        processes.say({"exit": 4, "rank": "1"})  # a chain is being made: the first one may have a word on that
        assert (await processes.hear() or {})["order"]["exit"] == 4
        assert await processes.hear() is None
        assert await processes.why(5) == "the process that makes videos ended with 4: last"
        assert all(one.returncode is not None for one in processes.processes)

    talk(work, ranks=2, variables={"MORE": "x"}, folder=str(tmp_path), keeps_tail=True, last_word=0.3)


def test_one_process_alone_gets_no_port_and_tells_how_it_ended() -> None:
    async def work(processes: Processes) -> None:
        assert (await processes.hear() or {})["rank"] is None
        processes.say({"id": "a"})
        assert (await processes.hear() or {})["order"] == {"id": "a"}
        processes.say({"exit": 3, "rank": "0", "say": []})
        assert await processes.hear() is None
        assert await processes.why(5) == "the process that makes videos ended with 3"

    talk(work, keeps_tail=True)


def test_a_process_that_is_killed_is_told_by_its_signal_and_one_that_lives_on_is_ended() -> None:
    async def killed(processes: Processes) -> None:
        await processes.hear()
        processes.kill()
        processes.kill()
        assert await processes.hear() is None
        assert await processes.why(5) == "the process that makes videos was ended by signal 9"

    async def lives(processes: Processes) -> None:
        await processes.hear()
        assert await processes.why(0.01) == "the process that makes videos ended with 0"
        assert processes.processes[0].returncode == -9
        processes.say({"id": "a"})  # to nobody

    talk(killed)
    talk(lives)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killing_fetches_no_exit_code() -> None:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    other: Any = SimpleNamespace(pid=child.pid, returncode=0, kill=child.poll)
    kill(other)  # which has ended, so the number may be somebody else's
    assert child.poll() is None
    other.returncode = None
    kill(other)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    kill(other)
    assert child.returncode is None
    child.communicate()
    assert child.returncode == -9
    kill(other)  # nobody


def test_a_process_may_end_by_itself_when_its_stdin_does() -> None:
    async def work(processes: Processes) -> None:
        await processes.hear()
        await processes.end(10)
        assert processes.processes[0].returncode == 0

    talk(work)


def test_a_command_that_is_none_is_an_error() -> None:
    with pytest.raises(OSError):
        asyncio.run(Processes.start(("/nowhere/program",), 2))


def test_of_a_log_the_last_lines_are_kept() -> None:
    async def work(processes: Processes) -> None:
        await processes.hear()
        processes.say({"exit": 3, "rank": "0", "say": [str(number) for number in range(40)] + ["x" * 400]})
        assert await processes.hear() is None
        assert await processes.why(5) == f"the process that makes videos ended with 3: {'x' * 300}"
        assert list(processes.tail) == [*map(str, range(11, 40)), "x" * 400] and processes.last_word == 60.0

    talk(work, keeps_tail=True)
