"""The size of a clip that continues or begins with a picture: the official rules, in plain arithmetic."""

from __future__ import annotations

import math

from wan.errors import UserError


def fills(width: int, height: int, max_area: int, cell: int) -> bool:
    """Whether a size is on the grid and within the area, and a cell more on both sides would not be.

    What a size rule f makes has this property; where such a size is left as it is, f(f(x)) = f(x).
    """
    on_grid = width % cell == 0 and height % cell == 0
    return on_grid and width * height <= max_area < (width + cell) * (height + cell)


def official_size(width: int, height: int, max_area: int, cell: int = 16) -> tuple[int, int]:
    """The official A14B rule: the image's aspect within `max_area` pixels, floored to 16 -> (width, height).

    Float arithmetic as in the official code, which makes 832x464 of an 832x480 image at the budget 832*480: the root
    comes out as 479.99999999999994 before the floor. `exact_size` does not.
    """
    aspect = height / width
    size = int(math.sqrt(max_area / aspect) // cell * cell), int(math.sqrt(max_area * aspect) // cell * cell)
    return _not_too_narrow(size, width, height, max_area)


def exact_size(width: int, height: int, max_area: int, cell: int = 16) -> tuple[int, int]:
    """The same rule in exact integer arithmetic -> (width, height), and what it made once it keeps.

    A size that fills the area stays as it is, so that a video is continued in one size however often.
    """
    if fills(width, height, max_area, cell):
        return width, height
    size = (
        math.isqrt(max_area * width // height) // cell * cell,
        math.isqrt(max_area * height // width) // cell * cell,
    )
    return _not_too_narrow(size, width, height, max_area)


def _not_too_narrow(size: tuple[int, int], width: int, height: int, max_area: int) -> tuple[int, int]:
    if not all(size):
        raise UserError(f"a {width}x{height} picture is too narrow for an area of {max_area} pixels; crop it first")
    return size


def best_size(width: int, height: int, max_area: int, cell: int = 32) -> tuple[int, int]:
    """The official 5B rule -> (width, height), multiples of 32 within `max_area`.

    Of two candidates, one that fixes the width first and one that fixes the height first, the one with the closer
    aspect. Raises UserError for a picture so narrow that a side would vanish.
    """
    aspect = width / height
    ideal_width = (max_area * aspect) ** 0.5
    ideal_height = max_area / ideal_width

    wide, high = int(ideal_width // cell * cell), int(ideal_height // cell * cell)
    if not (wide and high):
        raise UserError(f"a {width}x{height} picture is too narrow for an area of {max_area} pixels; crop it first")

    by_width = wide, int(max_area / wide // cell * cell)
    by_height = int(max_area / high // cell * cell), high

    def distortion(size: tuple[int, int]) -> float:
        other = size[0] / size[1]
        return max(aspect / other, other / aspect)

    return by_width if distortion(by_width) < distortion(by_height) else by_height


def continued_size(model_type: str, width: int, height: int, max_area: int) -> tuple[int, int]:
    """The size of a continuation of a width x height video by an "i2v" (A14B) or "ti2v" (5B) model."""
    if model_type == "i2v":
        return exact_size(width, height, max_area)
    return (width, height) if fills(width, height, max_area, 32) else best_size(width, height, max_area)


def begun_size(model_type: str, width: int, height: int, max_area: int) -> tuple[int, int]:
    """The size of a clip that such a model begins with a width x height picture."""
    rule = official_size if model_type == "i2v" else best_size
    return rule(width, height, max_area)
