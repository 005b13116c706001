"""Frames as InternVL wants them: which ones, cut how, normalised how. The official results, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan.captioner.base import Pictures, to_images
from wan.errors import UserError
from wan.pictures import as_shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def dynamic_preprocess(
    image: Image.Image, *, min_num: int = 1, max_num: int = 12, image_size: int = 448, use_thumbnail: bool = False
) -> list[Image.Image]:
    """InternVL's tiles of an image, each image_size x image_size, row by row.

    The grid of min_num to max_num tiles whose aspect is nearest to the image's is filled by stretching the image.
    `use_thumbnail` adds the whole image as one more tile when there are several. Raises UserError.
    """
    if not 1 <= min_num <= max_num:
        raise UserError(f"min_num {min_num} and max_num {max_num} must be at least 1 and in order")
    sides = range(1, max_num + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_num <= columns * rows <= max_num]
    grids.sort(key=math.prod)
    image = as_shown(image)
    columns, rows = closest_grid(image.width, image.height, grids, image_size)

    stretched = image.resize((columns * image_size, rows * image_size), Image.Resampling.BICUBIC)
    corners = [(column * image_size, row * image_size) for row in range(rows) for column in range(columns)]
    tiles = [stretched.crop((left, top, left + image_size, top + image_size)) for left, top in corners]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    return tiles


def closest_grid(width: int, height: int, grids: list[tuple[int, int]], image_size: int) -> tuple[int, int]:
    """The grid (columns, rows) nearest in aspect; of equals a larger one if the image would fill over half of it."""
    best, best_gap = grids[0], math.inf
    for columns, rows in grids:
        gap = abs(width / height - columns / rows)
        fills = width * height > 0.5 * image_size**2 * columns * rows
        if gap < best_gap or (gap == best_gap and fills):
            best, best_gap = (columns, rows), gap
    return best


def build_transform(input_size: int) -> Callable[[Image.Image], Tensor]:
    """A function: PIL image -> float32 [3, input_size, input_size], squashed and normalised as ImageNet was."""
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]

    def transform(image: Image.Image) -> Tensor:
        squashed = as_shown(image).resize((input_size, input_size), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()
        return levels.float().div(255).sub(mean).div(std)

    return transform


def pixels_of(frames: Pictures, side: int) -> Tensor:
    """Frames uint8 [n, H, W, 3] -> what the vision tower takes, float32 [n, 3, side, side]."""
    transform = build_transform(side)

    def pixels(image: Image.Image) -> Tensor:
        return transform(dynamic_preprocess(image, max_num=1, image_size=side)[0])

    # beside each other: a GPU that goes on with a chain waits for them
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return torch.stack(list(threads.map(pixels, to_images(frames))))
