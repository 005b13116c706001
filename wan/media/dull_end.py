"""Whether a video ends in a picture that is no start for another: black, one colour, or at a standstill."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt

from wan.media.colour import to_rgb
from wan.media.reading import Ending, find_ending
from wan.media.source import Picture, Source, inspect

# Levels of 0 to 255 on thumbnails. Noise and an encoder's own unrest are below them, motion in any place is above.
_SIDE, _CELL = 96, 4  # pixels
_SAME = 3.5  # of the cell that differs most, on average over the cell
_FLAT = 3.5  # standard deviation of the most varied channel
_BLACK = 24.0
_STILL_SECONDS = 1.0  # less is a pause
_FADE_SECONDS = 4.0  # the longest fade that is looked for
_FADING = 1.03  # a fade changes the light by more than that in three frames
_AT_REST = 3.0  # a change this much larger than those before it is a cut
_LAYERS = 4  # such as a fade out of a card that stands still


@dataclass(frozen=True)
class DullEnd:
    """The end of a video as a user should know it.

    `kind` is "black", "one colour" or "still"; `seconds` is how long it lasts, with the fade into it. `last_lively` is
    when the last frame before it appears, in seconds as a player counts, and None where nothing comes before. With it
    as `until` that frame is the last one.
    """

    kind: str
    seconds: float
    last_lively: float | None

    def __str__(self) -> str:
        what = "it stands still for" if self.kind == "still" else f"it is {self.kind} for"
        return f"{what} its last {self.seconds:.1f} s"


def find_dull_end(path: str | os.PathLike[str], until: float | None = None) -> DullEnd | None:
    """How a video ends that does not end in motion; None for one that does, of which only the end is decoded.

    Raises VideoError.
    """
    dull = _find(inspect(path, until))
    for _ in range(_LAYERS):
        if dull is None or dull.last_lively is None:
            return dull
        before = _find(inspect(path, dull.last_lively))
        if before is None:
            return dull
        dull = DullEnd(dull.kind, dull.seconds + before.seconds, before.last_lively)
    return None if dull is None else replace(dull, last_lively=None)  # a show of stills, say


@dataclass(frozen=True)
class _Look:
    """The pictures at the end of a file, oldest first: when each appears, and what of it can be measured."""

    clock: list[float]  # seconds, 0 for the last
    contrast: list[float]
    brightness: list[float]
    steps: list[float]  # how much each differs from the one before, 0 for the first
    to_last: list[float]  # and from the last
    unlike: list[float]  # how much all of it differs from the last on average


def _find(source: Source) -> DullEnd | None:
    span = 1.0
    while True:
        ending = find_ending(source, span)
        is_whole = ending.clock[0] > -span
        look = _look(ending, source)
        is_blank = look.contrast[-1] < _FLAT
        begins = _begins(look, is_blank)
        room = look.clock[begins] - look.clock[0]
        if is_whole or (begins and (room > _FADE_SECONDS or not is_blank)):
            break
        span = span * 4 if span < 256 else math.inf
    stays = max(ending.stay if source.until is None else 0.0, float(1 / source.fps))
    if not is_blank and stays - look.clock[begins] < _STILL_SECONDS:
        return None
    kind = "still" if not is_blank else "black" if look.brightness[-1] < _BLACK else "one colour"
    if not begins:
        return DullEnd(kind, stays - look.clock[0], None)
    lively = _before_fade(look, begins) if is_blank else _before_rest(look, begins)
    dull = look.clock[min(lively + 1, begins)]
    return DullEnd(kind, stays - dull, round(_moment(source, ending, look.clock[lively]), 3))


def _look(ending: Ending, source: Source) -> _Look:
    last = _cells(to_rgb(ending.last[-1], source, max_side=_SIDE))
    contrast, brightness, steps, to_last, unlike = [], [], [], [], []
    before = None
    for frame in ending.pictures:
        picture = to_rgb(frame, source, max_side=_SIDE)
        cells = _cells(picture)
        contrast.append(float(picture.std((0, 1)).max()))
        brightness.append(float(picture.mean()))
        steps.append(0.0 if before is None else _difference(cells, before))
        to_last.append(_difference(cells, last))
        unlike.append(abs(float(picture.mean()) - float(last.mean())))
        before = cells
    count = min(len(contrast), len(ending.clock))  # damage may cost a picture in one pass only
    kept = slice(-count, None)
    return _Look(ending.clock[kept], contrast[kept], brightness[kept], steps[kept], to_last[kept], unlike[kept])


def _cells(picture: Picture) -> npt.NDArray[np.float32]:
    """Means over the cells of a thumbnail, [rows, columns, 3]."""
    high, wide = (min(_CELL, side) for side in picture.shape[:2])
    rows, columns = picture.shape[0] // high, picture.shape[1] // wide
    cells = picture[: rows * high, : columns * wide].reshape(rows, high, columns, wide, 3)
    return np.asarray(cells.mean((1, 3), dtype=np.float32))


def _difference(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max()) if one.shape == other.shape else math.inf


def _begins(look: _Look, is_blank: bool) -> int:
    """The first picture of the run at the end that is blank, or the same as the last."""
    flags = [value < _FLAT for value in look.contrast] if is_blank else [value < _SAME for value in look.to_last]
    # the last one is always in it: of a damaged file another pass may have given another picture to compare with
    return next((at + 1 for at in range(len(flags) - 2, -1, -1) if not flags[at]), 0)


def _before_fade(look: _Look, begins: int) -> int:
    """The last picture before a blank run that has not begun to fade: going back, the light changes no more."""
    at = begins - 1
    if look.unlike[at] >= 0.5 * max(look.unlike[max(at - 24, 0) : begins]):
        return at  # a cut
    while at and look.clock[begins] - look.clock[at] < _FADE_SECONDS:
        if max(look.unlike[max(at - 3, 0) : at]) <= _FADING * look.unlike[at]:
            break
        at -= 1
    return at


def _before_rest(look: _Look, begins: int) -> int:
    """The first picture of a standstill where motion came to rest in it; the one before where it was cut to."""
    usual = look.steps[max(begins - 12, 1) : begins]
    is_cut = bool(usual) and look.steps[begins] > _AT_REST * median(usual) + _SAME
    return begins - 1 if is_cut else begins


def _moment(source: Source, ending: Ending, clock: float) -> float:
    """A time on an ending's clock as a player counts."""
    last = ending.last[-1].time
    if last is None or "mpegts" in source.format:  # whose clock may jump: `until` counts from the beginning as well
        last = source.start - find_ending(source, math.inf).clock[0]
    return last + clock - source.zero
