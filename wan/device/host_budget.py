"""What a run takes of the host's memory, told from the headers of a checkpoint, and how it keeps to less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import psutil

from wan.configs import ModelConfig
from wan.device.budget import LAYER, MemoryBudget, beside_packed, denoiser_dtypes, weight_sizes
from wan.device.host import GIB, host_free_bytes
from wan.errors import UserError
from wan.settings import Geometry
from wan.weights.checkpoint import Checkpoint
from wan.weights.tensors import Weights

# Beside weights and frames. A14B on a GPU was seen with 67.8 GiB that cannot be reclaimed, of which 64.3 were weights
# and 0.8 frames.
LIBRARIES, LIBRARIES_WITH_CUDA = 1.0 * GIB, 2.7 * GIB
_NO_LORAS: Mapping[str, int] = {}


@dataclass(frozen=True)
class HostPlan:
    """How models live in host memory.

    `in_turn`: a model leaves it when another is needed, and is read again. `mapped`: weights that a file holds in the
    dtype in which they are used stay in the file, whose pages the system reads again and drops as it likes.
    """

    in_turn: bool = False
    mapped: bool = False

    def __str__(self) -> str:
        residence = "models take turns in it and are read again" if self.in_turn else "all models stay in it"
        return residence + (", mapped from their files" if self.mapped else "")


PLANS = HostPlan(), HostPlan(in_turn=True), HostPlan(in_turn=True, mapped=True)  # the quickest first


def host_limit(host_memory: float | Literal["auto"]) -> int:
    """Bytes that this process may take of the host's memory, given GiB or "auto" for what is free now."""
    if host_memory == "auto":
        return host_free_bytes() + int(psutil.Process().memory_info().rss)
    return int(host_memory * GIB)


@dataclass(frozen=True)
class HostBudget:
    """What a checkpoint's models and a clip take of the host's memory that cannot be reclaimed, and what fits `limit`.

    `given`: the limit is the user's, and not what is free. Models that are `elsewhere` go to GPUs in slices at once.
    `sharers` processes have layers in common, of which this one counts its part, but for what each has packed.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    limit: int
    given: bool = False
    elsewhere: frozenset[str] = frozenset()
    sharers: int = 1

    def need(
        self,
        plan: HostPlan,
        budget: MemoryBudget,
        geometry: Geometry,
        loras: Mapping[str, int] = _NO_LORAS,
        captioner: int = 0,
    ) -> int:
        """Bytes with a plan. `loras`: their bytes, by expert; `captioner`: bytes of one in host memory.

        `budget` is the clip's on its device, whose activations are in host memory too where that is a CPU.
        """
        checkpoint, config = self.checkpoint, self.config
        in_8_bits = config.low_precision is not None
        # those who take turns hold different models at a time; see `Pipeline` for the others
        sharers = 1 if plan.in_turn or checkpoint.single or in_8_bits else self.sharers
        parts = [
            captioner,
            _bytes(checkpoint.text_encoder, lambda name: config.dtype_name("t5_dtype"), plan.mapped, sharers=sharers)
            * ("text_encoder" not in self.elsewhere),
            # convolutions are laid out anew, so their file is no place for them
            _bytes(checkpoint.vae, lambda name: config.dtype_name("vae_dtype"), False),
        ]
        for name, weights in checkpoint.experts.items():
            # what is changed or rounded is no longer what is in the file
            stays = plan.mapped and name not in loras and not in_8_bits
            dtype = config.dtype_name("param_dtype")
            size = _bytes(weights, denoiser_dtypes(dtype), stays, in_8_bits, sharers, packs=True)
            size += beside_packed(weights, dtype, loras.get(name, 0))
            parts.append(size * (name not in self.elsewhere))
        frames, height, width = geometry.size
        beside = 2 * 12 * frames * height * width  # float32 pixels, as they are decoded and as they are handed on
        if budget.device.type == "cpu":
            beside += int(LIBRARIES) + max(stage.working for stage in budget.stages(geometry).values())
        else:
            beside += int(LIBRARIES_WITH_CUDA)
        return beside + (max(parts) if plan.in_turn else sum(parts))

    def plan(
        self, budget: MemoryBudget, geometry: Geometry, loras: Mapping[str, int] = _NO_LORAS, captioner: int = 0
    ) -> HostPlan:
        """The quickest plan that fits. Raises UserError where none does."""
        for plan in PLANS:
            size = self.need(plan, budget, geometry, loras, captioner)
            if size <= self.limit:
                return plan
        where = f"`host_memory` is {self.limit / GIB:.3g}" if self.given else f"{self.limit / GIB:.1f} are free"
        frames, height, width = geometry.size
        raise UserError(
            f"{self.config.name} needs {size / GIB:.1f} GiB of host memory for {frames} frames of {width}x{height}, "
            f"even with one model at a time there, and {where}: close other programs, take weights in fewer bits ("
            "`dit`, `dit_high`, `dit_low`), or make smaller clips"
        )


def _bytes(
    weights: Weights,
    dtype_of: Callable[[str], str],
    mapped: bool,
    in_8_bits: bool = False,
    sharers: int = 1,
    packs: bool = False,
) -> int:
    """A model in host memory; `mapped`: without what its file holds as it is used, `sharers` have layers in common.

    Weights that a model `packs`, see `weight_sizes`, are each process's own.
    """
    sizes = weight_sizes(weights, dtype_of, in_8_bits, packs)
    stored = weights.stored_dtypes() if mapped or (packs and sharers > 1) else {}
    taken = {name: size for name, size in sizes.items() if not mapped or stored.get(name) != dtype_of(name)}

    def part(name: str) -> int:
        is_packed = packs and len(weights.shapes[name]) == 2 and name not in stored
        return sharers if LAYER.search(name) and not is_packed else 1

    return sum(size // part(name) for name, size in taken.items())
