"""Quantised denoisers from files of their own: held as they are, with the numbers of weights expanded beforehand."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.commands import without_start
from tests.support.golden import DATA, GOLDEN
from tests.support.quantized_files import (
    State,
    comfyui,
    comfyui_mixed,
    everything_fp8,
    gguf_file,
    is_linear,
    lightx2v,
    official,
    plain_fp8,
)
from wan.cli import continuous_main, generate_main
from wan.denoiser.lora import merge_loras
from wan.denoiser.lora_file import open_loras
from wan.denoiser.model import WanModel
from wan.device.placement import Placement
from wan.errors import UserError
from wan.settings import LoraFile
from wan.weights.checkpoint import resolve_folder
from wan.weights.gguf_files import GGUF_TYPES
from wan.weights.quantized import Addition, QuantizedLinear, QuantizedTensor, _expand
from wan.weights.single_file import open_denoiser
from wan.weights.tensors import Weights, open_safetensors

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf")  # the dev extra has it

CPU = torch.device("cpu")
HIGH = GOLDEN / "14b" / "ckpt" / "high_noise_model"
VIDEO = DATA / "corpus" / "h264_faststart.mp4"


def wide() -> State:
    """Random weights under the official names of the golden checkpoint, 256 wide: K-quants need rows of 256."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, value in official(HIGH).items():
        shape = [{48: 256, 96: 512, 288: 1536, 40: 64}.get(side, side) for side in value.shape]
        state[key] = torch.randn(shape, generator=generator) / 16 + ("norm" in key and key.endswith("weight"))
    return state


def open_state(state: Mapping[str, Tensor], folder: Path, heads: int = 2) -> Weights:
    """An ordinary expert's folder with these tensors."""
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "m.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": heads}))
    return open_safetensors(folder, "m")


