"""Models that are loaded while another computes."""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from wan import UserError
from wan.device.host_budget import HostPlan
from wan.models import Models

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
    def loader(mapped: bool) -> object:
        raise UserError("shard 2 is damaged")

    models = models_of(loader)
    with models.loading(["low_noise_model"]) as check:
        while not models.is_loaded("low_noise_model"):
            pass
        with pytest.raises(UserError, match="shard 2"):
            check()
        with pytest.raises(UserError, match="shard 2"):
            models["low_noise_model"]
    assert not models.is_loaded("low_noise_model")


@pytest.mark.parametrize("given", [{"in_threads": False}, {"plan": HostPlan(in_turn=True)}, {"alone": False}])
def test_where_it_cannot_be_loaded_beside_another_only_its_files_are_read(given: dict[str, Any]) -> None:
    options = dict(given)
    plan, alone = options.pop("plan", HostPlan()), options.pop("alone", True)
    models = models_of(lambda mapped: pytest.fail("loaded"), **options)
    models.live_by(plan)
    with models.loading(["low_noise_model"], alone) as check:
        check()
        assert not models.is_loaded("low_noise_model")


def test_what_nobody_has_begun_to_load_when_the_block_ends_is_let_be() -> None:
    begun, over, calls = Event(), Event(), []

    def loader(mapped: bool) -> object:
        calls.append(mapped)
        begun.set()
        assert over.wait(10)
        return object()

    models = models_of(loader)
    with models.loading(NAMES):
        assert begun.wait(10)
    over.set()
    assert not models.loaded and not any(models.is_loaded(name) for name in NAMES)
    assert len(calls) == 1
