"""Weights that are made smaller in a thread while the next ones are read."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.device.streaming import PinnedBuffer
from wan.errors import UserError
from wan.weights.loading import _Behind, _Blocks, _fill, _likes, _places, _range, load_into
from wan.weights.quantized import QuantizedTensor

COUNT = 6
PATIENCE = 20  # seconds after which a test that would hang fails


class Files:
    """The weights of some layers, every second bias before its weight; `on_read` is called before one is handed on."""

    path = Path("a.safetensors")

    def __init__(self, on_read: Callable[[str], None] = lambda key: None) -> None:
        self.on_read = on_read
        self.numbers: dict[str, Tensor] = {}
        for layer in range(COUNT):
            for part in ("weight", "bias") if layer % 2 else ("bias", "weight"):
                self.numbers[f"{layer}.{part}"] = torch.full((4, 4) if part == "weight" else (4,), layer + 1.0)
        self.shapes = {key: tuple(value.shape) for key, value in self.numbers.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for key, value in self.numbers.items():
            self.on_read(key)
            yield key, value

    def place_of(self, key: str) -> str:
        return str(self.path)


class Halves:
    """Takes the weights of all layers but the first, and makes half of their numbers; `on_make` is called before."""

    def __init__(self, on_make: Callable[[int], None] = lambda number: None) -> None:
        self.on_make = on_make
        self.made: list[int] = []

    def takes(self, name: str) -> bool:
        return name != "0"

    def __call__(self, layer: nn.Linear, numbers: Tensor) -> nn.Linear:
        number = int(numbers[0, 0]) - 1
        self.on_make(number)
        self.made.append(number)
        smaller = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        smaller._parameters["weight"] = nn.Parameter(numbers.half() / 2, requires_grad=False)
        return smaller


def load(files: Any, lower: Any) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(4, 4, device="meta") for _ in range(COUNT)))
    sources = {key: key for key in files.shapes}
    load_into(model, files, sources, lambda name: torch.float32, torch.device("cpu"), lower=lower)
    return model


def at_work() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_each_layer_gets_its_own_numbers() -> None:
    """A bias may come before its weight, after it, or while the layer is made of that."""
    half = Halves(lambda number: time.sleep(0.01))
    model = load(Files(), half)
    assert half.made == [1, 2, 3, 4, 5]
    for number, layer in enumerate(model):
        assert isinstance(layer, nn.Linear)
        assert torch.equal(layer.bias, torch.full((4,), number + 1.0))
        expected = torch.full((4, 4), number + 1.0) if number == 0 else torch.full((4, 4), (number + 1) / 2).half()
        assert torch.equal(layer.weight, expected) and layer.weight.dtype == expected.dtype
    assert at_work() == []


def test_one_weight_is_made_while_the_next_is_read() -> None:
    pause = 0.04
    start = time.perf_counter()
    load(Files(lambda key: time.sleep(pause if "weight" in key else 0)), Halves(lambda number: time.sleep(pause)))
    # one after the other it would be 11 pauses
    assert time.perf_counter() - start < 0.85 * (2 * COUNT - 1) * pause


def test_no_more_than_two_weights_wait() -> None:
    reading: list[int] = []
    ahead: list[int] = []

    def on_make(number: int) -> None:
        time.sleep(0.03)  # long enough to read all others
        ahead.append(reading[-1] - number)

    load(Files(lambda key: reading.append(int(key[0])) if "weight" in key else None), Halves(on_make))
    assert len(ahead) == COUNT - 1 and max(ahead) <= 2


def test_an_error_of_what_makes_weights_is_raised_once_and_nothing_is_at_work_after_it() -> None:
    def on_make(number: int) -> None:
        if number == 2:
            raise MemoryError("no room for layer 2")

    half = Halves(on_make)
    with pytest.raises(MemoryError, match="no room for layer 2"):
        load(Files(), half)
    assert at_work() == []
    last = Halves(lambda number: (_ for _ in ()).throw(MemoryError("at the end")) if number == COUNT - 1 else None)
    with pytest.raises(MemoryError, match="at the end"):
        load(Files(), last)
    assert at_work() == []


def test_an_error_of_what_reads_ends_what_makes_weights() -> None:
    begun, held = threading.Event(), threading.Event()

    def on_read(key: str) -> None:
        if key == "3.weight":
            assert begun.wait(PATIENCE)
            threading.Timer(0.05, held.set).start()
            raise OSError("the disk is gone")

    def on_make(number: int) -> None:
        if number == 2:
            begun.set()
            assert held.wait(PATIENCE)

    half = Halves(on_make)
    with pytest.raises(OSError, match="the disk is gone"):
        load(Files(on_read), half)
    assert at_work() == [] and half.made == [1, 2]  # what was begun has been waited for
    files = Files()
    files.numbers["4.weight"] = torch.full((4, 4), torch.nan)
    with pytest.raises(UserError, match=r"holds numbers in 4\.weight that are NaN"):
        load(files, Halves())
    assert at_work() == []


def test_of_the_work_behind_two_pieces_wait_at_most() -> None:
    used: list[Any] = []
    with _Behind() as behind:
        for number in range(4):
            behind.do(lambda number=number: number, used.append)  # type: ignore[misc]
            assert used == list(range(number - 1))
    assert used == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("numbers", "span"),
    [
        ([], (0, 0)),
        ([1.0, 2.0], (3, 3)),
        ([0.0, 0.0], (0, 0)),
        ([-2.0, 2.0], (-2, 2)),
        ([1.0, float("inf")], (1, float("inf"))),
        ([float("-inf"), float("inf")], (float("-inf"), float("inf"))),
    ],
)
def test_the_range_of_numbers_tells_damage_and_zeros(numbers: list[float], span: tuple[float, float]) -> None:
    assert _range(torch.tensor(numbers)) == span
    assert all(math.isnan(one) for one in _range(torch.tensor([1.0, float("nan")])))


@pytest.mark.parametrize(
    ("dtype", "largest", "broken"), [(torch.float8_e4m3fn, 0x7E, 0x7F), (torch.float8_e5m2, 0x7B, 0x7C)]
)
def test_the_range_of_fp8_is_that_of_its_bits(dtype: torch.dtype, largest: int, broken: int) -> None:
    for sign in (0, 0x80):
        data = torch.tensor([[1, largest | sign]], dtype=torch.uint8).view(dtype)
        assert data.float().isfinite().all()
        assert _range(QuantizedTensor(data)) == (0, largest)
        assert _range(QuantizedTensor(data, torch.tensor(0.5))) == (0, largest * 0.5)
        data = torch.tensor([[1, broken | sign]], dtype=torch.uint8).view(dtype)
        assert not data.float().isfinite().all() and math.isnan(_range(QuantizedTensor(data))[1])
    assert math.isnan(
        _range(QuantizedTensor(data.view(torch.uint8).fill_(1).view(dtype), torch.tensor(float("nan"))))[1]
    )
    assert _range(QuantizedTensor(torch.zeros(2, 2).to(dtype))) == (0, 0)


def test_blocks_of_zeros_are_known_by_all_their_weights() -> None:
    blocks, zero, one = _Blocks(), torch.zeros(2), torch.ones(2)
    assert blocks.see("blocks.0.a.weight", zero) and blocks.see("blocks.1.a.weight", zero)
    assert blocks.see("encoder.block.2.a.weight", zero) and blocks.zero == {"blocks.0", "blocks.1", "encoder.block.2"}
    assert blocks.see("blocks.0.b.weight", one) and blocks.zero == {"blocks.1", "encoder.block.2"}
    assert blocks.see("blocks.0.c.weight", zero) and "blocks.0" not in blocks.zero
    for name in ("blocks.1.a.bias", "blocks.1.norm.weight", "head.weight", "blocks.10.weight"):
        assert blocks.see(name, one)
    assert blocks.zero == {"blocks.1", "encoder.block.2"}
    assert not blocks.see("blocks.1.a.weight", torch.tensor([1.0, float("nan")]))
    assert not blocks.see("x", torch.tensor([float("inf")])) and not blocks.see("x", torch.tensor([-float("inf"), 1.0]))


@pytest.mark.parametrize("rounding", [None, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_numbers_are_put_into_memory_row_by_row(
    rounding: torch.dtype | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.weights.loading.PIECE", piece)
    numbers = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = numbers if rounding is None else numbers.to(rounding).float()
    for tensor in (numbers, QuantizedTensor(numbers * 2, torch.tensor(0.5))):
        for shape in ((5, 3), (5, 3, 1)):
            value = torch.empty(shape)
            _fill(value, tensor, rounding)
            assert torch.equal(value.view(5, 3), expected)
    turned = torch.empty(3, 5).T
    _fill(turned, QuantizedTensor(numbers), rounding)
    assert torch.equal(turned, expected)


def test_each_layer_has_a_buffer_for_its_parameters() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(3, 2, bias=number == 1) for number in range(2))
    dtypes = {"blocks.1.bias": torch.float32}
    likes = _likes(model, "blocks", lambda name: dtypes.get(name, torch.float16))
    assert [{name: (tuple(one.shape), one.dtype) for name, one in like.items()} for like in likes] == [
        {"blocks.0.weight": ((2, 3), torch.float16)},
        {"blocks.1.weight": ((2, 3), torch.float16), "blocks.1.bias": ((2,), torch.float32)},
    ]
    size = sum(PinnedBuffer.size(list(like.values())) for like in likes)
    for memory in (None, torch.zeros(size, dtype=torch.uint8)):
        places = _places(likes, memory)
        assert list(places) == ["blocks.0.weight", "blocks.1.weight", "blocks.1.bias"]
        for number, place in enumerate(places.values(), 1):
            place.fill_(number)
        assert [set(place.flatten().tolist()) for place in places.values()] == [{1}, {2}, {3}]
        shared = places["blocks.1.weight"].untyped_storage().data_ptr()
        assert places["blocks.1.bias"].untyped_storage().data_ptr() == shared
        if memory is not None:
            assert shared == memory.untyped_storage().data_ptr() and memory.any()
