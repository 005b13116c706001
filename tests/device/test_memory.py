"""A budget of GPU memory: what it is told to hold, and layers that come one by one without changing a result."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks.floor import counted, denoiser_flops
from benchmarks.real_size import DIT, VAE, headers
from tests.support.golden import GOLDEN
from tests.support.tiny_denoiser import build, noise, prompt
from wan import WAN_CONFIGS, UserError, WanV2V5B
from wan.captioner import weight_bytes
from wan.denoiser.headers import key_map
from wan.denoiser.model import WanModel
from wan.denoiser.policy import stays_float32
from wan.device import layers, streaming
from wan.device.budget import (
    ALWAYS,
    BARE_CONTEXT,
    CONTEXT,
    GIB,
    ClipNeeds,
    MemoryBudget,
    StageMemory,
    denoiser_memory,
    for_tensors,
    gpu_limit,
)
from wan.device.hardware import hold_to
from wan.device.host_budget import HostBudget, HostPlan
from wan.device.layers import layers_that_stay
from wan.device.placement import Placement
from wan.device.streaming import LayerStreamer
from wan.models import Models
from wan.prompting import CaptionerOwner
from wan.text.umt5 import TextEncoder
from wan.types import Clip, Geometry
from wan.vae import chunked
from wan.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")


def forward(model: WanModel) -> Tensor:
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output: Tensor = model(latents, torch.tensor([600.0]), prompt(1), return_dict=False)[0]
    return output


def places(model: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in model.parameters()]


def room_for(model: WanModel, staying: int) -> int:
    """Room in which so many layers can stay, and two more pass through."""
    layer, whole = (sum(int(x.nbytes) for x in (*of.parameters(), *of.buffers())) for of in (model.layers[0], model))
    return whole - (len(model.layers) - staying - 2) * layer


@pytest.mark.parametrize("staying", [0, 1, 3, 4, 6])  # 4: the two others have a slot each; 6: none comes again
def test_layers_that_come_one_by_one_change_no_bit(staying: int) -> None:
    model = build(num_layers=6)
    expected = forward(model)
    placement = Placement(CPU, weight_budget=room_for(model, staying))
    assert placement.streams(model) == (staying < 4)
    for _ in range(2):  # what a first use has put into one piece of memory, a second one finds there
        with placement.on_device(model):
            assert model.before_layer is not None
            assert torch.equal(forward(model), expected)
            assert torch.equal(forward(model), expected)  # the first layers come again after the last ones
        assert model.before_layer is None
    assert torch.equal(forward(model), expected)


def test_weights_pass_through_two_slots_and_are_back_where_they_were() -> None:
    model = build(num_layers=6)
    placement = Placement(CPU, weight_budget=room_for(model, 0))
    with placement.on_device(model):
        forward(model)
    before, seen = places(model), set[int]()
    with placement.on_device(model):
        fetch = model.before_layer
        assert fetch is not None

        def watch(number: int) -> None:
            fetch(number)
            block: Any = model.layers[number]
            seen.add(block.attn1.to_q.weight.data_ptr())

        model.before_layer = watch
        forward(model)
    assert len(seen) == 2 and not seen & set(before)
    assert places(model) == before


@pytest.mark.parametrize(
    ("staying", "times", "kept"), [(6, [1] * 6, 6), (0, [4, 3, 3, 3, 3, 3], 0), (2, [4, 3, 1, 3, 3, 1], 0)]
)
def test_layers_that_stay_come_once_and_then_text_keys_are_kept(
    staying: int, times: list[int], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fetched, fetch = build(num_layers=6), list[int](), LayerStreamer._fetch

    def counting(feed: LayerStreamer, number: int, used: int | None = None) -> None:
        fetched.append(number)
        fetch(feed, number, used)

    monkeypatch.setattr(LayerStreamer, "_fetch", counting)
    placement = Placement(CPU, weight_budget=room_for(model, staying))
    with torch.no_grad(), placement.on_device(model):
        text = model.text_keys(prompt(1), keep=not placement.streams(model))
        for _ in range(3):
            model(noise()[None], torch.tensor([600.0]), text)
    assert [fetched.count(number) for number in range(6)] == times
    assert len(text.by_block) == kept


def test_a_layer_that_was_left_out_does_not_confuse_those_after_it() -> None:
    """Caches leave layers out, in some forwards and not in others."""
    model = build(num_layers=6)
    whole = list(model.blocks)
    with Placement(CPU, weight_budget=room_for(model, 1)).on_device(model):
        expected = forward(model)
        skipped = _Skipped(whole[3])
        model.blocks[3] = skipped
        without = forward(model)
        model.blocks[3] = skipped.block
        assert torch.equal(forward(model), expected)
    model.blocks[3] = skipped
    assert torch.equal(forward(model), without)


class _Skipped(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.text_keys: Any = block.text_keys

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def test_one_piece_of_memory_keeps_what_is_channels_last_and_what_is_shared() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 5, (1, 3, 3)), nn.Conv2d(5, 4, 3), nn.Linear(7, 2, bias=False), nn.BatchNorm1d(3)
    )
    model.extra = model[2]
    layouts: list[tuple[Any, torch.memory_format]] = [
        (model[0], torch.channels_last_3d),
        (model[1], torch.channels_last),
    ]
    for convolution, layout in layouts:
        convolution.weight.data = convolution.weight.data.contiguous(memory_format=layout)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with Placement(CPU, weight_budget=2**30).on_device(model):
            state = model.state_dict()
            assert all(torch.equal(state[name], value) for name, (value, _) in before.items())
            assert {name: state[name].stride() for name in state} == {
                name: stride for name, (_, stride) in before.items()
            }
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, (value, _) in before.items())
    addresses = {tensor.data_ptr() // 2**20 for tensor in model.parameters()}
    assert len(addresses) <= 2, "all lie in one piece"


@pytest.mark.parametrize("family", ["ti2v", "i2v"])
def test_what_a_checkpoint_fills_needs_no_other_place(request: pytest.FixtureRequest, family: str) -> None:
    loaded = request.getfixturevalue(family)
    denoiser = "model" if family == "ti2v" else "low_noise_model"
    dit = WanModel.from_weights(
        loaded.checkpoint.experts[denoiser], dtype=torch.bfloat16, device=CPU, convert_model_dtype=False
    )
    words = loaded.tokenizer
    text = TextEncoder.from_weights(loaded.checkpoint.text_encoder, words, dtype=torch.bfloat16, device=CPU)
    models: list[Any] = [dit, text]
    for model in models:
        addresses = [places(layer) for layer in model.layers]
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        with Placement(CPU, weight_budget=2**40).on_device(model):
            for number in range(len(addresses)):
                model.before_layer(number)
                assert not set(addresses[number]) & set(places(model.layers[number]))
            assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert [places(layer) for layer in model.layers] == addresses
    model = WanModel.from_weights(  # whose weights give way to others: what is left must not hold their memory
        loaded.checkpoint.experts[denoiser], dtype=torch.bfloat16, device=CPU, low_precision="fp8"
    )
    layer = model.layers[0]
    size = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert (
        sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.parameters()}.values()) <= size
    )


def test_no_more_host_memory_is_locked_than_leaves_room_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[str, int]] = []

    def register(place: int, size: int, flags: int) -> bool:
        calls.append(("lock", size))
        return size == 3 << 20

    runtime = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda place: calls.append(("unlock", 0)),
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.cudart", lambda: runtime)
    monkeypatch.setattr("wan.device.streaming.host_bytes", lambda: 10 << 20)
    monkeypatch.setattr(streaming, "_pinned", {})
    streaming._say_that_copies_are_slow.cache_clear()
    pieces = [torch.empty(size << 20, dtype=torch.uint8) for size in (4, 4, 3, 3, 2)]
    # 8 of 10 MiB would be too much; the driver refuses the third and fourth
    assert [streaming._pin(piece) for piece in pieces] == [True, False, False, False, True]
    assert sum(streaming._pinned.values()) == 6 << 20 and caplog.text.count("cannot be pinned") == 1
    streaming._unpin(pieces[0])
    assert list(streaming._pinned.values()) == [2 << 20] and calls[-1] == ("unlock", 0)


def test_threads_that_pin_at_a_time_take_no_more_together(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, garbage = (torch.empty(size << 20, dtype=torch.uint8) for size in (4, 4, 2))
    others: list[bool] = []

    def register(place: int, *_: int) -> int:
        if place == first.data_ptr():  # which takes seconds with many GB
            with ThreadPoolExecutor(1) as thread:
                others.append(thread.submit(streaming._pin, second).result(10))
        return 0

    def host() -> int:
        if id(garbage) in streaming._pinned:
            streaming._unpin(garbage)  # as where it is collected in the middle of the counting
        return 10 << 20

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda place: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.cudart", lambda: runtime)
    monkeypatch.setattr("wan.device.streaming.host_bytes", host)
    monkeypatch.setattr(streaming, "_pinned", {id(garbage): garbage.nbytes})
    assert streaming._pin(first) and others == [False] and list(streaming._pinned) == [id(first)]
    streaming._unpin(first)
    assert streaming._pin(second)


def test_a_stage_is_one_piece_of_memory_for_all_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def register(place: int, size: int, flags: int) -> int:
        calls.append(("pin", size))
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda place: calls.append(("unpin", place)),
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.cudart", lambda: runtime)
    monkeypatch.setattr(streaming, "_pinned", {})
    stage = streaming.PinnedStage()
    first = stage.like(torch.zeros(3, 1000), torch.bfloat16)
    assert first.shape == (3, 1000) and first.dtype == torch.bfloat16 and first.data_ptr() % 4096 == 0
    assert stage.like(torch.zeros(2, 8), torch.float8_e4m3fn).data_ptr() == first.data_ptr()
    stage.like(torch.zeros(5000), torch.float32)  # a larger one
    assert calls == [("pin", 8192), ("unpin", first.data_ptr()), ("pin", 20480)]
    assert list(streaming._pinned.values()) == [20480]
    del stage
    assert len(calls) == 4 and not streaming._pinned


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has one size of pages"
)
def test_weights_lie_in_large_pages_which_go_with_them() -> None:
    memory = streaming._pages(64 << 20)
    place = memory.data_ptr()
    assert place % 4096 == 0 and len(memory) == 64 << 20 and not memory[:: 1 << 20].any()

    def flags() -> str:
        """What the kernel was told of the pages at that place."""
        text = Path("/proc/self/smaps").read_text(encoding="ascii")
        for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
            begin, end = (int(side, 16) for side in area.split(" ", 1)[0].split("-"))
            if begin <= place < end:
                return area.rsplit("VmFlags:", 1)[1]
        return ""

    assert " hg " in flags()
    view = memory.view(torch.bfloat16)[:8]
    del memory
    assert " hg " in flags() and not view.any()
    del view
    assert " hg " not in flags()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch's allocator gives the memory")
def test_memory_that_the_host_has_not_is_no_error_of_a_file() -> None:
    with pytest.raises(MemoryError, match="no 4611686018427387904 bytes of host memory"):
        streaming._pages(1 << 62)


def test_changed_weights_are_those_that_come() -> None:
    model = build(num_layers=6)
    placement = Placement(CPU, weight_budget=room_for(model, 0))
    with placement.on_device(model):
        before = forward(model)
    model.blocks[2].attn1.to_q.weight.data.mul_(2)  # as a LoRA does
    model.blocks[4].attn1.to_q.weight.data = model.blocks[4].attn1.to_q.weight.data * 3
    expected = forward(model)
    assert not torch.equal(before, expected)
    with placement.on_device(model):
        assert torch.equal(forward(model), expected)


def test_a_failure_leaves_the_weights_in_host_memory() -> None:
    model = build(num_layers=6)
    expected = forward(model)
    with pytest.raises(ZeroDivisionError), Placement(CPU, weight_budget=room_for(model, 0)).on_device(model):
        forward(model)
        raise ZeroDivisionError
    assert model.before_layer is None
    assert torch.equal(forward(model), expected)


def test_a_text_encoder_comes_layer_by_layer_too() -> None:
    config = UMT5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=5, num_heads=4)
    torch.manual_seed(2)
    words: Any = SimpleNamespace(__call__=None)
    encoder = TextEncoder(UMT5EncoderModel(config).eval(), words)
    ids, mask = torch.arange(1, 9)[None], torch.ones(1, 8, dtype=torch.long)
    with torch.no_grad():
        expected = encoder.model(ids, mask)[0]
        size = sum(tensor.nbytes for tensor in encoder.parameters())
        with Placement(CPU, weight_budget=size - 2 * 30000).on_device(encoder):
            assert encoder.before_layer is not None
            assert torch.equal(encoder.model(ids, mask)[0], expected)


@pytest.mark.parametrize(
    ("weight_budget", "stay"),
    [(None, 10), (1000, 10), (999, 7), (905, 7), (904, 6), (335, 1), (334, 0), (240, 0), (239, -1)],
)
def test_as_many_layers_stay_as_there_is_room_for(weight_budget: int | None, stay: int) -> None:
    """Ten layers of 95 bytes and 50 bytes more; room for two layers is for those that come."""
    assert layers_that_stay(1000, 95, 10, weight_budget) == stay


def test_what_is_told_is_what_a_placement_takes() -> None:
    part = StageMemory(weights=1000, working=200, layer=90, count=10, beside=40)
    assert part.peak(None) == part.peak(1240) == 1240
    assert part.peak(1200) == 1000 - 1 * 90 + 200 and part.peak(part.least) == 1000 - 8 * 90 + 200
    assert part.least == 1000 - 8 * 90 + 200 + 40


# Peaks in GiB of one clip on an H200, weights bf16, VAE float16 (benchmarks/LOG.md).
MEASURED: dict[str, tuple[tuple[int, int, int], int, dict[str, float]]] = {
    "i2v-A14B": ((832, 480, 81), 81, {"text": 10.73, "encoding": 3.32, "sampling": 31.54, "decoding": 4.0}),
    "ti2v-5B": ((1280, 704, 121), 1, {"text": 10.73, "encoding": 2.44, "sampling": 12.42, "decoding": 6.46}),
}


def at_real_size(task: str, vram: float | None = None) -> MemoryBudget:
    """The budget of a released checkpoint, of which only the sizes are there."""
    text = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with init_empty_weights():
        denoiser, vae, encoder = WanModel(**DIT[task]), AutoencoderKLWan(**VAE[task]), UMT5EncoderModel(text)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    experts = ("model",) if task == "ti2v-5B" else ("low_noise_model", "high_noise_model")
    checkpoint = Checkpoint(
        Path("."), {name: headers(denoiser) for name in experts}, headers(vae), headers(encoder), Path(".")
    )
    config = dataclasses.replace(WAN_CONFIGS[task], vae_dtype=torch.float16)
    gpu = torch.device("cuda")
    return MemoryBudget(checkpoint, config, gpu, gpu, None if vram is None else int(vram * GIB))


def clip_of(budget: MemoryBudget, width: int, height: int, frames: int) -> Geometry:
    return Geometry(frames, height, width, budget.config.vae_stride, budget.config.patch_size)


@pytest.mark.parametrize("task", MEASURED)
def test_estimates_are_within_a_tenth_of_what_was_measured(task: str) -> None:
    size, known, measured = MEASURED[task]
    budget = at_real_size(task)
    stages = budget.stages(clip_of(budget, *size), known)
    for name, peak in measured.items():
        assert stages[name].peak(None) / GIB == pytest.approx(peak, rel=0.1), name


@pytest.mark.parametrize(("task", "vram"), [("ti2v-5B", 8), ("ti2v-5B", 12), ("i2v-A14B", 16), ("i2v-A14B", 24)])
def test_small_gpus_have_a_plan_at_full_size(task: str, vram: int) -> None:
    budget = at_real_size(task, vram)
    geometry = clip_of(budget, *MEASURED[task][0])
    budget.check(geometry)
    assert budget.tensors is not None
    peak = max(stage.peak(budget.tensors) for stage in budget.stages(geometry).values())
    assert peak <= budget.tensors < vram * GIB - CONTEXT
    with pytest.raises(UserError, match=r"vram 4: \w+ of \d+ frames of \d+x\d+ needs \d+\.\d GiB; "):
        dataclasses.replace(budget, vram=4 * GIB).check(geometry)


@pytest.mark.parametrize(
    ("offload", "limit", "tokens"),
    [
        (False, 80, 1),
        (False, 78, 2),  # both experts, and what a half of the tokens takes
        (False, 70, None),
        (True, 13, 1),  # layers come one by one
        (True, 12, 2),
        (True, 8, None),
    ],
)
def test_a_clip_whose_tokens_are_shared_fits_smaller_gpus(offload: bool, limit: int, tokens: int | None) -> None:
    budget = at_real_size("i2v-A14B")
    needs = [ClipNeeds(clip_of(budget, *size, 81), offload, {}) for size in ((832, 480), (1280, 720))]
    fitting = [count for count in (1, 2, 4) if budget_with(budget, count).fits(needs, limit * GIB)]
    assert fitting == [count for count in (1, 2, 4) if tokens is not None and count >= tokens]
    assert budget.fits(needs, None) and budget.fits([], 1)
    assert budget.limit is None and dataclasses.replace(budget, vram=2, free=1).limit == 2


# Of a step of four layers on two H200s: by how much the peak of `cfg_size` 2 is above that of `ulysses_size` 2, in GiB.
@pytest.mark.parametrize(
    ("task", "size", "saved"),
    [("i2v-A14B", (832, 480, 81), 1.0), ("i2v-A14B", (1280, 720, 81), 2.9), ("ti2v-5B", (1280, 704, 121), 0.7)],
)
def test_what_two_gpus_save_by_sharing_tokens_is_what_was_measured(
    task: str, size: tuple[int, int, int], saved: float
) -> None:
    budget = at_real_size(task)
    geometry = clip_of(budget, *size)
    alone, shared = (budget_with(budget, count).stages(geometry)["sampling"].working for count in (1, 2))
    assert (alone - shared) / GIB == pytest.approx(saved, rel=0.2)


def budget_with(budget: MemoryBudget, token_ranks: int, ring_ranks: int = 1) -> MemoryBudget:
    return dataclasses.replace(budget, token_ranks=token_ranks, ring_ranks=ring_ranks)


def test_a_ring_holds_keys_and_values_of_all_tokens() -> None:
    budget = at_real_size("i2v-A14B")
    geometry = clip_of(budget, 1280, 720, 81)
    by_heads, ring = (budget_with(budget, 7, size).stages(geometry)["sampling"].working for size in (1, 7))
    tokens, width, bf16 = 75_600, 5120, 2
    assert ring - by_heads == pytest.approx(2 * tokens * width * bf16, rel=1e-6)


def test_a_file_that_lacks_what_the_plan_reads_is_said() -> None:
    budget = at_real_size("ti2v-5B")
    for weights, name in (
        (budget.checkpoint.vae, "decoder.norm_out.gamma"),
        (budget.checkpoint.experts["model"], "patch_embedding.weight"),
    ):
        shapes: Any = weights.shapes
        shape = shapes.pop(name)
        with pytest.raises(UserError, match=f"lacks {name}: download it again"):
            budget.stages(clip_of(budget, 1280, 704, 121))
        shapes[name] = shape


def test_a_budget_is_for_a_gpu() -> None:
    with pytest.raises(UserError, match="vram is for a GPU, and there is none"):
        WanV2V5B(WAN_CONFIGS["ti2v-5B"], GOLDEN / "5b" / "ckpt", vram=12)


def test_auto_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    asked: list[Any] = []
    monkeypatch.setattr("wan.device.hardware.grow_segments", lambda: asked.append("segments"))
    monkeypatch.setattr("wan.device.hardware.free_bytes", lambda device: 11 * GIB)
    monkeypatch.setattr("wan.device.hardware.hold_to", lambda device, limit: asked.append(limit))
    # what CUDA has taken already is not taken off again
    assert gpu_limit("auto", gpu) == 11 * GIB + BARE_CONTEXT
    assert for_tensors(gpu_limit("auto", gpu)) > 0.93 * (11 * GIB - (CONTEXT - BARE_CONTEXT))
    assert gpu_limit(7.5, gpu) == 7.5 * GIB
    assert asked == ["segments"] * 3 + [int(7.5 * GIB - CONTEXT)]


def test_a_limit_is_held_by_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda share, device: shares.append(share))
    for limit in (20 * GIB, 100 * GIB, -GIB):
        hold_to(torch.device("cuda"), limit)
    assert shares == [0.25, 1, 0]


@pytest.mark.parametrize("vram", [8, 12, 16, 24])
def test_slack_is_left_between_what_is_planned_and_what_is_held(vram: int) -> None:
    planned, held = for_tensors(vram * GIB), vram * GIB - CONTEXT
    assert held - planned > 0.4 * GIB
    # 0.62 GiB is what CUDA took where 23.6 GiB of tensors were 24.22 as the driver counts
    assert held + 0.62 * GIB < vram * GIB


@pytest.mark.parametrize(
    ("task", "free", "offload", "limited"),
    [
        ("i2v-A14B", 22, True, True),  # an expert is 26.6 GiB
        ("i2v-A14B", 34, True, True),  # and 31.5 with its activations
        ("i2v-A14B", 40, True, False),
        ("i2v-A14B", 22, False, False),  # asked for: no limit
        ("ti2v-5B", 12, True, True),
        ("ti2v-5B", 22, True, False),
    ],
)
def test_a_clip_that_needs_more_than_is_free_is_made_as_with_vram_auto(
    task: str, free: int, offload: bool, limited: bool
) -> None:
    budget = dataclasses.replace(at_real_size(task), free=free * GIB)
    geometry = clip_of(budget, *MEASURED[task][0])
    used = budget.for_clip(geometry, offload)
    assert used.vram == (free * GIB if limited else None)
    used.check(geometry)
    if limited:
        assert used.tensors is not None and used.gpu_bytes(geometry, True) <= used.tensors
        given = dataclasses.replace(budget, free=None, vram=free * GIB)
        assert used.placements(geometry, True)("sampling") == given.placements(geometry, True)("sampling")
    assert dataclasses.replace(budget, vram=9 * GIB).for_clip(geometry, offload).vram == 9 * GIB


def test_loras_beside_packed_weights_are_in_the_estimate(tmp_path: Path) -> None:
    budget = dataclasses.replace(at_real_size("i2v-A14B"), free=24 * GIB)
    checkpoint, loras = budget.checkpoint, dict.fromkeys(budget.checkpoint.experts, 2 * GIB)
    geometry = clip_of(budget, 832, 480, 81)
    assert budget.for_clip(geometry, True, loras).gpu_bytes(geometry, False) == budget.gpu_bytes(geometry, False)
    packed = {}
    for name, weights in checkpoint.experts.items():
        with (file := tmp_path / f"{name}.gguf").open("wb") as opened:
            opened.truncate(15 * GIB)  # as Q8_0 is
        packed[name] = dataclasses.replace(weights, path=file)
    budget = dataclasses.replace(budget, checkpoint=dataclasses.replace(checkpoint, experts=packed), text_device=None)
    assert budget.for_clip(geometry, True).vram is None
    within = budget.for_clip(geometry, True, loras)  # these are too many for whole experts
    assert within.vram == 24 * GIB and within.tensors is not None
    assert within.gpu_bytes(geometry, True) <= within.tensors
    assert within.gpu_bytes(geometry, False) == budget.gpu_bytes(geometry, False) + 4 * GIB
    for experts, more in ((packed, 4 * GIB), (checkpoint.experts, 0)):
        host = HostBudget(dataclasses.replace(checkpoint, experts=experts), budget.config, 0)
        every = host.need(HostPlan(), budget, geometry, loras) - host.need(HostPlan(), budget, geometry)
        assert every == more  # in host memory too


def test_a_text_encoder_or_vae_that_its_file_packs_is_counted_as_it_is_expanded(tmp_path: Path) -> None:
    budget = at_real_size("i2v-A14B")
    geometry = clip_of(budget, 832, 480, 81)
    packed = {}
    for name, size in (("text_encoder", 7 * GIB), ("vae", GIB // 10)):
        with (file := tmp_path / f"{name}.safetensors").open("wb") as opened:  # as in fp8
            opened.truncate(size)
        packed[name] = dataclasses.replace(getattr(budget.checkpoint, name), path=file)
    other = dataclasses.replace(budget, checkpoint=dataclasses.replace(budget.checkpoint, **packed))
    assert other.stages(geometry) == budget.stages(geometry)
    plan, hosts = HostPlan(), [HostBudget(one.checkpoint, budget.config, 0) for one in (budget, other)]
    assert hosts[0].need(plan, budget, geometry) == hosts[1].need(plan, other, geometry)


def test_a_clip_that_cannot_fit_into_what_is_free_is_refused_with_what_helps() -> None:
    budget = dataclasses.replace(at_real_size("i2v-A14B"), free=7 * GIB)
    with pytest.raises(
        UserError,
        match=r"^sampling of 81 frames of 832x480 needs 7\.\d GiB of GPU memory, 7\.0 are free; give frame_num \d+$",
    ):
        budget.for_clip(geometry := clip_of(budget, 832, 480, 81), True).check(geometry)


@pytest.mark.parametrize(
    ("task", "given", "vram", "advice"),
    [
        ("i2v-A14B", {}, 24, r"give `vram` 21.5"),
        ("i2v-A14B", {"offload": False}, 48, r"give `offload_model` True"),
        ("i2v-A14B", {"offload": False}, 24, r"give `offload_model` True and `vram` 21.5"),
        ("ti2v-5B", {"vae_dtype": torch.float32, "vram": 12 * GIB}, 12, r"give `vae_dtype` float16"),
        ("i2v-A14B", {"vram": 7 * GIB}, 7, r"give `frame_num` (\d+)"),
        ("i2v-A14B", {"vram": 3 * GIB}, 3, r"give a smaller `size`"),
    ],
)
def test_what_is_advised_would_have_worked(task: str, given: dict[str, Any], vram: int, advice: str) -> None:
    budget = at_real_size(task)
    config = dataclasses.replace(budget.config, vae_dtype=given.get("vae_dtype", torch.float16))
    budget = dataclasses.replace(budget, config=config, vram=given.get("vram"))
    geometry = clip_of(budget, *MEASURED[task][0])
    advised = budget.advice(geometry, given.get("offload", True), vram * GIB)
    match = re.fullmatch(advice, advised)
    assert match, advised
    if match.groups():  # by the estimate, that many frames fit and no more
        frames = int(match[1])
        dataclasses.replace(budget, vram=vram * GIB).check(dataclasses.replace(geometry, frames=frames))
        with pytest.raises(UserError):
            dataclasses.replace(budget, vram=vram * GIB).check(dataclasses.replace(geometry, frames=frames + 4))


def test_running_out_of_memory_names_what_would_have_worked(ti2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = ti2v.geometry(64, 64, 5)
    request: Any = SimpleNamespace(geometry=geometry, loras={})

    errors: list[RuntimeError] = []

    def fail(*_: Any) -> None:
        raise errors[-1]

    monkeypatch.setattr(type(ti2v), "_make", fail)
    monkeypatch.setattr(MemoryBudget, "advice", lambda self, of, offload, vram: f"{of.frames} {offload} {vram // GIB}")
    monkeypatch.setattr(ti2v, "budget", dataclasses.replace(ti2v.budget, free=20 * GIB))
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore"),
        RuntimeError("CUDA error: out of memory"),  # a library's, beside the allocator
    ):
        errors.append(error)
        with pytest.raises(UserError, match=r"^out of GPU memory \(CUDA .*out of memory.*\); 5 False 20$"):
            ti2v.run(request, offload=False)
    errors.append(RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        ti2v.run(request)


def vlm(path: Any, vram: int | None = None, url: str | None = None) -> CaptionerOwner:
    gpu = torch.device("cuda")
    return CaptionerOwner(path, url=url, question="?", trust_remote_code=False, main=gpu, vram=vram)


def test_a_vlm_larger_than_the_budget_stays_in_host_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 * GIB)  # a hole, which takes no disk
    monkeypatch.setattr("wan.prompting.open_captioner", lambda *_, **more: more["device"])
    for vram, home in ((None, "cuda"), (6 * GIB, "cuda"), (4 * GIB, "cpu")):
        owner: Any = vlm(tmp_path, vram)
        assert not caplog.text  # and a run with prompts of its own does not ask
        assert owner.captioner.type == owner.device.type == home
    assert "does not fit into `vram` and describes on the CPU" in caplog.text
    assert all(way in caplog.text for way in ("smaller InternVL with `vlm_path`", "`vlm_url`", "`prompt`"))
    assert vlm("a name", 4 * GIB, url="http://localhost:1").device.type == "cuda"
    assert vlm(None, 4 * GIB).device.type == "cuda"


@pytest.mark.parametrize(
    ("listed", "vram", "home"), [(2 * GIB, 5, "cuda"), (2 * GIB, 3, "cpu"), (None, 20, "cuda"), (None, 17, "cpu")]
)
def test_a_vlm_of_the_hub_has_the_size_that_it_has_there(
    listed: int | None, vram: int, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(hub_id: str, local_files_only: bool) -> str:
        raise LocalEntryNotFoundError("not in the cache")

    def model_info(self: Any, hub_id: str, **_: Any) -> Any:
        if listed is None:
            raise OSError("no connection")
        files = {"config.json": 3, "model-1.safetensors": listed // 2, "model-2.safetensors": listed // 2}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files.items()])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    assert vlm("a/vlm", vram * GIB).device.type == home


def test_a_vlm_in_the_hub_s_cache_is_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, local_files_only: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("it is there"))
    assert weight_bytes("a/vlm") == 1000
    assert weight_bytes(tmp_path) == 1000 and weight_bytes(tmp_path / "nowhere") is None


def test_all_models_stay_where_a_budget_holds_them_all() -> None:
    budget = at_real_size("i2v-A14B")
    geometry = clip_of(budget, *MEASURED["i2v-A14B"][0])
    assert budget.gpu_bytes(geometry, True) / GIB == pytest.approx(31.4, abs=0.5)
    assert budget.gpu_bytes(geometry, False) / GIB == pytest.approx(2 * 26.6 + 10.6 + 0.24 + 4.8, abs=1)
    cases = ((None, True, None), (48, True, "some"), (80, False, None), (16, True, "some"))
    for vram, offload, weight_budget in cases:
        limited = dataclasses.replace(budget, vram=None if vram is None else vram * GIB)
        placement = limited.placements(geometry, True)("sampling")
        assert placement.offload is offload and (placement.weight_budget is not None) == (weight_budget is not None)
        assert limited.holds_all(geometry) == (vram == 80)


def test_a_budget_needs_offloading(ti2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ti2v, "budget", dataclasses.replace(ti2v.budget, vram=80 * GIB))
    with pytest.raises(UserError, match="vram needs offload_model True"):
        ti2v.run(SimpleNamespace(geometry=None), offload=False)


def test_models_that_wait_are_in_host_memory() -> None:
    waiting: list[str] = []
    models = Models("x", at_real_size("ti2v-5B").checkpoint, {})
    assert not models.is_loaded("vae") and models.loaded == []
    models.put("vae", SimpleNamespace(to=waiting.append, modules=list))
    models.wait_at_home()
    assert models.is_loaded("vae") and waiting == ["cpu"]
    models.forget("vae")
    assert not models.is_loaded("vae")


@pytest.mark.parametrize(
    ("free", "offload", "fits"), [(120, True, True), (37, True, True), (34, True, False), (60, False, False)]
)
def test_a_clip_fits_beside_a_vlm_with_a_tenth_to_spare(
    free: int, offload: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.device.hardware.free_bytes", lambda device, budget: free * GIB)
    monkeypatch.setattr("wan.device.hardware.drop_cache", lambda device: None)
    budget = at_real_size("i2v-A14B")
    assert budget.fits_now(clip_of(budget, *MEASURED["i2v-A14B"][0]), offload, []) == fits


@pytest.mark.parametrize(("fits", "number", "stays"), [(True, 1, True), (True, 3, False), (False, 1, False)])
def test_a_vlm_stays_on_the_gpu_where_the_clip_fits_beside_it_and_another_follows(
    fits: bool, number: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    continuation = WanV2V5B(WAN_CONFIGS["v2v-5B"], GOLDEN / "5b" / "ckpt")
    continuation.vlm = vlm("a/vlm")
    continuation.vlm.use(Speaking(closed))
    continuation.prompts.owner = continuation.vlm
    monkeypatch.setattr(MemoryBudget, "fits_now", lambda *_: fits)
    clip = Clip(torch.zeros(5, 64, 64, 3), continuation.fps)
    plan = continuation.plan(clip, max_area=4096, frame_num=5, number=number, count=3)
    assert continuation.build_prompt(clip, plan).text == "It moves."
    assert closed == ([] if stays else [True])


class Speaking:
    """A captioner that notes when it is closed."""

    def __init__(self, closed: list[bool]) -> None:
        self.closed = closed

    def describe(self, *_: Any, **__: Any) -> str:
        return "It moves."

    def close(self) -> None:
        self.closed.append(True)


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    from wan import cli

    checkpoint = ["--ckpt_dir", str(GOLDEN / "5b" / "ckpt"), "--prompt", "a cat", "--size", "1280*704"]
    for flags, line in (
        (["--vram", "huge"], "--vram must be auto or a number of GiB from 1 to 4096, for instance 12; 'huge' is not"),
        (["--vram", "0.5"], "must be auto or a number of GiB"),
        (["--vram", "12", "--offload_model", "False"], "--vram needs --offload_model True"),
        (["--vram", "12"], "--vram is for a GPU, and there is none; leave it out"),
    ):
        assert cli.generate_main([*checkpoint, *flags]) == 2
        assert line in capsys.readouterr().err


@pytest.mark.parametrize(("task", "decoding", "forward"), [("i2v-A14B", 275, 1676), ("ti2v-5B", 2011, 516)])
def test_floors_are_the_arithmetic_of_the_released_models(task: str, decoding: float, forward: float) -> None:
    """VAEs: as counted on the official code; denoisers: by hand from their published sizes."""
    budget = at_real_size(task)
    geometry = clip_of(budget, *MEASURED[task][0])
    with init_empty_weights():
        vae, denoiser = AutoencoderKLWan(**VAE[task]).to("meta"), WanModel(**DIT[task])
    latents = torch.empty(1, VAE[task].get("z_dim", 16), *geometry.latent, device="meta")
    assert counted(lambda: chunked.decode(vae, latents, 1)) / 1e12 == pytest.approx(decoding, rel=0.01)
    assert denoiser_flops(denoiser, geometry.tokens, 512) / 1e12 == pytest.approx(forward, rel=0.01)


@pytest.mark.parametrize(("weight_budget", "left"), [(100 << 20, "0.1"), (-5 << 20, "0.0")])
def test_a_model_that_does_not_fit_layer_by_layer_says_what_it_needs(weight_budget: int, left: str) -> None:
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(1 << 14, 1 << 13, bias=False) for _ in range(8))  # of 0.5 GiB each
        model.rest = nn.Linear(1 << 14, 1 << 13, bias=False)
    needed = 0.5 * (1 + layers.SLOTS)
    placement = Placement(torch.device("cpu"), offload=True, weight_budget=weight_budget)
    with pytest.raises(UserError, match=f"needs {needed:.1f} GiB even layer by layer, {left} are left"):
        placement.streams(model)


def test_of_a_feed_forward_layer_its_inner_width_counts() -> None:
    budget = at_real_size("ti2v-5B")
    weights, tokens = budget.checkpoint.experts["model"], 10_000
    width, hidden = 3072, 14336
    working = denoiser_memory(weights, "bfloat16", False, tokens, 512).working
    assert working == pytest.approx(ALWAYS + tokens * (4 * hidden + 7 * width), rel=1e-6)


@pytest.mark.parametrize("task", ["i2v-A14B", "ti2v-5B"])
def test_two_matrices_that_get_loras_take_less_than_two_layers_and_what_is_in_none(task: str) -> None:
    """A number takes up to ten bytes, and twelve where it stays float32: checkpoint's, summed, rounded."""
    for weights in at_real_size(task).checkpoint.experts.values():
        name_of = {key: name for name, key in key_map(weights).items() if len(weights.shapes[key]) == 2}
        sizes = [math.prod(weights.shapes[key]) * (12 if stays_float32(name) else 10) for key, name in name_of.items()]
        assert sum(sorted(sizes)[-2:]) < denoiser_memory(weights, "bfloat16", False, 0, 0).least


def test_slices_count_the_layers_that_are_gathered_and_what_is_no_layer() -> None:
    stage = StageMemory(weights=40 * 7 + 8, working=3, layer=7, count=40)
    assert stage.sliced(1) is stage
    assert stage.sliced(4).peak(None) == 288 // 4 + 5 * 7 + 8 + 3
    few = StageMemory(weights=2 * 7 + 8, working=3, layer=7, count=2)
    assert few.sliced(2).peak(None) == 22 // 2 + 2 * 7 + 8 + 3
