"""Hundreds of chains of the tiny family with true captions: what denoisers and VAEs lose, and of what.

    python -m training import --folder runs
    python -m benchmarks.many_chains --folder runs [--name chains22] [--chains 256] [--links 12] [--known 9]
        [--steps 12] [--guidance 3] [--seed 13] [--fresh] [--batch 256] [--device cuda]

Right is what is right in most *new* frames of a clip. `--fresh` draws known frames anew for each, so that nothing is
handed on. Prints, clip by clip in %, `kinds` and `all` as `benchmarks.quality` counts them, and `vae`: the kinds of the
truth after one round trip. Then of shapes that went wrong: how many turn, are small, are covered, are wrong after the
round trip too. The last line is JSON. 256 chains take 20 s on an H200.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_size import commit
from training import scenes
from training.chains import MADE_BY, ChainMaker
from training.loop import Settings
from training.reading import read_many
from training.scenes import FRAMES, Scenes
from training.vae import HELD_OUT

SMALL = 11.0  # pixels, the radius below which a shape counts as small
COVERED = 0.6  # of a shape's pixels; where less is in sight it counts as covered


@dataclasses.dataclass(frozen=True)
class Link:
    """One clip of each of B chains: which shapes [B, S] are there, right, newly wrong, and what may be why."""

    present: Tensor
    right: Tensor
    by_vae: Tensor  # right after one round trip of the truth
    new: Tensor  # wrong, and right in the clip before
    turning: Tensor
    small: Tensor
    covered: Tensor

    def counts(self) -> dict[str, int]:
        """What `shares` needs of many links."""
        shown, chains = self.present, len(self.present)
        return {
            "shapes": int(shown.sum()),
            "kinds": int((self.right & shown).sum()),
            "vae": int((self.by_vae & shown).sum()),
            "chains": chains,
            "all": int((self.right | ~shown).all(1).sum()),
            "wrong": int(self.new.sum()),
            "turning": int((self.new & self.turning).sum()),
            "small": int((self.new & self.small).sum()),
            "covered": int((self.new & self.covered).sum()),
            "wrong_by_vae": int((self.new & ~self.by_vae).sum()),
        }


def links(maker: ChainMaker, world: Scenes, args: argparse.Namespace, generator: torch.Generator) -> Iterator[Link]:
    """The clips of chains that go on from these scenes, one after the other."""
    device, new = generator.device, FRAMES - args.known
    clip, now = world.draw(torch.arange(1 - FRAMES, 1, device=device)), 0
    was = world.present
    for _ in range(args.links):
        known = clip[:, :, -args.known :]
        if args.fresh:
            known, was = world.draw(torch.arange(now + 1 - args.known, now + 1, device=device)), world.present
        prompts = [f"continue video {caption}" for caption in world.captions(now)]
        clip = maker.made(known, (args.known + 3) // 4, prompts, generator)
        now += new
        truth = world.draw(torch.arange(now + 1 - FRAMES, now + 1, device=device))
        right = in_most(clip[:, :, -new:], world)
        seen = torch.stack([in_sight(world, time) for time in range(now - new, now + 1, 2)]).amin(0)
        yield Link(
            world.present,
            right,
            in_most(maker.codec.decode(maker.codec.encode(truth))[:, :, -new:], world),
            was & ~right & world.present,
            world.spin != 0,
            world.radii(torch.tensor([float(now)], device=device))[0][:, 0] < SMALL,
            seen < COVERED,
        )
        was = right


def in_most(frames: Tensor, world: Scenes) -> Tensor:
    """Which shapes [B, S] are there and of their kind in most of the frames [B, 3, T, H, W]."""
    right = torch.zeros(world.present.shape, device=frames.device)
    for frame in frames.unbind(2):
        read = read_many(frame)
        shown, kind = (value.gather(1, world.colour) for value in (read.present, read.kind))
        right += shown & (kind == world.shape)
    return right > frames.shape[2] / 2


def in_sight(world: Scenes, time: float) -> Tensor:
    """The share of each shape's pixels [B, S] that no other one covers at that moment: later ones are drawn over it."""
    alone = [
        dataclasses.replace(
            world, present=world.present & (torch.arange(scenes.MOST_SHAPES) == index).to(world.present)
        )
        for index in range(scenes.MOST_SHAPES)
    ]
    moment = torch.tensor([time], device=world.phase.device)
    nothing = dataclasses.replace(world, present=torch.zeros_like(world.present)).draw(moment)
    inside = torch.stack([(one.draw(moment) - nothing).abs().amax((1, 2)) > 0.1 for one in alone], 1)
    above = inside.flip(1).cumsum(1).flip(1) > 1  # itself, and at least one that is drawn later
    free: Tensor = (inside & ~above).sum((2, 3)) / inside.sum((2, 3)).clamp_min(1)
    return torch.where(world.present, free, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="checkpoints, as of `training import`")
    parser.add_argument("--name", choices=tuple(MADE_BY), default="chains22")
    parser.add_argument("--chains", type=int, default=256)
    parser.add_argument("--links", type=int, default=12)
    parser.add_argument("--known", type=int, choices=(1, 5, 9), default=9, help="frames")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    print(json.dumps(measure(args, device)))


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The shares, as they are printed."""
    settings = Settings(args.folder, device, 1, args.batch, 0.0, args.seed)
    maker = ChainMaker(args.name, settings, args.steps, args.guidance)
    # drawn on the CPU, so that they are those of `benchmarks.quality`
    drawn = scenes.sample(max(args.chains, 200), torch.Generator().manual_seed(HELD_OUT + args.seed))[: args.chains]
    world = Scenes(**{field.name: getattr(drawn, field.name).to(device) for field in dataclasses.fields(drawn)})
    sums: list[dict[str, int]] = [{} for _ in range(args.links)]
    with torch.no_grad():
        for start in range(0, args.chains, args.batch):
            part = world[start : start + args.batch]
            for total, link in zip(sums, links(maker, part, args, settings.generator(start)), strict=True):
                for key, count in link.counts().items():
                    total[key] = total.get(key, 0) + count
    rows = {
        "kinds": [100 * one["kinds"] / one["shapes"] for one in sums],
        "all": [100 * one["all"] / one["chains"] for one in sums],
        "vae": [100 * one["vae"] / one["shapes"] for one in sums],
    }
    for name, row in rows.items():
        print(f"{name:>5} {' '.join(f'{share:5.1f}' for share in row)}", flush=True)
    causes = ("wrong", "turning", "small", "covered", "wrong_by_vae")
    wrong = {name: sum(one[name] for one in sums) for name in causes}
    print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in wrong.items()), flush=True)
    words = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    rounded = {name: [round(share, 2) for share in row] for name, row in rows.items()}
    return {"commit": commit(), **words, **rounded, **wrong}


if __name__ == "__main__":
    main()
