"""Stages `turbo5b`, `turbo14b_high` and `turbo14b_low`: LoRAs with which `--preset turbo` makes a clip in 4 steps.

Each of the four steps should come to where the model without a LoRA comes from the same latents, with guidance and in
smaller steps: a LoRA learns the mean flow from one of the four noise levels to the next. Half of the latents between
two steps are those that it comes to itself, so that it learns to go on from its own errors. Its factors are stored in
fp8 and rounded so in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training import family
from training.clips import Clips
from training.denoiser import BOUNDARY, STAGES, new_denoiser, shifted
from training.loop import Batch, Settings, load, resume, train
from training.text import Prompts
from wan.configs.presets import TURBO
from wan.configs.rows import NEGATIVE_PROMPT

assert TURBO.steps is not None and TURBO.shift is not None
SIGMAS = shifted(torch.linspace(1, 0, TURBO.steps + 1), TURBO.shift).tolist()
GUIDANCE = 3.0  # that the models declare
FINEST = 0.17  # noise between two of the smaller steps, at most
SCALE = 1 / 256  # so that both factors have values that fp8 holds well
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
MOST = {"cuda": 16_384, "cpu": 8}  # pairs of latents and flow that are held
ITSELF = 0.5  # of the clips that go on from the LoRA's own step
REUSED = 8  # batches between two passes of the teacher, once so many are there


@dataclass(frozen=True)
class Turbo:
    """What one LoRA is trained for: a denoiser, and the file that it becomes."""

    denoiser: str  # in STAGES
    rank: int
    file: str


TURBOS: Mapping[str, Turbo] = {
    "turbo5b": Turbo("dit5b", 8, "tiny-TI2V-5B-4steps.safetensors"),
    "turbo14b_high": Turbo("dit14b_high", 6, "tiny-I2V-A14B-4steps-high.safetensors"),
    "turbo14b_low": Turbo("dit14b_low", 6, "tiny-I2V-A14B-4steps-low.safetensors"),
}


def train_turbo(name: str, settings: Settings) -> None:
    """Train one LoRA on the clips of its denoiser's folder."""
    turbo = TURBOS[name]
    stage = STAGES[turbo.denoiser]
    torch.manual_seed(settings.seed)
    model = opened(turbo.denoiser, settings)
    lora = attach(model, turbo)
    lora.to(settings.device)
    progress = resume(name, lora, settings)

    def student(batch: Batch) -> tuple[Tensor, Tensor]:
        return stage.conditioning.flow(model, batch["latents"], batch["sigma"], batch)

    def loss_of(batch: Batch) -> Tensor:
        flow, counts = student(batch)
        error = (flow - batch["flow"]).square().mean((1, 3, 4))
        return (error * counts).sum() / counts.sum()

    lasting = replace(settings, save_every=30.0, average=0.998)
    train(
        name,
        lora,
        loss_of,
        pairs(name, settings, progress.steps, lambda batch: student(batch)[0]),
        lasting,
        progress,
        in_fp8=lambda name, dimensions: True,
    )


def opened(stage: str, settings: Settings) -> Any:
    """The denoiser of that stage as it is trained so far and stored, not to be trained further."""
    model = new_denoiser(STAGES[stage].sizes, settings).requires_grad_(False).eval()
    weights = load(settings.folder / f"{stage}.pt", settings.device)["weights"]
    model.load_state_dict(weights)
    for name, value in model.named_parameters():
        if family.in_fp8(name, value.ndim):
            value.copy_(value.to(torch.float8_e4m3fn))
    return model


