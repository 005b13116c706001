"""The processes that make a clip together, one for each GPU: what they were told, how they begin and how they end."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan.commands.inputs import sampling_of
from wan.commands.lines import PROGRESS
from wan.device.ranks import Sizes, World, possible_sizes
from wan.errors import UserError
from wan.options import Settings

if TYPE_CHECKING:
    from wan.chain.dry_run import Effort
    from wan.chain.plan import Plan
    from wan.device.budget import ClipNeeds
    from wan.pipeline import Pipeline


_SIZES = ("ulysses_size", "cfg_size", "ring_size")


def check_world(settings: Settings, world: World) -> None:
    """Raise UserError for settings of several GPUs that cannot be followed with these processes."""
    sharded = [f"`{name}`" for name in ("t5_fsdp", "dit_fsdp") if getattr(settings, name)]
    if sharded and world.size == 1 and not settings.dry_run:
        raise UserError(f"{' and '.join(sharded)}: weights are shared among GPUs; start the command with torchrun")
    given = {name: size for name in _SIZES if (size := getattr(settings, name)) != "auto"}
    ranks = math.prod(given.values())
    sizes = ", ".join(f"`{name}` {size}" for name, size in given.items())
    if world.size == 1 and ranks > 1 and not settings.dry_run:
        raise UserError(f"{sizes} needs {ranks} processes: start the command with torchrun --nproc_per_node={ranks}")
    if world.size > 1 and (world.size % ranks or (len(given) == len(_SIZES) and ranks != world.size)):
        raise UserError(f"{sizes} does not make up the {world.size} processes that are started")


@dataclass(frozen=True)
class Gpus:
    """How one process of `world` works with the others. `offload`: only the model in use is on its GPU."""

    settings: Settings
    world: World
    offload: bool = False

    @property
    def size(self) -> int:
        """How many processes there are, or would be with the sizes that are given."""
        given = [size for size in self._given_sizes.values() if size is not None]
        return self.world.size if self.world.size > 1 else math.prod(given)

    @property
    def node(self) -> int:
        """How many of them keep the weights together, each a slice; `Team.node` as far as the launcher tells it."""
        return self.world.local_size if self.world.local_size > 1 else self.size

    def expect(self, pipeline: Pipeline) -> None:
        """Count with what a process takes where that is the least, until sizes are chosen. Raises UserError."""
        if self.size > 1:
            least = max(self._possible(pipeline), key=lambda sizes: (sizes.tokens, -sizes.ring))
            pipeline.share_memory(least, self.node)

    def outline(self, pipeline: Pipeline, clips: Iterable[Plan | Effort]) -> list[str]:
        """Count with what a process takes, also where none is started; a line on how they share the clips' work.

        Raises UserError.
        """
        if self.size == 1:
            return []
        sizes = pipeline.choose_sizes(
            self._possible(pipeline),
            self._guided(pipeline),
            self._needs(pipeline, clips),
            self.node,
            pipeline.budget.limit,  # the others' may be less
        )
        pipeline.share_memory(sizes, self.node)
        return [f"{self.size} GPUs: {sizes}"]

    def _possible(self, pipeline: Pipeline) -> list[Sizes]:
        return possible_sizes(self.size, pipeline.heads, self._guided(pipeline), **self._given_sizes)

    def _needs(self, pipeline: Pipeline, clips: Iterable[Plan | Effort]) -> list[ClipNeeds]:
        from wan.device.budget import ClipNeeds

        needs = [ClipNeeds(clip.geometry, self.offload, pipeline.models.lora_bytes(clip.loras)) for clip in clips]
        # most of a chain's clips are alike, and an estimate takes milliseconds
        return [one for number, one in enumerate(needs) if one not in needs[:number]]

    @property
    def _given_sizes(self) -> dict[str, int | None]:
        settings = self.settings
        given = {"cfg": settings.cfg_size, "ulysses": settings.ulysses_size, "ring": settings.ring_size}
        return {name: None if size == "auto" else size for name, size in given.items()}

    def _guided(self, pipeline: Pipeline) -> float:
        """The share of steps that have guidance."""
        shares = pipeline.rules.shares(sampling_of(self.settings, pipeline.rules))
        return sum(guided for _, guided in shares) / sum(steps for steps, _ in shares)

    @contextmanager
    def together(self, pipeline: Pipeline, clips: Iterable[Plan | Effort]) -> Iterator[None]:
        """In the first process: the others make their shares of the clips in the block. Raises UserError."""
        if self.world.size == 1:
            yield
            return
        self._join(pipeline, self._needs(pipeline, clips))
        logging.getLogger(PROGRESS).info("%d GPUs: %s", self.world.size, pipeline.team.sizes)
        try:
            with pipeline.team.watched():
                yield
        except GeneratorExit:  # between two clips
            self._part(pipeline)
            raise
        self._part(pipeline)

    def _part(self, pipeline: Pipeline) -> None:
        pipeline.release()
        pipeline.team.end()
        self.expect(pipeline)  # for the next chain

    def follow(self, pipeline: Pipeline) -> None:
        """In any other process: make its shares until the first has done."""
        self._join(pipeline)
        with pipeline.team.watched():
            pipeline.follow()
        pipeline.team.end()

    def _join(self, pipeline: Pipeline, clips: Sequence[ClipNeeds] = ()) -> None:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast can hang a host, and nothing here gains by it
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")  # which holds up the end, for who looks into NCCL
        timeout = self.settings.collective_timeout
        pipeline.join(self.world, self._guided(pipeline), clips, timeout=timeout, **self._given_sizes)
