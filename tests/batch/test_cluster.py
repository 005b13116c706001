"""A batch on a Ray cluster that is there already: joining it, the loss of a node, the loss of its head."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
    assert "refused" in stderr and time.monotonic() - began < 10


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes, each with a core for one worker."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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
    with (folder / "said.log").open("ab") as log:
        return subprocess.Popen(command, stderr=log, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})


def wait_for(what: str, folder: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while len(list(folder.glob(what))) < count:
        assert running.poll() is None and time.monotonic() < end, (folder / "said.log").read_text(encoding="utf-8")
        time.sleep(0.05)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/batch.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.rare
def test_a_node_that_goes_costs_a_clip_and_a_head_that_goes_the_command(cluster: Any, tmp_path: Path) -> None:
    running = begin(tmp_path, cluster.address, 3)
    try:
        wait_for("runs/*/video_01*.json", tmp_path, 2, running)  # by both workers
        cluster.remove_node(cluster.second, allow_graceful=False)
        end = time.monotonic() + 120
        while not (lost := [row for row in rows_of(tmp_path) if row["failures"]]):
            assert running.poll() is None and time.monotonic() < end, (tmp_path / "said.log").read_text("utf-8")
            time.sleep(0.2)
        cluster.shutdown()
        assert running.wait(120) != 0  # Ray ends a program whose head has gone, in words of its own
    finally:
        running.kill()
    assert re.match("its (worker died|machine has gone|machine cannot be reached)", lost[0]["reason"]), lost
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/video_*.json")}
    words = ["--videos", str(tmp_path / "list.jsonl"), "--output_dir", str(tmp_path / "runs/{name}"), *EACH]
    assert cli.batch_main(words) == 0  # on this machine alone
    assert len(list(tmp_path.glob("runs/*/video_*.json"))) == 9 and not list(tmp_path.glob("runs/*/redone"))
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    name = lost[0]["name"]
    lone = [
        "--video",
        str(SHAPES),
        "--output_dir",
        str(tmp_path / "lone"),
        "--base_seed",
        str(10 * int(name.split()[1])),
        *EACH,
    ]
    assert cli.continuous_main(lone) == 0
    assert states(tmp_path / "runs" / name) == states(tmp_path / "lone") != {}
