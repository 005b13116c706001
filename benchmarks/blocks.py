#!/usr/bin/env python3
"""One block of the denoiser at real size: ours and the library's, eager and compiled, in bf16 and 8 bits.

    python -m benchmarks.blocks --scenario a14b-480p-81 5b-704p-121 [--kernels | --errors]

A block is half of what three layers take beyond one layer, in milliseconds, for one guidance forward; "outside" is the
rest. Random weights; the library's class runs on the fastest attention kernel that it has. `--kernels`: where the GPU's
time of three layers goes; `--errors`: how far a whole forward is from float32, and not how long it takes. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from benchmarks.real_size import DEVICE, DIT, HALFS, SCENARIOS, commit, materialise, pack
from benchmarks.timing import timed
from wan.denoiser.attention_backends import fastest_attention, use_attention
from wan.denoiser.fp8 import PRECISIONS, quantize_model
from wan.denoiser.model import WanModel, policy_dtype

PACKED = {f"packed_{kind}": kind for kind in ("fp8", *HALFS)}  # weights that stay as in a quantized file
KINDS = ("stock", "stock compiled", "ours", "ours compiled", *(f"{name} compiled" for name in (*PRECISIONS, *PACKED)))
LINEAR, ATTENTION = ("gemm", "nvjet", "cutlass", "xmma", "cublas"), ("_attend", "fmha", "flash", "sdpa", "attn")


class Bench:
    """Models of one scenario and their inputs."""

    def __init__(self, scenario: str, library_attention: bool = False) -> None:
        self.task, width, height, frames = SCENARIOS[scenario]
        self.device = DEVICE
        cell = 16 if self.task == "ti2v-5B" else 8
        self.latent = (frames + 3) // 4, height // cell, width // cell
        self.tokens = self.latent[0] * (self.latent[1] // 2) * (self.latent[2] // 2)
        self.latents = torch.randn(1, DIT[self.task]["in_channels"], *self.latent, device=self.device)
        self.text = torch.randn(1, 512, 4096, device=self.device, dtype=torch.bfloat16)
        heads = DIT[self.task]["num_attention_heads"]
        self.stock_attention, self.attention = (
            fastest_attention(self.device, self.tokens, heads, 128, torch.bfloat16, flash_4)
            for flash_4 in (False, not library_attention)
        )

    def timesteps(self, each: int) -> torch.Tensor:
        """One a latent frame or token for the 5B, one for A14B."""
        return torch.full((1, each if self.task == "ti2v-5B" else 1), 600, device=self.device)

    def model(self, name: str, layers: int | None = None) -> Any:
        """The library's model ("stock"), ours, or ours in 8 bits; random weights, the same for all."""
        cls: Any = WanTransformer3DModel if name == "stock" else WanModel
        with init_empty_weights():
            model = cls(**DIT[self.task] | ({} if layers is None else {"num_layers": layers}))
        kept = tuple(model._keep_in_fp32_modules or ())

        def dtype_of(parameter: str) -> torch.dtype:
            if name != "stock":
                return policy_dtype(parameter, torch.bfloat16)
            return torch.float32 if any(part in parameter for part in kept) else torch.bfloat16

        materialise(model, dtype_of, self.device)
        if name == "stock":
            for block in model.blocks:
                block.attn1.set_attention_backend(self.stock_attention)
        elif name != "fp8_attention":
            use_attention(model, self.attention)
        if name in PRECISIONS:
            quantize_model(model, name, self.device)
        if name in PACKED:
            pack(model, PACKED[name], self.device)
        return model

    def forward(self, kind: str, layers: int) -> Callable[[], Any]:
        """A call of a guidance forward."""
        name, _, mode = kind.partition(" ")
        model = self.model(name, layers)
        torch.compiler.reset()
        if mode and name == "stock":
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        elif mode:
            model.compile_blocks()
        if name == "stock":
            t = self.timesteps(self.tokens)
            t = t if t.shape[1] > 1 else t[0]
            latents = self.latents.bfloat16()
            return lambda: model(latents, t, self.text, return_dict=False)
        t, keys = self.timesteps(self.latent[0]), model.text_keys(self.text)

        def ours() -> Any:
            flow = model(self.latents, t, keys, return_dict=False)
            assert model.is_compiled == bool(mode)
            return flow

        return ours


def errors(bench: Bench, kinds: Sequence[str]) -> dict[str, Any]:
    """How far a forward of all layers and three latent frames is from the same weights in float32, relative L2.

    "beside eager": how far it is from our bf16 blocks as they are.
    """
    torch.backends.cudnn.allow_tf32 = False
    latents, text = bench.latents[:, :, :3], bench.text
    t = bench.timesteps(3)
    flows: dict[str, torch.Tensor] = {}
    for kind in dict.fromkeys(("exact", "ours", *(kind for kind in kinds if not kind.startswith("stock")))):
        model, mode = bench.model("ours" if kind == "exact" else kind.split()[0]), kind.partition(" ")[2]
        if kind == "exact":
            use_attention(model.float(), "native")
        if mode:
            torch.compiler.reset()
            model.compile_blocks()
        flows[kind] = model(latents, t, text.float() if kind == "exact" else text, return_dict=False)[0].double()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    exact, eager = flows.pop("exact"), flows["ours"]
    return {
        kind: {
            "error": float(f"{(made - exact).norm() / exact.norm():.3g}"),
            "beside eager": float(f"{(made - eager).norm() / exact.norm():.3g}"),
        }
        for kind, made in flows.items()
    }


def by_kernel(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the GPU in linear layers, in attention, and in the longest of the others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    milliseconds_by: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        name = event.key.lower()
        group = "attention" if any(word in name for word in ATTENTION) else event.key[:60]
        if group != "attention" and any(word in name for word in LINEAR):
            group = "linear"
        milliseconds_by[group] += event.self_device_time_total / 1000
    longest = sorted(milliseconds_by.items(), key=lambda item: -item[1])[:12]
    return {name: round(taken, 2) for name, taken in longest}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), nargs="+", required=True)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=[kind for kind in KINDS if "packed" not in kind])
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--errors", action="store_true", help="distance from float32 instead of times")
    parser.add_argument("--library_attention", action="store_true", help="ours too on diffusers' fastest kernel")
    args = parser.parse_args()
    result: dict[str, Any] = {"commit": commit(), "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0)}
    for scenario in args.scenario:
        bench = Bench(scenario, args.library_attention)
        rows = result[scenario] = {"attention": bench.attention, "stock attention": bench.stock_attention}
        if args.errors:
            rows |= errors(bench, args.kinds)
            continue
        for kind in args.kinds:
            taken, kernels = [], {}
            for layers in (1, 3):
                call = bench.forward(kind, layers)
                taken.append(1000 * statistics.median(timed(call, DEVICE, 5, warm=2)))
                if args.kernels and layers == 3:
                    kernels = by_kernel(call)
                del call
                gc.collect()
                torch.cuda.empty_cache()
            block = (taken[1] - taken[0]) / 2
            rows[kind] = {"block": round(block, 2), "outside": round(taken[0] - block, 2)}
            if "stock" in rows:
                rows[kind]["over stock"] = round(block / rows["stock"]["block"], 3)
            print(scenario, kind, rows[kind], kernels, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
