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
