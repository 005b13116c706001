"""Models that are loaded while another computes."""

from __future__ import annotations

import time
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.support.golden import GOLDEN
from wan import UserError
from wan.denoiser.model import WanModel
from wan.device.host_budget import HostPlan
from wan.models import Models
from wan.weights.checkpoint import Names, open_checkpoint

NAMES = ("high_noise_model", "low_noise_model")


def models_of(loader: Any, **options: Any) -> Models:
    checkpoint: Any = SimpleNamespace(experts=dict.fromkeys(NAMES), single=False, parts=())
    return Models("x", checkpoint, dict.fromkeys(NAMES, loader), **options)


def test_a_model_is_loaded_while_the_block_computes() -> None:
    begun, computed = Event(), Event()

    def loader(mapped: bool) -> object:
        begun.set()
        assert computed.wait(10)
        return object()

    models = models_of(loader)
    with models.loading(["low_noise_model"]) as check:
        assert begun.wait(10)  # nobody has asked for it yet
        check()
        assert not models.is_loaded("low_noise_model")
        computed.set()
        model = models["low_noise_model"]  # waits for it
    assert models["low_noise_model"] is model and models.loaded == [model]
    with models.loading([]) as check:
        check()


def test_what_goes_wrong_is_told_in_the_block_and_where_the_model_is_used() -> None:
    calls, is_mended = [], Event()

    def loader(mapped: bool) -> object:
        calls.append(mapped)
        if is_mended.is_set():
            return object()
        raise UserError("shard 2 is damaged")

    models = models_of(loader)
    with pytest.raises(UserError, match="shard 2"), models.loading(["low_noise_model"]) as check:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            check()
    assert not models.is_loaded("low_noise_model")
    with pytest.raises(UserError, match="shard 2"):
        models["low_noise_model"]
    is_mended.set()  # a server goes on, and somebody has downloaded it again
    with models.loading(["low_noise_model"]) as check:
        check()
        assert models["low_noise_model"] is not None
    assert len(calls) == 3


@pytest.mark.parametrize("given", [{"in_threads": False}, {"plan": HostPlan(in_turn=True)}, {"alone": False}])
def test_where_it_cannot_be_loaded_beside_another_only_its_files_are_read(given: dict[str, Any]) -> None:
    options = dict(given)
    plan, alone = options.pop("plan", HostPlan()), options.pop("alone", True)
    models = models_of(lambda mapped: pytest.fail("loaded"), **options)
    models.live_by(plan)
    with models.loading(["low_noise_model"], alone) as check:
        check()
        assert not models.is_loaded("low_noise_model")


def test_what_has_begun_when_the_block_ends_is_for_whoever_wants_it_next() -> None:
    begun, over, calls = Event(), Event(), []

    def loader(mapped: bool) -> object:
        calls.append(mapped)
        begun.set()
        assert over.wait(10)
        return object()

    models = models_of(loader)
    with pytest.raises(KeyboardInterrupt), models.loading(NAMES):
        assert begun.wait(10)
        raise KeyboardInterrupt
    over.set()
    with models.loading(NAMES[:1]) as check:
        check()
        assert models[NAMES[0]] is not None
    assert len(calls) == 1 and not models.is_loaded(NAMES[1])
    models.forget_all()
    assert not models.loaded and not models.is_loaded(NAMES[0])


def test_a_denoiser_that_is_built_in_a_thread_takes_no_memory_from_modules_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    building, made = Event(), Event()
    init = WanModel.__init__

    def slow(self: WanModel, **config: Any) -> None:
        init(self, **config)
        building.set()
        assert made.wait(10)

    monkeypatch.setattr(WanModel, "__init__", slow)
    weights = open_checkpoint(GOLDEN / "14b" / "ckpt", in_channels=36, experts=2, names=Names()).experts[NAMES[0]]
    thread = Thread(target=WanModel._empty, args=(weights,))
    thread.start()
    assert building.wait(10)
    layer = nn.Linear(2, 2)
    made.set()
    thread.join()
    assert layer.weight.device.type == "cpu"


def test_experts_that_are_in_memory_stay_for_the_next_clip_where_there_is_room() -> None:
    models = models_of(lambda mapped: object())
    assert models.experts_to_keep() == frozenset()
    assert models[NAMES[0]] is not None
    assert models.experts_to_keep() == {NAMES[0]}
    models.live_by(HostPlan(in_turn=True))
    assert models[NAMES[0]] is not None and models.experts_to_keep() == frozenset()
