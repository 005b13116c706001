"""Which seed each clip of a run is made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wan.chain.script import Script
from wan.settings import draw_seed


class Seeds:
    """A clip's seed is drawn again, by the storyboard, of its name, or counted up from that of the first clip.

    `given` is the first clip's, or negative for that of the run so far or a new one; `before` what run.json says of
    the run so far. `follow` comes before anything else.
    """

    def __init__(self, given: int, before: Mapping[str, Any]) -> None:
        continues = "base_seed" in before
        self.base: int = int(before["base_seed"]) if given < 0 and continues else draw_seed(given)
        self._is_new = given < 0 and not continues
        over = before.get("redone_over", {})
        # those that were drawn again, with those of the storyboard that they are in place of
        self._redone = {int(number): (int(seed), over.get(number)) for number, seed in before.get("seeds", {}).items()}
        # of clips with a name, which keep them wherever they are moved
        self._named: dict[str, int] = {}
        if before.get("base_seed") == self.base:
            self._named |= before.get("named") or {}

    def follow(self, script: Script, redo: int | None = None) -> None:
        """Take the storyboard's seeds from a script, and give clip `redo` another one."""
        self._script, self._scripted = script, script.seeds
        if redo is not None:
            self.draw_again(redo)
        # a clip with a new name gets the seed of its place, or one beside it that no other name has
        for number in range(1, len(script.plans) + 1):
            if (name := script.name(number)) is not None and name not in self._named:
                seed = self.base + number - 1
                while seed in self._named.values():
                    seed += 1
                self._named[name] = seed

    def of(self, number: int) -> int:
        """The seed of a clip."""
        counted = self._named.get(self._script.name(number) or "", self.base + number - 1)
        seed: int = self._drawn_again.get(number, self._scripted.get(number, counted))
        return seed

    def is_drawn(self, number: int) -> bool:
        """Whether the seed of a clip is known only when the run begins."""
        return self._is_new and number not in self._drawn_again and number not in self._scripted

    def draw_again(self, number: int) -> None:
        """Give a clip another seed."""
        seed, name = draw_seed(-1), self._script.name(number)
        if name is not None and number not in self._scripted:
            self._named[name] = seed
        else:
            self._redone[number] = seed, self._scripted.get(number)

    @property
    def _drawn_again(self) -> dict[int, int]:
        """Unless the storyboard has another one by now."""
        return {number: seed for number, (seed, over) in self._redone.items() if over == self._scripted.get(number)}

    def as_json(self) -> dict[str, Any]:
        """What run.json says of them."""
        drawn = self._drawn_again
        return {
            "base_seed": self.base,
            "seeds": {str(number): seed for number, seed in sorted(drawn.items())},
            "redone_over": {str(number): self._scripted.get(number) for number in sorted(drawn)},
            **({"named": self._named} if self._named else {}),
        }
