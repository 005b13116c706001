"""The candidates of one clip: how each is made from a prompt and footage, how its seam is scored, which one is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from wan.chain.plan import Plan
from wan.colour_carry import graded, lead_to
from wan.fitted_frames import FittedFrames
from wan.prompting import ClipPrompt
from wan.quality import correct_drift, score_seam
from wan.stopwatch import Stopwatch
from wan.types import Clip, Footage, Generation, OnStep, Request, Sampled


class Draft(Protocol):
    """Where what is known of an unfinished clip is kept, see `wan.chain.draft.ClipDraft`."""

    @property
    def prompt(self) -> ClipPrompt | None:
        """The prompt that its candidates are made with, None before the first of them is sampled."""

    @property
    def handed(self) -> Tensor | None:
        """The known frames of its candidates [n, H, W, 3] as a program has left them, None before that."""

    def find(self, seed: int) -> Sampled | None:
        """What sampling the candidate with this seed came to, None for one that is to be sampled."""

    def keep(self, seed: int, sampled: Sampled, prompt: ClipPrompt, handed: Tensor | None) -> None:
        """Keep what sampling came to, and what it began with."""


@dataclasses.dataclass(frozen=True)
class CandidateMaker:
    """Makes the candidates of a clip that goes on from `footage`, all with one prompt.

    `run` is `Pipeline.run`, and `stride` how many frames a latent frame holds. What the `draft` has is not made again.
    """

    run: Callable[..., Generation]
    frames: FittedFrames
    stride: int
    device: torch.device
    footage: Footage
    prompt: ClipPrompt
    plan: Plan
    on_step: OnStep | None = None
    draft: Draft | None = None
    handed: Tensor | None = None

    def make(self, seed: int) -> Generation:
        """The candidate with this seed."""
        plan, draft = self.plan, self.draft
        watch = Stopwatch(self.device, plan.sampling.steps, self.on_step)
        with watch.stage("prepare"):
            known = self.frames.known(self.footage, plan)
            if plan.colour_carry and plan.dropped and self.footage.colours is not None:
                tail = self.frames.tail(self.footage, plan.geometry)
                known = lead_to(self.footage.colours, known, tail, plan.colour_carry)
        request = Request(
            self.prompt.text,
            plan.negative,
            known,
            plan.geometry,
            plan.sampling,
            seed,
            plan.loras,
            plan.motion_amplitude,
        )
        # of the whole chain, so that a run that goes on with it computes with the same kernels
        made = self.run(
            request,
            offload=plan.offload,
            on_step=self.on_step,
            clips=plan.count * plan.best_of,
            sampled=None if draft is None else draft.find(seed),
            on_sampled=None if draft is None else lambda sampled: draft.keep(seed, sampled, self.prompt, self.handed),
        )
        if plan.discard:
            shown = len(made.clip.frames) - plan.discard
            cells = plan.discard // self.stride
            made = replace(made, clip=Clip(made.clip.frames[:shown], made.clip.fps), latents=made.latents[:, :-cells])
        if plan.drift_correction and plan.dropped and plan.end is None:  # an end image says itself how the clip ends
            made = self._correct(made)
        return replace(made, seconds=watch.seconds | dict(made.seconds))

    def _correct(self, made: Generation) -> Generation:
        plan, steps = self.plan, self.plan.sampling.steps
        watch = Stopwatch(self.device, steps, self.on_step, done=steps)
        with watch.stage("correct"):
            before = self.frames.tail(self.footage, plan.geometry)
            if plan.colour_carry and self.footage.colours is not None:
                before = graded(before, self.footage.colours, plan.colour_carry)
            strength = plan.drift_correction
            frames = correct_drift(made.clip.frames, before, known=plan.dropped, strength=strength, device=self.device)
        return replace(made, clip=Clip(frames, made.clip.fps), seconds=dict(made.seconds) | watch.seconds)


class _Once:
    """A mapping that is computed when it is first called for; what it is computed from is let go then."""

    def __init__(self, compute: Callable[[], Mapping[str, Any]]) -> None:
        self._compute: Callable[[], Mapping[str, Any]] | None = compute
        self._value: Mapping[str, Any] = {}
        self._lock = Lock()

    def __call__(self) -> Mapping[str, Any]:
        with self._lock:
            if self._compute is not None:
                self._value, self._compute = self._compute(), None
            return self._value


def score_seam_later(
    frames: FittedFrames, footage: Footage, made: Generation, plan: Plan
) -> Callable[[], Mapping[str, Any] | None]:
    """How well the clip goes on from the footage, `SeamScore` as JSON values; None for one that begins a new shot.

    It is computed when it is first asked for, so that a chain need not wait for it.
    """
    if plan.is_cut:
        return lambda: None
    # a copy, lest each clip hold on to the one before it
    before = frames.tail(footage, plan.geometry)
    pixels, dropped = made.clip.frames, plan.dropped
    # the first frame that svi2pro makes restores its anchor, which is not the footage
    known = min(dropped - (plan.context.mode == "svi2pro"), len(before))
    return _Once(
        lambda: score_seam(
            before,
            pixels[dropped : dropped + len(before)],
            known=before[-known:],
            rendered=pixels[dropped - known : dropped],
        ).as_json()
    )


def is_better(made: Generation, other: Generation) -> bool:
    """Whether a candidate has a less visible seam; where there are no seams the first stays."""
    return made.seam is not None and seam_score(made) < seam_score(other)


def seam_score(made: Generation) -> float:
    """The score of a clip's seam, which it has."""
    assert made.seam is not None
    return float(made.seam["score"])
