"""Weights in pinned host memory, and layers that come to a GPU one by one, each while the one before computes."""

from __future__ import annotations

import functools
import logging
import mmap
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from queue import SimpleQueue
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wan.detail import tell_detail
from wan.device.hardware import synchronize
from wan.device.host import host_bytes
from wan.device.layers import SLOTS

log = logging.getLogger(__name__)


class LayerStreamer:
    """Brings a model's layers to a GPU: called before one is used, it has it there and fetches what is next.

    Layers that stay come once, each while the one before computes; the others take turns in a few slots.
    """

    def __init__(
        self,
        layers: Mapping[int, nn.Module],
        staying: Collection[int],
        device: torch.device,
        hold: Callable[[nn.Module, Sequence[Tensor]], HostTensors],
    ) -> None:
        self.layers, self.device, self.hold = layers, device, hold
        self.coming = [number for number in layers if number not in staying]
        sizes = {number: PinnedBuffer.size(tensors_of(layer)) for number, layer in layers.items()}
        self.staying = {number: _empty(sizes[number], device) for number in staying}
        largest = max((sizes[number] for number in self.coming), default=0)
        self.slots = [_empty(largest, device) for _ in range(SLOTS if self.coming else 0)]
        self.held: list[int | None] = [None] * len(self.slots)  # the layer in each slot
        self.here: dict[int, HostTensors] = {}
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
        if number + 1 in self.staying and number + 1 not in self.here:
            self._fetch(number + 1)
        if number in self.held:
            following = self.coming[(self.coming.index(number) + 1) % len(self.coming)]
            if following not in self.here:
                self._fetch(following, used=number)

    def close(self) -> None:
        """Leave all layers in host memory."""
        synchronize(self.device)  # copies that nothing waited for
        for layer in self.here.values():
            layer.go_home()

    def _fetch(self, number: int, used: int | None = None) -> None:
        """Copy a layer to its own place, or to a slot other than that of the layer which is used next."""
        layer = self.hold(self.layers[number], tensors_of(self.layers[number]))
        buffer = self.staying.get(number)
        if buffer is None:
            slot = next(slot for slot, held in enumerate(self.held) if held is None or held != used)
            buffer, before = self.slots[slot], self.held[slot]
            if before is not None:
                self.here.pop(before).go_home()
                self.arriving.pop(before, None)
            self.held[slot] = number
            if self.copies is not None:  # what computes with that slot has to be done
                self.copies.wait_stream(torch.cuda.current_stream(self.device))
        buffer = buffer[: layer.size(layer.tensors)]
        if self.copies is None:
            layer.copy_to(buffer)
        else:
            with torch.cuda.stream(self.copies):
                layer.copy_to(buffer)
                self.arriving[number] = self.copies.record_event()
        layer.use(buffer)
        self.here[number] = layer


