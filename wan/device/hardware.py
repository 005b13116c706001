"""The devices of this machine: which there are, what memory they have, and waiting for them."""

from __future__ import annotations

import gc
import importlib.util
import logging

import torch

from wan.device.host import AMDS, NVIDIAS, has_driver
from wan.errors import UserError

log = logging.getLogger(__name__)


def main_device(device_id: int = 0) -> torch.device:
    """The GPU `device_id`, NVIDIA's or AMD's, or the CPU on a machine without. Raises UserError for one not there.

    Where there is another GPU, a warning says that it is not used.
    """
    if not torch.cuda.is_available():
        if unused := unused_gpu():
            log.warning("%s is there and not used: the models run on the CPU, which is slow. %s", *unused)
        return torch.device("cpu")
    return parse_device(f"cuda:{device_id}")


def unused_gpu() -> tuple[str, str] | None:
    """A GPU that the models do not run on, and why, in words for the user."""
    if torch.backends.mps.is_available():
        return "Apple's GPU", "PyTorch has no float64 there, which the models need; `vlm_device` mps is accepted"
    if torch.version.cuda is None and torch.version.hip is None:
        for gpu, libraries, kind in (("an NVIDIA GPU", NVIDIAS, "CUDA"), ("an AMD GPU", AMDS, "ROCm")):
            if has_driver(*libraries):
                return gpu, f"This PyTorch is built for CPUs: install one for {kind}, see pytorch.org"
    return None


def parse_device(name: str) -> torch.device:
    """A device by name, checked to exist. Raises UserError."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not one; use {_DEVICES}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device {name!r} is not there: {count} CUDA device(s) found")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"device {name!r} is not there: this is no Mac with a GPU that PyTorch can use")
    elif device.type != "cpu":
        raise UserError(f"device {name!r} is not supported; use {_DEVICES}")
    return device


_DEVICES = "cpu, cuda or cuda:N (also for AMD), or mps for a VLM on a Mac"


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
    elif device.type == "mps":
        torch.mps.empty_cache()


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


def total_bytes(device: torch.device) -> int:
    """The memory of a GPU."""
    return int(torch.cuda.mem_get_info(device)[1])


def hold_to(device: torch.device, limit: int) -> None:
    """Let the allocator take no more bytes of a GPU than this; before it fails, it gives back what it does not use."""
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, limit / total_bytes(device))), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had too little memory; libraries beside PyTorch's allocator say so in words."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "cuda" in message and "out of memory" in message
    )


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement for `peak_gib`."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # there are no statistics of a GPU that nothing has touched yet
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The most GPU memory that was allocated since `reset_peak`, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


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
