"""Scenes that the tiny family was not trained on, and the clips that continue them. `quality` measures those."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from training import scenes
from training.scenes import Scenes
from training.vae import HELD_OUT
from wan import WanV2V, WanV2V5B
from wan.chain.plan import Plan
from wan.configs import config_for
from wan.continuation import VideoContinuation
from wan.denoiser.conditioning import ImageChannels, KnownLatents, latent_frames
from wan.settings import Context, LoraFile
from wan.types import Clip, Generation, Request

FOLDERS: dict[str, tuple[str, type[VideoContinuation]]] = {
    "v2v-5B": ("tiny-Wan2.2-TI2V-5B", WanV2V5B),
    "v2v-14B": ("tiny-Wan2.2-I2V-A14B", WanV2V),
}


@dataclass(frozen=True)
class Scene:
    """One held-out scene, and its past as the clip that is continued. Frame 0 is the clip's last one."""

    truth: Scenes
    source: Clip
    caption: str

    @property
    def shapes(self) -> list[int]:
        """Indices of the shapes that are there."""
        return [index for index, present in enumerate(self.truth.present[0].tolist()) if present]

    def colour(self, index: int) -> str:
        return list(scenes.COLOURS)[int(self.truth.colour[0, index])]

    @property
    def colours(self) -> list[str]:
        return sorted(self.colour(index) for index in self.shapes)


def held_out(count: int, seed: int = 0) -> list[Scene]:
    """The first `count` held-out scenes of that seed; they are the same ones whatever the count."""
    many = scenes.sample(max(count, 200), torch.Generator().manual_seed(HELD_OUT + seed))[:count]
    past = torch.arange(1 - scenes.FRAMES, 1)
    return [
        Scene(one, Clip(one.draw(past)[0].permute(1, 2, 3, 0), Fraction(scenes.FPS)), one.captions(0)[0])
        for one in (many[index : index + 1] for index in range(count))
    ]


@lru_cache(1)
def open_pipeline(models: Path, task: str, precision: str | None = None) -> VideoContinuation:
    name, pipeline = FOLDERS[task]
    return pipeline(
        config_for(task, models / name).variant(low_precision=precision),
        models / name,
        vlm_path=models / "tiny-InternVL",
    )


@dataclass(frozen=True)
class Maker:
    """Footage and seed -> the clip that goes on from it. It can be sent to another process, which loads the models."""

    models: Path
    task: str
    mode: str
    steps: int | None = None
    guidance: float | None = None
    drift_correction: float = 0.0
    colour_carry: float = 0.0
    drifting: bool = False
    seed: int = 0  # of the scenes
    prompt_mode: str = "describe"
    preset: str = "quality"
    cache: str | None = None
    precision: str | None = None
    loras: tuple[Path, ...] = ()  # of the high and the low expert, or of the one

    def __call__(self, footage: Any, seed: int) -> Generation:
        name, _, frames = self.mode.partition(":")
        pipeline = open_pipeline(self.models, self.task, self.precision)
        plan: Plan = pipeline.plan(
            footage,
            context=Context.choose(name, int(frames) if frames else None),
            steps=self.steps,
            guidance=self.guidance,
            drift_correction=self.drift_correction,
            colour_carry=self.colour_carry,
            prompt="" if self.drifting else None,
            prompt_mode=self.prompt_mode,
            preset=self.preset,
            cache=self.cache,
            loras={
                expert: (LoraFile(file),)
                for expert, file in zip(sorted(pipeline.checkpoint.experts), self.loras, strict=False)
            },
        )
        memory = footage.prompt_memory if isinstance(footage, Generation) else {}
        with torch.no_grad():
            if not self.drifting:
                return pipeline.extend(footage, seed, plan, memory=memory)
            number, index = divmod(seed, 1000)
            begins = index * (plan.geometry.frames - plan.dropped) - plan.dropped + 1
            run = Drifting(pipeline, held_out(number + 1, self.seed)[number], begins)
            with patch.object(pipeline, "run", run):
                return pipeline.extend(footage, seed, plan)


@dataclass(frozen=True)
class Drifting:
    """In place of sampling: the scene as it truly goes on, in the colours that the condition decodes to.

    They drift from there. `begins` is the moment of the clip's first frame.
    """

    pipeline: VideoContinuation
    scene: Scene
    begins: int

    CONTRAST = 0.02  # that a clip gains, and
    LEVELS = (1.0, 0.0, -0.5)  # of 255 that it moves by in R, G and B

    def __call__(self, request: Request, *, offload: bool, **_: Any) -> Generation:
        pipeline = self.pipeline
        budget = pipeline.budget.for_clip(request.geometry, offload)
        placements = budget.placements(request.geometry, offload, False)
        condition = pipeline.condition(request, pipeline.noise(request), placements("encoding"))
        count = len(request.known.leading)
        if isinstance(condition, KnownLatents):
            known = condition.known
        else:
            assert isinstance(condition, ImageChannels)
            known = condition.channels[4:, : latent_frames(count)]
        shown = pipeline.shared_vae.decode(known, placements("decoding"), None).permute(1, 0, 2, 3)  # [n, 3, H, W]
        times = torch.arange(self.begins, self.begins + request.geometry.frames)
        truth = self.scene.truth.draw(times)[0].transpose(0, 1)
        gain, offset = _tones(truth[count - 1], shown[-1])
        frames = [*shown]
        for index in range(count, len(truth)):
            share = (index - count + 1) / (len(truth) - count)
            levels = torch.tensor(self.LEVELS) * 2 / 255 * share
            tones = gain * (1 + self.CONTRAST * share), offset + levels
            frames.append((truth[index] * tones[0][:, None, None] + tones[1][:, None, None]).clamp(-1, 1))
        clip = Clip(torch.stack(frames).permute(0, 2, 3, 1), pipeline.fps)
        return Generation(clip, torch.zeros(pipeline.config.z_dim, *request.geometry.latent), request)


def _tones(truth: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset [3] of each channel between two pictures [3, H, W]."""
    one, other = truth.flatten(1), shown.flatten(1)
    means = one.mean(1, keepdim=True), other.mean(1, keepdim=True)
    gain = ((one - means[0]) * (other - means[1])).sum(1) / ((one - means[0]) ** 2).sum(1).clamp(min=1e-6)
    return gain, (means[1] - gain[:, None] * means[0])[:, 0]
