#!/usr/bin/env python3
"""How well the trained tiny family continues clips that it was not trained on, against the ground truth.

    python -m benchmarks.quality --task v2v-5B [--clips 200] [--chains 50] [--chain_clips 12] [--seed 0]
        [--modes last_frame tail:5] [--prompt_mode continue] [--preset turbo --loras FILE ...] [--cache C]
        [--precision fp8] [--drift_correction S] [--colour_carry S] [--drifting] [--jobs 1] [--output q.json]

Prints a table and, as the last line, JSON. Runs on a CPU as well: a clip takes seconds. `tail:5` knows five frames of
its footage; --loras are those of the high and the low expert, or of the one. Directions, positions and chains are
measured with the captioner's descriptions. Each `--seed` has scenes of its own, none of which was trained on. With
several jobs as many processes make the clips, on one thread each. With --drifting chains are not sampled: a clip shows
its scene as it truly goes on, in the colours that its condition decodes to, and they drift from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.continued import FOLDERS, Maker, Scene, held_out, open_pipeline
from benchmarks.real_size import commit
from training import scenes
from training.reading import Seen, shapes_in
from training.vae import psnr
from wan.chain.chain import chain
from wan.continuation import VideoContinuation
from wan.types import Generation

SECOND = scenes.FPS  # frames
SHORTEST = 3  # frames over which a direction can be told
STRIP, BESIDE = 3, 12  # pixels: the width of a strip along an edge, and how far from it is what it is compared with
INSIDE = 24  # pixels from the edge to a strip that is none of its
log = logging.getLogger(__name__)


def measure_vae(pipeline: VideoContinuation, world: Sequence[Scene]) -> dict[str, float]:
    """Mean PSNR of encoding and decoding, in dB, of clips of the length that the models make."""
    ratios, home = [], next(pipeline.vae.model.parameters()).device  # it waits in host memory
    for scene in world:
        pixels = scene.source.frames.permute(3, 0, 1, 2).to(home)
        back = pipeline.vae.decode(pipeline.vae.encode([pixels]))[0]
        ratios.append(float(psnr(back[None].clamp(-1, 1), pixels[None])))
    return {"vae_psnr": statistics.mean(ratios)}


PHRASE = re.compile(r"a (\w+) (\w+) (moves (\w+)|stays in place)")


def told_in(caption: str) -> dict[str, tuple[str, str]]:
    """What a caption says of each colour: the shape, and its direction or "stays"."""
    return {colour: (shape, direction or "stays") for colour, shape, _, direction in PHRASE.findall(caption)}


def measure_captioner(pipeline: VideoContinuation, world: Sequence[Scene]) -> dict[str, float]:
    """Of all shapes, the shares whose colour is named, whose shape is right, and whose direction is."""
    right, exact = {"colour": 0, "shape": 0, "direction": 0}, 0
    total = 0
    for scene in world:
        answer = pipeline.captioner.describe(scene.source.samples(8), pipeline.vlm.question)
        answered, true = told_in(answer), told_in(scene.caption)
        exact += answer.strip() == scene.caption
        total += len(true)
        for colour, (shape, direction) in true.items():
            right["colour"] += colour in answered
            right["shape"] += answered.get(colour, ("", ""))[0] == shape
            right["direction"] += answered.get(colour, ("", ""))[1] == direction
    shares = {f"caption_{name}": count / total for name, count in right.items()}
    return shares | {"caption_exact": exact / len(world)}


def measure_clips(world: Sequence[Scene], make: Make, each: Each = map) -> dict[str, float]:
    """One clip each: PSNR of its first frame, directions, positions after a second, the visible seam."""
    judged = list(each(partial(_judge_one, make), enumerate(world)))
    seams = [one.seam for one in judged if one.seam is not None]
    errors = [error for one in judged for error in one.errors if error is not None]
    total = sum(len(one.errors) for one in judged)
    return {
        "first_frame_psnr": statistics.mean(one.first_frame for one in judged),
        "seam": statistics.mean(seams),
        "direction": statistics.mean(right for one in judged for right in one.directions),
        "position_error": statistics.mean(errors),
        "position_within_10%": sum(error <= 0.1 for error in errors) / total,
        "lost_after_1s": 1 - len(errors) / total,
    }


@dataclass(frozen=True)
class OneClip:
    """What is measured of the clip that goes on from one scene."""

    first_frame: float  # dB
    seam: float | None
    directions: list[bool]
    errors: list[float | None]  # of the width, of each shape after a second; None: it is lost


def _judge_one(make: Make, numbered: tuple[int, Scene]) -> OneClip:
    number, scene = numbered
    made = make(scene.source, number)
    frames = made.clip.frames.permute(0, 3, 1, 2)
    last = scene.source.frames[-1].permute(2, 0, 1)
    now = (made.context_frames or 1) - 1
    log.info("clip %d", number + 1)
    return OneClip(
        float(psnr(frames[None, now], last[None])),
        None if made.seam is None else made.seam["score"],
        list(judge_directions(scene, frames[now:])),
        position_errors(scene, by_colour(frames[now + SECOND]), SECOND),
    )


def position_errors(scene: Scene, seen: dict[str, Seen], time: float) -> list[float | None]:
    """How far each shape is from where it should be at that moment, as a share of the width; None: it is lost."""
    distances: list[float | None] = []
    for index in scene.shapes:
        x, y = scene.truth.positions(torch.tensor([time]))[0, 0, index].tolist()
        shape = seen.get(scene.colour(index))
        distances.append(None if shape is None else ((shape.x - x) ** 2 + (shape.y - y) ** 2) ** 0.5 / scenes.WIDTH)
    return distances


def judge_directions(scene: Scene, frames: Tensor) -> Iterator[bool]:
    """For each moving shape whether it goes on in its direction, until it bounces or a second is over.

    Right means at least a quarter of the true way, and less across it; a shape that is not seen is wrong.
    """
    times = torch.arange(SECOND + 1)
    headings = scene.truth.headings(times)[0]
    for index in scene.shapes:
        start = headings[0, index]
        as_before = (headings[:, index] == start).all(1).long().cumprod(0)
        until = int(as_before.sum()) - 1
        if not start.any() or until < SHORTEST:
            continue
        way = start * until
        before, after = (by_colour(frames[at]).get(scene.colour(index)) for at in (0, until))
        if before is None or after is None:
            yield False
            continue
        moved = torch.tensor([after.x - before.x, after.y - before.y])
        along = float(moved @ way / way.norm())
        across = float((moved - along * way / way.norm()).norm())
        yield along >= 0.25 * float(way.norm()) and across < along


def measure_chains(world: Sequence[Scene], make: Make, clips: int, each: Each = map) -> dict[str, list[float]]:
    """Of chains of that many clips, clip by clip:

    colours_right: of the chains, those that show all shapes and no more, by count and colour;
    kinds_right: of the shapes, those of their colour that are of their kind;
    all_right: of the chains, those that show all shapes and no more, by count, colour and kind;
    area_right: of the shapes, those whose area is within 1.5 times of the true one;
    named_right: of the shapes that were of their kind in the frame before the clip, those that its prompt calls so;
    colour_error: how far the mean colour of a frame is from the truth's, in levels of 255, a channel;
    seam_step: how far it jumps from the last frame of the clip before to the first new one;
    border_levels: how far a strip along an edge of its last frame stands off from what is beside it, see `at_borders`;
    inside_levels: the same of strips that lie inside, where a background that is not quite right stands off as well;
    position_error: the mean over shapes that are not lost of how far one is, a second into the clip, from where the
    truth is by then, as a share of the width.

    Something is right in a clip when it is in most of its frames: in some frames one shape may cover another.
    """
    judged = list(each(partial(_judge_chain, make, clips), enumerate(world)))

    def mean(name: str, index: int) -> float:
        values: list[float] = [value for chain in judged for value in getattr(chain[index], name)]
        return statistics.mean(values or [0.0])

    names = {
        "named_right": "named",
        "colours_right": "colours",
        "kinds_right": "kinds",
        "all_right": "all_right",
        "area_right": "areas",
        "position_error": "errors",
        "colour_error": "levels",
        "seam_step": "steps",
        "border_levels": "borders",
        "inside_levels": "insides",
    }
    return {name: [mean(values, index) for index in range(clips)] for name, values in names.items()}


@dataclass(frozen=True)
class ChainClip:
    """What is right in one clip of one chain: one value a chain, or one a shape."""

    named: list[bool]
    colours: list[bool]
    kinds: list[bool]
    all_right: list[bool]
    areas: list[bool]
    errors: list[float]
    levels: list[float]
    borders: list[float]
    insides: list[float]
    steps: list[float]


def _judge_chain(make: Make, clips: int, numbered: tuple[int, Scene]) -> list[ChainClip]:
    number, scene = numbered
    judged, begins = [], 0  # the moment of the last frame that is known
    last = scene.source.frames[-1].permute(2, 0, 1)
    for made in chain(scene.source, count=clips, extend=make, seed=1000 * number):
        frames, known = made.clip.frames.permute(0, 3, 1, 2), (made.context_frames or 1) - 1
        named = judge_names(scene, by_colour(last), made.request.prompt)
        one = judge_clip(scene, frames, begins - known, begins + SECOND, named)
        step = 255 / 2 * float((frames[known + 1].mean((1, 2)) - last.mean((1, 2))).abs().mean())
        judged.append(replace(one, steps=[step]))
        last = frames[-1]
        begins += len(frames) - 1 - known
    kinds = " ".join(f"{sum(clip.kinds)}/{len(clip.kinds)}" for clip in judged)
    right = sum(clip.all_right[0] for clip in judged)
    log.info("chain %d: all right in %d of %d clips; kinds right by clip: %s", number + 1, right, clips, kinds)
    return judged


def judge_names(scene: Scene, seen: dict[str, Seen], prompt: str) -> list[bool]:
    """Of the shapes that are of their kind in a picture, whether the prompt calls them so."""
    named = told_in(prompt)
    kinds = {scene.colour(index): scenes.SHAPES[int(scene.truth.shape[0, index])] for index in scene.shapes}
    in_place = [colour for colour, kind in kinds.items() if colour in seen and seen[colour].shape == kind]
    return [named.get(colour, ("", ""))[0] == kinds[colour] for colour in in_place]


def judge_clip(scene: Scene, frames: Tensor, first: int, second: int, named: Sequence[bool] = ()) -> ChainClip:
    """One clip [T, 3, H, W] whose first frame is the moment `first`; positions are looked at at the moment `second`.

    `named` is what `judge_names` says of its prompt.
    """
    seen = [by_colour(frame) for frame in frames]
    times = torch.arange(first, first + len(frames))
    drawn = scene.truth.draw(times)[0].transpose(0, 1)
    truth = [by_colour(frame) for frame in drawn]
    away = (frames.mean((2, 3)) - drawn.mean((2, 3))).abs() * 255 / 2
    kind_of = {scene.colour(index): scenes.SHAPES[int(scene.truth.shape[0, index])] for index in scene.shapes}

    def most(right: Iterable[bool]) -> bool:
        return sum(right) > len(frames) / 2

    def fits(colour: str) -> Iterator[bool]:
        for now, true in zip(seen, truth, strict=True):
            areas = [shapes[colour].area for shapes in (now, true) if colour in shapes]
            yield len(areas) == 2 and max(areas) <= 1.5 * min(areas)

    return ChainClip(
        list(named),
        [most(sorted(now) == scene.colours for now in seen)],
        [most(colour in now and now[colour].shape == kind for now in seen) for colour, kind in kind_of.items()],
        [most({colour: now[colour].shape for colour in now} == kind_of for now in seen)],
        [most(fits(colour)) for colour in kind_of],
        [error for error in position_errors(scene, seen[second - first], second) if error is not None],
        [float(away.mean())],
        [at_borders(frames[-1], drawn[-1])],
        [at_borders(frames[-1], drawn[-1], INSIDE)],
        [],
    )


def at_borders(picture: Tensor, truth: Tensor, away: int = 0) -> float:
    """How far the strip along one edge stands off from what is beside it, more than in the truth: a band that grows.

    Pictures [3, H, W] in [-1, 1] -> levels of 255, of the edge and channel where it is most; of strips so many pixels
    `away` from the edges. It is the median along the edge, so shapes, which take less than half of it, do not count.
    """
    wrong = picture - truth
    edges = (one[:, away:] for one in (wrong, wrong.flip(1), wrong.mT, wrong.mT.flip(1)))  # each with its strip on top
    strips = (one[:, :STRIP].mean(1) - one[:, BESIDE : BESIDE + STRIP].mean(1) for one in edges)
    return 255 / 2 * max(float(strip.median(1).values.abs().max()) for strip in strips)


def by_colour(frame: Tensor) -> dict[str, Seen]:
    return {shape.colour: shape for shape in shapes_in(frame)}


Make: TypeAlias = Callable[[Any, int], Generation]
Each: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map`, or that of several processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--task", choices=tuple(FOLDERS), required=True)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--chains", type=int, default=50)
    parser.add_argument("--chain_clips", type=int, default=12)
    parser.add_argument("--modes", nargs="+", default=["last_frame", "tail:5"])
    parser.add_argument("--seed", type=int, default=0, help="of the held-out scenes")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make clips")
    parser.add_argument("--sample_steps", type=int)
    parser.add_argument("--sample_guide_scale", type=float)
    parser.add_argument("--drift_correction", type=float, default=0.0)
    parser.add_argument("--colour_carry", type=float, default=0.0)
    parser.add_argument("--drifting", action="store_true", help="chains that drift by a known amount, not sampled")
    parser.add_argument("--prompt_mode", default="describe")
    parser.add_argument("--preset", default="quality")
    parser.add_argument("--cache", help="of steps, in place of the preset's")
    parser.add_argument("--precision", choices=("fp8", "fp8_attention"), help="of the denoisers; on a GPU")
    parser.add_argument("--loras", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    prepare_process(arguments.jobs)

    world = held_out(max(arguments.clips, arguments.chains), arguments.seed)
    clips, chains = world[: arguments.clips], world[: arguments.chains]
    result: dict[str, Any] = {"commit": commit(), "device": "cuda" if torch.cuda.is_available() else "cpu"}
    result |= {
        key: [str(file) for file in value] if key == "loras" else value
        for key, value in vars(arguments).items()
        if not isinstance(value, Path)
    }
    if clips:
        pipeline = open_pipeline(arguments.models, arguments.task)
        with torch.no_grad():
            result |= measure_vae(pipeline, clips) | measure_captioner(pipeline, clips)
    with several(arguments.jobs) as each:
        for mode in arguments.modes:
            make = Maker(
                arguments.models,
                arguments.task,
                mode,
                arguments.sample_steps,
                arguments.sample_guide_scale,
                arguments.drift_correction,
                arguments.colour_carry,
                arguments.drifting,
                arguments.seed,
                arguments.prompt_mode,
                arguments.preset,
                arguments.cache,
                arguments.precision,
                tuple(arguments.loras),
            )
            scores: dict[str, Any] = dict(measure_clips(clips, make, each)) if clips else {}
            if chains:
                scores |= measure_chains(chains, make, arguments.chain_clips, each)
            result[mode] = scores
            log.info("%s: %s", mode, scores)
            if arguments.output:  # what there is, should the time be up before the next mode
                arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    for key, value in result.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for name, number in rows:
            print(f"{key:>20} {name:<24} {shown(number)}")
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n", encoding="utf-8")
    print(line)


def shown(value: Any) -> str:
    """A number, or one for each clip, short."""
    if isinstance(value, list):
        return " ".join(shown(number) for number in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def several(jobs: int) -> Iterator[Each]:
    """`map`, in as many processes; their pipelines stay open in between."""
    if jobs == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not work in a process that was forked
    with ProcessPoolExecutor(jobs, context, prepare_process, (jobs,)) as pool:
        yield pool.map


def prepare_process(jobs: int) -> None:
    """Logging, and one thread a process where there are several."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if jobs > 1:
        torch.set_num_threads(1)


if __name__ == "__main__":
    main()
