"""Prompts and pixels -> what the denoisers take, and latents -> pixels, by one process or by all of a team."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from wan.device.parallel import Group, Team
from wan.device.placement import Placement
from wan.text.umt5 import TextEncoder
from wan.types import TextContext

if TYPE_CHECKING:
    from wan.vae.vae import WanVAE

Value = TypeVar("Value")


class PromptEmbeddings:
    """Prompts encoded once for as long as they repeat, as a chain's and the negative one do.

    `load` gives the encoder, which runs on `encoder_device`; embeddings are handed out on `device`.
    """

    def __init__(self, load: Callable[[], TextEncoder], encoder_device: torch.device, device: torch.device) -> None:
        self.load, self.encoder_device, self.device = load, encoder_device, device
        self._encoded: dict[str, Tensor] = {}  # [1, 512, D] by text

    def context(self, positive: str, negative: str, placement: Placement) -> TextContext:
        """Both prompts, encoded."""
        texts = (positive, negative)
        if new := [text for text in dict.fromkeys(texts) if text not in self._encoded]:
            with placement.on_device(self.load(), self.encoder_device) as encode:
                self._encoded |= {text: encode(text) for text in new}
        self._encoded = {text: self._encoded[text] for text in texts}
        return TextContext(self._encoded[positive].to(self.device), self._encoded[negative].to(self.device))

    def clear(self) -> None:
        """Forget all of them."""
        self._encoded = {}


@dataclass(frozen=True)
class _Pixels:
    """That pixels of this shape are encoded next."""

    shape: torch.Size


@dataclass(frozen=True)
class SharedVae:
    """A VAE that all processes of a team run together, on the first one's pixels."""

    load: Callable[[], WanVAE]
    device: torch.device
    team: Team

    def encode(self, frames: Tensor, placement: Placement) -> Tensor:
        """In the first process: pixels [3, T, H, W] in [-1, 1] -> normalised latents [z, F, h, w] on the device."""
        self.team.tell(_Pixels(frames.shape))
        return self._encode(frames.to(self.device, torch.float32).contiguous(), placement)

    def share(self, make: Callable[[], Value], placement: Placement) -> Value:
        """What the first process makes, in all; they encode together what it encodes for that."""
        if self.team.is_first:
            return self.team.share(make)
        while isinstance(heard := self.team.hear(self.device), _Pixels):
            self._encode(torch.empty(heard.shape, device=self.device), placement)
        value: Value = heard
        return value

    def _encode(self, frames: Tensor, placement: Placement) -> Tensor:
        self.team.send(frames)
        with placement.on_device(vae := self.load()):
            return vae.encode([frames], group=self.team.all_)[0]

    def decode(self, latents: Tensor, placement: Placement, group: Group | None) -> Tensor:
        """Latents [z, F, h, w] -> pixels [3, T, H, W] in host memory, in the first process of a `group`."""
        with placement.on_device(vae := self.load()):
            return vae.decode([latents.to(self.device)], home=torch.device("cpu"), group=group)[0]
