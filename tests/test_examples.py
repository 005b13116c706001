"""The demo's picture shows videos, the seams of a chain and the ends of its clips. Files for clusters can be read."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.support.golden import ROOT
from wan.commands.flags import parse

VIDEO = str(ROOT / "examples/shapes.mp4")
CHAIN = ROOT / "tests/data/run_0_1_0/tail_14b"  # two clips


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the script; returns what it ends with."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["contact_sheet.py", *arguments])
        try:
            runpy.run_path(str(ROOT / "examples/contact_sheet.py"), run_name="__main__")
        except SystemExit as end:
            return str(end.code)
        return ""

    return run


def test_a_picture_has_a_row_for_each_video_each_seam_and_the_ends(made: Callable[..., str], tmp_path: Path) -> None:
    heights = []
    for more in ([], ["--seams", str(CHAIN)], ["--seams", str(CHAIN), "--ends", str(CHAIN)]):
        assert made(str(tmp_path / "sheet.png"), VIDEO, *more) == ""
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width == 980
            heights.append(sheet.height)
    assert heights == sorted(set(heights))


def test_a_folder_without_clips_is_refused_in_one_line(made: Callable[..., str], tmp_path: Path) -> None:
    told = made(str(tmp_path / "sheet.png"), VIDEO, "--ends", str(tmp_path))
    assert told == f"{tmp_path} holds no finished clip; name the folder of a chain"


@pytest.mark.parametrize("file", sorted((ROOT / "examples/cluster").iterdir()), ids=lambda file: str(file.name))
def test_a_file_for_a_cluster_gives_a_command_that_is_understood(file: Path) -> None:
    script = file.read_text()
    if file.suffix == ".yaml":
        described = yaml.safe_load(script)
        script = described["run"] if "run" in described else described["spec"]["entrypoint"]
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n"], input=script, text=True, check=True, timeout=10)
    commands = re.findall(r"(?:generate_batch\.py|wan-batch) (--.*)", script.replace("\\\n", ""))
    for command in commands:
        settings = parse("batch", shlex.split(re.sub(r"\$\(\(.*?\)\)", "16", command)))
        assert settings.output_dir.endswith("/{name}") and settings.videos
    assert len(commands) == 1
