"""Weights in slices, one in each of two processes: the numbers of whole ones. Processes on a CPU, through gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.support.golden import ROOT
from tests.support.ranks import Ranks
from wan.configs import config_for
from wan.device.parallel import Team
from wan.device.ranks import Sizes, World
from wan.device.sharding import is_sharded, slice_of
from wan.errors import UserError
from wan.settings import LoraFile
from wan.textimage2video import WanTI2V

pytestmark = pytest.mark.slow

FOLDER = ROOT / "models" / "tiny-Wan2.2-TI2V-5B"
BLOCK = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def numbers(pipeline: WanTI2V, lora: str) -> list[torch.Tensor]:
    """A prompt's embedding, and the denoiser's output without a LoRA, with one, and without it again."""
    text = pipeline.text_encoder("a red square moves left")
    latents = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    outputs = [text]
    for files in ((), (LoraFile(Path(lora)),), ()):
        pipeline.models.merge_loras({"model": files})
        model = pipeline.model
        with torch.no_grad():
            outputs.append(model(latents, torch.full((1, 3), 500.0), model.text_keys(text), return_dict=False)[0])
    return outputs


def in_a_rank(rank: int, size: int, lora: str) -> Any:
    pipeline = WanTI2V(config_for("ti2v-5B", FOLDER), FOLDER, t5_fsdp=True, dit_fsdp=True)
    pipeline.team = Team.start(World(rank, size, rank), Sizes(1, size), torch.device("cpu"), 60)
    outputs = numbers(pipeline, lora)
    model, encoder = pipeline.model, pipeline.text_encoder
    assert is_sharded(model) and is_sharded(encoder)
    for layer in (*model.blocks, *encoder.layers):  # what is outside of them stays whole for a while after a forward
        for parameter in layer.parameters():
            sliced = slice_of(parameter)
            assert sliced is not None and len(sliced.numbers) <= -(-len(parameter) // size)
    pipeline.team.end()
    return outputs


def test_slices_give_the_numbers_of_whole_weights_with_loras_too(ranks: Ranks, tmp_path: Path) -> None:
    whole = WanTI2V(config_for("ti2v-5B", FOLDER), FOLDER)
    width = whole.model.get_parameter("blocks.0.attn1.to_q.bias").numel()
    draw = torch.Generator().manual_seed(2)
    parts = {"lora_down": torch.randn(4, width, generator=draw), "lora_up": torch.randn(width, 4, generator=draw)}
    lora = tmp_path / "lora.safetensors"
    layers = [BLOCK.replace("blocks.0", f"blocks.{number}") for number in range(len(whole.model.blocks))]
    save_file({f"{one}.{key}.weight": part.clone() for one in layers for key, part in parts.items()}, lora)
    expected = numbers(whole, str(lora))
    assert not torch.equal(expected[1], expected[2]) and torch.equal(expected[1], expected[3])
    for outputs in ranks.run(in_a_rank, 2, str(lora)):
        for one, other in zip(expected, outputs, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()


def as_in_wan(rank: int, size: int) -> Any:
    """What a script of Wan2.2's does in each process."""
    dist.init_process_group("gloo")
    pipeline = WanTI2V(
        config_for("ti2v-5B", FOLDER), FOLDER, device_id=rank, rank=rank, t5_fsdp=True, dit_fsdp=True, use_sp=size > 1
    )
    made = clip(pipeline)
    dist.barrier()  # as that script does
    pipeline.team.end()
    return made


def clip(pipeline: WanTI2V) -> Any:
    return pipeline.generate("a red square", size=(96, 64), frame_num=5, sampling_steps=2, guide_scale=2.0, seed=4)


def test_constructor_arguments_mean_what_they_do_in_wan(ranks: Ranks) -> None:
    alone = clip(WanTI2V(config_for("ti2v-5B", FOLDER), FOLDER))
    first, second = ranks.run(as_in_wan, 2)
    assert second is None and first.shape == alone.shape
    assert (first - alone).norm() <= 1e-4 * alone.norm()
    with pytest.raises(UserError, match="use_sp shares a clip among processes: start the script with torchrun"):
        WanTI2V(config_for("ti2v-5B", FOLDER), FOLDER, use_sp=True)


def test_what_does_not_go_with_slices_is_refused() -> None:
    config = config_for("ti2v-5B", FOLDER)
    with pytest.raises(UserError, match="t5_fsdp slices the text encoder for GPUs, and t5_cpu runs it on the CPU"):
        WanTI2V(config, FOLDER, t5_fsdp=True, t5_cpu=True)
    with pytest.raises(UserError, match="dit_fsdp slices bf16 weights, and precision fp8 rounds whole ones"):
        WanTI2V(config.variant(low_precision="fp8"), FOLDER, dit_fsdp=True)
    with pytest.raises(UserError, match="dit_fsdp keep weights on all GPUs, so no layers come to them: leave out vram"):
        WanTI2V(config, FOLDER, dit_fsdp=True, vram=8)


def test_the_last_slice_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole:
        shape = (10, 2)

        def __init__(self, rank: int) -> None:
            self.device_mesh = SimpleNamespace(size=lambda: 4, get_local_rank=lambda: rank)
            self.rank = rank

        def to_local(self) -> torch.Tensor:
            return torch.zeros((3, 3, 3, 1)[self.rank], 2)

    monkeypatch.setattr("torch.distributed.tensor.DTensor", Whole)
    slices: list[Any] = [slice_of(Whole(rank)) for rank in range(4)]  # type: ignore[arg-type]
    assert [(one.rows.start, one.rows.stop) for one in slices] == [(0, 3), (3, 6), (6, 9), (9, 10)]
