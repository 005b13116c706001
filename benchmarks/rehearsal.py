#!/usr/bin/env python3
"""What a user waits for at real size, from Enter to the prompt: the real command on checkpoint folders of real size.

    python -m benchmarks.rehearsal make {5b,a14b,vlm} FOLDER [--dtype {fp32,bf16}] [--small]
    python -m benchmarks.rehearsal run FOLDER [--vlm FOLDER] [--tree COMMIT=DIR ...] [--caches cold warm] [-- FLAG ...]
    python -m benchmarks.rehearsal chain FOLDER [--vlm FOLDER] [--clips 12] [--tokens 128] [-- FLAG ...]

`run` starts `generate.py` of each source tree (this one unless others are named) on a terminal, on cold and then on
warm files, and prints a row for each: seconds from Enter to the first line of output, to the first bar, to
the first step that is done, to the result, from there to the prompt, and to the refusal of a budget that is too small
for the clip. Cold: the weights and the installed packages are dropped from the system's cache first. The disk's own
time is that of reading the weights one after the other, in the same run, and what the disks gave in each second of a
command says when they were idle. Each moment is printed as it comes, so that a run that is cut off has told all until
then.

`chain` makes a chain with `--preset turbo` and LoRAs of random numbers, and prints for each clip, as soon as its record
is there, how long it took, its stages by the record, and what is in none of them; then what share of the time sampling,
the VAE and the caption are. A VLM of random weights finds no end: `--tokens` is how long its captions are.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import psutil

SIZES = {"5b": (1280, 704, 24), "a14b": (832, 480, 16)}
BAR, FIRST_STEP = re.compile(r"\d+%\||\| *\d+/|\[\d\d:\d\d"), re.compile(r"\| *[1-9]\d*/\d+ ")
RESULT = re.compile(r"^\S+\.mp4\r?$", re.MULTILINE)
WIDEST = 200  # characters of a line, which may be a caption of random words
COLUMNS = ("first line", "first bar", "first step", "result", "to the prompt")
CLIP_BEGINS, CLIP_WRITTEN = (
    re.compile(r"clip (\d+)/\d+ seed "),
    re.compile(r"clip (\d+)/\d+ finished in .*?: (.+\.mp4)$"),
)
CLIP_ENDS = re.compile(r"clip (\d+)/\d+ decode: ")
CAPTIONS_OF = """
from wan.captioner.internvl import InternVLCaptioner as Captioner
from wan.cli import continuous_program
generate = Captioner.generate
Captioner.generate = lambda self, ids, pixels, tokens: generate(self, ids, pixels, min(tokens, {tokens}))
continuous_program()
"""


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
    """The large files of folders, of which one may lie in another."""
    files = (file for folder in folders for file in sorted(folder.rglob("*")))
    yield from dict.fromkeys(file for file in files if file.suffix in (".safetensors", ".pth"))


def forget(folders: Sequence[Path]) -> None:
    """Drop the files of folders from the system's cache."""
    os.sync()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folders: Sequence[Path], most: int) -> tuple[float, float]:
    """GB of weights, and GB a second of reading them one after the other, told from the first `most` bytes."""
    forget(folders)
    buffer, start, done = bytearray(8 << 20), time.perf_counter(), 0
    for file in weights(folders):
        with file.open("rb", buffering=0) as opened:
            while done < most and (count := opened.readinto(buffer)):
                done += count
    rate = done / (time.perf_counter() - start)
    return sum(file.stat().st_size for file in weights(folders)) / 1e9, rate / 1e9


