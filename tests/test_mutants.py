"""`make mutants`: each file in which it makes faults has tests to run."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.mutants import PACKAGES, ROOT, TESTS, Copy, Mutant, by_turns, covering_tests, measure, package_of


def test_every_file_that_gets_faults_has_tests_of_its_own() -> None:
    for package in PACKAGES:
        path = ROOT / package
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert files
        for file in files:
            name = file.relative_to(ROOT).as_posix()
            assert package_of(name) == package
            assert all((ROOT / test).is_file() for test in covering_tests(name))
    assert all((ROOT / name).exists() for name in TESTS)


def test_a_file_with_tests_of_its_own_is_not_tested_by_those_of_its_package() -> None:
    (report,) = covering_tests("wan/chain/report.py")
    assert report.endswith("test_report.py") and len(covering_tests("wan/chain/chain.py")) > 1


def test_a_run_that_is_stopped_has_seen_as_many_faults_of_each_package() -> None:
    of_text, of_vae = ([Mutant(f"wan/{name}/{n}.py", "", "") for n in range(3)] for name in ("text", "vae"))
    turns = by_turns([*of_text, *of_vae[:2]])
    assert turns == [of_text[0], of_vae[0], of_text[1], of_vae[1], of_text[2]]


@dataclass(frozen=True)
class _Copy(Copy):
    """Tests nothing: a fault is seen where its text says so, when another copy is at work too."""

    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    fails: bool = False
    limits: set[float] = field(default_factory=set)

    def seconds(self, test: str) -> float:
        if self.fails:
            raise SystemExit(test)
        return 2.0

    def sees(self, mutant: Mutant, tests: Sequence[str], limit: float) -> bool:
        self.both.wait(60)
        self.limits.add(limit)
        return mutant.text == "seen"


def test_copies_try_faults_at_the_same_time() -> None:
    mutants = [Mutant("wan/denoiser/sequence.py", str(n), "seen" if n % 2 else "") for n in range(4)]
    both = threading.Barrier(2)
    copies = [_Copy(ROOT, both=both), _Copy(ROOT, both=both)]
    assert dict(measure(mutants, copies)) == {mutant: mutant.text == "seen" for mutant in mutants}
    assert copies[0].limits == copies[1].limits == {30 + 3 * 2.0 * len(covering_tests(mutants[0].file))}


def test_tests_that_fail_without_a_fault_end_the_run() -> None:
    with pytest.raises(SystemExit, match=covering_tests("wan/denoiser/sequence.py")[0]):
        list(measure([Mutant("wan/denoiser/sequence.py", "", "")], [_Copy(ROOT, fails=True)]))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_a_copy_keeps_to_its_cores_and_to_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = min(os.sched_getaffinity(0))
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport os, time\nwhile len(os.sched_getaffinity(0)) > 1: time.sleep(0.01)\n"
        "time.sleep(float(os.environ.get('LASTS', '0')))\n"
    )
    script.chmod(0o755)
    copy = Copy(tmp_path, (core,))
    (tmp_path / "a.py").write_text("right\n")
    monkeypatch.setattr(sys, "executable", str(script))
    assert not copy.sees(Mutant("a.py", "", "wrong\n"), ("test_a.py",), 60)
    monkeypatch.setenv("LASTS", "60")
    assert copy.sees(Mutant("a.py", "", "wrong\n"), ("test_a.py",), 1)
    assert (tmp_path / "a.py").read_text() == "right\n"
