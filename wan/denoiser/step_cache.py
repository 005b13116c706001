"""Leave out what changes little from one step to the next: diffusers' cache hooks, put on for one expert's steps.

They are put on when an expert begins and taken off when it ends, so that nothing of one clip or expert reaches another,
and a model that is not sampling is as it was loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from torch import Tensor

from wan.denoiser.model import WanBlock
from wan.device.parallel import ALONE, Group, Team
from wan.settings import MAGCACHE_RETAINED, TAYLORSEER_WHOLE, StepCache

# Around a forward, by the name of its branch: what a cache keeps of "cond" is not that of "uncond".
Branch: TypeAlias = Callable[[str], AbstractContextManager[None]]

MAGCACHE_SKIPS = 2  # at most so many steps in a row (source: the paper's setting for Wan2.1 and Wan2.2)

TransformerBlockRegistry.register(WanBlock, TransformerBlockMetadata(return_hidden_states_index=0))


@dataclass(frozen=True)
class Caching:
    """A cache, or None, and the magnitudes that MagCache reads, by the name of the expert."""

    cache: StepCache | None = None
    mag_ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)
    team: Team = ALONE

    @contextmanager
    def of(self, model: Any, expert: str, steps: int) -> Iterator[Branch]:
        """The cache on an expert's model for its `steps`; none where they are too few for it to leave out any."""
        if self.cache is None or steps <= self.cache.whole(steps):
            yield _plain
            return
        model.enable_cache(_config(self.cache, steps, self.mag_ratios.get(expert, ())))
        if self.cache.kind == "first_block" and self.team.tokens is not None:
            hook = model.blocks[0]._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)
            hook._should_compute_remaining_blocks = partial(_differs, hook, model, self.team.tokens)
        try:
            yield model.cache_context
        finally:
            model.disable_cache()


NO_CACHE = Caching()


def _differs(hook: Any, model: Any, group: Group, residual: Tensor) -> bool:
    """The library's question of whether to compute on, asked of the tokens of all ranks, so that all answer alike.

    The other caches count steps, which is the same everywhere.
    """
    before = hook.state_manager.get_state().head_block_residual
    if before is None:
        return True
    real = model.share.real
    sums = torch.stack([(residual - before)[:, :real].abs().sum(), before[:, :real].abs().sum()])
    # each adds the same numbers in the same order
    change, size = torch.stack(group.gather(sums)).sum(0).tolist()
    return bool(change / size > hook.threshold)


def _plain(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def _config(cache: StepCache, steps: int, mag_ratios: Sequence[float]) -> Any:
    if cache.kind == "magcache":
        return MagCacheConfig(
            threshold=cache.strength,
            max_skip_steps=MAGCACHE_SKIPS,
            retention_ratio=MAGCACHE_RETAINED,
            num_inference_steps=steps,
            mag_ratios=list(mag_ratios),
        )
    if cache.kind == "first_block":
        return FirstBlockCacheConfig(threshold=cache.strength)
    return TaylorSeerCacheConfig(
        cache_interval=int(cache.strength),
        disable_cache_before_step=TAYLORSEER_WHOLE,
        taylor_factors_dtype=torch.float32,
        # of the model's output alone: of every layer they would take tens of GiB at real sizes
        use_lite_mode=True,
    )
