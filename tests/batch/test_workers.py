"""Workers as they are: processes that are killed, that share a chain, that hang; and one batch on Ray."""

from __future__ import annotations

import asyncio
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.serve import states
from tests.support.golden import ROOT
from tests.support.served import MODELS, SHAPES
from wan import cli
from wan.batch.hand import Hand

CREW = "wan/batch/crew.py"
# Says that it is ready, then does what the name of a chain says.
PUPPET = """
import json, os, sys, time
def say(event, **more): print(json.dumps({"event": event, "id": name, **more}), flush=True)
name = ""
sys.stdin.readline()
print(os.environ["OMP_NUM_THREADS"], os.environ.get("RANK"), file=sys.stderr, flush=True)
say("ready")
for line in sys.stdin:
    order = json.loads(line)
    if order.get("cancel"): say("end", state="cancelled"); continue
    name = order["id"]
    say("there", done=1, count=3)
    say("clip_started", clip=2, count=3, seed=1)
    say("warning", message="it is dark")
    if name == "dies": print("out of luck", file=sys.stderr, flush=True); sys.exit(3)
    if name == "hangs": continue
    if os.environ.get("RANK", "0") == "1" and name == "follower dies": os._exit(1)
    if name == "follower dies": continue
    say("clip_finished", clip=2, count=3, seam=None)
    say("end", state="completed", got=(order["settings"] | order["share"]).get("host_memory"))
"""


def hand(ranks: int = 1, siblings: int = 1, threads: str | None = None) -> Hand:
    return Hand((sys.executable, "-c", PUPPET), ranks, siblings, os.getcwd(), threads)


def order(name: str, folder: Path, **settings: Any) -> dict[str, Any]:
    return {"id": name, "settings": {"output_dir": str(folder), **settings}}


def test_a_hand_says_what_its_process_says(tmp_path: Path) -> None:
    async def work() -> None:
        one = hand(siblings=2, threads="7")
        ready = await one.start()
        assert len(ready["pids"]) == 1
        report = await one.do(order("a", tmp_path))
        assert (report["state"], report["done"], report["count"], report["made"]) == ("completed", 2, 3, 1)
        assert report["warnings"] == ["it is dark"] and report["got"] == one._share >= 1
        assert (await one.do(order("b", tmp_path, host_memory=3)))["got"] == 3
        assert one._processes is not None and one._processes.tail[0] == "7 None"
        making = asyncio.create_task(one.do(order("hangs", tmp_path)))
        while (look := await one.look())["id"] != "hangs" or look["clip"] != 2:
            await asyncio.sleep(0.01)
        assert (look["id"], look["done"], look["made"]) == ("hangs", 1, 0) and look["clip_seconds"] >= 0
        await one.stop()
        assert (await making)["state"] == "cancelled"
        await one.end()
        assert not psutil.pid_exists(ready["pids"][0])

    asyncio.run(work())


@pytest.mark.parametrize(
    ("name", "ranks", "why"),
    [
        ("dies", 1, "the process that makes videos ended with 3: out of luck"),
        ("hangs", 1, "the process that makes videos was ended by signal 9"),
        ("follower dies", 2, "the process that makes videos ended with 1"),
    ],
)
def test_why_a_process_ended_is_told(name: str, ranks: int, why: str, tmp_path: Path) -> None:
    async def work() -> None:
        one = hand(ranks)
        pids = (await one.start())["pids"]
        making = asyncio.create_task(one.do(order(name, tmp_path)))
        if name == "hangs":
            while (await one.look()).get("clip") != 2:
                await asyncio.sleep(0.01)
            os.kill(pids[0], signal.SIGKILL)
        report = await asyncio.wait_for(making, 20)
        assert report["state"] == "lost" and report["error"]["message"].startswith(why)
        assert report["done"] == 1 or ranks > 1  # the other one may be quicker
        assert not any(psutil.pid_exists(pid) for pid in pids)

    asyncio.run(work())


def test_a_process_that_cannot_start_says_why() -> None:
    one = Hand((sys.executable, "-c", "raise SystemExit('no CUDA here')"), 1, 1, "/nowhere", None)
    assert asyncio.run(one.start()) == {"error": "the process that makes videos ended with 1: no CUDA here"}


def test_without_ray_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "wan.batch.crew", raising=False)
    words = ["--videos", str(SHAPES), "--ckpt_dir", "m", "--output_dir", str(tmp_path / "{name}")]
    assert cli.batch_main(words) == 2
    assert capsys.readouterr().err == 'error: a batch needs Ray: in your clone, pip install -e ".[cluster]"\n'


