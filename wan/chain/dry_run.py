"""`--dry_run`: what a run would make, and about how long and how large that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan.chain.inventory import Inventory
from wan.denoiser.timetable import forwards
from wan.detail import span
from wan.device.budget import CONTEXT, GIB
from wan.foreign import count_numbered
from wan.options import LONGEST_CONTEXT
from wan.settings import LoraFile, Sampling
from wan.types import Geometry

if TYPE_CHECKING:
    from wan.chain.plan import Plan
    from wan.continuation import VideoContinuation
    from wan.pipeline import Pipeline

H200_FLOPS = 5.5e14  # reached by the denoiser at real sizes (benchmarks/README.md)
MP4_BYTES = 0.03  # per pixel and frame at the crf that clips are written with; footage differs by a factor of three


@dataclass(frozen=True)
class Effort:
    """What of a clip its time and memory follow from.

    So many `candidates` of it are made. `captioner` is the host memory in bytes of a VLM that describes what was
    before, and `has_vlm_beside` whether that lives on the device of the models.
    """

    geometry: Geometry
    sampling: Sampling
    offload: bool
    loras: Mapping[str, tuple[LoraFile, ...]] = field(default_factory=dict)
    candidates: int = 1
    captioner: int = 0
    has_vlm_beside: bool = False

    @classmethod
    def of(cls, continuation: VideoContinuation, plan: Plan) -> Effort:
        """That of a clip that continues a video."""
        vlm = continuation.vlm
        captioner, is_beside = (vlm.host_bytes, vlm.is_beside) if plan.described else (0, False)
        return cls(plan.geometry, plan.sampling, plan.offload, plan.loras, len(plan.candidates), captioner, is_beside)


@dataclass(frozen=True)
class Estimate:
    """What is still to be made of a run: `missing` of its `clips`, and about what that takes.

    `work` is the denoiser's arithmetic in floating point operations, and `seconds` its time: as finished clips took
    where `measured`, else on one H200. `disk_bytes` is what the folder grows by.
    """

    clips: int
    missing: int
    work: float
    seconds: float
    measured: bool
    disk_bytes: float


def estimate(continuation: VideoContinuation, inventory: Inventory) -> Estimate:
    """What is still to be made. Raises UserError where no GPU or host of this machine's has the memory for it."""
    if not (missing := inventory.missing):
        return Estimate(inventory.count, 0, 0.0, 0.0, False, 0.0)
    efforts = [Effort.of(continuation, plan) for plan in missing]
    _memory(continuation, efforts)
    _host_memory(continuation, efforts)
    work, (seconds, measured) = _work(continuation, missing), _seconds(continuation, inventory)
    disk, _ = _disk_bytes(missing, continuation.config.z_dim, inventory.settings.keep_state)
    return Estimate(inventory.count, len(missing), work, seconds, measured, disk)


def outline(continuation: VideoContinuation, inventory: Inventory) -> Iterator[str]:
    """The lines of the plan: a table of the clips, then sums."""
    size, count = inventory.plans[0].geometry, inventory.count
    where = inventory.folder.path
    yield f"{count} clips of {size.width}x{size.height} at {continuation.fps} frames per second, in {where}"
    yield f"{'clip':>4}  {'frames':>6}  {'new':>4}  {'from s':>7}  {'seed':>19}  {'known':<12}  prompt"
    start = 0.0
    for number, plan in enumerate(inventory.plans, 1):
        new = plan.shown - plan.fade_in
        known = "a cut" if plan.is_cut else f"{plan.context.mode} {plan.context.frames}"
        if (clip := inventory.clips.get(number)) is not None:
            seed, text = clip.record["seed"], f"(finished) {clip.record['prompt']}"
        else:
            seed = "drawn" if inventory.seeds.is_drawn(number) else inventory.seeds.of(number)
            text = prompt_of(plan)
        words = " ".join(text.split())
        yield f"{number:>4}  {plan.geometry.frames:>6}  {new:>4}  {start:>7.2f}  {seed:>19}  {known:<12}  {words}"
        start += float(new / continuation.fps)
    missing = inventory.missing
    yield f"{start:.2f} s of new video; {len(missing)} of {count} clips are still to be made"
    if missing:
        yield _disk(missing, continuation.config.z_dim, inventory.settings.keep_state)
        yield _time(continuation, inventory)
        efforts = [Effort.of(continuation, plan) for plan in missing]
        yield _memory(continuation, efforts)
        yield _host_memory(continuation, efforts)


def outline_clip(pipeline: Pipeline, effort: Effort) -> Iterator[str]:
    """What a clip alone takes, in lines. Raises UserError where there is no memory for it."""
    pipeline.budget_for(effort.geometry, effort.offload, effort.loras).check(effort.geometry)
    yield f"about {size_in_words(mp4_bytes(effort.geometry))} of disk"
    yield f"about {span(flops(pipeline, effort) / H200_FLOPS)} of sampling on one H200"
    yield _memory(pipeline, [effort])
    yield _host_memory(pipeline, [effort])


