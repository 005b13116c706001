"""`make mutants`: each file in which it makes faults has tests to run."""

from __future__ import annotations

from benchmarks.mutants import PACKAGES, ROOT, TESTS, covering_tests, package_of


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
