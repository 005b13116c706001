"""Where models live and how they run: device, dtype, offload. No other module moves a model."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from wan.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Placement:
    """Models run on `device`. With `offload`, only the model in use is there; the others wait in host memory."""

    device: torch.device
    offload: bool = True

    @contextmanager
    def on_device(self, model: Model, device: torch.device | None = None) -> Iterator[Model]:
        """The model on its device for the time of the block, back in host memory afterwards when offloading.

        Offloading keeps the host copy and drops the one on the GPU: weights do not change, and copying them back
        takes longer than bringing them (27 GiB for an A14B expert).
        """
        home = device or self.device
        if not self.offload or home.type == "cpu":
            yield model.to(home)
            return
        model.to("cpu")
        waiting = [(tensor, tensor.data) for tensor in chain(model.parameters(), model.buffers())]
        try:
            for tensor, host in waiting:
                tensor.data = host.to(home)
            yield model
        finally:  # also when the body raises: what is left behind would take the next model's memory
            for tensor, host in waiting:
                tensor.data = host
            release_memory(home)


def main_device(device_id: int = 0) -> torch.device:
    """The GPU `device_id`, or the CPU on a machine without CUDA. Raises UserError for a GPU that is not there."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return parse_device(f"cuda:{device_id}")


def parse_device(name: str) -> torch.device:
    """A device by name, checked to exist. Raises UserError."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not one; use cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device {name!r} is not there: {count} CUDA device(s) found")
    elif device.type != "cpu":
        raise UserError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    return device


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices share their memory; `cuda` is `cuda:0` here."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def release_memory(device: torch.device) -> None:
    """Hand freed memory of a GPU back, so that another model or process can have it."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement for `peak_gib`."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # there are no statistics of a GPU that nothing has touched yet
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The most GPU memory that was allocated since `reset_peak`, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def host_peak_gib() -> float:
    """The most host memory this process has had resident, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """The seeded noise source on the model's device: a CPU generator would give another video than the official one."""
    return torch.Generator(device).manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
