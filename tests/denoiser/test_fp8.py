"""Products and attention in 8 bits: the errors that the format has, and no others."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.golden import DATA, GOLDEN
from wan import WanTI2V, cli
from wan.denoiser import fp8
from wan.denoiser.fp8 import attend_in_fp8, check_precision, multiply, quantize, quantize_model
from wan.denoiser.model import WanModel
from wan.device.streaming import PinnedStage
from wan.errors import UserError
from wan.weights import loading
from wan.weights.quantized import Addition, QuantizedLinear, QuantizedTensor

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def exact_attention(*inputs: Tensor) -> Tensor:
    query, key, value = (part.double().transpose(1, 2) for part in inputs)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def test_rows_keep_their_largest_numbers_and_round_the_others_to_four_bits() -> None:
    x = random(40, 96) * torch.logspace(-3, 3, 40)[:, None]
    rows, scale = quantize(x)
    back = rows.float() * scale
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (40, 1)
    assert torch.allclose(back.abs().amax(1), x.abs().amax(1), rtol=1e-6)
    assert (back - x).abs().max(1).values.le(x.abs().amax(1) / 28).all()  # half a step of the largest binade
    assert quantize(torch.zeros(2, 8))[0].float().eq(0).all()


def test_numbers_that_are_rounded_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(7, 16)
    whole = quantize(x)
    monkeypatch.setattr(fp8, "_PIECE", 3 * 16)  # the last piece is shorter
    rows, scale = quantize(x)
    assert torch.equal(rows.float(), whole[0].float()) and torch.equal(scale, whole[1])


def test_a_product_has_the_error_of_its_roundings() -> None:
    x, weight, bias = random(2, 50, 256), random(64, 256, seed=1), random(64, seed=2)
    product = multiply(x, *quantize(weight), bias)
    assert product.shape == (2, 50, 64)
    assert 1e-2 < relative(product, F.linear(x.double(), weight.double(), bias.double())) < 5e-2
    powers = torch.tensor([448.0, 2.0, -1.0, 0.5]).repeat(1, 8)  # of which none is rounded
    assert torch.equal(multiply(powers, *quantize(powers), torch.zeros(1)), powers @ powers.T)


@pytest.mark.parametrize("common", [0.0, 6.0])
def test_attention_is_5_per_cent_from_exact_whatever_the_keys_have_in_common(common: float) -> None:
    query, key, value = random(3, 1, 500, 2, 64)
    key = key + common * random(1, 1, 2, 64, seed=1)
    assert 1e-2 < relative(attend_in_fp8(query, key, value), exact_attention(query, key, value)) < 7e-2


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the test below runs it")
@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("columns", [64, 128])
def test_the_kernel_is_attention(length: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from wan.denoiser import int8_attention_kernel

    # the interpreter cuts 8-bit floats off where a GPU rounds; in 16 bits only mistakes are left
    monkeypatch.setattr(int8_attention_kernel, "FORMAT", torch.float16)
    query, key, value = random(3, 2, length, 3, 32).bfloat16()
    key = key + 4
    for integers, bar in ((False, 5e-3), (True, 2e-2)):
        tiles = int8_attention_kernel.Tiles(64, columns, by_descriptor=False, integers=integers)
        attended = int8_attention_kernel.attend_in_int8(query, key, value, tiles)
        assert relative(attended, exact_attention(query, key, value)) < bar


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernel_runs_in_triton_s_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "kernel_is"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


@pytest.mark.gpu
def test_a_gpu_rounds_as_a_cpu_does() -> None:
    x, weight, bias = random(2, 48, 256), random(64, 256, seed=1), random(64, seed=2)
    exact = F.linear(x.double(), weight.double(), bias.double())
    rows, scale = quantize(weight)
    product = multiply(x.cuda(), rows.cuda(), scale.cuda(), bias.cuda())
    assert abs(relative(product.cpu(), exact) - relative(multiply(x, rows, scale, bias), exact)) < 4e-3
    inputs = random(3, 2, 700, 3, 128)
    inputs[1] += 4
    exact = exact_attention(*inputs)
    attended = attend_in_fp8(*inputs.cuda().bfloat16()).cpu()
    assert abs(relative(attended, exact) - relative(attend_in_fp8(*inputs), exact)) < 1.5e-2


@pytest.fixture
def lowered_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes the same roundings; users are refused it, since nothing is gained."""
    monkeypatch.setattr("wan.pipeline.check_precision", lambda *_: None)
    monkeypatch.setattr("wan.commands.start.has_gpu_driver", lambda: True)


