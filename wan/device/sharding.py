"""Weights of which each of several GPUs keeps a slice (FSDP2): a layer is whole only while it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan.device.parallel import Group


def shard(
    model: nn.Module,
    layers: str,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    group: Group,
    methods: Sequence[str] = (),
) -> None:
    """Make a model that has no memory yet one of slices, each of its modules in the list `layers` by itself.

    `methods` are those that use its own weights, outside of its forward. The numbers of the slices come later, by
    `slice_of` or `write`.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=owner, recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype_of(name), device="meta")
            module._parameters[name.rpartition(".")[2]] = nn.Parameter(empty, requires_grad=False)
    mesh = DeviceMesh.from_group(group.handle, device.type)
    for layer in model.get_submodule(layers).children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(model, method)
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
    model.to_empty(device=device)
    for name, buffer in buffers.items():  # which are computed, and were there
        model.get_buffer(name).copy_(buffer)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are slices."""
    if "torch.distributed.fsdp" not in sys.modules:  # whose import takes a second, and which makes them
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@dataclass(frozen=True)
class Slice:
    """Which rows of a parameter this process keeps, and their numbers, in place."""

    rows: slice
    numbers: Tensor


def slice_of(parameter: Tensor | None) -> Slice | None:
    """This process's slice of a parameter; None for one that is whole."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return None
    each = -(-parameter.shape[0] // parameter.device_mesh.size())
    start, numbers = parameter.device_mesh.get_local_rank() * each, parameter.to_local()
    return Slice(slice(start, start + len(numbers)), numbers)


def write(parameter: Tensor, value: Tensor) -> None:
    """Put numbers into a parameter, or into this process's slice of it."""
    sliced = slice_of(parameter)
    if sliced is None:
        parameter.copy_(value)
    else:
        sliced.numbers.copy_(value[sliced.rows])
