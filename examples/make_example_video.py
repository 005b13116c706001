"""Draw the example clip: a ball that bounces past, its soft shadow, hills that drift by.

python examples/make_example_video.py examples/ball.mp4
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wan.errors import UserError
from wan.media import write_video

Picture = NDArray[np.float64]  # [H, W] or [H, W, 3], in [0, 1]

WIDTH, HEIGHT, FPS, SECONDS = 320, 192, 24, 3
HORIZON = 0.62  # all lengths are in picture heights, x to the right, y down
RADIUS = 0.13


def frames(seed: int = 0) -> Iterator[NDArray[np.uint8]]:
    """The clip as uint8 [H, W, 3] frames; `seed` moves the hills."""
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, 3)
    for index in range(FPS * SECONDS):
        yield np.rint(255 * draw(index / FPS, phases)).astype(np.uint8)


def draw(time: float, phases: Picture) -> Picture:
    """One picture at `time` in seconds."""
    y, x = (np.mgrid[:HEIGHT, :WIDTH] + 0.5) / HEIGHT
    picture = blend(colour("#f7d9a8"), colour("#5b8fc7"), 1 - y / HORIZON)
    for layer, (height, shade) in enumerate(((0.20, "#8fa6b8"), (0.12, "#6f8f86"), (0.05, "#4f7a5b"))):
        along = x * (2 + layer) + phases[layer] + time * 0.12 * (1 + layer)
        ridge = HORIZON - height - 0.035 * (np.sin(2 * along) + 0.5 * np.sin(5 * along))
        picture = blend(picture, colour(shade), edge(y - ridge))
    floor = blend(colour("#b98a5e"), colour("#e2bd8c"), np.clip((y - HORIZON) / (1 - HORIZON), 0, 1))
    picture = blend(picture, floor, edge(y - HORIZON))

    centre = 0.25 + 0.38 * time
    bounce = abs(np.sin(np.pi * (time * 1.1 + 0.15)))
    ground = 0.88
    height = ground - RADIUS - 0.38 * bounce
    spread = RADIUS * (0.9 + 0.6 * bounce)
    distance = np.hypot((x - centre - 0.10 * bounce) / spread, (y - ground) / (0.28 * spread))
    picture = blend(picture, colour("#3c2a1e"), (0.65 - 0.4 * bounce) * np.exp(-(distance**2)))

    across, down = (x - centre) / RADIUS, (y - height) / RADIUS
    towards = np.sqrt(np.clip(1 - across**2 - down**2, 0, 1))
    turn = 3.2 * time
    stripe = np.sin(3 * (across * np.cos(turn) + down * np.sin(turn)) + 0.4)
    ball = blend(colour("#d8412f"), colour("#fbe7cf"), edge((stripe - 0.75) * 0.06))
    light = np.clip(-0.45 * across - 0.6 * down + 0.66 * towards, 0, 1)[..., None]
    ball = ball * (0.35 + 0.75 * light) + 0.5 * light**24
    return np.clip(blend(picture, ball, edge(RADIUS - np.hypot(x - centre, y - height))), 0, 1)


def blend(under: Picture, over: Picture, opacity: Picture) -> Picture:
    return under + (over - under) * np.clip(opacity, 0, 1)[..., None]


def edge(distance: Picture) -> Picture:
    """1 inside, 0 outside, over the width of one pixel; `distance` is positive inside."""
    return np.clip(distance * HEIGHT + 0.5, 0, 1)


def colour(code: str) -> Picture:
    return np.array([int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the example clip.")
    parser.add_argument("file", type=Path, help="the mp4 to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed moves the hills (default: 0)")
    arguments = parser.parse_args()
    try:
        write_video(arguments.file, frames(arguments.seed), FPS)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
