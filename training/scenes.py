"""The world of the tiny family: coloured shapes that move over a background, drawn exactly and described exactly.

A scene has no beginning and no end: it can be drawn at any time, in frames, before and after 0. Everything is batched
and computed on the device of the generator, so that a GPU draws as fast as it trains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH, HEIGHT, FPS, FRAMES = 160, 96, 8, 17

COLOURS: dict[str, tuple[float, float, float]] = {  # RGB in [0, 1]; all far more vivid than any background
    "red": (0.86, 0.14, 0.14),
    "green": (0.12, 0.64, 0.24),
    "blue": (0.14, 0.28, 0.90),
    "yellow": (0.95, 0.84, 0.16),
    "purple": (0.62, 0.18, 0.78),
    "cyan": (0.16, 0.78, 0.84),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
MODES = ("", "turns", "grows", "shrinks")
MOST_SHAPES = 3
RADII = (9.0, 15.0)  # pixels from the centre to the rim, for a square half its side times the root of pi/2
SPEEDS = (2.0, 4.0)  # pixels per frame
TURNING, OFTEN_TURNING, MOSTLY_TURNING = 0.15, 0.45, 0.85  # of squares and triangles


@dataclass(frozen=True)
class Scenes:
    """B scenes of up to S shapes. Lengths in pixels, times in frames, y down."""

    present: Tensor  # bool [B, S]
    colour: Tensor  # int64 [B, S], indices of COLOURS, ascending; the caption names the shapes in this order
    shape: Tensor  # int64 [B, S], indices of SHAPES
    start: Tensor  # [B, S, 2]
    velocity: Tensor  # [B, S, 2], one of the two is 0
    radius: Tensor  # [B, S]
    growth: Tensor  # [B, S], pixels per frame
    spin: Tensor  # [B, S], radians per frame
    background: Tensor  # [B, 2, 3], the two colours that it shades between
    waves: Tensor  # [B, 2], their wave vector in radians per pixel
    phase: Tensor  # [B]
    pan: Tensor  # [B], pixels per frame, positive to the right

    def __len__(self) -> int:
        return len(self.phase)

    def __getitem__(self, which: Tensor | slice) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[which] for field in dataclasses.fields(self)})

    def positions(self, times: Tensor) -> Tensor:
        """Centres [B, T, S, 2] at `times` [T]."""
        return _bounce(self.start, self.velocity, *_walls(self.start), times)[0]

    def headings(self, times: Tensor) -> Tensor:
        """Velocities [B, T, S, 2] just after `times` [T]."""
        return self.velocity[:, None] * _bounce(self.start, self.velocity, *_walls(self.start), times)[1]

    def radii(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Radii and their change per frame, both [B, T, S]."""
        low, high = torch.tensor(RADII, device=self.radius.device)
        radius, sign = _bounce(self.radius, self.growth, low, high, times)
        return radius, sign * self.growth[:, None]

    def draw(self, times: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] at `times` [T]."""
        device = self.phase.device
        y, x = torch.meshgrid(
            torch.arange(HEIGHT, device=device) + 0.5, torch.arange(WIDTH, device=device) + 0.5, indexing="ij"
        )
        along = self.waves[:, 0, None, None] * x + self.waves[:, 1, None, None] * y + self.phase[:, None, None]
        # a camera that pans to the right sees its background go to the left
        shift = (self.waves[:, 0] * self.pan)[:, None] * times
        shade = 0.5 + 0.5 * torch.sin(along[:, None] + shift[..., None, None])  # [B, T, H, W]
        first, second = self.background.unbind(1)
        pixels = first[:, :, None, None, None] + (second - first)[:, :, None, None, None] * shade[:, None]

        palette = torch.tensor(list(COLOURS.values()), device=device)
        centres, (radii, _) = self.positions(times), self.radii(times)
        for index in range(self.present.shape[1]):
            across = x - centres[:, :, index, 0, None, None]
            down = y - centres[:, :, index, 1, None, None]
            inside = _inside(self.shape[:, index], across, down, radii[:, :, index], self.spin[:, index, None] * times)
            opacity = (inside + 0.5).clamp(0, 1) * self.present[:, index, None, None, None]
            colour = palette[self.colour[:, index]][:, :, None, None, None]
            pixels = pixels + (colour - pixels) * opacity[:, None]
        return pixels * 2 - 1

    def captions(self, time: float = 0) -> list[str]:
        """What goes on at that moment, one sentence a scene."""
        moment = torch.tensor([time], device=self.phase.device)
        headings, change = self.headings(moment)[:, 0].sign().tolist(), self.radii(moment)[1][:, 0].tolist()
        names, colour, shape = list(COLOURS), self.colour.tolist(), self.shape.tolist()
        present, spin, pan = self.present.tolist(), self.spin.tolist(), self.pan.tolist()
        captions = []
        for b, shown in enumerate(present):
            phrases = [
                f"a {names[colour[b][s]]} {SHAPES[shape[b][s]]} {_motion(headings[b][s], change[b][s], spin[b][s])}"
                for s, is_shown in enumerate(shown)
                if is_shown
            ]
            camera = "is still" if pan[b] == 0 else f"pans {'right' if pan[b] > 0 else 'left'}"
            captions.append(f"{', '.join(phrases)}; the camera {camera}.")
        return captions

    def names(self) -> list[list[str]]:
        """What each scene shows, shape by shape: "a red circle"."""
        colour, shape, present = self.colour.tolist(), self.shape.tolist(), self.present.tolist()
        names = list(COLOURS)
        return [
            [f"a {names[c]} {SHAPES[s]}" for c, s, is_there in zip(*rows, strict=True) if is_there]
            for rows in zip(colour, shape, present, strict=True)
        ]


def sample(count: int, generator: torch.Generator, tries: int = 6, hard: bool = False) -> Scenes:
    """`count` scenes. Of a few candidates each takes the one whose shapes cover each other least around time 0.

    `hard`, for training: every second scene takes the one in which most is covered, moment by moment, from -8 to 16,
    and in two of four nearly half of the squares and triangles turn, which are hardest to keep.
    """
    present = torch.randint(MOST_SHAPES, (count, 1), generator=generator, device=generator.device)
    present = torch.arange(MOST_SHAPES, device=generator.device) <= present
    turning = torch.full((count, 1), TURNING, device=generator.device)
    if hard:
        turning[1::4] = turning[2::4] = OFTEN_TURNING
    candidates = _sample(present.repeat_interleave(tries, 0), turning.repeat_interleave(tries, 0), generator)
    chosen = _covered(candidates, range(-16, 33, 4), 2 * RADII[1]).view(count, tries).argmin(1)
    if hard:
        most = _covered(candidates, range(-8, 17, 2), RADII[0]).view(count, tries).argmax(1)
        chosen[::2] = most[::2]
    return candidates[torch.arange(count, device=generator.device) * tries + chosen]


def _covered(world: Scenes, times: range, distance: float) -> Tensor:
    """At how many of these times, over all pairs of shapes, two centres are nearer than so many pixels [B]."""
    centres = world.positions(torch.tensor(times, device=world.phase.device))
    apart = (centres[:, :, :, None] - centres[:, :, None]).norm(dim=-1)  # [B, T, S, S]
    pairs = (world.present[:, :, None] & world.present[:, None]).triu(1)[:, None]
    near: Tensor = ((apart < distance) & pairs).sum((1, 2, 3))
    return near


def stream(batch: int, generator: torch.Generator) -> Iterator[Scenes]:
    """Scenes to train on, without end."""
    while True:
        yield sample(batch, generator, hard=True)


def crowd(count: int, generator: torch.Generator) -> Scenes:
    """`count` scenes with a shape of each colour, most of which turn: for VAEs, whose errors are all along outlines."""
    present = torch.ones(count, len(COLOURS), dtype=torch.bool, device=generator.device)
    return _sample(present, torch.full((count, 1), MOSTLY_TURNING, device=generator.device), generator)


def _sample(present: Tensor, turning: Tensor, generator: torch.Generator) -> Scenes:
    """A scene for each row of `present` [B, S]; of its squares and triangles that share `turning` [B, 1] turns."""
    device, slots, count = present.device, present.shape, len(present)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

    def choice(options: int, *shape: int) -> Tensor:
        return torch.randint(options, shape, generator=generator, device=device)

    colour = uniform(0, 1, count, len(COLOURS)).argsort(1)[:, : present.shape[1]]
    # absent shapes go last, so that the present ones are in ascending order of colour
    colour = (colour + len(COLOURS) * ~present).sort(1).values % len(COLOURS)
    shape = choice(len(SHAPES), *slots)
    low, high = _walls(torch.zeros(1, device=device))
    start = low + (high - low) * uniform(0, 1, *slots, 2)
    heading = torch.tensor(list(DIRECTIONS.values()), device=device)[choice(len(DIRECTIONS), *slots)]
    moves = uniform(0, 1, *slots) < 0.85
    velocity = heading * (uniform(*SPEEDS, *slots) * moves)[..., None]
    mode = uniform(0, 1, *slots)
    sign = torch.where(choice(2, *slots) == 1, 1.0, -1.0)
    turns = (mode < turning) & (shape > 0)  # a circle that turns looks as before
    grows = (mode > 0.85) & ~turns
    level = uniform(0.15, 0.75, count, 1, 1) + uniform(-0.05, 0.05, count, 2, 3)
    pans = uniform(0, 1, count) < 0.3
    contrast = uniform(-0.25, 0.25, count, 1) * (uniform(0, 1, count, 1) < 0.6)
    # a pan must be seen: enough contrast, and waves across the picture
    contrast = torch.where(pans[:, None], 0.15 + 0.1 * uniform(0, 1, count, 1), contrast)
    other = (level[:, 1:] + contrast[:, None]).clamp(0.08, 0.85)
    angle = uniform(0, math.pi, count) * ~pans
    length = 2 * math.pi / uniform(80, 240, count)
    return Scenes(
        present=present,
        colour=colour,
        shape=shape,
        start=start,
        velocity=velocity,
        radius=uniform(*RADII, *slots),
        growth=sign * uniform(0.25, 0.5, *slots) * grows,
        spin=sign * uniform(0.1, 0.2, *slots) * turns,
        background=torch.cat([level[:, :1], other], dim=1),
        waves=length[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1),
        phase=uniform(0, 2 * math.pi, count),
        pan=torch.where(choice(2, count) == 1, 1.0, -1.0) * uniform(2, 5, count) * pans,
    )


def _walls(like: Tensor) -> tuple[Tensor, Tensor]:
    """Where a centre turns back, so that the largest shape stays inside: low and high [2]."""
    margin = torch.full((2,), RADII[1] + 1, device=like.device)
    return margin, torch.tensor([WIDTH, HEIGHT], device=like.device) - margin


def _bounce(start: Tensor, velocity: Tensor, low: Tensor, high: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Values [B, T, ...] that run between low and high and back, and the sign of their velocity against its start."""
    span = high - low
    travelled = (start - low)[:, None] + velocity[:, None] * times.view(1, -1, *[1] * (start.dim() - 1))
    unfolded = travelled.remainder(2 * span)
    return low + span - (span - unfolded).abs(), torch.where(unfolded < span, 1.0, -1.0)


