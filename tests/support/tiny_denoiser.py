"""A denoiser of three small layers with random weights, and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wan.denoiser.model import WanModel

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 96,
    "num_layers": 3,
}
LATENT = (4, 3, 8, 8)  # z, F, h, w: 16 tokens a latent frame


def build(channels: int = 4, dtype: torch.dtype = torch.float32, **sizes: Any) -> WanModel:
    torch.manual_seed(5)
    model = WanModel(in_channels=channels, **SIZES | sizes)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name != "scale_shift_table":
            torch.nn.init.normal_(parameter, std=0.15)
    model.condition_embedder.text_embedder.to(dtype)
    model.blocks.to(dtype)
    for block in model.blocks:
        block.scale_shift_table.data = block.scale_shift_table.float()
        block.norm2.float()
    model.eval()
    return model


def prompt(seed: int) -> Tensor:
    return torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(seed))


def noise(seed: int = 0) -> Tensor:
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(seed))
