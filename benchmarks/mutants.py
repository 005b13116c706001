"""How many small faults the tests see: `make mutants`, or `python -m benchmarks.mutants --help`.

Cosmic Ray makes the faults, a seeded sample of them for each package. Each is put into a copy of the project, where the
tests run that are for its file (`TESTS`). A fault is seen when a test fails, or takes far longer than without it. Some
faults change nothing that can be seen, so that no package gets all of its own.

A run can be cut off (`--seconds`) and taken up again (`--log`): with the same seed and code the sample is the same.
Tests that fail without any fault, say for want of a codec, are left out and listed.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# The files of tests, `test_NAME.py`, for each package or file, the quickest first. "wan" is for files that lie in no
# package. Tests of a file's own name come first without being listed.
TESTS: dict[str, str] = {
    "wan": "owners continuation_pairs faults continuation modes",
    "wan/commands": (
        "lines job continuous flags outputs prompts continuation_pairs faults bad_input options shell from inputs "
        "several clip_by_clip steering cli"
    ),
    "wan/commands/steering.py": "continuous steering",
    "wan/commands/preview.py": "continuous steering outputs",
    "wan/commands/finishing.py": "upscaling options",
    "wan/chain": (
        "seeds run_folder inventory continuation_pairs faults trust options edited_folders outputs steering "
        "clip_by_clip resume long_video"
    ),
    "wan/chain/plan.py": "dry_run continuation_pairs faults continuation modes",
    "wan/chain/chain.py": "seeds continuation",
    "wan/chain/report.py": "report",
    "wan/chain/facts.py": "report",
    "wan/chain/charts.py": "report",
    "wan/chain/measures.py": "report",
    "wan/chain/scores.py": "report page_charts",
    "wan/chain/storyboard.py": "storyboard faults options",
    "wan/chain/storyboard_file.py": "storyboard faults options",
    "wan/chain/dry_run.py": "dry_run faults options long_video",
    "wan/continuation.py": "candidates owners continuation_pairs faults continuation modes",
    "wan/pipeline.py": "owners continuation_pairs continuation presets memory modes not_finite",
    "wan/planning.py": "owners continuation_pairs faults continuation modes",
    "wan/candidates.py": "owners continuation_pairs faults continuation modes long_video",
    "wan/fitted_frames.py": "candidates owners continuation_pairs faults continuation modes handoff",
    "wan/caption_helpers.py": "continuation",
    "wan/cli.py": "leaving bad_input several faults from",
    "wan/colour_carry.py": "correction continuation_pairs",
    "wan/comfy.py": "parts outputs",
    "wan/detail.py": "lines continuation",
    "wan/errors.py": "bad_input faults",
    "wan/files.py": "run_folder faults trust outputs resume",
    "wan/footage.py": "continuation_pairs reading continuation modes from",
    "wan/foreign.py": "files bombs parts lora checkpoint readers",
    "wan/kinds.py": "options bad_input storyboard rows",
    "wan/pages.py": "report",
    "wan/public.py": "owners secrets outputs report",
    "wan/sizes.py": "files golden continuation modes options",
    "wan/types.py": "conditioning owners continuation_pairs sampling modes",
    "wan/upscaling.py": "upscaling options faults",
    "wan/image2video.py": "owners golden modes options",
    "wan/textimage2video.py": "owners golden modes options",
    "wan/text2video.py": "owners golden modes options",
    "wan/clip_sampler.py": "owners continuation_pairs continuation presets modes exact_speed",
    "wan/sampling_rules.py": "owners presets parts",
    "wan/encoding.py": "owners continuation modes memory several",
    "wan/experts.py": "owners continuation modes",
    "wan/models.py": "owners continuation_pairs faults lora parts continuation",
    "wan/pictures.py": "faults bombs colour storyboard",
    "wan/captioner/shared.py": "captioners",
    "wan/prompting.py": "continuation_pairs faults continuation memory options",
    "wan/settings.py": "owners presets continuation_pairs lora options modes",
    "wan/options.py": "kinds continuation_pairs faults bad_input options storyboard",
    "wan/media": "sound colour timeline writing reading dull_end bombs faults",
    "wan/media/decord_worker.py": "backends reading",
    "wan/quality": "vision motion seam_numbers drift_numbers metrics correction",
    "wan/captioner": "text next_prompt shared backends secrets internvl memory faults",
    "wan/denoiser": "sampling exact_speed golden modes presets precision",
    "wan/denoiser/headers.py": "headers precision parts checkpoint lora",
    "wan/denoiser/model.py": "sampling exact_speed quantized fp8 golden modes presets precision",
    "wan/denoiser/conditioning.py": "conditioning golden modes",
    "wan/denoiser/fp8.py": "fp8 precision",
    "wan/denoiser/lora.py": "lora faults parts",
    "wan/denoiser/lora_file.py": "lora faults parts",
    "wan/denoiser/sequence.py": "sequence",
    "wan/vae": "preview chunked bands golden not_finite memory",
    "wan/vae/bands.py": "bands",
    "wan/text": "umt5 vocabulary golden parts memory",
    "wan/weights": "tensors prefetch packed checkpoint loading vocabulary parts faults quantized lora readers",
    "wan/weights/loading.py": "loading shared host_budget checkpoint vocabulary parts faults quantized lora readers",
    "wan/weights/quantized.py": "packed quantized fp8 vocabulary checkpoint lora parts",
    "wan/device": "hardware host peers memory faults host_budget owners shared",
    "wan/device/parallel.py": "sequence several",
    "wan/device/sharding.py": "sharding",
    "wan/device/shared.py": "shared",
    "wan/device/watch.py": "watch",
    "wan/device/peers.py": "peers watch",
    "wan/device/ranks.py": "sequence several",
    "wan/batch": "rows crew schedule hand describer run behind locks upload captioners architecture workers cluster",
    "wan/server": (
        "bodies folders live supervisor guard worker app page_charts architecture processes limits videos chains"
    ),
}
EVERYWHERE = ["architecture"]  # for every file, and last
PACKAGES = tuple(name for name in TESTS if not name.endswith(".py"))
_LONGEST = 300.0  # seconds of a file of tests without a fault
# Only a GPU runs what they do.
NOT_HERE = (
    "wan/captioner/decode_attention_kernel.py",
    "wan/denoiser/int8_attention_kernel.py",
    "wan/vae/kernels.py",
)

# One or two of each kind: a test that sees `<` become `>=` hardly ever misses `<` becoming `!=`. Not among them are the
# operator `|`, which is mostly a type, `/`, which is mostly a path and not seen by luck, and decorators.
OPERATORS = (
    "AddNot",
    "NumberReplacer",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
    "ZeroIterationForLoop",
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "FloorDiv_Mul", "Mod_Mul")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt")),
)


def covering_tests(file: str) -> tuple[str, ...]:
    """The files of tests for a file, as paths in the project, wherever below `tests/` they are."""
    package = Path(file).parent.name  # of two files of one name the one in its own folder
    paths = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.parent.name == package, path))
    files = {path.stem: str(path.relative_to(ROOT)) for path in paths}
    its_own = f"test_{Path(file).stem}"
    listed = [f"test_{name}" for name in TESTS[file if file in TESTS else package_of(file)].split() + EVERYWHERE]
    return tuple(files[name] for name in dict.fromkeys((its_own, *listed)) if name in listed or name in files)


def package_of(file: str) -> str:
    folder = Path(file).parent.as_posix()
    return next(name for name in PACKAGES if name == folder)


@dataclass(frozen=True)
class Mutant:
    """One small fault: a file, and its text with the fault in it."""

    file: str
    operator: str
    text: str

    @property
    def change(self) -> str:
        """The lines that differ, as one."""
        lines = difflib.unified_diff((ROOT / self.file).read_text("utf-8").splitlines(), self.text.splitlines(), n=0)
        return "  ".join(line.strip() for line in list(lines)[2:])


def mutants_of(file: str) -> Iterator[tuple[str, Any, int]]:
    """Name, operator and number of each fault that can be put into a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    nodes = list(ast_nodes(get_ast((ROOT / file).read_text("utf-8"))))
    operators = [(name, get_operator(f"core/{name}")()) for name in OPERATORS]
    for name, operator in [*operators, ("LeaveOutCall", _leave_out_call())]:
        places = [node for node in nodes for _ in operator.mutation_positions(node)]
        for number, node in enumerate(places):
            if node.parent is None or node.parent.type not in ("parameters", "param"):  # a `*` there is no product
                yield name, operator, number


