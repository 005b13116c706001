"""The VAEs in bands of rows on several GPUs against one: `torchrun --nproc_per_node=4 -m benchmarks.vae_bands`.

Random weights at real size, one run a host. For each clip, stage and count of GPUs: seconds (of the slowest rank),
GPU memory above the weights, and the distance from one GPU. Float32 without TF32 has few frames: it is there for the
numbers. Without GPUs small networks and pictures run, for a test of this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.real_size import SCENARIOS, commit
from benchmarks.timing import slowest, timed
from benchmarks.vae import build, tf32
from wan.device.hardware import peak_gib, reset_peak, synchronize
from wan.device.parallel import Group, Team
from wan.device.ranks import Sizes, World
from wan.vae.vae import WanVAE, lay_out

EXACT_FRAMES = 17


def groups_of(world: World) -> dict[int, Group | None]:
    """How many GPUs share a clip, and this one's group: one alone, pairs, fours, …, all."""
    groups: dict[int, Group | None] = {1: None}
    for size in (count for count in range(2, world.size + 1) if world.size % count == 0):
        for first in range(0, world.size, size):
            handle = dist.new_group(list(range(first, first + size)))  # each is made by all
            if first <= world.rank < first + size:
                groups[size] = Group(handle, size, world.rank - first)
    return groups


def measured(call: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[Tensor, dict[str, float]]:
    """The result, the median seconds after one call, and the peak above what was there."""
    made = call()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    reset_peak(device)
    taken = []
    for _ in range(repeats):
        dist.barrier()
        taken += timed(call, device)
    row = {"seconds": round(slowest(statistics.median(taken), device), 3)}
    peak = peak_gib(device)
    return made, row if peak is None else row | {"peak_gib": round(slowest(peak - before / 2**30, device), 2)}


@torch.no_grad()
def measure(
    name: str, world: World, groups: dict[int, Group | None], dtype: torch.dtype, args: argparse.Namespace
) -> None:
    """Both stages of one clip; prints a row for each count of GPUs."""
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    tiny = device.type == "cpu"
    task, width, height, frames = SCENARIOS[name]
    exact = dtype == torch.float32
    frames = args.frames or (min(frames, EXACT_FRAMES) if exact else frames)
    width, height, frames = (64, 128, 9) if tiny else (width, height, frames)
    model = build(task, device, tiny).to(dtype)
    lay_out(model)
    channels = model.config.z_dim
    vae = WanVAE(model, [0.0] * channels, [1.0] * channels).to(device)
    coarse = torch.rand(3, frames, height // 16, width // 16, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse[None], (frames, height, width), mode="trilinear")[0] * 2 - 1
    pixels = pixels.to(device)
    latents = vae.encode([pixels])[0]

    def encode(group: Group | None) -> Tensor:
        return vae.encode([pixels], group)[0]

    def decode(group: Group | None) -> Tensor:
        return vae.decode([latents], None, group)[0]

    for stage, through in (("encode", encode), ("decode", decode)):
        alone = None
        for count, group in groups.items():
            made, row = measured(partial(through, group), device, 1 if exact else args.repeats)
            alone = made if alone is None else alone
            line: dict[str, Any] = {"clip": name, "dtype": str(dtype).rpartition(".")[2], "frames": frames}
            line |= {"stage": stage, "gpus": count} | row
            if made.shape == alone.shape:  # the first rank of a group has what is decoded
                distance = (made.double() - alone.double()).norm() / alone.double().norm()
                line |= {"equal": torch.equal(made, alone), "from_one": float(f"{float(distance):.2e}")}
            if world.is_first:
                print(json.dumps(line), flush=True)
            if args.profile:
                with torch.profiler.profile() as profile:
                    through(group)
                    synchronize(device)
                if world.is_first:
                    by = f"self_{device.type}_time_total"
                    print(profile.key_averages().table(sort_by=by, row_limit=14, max_name_column_width=80), flush=True)
            del made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", nargs="+", default=["a14b-480p-81", "5b-704p-121"], choices=tuple(SCENARIOS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=("float32", "float16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, help="4n+1 in place of the clip's")
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes in one and in all GPUs")
    args = parser.parse_args()
    world = World.read(os.environ)
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    team = Team.start(world, Sizes(1, world.size), device, 120)
    if world.is_first:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        print(commit(), kind, "x", world.size, "torch", torch.__version__, flush=True)
    groups = groups_of(world)
    for name in args.scenarios:
        for dtype in args.dtypes:
            with tf32(dtype != "float32"):
                measure(name, world, groups, getattr(torch, dtype), args)
    team.end()


if __name__ == "__main__":
    main()
