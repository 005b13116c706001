"""Where models live while they run. No other module moves a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from wan.device.hardware import drop_cache, same_device
from wan.device.layers import SLOTS, layers_that_stay
from wan.device.sharding import is_sharded
from wan.device.streaming import LayerStreamer, MappedTensors, PinnedBuffer, tensors_of
from wan.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Placement:
    """Models run on `device`. With `offload`, only the model in use is there; the others wait in host memory.

    `weight_budget`: bytes that the weights of one model may take there. Of a model with more, as many of its `layers`
    (a ModuleList) as fit stay there while it is used; the others come one by one, each while the one before computes.
    For that the model calls its `before_layer`, when that is not None, with a layer's number before it uses the layer.
    `instead`: what to do where the budget is too small even for that. `mapped`: weights come from where they lie, from
    mapped files for instance, and take no pinned memory.
    """

    device: torch.device
    offload: bool = True
    weight_budget: int | None = None
    mapped: bool = False
    instead: str = "make smaller clips"

    @contextmanager
    def on_device(self, model: Model, device: torch.device | None = None) -> Iterator[Model]:
        """The model on its device for the time of the block, back in host memory afterwards when offloading.

        Offloading keeps the host copy and drops the one on the GPU: weights do not change, and copying them back
        takes longer than bringing them (27 GiB for an A14B expert).
        """
        home = device or self.device
        if is_sharded(model):  # a slice of it is on each GPU, and stays there
            yield model
            return
        if not self.offload or (home.type == "cpu" and self.weight_budget is None):
            yield model.to(home)
            return
        model.to("cpu")
        layered: Any = model
        layers = dict(enumerate(getattr(model, "layers", ())))
        fed = {id(tensor) for layer in layers.values() for tensor in tensors_of(layer)}
        staying = self._layers_that_stay(layered)
        hold = MappedTensors if self.mapped else PinnedBuffer.of
        rest = hold(model, [tensor for tensor in tensors_of(model) if id(tensor) not in fed])
        feed = None
        try:
            rest.use(rest.on(home))
            if layers:
                layered.before_layer = feed = LayerStreamer(layers, staying, home, hold)
            yield model
        finally:  # also when the body raises: what is left behind would take the next model's memory
            if feed is not None:
                feed.close()
                layered.before_layer = feed = None
            rest.go_home()
            drop_cache(home)

    def streams(self, model: nn.Module) -> bool:
        """Whether layers of the model come to the device again in every pass."""
        return (
            self.offload
            and not is_sharded(model)
            and len(self._layers_that_stay(model)) < len(getattr(model, "layers", ()))
        )

    def _layers_that_stay(self, model: Any) -> range | frozenset[int]:
        """The layers that fit beside the rest of the model, spread evenly. Raises UserError where not even two do."""
        layers = getattr(model, "layers", ())
        size = sum(tensor.nbytes for tensor in tensors_of(model))
        each = max((sum(tensor.nbytes for tensor in tensors_of(layer)) for layer in layers), default=0)
        count = len(layers)
        stay = layers_that_stay(size, each, count, self.weight_budget)
        if stay < 0:
            least, left = (size - (count - SLOTS) * each) / 2**30, max(0, self.weight_budget or 0) / 2**30
            name = getattr(model, "title", type(model).__name__)
            raise UserError(f"{name} needs {least:.1f} GiB even layer by layer, {left:.1f} are left; {self.instead}")
        if stay == count:
            return range(count)
        return frozenset(number for number in range(count) if number * stay // count != (number + 1) * stay // count)


def move_home(model: nn.Module) -> None:
    """Let a model wait in host memory, but for one of slices."""
    if not is_sharded(model):
        model.to("cpu")


def bytes_on(model: nn.Module, device: torch.device) -> int:
    """What a model takes of a device now."""
    return sum(tensor.nbytes for tensor in tensors_of(model) if same_device(tensor.device, device))
