"""How many small faults the tests see: `make mutants`, or `python -m benchmarks.mutants --help`.

Cosmic Ray makes the faults, a seeded sample of them for each package. Each is put into a copy of the project, where the
tests run that are for its file (`TESTS`). A fault is seen when a test fails, or takes far longer than without it. Some
faults change nothing that can be seen, so that no package gets all of its own.
"""

from __future__ import annotations

import argparse
import difflib
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# The files of tests for each package or file, the quickest first; the longest name counts.
TESTS: dict[str, tuple[str, ...]] = {
    "wan/commands": (
        *("test_lines", "test_outputs", "test_prompts", "test_continuation_pairs", "test_faults", "test_bad_input"),
        *("test_options", "test_shell", "test_from", "test_cli"),
    ),
    "wan/chain": (
        *("test_continuation_pairs", "test_faults", "test_trust", "test_options", "test_edited_folders"),
        *("test_outputs", "test_resume", "test_long_video"),
    ),
    "wan/chain/plan.py": ("test_continuation_pairs", "test_faults", "test_continuation", "test_modes"),
    "wan/chain/report.py": ("test_report",),
    "wan/chain/facts.py": ("test_report",),
    "wan/chain/charts.py": ("test_report",),
    "wan/chain/measures.py": ("test_report",),
    "wan/chain/scores.py": ("test_report", "test_page_charts"),
    "wan/chain/storyboard.py": ("test_storyboard", "test_faults", "test_options"),
    "wan/chain/storyboard_file.py": ("test_storyboard", "test_faults", "test_options"),
    "wan/chain/dry_run.py": ("test_faults", "test_options", "test_long_video"),
    "wan/continuation.py": ("test_owners", "test_continuation_pairs", "test_faults", "test_continuation", "test_modes"),
    "wan/pipeline.py": (
        *("test_owners", "test_continuation_pairs", "test_continuation", "test_presets", "test_memory", "test_modes"),
        "test_not_finite",
    ),
    "wan/planning.py": ("test_owners", "test_continuation_pairs", "test_faults", "test_continuation", "test_modes"),
    "wan/candidates.py": (
        "test_owners",
        "test_continuation_pairs",
        "test_faults",
        "test_continuation",
        "test_modes",
        "test_long_video",
    ),
    "wan/fitted_frames.py": (
        "test_owners",
        "test_continuation_pairs",
        "test_faults",
        "test_continuation",
        "test_modes",
        "test_handoff",
    ),
    "wan/caption_helpers.py": ("test_continuation",),
    "wan/clip_sampler.py": (
        "test_owners",
        "test_continuation_pairs",
        "test_continuation",
        "test_presets",
        "test_modes",
        "test_exact_speed",
    ),
    "wan/sampling_rules.py": (*("test_owners", "test_presets", "test_parts"),),
    "wan/encoding.py": ("test_owners", "test_continuation", "test_modes", "test_memory", "test_several"),
    "wan/experts.py": ("test_owners", "test_continuation", "test_modes"),
    "wan/models.py": (
        "test_owners",
        "test_continuation_pairs",
        "test_faults",
        "test_lora",
        "test_parts",
        "test_continuation",
    ),
    "wan/prompting.py": ("test_continuation_pairs", "test_faults", "test_continuation", "test_memory", "test_options"),
    "wan/settings.py": ("test_presets", "test_continuation_pairs", "test_lora", "test_options", "test_modes"),
    "wan/options.py": ("test_continuation_pairs", "test_faults", "test_bad_input", "test_options", "test_storyboard"),
    "wan/media": (
        *("test_faults", "test_timeline", "test_writing", "test_reading", "test_sound", "test_colour", "test_dull_end"),
    ),
    "wan/quality": ("test_motion", "test_metrics", "test_correction"),
    "wan/captioner": ("test_text", "test_next_prompt", "test_faults", "test_backends", "test_secrets", "test_internvl"),
    "wan/denoiser": ("test_sampling", "test_exact_speed", "test_golden", "test_modes", "test_presets"),
    "wan/denoiser/conditioning.py": ("test_conditioning", "test_golden", "test_modes"),
    "wan/denoiser/fp8.py": ("test_fp8", "test_precision"),
    "wan/denoiser/lora.py": ("test_lora", "test_faults", "test_parts"),
    "wan/denoiser/lora_file.py": ("test_lora", "test_faults", "test_parts"),
    "wan/denoiser/sequence.py": ("test_sequence",),
    "wan/vae": ("test_preview", "test_chunked", "test_golden", "test_not_finite"),
    "wan/vae/bands.py": ("test_bands",),
    "wan/text": ("test_umt5", "test_vocabulary", "test_golden", "test_parts", "test_memory"),
    "wan/weights": (
        *("test_checkpoint", "test_vocabulary", "test_parts", "test_faults", "test_quantized", "test_readers"),
    ),
    "wan/weights/quantized.py": (
        *("test_quantized", "test_fp8", "test_vocabulary", "test_checkpoint", "test_lora", "test_parts"),
    ),
    "wan/device": ("test_memory", "test_faults", "test_host_budget", "test_host"),
    "wan/device/parallel.py": ("test_sequence", "test_several"),
    "wan/device/sharding.py": ("test_sharding",),
    "wan/device/shared.py": ("test_shared",),
    "wan/device/watch.py": ("test_watch",),
    "wan/device/ranks.py": ("test_sequence", "test_several"),
}
PACKAGES = tuple(name for name in TESTS if name.count("/") == 1)
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
    names = TESTS[max((name for name in TESTS if file.startswith(name)), key=len)]
    files = {path.stem: str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    return tuple(files[name] for name in names)


def package_of(file: str) -> str:
    return next(name for name in PACKAGES if file.startswith(name))


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
        path, chance = ROOT / package, random.Random(f"{seed} {package}")
        places: dict[str, list[Any]] = {}  # by kind, so that what is most frequent, numbers, is not most of the sample
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT).as_posix()
            for kind, operator, number in () if name in NOT_HERE else mutants_of(name):
                places.setdefault(kind, []).append((name, operator, number))
        while places and count > sum(one.file.startswith(package) for one in mutants):
            kind = chance.choice(sorted(places))
            name, operator, number = places[kind].pop(chance.randrange(len(places[kind])))
            if not places[kind]:
                del places[kind]
            mutants.append(Mutant(name, kind, mutate_code((ROOT / name).read_text("utf-8"), operator, number)))
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
    """Copy what Git knows of the project; returns the folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@dataclass(frozen=True)
class Copy:
    """A copy of the project in which the tests of one fault at a time run, on these cores (none: on all).

    Encoders and OpenCV start a thread a core: many copies with all cores each would wait for each other.
    """

    folder: Path
    cores: Sequence[int] = ()

    def seconds(self, test: str) -> float:
        """How long a file of tests takes without a fault. Raises SystemExit where one fails."""
        start = time.monotonic()
        if self._run((test,), None) != 0:
            raise SystemExit(f"without any fault a test fails: {test}")
        return time.monotonic() - start

    def sees(self, mutant: Mutant, tests: Sequence[str], limit: float) -> bool:
        """Whether a test fails with the fault in, or takes longer than `limit` seconds."""
        file = self.folder / mutant.file
        whole = file.read_text("utf-8")
        file.write_text(mutant.text, "utf-8")
        try:
            code = self._run(tests, limit)
        except subprocess.TimeoutExpired:
            return True
        finally:
            file.write_text(whole, "utf-8")
        if code == 5:
            raise SystemExit(f"no tests were found for {mutant.file}: {mutant.change}")
        return code != 0  # also where an import or a fixture fails, or the interpreter is ended by a signal

    def _run(self, tests: Sequence[str], limit: float | None) -> int:
        words = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            words, cwd=self.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=quiet, stderr=quiet
        ) as process:
            if self.cores:
                os.sched_setaffinity(process.pid, self.cores)
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def measure(mutants: Sequence[Mutant], copies: Sequence[Copy]) -> Iterator[tuple[Mutant, bool]]:
    """Each fault, and whether it is seen, as soon as that is known. Each copy tests one fault at a time."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def whole(test: str) -> float:
        copy = free.get()
        try:
            return copy.seconds(test)
        finally:
            free.put(copy)

    def seen(mutant: Mutant) -> bool:
        copy, tests = free.get(), covering_tests(mutant.file)
        try:
            return copy.sees(mutant, tests, 30 + 3 * sum(seconds[test] for test in tests))
        finally:
            free.put(copy)

    pool = ThreadPoolExecutor(len(copies))
    try:
        needed = sorted({test for mutant in mutants for test in covering_tests(mutant.file)})
        seconds = dict(zip(needed, pool.map(whole, needed), strict=True))
        running = {pool.submit(seen, mutant): mutant for mutant in mutants}
        for done in as_completed(running):
            yield running[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)  # nothing more is begun after an error


