"""decord, the optional second reader: kept in a killable process, and never trusted with the last frame."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from wan.errors import UserError
from wan.files import say_once
from wan.media.source import Picture

LIMIT_SECONDS = 20.0
WORKER = Path(__file__).with_name("decord_worker.py")

_SAME_PICTURE = 6.0  # mean difference in levels that two converters and two resamplings can make


def require() -> None:
    """Raises UserError when decord is not installed."""
    if find_spec("decord") is None:
        raise UserError(
            'decord is not installed: pip install -e ".[decord]" in the project, or use `video_reader` pyav'
        )


def check_last_frame_with_decord(path: str | os.PathLike[str], frame: Image.Image) -> str | None:
    """Compare the RGB last frame that PyAV read with decord's: None when they agree, else what was logged as a warning.

    The frame to use is PyAV's in any case. Takes at most 20 s. Raises UserError when decord is not installed.
    """
    name = os.fspath(path)
    frames = read(name, 0)
    if isinstance(frames, str):
        warning = f"decord {frames}; PyAV's last frame is kept"
    else:
        ours = np.asarray(frame.convert("RGB"), np.int16)
        if frames[0].shape == ours.shape and np.abs(frames[0] - ours).mean() < _SAME_PICTURE:
            return None
        warning = "decord returned another last frame; PyAV's is kept"
    say_once(name, warning)
    return warning


def read(path: str, count: int) -> Picture | str:
    """uint8 [count, H, W, 3], centres of equal slices, or the last frame for count 0; a str says what failed."""
    require()
    try:
        done = subprocess.run(
            [sys.executable, str(WORKER), path, str(count)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"did not finish in {LIMIT_SECONDS:.0f} s"
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        return f"failed with code {done.returncode} ({lines[-1]})"
    shape, _, pixels = done.stdout.partition(b"\n")
    frames, height, width = map(int, shape.split())
    return np.frombuffer(pixels, np.uint8).reshape(frames, height, width, 3)
