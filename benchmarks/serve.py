"""How a server stands load and kills, with a model that sleeps: `python -m benchmarks.serve load|kill`.

`load`: clients poll, listen and upload while a chain is made; the chain is made once without them before. `kill`: the
server, or its worker alone, is killed with SIGKILL at random moments while three chains wait; their states are
compared with those of a server that nobody killed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from safetensors import safe_open

from tests.support.served import SHAPES, Served, serving
from wan.server.supervisor import MOST_ATTEMPTS

WORDS = ("--frame_num", "5", "--sample_steps", "10")


class Client:
    """One connection that asks again and again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.waited: list[float] = []
        self.failed: list[str] = []

    async def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> Any:
        """The JSON of an answer. A GET's time is kept, and whatever is no 2xx."""
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
            if method != "GET":
                head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            writer.write(head.encode() + b"\r\n" + body)
            await writer.drain()
            answer = await reader.read()
        finally:
            writer.close()
        if method == "GET":
            self.waited.append(time.perf_counter() - began)
        top, _, data = answer.partition(b"\r\n\r\n")
        status = top.split(b" ", 2)[1:2]
        if not status or not status[0].startswith(b"2"):
            self.failed.append(f"{method} {path}: {top[:60]!r} {data[:200]!r}")
            return {}
        if method == "GET":  # the time of reading it would be taken from the server
            return {}
        try:
            return json.loads(data)
        except ValueError:
            return {}

    async def poll(self, name: str, until: float) -> None:
        """Look at a chain, at the list and at the page."""
        while time.monotonic() < until:
            for path in (f"/v1/videos/{name}", f"/v1/chains/{name}", "/v1/videos", f"/parts/chains/{name}"):
                await self.ask("GET", path)
                await asyncio.sleep(random.uniform(0.3, 0.7))

    async def listen(self, name: str, until: float) -> int:
        """Hear events, and go away in the middle of them now and then; returns how many there were."""
        heard = 0
        while time.monotonic() < until:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(f"GET /v1/chains/{name}/events HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n\r\n".encode())
                end = min(until, time.monotonic() + random.uniform(5, 20))
                while time.monotonic() < end:
                    try:
                        line = await asyncio.wait_for(reader.readline(), max(end - time.monotonic(), 0.01))
                    except asyncio.TimeoutError:
                        break
                    if not line:
                        break
                    heard += line.startswith(b"event:")
            finally:
                writer.close()
        if not heard:
            self.failed.append("no event was heard")
        return heard

    async def upload(self, until: float, every: float) -> int:
        """Send a video as a draft and remove it; each third time go away in the middle. Returns how many were whole."""
        data, sent = form({"start": "false", "prompt": "On."}, SHAPES.read_bytes()), 0
        while time.monotonic() < until:
            await asyncio.sleep(random.uniform(0, every))
            if random.random() < 1 / 3:
                _, writer = await asyncio.open_connection(self.host, self.port)
                head = f"POST /v1/chains HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: {FORM}\r\n"
                writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
                await writer.drain()
                writer.close()
                continue
            made = await self.ask("POST", "/v1/chains", data, FORM)
            if "id" in made:
                await self.ask("DELETE", f"/v1/chains/{made['id']}")
                sent += 1
        return sent


FORM = "multipart/form-data; boundary=edge"