def by_turns(mutants: Sequence[Mutant]) -> list[Mutant]:
    """One of each package after the other, so that a run that is stopped has seen as many of each."""
    groups: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault(package_of(mutant.file), []).append(mutant)
    return [one for turn in zip_longest(*groups.values()) for one in turn if one is not None]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the faults that no test saw, and how many were seen of each package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(PACKAGES)}; all by default")
    parser.add_argument("--count", type=int, default=20, help="faults for each package (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="faults that are tested at once (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    given = parser.parse_args(argv)
    packages = given.packages or PACKAGES
    if given.processes < 1:
        parser.error("--processes: at least 1")
    if unknown := sorted(set(packages) - set(PACKAGES)):
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(PACKAGES)}")
    mutants = sample(given.count, given.seed, packages)
    if given.list:
        print(*(f"{mutant.file}  {mutant.operator}  {mutant.change}" for mutant in mutants), sep="\n")
        return
    seen: dict[str, list[bool]] = {package: [] for package in packages}
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        count = given.processes
        copies = [Copy(copy_project(Path(folder, str(number))), cores[number::count]) for number in range(count)]
        for mutant, is_seen in measure(by_turns(mutants), copies):
            seen[package_of(mutant.file)].append(is_seen)
            print("seen    " if is_seen else "NOT SEEN", mutant.file, mutant.operator, mutant.change, flush=True)
    print(f"\n{'package':<22} seen  all")
    seen["all"] = [one for results in seen.values() for one in results]
    for package, results in seen.items():
        if results:
            print(f"{package:<22} {sum(results):>4} {len(results):>4}  {sum(results) / len(results):.0%}")


if __name__ == "__main__":
    main()
