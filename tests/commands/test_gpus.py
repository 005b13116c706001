"""Which sizes of groups of GPUs go with the processes that were started."""

from __future__ import annotations

from typing import Any

import pytest

from wan.commands.gpus import check_world
from wan.device.ranks import World
from wan.errors import UserError
from wan.options import Settings


@pytest.mark.parametrize(
    ("size", "given", "goes"),
    [
        (4, {}, True),
        (4, {"ulysses_size": 2}, True),
        (4, {"ulysses_size": 3}, False),
        (4, {"ulysses_size": 2, "cfg_size": 2}, True),
        (4, {"ulysses_size": 2, "cfg_size": 2, "ring_size": 1}, True),
        (4, {"ulysses_size": 2, "cfg_size": 1, "ring_size": 1}, False),
        (1, {"ulysses_size": 1}, True),
    ],
)
def test_sizes_that_are_given_make_up_the_processes_that_are_started(
    size: int, given: dict[str, Any], goes: bool
) -> None:
    settings = Settings(ckpt_dir="x", **given)
    if goes:
        check_world(settings, World(size=size))
        return
    with pytest.raises(UserError, match=f"does not make up the {size} processes that are started"):
        check_world(settings, World(size=size))
