"""The denoise loop, one for all models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.modules.conditioning import Condition
from wan.modules.model import TextKeys, WanModel
from wan.modules.schedule import Scheduler
from wan.placement import Placement
from wan.types import OnStep, Step, TextContext


@dataclass(frozen=True)
class Expert:
    """A denoiser, its guidance, and the lowest timestep it works at."""

    name: str
    model: WanModel
    guidance: float
    lowest: float


@dataclass(frozen=True)
class Stage:
    """One expert with its share of the timesteps, int64 [n]."""

    expert: Expert
    timesteps: Tensor


def plan_stages(timesteps: Tensor, experts: Sequence[Expert]) -> list[Stage]:
    """Give every timestep to the first expert that works at it; experts without a timestep get no stage.

    `experts` go from high noise to low. A14B: the high-noise expert works from boundary * 1000 up.
    """
    stages, rest = [], timesteps
    for expert in experts:
        mine = rest >= expert.lowest
        if mine.any():
            stages.append(Stage(expert, rest[mine]))
        rest = rest[~mine]
    return stages


@torch.no_grad()
def sample(
    noise: Tensor,
    stages: Sequence[Stage],
    scheduler: Scheduler,
    condition: Condition,
    context: TextContext,
    placement: Placement,
    on_step: OnStep | None = None,
) -> Tensor:
    """Noise [z, F, h, w] -> latents float32 [z, F, h, w]. `context` and `condition` are on the device already.

    Nothing in the loop waits for the GPU, unless `on_step` does.
    """
    latents, done = noise, 0
    total = sum(len(stage.timesteps) for stage in stages)
    for stage in stages:
        with placement.on_device(stage.expert.model):
            texts = text_keys(stage.expert, context)
            for t in stage.timesteps:
                flow = predict(stage.expert, condition, texts, latents, t)
                latents = scheduler.step(flow[None], t, latents[None], return_dict=False)[0][0]
                done += 1
                if on_step is not None:
                    on_step(Step(done, total, stage.expert.name, latents))
            del texts  # before the next expert comes; they are of this one's weights
    return condition.finish(latents)


def text_keys(expert: Expert, context: TextContext) -> list[TextKeys]:
    """What the expert takes of the positive prompt and, where guidance needs it, of the negative one.

    At guidance 1 the unconditional term cancels, so that forward is left out.
    """
    prompts = [context.positive] if expert.guidance == 1 else [context.positive, context.negative]
    return [expert.model.text_keys(prompt) for prompt in prompts]


def predict(expert: Expert, condition: Condition, texts: Sequence[TextKeys], latents: Tensor, t: Tensor) -> Tensor:
    """The guided flow float32 [z, F, h, w] (classifier-free guidance, Ho & Salimans 2022) with `text_keys`' texts."""
    placed, timestep = condition.model_input(latents, t)
    flows: list[Tensor] = [expert.model(placed, timestep, text, return_dict=False)[0][0] for text in texts]
    if len(flows) == 1:
        return flows[0]
    conditional, unconditional = flows
    return unconditional + expert.guidance * (conditional - unconditional)
