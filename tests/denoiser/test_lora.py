"""A LoRA adds strength * alpha / rank * B @ A to the checkpoint's weights, whatever its layers are called."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft as peft_library
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.golden import GOLDEN
from wan.denoiser import lora_file as lora_file_module
from wan.denoiser.headers import infer_config, key_map
from wan.denoiser.lora import _share_out, _workers, merge_loras
from wan.denoiser.lora_file import LoraMatch, open_loras
from wan.denoiser.model import WanModel
from wan.device.placement import Placement
from wan.device.sharding import Slice
from wan.device.streaming import PinnedStage, RoundTrip
from wan.errors import UserError
from wan.files import sampled_digest
from wan.models import Models
from wan.settings import LoraFile
from wan.weights import quantized
from wan.weights.checkpoint import Names, open_checkpoint
from wan.weights.quantized import QuantizedLinear
from wan.weights.single_file import open_denoiser
from wan.weights.tensors import Weights, open_file, open_safetensors

CPU = torch.device("cpu")
ATTENTION = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
BLOCKS = [f"blocks.{n}.{layer}" for n in (0, 1) for layer in [*ATTENTION, "ffn.0", "ffn.2"]]
OUTSIDE = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
EVERYWHERE = [*BLOCKS, *OUTSIDE, "time_projection.1", "head.head"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """B @ A of one layer, and its alpha."""

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)

    @property
    def baked(self) -> Pair:
        """The same with a scale of 1; exact, because all scales here are powers of two."""
        return Pair(self.up, self.down * self.scale, len(self.down))


Layers = Mapping[str, Pair]
State = dict[str, Tensor]


def pairs(shapes: Mapping[str, tuple[int, ...]], layers: list[str] = BLOCKS, seed: int = 0) -> dict[str, Pair]:
    """Ranks 2, 4 and 8 in turn, and scales from 1/8 to 4; bfloat16, as published files are."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(16).bfloat16()

    by_layer = {}
    for index, layer in enumerate(layers):
        out, *inner = shapes[f"{layer}.weight"]
        rank = (2, 4, 8)[index % 3]
        by_layer[layer] = Pair(random(out, rank, *(1 for _ in inner[1:])), random(rank, *inner), 2.0 ** (index % 4))
    return by_layer


def diffusers_name(layer: str) -> str:
    (name,) = convert_wan_transformer_to_diffusers({f"{layer}.weight": layer})
    return str(name).removesuffix(".weight")


# --- one LoRA in every style ------------------------------------------------------------------------------------------


def named(
    layers: Layers, name: Callable[[str], str], down: str, up: str, alpha: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A state dict; with `alpha` None the scale is baked into the matrices."""
    state: dict[str, Tensor] = {}
    for layer, pair in layers.items():
        stored = pair if alpha else pair.baked
        state |= {f"{name(layer)}.{down}.weight": stored.down, f"{name(layer)}.{up}.weight": stored.up}
        if alpha:
            state[f"{name(layer)}.alpha"] = torch.tensor(pair.alpha, dtype=alpha)
    return state


def svi(layers: Layers, file: Path) -> None:
    save_file(named(layers, str, "lora_A.default", "lora_B.default"), file)


def comfyui(layers: Layers, file: Path) -> None:
    save_file(named(layers, lambda layer: f"diffusion_model.{layer}", "lora_A", "lora_B"), file)


def lightx2v(layers: Layers, file: Path) -> None:
    name = "diffusion_model.{}".format
    save_file(named(layers, name, "lora_down", "lora_up", torch.bfloat16), file)


def kohya(layers: Layers, file: Path) -> None:
    name = "lora_unet_{}".format
    save_file(named(layers, lambda layer: name(layer.replace(".", "_")), "lora_down", "lora_up", torch.float16), file)


def videox_fun(layers: Layers, file: Path) -> None:
    name = "lora_unet__{}".format
    save_file(named(layers, lambda layer: name(layer.replace(".", "_")), "lora_down", "lora_up", torch.bfloat16), file)


def kohya_of_diffusers_names(layers: Layers, file: Path) -> None:
    def name(layer: str) -> str:
        return "lora_transformer_" + diffusers_name(layer).replace(".", "_")

    save_file(named(layers, name, "lora_down", "lora_up", torch.float32), file)


def diffusers(layers: Layers, file: Path) -> None:
    save_file(named(layers, lambda layer: f"transformer.{diffusers_name(layer)}", "lora_A", "lora_B"), file)


def diffusers_with_header(layers: Layers, file: Path) -> None:
    """What save_lora_weights writes since it keeps the configuration: the alphas are in the header."""
    plain = {layer: dataclasses.replace(pair, alpha=len(pair.down)) for layer, pair in layers.items()}
    alphas = {diffusers_name(layer): pair.alpha for layer, pair in layers.items() if pair.alpha != 1}
    config = {"transformer.r": 4, "transformer.lora_alpha": 1, "transformer.alpha_pattern": alphas}
    state = named(plain, lambda layer: f"transformer.{diffusers_name(layer)}", "lora_A", "lora_B")
    save_file(state, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)})


def peft(layers: Layers, file: Path) -> None:
    save_file(named(layers, lambda layer: f"base_model.model.{layer}", "lora_A", "lora_B"), file)


def diffsynth(layers: Layers, file: Path) -> None:
    save_file(named(layers, lambda layer: f"pipe.dit.{layer}", "lora_A.default", "lora_B.default"), file)


def kohya_with_dots(layers: Layers, file: Path) -> None:
    name = "lora_unet_{}".format
    save_file(named(layers, lambda layer: name(layer.replace(".", "_", 1)), "lora_down", "lora_up"), file)


def lycoris(layers: Layers, file: Path) -> None:
    def name(layer: str) -> str:
        return "lycoris_" + diffusers_name(layer).replace(".", "_")

    save_file(named(layers, name, "lora_down", "lora_up", torch.float32), file)


def odd_prefix(layers: Layers, file: Path) -> None:
    save_file(named(layers, lambda layer: f"diffusion.model.{layer}", "lora_A", "lora_B"), file)


def compiled(layers: Layers, file: Path) -> None:
    save_file(named(layers, lambda layer: f"_orig_mod.{layer}", "lora_A", "lora_B"), file)


def compiled_blocks(layers: Layers, file: Path) -> None:
    def name(layer: str) -> str:
        return "module.diffusion_model." + layer.replace("attn.", "attn._orig_mod.")

    save_file(named(layers, name, "lora_A", "lora_B"), file)


def without_weight(layers: Layers, file: Path, down: str = "lora_A", up: str = "lora_B") -> None:
    state = named(layers, str, down, up, torch.float32)
    save_file({key.removesuffix(".weight"): value for key, value in state.items()}, file)


def kohya_without_weight(layers: Layers, file: Path) -> None:
    without_weight(layers, file, "lora_down", "lora_up")


def lora_linear_layer(layers: Layers, file: Path) -> None:
    name = "transformer.{}".format
    state = named(layers, lambda layer: name(diffusers_name(layer)), "lora_linear_layer.down", "lora_linear_layer.up")
    save_file(state, file)


STYLES = [
    *(svi, comfyui, lightx2v, kohya, videox_fun, kohya_of_diffusers_names),
    *(diffusers, diffusers_with_header, peft, diffsynth),
    *(kohya_with_dots, lycoris, odd_prefix, compiled, compiled_blocks),
    *(without_weight, kohya_without_weight, lora_linear_layer),
]


# --- models -----------------------------------------------------------------------------------------------------------


def diffusers_layout(weights: Weights, folder: Path) -> Weights:
    """The same weights as the library's own save_pretrained writes them, in shards."""
    model = WanTransformer3DModel(**infer_config(weights))
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights.tensors())))
    model.save_pretrained(folder, max_shard_size="150KB")
    return open_safetensors(folder, "diffusion_pytorch_model")


def matches(files: Sequence[LoraFile], weights: Weights) -> list[LoraMatch]:
    return [one.match for one in open_loras(files, weights)]


