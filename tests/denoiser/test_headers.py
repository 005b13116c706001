"""What headers tell of a denoiser: the names of its parameters, against the library's own table, and their shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from tests.support.golden import GOLDEN
from wan.denoiser.headers import in_model, infer_config, key_map, parameters
from wan.denoiser.model import WanModel
from wan.errors import UserError
from wan.weights.tensors import Shape, Weights, open_safetensors


@pytest.mark.parametrize("part", ["5b/ckpt", "14b/ckpt/high_noise_model"])
def test_they_are_those_of_the_library(part: str) -> None:
    weights = open_safetensors(GOLDEN / part, "diffusion_pytorch_model")
    assert "blocks.0.self_attn.q.weight" in weights.shapes  # official names
    expected = convert_wan_transformer_to_diffusers({key: key for key in weights.shapes})
    assert key_map(weights) == expected
    for name in expected:  # what has them already
        assert name.startswith("blocks") or in_model(name) == name


@pytest.mark.parametrize("part", ["5b/ckpt", "14b/ckpt/high_noise_model"])
@pytest.mark.parametrize("changed", [{}, {"cross_attn_norm": False, "num_layers": 1}, {"patch_size": (2, 1, 4)}])
def test_parameters_have_the_shapes_that_the_model_gives_them(part: str, changed: dict[str, Any]) -> None:
    config = infer_config(open_safetensors(GOLDEN / part, "diffusion_pytorch_model")) | changed
    with torch.device("meta"):
        model = WanModel(**config)
    assert parameters(config) == {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("eps", [0, 1, -1e-6, True, "1e-6", None, 2])
def test_an_eps_that_is_none_is_refused(eps: Any) -> None:
    weights = open_safetensors(GOLDEN / "5b/ckpt", "diffusion_pytorch_model")
    with pytest.raises(UserError, match="expected eps between 0 and 1"):
        infer_config(dataclasses.replace(weights, config={**weights.config, "eps": eps}))


def of_a_width(dim: int, blocks: int, **config: Any) -> Weights:
    """The headers that sizes are told from, with patches of 1 x 2 x 2."""
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (dim, 36, 1, 2, 2),
        "text_embedding.0.weight": (dim, 4096),
        "time_embedding.0.weight": (dim, 256),
        "head.head.weight": (64, dim),
        "blocks.0.ffn.0.weight": (7 * dim, dim),
        **{f"blocks.{number}.self_attn.q.weight": (dim, dim) for number in range(blocks)},
    }
    return Weights(Path("dit"), (), shapes, {"num_heads": dim // 128} | config)


@pytest.mark.parametrize(("dim", "blocks"), [(1536, 30), (3072, 30), (5120, 40), (1024, 3)])
def test_sizes_are_told_from_shapes(dim: int, blocks: int) -> None:
    assert infer_config(of_a_width(dim, blocks)) == {
        "patch_size": (1, 2, 2),
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 7 * dim,
        "num_attention_heads": dim // 128,
        "attention_head_dim": 128,
        "num_layers": blocks,
        "cross_attn_norm": False,
        "eps": 1e-6,
    }
    if dim != 1024:  # no released model has that width, so its blocks may be any number
        with pytest.raises(UserError, match=f"dit has {blocks - 1} blocks, and models of its width have {blocks}; "):
            infer_config(of_a_width(dim, blocks - 1))


def test_a_config_says_more_than_the_width() -> None:
    assert infer_config(of_a_width(1536, 2, num_layers=2, eps=0.5))["num_layers"] == 2
    assert infer_config(of_a_width(1536, 2, num_layers=2, eps=0.5))["eps"] == 0.5
    with pytest.raises(UserError, match="dit has 30 blocks, and its config.json says 31; download it again"):
        infer_config(of_a_width(1536, 30, num_layers=31))


@pytest.mark.parametrize("heads", [0, -2, 5, True, 2.0, "2", None, 1024])
def test_heads_that_do_not_divide_the_width_into_pairs_are_refused(heads: Any) -> None:
    with pytest.raises(UserError, match="expected num_heads that divide the width 1024 into even parts, found"):
        infer_config(of_a_width(1024, 2, num_heads=heads))
    for fitting in (1, 2, 512):
        config = infer_config(of_a_width(1024, 2, num_heads=fitting))
        assert (config["num_attention_heads"], config["attention_head_dim"]) == (fitting, 1024 // fitting)
    assert infer_config(of_a_width(1024, 2, num_heads=4, num_attention_heads=8))["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("patch_embedding.weight", (1024, 36, 2, 2), r"its patch_embedding.weight is \[1024, 36, 2, 2\]"),
        ("patch_embedding.weight", (1024, 36, 1, 0, 2), r"its patch_embedding.weight is \[1024, 36, 1, 0, 2\]"),
        ("patch_embedding.weight", (0, 36, 1, 2, 2), r"its patch_embedding.weight is \[0, 36, 1, 2, 2\]"),
        ("head.head.weight", None, "it has no head.head.weight"),
        ("text_embedding.0.weight", (1024,), "a weight of it is a single number"),
    ],
)
def test_what_is_no_denoiser_is_refused(name: str, shape: Any, message: str) -> None:
    weights = of_a_width(1024, 2)
    shapes = {key: one for key, one in {**weights.shapes, name: shape}.items() if one is not None}
    with pytest.raises(UserError, match=f"dit is no Wan2.2 denoiser: {message}"):
        infer_config(dataclasses.replace(weights, shapes=shapes))
