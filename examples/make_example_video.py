"""Draw a clip of the tiny family's world, or its last frame, and say what happens at its end.

python -m examples.make_example_video examples/shapes.mp4
python -m examples.make_example_video examples/shapes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from training import scenes
from training.vae import HELD_OUT
from wan.errors import UserError
from wan.media import write_video
from wan.types import to_uint8

SECONDS = 3
SCENE = 14  # three shapes that do not meet


def scene(number: int = SCENE) -> scenes.Scenes:
    """A scene that the family was not trained on."""
    return scenes.sample(1, torch.Generator().manual_seed(2 * HELD_OUT + number))


def frames(number: int = SCENE) -> NDArray[np.uint8]:
    """The clip as uint8 [T, H, W, 3]; its last frame is the scene at time 0."""
    times = torch.arange(1 - SECONDS * scenes.FPS, 1)
    return to_uint8(scene(number).draw(times)[0].permute(1, 2, 3, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a clip of the tiny family's world.")
    parser.add_argument("file", type=Path, help="the mp4 to write, or the png of its last frame")
    parser.add_argument("--scene", type=int, default=SCENE, help=f"another number, another scene (default: {SCENE})")
    arguments = parser.parse_args()
    try:
        if arguments.file.suffix == ".png":
            Image.fromarray(frames(arguments.scene)[-1]).save(arguments.file, optimize=True)
        else:
            write_video(arguments.file, frames(arguments.scene), scenes.FPS)
    except UserError as error:
        parser.error(str(error))
    print(scene(arguments.scene).captions(0)[0])


if __name__ == "__main__":
    main()
