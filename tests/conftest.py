"""Fixtures that several tests share: the golden checkpoints, opened in float32."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import torch

from tests.support.commands import command, world
from tests.support.golden import GOLDEN, float32
from tests.support.small_convolutions import pytorch_s_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help="N times as many damaged files in tests/fuzz")
    parser.addoption("--rare", action="store_true", help="run also what only `make test-all` runs")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if item.get_closest_marker("rare") and not item.config.getoption("--rare"):
        pytest.skip("only `make test-all` runs it")


def pytest_collection_finish() -> None:
    _leave_out_of_collections()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _leave_out_of_collections()


def _leave_out_of_collections() -> None:
    """Each command ends with a collection of garbage, which would go through a million objects of imported modules."""
    gc.collect()
    gc.freeze()


__all__ = ["command", "pytorch_s_kernels", "world"]  # fixtures for all tests


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Meta data and prompts of the golden runs."""
    meta: dict[str, Any] = json.loads((GOLDEN / "meta.json").read_text(encoding="utf-8"))
    return meta | {"prompts": json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["prompts"]}


@pytest.fixture(scope="session")
def i2v() -> Any:
    from wan import WanI2V

    return WanI2V(float32("i2v-A14B"), GOLDEN / "14b" / "ckpt")


@pytest.fixture(scope="session")
def ti2v() -> Any:
    from wan import WanTI2V

    return WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt")
