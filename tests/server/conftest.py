"""Servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import QUICK, Served, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With the tiny 5B."""
    with serving(tmp_path_factory.mktemp("served") / "out", *QUICK) as served:
        yield served


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With a model that sleeps in place of computing."""
    folder = tmp_path_factory.mktemp("quick") / "out"
    with serving(folder, "--frame_num", "5", "--sample_steps", "8", program=("benchmarks.sleeping",)) as served:
        yield served
