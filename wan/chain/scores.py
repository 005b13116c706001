"""The score of a seam: from which one on it shows, and which numbers of a record can be drawn. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VISIBLE = 1.7  # score of a seam that shows, by `python -m benchmarks.seams`; what moves also turns by itself
SEAMLESS = 0.7  # two of its numbers at the edge of their good range
# The numbers of a look that drift, with their names.
LOOKS = {"lightness": "Lightness", "contrast": "Contrast", "chroma": "Colour strength", "sharpness": "Sharpness"}


def drawable(value: Any) -> float | None:
    """A finite number, of a size that can be drawn."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e12 else None


def score_of(clip: Mapping[str, Any]) -> float | None:
    """The score of a clip's seam, None where it has none."""
    return drawable((clip["seam"] or {}).get("score"))


def verdict(score: float | None) -> str:
    """Of a seam with this score: good, faint, visible or unknown."""
    if score is None:
        return "unknown"
    return "good" if score < SEAMLESS else "faint" if score < VISIBLE else "visible"
