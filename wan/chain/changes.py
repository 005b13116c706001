"""What is different about the clips of a folder that a run would make again, clip by clip and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wan.chain.fingerprint import difference

# what makes a clip one of another run: clips that differ in it do not belong in one folder
_OF_THE_RUN = ("task", "checkpoint", "width", "height")


@dataclass(frozen=True)
class Change:
    """Why a finished clip is not what is asked for: `reasons` of its own, or none where it only continues another.

    `root` is the clip at which what it follows from has changed, its own number where that is itself.
    """

    number: int
    reasons: tuple[str, ...]
    root: int


def find_change(number: int, old: Mapping[str, Any], new: Mapping[str, Any], before: Change | None) -> Change:
    """The change of a clip that was made with `old` and is to be made with `new`, after that of the clip before it."""
    keys = [key for key in sorted(old.keys() | new.keys()) if key != "parent" and old.get(key) != new.get(key)]
    reasons = tuple(dict.fromkeys(_reason(key, old.get(key), new.get(key)) for key in keys))
    if reasons:
        return Change(number, reasons, number)
    return Change(number, (), number - 1 if before is None else before.root)


def other_run(old: Mapping[str, Any], new: Mapping[str, Any], first: bool) -> str | None:
    """What makes a clip one of another run, in words; None where it may be made again in its folder.

    `first`: it is the clip that begins where the source ends.
    """
    if first and old.get("parent") != new.get("parent") and None not in (old.get("parent"), new.get("parent")):
        return difference("parent", None, None)
    for key in _OF_THE_RUN:
        if old.get(key) != new.get(key):
            if key in ("width", "height"):
                return f"another size ({old.get('width')}x{old.get('height')}, now {new['width']}x{new['height']})"
            return difference(key, old.get(key), new.get(key))
    return None


def _reason(key: str, old: Any, new: Any) -> str:
    if key == "prompt":
        return "its prompt changed"
    if key == "seed":
        return f"its seed {old}, now {new}"
    if key == "take":
        return f"take {new} of it was chosen" if new else "its best take was chosen"
    if key in ("anchor", "end_image", "cut", "loras", "handoff"):  # digests say nothing to a reader
        return f"{difference(key, 0, 0).partition(' 0')[0]} changed"
    return difference(key, old, new)


def in_words(changes: Iterable[Change]) -> list[str]:
    """A phrase for each clip, or for several in a row that have the same reason."""
    phrases = []
    for (reasons, root), group in groupby(changes, key=lambda one: (one.reasons, one.reasons or one.root)):
        numbers = [one.number for one in group]
        many = len(numbers) > 1
        clips = f"clips {numbers[0]} to {numbers[-1]}" if many else f"clip {numbers[0]}"
        if reasons:
            phrases.append(f"{clips}: {', '.join(reasons)}")
        elif root == numbers[0] - 1:
            phrases.append(f"{clips} follow from clip {root}" if many else f"{clips} continues clip {root}")
        else:
            phrases.append(f"{clips} follow{'' if many else 's'} from clip {root}")
    return phrases
