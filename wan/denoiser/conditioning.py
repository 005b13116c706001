"""How known frames steer the model: the only thing in which A14B, 5B and text-only sampling differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wan.types import is_finite


class Condition(Protocol):
    """What the loop asks before and after the model."""

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [z, F, h, w] and a scalar timestep -> latents [1, C, F, h, w] and timestep [1] or [1, F]."""

    def finish(self, latents: Tensor) -> Tensor:
        """The final latents [z, F, h, w] with what is known put back."""

    @property
    def is_finite(self) -> bool:
        """Whether what is known holds no NaN or infinity."""


@dataclass(frozen=True)
class TextOnly:
    """Nothing is known but the prompt."""

    is_finite = True

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

    @property
    def is_finite(self) -> bool:
        return is_finite(self.channels)

    @classmethod
    def from_latents(
        cls, image_latents: Tensor, known_frames: int = 1, *, end: bool = False, amplitude: float = 1.0
    ) -> ImageChannels:
        """Image latents [z, F, h, w] of `known_frames` leading pixel frames (4n+1), grey ones, and at the `end` one.

        Channel c of latent frame j > 0 is the flag of pixel frame 4(j-1)+1+c, and all four of latent frame 0 that of
        pixel frame 0 (source: the official image-to-video code, which knows one frame). `amplitude`: see `amplified`.
        """
        mask = torch.zeros_like(image_latents[:1]).repeat(4, 1, 1, 1)
        mask[:, : latent_frames(known_frames)] = 1
        if end:
            mask[3, -1] = 1
        free = slice(latent_frames(known_frames), -1 if end else None)
        return cls(torch.cat([mask, amplified(image_latents, free, amplitude)]))

    @classmethod
    def from_anchor(cls, anchor: Tensor, motion: Tensor, frames: int, end: Tensor | None = None) -> ImageChannels:
        """Stable Video Infinity 2.0 Pro: the anchor's latent frame [z, 1, h, w], the motion's [z, M, h, w], then zeros.

        `frames` is F. The zeros are literal, not the latents of grey pixels, and only latent frame 0 is marked as
        known: the LoRA that is trained for this reads the motion by its position. The LoRA was not trained with an
        `end` [z, 1, h, w]: it takes the last latent frame, which is marked as known in all four channels (source:
        ComfyUI-Wan-SVI2Pro-FLF).
        """
        rest = anchor.new_zeros(anchor.shape[0], frames - 1 - motion.shape[1], *anchor.shape[2:])
        if end is not None:
            rest = torch.cat([rest[:, 1:], end], dim=1)
        condition = cls.from_latents(torch.cat([anchor, motion, rest], dim=1))
        if end is not None:
            condition.channels[:4, -1] = 1
        return condition

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([latents, self.channels])[None], t[None]

    def finish(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class HeldImageChannels(ImageChannels):
    """A14B with several known frames: their latents are also held to what they are while the rest is sampled.

    `known` float32 [z, K, h, w], `noise` [z, F, h, w] the clip's initial noise. At timestep t the model sees the known
    latents at the noise level of all others, (1 - sigma) known + sigma noise, as it did in training; what comes out
    is the known latents themselves.
    """

    known: Tensor
    noise: Tensor
    train_timesteps: int = 1000

    @classmethod
    def hold(cls, channels: ImageChannels, known: Tensor, noise: Tensor, train_timesteps: int) -> HeldImageChannels:
        """`channels`, and hold the leading latents `known`."""
        return cls(channels.channels, known, noise, train_timesteps)

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.to(torch.float32) / self.train_timesteps
        held = (1 - sigma) * self.known + sigma * self.noise[:, : self.known.shape[1]]
        return super().model_input(_with_leading(held, latents), t)

    def finish(self, latents: Tensor) -> Tensor:
        return _with_leading(self.known, latents)


@dataclass(frozen=True)
class KnownLatents:
    """5B: leading latent frames, and the last one where there is an `end`, are known, and they are given timestep 0.

    `known` float32 [z, K, h, w] with K <= F, `end` [z, 1, h, w]. A token of the model is one latent frame deep.
    """

    known: Tensor
    end: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        return is_finite(self.known) and (self.end is None or is_finite(self.end))

    def model_input(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        placed = self.finish(latents)
        steps = t.to(torch.float32).repeat(placed.shape[1])  # float32 as in the official code: mask * t
        steps[: self.known.shape[1]] = 0
        if self.end is not None:
            steps[-1] = 0
        return placed[None], steps[None]

    def finish(self, latents: Tensor) -> Tensor:
        placed = _with_leading(self.known, latents)
        return placed if self.end is None else torch.cat([placed[:, :-1], self.end], dim=1)


def latent_frames(frames: int) -> int:
    """Latent frames of so many pixel frames (4n+1)."""
    return (frames - 1) // 4 + 1


def amplified(latents: Tensor, free: slice, amplitude: float) -> Tensor:
    """Image latents [z, F, h, w] whose `free` frames lie `amplitude` times as far from the first; 1 changes nothing.

    The mean of each frame's distance, over channels and space, stays, so that the picture does not get lighter or
    darker as a whole. What is far from what the VAE makes is clamped (source: ComfyUI's PainterI2V, which answers
    step-distilled LoRAs that make slow motion).
    """
    if amplitude == 1:
        return latents
    first, rest = latents[:, :1], latents[:, free]
    away = rest - first
    mean = away.mean(dim=(0, 2, 3), keepdim=True)
    moved = latents.clone()
    moved[:, free] = (first + (away - mean) * amplitude + mean).clamp(-6, 6)
    return moved


def carried(latents: Tensor, plain: Tensor, graded: Tensor) -> Tensor:
    """Known latents [z, K, h, w] led to other colours: by what a change of colours does to them, smoothed in space.

    `plain` and `graded` [z, K, h, w] are those of the same frames, encoded as they are and with the change: what
    encoding itself costs is in both and drops out. The first known frame stays, and the change grows smoothly to the
    last one, which the new frames follow (source: H3's latent colour carry).
    """
    change = torch.nn.functional.pad((graded - plain).transpose(0, 1), (1, 1, 1, 1), mode="replicate")
    smooth = torch.nn.functional.avg_pool2d(change, 3, stride=1).transpose(0, 1)
    count = latents.shape[1]
    share = torch.linspace(0, 1, count) if count > 1 else torch.ones(1)
    weight = (share * share * (3 - 2 * share)).to(latents)[None, :, None, None]
    return latents + weight * smooth


def _with_leading(known: Tensor, latents: Tensor) -> Tensor:
    return torch.cat([known, latents[:, known.shape[1] :]], dim=1)
