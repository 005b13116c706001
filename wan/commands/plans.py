"""The plan of every clip of a chain: the command line's, with what the clip's scene says in its place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wan import media
from wan.chain.fingerprint import picture_digest
from wan.chain.plan import LaterPicture, Plan
from wan.chain.storyboard import Scene
from wan.commands.job import Job
from wan.errors import UserError
from wan.settings import Context
from wan.types import Footage, Frame

if TYPE_CHECKING:
    from wan.continuation import VideoContinuation


def plans_of(
    job: Job, continuation: VideoContinuation, footage: Footage, scenes: Sequence[Scene], count: int
) -> list[Plan]:
    """The plan of every clip: the command line's, with what its scene says. Raises UserError."""
    settings = job.settings
    common = job.plan(continuation, footage, check=count > len(scenes))  # else each clip's scene has its own

    def read(file: str) -> Frame:
        """A picture file in the clips' size: the file itself may be large."""
        return continuation.frame_for(media.read_image(file), common.geometry.width, common.geometry.height)

    picture = functools.cache(read)

    plans: list[Plan] = []
    anchor, shot = common.anchor, None  # what is held on to, and what the shot began with
    begin: Frame | None = continuation.frame_for(footage.last, common.geometry.width, common.geometry.height)
    ends = [_later(file, read) for file in job.ends]
    if ends:
        continuation.plan.check(dataclasses.replace(common, end=ends[0]))
    for number in range(1, count + 1):
        # the end image of the command line is where the whole chain ends
        end = ends[number - 1] if ends else common.end if number == count else None
        plan = dataclasses.replace(common, number=number, count=count, end=end, anchor=anchor)
        if number <= len(scenes):
            scene = scenes[number - 1]
            ending: dict[str, Any] = {} if "end_image" in scene.values else {"end": end}
            try:
                of_scene = scene.over(settings)
                is_svi = Context.choose(of_scene.continuation, of_scene.context_frames).mode == "svi2pro"
                if number == count and settings.until is not None and "end_image" in scene.values:
                    raise UserError("end_image: the last clip ends with the first frame of `until`")
                if "anchor_image" in scene.values:
                    if not is_svi:
                        raise UserError("anchor goes with `continuation` svi2pro")
                    anchor = picture(scene.values["anchor_image"])
                if is_svi and anchor is None:
                    anchor = shot
                of_clip = {"anchor": anchor, "number": number, "count": count} | ending
                plan = job.plan(continuation, footage, of_scene, picture, **of_clip)
            except UserError as error:
                where = f"{settings.storyboard}, line {scene.line}" if scene.line else f"clip {number}"
                raise UserError(f"{where}: {error.marked}") from error
            if is_svi:
                anchor = plan.anchor
            if isinstance(scene.values.get("cut"), str):
                shot = picture(scene.values["cut"])
                if anchor is not None and not settings.anchor_image:
                    anchor = shot
            if plan.is_cut:
                begin = shot if isinstance(scene.values["cut"], str) else None
        held = anchor if plan.context.mode == "svi2pro" else begin
        plan = dataclasses.replace(plan, likeness=held)
        plans.append(continuation.frames.with_available_context(footage, plan) if number == 1 else plan)
    for before, plan in pairwise(plans):
        if 2 * plan.fade_in > min(before.shown, plan.shown):
            raise UserError(
                f"`fade` {plan.fade_in} is more than half of clip {plan.number} or of the one before it; give less"
            )
        if plan.fade_in and settings.include_source:
            raise UserError("`fade` is for a joined video without the source in front; leave `include_source` out")
    return plans


def _later(file: str, read: Callable[[str], Frame]) -> LaterPicture:
    """A picture that is looked at now, and read again for its clip. Raises UserError."""
    digest = picture_digest(read(file))

    def read_again() -> Frame:
        frame = read(file)
        if picture_digest(frame) != digest:
            raise UserError(f"{file} is another picture than when the run began; the same command goes on with it")
        return frame

    return LaterPicture(digest, read_again)
