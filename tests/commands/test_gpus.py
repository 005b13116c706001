"""Which groups of GPUs go with the processes that were started, and what these are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from wan.commands.gpus import Gpus, check_world
from wan.device.budget import ClipNeeds
from wan.device.ranks import Sizes, World, choose_sizes
from wan.errors import UserError
from wan.options import Settings


@pytest.mark.parametrize(
    ("size", "given", "goes"),
    [
        (4, {}, True),
        (4, {"ulysses_size": 2}, True),
        (4, {"ulysses_size": 3}, False),
        (4, {"ulysses_size": 2, "cfg_size": 2}, True),
        (4, {"ulysses_size": 2, "cfg_size": 2, "ring_size": 1}, True),
        (4, {"ulysses_size": 2, "cfg_size": 1, "ring_size": 1}, False),
        (1, {"ulysses_size": 1}, True),
    ],
)
def test_sizes_that_are_given_make_up_the_processes_that_are_started(
    size: int, given: dict[str, Any], goes: bool
) -> None:
    settings = Settings(ckpt_dir="x", **given)
    if goes:
        check_world(settings, World(size=size))
        return
    with pytest.raises(UserError, match=f"does not make up the {size} processes that are started"):
        check_world(settings, World(size=size))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"t5_fsdp": True}, "^t5_fsdp: weights are shared among GPUs; start the command with torchrun"),
        ({"t5_fsdp": True, "dit_fsdp": True}, "^t5_fsdp and dit_fsdp: weights are shared"),
        ({"ulysses_size": 2}, "ulysses_size 2 needs 2 processes: start the command with torchrun --nproc_per_node=2"),
        ({"ulysses_size": 2, "cfg_size": 2}, "ulysses_size 2, cfg_size 2 needs 4 processes"),
    ],
)
def test_one_process_cannot_be_several(given: dict[str, Any], message: str) -> None:
    settings = Settings(ckpt_dir="x", **given)
    with pytest.raises(UserError, match=message):
        check_world(settings, World())
    check_world(replace(settings, dry_run=True), World())  # which says what they would do
    check_world(settings, World(size=4))


class Pipeline:
    """Notes what its processes are told."""

    heads = 24

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.budget = SimpleNamespace(limit=5)
        self.models = SimpleNamespace(lora_bytes=lambda loras: {"model": len(loras)})
        self.rules = SimpleNamespace(
            merge=lambda *_, **__: "sampling", shares=lambda sampling: [(1, 1), (3, 1)] * (sampling == "sampling")
        )
        self.team = SimpleNamespace(sizes="sizes", watched=self._watched, end=lambda: self.told.append("end"))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self.told.append("watched")
        yield

    def choose_sizes(self, possible: Any, guided: float, clips: list[ClipNeeds], node: int, limit: int) -> Sizes:
        assert (clips, limit) == (NEEDS, 5)
        return choose_sizes(possible, guided)

    def share_memory(self, sizes: Sizes, node: int) -> None:
        self.told.append((sizes.tokens, node) if sizes.ring == 1 else (sizes, node))

    def join(self, *what: Any, **how: Any) -> None:
        self.told.append((what, how))

    def release(self) -> None:
        self.told.append("release")

    def follow(self) -> None:
        self.told.append("follow")


CLIP: Any = SimpleNamespace(geometry="geometry", loras={"model": "two"})
NEEDS = [ClipNeeds(CLIP.geometry, True, {"model": 1})]


def gpus(size: int = 1, **given: Any) -> Gpus:
    return Gpus(Settings(ckpt_dir="x", **given), World(size=size), offload=True)


def test_a_dry_run_tells_how_gpus_would_share_the_work() -> None:
    pipeline: Any = Pipeline()
    assert gpus().outline(pipeline, [CLIP]) == gpus(cfg_size=1).outline(pipeline, [CLIP]) == [] == pipeline.told
    # half of the steps are guided, so that two groups would lose more than they gain
    assert gpus(4).outline(pipeline, [CLIP]) == ["4 GPUs: `cfg_size` 1, `ulysses_size` 4"]
    assert gpus(ulysses_size=2, cfg_size=2).outline(pipeline, [CLIP]) == ["4 GPUs: `cfg_size` 2, `ulysses_size` 2"]
    assert pipeline.told == [(4, 4), (2, 4)]  # its memory is that of a process
    several = Gpus(Settings(ckpt_dir="x"), World(size=4, local_size=2), offload=True)
    assert several.outline(pipeline, [CLIP, CLIP]) and pipeline.told[2:] == [(4, 2)]  # slices are a machine's
    assert gpus(4, ring_size=2).outline(pipeline, [CLIP])[0].endswith("`ulysses_size` 2, `ring_size` 2")


def test_until_sizes_are_chosen_a_clip_needs_what_the_best_of_them_for_memory_take() -> None:
    pipeline: Any = Pipeline()
    gpus().expect(pipeline)
    for given in ({}, {"cfg_size": 2}, {"ring_size": 2}):
        gpus(4, **given).expect(pipeline)
    assert pipeline.told == [(4, 4), (2, 4), (Sizes(1, 2, 2), 4)]  # without a ring, where the choice is free
    with pytest.raises(UserError, match="ulysses_size 16 does not go"):
        gpus(32, ulysses_size=16).expect(pipeline)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_NVLS_ENABLE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("environment")
def test_processes_join_before_a_clip_and_part_after_it() -> None:
    pipeline: Any = Pipeline()
    with gpus().together(pipeline, [CLIP]):
        assert pipeline.told == []  # alone there is nothing to share
    given = gpus(4, ulysses_size=4, collective_timeout=77)
    with given.together(pipeline, [CLIP]):
        (world, guided, clips), how = pipeline.told[0]
        assert (world, guided, clips) == (given.world, 0.5, NEEDS)  # two of four steps
        assert how == {"timeout": 77, "cfg": None, "ulysses": 4, "ring": None}
        assert pipeline.told[1:] == ["watched"]
        assert os.environ["NCCL_NVLS_ENABLE"] == os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert pipeline.told[2:] == ["release", "end", (4, 4)]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("error", "parts"), [(GeneratorExit, True), (RuntimeError, False), (KeyboardInterrupt, False)])
def test_a_loop_that_is_left_lets_the_others_end_and_an_error_does_not_wait_for_them(
    error: type[BaseException], parts: bool
) -> None:
    pipeline: Any = Pipeline()
    with pytest.raises(error), gpus(2).together(pipeline, [CLIP]):
        raise error
    assert pipeline.told[2:] == (["release", "end", (2, 2)] if parts else [])


@pytest.mark.usefixtures("environment")
def test_another_process_follows_until_the_first_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")  # who says it means it
    pipeline: Any = Pipeline()
    gpus(2).follow(pipeline)
    assert pipeline.told[1:] == ["watched", "follow", "end"] and os.environ["NCCL_NVLS_ENABLE"] == "1"
