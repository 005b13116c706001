"""Where the tests' data lies, and config rows as the golden runs had them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from wan.configs import WAN_CONFIGS, ModelConfig

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "golden"
GOLDEN_VLM = DATA / "golden_vlm"


def float32(task: str) -> ModelConfig:
    """A config row that computes in float32, as the golden runs did."""
    return dataclasses.replace(WAN_CONFIGS[task], param_dtype=torch.float32, t5_dtype=torch.float32)