class LowRank(nn.Module):
    """What is added to a matrix."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, into))
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALE * (self.up @ self.down)


def attach(model: Any, turbo: Turbo) -> nn.ModuleDict:
    """Put a new LoRA into the model; returns its factors by official layer, with "/" for the dots."""
    names, ranks = family.denoiser_names(family.DENOISERS[STAGES[turbo.denoiser].sizes]), {}
    for number in range(len(model.blocks)):
        for layer in LAYERS:
            official = f"blocks.{number}.{layer}"
            module = model.get_submodule(names[f"{official}.weight"][0].removesuffix(".weight"))
            out, into = module.weight.shape
            ranks[official.replace(".", "/")] = part = LowRank(out, into, turbo.rank)
            parametrize.register_parametrization(module, "weight", part.to(module.weight.device))
    return nn.ModuleDict(ranks)


def pairs(name: str, settings: Settings, step: int, student: Callable[[Batch], Tensor]) -> Iterator[Batch]:
    """Latents at one of the LoRA's noise levels and the mean flow from there to the next, again and again.

    `student` gives the flow that the model has with the LoRA as it is.
    """
    teacher, generator = Teacher(name, settings, student), settings.generator(step)
    source = Clips(settings.folder / STAGES[TURBOS[name].denoiser].clips, settings, generator).batches(settings.batch)
    most, held, place, filled, number = MOST[settings.device.type], Batch(), 0, 0, 0
    while True:
        if filled < most or number % REUSED == 0:
            for pair in teacher.pairs(next(source), generator):
                count = len(pair["sigma"])
                place = 0 if place + count > most else place
                for key, value in pair.items():
                    if key not in held:
                        held[key] = torch.empty(most, *value.shape[1:], dtype=value.dtype, device=value.device)
                    held[key][place : place + count] = value
                place += count
                filled = max(filled, place)
        number += 1
        which = torch.randint(filled, (settings.batch,), generator=generator, device=settings.device)
        yield {key: value[which] for key, value in held.items()}


class Teacher:
    """The denoisers without a LoRA, with guidance. What goes on from the steps of a `student` is half of its clips."""

    def __init__(self, name: str, settings: Settings, student: Callable[[Batch], Tensor] | None = None) -> None:
        turbo = TURBOS[name]
        self.student = student
        self.conditioning = STAGES[turbo.denoiser].conditioning
        self.null = Prompts(settings)([NEGATIVE_PROMPT])
        denoiser = turbo.denoiser
        two = denoiser != "dit5b"
        self.levels = [level for level in SIGMAS[:-1] if not two or (level >= BOUNDARY) == (denoiser == "dit14b_high")]
        self.low = opened("dit14b_low" if two else denoiser, settings)
        self.high = opened("dit14b_high", settings) if two else self.low

    @torch.no_grad()
    def pairs(self, clips: Batch, generator: torch.Generator) -> Iterator[Batch]:
        """For each of the LoRA's levels, the latents there and the mean flow to the next level, from fresh noise."""
        beside = {key: clips[key] for key in ("known", "count", "text")}
        latents = torch.randn(clips["latents"].shape, generator=generator, device=generator.device)
        for start, end in zip(SIGMAS, SIGMAS[1:], strict=False):
            if start < min(self.levels):
                return
            moved = self._go(latents, start, end, beside)
            if start in self.levels:
                sigma = torch.full((len(latents),), start, device=latents.device)
                at = {"latents": latents, "sigma": sigma, **beside}
                yield at | {"flow": (moved - latents) / (end - start)}
                if self.student is not None:
                    itself = torch.rand(len(latents), generator=generator, device=generator.device) < ITSELF
                    moved = torch.where(
                        itself[:, None, None, None, None], latents + (end - start) * self.student(at), moved
                    )
            latents = moved

    def _go(self, latents: Tensor, start: float, end: float, beside: Batch) -> Tensor:
        """From one noise level to another by the midpoint rule."""
        levels = torch.linspace(start, end, 1 + math.ceil((start - end) / FINEST)).tolist()
        for now, then in zip(levels, levels[1:], strict=False):
            between = (now + then) / 2
            middle = latents + (between - now) * self._flow(latents, now, beside)
            latents = latents + (then - now) * self._flow(middle, between, beside)
        return latents

    def _flow(self, latents: Tensor, level: float, beside: Batch) -> Tensor:
        count = len(latents)
        batch = {
            "known": beside["known"].repeat(2, 1, 1, 1, 1),
            "count": beside["count"].repeat(2),
            "text": torch.cat([beside["text"], self.null.expand_as(beside["text"])]),
        }
        sigma = torch.full((2 * count,), level, device=latents.device)
        model = self.high if level >= BOUNDARY else self.low
        told, untold = self.conditioning.flow(model, latents.repeat(2, 1, 1, 1, 1), sigma, batch)[0].chunk(2)
        return untold + GUIDANCE * (told - untold)


def write_loras(runs: Path, folder: Path) -> list[Path]:
    """The LoRAs that are trained, as files of users are."""
    made = []
    for name, turbo in TURBOS.items():
        if not (runs / f"{name}.pt").is_file():
            continue
        tensors: dict[str, Tensor] = {}
        for key, value in load(runs / f"{name}.pt")["weights"].items():
            layer, _, factor = key.rpartition(".")
            official = layer.replace("/", ".")
            tensors[f"{official}.lora_{factor}.weight"] = value.to(torch.float8_e4m3fn)
            tensors[f"{official}.alpha"] = torch.tensor(turbo.rank * SCALE)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / turbo.file, {"format": "pt"})
        made.append(folder / turbo.file)
    return made


def read_loras(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Stage and factors of each LoRA in that folder, as `write_loras` left it."""
    for name, turbo in TURBOS.items():
        if (folder / turbo.file).is_file():
            stored = load_file(folder / turbo.file)
            factors = {key: value for key, value in stored.items() if not key.endswith(".alpha")}
            by_layer = {key: key.rpartition(".lora_") for key in factors}
            yield (
                name,
                {
                    f"{layer.replace('.', '/')}.{factor.removesuffix('.weight')}": factors[key].float()
                    for key, (layer, _, factor) in by_layer.items()
                },
            )
