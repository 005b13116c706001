"""A program of the user's that may change the pictures which one clip hands to the next."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan import media
from wan.errors import UserError
from wan.files import readable, sampled_digest
from wan.kinds import FRAMES, words_in
from wan.types import from_uint8, to_uint8


def check_program(command: str) -> None:
    """Raise UserError where the command's program is not there: to be asked before hours of work."""
    program = words_in(command)[0]
    if shutil.which(program) is None:
        raise UserError(f"`handoff_command`: there is no program {program!r} that can be run; give its path")


def identity(command: str) -> list[str]:
    """What a result depends on, as far as it is known before: the command, and the files that it names."""
    return [command, *(sampled_digest(Path(word)) for word in words_in(command) if os.path.isfile(word))]


def hand_off(command: str, frames: Tensor) -> Tensor:
    """Frames float32 [n, H, W, 3] in [-1, 1], oldest first, as the command leaves them.

    It gets them as 000.png, 001.png, ... in a folder of its own. A picture that it does not change stays as it was,
    unrounded. Raises UserError where the command fails, or leaves something else than these pictures.
    """
    with tempfile.TemporaryDirectory(prefix="wan_handoff_") as folder:
        paths = [Path(folder) / f"{number:03d}.png" for number in range(len(frames))]
        shown = to_uint8(frames)
        for path, picture in zip(paths, shown, strict=True):
            media.write_png(path, Image.fromarray(picture))
        _run(arguments(command, folder))
        frames_back = []
        for path, frame, before in zip(paths, frames, shown, strict=True):
            try:
                picture = np.asarray(media.read_image(path))
            except UserError as error:
                raise UserError(f"`handoff_command` left no picture {path.name}: {error}") from error
            if picture.shape != before.shape:
                sizes = " to ".join(f"{size[1]}x{size[0]}" for size in (before.shape, picture.shape))
                raise UserError(f"`handoff_command` changed the size of {path.name} from {sizes}; it must keep it")
            frames_back.append(frame if np.array_equal(picture, before) else from_uint8(picture))
    return torch.stack(frames_back)


def arguments(command: str, folder: str, windows: bool = os.name == "nt") -> str | list[str]:
    """How the program is started, without a shell; the folder is one argument, or part of one, whatever its name.

    Windows programs take their command line apart themselves, so it is handed on as it was written, with quotes around
    a folder with blanks where there are none.
    """
    if windows:
        line, *rest = command.split(FRAMES)
        for part in rest:
            line += (folder if _is_quoted(line) else subprocess.list2cmdline([folder])) + part
        return line
    return [word.replace(FRAMES, folder) for word in shlex.split(command)]


def _is_quoted(line: str) -> bool:
    """Whether what follows a part of a Windows command line is between quotes: one after a backslash is none."""
    return len(re.findall(r'(?<!\\)(?:\\\\)*"', line)) % 2 == 1


def _run(words: str | Sequence[str]) -> None:
    streams: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(words, text=True, errors="replace", check=False, **streams)
    except OSError as error:
        raise UserError(f"`handoff_command` cannot be run: {error.strerror or error}") from error
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        last = f": {readable(lines[-1][:300])}" if lines else ", and said nothing"
        raise UserError(f"`handoff_command` failed with exit code {done.returncode}{last}")