def _empty(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


class HostTensors(ABC):
    """A module's tensors in host memory, which can be used in a buffer of one layout elsewhere."""

    ALIGNED, PAGE = 256, 4096

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.starts = self.starts_of(tensors)
        self.layouts = [_layout(tensor) for tensor in tensors]

    @abstractmethod
    def copy_to(self, buffer: Tensor) -> None:
        """Copy them to a buffer, without waiting where that can be."""

    @abstractmethod
    def go_home(self) -> None:
        """Let the tensors be those in host memory."""

    def on(self, device: torch.device) -> Tensor:
        """A new buffer with them on a device."""
        buffer = _empty(self.size(self.tensors), device)
        self.copy_to(buffer)
        return buffer

    @classmethod
    def starts_of(cls, tensors: Sequence[Tensor]) -> list[int]:
        """Where each tensor begins in the buffer, and where the last one ends."""
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // cls.ALIGNED) * cls.ALIGNED)
        return starts

    @classmethod
    def size(cls, tensors: Sequence[Tensor]) -> int:
        """Bytes of such a buffer: whole pages."""
        return -(-cls.starts_of(tensors)[-1] // cls.PAGE) * cls.PAGE

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in a buffer of this layout."""
        return _views(memory, self.tensors, self.starts, self.layouts)

    def use(self, memory: Tensor) -> None:
        """Let the tensors be those in a buffer."""
        for tensor, view in zip(self.tensors, self.views(memory), strict=True):
            tensor.data = view


class MappedTensors(HostTensors):
    """A module's tensors as they lie, in mapped files for instance; each copy reads them there."""

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.home = [tensor.data for tensor in tensors]

    def copy_to(self, buffer: Tensor) -> None:
        for view, tensor in zip(self.views(buffer), self.home, strict=True):
            view.copy_(tensor, non_blocking=True)

    def go_home(self) -> None:
        for tensor, home in zip(self.tensors, self.home, strict=True):
            tensor.data = home


class PinnedBuffer(HostTensors):
    """A module's tensors in one pinned host buffer, for asynchronous copies."""

    known: ClassVar[weakref.WeakKeyDictionary[nn.Module, PinnedBuffer]] = weakref.WeakKeyDictionary()

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        in_place = self._in_place()
        self.host = self._gathered() if in_place is None else in_place
        self.places = [tensor.data_ptr() for tensor in tensors]
        _pin_for(self, self.host)

    def copy_to(self, buffer: Tensor) -> None:
        buffer.copy_(self.host, non_blocking=True)

    def go_home(self) -> None:
        self.use(self.host)

    def _gathered(self) -> Tensor:
        host = self.memory(self.tensors)
        for tensor, view in zip(self.tensors, self.views(host), strict=True):
            view.copy_(tensor.data)
        self.use(host)
        return host

    def _in_place(self) -> Tensor | None:
        """The buffer that the tensors lie in already, see `in_one_buffer`."""
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
        """Host memory for such a buffer: a pinned page has nothing else in it."""
        return _pages(cls.size(tensors))

    @classmethod
    def of(cls, module: nn.Module, tensors: Sequence[Tensor]) -> PinnedBuffer:
        """The buffer of a module's tensors, made when they lie elsewhere; a LoRA may have replaced some."""
        known = cls.known.get(module)
        if known is None or [(id(t), t.data_ptr()) for t in tensors] != [
            (id(t), place) for t, place in zip(known.tensors, known.places, strict=True)
        ]:
            cls.known[module] = known = cls(tensors)
        return known


class PinnedStage:
    """Host memory that tensors pass through, one at a time, on their way to a GPU or back; pinned where it can be."""

    def __init__(self, size: int = 0) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], object] = lambda: None
        self.like(torch.empty(size, device="meta"), torch.uint8)

    def like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """An empty tensor of this shape; the one before lies there too, and has to have passed."""
        size = tensor.numel() * dtype.itemsize
        if size > len(self._memory):
            self._unpin()
            self._memory = _pages(-(-size // HostTensors.PAGE) * HostTensors.PAGE)
            self._unpin = _pin_for(self, self._memory)
        return self._memory[:size].view(dtype).view(tensor.shape)


class RoundTrip:
    """The way of tensors from host memory to a device and back, one at a time, through pinned memory.

    From other memory, and to it, a GPU copies at a fraction of the rate.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stages = None if device.type == "cpu" else (PinnedStage(), PinnedStage())

    def go(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in this dtype on the device; the one before must have been computed with."""
        if self._stages is not None and tensor.device.type == "cpu":
            tensor = self._stages[0].like(tensor, dtype).copy_(tensor)
        return tensor.to(self.device, non_blocking=True).to(dtype)

    def back(self, tensor: Tensor) -> Tensor:
        """A tensor of the device in host memory, until the next one is; waits for the device."""
        if self._stages is not None:
            tensor = self._stages[1].like(tensor, tensor.dtype).copy_(tensor, non_blocking=True)
            synchronize(self.device)
        return tensor.cpu()


PIECE, THREADS = 16 * 2**20, 8  # bytes that a thread copies at a time, and threads: one has a fraction of a GPU's rate


def move_in_pieces(module: nn.Module, device: torch.device) -> None:
    """Move a module out of host memory, or of the files that it is mapped from, to a device through pinned memory.

    Its tensors have no gaps there. After an error it is of no use.
    """
    stages: SimpleQueue[PinnedStage] = SimpleQueue()
    for _ in range(THREADS):
        stages.put(PinnedStage(PIECE))
    # the one that the memory for the tensors is of
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @torch.inference_mode()  # a thread does not know whether its caller is in it
    def copy(source: Tensor, target: Tensor) -> int:
        stage = stages.get()
        try:
            with torch.cuda.stream(stream):
                target.copy_(stage.like(source, source.dtype).copy_(source))  # waits until it is there
        finally:
            stages.put(stage)
        return len(source)

    tensors, copies = tensors_of(module), list[Future[int]]()
    size, done = sum(tensor.nbytes for tensor in tensors), 0
    with ThreadPoolExecutor(THREADS, "weights") as threads:
        for tensor in tensors:
            here = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            pieces = (torch.split(one.reshape(-1).view(torch.uint8), PIECE) for one in (tensor.data, here))
            copies += map(threads.submit, repeat(copy), *pieces)
            tensor.data = here
        try:
            for one in copies:
                done += one.result()
                tell_detail(f"{done / 1e9:.1f} of {size / 1e9:.1f} GB")
        finally:
            threads.shutdown(cancel_futures=True)  # after an error no more of many GB


def in_one_buffer(tensors: Sequence[Tensor], memory: Tensor | None = None) -> list[Tensor]:
    """Empty tensors like these (on any device) in one host buffer, so that `Placement` need not copy them.

    `memory`: as many whole pages as `PinnedBuffer.size` says, instead of new ones.
    """
    layouts = [_layout(tensor) for tensor in tensors]
    memory = PinnedBuffer.memory(tensors) if memory is None else memory
    return _views(memory, tensors, PinnedBuffer.starts_of(tensors), layouts)


def _pages(size: int) -> Tensor:
    """Bytes of host memory from the beginning of a page; large pages where there are some (benchmarks/LOG.md)."""
    if sys.platform == "linux" and size:
        try:
            pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:  # which would read as one of a file
            raise MemoryError(f"no {size} bytes of host memory: {error.strerror}") from error
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8)
    memory = torch.empty(size + HostTensors.PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % HostTensors.PAGE :][:size]


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


# Pinned memory cannot be swapped out. Where models fill the host's memory, the rest of them stays as it is.
PINNED_SHARE = 0.7
_pinned: dict[int, int] = {}  # the bytes of each tensor that is pinned or about to be, by its id
_counting = threading.Lock()  # of those that pin; `_unpin` runs wherever garbage is collected, and must not wait for it


def _pin(host: Tensor) -> bool:
    """Pin whole pages of host memory for a GPU, if there is one and memory to spare."""
    if not torch.cuda.is_available():
        return False
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with _counting:
        if sum(list(_pinned.values())) + host.nbytes > PINNED_SHARE * host_bytes():
            return False
        _pinned[id(host)] = host.nbytes
    if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)) != 0:
        del _pinned[id(host)]
        _say_that_copies_are_slow()
        return False
    return True


@functools.cache
def _say_that_copies_are_slow() -> None:
    log.warning("host memory cannot be pinned, so weights come to the GPU slowly; see ulimit -l")


def _pin_for(owner: object, host: Tensor) -> Callable[[], object]:
    """Pin host memory, if that can be, until its owner is gone or what this returns is called."""
    if not _pin(host):
        return lambda: None
    unpin = weakref.finalize(owner, _unpin, host)  # it keeps the memory until then
    unpin.atexit = False
    return unpin


def _unpin(host: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(host.data_ptr())
    del _pinned[id(host)]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]
