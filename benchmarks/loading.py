#!/usr/bin/env python3
"""Peak host memory and time of loading a denoiser of several GB, generated for the purpose.

    python -m benchmarks.loading FOLDER [--layers 24] [--dim 2560] [--precision fp8]
    python -m benchmarks.loading FOLDER --merge 16
    python -m benchmarks.loading FOLDER --readers ours safetensors fastsafetensors runai [--device cuda cpu] [--cold]

Writes a float32 checkpoint into FOLDER (kept, and used again), loads it in bf16, or in 8 bits that a GPU rounds where
there is one, and compares the peak with the bytes of the loaded model. Resident memory counts the pages of the mapped
files too. A folder of weights that is there already will do as well. The last line is JSON.

With `--merge RANK` seconds of putting a LoRA of random numbers into all blocks of a folder in bf16, on the GPU where
there is one: from the parameters as they were loaded, from the files, and of taking it out, twice each, and the
GPU's peak. Exits with 1 where results differ.

With `--readers` a line for each of them and each device: seconds until every tensor of the same files is in memory of
its own there, with files in the system's cache and, with `--cold`, out of it. Exits with 1 where one reads other bits.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rehearsal import forget, write_lora
from benchmarks.timing import Timer
from tests.support.tiny_checkpoint import Denoiser, write_denoiser
from wan.denoiser.fp8 import PRECISIONS
from wan.denoiser.lora import merge_loras
from wan.denoiser.lora_file import open_loras
from wan.denoiser.model import WanModel
from wan.device.hardware import peak_gib, reset_peak
from wan.device.host import host_peak_gib
from wan.settings import LoraFile
from wan.weights.tensors import Weights, open_safetensors


def ours(weights: Weights, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Mapped tensors, copied while the next file is read: what `wan.weights.loading` fills models with."""
    for name, tensor in weights.tensors():
        assert isinstance(tensor, Tensor)
        yield name, tensor.to(device, copy=True)


def of_safetensors(weights: Weights, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """As the format's own library reads a file."""
    from safetensors.torch import load_file

    for file in weights.files:
        for name, tensor in load_file(file, device=str(device)).items():
            yield name, tensor.clone() if device.type == "cpu" else tensor  # lest it stay in the file


def of_fastsafetensors(weights: Weights, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Without GPUDirect Storage, which a rented machine's disk lacks."""
    from fastsafetensors import ParallelLoader

    files = [str(file) for file in weights.files]
    named = f"cuda:{device.index or 0}" if device.type == "cuda" else str(device)  # it wants the number
    loader = ParallelLoader(None, files, device=named, nogds=True, use_tqdm_on_load=False)
    try:
        with contextlib.closing(loader.iterate_weights()) as tensors:
            yield from tensors
    finally:
        loader.close()


def of_runai(weights: Weights, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Its tensors are the caller's."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in weights.files], device=str(device))
        yield from streamer.get_tensors()


READERS: dict[str, Callable[[Weights, torch.device], Iterator[tuple[str, Tensor]]]] = {
    "ours": ours,
    "safetensors": of_safetensors,
    "fastsafetensors": of_fastsafetensors,
    "runai": of_runai,
}


def compare(folder: Path, readers: Sequence[str], devices: Sequence[str], cold: bool) -> bool:
    """A line for each reader, device and cache; whether all read the same bits. One that is not installed is told."""
    weights = open_safetensors(folder, "diffusion_pytorch_model")
    size, sums = sum(file.stat().st_size for file in weights.files) / 1e9, set()
    for device in map(torch.device, devices):
        torch.zeros(1, device=device)  # what CUDA takes is not the reader's
        for reader in readers:
            for cache in ("cold", "warm") if cold else ("warm",):
                if cache == "cold":
                    forget([folder])
                row: dict[str, Any] = {"reader": reader, "device": device.type, "cache": cache}
                try:
                    with Timer(device) as watch:
                        made = dict(READERS[reader](weights, device))
                except ImportError as error:
                    print(json.dumps(row | {"not_installed": str(error)}), flush=True)
                    break
                right = {name: tuple(tensor.shape) for name, tensor in made.items()} == dict(weights.shapes)
                bits = sum(int(tensor.view(torch.int16).sum(dtype=torch.int64)) for tensor in made.values())
                sums.add((right, bits))
                row |= {"seconds": round(watch.seconds, 2), "gb_per_s": round(size / watch.seconds, 2), "bits": bits}
                print(json.dumps(row), flush=True)
                del made
                gc.collect()
    return len(sums) <= 1 and all(right for right, _ in sums)


def merge(folder: Path, rank: int) -> bool:
    """A line of how long merging takes by its source, and what of the GPU; whether both give the same bits."""
    weights = open_safetensors(folder, "diffusion_pytorch_model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = WanModel.from_weights(weights, dtype=torch.bfloat16, device=torch.device("cpu"))
    row: dict[str, list[float]] = {"parameters": [], "files": [], "taken_out": []}
    bits = set()
    with tempfile.TemporaryDirectory() as place:
        opened = open_loras([LoraFile(write_lora(Path(place) / "lora.safetensors", folder, rank))], weights)
        reset_peak(device)
        for source, files in 2 * [("parameters", opened), ("taken_out", []), ("files", opened), ("taken_out", [])]:
            if source == "files":
                model.altered = frozenset(opened[0].parts)  # as if they had been
            with Timer(device) as watch:
                merge_loras(model, weights, files, device)
            row[source].append(round(watch.seconds, 2))
            if files:
                bits.add(sum(int(value.view(torch.int16).sum(dtype=torch.int64)) for value in model.parameters()))
    print(json.dumps({**row, "gpu_peak_gib": peak_gib(device)}))
    return len(bits) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dim", type=int, default=2560)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--merge", type=int, metavar="RANK")
    parser.add_argument("--readers", choices=tuple(READERS), nargs="+")
    parser.add_argument("--device", choices=("cuda", "cpu"), nargs="+", default=["cuda"])
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    if args.readers and args.folder.exists():
        sys.exit(not compare(args.folder, args.readers, args.device, args.cold))
    if args.merge and args.folder.exists():
        sys.exit(not merge(args.folder, args.merge))
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