def merge(model: WanModel, weights: Weights, files: Sequence[LoraFile]) -> None:
    merge_loras(model, weights, open_loras(files, weights))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    a14b = open_checkpoint(GOLDEN / "14b" / "ckpt", in_channels=36, experts=2, names=Names()).experts
    names = Names(vae="Wan2.2_VAE.pth")
    five_b = open_checkpoint(GOLDEN / "5b" / "ckpt", in_channels=48, experts=1, names=names).experts["model"]
    opened = {"A14B": a14b["high_noise_model"], "low noise": a14b["low_noise_model"], "5B": five_b}
    return opened | {"diffusers": diffusers_layout(opened["A14B"], tmp_path_factory.mktemp("diffusers") / "model")}


@pytest.fixture(params=["A14B", "5B", "diffusers"])
def weights(checkpoints: dict[str, Weights], request: pytest.FixtureRequest) -> Weights:
    return checkpoints[request.param]


@pytest.fixture
def a14b(checkpoints: dict[str, Weights]) -> Weights:
    return checkpoints["A14B"]


def official_shapes(weights: Weights, checkpoints: dict[str, Weights]) -> Mapping[str, tuple[int, ...]]:
    return checkpoints["A14B"].shapes if weights is checkpoints["diffusers"] else weights.shapes


def load(weights: Weights, dtype: torch.dtype = torch.float32, convert: bool = False) -> WanModel:
    return WanModel.from_weights(weights, dtype=dtype, device=CPU, convert_model_dtype=convert)


