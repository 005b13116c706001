#!/usr/bin/env python3
"""Time, memory and error of the VAEs at real size, with random weights; the library's own pass is the peer.

    python -m benchmarks.vae --scenario {a14b-480p-81,a14b-720p-81,5b-704p-121} [--chunks 1 2 4]

Errors are those against float32 without TF32, in dB: of pixels in [-1, 1] (PSNR) and of latents (signal to noise).
`--tiny` runs on any machine, with small networks and pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.real_size import SCENARIOS, VAE, commit, materialise
from benchmarks.timing import Timer
from wan.device.hardware import peak_gib, reset_peak, synchronize
from wan.vae import chunked
from wan.vae.vae import lay_out

TINY: dict[str, Any] = {"base_dim": 16, "num_res_blocks": 1}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build(task: str, device: torch.device, tiny: bool) -> Any:
    sizes = VAE[task] | (TINY if tiny else {})
    if tiny and "decoder_base_dim" in sizes:
        sizes["decoder_base_dim"] = TINY["base_dim"]
    with init_empty_weights():
        model = AutoencoderKLWan(**sizes)
    return materialise(model, lambda name: torch.float32, device).requires_grad_(False)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether convolutions may round their inputs to TF32, which PyTorch lets them by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def measured(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, dict[str, float]]:
    """The result of the second call, its seconds, and its peak above what was there."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    reset_peak(device)
    with Timer(device) as watch:
        result = call()
    peak = peak_gib(device)
    row = {"seconds": round(watch.seconds, 3)}
    return result, row if peak is None else row | {"peak_gib": round(peak - before / 2**30, 2)}


def decibels(value: Tensor, exact: Tensor, signal: float | None = None) -> float:
    """The power of the signal (of `exact`, unless given) over that of the error, in dB."""
    error = float((value.float().cpu() - exact).square().mean())
    power = float(exact.square().mean()) if signal is None else signal
    return round(10 * float(torch.log10(torch.tensor(power / max(error, 1e-30)))), 1)


def teraflops(call: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), required=True)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 1, 4], help="latent frames at a time; 0: less")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--no_library", action="store_true", help="without the library's own pass")
    parser.add_argument("--frames", type=int, help="4n+1 in place of the scenario's")
    parser.add_argument("--search", action="store_true", help="let cuDNN try its kernels (cudnn.benchmark)")
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time of a decode goes")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = args.search
    task, width, height, frames = SCENARIOS[args.scenario]
    frames = args.frames or frames
    if args.tiny:
        width, height, frames = 64, 32, 9
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, frames, height // 16, width // 16, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear").to(device) * 2 - 1

    model = build(task, device, args.tiny)
    meta = torch.device("meta")
    work = {"encode": teraflops(lambda: chunked.encode(model.to(meta), pixels.to(meta), frames))}
    size = (
        1,
        model.config.z_dim,
        (frames + 3) // 4,
        *(side // model.config.scale_factor_spatial for side in (height, width)),
    )
    work["decode"] = teraflops(lambda: chunked.decode(model, torch.empty(size, device=meta), frames))
    model = build(task, device, args.tiny)

    rows: list[dict[str, Any]] = []

    def add(name: str, stage: str, call: Callable[[], Tensor], exact: Tensor, signal: float | None) -> None:
        row: dict[str, Any] = {"pass": name, "stage": stage}
        try:
            result, measurement = measured(call, device)
        except torch.OutOfMemoryError:
            rows.append(row | {"error": "out of memory"})
        else:
            rate = round(work[stage] / measurement["seconds"], 1)
            rows.append(row | measurement | {"tflops": rate, "db": decibels(result, exact, signal)})
        print(rows[-1], flush=True)

    with torch.no_grad():
        with tf32(False):
            lay_out(model)
            latents = chunked.encode(model, pixels, 1)
            decoded = chunked.decode(model, latents, 1).cpu()
        exact = latents.cpu()
        if not args.no_library:
            peer = build(task, device, args.tiny)
            add("library float32", "encode", lambda: peer.encode(pixels).latent_dist.mode(), exact, None)
            add("library float32", "decode", lambda: peer.decode(latents).sample, decoded, 4.0)
            del peer
        for name in args.dtypes:
            model.to(DTYPES[name])
            for chunk in args.chunks:
                add(f"{name}, chunk {chunk}", "encode", partial(chunked.encode, model, pixels, chunk), exact, None)
                add(f"{name}, chunk {chunk}", "decode", partial(chunked.decode, model, latents, chunk), decoded, 4.0)
        if args.profile:
            with torch.profiler.profile() as profile:
                chunked.decode(model, latents, args.chunks[-1])
                synchronize(device)
            by = f"self_{device.type}_time_total"
            print(profile.key_averages().table(sort_by=by, row_limit=14, max_name_column_width=70))
    print(
        json.dumps(
            {
                "scenario": args.scenario,
                "commit": args.commit,
                "torch": torch.__version__,
                "teraflop": work,
                "search": args.search,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