@pytest.mark.usefixtures("lowered_on_a_cpu")
@pytest.mark.parametrize("precision", fp8.PRECISIONS)
def test_a_denoiser_s_blocks_are_lowered_and_little_else(precision: str, ti2v: Any) -> None:
    model = type(ti2v)(dataclasses.replace(ti2v.config, low_precision=precision), ti2v.checkpoint.folder).model
    packed = {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    blocks = len(model.blocks)
    assert len(packed) == 8 * blocks and all(name.startswith("blocks.") for name in packed)
    assert not any("attn2.to_k" in name or "attn2.to_v" in name for name in packed)
    latents, text, t = random(1, 48, 3, 4, 6), random(1, 512, ti2v.model.config.text_dim), torch.tensor([600.0])
    with torch.no_grad():
        lowered, exact = (one(latents, t, text, return_dict=False)[0] for one in (model, ti2v.model))
    assert 1e-3 < relative(lowered, exact) < 0.15


@pytest.mark.usefixtures("lowered_on_a_cpu")
def test_weights_are_rounded_as_they_are_read(ti2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a model that is rounded afterwards, and none of them is in memory in its own dtype on the way."""
    filled: list[Tensor] = []
    fill = loading._fill

    def noted(value: Tensor, *rest: Any) -> None:
        filled.append(value)
        fill(value, *rest)

    monkeypatch.setattr(loading, "_fill", noted)
    weights = ti2v.checkpoint.experts["model"]
    cpu = torch.device("cpu")
    low = WanModel.from_weights(weights, dtype=torch.bfloat16, device=cpu, low_precision="fp8")
    packed = [name for name, layer in low.named_modules() if isinstance(layer, QuantizedLinear)]
    assert len(filled) == len(weights.shapes) - len(packed)
    after = WanModel.from_weights(weights, dtype=torch.bfloat16, device=cpu)
    quantize_model(after, "fp8", cpu)
    expected = after.state_dict()
    assert expected.keys() == low.state_dict().keys()
    for name, value in low.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_weights_that_pass_through_pinned_memory_are_the_same() -> None:
    cpu = torch.device("cpu")
    plain, staged = fp8.Lowering(torch.bfloat16, cpu, cpu), fp8.Lowering(torch.bfloat16, cpu, cpu)
    staged._way._stages = PinnedStage(), PinnedStage()  # as on a GPU
    made = []
    for size in (24, 48, 16):  # each takes the place of the one before
        layer, numbers = torch.nn.Linear(size, 32), random(32, size, seed=size)
        made.append((plain(layer, numbers), staged(layer, numbers)))
    for one, other in made:
        assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
        assert isinstance(one, QuantizedLinear) and isinstance(other, QuantizedLinear)
        assert one.scale is not None and other.scale is not None and torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("precision", fp8.PRECISIONS)
def test_one_graph_serves_all_lowered_blocks(precision: str) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    model = WanModel(**sizes, freq_dim=64, ffn_dim=96, num_layers=10).eval()  # more than a compiler's limit of graphs
    quantize_model(model, precision, torch.device("cpu"))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile_blocks(backend)
    with torch.no_grad():
        model(random(1, 4, 3, 8, 8), torch.tensor([600.0]), random(1, 512, 32))
    assert len(graphs) == 1 and model.is_compiled


@pytest.mark.usefixtures("lowered_on_a_cpu")
def test_what_a_lora_adds_is_added_beside_the_weight(ti2v: Any) -> None:
    linear = ti2v.model.blocks[0].attn1.to_q
    model = type(ti2v)(dataclasses.replace(ti2v.config, low_precision="fp8"), ti2v.checkpoint.folder).model
    low = model.blocks[0].attn1.to_q
    x = random(1, 10, linear.in_features)
    left, right = random(linear.out_features, 2, seed=1), random(2, linear.in_features, seed=2)
    with torch.no_grad():
        without = low(x)
        low.set_loras([Addition(left, right, 0.5), Addition(left @ right, None, -0.25)])
        assert torch.allclose(low(x) - without, 0.25 * F.linear(x, left @ right), atol=1e-4)
        low.set_loras([])
        assert torch.equal(low(x), without)


@pytest.mark.usefixtures("lowered_on_a_cpu")
def test_the_command_line_says_what_it_computed_in(tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(GOLDEN / "5b" / "ckpt", tmp_path / "ckpt")
    declared = {"sizes": ["96*64"], "frame_num": 5, "sample_steps": 2, "param_dtype": "float32", "t5_dtype": "float32"}
    (tmp_path / "ckpt" / "wan_config.json").write_text(json.dumps(declared))
    flags = ["--ckpt_dir", str(tmp_path / "ckpt"), "--video", str(VIDEO), "--prompt", "A cat", "--base_seed", "1"]
    made = {}
    for precision in ("", "fp8", "fp8_attention"):
        target = tmp_path / f"{precision}.mp4"
        more = ["--precision", precision] if precision else []
        assert cli.generate_main([*flags, "--save_file", str(target), *more]) == 0
        record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        assert record["precision"] == (precision or None)
        made[precision] = target.read_bytes()
    assert len(set(made.values())) == 3


def test_what_cannot_compute_in_8_bits_says_so_before_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    check_precision(None, gpu)
    for precision in fp8.PRECISIONS:
        with pytest.raises(
            UserError, match=f"precision {precision} needs a GPU .* and there is none; give precision bf16"
        ):
            check_precision(precision, torch.device("cpu"))
    with pytest.raises(UserError, match="RTX 3090 has none"):
        check_precision("fp8", gpu)
    for has_8_bits in ((8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=has_8_bits: has)
        check_precision("fp8", gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the triton package"):
        check_precision("fp8_attention", gpu)
    config = dataclasses.replace(cli_config(), low_precision="fp8")
    monkeypatch.setattr("wan.pipeline.check_precision", lambda *_: None)
    with pytest.raises(UserError, match=r"x\.gguf: precision fp8 is for bf16"):
        WanTI2V(config, GOLDEN / "5b" / "ckpt", dit_files={"model": tmp_path / "x.gguf"})


def test_an_amd_gpu_is_asked_instead_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Radeon RX 7900 XTX")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (11, 0))
    # the probe runs where the test does
    monkeypatch.setattr(
        fp8, "_fault", lambda precision, device, probe=fp8._fault: probe(precision, torch.device("cpu"))
    )
    check_precision("fp8", gpu)
    right = fp8.multiply
    for wrong, reason in (
        (lambda x, weight, scale, bias: right(x, weight, 2 * scale, bias), "is off by"),
        (lambda *_: (_ for _ in ()).throw(RuntimeError("e4m3 is not for gfx1100\nat")), r"e4m3 is not for gfx1100\)"),
    ):
        results = iter([right, wrong])

        def multiply(*given: Any, results: Any = results) -> Any:
            return next(results)(*given)

        monkeypatch.setattr(fp8, "multiply", multiply)
        with pytest.raises(UserError, match=f"precision fp8 does not work on AMD Radeon RX 7900 XTX .*{reason}"):
            check_precision("fp8", gpu)


@pytest.mark.parametrize(
    ("factor", "reason"), [(1.0, ""), (1.09, ""), (1.11, "attend is off by 1.1e-01"), (0.0, "1.0e")]
)
def test_attention_is_probed_where_it_is_to_be_in_8_bits(
    factor: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def attend(*heads: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return attend_in_fp8(*heads).float() * (factor if len(calls) == 2 else 1)  # the second is the device's

    monkeypatch.setattr(fp8, "attend_in_fp8", attend)
    assert fp8._fault("fp8", torch.device("cpu")) == "" and not calls
    assert reason in fp8._fault("fp8_attention", torch.device("cpu")) and len(calls) == 2
    assert (fp8._fault("fp8_attention", torch.device("cpu")) == "") and len(calls) == 4


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("blocks.0.attn1.to_q", True),
        ("blocks.1.attn2.to_q", True),
        ("blocks.0.ffn.net.0.proj", True),
        ("blocks.0.attn2.to_k", False),  # computed once a clip
        ("blocks.0.attn2.to_v", False),
        ("proj_out", False),
        ("condition_embedder.text_embedder.linear_1", False),
    ],
)
def test_layers_of_blocks_are_rounded_but_for_what_is_computed_once(name: str, taken: bool) -> None:
    cpu = torch.device("cpu")
    assert fp8.Lowering(torch.bfloat16, cpu, cpu).takes(name) == taken


def test_rows_are_rounded_to_their_own_largest_number() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [448.0, 1.0, -448.0]])
    rows, scale = quantize(x)
    # e4m3's largest number is 448
    assert rows.dtype == torch.float8_e4m3fn and scale[0, 0] == pytest.approx(2 / 448) and scale[2, 0] == 1
    assert rows.float()[0].tolist() == [224, -448, 112] and rows.float()[1].tolist() == [0, 0, 0] and scale[1, 0] > 0
    torch.testing.assert_close(rows.float() * scale, x)


def test_a_large_matrix_is_rounded_in_pieces_as_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 16, generator=torch.Generator().manual_seed(1))
    whole = quantize(x)
    for piece in (16 * 37 - 1, 16 * 10, 16):
        monkeypatch.setattr(fp8, "_PIECE", piece)
        pieces = quantize(x)
        assert all(torch.equal(one.float(), other.float()) for one, other in zip(whole, pieces, strict=True))


def test_fp8_on_a_cpu_is_refused_before_anything_loads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # wherever this runs
    flags = ["--ckpt_dir", str(GOLDEN / "5b" / "ckpt"), "--prompt", "a cat", "--precision", "fp8_attention"]
    assert cli.generate_main(flags) == 2
    assert "--precision fp8_attention needs a GPU with 8-bit floats" in capsys.readouterr().err


def cli_config() -> Any:
    from wan import WAN_CONFIGS

    return WAN_CONFIGS["ti2v-5B"]


def test_weights_that_are_fp8_without_scales_are_multiplied_as_they_are(ti2v: Any) -> None:
    model = type(ti2v)(ti2v.config, ti2v.checkpoint.folder).model
    linear = model.blocks[0].attn1.to_q
    whole = linear.weight.detach().to(torch.float8_e4m3fn)
    model.blocks[0].set_submodule(
        "attn1.to_q", QuantizedLinear(linear, QuantizedTensor(whole), torch.float32, torch.device("cpu"))
    )
    quantize_model(model, "fp8", torch.device("cpu"))
    rows = random(3, linear.in_features)
    assert relative(model.blocks[0].attn1.to_q(rows), F.linear(rows, whole.float(), linear.bias)) < 0.05


def test_weights_of_another_quantisation_are_refused(ti2v: Any) -> None:
    model = type(ti2v)(ti2v.config, ti2v.checkpoint.folder).model
    quantize_model(model, "fp8", torch.device("cpu"))
    model.blocks[0].attn1.to_q.weight.data = model.blocks[0].attn1.to_q.weight.data.to(torch.float8_e5m2)
    with pytest.raises(UserError, match="bf16 and fp8"):
        quantize_model(model, "fp8", torch.device("cpu"))
