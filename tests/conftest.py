"""Fixtures that several tests share: the golden checkpoints, opened in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.commands import command, world

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"

__all__ = ["DATA", "GOLDEN", "command", "float32", "world"]  # the fixtures of whole commands are for all tests


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Meta data and prompts of the golden runs."""
    prompts = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    return json.loads((GOLDEN / "meta.json").read_text(encoding="utf-8")) | {"prompts": prompts}


def float32(task: str) -> Any:
    """A config row that computes in float32, as the golden runs did."""
    from wan.configs import WAN_CONFIGS

    return dataclasses.replace(WAN_CONFIGS[task], param_dtype=torch.float32, t5_dtype=torch.float32)


@pytest.fixture(scope="session")
def i2v() -> Any:
    from wan import WanI2V

    return WanI2V(float32("i2v-A14B"), GOLDEN / "14b" / "ckpt")


@pytest.fixture(scope="session")
def ti2v() -> Any:
    from wan import WanTI2V

    return WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt")
