"""Denoisers in files as they are published: fp8 with and without scales, GGUF; each writer returns what it meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

gguf = pytest.importorskip("gguf")  # the dev extra has it

State = dict[str, Tensor]


def official(folder: Path) -> State:
    """The tensors of an expert's shards."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def is_linear(key: str, value: Tensor) -> bool:
    return key.endswith(".weight") and value.ndim == 2


def scaled(
    state: State, file: Path, scale: str, *, prefix: str = "", rows: bool = False, beside: State | None = None
) -> State:
    """Write linear weights in fp8 with scales, all else in bf16; returns what the file means, in float32."""
    stored, meant = dict(beside or {}), {}
    for key, value in state.items():
        if not is_linear(key, value):
            stored[prefix + key] = meant[key] = value.to(torch.bfloat16)
            continue
        largest = value.abs().amax(dim=1, keepdim=True) if rows else value.abs().max()
        factor = largest.float() / 448
        stored[prefix + key] = (value / factor).to(torch.float8_e4m3fn)
        stored[prefix + key.removesuffix(".weight") + scale] = factor
        meant[key] = stored[prefix + key].float() * factor
    save_file({key: value.contiguous() for key, value in stored.items()}, file)
    return {key: value.float() for key, value in meant.items()}


def comfyui(state: State, file: Path) -> State:
    beside = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    beside["blocks.0.ffn.0.scale_input"] = torch.ones(1)
    return scaled(state, file, ".scale_weight", beside=beside)


def comfyui_mixed(state: State, file: Path) -> State:
    prefix = "model.diffusion_model."
    declared = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    beside = {
        f"{prefix}blocks.0.ffn.0.comfy_quant": declared,
        f"{prefix}blocks.0.ffn.0.input_scale": torch.tensor(1.0),
    }
    return scaled(state, file, ".weight_scale", prefix=prefix, beside=beside)


def lightx2v(state: State, file: Path) -> State:
    return scaled(state, file, ".weight_scale", prefix="diffusion_model.", rows=True)


def plain_fp8(state: State, file: Path) -> State:
    stored = {
        key: value.to(torch.float8_e4m3fn if is_linear(key, value) else torch.float32) for key, value in state.items()
    }
    save_file(stored, file)
    return {key: value.float() for key, value in stored.items()}


def everything_fp8(state: State, file: Path) -> State:
    stored = {key: value.to(torch.float8_e5m2) for key, value in state.items()}
    save_file(stored, file)
    return {key: value.float() for key, value in stored.items()}


def store(writer: Any, name: str, values: Any, kind: Any) -> torch.Tensor:
    """Add numbers to a GGUF file in a kind; returns what a reader then gets, in float32."""
    stored = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
    return torch.from_numpy(gguf.quants.dequantize(stored, kind).copy())


def finish(writer: Any) -> None:
    """Write a GGUF file to which everything was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(kind: str, arch: str = "wan", prefix: str = "", flat: bool = False) -> Callable[[State, Path], State]:
    """A writer of GGUF files: linear weights in `kind` where their rows allow it, as converters do."""

    def write(state: State, file: Path) -> State:
        writer, meant = gguf.GGUFWriter(file, arch), {}
        wanted = gguf.GGMLQuantizationType[kind]
        for key, value in state.items():
            rows = value.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
            kept = wanted if is_linear(key, value) and rows else gguf.GGMLQuantizationType.F32
            array = value.float().numpy()
            if flat and array.ndim == 5:
                writer.add_array(f"comfy.gguf.orig_shape.{prefix}{key}", list(array.shape))
                array = array.reshape(-1)
            meant[key] = store(writer, prefix + key, array, kept).reshape(value.shape)
        finish(writer)
        return meant

    return write
