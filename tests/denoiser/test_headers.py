"""What headers tell of a denoiser: the names of its parameters, against the library's own table, and their shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from tests.support.golden import GOLDEN
from wan.denoiser.headers import in_model, infer_config, key_map, parameters
from wan.denoiser.model import WanModel
from wan.errors import UserError
from wan.weights.tensors import open_safetensors


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
