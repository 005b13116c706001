"""Stages `dit5b`, `dit14b_high` and `dit14b_low`: flow matching on encoded clips, conditioned as the two models are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import scenes
from training.clips import Clips
from training.family import DENOISERS, build_denoiser, in_fp8
from training.loop import Batch, Settings, half_precision, resume, train
from training.text import LENGTH, Prompts
from training.vae import Codec
from wan.configs.rows import NEGATIVE_PROMPT

LATENT_FRAMES = (scenes.FRAMES - 1) // 4 + 1
KNOWN = 3  # latent frames of the longest context
BOUNDARY = 0.9  # sigma from which the high-noise expert works
TEXT_ROWS = 512  # that the pipelines hand over, most of them zeros
ZEROS = 8  # rows that stand for all zeros after the longest caption


class Conditioning(Protocol):
    """How known frames get into a model."""

    def encode(self, codec: Codec, context: Tensor) -> Tensor:
        """The known frames of a clip, pixels [B, 3, n, H, W], as latents to keep for it."""
        ...

    def target(self, batch: Batch) -> Tensor:
        """The latents [B, z, F, h, w] that the model should make."""
        ...

    def flow(self, model: Any, noised: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The flow [B, z, F, h, w] at sigma [B], and which latent frames [B, F] the model answers for.

        The batch holds the `known` latents, the `count` of known latent frames and the embedded `text`.
        """
        ...


class InPlace:
    """The 5B: known latent frames stand in the input, and their tokens have timestep 0."""

    def encode(self, codec: Codec, context: Tensor) -> Tensor:
        latents = codec.encode(context)
        return F.pad(latents, (0, 0, 0, 0, 0, KNOWN - latents.shape[2]))

    def target(self, batch: Batch) -> Tensor:
        return batch["latents"]

    def flow(self, model: Any, noised: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        free = ~known_frames(batch)
        known = F.pad(batch["known"], (0, 0, 0, 0, 0, LATENT_FRAMES - KNOWN))
        placed = torch.where(free[:, None, :, None, None], noised, known)
        return forward(model, placed, sigma[:, None] * 1000 * free, batch["text"]), free


class InChannels:
    """The A14B: mask and latents of the known and then grey frames are further input channels."""

    def encode(self, codec: Codec, context: Tensor) -> Tensor:
        return codec.encode(F.pad(context, (0, 0, 0, 0, 0, scenes.FRAMES - context.shape[2])))

    def target(self, batch: Batch) -> Tensor:
        # known frames as they are, worn or not: a clip begins with the frame that it is given
        return torch.where(known_frames(batch)[:, None, :, None, None], batch["known"], batch["latents"])

    def flow(self, model: Any, noised: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        known = known_frames(batch)
        mask = known[:, None, :, None, None].expand(-1, 4, -1, *noised.shape[3:]).to(noised.dtype)
        placed = torch.cat([noised, mask, batch["known"]], dim=1)
        return forward(model, placed, sigma * 1000, batch["text"]), torch.ones_like(known)


def known_frames(batch: Batch) -> Tensor:
    """Which latent frames [B, F] are known."""
    return torch.arange(LATENT_FRAMES, device=batch["count"].device) < batch["count"][:, None]


@dataclass(frozen=True)
class TrainingStage:
    """What one denoiser is trained on. `sigma_of` makes noise levels of numbers that are uniform in [0, 1]."""

    sizes: str  # in family.DENOISERS
    clips: str  # the stage that encodes them
    conditioning: Conditioning
    sigma_of: Callable[[Tensor], Tensor]


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Numbers in [0, 1] moved towards 1, as the schedules do."""
    return shift * uniform / (1 + (shift - 1) * uniform)


STAGES: Mapping[str, TrainingStage] = {
    "dit5b": TrainingStage("dit5b", "clips22", InPlace(), lambda u: shifted(u, 3)),
    "dit14b_high": TrainingStage("dit14b", "clips21", InChannels(), lambda u: BOUNDARY + (1 - BOUNDARY) * u),
    "dit14b_low": TrainingStage("dit14b", "clips21", InChannels(), lambda u: BOUNDARY * shifted(u, 2)),
}


def train_denoiser(name: str, settings: Settings) -> None:
    """Train one denoiser on the clips of its folder, which may grow meanwhile."""
    stage = STAGES[name]
    model = new_denoiser(stage.sizes, settings)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    progress = resume(name, model, settings)
    if settings.compiler is not None:
        model.compile_blocks(settings.compiler)
    if settings.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True

    def loss_of(batch: Batch) -> Tensor:
        latents, noise = stage.conditioning.target(batch), batch["noise"]
        sigma = batch["sigma"].view(-1, 1, 1, 1, 1)
        noised = (1 - sigma) * latents + sigma * noise
        flow, counts = stage.conditioning.flow(model, noised, batch["sigma"], batch)
        error = (flow - (noise - latents)).square().mean((1, 3, 4))
        return (error * counts).sum() / counts.sum()

    # each stretch draws noise that those before it did not
    batches = noised_batches(stage, settings, settings.generator(progress.steps))
    lasting = replace(settings, save_every=60.0, average=0.999)
    train(name, model, loss_of, batches, lasting, progress, in_fp8=in_fp8)


def noised_batches(stage: TrainingStage, settings: Settings, generator: torch.Generator) -> Iterator[Batch]:
    """Batches with noise, sigma in [0, 1] and, for one in ten, no text."""
    null = Prompts(settings)([NEGATIVE_PROMPT, ""])
    clips = Clips(settings.folder / stage.clips, settings, generator)
    for batch in clips.batches(settings.batch):
        count, device = settings.batch, settings.device
        drop, uniform = torch.rand(2, count, generator=generator, device=device)
        nothing = null[(drop < 0.05).long()]
        text = torch.where(drop[:, None, None] < 0.1, nothing, batch["text"])
        noise = torch.randn(batch["latents"].shape, generator=generator, device=device)
        yield batch | {"text": text, "noise": noise, "sigma": stage.sigma_of(uniform)}


def new_denoiser(sizes: str, settings: Settings) -> Any:
    """A denoiser with random weights whose cross-attention takes few rows of zeros for all of them."""
    torch.manual_seed(settings.seed)
    model = build_denoiser(DENOISERS[sizes]).to(settings.device)
    for block in model.blocks:
        block.attn2.set_processor(_FewRows(settings.device))
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


def forward(model: Any, latents: Tensor, steps: Tensor, text: Tensor) -> Tensor:
    """The flow for embedded captions [B, LENGTH, D], which the pipelines pad to TEXT_ROWS with zeros."""
    with half_precision(latents.device):
        flow: Tensor = model(latents, steps, F.pad(text, (0, 0, 0, ZEROS)), return_dict=False)[0]
    return flow.float()
