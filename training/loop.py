"""The training loop of all stages: a wall-clock budget, a checkpoint to resume from, an average of the weights."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How long and how fast one stage trains. `minutes` is wall clock; `steps` ends it earlier."""

    folder: Path
    device: torch.device
    minutes: float
    batch: int
    rate: float
    seed: int = 0
    steps: int = 1 << 40
    frames: int | None = None  # of the clips that a VAE trains on; None: as many as the models make
    decoder_only: bool = False  # a VAE keeps its latents
    warm_up: int = 200
    average: float = 0.998
    graph: bool = True  # on a GPU: forward and backward as one CUDA graph
    compiler: str | None = None  # the back end of torch.compile for a denoiser's blocks
    save_every: float = math.inf  # seconds; what `finish` adds is for the last checkpoint only

    def generator(self, step: int) -> torch.Generator:
        """Random numbers that a resumed run does not draw again."""
        low = (step + 0x9E3779B1 * self.seed) % (1 << 32)  # a CPU's generator looks at no more bits than these
        return torch.Generator(self.device).manual_seed((self.seed << 32) + low)


@dataclass
class Progress:
    """What a checkpoint holds beside the weights."""

    steps: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] | None = None


def save(path: Path, content: dict[str, Any]) -> None:
    """A checkpoint that is whole or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(content, part)
    part.replace(path)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def resume(name: str, model: nn.Module, settings: Settings) -> Progress:
    """The weights of the stage's checkpoint into the model, if there is one.

    Only the averaged weights are kept: the optimizer's moments would be twice their size, and come back in warm-up.
    """
    path = settings.folder / f"{name}.pt"
    if not path.is_file():
        return Progress()
    state = load(path, settings.device)
    model.load_state_dict(state["weights"])
    log.info("%s: resumed at step %d", name, state["steps"])
    return Progress(state["steps"], state["seconds"], [tuple(pair) for pair in state["losses"]])


def train(
    name: str,
    model: nn.Module,
    loss_of: Loss,
    batches: Iterator[Batch],
    settings: Settings,
    progress: Progress,
    finish: Callable[[], dict[str, Any]] = dict,
    in_fp8: Callable[[str, int], bool] = lambda name, dimensions: False,
) -> None:
    """Train until the budget is spent or SIGTERM comes, then save the averaged weights with what `finish` adds.

    At the end the model holds the averaged weights. The learning rate warms up and falls to nothing over the budget.
    Parameters of which `in_fp8(name, dimensions)` is true are rounded whenever the model computes, so that it learns
    to do with what will be stored; the optimizer works on them as they are.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    parameters = [value for _, value in named]
    weights = [  # what the optimizer changes
        nn.Parameter(value.detach().clone()) if in_fp8(name, value.ndim) else value for name, value in named
    ]

    @torch.no_grad()
    def round_weights() -> None:
        for weight, value in zip(weights, parameters, strict=True):
            if weight is not value:
                value.copy_(weight.to(torch.float8_e4m3fn))

    optimizer = torch.optim.AdamW(weights, settings.rate, (0.9, 0.98), fused=settings.device.type == "cuda")
    average = [value.detach().clone() for value in weights]
    round_weights()
    first = next(batches)
    if settings.device.type == "cuda" and settings.graph:
        step_of: Loss = Graphed(loss_of, first, parameters)
    else:
        step_of = Eager(loss_of, parameters)

    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    start = logged = saved = time.monotonic()
    losses, recent, done, batch = progress.losses or [], [], 0, first

    def checkpoint() -> dict[str, Any]:
        averaged = {id(value): mean for value, mean in zip(parameters, average, strict=True)}
        state = model.state_dict(keep_vars=True)
        return {
            "weights": {key: averaged.get(id(value), value).detach().cpu().clone() for key, value in state.items()},
            "steps": progress.steps + done,
            "seconds": progress.seconds + time.monotonic() - start,
            "losses": [list(pair) for pair in losses],
            "seed": settings.seed,
        }

    try:
        while not stopped and done < settings.steps:
            spent = (time.monotonic() - start) / (60 * settings.minutes)
            if spent >= 1:
                break
            share = max(spent, done / settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * min(1, (done + 1) / settings.warm_up) * _cosine(share)
            recent.append(step_of(batch).detach().clone())
            for weight, value in zip(weights, parameters, strict=True):
                weight.grad = value.grad
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            round_weights()
            done += 1
            # young averages follow faster, so that little remains of where they started
            torch._foreach_lerp_(average, list[Tensor](weights), 1 - min(settings.average, done / (done + 10)))
            if len(recent) == 50:  # also keeps the host from running far ahead of the GPU
                losses.append((progress.steps + done, float(torch.stack(recent).mean())))
                recent.clear()
                if time.monotonic() - logged > 15:
                    logged = time.monotonic()
                    speed = done / (logged - start)
                    log.info("%s: step %d loss %.5f, %.1f steps/s", name, *losses[-1], speed)
            if time.monotonic() - saved > settings.save_every:
                saved = time.monotonic()
                save(settings.folder / f"{name}.pt", checkpoint())
            batch = next(batches)
    finally:
        signal.signal(signal.SIGTERM, before)
    content = checkpoint()
    with torch.no_grad():
        torch._foreach_copy_(list[Tensor](parameters), average)
    content |= finish()
    save(settings.folder / f"{name}.pt", content)
    last = round(losses[-1][1], 5) if losses else None  # a run of less than 50 steps says nothing
    extra = {key: value for key, value in content.items() if isinstance(value, float)}
    log.info("%s: %s", name, json.dumps({"steps": content["steps"], "loss": last, **extra}))


class Eager:
    """Loss and gradients, kernel by kernel."""

    def __init__(self, loss_of: Loss, parameters: list[nn.Parameter]) -> None:
        self.loss_of, self.parameters = loss_of, parameters

    def __call__(self, batch: Batch) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss_of(batch)
        torch.autograd.backward(loss)
        return loss


class Graphed:
    """Loss and gradients as one CUDA graph: small models spend their time on launches otherwise.

    All batches must have the shapes of the first.
    """

    def __init__(self, loss_of: Loss, first: Batch, parameters: list[nn.Parameter]) -> None:
        self.inputs = {key: value.clone() for key, value in first.items()}
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

        def step() -> Tensor:
            torch._foreach_zero_(gradients)
            loss = loss_of(self.inputs)
            torch.autograd.backward(loss)
            return loss.detach()

        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compiles, tunes and allocates
                step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step()

    def __call__(self, batch: Batch) -> Tensor:
        for key, value in batch.items():
            self.inputs[key].copy_(value)
        self.graph.replay()
        return self.loss


def half_precision(device: torch.device) -> torch.autocast:
    """bf16 matrix products on a GPU; a CPU computes in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def _cosine(share: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * min(share, 1))
