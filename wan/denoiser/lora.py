"""LoRAs -> the weights of a denoiser: W + strength * alpha / rank * B @ A.

LoKr and LoHa put other products in the place of B @ A, and DoRA scales the rows or columns of the sum; its strength
says how far the weights go from the checkpoint's to the scaled ones.

Strength and sum are applied in float32 to the checkpoint's own values and rounded once, so that what is merged depends
on the files alone and not on what was merged before; taking a LoRA out reads the checkpoint's values again. Those of a
parameter that no LoRA has altered are in the parameter already, where it has the file's dtype. A layer whose weight
stays quantized holds the LoRA beside it and does the same sum whenever it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import torch
from torch import Tensor

from wan.denoiser.headers import key_map
from wan.denoiser.lora_file import LOHA, OpenedLora
from wan.denoiser.model import WanModel
from wan.device.hardware import synchronize
from wan.device.sharding import slice_of, write
from wan.device.streaming import RoundTrip
from wan.errors import UserError
from wan.weights.quantized import PIECE, Addition, QuantizedLinear, QuantizedTensor, dequantize
from wan.weights.tensors import Weights

Original: TypeAlias = tuple[str, Tensor | QuantizedTensor]  # the name of a parameter and the checkpoint's values

_LOGGER = logging.getLogger(__name__)
_TUCKER_LOHA = (("t1", "w1_a", "w1_b"), ("t2", "w2_a", "w2_b"))


@torch.no_grad()
def merge_loras(
    model: WanModel,
    weights: Weights,
    opened: Sequence[OpenedLora],
    device: torch.device | None = None,
    layers_have_them: bool = False,
) -> None:
    """Put these LoRAs, and no others, into the model that was loaded from `weights`; `()` takes all of them out.

    `layers_have_them`: another process has put them into the parameters of blocks, which the two have in common.

    Parameters are changed in place and stay where they are; the sums are made on `device`, or where the parameters are.
    Raises UserError for values that are not finite; the next merge puts right what such an error left half done.
    """
    loras = tuple(one.match.lora for one in opened)
    if loras == model.loras:
        return
    changed = frozenset(name for file in opened for name in file.parts)
    held = [_Values(file) for file in opened]
    altered = model.altered
    source_of = key_map(weights)
    name_of = {source_of[name]: name for name in changed | altered}
    model.loras, model.altered = None, changed | altered  # until all is done
    changing: set[Path] = set()  # the files that hold more than zeros
    packed = {name: module for name in name_of.values() if (module := _packed(model, name))}
    for name, linear in packed.items():
        home, base = linear.weight.device, None
        if any(file.has_magnitude(name) for file in opened):
            ((_, original),) = weights.read({source_of[name]})
            base = dequantize(original).to(home, torch.float32)
        linear.set_loras([addition for file in held for addition in file.additions(name, home, base, changing)])
    done = {name for name in name_of.values() if layers_have_them and name.startswith("blocks.")}
    name_of = {key: name for key, name in name_of.items() if name not in packed.keys() | done}

    def merge(way: RoundTrip | None, given: Original) -> None:
        name, original = given[0], dequantize(given[1])
        parameter = model.get_parameter(name)
        original = original.to(parameter.device) if way is None else way.go(original, original.dtype)
        value = original.to(torch.float32, copy=True).view(parameter.shape)
        base = value.clone() if any(file.has_magnitude(name) for file in opened) else None
        for file in held:
            file.add(name, value, base, changing)
        value = (value if model.rounding is None else value.to(model.rounding)).to(parameter.dtype)
        if way is not None and parameter.device.type == "cpu":
            value = way.back(value)
        write(parameter, value)
        synchronize(parameter.device)  # the next one takes the places of this one

    def merge_there(way: RoundTrip | None, given: Original) -> None:
        # a thread begins on the first GPU, and would pin its memory there
        with torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext():
            merge(way, given)

    ways = [None if device is None else RoundTrip(device) for _ in range(_workers(model, opened, device))]
    _share_out(_originals(model, weights, name_of, altered), [partial(merge_there, way) for way in ways])
    model.loras, model.altered = loras, changed
    for file in opened:
        _LOGGER.info("merged %s", file.match)
        if file.file.path not in changing and not done:
            _LOGGER.warning(
                "%s changes nothing: it has only zeros for %s; train it first, or leave it out",
                file.file.path,
                weights.expert or "this model",
            )


def _originals(
    model: WanModel, weights: Weights, name_of: Mapping[str, str], altered: Collection[str]
) -> Generator[Original]:
    """The checkpoint's values of parameters, which `name_of` names by key: their own where those are exactly these.

    That is where they have the file's dtype, and no LoRA altered them, here or in a process that has their memory too.
    """
    stored = weights.stored_dtypes() if model.rounding is None else {}

    def is_original(name: str, dtype: str) -> bool:
        parameter = model.get_parameter(name)
        return (
            str(parameter.dtype) == f"torch.{dtype}"
            and name not in altered
            and not (model.in_common and name.startswith("blocks."))
            and slice_of(parameter) is None
        )

    here = [key for key in stored if key in name_of and is_original(name_of[key], stored[key])]
    for key in here:
        yield name_of[key], model.get_parameter(name_of[key]).detach()
    if rest := name_of.keys() - here:
        for key, value in weights.read(rest):
            yield name_of[key], value


def _workers(model: WanModel, opened: Sequence[OpenedLora], device: torch.device | None) -> int:
    """How many parameters are merged at a time: two where they are copied to a GPU and back, which takes the longest.

    A number takes eight to twelve bytes of the GPU then, by its dtypes. For the two largest matrices that is less than
    two layers and what is in none, for which every budget has room. DoRA and products of other forms take more, so they
    come one at a time.
    """
    away = device is not None and device.type == "cuda" and next(model.parameters()).device.type == "cpu"
    return 2 if away and all(file.is_light(PIECE) for file in opened) else 1


def _share_out(items: Generator[Original], workers: Sequence[Callable[[Original], None]]) -> None:
    """Give each item to one of the workers, of which each has a thread if there are several; stops at an error."""
    if len(workers) == 1:
        for item in items:
            workers[0](item)
        return
    turn = Lock()

    @torch.inference_mode()  # a thread does not know whether its caller is in it
    def run(work: Callable[[Original], None]) -> None:
        while True:
            with turn:
                item = next(items, None)
            if item is None:
                return
            work(item)

    with ThreadPoolExecutor(len(workers), "loras") as pool:
        try:
            running = [pool.submit(run, work) for work in workers]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            with turn:
                items.close()  # so that each ends with what it is at
    for one in running:
        one.result()


def _packed(model: WanModel, name: str) -> QuantizedLinear | None:
    """The layer that holds this parameter packed, and so takes what is added to it as it is."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return module if leaf == "weight" and isinstance(module, QuantizedLinear) else None


