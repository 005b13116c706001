"""Footage in the rate and size of the clip that continues it: what the clip knows, and what it is measured against."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from wan.chain.plan import LaterPicture, Plan
from wan.footage import ChangedEnd
from wan.handoff import hand_off
from wan.options import LONGEST_CONTEXT
from wan.settings import Geometry
from wan.types import Footage, Frame, KnownFrames

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FittedFrames:
    """How a model sees footage: `fit` brings a picture to a width and a height, float32 [3, height, width]."""

    fit: Callable[[Frame, int, int], Tensor]
    fps: Fraction

    def picture(self, frame: Frame, geometry: Geometry) -> Tensor:
        """A picture in the clip's size, float32 [3, H, W]."""
        return self.fit(frame, geometry.width, geometry.height)

    def last(self, footage: Footage, count: int, geometry: Geometry) -> tuple[Tensor, ...]:
        """The footage's last frames at the model's rate, up to `count`, float32 [3, H, W] of the clip's size."""
        return tuple(self.picture(frame.permute(2, 0, 1), geometry) for frame in footage.tail(count, self.fps))

    def tail(self, footage: Footage, geometry: Geometry) -> Tensor:
        """As many of the last frames as anything asks for, float32 [n, H, W, 3]."""
        return torch.stack(self.last(footage, LONGEST_CONTEXT, geometry)).permute(0, 2, 3, 1)

    def with_available_context(self, footage: Footage, plan: Plan) -> Plan:
        """The plan with no more known frames than the footage has at the model's rate."""
        if plan.context.mode != "tail" or plan.is_cut:
            return plan
        context = plan.context.within(len(footage.tail(plan.context.frames, self.fps)))
        if context != plan.context:
            log.warning("the video is too short for %d known frames: %d", plan.context.frames, context.frames)
        return dataclasses.replace(plan, context=context)

    def hand_off(self, footage: Footage, plan: Plan, handed: Tensor | None) -> tuple[Footage, Tensor | None]:
        """What the clip starts from, and its known frames [n, H, W, 3] where the plan's command has seen them.

        `handed` are those frames where they are known already. Raises UserError where the command fails.
        """
        if plan.handoff is None or plan.is_cut:
            return footage, None
        tail = self.tail(footage, plan.geometry)
        if plan.context.frames == 1:
            last = self.picture(footage.last, plan.geometry)
            tail = torch.cat([tail[:-1], last.permute(1, 2, 0)[None]])  # as it would be known without this
        # svi2pro knows the last latent frame, which is encoded from all of these
        known = tail if plan.context.mode == "svi2pro" else tail[-plan.context.frames :]
        if handed is None:
            handed = hand_off(plan.handoff, known)
        if torch.equal(handed, known):
            return footage, handed
        return ChangedEnd(footage, torch.cat([tail[: len(tail) - len(handed)], handed])), handed

    def known(self, footage: Footage, plan: Plan) -> KnownFrames:
        """What the clip is conditioned on."""
        geometry = plan.geometry
        later = plan.end.read() if isinstance(plan.end, LaterPicture) else plan.end
        end = None if later is None else self.picture(later, geometry)
        if plan.cut is True:
            return KnownFrames(end=end)
        if plan.cut is not None and plan.cut is not False:
            picture = self.picture(plan.cut, geometry)
            # the first clip of a shot has an anchor and no motion yet (source: Stable Video Infinity 2.0 Pro)
            is_svi = plan.context.mode == "svi2pro"
            return KnownFrames(end=end, anchor=picture) if is_svi else KnownFrames((picture,), end)
        if plan.context.mode == "svi2pro":
            assert plan.anchor is not None
            anchor = self.picture(plan.anchor, geometry)
            if footage.motion is not None:
                return KnownFrames(end=end, anchor=anchor, motion=footage.motion)
            tail = self.last(footage, LONGEST_CONTEXT, geometry)
            return KnownFrames(tail[(len(tail) - 1) % 4 :], end, anchor)
        if plan.context.frames == 1:
            return KnownFrames((self.picture(footage.last, geometry),), end)
        return KnownFrames(self.last(footage, plan.context.frames, geometry), end)
