"""The VAE in bands of rows, one in each process, gives what it gives in one. Processes on a CPU, through gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.golden import ROOT
from tests.support.ranks import Ranks
from wan.configs import config_for
from wan.device.parallel import Team
from wan.device.ranks import Sizes, World
from wan.experts import pipeline_class

FOLDERS = {"ti2v-5B": "tiny-Wan2.2-TI2V-5B", "i2v-A14B": "tiny-Wan2.2-I2V-A14B"}
SIZE = 9, 112, 48  # 7 rows of latents of the 5B, 14 of A14B, which do not divide by two or four


def pass_through(team: Team | None) -> list[torch.Tensor]:
    found = []
    for task, folder in FOLDERS.items():
        path = ROOT / "models" / folder
        vae = pipeline_class(task)(config_for(task, path), path).vae
        clip = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
        group = None if team is None else team.all_
        latents = vae.encode([clip], group=group)[0]
        found += [latents, vae.decode([latents], group=group)[0]]
    return found


def in_a_rank(rank: int, size: int) -> Any:
    team = Team.start(World(rank, size, rank), Sizes(1, size), torch.device("cpu"), 60)
    found = pass_through(team)
    team.end()
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.rare)])
def test_bands_are_the_whole_picture(size: int) -> None:
    expected = pass_through(None)
    with Ranks() as ranks:
        first, *others = ranks.run(in_a_rank, size)
    for number, (one, other) in enumerate(zip(expected, first, strict=True)):
        torch.testing.assert_close(other, one, atol=2e-5, rtol=0)
        assert all(rank[number].shape == (one.shape if number % 2 == 0 else (3, 0, *SIZE[1:])) for rank in others)
    assert expected[1].std() > 0.01  # of pictures, not of nothing
