"""Which parameters of the denoiser stay float32, whatever dtype it computes in: the official precision policy.

And what 8 bits need, where that is told without PyTorch.
"""

from __future__ import annotations

from wan.errors import UserError

FLOAT32_PARTS = ("condition_embedder.time_embedder.", "condition_embedder.time_proj.", "proj_out.")
_NAMES = ("scale_shift_table", "norm2.weight", "norm2.bias")


def stays_float32(name: str) -> bool:
    """Whether a parameter, by the library's name, does."""
    return name.startswith(FLOAT32_PARTS) or name.endswith(_NAMES)


def needs_of(precision: str) -> str:
    """What a `precision` of 8 bits needs, for messages."""
    return f"`precision` {precision} needs a GPU with 8-bit floats (RTX 40-series, Hopper or newer)"


def no_gpu_for(precision: str) -> UserError:
    """That there is no GPU at all."""
    return UserError(f"{needs_of(precision)}, and there is none; give `precision` bf16")
