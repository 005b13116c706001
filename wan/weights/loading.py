"""The tensors of a checkpoint -> the parameters of a module: whether they fit, are damaged, and where they wait."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn

from wan.device import sharding
from wan.device.shared import CommonMemory, SharedMemory
from wan.device.streaming import PinnedBuffer, in_one_buffer
from wan.errors import UserError
from wan.weights.quantized import FLOAT8, PIECE, QuantizedLinear, QuantizedTensor, dequantize
from wan.weights.tensors import Weights, check_shapes


class Lower(Protocol):
    """Makes linear layers with weights in fewer bits."""

    def takes(self, name: str) -> bool:
        """Whether it makes one of the linear layer of this name."""

    def __call__(self, layer: nn.Linear, numbers: Tensor) -> nn.Linear:
        """What takes the place of a layer, with its weight, whose numbers are those [out, in] of a file."""


def check_fit(model: nn.Module, weights: Weights, source_of: Mapping[str, str]) -> None:
    """Raise UserError for missing and extra keys and for wrong shapes; no tensor is read."""
    check_shapes({name: tuple(value.shape) for name, value in model.state_dict().items()}, weights, source_of)


def load_into(
    model: nn.Module,
    weights: Weights,
    source_of: Mapping[str, str],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    *,
    rounding: torch.dtype | None = None,
    stays_quantized: Callable[[str], bool] = lambda name: False,
    layers: str = "",
    mapped: bool = False,
    shared: SharedMemory | CommonMemory | None = None,
    lower: Lower | None = None,
) -> None:
    """Put the weights into a model that was built without memory, tensor by tensor, straight in their final dtype.

    `source_of` maps each parameter of the model to its key in the files, `dtype_of` says its dtype. `rounding` rounds
    every value through that dtype first. What is quantized in the file is expanded, but for the weights of
    linear layers that `stays_quantized` names. Each of the modules in the list `layers` gets one host buffer, as
    offloading wants it; `mapped` leaves in the file instead what it holds in its final dtype. `lower` makes layers with
    weights in fewer bits, one by one in a thread, while the next weight is read. Host memory never holds more than the
    model and one file; those buffers are in `shared`, where that can be had. All processes of a team that have one call
    this; the `done` of what strangers have in common is the caller's. Of a model of slices (`wan.device.sharding`) only
    those are read, and all of it is expanded. Raises UserError for missing and extra keys and for wrong shapes.
    """
    check_fit(model, weights, source_of)
    name_of: dict[str, str] = {}
    for name, key in source_of.items():
        name_of.setdefault(key, name)  # a tied tensor has two names; the caller ties the second
    mapped = mapped and device.type == "cpu" and rounding is None
    likes = _likes(model, layers, dtype_of) if layers and device.type == "cpu" and not mapped else []
    size = sum(PinnedBuffer.size(list(like.values())) for like in likes)
    shared = shared if size else None
    if shared is not None:
        shared.open(size)
    places = _places(likes, None if shared is None else shared.memory)
    waits = set() if shared is None or shared.memory is None or shared.fills else set(places)
    blocks = _Blocks()
    with _Behind() as behind:
        for key, tensor in weights.tensors():
            name = name_of[key]
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            sliced = sharding.slice_of(module._parameters.get(leaf))
            if sliced is not None:
                tensor = dequantize(tensor).view(weights.shapes[key])[sliced.rows]
            seen = name in waits and isinstance(tensor, Tensor)  # by the first process, which reads it
            if not seen and not blocks.see(name, tensor):
                raise UserError(
                    f"{weights.place_of(key)} holds numbers in {key} that are NaN or infinite; download it again"
                )
            if sliced is not None:
                _fill(sliced.numbers, tensor, rounding)
                continue
            if (
                isinstance(tensor, QuantizedTensor)
                and isinstance(module, nn.Linear)
                and leaf == "weight"
                and stays_quantized(name)
            ):
                model.set_submodule(owner, QuantizedLinear(module, tensor, dtype_of(name), device))
                continue
            if (
                lower is not None
                and isinstance(tensor, Tensor)
                and isinstance(module, nn.Linear)
                and leaf == "weight"
                and lower.takes(owner)
            ):
                numbers = tensor.view(weights.shapes[key])
                behind.do(partial(lower, module, numbers), partial(_replace, model, owner))
                continue
            if mapped and isinstance(tensor, Tensor) and tensor.dtype == dtype_of(name):
                value = tensor.view(weights.shapes[key])
            else:
                place = places.pop(name, None)
                value = (
                    torch.empty(weights.shapes[key], dtype=dtype_of(name), device=device) if place is None else place
                )
                if name not in waits:
                    _fill(value, tensor, rounding)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
    if isinstance(shared, SharedMemory):
        shared.done()
    if blocks.zero:
        block = min(blocks.zero)
        key = next(source_of[name] for name in source_of if name.startswith(f"{block}."))
        raise UserError(f"{weights.place_of(key)} is damaged: all weights of {block} are zero; download it again")


def _replace(model: nn.Module, name: str, layer: nn.Linear) -> None:
    """Put a layer in the place of another, with that one's bias, which may have come while this one was made."""
    layer._parameters["bias"] = model.get_submodule(name)._parameters["bias"]
    model.set_submodule(name, layer)


