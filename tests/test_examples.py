"""The demo's picture shows videos, the seams of a chain and the ends of its clips."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.support.golden import ROOT

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
