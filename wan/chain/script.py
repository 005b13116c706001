"""`Script`: what each clip of a run is to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan.chain.storyboard import Scene

if TYPE_CHECKING:
    from wan.chain.plan import Plan


@dataclass(frozen=True)
class Script:
    """What each clip of a run is to be: scenes as far as there are any, the plan of every clip, and what it is made
    with but for its seed and the clip before it, as JSON values."""

    scenes: Sequence[Scene]
    plans: Sequence[Plan]
    wanted: Sequence[Mapping[str, Any]]

    def name(self, number: int) -> str | None:
        """The name that a storyboard gives a clip, counted from 1."""
        return self.scenes[number - 1].values.get("name") if number <= len(self.scenes) else None

    def key(self, number: int) -> str:
        """By which a clip is known from run to run: its name, or its number."""
        return self.name(number) or str(number)

    @property
    def seeds(self) -> dict[int, int]:
        """The seeds that a storyboard gives, by clip."""
        return {number: scene.values["seed"] for number, scene in enumerate(self.scenes, 1) if "seed" in scene.values}

    def fades(self, count: int) -> list[int]:
        """Over how many frames each of the first clips fades in."""
        return [plan.fade_in for plan in self.plans[:count]]
