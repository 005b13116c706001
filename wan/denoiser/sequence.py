"""A clip's tokens shared among GPUs: each computes all layers for its run of them, and attention for its heads.

Around attention the ranks exchange tokens for heads and back (DeepSpeed-Ulysses, Jacobs et al. 2023), so the attention
kernel sees all tokens of fewer heads, and its numbers are those of one GPU. Where the heads are too few for all ranks,
the others form a ring: each gathers the keys and values of the rest, and attends to them with its own queries. Nothing
is merged from parts, so any kernel can be used, and its numbers are those of one GPU again. Operations are functional
ones, which PyTorch's compiler sees through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives  # noqa: F401  (registers the operations below)
import torch.nn.functional as F
from torch import Tensor

from wan.device.parallel import Group

_operations: Any = torch.ops._c10d_functional


@dataclass(frozen=True)
class Share:
    """The run of `count` tokens that a rank computes, out of `tokens`; the last runs are filled up with zeros.

    For attention `heads_ranks` neighbours exchange tokens for heads, and `ring_ranks` gather each other's keys.
    """

    tokens: int
    ranks: int
    index: int
    name: str
    heads_ranks: int = 1
    heads_name: str = ""
    ring_ranks: int = 1
    ring_name: str = ""

    @classmethod
    def of(cls, tokens: int, group: Group) -> Share:
        """This rank's share."""
        inner = [(1, "") if one is None else (one.size, one.name) for one in (group.by_heads, group.ring)]
        return cls(tokens, group.size, group.index, group.name, *inner[0], *inner[1])

    @property
    def count(self) -> int:
        """Tokens of each rank."""
        return -(-self.tokens // self.ranks)

    @property
    def real(self) -> int:
        """Those of this rank's that are no filling."""
        return min(self.count, max(0, self.tokens - self.index * self.count))

    def mine(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [B, count, ...]."""
        start = self.index * self.count
        part = x[:, start : start + self.real]
        return F.pad(part, (0, 0) * (x.ndim - 2) + (0, self.count - self.real)) if self.real < self.count else part

    def rows(self, frames: int, device: torch.device) -> Tensor:
        """The frame of each of this rank's tokens, int64 [count], where `frames` equal runs make up all tokens."""
        start = self.index * self.count
        tokens = torch.arange(start, start + self.count, device=device).clamp_(max=self.tokens - 1)
        return tokens // (self.tokens // frames)

    def packed(self, x: Tensor) -> Tensor:
        """Tokens of this rank, all heads [1, count, h, d] -> [n, count, h / n, d], a part for each neighbour."""
        return x[0].view(self.count, self.heads_ranks, -1, x.shape[-1]).transpose(0, 1).contiguous()

    def exchange(self, parts: Tensor) -> Tensor:
        """Parts [n, ...], one for each neighbour -> those that each of them has for this one; on its way, see
        `landed`."""
        if self.heads_ranks == 1:
            return parts
        ones = [1] * self.heads_ranks
        sent: Tensor = _operations.all_to_all_single(parts, ones, ones, self.heads_name)
        return sent

    def landed(self, x: Tensor) -> Tensor:
        """What `exchange` has sent, when it is there."""
        whole: Tensor = x if self.heads_ranks == 1 else _operations.wait_tensor(x)
        return whole

    def around(self, x: Tensor) -> Tensor:
        """Packed keys or values that `exchange` has sent -> those of all tokens; on its way, see `arrived`."""
        if self.ring_ranks == 1:
            return x
        mine = self.landed(x).flatten(0, 1)
        sent: Tensor = _operations.all_gather_into_tensor(mine, self.ring_ranks, self.ring_name)
        return sent

    def arrived(self, x: Tensor) -> Tensor:
        """What `around` has sent, when it is there: [1, L, h / n, d], without filling."""
        whole: Tensor = self.landed(x).flatten(0, 1) if self.ring_ranks == 1 else _operations.wait_tensor(x)
        return whole[None, : self.tokens]

    def attend(
        self, kernel: Callable[[Tensor, Tensor, Tensor], Tensor], queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Softmax attention of all tokens with what is on its way -> [n, count, h / n, d], on its way back."""
        mine = self.landed(queries).flatten(0, 1)[None]
        # in a ring its own tokens, the filling among them, with the keys of all
        mine = mine[:, : self.tokens] if self.ring_ranks == 1 else mine
        mixed = kernel(mine, self.arrived(keys), self.arrived(values))[0]
        filled = F.pad(mixed, (0, 0, 0, 0, 0, self.count * self.heads_ranks - len(mixed))).contiguous()
        return self.exchange(filled.view(self.heads_ranks, self.count, *mixed.shape[1:]))

    @staticmethod
    def unpacked(parts: Tensor) -> Tensor:
        """[n, count, h / n, d] -> tokens of this rank [1, count, h * d]."""
        return parts.transpose(0, 1).flatten(1)[None]

    def whole(self, x: Tensor) -> Tensor:
        """[1, count, D] of every rank -> [1, L, D]."""
        gathered = _operations.wait_tensor(_operations.all_gather_into_tensor(x[0].contiguous(), self.ranks, self.name))
        tokens: Tensor = gathered[None, : self.tokens]
        return tokens
