"""What the denoiser's blocks run on: the attention kernel that is fastest and right here, compiled where that pays."""

from __future__ import annotations

import functools
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from wan.modules.model import WanModel
from wan.placement import synchronize

log = logging.getLogger(__name__)

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values [B, L, heads, head_dim]

# The library's backends that round no more than their dtype does and that are fetched from nowhere, with the package
# that each needs. The 8-bit ones (sage) are not among them, nor are those of a hub, FlashAttention 4 for one.
BACKENDS = {"native": None, "_native_cudnn": None, "_flash_3": "flash_attn_interface", "flash": "flash_attn"}
PROBE_FLOP = 1e13  # of one call, with all tokens and as many heads as that allows: 15 to 30 ms on an H200
PROBE_ROWS = 64  # queries that are compared with exact arithmetic

# One H200, whole clips: a forward of A14B at 32,760 tokens takes 3.10 s as it is and 2.77 s compiled, of 5B at 27,280
# tokens 1.02 and 0.88 s. That is 5e-11 s for each number of the residual stream in each layer; a slower GPU gains more
# seconds. Compiling adds 15 to 18 s to the first clip, less where the compiler's cache has it from a run before.
SECONDS_SAVED = 5e-11
SECONDS_TO_COMPILE = 20.0  # one block once, for all blocks of both experts


def use_fastest_attention(model: WanModel, tokens: int, device: torch.device) -> None:
    """Run the self-attention of `model` on the fastest right kernel for clips of so many tokens.

    Only in bf16 and fp16 on a GPU; elsewhere it stays what it is. Cross-attention stays too.
    """
    dtype = model.blocks[0].attn1.to_q.bias.dtype  # weights may be packed
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or model.low_precision == "fp8_attention":
        return
    name = fastest_backend(device, tokens, model.config.num_attention_heads, model.config.attention_head_dim, dtype)
    for block in model.blocks:
        block.attn1.set_attention_backend(name)


@functools.cache
def fastest_backend(device: torch.device, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> str:
    """The name in `BACKENDS` of the fastest right kernel for this self-attention: a probe of about a second."""
    heads = max(1, min(heads, round(PROBE_FLOP / (4 * tokens**2 * head_dim))))
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, tokens, heads, head_dim)
    query, key, value = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    there = [name for name, package in BACKENDS.items() if package is None or importlib.util.find_spec(package)]
    candidates = {name: functools.partial(dispatch_attention_fn, backend=AttentionBackendName(name)) for name in there}
    return fastest(candidates, query, key, value)


@torch.no_grad()
def fastest(candidates: Mapping[str, Attention], query: Tensor, key: Tensor, value: Tensor) -> str:
    """The name of the fastest candidate that is right, or the first name if none is.

    Right is what agrees with float64 arithmetic in every head within two units of the dtype's rounding, relative L2:
    1.6e-2 in bf16, where exact kernels are at about 3e-3 and 8-bit ones at 4e-2.
    """
    rows = torch.linspace(0, query.shape[1] - 1, PROBE_ROWS, device=query.device).long()
    exact = _exact(query[:, rows], key, value)
    seconds: dict[str, float] = {}
    for name, attention in candidates.items():
        try:
            found = attention(query, key, value)[:, rows].double()
            error = float(((found - exact).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))).max())
            if error <= 2 * torch.finfo(query.dtype).eps:  # not so when it is NaN
                seconds[name] = min(_seconds(attention, query, key, value) for _ in range(2))
            else:
                log.warning("attention kernel %s is wrong on this machine (error %.1e) and left out", name, error)
        except Exception as error:  # what a kernel raises that does not fit the machine is its own affair
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.info("attention kernel %s does not run on this machine and is left out: %s", name, reason)
    chosen = min(seconds, key=seconds.__getitem__) if seconds else next(iter(candidates))
    times = ", ".join(f"{name} {1000 * taken:.1f} ms" for name, taken in seconds.items())
    log.info("attention kernel: %s (%s)", chosen, times or "none was right")
    return chosen


def compile_where_it_pays(model: WanModel, tokens: int, forwards: float, device: torch.device) -> None:
    """Compile the blocks of `model` if so many forwards of so many tokens save more time than it takes; on a GPU only.

    They stay compiled, and are compiled again for a clip of another size.
    """
    width = model.config.num_attention_heads * model.config.attention_head_dim
    saved = SECONDS_SAVED * forwards * tokens * width * model.config.num_layers
    if device.type == "cuda" and saved > SECONDS_TO_COMPILE:
        model.compile_blocks()


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B, rows, heads, head_dim] of a few queries in float64, which no TF32 setting touches."""
    mixed: list[Tensor] = []
    for head in range(query.shape[2]):  # by itself, because a number takes 8 bytes
        one, other, values = (part[:, :, head].double() for part in (query, key, value))
        mixed.append((one @ other.mT * query.shape[-1] ** -0.5).softmax(-1) @ values)
    return torch.stack(mixed, dim=2)


def _seconds(attention: Attention, *inputs: Tensor) -> float:
    synchronize(inputs[0].device)
    start = time.perf_counter()
    attention(*inputs)
    synchronize(inputs[0].device)
    return time.perf_counter() - start
