#!/usr/bin/env python3
"""Whether the report's threshold of a visible seam tells footage that was cut from footage that goes on.

    python -m benchmarks.seams [--scenes 200] [--seed 0] [--videos FILE …] [--every 5]

Held-out scenes of the tiny family's world, and real videos, are cut in two. Either the second part follows (no seam is
to be seen), or it begins a second later, or it is of another scene (a seam is to be seen). Places of a video where the
film itself is cut are left out, and so are scenes of which nothing moves. Prints the shares of seams that are visible
and that the report lists; as the last line JSON. Runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from training import scenes
from training.vae import HELD_OUT
from wan.chain.measures import needs_attention
from wan.chain.scores import VISIBLE
from wan.quality import SeamScore, score_seam
from wan.types import to_uint8

BEFORE, AFTER = 13, 16  # frames that are looked at
OWN_CUT = 4.0  # times the usual change: the film is cut there
KINDS = ("goes on", "a second later", "another scene")


def world_seams(count: int, seed: int) -> Iterator[tuple[str, SeamScore]]:
    """Seams of held-out scenes, by kind."""
    many = scenes.sample(max(count, 200), torch.Generator().manual_seed(HELD_OUT + seed))

    def clip(index: int, first: int, frames: int) -> Tensor:
        drawn = many[index : index + 1].draw(torch.arange(first, first + frames))[0].permute(1, 2, 3, 0)
        return torch.from_numpy(to_uint8(drawn)).float() / 127.5 - 1

    for index in range(count):
        before, after = clip(index, 0, BEFORE), clip(index, BEFORE, AFTER)
        later = clip(index, BEFORE + scenes.FPS, AFTER)
        yield KINDS[0], score_seam(before, after)
        if not torch.equal(later, after):
            yield KINDS[1], score_seam(before, later)
        yield KINDS[2], score_seam(before, clip((index + 1) % count, BEFORE, AFTER))


def film_seams(films: list[tuple[Tensor, int]], every: int) -> Iterator[tuple[str, SeamScore]]:
    """Seams of films [T, H, W, 3] with their whole frames a second, by kind."""
    for number, (film, rate) in enumerate(films):
        other = films[(number + 1) % len(films)][0][:AFTER]
        other = F.interpolate(other.permute(0, 3, 1, 2), size=film.shape[1:3], mode="area").permute(0, 2, 3, 1)
        for place in range(BEFORE, len(film) - AFTER - rate, every):
            before, after = film[place - BEFORE : place], film[place : place + AFTER]
            if is_cut(film[place - BEFORE : place + AFTER]):
                continue
            yield KINDS[0], score_seam(before, after)
            yield KINDS[1], score_seam(before, film[place + rate : place + rate + AFTER])
            if len(films) > 1:
                yield KINDS[2], score_seam(before, other)


def is_cut(frames: Tensor) -> bool:
    """Whether one change from frame to frame stands out among the others."""
    changes: list[float] = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).tolist()
    return max(changes) > OWN_CUT * max(median(changes), 1e-3)


def read(path: Path, most: int = 260) -> tuple[Tensor, int]:
    """The first frames of a video [T, H, W, 3] in [-1, 1], at most 416 pixels wide, and the frames of a second."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        scale = min(1.0, 416 / max(stream.width, stream.height))
        size = (round(stream.width * scale), round(stream.height * scale))
        for frame in container.decode(stream):
            small = frame.reformat(*size, "rgb24", interpolation=av.video.reformatter.Interpolation.AREA)
            frames.append(torch.from_numpy(small.to_ndarray()).float() / 127.5 - 1)
            if len(frames) == most:
                break
        return torch.stack(frames), round(stream.average_rate or 25)


def told(seams: Iterator[tuple[str, SeamScore]]) -> dict[str, Any]:
    """By kind: how many seams, the share that is visible, and that the report lists."""
    by_kind: dict[str, list[SeamScore]] = {}
    for kind, seam in seams:
        by_kind.setdefault(kind, []).append(seam)
    return {
        kind: {
            "seams": len(scores),
            "visible": mean(seam.score >= VISIBLE for seam in scores),
            "listed": mean(needs_attention(seam.score, seam.warnings) for seam in scores),
        }
        for kind, scores in by_kind.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the held-out scenes")
    parser.add_argument("--videos", type=Path, nargs="*", default=[])
    parser.add_argument("--every", type=int, default=5, help="frames from one cut of a video to the next")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    if arguments.scenes:
        result["tiny world"] = told(world_seams(arguments.scenes, arguments.seed))
    if arguments.videos:
        result["videos"] = told(film_seams([read(path) for path in arguments.videos], arguments.every))
    for name, kinds in result.items():
        for kind, shares in kinds.items():
            print(f"{name:>12} {kind:<16}", " ".join(f"{key} {value:.3g}" for key, value in shares.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
