"""Kills chains with SIGKILL, goes on with them, and compares; run by test_resume.py in a process of its own.

    python -m tests.support.kill_runs CHECKPOINT VIDEO FOLDER KILLS

Every run is a fork of this process, which has imported everything and computed nothing. An event is the beginning of a
stage, a solver step, or the moment before a file gets its name. One run is stopped at every event, with all its
threads, while its folder is copied: the copy is what SIGKILL would leave at that moment. Each copy that differs from
all before it is resumed. Then runs are really killed, KILLS at events and as many at random moments. The last line is
JSON.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2  # noqa: F401  (here once rather than in each of seventy runs, as all that says so)
import torch
from PIL import Image
from pydantic import type_adapter  # noqa: F401
from safetensors.torch import load_file
from transformers.models.umt5 import modeling_umt5  # noqa: F401

import tests.support.small_convolutions  # noqa: F401
import wan.commands.continuous
import wan.commands.gpus
import wan.commands.steering
import wan.upscaling
import wan.vae.preview  # noqa: F401
from wan import cli
from wan.chain import report
from wan.commands.progress import Progress
from wan.wan22video2video5B import WanV2V5B

torch.set_num_threads(1)
Image.preinit()
report._template()
gc.collect()
gc.freeze()  # a collection in a run would copy all the memory that it shares with this process
CLIPS = 3


def chain(
    checkpoint: str, video: str, folder: Path, kill_at: int = 0, at_event: Callable[[], None] | None = None
) -> int:
    """Fork a run; returns its exit code, or -9 when it was killed at event `kill_at`, counted from 1.

    With `at_event` the run is stopped at every event while `at_event` is called.
    """
    child = os.fork()
    if child:
        while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
            assert at_event is not None
            at_event()
            os.kill(child, signal.SIGCONT)
        return os.waitstatus_to_exitcode(status)
    events = itertools.count(1)  # of several threads

    def event(*_: Any) -> None:
        number = next(events)
        if at_event is not None:
            os.kill(os.getpid(), signal.SIGSTOP)
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("replace", "rename"):
        original = getattr(os, name)

        def counted(source: Any, target: Any, original: Any = original, **options: Any) -> Any:
            event()  # what is on disk after a name was given is what is there before the next one is
            return original(source, target, **options)

        setattr(os, name, counted)
    extend = WanV2V5B.extend

    def watched(self: Any, footage: Any, seed: int, plan: Any, on_step: Any = None, **more: Any) -> Any:
        begun = set[tuple[str, int, bool]]()

        def heard(step: Any) -> None:
            """What is told inside a stage changes nothing on disk, and whether it waits for a load is chance."""
            place = step.stage, step.index, step.latents is None
            if not step.detail and place not in begun:
                begun.add(place)
                event()

        return extend(self, footage, seed, plan, heard, **more)

    WanV2V5B.extend = watched  # type: ignore[method-assign]
    Progress.begin = lambda *_: event()  # type: ignore[method-assign]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    flags = ["--ckpt_dir", checkpoint, "--video", video, "--output_dir", str(folder), "--prompt", "it goes on"]
    code = cli.continuous_main([*flags, "--num_videos", str(CLIPS), "--frame_num", "5", "--base_seed", "3"])
    os._exit(code)


def content(folder: Path) -> dict[str, Any]:
    """The exact tensors of every finished clip, the frames of the joined video, and the names of all files."""
    states = {path.name: load_file(path) for path in sorted(folder.glob("video_*.safetensors"))}
    with av.open(str(folder / "joined.mp4")) as joined:
        frames = sum(1 for _ in joined.decode(video=0))
    return states | {"frames": frames, "names": sorted(path.name for path in folder.iterdir())}


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What is not the same in two folders, nothing if all is."""
    # x264 does not always make the same bytes of the same frames, so of the joined video only the count is compared
    differing = [f"{key}: {one[key]}, not {other[key]}" for key in ("frames", "names") if one[key] != other[key]]
    for name in (name for name in sorted(one.keys() & other.keys()) if name.endswith(".safetensors")):
        differing += [f"{key} in {name}" for key in other[name] if not torch.equal(one[name][key], other[name][key])]
    return "; ".join(differing)


def finished(folder: Path) -> dict[str, int]:
    """The clips that were finished, and when."""
    records = sorted(folder.glob("video_*.json")) if folder.is_dir() else []
    return {path.name: path.with_suffix(".mp4").stat().st_mtime_ns for path in records}


def digest(folder: Path) -> str:
    """Of all files and their names, whatever the random part of a temporary name."""
    summed = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = re.sub(r"\.\w+\.part$", ".part", path.name)
        summed.update(f"{path.parent.relative_to(folder)}/{name}".encode())
        if path.is_file():
            summed.update(hashlib.sha256(path.read_bytes()).digest())
    return summed.hexdigest()


def main() -> None:
    checkpoint, video, home, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    copies: dict[str, tuple[int, Path]] = {}  # by digest: the event, the folder
    events, wrong, killed = 0, [], 0

    def copy() -> None:
        nonlocal events
        events += 1
        if (home / "whole").is_dir() and (known := digest(home / "whole")) not in copies:
            copies[known] = events, home / f"copy_{events}"
            shutil.copytree(home / "whole", home / f"copy_{events}")

    assert chain(checkpoint, video, home / "whole", at_event=copy) == 0
    whole = content(home / "whole")

    def check(folder: Path, name: str) -> None:
        before = finished(folder)
        code = chain(checkpoint, video, folder)
        after = finished(folder)
        different = differences(content(folder), whole) if code == 0 else ""
        if code or different:
            wrong.append(f"{name}: exit code {code}; {different}")
        if any(after.get(clip) != stamp for clip, stamp in before.items()):
            wrong.append(f"{name}: a finished clip was made again")
        shutil.rmtree(folder)

    for number, folder in copies.values():
        check(folder, f"event {number}")
    for number in (1 + round(part * (events - 1) / (kills - 1)) for part in range(kills)):
        if chain(checkpoint, video, home / "killed", kill_at=number) != -signal.SIGKILL:
            wrong.append(f"event {number}: not killed")
        killed += 1
        (home / "killed").mkdir(exist_ok=True)
        check(home / "killed", f"killed at event {number}")
    start = time.perf_counter()
    assert chain(checkpoint, video, home / "again") == 0
    seconds, moments = time.perf_counter() - start, random.Random(0)
    for number in range(kills):
        child = os.fork()
        if child == 0:
            os._exit(chain(checkpoint, video, home / "killed") and 1)
        time.sleep(moments.uniform(0, seconds))
        # the run is the child of this child: kill both
        for process in Path(f"/proc/{child}/task/{child}/children").read_text().split():
            os.kill(int(process), signal.SIGKILL)
            killed += 1
        os.waitpid(child, 0)
        (home / "killed").mkdir(exist_ok=True)
        check(home / "killed", f"random {number}")
    print(json.dumps({"events": events, "copies": len(copies), "kills": killed, "wrong": wrong}))


if __name__ == "__main__":
    main()