FILES: dict[str, tuple[Callable[[State, Path], State], str]] = {
    "ComfyUI": (comfyui, "x.safetensors"),
    "ComfyUI mixed": (comfyui_mixed, "x.safetensors"),
    "lightx2v": (lightx2v, "x.safetensors"),
    "plain fp8": (plain_fp8, "x.safetensors"),
    "all in fp8": (everything_fp8, "x.safetensors"),
    "Q8_0": (gguf_file("Q8_0"), "x.gguf"),
    "Q4_0, prefix": (gguf_file("Q4_0", "pig", "model.diffusion_model."), "x.gguf"),
    "Q5_1, flat": (gguf_file("Q5_1", flat=True), "x.gguf"),
    "F16": (gguf_file("F16"), "x.GGUF"),
    "BF16": (gguf_file("BF16"), "x.gguf"),
}


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(model: WanModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text = torch.zeros(1, 512, model.config.text_dim)
    text[:, :20] = torch.randn(1, 20, model.config.text_dim, generator=generator)
    latents = torch.randn(1, model.config.in_channels, 2, 4, 6, generator=generator)
    output: Tensor = model(latents, torch.tensor([613]), text, return_dict=False)[0]
    return output


def load(weights: Weights, dtype: torch.dtype, convert: bool = False) -> WanModel:
    return WanModel.from_weights(weights, dtype=dtype, device=CPU, convert_model_dtype=convert)


def packed(model: WanModel) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return {"golden": official(HIGH), "wide": wide()}


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder with a config.json of two heads."""
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    return tmp_path


@pytest.mark.parametrize("size", ["golden", "wide"])
@pytest.mark.parametrize("name", FILES)
def test_a_packed_model_is_the_model_of_the_numbers_it_stands_for(
    name: str, size: str, states: dict[str, State], beside: Path
) -> None:
    write, file = FILES[name]
    meant = write(states[size], beside / file)
    weights, reference = open_denoiser(beside / file, beside), open_state(meant, beside / "reference")
    for dtype, convert in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = load(weights, dtype, convert)
        assert torch.equal(forward(model), forward(load(reference, dtype, convert)))
        held = packed(model)
        if name in ("F16", "BF16"):
            assert not held
            continue
        assert all(layer.weight.dtype.itemsize == 1 and layer.dtype == dtype for layer in held.values())
        assert not any(layer.startswith(("condition_embedder.time", "proj_out")) for layer in held)
        if size == "wide" or file.endswith("safetensors"):
            assert len(held) == 2 * 10 + 2  # every linear layer of the blocks and of the text path
        others = (value for key, value in model.named_parameters() if key.removesuffix(".weight") not in held)
        assert all(value.dtype.itemsize > 1 for value in others)


def test_memory_is_that_of_the_file(states: dict[str, State], beside: Path) -> None:
    def size(file: Path) -> int:
        model = load(open_denoiser(file, beside), torch.bfloat16)
        return sum(layer.weight.nbytes for layer in packed(model).values())

    linear = sum(layer.weight.numel() for layer in _packed_of(states["wide"], beside).values())
    gguf_file("Q8_0")(states["wide"], beside / "x.gguf")
    gguf_file("Q4_0")(states["wide"], beside / "y.gguf")
    assert size(beside / "x.safetensors") == linear
    assert size(beside / "x.gguf") == linear * 34 // 32  # 32 numbers in 34 bytes
    assert size(beside / "y.gguf") == linear * 18 // 32


def _packed_of(state: State, folder: Path) -> dict[str, QuantizedLinear]:
    comfyui(state, folder / "x.safetensors")
    return packed(load(open_denoiser(folder / "x.safetensors", folder), torch.bfloat16))


def test_every_type_expands_to_the_numbers_of_the_format() -> None:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    assert {kind.name for kind in dequantize_functions} == {*GGUF_TYPES, "BF16"}
    generator = torch.Generator().manual_seed(0)
    for name in GGUF_TYPES:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = torch.randint(0, 256, (6, 3 * size), generator=generator, dtype=torch.uint8)
        # whatever the bytes are, they are numbers, but for the halfs among them: these are made finite
        halfs = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
        halfs |= {"Q4_K": (0, 2), "Q5_K": (0, 2)}
        for block in range(3):
            for start in halfs.get(name, (0,)):
                blocks[:, block * size + start + 1] &= 0x3B
        expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind).copy())
        torch.testing.assert_close(_expand(blocks, name), expected, rtol=1e-6, atol=0, msg=name)


def error(weights: Weights, reference: Tensor) -> float:
    output = forward(load(weights, torch.bfloat16))
    return float((output - reference).norm() / reference.norm())


def test_how_far_quantised_weights_are_from_float32(
    states: dict[str, State], beside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative L2 of one forward in bf16: what rounding the weights to bf16 does, and fp8 and Q8_0 beside it."""
    errors_by_size: dict[str, dict[str, float]] = {}
    for size, state in states.items():
        whole = open_state(state, beside / size)
        reference = forward(load(whole, torch.float32))
        comfyui(state, beside / "x.safetensors")
        gguf_file("Q8_0")(state, beside / "x.gguf")
        files = {
            "fp8": open_denoiser(beside / "x.safetensors", beside),
            "Q8_0": open_denoiser(beside / "x.gguf", beside),
        }
        errors_by_size[size] = {name: error(weights, reference) for name, weights in {"bf16": whole, **files}.items()}
    with capsys.disabled():
        print(
            "\nrelative error of one forward:",
            json.dumps({key: _short(value) for key, value in errors_by_size.items()}),
        )
    for errors in errors_by_size.values():
        assert errors["bf16"] < errors["Q8_0"] < 4 * errors["bf16"]
        assert errors["Q8_0"] < errors["fp8"] < 16 * errors["bf16"]  # e4m3 has four bits less of mantissa than bf16


def _short(errors: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in errors.items()}


@pytest.mark.parametrize("name", ["ComfyUI", "Q8_0"])
def test_offloading_takes_all_of_a_packed_model_along(name: str, states: dict[str, State], beside: Path) -> None:
    write, file = FILES[name]
    write(states["wide"], beside / file)
    weights = open_denoiser(beside / file, beside)
    model = load(weights, torch.bfloat16)
    merge_loras(model, weights, open_loras([lora(states["wide"], beside)], weights))
    before = forward(model)
    placement = Placement(torch.device("cpu"), weight_budget=2**40)  # the GPU is played by other pieces of host memory
    with placement.on_device(model):
        assert torch.equal(forward(model), before)
    before_places = places(model)
    with pytest.raises(KeyError), placement.on_device(model):
        assert torch.equal(forward(model), before)
        assert not places(model) & before_places
        raise KeyError
    assert places(model) == before_places and torch.equal(forward(model), before)
    held = sum(layer.weight.nbytes for layer in packed(model).values())
    assert held < 1.1 * sum(layer.weight.numel() for layer in packed(model).values())


@pytest.mark.parametrize("name", ["ComfyUI", "Q8_0"])
def test_packed_blocks_compile_as_they_are(name: str, states: dict[str, State], beside: Path) -> None:
    write, file = FILES[name]
    write(states["wide"], beside / file)
    weights = open_denoiser(beside / file, beside)
    model, graphs = load(weights, torch.float32), []
    merge_loras(model, weights, open_loras([lora(states["wide"], beside)], weights))
    before = forward(model)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile_blocks(backend)
    torch.testing.assert_close(forward(model), before, atol=1e-5, rtol=1e-4)
    stronger = open_loras([lora(states["wide"], beside, -0.2)], weights)  # a clip with another strength
    merge_loras(model, weights, stronger)
    assert (forward(model) - before).abs().max() > 0.01
    assert len(graphs) == 2 and model.is_compiled  # the LoRA leaves one layer of one block as it is


def places(model: WanModel) -> set[int]:
    return {value.data_ptr() for value in (*model.parameters(), *model.buffers())}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ComfyUI", "lightx2v", "Q8_0", "Q4_0, prefix"])
def test_a_gpu_expands_to_the_same_numbers(name: str, states: dict[str, State], beside: Path) -> None:
    write, file = FILES[name]
    write(states["wide"], beside / file)
    weights = open_denoiser(beside / file, beside)
    model = load(weights, torch.bfloat16)
    wanted = {key: layer.dense() for key, layer in packed(model).items()}
    with Placement(torch.device("cuda")).on_device(model):
        assert model.before_layer is not None
        for number in range(len(model.layers)):
            model.before_layer(number)
        torch.cuda.synchronize()
        for key, layer in packed(model).items():
            assert layer.weight.is_cuda and torch.equal(layer.dense().cpu(), wanted[key])


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def lora(state: State, folder: Path, strength: float = 0.7) -> LoraFile:
    """A LoRA of every linear layer, with differences of biases, a norm and one whole weight."""
    generator = torch.Generator().manual_seed(5)
    tensors: State = {}
    for key, value in state.items():
        stem = f"diffusion_model.{key.removesuffix('.weight')}"
        if is_linear(key, value):
            down = torch.randn(4, value.shape[1], generator=generator) / 16
            up = torch.randn(value.shape[0], 4, generator=generator) / 16
            tensors |= {f"{stem}.lora_down.weight": down.bfloat16(), f"{stem}.lora_up.weight": up.bfloat16()}
            tensors[f"{stem}.diff_b"] = torch.randn(len(value), generator=generator) / 16
    for layer in ("blocks.0.norm3", "blocks.1.ffn.0"):
        shape = state[f"{layer}.weight"].shape
        tensors[f"diffusion_model.{layer}.diff"] = torch.randn(shape, generator=generator) / 16
    save_file(tensors, folder / "lora.safetensors")
    return LoraFile(folder / "lora.safetensors", strength)


@pytest.mark.parametrize("size", ["golden", "wide"])
@pytest.mark.parametrize("name", ["ComfyUI", "lightx2v", "all in fp8", "Q8_0", "Q4_0, prefix"])
def test_a_lora_does_what_it_does_to_weights_that_were_expanded_beforehand(
    name: str, size: str, states: dict[str, State], beside: Path
) -> None:
    write, file = FILES[name]
    meant = write(states[size], beside / file)
    weights, reference = open_denoiser(beside / file, beside), open_state(meant, beside / "reference")
    model, other = load(weights, torch.bfloat16), load(reference, torch.bfloat16)
    before, files = forward(model), [lora(states[size], beside)]
    for strengths in ([0.7], [0.7, -1.5]):
        files = [LoraFile(beside / "lora.safetensors", strength) for strength in strengths]
        merge_loras(model, weights, open_loras(files, weights))
        merge_loras(other, reference, open_loras(files, reference))
        assert not torch.equal(forward(model), before)
        assert torch.equal(forward(model), forward(other))
    merge_loras(model, weights, open_loras((), weights))
    assert torch.equal(forward(model), before)
    assert all(layer.held == () and len(list(layer.buffers())) <= 1 for layer in packed(model).values())


def test_what_loras_add_is_no_weight_of_the_model() -> None:
    packed = QuantizedTensor(torch.ones(4, 3), torch.tensor(0.5))
    layer = QuantizedLinear(torch.nn.Linear(3, 4), packed, torch.float32, torch.device("cpu"))
    names = list(layer.state_dict())
    layer.set_loras([Addition(torch.ones(4, 2), torch.ones(2, 3), 0.5)])
    assert list(layer.state_dict()) == names and len(layer.additions) == 1


def test_a_weight_of_many_pieces_is_the_weight_of_one(
    states: dict[str, State], beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lightx2v", "ComfyUI", "Q8_0"):
        write, file = FILES[name]
        write(states["wide"], beside / file)
        weights = open_denoiser(beside / file, beside)
        model = load(weights, torch.float32)
        merge_loras(model, weights, open_loras([lora(states["wide"], beside)], weights))
        whole = {key: layer.dense() for key, layer in packed(model).items()}
        monkeypatch.setattr("wan.weights.quantized.PIECE", 1000)
        for key, layer in packed(model).items():
            torch.testing.assert_close(layer.dense(), whole[key], rtol=1e-6, atol=1e-6)
        monkeypatch.undo()


def test_a_lora_that_is_not_finite_is_refused(states: dict[str, State], beside: Path) -> None:
    comfyui(states["golden"], beside / "x.safetensors")
    weights = open_denoiser(beside / "x.safetensors", beside)
    model = load(weights, torch.bfloat16)
    asked = lora(states["golden"], beside)
    tensors = load_file(asked.path)
    tensors["diffusion_model.blocks.1.self_attn.q.lora_up.weight"][0, 0] = torch.nan
    save_file(tensors, asked.path)
    with pytest.raises(UserError, match=r"lora.safetensors makes blocks.1.attn1.to_q.weight infinite or NaN"):
        merge_loras(model, weights, open_loras([asked], weights))


# --- from the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official folders without their denoisers, files to use with them, and files that are wrong."""
    folder = tmp_path_factory.mktemp("world")
    declared = {"sizes": ["96*64"], "frame_num": 5, "sample_steps": 2, "param_dtype": "float32"}
    for name, source in (("i2v", "14b"), ("ti2v", "5b")):
        shutil.copytree(GOLDEN / source / "ckpt", folder / name, ignore=shutil.ignore_patterns("diffusion_*"))
        (folder / name / "wan_config.json").write_text(json.dumps(declared))
        shutil.copy(GOLDEN / source / "image.png", folder / f"{name}.png")
    high, low = official(HIGH), official(HIGH.with_name("low_noise_model"))
    five_b = official(GOLDEN / "5b" / "ckpt")
    gguf_file("Q8_0")(high, folder / "Wan2.2-I2V-A14B-HighNoise-Q8_0.gguf")
    comfyui(low, folder / "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors")
    gguf_file("Q8_0")(five_b, folder / "5b.gguf")
    comfyui(five_b, folder / "5b.safetensors")
    gguf_file("F32", "flux")({"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)}, folder / "flux.gguf")
    gguf_file("Q8_0")(wide(), folder / "wide.gguf")
    gguf_file("TQ1_0")(wide(), folder / "tq.gguf")
    gguf_file("Q8_0")(high | {"img_emb.proj.0.weight": torch.ones(3)}, folder / "wan21.gguf")
    whole = (folder / "Wan2.2-I2V-A14B-HighNoise-Q8_0.gguf").read_bytes()
    for name, share in (("head", 0.01), ("half", 0.5), ("none", 0.0)):
        (folder / f"cut_{name}.gguf").write_bytes(whole[: int(len(whole) * share)])
    whole = (folder / "5b.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.gguf").write_text("<html>not found</html>")
    (folder / "x.bin").write_text("")
    save_file(high | {"blocks.0.ffn.0.weight": torch.ones(96, 48, dtype=torch.int8)}, folder / "int8.safetensors")
    blocked = {"blocks.0.ffn.0.weight_scale": torch.ones(96, 2)}
    save_file(high | blocked, folder / "blocks.safetensors")
    save_file(
        {key: value for key, value in five_b.items() if key != "blocks.0.ffn.0.bias"}, folder / "less.safetensors"
    )
    return folder


def run(
    world: Path, text: str, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int] = generate_main
) -> tuple[int, str]:
    """The exit code and the standard error of a command; {name} is that file of the folder, {clip} a video."""
    paths = {"clip": str(VIDEO)}
    words = re.sub(r"\{(.+?)\}", lambda match: paths.get(match[1], str(world / match[1])), text).split()
    if main is generate_main:
        words += ["--save_file", str(world / "out.mp4")]
    return main(words), capsys.readouterr().err


HIGH_FILE, LOW_FILE = "{Wan2.2-I2V-A14B-HighNoise-Q8_0.gguf}", "{wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors}"


@pytest.mark.parametrize(
    ("flags", "task"),
    [
        (f"--ckpt_dir {{i2v}} --dit_high {HIGH_FILE} --dit_low {LOW_FILE} --prompt x --image {{i2v.png}}", "i2v-A14B"),
        ("--ckpt_dir {ti2v} --dit {5b.gguf} --prompt x --video {clip}", "v2v-5B"),
        ("--ckpt_dir {ti2v} --dit {5b.safetensors} --prompt x", "ti2v-5B"),
    ],
)
def test_files_stand_in_for_the_shards_of_a_folder(
    flags: str, task: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = run(world, flags, capsys)
    assert code == 0, output
    record = json.loads((world / "out.json").read_text())
    given = {name for name in ("dit", "dit_high", "dit_low") if record[name]}
    assert record["task"] == task and given == ({"dit_high", "dit_low"} if "A14B" in task else {"dit"})


def test_a_chain_is_not_gone_on_with_from_another_file(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = f"--ckpt_dir {{ti2v}} --video {{clip}} --prompt x --frame_num 5 --num_videos 1 --output_dir {world}/chain"
    for file, wanted in (("5b.gguf", 0), ("5b.gguf", 0), ("5b.safetensors", 2)):
        code, output = run(world, f"{chain} --dit {{{file}}}", capsys, continuous_main)
        assert code == wanted, output
    assert "another checkpoint" in output


A14B, FIVE_B = "--ckpt_dir {i2v} --image {i2v.png} --prompt x", "--ckpt_dir {ti2v} --prompt x"
WRONG = [
    (f"{FIVE_B} --dit {{nothing.gguf}}", "nothing.gguf does not exist"),
    (f"{FIVE_B} --dit {{i2v}}", "is a folder; name the file in it"),
    (f"{FIVE_B} --dit {{x.bin}}", "is no .gguf or .safetensors file"),
    (f"{FIVE_B} --dit {{text.gguf}}", "text.gguf is a web page that was saved under this"),
    (f"{FIVE_B} --dit {{cut_head.gguf}}", "cut_head.gguf cannot be read, it may be truncated"),
    (f"{FIVE_B} --dit {{cut_half.gguf}}", "cut_half.gguf cannot be read, it may be truncated"),
    (f"{FIVE_B} --dit {{cut_none.gguf}}", "cut_none.gguf cannot be read, it may be truncated"),
    (f"{FIVE_B} --dit {{cut.safetensors}}", "cut.safetensors cannot be read, it may be truncated"),
    (f"{FIVE_B} --dit {{flux.gguf}}", "is no Wan denoiser: a GGUF file of the architecture flux without a patch_emb"),
    (f"{FIVE_B} --dit {{lora.safetensors}}", "lora.safetensors does not exist"),
    (f"{FIVE_B} --dit {{less.safetensors}}", "less.safetensors does not fit the model: missing blocks.0.ffn.0.bias"),
    (f"{FIVE_B} --task ti2v-5B --dit {HIGH_FILE}", "takes 36 input channels, TI2V-5B (1 expert(s), 48 input channels)"),
    (f"{FIVE_B} --dit_high {HIGH_FILE} --task ti2v-5B", "--dit_high is not for this model, which takes --dit"),
    (f"{A14B} --dit {{5b.gguf}} --task i2v-A14B", "takes 48 input channels, I2V-A14B (2 expert(s), 36 input channels)"),
    (f"{A14B} --dit {{5b.gguf}} --dit_low {LOW_FILE} --task i2v-A14B", "are not of one model; give two of one model"),
    (f"{A14B} --dit_high {HIGH_FILE}", "expected diffusion_pytorch_model*.safetensors in low_noise_model"),
    (f"{A14B} --dit_high {HIGH_FILE} --dit_low {{5b.gguf}}", "are not of one model"),
    (f"{A14B} --dit_high {HIGH_FILE} --dit_low {{wide.gguf}}", "is of a model of width 256"),
    (f"{A14B} --dit_high {HIGH_FILE} --dit_low {HIGH_FILE}", "is for the high-noise expert by its name"),
    (f"{A14B} --dit_high {LOW_FILE} --dit_low {HIGH_FILE}", "give it with --dit_"),
    (f"{A14B} --dit_high {{wan21.gguf}} --dit_low {{wan21.gguf}}", "is given for both experts"),
    (f"{A14B} --dit_high {{wan21.gguf}} --dit_low {LOW_FILE}", "does not fit the model: unexpected img_emb.proj"),
    (f"{A14B} --dit_high {{tq.gguf}} --dit_low {LOW_FILE}", "is stored as TQ1_0, which cannot be read; there is Q2_K"),
    (f"{A14B} --dit_high {{int8.safetensors}} --dit_low {LOW_FILE}", "blocks.0.ffn.0.weight is stored as I8"),
    (f"{A14B} --dit_high {{blocks.safetensors}} --dit_low {LOW_FILE}", "is no scale of a tensor or of its rows"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_a_wrong_file_is_said_in_one_line_before_anything_loads(
    flags: str, message: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.denoiser.model.WanModel.from_weights", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("wan.models.TextEncoder.from_weights", lambda *_, **__: pytest.fail("loaded"))
    code, output = run(world, flags, capsys)
    assert code == 2 and message in output, output
    assert len(without_start(output).strip().splitlines()) == 1


def test_a_missing_extra_is_said(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, output = run(world, f"{FIVE_B} --dit {{5b.gguf}}", capsys)
    assert code == 2 and 'pip install -e ".[gguf]" in the project' in output
    assert run(world, f"{FIVE_B} --dit {{5b.safetensors}}", capsys)[0] == 0


def test_a_file_without_a_configuration_has_heads_as_wide_as_the_released_ones(tmp_path: Path) -> None:
    gguf_file("Q8_0")(wide(), tmp_path / "wide.gguf")
    assert load(open_denoiser(tmp_path / "wide.gguf"), torch.float32).config.num_attention_heads == 2
    comfyui(official(HIGH), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"does not say how many heads there are; put its model's config.json into"):
        open_denoiser(tmp_path / "x.safetensors", tmp_path)


def test_denoisers_that_come_from_files_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fnmatch import fnmatch

    asked: list[list[str] | None] = []

    def download(name: str, ignore_patterns: list[str] | None) -> str:
        asked.append(ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_folder("Wan-AI/Wan2.2-I2V-A14B", ("high_noise_model",))
    resolve_folder("Wan-AI/Wan2.2-I2V-A14B")
    (patterns, none) = asked
    assert none is None and patterns is not None
    spared = [file for file in FOLDER if any(fnmatch(file, pattern) for pattern in patterns)]
    assert spared == ["high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors"]


FOLDER = [
    "high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors",
    "high_noise_model/config.json",
    "low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors",
    "Wan2.1_VAE.pth",
]


@pytest.mark.parametrize("rows", [slice(0, 12), slice(5, 7), slice(3, 9), slice(8, 12), slice(9, 20)])
def test_rows_of_a_kronecker_product_are_those_of_the_whole(rows: slice) -> None:
    left, right = (torch.arange(1.0, size + 1).view(-1, 2) for size in (6, 8))
    assert torch.equal(Addition._kronecker(left, right, rows), torch.kron(left, right)[rows])
