"""The presets: one frozen row each. What a row leaves None is the model's; an explicit setting wins over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from wan.errors import UserError


@dataclass(frozen=True)
class Preset:
    """Settings that go together. `distilled`: they are for step-distillation LoRAs, and make noise without them."""

    name: str
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None
    solver: str = "unipc"
    guidance_interval: tuple[float, float] | None = None
    cache: str = "off"
    distilled: bool = False


QUALITY = Preset("quality")  # the released settings
BALANCED = Preset("balanced", cache="taylorseer:2")  # nearer to quality than half of its steps (benchmarks/LOG.md)
# What 4-step LoRAs for Wan2.2 are sampled with (source: lightx2v's Wan2.2-Lightning and Wan2.2-Distill-Loras).
TURBO = Preset("turbo", steps=4, shift=5.0, guidance=1.0, solver="euler", distilled=True)

PRESETS: Mapping[str, Preset] = MappingProxyType({row.name: row for row in (QUALITY, BALANCED, TURBO)})


def preset_named(name: str) -> Preset:
    """The row of that name. Raises UserError."""
    if name not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}; {name!r} is not")
    return PRESETS[name]