def sample(count: int, seed: int, packages: Sequence[str]) -> list[Mutant]:
    """`count` faults for each package, the same for the same seed and code."""
    from cosmic_ray.mutating import mutate_code

    mutants: list[Mutant] = []
    for package in packages:
        chance, taken = random.Random(f"{seed} {package}"), 0
        places: dict[str, list[Any]] = {}  # by kind, so that what is most frequent, numbers, is not most of the sample
        for file in sorted((ROOT / package).glob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            for kind, operator, number in () if name in NOT_HERE else mutants_of(name):
                places.setdefault(kind, []).append((name, operator, number))
        while places and taken < count:
            kind = chance.choice(sorted(places))
            name, operator, number = places[kind].pop(chance.randrange(len(places[kind])))
            if not places[kind]:
                del places[kind]
            mutants.append(Mutant(name, kind, mutate_code((ROOT / name).read_text("utf-8"), operator, number)))
            taken += 1
    return mutants


def _leave_out_call() -> Any:
    """Cosmic Ray has no operator for it: a call whose result nobody takes becomes `pass`."""
    from cosmic_ray.operators.operator import Example, Operator
    from parso.python.tree import Name

    class LeaveOutCall(Operator):  # type: ignore[misc]  # its package has no types
        def mutation_positions(self, node: Any) -> Iterator[Any]:
            is_statement = node.parent is not None and node.parent.type == "simple_stmt"
            if node.type == "atom_expr" and is_statement and node.children[-1].get_first_leaf().value == "(":
                yield node.start_pos, node.end_pos

        def mutate(self, node: Any, index: int) -> Any:
            return Name("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

        @classmethod
        def examples(cls) -> tuple[Any, ...]:
            return (Example("publish(part)\n", "pass\n"),)

    return LeaveOutCall()


def copy_project(folder: Path) -> Path:
    """Copy what Git knows of the project; without Git all but hidden files and caches. Returns the folder."""
    if not (ROOT / ".git").exists():
        hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "outputs")
        return Path(shutil.copytree(ROOT, folder, ignore=hidden, dirs_exist_ok=True))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@dataclass(frozen=True)
class Baseline:
    """A file of tests without a fault: how long it takes, and which of its tests fail here (`FILE`: all of them)."""

    seconds: float
    failing: Sequence[str] = ()


@dataclass(frozen=True)
class Copy:
    """A copy of the project in which the tests of one fault at a time run, on these cores (none: on all).

    Encoders and OpenCV start a thread a core: many copies with all cores each would wait for each other.
    """

    folder: Path
    cores: Sequence[int] = ()

    def baseline(self, test: str, limit: float) -> Baseline:
        """Run a file of tests without a fault. One that takes longer than `limit` seconds counts as failing."""
        start, failed = time.monotonic(), self.folder / "build/mutants/v/cache/lastfailed"
        failed.unlink(missing_ok=True)
        try:
            code = self._run((test, "-o", "cache_dir=build/mutants"), limit)
        except subprocess.TimeoutExpired:
            return Baseline(limit, (test,))
        failing = sorted(json.loads(failed.read_text("utf-8"))) if failed.is_file() else []
        return Baseline(time.monotonic() - start, failing or (() if code == 0 else (test,)))

    def sees(self, mutant: Mutant, tests: Sequence[str], limit: float) -> bool | None:
        """Whether a test fails with the fault in, or takes longer than `limit` seconds; None: none is to be run."""
        file = self.folder / mutant.file
        whole = file.read_text("utf-8")
        file.write_text(mutant.text, "utf-8")
        try:
            code = self._run(("-x", "-p", "no:cacheprovider", *tests), limit)
        except subprocess.TimeoutExpired:
            return True
        finally:
            file.write_text(whole, "utf-8")
        return (
            None if code == 5 else code != 0
        )  # also where an import or a fixture fails, or the interpreter is ended by a signal

    def _run(self, words: Sequence[str], limit: float) -> int:
        temporary = self.folder.with_suffix(".tmp")
        temporary.mkdir(exist_ok=True)
        with subprocess.Popen(
            [sys.executable, "-B", "-m", "pytest", "-q", *words],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            if self.cores:
                os.sched_setaffinity(process.pid, self.cores)
            try:
                return process.wait(limit)
            finally:
                with contextlib.suppress(ProcessLookupError):  # also those that a fault has left behind
                    os.killpg(process.pid, signal.SIGKILL)
                shutil.rmtree(temporary, ignore_errors=True)


def measure(
    mutants: Sequence[Mutant],
    copies: Sequence[Copy],
    baselines: dict[str, Baseline],
    on_baseline: Callable[[str, Baseline], None],
    end: float = math.inf,
) -> Iterator[tuple[Mutant, bool]]:
    """Each fault, and whether it is seen, as soon as that is known. Each copy tests one fault at a time.

    Files of tests that `baselines` lacks are run without a fault first, and put there. Faults for which no test passes
    without them, and those whose tests would end later than `end` (of `time.monotonic`), are left out.
    """
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def whole(test: str) -> None:
        copy = free.get()
        try:
            if (left := end - time.monotonic()) > 0:
                baseline = copy.baseline(test, min(_LONGEST, left))
                if time.monotonic() < end:
                    baselines[test] = baseline
                    on_baseline(test, baseline)
        finally:
            free.put(copy)

    def seen(mutant: Mutant) -> bool | None:
        copy, tests = free.get(), covering_tests(mutant.file)
        try:
            if time.monotonic() >= end:
                return None
            words = [word for test in tests for word in _passing(test, baselines[test])]
            limit = 30 + 3 * sum(baselines[test].seconds for test in tests)
            if not words:
                return None
            is_seen = copy.sees(mutant, words, min(limit, end - time.monotonic()))
            return is_seen if time.monotonic() < end else None
        finally:
            free.put(copy)

    pool = ThreadPoolExecutor(len(copies))
    try:
        needed = dict.fromkeys(test for mutant in mutants for test in covering_tests(mutant.file))
        list(pool.map(whole, [test for test in needed if test not in baselines]))
        running = {pool.submit(seen, mutant): mutant for mutant in mutants}
        for done in as_completed(running):
            is_seen = done.result()
            if is_seen is not None:
                yield running[done], is_seen
    finally:
        pool.shutdown(cancel_futures=True)  # nothing more is begun after an error


def _passing(test: str, baseline: Baseline) -> list[str]:
    """The words that make pytest run what passes of a file without a fault."""
    if any("::" not in name for name in baseline.failing):
        return []
    return [test, *(f"--deselect={name}" for name in baseline.failing)]


def by_turns(mutants: Sequence[Mutant]) -> list[Mutant]:
    """One of each package after the other, so that a run that is stopped has seen as many of each."""
    groups: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault(package_of(mutant.file), []).append(mutant)
    return [one for turn in zip_longest(*groups.values()) for one in turn if one is not None]


class Log:
    """What is known by now, a JSON line each in a file that a cut-off run leaves: baselines, and faults with `seen`."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text("utf-8").splitlines() if file is not None and file.is_file() else []
        known = [json.loads(line) for line in lines if line.endswith("}")]  # a machine that stops leaves half a line
        self.baselines = {one["tests"]: Baseline(one["seconds"], one["failing"]) for one in known if "tests" in one}
        self._seen = {(one["file"], one["operator"], one["change"]): one["seen"] for one in known if "seen" in one}

    def seen(self, mutant: Mutant) -> bool | None:
        """Whether a fault was seen; None: it was not tried yet."""
        return self._seen.get((mutant.file, mutant.operator, mutant.change))

    def add(self, mutant: Mutant, is_seen: bool) -> None:
        self._write({"seen": is_seen, "file": mutant.file, "operator": mutant.operator, "change": mutant.change})

    def add_baseline(self, test: str, baseline: Baseline) -> None:
        self._write({"tests": test, "seconds": round(baseline.seconds, 1), "failing": list(baseline.failing)})

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the faults that no test saw, and how many were seen of each package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(PACKAGES)}; all by default")
    parser.add_argument("--count", type=int, default=20, help="faults for each package (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="faults that are tested at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop then; as many faults of each are tried")
    parser.add_argument("--log", type=Path, metavar="FILE", help="add results here; what is in it is not tried again")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    given = parser.parse_args(argv)
    end = time.monotonic() + given.seconds
    packages = given.packages or PACKAGES
    if given.processes < 1:
        parser.error("--processes: at least 1")
    if unknown := sorted(set(packages) - set(PACKAGES)):
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(PACKAGES)}")
    mutants = sample(given.count, given.seed, packages)
    if given.list:
        print(*(f"{mutant.file}  {mutant.operator}  {mutant.change}" for mutant in mutants), sep="\n")
        return
    log = Log(given.log)
    seen: dict[str, list[bool]] = {package: [] for package in packages}

    def add(mutant: Mutant, is_seen: bool) -> None:
        seen[package_of(mutant.file)].append(is_seen)
        print("seen    " if is_seen else "NOT SEEN", mutant.file, mutant.operator, mutant.change, flush=True)

    for mutant in mutants:
        if (is_seen := log.seen(mutant)) is not None:
            add(mutant, is_seen)
    left = [mutant for mutant in by_turns(mutants) if log.seen(mutant) is None]
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        count = given.processes
        copies = [Copy(copy_project(Path(folder, str(number))), cores[number::count]) for number in range(count)]
        for mutant, is_seen in measure(left, copies, log.baselines, log.add_baseline, end):
            log.add(mutant, is_seen)
            add(mutant, is_seen)
    print(f"\n{'package':<22} seen  all")
    seen["all"] = [one for results in seen.values() for one in results]
    for package, results in seen.items():
        if results:
            print(f"{package:<22} {sum(results):>4} {len(results):>4}  {sum(results) / len(results):.0%}")
    print(f"not tried: {len(mutants) - len(seen['all'])} of {len(mutants)}")
    for name in sorted(name for baseline in log.baselines.values() for name in baseline.failing):
        print(f"left out, fails without a fault: {name}")


if __name__ == "__main__":
    main()
