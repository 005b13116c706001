"""Weights in 4 bits as AWQ (gemm) and GPTQ lay them out, and what transformers asks of gptqmodel to read the first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 32  # numbers of a row that share a scale and a zero
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the output, from the lowest of the eight numbers in an int32

_MODULES = {
    "quantization/__init__.py": "from types import SimpleNamespace\nMETHOD = SimpleNamespace(AWQ='awq')",
    "quantization/awq/modules/act.py": "ScaledActivation = None  # for other models",
    "utils/importer.py": "from tests.support.awq import select as hf_select_quant_linear_v2",
    "utils/model.py": "from tests.support.awq import begin as hf_gptqmodel_post_init",
}


def write_package(folder: Path) -> None:
    """Put what is imported of gptqmodel into its folder."""
    for name, code in _MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{code}\n")


def packed(weight: Tensor) -> dict[str, Tensor]:
    """A weight [out, in] in 4 bits, by the ends of its names in a file."""
    rows = weight.float().T.reshape(-1, GROUP, len(weight))  # [groups, GROUP, out]
    low, high = rows.amin(1), rows.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(1, 15)
    numbers = (rows / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
    return {"qweight": _pack(numbers), "qzeros": _pack(zeros), "scales": scales}


def unpacked(parts: Mapping[str, Tensor]) -> Tensor:
    """The weight float32 [out, in] that `packed` stands for."""
    numbers, zeros = _unpack(parts["qweight"]), _unpack(parts["qzeros"])
    rows = (numbers.reshape(-1, GROUP, numbers.shape[1]) - zeros[:, None]) * parts["scales"].float()[:, None]
    return rows.flatten(0, 1).T.contiguous()


def packed_by_rows(weight: Tensor) -> dict[str, Tensor]:
    """A weight [out, in] as GPTQ has it, by the ends of its names: eight rows in an int32, zeros less one."""
    parts = packed(weight)
    numbers, zeros = _unpack(parts["qweight"]), _unpack(parts["qzeros"]) - 1
    eights = numbers.long().reshape(-1, 8, numbers.shape[1]) << torch.arange(0, 32, 4)[None, :, None]
    columns = zeros.long().reshape(len(zeros), -1, 8) << torch.arange(0, 32, 4)
    groups = torch.arange(len(numbers)) // GROUP
    rows = {"qweight": eights.sum(1), "qzeros": columns.sum(-1), "g_idx": groups}
    return {name: value.to(torch.int32) for name, value in rows.items()} | {"scales": parts["scales"]}


def _pack(numbers: Tensor) -> Tensor:
    eights = numbers.long().reshape(len(numbers), -1, 8)[..., list(_COLUMNS)]
    return (eights << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def _unpack(words: Tensor) -> Tensor:
    eights = (words.long()[..., None] >> torch.arange(0, 32, 4)) & 15
    return eights[..., list(torch.tensor(_COLUMNS).argsort())].flatten(1).float()


class AwqLinear(nn.Module):
    """A layer whose weight is unpacked whenever it is used."""

    begun = 0  # layers that were told that their weights are there

    def __init__(self, in_features: int, out_features: int, bias: bool, group_size: int, bits: int, **_: Any) -> None:
        super().__init__()
        assert (group_size, bits, bias) == (GROUP, 4, False)
        self.register_buffer("qweight", torch.zeros(in_features, out_features // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(in_features // GROUP, out_features // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(in_features // GROUP, out_features, dtype=torch.half))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, unpacked(dict(self.named_buffers())).to(x.dtype))


def select(*, quant_method: str, bits: int, group_size: int, format: str, **_: Any) -> type[AwqLinear]:
    """The class of the layers."""
    assert (quant_method, bits, group_size, str(getattr(format, "value", format))) == ("awq", 4, GROUP, "gemm")
    return AwqLinear


def begin(model: nn.Module, use_act_order: bool) -> nn.Module:
    """Called when the weights are there."""
    AwqLinear.begun = sum(isinstance(module, AwqLinear) for module in model.modules())
    return model
