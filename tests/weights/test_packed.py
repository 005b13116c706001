"""Packed weights and what LoRAs add to them, against the same numbers written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.weights import quantized
from wan.weights.quantized import Addition, QuantizedLinear, QuantizedTensor, dequantize

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# A weight [6, 4], and what each form adds to it at strength 1.
WEIGHT = random(6, 4, seed=9)
FORMS: dict[str, tuple[Addition, Tensor]] = {
    "product": (Addition(random(6, 2), random(2, 4, seed=1), 0.5), random(6, 2) @ random(2, 4, seed=1)),
    "whole": (Addition(random(6, 4), None, 0.5), random(6, 4)),
    "kronecker": (
        Addition(random(2, 2), random(3, 2, seed=1), 0.5, "kronecker"),
        torch.kron(random(2, 2), random(3, 2, seed=1)),
    ),
    "gain of rows": (Addition(random(6, 1), None, 0.5, "gain"), WEIGHT * random(6, 1)),
    "gain of columns": (Addition(random(1, 4), None, 0.5, "gain"), WEIGHT * random(1, 4)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1, 2, 4, 6, 9])
def test_an_addition_to_some_rows_is_that_part_of_it(form: str, step: int) -> None:
    addition, expected = FORMS[form]
    value = torch.ones(6, 4)
    addition.add_to(value, base=WEIGHT)
    torch.testing.assert_close(value, 1 + 0.5 * expected)
    for start in range(0, 6, step):
        rows = slice(start, start + step)
        part = torch.ones(6, 4)[rows]
        addition.add_to(part, rows, base=WEIGHT[rows])
        torch.testing.assert_close(part, 1 + 0.5 * expected[rows])


def test_an_addition_of_halves_is_summed_in_float32() -> None:
    value = torch.zeros(2, 2)
    Addition(torch.full((2, 1), 0.1).half(), torch.full((1, 2), 0.1).bfloat16(), 1.0).add_to(value)
    exact = float(torch.tensor(0.1).half()) * float(torch.tensor(0.1).bfloat16())
    assert value.flatten().tolist() == pytest.approx([exact] * 4, rel=1e-6)


def test_an_addition_to_a_convolution_is_flat() -> None:
    value, left, right = torch.ones(6, 2, 1, 2), random(6, 2), random(2, 4, seed=1)
    Addition(left, right, 2.0).add_to(value)
    torch.testing.assert_close(value, 1 + 2 * (left @ right).view(6, 2, 1, 2))


@pytest.mark.parametrize(
    ("left", "right", "strength", "is_zero"),
    [
        (torch.zeros(2, 1), torch.ones(1, 2), 1.0, True),
        (torch.ones(2, 1), torch.zeros(1, 2), 1.0, True),
        (torch.ones(2, 1), torch.ones(1, 2), 0.0, True),
        (torch.ones(2, 1), torch.ones(1, 2), torch.tensor(0.0), True),
        (torch.ones(2, 1), None, 1.0, False),
        (torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0, 0.0]]), -1.0, False),
    ],
)
def test_an_addition_is_nothing_where_a_factor_is(
    left: Tensor, right: Tensor | None, strength: Any, is_zero: bool
) -> None:
    assert Addition(left, right, strength).is_zero is is_zero


def test_a_packed_tensor_is_its_numbers_times_their_scales() -> None:
    data = torch.arange(12.0).view(3, 2, 2)
    for scale, factor in ((torch.tensor(0.5), 0.5), (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2, 4]))):
        packed = QuantizedTensor(data.to(torch.float8_e4m3fn), scale.half())
        expected = data * (factor.view(3, 1, 1) if isinstance(factor, Tensor) else factor)
        assert torch.equal(packed.rows(), expected) and torch.equal(dequantize(packed), expected)
        assert torch.equal(packed.rows(slice(1, 3)), expected[1:]) and packed.rows().dtype == torch.float32
    plain = QuantizedTensor(data)
    plain.rows().zero_()
    assert torch.equal(plain.rows(slice(0, 2)), data[:2])  # in memory of their own
    assert dequantize(data) is data


class Exact:
    """Stands for a kernel that multiplies packed weights."""

    def __call__(self, inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.linear(inputs, weight.float() * scale, bias)


def layer_of(scale: float = 1.0) -> QuantizedLinear:
    linear = nn.Linear(4, 6)
    with torch.no_grad():
        linear.bias.copy_(random(6, seed=3))
    packed = QuantizedTensor(WEIGHT / scale, torch.tensor(scale))
    return QuantizedLinear(linear, packed, torch.float32, CPU)


@pytest.mark.parametrize("names", [[], *([form] for form in FORMS), list(FORMS)])
@pytest.mark.parametrize("piece", [1, 8, 1000])
def test_a_packed_layer_computes_with_what_is_held(
    names: list[str], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "PIECE", piece)
    layer, inputs = layer_of(0.5), random(2, 3, 4, seed=4)
    layer.set_loras([FORMS[name][0] for name in names])
    weight = WEIGHT + sum(0.5 * FORMS[name][1] for name in names)
    torch.testing.assert_close(layer.dense(), weight)
    expected = nn.functional.linear(inputs, weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), expected)
        layer.multiply = Exact()
        torch.testing.assert_close(layer(inputs), expected)
    assert [addition.form for addition in layer.additions] == [FORMS[name][0].form for name in names]
    assert set(layer.state_dict()) == {"weight", "bias", "scale"} and not layer.weight.requires_grad
    layer.set_loras([])
    torch.testing.assert_close(layer.dense(), WEIGHT)
    assert {name for name, _ in layer.named_buffers()} == {"scale"}


def test_a_packed_layer_keeps_its_own_memory_and_rounds_once() -> None:
    data, linear = WEIGHT.clone(), nn.Linear(4, 6)
    layer = QuantizedLinear(linear, QuantizedTensor(data), torch.bfloat16, CPU)
    data.zero_()
    assert torch.equal(layer.dense(), WEIGHT.bfloat16()) and layer.scale is None and layer.bias is linear.bias
    layer.set_loras([FORMS["whole"][0]])
    assert torch.equal(layer.dense(), (WEIGHT + 0.5 * FORMS["whole"][1]).bfloat16())