class _Values:
    """What a LoRA file holds for the model, mapped: opening it anew for each parameter takes as long as a small sum."""

    def __init__(self, opened: OpenedLora) -> None:
        self._opened = opened
        self._tensors = dict(opened.file.read({key for part in opened.parts.values() for key in part.keys.values()}))

    def add(self, name: str, value: Tensor, base: Tensor | None, changing: set[Path]) -> None:
        """Add what it holds for a parameter to its float32 value.

        `base` are the checkpoint's own values, which only DoRA needs. A file of more than zeros goes into `changing`.
        """
        additions = self.additions(name, value.device, base, changing)
        for addition in additions:
            addition.add_to(value, base=base)
        if additions and not value.sum().isfinite():  # as telling as every value by itself, and far quicker
            raise _not_finite(self._opened, name)

    def additions(self, name: str, device: torch.device, base: Tensor | None, changing: set[Path]) -> list[Addition]:
        """What it adds to a parameter, in the dtypes of the file, on the device. Raises UserError for NaN."""
        opened = self._opened
        part = opened.parts.get(name)
        if part is None:
            return []
        tensors = {role: dequantize(self._tensors[key]).to(device, copy=True) for role, key in part.keys.items()}
        if not all(_is_finite(tensor) for tensor in tensors.values()):
            raise _not_finite(opened, name)
        additions = _products(tensors, part.scale)
        if "bias" in tensors:
            additions.append(Addition(tensors["bias"], None, part.scale))
        if "diff" in tensors:
            additions.append(Addition(tensors["diff"], None, 1.0))
        if "dora_scale" in tensors:
            assert base is not None
            additions = _with_magnitude(additions, tensors["dora_scale"].float(), base)
        if opened.file.path not in changing and not all(addition.is_zero for addition in additions):
            changing.add(opened.file.path)
        strength = opened.match.lora.strength
        return [replace(addition, strength=strength * addition.strength) for addition in additions]


