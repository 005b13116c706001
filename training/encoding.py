"""Stages `clips21` and `clips22`: draw clips and encode them for the denoisers, with the known frames of a chain.

In a chain the known frames are the end of a clip that the model made. So most of the ones here are not drawn either:
the end of the earlier clip has been through the VAE, or it has been noised and made anew by the denoiser as far as
that is trained, once or twice. Its errors are those that a chain goes on from, and the clip that follows is true again:
so the model learns to mend them, and to believe the caption where the picture is unclear.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import scenes
from training.captioner import SEEN
from training.chains import shown_of
from training.clips import narrowed
from training.denoiser import KNOWN, STAGES, TrainingStage, known_frames, new_denoiser
from training.loop import Batch, Settings, save
from training.text import Prompts, as_prompts
from training.vae import Codec
from training.whole_clip import compile_pointwise
from wan.configs.rows import NEGATIVE_PROMPT

log = logging.getLogger(__name__)
VAE_OF = {"clips22": "vae22", "clips21": "vae21"}
OWN = {"clips22": "dit5b", "clips21": "dit14b_low"}  # whose errors known frames have
SHOWN = 64  # clips of a chunk that the captioner gets to see
STEPS, GUIDANCE = 6, 3.0  # with which they are made; half of a clip's, for the second half of the noise at most


def encode_clips(name: str, settings: Settings) -> None:
    """Write chunks of clips into the stage's folder until the time is up, after those that are there."""
    folder = settings.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if settings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
        compile_pointwise(dynamic=True)
    make = Encoder(name, settings)
    seen = settings.folder / SEEN / name
    seen.mkdir(parents=True, exist_ok=True)
    number = first = 1 + max((int(file.stem) for file in folder.glob("[0-9]*.pt")), default=-1)
    start = logged = time.monotonic()
    while number - first < settings.steps and (now := time.monotonic()) - start < 60 * settings.minutes:
        save(folder / f"{number:08d}.pt", narrowed(make.chunk(number)))
        if make.seen:
            save(seen / f"{number:08d}.pt", make.seen)
        number += 1
        if now - logged > 15:
            logged = now
            speed = (number - first) * make.size / (now - start)
            log.info("%s: %d clips, %.0f a second", name, number * make.size, speed)
    log.info("%s: %d clips, %d of them new", name, number * make.size, (number - first) * make.size)


class Encoder:
    """Makes chunks of encoded clips; all of a chunk have the same number of known frames.

    `seen` is what the captioner should say of the clips that the model made for the last chunk, if there are any.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.settings, self.size = settings, settings.batch
        self.stage: TrainingStage = STAGES[OWN[name]]
        self.conditioning = self.stage.conditioning
        self.codec, self.prompts = Codec(VAE_OF[name], settings), Prompts(settings)
        self.null = self.prompts([NEGATIVE_PROMPT])
        self.newest = Newest(settings.folder / f"{OWN[name]}.pt", self.stage.sizes, settings)
        self.seen: dict[str, Any] = {}
        self.begins = name == "clips22"  # now and then nothing is known, so that the 5B can also begin a video

    @torch.no_grad()
    def chunk(self, number: int) -> Batch:
        generator = self.settings.generator(number)

        def uniform() -> float:
            return float(torch.rand((), generator=generator, device=generator.device))

        drawn = uniform()
        count = 1 if drawn < 0.45 else 2 if drawn < 0.7 else KNOWN
        frames = 4 * count - 3
        world = scenes.sample(self.size, generator, hard=True)
        times = torch.arange(frames - scenes.FRAMES, scenes.FRAMES, device=generator.device)
        pixels = world.draw(times)
        earlier, clip = pixels[:, :, : scenes.FRAMES], pixels[:, :, -scenes.FRAMES :]
        kind = uniform()
        context, self.seen = earlier, {}
        if kind < 0.6 and (model := self.newest()) is not None:
            for _ in range(1 + (uniform() < 0.5)):
                context = self._made(model, context, world, float(times[0]), 0.2 + 0.7 * uniform(), generator)
            self.seen = shown_of(context[:SHOWN], world[:SHOWN], frames - 1)
        elif kind < 0.85:
            latents = self.codec.encode(earlier)
            level = 0.15 * torch.rand(len(latents), 1, 1, 1, 1, generator=generator, device=generator.device)
            context = self.codec.decode(latents + level * _normal(latents, generator))
        unknown = self.begins and uniform() < 0.05
        return {
            "latents": self.codec.encode(clip),
            "known": self.conditioning.encode(self.codec, context[:, :, -frames:]),
            "count": torch.full((len(clip),), 0 if unknown else count, device=generator.device),
            "text": self._text(world, 0 if unknown else frames - 1, generator),
        }

    def _made(
        self, model: Any, clip: Tensor, world: scenes.Scenes, begins: float, level: float, generator: torch.Generator
    ) -> Tensor:
        """The clip noised to that level, of which the denoiser then makes a clip again; it begins at that moment."""
        count = 1 + int(torch.randint(KNOWN, (), generator=generator, device=generator.device))
        frames = 4 * count - 3
        latents = self.codec.encode(clip)
        known = self.conditioning.encode(self.codec, clip[:, :, :frames])
        text = self._text(world, begins + frames - 1, generator)
        batch = {
            "known": known.repeat(2, 1, 1, 1, 1),
            "count": torch.full((2 * len(clip),), count, device=clip.device),
            "text": torch.cat([text, self.null.expand_as(text)]),
        }
        noised = (1 - level) * latents + level * _normal(latents, generator)
        sigmas = torch.linspace(level, 0, STEPS + 1).tolist()
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            sigma = torch.full((len(batch["count"]),), now, device=clip.device)
            flow, free = self.conditioning.flow(model, noised.repeat(2, 1, 1, 1, 1), sigma, batch)
            told, untold = flow.chunk(2)
            noised = noised + (then - now) * (untold + GUIDANCE * (told - untold))
        if not free.all():  # the 5B's known latents are part of its clip
            is_known = known_frames(batch).chunk(2)[0][:, None, :, None, None]
            noised = torch.where(is_known, latents, noised)
        return self.codec.decode(noised)

    def _text(self, world: scenes.Scenes, time: float, generator: torch.Generator) -> Tensor:
        return self.prompts(as_prompts(world.captions(time), generator))


class Newest:
    """The denoiser that a training has saved last, None where there is none yet."""

    def __init__(self, path: Path, sizes: str, settings: Settings) -> None:
        self.path, self.sizes, self.settings = path, sizes, settings
        self.model: Any = None
        self.saved = 0.0

    def __call__(self) -> Any:
        saved = self.path.stat().st_mtime if self.path.is_file() else 0.0
        if saved > self.saved:
            self.model = self.model or new_denoiser(self.sizes, self.settings).requires_grad_(False).eval()
            self.model.load_state_dict(torch.load(self.path, self.settings.device, weights_only=True)["weights"])
            self.saved = saved
        return self.model


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)