def form(fields: dict[str, str], video: bytes) -> bytes:
    """The body of a form with a video."""
    parts = "".join(f'--edge\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items())
    head = '--edge\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\n'
    return (parts + head).encode() + video + b"\r\n--edge--\r\n"


def order(served: Served, clips: int, seed: int, prompt: str = "On.") -> str:
    """Ask for a chain."""
    fields = {"num_videos": clips, "base_seed": seed, "prompt": prompt}
    status, chain = served.send("/v1/chains", fields, [("video", "a.mp4", SHAPES.read_bytes())])
    assert status == 201, chain
    return str(chain["id"])


async def load(clients: int, seconds: float, every: float, folder: Path) -> dict[str, Any]:
    """A chain alone, then one with clients."""
    os.environ["SLEEP_STEP"] = "0.1"
    clips = max(int(seconds / 1.3), 2)
    with serving(folder, *WORDS, program=("benchmarks.sleeping",)) as served:
        warm = order(served, 2, 1)
        await asyncio.to_thread(served.wait, warm, "completed")
        alone = await timed(served, order(served, clips, 2), clips)
        process = psutil.Process(served.process.pid)
        name = order(served, clips, 3)
        await asyncio.to_thread(served.wait, name, "in_progress")
        until = time.monotonic() + seconds
        crowd = [Client(served.url) for _ in range(clients)]
        kinds = [
            client.upload(until, every)
            if n % 5 == 0
            else client.listen(name, until)
            if n % 5 == 1
            else client.poll(name, until)
            for n, client in enumerate(crowd)
        ]
        memory = list[float]()

        async def weigh() -> None:
            while time.monotonic() < until:
                memory.append(process.memory_info().rss / 2**20)
                await asyncio.sleep(1)

        done: list[Any] = await asyncio.gather(timed(served, name, clips), weigh(), *kinds)
        left = [path.name for path in (folder / "jobs").glob(".*")] + list((folder / ".uploads").iterdir())
    waited = sorted(time for client in crowd for time in client.waited)
    failed = [line for client in crowd for line in client.failed]
    third = len(memory) // 3 or 1
    return {
        "clients": clients,
        "gets": len(waited),
        "uploads": sum(done[2 + n] for n in range(0, clients, 5)),
        "lost": len(failed),
        "first_lost": failed[:3],
        "get_p50_ms": round(1000 * statistics.median(waited), 1),
        "get_p95_ms": round(1000 * waited[int(0.95 * len(waited))], 1),
        "rss_mib_first_and_last_third": [
            round(statistics.mean(memory[:third]), 1),
            round(statistics.mean(memory[-third:]), 1),
        ],
        "clip_s_alone": round(alone, 4),
        "clip_s_loaded": round(done[0], 4),
        "slower_percent": round(100 * (done[0] / alone - 1), 2),
        "left": len(left),
    }


async def timed(served: Served, name: str, clips: int) -> float:
    """Seconds of a clip: sampling, as the worker's clock has it, and all else between two clips."""
    chain = await asyncio.to_thread(served.wait, name, "in_progress", "completed")
    began = time.monotonic() if chain["status"] == "in_progress" else 0.0
    chain = await asyncio.to_thread(served.wait, name, "completed", seconds=600)
    return (time.monotonic() - began) / clips


def _clips(folder: Path) -> int:
    return len(glob("war/jobs/*/run/video_*.json", root_dir=folder))


def kill(kills: int, folder: Path, *, clips: int = 4, step: float = 0.1) -> dict[str, Any]:
    """Three chains that are killed again and again, and the same three in peace."""
    os.environ["SLEEP_STEP"] = str(step)
    seeds = (100, 200, 300)
    with serving(folder / "peace", *WORDS, program=("benchmarks.sleeping",)) as served:
        names = [order(served, clips, seed) for seed in seeds]
        for name in names:
            served.wait(name, "completed")
    wanted = [states(folder / "peace" / "jobs" / name / "run") for name in names]
    names, killed = [], 0
    finished, in_vain = (
        0,
        0,
    )  # kills since the last clip was finished: a chain that ends its worker three times has failed
    while True:
        with serving(folder / "war", *WORDS, program=("benchmarks.sleeping",)) as served:
            names = names or [order(served, clips, seed) for seed in seeds]
            while killed < kills:
                while served.ask("/health")[1]["worker"] == "starting":
                    time.sleep(0.05)
                time.sleep(random.uniform(0, clips * 3 * 10 * step / kills * 2))
                if in_vain == MOST_ATTEMPTS - 1:
                    while _clips(folder) == finished:
                        time.sleep(0.05)
                    time.sleep(0.5)  # until the server knows of it
                in_vain = in_vain + 1 if _clips(folder) == finished else 1
                finished = _clips(folder)
                whole = random.random() < 0.5
                server = psutil.Process(served.process.pid)
                workers = [one for one in server.children() if "work" in one.cmdline()]
                for victim in [server] if whole else workers:
                    os.kill(victim.pid, signal.SIGKILL)
                killed += 1
                if whole:
                    served.process.wait()
                    break
                time.sleep(1)  # until that is seen
            else:
                ends = [served.wait(name, "completed", "failed", seconds=300)["status"] for name in names]
                break
    runs = [folder / "war" / "jobs" / name / "run" for name in names]
    return {
        "kills": killed,
        "ends": ends,
        "bit_equal": [states(run) for run in runs] == wanted,
        "made_twice": sum(len(list(run.glob("redone/video_*.json"))) for run in runs),
        "left": sorted(path.name for path in (folder / "war" / "jobs").glob(".*")),
    }


def states(run: Path) -> dict[str, Any]:
    """What is in the states of the clips in a folder: digests of their tensors, and what they were made with."""
    by_name: dict[str, Any] = {}
    for path in sorted(run.glob("video_*.safetensors")):
        with safe_open(path, framework="numpy") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            digests = {key: hashlib.sha256(tensor.tobytes()).hexdigest() for key, tensor in tensors.items()}
            by_name[path.name] = digests, opened.metadata()  # of which a file keeps no order
    return by_name


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("load", "kill"))
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--every", type=float, default=20, help="seconds between two uploads of a client, at most")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        result = (
            asyncio.run(load(given.clients, given.seconds, given.every, Path(folder) / "out"))
            if given.what == "load"
            else kill(given.kills, Path(folder))
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
