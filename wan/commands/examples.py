"""What each task makes when it is given neither a prompt nor an input, as Wan2.2's own script does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_SHAPES = {"prompt": "The shapes keep moving across the picture at the same pace.", "video": "examples/shapes.mp4"}

EXAMPLE_PROMPT: dict[str, dict[str, str]] = {
    "t2v-A14B": {"prompt": "A paper boat drifts down a rain-wet street at dusk while lamps are lit one by one."},
    "i2v-A14B": {
        "prompt": "The shapes glide slowly across the picture, and the camera stays still.",
        "image": "examples/shapes.png",
    },
    "ti2v-5B": {"prompt": "A paper boat drifts down a rain-wet street at dusk while lamps are lit one by one."},
    "v2v-14B": _SHAPES,
    "v2v-5B": _SHAPES,
}


def example_of(task: str) -> Mapping[str, str]:
    """The settings of a task's example; its files lie in the repository."""
    root = Path(__file__).parent.parent.parent
    example = dict(EXAMPLE_PROMPT[task])
    return example | {name: str(root / example[name]) for name in ("image", "video") if name in example}
