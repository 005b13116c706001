"""Where models live and how they run: device, dtype, offload. No other module moves a model."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
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
        layers = dict(enumerate(getattr(model, "layers", ())))
        fed = {id(tensor) for layer in layers.values() for tensor in _tensors(layer)}
        staying = self._layers_that_stay(layered)
        rest = _Piece.of(model, [tensor for tensor in _tensors(model) if id(tensor) not in fed])
        feed = None
        try:
            rest.use(rest.host.to(home, copy=True))
            if layers:
                layered.before_layer = feed = _Feed(layers, staying, home)
            yield model
        finally:  # also when the body raises: what is left behind would take the next model's memory
            if feed is not None:
                feed.close()
                layered.before_layer = feed = None
            rest.use(rest.host)
            drop_cache(home)

    def streams(self, model: nn.Module) -> bool:
        """Whether layers of the model come to the device again in every pass."""
        return self.offload and len(self._layers_that_stay(model)) < len(getattr(model, "layers", ()))

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
    """Brings a model's layers to a GPU: called before one is used, it has it there and fetches what is next.

    Layers that stay come once, each while the one before computes; the others take turns in a few slots.
    """

    def __init__(self, layers: Mapping[int, nn.Module], staying: Collection[int], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.coming = [number for number in layers if number not in staying]
        sizes = {number: _Piece.size(_tensors(layer)) for number, layer in layers.items()}
        self.own = {number: _empty(sizes[number], device) for number in staying}
        largest = max((sizes[number] for number in self.coming), default=0)
        self.slots = [_empty(largest, device) for _ in range(SLOTS if self.coming else 0)]
        self.held: list[int | None] = [None] * len(self.slots)  # the layer in each slot
        self.here: dict[int, _Piece] = {}
        self.arriving: dict[int, torch.cuda.Event] = {}
        self.copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.copies.wait_stream(torch.cuda.current_stream(device))  # what had this memory before may still compute
        for number in sorted({0, *self.coming[:1]}):
            self._fetch(number)

    def __call__(self, number: int) -> None:
        if number not in self.here:  # a cache has left layers out
            self._fetch(number)
        arrived = self.arriving.pop(number, None)
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        if number + 1 in self.own and number + 1 not in self.here:
            self._fetch(number + 1)
        if number in self.held:
            following = self.coming[(self.coming.index(number) + 1) % len(self.coming)]
            if following not in self.here:
                self._fetch(following, used=number)

    def close(self) -> None:
        """Leave all layers in host memory."""
        synchronize(self.device)  # copies that nothing waited for
        for layer in self.here.values():
            layer.use(layer.host)

    def _fetch(self, number: int, used: int | None = None) -> None:
        """Copy a layer to its own place, or to a slot other than that of the layer which is used next."""
        layer = _Piece.of(self.layers[number], _tensors(self.layers[number]))
        there = self.own.get(number)
        if there is None:
            slot = next(slot for slot, held in enumerate(self.held) if held is None or held != used)
            there, before = self.slots[slot], self.held[slot]
            if before is not None:
                self.here[before].use(self.here.pop(before).host)
                self.arriving.pop(before, None)
            self.held[slot] = number
            if self.copies is not None:  # what computes with that slot has to be done
                self.copies.wait_stream(torch.cuda.current_stream(self.device))
        there = there[: len(layer.host)]
        if self.copies is None:
            there.copy_(layer.host)
        else:
            with torch.cuda.stream(self.copies):
                there.copy_(layer.host, non_blocking=True)
                self.arriving[number] = self.copies.record_event()
        layer.use(there)
        self.here[number] = layer


def _empty(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


class _Piece:
    """Tensors of a module in one piece of host memory, which is locked so that a GPU copies from it by itself."""

    ALIGNED, PAGE = 256, 4096
    known: ClassVar[weakref.WeakKeyDictionary[nn.Module, _Piece]] = weakref.WeakKeyDictionary()

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.starts = self.starts_of(tensors)
        self.layouts = [_layout(tensor) for tensor in tensors]
        there = self._found()
        self.host = self._gathered() if there is None else there
        self.places = [tensor.data_ptr() for tensor in tensors]
        if _lock(self.host):
            weakref.finalize(self, _unlock, self.host).atexit = False  # it keeps the memory until then

    def _gathered(self) -> Tensor:
        host = self.memory(self.tensors)
        for tensor, view in zip(self.tensors, self.views(host), strict=True):
            view.copy_(tensor.data)
        self.use(host)
        return host

    def _found(self) -> Tensor | None:
        """The piece that the tensors lie in already, see `in_one_piece`."""
        if not self.tensors:
            return None
        storage, first = self.tensors[0].untyped_storage(), self.tensors[0].data_ptr()
        begin, size = first - storage.data_ptr(), self.size(self.tensors)
        if first % self.PAGE or begin + size > storage.nbytes() or self.tensors[0].device.type != "cpu":
            return None
        for tensor, start, layout in zip(self.tensors, self.starts, self.layouts, strict=False):
            if tensor.data_ptr() != first + start or tuple(tensor.stride()) != tuple(layout):
                return None
        return torch.empty(0, dtype=torch.uint8).set_(storage, begin, (size,))  # type: ignore[call-overload,no-any-return]

    @classmethod
    def memory(cls, tensors: Sequence[Tensor]) -> Tensor:
        """Host memory for such a piece: a page that is locked has nothing else in it."""
        memory = torch.empty(cls.size(tensors) + cls.PAGE, dtype=torch.uint8)
        return memory[-memory.data_ptr() % cls.PAGE :][: cls.size(tensors)]

    @classmethod
    def of(cls, module: nn.Module, tensors: Sequence[Tensor]) -> _Piece:
        """The tensors of a module, put into one piece when they are not; a LoRA may have changed what they are."""
        there = cls.known.get(module)
        if there is None or [(id(t), t.data_ptr()) for t in tensors] != [
            (id(t), place) for t, place in zip(there.tensors, there.places, strict=True)
        ]:
            cls.known[module] = there = cls(tensors)
        return there

    @classmethod
    def starts_of(cls, tensors: Sequence[Tensor]) -> list[int]:
        """Where each tensor begins in the piece, and where the last one ends."""
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // cls.ALIGNED) * cls.ALIGNED)
        return starts

    @classmethod
    def size(cls, tensors: Sequence[Tensor]) -> int:
        """Bytes of such a piece: whole pages."""
        return -(-cls.starts_of(tensors)[-1] // cls.PAGE) * cls.PAGE

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in a piece of memory of this layout."""
        return _views(memory, self.tensors, self.starts, self.layouts)

    def use(self, memory: Tensor) -> None:
        """Let the tensors be those in a piece of memory."""
        for tensor, view in zip(self.tensors, self.views(memory), strict=True):
            tensor.data = view


