"""Weights in host memory: once for all processes of a machine. Processes on a CPU, through gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import tiny_denoiser
from tests.support.ranks import Ranks
from wan.denoiser.model import WanModel
from wan.device.parallel import Team
from wan.device.placement import Placement
from wan.device.ranks import Sizes, World
from wan.weights.tensors import open_safetensors

WIDE: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 16384, "num_layers": 4}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of 4 layers of 34 MiB in float32, and little beside them."""
    folder = tmp_path_factory.mktemp("wide")
    for home, sizes in ((folder, WIDE), (folder / "small", {})):
        home.mkdir(exist_ok=True)
        model = tiny_denoiser.build(**sizes)
        save_file(model.state_dict(), home / "model.safetensors")
        (home / "config.json").write_text(f'{{"num_heads": {model.config.num_attention_heads}}}')
    return folder


def memory() -> torch.Tensor:
    """MiB that this process has for itself, and of those that it has in common with others its equal part."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return torch.tensor([int(rollup.split(f"Pss_{kind}:")[1].split()[0]) / 1024 for kind in ("Anon", "Shmem")])


def in_a_rank(rank: int, size: int, folder: str) -> Any:
    team = Team.start(World(rank, size, rank), Sizes(1, size), torch.device("cpu"), 60)
    assert team.machine is not None and (team.machine.size, team.machine.index) == (size, rank)
    cpu, results = torch.device("cpu"), []
    weights = open_safetensors(Path(folder), "model")
    small = open_safetensors(Path(folder) / "small", "model")
    WanModel.from_weights(small, dtype=torch.bfloat16, device=cpu)  # what libraries take when they are first used
    for together in (True, False):
        if rank and not together:  # as where this process does not see what the other one has
            torch.from_file = missing
        before = memory()
        model = WanModel.from_weights(weights, dtype=torch.bfloat16, device=cpu, machine=team.machine)
        team.share(lambda: None)
        grown = memory() - before
        # layers come one by one to a "GPU", and need no other place in host memory for it
        places = [parameter.data_ptr() for parameter in model.blocks.parameters()]
        size_of = sum(tensor.nbytes for tensor in model.parameters())
        latents = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        with Placement(cpu, weight_budget=size_of * 3 // 4).on_device(model), torch.no_grad():
            flow = model(latents, torch.tensor([500.0]), tiny_denoiser.prompt(1), return_dict=False)[0]
        assert places == [parameter.data_ptr() for parameter in model.blocks.parameters()]
        results.append((flow, grown / (size_of / 2**20)))
        team.share(lambda: None)
        del model
    team.end()
    return results


def missing(*_: Any, **more: Any) -> Any:
    raise FileNotFoundError("no such file")


def test_weights_are_in_host_memory_once_for_all_processes_of_a_machine(ranks: Ranks, checkpoint: Path) -> None:
    weights = open_safetensors(checkpoint, "model")
    model = WanModel.from_weights(weights, dtype=torch.bfloat16, device=torch.device("cpu"))
    latents = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(latents, torch.tensor([500.0]), tiny_denoiser.prompt(1), return_dict=False)[0]
    (shared, apart), (shared_too, apart_too) = ranks.run(in_a_rank, 2, str(checkpoint))
    assert all(torch.equal(flow, expected) for flow, _ in (shared, shared_too, apart, apart_too))
    alone, in_common = (shared[1] + shared_too[1]).tolist()
    assert 0.95 <= in_common <= 1.1 and alone < 1.2, "one copy, and what libraries take"
    alone, in_common = (apart[1] + apart_too[1]).tolist()
    assert in_common < 0.05 and alone > 1.7, "a copy in each"
