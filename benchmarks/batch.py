"""How a batch stands kills: `python -m benchmarks.batch fake|tiny|twice|between|gpus`. The last line is JSON.

`fake`: jobs of a model that sleeps, while a worker's process is killed every few seconds; each process has a clock of
its own, up to a day off, and one job ends whichever process makes it. `tiny`: jobs of the tiny 5B with kills, whose
states are compared with those of lone runs. `twice`: two commands make one list at once. `between`: how long a worker
computes nothing between two chains of one clip, when it waits for their files and when it does not. `gpus`: chains on
all GPUs of this machine against one after another on one GPU, with a real checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from wan.files import write_json

CLIPS = 3
DAY = 86400.0
LINE, SAID = "made.log", "said.log"


# --- the model that sleeps


def work() -> int:
    """A worker that speaks as `wan.server.worker` does, and whose clips are files that say who made them."""
    from filelock import FileLock, Timeout

    skew, pause = random.uniform(-DAY, DAY), float(os.environ.get("SLEEP_CLIP", "0.1"))
    behind, talking = threading.Thread(), threading.Lock()

    def say(event: str, **more: Any) -> None:
        with talking:
            print(json.dumps({"event": event, **more}), flush=True)

    def write(name: str, folder: Path, number: int) -> None:
        file = folder / f"clip_{number}.json"
        write_json(file, {"clip": number})
        with (folder / LINE).open("a", encoding="utf-8") as log:
            log.write(f"{number}\n")
        os.utime(file, (time.time() + skew, time.time() + skew))
        write_json(folder / "run.json", {"clips_finished": number, "when": time.time() + skew})
        say("clip_finished", id=name, clip=number, count=CLIPS, seam=None)

    def make(name: str, folder: Path, ahead: bool) -> threading.Thread | None:
        """With `ahead` the thread that is to write its last clip."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", thread_local=False)
        lock.acquire(blocking=False)
        finished = len(list(folder.glob("clip_*.json")))
        say("there", id=name, done=finished, count=CLIPS)
        for number in range(finished + 1, CLIPS + 1):
            say("clip_started", id=name, clip=number, count=CLIPS, seed=number)
            time.sleep(pause)
            if name == "poison":
                os.abort()
            if ahead and number == CLIPS:
                return threading.Thread(target=write_last, args=(name, folder, lock))
            write(name, folder, number)
        lock.release()
        say("end", id=name, state="completed")
        return None

    def write_last(name: str, folder: Path, lock: FileLock) -> None:
        time.sleep(pause)
        write(name, folder, CLIPS)
        lock.release()
        say("end", id=name, state="completed")

    sys.stdin.readline()
    say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        if "cancel" in order:
            continue
        name, folder = order["id"], Path(order["settings"]["output_dir"])
        if order["check"]:
            missing = CLIPS - len(list(folder.glob("clip_*.json")))
            estimate: dict[str, Any] = {
                "clips": CLIPS,
                "missing": missing,
                "work": float(missing),
                "seconds": pause * missing,
            }
            estimate |= {"measured": False, "disk_bytes": 0.0, "status": "" if missing else "finished"}
            say("end", id=name, state="checked", found=estimate)
            continue
        try:
            last = make(name, folder, order["ahead"])
        except Timeout:
            say("end", id=name, state="failed", error={"code": "in_use", "message": "in use"})
            continue
        if last is not None:
            if behind.ident is not None:
                behind.join()
            behind = last
            behind.start()
            say("made", id=name)
    return 0


def command(words: Sequence[str]) -> int:
    """`generate_batch.py` with that model."""
    from wan.batch import crew
    from wan.cli import batch_main

    crew.WORKER = (sys.executable, "-m", "benchmarks.batch", "work")
    return batch_main(words)


# --- what is measured


def begin(folder: Path, jobs: Sequence[dict[str, Any]], *words: str, fake: bool) -> subprocess.Popen[bytes]:
    """A batch command that runs."""
    (folder / "list.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    program = ["-m", "benchmarks.batch", "command"] if fake else ["generate_batch.py"]
    given = ["--videos", str(folder / "list.jsonl"), "--output_dir", str(folder / "runs" / "{name}"), *words]
    with (folder / SAID).open("w", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, *program, *given], stderr=log)