def in_one_piece(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Empty tensors like these (on any device) in one piece of host memory, so that `Placement` need not copy them."""
    layouts = [_layout(tensor) for tensor in tensors]
    return _views(_Piece.memory(tensors), tensors, _Piece.starts_of(tensors), layouts)


def _views(
    memory: Tensor, like: Sequence[Tensor], starts: Sequence[int], layouts: Sequence[Sequence[int]]
) -> list[Tensor]:
    return [
        memory[start : start + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, layout)
        for start, tensor, layout in zip(starts, like, layouts, strict=False)
    ]


def _layout(tensor: Tensor) -> Sequence[int]:
    """The strides of a tensor with no gaps: weights of convolutions lie channels last."""
    return torch.empty_like(tensor, device="meta").stride()  # it has those of a tensor that has no gaps


# Locked memory cannot be swapped out. Where models fill the host's memory, the rest of them stays as it is.
LOCKED_SHARE = 0.7
_locked = {"bytes": 0, "said": 0}


def _lock(host: Tensor) -> bool:
    """Lock whole pages of host memory for a GPU, if there is one and memory to spare."""
    if not torch.cuda.is_available():
        return False
    if _locked["bytes"] + host.nbytes > LOCKED_SHARE * host_bytes():
        return False
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)) != 0:
        if not _locked["said"]:
            log.warning("host memory cannot be locked, so that weights come to the GPU slowly; see ulimit -l")
        _locked["said"] = 1
        return False
    _locked["bytes"] += host.nbytes
    return True


def _unlock(host: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(host.data_ptr())
    _locked["bytes"] -= host.nbytes


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


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """The seeded noise source on the model's device: a CPU generator would give another video than the official one."""
    return torch.Generator(device).manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
