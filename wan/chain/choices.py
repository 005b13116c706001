"""What a person has decided about the clips of a run, as run.json keeps it, so that nobody is asked twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from wan.chain.fingerprint import fingerprint
from wan.chain.finished_clip import FinishedClip
from wan.errors import UserError
from wan.options import CANDIDATE_STEP, Settings


class Choices:
    """Takes, edited prompts, clips that are kept after another predecessor, and clips that may be made again.

    `before` is what run.json says of the run so far.
    """

    def __init__(self, settings: Settings, before: Mapping[str, Any]) -> None:
        self._settings = settings
        # clips that --keep_following vouched for: their fingerprints, and that of the clip that they now go on from
        self._accepted = dict(before.get("accepted") or {})
        self._given_up = set(before.get("given_up") or ())
        # the takes that were chosen, with the fingerprint of the clip without that choice, by `Script.key`
        self._takes = {key: (int(take), str(of)) for key, (take, of) in (before.get("takes") or {}).items()}
        # prompts that were edited in a review, with those that they are in place of, by `Script.key`
        self.edited: dict[str, dict[str, str | None]] = dict(before.get("edited") or {})

    def accept(self, clip: FinishedClip, wanted: Mapping[str, Any]) -> bool:
        """Whether a clip is what is wanted; `keep_following` vouches for it after one other predecessor."""
        if clip.settings == wanted:
            return True
        if dict(clip.settings) | {"parent": wanted["parent"]} != wanted:
            return False
        settings = self._settings
        if settings.keep_following and settings.redo is not None and clip.number > settings.redo:
            self._accepted[clip.fingerprint] = wanted["parent"]
        return bool(self._accepted.get(clip.fingerprint) == wanted["parent"])

    def take(
        self, number: int, key: str, wanted: Mapping[str, Any], most: int, finished: Callable[[], FinishedClip | None]
    ) -> dict[str, int]:
        """The take that was chosen of a clip with these settings; nothing where it is the one with the best seam.

        There are `most` of them, and `finished` gives the clip with that one. Raises UserError.
        """
        digest = fingerprint(wanted)
        take, of = self._takes.get(key, (0, digest))
        take = dict(self._settings.take).get(number, take if of == digest else 0)
        if not take:
            return {}
        if take > most:
            raise UserError(f"`take` {number}={take}: the clip has {most} of them; `takes` makes more")
        self._takes[key] = take, digest
        best = finished()
        is_best = best is not None and best.record["seed"] == wanted["seed"] + (take - 1) * CANDIDATE_STEP
        return {} if is_best else {"take": take}

    def give_up(self, clips: Iterable[FinishedClip]) -> None:
        """Note that these, and none but these, are to be made again."""
        self._given_up = {clip.fingerprint for clip in clips}

    def has_given_up(self, clip: FinishedClip) -> bool:
        """Whether it was agreed that a clip is made again."""
        return clip.fingerprint in self._given_up

    def as_json(self) -> dict[str, Any]:
        """What run.json says of them."""
        return {
            **({"edited": self.edited} if self.edited else {}),
            **({"takes": self._takes} if self._takes else {}),
            **({"given_up": sorted(self._given_up)} if self._given_up else {}),
            "accepted": dict(sorted(self._accepted.items())),
        }
