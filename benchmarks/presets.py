#!/usr/bin/env python3
"""What presets, caches and a guidance interval save, and how far they take a clip from the one without them.

    python -m benchmarks.presets --task v2v-5B --ckpt_dir DIR --video FILE [--steps 40 20] [--seeds 3]

A trained model is needed: random weights say nothing about quality. Each row is compared with `quality` at the same
steps and seed; rows with fewer steps say what the same work buys without any cache. Prints MagCache's magnitudes of
the model, a table, and as the last line JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.hooks import MagCacheConfig
from diffusers.hooks.mag_cache import MagCacheBlockHook

import wan
from wan.configs import config_for
from wan.continuation import VideoContinuation
from wan.denoiser.model import WanModel
from wan.denoiser.step_cache import Branch, Caching
from wan.errors import UserError
from wan.footage import VideoFile
from wan.settings import Sampling, StepCache
from wan.types import Generation

CACHES = (
    *("magcache:0.03", "magcache:0.06", "magcache:0.12"),
    *("first_block:0.03", "first_block:0.05", "first_block:0.1", "first_block:0.2"),
    *("taylorseer:2", "taylorseer:3", "taylorseer:4"),
)
INTERVALS = ((0.0, 0.9), (0.3, 1.0), (0.5, 1.0))


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """Of pixels in [-1, 1], in dB; None where they are equal."""
    error = float((made - wanted).square().mean())
    return None if error == 0 else 10 * math.log10(4 / error)


@contextmanager
def counted(models: Sequence[WanModel]) -> Iterator[list[int]]:
    """How many blocks were computed: a block that is left out does not come to its attention."""
    blocks = [0]

    def count(*_: Any) -> None:
        blocks[0] += 1

    hooks = [block.attn1.register_forward_pre_hook(count) for model in models for block in model.blocks]
    try:
        yield blocks
    finally:
        for hook in hooks:
            hook.remove()


class Calibration(Caching):
    """Takes the place of a cache and measures the magnitudes that MagCache would read."""

    measured: dict[str, tuple[float, ...]] = {}  # noqa: RUF012  (one run fills it)

    @contextmanager
    def of(self, model: Any, expert: str, steps: int) -> Iterator[Branch]:
        model.enable_cache(MagCacheConfig(num_inference_steps=steps + 1, calibrate=True))
        registry = model.blocks[-1]._diffusers_hook
        (tail,) = [hook for hook in registry.hooks.values() if isinstance(hook, MagCacheBlockHook)]
        try:
            yield model.cache_context
            ratios = tail.state_manager._state_cache["cond"].calibration_ratios
            Calibration.measured[expert] = tuple(round(ratio, 4) for ratio in ratios)
        finally:
            model.disable_cache()


def experts_of(pipeline: VideoContinuation) -> list[WanModel]:
    return [getattr(pipeline, name) for name in pipeline.checkpoint.experts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("v2v-14B", "v2v-5B"), required=True)
    parser.add_argument("--ckpt_dir", required=True)
    parser.add_argument("--video", required=True)
    parser.add_argument("--prompt", default="a ball moves to the right")
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 20])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    args = parser.parse_args()

    config = config_for(args.task, args.ckpt_dir)
    pipeline = wan.pipeline_class(args.task)(config, Path(args.ckpt_dir))
    assert isinstance(pipeline, VideoContinuation)
    footage = VideoFile(args.video)

    def clip(sampling: Sampling, seed: int) -> tuple[Generation, int]:
        plan = dataclasses.replace(
            pipeline.plan(footage, prompt=args.prompt, steps=sampling.steps), sampling=sampling, offload=False
        )
        with counted(experts_of(pipeline)) as blocks:
            return pipeline.extend(footage, seed, plan), blocks[0]

    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        plain = pipeline.rules.merge(steps, guide_scale=args.guidance)
        if not pipeline.config.mag_ratios:
            calibrate(pipeline, clip, plain)
        variants: dict[str, Sampling] = {"quality": plain}
        variants |= {f"{fewer} steps": dataclasses.replace(plain, steps=fewer) for fewer in fewer_than(steps)}
        variants |= {text: dataclasses.replace(plain, cache=StepCache.parse(text)) for text in CACHES}
        variants |= {
            f"{low:g} {high:g}": dataclasses.replace(plain, guidance_interval=(low, high)) for low, high in INTERVALS
        }
        variants["balanced"] = pipeline.rules.merge(steps, guide_scale=args.guidance, preset="balanced")
        variants["turbo, no LoRA"] = pipeline.rules.merge(preset="turbo")
        wanted = [clip(plain, seed) for seed in range(args.seeds)]
        for name, sampling in variants.items():
            made = [clip(sampling, seed) for seed in range(args.seeds)]
            rows.append({"steps": steps, "row": name} | compare(made, wanted))
            print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
    print(json.dumps({"task": args.task, "mag_ratios": pipeline.config.mag_ratios, "rows": rows}))


def fewer_than(steps: int) -> list[int]:
    return [round(steps * share) for share in (0.75, 0.5, 0.25)]


def calibrate(pipeline: VideoContinuation, clip: Any, plain: Sampling) -> None:
    """Give the pipeline's config the magnitudes of its model, measured with a seed that no row has."""
    with mock.patch("wan.clip_sampler.Caching", Calibration):
        clip(plain, 1000)
    ratios = tuple(Calibration.measured.values())
    if len(ratios) != len(pipeline.checkpoint.experts):
        raise UserError(f"{plain.steps} steps do not reach every expert; calibrate with more")
    pipeline.config = dataclasses.replace(pipeline.config, mag_ratios=ratios)
    print(json.dumps({"mag_ratios": ratios}))


def compare(made: list[tuple[Generation, int]], wanted: list[tuple[Generation, int]]) -> dict[str, Any]:
    pairs = list(zip(made, wanted, strict=True))
    errors = [float((a.latents - b.latents).norm() / b.latents.norm()) for (a, _), (b, _) in pairs]
    levels = [level for (a, _), (b, _) in pairs if (level := psnr(a.clip.frames, b.clip.frames)) is not None]
    return {
        "work": round(statistics.mean(a / b for (_, a), (_, b) in pairs), 3),
        "psnr_db": round(statistics.mean(levels), 1) if levels else None,
        "latent_error": round(statistics.mean(errors), 4),
        "sample_s": round(statistics.mean(a.seconds["sample"] for (a, _), _ in pairs), 2),
    }


if __name__ == "__main__":
    main()
