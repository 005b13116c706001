#!/usr/bin/env python3
"""Peak host memory and time of loading a denoiser of several GB, generated for the purpose.

    python -m benchmarks.loading FOLDER [--layers 24] [--dim 2560] [--precision fp8]

Writes a float32 checkpoint into FOLDER (kept, and used again), loads it in bf16, or in 8 bits that a GPU rounds where
there is one, and compares the peak with the bytes of the loaded model. Resident memory counts the pages of the mapped
files too. A folder of weights that is there already will do as well. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.timing import Timer
from tests.support.tiny_checkpoint import Denoiser, write_denoiser
from wan.denoiser.fp8 import PRECISIONS
from wan.denoiser.model import WanModel
from wan.device.host import host_peak_gib
from wan.weights.tensors import open_safetensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dim", type=int, default=2560)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--precision", choices=PRECISIONS)
    args = parser.parse_args()
    if not args.folder.exists():
        sizes = {
            "dim": args.dim,
            "num_heads": args.dim // 128,
            "ffn_dim": args.dim * 27 // 10,
            "num_layers": args.layers,
        }
        write_denoiser(args.folder, Denoiser("ti2v", 48, 48, **sizes), shards=args.shards)
        sys.exit("written; run again to measure (the peak of this process is the writer's)")
    weights = open_safetensors(args.folder, "diffusion_pytorch_model")
    cpu = torch.device("cpu")
    rounds_on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=rounds_on)  # what CUDA takes is not the model's
    before = host_peak_gib()
    with Timer(rounds_on) as watch:
        model = WanModel.from_weights(
            weights, dtype=torch.bfloat16, device=cpu, low_precision=args.precision, rounded_on=rounds_on
        )
    loaded = sum(value.numel() * value.element_size() for value in model.parameters()) / 2**30
    shard = max(file.stat().st_size for file in weights.files) / 2**30
    peak = host_peak_gib() - before
    result = {
        "files_gib": sum(file.stat().st_size for file in weights.files) / 2**30,
        "largest_shard_gib": shard,
        "loaded_gib": loaded,
        "peak_above_start_gib": peak,
        "allowed_gib": 1.2 * loaded + shard,
        "seconds": watch.seconds,
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
