"""A clip's tokens shared among GPUs: each computes all layers for its run of them, and attention for its heads.

Around attention the ranks exchange tokens for heads and back (DeepSpeed-Ulysses, Jacobs et al. 2023), so the attention
kernel sees all tokens of fewer heads, and its numbers are those of one GPU. Operations are functional ones, which
PyTorch's compiler sees through.
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
    """The run of `count` tokens that a rank computes, out of `tokens`; the last runs are filled up with zeros."""

    tokens: int
    ranks: int
    index: int
    name: str

    @classmethod
    def of(cls, tokens: int, group: Group) -> Share:
        """This rank's share."""
        return cls(tokens, group.size, group.index, group.name)

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

    def spread(self, x: Tensor) -> Tensor:
        """Tokens of this rank, all heads [1, count, h, d] -> all tokens, some heads; on its way, see `landed`."""
        parts = x[0].view(self.count, self.ranks, -1, x.shape[-1]).transpose(0, 1).contiguous()  # [n, count, h / n, d]
        return self._exchange(parts)

    def landed(self, x: Tensor) -> Tensor:
        """What `spread` has sent, when it is there: [1, L, h / n, d], without filling."""
        whole: Tensor = _operations.wait_tensor(x)
        return whole.flatten(0, 1)[None, : self.tokens]

    def collect(self, x: Tensor) -> Tensor:
        """[1, L, h / n, d] -> [1, count, h, d]."""
        parts = F.pad(x[0], (0, 0, 0, 0, 0, self.count * self.ranks - self.tokens)).contiguous()
        back: Tensor = _operations.wait_tensor(self._exchange(parts.view(self.ranks, self.count, *parts.shape[1:])))
        return back.transpose(0, 1).flatten(1, 2)[None]

    def _exchange(self, parts: Tensor) -> Tensor:
        """Parts [n, ...], one for each rank -> those that each rank has for this one."""
        ones = [1] * self.ranks
        sent: Tensor = _operations.all_to_all_single(parts, ones, ones, self.name)
        return sent

    def whole(self, x: Tensor) -> Tensor:
        """[1, count, D] of every rank -> [1, L, D]."""
        gathered = _operations.wait_tensor(_operations.all_gather_into_tensor(x[0].contiguous(), self.ranks, self.name))
        found: Tensor = gathered[None, : self.tokens]
        return found

    def attend(
        self,
        kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
        value: Callable[[], Tensor],
        query: Callable[[], Tensor],
        key: Callable[[], Tensor],
    ) -> Tensor:
        """Softmax attention of all tokens [1, count, h, d]; each input is on its way while the next is computed."""
        values, queries, keys = self.spread(value()), self.spread(query()), self.spread(key())
        return self.collect(kernel(self.landed(queries), self.landed(keys), self.landed(values)))