def values(model: WanModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def expected(weights: Weights, *loras: tuple[Layers, float]) -> dict[str, Tensor]:
    """W + strength * alpha / rank * B @ A in float64."""
    by_key = {key: value for key, value in weights.tensors() if isinstance(value, Tensor)}
    wanted = {name: by_key[key].double() for name, key in key_map(weights).items()}
    for layers, strength in loras:
        for layer, pair in layers.items():
            name = f"{diffusers_name(layer)}.weight"
            product = pair.up.double().flatten(1) @ pair.down.double().flatten(1)
            wanted[name] += strength * pair.scale * product.view_as(wanted[name])
    return wanted


# --- one file for both experts ----------------------------------------------------------------------------------------


def ai_toolkit(half: str, layers: Layers) -> dict[str, Tensor]:
    part = {"high": "transformer_1", "low": "transformer_2"}[half]
    return named(layers, lambda layer: f"diffusion_model.{part}.{layer}", "lora_A", "lora_B")


def diffusers_pair(half: str, layers: Layers) -> dict[str, Tensor]:
    part = {"high": "transformer", "low": "transformer_2"}[half]
    return named(layers, lambda layer: f"{part}.{diffusers_name(layer)}", "lora_A", "lora_B")


def diffsynth_pair(half: str, layers: Layers) -> dict[str, Tensor]:
    part = {"high": "pipe.dit", "low": "pipe.dit2"}[half]
    return named(layers, lambda layer: f"{part}.{layer}", "lora_A.default", "lora_B.default")


@pytest.mark.parametrize("style", [ai_toolkit, diffusers_pair, diffsynth_pair])
def test_each_expert_takes_its_half_of_a_file_for_both(style: Any, checkpoints: Any, tmp_path: Path) -> None:
    shapes = checkpoints["A14B"].shapes
    halves = {"high": pairs(shapes, seed=1), "low": pairs(shapes, BLOCKS[:9], seed=2)}
    file = tmp_path / "both.safetensors"
    save_file({key: value for half in halves for key, value in style(half, halves[half]).items()}, file)
    for half, weights in (("high", checkpoints["A14B"]), ("low", checkpoints["low noise"])):
        both, split = load(weights), load(weights)
        merge(both, weights, [LoraFile(file)])
        svi(halves[half], tmp_path / f"{half}.safetensors")
        merge(split, weights, [LoraFile(tmp_path / f"{half}.safetensors")])
        assert same(values(both), values(split))
        assert not same(values(both), values(load(weights)))
        (match,) = matches([LoraFile(file)], weights)
        assert match.matched == match.total == len(halves[half])
    sizes = [open_loras([LoraFile(file)], checkpoints[name])[0].size for name in ("A14B", "low noise")]
    assert file.stat().st_size - 2 <= sum(sizes) <= file.stat().st_size and min(sizes) > 0  # of each its half
    refused(file, checkpoints["5B"], "is for a model of two experts, this one has one")


def test_one_whose_alphas_are_all_zero_is_refused(a14b: Weights, tmp_path: Path) -> None:
    comfyui(pairs(a14b.shapes), tmp_path / "zero.safetensors")
    state = load_file(tmp_path / "zero.safetensors")
    alphas = {
        key.replace("lora_A.weight", "alpha"): torch.tensor(0.0) for key in state if key.endswith("lora_A.weight")
    }
    save_file(state | alphas, tmp_path / "zero.safetensors")
    refused(tmp_path / "zero.safetensors", a14b, "changes nothing: each alpha in it is 0")


@pytest.mark.parametrize("trained", [False, True])
def test_one_of_zeros_is_said_to_change_nothing(
    trained: bool, a14b: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an untrained one is, whose B is zero; one layer that was trained is enough."""
    layers = pairs(a14b.shapes)
    still = {name: dataclasses.replace(pair, up=torch.zeros_like(pair.up)) for name, pair in layers.items()}
    comfyui(still | dict(list(layers.items())[-1:] if trained else []), tmp_path / "zeros.safetensors")
    merge(load(a14b), a14b, [LoraFile(tmp_path / "zeros.safetensors", 0.0)])
    expected = "changes nothing: it has only zeros for high_noise_model; train it first, or leave it out"
    assert caplog.messages == ([] if trained else [f"{tmp_path / 'zeros.safetensors'} {expected}"])


@pytest.mark.parametrize(("half", "other"), [("high", "low noise"), ("low", "A14B")])
def test_half_a_file_is_refused_for_the_other_expert(half: str, other: str, checkpoints: Any, tmp_path: Path) -> None:
    save_file(ai_toolkit(half, pairs(checkpoints["A14B"].shapes)), tmp_path / "lora.safetensors")
    message = f"holds layers of the {half}-noise expert only; give it with lora_{half}"
    refused(tmp_path / "lora.safetensors", checkpoints[other], message)


@pytest.mark.parametrize("both", [True, False])
def test_each_expert_has_its_own_alphas_in_a_header(both: bool, checkpoints: Any, tmp_path: Path) -> None:
    lora = {layer: pair for layer, pair in pairs(checkpoints["A14B"].shapes).items() if len(pair.down) == 2}
    plain = {layer: dataclasses.replace(pair, alpha=2) for layer, pair in lora.items()}
    alphas = {"high": 8.0, "low": 4.0}
    models = {"high": "transformer", "low": "transformer_2"}
    state: State = {}
    config: dict[str, Any] = {}
    for half in alphas if both else ["low"]:
        state |= {key: value.clone() for key, value in diffusers_pair(half, plain).items()}
        config |= {f"{models[half]}.r": 2, f"{models[half]}.lora_alpha": alphas[half]}
    file = tmp_path / "lora.safetensors"
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(config)})
    for half, name in (("high", "A14B"), ("low", "low noise")):
        if both or half == "low":
            model, weights = load(checkpoints[name]), checkpoints[name]
            merge(model, weights, [LoraFile(file)])
            wanted = expected(weights, ({k: dataclasses.replace(v, alpha=alphas[half]) for k, v in lora.items()}, 1.0))
            merged = values(model)
            for key, value in wanted.items():
                torch.testing.assert_close(merged[key].double(), value, rtol=1e-6, atol=1e-7)


# --- other forms ------------------------------------------------------------------------------------------------------

Formed = Callable[[Tensor, Callable[..., Tensor]], tuple[State, Tensor]]
LAYERS_OF_FORMS = ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.0", "blocks.1.ffn.2"]


def lokr(weight: Tensor, random: Callable[..., Tensor]) -> tuple[State, Tensor]:
    """Both factors whole: alpha says nothing, LyCORIS writes it all the same."""
    out, inner = weight.shape
    state = {"lokr_w1": random(4, 2), "lokr_w2": random(out // 4, inner // 2)}
    return state | {"alpha": torch.tensor(1e10)}, torch.kron(state["lokr_w1"].double(), state["lokr_w2"].double())


def lokr_split(weight: Tensor, random: Callable[..., Tensor]) -> tuple[State, Tensor]:
    out, inner = weight.shape
    state = {
        "lokr_w1_a": random(4, 2),
        "lokr_w1_b": random(2, 8),
        "lokr_w2_a": random(out // 4, 2),
        "lokr_w2_b": random(2, inner // 8),
    }
    a, b, c, d = (value.double() for value in state.values())
    return state | {"alpha": torch.tensor(3.0)}, 1.5 * torch.kron(a @ b, c @ d)


def loha(weight: Tensor, random: Callable[..., Tensor]) -> tuple[State, Tensor]:
    out, inner = weight.shape
    state = {f"hada_w{n}_{side}": random(*((out, 4), (4, inner))[side == "b"]) for n in (1, 2) for side in "ab"}
    a, b, c, d = (value.double() for value in state.values())
    return state | {"alpha": torch.tensor(2.0)}, 0.5 * (a @ b) * (c @ d)


def plain(weight: Tensor, random: Callable[..., Tensor]) -> tuple[State, Tensor]:
    out, inner = weight.shape
    state = {"lora_down.weight": random(4, inner), "lora_up.weight": random(out, 4), "alpha": torch.tensor(2.0)}
    return state, 0.5 * state["lora_up.weight"].double() @ state["lora_down.weight"].double()


def dora(form: Formed, axis: int, name: str = "dora_scale", flat: bool = False) -> Formed:
    """That form with magnitudes: of rows with axis 1, of columns with axis 0."""

    def formed(weight: Tensor, random: Callable[..., Tensor]) -> tuple[State, Tensor]:
        state, change = form(weight, random)
        whole = weight.double() + change
        norm = whole.norm(dim=axis, keepdim=True)
        magnitude = (norm * (1 + random(*norm.shape).double())).float()
        stored = magnitude.flatten() if flat else magnitude
        return state | {name: stored}, magnitude.double() / norm * whole - weight.double()

    return formed


FORMS: dict[str, Formed] = {
    "LoKr": lokr,
    "LoKr of products": lokr_split,
    "LoHa": loha,
    "DoRA": dora(plain, 1),
    "DoRA by columns": dora(plain, 0),
    "LoHa DoRA": dora(loha, 1),
    "LoKr DoRA": dora(lokr_split, 1),
    "LoKr DoRA by columns": dora(lokr_split, 0),
    "peft's DoRA": dora(plain, 1, "lora_magnitude_vector", flat=True),
}


def formed_lora(form: Formed, weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Write it; returns what it adds by layer, float64."""
    generator = torch.Generator().manual_seed(3)
    state: State = {}
    changes: State = {}
    for layer in LAYERS_OF_FORMS:
        tensors, changes[layer] = form(
            weights[f"{layer}.weight"], lambda *shape: torch.randn(shape, generator=generator).div(8).bfloat16()
        )
        state |= {f"diffusion_model.{layer}.{name}": value for name, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return changes


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_add_what_their_formula_says(form: str, a14b: Weights, tmp_path: Path) -> None:
    original = {key: value for key, value in a14b.tensors() if isinstance(value, Tensor)}
    changes = formed_lora(FORMS[form], original, tmp_path / "lora.safetensors")
    svi(pairs(a14b.shapes), tmp_path / "other.safetensors")
    model = load(a14b)
    before = values(model)
    asked = [LoraFile(tmp_path / "other.safetensors", 0.5), LoraFile(tmp_path / "lora.safetensors", 0.75)]
    (_, match) = matches(asked, a14b)
    assert match.matched == match.total == len(LAYERS_OF_FORMS)
    merge(model, a14b, asked)
    merged, wanted = values(model), expected(a14b, (pairs(a14b.shapes), 0.5))
    for layer, change in changes.items():
        wanted[f"{diffusers_name(layer)}.weight"] += 0.75 * change
    for key, value in wanted.items():
        torch.testing.assert_close(merged[key].double(), value, rtol=1e-5, atol=1e-6)
    merge(model, a14b, [])
    assert same(values(model), before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_fp8", [False, True])
def test_other_forms_are_added_to_packed_weights(
    form: str, in_fp8: bool, a14b: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weight expanded in pieces, and with products in the weight's own format."""
    monkeypatch.setattr(quantized, "PIECE", 480)
    original = {key: value for key, value in a14b.tensors() if isinstance(value, Tensor)}
    state = {key: value.to(torch.float8_e4m3fn if value.ndim == 2 else value.dtype) for key, value in original.items()}
    expanded = {key: value.float() for key, value in state.items()}
    save_file(state, tmp_path / "fp8.safetensors")
    weights = dataclasses.replace(open_denoiser(tmp_path / "fp8.safetensors", a14b.path), expert=a14b.expert)
    changes = formed_lora(FORMS[form], expanded, tmp_path / "lora.safetensors")
    model = load(weights)
    merge(model, weights, [LoraFile(tmp_path / "lora.safetensors", 0.75)])
    for layer, change in changes.items():
        linear = model.get_submodule(diffusers_name(layer))
        assert isinstance(linear, QuantizedLinear)
        wanted = expanded[f"{layer}.weight"].double() + 0.75 * change
        inputs = torch.randn(2, 7, linear.in_features, generator=torch.Generator().manual_seed(1))
        if in_fp8:
            linear.scale = torch.ones(1)
            linear.multiply = lambda x, w, scale, bias: F.linear(x, w.float() * scale, bias)
        product = linear(inputs) if in_fp8 else F.linear(inputs, linear.dense(), linear.bias)
        reference = F.linear(inputs.double(), wanted, linear.bias.double())
        torch.testing.assert_close(product.double(), reference, rtol=1e-4, atol=1e-5)


def locon(shape: Sequence[int], random: Callable[..., Tensor]) -> tuple[State, Tensor]:
    """LyCORIS' LoRA of a convolution: three convolutions in a row, here what they make of each single input."""
    out, inner, *size = shape
    state = {
        "lora_up.weight": random(out, 3, 1, 1, 1),
        "lora_mid.weight": random(3, 3, *size),
        "lora_down.weight": random(3, inner, 1, 1, 1),
    }
    up, mid, down = (value.double() for value in state.values())
    ones = torch.eye(inner * math.prod(size), dtype=torch.float64).view(-1, inner, *size)
    seen = F.conv3d(F.conv3d(F.conv3d(ones, down), mid), up)  # [inputs, out, 1, 1, 1]
    return state | {"alpha": torch.tensor(6.0)}, 2 * seen.flatten(1).T.reshape(shape)


def rebuilt(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Every place of the kernel by itself."""
    places = core.flatten(2).double()
    matrices = [left.double().T @ places[..., at] @ right.double() for at in range(places.shape[2])]
    return torch.stack(matrices, -1).view(left.shape[1], right.shape[1], *core.shape[2:])


def tucker_loha(shape: Sequence[int], random: Callable[..., Tensor]) -> tuple[State, Tensor]:
    out, inner, *size = shape
    state: State = {}
    for n in (1, 2):
        state |= {f"hada_t{n}": random(3, 3, *size), f"hada_w{n}_a": random(3, out), f"hada_w{n}_b": random(3, inner)}
    one, other = (rebuilt(*(state[f"hada_{part}"] for part in (f"t{n}", f"w{n}_a", f"w{n}_b"))) for n in (1, 2))
    return state | {"alpha": torch.tensor(1.5)}, 0.5 * one * other


def tucker_lokr(shape: Sequence[int], random: Callable[..., Tensor]) -> tuple[State, Tensor]:
    out, inner, *size = shape
    state = {
        "lokr_w1": random(4, 2),
        "lokr_t2": random(3, 3, *size),
        "lokr_w2_a": random(3, out // 4),
        "lokr_w2_b": random(3, inner // 2),
    }
    second = rebuilt(*(state[name] for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")))
    first = state["lokr_w1"].double().view(4, 2, *(1 for _ in size))
    return state | {"alpha": torch.tensor(6.0)}, 2 * torch.kron(first, second)


@pytest.mark.parametrize("form", [locon, tucker_loha, tucker_lokr])
@pytest.mark.parametrize("scaled", [False, True])
def test_cores_of_convolutions_are_multiplied_out(form: Any, scaled: bool, a14b: Weights, tmp_path: Path) -> None:
    """Tucker's, which only the patch embedding can have; with magnitudes too."""
    original = dict(a14b.read({"patch_embedding.weight"}))["patch_embedding.weight"]
    assert isinstance(original, Tensor)
    generator = torch.Generator().manual_seed(3)
    state, change = form(original.shape, lambda *shape: torch.randn(shape, generator=generator) / 4)
    if scaled:
        whole = original.double() + change
        norm = whole.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
        magnitude = (norm * 1.25).float()
        state["dora_scale"], change = magnitude, magnitude.double() / norm * whole - original.double()
    file = tmp_path / "lora.safetensors"
    save_file({f"lycoris_patch_embedding.{name}": value.contiguous() for name, value in state.items()}, file)
    model = load(a14b)
    merge(model, a14b, [LoraFile(file, 0.5)])
    wanted = original.double() + 0.5 * change
    torch.testing.assert_close(values(model)["patch_embedding.weight"].double(), wanted, rtol=1e-5, atol=1e-6)


class Block(torch.nn.Module):
    """The layers of one model with official names, as a trainer that uses peft has them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for layer in LAYERS_OF_FORMS:
            owner: torch.nn.Module = self
            *path, leaf = layer.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            out, inner = weights[f"{layer}.weight"].shape
            linear = torch.nn.Linear(inner, out)
            linear.weight.data = weights[f"{layer}.weight"].float().clone()
            owner.add_module(leaf, linear)


@pytest.mark.parametrize(
    "config",
    [
        peft_library.LoKrConfig(r=4, alpha=6, rank_pattern={"ffn.0": 2}, init_weights=False),
        peft_library.LoKrConfig(r=99, alpha=6, init_weights=False),
        peft_library.LoHaConfig(r=4, alpha=6, alpha_pattern={"ffn.2": 3}, init_weights=False),
        peft_library.LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False),
        peft_library.LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False),
    ],
    ids=["LoKr", "LoKr whole", "LoHa", "DoRA", "rsLoRA"],
)
def test_what_peft_saves_is_what_peft_merges(config: Any, a14b: Weights, tmp_path: Path) -> None:
    original = {key: value for key, value in a14b.tensors() if isinstance(value, Tensor)}
    torch.manual_seed(0)
    config = dataclasses.replace(config, target_modules=[layer.split(".", 2)[2] for layer in LAYERS_OF_FORMS])
    theirs = peft_library.get_peft_model(Block(original), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.25)
            elif "lokr" in name or "hada" in name or "lora" in name:
                parameter.div_(8)
    theirs.save_pretrained(tmp_path)
    model = load(a14b)
    merge(model, a14b, [LoraFile(tmp_path / "adapter_model.safetensors")])
    merged = theirs.merge_and_unload()
    for layer in LAYERS_OF_FORMS:
        weight = model.get_submodule(diffusers_name(layer)).weight
        assert not torch.equal(weight, original[f"{layer}.weight"].float())
        torch.testing.assert_close(weight, merged.get_submodule(layer).weight, rtol=1e-5, atol=1e-6)


# --- what is merged ---------------------------------------------------------------------------------------------------


def test_every_style_makes_the_same_weights(weights: Weights, checkpoints: Any, tmp_path: Path) -> None:
    lora = pairs(official_shapes(weights, checkpoints), EVERYWHERE)
    model, merged, total = load(weights), [], len(EVERYWHERE)
    for style in STYLES:
        style(lora, tmp_path / f"{style.__name__}.safetensors")
        asked = [LoraFile(tmp_path / f"{style.__name__}.safetensors", 0.5)]
        (match,) = matches(asked, weights)
        assert (match.matched, match.total, match.ranks, match.unmatched) == (total, total, (2, 4, 8), ())
        merge(model, weights, asked)
        merged.append(values(model))
    assert all(same(merged[0], other) for other in merged[1:])
    for name, value in expected(weights, (lora, 0.5)).items():
        torch.testing.assert_close(merged[0][name].double(), value, rtol=1e-6, atol=1e-7)


def test_a_merged_model_is_the_model_of_a_merged_checkpoint(a14b: Weights, tmp_path: Path) -> None:
    """Rounded once, to each parameter's own dtype."""
    lora = pairs(a14b.shapes, EVERYWHERE)
    lightx2v(lora, tmp_path / "lora.safetensors")
    exact = load(a14b)
    merge(exact, a14b, [LoraFile(tmp_path / "lora.safetensors", 0.7)])
    (tmp_path / "merged").mkdir()
    save_file(values(exact), tmp_path / "merged" / "m.safetensors")
    (tmp_path / "merged" / "config.json").write_text(json.dumps(dict(a14b.config)))
    merged = open_safetensors(tmp_path / "merged", "m")
    for dtype, convert in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
        model = load(a14b, dtype, convert)
        merge(model, a14b, [LoraFile(tmp_path / "lora.safetensors", 0.7)])
        assert same(values(model), values(load(merged, dtype, convert)))


@pytest.mark.parametrize("convert", [False, True])
def test_what_is_taken_out_leaves_no_trace(weights: Weights, checkpoints: Any, convert: bool, tmp_path: Path) -> None:
    shapes = official_shapes(weights, checkpoints)
    one, other = LoraFile(tmp_path / "one.safetensors"), LoraFile(tmp_path / "other.safetensors", -1.5)
    comfyui(pairs(shapes, EVERYWHERE[::2]), one.path)
    kohya(pairs(shapes, EVERYWHERE[::3], seed=1), other.path)
    model = load(weights, torch.bfloat16, convert)
    before = values(model)
    merge(model, weights, [other])
    alone = values(model)
    assert not same(alone, before)
    merge(model, weights, [one, other])
    both = values(model)
    merge(model, weights, [])
    assert same(values(model), before)
    merge(model, weights, [one, other])
    assert same(values(model), both)
    merge(model, weights, [other])
    assert same(values(model), alone)


def in_bfloat16(weights: Weights, folder: Path) -> Weights:
    """The same weights rounded, in one file."""
    folder.mkdir()
    state = {key: value.bfloat16() for key, value in weights.tensors() if isinstance(value, Tensor)}
    save_file(state, folder / "m.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(weights.config)))
    return open_safetensors(folder, "m")


@pytest.fixture
def keys_read(monkeypatch: pytest.MonkeyPatch) -> dict[Path, list[str]]:
    """The keys that are read from files, by the path of their weights."""
    seen: dict[Path, list[str]] = {}
    read = Weights.read

    def noted(weights: Weights, keys: Any, *more: Any) -> Any:
        for key, value in read(weights, keys, *more):
            seen.setdefault(weights.path, []).append(key)
            yield key, value

    monkeypatch.setattr(Weights, "read", noted)
    return seen


@pytest.mark.parametrize("number", [1, 2])
def test_what_no_lora_has_altered_is_not_read_again(
    number: int, a14b: Weights, tmp_path: Path, keys_read: dict[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what has another dtype than its file, or has been altered; the numbers are the same, from either source."""
    monkeypatch.setattr("wan.denoiser.lora._workers", lambda *_: number)
    weights = in_bfloat16(a14b, tmp_path / "half")
    one, other = LoraFile(tmp_path / "one.safetensors", 0.7), LoraFile(tmp_path / "other.safetensors", -1.5)
    comfyui(pairs(a14b.shapes, EVERYWHERE[::2]), one.path)
    kohya(pairs(a14b.shapes, EVERYWHERE[1:], seed=1), other.path)
    source_of = key_map(weights)
    model, reference = load(weights, torch.bfloat16), load(weights, torch.bfloat16)
    before = values(model)
    wide = {source_of[name] for name, value in before.items() if value.dtype == torch.float32}
    altered: set[str] = set()
    for loras in ([one], [one, other], [other], []):
        reference.altered = frozenset(source_of)  # so that all of it is read
        merge(reference, weights, loras)
        keys_read.clear()
        merge(model, weights, loras)
        changed = {source_of[name] for file in open_loras(loras, weights) for name in file.parts}
        read = keys_read.get(weights.path, [])
        assert sorted(read) == sorted(altered | (changed & wide)), "each once"
        assert same(values(model), values(reference))
        altered = changed
    assert same(values(model), before) and model.altered == frozenset()


@pytest.mark.parametrize("why", ["in common", "sliced", "rounded", "half done"])
def test_values_that_may_not_be_the_checkpoints_are_read(
    why: str, a14b: Weights, tmp_path: Path, keys_read: dict[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    svi(pairs(a14b.shapes), tmp_path / "lora.safetensors")
    lora, rounded = LoraFile(tmp_path / "lora.safetensors", 0.7), why == "rounded"
    model, reference = load(a14b, convert=rounded), load(a14b, convert=rounded)
    merge(reference, a14b, [lora])
    if why == "in common":  # another process was quicker
        model.in_common = True
        model.load_state_dict(values(reference))
    if why == "sliced":  # that they are written too is in test_sharding.py
        monkeypatch.setattr("wan.denoiser.lora.slice_of", lambda parameter: Slice(slice(0, 1), parameter[:1]))
    if why == "half done":
        state = load_file(lora.path)
        save_file({key: value * math.nan for key, value in state.items()}, tmp_path / "nan.safetensors")
        with pytest.raises(UserError, match="infinite or NaN"):
            merge(model, a14b, [LoraFile(tmp_path / "nan.safetensors")])
        assert model.loras is None
        for name in model.altered:  # whichever of them were at work
            model.get_parameter(name).fill_(math.nan)
    keys_read.clear()
    merge(model, a14b, [lora])
    assert sorted(keys_read[a14b.path]) == sorted(f"{layer}.weight" for layer in BLOCKS)
    assert same(values(model), values(reference))


def test_several_loras_add_up(a14b: Weights, tmp_path: Path) -> None:
    one, other = pairs(a14b.shapes), pairs(a14b.shapes, EVERYWHERE, seed=1)
    svi(one, tmp_path / "one.safetensors")
    diffusers(other, tmp_path / "other.safetensors")
    model = load(a14b)
    merge(model, a14b, [LoraFile(tmp_path / "one.safetensors", 0.5), LoraFile(tmp_path / "other.safetensors")])
    merged = values(model)
    for name, value in expected(a14b, (one, 0.5), (other, 1.0)).items():
        torch.testing.assert_close(merged[name].double(), value, rtol=1e-6, atol=1e-7)


def test_the_same_set_is_merged_once(a14b: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svi(pairs(a14b.shapes), tmp_path / "lora.safetensors")
    model, opened = load(a14b), open_loras([LoraFile(tmp_path / "lora.safetensors")], a14b)
    merge_loras(model, a14b, opened)
    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("read again"))
    merge_loras(model, a14b, opened)


def test_the_headers_of_a_lora_are_read_once_for_each_expert(
    a14b: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svi(pairs(a14b.shapes), tmp_path / "lora.safetensors")
    read: list[Path] = []

    def counted(file: Path) -> Any:
        read.append(file)
        return open_file(file)

    monkeypatch.setattr(lora_file_module, "open_file", counted)
    checkpoint: Any = SimpleNamespace(experts={"high_noise_model": a14b, "low_noise_model": a14b}, single=False)
    models = Models("x", checkpoint, {name: lambda *_: load(a14b) for name in checkpoint.experts})
    for strength in (1.0, 0.5, 1.0):  # clips that differ
        files = (LoraFile(tmp_path / "lora.safetensors", strength),)
        wanted = {"high_noise_model": files, "low_noise_model": files}
        models.check_loras(wanted)
        models.merge_loras(wanted)
        assert models["high_noise_model"].loras == files
    assert len(read) == 2 * 2  # an expert and a strength
    assert models.merged["high_noise_model"][0].lora.strength == 1.0


def test_values_that_are_not_finite_are_told_before_an_expert_is_loaded(
    a14b: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svi(pairs(a14b.shapes), tmp_path / "good.safetensors")
    good = load_file(tmp_path / "good.safetensors")
    factor = next(key for key, value in good.items() if value.ndim == 2)
    save_file(good | {factor: good[factor] * math.nan}, tmp_path / "bad.safetensors")
    checkpoint: Any = SimpleNamespace(experts={"high_noise_model": a14b, "low_noise_model": a14b}, single=False)
    models = Models("x", checkpoint, {name: lambda *_: pytest.fail("loaded") for name in checkpoint.experts})
    wanted = {"low_noise_model": (LoraFile(tmp_path / "good.safetensors"),)}
    models.merge_loras(wanted)
    with pytest.raises(UserError, match=r"bad.safetensors makes \S+ infinite or NaN"):
        models.merge_loras({"low_noise_model": (LoraFile(tmp_path / "bad.safetensors"),)})
    monkeypatch.setattr("wan.denoiser.lora.check_values", lambda one: pytest.fail("read again"))
    models.merge_loras(wanted)


def test_an_expert_gets_its_loras_when_it_is_first_used(a14b: Weights, tmp_path: Path) -> None:
    svi(pairs(a14b.shapes), tmp_path / "lora.safetensors")
    checkpoint: Any = SimpleNamespace(experts={"high_noise_model": a14b, "low_noise_model": a14b}, single=False)
    loads: list[str] = []

    def loader(name: str) -> Callable[[bool, object], WanModel]:
        def made(mapped: bool, common: object) -> WanModel:
            loads.append(name)
            return load(a14b)

        return made

    models = Models("x", checkpoint, {name: loader(name) for name in checkpoint.experts}, device=CPU)
    files = (LoraFile(tmp_path / "lora.safetensors"),)
    models.merge_loras({"high_noise_model": files, "low_noise_model": files})
    assert loads == [] and models.merged == {}
    merged = values(models["high_noise_model"])
    assert loads == ["high_noise_model"] and list(models.merged) == ["high_noise_model"]
    assert not same(merged, values(load(a14b)))
    models.merge_loras({"low_noise_model": files})  # taken out of the one that is there
    assert same(values(models["high_noise_model"]), values(load(a14b)))
    assert same(values(models["low_noise_model"]), merged)
    assert loads == ["high_noise_model", "low_noise_model"]


def test_what_is_added_up_on_another_device_passes_through_pinned_memory(
    weights: Weights, checkpoints: dict[str, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []

    class Staged(RoundTrip):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self._stages = PinnedStage(), PinnedStage()  # as on a GPU

        def go(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
            passed.append("go")
            return super().go(tensor, dtype)

        def back(self, tensor: Tensor) -> Tensor:
            passed.append("back")
            return super().back(tensor)

    monkeypatch.setattr("wan.denoiser.lora.RoundTrip", Staged)
    svi(pairs(official_shapes(weights, checkpoints)), tmp_path / "lora.safetensors")
    opened = open_loras([LoraFile(tmp_path / "lora.safetensors", 0.7)], weights)
    here, away = load(weights, torch.bfloat16), load(weights, torch.bfloat16)
    plain = values(here)
    merge_loras(here, weights, opened)
    assert not passed and not same(values(here), plain)
    merge_loras(away, weights, opened, CPU)
    assert same(values(away), values(here))
    assert passed == ["go", "back"] * len(away.altered)
    merge_loras(away, weights, (), CPU)
    assert same(values(away), plain)


def test_two_at_a_time_pass_to_a_gpu_where_they_take_little_of_it(a14b: Weights, tmp_path: Path) -> None:
    svi(pairs(a14b.shapes), tmp_path / "plain.safetensors")
    state = load_file(tmp_path / "plain.safetensors")
    save_file(state | {"blocks.0.self_attn.q.dora_scale": torch.ones(48, 1)}, tmp_path / "dora.safetensors")
    plain, dora = (open_loras([LoraFile(tmp_path / f"{name}.safetensors")], a14b) for name in ("plain", "dora"))
    model, gpu = load(a14b), torch.device("cuda")
    assert [_workers(model, plain, device) for device in (gpu, CPU, None)] == [2, 1, 1]
    assert [_workers(model, files, gpu) for files in ([], dora, [*plain, *dora])] == [2, 1, 1]
    largest = max(value.numel() for value in state.values())
    assert plain[0].is_light(largest) and not plain[0].is_light(largest - 1)


def test_full_differences_and_biases_are_added(a14b: Weights, tmp_path: Path) -> None:
    q, head = "blocks.1.cross_attn.q", "head.head"
    lora = pairs(a14b.shapes, [q])
    differences = {
        f"diffusion_model.{q}.diff_b": ("blocks.1.attn2.to_q.bias", 1.0),
        f"diffusion_model.{head}.diff": ("proj_out.weight", 1.0),
        f"diffusion_model.{head}.diff_b": ("proj_out.bias", 1.0),
        "diffusion_model.blocks.0.norm3.diff": ("blocks.0.norm2.weight", 1.0),
        "diffusion_model.blocks.0.norm3.diff_b": ("blocks.0.norm2.bias", 1.0),
        "diffusion_model.blocks.0.self_attn.norm_k.diff": ("blocks.0.attn1.norm_k.weight", 1.0),
        "diffusion_model.blocks.0.diff_m": ("blocks.0.scale_shift_table", 1.0),
        "diffusion_model.head.modulation.diff": ("scale_shift_table", 1.0),
        "diffusion_model.patch_embedding.diff": ("patch_embedding.weight", 1.0),
    }
    state = named(lora, "diffusion_model.{}".format, "lora_down", "lora_up", torch.float32)
    wanted = expected(a14b, (lora, 0.5))
    for seed, (key, (name, scale)) in enumerate(differences.items()):
        state[key] = torch.randn(wanted[name].shape, generator=torch.Generator().manual_seed(seed))
        wanted[name] += 0.5 * scale * state[key]
    save_file(state, tmp_path / "lora.safetensors")
    model = load(a14b)
    merge(model, a14b, [LoraFile(tmp_path / "lora.safetensors", 0.5)])
    for name, value in values(model).items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-6, atol=1e-7)


def test_a_bias_of_peft_is_scaled_like_the_product(a14b: Weights, tmp_path: Path) -> None:
    lora = pairs(a14b.shapes, ["blocks.0.self_attn.q"])
    state = named(lora, "base_model.model.{}".format, "lora_A", "lora_B")
    state["base_model.model.blocks.0.self_attn.q.lora_B.bias"] = bias = torch.ones(48)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "alpha_pattern": {}}))
    model, before = load(a14b), expected(a14b)
    merge(model, a14b, [LoraFile(tmp_path / "adapter_model.safetensors", 0.5)])
    change = values(model)["blocks.0.attn1.to_q.bias"].double() - before["blocks.0.attn1.to_q.bias"]
    torch.testing.assert_close(change, 0.5 * 6 / 2 * bias.double(), rtol=1e-6, atol=1e-6)


def test_rank_stabilised_alpha_is_divided_by_the_root_of_the_rank(a14b: Weights, tmp_path: Path) -> None:
    lora = pairs(a14b.shapes)
    plain = {layer: dataclasses.replace(pair, alpha=len(pair.down)) for layer, pair in lora.items()}
    config = json.dumps({"transformer.lora_alpha": 3, "transformer.use_rslora": True})
    state = named(plain, lambda layer: f"transformer.{diffusers_name(layer)}", "lora_A", "lora_B")
    save_file(state, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": config})
    model = load(a14b)
    merge(model, a14b, [LoraFile(tmp_path / "lora.safetensors")])
    rooted = {layer: dataclasses.replace(pair, alpha=3 * math.sqrt(len(pair.down))) for layer, pair in lora.items()}
    for name, value in expected(a14b, (rooted, 1.0)).items():
        torch.testing.assert_close(values(model)[name].double(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("style", [comfyui, lightx2v, kohya, diffusers])
def test_diffusers_fuses_to_the_same_weights(style: Any, a14b: Weights, tmp_path: Path) -> None:
    """Oracle, for the styles that it reads without loss (it silently ignores SVI's own)."""
    lora = pairs(a14b.shapes)
    if style is kohya:  # that converter needs every alpha; peft then reads ranks that differ from layer to layer
        lora = {layer: dataclasses.replace(pair, alpha=1.0) for layer, pair in lora.items()}
    style(lora, tmp_path / "lora.safetensors")
    theirs = WanTransformer3DModel(**infer_config(a14b))
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(a14b.tensors())))
    pipeline = WanPipeline(None, None, None, None, theirs)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    model = load(a14b)
    merge(model, a14b, [LoraFile(tmp_path / "lora.safetensors", 0.5)])
    fused = theirs.state_dict()
    # it scales the matrices in the file's bfloat16 before it multiplies them
    for name, value in values(model).items():
        torch.testing.assert_close(fused[name], value, rtol=1e-6, atol=1e-6)


def test_parameters_keep_their_memory(a14b: Weights, tmp_path: Path) -> None:
    """What offloading puts back after use is this memory."""
    svi(pairs(a14b.shapes), tmp_path / "lora.safetensors")
    model = load(a14b)
    parameter = model.get_parameter("blocks.0.attn1.to_q.weight")
    host, before = parameter.data, parameter.detach().clone()
    merge(model, a14b, [LoraFile(tmp_path / "lora.safetensors")])
    assert parameter is model.get_parameter("blocks.0.attn1.to_q.weight")
    assert parameter.data_ptr() == host.data_ptr()
    assert not torch.equal(host, before)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [True, False])
def test_what_runs_on_a_gpu_is_what_was_merged(offload: bool, a14b: Weights, tmp_path: Path) -> None:
    svi(pairs(a14b.shapes, EVERYWHERE), tmp_path / "lora.safetensors")
    placement, lora = Placement(torch.device("cuda"), offload), LoraFile(tmp_path / "lora.safetensors")
    model, wanted = load(a14b), load(a14b)
    before = values(model)
    merge(wanted, a14b, [lora])
    with placement.on_device(model):
        pass
    for loras, expected in (([lora], values(wanted)), ([], before)):
        merge(model, a14b, loras)
        with placement.on_device(model):
            for number in range(len(model.layers) if offload else 0):
                assert model.before_layer is not None
                model.before_layer(number)  # it comes when it is used
            torch.cuda.synchronize()
            for name, value in values(model).items():
                assert value.is_cuda
                torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-6, atol=1e-7)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_leftovers_of_wan21_are_not_counted(a14b: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = named(pairs(a14b.shapes), "diffusion_model.{}".format, "lora_down", "lora_up")
    for key in (
        *("blocks.0.cross_attn.k_img.lora_down.weight", "blocks.0.cross_attn.k_img.lora_up.weight"),
        *("blocks.0.cross_attn.v_img.diff_b", "blocks.0.cross_attn.norm_k_img.diff", "img_emb.proj.0.diff"),
    ):
        state[f"diffusion_model.{key}"] = torch.ones(7, 7)
    save_file(state, tmp_path / "lora.safetensors")
    (match,) = matches([LoraFile(tmp_path / "lora.safetensors")], a14b)
    assert (match.matched, match.total, match.unmatched) == (len(BLOCKS), len(BLOCKS), ())
    assert caplog.records == []


def test_a_text_to_video_lora_fits_but_for_its_input_channels(
    a14b: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = {**a14b.shapes, "patch_embedding.weight": (48, 16, 1, 2, 2)}
    lora = pairs(shapes, ["patch_embedding", *BLOCKS])
    svi(lora, tmp_path / "t2v.safetensors")
    with caplog.at_level(logging.WARNING):
        (match,) = matches([LoraFile(tmp_path / "t2v.safetensors")], a14b)
    assert (match.matched, match.total, match.unmatched) == (len(BLOCKS), len(BLOCKS) + 1, ("patch_embedding",))
    assert caplog.messages == [
        "t2v.safetensors: 20 of 21 layers, rank 2/4/8, strength 1.0; left out: patch_embedding",
    ]
    model = load(a14b)
    merge(model, a14b, [LoraFile(tmp_path / "t2v.safetensors")])
    del lora["patch_embedding"]
    for name, value in expected(a14b, (lora, 1.0)).items():
        torch.testing.assert_close(values(model)[name].double(), value, rtol=1e-6, atol=1e-7)


def refused(lora: Path, weights: Weights, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        matches([LoraFile(lora)], weights)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        merge(load(weights), weights, [LoraFile(lora)])


def test_a_lora_of_another_width_is_refused_by_both_widths(a14b: Weights, tmp_path: Path) -> None:
    lora = pairs({f"{layer}.weight": (64, 64) for layer in BLOCKS})
    for style in (svi, kohya):
        style(lora, tmp_path / "wide.safetensors")
        refused(tmp_path / "wide.safetensors", a14b, "is for a model of width 64, this one is 48")
    state = named(lora, "diffusion_model.{}".format, "lora_down", "lora_up")
    save_file({"diffusion_model.blocks.0.diff_m": torch.zeros(1, 6, 64), **state}, tmp_path / "wide.safetensors")
    refused(tmp_path / "wide.safetensors", a14b, "is for a model of width 64, this one is 48")


def test_a_lora_of_other_sizes_inside_is_refused(a14b: Weights, tmp_path: Path) -> None:
    shapes = {**a14b.shapes, "blocks.0.ffn.0.weight": (128, 48)}
    svi(pairs(shapes), tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", a14b, r"blocks.0.ffn.net.0.proj is \(128, 48\), here it is \(96, 48\)")


def test_a_lora_that_fits_by_less_than_half_is_refused(a14b: Weights, tmp_path: Path) -> None:
    deep = {f"blocks.{n}.self_attn.q.weight": (48, 48) for n in range(5)}
    svi(pairs(deep, [key.removesuffix(".weight") for key in deep]), tmp_path / "deep.safetensors")
    refused(tmp_path / "deep.safetensors", a14b, "only 2 of its 5 layers are in this one, not blocks.2.self_attn.q, ")


def write(**tensors: Tensor) -> Callable[[Path], None]:
    return lambda file: save_file({key.replace("__", "."): value.clone() for key, value in tensors.items()}, file)


Q = "blocks__0__self_attn__q"
A, B = torch.zeros(2, 48), torch.zeros(48, 2)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (write(double_blocks__0__qkv__lora_A__weight=A, double_blocks__0__qkv__lora_B__weight=B), "no layer of this"),
        (write(), "holds no LoRA for any layer"),
        (write(blocks__0__cross_attn__k_img__diff_b=A[0]), "holds no LoRA for any layer"),
        (write(**{f"{Q}__weight": A}), "is no LoRA that can be merged, it holds blocks.0.self_attn.q.weight;"),
        (write(**{f"{Q}__lokr_w1": A, f"{Q}__on_input": A, f"{Q}__hada_t3": A}), "holds .*hada_t3 and 1 more like it;"),
        (write(**{f"{Q}__lokr_w1": A, f"{Q}__lokr_t2": A}), "holds one half of blocks.0.self_attn.q only"),
        (write(**{f"{Q}__lora_mid__weight": A}), "holds one half of blocks.0.self_attn.q only"),
        (
            write(**{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B, f"{Q}__lora_mid__weight": B}),
            "two halves of blocks.0.self_attn.q are",
        ),
        (write(**{f"{Q}__lokr_w1": A, f"{Q}__lokr_w2": torch.zeros(24, 2)}), r"its .*to_q is \(48, 96\), here"),
        (write(**{f"{Q}__lokr_w1": A}), "holds one half of blocks.0.self_attn.q only"),
        (write(**{f"{Q}__lokr_w1": A[0], f"{Q}__lokr_w2": A}), "two halves of blocks.0.self_attn.q are"),
        (write(**{f"{Q}__hada_w1_a": B, f"{Q}__hada_w1_b": A, f"{Q}__hada_w2_a": B}), "holds one half of blocks.0"),
        (write(**{f"{Q}__dora_scale": B}), "holds one half of blocks.0.self_attn.q only"),
        (
            write(**{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B, f"{Q}__dora_scale": B}),
            r"the magnitude of blocks.0.attn1.to_q is \(48, 2\)",
        ),
        (
            write(
                **{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B},
                **{f"{Q}__lokr_w1": torch.zeros(2, 2), f"{Q}__lokr_w2": torch.zeros(24, 24)},
            ),
            "holds blocks.0.self_attn.q in two forms",
        ),
        (write(**{f"{Q}__lora_A__weight": A}), "holds one half of blocks.0.self_attn.q only"),
        (write(**{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B[:, :1]}), "two halves of blocks.0.self_attn.q"),
        (
            write(**{f"{Q}__lora_A__weight": A, f"{Q}__lora_down__weight": A, f"{Q}__lora_B__weight": B}),
            "holds blocks.0.self_attn.q twice, as blocks.0.self_attn.q.lora_A.weight and",
        ),
        (
            write(
                **{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B},
                lora_unet_blocks_0_self_attn_q__lora_up__weight=B,
                lora_unet_blocks_0_self_attn_q__lora_down__weight=A,
            ),
            "holds blocks_0_self_attn_q twice, under two names",
        ),
        (
            write(**{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B, f"{Q}__alpha": A}),
            "no alpha that can be read",
        ),
        (
            write(**{f"{Q}__lora_A__weight": A[:0], f"{Q}__lora_B__weight": B[:, :0]}),
            "is damaged: blocks.0.self_attn.q is empty",
        ),
        (write(**{f"{Q}__diff_b": A[0, :0]}), "is damaged: blocks.0.self_attn.q is empty"),
        (
            write(**{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B.to(torch.int8)}),
            r"holds blocks.0.self_attn.q in I8 numbers; give one in bf16",
        ),
        (  # powers of two, without a sign
            write(**{f"{Q}__lora_A__weight": A, f"{Q}__lora_B__weight": B.to(torch.float8_e8m0fnu)}),
            r"holds blocks.0.self_attn.q in F8_E8M0 numbers; give one in bf16",
        ),
        (lambda file: file.write_bytes(b""), "cannot be read, it may be truncated"),
        (lambda file: file.write_bytes(b"<!DOCTYPE html>" * 9), "is a web page that was saved under this name"),
        (lambda file: file.mkdir(), "is a folder; name the .safetensors file in it"),
        (lambda file: None, "does not exist"),
    ],
)
def test_a_file_that_is_no_lora_for_this_model_is_refused(
    contents: Callable[[Path], None], message: str, a14b: Weights, tmp_path: Path
) -> None:
    contents(tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", a14b, message)


@pytest.mark.parametrize(
    ("shapes", "fit"),
    [
        # a LoRA's B @ A, of a linear layer and of a convolution whose kernel is in either half
        ({"up": (8, 2), "down": (2, 6)}, True),
        ({"up": (8, 3), "down": (2, 6)}, False),
        ({"up": (8, 2, 1, 1), "down": (2, 6, 3, 3)}, True),
        ({"up": (8, 2), "down": (2, 6, 3, 3)}, False),
        # with a core between them (Tucker)
        ({"up": (8, 2, 1, 1), "down": (3, 6, 1, 1), "mid": (2, 3, 3, 3)}, True),
        ({"up": (8, 2), "down": (3, 6), "mid": (2, 3, 3, 3)}, True),
        ({"up": (8, 2), "down": (3, 6), "mid": (3, 2, 3, 3)}, False),
        ({"up": (8, 2), "down": (3, 6), "mid": (2,)}, False),
        # LoHa: two products, or cores with matrices that lie the other way round
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}, True),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 3), "hada_w2_b": (2, 6)}, False),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 6, 3, 3), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6, 3, 3)}, True),
        ({"hada_w1_a": (), "hada_w1_b": (1, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}, False),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}, False),
        ({"hada_t1": (2, 3, 3, 3), "hada_w1_a": (2, 8), "hada_w1_b": (3, 6)}, True),
        ({"hada_t1": (2, 3, 3, 3), "hada_w1_a": (8, 2), "hada_w1_b": (3, 6)}, False),
        ({"hada_t1": (2, 3, 3, 3), "hada_w1_a": (2, 8), "hada_w1_b": (6, 3)}, False),
        ({"hada_t1": (2, 3, 3, 3), "hada_w1_a": (2, 8, 1), "hada_w1_b": (3, 6, 1)}, False),
        ({"hada_t1": (2, 3, 3, 3), "hada_w1_a": (2, 8), "hada_w1_b": (3, 6, 1)}, False),
        # LoKr: factors that are whole, or products of their own
        ({"lokr_w1": (2, 2), "lokr_w2": (4, 3)}, True),
        ({"lokr_w1": (2,), "lokr_w2": (4, 3)}, False),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3)}, True),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 3)}, False),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2": (4, 3, 3, 3)}, True),
        ({"lokr_w1_a": (2, 2), "lokr_w1_b": (1, 2), "lokr_w2": (4, 3)}, False),
        ({"lokr_w1": (2, 2), "lokr_t2": (2, 3, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (3, 3)}, True),
        ({"lokr_w1": (2, 2), "lokr_t2": (3, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (3, 3)}, False),
    ],
)
def test_factors_of_a_layer_fit_where_they_can_be_multiplied(shapes: dict[str, tuple[int, ...]], fit: bool) -> None:
    file = Weights(Path("x"), (), shapes, {})
    assert lora_file_module._halves_fit(file, {role: role for role in shapes}) == fit


