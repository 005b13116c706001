"""Tokens are decoded greedily in a memory that stays; our attention is taken where it is right, and only there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.golden import GOLDEN_VLM
from wan.captioner import InternVLCaptioner, decoding
from wan.captioner.decoding import GreedyDecoder, LayeredVlm
from wan.detail import heard_by

EXPECTED = json.loads((GOLDEN_VLM / "expected.json").read_text(encoding="utf-8"))
FRAMES = np.load(GOLDEN_VLM / "frames.npy")


def place_one_token(
    projected: Tensor,
    turn: tuple[Tensor, Tensor],
    position: Tensor,
    key: Tensor,
    value: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """What the kernel of that name does, by PyTorch's own functions."""
    shared, dim = key.shape[1], key.shape[3]
    rows = projected.view(1, 1, -1, dim).transpose(1, 2)
    heads = rows.shape[1] - 2 * shared
    parts = [rows[:, :heads], rows[:, heads : heads + shared]]
    if norms is not None:
        parts = [nn.functional.rms_norm(part, (dim,), norm, epsilon) for part, norm in zip(parts, norms, strict=True)]
    cosine, sine = (part[:, None] for part in turn)
    turned = [torch.cat((-part[..., dim // 2 :], part[..., : dim // 2]), -1) for part in parts]
    query, new = (part * cosine + other * sine for part, other in zip(parts, turned, strict=True))
    at = int(position)
    key[:, :, at : at + 1], value[:, :, at : at + 1] = new, rows[:, heads + shared :]
    return query


def attend_with_one_query(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """What the kernel of that name does, by PyTorch's own function."""
    keys, values = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    return nn.functional.scaled_dot_product_attention(query, keys, values, seen, scale=scale).transpose(1, 2)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for our kernels, which need Triton, on a machine that could run them."""
    made = SimpleNamespace(calls=0, wrong=0.0)

    def attend(*given: Any) -> Tensor:
        made.calls += 1
        exact = attend_with_one_query(*given)
        return exact + float(made.wrong)

    module = SimpleNamespace(place_one_token=place_one_token, attend_with_one_query=attend)
    monkeypatch.setitem(sys.modules, "wan.captioner.decode_attention_kernel", module)
    monkeypatch.setattr(decoding, "runs_triton", lambda device: True)
    return made


@pytest.fixture
def vlm() -> Iterator[InternVLCaptioner]:
    captioner = InternVLCaptioner(GOLDEN_VLM / "orig", "cpu", torch.float32)
    yield captioner
    captioner.close()


def test_our_attention_gives_the_official_tokens(vlm: InternVLCaptioner, kernels: SimpleNamespace) -> None:
    language = vlm.model.model.language_model
    assert decoding._error_of_own_attention(language) < 1e-6  # float64 by way of float32
    assert kernels.calls == 1
    kernels.calls = 0
    ids, pixels = vlm.prepare(FRAMES, EXPECTED["question"])
    assert vlm.generate(ids, pixels, 12).tolist() == EXPECTED["greedy_ids"][:12]
    layers = len(language.layers)
    # a trial, and each token after the first, of 8 that are launched at once and of the other 3; not the prompt
    assert kernels.calls == 1 + 11 * layers
    assert all(isinstance(layer.self_attn, decoding._OneQuery) for layer in language.layers)
    first: Any = language.layers[0].self_attn
    assert first.fused is None
    with torch.inference_mode():
        decoding.fuse_projections(vlm.model)
    fused: Any = first.fused
    weight, bias = fused
    parts = (first.q_proj, first.k_proj, first.v_proj)
    assert weight.data_ptr() == first.q_proj.weight.data_ptr() and (bias is None) is (first.q_proj.bias is None)
    assert torch.equal(torch.cat([part.weight for part in parts]), weight)
    decoding.fuse_projections(vlm.model)
    assert first.fused is fused  # once is enough
    assert vlm.generate(ids, pixels, 12).tolist() == EXPECTED["greedy_ids"][:12]
    decoding.use_own_attention(vlm.model)
    assert type(first).__mro__.count(decoding._OneQuery) == 1


@pytest.mark.parametrize(("wrong", "taken"), [(0.0, True), (1e-3, False), (float("nan"), False)])
def test_an_attention_that_is_wrong_is_left_out(
    wrong: float, taken: bool, vlm: InternVLCaptioner, kernels: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.wrong = wrong
    decoding.use_own_attention(vlm.model)
    layers = vlm.model.model.language_model.layers
    assert {isinstance(layer.self_attn, decoding._OneQuery) for layer in layers} == {taken}
    assert ("is wrong on this machine" in caplog.text) is not taken
    decoding.fuse_projections(vlm.model)  # of what is not ours nothing is
    assert {"fused" in vars(layer.self_attn) for layer in layers} == {taken}


def test_without_triton_the_library_s_attention_stays(vlm: InternVLCaptioner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_error_of_own_attention", lambda language: 0.0)
    monkeypatch.setattr(decoding, "runs_triton", lambda device: False)
    decoding.use_own_attention(vlm.model)
    assert not isinstance(vlm.model.model.language_model.layers[0].self_attn, decoding._OneQuery)


class Library(nn.Module):
    """Attention as the library has it: tells what it is given."""

    def forward(self, *given: Any, **options: Any) -> tuple[Any, ...]:
        return given, options


class Ours(decoding._OneQuery, Library):
    layer_idx = 0


@pytest.mark.parametrize(
    ("tokens", "initialized", "sliding", "position", "mask", "ours"),
    [
        (1, True, False, True, True, True),
        (2, True, False, True, True, False),
        (1, False, False, True, True, False),
        (1, True, True, True, True, False),
        (1, True, False, False, True, False),
        (1, True, False, True, False, False),
    ],
)
def test_one_token_to_a_static_cache_is_ours_and_the_rest_is_the_library_s(
    tokens: int,
    initialized: bool,
    sliding: bool,
    position: bool,
    mask: bool,
    ours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = SimpleNamespace(attend_with_one_query=None, place_one_token=None)
    monkeypatch.setitem(sys.modules, "wan.captioner.decode_attention_kernel", stub)
    module = Ours()
    layer = SimpleNamespace(is_initialized=initialized, is_sliding=sliding)
    given: Any = (
        torch.zeros(1, tokens, 8),
        (torch.zeros(1), torch.zeros(1)),
        torch.ones(1) if mask else None,
        SimpleNamespace(layers=[layer]),
    )
    options = {"position_ids": torch.zeros(1, 1) if position else None}
    if ours:
        with pytest.raises(AttributeError, match="q_proj"):  # which it would multiply by
            module(*given, **options)
    else:
        seen: Any = module(*given, **options)
        assert all(one is other for one, other in zip(seen[0], given, strict=True)) and seen[1] == options
    without: Any = module(*given[:3], None, **options)
    assert without[0][3] is None


class Qwen3RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size)), epsilon


class Qwen2RMSNorm(Qwen3RMSNorm): ...


class OtherRMSNorm(Qwen3RMSNorm): ...


def test_norms_of_qwen_become_one_kernel_with_their_weights() -> None:
    model = nn.Sequential(Qwen3RMSNorm(8, 1e-6), nn.Sequential(Qwen2RMSNorm(4, 1e-5)), OtherRMSNorm(8, 1e-6))
    weights = list(model.parameters())
    fused = decoding.fuse_norms(model)
    assert [type(one).__name__ for one in fused.modules()].count("RMSNorm") == 2
    assert [one.eps for one in fused.modules() if isinstance(one, nn.RMSNorm)] == [1e-6, 1e-5]
    assert all(one is other for one, other in zip(fused.parameters(), weights, strict=True))


class Counting(nn.Module):
    """A model whose next token is always one more, and which keeps what it was given."""

    def __init__(self, words: int = 600) -> None:
        super().__init__()
        self.device, self.config = torch.device("cpu"), None
        self.words = words
        self.model = SimpleNamespace(language_model=self.language_model)
        self.lm_head = nn.Identity()
        self.steps: list[tuple[int, int]] = []

    def after(self, ids: Tensor) -> Tensor:
        return nn.functional.one_hot((ids + 1) % self.words, self.words).float()

    def forward(self, input_ids: Tensor, pixel_values: Tensor, past_key_values: Any, logits_to_keep: int) -> Any:
        assert logits_to_keep == 1
        return SimpleNamespace(logits=self.after(input_ids[:, -logits_to_keep:]))

    def language_model(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any
    ) -> Any:
        assert attention_mask.ndim == 4
        self.steps.append((int(position_ids), int(attention_mask.sum())))
        return SimpleNamespace(last_hidden_state=self.after(input_ids))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    class Cache:
        def __init__(self, config: Any, max_cache_len: int) -> None:
            self.resets = 0

        def reset(self) -> None:
            self.resets += 1

    monkeypatch.setattr("transformers.StaticCache", Cache)
    monkeypatch.setattr(decoding, "use_own_attention", lambda model: None)
    return Counting()


@pytest.mark.parametrize(("needed", "capacity"), [(1, 256), (256, 256), (257, 512), (600, 768)])
def test_a_decoder_has_room_for_whole_rounds_of_tokens(needed: int, capacity: int, counting: Counting) -> None:
    decoder = GreedyDecoder(counting, needed)
    assert decoder.capacity == capacity and decoder.graph is None
    assert len(decoder.places) == len(decoder.made) == capacity


@pytest.mark.parametrize(
    ("most", "end", "tokens", "steps", "told"),
    [
        (1, None, [10], 0, []),
        (2, None, [10, 11], 1, ["2 of 2 tokens"]),
        (9, None, [*range(10, 19)], 8, ["9 of 9 tokens"]),
        (12, None, [*range(10, 22)], 11, ["9 of 12 tokens", "12 of 12 tokens"]),
        (40, 10, [10], 0, []),
        (40, 12, [10, 11, 12], 8, ["3 of 40 tokens"]),
        (40, 18, [*range(10, 19)], 8, ["9 of 40 tokens"]),
        (40, 19, [*range(10, 20)], 16, ["9 of 40 tokens", "10 of 40 tokens"]),
    ],
)
def test_tokens_are_launched_eight_at_once_up_to_the_end_mark(
    most: int, end: int | None, tokens: list[int], steps: int, told: list[str], counting: Counting
) -> None:
    decoder = GreedyDecoder(counting, 50)
    heard: list[str] = []
    ids = torch.tensor([[3, 4, 9]])
    for again in range(2):  # nothing of the answer before is left
        counting.steps.clear()
        heard.clear()
        with heard_by(heard.append):
            assert decoder(ids, torch.zeros(1), most, end).tolist() == tokens
        assert counting.steps == [(3 + at, 4 + at) for at in range(steps)]  # each sees all before it and itself
        assert heard == told and decoder.cache.resets == again + 1


def test_layers_that_come_one_by_one_are_asked_for_by_their_numbers() -> None:
    layers = nn.ModuleList(nn.Identity() for _ in range(3))
    model = nn.Module()
    model.model = nn.Module()
    model.model.language_model = nn.Module()
    model.model.language_model.layers = layers
    layered = LayeredVlm(model)
    assert layered.layers is layers and layered.title == "the VLM"
    came: list[int] = []
    layers[1](torch.zeros(1))
    layered.before_layer = came.append
    for layer in layers:
        layer(torch.zeros(1))
    assert came == [0, 1, 2]