def _inside(shape: Tensor, across: Tensor, down: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Signed distance to the rim [B, T, H, W] in pixels, positive inside. All shapes have about the same area."""
    cos, sin, r = angle.cos()[..., None, None], angle.sin()[..., None, None], radius[..., None, None]
    u, v = across * cos + down * sin, down * cos - across * sin
    circle = r * 0.95 - torch.hypot(u, v)
    square = r * 0.85 - torch.maximum(u.abs(), v.abs())
    # an equilateral triangle, its point up: three half planes at the same distance from the centre
    triangle = r * 0.68 - torch.maximum(v, u.abs() * (math.sqrt(3) / 2) - v / 2)
    kind = shape[:, None, None, None]
    return torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))


def _motion(heading: list[float], change: float, spin: float) -> str:
    across, down = heading
    mode = "turns" if spin else ("grows" if change > 0 else "shrinks") if change else ""
    if (across, down) == (0, 0):
        return f"stays in place and {mode}" if mode else "stays in place"
    names = {vector: name for name, vector in DIRECTIONS.items()}
    return f"moves {names[int(across), int(down)]}" + (f" and {mode}" if mode else "")


def every_word() -> str:
    """A text with all that captions can say, for tokenizers."""
    motions = [f"moves {name}" for name in DIRECTIONS] + ["stays in place"]
    phrases = [
        f"a {colour} {shape} {motion}{f' and {mode}' if mode else ''}"
        for colour in COLOURS
        for shape in SHAPES
        for motion in motions
        for mode in MODES
    ]
    cameras = [f"the camera {move}" for move in ("is still", "pans left", "pans right")]
    return "; ".join([", ".join(phrases), *cameras * 8]) + "."
