"""A batch on a Ray cluster that is there already: joining it, the loss of a node, the loss of its head."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.serve import states
from tests.support.golden import ROOT
from tests.support.served import MODELS, SHAPES
from wan import cli

EACH = ["--ckpt_dir", str(MODELS / "tiny-Wan2.2-TI2V-5B"), "--vlm_path", str(MODELS / "tiny-InternVL")]
EACH += ["--frame_num", "5", "--sample_steps", "1", "--num_videos", "3", "--prompt", "On."]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused_at_once(
    scheme: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
    words = ["--videos", str(SHAPES), "--ckpt_dir", "m", "--output_dir", str(tmp_path / "{name}")]
    began = time.monotonic()
    assert cli.batch_main([*words, "--address", address]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: --address {address}: Ray cannot be used (") and stderr.count("\n") == 1
    assert "refused" in stderr and "RAY_AUTH_TOKEN here" in stderr and time.monotonic() - began < 10


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes, each with a core for one worker."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as the run that it is compared with
    each = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=each)
    nodes.second = nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    nodes.wait_for_nodes(60)
    yield nodes
    nodes.shutdown()


def begin(folder: Path, address: str, jobs: int) -> subprocess.Popen[bytes]:
    rows = [{"video": str(SHAPES), "name": f"job {n}", "seed": 10 * n} for n in range(jobs)]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--videos", str(folder / "list.jsonl"), "--output_dir", str(folder / "runs/{name}"), "--workers", "2"]
    command = [sys.executable, str(ROOT / "generate_batch.py"), *words, "--address", address, *EACH]
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(command, stderr=log, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})


def wait_for(what: str, folder: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while len(glob(what, root_dir=folder)) < count:  # folders may go meanwhile
        assert running.poll() is None and time.monotonic() < end, (folder / "output.log").read_text(encoding="utf-8")
        time.sleep(0.05)


def is_worker_in(folder: Path, process: psutil.Process) -> bool:
    try:
        return "wan.server.worker" in process.cmdline() and process.cwd() == str(folder)
    except psutil.Error:
        return False


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/batch.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.usefixtures("pytorch_s_kernels")
def test_a_chain_whose_node_goes_is_finished_on_another(cluster: Any, tmp_path: Path) -> None:
    running = begin(tmp_path, cluster.address, 2)
    try:
        wait_for("runs/*/video_01*.json", tmp_path, 2, running)  # by both workers
        cluster.remove_node(cluster.second, allow_graceful=False)
        assert running.wait(300) == 0, (tmp_path / "output.log").read_text("utf-8")
    finally:
        running.kill()
    rows = rows_of(tmp_path)
    (lost,) = [row for row in rows if row["failures"]]
    assert [row["state"] for row in rows] == ["completed"] * 2 and not list(tmp_path.glob("runs/*/redone"))
    name = lost["name"]
    lone = ["--video", str(SHAPES), "--output_dir", str(tmp_path / "lone"), "--base_seed", str(10 * int(name[-1]))]
    assert cli.continuous_main([*lone, *EACH]) == 0
    assert states(tmp_path / "runs" / name) == states(tmp_path / "lone") != {}


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("what", ["head", "raylet"])
def test_a_head_that_goes_ends_the_command_with_a_line(what: str, cluster: Any, tmp_path: Path) -> None:
    running = begin(tmp_path, cluster.address, 60)  # more than are made in the 20 s without a head
    try:
        wait_for("runs/*/video_01*.json", tmp_path, 2, running)
        if what == "head":
            cluster.head_node.kill_gcs_server()
        else:
            cluster.head_node.kill_raylet()
        assert running.wait(100) == 2
    finally:
        running.kill()
    output = (tmp_path / "output.log").read_text(encoding="utf-8")
    last = output.splitlines()[-1]
    assert "Traceback" not in output and last.startswith("error: ") and "finished clips are kept, and the same" in last
    assert ("the head of the Ray cluster" if what == "head" else "its raylet has ended") in last, output
    assert "chains are finished; the same command goes on with the others" in output
    left = [process for process in psutil.process_iter() if is_worker_in(tmp_path, process)]
    assert not psutil.wait_procs(left, 10)[1]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/video_*.json")}
    rows = (tmp_path / "list.jsonl").read_text(encoding="utf-8").splitlines()
    begun = {path.parent.name for path in kept}
    rows = [row for row in rows if json.loads(row)["name"] in begun]
    (tmp_path / "begun.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = ["--videos", str(tmp_path / "begun.jsonl"), "--output_dir", str(tmp_path / "runs/{name}"), *EACH]
    assert cli.batch_main(words) == 0  # on this machine alone
    assert len(list(tmp_path.glob("runs/*/video_*.json"))) == 3 * len(begun) and not list(
        tmp_path.glob("runs/*/redone")
    )
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
