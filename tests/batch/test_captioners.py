"""Captioners that the workers of a batch share: where they are, how they are asked, and what a death of one costs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.golden import ROOT
from tests.support.served import MODELS, SHAPES
from wan import cli
from wan.batch.hand import Hand
from wan.batch.places import Places, captioner_place, choose_places
from wan.errors import UserError
from wan.options import Settings
from wan.server.questions import Questions

# A process that asks in the middle of its work, and says what it heard.
ASKER = """
import json, sys
def say(event, **more): print(json.dumps({"event": event, "id": name, **more}), flush=True)
name = ""
asks = json.loads(sys.stdin.readline())["asks"]
say("ready")
for line in sys.stdin:
    name = json.loads(line)["id"]
    if asks: say("ask", number=7, asked={"what": "describe", "text": "x" * 300_000})
    say("end", state="completed", heard=json.loads(sys.stdin.readline()) if asks else None)
"""


@pytest.mark.parametrize("asks", [True, False])
def test_a_hand_brings_questions_to_the_captioner_and_answers_back(asks: bool, tmp_path: Path) -> None:
    async def captioner(asked: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"text": f"{len(asked['text'])} characters"}

    async def work() -> Mapping[str, Any]:
        one = Hand((sys.executable, "-c", ASKER), 1, 1, os.getcwd(), None, captioner if asks else None)
        await one.start()
        ended = await one.do({"id": "a", "settings": {"output_dir": str(tmp_path)}})
        await one.end()
        return ended

    heard = {"number": 7, "answer": {"text": "300000 characters"}} if asks else None
    assert asyncio.run(work())["heard"] == heard


def test_a_chain_that_is_not_wanted_any_more_waits_for_no_answer() -> None:
    class NotWanted(Exception): ...

    sent: list[int] = []
    wanted = threading.Event()
    wanted.set()

    def check() -> None:
        if not wanted.is_set():
            raise NotWanted

    def send(event: str, number: int, asked: Mapping[str, Any]) -> None:
        sent.append(number)
        if asked["what"] == "leave":
            wanted.clear()

    questions = Questions(send, check)
    with pytest.raises(NotWanted):
        questions.ask({"what": "leave"})
    wanted.set()
    questions.hear({"number": 1, "answer": {"text": "too late"}})
    questions.hear({"number": 2, "answer": {"text": "yes"}})
    assert questions.ask({"what": "describe"}) == {"text": "yes"} and sent == [1, 2]


def test_captioners_take_gpus_that_no_group_has_use_for() -> None:
    assert captioner_place([8, 8], 1) == 0 and captioner_place([7, 8], 1) == 1
    assert captioner_place([8, 6], 4) == 1  # whose last two make no group
    assert captioner_place([0, 1], 1) == 1


def test_workers_get_the_gpus_that_captioners_leave(caplog: pytest.LogCaptureFixture) -> None:
    two = {"a": 8, "b": 6}

    def places(gpus: Mapping[str, int] = two, **settings: Any) -> Places:
        return choose_places(Settings(**settings), gpus)

    assert places() == Places(14, 8, uses_gpus=True, captioners=[])
    assert places(gpus_per_job=4, captioners=2) == Places(3, 2, uses_gpus=True, captioners=["b", "b"])
    assert places({"a": 2}, captioners=1) == Places(1, 1, uses_gpus=True, captioners=["a"])
    assert places({"a": 2, "b": 2}, gpus_per_job=2, captioners=1).captioners == ["a"]  # the other makes a group
    assert places(workers=3) == Places(3, 3, uses_gpus=True, captioners=[])
    assert places(workers=20, address="head:6379").size == 20 and "until the cluster has grown" in caplog.text
    assert places({"a": 0, "b": 0}, workers=3, captioners=1) == Places(3, 2, uses_gpus=False, captioners=[""])
    for message, gpus, given in (
        ("gpus_per_job 2: Ray sees no GPU", {"a": 0}, {"gpus_per_job": 2}),
        ("gpus_per_job 9 is more than a machine has; the most are 8", two, {"gpus_per_job": 9}),
        ("captioners 1 leave no worker 1 GPUs", {"a": 1}, {"captioners": 1}),
        ("workers 20 of 1 GPUs each are more than the 14 GPUs are for; 14 are the most", two, {"workers": 20}),
    ):
        with pytest.raises(UserError, match=message):
            places(gpus, **given)


def test_where_the_vlm_is_may_be_said_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--videos", str(SHAPES), "--ckpt_dir", "m", "--output_dir", str(tmp_path / "{name}"), "--captioners", "1"]
    assert cli.batch_main([*words, "--vlm_url", "http://127.0.0.1:1/v1"]) == 2
    assert capsys.readouterr().err == "error: --vlm_url and --captioners each say where the VLM is; give one of them\n"


@pytest.mark.slow
@pytest.mark.rare
def test_prompts_by_a_shared_captioner_that_was_killed_are_those_of_lone_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from wan.batch import crew

    # a worker that opened a captioner of its own would fail
    program = "import wan.prompting as p; p.open_captioner = None; from wan.server.worker import main; main()"
    monkeypatch.setattr(crew, "WORKER", (sys.executable, "-c", program))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as the run that it is compared with
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = [{"video": str(SHAPES), "name": f"job {n}", "seed": 10 * n} for n in range(2)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    each = ["--ckpt_dir", str(MODELS / "tiny-Wan2.2-TI2V-5B"), "--vlm_path", str(MODELS / "tiny-InternVL")]
    each += ["--frame_num", "5", "--sample_steps", "1", "--num_videos", "2"]
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and not killed:
            for process in psutil.Process().children(recursive=True):
                try:
                    is_describer = process.cmdline()[0].startswith("ray::Describer")
                except (psutil.Error, IndexError):
                    continue
                if is_describer and list(tmp_path.glob("runs/*/video_01*.json")):
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    words = ["--videos", str(tmp_path / "list.jsonl"), "--output_dir", str(tmp_path / "runs/{name}"), "--workers", "2"]
    code = cli.batch_main([*words, "--captioners", "1", *each])
    killer.join()
    assert code == 0 and killed
    for row in rows:
        lone = ["--video", str(SHAPES), "--output_dir", str(tmp_path / "lone" / row["name"])]  # type: ignore[operator]
        assert cli.continuous_main([*lone, "--base_seed", str(row["seed"]), *each]) == 0
        assert prompts(tmp_path / "runs" / str(row["name"])) == prompts(tmp_path / "lone" / str(row["name"])) != []


def prompts(folder: Path) -> list[Any]:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("video_*.json"))]
    return [(record["prompt"], record["answers"], record["vlm_path"]) for record in records]
