"""The library's own denoiser on several GPUs: `torchrun --nproc_per_node=4 -m benchmarks.parallel_peer`.

The stock class of diffusers with its own context parallelism (Ulysses, ring) on the GPUs of this host, eager and
compiled, one guidance forward; the same clips, random weights, layers and rows as `benchmarks.parallel`, whose peer it
is. Without GPUs a narrow model and a small clip run with `--plans "1 GPU"`, for a test of this file: the library's
parallelism asks for a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import ContextParallelConfig, WanTransformer3DModel

from benchmarks.real_size import DIT, SCENARIOS, commit, materialise
from benchmarks.timing import milliseconds
from wan.device.hardware import peak_gib, reset_peak
from wan.device.ranks import World

PLANS: dict[str, dict[str, int]] = {"1 GPU": {}, "ulysses": {"ulysses_degree": 0}, "ring": {"ring_degree": 0}}


def build(task: str, layers: int, device: torch.device, sizes: dict[str, int], attention: str) -> Any:
    """The library's model of so many layers, shared among the GPUs as `sizes` says."""
    narrow = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 256} if device.type == "cpu" else {}
    with init_empty_weights():
        model = WanTransformer3DModel(**DIT[task] | {"num_layers": layers} | narrow)
    kept = tuple(model._keep_in_fp32_modules or ())
    low = torch.float32 if device.type == "cpu" else torch.bfloat16
    materialise(model, lambda name: torch.float32 if any(part in name for part in kept) else low, device)
    for block in model.blocks:
        block.attn1.set_attention_backend(attention)
    if sizes:
        model.enable_parallelism(config=ContextParallelConfig(**sizes))
    return model


@torch.no_grad()
def measure(name: str, plan: str, args: argparse.Namespace, world: World, alone: dict[str, torch.Tensor]) -> None:
    """One way to share a forward of one clip; prints a row."""
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    how, _, compiled = plan.partition(", ")
    sizes = {key: value or world.size for key, value in PLANS[how].items()}
    task, width, height, frames = SCENARIOS[name]
    if device.type == "cpu":
        width, height, frames = 64, 64, 5
    cell = 16 if task == "ti2v-5B" else 8
    shape = (1, DIT[task]["in_channels"], (frames + 3) // 4, height // cell, width // cell)
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    latents = torch.randn(shape, device=device, generator=generator).to(dtype)
    text = torch.randn(1, 512, 4096, device=device, generator=generator).to(dtype)
    tokens = shape[2] * (shape[3] // 2) * (shape[4] // 2)
    steps = torch.full((1, tokens) if task == "ti2v-5B" else (1,), 600, device=device)

    by_layers = {}
    reset_peak(device)
    for layers in args.layers:
        torch.compiler.reset()
        model = build(task, layers, device, sizes, args.attention)
        if compiled:
            # the library's hooks at the first block cannot be traced
            model.compile_repeated_blocks(fullgraph=not sizes, dynamic=False)

        def forward(model: Any = model) -> torch.Tensor:
            flow: torch.Tensor = model(latents, steps, text, return_dict=False)[0]
            return flow

        flow = forward()
        by_layers[layers] = milliseconds(forward, device, args.repeats)
        del model
    alone.setdefault(name, flow)
    few, many = sorted(by_layers)
    block = (by_layers[many] - by_layers[few]) / (many - few)
    row: dict[str, Any] = {"scenario": name, "plan": f"library, {plan}", "gpus": world.size if sizes else 1}
    row |= {
        "block_ms": round(block, 3),
        "forward_ms": round(by_layers[few] + block * (DIT[task]["num_layers"] - few), 1),
    }
    far = float((flow.double() - alone[name].double()).norm() / alone[name].double().norm())
    row |= {"peak_gib": peak_gib(device), "from_one_gpu": float(f"{far:.2e}")}
    if world.is_first:
        print(json.dumps(row), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=tuple(SCENARIOS))
    parser.add_argument("--plans", nargs="+", default=["1 GPU, compiled", "ulysses, compiled", "ring, compiled"])
    parser.add_argument("--layers", nargs=2, type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="_native_cudnn" if torch.cuda.is_available() else "native")
    args = parser.parse_args(argv)
    world = World.read(os.environ)
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    if world.is_first:
        print(commit(), "x", world.size, "torch", torch.__version__, flush=True)
    alone: dict[str, torch.Tensor] = {}
    for name in args.scenarios:
        for plan in args.plans:
            measure(name, plan, args, world, alone)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
