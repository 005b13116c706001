"""Which frames are compared at a seam, and when that is worked out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan import candidates
from wan.candidates import score_seam_later


@pytest.mark.parametrize(
    ("dropped", "mode", "old", "known"),
    [
        (1, "last", 13, [0]),
        (9, "tail", 13, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (9, "tail", 4, [5, 6, 7, 8]),  # no more than the footage has
        (5, "svi2pro", 13, [1, 2, 3, 4]),  # whose first frame is its anchor's
    ],
)
def test_a_seam_is_scored_between_the_footage_and_what_is_new(
    dropped: int, mode: str, old: int, known: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def score_seam(before: Any, after: Any, **more: Any) -> Any:
        asked.append((before, after, more))
        return SimpleNamespace(as_json=lambda: {"score": 1.0})

    monkeypatch.setattr(candidates, "score_seam", score_seam)
    before, pixels = -torch.arange(1.0, old + 1), torch.arange(30.0)
    frames: Any = SimpleNamespace(tail=lambda footage, geometry: before)
    plan: Any = SimpleNamespace(is_cut=False, geometry=None, dropped=dropped, context=SimpleNamespace(mode=mode))
    made: Any = SimpleNamespace(clip=SimpleNamespace(frames=pixels))
    later = score_seam_later(frames, None, made, plan)  # type: ignore[arg-type]
    assert not asked
    assert later() == later() == {"score": 1.0} and len(asked) == 1
    shown, new, more = asked[0]
    assert torch.equal(shown, before) and new.tolist() == list(range(dropped, min(dropped + old, 30)))
    assert more["rendered"].tolist() == known and torch.equal(more["known"], before[-len(known) :])


def test_a_new_shot_has_no_seam() -> None:
    plan: Any = SimpleNamespace(is_cut=True)
    assert score_seam_later(None, None, None, plan)() is None  # type: ignore[arg-type]
