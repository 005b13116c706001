"""`--preview`: a small moving picture in the run's folder of the clip that is being sampled."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

from wan import media
from wan.chain.written import Written
from wan.files import digest_of, write_bytes
from wan.types import Step
from wan.vae.preview import preview

SHARE = 0.01  # of the time, at most
_FRAMES_APART = 4  # of the clip, from one latent frame to the next


class Preview:
    """Writes what the latents show after a solver step, as often as that takes at most `SHARE` of the time.

    A file of that name that the run did not write moves to `redone/`, as `written` has it.
    """

    def __init__(self, path: Path, fps: Fraction, written: Written) -> None:
        self.path, self.fps, self._written = path, fps / _FRAMES_APART, written
        self._next = 0.0

    def __call__(self, step: Step) -> None:
        """See `OnStep`."""
        if step.latents is None or time.perf_counter() < self._next:
            return
        latents = step.latents.detach().float().cpu()  # the step is waited for, which would be later otherwise
        start = time.perf_counter()
        picture = media.as_webp(preview(latents), self.fps)
        self._written.announce(self.path.name, digest_of(picture))
        write_bytes(self.path, picture)
        end = time.perf_counter()
        self._next = end + (end - start) / SHARE
