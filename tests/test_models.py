"""Models that are loaded while another computes."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5EncoderModel

from tests.support.golden import GOLDEN, float32
from wan import UserError
from wan.background import BackgroundLoader
from wan.denoiser.model import WanModel
from wan.detail import heard_by, tell_detail
from wan.device.host_budget import HostPlan
from wan.device.shared import CommonLayers
from wan.models import Models, loaders
from wan.settings import LoraFile
from wan.text.umt5 import PromptTokenizer, TextEncoder
from wan.vae.vae import Wan2_1_VAE
from wan.weights.checkpoint import Names, open_checkpoint

NAMES = ("high_noise_model", "low_noise_model")


def models_of(loader: Any, **options: Any) -> Models:
    checkpoint: Any = SimpleNamespace(experts=dict.fromkeys(NAMES), single=False, parts=())
    return Models("x", checkpoint, dict.fromkeys(NAMES, loader), **options)


def loading_threads() -> set[Thread]:
    return {one for one in threading.enumerate() if one.name == "loading"}


def test_a_model_is_loaded_while_the_block_computes() -> None:
    begun, computed, calls = Event(), Event(), list[bool]()

    def loader(mapped: bool, common: object) -> object:
        calls.append(mapped)
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
    assert models["low_noise_model"] is model and models.loaded == [model] and len(calls) == 1
    with models.loading([]) as check:
        check()


def test_what_a_thread_has_loaded_is_for_the_first_who_takes_it() -> None:
    background = BackgroundLoader(str.upper)
    with background.loading(["a", "b"]):
        assert (background.take("b"), background.take("b"), background.take("c")) == ("B", None, None)
    assert background.take("a") == "A" and not background.has("b")


def test_what_goes_wrong_is_told_in_the_block_and_where_the_model_is_used() -> None:
    calls, is_mended = [], Event()

    def loader(mapped: bool, common: object) -> object:
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


def test_who_waits_for_a_model_hears_what_its_thread_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.background.LOOKS", 0.01)
    told, heard = list[str](), Event()

    def hear(detail: str) -> None:
        told.append(detail)
        heard.set()

    def loader(mapped: bool, common: object) -> object:
        tell_detail("shard 2 of 6")
        assert heard.wait(10)
        return object()

    models = models_of(loader)
    with heard_by(hear), models.loading(NAMES[:1]):
        assert models[NAMES[0]] is not None
    assert set(told) == {"shard 2 of 6"}
    with models.loading(NAMES[:1]):  # it is there, and nobody loads it again
        pass
    assert len(models.loaded) == 1


def test_what_is_forgotten_while_it_comes_is_not_kept() -> None:
    begun, over = Event(), Event()

    def loader(mapped: bool, common: object) -> object:
        begun.set()
        assert over.wait(10)
        return object()

    models = models_of(loader)
    with models.loading(NAMES[:1]):
        assert begun.wait(10)
        models.forget_all()
        over.set()
    assert not models.is_loaded(NAMES[0]) and models._background.take(NAMES[0]) is None


def test_what_is_forgotten_while_it_comes_is_read_no_further_and_what_waits_is_not_read() -> None:
    begun, forgotten, begins, ends = Event(), Event(), list[str](), list[str]()

    def loader(name: str) -> Any:
        def load(mapped: bool, common: object) -> object:
            begins.append(name)
            tell_detail("shard 1 of 2")
            begun.set()
            assert forgotten.wait(10)
            tell_detail("shard 2 of 2")
            ends.append(name)
            return object()

        return load

    models = models_of(None)
    models._loaders = {name: loader(name) for name in NAMES}
    before = loading_threads()  # of other tests
    with models.loading(NAMES):
        assert begun.wait(10)
        (thread,) = loading_threads() - before
        models.forget_all()
        forgotten.set()
        thread.join(10)
    assert begins == [NAMES[0]] and not ends


def test_what_is_read_again_while_its_thread_still_reads_lies_elsewhere(tmp_path: Path) -> None:
    begun, over, lain = Event(), Event(), list[Any]()

    def loader(mapped: bool, common: object) -> object:
        lain.append(common)
        if len(lain) == 1:
            begun.set()
            assert over.wait(10)
        return object()

    file = tmp_path / "weights"
    file.touch()
    models = models_of(loader, common=CommonLayers({NAMES[0]: [file]}, "float32"))
    before = loading_threads()
    with models.loading(NAMES[:1]):
        assert begun.wait(10)
        (thread,) = loading_threads() - before
        models.forget_all()
        assert models[NAMES[0]] is not None
        over.set()
        thread.join(10)
    assert lain[0] is not lain[1] and None not in lain


def test_what_fails_in_a_thread_holds_no_memory_while_it_is_read_again() -> None:
    class Half:
        def __init__(self) -> None:
            self.hook = partial(id, self)  # as models are in circles of their hooks

    halves, kept = list[Any](), list[bool]()

    def loader(mapped: bool, common: object) -> object:
        half = Half()
        kept.extend(one() is not None for one in halves)
        halves.append(weakref.ref(half))
        raise UserError("its last shard is damaged")

    models = models_of(loader)
    with models.loading(NAMES[:1]), pytest.raises(UserError, match="its last shard is damaged"):
        models[NAMES[0]]
    assert kept == [False]


@pytest.mark.parametrize("given", [{"in_threads": False}, {"plan": HostPlan(in_turn=True)}, {"alone": False}])
def test_where_it_cannot_be_loaded_beside_another_only_its_files_are_read(given: dict[str, Any]) -> None:
    options = dict(given)
    plan, alone = options.pop("plan", HostPlan()), options.pop("alone", True)
    models = models_of(lambda *_: pytest.fail("loaded"), **options)
    models.live_by(plan)
    with models.loading(["low_noise_model"], alone) as check:
        check()
        assert not models.is_loaded("low_noise_model")


def test_what_has_begun_when_the_block_ends_is_for_whoever_wants_it_next() -> None:
    begun, over, calls = Event(), Event(), []

    def loader(mapped: bool, common: object) -> object:
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


def test_models_are_the_same_while_a_library_has_set_another_dtype_for_the_process() -> None:
    config = float32("i2v-A14B")
    checkpoint = open_checkpoint(GOLDEN / "14b" / "ckpt", in_channels=36, experts=2, names=Names())
    cpu, tokenizer = torch.device("cpu"), PromptTokenizer(checkpoint.tokenizer)
    load = loaders(
        checkpoint, config, tokenizer, lambda: Wan2_1_VAE, device=cpu, load_device=cpu, convert_model_dtype=False
    )

    def state(name: str) -> dict[str, torch.Tensor]:
        model = load[name](False, None)
        return dict(model.named_parameters()) | dict(model.named_buffers())

    for name in load:
        usual = state(name)
        torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a VLM
        try:
            other = state(name)
        finally:
            torch.set_default_dtype(torch.float32)
        assert usual.keys() == other.keys()
        assert all(one.dtype == other[key].dtype and torch.equal(one, other[key]) for key, one in usual.items()), name


@pytest.mark.parametrize("part", ["denoiser", "text encoder", "VAE"])
def test_a_model_that_is_built_in_a_thread_takes_no_memory_from_modules_of_others(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    building, made = Event(), Event()
    checkpoint = open_checkpoint(GOLDEN / "14b" / "ckpt", in_channels=36, experts=2, names=Names())
    built, empty, weights = {
        "denoiser": (WanModel, WanModel._empty, checkpoint.experts[NAMES[0]]),
        "text encoder": (UMT5EncoderModel, TextEncoder._empty, checkpoint.text_encoder),
        "VAE": (AutoencoderKLWan, Wan2_1_VAE._empty, checkpoint.vae),
    }[part]
    init = built.__init__

    def slow(self: Any, *given: Any, **config: Any) -> None:
        init(self, *given, **config)
        building.set()
        assert made.wait(10)

    monkeypatch.setattr(built, "__init__", slow)
    thread = Thread(target=empty, args=(weights,))
    thread.start()
    assert building.wait(10)
    layer = nn.Linear(2, 2)
    made.set()
    thread.join()
    assert layer.weight.device.type == "cpu"


def test_experts_that_are_in_memory_stay_for_the_next_clip_where_there_is_room() -> None:
    models = models_of(lambda *_: object())
    assert models.experts_to_keep() == frozenset()
    assert models[NAMES[0]] is not None
    assert models.experts_to_keep() == {NAMES[0]}
    models.live_by(HostPlan(in_turn=True))
    assert models[NAMES[0]] is not None and models.experts_to_keep() == frozenset()


def single() -> Models:
    """One denoiser that serves both experts."""
    checkpoint: Any = SimpleNamespace(experts=dict.fromkeys(NAMES), single=True, parts=())
    return Models("x", checkpoint, dict.fromkeys(NAMES, lambda *_: object()))


def test_one_denoiser_that_serves_both_experts_is_loaded_once() -> None:
    models = single()
    assert models["low_noise_model"] is models["high_noise_model"] and len(models.loaded) == 1
    assert models.is_loaded("low_noise_model") and models.is_loaded("high_noise_model")
    models.forget("low_noise_model")
    assert models.loaded == []
    ready = object()
    models.put("low_noise_model", ready)
    assert models["high_noise_model"] is ready


def test_a_team_keeps_the_experts_that_all_have() -> None:
    models = models_of(lambda *_: object())
    kept, other = models[NAMES[0]], models[NAMES[1]]
    models.keep_experts([NAMES[0]])
    assert models.loaded == [kept] and models[NAMES[1]] is not other
    models.keep_experts(NAMES)
    assert len(models.loaded) == 2
    models.keep_experts([])
    assert models.loaded == []


@pytest.mark.parametrize("mapped", [True, False])
def test_weights_stay_mapped_where_the_plan_says_so(mapped: bool) -> None:
    asked: list[bool] = []

    def loader(mapped: bool, common: object) -> object:
        asked.append(mapped)
        return object()

    models = models_of(loader)
    models.live_by(HostPlan(mapped=mapped))
    assert models[NAMES[0]] is models[NAMES[0]] and asked == [mapped]


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was opened and merged; a file named "bad" cannot be."""
    done: list[Any] = []

    def open_loras(files: Any, weights: Any) -> list[Any]:
        done.append(("open", [str(file.path) for file in files]))
        return [SimpleNamespace(match=SimpleNamespace(lora=file), size=len(str(file.path))) for file in files]

    def merge_loras(model: Any, weights: Any, opened: Any, device: Any, layers_have_them: bool) -> None:
        names = [str(one.match.lora.path) for one in opened]
        done.append(("merge", names))
        if "bad" in names:
            raise UserError("it is NaN")

    monkeypatch.setattr("wan.models.open_loras", open_loras)
    monkeypatch.setattr("wan.models.check_for_experts", lambda loras, checkpoint, name: None)
    monkeypatch.setattr("wan.denoiser.lora.merge_loras", merge_loras)
    monkeypatch.setattr("wan.denoiser.lora.check_values", lambda opened: None)
    return done


