#!/usr/bin/env python3
"""How well the trained tiny family continues clips that it was not trained on, against the ground truth.

    python -m benchmarks.quality --task v2v-5B [--clips 200] [--chains 50] [--modes last_frame tail:5] [--output q.json]

Prints a table and, as the last line, JSON. Runs on a CPU as well: a clip takes seconds. `tail:5` knows five frames of
its footage. Directions, positions and chains are measured with the captioner's descriptions.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_size import commit
from training import scenes
from training.reading import Seen, shapes_in
from training.scenes import Scenes
from training.vae import HELD_OUT, psnr
from wan import WanV2V, WanV2V5B
from wan.chain.chain import chain
from wan.chain.plan import Plan
from wan.configs import config_for
from wan.continuation import VideoContinuation
from wan.settings import Context
from wan.types import Clip, Generation

FOLDERS: dict[str, tuple[str, type[VideoContinuation]]] = {
    "v2v-5B": ("tiny-Wan2.2-TI2V-5B", WanV2V5B),
    "v2v-14B": ("tiny-Wan2.2-I2V-A14B", WanV2V),
}
SECOND = scenes.FPS  # frames
SHORTEST = 3  # frames over which a direction can be told
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """One held-out scene, and its past as the clip that is continued. Frame 0 is the clip's last one."""

    truth: Scenes
    source: Clip
    caption: str

    @property
    def shapes(self) -> list[int]:
        """Indices of the shapes that are there."""
        return [index for index, there in enumerate(self.truth.present[0].tolist()) if there]

    def colour(self, index: int) -> str:
        return list(scenes.COLOURS)[int(self.truth.colour[0, index])]

    @property
    def colours(self) -> list[str]:
        return sorted(self.colour(index) for index in self.shapes)


def held_out(count: int) -> list[Scene]:
    """The first `count` held-out scenes; they are the same ones whatever the count."""
    many = scenes.sample(max(count, 200), torch.Generator().manual_seed(HELD_OUT))[:count]
    past = torch.arange(1 - scenes.FRAMES, 1)
    return [
        Scene(one, Clip(one.draw(past)[0].permute(1, 2, 3, 0), Fraction(scenes.FPS)), one.captions(0)[0])
        for one in (many[index : index + 1] for index in range(count))
    ]


def open_pipeline(models: Path, task: str) -> VideoContinuation:
    name, pipeline = FOLDERS[task]
    return pipeline(config_for(task, models / name), models / name, vlm_path=models / "tiny-InternVL")


# --- what is measured -------------------------------------------------------------------------------------------------


def measure_vae(pipeline: VideoContinuation, world: Sequence[Scene]) -> dict[str, float]:
    """Mean PSNR of encoding and decoding, in dB, of clips of the length that the models make."""
    found = []
    for scene in world:
        pixels = scene.source.frames.permute(3, 0, 1, 2).to(pipeline.device)
        back = pipeline.vae.decode(pipeline.vae.encode([pixels]))[0]
        found.append(float(psnr(back[None].clamp(-1, 1), pixels[None])))
    return {"vae_psnr": statistics.mean(found)}


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
        said, true = told_in(answer), told_in(scene.caption)
        exact += answer.strip() == scene.caption
        total += len(true)
        for colour, (shape, direction) in true.items():
            right["colour"] += colour in said
            right["shape"] += said.get(colour, ("", ""))[0] == shape
            right["direction"] += said.get(colour, ("", ""))[1] == direction
    shares = {f"caption_{name}": count / total for name, count in right.items()}
    return shares | {"caption_exact": exact / len(world)}


