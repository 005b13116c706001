"""A server whose model sleeps, for `benchmarks.serve`: all is as in `wan.server`, but nothing is computed.

Its pictures come from seed and prompt, so that chains can be compared bit by bit. SLEEP_STEP are the seconds of a
solver step.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from fractions import Fraction
from typing import Any

STEP = float(os.environ.get("SLEEP_STEP", "0.05"))


def work() -> int:
    """The worker."""
    import torch

    from wan.pipeline import Pipeline
    from wan.server import worker
    from wan.types import Clip, Generation, Request, Step

    torch.set_num_threads(1)

    def sleep_through(self: Pipeline, request: Request, on_step: Any = None, **_: Any) -> Generation:
        steps, began = request.sampling.steps, time.perf_counter()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{request.seed} {request.prompt}".encode()))
        latents = torch.randn(self.config.z_dim, *request.geometry.latent, generator=generator)
        if on_step is not None:
            on_step(Step(0, steps, "sample"))
        for index in range(steps):
            time.sleep(STEP)
            if on_step is not None:
                on_step(Step(index + 1, steps, "sample", latents))
        colour = torch.rand(3, generator=generator) * 2 - 1
        pixels = colour + torch.rand(*request.geometry.size, 3, generator=generator) / 8
        clip = Clip(pixels.clamp(-1, 1), Fraction(self.config.sample_fps))
        return Generation(clip, latents, request, seconds={"sample": time.perf_counter() - began})

    Pipeline.run = sleep_through  # type: ignore[method-assign]
    return worker.main()


def serve() -> int:
    """The server."""
    from wan.server import supervisor

    supervisor.WORKER = (sys.executable, "-m", "benchmarks.sleeping", "work")
    from wan.cli import serve_main

    return serve_main()


if __name__ == "__main__":
    sys.exit(work() if sys.argv[1:] == ["work"] else serve())
