"""`make mutants`: each file in which it makes faults has tests to run."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.mutants import (
    PACKAGES,
    ROOT,
    TESTS,
    Baseline,
    Copy,
    Log,
    Mutant,
    by_turns,
    covering_tests,
    measure,
    package_of,
)


def test_every_file_that_gets_faults_has_tests_of_its_own() -> None:
    for package in PACKAGES:
        files = sorted((ROOT / package).glob("*.py"))
        assert files
        for file in files:
            name = file.relative_to(ROOT).as_posix()
            assert package_of(name) == package
            tests = covering_tests(name)
            assert tests and all((ROOT / test).is_file() for test in tests)
    assert all((ROOT / name).exists() for name in TESTS)


def test_the_tests_of_a_file_come_before_those_of_its_package() -> None:
    assert covering_tests("wan/chain/report.py") == ("tests/chain/test_report.py", ARCHITECTURE)
    first, *others = covering_tests("wan/quality/metrics.py")
    assert first == "tests/quality/test_metrics.py" and "tests/quality/test_motion.py" in others
    assert covering_tests("wan/captioner/memory.py")[0] == "tests/captioner/test_memory.py"
    assert covering_tests("wan/device/shared.py") == ("tests/device/test_shared.py", ARCHITECTURE)
    assert package_of("wan/pipeline.py") == "wan" and len(covering_tests("wan/chain/chain.py")) > 1


def test_a_run_that_is_stopped_has_seen_as_many_faults_of_each_package() -> None:
    of_text, of_vae = ([Mutant(f"wan/{name}/{n}.py", "", "") for n in range(3)] for name in ("text", "vae"))
    turns = by_turns([*of_text, *of_vae[:2]])
    assert turns == [of_text[0], of_vae[0], of_text[1], of_vae[1], of_text[2]]


@dataclass(frozen=True)
class _Copy(Copy):
    """Tests nothing: a fault is seen where its text says so, when another copy is at work too."""

    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    failing: Sequence[str] = ()
    lasts: float = 0.0
    calls: list[tuple[Sequence[str], float]] = field(default_factory=list)

    def baseline(self, test: str, limit: float) -> Baseline:
        return Baseline(2.0, [name for name in self.failing if name.startswith(test)])

    def sees(self, mutant: Mutant, tests: Sequence[str], limit: float) -> bool:
        self.both.wait(60)
        self.calls.append((tests, limit))
        time.sleep(self.lasts)
        return mutant.text == "seen"


FAULTS = [Mutant("wan/denoiser/sequence.py", str(n), "seen" if n % 2 else "") for n in range(4)]
SEQUENCE, ARCHITECTURE = covering_tests(FAULTS[0].file)


def test_copies_try_faults_at_the_same_time() -> None:
    both = threading.Barrier(2)
    copies = [_Copy(ROOT, both=both), _Copy(ROOT, both=both)]
    log = Log(None)
    measured = dict(measure(FAULTS, copies, log.baselines, log.add_baseline))
    assert measured == {mutant: mutant.text == "seen" for mutant in FAULTS}
    assert copies[0].calls == copies[1].calls == [([SEQUENCE, ARCHITECTURE], 30 + 3 * 4.0)] * 2
    assert log.baselines == {SEQUENCE: Baseline(2.0, []), ARCHITECTURE: Baseline(2.0, [])}


def test_tests_that_fail_without_a_fault_are_left_out_and_listed() -> None:
    copy, log = _Copy(ROOT, failing=[f"{SEQUENCE}::test_a"]), Log(None)
    assert len(dict(measure(FAULTS[:1], [copy], log.baselines, log.add_baseline))) == 1
    assert copy.calls[0][0] == [SEQUENCE, f"--deselect={SEQUENCE}::test_a", ARCHITECTURE]
    assert log.baselines[SEQUENCE].failing == [f"{SEQUENCE}::test_a"]
    none_passes = _Copy(ROOT, failing=[SEQUENCE, ARCHITECTURE])
    assert list(measure(FAULTS, [none_passes], {}, log.add_baseline)) == [] == none_passes.calls


def test_a_run_out_of_time_begins_nothing_and_does_not_count_what_it_cut_off() -> None:
    copy = _Copy(ROOT, lasts=0.3)
    assert (
        list(
            measure(
                FAULTS, [copy], dict.fromkeys((SEQUENCE, ARCHITECTURE), Baseline(2.0)), print, time.monotonic() + 0.2
            )
        )
        == []
    )
    assert len(copy.calls) == 1 and copy.calls[0][1] <= 0.2
    known = dict[str, Baseline]()
    assert list(measure(FAULTS, [copy], known, print, time.monotonic())) == [] and known == {}  # none fails


def test_a_log_holds_what_a_run_that_was_cut_off_knew(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    log.add(FAULTS[0], False)
    log.add_baseline(SEQUENCE, Baseline(2.0, ["a"]))
    log.add(FAULTS[1], True)
    with (tmp_path / "log").open("a") as file:
        file.write('{"seen": tr')
    later = Log(tmp_path / "log")
    assert [later.seen(fault) for fault in FAULTS[:3]] == [False, True, None]
    assert later.baselines == {SEQUENCE: Baseline(2.0, ["a"])}


def test_what_fails_without_a_fault_is_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_a.py").write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    assert Copy(tmp_path).baseline("test_a.py", 60).failing == ["test_a.py::test_wrong"]
    assert Copy(tmp_path).baseline("test_a.py", 0.01) == Baseline(0.01, ("test_a.py",))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_a_copy_keeps_to_its_cores_and_to_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core, python, script = min(os.sched_getaffinity(0)), sys.executable, tmp_path / "python"
    script.touch(0o755)
    copy, mutant = Copy(tmp_path, (core,)), Mutant("a.py", "", "wrong\n")
    (tmp_path / "a.py").write_text("right\n")
    monkeypatch.setattr(sys, "executable", str(script))
    for does, limit, is_seen in (
        ("while len(os.sched_getaffinity(0)) > 1: time.sleep(0.01)", 60, False),
        ("raise SystemExit(1)", 60, True),
        ("raise SystemExit(5)", 60, None),  # pytest's word for no tests
        ("time.sleep(60)", 1, True),
    ):
        script.write_text(f"#!{python}\nimport os, time\n{does}\n")
        assert copy.sees(mutant, ("test_a.py",), limit) is is_seen
        assert (tmp_path / "a.py").read_text() == "right\n"