class _Behind:
    """Does work in a thread, in its order, while the `with` block brings more of it: a piece is done, one waits.

    The first error of the work is raised in the block or at its end. Nothing is at work after that.
    """

    WAITING = 2  # pieces, so that what they hold stays little

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "weights")
        self._unfinished: deque[tuple[Future[nn.Linear], Callable[[nn.Linear], None]]] = deque()

    def do(self, work: Callable[[], nn.Linear], use: Callable[[nn.Linear], None]) -> None:
        """Have this done as soon as what came before is done, and its result used, in the caller's thread, after that.

        Waits while there are two pieces.
        """
        while len(self._unfinished) >= self.WAITING:
            self._finish()
        self._unfinished.append((self._thread.submit(work), use))

    def _finish(self) -> None:
        result, use = self._unfinished.popleft()
        use(result.result())

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            while kind is None and self._unfinished:
                self._finish()
        finally:
            self._thread.shutdown(cancel_futures=True)


def _fill(value: Tensor, tensor: Tensor | QuantizedTensor, rounding: torch.dtype | None) -> None:
    """Copy numbers into memory. Quantized ones are expanded row by row: the 4 GiB of a vocabulary's are too many."""
    if isinstance(tensor, QuantizedTensor) and tensor.data.ndim == 2 and value.is_contiguous():
        flat = value.view(len(tensor.data), -1)
        step = max(1, PIECE // max(1, flat.shape[1]))
        pieces = [slice(start, start + step) for start in range(0, len(flat), step)]
        for rows in pieces:
            numbers = tensor.rows(rows)
            flat[rows] = numbers if rounding is None else numbers.to(rounding)
        return
    numbers = dequantize(tensor)
    value.copy_((numbers if rounding is None else numbers.to(rounding)).view(value.shape))


class _Blocks:
    """Which blocks of a model have had no weight but zeros so far."""

    def __init__(self) -> None:
        self.zero: set[str] = set()
        self._other: set[str] = set()

    def see(self, name: str, tensor: Tensor | QuantizedTensor) -> bool:
        """Note a tensor; False where its numbers are not finite. Those of GGUF are looked at until one is not zero."""
        low, high = _range(tensor)
        block = re.match(r"(?:encoder\.block|blocks)\.\d+(?=\.)", name)
        if block is not None and name.endswith(".weight") and "norm" not in name:
            if low == high == 0:
                self.zero |= {block[0]} - self._other
            else:
                self._other.add(block[0])
                self.zero.discard(block[0])
        return math.isfinite(low) and math.isfinite(high)


def _range(tensor: Tensor | QuantizedTensor) -> tuple[float, float]:
    """Two numbers that are finite where a tensor's are, and both 0 only where all of them are: enough to tell damage.

    They are the least and the greatest, or the sum, which takes half of the time. Of fp8 the size of the numbers, of
    GGUF the first rows that are not all zero.
    """
    if isinstance(tensor, Tensor):
        if not tensor.numel():
            return 0.0, 0.0
        total = tensor.sum().item()
        if total and math.isfinite(total):
            return total, total
        low, high = tensor.aminmax()
        return low.item(), high.item()
    if tensor.gguf_type is None:
        sides = (0.0, 1.0) if tensor.scale is None else _range(tensor.scale)
        if tensor.data.dtype not in FLOAT8:
            span = _range(tensor.data)
            return span[0] * sides[1], span[1] * sides[1]
        largest = int((tensor.data.view(torch.uint8) & 0x7F).max())  # without the sign
        finite = largest <= {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}[tensor.data.dtype]
        return 0.0, largest * sides[1] if finite else math.nan
    step = max(1, (1 << 20) // max(1, math.prod(tensor.data.shape[1:])))
    for start in range(0, len(tensor.data), step):
        span = _range(tensor.rows(slice(start, start + step)))
        if span != (0.0, 0.0):
            return span
    return 0.0, 0.0


def _likes(model: nn.Module, layers: str, dtype_of: Callable[[str], torch.dtype]) -> list[dict[str, Tensor]]:
    """What the parameters of each layer, by name, are to be like."""
    return [
        {
            (full := f"{layers}.{number}.{name}"): torch.empty(parameter.shape, dtype=dtype_of(full), device="meta")
            for name, parameter in layer.named_parameters()
        }
        for number, layer in model.get_submodule(layers).named_children()
    ]


def _places(likes: Sequence[Mapping[str, Tensor]], memory: Tensor | None) -> dict[str, Tensor]:
    """Memory for tensors like these, one buffer a layer. Pages that nothing is written to are never taken."""
    places: dict[str, Tensor] = {}
    for like in likes:
        tensors, here = list(like.values()), None
        if memory is not None:
            size = PinnedBuffer.size(tensors)
            here, memory = memory[:size], memory[size:]
        places |= dict(zip(like, in_one_buffer(tensors, here), strict=True))
    return places