def measure_clips(world: Sequence[Scene], make: Make) -> dict[str, float]:
    """One clip each: PSNR of its first frame, directions, positions after a second, the visible seam."""
    first, seams, errors, directions, lost = [], [], [], [], 0
    for number, scene in enumerate(world):
        made = make(scene.source, number)
        frames = made.clip.frames.permute(0, 3, 1, 2)
        last = scene.source.frames[-1].permute(2, 0, 1)
        now = (made.context_frames or 1) - 1
        first.append(float(psnr(frames[None, now], last[None])))
        if made.seam is not None:
            seams.append(made.seam["score"])
        directions += list(judge_directions(scene, frames[now:]))
        seen = by_colour(frames[now + SECOND])
        for index in scene.shapes:
            x, y = scene.truth.positions(torch.tensor([SECOND]))[0, 0, index].tolist()
            if shape := seen.get(scene.colour(index)):
                errors.append(((shape.x - x) ** 2 + (shape.y - y) ** 2) ** 0.5 / scenes.WIDTH)
            else:
                lost += 1
        log.info("%d of %d clips", number + 1, len(world))
    return {
        "first_frame_psnr": statistics.mean(first),
        "seam": statistics.mean(seams),
        "direction": statistics.mean(directions),
        "position_error": statistics.mean(errors),
        "position_within_10%": sum(error <= 0.1 for error in errors) / (len(errors) + lost),
        "lost_after_1s": lost / (len(errors) + lost),
    }


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


def measure_chains(world: Sequence[Scene], make: Make, clips: int) -> dict[str, float]:
    """Of chains of that many clips, the share whose count of shapes and colours is right in each clip's frames.

    A clip is right when most of its frames are: for some frames one shape may cover another.
    """
    kept = [0.0] * clips
    for number, scene in enumerate(world):
        made = chain(scene.source, count=clips, extend=make, seed=1000 * number)
        for index, clip in enumerate(made):
            right = [sorted(by_colour(frame)) == scene.colours for frame in clip.clip.frames.permute(0, 3, 1, 2)]
            kept[index] += sum(right) > len(right) / 2
        log.info("%d of %d chains", number + 1, len(world))
    shares = {index: count / len(world) for index, count in enumerate(kept, 1)}
    return {f"chain_right_at_{index}": share for index, share in shares.items() if index in (1, 2, 3, 6, clips)}


def by_colour(frame: Tensor) -> dict[str, Seen]:
    return {shape.colour: shape for shape in shapes_in(frame)}


Make = Callable[[Any, int], Generation]


def maker(pipeline: VideoContinuation, mode: str, arguments: argparse.Namespace) -> Make:
    """A function: footage and seed -> the clip that goes on from it."""
    name, _, frames = mode.partition(":")
    context = Context.choose(name, int(frames) if frames else None)

    def make(footage: Any, seed: int) -> Generation:
        plan: Plan = pipeline.plan(
            footage,
            context=context,
            steps=arguments.sample_steps,
            guidance=arguments.sample_guide_scale,
            drift_correction=arguments.drift_correction,
        )
        return pipeline.extend(footage, seed, plan)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--task", choices=tuple(FOLDERS), required=True)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--chains", type=int, default=50)
    parser.add_argument("--chain_clips", type=int, default=12)
    parser.add_argument("--modes", nargs="+", default=["last_frame", "tail:5"])
    parser.add_argument("--sample_steps", type=int)
    parser.add_argument("--sample_guide_scale", type=float)
    parser.add_argument("--drift_correction", type=float, default=0.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    pipeline = open_pipeline(arguments.models, arguments.task)
    world = held_out(max(arguments.clips, arguments.chains))
    clips, chains = world[: arguments.clips], world[: arguments.chains]
    result: dict[str, Any] = {"commit": commit(), "device": str(pipeline.device)}
    result |= {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    if clips:
        result |= measure_vae(pipeline, clips) | measure_captioner(pipeline, clips)
    for mode in arguments.modes:
        make = maker(pipeline, mode, arguments)
        found = measure_clips(clips, make) if clips else {}
        found |= measure_chains(chains, make, arguments.chain_clips) if chains else {}
        result[mode] = found
        log.info("%s: %s", mode, found)
    for key, value in result.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for name, number in rows:
            print(f"{key:>20} {name:<24} {number if not isinstance(number, float) else round(number, 4)}")
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    with torch.no_grad():
        main()
