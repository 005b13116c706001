"""The names of the denoiser's parameters, against the library's own table."""

from __future__ import annotations

import pytest
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from tests.support.golden import GOLDEN
from wan.denoiser.headers import in_model, key_map
from wan.weights.tensors import open_safetensors


@pytest.mark.parametrize("part", ["5b/ckpt", "14b/ckpt/high_noise_model"])
def test_they_are_those_of_the_library(part: str) -> None:
    weights = open_safetensors(GOLDEN / part, "diffusion_pytorch_model")
    assert "blocks.0.self_attn.q.weight" in weights.shapes  # official names
    expected = convert_wan_transformer_to_diffusers({key: key for key in weights.shapes})
    assert key_map(weights) == expected
    for name in expected:  # what has them already
        assert name.startswith("blocks") or in_model(name) == name
