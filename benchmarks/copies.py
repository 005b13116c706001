"""An exchange between GPUs of one host by their copy engines, which take no multiprocessor from what computes.

To be timed against NCCL's by `benchmarks.parallel --overlap copies`. Each GPU writes its parts into buffers of the
others, and a counter after each; who waits for a part lets its stream wait for the counter. A buffer is written again
only by who has had an answer that was computed from it, so nothing has to tell that it is free.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wan.denoiser.sequence import Share

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # no multicast: it can hang a host
SLOTS = 8  # exchanges of a block, for a pair of forwards


class Copies:
    """The buffers of one group and size: slot by slot a part of each GPU, and a counter for each part."""

    def __init__(self, like: Tensor, share: Share) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.ranks = share.heads_ranks
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.side: Any = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        self.shape = (SLOTS, *like.shape)
        self.parts = symmetric.empty(*self.shape, dtype=like.dtype, device=like.device)
        self.counters = symmetric.empty(SLOTS, self.ranks, dtype=torch.int32, device=like.device)
        self.counters.zero_()
        torch.cuda.synchronize()
        group: Any = share.heads_name
        parts, counters = symmetric.rendezvous(self.parts, group), symmetric.rendezvous(self.counters, group)
        self.me = parts.rank
        self.theirs = [parts.get_buffer(peer, self.shape, like.dtype) for peer in range(self.ranks)]
        self.told = [counters.get_buffer(peer, (SLOTS, self.ranks), torch.int32) for peer in range(self.ranks)]
        self.uses = 0
        self.waiting: dict[int, tuple[int, int]] = {}
        dist.barrier()
        torch.cuda.synchronize()

    def exchange(self, parts: Tensor) -> Tensor:
        slot, number = self.uses % SLOTS, self.uses // SLOTS + 1
        self.uses += 1
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for peer in (*range(self.me + 1, self.ranks), *range(self.me + 1)):
                self.theirs[peer][slot, self.me].copy_(parts[peer], non_blocking=True)
                self._call("cuStreamWriteValue32_v2", self.side, self.told[peer][slot, self.me], number)
        parts.record_stream(self.side)
        mine = self.parts[slot]
        self.waiting[mine.data_ptr()] = slot, number
        return mine

    def landed(self, x: Tensor) -> Tensor:
        slot, number = self.waiting.pop(x.data_ptr())
        for peer in range(self.ranks):
            self._call("cuStreamWaitValue32_v2", torch.cuda.current_stream(), self.counters[slot, peer], number)
        return x

    def _call(self, name: str, stream: Any, place: Tensor, number: int) -> None:
        """Write a number on a stream, or let it wait until there is at least that number."""
        code = getattr(self.driver, name)(
            ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(place.data_ptr()), ctypes.c_uint32(number), 0
        )
        if code:
            raise RuntimeError(f"{name} gives {code}")


_known: dict[Any, Copies] = {}


def copies_of(share: Share, like: Tensor) -> Copies:
    key = share.heads_name, like.shape, like.dtype
    if key not in _known:
        _known[key] = Copies(like, share)
    return _known[key]


def exchange(share: Share, parts: Tensor) -> Tensor:
    """In place of `Share.exchange`."""
    return parts if share.heads_ranks == 1 else copies_of(share, parts).exchange(parts)


def landed(share: Share, x: Tensor) -> Tensor:
    """In place of `Share.landed`."""
    return x if share.heads_ranks == 1 else copies_of(share, x).landed(x)
