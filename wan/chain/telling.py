"""What is kept of a clip next to its frames and latents: its record, samples, and the pictures around its seam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wan import media
from wan.chain.finished_clip import FinishedClip, Told
from wan.chain.report import seam_thumbnails
from wan.types import Footage, Generation, from_uint8

if TYPE_CHECKING:
    from wan.chain.plan import Plan

SHEET_FRAMES = 4  # on each side of a seam


def tell(
    made: Generation,
    plans: Sequence[Plan],
    *,
    before: FinishedClip | None,
    source: Footage,
    describe: Callable[[Plan], dict[str, Any]],
    metadata: bool,
) -> Told:
    """What is kept of a clip that was made by the first of `plans`; the second is that of the clip after it, if any.

    It goes on from the clip `before`, or from the `source`.
    """
    from wan.prompting import RECENT_SECONDS
    from wan.quality import measure_look

    plan, following = plans[0], plans[-1]  # whose captioner will look at this clip
    recent = RECENT_SECONDS if following.prompt_mode == "continue" else None
    fps, fades = made.clip.fps, (plan.fade_in, following.fade_in if len(plans) > 1 else 0)
    if before is not None and before.is_pruned:  # the clip begins a shot, and these are only looked at
        tail = from_uint8(media.read_tail(before.video, SHEET_FRAMES, fps))
    else:
        tail = (before or source).tail(SHEET_FRAMES, fps)
    return Told(
        lambda: describe(plan) | {"look": measure_look(made.clip.frames).as_json()},
        samples=(following.num_segments, recent),
        sheet=seam_thumbnails(tail, made.clip.frames[made.dropped : made.dropped + SHEET_FRAMES]),
        metadata=metadata,
        keyframes=frozenset((fades[0], len(made.clip.frames) - fades[1])) if any(fades) else frozenset(),
    )
