"""A step and its parts on several GPUs against one: `torchrun --nproc_per_node=N -m benchmarks.parallel`.

One run a host: it prints, for each scenario and each way to share a step, milliseconds of a step, how many times faster
that is than one GPU in the same run, GPU memory, and how far the numbers are from float32 ones. Random weights, a few
layers: a step's time is theirs times the model's layers, plus what is outside of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.distributed.tensor import DTensor

from benchmarks.real_size import DIT, SCENARIOS, commit, materialise
from benchmarks.timing import milliseconds
from wan.configs import WAN_CONFIGS
from wan.denoiser.attention_backends import use_attention
from wan.denoiser.fp8 import quantize_model
from wan.denoiser.model import WanModel, policy_dtype
from wan.denoiser.sequence import Share
from wan.device.hardware import peak_gib, reset_peak
from wan.device.parallel import Group, Team
from wan.device.ranks import Sizes, World
from wan.device.sharding import shard, write


def build(
    task: str, layers: int, device: torch.device, float32: bool = False, precision: str | None = None
) -> WanModel:
    """A denoiser of that many layers, the same on each GPU."""
    with init_empty_weights():
        model = WanModel(**DIT[task] | {"num_layers": layers})
    dtype = WAN_CONFIGS[task].param_dtype
    materialise(model, lambda name: policy_dtype(name, dtype), device)
    if precision:
        quantize_model(model, precision, device)
    return model.float() if float32 else model


@torch.no_grad()
def sliced(whole: WanModel, task: str, device: torch.device, group: Group) -> WanModel:
    """The same denoiser with a slice of its weights on each GPU."""
    dtype = WAN_CONFIGS[task].param_dtype
    with init_empty_weights():
        model = WanModel(**DIT[task] | {"num_layers": len(whole.blocks)})
    shard(model, "blocks", lambda name: policy_dtype(name, dtype), device, group, ["text_keys"])
    for name, parameter in model.named_parameters():
        write(parameter, whole.get_parameter(name))
    model.eval()
    return model


def inputs(task: str, width: int, height: int, frames: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Latents, timestep and text of a forward."""
    config = WAN_CONFIGS[task]
    time, high, wide = config.vae_stride
    shape = (1, DIT[task]["in_channels"], (frames - 1) // time + 1, height // high, width // wide)
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(shape, device=device, generator=generator)
    steps = torch.full((1, shape[2]), 700.0, device=device)
    steps[:, 0] = 0
    text = torch.randn(1, 512, 4096, device=device, generator=generator)
    return latents, steps if config.boundary is None else steps[:, -1], text


def by_kernel(work: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the GPU by what it does, and for how long it does nothing but exchange or wait."""
    kinds = {"nccl": "exchange", "Memcpy": "copies", "fmha|sdpa|flash|attend|cudnn": "attention"}
    kinds |= {"gemm|nvjet|cutlass|cublas|xmma|_mm": "products", "triton": "fused"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    by_kind: dict[str, float] = {}
    busy, events = [], [one for one in profile.events() or () if str(one.device_type).endswith("CUDA")]
    for event in events:
        kind = next((kind for names, kind in kinds.items() if re.search(names, event.name)), "other")
        span = event.time_range
        by_kind[kind] = by_kind.get(kind, 0) + (span.end - span.start) / 1000
        if kind != "exchange":
            busy.append((span.start, span.end))
    idle, last = 0.0, min((one.time_range.start for one in events), default=0.0)
    for start, end in sorted(busy):
        idle, last = idle + max(0.0, start - last), max(last, end)
    return by_kind | {"computes nothing": idle / 1000}


def exchange_alone(team: Team, tokens: int, width: int, heads: int, device: torch.device) -> dict[str, float]:
    """Milliseconds in which queries are packed and exchanged, and GB/s out of each GPU."""
    assert team.tokens is not None
    share = Share.of(tokens, team.tokens)
    queries = torch.zeros(1, share.count, heads, width // heads, dtype=torch.bfloat16, device=device)
    taken = milliseconds(lambda: [share.landed(share.spread(queries)) for _ in range(8)], device, 3) / 8
    return {"exchange_ms": taken, "exchange_gb_s": queries.nbytes * (1 - 1 / share.heads_ranks) / taken / 1e6}


@torch.no_grad()
def measure(name: str, world: World, teams: dict[str, Team], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One scenario: every way to share a step."""
    task, width, height, frames = SCENARIOS[name]
    device = torch.device("cuda", world.local_rank)
    latents, steps, text = inputs(task, width, height, frames, device)
    tall = DIT[task]["num_layers"]
    rows: list[dict[str, Any]] = []
    models = {count: build(task, count, device, precision=args.precision) for count in args.layers}
    for model in models.values():
        if args.precision != "fp8_attention":
            use_attention(model, args.attention)
        model.compile_blocks()
    flows = {}
    for label, team in teams.items():
        if "slices" in label:
            assert team.node is not None
            for count, model in list(models.items()):
                models[count] = sliced(model, task, device, team.node)
                if args.precision != "fp8_attention":
                    use_attention(models[count], args.attention)
                models[count].compile_blocks()
            del model  # the whole ones are gone
        seconds_by = {}
        row: dict[str, Any] = {"scenario": name, "plan": label}
        reset_peak(device)
        for count, model in models.items():
            model.token_group = team.tokens
            texts = model.text_keys(text)

            def forward(model: WanModel = model, texts: Any = texts, team: Team = team) -> torch.Tensor:
                flow: torch.Tensor = model(latents, steps, texts, return_dict=False)[0]
                if team.guidance is not None:
                    team.guidance.gather(flow)
                return flow

            flows[label] = forward()
            seconds_by[count] = milliseconds(forward, device, args.repeats)
        few, many = sorted(seconds_by)
        block = (seconds_by[many] - seconds_by[few]) / (many - few)
        whole = seconds_by[few] + block * (tall - few)
        step = whole * (1 if team.sizes.cfg == 2 else 2)
        row |= {"block_ms": block, "forward_ms": whole, "step_ms": step}
        weights = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in models[many].parameters())
        row |= {"peak_gib": peak_gib(device), "weights_gib": weights / 2**30}
        rows.append(row)
        row["speedup"] = rows[0]["step_ms"] / step
        flow, alone = flows[label].double(), flows["1 GPU"].double()
        row["from_one_gpu"] = float((flow - alone).norm() / alone.norm())
        if args.profile:
            row |= by_kernel(forward)
            if team.tokens is not None and team.sizes.ulysses > 1:
                shape = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
                sizes = model.config.num_attention_heads, model.config.attention_head_dim
                row |= exchange_alone(team, shape, sizes[0] * sizes[1], sizes[0], device)
        if world.is_first:
            print(
                json.dumps({key: round(value, 8) if isinstance(value, float) else value for key, value in row.items()}),
                flush=True,
            )
    return rows


@torch.no_grad()
def exactness(world: World, teams: dict[str, Team], attention: str) -> None:
    """How far several GPUs are from one, float32, and from float32 in bf16; sizes that need filling among them."""
    device = torch.device("cuda", world.local_rank)
    for task, width, height, frames in (("i2v-A14B", 208, 240, 13), ("ti2v-5B", 416, 224, 21)):
        latents, steps, text = inputs(task, width, height, frames, device)
        for float32 in (True, False):
            model = build(task, 4, device, float32=float32)
            if not float32:
                use_attention(model, attention)
            flows = {}
            for label, team in teams.items():
                if "slices" in label:
                    continue
                model.token_group = team.tokens
                flows[label] = model(latents, steps, text, return_dict=False)[0].double()
            if float32:
                exact = flows["1 GPU"]
            if world.is_first:
                distances = {
                    label: f"{float((flow - exact).norm() / exact.norm()):.2e}" for label, flow in flows.items()
                }
                print(task, f"{width}x{height}x{frames}", "float32" if float32 else "bf16", "from float32", distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS))
    parser.add_argument("--layers", nargs=2, type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--attention", default="_native_cudnn")
    parser.add_argument("--precision")
    parser.add_argument("--plans", nargs="+", default=["ulysses", "cfg", "ring"])
    parser.add_argument("--profile", action="store_true", help="also what the GPU does in a forward of some layers")
    parser.add_argument("--slices", action="store_true", help="also with a slice of the weights on each GPU (FSDP)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    world = World.read(os.environ)
    device = torch.device("cuda", world.local_rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    alone = Team(world, Sizes())
    sizes = {f"ulysses {world.size}": Sizes(1, world.size), f"ring {world.size}": Sizes(1, 1, world.size)}
    if world.size % 2 == 0:
        sizes[f"cfg 2 x ulysses {world.size // 2}"] = Sizes(2, world.size // 2)
    taken = {label: one for label, one in sizes.items() if label.split()[0] in args.plans}
    teams = {"1 GPU": alone} | {label: Team.start(world, one, device, 120) for label, one in taken.items()}
    if args.slices:  # last, since the whole weights go for them
        teams[f"ulysses {world.size}, slices"] = teams[f"ulysses {world.size}"]
    if world.is_first:
        print(commit(), torch.cuda.get_device_name(device), "x", world.size, "torch", torch.__version__)
    if not args.precision and not args.profile:
        exactness(world, teams, args.attention)
    rows = [row for name in args.scenarios for row in measure(name, world, teams, args)]
    if args.out and world.is_first:
        args.out.write_text(json.dumps(rows, indent=1))
    for team in teams.values():
        team.end()


if __name__ == "__main__":
    main()
