"""Which parameters of the denoiser stay float32, whatever dtype it computes in: the official precision policy."""

from __future__ import annotations

FLOAT32_PARTS = ("condition_embedder.time_embedder.", "condition_embedder.time_proj.", "proj_out.")
_NAMES = ("scale_shift_table", "norm2.weight", "norm2.bias")


def stays_float32(name: str) -> bool:
    """Whether a parameter, by the library's name, does."""
    return name.startswith(FLOAT32_PARTS) or name.endswith(_NAMES)
