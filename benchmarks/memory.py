#!/usr/bin/env python3
"""One clip from a checkpoint folder within so much GPU and host memory: does it hold, and with the same frames?

    python -m benchmarks.memory FOLDER --video FILE [--whole] [--warm] [--vram 24 16] [--host 64 32] [--minutes 9]
        [-- FLAG ...]

With `--whole` the first run has no limits. Each other one has `--vram` and `--host_memory` of its pair, and is in a
memory group of that size where groups may be made. What the GPU's driver counts is seen from outside, and so is host
memory that cannot be reclaimed. `default` in place of a number of `--vram` leaves the flag out; with `default:24`
another process holds all but 24 GiB of the GPU meanwhile; it is the first that CUDA_VISIBLE_DEVICES names, by number.
What stands after `--` is for generate.py. Each run reads its files from the disk where the system lets us drop what it
keeps of them, which `--warm` leaves out. Prints a line for each run and JSON, and exits with 1 if a run fails, takes
more than its limit, or makes another mp4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
GROUPS = Path("/sys/fs/cgroup")
EVERY = 0.2  # seconds between two looks


class Group:
    """A memory group of a size (GiB; None: no limit), where the system lets us make one."""

    def __init__(self, size: float | None) -> None:
        self.folder: Path | None = None
        version_1 = (GROUPS / "memory").is_dir()
        if not version_1:  # the groups below the root have limits where it hands them on
            with suppress(OSError):
                (GROUPS / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
        folder = (GROUPS / "memory" if version_1 else GROUPS) / f"benchmark_{os.getpid()}_{time.time_ns()}"
        try:
            folder.mkdir()
            limit = folder / ("memory.limit_in_bytes" if version_1 else "memory.max")
            if size is not None:
                limit.write_text(str(int(size * GIB)), encoding="ascii")
                swap = folder / "memory.swap.max"  # what is swapped out would not be counted
                if swap.is_file():
                    swap.write_text("0", encoding="ascii")
            (folder / "memory.stat").read_text(encoding="ascii")
            self.folder = folder
        except OSError as error:
            print(f"     no memory group ({error.strerror}): the limit is the flag's alone", flush=True)
            if folder.is_dir():
                folder.rmdir()

    def join(self) -> None:
        """Called in the new process before it becomes the command."""
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def taken(self, process: psutil.Process) -> int:
        """Bytes of host memory that cannot be reclaimed."""
        if self.folder is not None:
            rows = (row.split() for row in (self.folder / "memory.stat").read_text(encoding="ascii").splitlines())
            stat = {name: int(value) for name, value in rows}
            return stat.get("anon", stat.get("total_rss", 0)) + stat.get("shmem", stat.get("total_shmem", 0))
        try:
            family = [process, *process.children(recursive=True)]
            return sum(one.memory_info().rss - getattr(one.memory_info(), "shared", 0) for one in family)
        except psutil.Error:  # one of them has ended
            return 0

    def close(self) -> None:
        """Remove the group, whose processes have ended."""
        if self.folder is not None:
            self.folder.rmdir()


def asked(*query: str) -> list[list[str]]:
    """The rows of an answer of nvidia-smi about the GPU that runs use; none without one."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    try:
        command = ["nvidia-smi", *query, "--format=csv,noheader,nounits", f"--id={gpu}"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [[cell.strip() for cell in row.split(",")] for row in printed.splitlines() if row.strip()]


def gpu_bytes(processes: Collection[int] = ()) -> int:
    """What the driver counts on the GPU, of these processes or of all; 0 without one."""
    if processes:
        rows = asked("--query-compute-apps=pid,used_memory")
        return sum(int(size) * 2**20 for pid, size in rows if int(pid) in processes and size.isdecimal())
    return sum(int(row[0]) * 2**20 for row in asked("--query-gpu=memory.used"))


HOLD = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
held = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


@contextmanager
def free_only(size: float | None) -> Iterator[None]:
    """No more than so many GiB of the GPU are free meanwhile (None: what is)."""
    if size is None:
        yield
        return
    command = [sys.executable, "-c", HOLD, str(int(size * GIB))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        print(f"     free of the GPU: {int(holder.stdout.readline()) / GIB:.2f} GiB", flush=True)
        try:
            yield
        finally:
            holder.stdin.close()


def drop_cached_files() -> None:
    """Let files be read from the disk again, where we may say so."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")
    except OSError as error:
        print(f"     files may still be in memory ({error.strerror})", flush=True)


def pids_of(process: psutil.Process) -> set[int]:
    """Its own and those of what it has started."""
    try:
        return {process.pid, *(child.pid for child in process.children(recursive=True))}
    except psutil.Error:  # it has ended
        return {process.pid}


def run(command: Sequence[str], host: float | None, until: float, warm: bool = False) -> dict[str, Any]:
    """The command's exit code, seconds and peaks; it is ended at the time `until`."""
    if not warm:
        drop_cached_files()
    group, before, peaks, own_peak = Group(host), gpu_bytes(), [0, 0], 0
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed:
        child = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=printed, preexec_fn=group.join)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            own_peak = max(own_peak, gpu_bytes(pids_of(process)))
            peaks = [max(peaks[0], gpu_bytes() - before), max(peaks[1], group.taken(process))]
            if time.monotonic() > until:
                child.terminate()
                child.wait()
                break
            time.sleep(EVERY)
        printed.seek(0)
        last = [line for line in printed.read().replace("\r", "\n").splitlines() if line.strip()][-3:]
    group.close()
    return {
        "code": child.returncode,
        "seconds": round(time.monotonic() - begun, 1),
        "gpu_gib": round((own_peak or peaks[0]) / GIB, 2),  # a driver that knows no processes has the whole GPU's alone
        "host_gib": round(peaks[1] / GIB, 2),
        "said": last,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkpoint folder")
    parser.add_argument("--video", required=True, help="the clip to continue")
    parser.add_argument(
        "--vram", nargs="*", default=["24", "16"], metavar="GIB", help="or `default`, `default:GIB` or auto"
    )
    parser.add_argument("--host", nargs="*", type=float, default=[64, 32], metavar="GIB", help="one for each of --vram")
    parser.add_argument("--whole", action="store_true", help="begin with a run without limits")
    parser.add_argument("--warm", action="store_true", help="files may stay in memory, as they are in it")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompt", default="It goes on.", help="empty: a captioner describes")
    parser.add_argument("--minutes", type=float, default=9, help="of all runs together")
    # argparse takes what follows -- for arguments of ours where a flag stands before it
    ours, more = (sys.argv[1:], [])
    if "--" in ours:
        ours, more = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    args = parser.parse_args(ours)

    until, results, failed = time.monotonic() + 60 * args.minutes, [], []
    wanted: list[tuple[str, float | None]] = list(zip(args.vram, args.host, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        first: bytes | None = None
        for number, (vram, host) in enumerate([("default", None), *wanted] if args.whole else wanted):
            target = Path(folder) / f"{number}.mp4"
            command = [sys.executable, "generate.py", "--ckpt_dir", args.folder, "--video", args.video]
            command += ["--sample_steps", str(args.steps), "--base_seed", "1", "--save_file", str(target)]
            command += ["--no_video_metadata", *(["--prompt", args.prompt] if args.prompt else []), *more]
            name, _, free = vram.partition(":")
            command += [] if name == "default" else ["--vram", vram]
            command += [] if host is None else ["--host_memory", f"{host:g}"]
            with free_only(float(free) if free else None):
                made = {"vram": vram, "host": host} | run(command, host, until, args.warm)
            if target.exists():
                first = first or target.read_bytes()
                record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
                made |= {"same": target.read_bytes() == first, "stages": record["seconds"]}
            right = made["code"] == 0 and made.get("same")
            right = right and (host is None or made["host_gib"] <= host)
            right = right and (vram in ("default", "auto") or made["gpu_gib"] <= float(free or vram))
            print("ok  " if right else "FAIL", made, flush=True)
            results.append(made)
            failed += [] if right else [number]
    print(json.dumps(results))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
