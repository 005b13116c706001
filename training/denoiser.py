"""Stages `dit5b` and `dit14b`: flow matching on cached latents, with the exact conditioning of the two models.

The clip begins with known frames. Most of these have been through the VAE once, as the end of an earlier clip, because
that is what a chain goes on from. The caption is what goes on at the first frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import scenes
from training.family import DENOISERS, build_denoiser
from training.loop import Batch, Settings, half_precision, resume, train
from training.text import LENGTH, Prompts, as_prompts
from training.vae import Codec
from wan.configs.rows import NEGATIVE_PROMPT

LATENT_FRAMES = (scenes.FRAMES - 1) // 4 + 1
KNOWN = 9  # pixel frames of the longest context
BOUNDARY = 0.9  # sigma from which the high-noise expert works
CHUNK = 64  # clips that are drawn and encoded at a time
TEXT_ROWS = 512  # that the pipelines hand over, most of them zeros
ZEROS = 8  # rows that stand for all zeros after the longest caption


def train_5b(settings: Settings) -> None:
    """The one denoiser of the 5B: known latent frames stand in the input, and their tokens have timestep 0."""
    codec, prompts = Codec("vae22", settings), Prompts(settings)
    model = _new(settings, "dit5b")
    progress = resume("dit5b", model, settings)

    def encode(clip: Tensor, context: Tensor, count: Tensor) -> Batch:
        return {"latents": codec.encode(clip), "known": codec.encode(context)}

    def loss_of(batch: Batch) -> Tensor:
        latents, noise, sigma = batch["latents"], batch["noise"], batch["sigma"].view(-1, 1, 1, 1, 1)
        frames = torch.arange(LATENT_FRAMES, device=latents.device)
        known = frames < batch["count"][:, None]  # [B, F]
        context = F.pad(batch["known"], (0, 0, 0, 0, 0, LATENT_FRAMES - batch["known"].shape[2]))
        noised = (1 - sigma) * latents + sigma * noise
        placed = torch.where(known[:, None, :, None, None], context, noised)
        flow = _forward(model, placed, batch["sigma"][:, None] * 1000 * ~known, batch["text"])
        error = (flow - (noise - latents)).square().mean((1, 3, 4))
        return (error * ~known).sum() / (~known).sum()

    pool = Pool(encode, codec, prompts, settings, progress.steps)
    # now and then nothing is known, so that the model can also begin a video
    batches = noised_batches(pool, (0.05, 0.45, 0.25, 0.25), lambda u: shifted(u, 3))
    train("dit5b", model, loss_of, batches, settings, progress)


def train_14b(settings: Settings) -> None:
    """The two experts of the A14B: mask and latents of the known and then grey frames are further input channels."""
    codec, prompts = Codec("vae21", settings), Prompts(settings)
    experts = nn.ModuleDict({name: _new(settings, "dit14b") for name in ("high", "low")})
    progress = resume("dit14b", experts, settings)

    def encode(clip: Tensor, context: Tensor, count: Tensor) -> Batch:
        shown = torch.arange(KNOWN, device=clip.device) < 4 * count[:, None] - 3
        grey = torch.zeros_like(clip[:, :, KNOWN:])
        begun = torch.cat([context * shown[:, None, :, None, None], grey], dim=2)
        return {"latents": codec.encode(clip), "image": codec.encode(begun)}

    def loss_of(batch: Batch) -> Tensor:
        latents, noise = batch["latents"], batch["noise"]
        known = torch.arange(LATENT_FRAMES, device=latents.device) < batch["count"][:, None]
        mask = known[:, None, :, None, None].expand(-1, 4, -1, *latents.shape[3:]).to(latents.dtype)
        half, loss = len(latents) // 2, torch.zeros((), device=latents.device)
        sigmas = {"high": BOUNDARY + (1 - BOUNDARY) * batch["sigma"], "low": BOUNDARY * shifted(batch["sigma"], 2)}
        for name, rows in (("high", slice(0, half)), ("low", slice(half, None))):
            sigma = sigmas[name][rows].view(-1, 1, 1, 1, 1)
            noised = (1 - sigma) * latents[rows] + sigma * noise[rows]
            placed = torch.cat([noised, mask[rows], batch["image"][rows]], dim=1)
            flow = _forward(experts[name], placed, sigmas[name][rows] * 1000, batch["text"][rows])
            loss = loss + (flow - (noise[rows] - latents[rows])).square().mean()
        return loss / 2

    pool = Pool(encode, codec, prompts, settings, progress.steps)
    train("dit14b", experts, loss_of, noised_batches(pool, None, lambda u: u), settings, progress)


class Pool:
    """Encoded clips that go round: drawing and encoding takes longer than a step, so each clip is used several times.

    A new chunk replaces the oldest one every few batches.
    """

    def __init__(
        self,
        encode: Callable[[Tensor, Tensor, Tensor], Batch],
        codec: Codec,
        prompts: Prompts,
        settings: Settings,
        step: int,
        size: int = 512,
        reuse: int = 16,
    ) -> None:
        self.encode, self.codec, self.prompts = encode, codec, prompts
        self.settings, self.size, self.reuse = settings, size, reuse
        self.generator = settings.generator(step)
        self.chunks: list[Batch] = []
        self.null = prompts([NEGATIVE_PROMPT, ""])

    def rows(self, count: int) -> Iterator[Batch]:
        """`count` clips at random, again and again."""
        start = min(self.size, 32 if self.settings.device.type == "cuda" else 1)
        self.chunks = [self._chunk() for _ in range(start)]
        at = 0
        while True:
            for _ in range(self.reuse):
                which = torch.randint(len(self.chunks), (count // 8,)).tolist()
                first = torch.randint(CHUNK - 8 + 1, (count // 8,)).tolist()
                yield {
                    key: torch.cat([self.chunks[i][key][j : j + 8] for i, j in zip(which, first, strict=True)])
                    for key in self.chunks[0]
                }
            if len(self.chunks) < self.size:
                self.chunks.append(self._chunk())
            else:
                self.chunks[at] = self._chunk()
                at = (at + 1) % self.size

    def _chunk(self) -> Batch:
        generator, device = self.generator, self.settings.device
        batch = scenes.sample(CHUNK, generator, tries=2)  # shapes that pass each other, as they do in a long chain
        before = scenes.FRAMES - KNOWN
        pixels = batch.draw(torch.arange(-before, scenes.FRAMES, device=device))
        clip, earlier = pixels[:, :, before:], pixels[:, :, : scenes.FRAMES]
        latents = self.codec.encode(earlier)
        # not only what the VAE loses, but also what a denoiser does not get right
        level = 0.15 * torch.rand(CHUNK, 1, 1, 1, 1, generator=generator, device=device)
        worn = self.codec.decode(latents + level * torch.randn(latents.shape, generator=generator, device=device))
        is_worn = torch.rand(CHUNK, 1, 1, 1, 1, generator=generator, device=device) < 0.7
        context = torch.where(is_worn, worn, earlier)[:, :, -KNOWN:]
        share = torch.tensor([0.5, 0.25, 0.25], device=device)
        count = 1 + torch.multinomial(share, CHUNK, replacement=True, generator=generator)
        return {
            **self.encode(clip, context, count),
            "count": count,
            "text": self.prompts(as_prompts(batch.captions(0), generator)),
        }


def noised_batches(
    pool: Pool, shares: tuple[float, ...] | None, sigma_of: Callable[[Tensor], Tensor]
) -> Iterator[Batch]:
    """Batches with noise, sigma in [0, 1] and, for one in ten, no text. `shares` redraws how many slots are known."""
    generator, device = pool.generator, pool.settings.device
    for batch in pool.rows(pool.settings.batch):
        count = len(batch["latents"])

        def uniform(count: int = count) -> Tensor:
            return torch.rand(count, generator=generator, device=device)

        if shares is not None:
            weights = torch.tensor(shares, device=device)
            batch["count"] = torch.multinomial(weights, count, replacement=True, generator=generator)
        drop = uniform()
        nothing = pool.null[(drop < 0.05).long()]
        text = torch.where(drop[:, None, None] < 0.1, nothing, batch["text"])
        noise = torch.randn(batch["latents"].shape, generator=generator, device=device)
        yield batch | {"text": text, "noise": noise, "sigma": sigma_of(uniform())}


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Numbers in [0, 1] moved towards 1, as the schedules do."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def _new(settings: Settings, name: str) -> Any:
    torch.manual_seed(settings.seed)
    model = build_denoiser(DENOISERS[name]).to(settings.device)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for block in model.blocks:
        block.attn2.set_processor(_FewRows(settings.device))
    if settings.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        model.compile_repeated_blocks()
    return model


class _FewRows:
    """Cross-attention to the caption's rows and a few zero rows, each of which counts as often as it stands for.

    n equal keys have n times the weight of one, and so has one whose score is higher by log n. At these sizes the zeros
    would take most of a step.
    """

    def __init__(self, device: torch.device) -> None:
        often = torch.tensor([1.0] * LENGTH + [(TEXT_ROWS - LENGTH) / ZEROS] * ZEROS, device=device)
        self.more = often.log()[None, None, None]

    def __call__(self, attn: Any, tokens: Tensor, text: tuple[Tensor, Tensor], *_: Any) -> Tensor:
        query = attn.norm_q(attn.to_q(tokens)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        keys, values = (part.transpose(1, 2).to(query.dtype) for part in text)
        mask = self.more.to(query.dtype).expand(len(query), 1, query.shape[2], -1)
        mixed = F.scaled_dot_product_attention(query, keys, values, mask)
        heads: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return heads


def _forward(model: Any, latents: Tensor, steps: Tensor, text: Tensor) -> Tensor:
    """The flow for embedded captions [B, LENGTH, D], which the pipelines pad to TEXT_ROWS with zeros."""
    with half_precision(latents.device):
        flow: Tensor = model(latents, steps, F.pad(text, (0, 0, 0, ZEROS)), return_dict=False)[0]
    return flow.float()
