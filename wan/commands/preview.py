"""`--preview`: a small moving picture in the run's folder of the clip that is being sampled."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

from wan import media
from wan.types import Step
from wan.vae.preview import preview

SHARE = 0.01  # of the time, at most
_FRAMES_APART = 4  # of the clip, from one latent frame to the next


class Preview:
    """Writes what the latents show after a solver step, as often as that takes at most `SHARE` of the time."""

    def __init__(self, path: Path, fps: Fraction) -> None:
        self.path, self.fps = path, fps / _FRAMES_APART
        self._next = 0.0

    def __call__(self, step: Step) -> None:
        """See `OnStep`."""
        if step.latents is None or time.perf_counter() < self._next:
            return
        latents = step.latents.detach().float().cpu()  # the step is waited for, which would be later otherwise
        start = time.perf_counter()
        media.write_webp(self.path, preview(latents), self.fps)
        end = time.perf_counter()
        self._next = end + (end - start) / SHARE