def files(*names: str) -> tuple[LoraFile, ...]:
    return tuple(LoraFile(Path(name)) for name in names)


def test_loras_are_merged_when_they_change_and_read_once(merging: list[Any]) -> None:
    models = models_of(lambda *_: object())
    high, low = NAMES
    models.check_loras({high: files("a")})
    assert models.lora_bytes({high: files("a", "bcd"), low: ()}) == {high: 4} and models.loaded == []
    assert merging == [("open", ["a"]), ("open", ["bcd"])]
    merging.clear()
    models.merge_loras({high: files("a")})
    assert models.loaded == [], "they come when it is first used"

    def merged() -> list[Any]:
        return [names for kind, names in merging if kind == "merge"]

    assert models[high] is models[high] and merged() == [["a"]]
    models.merge_loras({high: files("a")})
    assert merged() == [["a"]], "they are in it"
    assert [str(match.lora.path) for match in models.matches[high]] == ["a"]
    assert models[low] is not None and merged() == [["a"]]
    models.merge_loras({low: files("bcd")})
    assert sorted(merged()[1:]) == [[], ["bcd"]], "out of one and into the other"
    models.forget(low)
    assert low not in models.merged
    assert models[low] is not None and merged()[3:] == [["bcd"]], "a model that is read again gets them again"


def test_a_model_that_was_half_merged_is_let_go(merging: list[Any]) -> None:
    models = models_of(lambda *_: object())
    assert models[NAMES[0]] is not None
    with pytest.raises(UserError, match="it is NaN"):
        models.merge_loras({NAMES[0]: files("bad")})
    assert not models.is_loaded(NAMES[0]) and NAMES[0] not in models.merged


def test_files_of_models_that_are_not_loaded_are_read_ahead_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.models.that_fit", lambda files: files[:2])
    models = models_of(lambda *_: object())
    parts = [(name, SimpleNamespace(files=[Path(f"{name}_{n}") for n in (1, 2)])) for name in ("vae", *NAMES)]
    checkpoint: Any = models.checkpoint
    checkpoint.parts = parts
    assert [path.name for path in models.read_ahead().files] == ["vae_1", "vae_2"] and models.read_ahead().distance == 6
    assert [path.name for path in models.read_ahead(NAMES).files] == ["high_noise_model_1", "high_noise_model_2"]
    assert models[NAMES[0]] is not None
    assert [path.name for path in models.read_ahead(NAMES).files] == ["low_noise_model_1", "low_noise_model_2"]
