"""Noise -> latents of one clip: the experts load, get their kernels and LoRAs, and take their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from wan.configs import ModelConfig
from wan.denoiser.attention_backends import compile_where_it_pays, use_fastest_attention
from wan.denoiser.conditioning import Condition
from wan.denoiser.model import WanModel
from wan.denoiser.sampling import Expert, NotFinite, plan_stages, sample
from wan.denoiser.schedule import build_scheduler
from wan.denoiser.step_cache import Caching
from wan.denoiser.timetable import forwards, step_shares
from wan.device.hardware import peak_gib
from wan.device.parallel import Team
from wan.device.placement import Placement
from wan.errors import UserError
from wan.models import Models
from wan.stopwatch import Stopwatch
from wan.types import Request, Sampled, Step, TextContext, is_finite
from wan.weights.checkpoint import Checkpoint

NOT_FINITE = "numbers that are not finite (NaN or infinite)"
DAMAGED = ": its file is damaged or of another model; download it again"


@dataclass(frozen=True)
class ClipStart:
    """What sampling begins with: noise [z, F, h, w], what is known of the clip, and its prompts, on the device."""

    noise: Tensor
    condition: Condition
    text: TextContext


@dataclass(frozen=True)
class ClipSampler:
    """The denoisers of one checkpoint on one device, or on all devices of a team."""

    config: ModelConfig
    models: Models
    device: torch.device
    team: Team
    compile_blocks: bool

    def sample(
        self,
        request: Request,
        start: ClipStart,
        experts: Sequence[Expert],
        placement: Callable[[], Placement],
        watch: Stopwatch,
        clips: int,
    ) -> Sampled:
        """Take all steps; it is one of `clips` alike. Raises UserError where a model gives numbers that are not finite.

        `experts` are those of the model, as `Pipeline.experts` gives them.
        """
        sampling, train = request.sampling, self.config.num_train_timesteps
        with watch.stage("load"):
            self.models.merge_loras(request.loras)
            shares = step_shares(sampling, self.config.lowest_timesteps, train)
            count = clips * forwards(shares, sampling.cache)
            prepare = partial(self._prepare, watch=watch, tokens=request.geometry.tokens, count=count)
            prepared = [replace(expert, load=partial(prepare, expert)) for expert in experts]
            scheduler = build_scheduler(sampling, self.device, train)
            stages = plan_stages(scheduler.timesteps, prepared, lambda t: sampling.guides(t / train))
            names = [expert.name for expert in experts]
            caching = Caching(sampling.cache, dict(zip(names, self.config.mag_ratios, strict=False)), self.team)
            stages[0].expert.load()
        later = [part for stage in stages[1:] if not self.models.is_loaded(part := stage.expert.part)]
        try:
            # the next expert is loaded while this one computes
            with watch.stage("sample"), self.models.loading(later, self.team.world.size == 1) as check:

                def on_step(step: Step) -> None:
                    check()
                    if watch.on_step is not None:
                        watch.on_step(step)

                latents = sample(
                    start.noise,
                    stages,
                    scheduler,
                    start.condition,
                    start.text,
                    placement(),
                    on_step,
                    caching,
                    self.team,
                ).cpu()
        except NotFinite as error:
            raise UserError(why_not_finite(self.models.checkpoint, error, start)) from error
        loras = {
            name: [match.as_json() for match in matches] for name, matches in self.models.matches.items() if matches
        }
        notes = stages[-1].expert.load().kernels | ({"loras": loras} if loras else {})
        return Sampled(latents, dict(watch.seconds), peak_gib(self.device), notes)

    def _prepare(self, expert: Expert, *, watch: Stopwatch, tokens: int, count: float) -> WanModel:
        """An expert with the kernels that are fastest for `count` forwards, with the same results.

        It may have left host memory for another model, and then it is a new one.
        """
        with nullcontext() if self.models.is_loaded(expert.part) else watch.stage("load"):
            model = expert.load()
        model.token_group = self.team.tokens
        use_fastest_attention(model, tokens, count, self.device, self.team)
        if self.compile_blocks:
            compile_where_it_pays(model, tokens // self.team.sizes.tokens, count, self.device)
        return model


def why_not_finite(checkpoint: Checkpoint, error: NotFinite, start: ClipStart) -> str:
    """Which model gave the first numbers that are not finite, and what may be the cause."""
    if not (is_finite(start.text.positive) and is_finite(start.text.negative)):
        return f"the text encoder in {checkpoint.text_encoder.path} gives {NOT_FINITE}{DAMAGED}"
    if not start.condition.is_finite:
        return f"the VAE in {checkpoint.vae.path} encodes what is known to {NOT_FINITE}{DAMAGED}"
    which = f"{error.expert.name} expert" if len(checkpoint.experts) > 1 else "denoiser"
    path = checkpoint.experts[error.expert.part].path
    return (
        f"the {which} in {path} gives {NOT_FINITE} in step {error.step}{DAMAGED}, "
        "if `sample_guide_scale`, `sample_shift` and the LoRAs' strengths are usual ones"
    )
