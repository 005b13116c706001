"""Several processes that make one clip, each with its GPU: their groups, and what one tells the others."""

from __future__ import annotations

import io
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wan.device.peers import Ended
from wan.device.ranks import Sizes, World
from wan.device.watch import Watch
from wan.errors import UserError

Value = TypeVar("Value")
_LONG = timedelta(days=7)


@dataclass(frozen=True)
class Group:
    """Some of the processes, in order: how many, which of them this one is, and PyTorch's name for them.

    Of those that share tokens: neighbours, who share the heads of attention (`by_heads`), and those that have the same
    heads for other tokens (`ring`), each None where there is but one.
    """

    handle: Any
    size: int
    index: int
    by_heads: Group | None = None
    ring: Group | None = None

    @property
    def name(self) -> str:
        """What operations that the compiler can see through take."""
        return str(self.handle.group_name)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all, alike in shape, in order."""
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine.contiguous(), group=self.handle)
        return gathered


def is_met() -> bool:
    """Whether this process has met others by `torch.distributed.init_process_group`."""
    return dist.is_available() and dist.is_initialized()


def world_met(rank: int, local_rank: int) -> World:
    """This process among those that it has met. Raises UserError."""
    if not is_met():
        raise UserError(
            "use_sp shares a clip among processes: start the script with torchrun, and call "
            "torch.distributed.init_process_group before this, as Wan2.2's does"
        )
    if rank != dist.get_rank():
        raise UserError(f"rank is {rank} in the process that torch.distributed has as {dist.get_rank()}")
    return World(rank, dist.get_world_size(), local_rank, "")


class Team:
    """The processes that make a clip together. With one of them there is nothing to do.

    `tokens` share a forward's tokens, `guidance` its two forwards; None where that is not shared. `node` are the
    processes of one machine, or all where each has a machine of its own. `all_` are all. `machine` are those of this
    machine, which tell each other what is in host memory; None where there is but one of them.
    """

    def __init__(self, world: World, sizes: Sizes) -> None:
        self.world, self.sizes = world, sizes
        self.tokens: Group | None = None
        self.guidance: Group | None = None
        self.node: Group | None = None
        self.machine: Group | None = None
        self.all_: Group | None = None
        self._words: Any = None
        self._groups = 0  # that this process has begun to make, its own or not
        self._watch: Watch | None = None

    @classmethod
    def start(cls, world: World, sizes: Sizes | Callable[[Team], Sizes], device: torch.device, timeout: float) -> Team:
        """Meet the other processes; one that lets them wait for longer than `timeout` seconds is an error.

        `sizes` may be chosen when they have met and can tell each other something. Raises UserError where some do not
        come.
        """
        team = cls(world, sizes if isinstance(sizes, Sizes) else Sizes())
        if world.size == 1:
            return team
        wait = timedelta(seconds=1.1 * timeout + 10)  # the watch comes first, and it knows whom they wait for
        try:
            team._meet(device, wait)
            watch = Watch(world.rank, world.size, team._begun, team._abort, timeout)
            watch.start(team.share, world.address or team._address())
        except dist.DistError as error:
            raise Ended(
                f"the {world.size} processes did not all come together within {timeout:g} s (`collective_timeout`): "
                f"{str(error).splitlines()[0]}"
            ) from error
        team._watch = watch
        with team.watched():
            team._gather(wait)
            if not isinstance(sizes, Sizes):
                team.sizes = sizes(team)
            team._divide(wait)
        return team

    def _meet(self, device: torch.device, wait: timedelta) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            if device.type == "cuda":
                dist.init_process_group("cpu:gloo,cuda:nccl", timeout=wait, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=wait)
        self._words = dist.group.WORLD
        self.all_ = Group(dist.group.WORLD, self.world.size, self.world.rank)

    def _gather(self, wait: timedelta) -> None:
        # a caption on a CPU or a long clip's writing may take much longer than a step
        self._words = self._group([range(self.world.size)], _LONG, "gloo").handle
        machines = self._machines()
        alone = min(map(len, machines)) == 1
        self.node = self._group([range(self.world.size)] if alone else machines, wait)
        # one of them may read weights for a long time
        here = self._group(machines, _LONG, "gloo")
        self.machine = here if here.size > 1 else None

    def _divide(self, wait: timedelta) -> None:
        # neighbours share tokens, which is most of the traffic; each group has to be made by all
        tokens, ulysses = self.sizes.tokens, self.sizes.ulysses
        halves = [range(first, first + tokens) for first in range(0, self.world.size, tokens)]
        if tokens > 1:
            parts = [half[first : first + ulysses] for half in halves for first in range(0, tokens, ulysses)]
            rings = [half[first::ulysses] for half in halves for first in range(ulysses)]
            self.tokens = replace(
                self._group(halves, wait),
                by_heads=self._group(parts, wait) if ulysses > 1 else None,
                ring=self._group(rings, wait) if self.sizes.ring > 1 else None,
            )
        if self.sizes.cfg > 1:
            self.guidance = self._group([range(first, self.world.size, tokens) for first in range(tokens)], wait)

    def _address(self) -> str:
        """Where the first process can be reached: the name of its machine, or this one."""
        name = self.share(platform.node)
        return "127.0.0.1" if name == platform.node() else name

    def _machines(self) -> list[Sequence[int]]:
        """The processes of each machine."""
        names = self.told_by_all(platform.node())
        return [[rank for rank, name in enumerate(names) if name == one] for one in dict.fromkeys(names)]

    def told_by_all(self, mine: Value) -> list[Value]:
        """What each process has to tell, in order."""
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, mine, group=self._words)
        return values

    def _group(self, members: Sequence[Sequence[int]], wait: timedelta, backend: str | None = None) -> Group:
        mine = None
        for ranks in members:
            self._groups += 1
            handle = dist.new_group(list(ranks), timeout=wait, backend=backend)
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
            dist.broadcast_object_list([written.getvalue()], src=0, group=self._words)

    def send(self, x: Tensor) -> None:
        """Send a tensor on the team's device to all other processes, in which one of its shape takes its place."""
        if self.world.size > 1:
            dist.broadcast(x, src=0)

    def hear(self, device: torch.device | str = "cpu") -> Any:
        """What the first process tells."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._words)
        value = torch.load(io.BytesIO(heard[0]), map_location=device, weights_only=False)  # our own process wrote it
        if isinstance(value, _Failed):
            raise Ended(f"the first process has failed ({value.reason})")
        return value

    @contextmanager
    def watched(self) -> Iterator[None]:
        """An error in the block ends all processes. What is raised is its cause, which may be that of another one."""
        try:
            yield
        except GeneratorExit:  # a loop over clips was left, which is no error
            raise
        except BaseException as error:
            cause = error if self._watch is None else self._watch.end(error)
            if cause is error:
                raise
            raise cause from error

    def _begun(self) -> int:
        """Operations of this process with others, and groups; each process begins as many."""
        return self._groups + sum(int(group.handle._get_sequence_number_for_group()) for group in self._of_steps)

    def _abort(self) -> None:
        # at once: NCCL waits for what the GPU does while it takes one group apart, which may be another one's exchange
        for group in self._of_steps:
            threading.Thread(target=group.handle.abort, daemon=True, name="abort").start()

    @property
    def _of_steps(self) -> list[Group]:
        """The groups whose processes wait for each other in a step."""
        tokens = self.tokens
        within = [] if tokens is None else [tokens, tokens.by_heads, tokens.ring]
        return [group for group in (*within, self.guidance, self.node, self.all_) if group is not None]

    def end(self) -> None:
        """Leave the other processes."""
        if self._watch is not None:
            self._watch.close()
        if self.world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Failed:
    reason: str


ALONE = Team(World(), Sizes())