def check_values(opened: OpenedLora) -> None:
    """Raise UserError for a value that is not finite, of those for this model, before that is loaded."""
    name_of = {key: name for name, part in opened.parts.items() for key in part.keys.values()}
    for key, tensor in opened.file.read(name_of):
        if not _is_finite(dequantize(tensor)):
            raise _not_finite(opened, name_of[key])


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.float().sum().isfinite())


def _not_finite(opened: OpenedLora, name: str) -> UserError:
    return UserError(f"{opened.file.path} makes {name} infinite or NaN; download it again or lower its strength")


def _products(tensors: Mapping[str, Tensor], scale: float) -> list[Addition]:
    """What the factors of a LoRA, a LoKr or a LoHa stand for."""
    if "up" in tensors:
        up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
        if "mid" in tensors:
            down = torch.einsum("ij...,jr->ir...", tensors["mid"].float(), down.float()).flatten(1)
        return [Addition(up, down, scale)]
    if "hada_t1" in tensors:
        first, second = (_tucker(*(tensors[f"hada_{part}"] for part in parts)) for parts in _TUCKER_LOHA)
        return [Addition(first * second, None, scale)]
    if "hada_w1_a" in tensors:
        # The elementwise product of two products is one product, of every pair of their columns and rows.
        a, b, c, d = (tensors[role].float().flatten(1) for role in LOHA)
        left = (a[:, :, None] * c[:, None]).flatten(1)
        return [Addition(left, (b[:, None] * d[None]).flatten(0, 1), scale)]
    if (one := _factor(tensors, "lokr_w1")) is not None and (two := _factor(tensors, "lokr_w2")) is not None:
        return [Addition(one, two, scale, "kronecker")]
    return []


def _factor(tensors: Mapping[str, Tensor], role: str) -> Tensor | None:
    """A factor of a LoKr, which is there whole or as a product of its own; flat."""
    if role in tensors:
        return tensors[role].flatten(1)
    if role == "lokr_w2" and "lokr_t2" in tensors:
        return _tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"]).flatten(1)
    if f"{role}_a" in tensors:
        return tensors[f"{role}_a"].float() @ tensors[f"{role}_b"].float().flatten(1)
    return None


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A convolution's weights [out, in, ...] of a core [i, j, ...] and matrices [i, out] and [j, in] (LyCORIS)."""
    return torch.einsum("ij...,ip,jr->pr...", core.float(), left.float(), right.float())


def _with_magnitude(changes: Sequence[Addition], magnitude: Tensor, base: Tensor) -> list[Addition]:
    """DoRA: W + changes, with each row (or column) scaled to its magnitude, as additions to W.

    With V = W + changes and g = magnitude / norm(V) that is W + (g - 1) * W + g * changes.
    """
    changed = base.clone()
    for change in changes:
        change.add_to(changed)
    out, inner = base.shape[:2]
    by_row = magnitude.numel() == out and not (out == inner and magnitude.ndim > 1 and len(magnitude) == 1)
    shape = [out if by_row else 1, 1 if by_row else inner, *(1 for _ in base.shape[2:])]
    axes = [axis for axis in range(base.ndim) if axis != (0 if by_row else 1)]
    gain = magnitude.view(shape) / torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
    additions = [Addition(gain - 1, None, 1.0, "gain")]
    for change in changes:
        flat = gain.expand(*shape[:2], *base.shape[2:]).flatten(1)
        if change.form == "product" and change.right is not None and by_row:
            additions.append(replace(change, left=change.left.float() * flat[:, :1]))
        elif change.form == "product" and change.right is not None:
            additions.append(replace(change, right=change.right.float() * flat))
        else:  # a Kronecker product that is scaled by rows is none any more
            whole = torch.zeros_like(base)
            change.add_to(whole)
            additions.append(Addition(whole * gain, None, 1.0))
    return additions