def watch(
    command: Sequence[str], tree: Path, seconds: float, tell: Callable[[str], None]
) -> tuple[int, dict[str, float], str]:
    """Exit code, seconds to each of `COLUMNS`, and what was printed, of a command on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    start, moments, output, read = time.perf_counter(), dict[str, float](), "", [bytes_read()]
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, cwd=tree, env=environment)
    os.close(theirs)
    while True:
        if time.perf_counter() - start > len(read):
            read.append(bytes_read())
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
            for name in [name for name, appeared in seen.items() if appeared and name not in moments]:
                moments[name] = now
                tell(f"{name} {now:.1f} s")
        if time.perf_counter() - start > seconds:
            process.kill()
            break
    code = process.wait()
    os.close(ours)
    end = time.perf_counter() - start
    moments["to the prompt"] = end - moments.get("result", end)
    moments["end"] = end
    tell(f"exit {code} at {end:.1f} s")
    if read[0] is not None:
        rates = [f"{(after - before) / 1e9:.1f}" for before, after in itertools.pairwise(filter(None, read))]
        tell(f"GB from the disks in each second: {' '.join(rates)}")
    return code, moments, output


def bytes_read() -> int | None:
    """What this machine has read from its disks so far; None where it does not count."""
    counters = psutil.disk_io_counters()
    return None if counters is None else counters.read_bytes


def footage(target: Path, kind: str) -> Path:
    """A clip to go on from, made by another process: pages of libraries that this one maps would stay in the cache."""
    width, height, fps = SIZES[kind]
    made = f"full_size.video(Path({str(target)!r}), {width}, {height}, {2 * fps}, {fps})"
    program = f"from pathlib import Path\nfrom benchmarks import full_size\n{made}"
    subprocess.run([sys.executable, "-c", program], check=True)
    return target


def kind_of(folder: Path) -> str:
    """Which of `SIZES` a checkpoint folder is."""
    return "a14b" if (folder / "high_noise_model").is_dir() else "5b"


def size_flags(folder: Path) -> list[str]:
    """The size of the clips, which narrow models say themselves."""
    width, height, _ = SIZES[kind_of(folder)]
    return [] if (folder / "wan_config.json").is_file() else ["--size", f"{width}*{height}"]


def run(args: argparse.Namespace) -> None:
    """A row for each tree, cold and warm."""
    folders = [args.folder.resolve(), *([args.vlm.resolve()] if args.vlm else [])]
    packages = [Path(path) for path in sys.path if path.endswith("site-packages")]
    trees = dict(one.split("=", 1) for one in args.tree) or {"this tree": "."}
    rows = ["| tree | cache | " + " | ".join(COLUMNS) + " | refusal |", "| --- " * (len(COLUMNS) + 3) + "|"]
    if "cold" in args.caches:
        size, rate = disk_rate(folders, int(args.probe * 1e9))
        print(f"all {size:.1f} GB of weights at the disk's rate of {rate:.2f} GB/s: {size / rate:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as place:
        video = footage(Path(place) / "in.mp4", kind_of(args.folder))
        given = ["--video", str(video), "--ckpt_dir", str(folders[0]), "--base_seed", "1", *size_flags(args.folder)]
        given += ["--vlm_path", str(folders[1])] if args.vlm else ["--prompt", "The square moves on."]
        for cache in args.caches:
            for name, folder in trees.items():
                tree = Path(folder).resolve()
                command = [sys.executable, str(tree / "generate.py"), *given]
                begun = time.perf_counter()
                cells = dict.fromkeys((*COLUMNS, "refusal"), "–")
                # the clip first: it is what matters where time is short
                if cache == "cold":
                    forget(folders + packages)
                target = Path(place) / f"{len(os.listdir(place))}.mp4"
                tell = partial(print, f"  {name}, {cache}:", flush=True)
                code, moments, output = watch(
                    [*command, "--save_file", str(target), *args.flags], tree, args.seconds, tell
                )
                cells |= {column: f"{moments[column]:.1f}" for column in COLUMNS if column in moments}
                if code:
                    print(f"exit {code}: {output[-1500:]}", flush=True)
                else:
                    tell(f"stages {json.loads(target.with_suffix('.json').read_text(encoding='utf-8'))['seconds']}")
                if args.refusal:
                    if cache == "cold":
                        forget(folders + packages)
                    tell = partial(print, f"  {name}, {cache}, refusal:", flush=True)
                    code, moments, output = watch([*command, "--vram", "1.5"], tree, args.seconds, tell)
                    cells["refusal"] = f"{moments['end']:.1f}" if code == 2 else f"exit {code}"
                    print(f"  refused: {output.strip().splitlines()[-1:]}")
                rows.append(f"| {name} | {cache} | " + " | ".join(cells.values()) + " |")
                print(rows[-1], f"in {time.perf_counter() - begun:.0f} s", flush=True)
    print("\n".join(rows))


def write_lora(target: Path, expert: Path, rank: int) -> Path:
    """A LoRA of random numbers for every matrix of an expert's blocks."""
    from benchmarks import full_size
    from wan.weights.tensors import open_safetensors

    tensors: dict[str, tuple[full_size.Shape, full_size.Fill]] = {}
    for name, shape in open_safetensors(expert, "diffusion_pytorch_model").shapes.items():
        if len(shape) == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.lora_down.weight"] = ((rank, shape[1]), "normal")
            tensors[f"{layer}.lora_up.weight"] = ((shape[0], rank), "normal")
    full_size.write_safetensors(target, tensors, full_size.Values("bf16"))
    return target


