"""Where models live and how they run: device, dtype, offload. No other module moves a model."""

from __future__ import annotations

import gc
import logging
import resource
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from wan.errors import UserError

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Placement:
    """Models run on `device`. With `offload`, only the model in use is there; the others wait in host memory.

    `room`: bytes that the weights of one model may take there. Of a model with more, as many of its `layers` (a
    ModuleList) as fit stay there while it is used; the others come one by one, each while the one before computes. For
    that the model calls its `before_layer`, when that is not None, with a layer's number before it uses the layer.
    """

    device: torch.device
    offload: bool = True
    room: int | None = None

    @contextmanager
    def on_device(self, model: Model, device: torch.device | None = None) -> Iterator[Model]:
        """The model on its device for the time of the block, back in host memory afterwards when offloading.

        Offloading keeps the host copy and drops the one on the GPU: weights do not change, and copying them back
        takes longer than bringing them (27 GiB for an A14B expert).
        """
        home = device or self.device
        if not self.offload or (home.type == "cpu" and self.room is None):
            yield model.to(home)
            return
        model.to("cpu")
        layered: Any = model
        staying = self._layers_that_stay(layered)
        coming = {n: layer for n, layer in enumerate(getattr(model, "layers", ())) if n not in staying}
        later = {id(tensor) for layer in coming.values() for tensor in _tensors(layer)}
        waiting = [(tensor, tensor.data) for tensor in _tensors(model) if id(tensor) not in later]
        feed = None
        try:
            if coming:
                layered.before_layer = feed = _Feed(coming, home)
            for tensor, host in waiting:
                tensor.data = host.to(home)
            yield model
        finally:  # also when the body raises: what is left behind would take the next model's memory
            if feed is not None:
                feed.close()
                layered.before_layer = feed = None
            for tensor, host in waiting:
                tensor.data = host
            release_memory(home)

    def _layers_that_stay(self, model: Any) -> range | frozenset[int]:
        """The layers that fit beside the rest of the model, spread evenly. Raises UserError where not even two do."""
        layers = getattr(model, "layers", ())
        size = sum(tensor.nbytes for tensor in _tensors(model))
        each = max((sum(tensor.nbytes for tensor in _tensors(layer)) for layer in layers), default=0)
        count = len(layers)
        stay = layers_that_stay(size, each, count, self.room)
        if stay < 0:
            least, left = (size - (count - SLOTS) * each) / 2**30, max(0, self.room or 0) / 2**30
            name = type(model).__name__
            raise UserError(
                f"{name} needs {least:.1f} GiB even layer by layer, {left:.1f} are left; make smaller clips"
            )
        if stay == count:
            return range(count)
        return frozenset(number for number in range(count) if number * stay // count != (number + 1) * stay // count)


def move_home(model: nn.Module) -> None:
    """Let a model wait in host memory."""
    model.to("cpu")


def bytes_on(model: nn.Module, device: torch.device) -> int:
    """What a model takes of a device now."""
    return sum(tensor.nbytes for tensor in _tensors(model) if same_device(tensor.device, device))


SLOTS = 2  # layers that are on the GPU while layers come one by one: one is used, one arrives


def layers_that_stay(weights: int, layer: int, count: int, room: int | None) -> int:
    """How many of a model's `count` layers can stay on a GPU with so much room; below 0: it is too small for any."""
    if room is None or weights <= room or not count:
        return count
    return (room - (weights - count * layer)) // layer - SLOTS


class _Feed:
    """Brings layers to a GPU one by one: called before one is used, it has it there and fetches the one after it."""

    def __init__(self, layers: Mapping[int, nn.Module], device: torch.device) -> None:
        self.device = device
        self.layers = {number: _Layer.of(layer) for number, layer in layers.items()}
        self.after = dict(zip(layers, [*list(layers)[1:], next(iter(layers))], strict=True))
        largest = max(layer.host.nbytes for layer in self.layers.values())
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        on_gpu = device.type == "cuda"
        self.copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.arrived = [torch.cuda.Event() for _ in range(SLOTS if on_gpu else 0)]  # type: ignore[no-untyped-call]
        self.slot = 0
        self.current: int | None = None
        self.fetched = next(iter(layers))
        self._fetch(self.fetched)

    def __call__(self, number: int) -> None:
        if number not in self.layers or number == self.current:
            return
        if number != self.fetched:  # a cache has left layers out
            self._fetch(number)
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[self.slot])
        self.layers[number].use(self.slots[self.slot])
        if self.current is not None:
            self.layers[self.current].use(self.layers[self.current].host)
        self.current = number
        self.slot = (self.slot + 1) % SLOTS
        self._fetch(self.after[number])

    def close(self) -> None:
        """Leave all layers in host memory."""
        synchronize(self.device)  # copies that nothing waited for
        if self.current is not None:
            self.layers[self.current].use(self.layers[self.current].host)

    def _fetch(self, number: int) -> None:
        """Copy a layer into the next slot, once what computes with that slot is done."""
        host, self.fetched = self.layers[number].host, number
        there = self.slots[self.slot][: len(host)]
        if self.copies is None:
            there.copy_(host)
            return
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            there.copy_(host, non_blocking=True)
            self.arrived[self.slot].record(self.copies)


class _Layer:
    """A layer whose tensors lie in one piece of host memory, which is locked so that a GPU copies from it by itself."""

    ALIGNED, PAGE = 256, 4096
    known: ClassVar[weakref.WeakKeyDictionary[nn.Module, _Layer]] = weakref.WeakKeyDictionary()

    def __init__(self, layer: nn.Module) -> None:
        self.tensors = _tensors(layer)
        starts = [0]
        for tensor in self.tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // self.ALIGNED) * self.ALIGNED)
        self.starts = starts
        pages = -(-starts[-1] // self.PAGE) * self.PAGE
        memory = torch.empty(pages + self.PAGE, dtype=torch.uint8)
        self.host = memory[-memory.data_ptr() % self.PAGE :][:pages]  # a page that is locked has nothing else in it
        for tensor, view in zip(self.tensors, self.views(self.host), strict=True):
            view.copy_(tensor.data)
        self.use(self.host)
        self.places = [tensor.data_ptr() for tensor in self.tensors]
        if torch.cuda.is_available():
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(runtime.cudaHostRegister(self.host.data_ptr(), pages, 0)) == 0:
                weakref.finalize(self, _unlock, self.host)  # which keeps the memory until then
            else:
                log.warning("host memory cannot be locked, so that layers come to the GPU slowly; see ulimit -l")

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer:
        """The layer, put into one piece when that is new to it; a LoRA may have changed what it holds."""
        there = cls.known.get(layer)
        tensors = _tensors(layer)
        if there is None or [(id(t), t.data_ptr()) for t in tensors] != [
            (id(t), place) for t, place in zip(there.tensors, there.places, strict=True)
        ]:
            cls.known[layer] = there = cls(layer)
        return there

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in a piece of memory of this layout."""
        return [
            memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(self.starts, self.tensors, strict=False)
        ]

    def use(self, memory: Tensor) -> None:
        """Let the layer's tensors be those in a piece of memory."""
        for tensor, view in zip(self.tensors, self.views(memory), strict=True):
            tensor.data = view


def _unlock(host: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(host.data_ptr())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


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
