"""Tokens shared among processes: each forward gives what one process gives. Processes on a CPU, through gloo."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support import tiny_denoiser
from tests.support.ranks import Ranks
from wan.denoiser import attention_backends
from wan.denoiser.fp8 import attend_in_fp8
from wan.denoiser.sequence import Share
from wan.device.parallel import Team
from wan.device.ranks import Sizes, World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In place of the package's kernel, with its layout."""
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return mixed.transpose(1, 2).contiguous()


KERNELS = {"8 bits": attend_in_fp8, "flash 4": attention_backends.flash_attention_4}


def forward(
    team: Team | None,
    frames: int,
    rows: int,
    per_frame: bool,
    dtype: torch.dtype,
    compiled: bool,
    kernel: str | None = None,
) -> Any:
    torch.set_num_threads(1)
    attention_backends._flash_attn_func = lambda: flash  # type: ignore[assignment]
    model = tiny_denoiser.build(dtype=dtype, num_attention_heads=4, attention_head_dim=12)
    if kernel is not None:
        for block in model.blocks:
            block.attn1.processor.attend = KERNELS[kernel]
    if compiled:
        model.compile_blocks("eager")
    if team is not None:
        model.token_group = team.tokens
    latents = torch.randn(1, 4, frames, 2 * rows, 8, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([[0.0] + [700.0] * (frames - 1)]) if per_frame else torch.tensor([700.0])
    with torch.no_grad():
        return model(latents, timestep, tiny_denoiser.prompt(2), return_dict=False)[0]


alone = functools.cache(functools.partial(forward, None))


def in_a_rank(rank: int, size: int, ring: int, cases: list[Any]) -> list[Any]:
    sizes = Sizes(1, size // ring, ring)
    team = Team.start(World(rank, size, rank), sizes, torch.device("cpu"), 60)
    outputs = [forward(team, *case) for case in cases]
    team.end()
    return outputs


CASES: list[tuple[Any, ...]] = [
    (3, 4, False, torch.float32, False),
    (3, 4, True, torch.float32, False),  # a rank's run of tokens begins inside a frame
    (3, 3, True, torch.float32, False),  # 36 tokens
    (5, 1, True, torch.float32, True),  # 20 tokens
    (1, 3, False, torch.float32, False),  # 12 tokens
    (3, 4, True, torch.bfloat16, False),
    (3, 4, False, torch.bfloat16, True),
    # any kernel sees all keys of its heads, and so is no farther from exact numbers than in one process
    (3, 3, True, torch.float32, False, "8 bits"),
    (5, 1, True, torch.float32, True, "flash 4"),
]


@pytest.mark.parametrize(("size", "ring"), [(2, 1), (2, 2), (4, 1), (4, 2), pytest.param(5, 5, marks=pytest.mark.rare)])
def test_a_forward_of_several_processes_is_that_of_one(size: int, ring: int, ranks: Ranks) -> None:
    def compiled(case: tuple[Any, ...]) -> bool:
        """In each kind of exchange with two processes, and of four, which trace for long, where both kinds meet."""
        return bool(case[4]) and (size == 2 or (ring == 2 and case[3] == torch.bfloat16))

    cases = [(*case[:4], compiled(case), *case[5:]) for case in CASES]
    for outputs in ranks.run(in_a_rank, size, ring, cases):
        for case, output in zip(cases, outputs, strict=True):
            exact, one = alone(*case[:3], torch.float32, False), alone(*case)
            if case[3] == torch.float32 and case[5:] != ("8 bits",):
                assert (output - exact).norm() <= 1e-5 * exact.norm(), case
            else:
                assert (output - exact).norm() <= 1.1 * (one - exact).norm(), case


def test_tokens_are_dealt_out_in_equal_numbers_with_filling_at_the_end() -> None:
    shares = [Share(10, 4, index, "group", 4, "group", 1, "") for index in range(4)]
    assert [share.count for share in shares] == [3, 3, 3, 3]
    assert [share.real for share in shares] == [3, 3, 3, 1]
    assert Share(9, 8, 7, "group", 8, "group", 1, "").real == 0


def test_cudnn_gets_numbers_as_they_lie_and_gives_them_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    works: Any = F.scaled_dot_product_attention

    def attend(*parts: torch.Tensor) -> torch.Tensor:
        seen.extend(parts)
        mixed: torch.Tensor = works(*parts)
        return mixed

    monkeypatch.setattr(attention_backends, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    parts: list[Any] = list(torch.randn(3, 1, 7, 4, 8, generator=torch.Generator().manual_seed(1)))
    mixed = attention_backends.cudnn_attention(*parts)
    assert [one.data_ptr() for one in seen] == [part.data_ptr() for part in parts]
    expected = works(*(part.transpose(1, 2) for part in parts)).transpose(1, 2)
    assert torch.equal(mixed, expected) and mixed.shape == parts[0].shape


def test_only_what_comes_from_other_gpus_is_left_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def fastest(candidates: Any, *_: torch.Tensor) -> str:
        asked.append(set(candidates))
        return "native"

    monkeypatch.setattr(attention_backends, "fastest", fastest)
    for travels in (False, True):
        attention_backends.fastest_attention(torch.device("cpu"), 64, 2, 8, torch.bfloat16, False, travels)
    attention_backends.fastest_attention.cache_clear()
    alone, shared = asked
    assert shared - alone == {"cudnn"} and "_native_cudnn" in alone


def share(tokens: int, ranks: int, index: int, heads_ranks: int = 1, ring_ranks: int = 1) -> Share:
    return Share(tokens, ranks, index, "all", heads_ranks, "heads", ring_ranks, "ring")


@pytest.mark.parametrize(
    ("tokens", "ranks", "real"),
    [(12, 4, [3, 3, 3, 3]), (10, 4, [3, 3, 3, 1]), (9, 4, [3, 3, 3, 0]), (5, 4, [2, 2, 1, 0]), (1, 3, [1, 0, 0])],
)
def test_each_rank_has_a_run_of_all_tokens_and_the_last_are_filled_up(tokens: int, ranks: int, real: list[int]) -> None:
    x = torch.arange(1.0, tokens + 1)[None, :, None, None].expand(1, tokens, 2, 3)
    shares = [share(tokens, ranks, index) for index in range(ranks)]
    count = shares[0].count
    assert [one.real for one in shares] == real and {one.count for one in shares} == {count}
    for one in shares:
        mine = one.mine(x)
        begin = one.index * count
        expected = [*range(begin + 1, begin + 1 + one.real), *[0] * (count - one.real)]
        assert mine.shape == (1, count, 2, 3) and mine[0, :, 1, 2].tolist() == expected
        assert torch.equal(one.mine(x[..., 0]), mine[..., 0])


def test_a_token_has_the_row_of_its_frame() -> None:
    cpu = torch.device("cpu")
    # three frames of four tokens, five a rank
    assert share(12, 3, 0).rows(3, cpu).tolist() == [0, 0, 0, 0]
    assert share(12, 2, 1).rows(3, cpu).tolist() == [1, 1, 2, 2, 2, 2]
    assert share(12, 5, 4).rows(3, cpu).tolist() == [2, 2, 2]  # beyond the end the last one's
    assert share(12, 2, 0).rows(12, cpu).tolist() == [0, 1, 2, 3, 4, 5]


class Exchange:
    """The operations of several ranks, whose tensors are those of all of them, one after the other."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def all_to_all_single(self, parts: torch.Tensor, out: list[int], into: list[int], name: str) -> torch.Tensor:
        self.asked.append((name, tuple(parts.shape), out, into))
        return parts

    def all_gather_into_tensor(self, x: torch.Tensor, ranks: int, name: str) -> torch.Tensor:
        self.asked.append((name, tuple(x.shape), ranks))
        return torch.cat([x + 100 * rank for rank in range(ranks)])

    def wait_tensor(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("wait")
        return x


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> Exchange:
    operations = Exchange()
    monkeypatch.setattr("wan.denoiser.sequence._operations", operations)
    return operations


def test_alone_for_its_heads_a_rank_exchanges_nothing(exchange: Exchange) -> None:
    x, one = torch.rand(1, 3, 4, 2), share(6, 2, 0)
    assert torch.equal(one.landed(one.spread(x)), x[0]) and one.collect(x) is x and one.around(x[0]) is not None
    assert one.arrived(torch.zeros(9, 4, 2)).shape == (1, 6, 4, 2) and exchange.asked == []


def test_tokens_are_exchanged_for_heads_and_back(exchange: Exchange) -> None:
    one = share(5, 2, 0, heads_ranks=2)  # three a rank, of which the last is filling
    x = torch.arange(24.0).view(1, 3, 4, 2)
    parts = one.spread(x)
    assert exchange.asked == [("heads", (2, 3, 2, 2), [1, 1], [1, 1]), "wait"]  # one at a time where there is no GPU
    assert torch.equal(parts[0], x[0, :, :2]) and torch.equal(parts[1], x[0, :, 2:])
    whole = one.landed(parts)
    assert exchange.asked[2:] == ["wait"] and whole.shape == (6, 2, 2)
    back = one.collect(whole[None, :5])
    assert exchange.asked[3:] == [("heads", (2, 3, 2, 2), [1, 1], [1, 1]), "wait", "wait"]
    exchange.asked.clear()
    one.spread(x.to("meta"))
    assert len(exchange.asked) == 1
    x[0, 2, 2:] = 0  # the filling of the last rank's tokens
    assert torch.equal(back, x)


def test_a_ring_gathers_the_keys_of_all_without_filling(exchange: Exchange) -> None:
    one = share(5, 2, 0, ring_ranks=2)
    x = torch.arange(6.0).view(3, 2, 1)
    whole = one.arrived(one.around(x))
    assert exchange.asked == [("ring", (3, 2, 1), 2), "wait", "wait"]
    assert torch.equal(whole, torch.cat([x, x + 100])[None, :5])
    exchange.asked.clear()
    assert torch.equal(one.whole(x[None, ..., 0]), torch.cat([x, x + 100])[None, :5, :, 0])
    assert exchange.asked == [("all", (3, 2), 2), "wait"]


@pytest.mark.parametrize("ring", [1, 2])
def test_attention_sees_all_keys_and_a_ring_its_own_queries(ring: int, exchange: Exchange) -> None:
    seen: list[tuple[tuple[int, ...], ...]] = []
    order: list[str] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        assert query.max() == 1 and key[0, 0, 0, 0] == 2 and value[0, 0, 0, 0] == 3
        return query

    def made(name: str, level: float) -> Any:
        def make() -> torch.Tensor:
            order.append(name)
            return torch.full((1, 3, 2, 4), level)

        return make

    one = share(3 if ring == 1 else 5, ring, 0, ring_ranks=ring)
    mixed = one.attend(kernel, made("value", 3), made("query", 1), made("key", 2))
    keys = (1, 3, 2, 4) if ring == 1 else (1, 5, 2, 4)
    assert seen == [((1, 3, 2, 4), keys, keys)] and mixed.shape == (1, 3, 2, 4)
    assert order == (["value", "query", "key"] if ring == 1 else ["value", "key", "query"])  # the rest is on its way