def chain(args: argparse.Namespace) -> int:
    """A row for each clip of a chain of few steps, and the shares of its time; returns the command's exit code."""
    kind, begun = kind_of(args.folder), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        video = footage(Path(place) / "in.mp4", kind)
        flags = ["--video", str(video), "--ckpt_dir", str(args.folder.resolve()), "--base_seed", "1"]
        flags += size_flags(args.folder)
        flags += ["--vlm_path", str(args.vlm.resolve())] if args.vlm else ["--prompt", "The square moves on."]
        experts = {"lora_high": "high_noise_model", "lora_low": "low_noise_model"} if kind == "a14b" else {"lora": "."}
        for flag, expert in experts.items():
            lora = write_lora(Path(place) / f"{flag}.safetensors", args.folder / expert, args.rank)
            flags += [f"--{flag}", str(lora)]
        flags += ["--preset", "turbo", "--num_videos", str(args.clips), "--output_dir", str(Path(place) / "run")]
        print(f"footage and LoRAs in {time.perf_counter() - begun:.1f} s", flush=True)
        begun = time.perf_counter()
        command = [sys.executable, "-c", CAPTIONS_OF.format(tokens=args.tokens), *flags, *args.flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        starts, rows = dict[int, float](), dict[int, tuple[float, dict[str, float]]]()
        ends, records = dict[int, float](), dict[int, dict[str, float]]()
        for line in process.stdout:
            now = time.perf_counter() - begun
            if match := CLIP_BEGINS.match(line):
                starts[int(match[1])] = now
                print(f"clip {match[1]} begins at {now:.2f} s", flush=True)
            elif match := CLIP_ENDS.match(line):
                ends[int(match[1])] = now
            elif match := CLIP_WRITTEN.match(line):
                record = json.loads(Path(match[2].strip()).with_suffix(".json").read_text(encoding="utf-8"))
                records[int(match[1])] = record["seconds"]
            else:
                print(line.rstrip()[:WIDEST], flush=True)
            for number in sorted(records.keys() - rows.keys()):
                # until the next one begins, which waits until the one before it is written
                until = starts.get(number + 1, ends.get(number) if number == args.clips else None)
                if until is not None:
                    rows[number] = (until - starts[number], records[number])
                    print(f"clip {number}: {shares([rows[number]])}", flush=True)
        code = process.wait()
        print(f"exit {code} at {time.perf_counter() - begun:.1f} s")
    print(f"all {len(rows)} clips: {shares(list(rows.values()))}")
    print(f"without the first: {shares([row for number, row in rows.items() if number > 1])}")
    return code


def shares(rows: Sequence[tuple[float, Mapping[str, float]]]) -> str:
    """Of clips, each by its seconds and those of its stages: the time, the shares and all stages, in words."""
    whole, stages = sum(wall for wall, _ in rows), Counter[str]()
    for _, seconds in rows:
        stages.update(seconds)
    if not whole:
        return "no time was taken"
    made = sum(stages[name] for name in ("sample", "encode", "decode"))
    parts = {"sampling and VAE": made, "and caption": made + stages["caption"], "in no stage": whole - stages.total()}
    told = ", ".join(f"{name} {100 * seconds / whole:.1f} %" for name, seconds in parts.items())
    rounded = {name: round(seconds, 3) for name, seconds in stages.items()}
    return f"{whole:.2f} s; {told}; {rounded}"


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
    running.add_argument("--caches", choices=("cold", "warm"), nargs="+", default=["cold"])
    running.add_argument("--no_refusal", dest="refusal", action="store_false", help="leave the refusals out")
    running.add_argument("--probe", type=float, default=5.0, help="GB that are read to tell the disk's rate")
    running.add_argument("--seconds", type=float, default=300.0, help="after which a command is ended")
    chaining = sub.add_parser("chain")
    chaining.add_argument("folder", type=Path)
    chaining.add_argument("--vlm", type=Path)
    chaining.add_argument("--clips", type=int, default=12)
    chaining.add_argument("--tokens", type=int, default=128, help="of a caption at most")
    chaining.add_argument("--rank", type=int, default=64, help="of the LoRAs")
    chaining.add_argument("--place", help="folder for the run, which is removed again")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    args.flags = sys.argv[at + 1 :]  # more flags of the command
    if sys.dont_write_bytecode and args.what != "make":
        print("PYTHONDONTWRITEBYTECODE is set: packages without bytecode are compiled at each start", flush=True)
    if args.what == "run":
        run(args)
        return
    if args.what == "chain":
        sys.exit(chain(args))
    if args.folder.exists():
        shutil.rmtree(args.folder)
    make(args.kind, args.folder, args.dtype, args.small)


if __name__ == "__main__":
    main()
