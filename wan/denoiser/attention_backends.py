"""What the denoiser's blocks run on: the attention kernel that is fastest and right here, compiled where that pays."""

from __future__ import annotations

import functools
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan.denoiser.model import WanModel
from wan.device.hardware import synchronize
from wan.device.parallel import ALONE, Team

log = logging.getLogger(__name__)

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values [B, L, heads, head_dim]

# The library's backends that round no more than their dtype does and that are fetched from nowhere, with the package
# that each needs. The 8-bit ones (sage) are not among them, nor are those of a hub.
_FLASH_2 = "flash_attn.flash_attn_interface"  # `flash_attn` alone may be a part of FlashAttention 4
BACKENDS = {"native": None, "_native_cudnn": None, "_flash_3": "flash_attn_interface", "flash": _FLASH_2}
FLASH_4 = "flash_4"  # of a package, which the library takes from a hub only
CUDNN = "cudnn"  # `_native_cudnn` without the library's copies of what does not lie by heads
PROBE_FLOP = 1e13  # of one call, with all tokens and as many heads as that allows: 15 to 30 ms on an H200
PROBE_ROWS = 64  # queries that are compared with exact arithmetic

# One H200, whole clips: a forward of A14B at 32,760 tokens takes 3.10 s as it is and 2.77 s compiled, of 5B at 27,280
# tokens 1.02 and 0.88 s. That is 5e-11 s for each number of the residual stream in each layer; a slower GPU gains more
# seconds. Compiling adds 15 to 18 s to the first clip, less where the compiler's cache has it from a run before.
SECONDS_SAVED = 5e-11
SECONDS_TO_COMPILE = 20.0  # one block once, for all blocks of both experts
# One H100 (benchmarks/LOG.md): what FlashAttention 4 saves of cuDNN's time for each FLOP of attention. What it takes to
# import and to compile itself in each process is an estimate on the safe side.
FLASH_4_SAVES = 2.5e-16
SECONDS_OF_FLASH_4 = 5.0


def use_fastest_attention(
    model: WanModel, tokens: int, forwards: float, device: torch.device, team: Team = ALONE
) -> None:
    """Run the self-attention of `model` on the fastest right kernel for so many forwards of so many tokens.

    Only in bf16 and fp16 on a GPU; elsewhere it stays what it is. Cross-attention stays too. Of a `team` the first
    process chooses.
    """
    dtype = model.blocks[0].attn1.to_q.bias.dtype  # weights may be packed
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or model.low_precision == "fp8_attention":
        return
    heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
    heads //= team.sizes.ulysses  # each of them for all tokens
    flop = 4.0 * tokens**2 * heads * head_dim * model.config.num_layers * forwards
    pays = flop * FLASH_4_SAVES > SECONDS_OF_FLASH_4
    travels = team.sizes.tokens > 1
    use_attention(model, team.share(lambda: fastest_attention(device, tokens, heads, head_dim, dtype, pays, travels)))


def use_attention(model: WanModel, name: str) -> None:
    """Run the self-attention of `model` on the kernel of that name in `kernels_there`."""
    attention = kernels_there()[name]
    for block in model.blocks:
        block.attn1.processor.attend, block.attn1.processor.kernel = attention, name


@functools.cache
def kernels_there() -> Mapping[str, Attention]:
    """The exact attention kernels that are installed, whether or not they run here."""
    kernels: dict[str, Attention] = {
        name: functools.partial(dispatch_attention_fn, backend=AttentionBackendName(name))
        for name, package in BACKENDS.items()
        if package is None or _is_installed(package)
    }
    kernels |= {CUDNN: cudnn_attention}
    return kernels | ({FLASH_4: flash_attention_4} if _is_installed("flash_attn.cute") else {})


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError as error:  # what it is a part of is missing, or broken
        log.info("%s is not there: %s", package, error)
        return False


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention [B, L, heads, head_dim] by cuDNN, which takes numbers as they lie and leaves them so.

    What has come from other GPUs lies by tokens, and nothing fuses a copy of it with what made it.
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return mixed.transpose(1, 2)


@torch.library.custom_op("wan::flash_attention_4", mutates_args=())
def flash_attention_4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention [B, L, heads, head_dim] by the package flash-attn-4 (Dao et al.), bf16 or fp16 on a GPU.

    An operation of its own, because PyTorch's compiler cannot look into it.
    """
    result = _flash_attn_func()(query, key, value)
    output: Tensor = result[0] if isinstance(result, tuple) else result  # with the logarithms of the sums
    return output


@flash_attention_4.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@functools.cache
def _flash_attn_func() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func

    warnings.filterwarnings("ignore", message="Argument aux_data")  # of its own compiler to its authors
    return flash_attn_func  # type: ignore[no-any-return]


@functools.cache
def fastest_attention(
    device: torch.device,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    flash_4: bool,
    travels: bool = False,
) -> str:
    """The name in `kernels_there` of the fastest right kernel for this self-attention, by a probe of about a second.

    With `flash_4` also where that package has to start for it, which takes a few seconds. `travels`: what it takes has
    come from other GPUs. On one GPU the compiler fuses the library's copies with what makes their numbers, so that what
    saves them is no candidate there.
    """
    heads = max(1, min(heads, round(PROBE_FLOP / (4 * tokens**2 * head_dim))))
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, tokens, heads, head_dim)
    query, key, value = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    left_out = {FLASH_4: not flash_4, CUDNN: not travels}
    candidates = {name: attention for name, attention in kernels_there().items() if not left_out.get(name)}
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
            ours = attention(query, key, value)[:, rows].double()
            error = float(((ours - exact).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))).max())
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
