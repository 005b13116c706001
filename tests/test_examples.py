"""The demo's picture shows videos, the seams of a chain and the ends of its clips."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.golden import ROOT

CHAIN = ROOT / "tests/data/run_0_1_0/tail_14b"  # two clips


def made(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/contact_sheet.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_picture_has_a_row_for_each_video_each_seam_and_the_ends(tmp_path: Path) -> None:
    heights = []
    for more in ([], ["--seams", str(CHAIN)], ["--seams", str(CHAIN), "--ends", str(CHAIN)]):
        done = made(str(tmp_path / "sheet.png"), "examples/shapes.mp4", *more)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width == 980
            heights.append(sheet.height)
    assert heights == sorted(set(heights))


def test_a_folder_without_clips_is_refused_in_one_line(tmp_path: Path) -> None:
    done = made(str(tmp_path / "sheet.png"), "examples/shapes.mp4", "--ends", str(tmp_path))
    assert (done.returncode, done.stderr) == (1, f"{tmp_path} holds no finished clip; name the folder of a chain\n")
