"""What a clip takes of a GPU's memory, stage by stage, told from the headers of a checkpoint before anything loads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from wan.denoiser.model import policy_dtype
from wan.device.streaming import SLOTS, layers_that_stay
from wan.errors import UserError
from wan.types import Geometry
from wan.vae import chunked
from wan.weights.checkpoint import Weights

GIB = 2**30
CONTEXT = 0.75 * GIB  # what CUDA and its libraries take beside tensors
FITTING = 0.97  # of the rest; some is lost between tensors
# Measured on an H200 (benchmarks/LOG.md). Beside what is counted: workspaces, inputs and outputs of a step.
ALWAYS, TEXT = 0.4 * GIB, 0.15 * GIB
# The most that a pass through a VAE holds, in its widest activation (one latent frame): VAE 2.1, VAE 2.2.
DECODING, DECODING_A_FRAME, DECODING_BY_FRAME, ENCODING = (3.1, 4.6), (2.8, 2.8), (4.1, 5.6), (3.6, 3.6)


def for_tensors(vram: int) -> int:
    """Bytes of the `vram` budget left for tensors."""
    return int(FITTING * (vram - CONTEXT))


@dataclass(frozen=True)
class StageMemory:
    """What one stage takes, in bytes: weights, of which `count` layers of `layer` bytes may come one by one."""

    weights: int
    working: int
    layer: int = 0
    count: int = 0
    beside: int = 0  # what is kept as well where all layers stay

    def weight_budget(self, budget: int) -> int:
        """What is left of a budget for weights."""
        return budget - self.working - self.beside

    def peak(self, budget: int | None) -> int:
        """The most that is taken at once, as `Placement` keeps a budget."""
        left = None if budget is None else self.weight_budget(budget)
        stay = layers_that_stay(self.weights, self.layer, self.count, left)
        if stay == self.count:
            return self.weights + self.working + self.beside
        return self.weights - (self.count - max(0, stay) - SLOTS) * self.layer + self.working

    @property
    def least(self) -> int:
        """What it takes with all layers coming one by one."""
        coming = max(0, self.count - SLOTS)
        return self.weights - coming * self.layer + self.working + (self.beside if coming else 0)


def text_memory(weights: Weights, dtype: torch.dtype, length: int) -> StageMemory:
    """The text encoder on a prompt of `length` tokens."""
    sizes = _sizes(weights, lambda name: dtype)
    return _layered(sizes, int(TEXT + length * 1e5))


def denoiser_memory(weights: Weights, dtype: torch.dtype, in_8_bits: bool, tokens: int, text: int) -> StageMemory:
    """One expert on a clip of so many tokens; `text`: rows of the prompt.

    Per token a block holds the residual stream in float32 and at its widest either queries, keys, values and their
    rotation or the feed-forward layer before and after its activation.
    """
    official = "blocks.0.self_attn.q.weight" in weights.shapes
    feed = "blocks.0.ffn.0.weight" if official else "blocks.0.ffn.net.0.proj.weight"
    width, item = _shape(weights, "patch_embedding.weight")[0], dtype.itemsize
    hidden = _shape(weights, feed)[0]
    working = tokens * max((12 + 4.5 * item) * width, 2 * hidden * item + (4 + 1.5 * item) * width)
    part = _layered(_sizes(weights, lambda name: policy_dtype(name, dtype), in_8_bits), int(ALWAYS + working))
    beside = 4 * text * width * item * part.count  # keys and values of two prompts
    return StageMemory(part.weights, part.working, part.layer, part.count, beside)


def vae_memory(weights: Weights, dtype: torch.dtype, geometry: Geometry, known: int) -> tuple[StageMemory, StageMemory]:
    """Encoding `known` frames, and decoding a clip, whose pixels go to host memory."""
    size = sum(_sizes(weights, lambda name: dtype).values())
    frames, height, width = geometry.size
    official = "decoder.head.0.gamma"
    channels = _shape(weights, official if official in weights.shapes else "decoder.norm_out.gamma")[0]
    first = "encoder.conv1.weight" if official in weights.shapes else "encoder.conv_in.weight"
    patch = 2 if _shape(weights, first)[1] == 12 else 1
    widest = chunked.widest(channels, patch, height, width) * dtype.itemsize
    chunk = min(chunked.chunk_for(widest), geometry.latent[0])
    decoding = DECODING[patch - 1] + DECODING_A_FRAME[patch - 1] * chunk if chunk else DECODING_BY_FRAME[patch - 1]
    at_once = min(known, chunked.PER_LATENT * max(1, chunk)) / chunked.PER_LATENT
    return (
        StageMemory(size, int(ALWAYS + 24 * known * height * width + ENCODING[patch - 1] * at_once * widest)),
        StageMemory(size, int(ALWAYS + decoding * widest)),
    )


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    if name not in weights.shapes:
        raise UserError(f"{weights.path} lacks {name}: download it again")
    return weights.shapes[name]


def _sizes(weights: Weights, dtype_of: Callable[[str], torch.dtype], in_8_bits: bool = False) -> dict[str, int]:
    """Bytes of each tensor in memory. Weights that a file holds quantized stay as large as there."""
    smaller = 1.0 if in_8_bits else math.inf
    if weights.path.is_file() and weights.path.suffix in (".gguf", ".safetensors"):
        smaller = min(smaller, weights.path.stat().st_size / sum(map(math.prod, weights.shapes.values())))
    sizes = {}
    for name, shape in weights.shapes.items():
        item: float = dtype_of(name).itemsize
        if len(shape) == 2 and _LAYER.search(name):
            item = min(item, smaller)
        sizes[name] = int(math.prod(shape) * item)
    return sizes


_LAYER = re.compile(r"(?:^|\.)blocks?\.(\d+)\.")


def _layered(sizes: dict[str, int], working: int) -> StageMemory:
    by_layer: dict[int, int] = {}
    for name, size in sizes.items():
        if match := _LAYER.search(name):
            by_layer[int(match[1])] = by_layer.get(int(match[1]), 0) + size
    return StageMemory(sum(sizes.values()), working, max(by_layer.values(), default=0), len(by_layer))
