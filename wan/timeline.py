"""Which frame is shown when: the arithmetic of putting clips end to end, in one place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count

SAME = Fraction(1, 500)  # 23.976 and 24 count as one rate, as they always have in television


@dataclass(frozen=True)
class Part:
    """A video file on the timeline: `frames` at `fps`, of which the first `drop` repeat the part before.

    `moments`: when each of its frames appears, in seconds from the first, where they are not evenly spaced. `stay`: for
    how many seconds its last frame is held, where that is longer than a frame's usual time.
    """

    frames: int
    fps: Fraction
    drop: int = 0
    moments: Sequence[Fraction] | None = None
    stay: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if not 0 <= self.drop < self.frames:
            raise ValueError(f"{self.drop} of {self.frames} frames cannot be left out")

    @property
    def new(self) -> int:
        """Frames that are shown."""
        return self.frames - self.drop

    def moment(self, number: int) -> Fraction:
        """When a frame appears, in seconds from the first."""
        return number / self.fps if self.moments is None else self.moments[number]


@dataclass(frozen=True)
class Timeline:
    """Parts end to end, shown at `rate` frames per second without changing the speed of any.

    Only a part whose rate is the same but for a thousandth (24 for 23.976) takes `rate`, or it would lose a frame every
    42 seconds. No frame of any other is lost where `rate` is at least its own.

    The first new frame of a part that goes on from another appears one of its own frame times after the last frame of
    that one: its known frames are that one's last at its own rate. After a cut (`drop` 0) the last frame stays for its
    own frame time. A last frame that is held stays that long in either case. A frame is shown from the output frame
    nearest to its moment until the next one is.
    """

    parts: Sequence[Part]
    rate: Fraction

    def __post_init__(self) -> None:
        paced = [replace(part, fps=self.rate) if _same(part.fps, self.rate) else part for part in self.parts]
        object.__setattr__(self, "parts", tuple(paced))

    @property
    def starts(self) -> list[Fraction]:
        """When the first new frame of each part appears, in seconds."""
        starts, now = [], Fraction(0)
        for index, part in enumerate(self.parts):
            if index:
                before = self.parts[index - 1]
                now += before.moment(before.frames - 1) - before.moment(before.drop)
                now += max(1 / (part.fps if part.drop else before.fps), before.stay)
            starts.append(now)
        return starts

    @property
    def ends(self) -> list[int]:
        """The output frame after the last of each part."""
        last = self.parts[-1]
        over = self.starts[-1] + last.moment(last.frames - 1) - last.moment(last.drop) + max(1 / last.fps, last.stay)
        return [_nearest(start * self.rate) for start in [*self.starts[1:], over]]

    @property
    def count(self) -> int:
        """Output frames."""
        return self.ends[-1]

    def frames(self) -> Iterator[tuple[int, int]]:
        """For each output frame the part and the number of the frame in that part's file."""
        for index, (part, start, end) in enumerate(zip(self.parts, self.starts, self.ends, strict=True)):
            shown = [
                _nearest((start + part.moment(number) - part.moment(part.drop)) * self.rate)
                for number in range(part.drop, part.frames)
            ]
            for number, (first, after) in enumerate(zip(shown, [*shown[1:], end], strict=True), part.drop):
                yield from [(index, number)] * (after - first)


def shared_rate(source: Fraction, model: Fraction) -> Fraction:
    """The rate at which every source frame is shown equally often and no frame of the model is left out.

    The smallest whole multiple of the source's rate that is at least the model's.
    """
    return source * next(n for n in count(1) if source * n >= (1 - SAME) * model)


def _same(one: Fraction, other: Fraction) -> bool:
    return abs(one - other) <= SAME * other


def _nearest(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))
