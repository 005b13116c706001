"""How a model may be sampled: what is asked for merged with its presets and its row, and what it cannot do refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wan.configs import ModelConfig, preset_named
from wan.denoiser.lora_file import LORA_SETTING
from wan.denoiser.timetable import step_shares
from wan.errors import UserError
from wan.settings import LoraFile, Sampling, merge_sampling
from wan.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class SamplingRules:
    """The rules of one row with one checkpoint."""

    config: ModelConfig
    checkpoint: Checkpoint

    def merge(
        self,
        steps: int | None = None,
        shift: float | None = None,
        solver: str | None = None,
        guide_scale: float | tuple[float, float] | list[float] | None = None,
        *,
        guidance_interval: tuple[float, float] | None = None,
        cache: str | None = None,
        preset: str = "quality",
    ) -> Sampling:
        """Wan's sampling arguments as one value, see `merge_sampling`. Raises UserError.

        A cache that could leave nothing out is refused as well.
        """
        sampling = merge_sampling(
            self.config,
            steps,
            shift,
            solver,
            guide_scale,
            guidance_interval=guidance_interval,
            cache=cache,
            preset=preset,
        )
        self._check_cache(sampling)
        return sampling

    def _check_cache(self, sampling: Sampling) -> None:
        cache = sampling.cache
        if cache is None:
            return
        if sampling.uses("magcache") and len(self.config.mag_ratios) != len(self.checkpoint.experts):
            raise UserError(
                "`cache` magcache needs this model's mag_ratios in its wan_config.json (python -m benchmarks.presets "
                "measures them); use first_block, which needs none"
            )
        shares = [steps for steps, _ in self.shares(sampling)]
        if all(steps <= cache.whole(steps) for steps in shares):
            raise UserError(
                f"`cache` {cache} leaves nothing out of {' + '.join(map(str, shares))} steps, the first "
                f"{cache.whole(max(shares))} are computed whole; give `cache` off or more `sample_steps`"
            )

    def shares(self, sampling: Sampling) -> list[tuple[int, int]]:
        """The steps of each expert, from high noise to low, and how many of them have guidance's second forward."""
        return step_shares(sampling, self.config.lowest_timesteps, self.config.num_train_timesteps)

    def check_distilled(self, preset: str, loras: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Raise UserError where a preset for step-distillation LoRAs has none for an expert."""
        if not preset_named(preset).distilled:
            return
        missing = [
            name
            for name, weights in self.checkpoint.experts.items()
            if all(file.is_svi for file in loras.get(name, ())) and not weights.is_distilled
        ]
        if missing:
            needed = " and ".join(f"{LORA_SETTING[name]} FILE" for name in sorted(missing))
            raise UserError(
                f"`preset` {preset} needs {needed}: 4-step distillation LoRAs of {self.config.name}, for A14B "
                "those of lightx2v's Wan2.2-Distill-Loras or Wan2.2-Lightning; or a distilled model with `dit`"
            )
