"""Weights that stay in memory as a file holds them, and become numbers when they are used: scaled fp8, GGUF blocks.

A packed weight is expanded in float32 and rounded once to the compute dtype, in each forward, so that the results are
those of a model whose weights were expanded when they were loaded. LoRAs are added before that rounding, as they are
to weights that are not packed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.weights.gguf_files import gguf_reader

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What is expanded in one piece: 64 MiB of float32, so that expanding takes little beside the weight that it makes.
PIECE = 1 << 24


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as a file holds it: `data * scale`, or the blocks of a GGUF type along the last dimension."""

    data: Tensor  # fp8 (or any float) in the tensor's own shape; uint8 [..., bytes] of blocks
    scale: Tensor | None = None  # float32, one number or one per row
    gguf_type: str | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", self.scale.float().reshape(-1, *(1 for _ in self.data.shape[1:])))

    def rows(self, rows: slice | None = None) -> Tensor:
        """These rows (along the first dimension), or all, as numbers, float32, in memory of their own."""
        data = self.data if rows is None else self.data[rows]
        if self.gguf_type is not None:
            return _expand(data, self.gguf_type)
        value = data.to(torch.float32, copy=True)
        if self.scale is None:
            return value
        return value.mul_(self.scale if rows is None or len(self.scale) == 1 else self.scale[rows])


def dequantize(value: Tensor | QuantizedTensor) -> Tensor:
    """A tensor as numbers, whichever way it is held."""
    return value.rows() if isinstance(value, QuantizedTensor) else value


# Inputs [..., in], a weight [out, in], its scales and the bias -> outputs [..., out]
Multiply: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


Form: TypeAlias = Literal["product", "kronecker", "gain"]


