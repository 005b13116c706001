"""`--dry_run`: what a run would make, and about how long and how large that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan.chain.inventory import Inventory
from wan.denoiser.timetable import forwards
from wan.detail import span
from wan.device.budget import CONTEXT, GIB
from wan.foreign import count_numbered
from wan.options import LONGEST_CONTEXT

if TYPE_CHECKING:
    from wan.chain.plan import Plan
    from wan.continuation import VideoContinuation

H200_FLOPS = 5.5e14  # reached by the denoiser at real sizes (benchmarks/README.md)
MP4_BYTES = 0.03  # per pixel and frame at the crf that clips are written with; footage differs by a factor of three


@dataclass(frozen=True)
class Estimate:
    """What is still to be made of a run: `missing` of its `clips`, and about what that takes.

    `work` is the denoiser's arithmetic in floating point operations, and `seconds` its time: as finished clips took
    where `measured`, else on an H200. `disk_bytes` is what the folder grows by.
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
    _memory(continuation, missing)
    _host_memory(continuation, missing)
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
            text = _words(plan)
        words = " ".join(text.split())
        yield f"{number:>4}  {plan.geometry.frames:>6}  {new:>4}  {start:>7.2f}  {seed:>19}  {known:<12}  {words}"
        start += float(new / continuation.fps)
    missing = inventory.missing
    yield f"{start:.2f} s of new video; {len(missing)} of {count} clips are still to be made"
    if missing:
        yield _disk(missing, continuation.config.z_dim, inventory.settings.keep_state)
        yield _time(continuation, inventory)
        yield _memory(continuation, missing)
        yield _host_memory(continuation, missing)


def _memory(continuation: VideoContinuation, missing: Sequence[Plan]) -> str:
    """The most of a GPU's memory that any clip takes, and that of each stage where one model at a time is there."""
    kinds = {(plan.geometry, plan.offload, tuple(plan.loras.items())) for plan in missing}
    budgets = [(continuation.budget_for(*kind[:2], dict(kind[2])), kind) for kind in kinds]
    budget, (geometry, offload, _) = max(budgets, key=lambda one: one[0].gpu_bytes(*one[1][:2]))
    whole = budget.gpu_bytes(geometry, offload)
    peaks = {name: stage.peak(budget.tensors) for name, stage in budget.stages(geometry).items()}
    by_stage = ", ".join(f"{stage} {(peak + CONTEXT) / GIB:.1f}" for stage, peak in peaks.items())
    loading = by_stage if max(peaks.values()) == whole else "all models at once"
    limited = (
        f", within the {budget.vram / GIB:.1f} that are free" if budget.vram and not continuation.budget.vram else ""
    )
    return f"about {(whole + CONTEXT) / GIB:.1f} GiB of GPU memory ({loading}){limited}, beside the VLM"


def _host_memory(continuation: VideoContinuation, missing: Sequence[Plan]) -> str:
    """The most of the host's memory that any clip takes, and how the models live in it."""
    host, needs = continuation.host, []
    for plan in missing:
        captioner = continuation.vlm.host_bytes if plan.described else 0
        loras = continuation.models.lora_bytes(plan.loras)
        chosen = host.plan(continuation.budget, plan.geometry, loras, captioner)
        needs.append((host.need(chosen, continuation.budget, plan.geometry, loras, captioner), chosen))
    size, chosen = max(needs, key=lambda one: one[0])
    limited_by = "given" if host.given else "free"
    return f"about {size / GIB:.1f} GiB of host memory, of {host.limit / GIB:.1f} that are {limited_by}: {chosen}"


def _words(plan: Plan) -> str:
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
        (state + mp4_bytes(plan)) * plan.best_of
        for state, plan in zip(states, missing, strict=True)
        if plan.keeps_takes
    )
    # an mp4 is there once in the joined video, too
    rest = takes + sum(2 * mp4_bytes(plan) for plan in missing)
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


def mp4_bytes(plan: Plan) -> float:
    """What its mp4 takes, about."""
    return MP4_BYTES * math.prod(plan.geometry.size)


def flops(continuation: VideoContinuation, plan: Plan) -> float:
    """Arithmetic of the denoiser for one clip: its matrix products and attention, from the checkpoint's shapes."""
    tokens = plan.geometry.tokens
    weights = next(iter(continuation.checkpoint.experts.values()))
    matrices = sum(math.prod(shape) for name, shape in weights.shapes.items() if len(shape) == 2)
    blocks = count_numbered(weights.shapes, "blocks.", str(weights.path))
    dim = weights.shapes["patch_embedding.weight"][0]
    forward = 2.0 * matrices * tokens + 4.0 * blocks * dim * tokens * tokens
    return forward * len(plan.candidates) * forwards(continuation.rules.shares(plan.sampling), plan.sampling.cache)


def _time(continuation: VideoContinuation, inventory: Inventory) -> str:
    """Sampling time, from this run's finished clips if it has any."""
    seconds, measured = _seconds(continuation, inventory)
    if measured:
        return f"about {span(seconds)} of sampling, as its finished clips took"
    return f"about {span(seconds)} of sampling on an H200; elsewhere the first clip will tell"


def _work(continuation: VideoContinuation, missing: Sequence[Plan]) -> float:
    return sum(flops(continuation, plan) for plan in missing)


def _seconds(continuation: VideoContinuation, inventory: Inventory) -> tuple[float, bool]:
    """Seconds of sampling, and whether this run's finished clips tell them."""
    work = _work(continuation, inventory.missing)
    rates = [
        flops(continuation, inventory.plans[number - 1]) / seconds
        for number, clip in inventory.clips.items()
        if (seconds := (clip.record.get("seconds") or {}).get("sample"))
    ]
    return (work / statistics.median(rates), True) if rates else (work / H200_FLOPS, False)
