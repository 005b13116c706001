"""The denoise loop, one for all models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.denoiser.conditioning import Condition
from wan.denoiser.model import TextKeys, WanModel
from wan.denoiser.schedule import Scheduler
from wan.denoiser.step_cache import NO_CACHE, Branch, Caching
from wan.denoiser.timetable import share_out
from wan.device.parallel import ALONE, Team
from wan.device.placement import Placement
from wan.types import OnStep, Step, TextContext, is_finite


@dataclass(frozen=True)
class Expert:
    """A denoiser, its guidance, and the lowest timestep it works at. `load` has the model ready when it is called."""

    name: str
    part: str  # its name in a checkpoint
    load: Callable[[], WanModel]
    guidance: float
    lowest: float


class NotFinite(Exception):
    """Latents that hold NaN or infinity: which expert made them, and in which step of the clip, counted from 1."""

    def __init__(self, expert: Expert, step: int) -> None:
        super().__init__(f"the {expert.name} expert's latents are not finite after step {step}")
        self.expert, self.step = expert, step


@dataclass(frozen=True)
class Stage:
    """One expert with its share of the timesteps [n], and the guidance of each."""

    expert: Expert
    timesteps: Tensor
    guidance: tuple[float, ...]


def plan_stages(
    timesteps: Tensor, experts: Sequence[Expert], guides: Callable[[float], bool] = lambda t: True
) -> list[Stage]:
    """The stages of a clip; experts without a timestep get none.

    `experts` go from high noise to low. Where a timestep is not one that `guides`, its guidance is 1.
    """
    stages, begin = [], 0
    for expert, share in zip(experts, share_out(timesteps.tolist(), [one.lowest for one in experts]), strict=True):
        if share:
            guidance = tuple(expert.guidance if guides(t) else 1.0 for t in share)
            stages.append(Stage(expert, timesteps[begin : begin + len(share)], guidance))
        begin += len(share)
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
    caching: Caching = NO_CACHE,
    team: Team = ALONE,
) -> Tensor:
    """Noise [z, F, h, w] -> latents float32 [z, F, h, w]. `context` and `condition` are on the device already.

    Nothing in the loop waits for the GPU but the first and the last step of each expert, whose latents are looked at,
    unless `on_step` does. Raises NotFinite.
    """
    latents, done = noise, 0
    total = sum(len(stage.timesteps) for stage in stages)
    for stage in stages:
        steps = len(stage.timesteps)
        expert = stage.expert.load()
        with placement.on_device(expert) as model, caching.of(model, stage.expert.name, steps) as branch:
            texts = text_keys(model, stage, context, keep=not placement.streams(model))
            for index, (t, guidance) in enumerate(zip(stage.timesteps, stage.guidance, strict=True)):
                flow = predict(model, guidance, condition, texts, latents, t, branch, team)
                latents = scheduler.step(flow[None], t, latents[None], return_dict=False)[0][0]
                done += 1
                if index in (0, steps - 1) and not is_finite(latents):
                    raise NotFinite(stage.expert, done)
                if on_step is not None:
                    on_step(Step(done, total, stage.expert.name, latents))
            del texts  # before the next expert comes; they are of this one's weights
        del expert, model  # which may have to leave before the next one can come
    return condition.finish(latents)


def text_keys(model: WanModel, stage: Stage, context: TextContext, keep: bool) -> list[TextKeys]:
    """What the expert takes of the positive prompt and, where guidance needs it, of the negative one.

    They are kept for all steps, but where the expert's weights leave no room for that.
    """
    guided = any(guidance != 1 for guidance in stage.guidance)
    prompts = [context.positive, context.negative] if guided else [context.positive]
    return [model.text_keys(prompt, keep) for prompt in prompts]


def predict(
    model: WanModel,
    guidance: float,
    condition: Condition,
    texts: Sequence[TextKeys],
    latents: Tensor,
    t: Tensor,
    branch: Branch,
    team: Team = ALONE,
) -> Tensor:
    """The guided flow float32 [z, F, h, w] (classifier-free guidance, Ho & Salimans 2022) with `text_keys`' texts.

    At guidance 1 the unconditional term cancels, so that forward is left out. A cache knows the two by their `branch`.
    Where a `team` shares guidance, each of its halves computes one of the two.
    """
    placed, timestep = condition.model_input(latents, t)

    def flow(name: str, text: TextKeys) -> Tensor:
        with branch(name):
            output: Tensor = model(placed, timestep, text, return_dict=False)[0][0]
        return output

    if guidance == 1:
        return flow("cond", texts[0])
    if team.guidance is not None:
        half = team.guidance.index
        conditional, unconditional = team.guidance.gather(flow(("cond", "uncond")[half], texts[half]))
    else:
        conditional, unconditional = flow("cond", texts[0]), flow("uncond", texts[1])
    return unconditional + guidance * (conditional - unconditional)
