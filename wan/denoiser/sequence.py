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

    def spread(self, x: Tensor) -> Tensor:
        """Tokens of this rank, all heads [1, count, h, d] -> tokens of all neighbours, some heads; on its way, see
        `landed`."""
        if self.heads_ranks == 1:
            return x[0]
        ranks = self.heads_ranks
        parts = x[0].view(self.count, ranks, -1, x.shape[-1]).transpose(0, 1).contiguous()  # [n, count, h / n, d]
        return self._exchange(parts)

    def landed(self, x: Tensor) -> Tensor:
        """What `spread` has sent, when it is there: [n * count, h / n, d]."""
        if self.heads_ranks == 1:
            return x
        whole: Tensor = _operations.wait_tensor(x)
        return whole.flatten(0, 1)

    def around(self, x: Tensor) -> Tensor:
        """[n * count, h / n, d] of each rank of the ring -> all tokens [L, h / n, d]; on its way, see `arrived`."""
        if self.ring_ranks == 1:
            return x
        return _one_by_one(_operations.all_gather_into_tensor(x.contiguous(), self.ring_ranks, self.ring_name))

    def arrived(self, x: Tensor) -> Tensor:
        """What `around` has sent, when it is there: [1, L, h / n, d], without filling."""
        whole: Tensor = x if self.ring_ranks == 1 else _operations.wait_tensor(x)
        return whole[None, : self.tokens]

    def collect(self, x: Tensor) -> Tensor:
        """[1, n * count, h / n, d], or without the filling at its end -> [1, count, h, d]."""
        if self.heads_ranks == 1:
            return x
        ranks = self.heads_ranks
        parts = F.pad(x[0], (0, 0, 0, 0, 0, self.count * ranks - x.shape[1])).contiguous()
        back: Tensor = _operations.wait_tensor(self._exchange(parts.view(ranks, self.count, *parts.shape[1:])))
        return back.transpose(0, 1).flatten(1, 2)[None]

    def _exchange(self, parts: Tensor) -> Tensor:
        """Parts [n, ...], one for each neighbour -> those that each of them has for this one."""
        ones = [1] * self.heads_ranks
        return _one_by_one(_operations.all_to_all_single(parts, ones, ones, self.heads_name))

    def whole(self, x: Tensor) -> Tensor:
        """[1, count, D] of every rank -> [1, L, D]."""
        gathered = _operations.wait_tensor(_operations.all_gather_into_tensor(x[0].contiguous(), self.ranks, self.name))
        tokens: Tensor = gathered[None, : self.tokens]
        return tokens

    def attend(
        self,
        kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
        value: Callable[[], Tensor],
        query: Callable[[], Tensor],
        key: Callable[[], Tensor],
    ) -> Tensor:
        """Softmax attention of all tokens [1, count, h, d]; each input is on its way while the next is computed."""
        if self.ring_ranks == 1:
            values, queries, keys = self.spread(value()), self.spread(query()), self.spread(key())
            mixed = kernel(*(self.landed(one)[None, : self.tokens] for one in (queries, keys, values)))
            return self.collect(mixed)
        values, keys = self.spread(value()), self.spread(key())
        values, keys = self.around(self.landed(values)), self.around(self.landed(keys))
        # its own tokens, the filling among them, with the keys of all
        queries = self.landed(self.spread(query()))[None]
        return self.collect(kernel(queries, self.arrived(keys), self.arrived(values)))


def _one_by_one(sent: Tensor) -> Tensor:
    """A tensor on its way, in host memory one that is there: with two of them on their way, of either kind, gloo writes
    over what is not its own (PyTorch 2.13), and the process dies sooner or later."""
    one: Tensor = _operations.wait_tensor(sent) if sent.device.type == "cpu" else sent
    return one