def test_a_truncated_file_is_refused(a14b: Weights, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    svi(pairs(a14b.shapes), file)
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, a14b, "cannot be read, it may be truncated or damaged; download it again")


@pytest.mark.parametrize("name", ["lora.pt", "lora.ckpt", "lora.bin"])
def test_a_pickle_is_refused_unopened_with_advice(name: str, a14b: Weights, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    refused(tmp_path / name, a14b, r"is no \.safetensors file; .* convert it")


def test_a_header_that_is_damaged_is_refused(a14b: Weights, tmp_path: Path) -> None:
    state = named(pairs(a14b.shapes), str, "lora_A", "lora_B")
    for header in ("{", "[]", '{"transformer.lora_alpha": "much"}', '{"transformer.alpha_pattern": {"(": 1}}'):
        save_file(state, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": header})
        refused(tmp_path / "lora.safetensors", a14b, "(the header of |alpha that can)")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("SVI_v2_PRO_Wan2.2-I2V-A14B_HIGH_lora_rank_128_fp16", "high"),
        ("SVI_Wan2.2-I2V-A14B_low_noise_lora_v2.0_pro", "low"),
        ("wan22-style-lownoise", "low"),
        ("Wan2.2-HighNoise", "high"),
        ("low-high-both", None),
        ("slow_flow_highway", None),
        ("low_poly_style_v2", None),
        ("high-kick", None),
        ("Wan_2_2_I2V_A14B_HIGH_lightx2v_4step_lora_260412_rank_64", "high"),
        ("style_low_000002500", "low"),
        ("wan-high", "high"),
    ],
)
def test_a_file_is_for_the_expert_that_its_name_says(
    name: str, named: str | None, checkpoints: dict[str, Weights], tmp_path: Path
) -> None:
    file = tmp_path / f"{name}.safetensors"
    svi(pairs(checkpoints["A14B"].shapes), file)
    for expert, weights in (("high", checkpoints["A14B"]), ("low", checkpoints["low noise"])):
        if named in (None, expert):
            assert matches([LoraFile(file)], weights)[0].matched == len(BLOCKS)
        else:
            refused(file, weights, f"is for the {named}-noise expert by its name.* lora_{named}")
    assert matches([LoraFile(file)], checkpoints["5B"])[0].matched == len(BLOCKS)


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_half_way_is_put_right_by_the_next_merge(
    number: int, a14b: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.denoiser.lora._workers", lambda *_: number)
    lora = pairs(a14b.shapes)
    svi(lora, tmp_path / "good.safetensors")
    broken = dataclasses.replace(lora[BLOCKS[-1]], up=lora[BLOCKS[-1]].up * math.nan)
    svi({**lora, BLOCKS[-1]: broken}, tmp_path / "nan.safetensors")
    model = load(a14b)
    before = values(model)
    with pytest.raises(UserError, match="makes blocks.1.ffn.net.2.weight infinite or NaN"):
        merge(model, a14b, [LoraFile(tmp_path / "nan.safetensors")])
    assert not same(values(model), before)
    merge(model, a14b, [])
    assert same(values(model), before)


def test_after_an_error_nothing_more_is_shared_out() -> None:
    begun: list[str] = []

    def work(item: tuple[str, Any]) -> None:
        begun.append(item[0])
        if item[0] == "3":
            raise UserError("the fourth")
        time.sleep(0.001)

    with pytest.raises(UserError, match="the fourth"):
        _share_out(((str(number), torch.zeros(1)) for number in range(500)), [work, work])
    assert "3" in begun and len(begun) < 100


# --- what the user types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir:1/a.safetensors:-.5", "dir:1/a.safetensors", -0.5),
        ("c:\\a.safetensors", "c:\\a.safetensors", 1.0),
        ("a:2:1e-1", "a:2", 0.1),
        ("a.safetensors:", "a.safetensors:", 1.0),
        ("a:1_0", "a:1_0", 1.0),
        ("~/a.safetensors:2", str(Path.home() / "a.safetensors"), 2.0),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_strength(text: str, path: str, strength: float) -> None:
    assert LoraFile.parse(text) == LoraFile(Path(path), strength)


@pytest.mark.parametrize("text", ["", ":1", "a:nan", "a:-inf", "a:Infinity", "a:1e999"])
def test_a_strength_without_a_file_or_without_a_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="names no LoRA file|must be from -1000 to 1000"):
        LoraFile.parse(text)


def test_the_record_of_a_lora_changes_with_its_contents(a14b: Weights, tmp_path: Path) -> None:
    lora = LoraFile(tmp_path / "lora.safetensors", 0.5)
    svi(pairs(a14b.shapes), lora.path)
    before = lora.as_json()
    assert before == {"file": lora.path.name, "digest": sampled_digest(lora.path), "strength": 0.5}
    svi(pairs(a14b.shapes, seed=1), lora.path)
    assert LoraFile(lora.path, 0.5).as_json()["digest"] != before["digest"]


def test_the_record_is_of_the_file_that_was_merged(a14b: Weights, tmp_path: Path) -> None:
    """Also when it is gone before the clip is done."""
    lora = LoraFile(tmp_path / "lora.safetensors")
    svi(pairs(a14b.shapes), lora.path)
    digest = sampled_digest(lora.path)
    (match,) = matches([lora], a14b)
    merge(load(a14b), a14b, [lora])
    lora.path.unlink()
    assert match.as_json() == lora.as_json() | {"matched": len(BLOCKS), "total": len(BLOCKS)}
    assert lora.as_json()["digest"] == digest
