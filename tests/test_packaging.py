"""What is declared agrees with itself: requirements.txt, pyproject.toml and the lock, on every supported platform."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.golden import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLATFORMS = {
    "linux-x86_64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "linux-arm64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macos-arm64": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def requirements(file: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip(" \\") for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("--hash=")]


def declared() -> list[Requirement]:
    """All that pyproject.toml asks for, but for the extra that names the others."""
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [*PROJECT["project"]["dependencies"], *(text for extra in extras.values() for text in extra)]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != PROJECT["project"]["name"]]


def wanted(items: list[Requirement], platform: str, python: str) -> dict[str, Requirement]:
    """What pip would take from the list on that platform."""
    environment = PLATFORMS[platform] | {"python_version": python, "python_full_version": f"{python}.5"}
    return {
        canonicalize_name(item.name): item for item in items if item.marker is None or item.marker.evaluate(environment)
    }


def test_requirements_txt_has_the_whole_list() -> None:
    names = {item.name for item in requirements("requirements.txt")}
    assert names >= {"torch", "transformers", "decord", "timm", "numpy", "pillow", "einops", "diffusers", "accelerate"}
    assert names >= {"av", "ftfy", "safetensors", "tqdm"}


def test_requirements_txt_and_pyproject_ask_for_the_same_versions() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    development = {Requirement(text).name for extra in ("dev", "docs", "mutants") for text in extras[extra]}
    assert {str(item) for item in requirements("requirements.txt")} == {
        str(item) for item in declared() if item.name not in development
    }


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    for item in [*declared(), *map(Requirement, PROJECT["build-system"]["requires"])]:
        assert {specifier.operator for specifier in item.specifier} == {">=", "<"}, f"{item} is not bounded"


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-pip.lock"])
def test_the_lock_pins_versions_and_bytes_and_names_no_place(file: str) -> None:
    for item in requirements(file):
        assert [specifier.operator for specifier in item.specifier] == ["=="], f"{item} is not pinned"
        assert item.url is None
    text = (ROOT / file).read_text()
    assert not re.search(r"://|\bindex\b", text)
    for entry in re.split(r"\n(?=\w)", text)[1:]:
        name, *hashes = entry.replace("\\\n", "").split("--hash=")
        assert hashes, f"{name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", one) for one in hashes), name


def test_what_installs_is_new_enough_to_look_at_hashes() -> None:
    """An older pip does not compare packages with the hashes of a constraint."""
    setup, build = PROJECT["dependency-groups"]["setup"], PROJECT["build-system"]["requires"]
    assert [str(Requirement(text)) for text in build] == [str(Requirement(text)) for text in setup[1:]]
    pins = {item.name: next(iter(item.specifier)).version for item in requirements("requirements-pip.lock")}
    for item in map(Requirement, setup):
        assert item.specifier.contains(pins[item.name])
    assert not Requirement(setup[0]).specifier.contains("26.0")
    assert {f"{name}=={version}" for name, version in pins.items() if name != "pip"} <= {
        f"{item.name}{item.specifier}" for item in requirements("requirements.lock")
    }


def installs() -> list[str]:
    """Every use of pip in the Makefile, its variables filled in, and in the workflow."""
    targets = ("-B", "--dry-run", "BIN=.venv/bin", "quick", "docs", "mutants", "lock", "audit")
    made = subprocess.run(["make", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [*made.splitlines(), *(ROOT / ".github/workflows/ci.yml").read_text().splitlines()]
    return [line for line in lines if "pip install" in line]


@pytest.mark.skipif(shutil.which("make") is None, reason="the Makefile is for systems that have make")
def test_a_set_up_checks_the_bytes_of_all_that_an_index_gives() -> None:
    commands = installs()
    assert sum("wan-continue[dev]" in line for line in commands) == 2, "the Makefile's and the workflow's"
    for line in commands:
        unasked = "--no-index" in line or "--no-deps --no-build-isolation --editable ." in line
        tool = re.search(r"build/(uv|audit)/bin", line) is not None  # what looks at packages, and runs none of them
        assert "--require-hashes" in line or unasked or tool, line


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_lock_covers_every_dependency_within_its_bounds(platform: str, python: str) -> None:
    pins = wanted(requirements("requirements.lock"), platform, python)
    for name, item in wanted(declared(), platform, python).items():
        (pin,) = pins[name].specifier
        assert item.specifier.contains(pin.version), f"{item} on {platform} with Python {python}, locked {pin.version}"


def test_the_locked_torchvision_is_the_one_for_the_locked_torch() -> None:
    (torch,), (torchvision,) = (
        [spec.version for item in requirements("requirements.lock") if item.name == name for spec in item.specifier]
        for name in ("torch", "torchvision")
    )
    major, minor, patch = map(int, torch.split("."))
    assert torchvision == f"0.{minor + 15}.{patch}", "torch 2.N goes with torchvision 0.(N + 15)"
    assert major == 2


@pytest.mark.parametrize(
    ("platform", "reader"), [("linux-x86_64", "decord"), ("linux-arm64", None), ("macos-arm64", "decord2")]
)
def test_decord_is_asked_for_only_where_it_has_wheels(platform: str, reader: str | None) -> None:
    for needed in (requirements("requirements.txt"), declared(), requirements("requirements.lock")):
        names = wanted(needed, platform, "3.11").keys() & {"decord", "decord2"}
        assert names == ({reader} if reader else set())


def test_the_plain_set_up_needs_no_torchvision() -> None:
    project = PROJECT["project"]
    names = {Requirement(text).name for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    assert not names & {"torchvision", "timm", "decord", "decord2"}


def test_every_supported_python_is_allowed() -> None:
    supported = Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    assert all(supported.contains(f"{python}.0") for python in PYTHONS)


def test_nobody_is_told_to_install_a_package_that_is_on_no_index() -> None:
    """Its name would be free for anybody to take. With hashes pip keeps the clone's, and refuses a stranger's."""
    told = [*(ROOT / "wan").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]
    lines = [line for file in told for line in file.read_text(encoding="utf-8").splitlines()]
    lines += installs() if shutil.which("make") else []
    named = [line for line in lines if re.search(r"pip install .*\bwan-continue\b", line)]
    assert [line for line in named if not re.search(r"--require-hashes|\$\(CHECKED\)", line)] == []
    assert "--require-hashes" in re.findall(r"^CHECKED := (.*)", (ROOT / "Makefile").read_text(), re.M)[0]