def test_one_module_imports_ray_and_only_a_batch_imports_that() -> None:
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "wan").rglob("*.py")
    }
    assert [name for name, text in files.items() if re.search(r"^\s*(import|from) ray\b", text, re.M)] == [CREW]
    users = [name for name, text in files.items() if "wan.batch.crew import" in text]
    assert users == ["wan/batch/run.py"] and not re.search(r"^from wan.batch.crew", files["wan/batch/run.py"], re.M)


@pytest.mark.slow
@pytest.mark.rare
def test_two_processes_share_one_chain_after_the_other(tmp_path: Path) -> None:
    each: dict[str, Any] = {"video": str(SHAPES), "num_videos": 1, "frame_num": 5, "sample_steps": 1, "prompt": "On."}
    each |= {"ckpt_dir": str(MODELS / "tiny-Wan2.2-TI2V-5B"), "vlm_path": str(MODELS / "tiny-InternVL")}

    async def work() -> None:
        group = Hand((sys.executable, "-m", "wan.server.worker"), 2, 1, str(ROOT), "1")
        pids = (await group.start())["pids"]
        assert len(pids) == 2
        for name in ("a", "b"):  # the second one begins while the first one is written
            making = await group.do(order(name, tmp_path / name, base_seed=7, **each) | {"ahead": True})
            assert making["state"] == "writing", making
        report = await group.written()
        assert (report["state"], report["made"]) == ("completed", 1), report
        await group.end()
        assert not any(psutil.pid_exists(pid) for pid in pids)

    asyncio.run(work())
    lone = ["--video", str(SHAPES), "--output_dir", str(tmp_path / "lone"), "--base_seed", "7", "--num_videos", "1"]
    lone += ["--frame_num", "5", "--sample_steps", "1", "--prompt", "On.", "--ckpt_dir", each["ckpt_dir"]]
    assert cli.continuous_main([*lone, "--vlm_path", each["vlm_path"]]) == 0
    assert states(tmp_path / "a") == states(tmp_path / "b") and list(states(tmp_path / "a")) == list(
        states(tmp_path / "lone")
    )


@pytest.mark.slow
@pytest.mark.usefixtures("pytorch_s_kernels")
def test_six_chains_with_a_kill_are_those_of_lone_runs(tmp_path: Path) -> None:
    rows = [{"video": str(SHAPES), "name": f"job {n}", "seed": 10 * n, "num_videos": 1 + (n < 3)} for n in range(6)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    weights = ["--ckpt_dir", str(MODELS / "tiny-Wan2.2-TI2V-5B"), "--vlm_path", str(MODELS / "tiny-InternVL")]
    each = [*weights, "--frame_num", "5", "--sample_steps", "1", "--prompt", "On."]
    words = ["--videos", "list.jsonl", "--output_dir", "runs/{name}", "--workers", "2", *each]
    command = [sys.executable, str(ROOT / "generate_batch.py"), *words]
    # as many as the lone run here has: sums of more threads round otherwise
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        killed = kill_one(running, tmp_path / "runs")
        _, stderr = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 0, stderr
    recorded = [json.loads(line) for line in (tmp_path / "runs/batch.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["state"] for row in recorded] == ["completed"] * 6 and sum(row["failures"] for row in recorded) == 1, (
        stderr
    )
    assert not psutil.pid_exists(killed)
    assert not list(tmp_path.glob("runs/*/redone")) and len(list(tmp_path.glob("runs/*/video_*.json"))) == 9
    again = next(row for row in recorded if row["failures"])
    # the worker's share of the machine is not for who makes it again alone
    arguments = json.loads((tmp_path / "runs" / again["name"] / "run.json").read_text(encoding="utf-8"))["arguments"]
    assert (arguments["host_memory"], arguments["share_weights"]) == ("auto", 1)
    lone = ["--video", str(SHAPES), "--output_dir", str(tmp_path / "lone"), "--num_videos", str(again["clips"]), *each]
    assert cli.continuous_main([*lone, "--base_seed", str(10 * int(again["name"].split()[1]))]) == 0
    assert states(tmp_path / "runs" / again["name"]) == states(tmp_path / "lone") != {}


def kill_one(running: subprocess.Popen[str], runs: Path) -> int:
    """Kill a worker that makes a chain; its number."""
    end = time.monotonic() + 90
    while time.monotonic() < end and running.poll() is None:
        made, begun = (glob.glob(str(runs / "*" / name)) for name in ("video_*.json", ".lock"))  # not there at first
        if made and begun:
            for process in psutil.Process(running.pid).children(recursive=True):
                if is_worker(process):
                    process.kill()
                    return int(process.pid)
        time.sleep(0.02)
    raise AssertionError(f"nothing to kill: {running.poll()}")


def is_worker(process: psutil.Process) -> bool:
    try:
        return "wan.server.worker" in process.cmdline()
    except psutil.Error:
        return False
