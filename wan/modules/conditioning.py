"""How known frames steer the model: the only thing in which A14B, 5B and text-only sampling differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Condition(Protocol):
    """What the loop asks before and after the model."""

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [z, F, h, w] and a scalar timestep -> latents [1, C, F, h, w] and timestep [1] or [1, L]."""

    def finish(self, latents: Tensor) -> Tensor:
        """The final latents [z, F, h, w] with what is known put back."""


@dataclass(frozen=True)
class TextOnly:
    """Nothing is known but the prompt."""

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return latents[None], t[None]

    def finish(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class ImageChannels:
    """A14B: mask and image latents as extra input channels.

    `channels` float32 [4 + z, F, h, w]: the mask (1 where a frame is known), then the latents of the known frames
    followed by grey ones.
    """

    channels: Tensor

    @classmethod
    def from_latents(cls, image_latents: Tensor, known_frames: int = 1) -> ImageChannels:
        """Image latents [z, F, h, w] of `known_frames` leading pixel frames (4n+1) and grey ones.

        Channel c of latent frame j > 0 is the flag of pixel frame 4(j-1)+1+c, and all four of latent frame 0 that of
        pixel frame 0 (source: the official image-to-video code, which knows one frame).
        """
        mask = torch.zeros_like(image_latents[:1]).repeat(4, 1, 1, 1)
        mask[:, : 1 + (known_frames - 1) // 4] = 1
        return cls(torch.cat([mask, image_latents]))

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([latents, self.channels])[None], t[None]

    def finish(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class KnownLatents:
    """5B: leading latent frames are known, and their tokens are given timestep 0.

    `known` float32 [z, K, h, w] with K <= F; `patch_size` is the model's.
    """

    known: Tensor
    patch_size: tuple[int, int, int] = (1, 2, 2)

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        placed = self.finish(latents)
        frames, height, width = (size // patch for size, patch in zip(placed.shape[1:], self.patch_size, strict=True))
        steps = t.to(torch.float32).expand(frames).clone()  # float32 as in the official code: mask * t
        steps[: self.known.shape[1]] = 0
        return placed[None], steps.repeat_interleave(height * width)[None]

    def finish(self, latents: Tensor) -> Tensor:
        return torch.cat([self.known, latents[:, self.known.shape[1] :]], dim=1)
