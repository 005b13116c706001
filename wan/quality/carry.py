"""Colours of the first clip of a shot, and how far a later one may be led back to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_LEVELS = 6 / 255  # of the range: by how much luma and the two colour axes may move
MOST_GAIN = 0.06  # by which contrast and saturation may grow or shrink
_GREY = 1e-3  # a deviation, in shares of the range, below which there is nothing to compare
# R, G, B -> luma as in BT.709 and the two differences from it
_TO_AXES = torch.tensor([[0.2126, 0.7152, 0.0722], [-0.2126, -0.7152, 0.9278], [0.7874, -0.7152, -0.0722]])
_FROM_AXES = torch.linalg.inv(_TO_AXES)


def measure_colours(frames: Tensor) -> Tensor:
    """Frames [n, H, W, 3] in [-1, 1] -> float32 [5], in shares of the range: the means of luma and of B and R less
    luma, the deviation of luma, and that of the other two."""
    # in one order whatever the layout, so that the same frames have the same colours to the last bit
    unit = (frames.contiguous().reshape(-1, 3).double().cpu() + 1) / 2
    axes = unit @ _TO_AXES.T.double()
    means = axes.mean(dim=0)
    spread = (axes - means).square().mean(dim=0)
    return torch.stack([*means, spread[0].sqrt(), spread[1:].mean().sqrt()]).float()


@dataclass(frozen=True)
class Grade:
    """A change of colours: `offset` [3] of luma and of B and R less luma, `contrast` around `middle`, `saturation`."""

    middle: float
    offset: Tensor
    contrast: float
    saturation: float

    @classmethod
    def towards(cls, wanted: Tensor, now: Tensor, strength: float) -> Grade:
        """By `strength` in [0, 1] of the way from what `measure_colours` says is there now to what is wanted.

        No further than `MOST_LEVELS` and `MOST_GAIN`: what is further away is another scene, not a drift.
        """

        def gain(index: int) -> float:
            if min(float(wanted[index]), float(now[index])) < _GREY:
                return 1.0
            return min(max(float(wanted[index] / now[index]), 1 - MOST_GAIN), 1 + MOST_GAIN)

        contrast, saturation = gain(3), gain(4)
        # saturation grows from grey, so it moves the means of the colours as well
        offset = wanted[:3] - now[:3] * torch.tensor([1, saturation, saturation])
        return cls(
            float(now[0]),
            offset.clamp(-MOST_LEVELS, MOST_LEVELS) * strength,
            1 + (contrast - 1) * strength,
            1 + (saturation - 1) * strength,
        )

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing."""
        return self.contrast == self.saturation == 1 and not bool(self.offset.any())

    def __call__(self, frame: Tensor) -> Tensor:
        """A frame [3, H, W] in [-1, 1] with this change; what that pushes out of the range is clamped."""
        axes = torch.einsum("ac,chw->ahw", _TO_AXES.to(frame.device), (frame.float() + 1) / 2)
        offset = self.offset.to(frame.device)[:, None]
        luma = (axes[:1] - self.middle) * self.contrast + self.middle
        moved = torch.cat([luma, axes[1:] * self.saturation]) + offset[:, None]
        return torch.einsum("ca,ahw->chw", _FROM_AXES.to(frame.device), moved).clamp(0, 1) * 2 - 1
