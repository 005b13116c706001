"""The training stages start, save themselves and go on; what they learn is measured on a GPU (training/LOG.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.media_samples import CORPUS

ROOT = CORPUS.parents[2]


def train(stage: str, folder: Path) -> None:
    command = [sys.executable, "-m", "training", stage, "--folder", str(folder), "--steps", "2", "--batch", "1"]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", ["text", "vae22"])
def test_a_stage_goes_on_from_its_own_checkpoint(stage: str, tmp_path: Path) -> None:
    steps = []
    for _ in range(2):
        train(stage, tmp_path)
        found = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
        steps.append(found["steps"])
        assert all(torch.isfinite(value).all() for value in found["weights"].values())
    assert steps == [2, 4]
