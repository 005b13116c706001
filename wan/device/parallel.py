"""Several processes that make one clip, each with its GPU: their groups, and what one tells the others."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wan.device.ranks import Sizes, World
from wan.errors import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """Some of the processes, in order: how many, which of them this one is, and PyTorch's name for them."""

    handle: Any
    size: int
    index: int

    @property
    def name(self) -> str:
        """What operations that the compiler can see through take."""
        return str(self.handle.group_name)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all, alike in shape, in order."""
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine.contiguous(), group=self.handle)
        return found


class Team:
    """The processes that make a clip together. With one of them there is nothing to do.

    `tokens` share a forward's tokens, `guidance` its two forwards; None where that is not shared.
    """

    def __init__(self, world: World, sizes: Sizes) -> None:
        self.world, self.sizes = world, sizes
        self.tokens: Group | None = None
        self.guidance: Group | None = None
        self._said: Any = None

    @classmethod
    def start(cls, world: World, sizes: Sizes, device: torch.device, timeout: float) -> Team:
        """Meet the other processes; a collective operation that takes longer than `timeout` seconds is an error."""
        team = cls(world, sizes)
        if world.size == 1:
            return team
        wait = timedelta(seconds=timeout)
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("cpu:gloo,cuda:nccl", timeout=wait, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=wait)
        # a caption on a CPU or a long clip's writing may take much longer than a step
        team._said = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        # neighbours share tokens, which is most of the traffic; each group has to be made by all
        rows = [range(first, first + sizes.ulysses) for first in range(0, world.size, sizes.ulysses)]
        columns = [range(first, world.size, sizes.ulysses) for first in range(sizes.ulysses)]
        if sizes.ulysses > 1:
            team.tokens = team._group([list(row) for row in rows], wait)
        if sizes.cfg > 1:
            team.guidance = team._group([list(column) for column in columns], wait)
        return team

    def _group(self, members: list[list[int]], wait: timedelta) -> Group:
        mine = None
        for ranks in members:
            handle = dist.new_group(ranks, timeout=wait)
            if self.world.rank in ranks:
                mine = Group(handle, len(ranks), ranks.index(self.world.rank))
        assert mine is not None  # they hold every rank once
        return mine

    @property
    def is_first(self) -> bool:
        """Whether this process prints, writes, and says what is made."""
        return self.world.is_first

    def share(self, make: Callable[[], Value], device: torch.device | str = "cpu") -> Value:
        """What the first process makes, in all of them; its tensors on `device`. An error there is one here."""
        if self.world.size == 1:
            return make()
        if not self.is_first:
            return self.hear(device)  # type: ignore[no-any-return]
        try:
            value = make()
        except BaseException as error:
            self.tell(_Failed(type(error).__name__))
            raise
        self.tell(value)
        return value

    def tell(self, value: Any) -> None:
        """Send a value to all other processes, which `hear` it."""
        if self.world.size > 1:
            written = io.BytesIO()
            torch.save(value, written)
            dist.broadcast_object_list([written.getvalue()], src=0, group=self._said)

    def hear(self, device: torch.device | str = "cpu") -> Any:
        """What the first process tells."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._said)
        value = torch.load(io.BytesIO(heard[0]), map_location=device, weights_only=False)  # our own process wrote it
        if isinstance(value, _Failed):
            raise Ended(f"the first process has failed ({value.reason})")
        return value

    def end(self) -> None:
        """Leave the other processes."""
        if self.world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Failed:
    reason: str


class Ended(UserError):
    """The first process has ended with an error, which it says itself."""


ALONE = Team(World(), Sizes())