def workers_of(running: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a batch that make chains."""
    workers = []
    for process in psutil.Process(running.pid).children(recursive=True):
        try:
            if process.cmdline()[-2:] in (["benchmarks.batch", "work"], ["-m", "wan.server.worker"]):
                workers.append(process)
        except psutil.Error:
            continue
    return workers


def harass(running: subprocess.Popen[bytes], every: float) -> int:
    """Kill a worker every so many seconds until the batch ends; returns how many."""
    kills = 0
    while True:
        try:
            running.wait(every)
            return kills
        except subprocess.TimeoutExpired:
            if workers := workers_of(running):
                random.choice(workers).kill()
                kills += 1


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What batch.jsonl says."""
    return [json.loads(line) for line in (folder / "runs/batch.jsonl").read_text(encoding="utf-8").splitlines()]


def fake(jobs: int, every: float, workers: int, folder: Path) -> dict[str, Any]:
    """Kills among jobs of the model that sleeps, one of which is poisoned."""
    video = str(Path("examples/shapes.mp4").absolute())
    rows = [{"video": video, "name": f"job {number}"} for number in range(jobs)] + [{"video": video, "name": "poison"}]
    words = ("--ckpt_dir", "m", "--workers", str(workers), "--max_failures", "5")
    began = time.monotonic()
    running = begin(folder, rows, *words, fake=True)
    kills = harass(running, every)
    seconds = time.monotonic() - began
    printed = (folder / SAID).read_text(encoding="utf-8")
    states = rows_of(folder)
    logs = {path.parent.name: path.read_text(encoding="utf-8").split() for path in (folder / "runs").glob(f"*/{LINE}")}
    again = begin(folder, rows[:-1], *words, fake=True)
    again_code = again.wait()
    return {
        "jobs": jobs,
        "kills": kills,
        "seconds": round(seconds),
        "exit": running.returncode,
        "last_line": printed.strip().splitlines()[-1][-200:],
        "states": Counter(row["state"] for row in states),
        "poison": next((row["state"], row["failures"]) for row in states if row["name"] == "poison"),
        "failures": sum(row["failures"] for row in states),
        "made_twice": sum(len(log) - len(set(log)) for log in logs.values()),
        "clips": len(list((folder / "runs").glob("job */clip_*.json"))),
        "again_exit": again_code,
        "made_again": sum(row["clips_made_now"] for row in rows_of(folder)),
    }


def twice(jobs: int, workers: int, folder: Path) -> dict[str, Any]:
    """Two commands on one list."""
    video = str(Path("examples/shapes.mp4").absolute())
    rows = [{"video": video, "name": f"job {number}"} for number in range(jobs)]
    words = ("--ckpt_dir", "m", "--workers", str(workers))
    both = [begin(folder, rows, *words, "--report_dir", str(folder / one), fake=True) for one in ("one", "two")]
    codes = [one.wait() for one in both]
    made = [
        [json.loads(line) for line in (folder / one / "batch.jsonl").read_text(encoding="utf-8").splitlines()]
        for one in ("one", "two")
    ]
    logs = [path.read_text(encoding="utf-8").split() for path in (folder / "runs").glob(f"*/{LINE}")]
    return {
        "exits": codes,
        "states": [Counter(row["state"] for row in one) for one in made],
        "clips_by_each": [sum(row["clips_made_now"] for row in one) for one in made],
        "made_twice": sum(len(log) - len(set(log)) for log in logs),
        "clips": sum(len(log) for log in logs),
    }


def tiny(jobs: int, every: float, workers: int, folder: Path) -> dict[str, Any]:
    """Kills among jobs of the tiny 5B, against lone runs."""
    from benchmarks.serve import states
    from tests.support.served import MODELS, SHAPES
    from wan.cli import continuous_main

    rows: list[dict[str, Any]] = [
        {"video": str(SHAPES), "name": f"job {number}", "seed": 100 * number} for number in range(jobs)
    ]
    each = ["--ckpt_dir", str(MODELS / "tiny-Wan2.2-TI2V-5B"), "--vlm_path", str(MODELS / "tiny-InternVL")]
    each += ["--num_videos", str(CLIPS), "--frame_num", "5", "--sample_steps", "2"]
    began = time.monotonic()
    running = begin(folder, rows, "--workers", str(workers), "--max_failures", "10", *each, fake=False)
    kills = harass(running, every)
    seconds = time.monotonic() - began
    differ = []
    for row in rows:
        alone = folder / "alone" / row["name"]
        words = ["--video", row["video"], "--base_seed", str(row["seed"]), "--output_dir", str(alone), "--quiet"]
        assert continuous_main([*words, *each]) == 0
        if not states(alone) or states(alone) != states(folder / "runs" / row["name"]):
            differ.append(row["name"])
    return {
        "jobs": jobs,
        "kills": kills,
        "seconds": round(seconds),
        "exit": running.returncode,
        "states": Counter(row["state"] for row in rows_of(folder)),
        "failures": sum(row["failures"] for row in rows_of(folder)),
        "made_twice": len(list((folder / "runs").glob("*/redone"))),
        "differ": differ,
    }


def between(jobs: int, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Chains of one clip by one worker, alone and ahead: the tiny 5B, or the flags of another checkpoint."""
    return {name: asyncio.run(_between(jobs, words, folder / name, name == "ahead")) for name in ("alone", "ahead")}


async def _between(jobs: int, words: Sequence[str], folder: Path, ahead: bool) -> dict[str, Any]:
    from tests.support.served import MODELS, SHAPES
    from wan.batch.hand import WRITING, Hand
    from wan.commands.flags import parse
    from wan.server.wire import as_json

    tiny = ("--video", str(SHAPES), "--ckpt_dir", str(MODELS / "tiny-Wan2.2-TI2V-5B"), "--prompt", "On.")
    worker = Hand((sys.executable, "-m", "wan.server.worker"), 1, 1, os.getcwd(), os.environ.get("OMP_NUM_THREADS"))
    await worker.start()
    spans, chains = list[tuple[float, float]](), list[dict[str, Any]]()
    written: asyncio.Task[dict[str, Any]] | None = None
    for number in range(jobs):
        given = (*(words or tiny), "--num_videos", "1", "--output_dir", str(folder / str(number)))
        settings = as_json(parse("continuous", given))
        making = asyncio.create_task(worker.do({"id": str(number), "settings": settings, "ahead": ahead}))
        began, ended = 0.0, 0.0
        while not making.done():
            look = await worker.look()
            if look["id"] == str(number) and look["stage"] not in ("", "write"):
                began, ended = began or time.monotonic(), time.monotonic()
            await asyncio.sleep(0.005)
        spans.append((began, ended))
        if written is not None:
            chains.append(await written)
            written = None
        if making.result()["state"] == WRITING:
            written = asyncio.create_task(worker.written())
        else:
            chains.append(making.result())
    if written is not None:
        chains.append(await written)
    seconds = time.monotonic() - spans[0][1]
    await worker.end()
    return {
        "states": Counter(chain["state"] for chain in chains),
        "seconds_a_chain": round(seconds / (jobs - 1), 2),
        "computes": round(statistics.median(end - begin for begin, end in spans[1:]), 2),
        "computes_nothing": round(statistics.median(two[0] - one[1] for one, two in itertools.pairwise(spans)), 2),
    }


def gpus(video: Path, words: Sequence[str], jobs: int, count: int, folder: Path) -> dict[str, Any]:
    """Clips an hour by all workers at once, and by one with its share of the jobs.

    Of each: by the whole command, and between each worker's first clip and the last one, which leaves the loading out;
    the share of seconds in which a GPU did nothing, over both spans; the most host memory that was in use.
    """
    rows = [{"video": str(video.absolute()), "name": f"job {number}", "seed": 100 * number} for number in range(jobs)]
    result: dict[str, Any] = {"workers": count, "jobs": jobs}
    for workers in (count, 1):
        place = folder / str(workers)
        place.mkdir()
        some = rows if workers == count else rows[: max(1, jobs // count)]
        result[f"{workers} at once"] = watched(place, some, workers, words)
        print(json.dumps(result), flush=True)
    both = result[f"{count} at once"], result["1 at once"]
    for name in ("clips_an_hour", "clips_an_hour_later"):
        result[f"{name}_times"] = round(both[0][name] / both[1][name], 3) if both[1][name] else None
    return result


def watched(place: Path, rows: Sequence[dict[str, Any]], workers: int, words: Sequence[str]) -> dict[str, Any]:
    """What a batch took, seen each second from outside."""
    before, began = psutil.virtual_memory(), time.time()
    used, most, per_worker = list[tuple[float, list[int]]](), 0.0, 0.0
    running = begin(place, rows, "--workers", str(workers), *words, fake=False)
    try:
        while running.poll() is None:
            used.append((time.time(), utilization()))
            now = psutil.virtual_memory()
            most = max(most, (before.available - now.available) / 2**30)
            per_worker = max([per_worker, *(memory_of(process) / 2**30 for process in workers_of(running))])
            time.sleep(1)
    finally:
        running.kill()
    if running.returncode:
        raise SystemExit(f"the batch ended with {running.returncode}: {(place / SAID).read_text()[-2000:]}")
    seconds = time.time() - began
    clips = sorted(path.stat().st_mtime for path in place.glob("runs/*/video_*.json"))
    first, last = clips[min(workers, len(clips)) - 1], clips[-1]
    later = [gpus for when, gpus in used if first <= when <= last]
    return {
        "clips": len(clips),
        "seconds": round(seconds, 1),
        "clips_an_hour": round(3600 * len(clips) / seconds, 2),
        "seconds_later": round(last - first, 1),
        "clips_an_hour_later": round(3600 * (len(clips) - workers) / (last - first), 2) if last > first else 0.0,
        "idle": idle([gpus for _, gpus in used]),
        "idle_later": idle(later),
        "host_gib": round(most, 1),
        "largest_worker_gib": round(per_worker, 1),
        **by_clip(place),
    }


def utilization() -> list[int]:
    """Percent of the last moment in which each GPU of this machine worked; nothing without a GPU."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    query = [program, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]


def idle(used: Sequence[Sequence[int]]) -> list[float]:
    """The share of looks at which each GPU did nothing."""
    return [round(sum(not percent for percent in one) / len(used), 3) for one in zip(*used, strict=True)]


def memory_of(process: psutil.Process) -> float:
    """Bytes that are a process's own, without the pages of files that it maps."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0.0
    return float(memory.rss - memory.shared)


def by_clip(place: Path) -> dict[str, list[float]]:
    """Seconds of each chain's first clip, in the order in which chains began, and of all later clips.

    A worker that keeps its models takes longer for the first clip of its first chain alone.
    """
    chains = []
    for folder in place.glob("runs/*/"):
        made = [path.stat().st_mtime for path in sorted(folder.glob("video_*.json"))]
        chains.append([min(path.stat().st_mtime for path in folder.iterdir()), *made])
    chains.sort()
    return {
        "first_clips": [round(one[1] - one[0], 1) for one in chains if len(one) > 1],
        "later_clips": [round(end - start, 1) for one in chains for start, end in itertools.pairwise(one[1:])],
    }


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words == ["work"]:
        return work()
    if words[:1] == ["command"]:
        return command(words[1:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("fake", "tiny", "twice", "between", "gpus"))
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--every", type=float, default=3.0, help="seconds from one kill to the next")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--video", type=Path, help="gpus, between: what is continued; further flags are the commands'")
    given, more = parser.parse_known_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "fake":
            result = fake(given.jobs, given.every, given.workers, folder)
        elif given.what == "tiny":
            result = tiny(given.jobs, given.every, given.workers, folder)
        elif given.what == "twice":
            result = twice(given.jobs, given.workers, folder)
        elif given.what == "between":
            video = [] if given.video is None else ["--video", str(given.video.absolute())]
            result = between(given.jobs, [*video, *more], folder)
        else:
            result = gpus(given.video, more, given.jobs, given.workers, folder)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
