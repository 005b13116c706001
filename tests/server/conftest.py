"""One server for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import QUICK, Served, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "out", *QUICK) as served:
        yield served
