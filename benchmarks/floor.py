"""The least time that each stage of a clip can take on an H200, from its arithmetic and the bytes that it must read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from wan.denoiser.model import WanModel
from wan.pipeline import Pipeline
from wan.types import Request
from wan.vae import chunked

# Reached in practice by one kernel alone: a bf16 matrix product, reading memory, a copy from locked host memory.
FLOPS, BYTES, COPIED = 798e12, 4.19e12, 55e9
TF32 = 0.5  # of FLOPS


def floors(pipeline: Pipeline, request: Request) -> dict[str, dict[str, float]]:
    """TFLOP, GiB read and the seconds that they take by stage; "step" is one with guidance, "move" the experts' way."""
    geometry, config = request.geometry, pipeline.config
    frames, height, width = geometry.size
    known = frames if config.model_type == "i2v" else max(1, len(request.known.leading))
    vae = copy.deepcopy(pipeline.vae.model).to("meta").float()
    rate = FLOPS if config.vae_dtype == torch.float16 else TF32 * FLOPS
    pixels = torch.empty(1, 3, known, height, width, device="meta")
    latents = torch.empty(1, config.z_dim, *geometry.latent, device="meta")
    encoder: Any = pipeline.text_encoder.model
    experts = [getattr(pipeline, name) for name in pipeline.checkpoint.experts]
    forwards = 2 if request.sampling.guidance[1] != 1 else 1
    return {
        "text": _row(2 * text_flops(encoder, config.text_len), size(encoder), FLOPS),
        "encode": _row(counted(lambda: chunked.encode(vae, pixels, 1)), size(pipeline.vae), rate),
        "move": _row(0, sum(map(size, experts)), FLOPS, COPIED),
        "step": _row(forwards * denoiser_flops(experts[0], geometry.tokens, config.text_len), size(experts[0]), FLOPS),
        "decode": _row(counted(lambda: chunked.decode(vae, latents, 1)), size(pipeline.vae), rate),
    }


def _row(flops: float, read: float, rate: float, bandwidth: float = BYTES) -> dict[str, float]:
    return {"tflop": flops / 1e12, "gib": read / 2**30, "seconds": max(flops / rate, read / bandwidth)}


def size(model: torch.nn.Module) -> float:
    """Bytes of a model's weights."""
    return float(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))


def counted(run: Callable[[], object]) -> float:
    """FLOP of the convolutions, products and attention in a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def text_flops(encoder: torch.nn.Module, tokens: int) -> float:
    """FLOP of the text encoder on one prompt, without its attention's scores (below a hundredth)."""
    products = [x for x in encoder.modules() if isinstance(x, torch.nn.Linear)]
    return 2.0 * tokens * sum(x.in_features * x.out_features for x in products)


def denoiser_flops(model: WanModel, tokens: int, text: int) -> float:
    """FLOP of one forward: products, self-attention and cross-attention; the text's keys are made once a clip."""
    width, blocks = model.config.num_attention_heads * model.config.attention_head_dim, model.config.num_layers
    products = 6 * width * width + 2 * width * model.config.ffn_dim  # self-attention's four, cross-attention's two
    return float(blocks * (2 * tokens * products + 4 * width * tokens * (tokens + text)))