@dataclass(frozen=True)
class Addition:
    """What a LoRA adds to a parameter, times `strength`.

    `form` says what it is made of: "product" is `left @ right`, or `left` in the parameter's shape without a `right`;
    "kronecker" is their Kronecker product; "gain" is `left` times the checkpoint's own values.
    """

    left: Tensor  # [out, rank]; of a gain [out, 1] or [1, in], with more ones for a convolution
    right: Tensor | None  # [rank, in]
    strength: float | Tensor
    form: Form = "product"

    def add_to(self, value: Tensor, rows: slice | None = None, *, base: Tensor | None = None) -> None:
        """Add these rows, or all, to the float32 rows of a parameter; `base` are the checkpoint's own rows.

        Only a gain needs `base`.
        """
        every = rows is None or self.form == "kronecker" or (self.form == "gain" and len(self.left) == 1)
        left = (self.left if every or rows is None else self.left[rows]).float()
        flat = value.view(len(value), -1)  # a convolution's weights have five dimensions
        if self.form == "gain":
            assert base is not None
            value.add_(base * left * self.strength)
        elif self.right is None:
            value.add_(left * self.strength)
        elif self.form == "kronecker":
            flat.add_(self._kronecker(left, self.right.float(), rows) * self.strength)
        else:
            flat.addmm_(left, self.right.float() * self.strength)

    @property
    def is_zero(self) -> bool:
        """Whether one of its factors is zero throughout."""
        factors = (self.left, self.right, torch.as_tensor(self.strength))
        return not all(factor.float().any() for factor in factors if factor is not None)

    @staticmethod
    def _kronecker(left: Tensor, right: Tensor, rows: slice | None) -> Tensor:
        if rows is None:
            return torch.kron(left, right)
        height = len(right)
        first, stop = rows.start // height, min(rows.stop, len(left) * height)
        return torch.kron(left[first : -(-stop // height)], right)[rows.start - first * height : stop - first * height]


class QuantizedLinear(nn.Linear):
    """A linear layer with a packed weight; `dtype` is that of its inputs, its bias and its outputs."""

    def __init__(self, linear: nn.Linear, packed: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        # put in place, not registered: while another thread builds a model without memory, that would take these too
        self._parameters["bias"] = linear.bias
        self._parameters["weight"] = nn.Parameter(packed.data.to(device, copy=True), requires_grad=False)
        self.dtype = dtype
        self.gguf_type = packed.gguf_type
        self.scale: Tensor | None
        self.register_buffer("scale", None if packed.scale is None else packed.scale.to(device, copy=True))
        self.held: tuple[Form, ...] = ()  # the forms of the additions, whose tensors are in buffers
        self.multiply: Multiply | None = None  # with the weight as it is, and what is held beside it

    def set_loras(self, additions: Sequence[Addition]) -> None:
        """Add these, and no others, to the weight whenever it is used."""
        for index in range(len(self.held)):
            del self._buffers[f"left_{index}"], self._buffers[f"right_{index}"], self._buffers[f"strength_{index}"]
        for index, addition in enumerate(additions):  # buffers, so that they go where the weight goes
            self.register_buffer(f"left_{index}", addition.left, persistent=False)
            self.register_buffer(f"right_{index}", addition.right, persistent=False)
            # a number would be part of a compiled graph, and each other number another graph
            strength = torch.as_tensor(addition.strength, dtype=torch.float32, device=addition.left.device)
            self.register_buffer(f"strength_{index}", strength, persistent=False)
        self.held = tuple(addition.form for addition in additions)

    @property
    def additions(self) -> list[Addition]:
        """What is held."""
        return [
            Addition(
                self.get_buffer(f"left_{index}"),
                self._buffers[f"right_{index}"],
                self.get_buffer(f"strength_{index}"),
                form,
            )
            for index, form in enumerate(self.held)
        ]

    def dense(self) -> Tensor:
        """The weight [out, in] in the compute dtype, with what is held added."""
        packed = QuantizedTensor(self.weight.data, self.scale, self.gguf_type)
        held = self.additions
        whole = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.weight.device)
        step = max(1, PIECE // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            value = packed.rows(rows)
            base = value.clone() if "gain" in self.held else None
            for addition in held:
                addition.add_to(value, rows, base=base)
            whole[rows] = value
        return whole

    def forward(self, input: Tensor) -> Tensor:
        if self.multiply is None:
            return F.linear(input, self.dense(), self.bias)
        assert self.scale is not None
        plain = self.multiply(input, self.weight, self.scale, self.bias)
        outputs = plain
        for addition in self.additions:
            outputs = outputs + addition.strength * self._added(addition, input, plain)
        return outputs

    def _added(self, addition: Addition, input: Tensor, plain: Tensor) -> Tensor:
        """The outputs of an addition's own weight; `plain` are those of the layer without additions."""
        left, right = addition.left.to(input.dtype), addition.right
        if addition.form == "gain" and len(left) == 1:
            assert self.multiply is not None and self.scale is not None
            return self.multiply(input * left[0], self.weight, self.scale, torch.zeros_like(self.bias))
        if addition.form == "gain":
            return (plain - self.bias) * left[:, 0]
        if right is None:
            return F.linear(input, left)
        right = right.to(input.dtype)
        if addition.form == "kronecker":
            inner = F.linear(input.reshape(*input.shape[:-1], left.shape[1], right.shape[1]), right)
            return (left @ inner).flatten(-2)
        return F.linear(F.linear(input, right), left)


def read_gguf(file: Path, keys: Container[str]) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The named tensors of a GGUF file, each copied from it; the types F32, F16 and BF16 as plain tensors."""
    gguf, reader = gguf_reader(file)
    for tensor in reader.tensors:
        if tensor.name not in keys:
            continue
        name, stored = gguf.GGMLQuantizationType(tensor.tensor_type).name, torch.from_numpy(tensor.data.copy())
        if name in PLAIN_TYPES:
            yield tensor.name, stored.view(PLAIN_TYPES[name])
        else:
            yield tensor.name, QuantizedTensor(stored, gguf_type=name)


def _expand(data: Tensor, gguf_type: str) -> Tensor:
    """Blocks uint8 [..., bytes] -> float32 [..., elements]."""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = gguf.GGMLQuantizationType[gguf_type]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, size)
    value: Tensor = dequantize_functions[kind](blocks, elements, size, dtype=torch.float32)
    return value.reshape(*data.shape[:-1], data.shape[-1] // size * elements)
