"""What the numbers of a seam mean: which of them a viewer notices, and what is said of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wan.chain.scores import VISIBLE, drawable
from wan.quality.metrics import (
    FAITHFUL_DB,
    GOOD_SPEED,
    MILD,
    VISIBLE_COLOUR,
    VISIBLE_DUPLICATE,
    VISIBLE_FLASH,
    VISIBLE_JUMP,
    VISIBLE_SPEED,
    VISIBLE_TURN,
)


def needs_attention(score: float | None, warnings: Iterable[str]) -> bool:
    """Whether a seam can be seen, or has a warning of what footage does not do by itself."""
    return (score or 0.0) >= VISIBLE or not set(MILD).issuperset(warnings)


@dataclass(frozen=True)
class Measure:
    """One number of a seam: its ranges `good` and `faint` (beyond which it is visible), and what it means in words."""

    key: str
    name: str
    unit: str
    good: tuple[float, float]
    faint: tuple[float, float]
    below: str
    within: str
    above: str

    def read(self, seam: Mapping[str, Any]) -> dict[str, str]:
        """Name, value, verdict (good, faint, visible or unknown) and words."""
        value = drawable(seam.get(self.key))
        if value is None:
            return {"name": self.name, "value": "–", "verdict": "unknown", "words": "not measured"}
        ranges = {"good": self.good, "faint": self.faint}
        verdict = next((name for name, (low, high) in ranges.items() if low <= value <= high), "visible")
        words = self.within if verdict == "good" else self.below if value < self.good[0] else self.above
        return {"name": self.name, "value": f"{value:.2f} {self.unit}", "verdict": verdict, "words": words}


MEASURES = (
    Measure(
        "jump_ratio",
        "Change at the seam",
        "× usual",
        (0.7, 1.4),
        (VISIBLE_DUPLICATE, VISIBLE_JUMP),
        "less than between other frames: the picture halts",
        "as between any two frames",
        "more than between other frames: the picture jumps",
    ),
    Measure(
        "speed_ratio",
        "Speed after the seam",
        "× before",
        GOOD_SPEED,
        (1 / VISIBLE_SPEED, VISIBLE_SPEED),
        "the motion slows down at once",
        "the motion keeps its pace",
        "the motion speeds up at once",
    ),
    Measure(
        "later_speed_ratio",
        "Speed a little later",
        "× before",
        GOOD_SPEED,
        (VISIBLE_SPEED**-2, VISIBLE_SPEED**2),
        "the motion dies down",
        "the motion keeps its pace",
        "the motion picks up",
    ),
    Measure(
        "velocity_change",
        "Turn of the motion",
        "of the speed",
        (0, 0.25),
        (0, VISIBLE_TURN),
        "",
        "the motion keeps its direction",
        "the motion changes direction",
    ),
    Measure(
        "colour_step",
        "Colour step",
        "ΔE",
        (0, 0.5),
        (0, VISIBLE_COLOUR),
        "",
        "the colours stay",
        "the colours change at once",
    ),
    Measure(
        "flash",
        "Flash",
        "L*",
        (0, VISIBLE_FLASH / 2),
        (0, VISIBLE_FLASH),
        "",
        "the brightness stays",
        "the picture flickers after the seam",
    ),
    Measure(
        "fidelity_db",
        "Known frames redrawn",
        "dB",
        (30, math.inf),
        (FAITHFUL_DB, math.inf),
        "the clip begins with other pixels than it was given",
        "the clip begins with what it was given",
        "",
    ),
)
