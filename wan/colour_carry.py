"""`colour_carry`: a clip begins in colours nearer to those of its shot's first clip; what is shown is not changed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from wan.options import LONGEST_CONTEXT
from wan.quality import Grade, measure_colours
from wan.types import Footage, Generation, KnownFrames


def colours_of_shot(footage: Footage, made: Generation, *, is_cut: bool) -> Tensor:
    """What the clips after this one are led back to: the end of the first clip that was made of the shot."""
    if is_cut or footage.colours is None:
        return measure_colours(made.clip.frames[-LONGEST_CONTEXT:])
    return footage.colours


def graded(tail: Tensor, colours: Tensor, strength: float) -> Tensor:
    """The end of the footage [n, H, W, 3] in [-1, 1] as the clip after it should begin: what that is measured against,
    lest `drift_correction` takes the way back for a step at the seam."""
    grade = Grade.towards(colours, measure_colours(tail), strength)
    return torch.stack([grade(frame.permute(2, 0, 1)).permute(1, 2, 0) for frame in tail])


def lead_to(colours: Tensor, known: KnownFrames, tail: Tensor, strength: float) -> KnownFrames:
    """What is known of a clip, with the colours that it should begin in, see `carried`.

    `tail` float32 [n, H, W, 3] in [-1, 1] is the end of the footage, by which the colours are compared.
    """
    grade = Grade.towards(colours, measure_colours(tail), strength)
    if grade.is_nothing:
        return known
    # the motion of svi2pro is a latent frame, which the end of the clip before is the picture of
    frames = known.leading or tuple(tail[(len(tail) - 1) % 4 :].permute(0, 3, 1, 2))
    graded = torch.stack([grade(_tensor(frame)) for frame in frames], dim=1)
    return dataclasses.replace(known, leading=frames, graded=graded)


def _tensor(frame: object) -> Tensor:
    assert isinstance(frame, Tensor)  # of the clip's size, as `VideoContinuation.known` has them
    return frame
