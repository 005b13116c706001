"""A budget of host memory: what is told, which plan keeps to it, and models read again without another result."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.device.test_memory import MEASURED, at_real_size, clip_of, room_for
from tests.support.golden import GOLDEN, float32
from wan import UserError, WanI2V, cli
from wan.device.budget import GIB
from wan.device.host_budget import PLANS, HostBudget, HostPlan, host_limit
from wan.device.placement import Placement
from wan.device.streaming import MappedTensors, PinnedBuffer
from wan.settings import LoraFile
from wan.weights.tensors import Weights

pytestmark = pytest.mark.slow

ALL, IN_TURN, MAPPED = PLANS


def host_of(
    task: str, limit: float, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[HostBudget, Any, Any]:
    """The host budget of a released checkpoint with experts stored in a dtype, its GPU's, and a clip."""
    budget = at_real_size(task)
    budget = dataclasses.replace(budget, config=dataclasses.replace(budget.config, vae_dtype=torch.float32))

    def stored_dtypes(weights: Weights) -> dict[str, str]:
        text = weights is budget.checkpoint.text_encoder
        return dict.fromkeys(weights.shapes, str(torch.bfloat16 if text else stored).removeprefix("torch."))

    monkeypatch.setattr(Weights, "stored_dtypes", stored_dtypes)
    geometry = clip_of(budget, *MEASURED[task][0])
    return HostBudget(budget.checkpoint, budget.config, int(limit * GIB)), budget, geometry


def test_what_is_told_is_what_was_seen_at_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    host, budget, geometry = host_of("i2v-A14B", 100, torch.float32, monkeypatch)
    # seen: 67.8 GiB that cannot be reclaimed
    assert host.need(ALL, budget, geometry) / GIB == pytest.approx(67.8, rel=0.02)


