"""A clip through the VAE in bands of rows, one on each of several GPUs, with the numbers of one.

Before each convolution over places a rank gets the rows beside its band from its neighbours. The attention in the
middle takes the whole picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.device.parallel import Group


@dataclass(frozen=True)
class Band:
    """This rank's rows, out of `rows` of the latents; a picture may have a multiple of them."""

    group: Group
    rows: int

    @property
    def counts(self) -> list[int]:
        """Rows of the latents of each rank."""
        each, more = divmod(self.rows, self.group.size)
        return [each + (rank < more) for rank in range(self.group.size)]

    def mine(self, x: Tensor) -> Tensor:
        """[..., H, W] -> [..., H of this band, W]."""
        times, index = x.shape[-2] // self.rows, self.group.index
        start = sum(self.counts[:index])
        return x[..., times * start : times * (start + self.counts[index]), :]

    def beside(self, x: Tensor, above: int, below: int) -> Tensor:
        """[..., H, W] of this band -> with the rows next to it, which are zeros outside of the picture.

        Every rank has the edges of all others for that, which are few rows, and one operation.
        """
        edges = torch.cat([x[..., :below, :], x[..., x.shape[-2] - above :, :]], dim=-2)
        gathered, index = self.group.gather(edges), self.group.index
        around = F.pad(x, (0, 0, above, below))  # laid out in memory as x is, which `cat` would not keep
        if above and index:
            around[..., :above, :] = gathered[index - 1][..., below:, :]
        if below and index + 1 < len(gathered):
            around[..., -below:, :] = gathered[index + 1][..., :below, :]
        return around

    def whole(self, x: Tensor) -> Tensor:
        """[..., H of this band, W] of every rank -> [..., H, W]."""
        times = x.shape[-2] // self.counts[self.group.index]
        # all alike: the first band has the most rows
        padded = F.pad(x, (0, 0, 0, self.counts[0] * times - x.shape[-2]))
        parts = zip(self.group.gather(padded), self.counts, strict=True)
        return torch.cat([part[..., : times * count, :] for part, count in parts], dim=-2)

    def agrees(self, good: Tensor) -> bool:
        """Whether something is so in all ranks."""
        return bool(torch.stack(self.group.gather(good.float())).min() > 0)
