"""Where the tests' data lies, and config rows as the golden runs had them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from wan.configs import WAN_CONFIGS, ModelConfig

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "golden"
GOLDEN_VLM = DATA / "golden_vlm"


def small_checkpoints(folder: Path, sizes: tuple[str, ...] = ("96*64",), **declared: Any) -> None:
    """The golden checkpoints as folders `i2v` and `ti2v` that declare small sizes, and what else is given."""
    common = {"sizes": list(sizes), "frame_num": 5, "sample_steps": 2, "param_dtype": "float32", "t5_dtype": "float32"}
    for name, source in (("i2v", "14b"), ("ti2v", "5b")):
        shutil.copytree(GOLDEN / source / "ckpt", folder / name)
        (folder / name / "wan_config.json").write_text(json.dumps(common | declared))


def float32(task: str) -> ModelConfig:
    """A config row that computes in float32, as the golden runs did."""
    return dataclasses.replace(WAN_CONFIGS[task], param_dtype=torch.float32, t5_dtype=torch.float32)