def _memory(pipeline: Pipeline, efforts: Sequence[Effort]) -> str:
    """The most of a GPU's memory that any clip takes, and that of each stage where one model at a time is there."""
    kinds = {(one.geometry, one.offload, tuple(one.loras.items())) for one in efforts}
    budgets = [(pipeline.budget_for(*kind[:2], dict(kind[2])), kind) for kind in kinds]
    budget, (geometry, offload, _) = max(budgets, key=lambda one: one[0].gpu_bytes(*one[1][:2]))
    whole = budget.gpu_bytes(geometry, offload)
    peaks = {name: stage.peak(budget.tensors) for name, stage in budget.stages(geometry).items()}
    by_stage = ", ".join(f"{stage} {(peak + CONTEXT) / GIB:.1f}" for stage, peak in peaks.items())
    loading = by_stage if max(peaks.values()) == whole else "all models at once"
    limited = f", within the {budget.vram / GIB:.1f} that are free" if budget.vram and not pipeline.budget.vram else ""
    beside = ", beside the VLM" if any(one.has_vlm_beside for one in efforts) else ""
    return f"about {(whole + CONTEXT) / GIB:.1f} GiB of GPU memory ({loading}){limited}{beside}"


def _host_memory(pipeline: Pipeline, efforts: Sequence[Effort]) -> str:
    """The most of the host's memory that any clip takes, and how the models live in it."""
    host, needs = pipeline.host, []
    for one in efforts:
        loras = pipeline.models.lora_bytes(one.loras)
        chosen = host.plan(pipeline.budget, one.geometry, loras, one.captioner)
        needs.append((host.need(chosen, pipeline.budget, one.geometry, loras, one.captioner), chosen))
    size, chosen = max(needs, key=lambda one: one[0])
    limited_by = "given" if host.given else "free"
    return f"about {size / GIB:.1f} GiB of host memory, of {host.limit / GIB:.1f} that are {limited_by}: {chosen}"


def prompt_of(plan: Plan) -> str:
    """The prompt as it is known before the VLM was asked."""
    if not plan.described:
        return f"{plan.prefix} {plan.prompt}".strip()
    what = "what the VLM says happens next" if plan.prompt_mode == "continue" else "a description by the VLM"
    goal = f", towards: {plan.prompt}" if plan.prompt else ""
    return f"{plan.prefix} <{what}{goal}>".strip()


def _disk(missing: Sequence[Plan], z_dim: int, keep_state: str) -> str:
    """What the folder grows by, and what of it are frames and latents that `keep_state` is about."""
    size, kept = _disk_bytes(missing, z_dim, keep_state)
    last = _disk_bytes(missing, z_dim, "last")[1]
    less = f"; {size_in_words(last)} with `keep_state` last" if keep_state == "all" and len(missing) > 2 else ""
    states = f"{size_in_words(kept)} are frames and latents to go on from{less}"
    return f"about {size_in_words(size)} of disk, of which {states}"


def _disk_bytes(missing: Sequence[Plan], z_dim: int, keep_state: str) -> tuple[float, float]:
    """Bytes that the folder grows by, and those of frames and latents among them."""
    states = [state_bytes(plan, z_dim) for plan in missing]
    takes = sum(
        (state + mp4_bytes(plan.geometry)) * plan.best_of
        for state, plan in zip(states, missing, strict=True)
        if plan.keeps_takes
    )
    # an mp4 is there once in the joined video, too
    rest = takes + sum(2 * mp4_bytes(plan.geometry) for plan in missing)
    kept = sum(states[-2:] if keep_state == "last" else states)
    return rest + kept, kept


def size_in_words(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size > 2**29 else f"{size / 2**20:.0f} MiB"


def state_bytes(plan: Plan, z_dim: int) -> float:
    """What a clip's latents, last frames and caption frames take."""
    frames, height, width = plan.geometry.size
    latents = 4 * z_dim * math.prod(plan.geometry.latent)
    tail = 4 * 3 * height * width * min(LONGEST_CONTEXT, frames)
    return latents + tail + 3 * height * width * plan.num_segments


def mp4_bytes(geometry: Geometry) -> float:
    """What a clip's mp4 takes, about."""
    return MP4_BYTES * math.prod(geometry.size)


def flops(pipeline: Pipeline, effort: Effort) -> float:
    """Arithmetic of the denoiser for one clip: its matrix products and attention, from the checkpoint's shapes."""
    tokens = effort.geometry.tokens
    weights = next(iter(pipeline.checkpoint.experts.values()))
    matrices = sum(math.prod(shape) for name, shape in weights.shapes.items() if len(shape) == 2)
    blocks = count_numbered(weights.shapes, "blocks.", str(weights.path))
    dim = weights.shapes["patch_embedding.weight"][0]
    forward = 2.0 * matrices * tokens + 4.0 * blocks * dim * tokens * tokens
    return forward * effort.candidates * forwards(pipeline.rules.shares(effort.sampling), effort.sampling.cache)


def _time(continuation: VideoContinuation, inventory: Inventory) -> str:
    """Sampling time, from this run's finished clips if it has any."""
    seconds, measured = _seconds(continuation, inventory)
    if measured:
        return f"about {span(seconds)} of sampling, as its finished clips took"
    return f"about {span(seconds)} of sampling on one H200; elsewhere the first clip will tell"


def _work(continuation: VideoContinuation, missing: Sequence[Plan]) -> float:
    return sum(flops(continuation, Effort.of(continuation, plan)) for plan in missing)


def _seconds(continuation: VideoContinuation, inventory: Inventory) -> tuple[float, bool]:
    """Seconds of sampling, and whether this run's finished clips tell them."""
    work = _work(continuation, inventory.missing)
    rates = [
        flops(continuation, Effort.of(continuation, inventory.plans[number - 1])) / seconds
        for number, clip in inventory.clips.items()
        if (seconds := (clip.record.get("seconds") or {}).get("sample"))
    ]
    return (work / statistics.median(rates), True) if rates else (work / H200_FLOPS, False)
