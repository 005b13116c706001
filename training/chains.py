"""Stages `chains21` and `chains22`: chains of clips that the denoisers make, for the captioner to learn from.

A chain's captions are those of the true scene, so that its clips follow the scene as well as the denoisers can. What
does not is not shown to the captioner: a clip counts where all its shapes are there, of their kind and on their way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from training import scenes
from training.captioner import SEEN, SEGMENTS, as_levels, told_of
from training.denoiser import BOUNDARY, STAGES, new_denoiser, shifted
from training.loop import Settings, load, save
from training.reading import read_many
from training.text import Prompts, as_prompts
from training.vae import Codec
from wan.configs.rows import NEGATIVE_PROMPT
from wan.types import frame_indices

log = logging.getLogger(__name__)
MADE_BY: Mapping[str, tuple[str, tuple[str, ...]]] = {  # the VAE, and the denoisers from the highest noise on
    "chains22": ("vae22", ("dit5b",)),
    "chains21": ("vae21", ("dit14b_high", "dit14b_low")),
}
LINKS = 8
STEPS, SHIFT, GUIDANCE = 12, 3.0, 3.0  # the models' own
BACK = 3  # frames over which a shape's way is looked at
STANDS = 0.7  # pixels a frame; what moves goes at twice that and more


def make_chains(name: str, settings: Settings) -> None:
    """Write files of clips into the folder of those that the captioner sees, until the time is up."""
    folder = settings.folder / SEEN / name
    folder.mkdir(parents=True, exist_ok=True)
    maker = ChainMaker(name, settings)
    number = first = 1 + max((int(file.stem) for file in folder.glob("[0-9]*.pt")), default=-1)
    kept, start = [0] * LINKS, time.monotonic()
    chains = 0
    while number - first < settings.steps and time.monotonic() - start < 60 * settings.minutes:
        for link, part in enumerate(maker.chain(settings.generator(number))):
            if count := len(part["told"]):
                save(folder / f"{number:08d}.pt", part)
            kept[link] += count
            number += 1
        chains += settings.batch
        shares = " ".join(f"{100 * count / chains:.0f}" for count in kept)
        log.info("%s: %d clips; right, by clip of a chain, %%: %s", name, sum(kept), shares)


class ChainMaker:
    """The models of a family, making chains in batches."""

    def __init__(self, name: str, settings: Settings, steps: int = STEPS, guidance: float = GUIDANCE) -> None:
        vae, stages = MADE_BY[name]
        self.settings, self.steps, self.guidance = settings, steps, guidance
        self.codec, self.prompts = Codec(vae, settings), Prompts(settings)
        self.null = self.prompts([NEGATIVE_PROMPT])
        self.conditioning = STAGES[stages[0]].conditioning
        self.models = []
        for stage in stages:
            model = new_denoiser(STAGES[stage].sizes, settings).requires_grad_(False).eval()
            model.load_state_dict(load(settings.folder / f"{stage}.pt", settings.device)["weights"])
            self.models.append(model)

    @torch.no_grad()
    def chain(self, generator: torch.Generator) -> Iterator[dict[str, Any]]:
        """Clip by clip of a batch of chains, what the captioner sees of those that are right, and is to say of them."""
        world = scenes.sample(self.settings.batch, generator, hard=True)
        clip = world.draw(torch.arange(1 - scenes.FRAMES, 1, device=generator.device))
        now = 0
        for _ in range(LINKS):
            count = 3 if float(torch.rand((), generator=generator, device=generator.device)) < 0.7 else 1
            known = clip[:, :, 3 - 4 * count :]
            clip = self.made(known, count, as_prompts(world.captions(now), generator), generator)
            now += scenes.FRAMES - known.shape[2]
            yield shown_of(clip, world, now)

    def made(self, known: Tensor, count: int, captions: list[str], generator: torch.Generator) -> Tensor:
        """Clips [B, 3, T, H, W] that go on from known frames [B, 3, 4 * count - 3, H, W]."""
        batch = {
            "known": self.conditioning.encode(self.codec, known).repeat(2, 1, 1, 1, 1),
            "count": torch.full((2 * len(known),), count, device=known.device),
            "text": torch.cat([text := self.prompts(captions), self.null.expand_as(text)]),
        }
        shape = (len(known), self.codec.mean.shape[1], (scenes.FRAMES - 1) // 4 + 1, *batch["known"].shape[3:])
        latents = torch.randn(shape, generator=generator, device=known.device)
        sigmas = shifted(torch.linspace(1, 0, self.steps + 1), SHIFT).tolist()
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            model = self.models[0 if now >= BOUNDARY else -1]
            sigma = torch.full((len(batch["count"]),), now, device=known.device)
            flow, free = self.conditioning.flow(model, latents.repeat(2, 1, 1, 1, 1), sigma, batch)
            told, untold = flow.chunk(2)
            latents = latents + (then - now) * (untold + self.guidance * (told - untold))
        held = ~free[: len(known), None, :, None, None]  # the 5B's known latents are part of its clip
        if held.any():
            placed = torch.zeros_like(latents)
            placed[:, :, :count] = batch["known"][: len(known), :, :count]
            latents = torch.where(held, placed, latents)
        return self.codec.decode(latents)


def shown_of(clip: Tensor, world: scenes.Scenes, now: int) -> dict[str, Any]:
    """What the captioner sees of the clips that are right, which end at that moment, and what it is to say of them."""
    right = follows(clip, world, now)
    shown = clip[right][:, :, frame_indices(scenes.FRAMES, SEGMENTS)].transpose(1, 2)
    return {"levels": as_levels(shown).byte().cpu(), "told": told_of(world[right], now)}


def follows(clip: Tensor, world: scenes.Scenes, now: int) -> Tensor:
    """Of which clips [B] that end at the moment `now` all shapes are there, of their kind, and go where they should."""
    last, before = (read_many(clip[:, :, at]) for at in (-1, -1 - BACK))
    way = (last.place - before.place) / BACK  # [B, C, 2]
    way = (
        torch.where(way.abs() == way.abs().amax(-1, keepdim=True), way, 0.0).sign()
        * (way.abs().amax(-1) > STANDS)[..., None]
    )
    heading = world.headings(torch.tensor([now], device=clip.device))[:, 0].sign()  # [B, S, 2]
    wanted, kinds = torch.zeros_like(way), torch.full_like(last.kind, -1)
    present = torch.zeros_like(last.present)
    for index in range(world.present.shape[1]):
        rows = world.present[:, index].nonzero()[:, 0]
        place = rows, world.colour[rows, index]
        present[place], kinds[place], wanted[place] = True, world.shape[rows, index], heading[rows, index]
    right = (last.present == present) & (before.present == present)
    right &= ~present | ((last.kind == kinds) & (way == wanted).all(-1))
    return right.all(1)
