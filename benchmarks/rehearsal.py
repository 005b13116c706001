#!/usr/bin/env python3
"""What a user waits for at real size, from Enter to the prompt: the real command on checkpoint folders of real size.

    python -m benchmarks.rehearsal make {5b,a14b,vlm} FOLDER [--dtype {fp32,bf16}] [--small]
    python -m benchmarks.rehearsal run FOLDER [--vlm FOLDER] [--tree COMMIT=DIR ...] [--warm] [-- FLAG ...]

`run` starts `generate.py` of each source tree (this one unless others are named) on a terminal, on cold and with
`--warm` on warm files, and prints a row for each: seconds from Enter to the first line of output, to the first bar, to
the first step that is done, to the result, from there to the prompt, and to the refusal of a budget that is too small
for the clip. Cold: the weights and the installed packages are dropped from the system's cache first. The disk's own
time is that of reading the weights one after the other, in the same run.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SIZES = {"5b": (1280, 704, 24), "a14b": (832, 480, 16)}
BAR, FIRST_STEP = re.compile(r"\d+%\||\| *\d+/|\[\d\d:\d\d"), re.compile(r"\| *[1-9]\d*/\d+ ")
RESULT = re.compile(r"^\S+\.mp4\r?$", re.MULTILINE)
COLUMNS = ("first line", "first bar", "first step", "result", "to the prompt")


def make(kind: str, folder: Path, dtype: str, small: bool) -> None:
    """A folder, made by several processes."""
    from benchmarks import full_size

    start = time.perf_counter()
    with ProcessPoolExecutor(len(full_size.jobs(kind))) as pool:
        for job in [pool.submit(full_size.make, kind, folder, part, dtype, small) for part in full_size.jobs(kind)]:
            job.result()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
    print(f"{folder}: {size:.1f} GB in {time.perf_counter() - start:.0f} s")


def weights(folders: Sequence[Path]) -> Iterator[Path]:
    """The large files of folders."""
    for folder in folders:
        yield from (file for file in sorted(folder.rglob("*")) if file.suffix in (".safetensors", ".pth"))


def forget(folders: Sequence[Path]) -> None:
    """Drop the files of folders from the system's cache."""
    os.sync()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_seconds(folders: Sequence[Path], most: int) -> tuple[float, float]:
    """How long the weights take to be read one after the other, told from the first `most` bytes, and GB a second."""
    forget(folders)
    buffer, start, done = bytearray(8 << 20), time.perf_counter(), 0
    for file in weights(folders):
        with file.open("rb", buffering=0) as opened:
            while done < most and (count := opened.readinto(buffer)):
                done += count
    rate = done / (time.perf_counter() - start)
    return sum(file.stat().st_size for file in weights(folders)) / rate, rate / 1e9


def watch(command: Sequence[str], tree: Path, seconds: float) -> tuple[int, dict[str, float], str]:
    """Exit code, seconds to each of `COLUMNS`, and what was said, of a command on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    start, moments, output = time.perf_counter(), dict[str, float](), ""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, cwd=tree, env=environment)
    os.close(theirs)
    while True:
        ready, _, _ = select.select([ours], [], [], 0.01)
        if ready:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the terminal is closed
                data = b""
            if not data:
                break
            output += data.decode(errors="replace")
            now = time.perf_counter() - start
            seen = {"first line": True, "first bar": BAR.search(output), "first step": FIRST_STEP.search(output)}
            seen["result"] = RESULT.search(output)
            moments |= {name: now for name, appeared in seen.items() if appeared and name not in moments}
        if time.perf_counter() - start > seconds:
            process.kill()
            break
    code = process.wait()
    os.close(ours)
    end = time.perf_counter() - start
    moments["to the prompt"] = end - moments.get("result", end)
    moments["end"] = end
    return code, moments, output


def run(args: argparse.Namespace) -> None:
    """A row for each tree, cold and warm."""
    folders = [args.folder.resolve(), *([args.vlm.resolve()] if args.vlm else [])]
    packages = [Path(path) for path in sys.path if path.endswith("site-packages")]
    trees = dict(one.split("=", 1) for one in args.tree) or {"this tree": "."}
    kind = "a14b" if (args.folder / "high_noise_model").is_dir() else "5b"
    width, height, fps = SIZES[kind]
    read, rate = disk_seconds(folders, int(args.probe * 1e9))
    print(f"all weights at the disk's rate of {rate:.2f} GB/s: {read:.1f} s")
    print("| tree | cache |", " | ".join(COLUMNS), "| refusal |")
    print("| --- " * (len(COLUMNS) + 3) + "|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        video = Path(place) / "in.mp4"
        # in another process: pages of libraries that this one maps would stay in the cache
        footage = f"full_size.video(Path({str(video)!r}), {width}, {height}, {2 * fps}, {fps})"
        program = f"from pathlib import Path\nfrom benchmarks import full_size\n{footage}"
        subprocess.run([sys.executable, "-c", program], check=True)
        given = ["--video", str(video), "--ckpt_dir", str(folders[0]), "--base_seed", "1"]
        given += ["--vlm_path", str(folders[1])] if args.vlm else ["--prompt", "The square moves on."]
        for cache in ("cold", "warm") if args.warm else ("cold",):
            for name, folder in trees.items():
                tree = Path(folder).resolve()
                command = [sys.executable, str(tree / "generate.py"), *given]
                if cache == "cold":
                    forget(folders + packages)
                refused = watch([*command, "--vram", "1.5"], tree, args.seconds)
                if cache == "cold":
                    forget(folders + packages)
                target = Path(place) / f"{len(os.listdir(place))}.mp4"
                made = watch([*command, "--save_file", str(target), *args.flags], tree, args.seconds)
                cells = [f"{made[1][column]:.1f}" if column in made[1] else "–" for column in COLUMNS]
                refusal = f"{refused[1]['end']:.1f}" if refused[0] == 2 else f"exit {refused[0]}"
                print(f"| {name} | {cache} |", " | ".join(cells), f"| {refusal} |", flush=True)
                if made[0]:
                    print(f"exit {made[0]}: {made[2][-1500:]}")
                print(f"  refused: {refused[2].strip().splitlines()[-1:]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    making = sub.add_parser("make")
    making.add_argument("kind", choices=("5b", "a14b", "vlm"))
    making.add_argument("folder", type=Path)
    making.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    making.add_argument("--small", action="store_true", help="narrow models of two layers")
    running = sub.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--vlm", type=Path)
    running.add_argument("--tree", action="append", default=[], metavar="COMMIT=DIR")
    running.add_argument("--warm", action="store_true")
    running.add_argument("--probe", type=float, default=5.0, help="GB that are read to tell the disk's rate")
    running.add_argument("--seconds", type=float, default=300.0, help="after which a command is ended")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    args.flags = sys.argv[at + 1 :]  # more flags of the command
    if args.what == "run":
        run(args)
        return
    if args.folder.exists():
        shutil.rmtree(args.folder)
    make(args.kind, args.folder, args.dtype, args.small)


if __name__ == "__main__":
    main()
