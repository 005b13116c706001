"""What becomes of the joined video when a chain is finished: a larger one next to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from wan.chain.run_folder import JOINED, UPSCALED, RunFolder
from wan.upscaling import Upscaler, made_of, upscale


def upscale_joined(
    folder: RunFolder,
    of: Sequence[str],
    upscaler: Upscaler,
    device: torch.device,
    *,
    metadata: bool,
    on_frame: Callable[[], None],
) -> Path:
    """The larger video of the joined one; `of` is what that was joined of. Raises UserError.

    One that is there and is of the same is kept. One of the beginning of the same is replaced, like the joined video;
    any other file of that name moves to `redone/`.
    """
    target = folder.path / UPSCALED[0]
    before = made_of(target, upscaler)
    if before == list(of):
        return target
    if not (isinstance(before, list) and before and before == list(of)[: len(before)]):
        folder.set_aside(*UPSCALED)
    upscale(folder.path / JOINED, target, upscaler, device, of=list(of), metadata=metadata, on_frame=on_frame)
    return target
