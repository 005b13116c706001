"""The VAE in bands of rows, one in each process, gives what it gives in one. Processes on a CPU, through gloo."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.golden import ROOT
from tests.support.ranks import Ranks
from wan.configs import config_for
from wan.device.parallel import Team
from wan.device.ranks import Sizes, World
from wan.experts import pipeline_class
from wan.vae.bands import Band
from wan.vae.vae import WanVAE

pytestmark = pytest.mark.slow

FOLDERS = {"ti2v-5B": "tiny-Wan2.2-TI2V-5B", "i2v-A14B": "tiny-Wan2.2-I2V-A14B"}
SIZE = 9, 112, 48  # 7 rows of latents of the 5B, 14 of A14B, which do not divide by two or four


def pass_through(team: Team | None) -> list[torch.Tensor]:
    outputs = []
    for task, folder in FOLDERS.items():
        path = ROOT / "models" / folder
        vae = pipeline_class(task)(config_for(task, path), path).vae
        clip = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
        group = None if team is None else team.all_
        latents = vae.encode([clip], group=group)[0]
        outputs += [latents, vae.decode([latents], group=group)[0]]
    return outputs


def in_a_rank(rank: int, size: int) -> Any:
    team = Team.start(World(rank, size, rank), Sizes(1, size), torch.device("cpu"), 60)
    outputs = pass_through(team)
    team.end()
    return outputs


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.rare)])
def test_bands_are_the_whole_picture(size: int) -> None:
    expected = pass_through(None)
    with Ranks() as ranks:
        first, *others = ranks.run(in_a_rank, size)
    for number, (one, other) in enumerate(zip(expected, first, strict=True)):
        torch.testing.assert_close(other, one, atol=2e-5, rtol=0)
        assert all(rank[number].shape == (one.shape if number % 2 == 0 else (3, 0, *SIZE[1:])) for rank in others)
    assert expected[1].std() > 0.01  # of pictures, not of nothing


def test_rows_from_beside_keep_the_layout_that_convolutions_are_fast_in() -> None:
    """One process as the middle one of three, whose neighbours have the same rows."""

    class Three:
        size, index = 3, 1

        def gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
            return [mine.contiguous()] * 3

    x = torch.rand(1, 8, 2, 4, 6).contiguous(memory_format=torch.channels_last_3d)
    band: Any = Band(Three(), 12)  # type: ignore[arg-type]
    around = band.beside(x, 1, 1)
    assert around.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(around, torch.cat([x[..., -1:, :], x, x[..., :1, :]], dim=-2))
    frames = x[0].transpose(0, 1)
    assert band.beside(frames, 0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(band.beside(frames, 0, 1), torch.cat([frames, frames[..., :1, :]], dim=-2))


def test_rows_are_shared_as_evenly_as_they_can_be() -> None:
    x = torch.arange(14).view(14, 1).expand(14, 2)
    bands = [Band(SimpleNamespace(size=3, index=index), 7) for index in range(3)]  # type: ignore[arg-type]
    assert [band.counts for band in bands] == [[3, 2, 2]] * 3
    assert [band.mine(x)[:, 0].tolist() for band in bands] == [[*range(6)], [6, 7, 8, 9], [10, 11, 12, 13]]
    even = Band(SimpleNamespace(size=2, index=0), 8)  # type: ignore[arg-type]
    assert even.counts == [4, 4]


def test_of_clips_with_too_few_rows_to_share_all_are_left_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = torch.nn.Identity()
    model.config = SimpleNamespace(scale_factor_spatial=8)
    vae = WanVAE(model, [0.0] * 4, [1.0] * 4)
    monkeypatch.setattr("wan.vae.vae._band", lambda group, rows: None)
    group: Any = SimpleNamespace(index=1, size=2)
    decoded = vae.decode([torch.zeros(4, 1, 1, 2), torch.zeros(4, 1, 1, 3)], group=group)
    assert [tuple(one.shape) for one in decoded] == [(3, 0, 8, 16), (3, 0, 8, 24)]
    assert not vae.state_dict()  # statistics are the row's and no weights