@pytest.mark.parametrize(
    ("task", "limit", "stored", "plan"),
    [
        ("i2v-A14B", 80, torch.float32, ALL),
        ("i2v-A14B", 64, torch.float32, IN_TURN),  # where 0.1.0 was killed
        ("i2v-A14B", 32, torch.float32, IN_TURN),
        ("i2v-A14B", 24, torch.bfloat16, MAPPED),
        ("ti2v-5B", 32, torch.float32, ALL),
        ("ti2v-5B", 16, torch.float32, IN_TURN),
        ("ti2v-5B", 15, torch.float32, MAPPED),  # of which the text encoder alone stays in its file
    ],
)
def test_the_quickest_plan_that_fits_is_taken(
    task: str, limit: float, stored: torch.dtype, plan: HostPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, budget, geometry = host_of(task, limit, stored, monkeypatch)
    assert host.plan(budget, geometry) == plan
    assert host.need(plan, budget, geometry) <= limit * GIB


def test_what_cannot_fit_is_refused_with_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    host, budget, geometry = host_of("i2v-A14B", 24, torch.float32, monkeypatch)
    with pytest.raises(
        UserError, match=r"i2v-A14B needs 29\.\d GiB of host memory for 81 frames of 832x480.* 24\.0 are free"
    ):
        host.plan(budget, geometry)
    with pytest.raises(UserError, match="and host_memory is 24:"):
        dataclasses.replace(host, given=True).plan(budget, geometry)


def test_what_loras_and_8_bits_change_is_not_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    host, budget, geometry = host_of("i2v-A14B", 24, torch.bfloat16, monkeypatch)
    low = dataclasses.replace(host, config=dataclasses.replace(host.config, low_precision="fp8"))
    least = host.need(MAPPED, budget, geometry)
    assert least < 5 * GIB
    assert host.need(MAPPED, budget, geometry, {"low_noise_model": 0}) > 28 * GIB
    # weights that are rounded as they are read never lie there in bf16
    assert 15 * GIB < low.need(MAPPED, budget, geometry) < 20 * GIB
    assert host.need(ALL, budget, geometry) - low.need(ALL, budget, geometry) > 22 * GIB
    assert host.need(IN_TURN, budget, geometry, captioner=40 * GIB) > 40 * GIB


def test_layers_that_eight_have_in_common_are_counted_once_by_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    host, budget, geometry = host_of("i2v-A14B", 100, torch.float32, monkeypatch)
    experts = {name: dataclasses.replace(one, path=Path(name)) for name, one in host.checkpoint.experts.items()}
    host = dataclasses.replace(host, checkpoint=dataclasses.replace(host.checkpoint, experts=experts))
    alone = host.need(ALL, budget, geometry)
    eighth = dataclasses.replace(host, sharers=8)
    together = 8 * eighth.need(ALL, budget, geometry)
    assert 115 * GIB < together < 125 * GIB and 8 * alone > 540 * GIB  # one copy, and what each has beside it
    assert eighth.need(IN_TURN, budget, geometry) == host.need(IN_TURN, budget, geometry)
    assert eighth.plan(budget, geometry) == ALL
    low = dataclasses.replace(eighth, config=dataclasses.replace(host.config, low_precision="fp8"))
    low_alone = dataclasses.replace(low, sharers=1)  # what is rounded is each one's own, and the text encoder beside it
    assert low.need(ALL, budget, geometry) == low_alone.need(ALL, budget, geometry)
    # so are weights that stay as a file holds them packed: those of layers, but not what is expanded
    monkeypatch.setattr(Weights, "stored_dtypes", lambda weights: {})
    packed = eighth.need(ALL, budget, geometry)
    assert 0 < alone - packed < 12 * GIB  # 7/8 of the text encoder


def test_auto_is_what_is_free_and_what_this_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.device.host_budget.host_free_bytes", lambda: 20 * GIB)
    assert 20 * GIB < host_limit("auto") < 60 * GIB
    assert host_limit(12.5) == 12.5 * GIB


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The A14B golden checkpoint, its experts stored as they are used."""
    import shutil

    shutil.copytree(GOLDEN / "14b" / "ckpt", tmp_path / "ckpt")
    return tmp_path / "ckpt"


def made(pipeline: Any, plan: HostPlan, monkeypatch: pytest.MonkeyPatch, loras: Any = None) -> Any:
    """A small clip with a plan of host memory, and which models were there at each step."""
    from PIL import Image

    loaded: list[list[str]] = []
    monkeypatch.setattr(HostBudget, "plan", lambda *_: plan)
    image = Image.open(GOLDEN / "14b" / "image.png").convert("RGB")

    def on_step(step: Any) -> None:
        if step.latents is not None:
            loaded.append(sorted(pipeline.models._loaded))

    if loras is not None:
        run = pipeline.run
        monkeypatch.setattr(
            pipeline, "run", lambda request, **more: run(dataclasses.replace(request, loras=loras), **more)
        )
    video = pipeline.generate("a boat", image, max_area=64 * 96, frame_num=9, sampling_steps=4, seed=3, on_step=on_step)
    return video, loaded


@pytest.mark.parametrize("plan", [IN_TURN, MAPPED])
def test_models_that_take_turns_give_the_same_clip(
    plan: HostPlan, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = float32("i2v-A14B")
    expected, together = made(WanI2V(config, checkpoint), ALL, monkeypatch)
    pipeline = WanI2V(config, checkpoint)
    video, loaded = made(pipeline, plan, monkeypatch)
    assert torch.equal(video, expected)
    counts = [len(names) for names in together]  # the low-noise expert comes when it is needed, and all stay
    assert counts == sorted(counts) and set(counts) == {3, 4}
    assert [names for n, names in enumerate(loaded) if names not in loaded[:n]] == [
        ["high_noise_model"],
        ["low_noise_model"],
    ]
    assert torch.equal(made(pipeline, plan, monkeypatch)[0], expected)  # and again


def test_loras_are_merged_into_an_expert_that_is_read_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = float32("i2v-A14B")
    probe = WanI2V(config, checkpoint)
    shapes = probe.checkpoint.experts["high_noise_model"].shapes
    tensors: dict[str, torch.Tensor] = {}
    for name in [name for name in shapes if name.endswith("attn.q.weight")]:
        out, inner = shapes[name]
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        tensors |= {
            f"{key}.lora_A.weight": torch.full((2, inner), 0.1),
            f"{key}.lora_B.weight": torch.full((out, 2), 0.1),
        }
    save_file(tensors, tmp_path / "boat.safetensors")
    loras = {expert: (LoraFile(tmp_path / "boat.safetensors", 1.0),) for expert in probe.checkpoint.experts}
    expected, _ = made(probe, ALL, monkeypatch, loras)
    plain, _ = made(WanI2V(config, checkpoint), ALL, monkeypatch)
    pipeline = WanI2V(config, checkpoint)
    video, _ = made(pipeline, IN_TURN, monkeypatch, loras)
    assert torch.equal(video, expected) and not torch.equal(video, plain)
    assert set(pipeline.models.matches) == {"high_noise_model", "low_noise_model"}


def test_a_mapped_model_is_in_its_file_and_streams_from_there(ti2v: Any) -> None:
    """Weights are equal, take no memory of their own, and pass through the slots with the same result."""
    from wan.denoiser.model import WanModel

    weights = ti2v.checkpoint.experts["model"]
    options: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    mapped, whole = WanModel.from_weights(weights, mapped=True, **options), WanModel.from_weights(weights, **options)
    files: dict[str, torch.Tensor] = {}
    for file in weights.files:
        files |= load_file(file)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in mapped.state_dict().items())
    regions = (
        [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
        if Path("/proc/self/maps").exists()
        else []
    )
    spans = [[int(side, 16) for side in words[0].split("-")] for words in regions if words[-1].endswith(".safetensors")]
    if regions:
        inside = [any(low <= value.data_ptr() < high for low, high in spans) for value in mapped.parameters()]
        assert all(inside), "every parameter lies in the file"
        assert not any(low <= value.data_ptr() < high for low, high in spans for value in whole.parameters())
    before = [value.data_ptr() for value in mapped.parameters()]
    for staying in (0, 1):
        placement = Placement(torch.device("cpu"), True, room_for(mapped, staying), mapped=True)
        with placement.on_device(mapped):
            for number, layer in enumerate(mapped.layers):
                assert mapped.before_layer is not None
                mapped.before_layer(number)
                assert all(
                    torch.equal(value, whole.state_dict()[f"blocks.{number}.{name}"])
                    for name, value in layer.state_dict().items()
                )
        assert [value.data_ptr() for value in mapped.parameters()] == before
        assert mapped not in PinnedBuffer.known and not any(layer in PinnedBuffer.known for layer in mapped.layers)


def test_mapped_tensors_keep_their_layouts() -> None:
    convolution = torch.nn.Conv2d(3, 5, 3)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    tensors = list(convolution.parameters())
    held = MappedTensors(convolution, tensors)
    expected = [value.clone() for value in tensors]
    held.use(held.on(torch.device("cpu")))
    assert all(torch.equal(value, wanted) for value, wanted in zip(tensors, expected, strict=True))
    assert convolution.weight.stride() == expected[0].stride()
    held.go_home()
    assert [value.data_ptr() for value in tensors] == [value.data_ptr() for value in held.home]
    gc.collect()


def test_the_flag_refuses_before_loading(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.models.Models.__getitem__", lambda *_: pytest.fail("nothing may load"))
    monkeypatch.setattr("wan.device.host_budget.LIBRARIES", 3 * GIB)
    checkpoint = ["--ckpt_dir", str(GOLDEN / "5b" / "ckpt"), "--prompt", "a cat", "--size", "1280*704"]
    assert cli.generate_main([*checkpoint, "--host_memory", "2"]) == 2
    assert "GiB of host memory" in (stderr := capsys.readouterr().err) and "--host_memory is 2" in stderr
    assert cli.generate_main([*checkpoint, "--host_memory", "much"]) == 2
    assert "--host_memory must be auto or a number of GiB" in capsys.readouterr().err


def test_what_goes_to_gpus_in_slices_is_not_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    host, budget, geometry = host_of("i2v-A14B", 24, torch.bfloat16, monkeypatch)
    experts = frozenset(host.checkpoint.experts)
    sliced = dataclasses.replace(host, elsewhere=experts)
    none = dataclasses.replace(host, elsewhere=experts | {"text_encoder"})
    all_of, without, nothing = (one.need(ALL, budget, geometry) for one in (host, sliced, none))
    assert all_of - without > 50 * GIB and without - nothing > 10 * GIB
