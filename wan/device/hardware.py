"""The devices of this machine: which there are, what memory they have, and waiting for them."""

from __future__ import annotations

import gc
import importlib.util
import os
import resource
import sys

import torch

from wan.errors import UserError


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
    """Hand freed memory of a GPU back, also what only the garbage collector finds, which takes it 0.2 s."""
    gc.collect()
    drop_cache(device)


def drop_cache(device: torch.device) -> None:
    """Hand freed memory of a GPU back, so that another model or process can have it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def free_bytes(device: torch.device, budget: int | None = None) -> int:
    """What tensors may still take of a GPU, or of a budget for them there if that is less."""
    taken = torch.cuda.memory_allocated(device)
    free = int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device) - taken
    return free if budget is None else min(free, budget - taken)


def grow_segments() -> None:
    """Let the allocator join pages into pieces of any size, so that little is lost between tensors.

    Without it a twelfth of a budget was reserved but could not be used (benchmarks/LOG.md).
    """
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # the older name warns where this one is
    (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement for `peak_gib`."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # there are no statistics of a GPU that nothing has touched yet
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The most GPU memory that was allocated since `reset_peak`, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def host_bytes() -> int:
    """The host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_peak_gib() -> float:
    """The most host memory this process has had resident, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def runs_triton(device: torch.device) -> bool:
    """Whether our kernels can run there: Triton comes with PyTorch for CUDA, on Linux."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """The seeded noise source on the model's device: a CPU generator would give another video than the official one."""
    return torch.Generator(device).manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
