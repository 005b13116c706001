"""A Wan VAE on whole clips at once, for training.

The library's class goes through a clip in pieces of four frames and hands convolution states from one to the next.
The network is causal, so one pass over all frames gives the same numbers with a fifth of the launches, and can be
captured as a CUDA graph. Only the changes of the frame rate differ: the first frame is left out of both.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock, patchify, unpatchify
from torch import Tensor, nn


class WholeClip(nn.Module):
    """The VAE given to it, changed in place: its own `encode` and `decode` cannot be used any more."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae
        self.patch = vae.config.patch_size or 1
        for module in vae.modules():
            if isinstance(module, WanResample):
                module.forward = MethodType(_resample, module)
            elif isinstance(module, WanResidualBlock):
                module.forward = MethodType(_residual, module)

    def channels_last(self) -> None:
        """Lay the convolutions' weights out as the fast kernels of a GPU want them; activations follow."""
        for parameter in self.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1], T = 4n+1 -> the mode of the latents [B, z, F, h, w], not normalised."""
        moments = self.vae.quant_conv(self.vae.encoder(patchify(pixels, self.patch)))
        latents: Tensor = moments.chunk(2, dim=1)[0]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, F, h, w], not normalised -> pixels [B, 3, T, H, W], not clamped."""
        pixels: Tensor = unpatchify(self.vae.decoder(self.vae.post_quant_conv(latents), first_chunk=True), self.patch)
        return pixels


def normalise_and_activate(x: Tensor, gamma: Tensor) -> Tensor:
    """The library's RMS norm over channels, then SiLU; compiled on a GPU it is one kernel instead of ten."""
    y = x.float()
    y = y * y.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt() * (x.shape[1] ** 0.5)
    return F.silu(y * gamma).to(x.dtype)


_activate = normalise_and_activate


def compile_pointwise(dynamic: bool = False) -> None:
    """From here on the norms of all `WholeClip`s are compiled, for each size or once for any."""
    global _activate
    torch._dynamo.config.recompile_limit = 64  # one for each width and size in the network
    _activate = torch.compile(normalise_and_activate, dynamic=dynamic)


def _residual(self: Any, x: Tensor, **_: Any) -> Tensor:
    inner = self.conv1(_activate(x, self.norm1.gamma))
    outer: Tensor = self.conv2(_activate(inner, self.norm2.gamma)) + self.conv_shortcut(x)
    return outer


def _resample(self: Any, x: Tensor, **_: Any) -> Tensor:
    if self.mode == "upsample3d":
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            doubled = self.time_conv(rest).unflatten(1, (2, -1))  # [B, 2, C, F, h, w]
            rest = doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([first, rest], dim=2)
    batch, frames = x.shape[0], x.shape[2]
    pictures = x.transpose(1, 2).flatten(0, 1)
    if self.mode.startswith("upsample"):
        pictures = self.resample[1](F.interpolate(pictures, scale_factor=2.0, mode="nearest"))
    else:
        pictures = self.resample(pictures)
    x = pictures.unflatten(0, (batch, frames)).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x
