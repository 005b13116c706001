"""What is kept of a clip next to its frames: which frames its captioner sees, its seam's pictures, and its record."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wan.chain.report import seam_thumbnails
from wan.chain.telling import tell
from wan.prompting import RECENT_SECONDS
from wan.types import Clip, Generation


def plan(mode: str = "describe", segments: int = 8, fade: int = 0) -> Any:
    return SimpleNamespace(prompt_mode=mode, num_segments=segments, fade_in=fade)


def made(dropped: int = 1) -> Generation:
    frames = torch.linspace(-1, 1, 17)[:, None, None, None].expand(17, 16, 16, 3)
    request: Any = None
    return Generation(Clip(frames, Fraction(16)), torch.zeros(1), request, dropped=dropped)


SOURCE: Any = SimpleNamespace(tail=lambda count, fps: torch.full((count, 16, 16, 3), -1.0))


def told(*plans: Any, clip: Generation | None = None, before: Any = None, metadata: bool = True) -> Any:
    described: Any = lambda plan: {"plan": plan.num_segments}  # noqa: E731
    return tell(clip or made(), plans, before=before, source=SOURCE, describe=described, metadata=metadata)


@pytest.mark.parametrize(
    ("plans", "samples"),
    [
        ((plan(segments=3),), (3, None)),
        ((plan(segments=3), plan(segments=5)), (5, None)),  # the next clip's captioner looks at it
        ((plan("continue", 3), plan(segments=5)), (5, None)),
        ((plan(segments=3), plan("continue", 5)), (5, RECENT_SECONDS)),
        ((plan("continue", 3),), (3, RECENT_SECONDS)),
    ],
)
def test_frames_are_kept_for_the_captioner_of_the_next_clip(plans: Any, samples: Any) -> None:
    assert told(*plans).samples == samples
    record = told(*plans).describe()
    assert record["plan"] == 3 and record["look"]["lightness"] > 0


@pytest.mark.parametrize(
    ("fades", "keyframes"),
    [((0, 0), ()), ((4, 0), (4, 17)), ((0, 4), (0, 13)), ((4, 3), (4, 14)), ((4,), (4, 17)), ((0,), ())],
)
def test_a_clip_can_be_cut_where_it_fades(fades: tuple[int, ...], keyframes: tuple[int, ...]) -> None:
    assert told(*(plan(fade=frames) for frames in fades)).keyframes == frozenset(keyframes)


@pytest.mark.parametrize("metadata", [True, False])
def test_a_seam_is_shown_with_four_frames_on_either_side(metadata: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = told(plan(), clip=made(dropped=5), metadata=metadata)
    frames = made().clip.frames
    assert kept.metadata == metadata
    assert kept.sheet == seam_thumbnails(torch.full((4, 16, 16, 3), -1.0), frames[5:9]) and len(kept.sheet) == 8
    grey = torch.zeros(4, 16, 16, 3)
    before = SimpleNamespace(is_pruned=False, tail=lambda count, fps: grey, video=Path("1.mp4"))
    assert told(plan(), before=before).sheet == seam_thumbnails(grey, frames[1:5])
    read: list[Any] = []

    def read_tail(path: Path, count: int, fps: Fraction) -> Any:
        read.append((path, count, fps))
        return np.full((count, 16, 16, 3), 255, np.uint8)

    monkeypatch.setattr("wan.media.read_tail", read_tail)
    pruned = SimpleNamespace(is_pruned=True, video=Path("1.mp4"))  # whose frames are in its video alone
    assert told(plan(), before=pruned).sheet == seam_thumbnails(torch.ones(4, 16, 16, 3), frames[1:5])
    assert read == [(Path("1.mp4"), 4, 16)]
