"""Matrix products (e4m3) and self-attention (int8, e4m3) of the denoiser in 8 bits, where the user asks for them.

Weights are scaled by output channel, inputs by token while they are used; products are summed in float32. Not among
them are cross-attention's keys and values, which are computed once a clip, and what is outside the blocks.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.denoiser.policy import needs_of, no_gpu_for
from wan.device.hardware import runs_triton, synchronize
from wan.device.streaming import RoundTrip
from wan.errors import UserError
from wan.weights.quantized import QuantizedLinear, QuantizedTensor

PRECISIONS = ("fp8", "fp8_attention")  # the second: self-attention too
_LARGEST = 448.0  # of e4m3
_KEPT = ("attn2.to_k", "attn2.to_v")  # computed once a clip
_PIECE = 1 << 25  # numbers that are rounded in one piece, so that their float32 copies stay small


class Denoiser(Protocol):
    """What is asked of a model: blocks of layers, and a place to say their precision."""

    blocks: Any
    low_precision: str | None


def check_precision(precision: str | None, device: torch.device) -> None:
    """Raise UserError where a device cannot compute in a precision. What computes on a CPU is for tests."""
    if precision is None:
        return
    if device.type != "cuda":
        raise no_gpu_for(precision)
    needs = needs_of(precision)
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"{needs}, {name} has none; give `precision` bf16")
    if precision == "fp8_attention" and not runs_triton(device):
        raise UserError("`precision` fp8_attention needs the triton package; use `precision` fp8")
    if torch.version.hip is not None and (reason := _fault(precision, device)):  # AMD's numbers say nothing of this
        raise UserError(f"`precision` {precision} does not work on {name} ({reason}); give `precision` bf16")


def _fault(precision: str, device: torch.device) -> str:
    """Why a device does not compute as a CPU does in a precision, by a small probe; "" where it does."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 128, 256, generator=generator).bfloat16()
    rows, scale = quantize(weight)
    heads = torch.randn(3, 1, 256, 2, 128, generator=generator).bfloat16()
    checks: list[tuple[Any, list[Tensor]]] = [(multiply, [x, rows, scale, torch.zeros(128, dtype=torch.bfloat16)])]
    checks += [(attend_in_fp8, list(heads))] if precision == "fp8_attention" else []
    for compute, given in checks:
        expected = compute(*given).float()
        try:
            ours = compute(*(part.to(device) for part in given)).float().cpu()
        except Exception as error:  # what a library raises where its kernels do not fit is its own affair
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        off = float((ours - expected).norm() / expected.norm())
        if not off < 0.1:  # also when it is NaN
            return f"{compute.__name__} is off by {off:.1e}"
    return ""


class Lowering:
    """Rounds weights of blocks to `dtype` and then to e4m3 on a device, and keeps them at `home`.

    So a host holds no expert in bf16 on the way. The blocks still have to be told what they compute in, by
    `quantize_model`.
    """

    def __init__(self, dtype: torch.dtype, home: torch.device, on: torch.device) -> None:
        self.dtype, self.home, self.on = dtype, home, on
        self._way = RoundTrip(on)

    def takes(self, name: str) -> bool:
        """Whether the weight of the linear layer of this name is rounded."""
        place = name.split(".", 2)
        return place[0] == "blocks" and place[-1] not in _KEPT

    def __call__(self, layer: nn.Linear, numbers: Tensor) -> nn.Linear:
        """A layer with these numbers [out, in], of any dtype, in 8 bits."""
        rows, scale = quantize(self._way.go(numbers.detach(), self.dtype))
        if self.home.type == "cpu":
            rows = self._way.back(rows)
        synchronize(self.on)  # the next weight takes the places of this one
        return QuantizedLinear(layer, QuantizedTensor(rows, scale), self.dtype, self.home)


def quantize_model(model: Denoiser, precision: str, device: torch.device) -> None:
    """Turn a model's blocks to a precision of `PRECISIONS`. Weights are rounded on `device` and stay where they are.

    Weights that are fp8 in the file, or were rounded as they were loaded, are used as they are. Raises UserError for
    those of another quantisation.
    """
    # for all layers of a kind, whose pinned memory it keeps
    lowering = cache(lambda dtype, home: Lowering(dtype, home, device))
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if not isinstance(layer, nn.Linear) or name in _KEPT:
                continue
            if not isinstance(layer, QuantizedLinear):
                weight = layer.weight
                layer = lowering(weight.dtype, weight.device)(layer, weight)
                block.set_submodule(name, layer)
            if layer.weight.dtype != torch.float8_e4m3fn:
                raise UserError(
                    f"`precision` {precision} is for bf16 and fp8 weights, the file's are {layer.gguf_type}"
                )
            if layer.scale is None:  # a file whose fp8 are the weights themselves
                layer.scale = torch.ones(1, 1, device=layer.weight.device)
            layer.multiply = multiply
        if precision == "fp8_attention":
            block.attn1.processor.attend = attend_in_fp8
    model.low_precision = precision


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., K] -> e4m3 of that shape and float32 scales [..., 1], such that each row's largest number is 448."""
    if x.dim() == 2 and x.numel() > _PIECE and not torch.compiler.is_compiling():  # a compiler makes one pass of it
        rows, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty_like(x[:, :1], dtype=torch.float32)
        step = max(1, _PIECE // x.shape[1])
        for start in range(0, len(x), step):
            piece = slice(start, start + step)
            rows[piece], scale[piece] = quantize(x[piece])
        return rows, scale
    scale = (x.abs().amax(-1, keepdim=True).float() / _LARGEST).clamp_min(1e-12)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def multiply(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x [..., K] times a weight e4m3 [N, K] with scales [N, 1] or [1, 1], plus bias [N] -> [..., N] in bias's dtype."""
    rows, row_scale = quantize(x.flatten(0, -2))
    if x.is_cuda:
        scales = scale.expand(len(weight), 1).t().contiguous()
        product: Tensor = torch._scaled_mm(  # in bf16, the only dtype that it sums scaled rows in
            rows, weight.t(), row_scale, scales, bias.bfloat16(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        product = F.linear(rows.float() * row_scale, weight.float() * scale, bias.float())
    return product.to(bias.dtype).view(*x.shape[:-1], -1)


def attend_in_fp8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Self-attention [B, L, heads, head_dim] in 8 bits; on a CPU the same roundings in plain PyTorch."""
    if query.is_cuda:
        from wan.denoiser.int8_attention_kernel import attention8

        mixed: Tensor = attention8(query.bfloat16(), key.bfloat16(), value.bfloat16())
        return mixed.type_as(query)
    by_head: list[Any] = [part.float().transpose(1, 2) for part in (query, key, value)]
    by_head[1] = by_head[1] - by_head[1].mean(2, keepdim=True)
    queries = _integers(by_head[0])
    keys = torch.cat([_integers(part.flatten(2)).view_as(part) for part in by_head[1].split(128, dim=2)], dim=2)
    scores = queries @ keys.mT * query.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    values, scale = quantize(by_head[2].mT)
    mixed = (weights * 256).to(torch.float8_e4m3fn).float() / 256 @ (values.float() * scale).mT
    return (mixed / weights.sum(-1, keepdim=True)).transpose(1, 2).type_as(query)


def _integers(x: Tensor) -> Tensor:
    """Through int8 and back, with a scale for each row."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / scale).round() * scale
