#!/usr/bin/env python3
"""Time and memory of one clip at real size, with random weights made on the GPU: no files are needed.

    python -m benchmarks.clip --scenario 5b-704p-121 [--steps 4] [--chain 3] [--caption] [--stock] [--packed fp8]

Prints a table and, as the last line, JSON. Weights do not change speed or memory; quality is not measured here.
`--stock` times diffusers' own transformer class on the same inputs in the same process: ratios, not lone times.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from PIL import Image

from benchmarks.captioning import RandomCaptioner, captions
from benchmarks.floor import floors
from benchmarks.real_size import DEVICE, DIT, HALFS, SCENARIOS, build, commit, materialise
from benchmarks.timing import Timer, timed
from wan.chain.chain import chain
from wan.chain.plan import Plan
from wan.configs import PRESETS
from wan.continuation import VideoContinuation
from wan.denoiser.attention_backends import fastest_attention, use_attention
from wan.denoiser.conditioning import KnownLatents
from wan.denoiser.fp8 import PRECISIONS
from wan.denoiser.model import WanModel
from wan.denoiser.sampling import Stage
from wan.device.budget import CONTEXT
from wan.device.hardware import grow_segments, peak_gib, reset_peak
from wan.device.host import host_peak_gib
from wan.device.placement import Placement
from wan.errors import UserError
from wan.media import write_video
from wan.pipeline import Pipeline
from wan.stopwatch import Stopwatch
from wan.types import Clip, Footage, Generation, KnownFrames, Request, Step, TextContext, to_uint8
from wan.vae.vae import lay_out


def make_request(pipeline: Pipeline, width: int, height: int, frames: int, steps: int, context: int) -> Request:
    known = [Image.effect_noise((width, height), 60).convert("RGB") for _ in range(context)]
    return Request(
        "p",
        "n",
        KnownFrames(tuple(known)),
        pipeline.geometry(width, height, frames),
        pipeline.rules.merge(steps),
        seed=1,
    )


class PeakWatch(Stopwatch):
    """Notes also what each stage takes of the GPU's memory at its peak."""

    def __init__(self, peaks: dict[str, float], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.peaks = peaks

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        reset_peak(self.device)
        with super().stage(name):
            yield
        self.peaks[name] = max(peak_gib(self.device) or 0.0, self.peaks.get(name, 0.0))


def within(pipeline: Pipeline, vram: float, request: Request, clips: int) -> dict[str, Any]:
    """A clip made within so many GiB, of which the allocator gives out no more."""
    gc.collect()
    torch.cuda.empty_cache()
    grow_segments()
    limit = int(vram * 2**30)
    pipeline.budget = dataclasses.replace(pipeline.budget, vram=limit)
    torch.cuda.set_per_process_memory_fraction((limit - CONTEXT) / torch.cuda.mem_get_info()[1])
    pipeline.embeddings.clear()
    stages = pipeline.budget.stages(request.geometry).items()
    result: dict[str, Any] = {
        "vram": vram,
        "estimated_gib": {name: round(stage.peak(pipeline.budget.tensors) / 2**30, 2) for name, stage in stages},
    }
    try:
        return result | timed_run(pipeline, request, True, clips)
    except (torch.OutOfMemoryError, UserError) as error:
        return result | {"failed": str(error).splitlines()[0]}


def timed_run(pipeline: Pipeline, request: Request, offload: bool, clips: int) -> dict[str, Any]:
    stamps: list[tuple[str, float]] = []  # which denoiser took a step, "" where none did

    def on_step(step: Step) -> None:
        if step.detail:  # whose work is not to be waited for
            return
        torch.cuda.synchronize()
        stamps.append((step.stage if step.latents is not None else "", time.perf_counter()))

    peaks: dict[str, float] = {}
    with patch("wan.pipeline.Stopwatch", partial(PeakWatch, peaks)):
        made = pipeline.run(request, offload=offload, on_step=on_step, clips=clips)
    print(f"{(pipeline.budget.vram or 0) / 2**30:g} GiB: {made.seconds} {peaks}", flush=True)  # a later run may fail
    condition = pipeline.condition(request, pipeline.noise(request), Placement(pipeline.device, offload))
    held = getattr(condition, "known", None)
    # the first step of a stage also moves the expert
    steps = [at - before for (last, before), (this, at) in zip(stamps, stamps[1:], strict=False) if last == this != ""]
    return {
        "kernels": {name: made.notes.get(name) for name in ("attention", "compiled")},
        "seconds": {stage: round(taken, 3) for stage, taken in made.seconds.items()},
        "step_median": round(statistics.median(steps), 3) if steps else None,
        "step_p95": round(statistics.quantiles(steps, n=20)[-1], 3) if len(steps) > 1 else None,
        "steps": [round(step, 3) for step in steps],
        "peak_gpu_gib": {stage: round(peak, 2) for stage, peak in peaks.items()},
        "latents": made.latents,
        "finite": bool(torch.isfinite(made.clip.frames).all()),
        "held_exactly": None if held is None else torch.equal(made.latents[:, : held.shape[1]], held.cpu()),
    }


def chained(pipeline: VideoContinuation, request: Request, count: int, folder: Path) -> dict[str, Any]:
    """A chain of clips that a VLM on the same GPU describes; its clips after the first, and what the GPU does in them.

    `busy`: the share of their time in which a kernel or a copy runs on the GPU, by the profiler.
    """
    captioner = RandomCaptioner(DEVICE)
    pipeline.vlm.use(captioner)
    geometry, fps = request.geometry, Fraction(pipeline.config.sample_fps)
    plan = Plan(geometry, request.sampling, request.negative, count=count)
    numbers = iter(range(1, count + 1))

    def extend(footage: Footage, seed: int) -> Generation:
        return pipeline.extend(footage, seed, dataclasses.replace(plan, number=next(numbers)))

    start = Clip(torch.rand(geometry.frames, geometry.height, geometry.width, 3) * 2 - 1, fps)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    walls, stages, writes = [], [], []
    with ThreadPoolExecutor(1) as writer:
        begun = time.perf_counter()
        for index, made in enumerate(chain(start, count=count, extend=extend, seed=1)):
            walls.append(time.perf_counter() - begun)
            stages.append(made.seconds)
            if index == 0:
                profile.start()
            begun = time.perf_counter()
            writes.append(writer.submit(timed_write, folder / f"{index}.mp4", made))
        torch.cuda.synchronize()
        profile.stop()
    later = [{name: round(taken, 3) for name, taken in row.items()} for row in stages[1:]]
    return {
        "clip_seconds": [round(wall, 2) for wall in walls],
        "stages": later,
        "beside_stages": [round(wall - sum(row.values()), 2) for wall, row in zip(walls[1:], stages[1:], strict=True)],
        "write_seconds": [round(write.result(), 2) for write in writes],
        "busy": round(busy_seconds(profile) / sum(walls[1:]), 4),
        "peak_gpu_gib": peak_gib(DEVICE),
    }


def timed_write(path: Path, made: Generation) -> float:
    """Seconds of writing a clip as a video, and of judging its seam, as a chain does beside the next one."""
    start = time.perf_counter()
    write_video(path, to_uint8(made.clip.frames), made.clip.fps)
    assert made.seam
    return time.perf_counter() - start


def busy_seconds(profile: torch.profiler.profile) -> float:
    """The time in which at least one thing ran on the GPU."""
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    spans = sorted((event.start_ns(), event.end_ns()) for event in events if "CUDA" in str(event.device_type()))
    busy = until = 0
    for begin, end in spans:
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e9


@torch.no_grad()
def stock_step(task: str, request: Request, repeats: int) -> float:
    """Seconds of the two guidance forwards of diffusers' own class in bf16, as its pipeline calls it, in eager mode.

    Its self-attention runs on the fastest kernel that it has.
    """
    with init_empty_weights():
        model = WanTransformer3DModel(**DIT[task])
    keep = tuple(model._keep_in_fp32_modules)
    model = materialise(
        model,
        lambda name: torch.float32 if any(part in name for part in keep) else torch.bfloat16,
        torch.device("cuda"),
    )
    geometry = request.geometry
    heads = DIT[task]["num_attention_heads"]
    attention = fastest_attention(DEVICE, geometry.tokens, heads, 128, torch.bfloat16, flash_4=False)
    for block in model.blocks:
        block.attn1.set_attention_backend(attention)
    latents = torch.randn(1, DIT[task]["in_channels"], *geometry.latent, device="cuda", dtype=torch.bfloat16)
    text = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    t = torch.full((1,), 600, device="cuda")
    if task == "ti2v-5B":
        t = t[:, None].expand(1, geometry.tokens).contiguous()

    def step() -> None:
        for _ in range(2):
            model(latents, t, text, return_dict=False)

    return statistics.median(timed(step, DEVICE, repeats, warm=1))


WITHOUT = ("compile", "probe", "reuse", "rows")


@contextmanager
def without(name: str, pipeline: Pipeline, tokens: int) -> Iterator[None]:
    """Runs without one of `WITHOUT`."""

    def by_token(self: KnownLatents, latents: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        placed, steps = model_input(self, latents, t)
        return placed, steps.repeat_interleave(tokens // steps.shape[1], 1)

    def anew(model: WanModel, stage: Stage, context: TextContext, keep: bool) -> list[torch.Tensor]:
        return [context.positive, context.negative]

    model_input = KnownLatents.model_input
    models: list[WanModel] = [getattr(pipeline, expert) for expert in pipeline.checkpoint.experts]
    with ExitStack() as patches:
        if name == "compile":
            patches.enter_context(patch.object(pipeline, "compile_blocks", False))
            for block in (block for model in models for block in model.blocks):
                patches.enter_context(patch.object(block, "compiled", None))
        if name == "probe":
            patches.enter_context(
                patch("wan.clip_sampler.use_fastest_attention", lambda model, *_: use_attention(model, "native"))
            )
        if name == "reuse":
            patches.enter_context(patch("wan.denoiser.sampling.text_keys", anew))
        if name == "rows":
            patches.enter_context(patch.object(KnownLatents, "model_input", by_token))
        yield


def preset_run(
    pipeline: Pipeline, request: Request, spec: str, offload: bool, clips: int, step: float | None
) -> dict[str, Any]:
    """A clip with a preset, `NAME` or `NAME:STEPS`; its sampling beside that of `quality`, whose steps take `step`.

    Of quality it takes the place of as many steps, or of all that the model has where the preset has its own.
    """
    name, _, steps = spec.partition(":")
    sampling = pipeline.rules.merge(int(steps) if steps else None, preset=name)
    measured_run = timed_run(pipeline, dataclasses.replace(request, sampling=sampling), offload, clips)
    of_quality = pipeline.config.sample_steps if PRESETS[name].steps else sampling.steps
    over = round(measured_run["seconds"]["sample"] / (of_quality * step), 3) if step else None
    return measured_run | {"preset": name, "steps_of_quality": of_quality, "sample_over_quality": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--context_frames", type=int, default=1, help="known frames: 1 or 4n+1")
    parser.add_argument("--no_offload", action="store_true", help="keep every model on the GPU")
    parser.add_argument("--clips", type=int, default=100, help="as one of so many; decides on compiling (default: 100)")
    parser.add_argument("--no_compile", action="store_true", help="run the blocks as they are, in all clips")
    parser.add_argument(
        "--without",
        choices=WITHOUT,
        nargs="*",
        default=[],
        help="also a clip without each of these: compiled blocks; the probe, so on the library's default attention; "
        "reuse, so the text is embedded anew in every forward; rows, so 5B has a timestep for every token",
    )
    parser.add_argument(
        "--preset", nargs="*", default=[], metavar="NAME[:STEPS]", help="also a clip with each of these presets"
    )
    parser.add_argument("--chain", type=int, default=0, metavar="N", help="also a chain of N clips with its captions")
    parser.add_argument("--caption", action="store_true", help="also the time of a caption of an 8B VLM")
    parser.add_argument("--stock", action="store_true", help="also time diffusers' own transformer class")
    parser.add_argument("--packed", choices=("fp8", *HALFS), help="denoisers as from a quantized file")
    parser.add_argument("--vram", type=float, nargs="*", default=[], help="also within so many GiB, for each of them")
    parser.add_argument("--precision", choices=PRECISIONS, help="denoisers in 8 bits")
    parser.add_argument("--vae_dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()

    task, width, height, frames = SCENARIOS[args.scenario]
    with Timer(DEVICE) as building:
        pipeline = build(task, args.packed, args.precision)
    pipeline.vae.model.to(getattr(torch, args.vae_dtype))
    lay_out(pipeline.vae.model)
    pipeline.config = dataclasses.replace(
        pipeline.config, vae_dtype=getattr(torch, args.vae_dtype), low_precision=args.precision
    )
    request = make_request(pipeline, width, height, frames, args.steps, args.context_frames)
    pipeline.compile_blocks = not args.no_compile
    offload, tokens = not args.no_offload, request.geometry.tokens
    runs = [timed_run(pipeline, request, offload, args.clips) for _ in range(2)]
    step = runs[1]["step_median"]
    presets = [preset_run(pipeline, request, spec, offload, args.clips, step) for spec in args.preset]
    lacking = []
    for name in args.without:
        with without(name, pipeline, tokens):
            run = timed_run(pipeline, request, offload, args.clips)
        lacking.append({"without": name, "step_over": round(run["step_median"] / step, 3) if step else None} | run)
    capped = [within(pipeline, vram, request, args.clips) for vram in args.vram]
    whole = runs[1]["latents"]
    for run in (*runs, *presets, *lacking, *capped):
        run["same_latents"] = torch.equal(run.pop("latents", torch.empty(0)), whole)
    stages = pipeline.budget.stages(request.geometry).items()
    floor = floors(pipeline, request)
    times = runs[1]["seconds"] | {"text": runs[0]["seconds"]["text"], "step": runs[1]["step_median"]}  # text is kept
    result: dict[str, Any] = {
        "scenario": args.scenario,
        "context_frames": args.context_frames,
        "commit": args.commit,
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "offload": not args.no_offload,
        "packed": args.packed,
        "precision": args.precision,
        "vae_dtype": args.vae_dtype,
        "estimated_gib": {name: round(stage.peak(None) / 2**30, 2) for name, stage in stages},
        "compile": not args.no_compile,
        "build_seconds": round(building.seconds, 1),
        "first": runs[0],
        "second": runs[1],
        "presets": presets,
        "without": lacking,
        "within": capped,
        "floor": {stage: {what: round(value, 4) for what, value in row.items()} for stage, row in floor.items()},
        "reached": {stage: round(row["seconds"] / times[stage], 3) for stage, row in floor.items() if times.get(stage)},
        "peak_host_gib": round(host_peak_gib(), 1),
    }
    if args.caption:
        result["caption"] = captions(DEVICE)
    if args.chain:
        pipeline.budget = dataclasses.replace(pipeline.budget, vram=None)
        torch.cuda.set_per_process_memory_fraction(1.0)
        with TemporaryDirectory() as folder:
            result["chain"] = chained(pipeline, request, args.chain, Path(folder))
    if args.stock:
        pipeline.vlm.forget()
        for name in ("model", "low_noise_model", "high_noise_model"):
            pipeline.models.forget(name)
        gc.collect()
        torch.cuda.empty_cache()
        result["stock_step"] = round(stock_step(task, request, 2), 3)
        result["step_over_stock"] = round(runs[1]["step_median"] / result["stock_step"], 3)
    for key, value in result.items():
        print(f"{key:16} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
