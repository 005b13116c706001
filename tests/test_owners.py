"""The owners that a pipeline is made of, each built by itself."""

from __future__ import annotations

import gc
import inspect
import io
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.golden import GOLDEN, float32
from wan import UserError, WanI2V, WanT2V, WanTI2V, WanV2V5B, clip_sampler, compat
from wan.candidates import is_better
from wan.clip_sampler import ClipSampler
from wan.denoiser.conditioning import TextOnly
from wan.denoiser.sampling import Expert, NotFinite
from wan.device.budget import GIB, ClipNeeds, MemoryBudget
from wan.device.host_budget import HostPlan
from wan.device.parallel import ALONE
from wan.device.ranks import Sizes, World
from wan.encoding import PromptEmbeddings, SharedVae
from wan.experts import OneExpert, TwoExperts, pipeline_class
from wan.fitted_frames import FittedFrames
from wan.image2video import crop_to_aspect
from wan.models import Models, loaders
from wan.pipeline import _check_shards, _Shared
from wan.planning import Planner, check_pairing, loras_by_expert
from wan.public import public_path, public_url, without_login
from wan.settings import Context, LoraFile, Sampling
from wan.stopwatch import Stopwatch
from wan.types import (
    Clip,
    Generation,
    Geometry,
    KnownFrames,
    Step,
    TextContext,
    as_picture,
    frame_indices,
    frame_size,
    from_uint8,
    image_to_frame,
    is_finite,
    to_uint8,
)

CPU = torch.device("cpu")
EXPERTS = ["high_noise_model", "low_noise_model"]


class Here:
    """A placement that moves nothing."""

    def on_device(self, model: Any, device: Any = None) -> Any:
        return nullcontext(model)


PLACEMENT: Any = Here()


def footage(frames: int) -> Clip:
    return Clip(torch.linspace(-1, 1, frames)[:, None, None, None].expand(frames, 16, 16, 3), Fraction(24))


def plan(mode: str = "tail", frames: int = 9, **more: Any) -> Any:
    defaults = {"is_cut": False, "loras": {}, "geometry": Geometry(17, 32, 32, (4, 16, 16)), "end": None, "cut": None}
    return SimpleNamespace(context=Context(mode, frames), **{**defaults, **more})


FITTED = FittedFrames(lambda frame, width, height: frame, Fraction(24))  # type: ignore[arg-type,return-value]


def test_prompts_are_encoded_once_for_as_long_as_they_repeat() -> None:
    asked: list[str] = []

    def encode(text: str) -> torch.Tensor:
        asked.append(text)
        return torch.full((1, 2, 2), float(len(asked)))

    embeddings = PromptEmbeddings(lambda: encode, CPU, CPU)  # type: ignore[arg-type,return-value]
    first = embeddings.context("a", "n", PLACEMENT)
    again = embeddings.context("a", "n", PLACEMENT)
    assert asked == ["a", "n"] and torch.equal(first.positive, again.positive)
    embeddings.context("b", "n", PLACEMENT)
    embeddings.context("a", "n", PLACEMENT)  # nobody keeps the last but one
    assert asked == ["a", "n", "b", "a"]
    embeddings.clear()
    embeddings.context("a", "n", PLACEMENT)
    assert asked[4:] == ["a", "n"]


def test_a_vae_encodes_and_decodes_alone() -> None:
    vae: Any = SimpleNamespace(
        encode=lambda frames, group: [frames[0] * 2], decode=lambda latents, home, group: [latents[0] / 2]
    )
    shared = SharedVae(lambda: vae, CPU, ALONE)
    pixels = torch.ones(3, 1, 4, 4)
    latents = shared.share(lambda: shared.encode(pixels, PLACEMENT), PLACEMENT)
    assert torch.equal(latents, 2 * pixels)
    assert torch.equal(shared.decode(latents, PLACEMENT, None), pixels)


@pytest.mark.parametrize(("asked", "length", "frames"), [(9, 9, 9), (9, 5, 5), (17, 12, 9), (9, 30, 9)])
def test_no_more_frames_are_known_than_there_are(
    asked: int, length: int, frames: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wan.fitted_frames.dataclasses.replace", lambda plan, context: context)
    context: Any = FITTED.with_available_context(footage(length), plan(frames=asked))
    assert context == Context("tail", frames)
    assert ("too short" in caplog.text) == (frames != asked)


def test_what_has_no_tail_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    for one in (plan("last_frame", 1), plan("svi2pro", 5), plan(frames=9, is_cut=True)):
        assert FITTED.with_available_context(footage(3), one) is one
    assert not caplog.messages


@pytest.mark.parametrize("cut", [False, True, "picture"])
@pytest.mark.parametrize(("mode", "frames"), [("last_frame", 1), ("tail", 5), ("svi2pro", 5)])
@pytest.mark.parametrize("has_motion", [False, True])
def test_a_clip_ends_with_its_end_image_however_it_begins(
    mode: str, frames: int, cut: bool | str, has_motion: bool
) -> None:
    red, anchor = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    before: Any = SimpleNamespace(
        last=anchor, tail=lambda count, fps: footage(9).frames[-count:], motion=torch.zeros(16, 1, 2, 2)
    )
    picture = anchor if cut == "picture" else cut
    of = plan(mode, frames, end=red, anchor=anchor, cut=picture, is_cut=cut is not False)
    known = FITTED.known(before if has_motion else footage(9), of)
    assert known.end is not None and torch.equal(torch.as_tensor(known.end), red)
    goes_on = {"last_frame": 1, "tail": 5, "svi2pro": 0 if has_motion else 9}[mode]
    new_shot = 1 if cut == "picture" and mode != "svi2pro" else 0
    assert len(known.leading) == (new_shot if cut else goes_on)


def test_svi_and_its_loras_go_together(caplog: pytest.LogCaptureFixture) -> None:
    def pair(name: str) -> dict[str, tuple[LoraFile, ...]]:
        return {expert: (LoraFile(Path(name)),) for expert in EXPERTS}

    check_pairing(plan("svi2pro", 5, loras=pair("SVI_2.0_Pro.safetensors")), EXPERTS)
    check_pairing(plan(loras=pair("style.safetensors")), EXPERTS)
    assert not caplog.messages
    check_pairing(plan("svi2pro", 5, loras=pair("mine.safetensors")), EXPERTS)
    assert "no name of the LoRAs says SVI" in caplog.text
    with pytest.raises(UserError, match="another SVI version"):
        check_pairing(plan("svi2pro", 5, loras=pair("SVI_2.0.safetensors")), EXPERTS)
    with pytest.raises(UserError, match="needs its pair"):
        check_pairing(plan("svi2pro", 5, loras={EXPERTS[0]: pair("SVI_Pro")[EXPERTS[0]]}), EXPERTS)
    with pytest.raises(UserError, match="use it with continuation svi2pro"):
        check_pairing(plan(loras=pair("SVI_2.0_Pro.safetensors")), EXPERTS)


def test_loras_for_two_experts_are_given_by_expert() -> None:
    with pytest.raises(UserError, match=r"\{'high_noise_model': …, 'low_noise_model': …\}"):
        loras_by_expert("a.safetensors", EXPERTS)
    assert loras_by_expert((), EXPERTS) == {}


def test_the_less_visible_seam_is_better_and_without_seams_the_first_stays() -> None:
    one, other, none = (SimpleNamespace(seam=seam) for seam in ({"score": 0.5}, {"score": 0.7}, None))
    assert is_better(one, other) and not is_better(other, one)  # type: ignore[arg-type]
    assert not is_better(one, one) and not is_better(none, one)  # type: ignore[arg-type]


# Models


class Model:
    """In a circle of its own."""

    def __init__(self) -> None:
        self.itself = self


def models() -> Models:
    checkpoint: Any = SimpleNamespace(experts=dict.fromkeys(EXPERTS), single=False, parts=())
    return Models("x", checkpoint, {name: lambda *_: Model() for name in ("vae", *EXPERTS)}, in_threads=False)


def test_models_that_are_let_go_are_gone_at_once() -> None:
    owner = models()
    model = weakref.ref(owner["vae"])
    gc.disable()
    try:
        owner.forget_all()
        assert model() is None
    finally:
        gc.enable()


def test_models_leave_when_they_are_to_take_turns_and_not_again_for_the_same_plan() -> None:
    owner = models()
    model, turns = owner["vae"], HostPlan(in_turn=True)
    owner.live_by(HostPlan())
    assert owner["vae"] is model
    owner.live_by(turns)
    assert not owner.is_loaded("vae")
    assert owner[EXPERTS[0]] in owner.loaded and owner["vae"] is not model and not owner.is_loaded(EXPERTS[0])
    model = owner["vae"]
    owner.live_by(HostPlan(in_turn=True))
    assert owner["vae"] is model
    owner.live_by(HostPlan())
    assert owner[EXPERTS[0]] in owner.loaded and owner["vae"] is model


def test_models_wait_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    monkeypatch.setattr("wan.models.move_home", moved.append)
    owner = models()
    loaded = [owner["vae"], owner[EXPERTS[0]]]
    owner.wait_at_home()
    assert moved == loaded


@pytest.mark.parametrize("group", [None, object()])
def test_an_expert_is_loaded_where_it_waits_and_its_slice_where_it_computes(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[Any] = []

    def from_weights(weights: Any, **options: Any) -> Any:
        where.append(options["device"])
        raise KeyboardInterrupt

    monkeypatch.setattr("wan.denoiser.model.WanModel.from_weights", from_weights)
    config: Any = float32("ti2v-5B")
    checkpoint: Any = SimpleNamespace(experts={"model": None})
    load = loaders(
        checkpoint,
        config,
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        device=torch.device("meta"),
        load_device=CPU,
        convert_model_dtype=False,
        shards=lambda name: group,
    )
    with pytest.raises(KeyboardInterrupt):
        load["model"](False, None)
    assert where == [CPU if group is None else torch.device("meta")]


# The pipeline itself


@pytest.fixture(scope="module")
def pipeline() -> WanV2V5B:
    return WanV2V5B(float32("v2v-5B"), GOLDEN / "5b" / "ckpt", vlm_path="none")


def test_a_size_that_does_not_fit_is_refused_as_soon_as_it_is_asked_for(
    pipeline: WanV2V5B, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Geometry] = []
    monkeypatch.setattr(MemoryBudget, "check", lambda self, geometry: checked.append(geometry))
    geometry = pipeline.geometry(64, 64, 5)
    assert checked == [geometry]


@pytest.mark.parametrize(("task", "family", "experts"), [("ti2v-5B", "5b", 1), ("i2v-A14B", "14b", 2)])
def test_a_folder_is_opened_for_as_many_experts_as_the_row_has(
    monkeypatch: pytest.MonkeyPatch, task: str, family: str, experts: int
) -> None:
    asked: list[tuple[int, int]] = []

    def note(folder: Path, **options: Any) -> None:
        asked.append((options["experts"], options["in_channels"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("wan.pipeline.open_checkpoint", note)
    with pytest.raises(KeyboardInterrupt):
        pipeline_class(task)(float32(task), GOLDEN / family / "ckpt")
    assert asked == [(experts, 48 if experts == 1 else 36)]


@pytest.mark.parametrize(("vram", "holds_all", "leave"), [(None, False, 0), (8, True, 0), (8, False, 1)])
def test_models_of_a_smaller_clip_leave_the_gpu_for_one_that_does_not_fit(
    pipeline: WanV2V5B, monkeypatch: pytest.MonkeyPatch, vram: int | None, holds_all: bool, leave: int
) -> None:
    left: list[int] = []
    budget = SimpleNamespace(vram=vram, holds_all=lambda geometry: holds_all, placements=lambda *how: how)
    monkeypatch.setattr(MemoryBudget, "for_clip", lambda *_: budget)
    monkeypatch.setattr(Models, "wait_at_home", lambda self: left.append(1))
    geometry = Geometry(5, 64, 64, (4, 16, 16))
    request: Any = SimpleNamespace(geometry=geometry, loras={})
    plan = HostPlan(mapped=True)
    made: Any = pipeline._make_room(_Shared(request, True, 1, plan))
    assert made == (geometry, True, True) and len(left) == leave


@pytest.mark.parametrize(
    ("sharded", "dit", "t5"),
    [(set(), 1, 1), ({"model"}, 4, 1), ({"text_encoder"}, 1, 4), ({"model", "text_encoder"}, 4, 4)],
)
def test_slices_of_weights_are_in_the_budget(
    monkeypatch: pytest.MonkeyPatch, sharded: set[str], dit: int, t5: int
) -> None:
    alone = WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt")
    alone.sharded = sharded
    team = SimpleNamespace(node=SimpleNamespace(size=4), sizes=Sizes(ring=4))
    monkeypatch.setattr("wan.pipeline.Team.start", lambda *_: team)
    alone.join(World(0, 4, 0), ring=4)
    assert (alone.budget.dit_shards, alone.budget.t5_shards) == (dit, t5)
    assert alone.host.elsewhere == sharded


@pytest.mark.parametrize(("limits", "cfg"), [((90, 90), 2), ((90, 78), 1), ((None, 78), 1), ((None, None), 2)])
def test_the_gpu_with_the_least_memory_decides_on_the_sizes_of_all(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int | None, ...], cfg: int
) -> None:
    alone = WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt")
    chosen: list[Sizes] = []

    def start(world: World, choose: Callable[[Any], Sizes], *_: Any) -> Any:
        told = [(None, None if limit is None else limit * GIB) for limit in limits]
        team = SimpleNamespace(told_by_all=lambda _: told, share=lambda make: make(), node=None)
        team.sizes = choose(team)
        chosen.append(team.sizes)
        return team

    monkeypatch.setattr("wan.pipeline.Team.start", start)
    monkeypatch.setattr(MemoryBudget, "gpu_bytes", lambda self, *_: (76 - 3 * self.token_ranks) * GIB)
    clip = ClipNeeds(alone.geometry(64, 64, 5), False, {})
    alone.join(World(0, 2, 0), clips=[clip])
    assert chosen == [Sizes(cfg, 2 // cfg)] and alone.budget.token_ranks == 2 // cfg
    assert alone.budget.free == min((limit * GIB for limit in limits if limit is not None), default=None)


def test_the_first_gpu_is_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, int]] = []

    def world_met(rank: int, local_rank: int) -> World:
        met.append((rank, local_rank))
        return World()

    monkeypatch.setattr("wan.pipeline.world_met", world_met)
    WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt", rank=3, use_sp=True)
    assert met == [(3, 0)]


def test_a_model_without_measured_magnitudes_samples(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    plain = WanTI2V(float32("ti2v-5B").variant(mag_ratios=()), GOLDEN / "5b" / "ckpt")
    video = plain.generate("x", size=(64, 64), frame_num=5, sampling_steps=1, guide_scale=1.0, seed=1)
    assert video.shape == (3, 5, 64, 64)


@pytest.mark.parametrize(("solver", "planned"), [("unipc", None), ("euler", "euler")])
def test_the_default_solver_is_no_choice_against_a_preset(
    pipeline: WanV2V5B, monkeypatch: pytest.MonkeyPatch, solver: str, planned: str | None
) -> None:
    class Planned(Exception):  # noqa: N818
        pass

    asked: list[Any] = []

    def note(footage: Any, **options: Any) -> None:
        asked.append(options["solver"])
        raise Planned

    monkeypatch.setattr(pipeline, "plan", note)
    with pytest.raises(Planned):
        pipeline.v2v(torch.zeros(1, 8, 8, 3, dtype=torch.uint8).numpy(), "x", sample_solver=solver)
    assert asked == [planned]


@pytest.mark.parametrize(("frames", "near"), [(6, "5 and 9"), (8, "5 and 9"), (0, "1 and 5"), (-7, "1 and 5")])
def test_the_lengths_beside_one_that_no_clip_has_are_told(frames: int, near: str) -> None:
    with pytest.raises(UserError, match=rf"must be 4n\+1: {frames} is not, {near} are"):
        Geometry(frames, 64, 64, (4, 16, 16))


# Pixels


def test_a_captioner_looks_at_the_middles_of_equal_parts() -> None:
    # InternVL's own rule: the middle of each part of the frames from first to last
    assert frame_indices(81, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert frame_indices(81, 1) == [40] and frame_indices(1, 1) == [0] and frame_indices(1, 3) == [0, 0, 0]
    assert frame_indices(9, 4) == [1, 3, 5, 7]
    for count, parts in ((0, 8), (8, 0), (-1, 1)):
        with pytest.raises(UserError, match=f"cannot take {parts} of {count} frames"):
            frame_indices(count, parts)


def test_pixels_are_rounded_to_the_nearest_level_and_stay_within() -> None:
    pixels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert to_uint8(pixels).tolist() == [0, 0, 64, 128, 191, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8).numpy()
    assert (to_uint8(from_uint8(levels)) == levels).all()
    assert from_uint8(levels)[[0, 255]].tolist() == [-1.0, 1.0] and from_uint8(levels).dtype == torch.float32
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]))


def test_a_frame_is_a_tensor_or_a_picture() -> None:
    picture = Image.new("RGB", (6, 4), (255, 0, 128))
    frame = image_to_frame(picture)
    assert frame.shape == (3, 4, 6) and frame[:, 0, 0].tolist() == pytest.approx([1, -1, 1 / 255], abs=1e-6)
    assert frame_size(frame) == frame_size(picture) == (6, 4)
    assert as_picture(frame).tobytes() == picture.tobytes() == as_picture(picture).tobytes()
    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6  # to be shown upright
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=turned.getexif())
    with Image.open(buffer) as opened:
        assert frame_size(opened) == (4, 6) and as_picture(opened).size == (4, 6)


def test_nothing_that_is_nan_or_infinite_is_finite() -> None:
    assert is_finite(torch.ones(3)) and is_finite(torch.ones(0))
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.tensor([1.0, wrong]))


def test_a_clip_has_a_tail_a_last_frame_and_samples() -> None:
    clip = footage(9)  # evenly from black to white
    assert clip.last.shape == (3, 16, 16) and clip.last.min() == 1
    assert torch.equal(clip.tail(2, Fraction(24)), clip.frames[-2:]) and len(clip.tail(20, Fraction(24))) == 9
    with pytest.raises(ValueError, match="24"):
        clip.tail(2, Fraction(16))
    assert clip.samples(2)[:, 0, 0, 0].tolist() == to_uint8(clip.frames[[2, 6], 0, 0, 0]).tolist()
    for count, seconds, frames in ((3, 0.25, [2, 5, 8]), (3, 1.0, [8]), (1, 1.0, [8]), (2, 8 / 24, [0, 8])):
        assert clip.samples(count, seconds)[:, 0, 0, 0].tolist() == to_uint8(clip.frames[frames, 0, 0, 0]).tolist()
    clip.tail(1, Fraction(24)).zero_()
    assert clip.last.min() == 1, "the clip stays as it is"
    generation = Generation(clip, torch.arange(12.0).view(1, 3, 2, 2), None)  # type: ignore[arg-type]
    assert torch.equal(generation.last, clip.last) and generation.motion.flatten().tolist() == [8, 9, 10, 11]
    assert generation.video.shape == (3, 9, 16, 16) and torch.equal(generation.video[:, -1], clip.last)
    assert torch.equal(generation.tail(3, Fraction(24)), clip.frames[-3:]) and generation.seam is None


# What is around the models


def test_a_torchvision_that_is_broken_counts_as_absent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules: dict[str, Any] = {}
    monkeypatch.setattr(compat, "sys", SimpleNamespace(modules=modules))

    def hide(error: Exception | None) -> None:
        def import_module(name: str) -> None:
            assert name == "torchvision"
            if error is not None:
                raise error

        modules.clear()
        modules.update(dict.fromkeys(("torchvision", "torchvision.ops", "torch", "torchvision_extra"), "a module"))
        monkeypatch.setattr(compat, "importlib", SimpleNamespace(import_module=import_module))
        compat.hide_broken_torchvision()

    for fine in (None, ModuleNotFoundError("no", name="torchvision")):
        hide(fine)
        assert len(modules) == 4 and "a module" in modules.values() and not caplog.messages
    for broken in (RuntimeError("operator\n nms"), ModuleNotFoundError("no", name="torchvision._C")):
        caplog.clear()
        hide(broken)
        assert modules == {"torchvision": None, "torch": "a module", "torchvision_extra": "a module"}
        assert "torchvision is installed but broken, going on without it: " in caplog.text
    assert caplog.messages[0].endswith(": no")


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("a/b.mp4", "a/b.mp4"),
        ("/elsewhere/b.mp4", "b.mp4"),
        ("/elsewhere/folder/", "folder"),
        ("/elsewhere/b\udcff", "b\\xff"),
        ("../b.mp4", "../b.mp4"),
    ],
)
def test_a_path_that_is_handed_on_has_no_folder_of_this_machine(path: str, public: str) -> None:
    assert public_path(path) == public
    assert public_path(Path.cwd() / "a" / "b.mp4") == "a/b.mp4"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("http://user:password@host:8000/v1?key=1#x", "http://host:8000/v1"),
        ("https://host/", "https://host/"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
        ("http://[::1]/v1", "http://[::1]/v1"),
        ("ftp://host/", None),
        ("host/v1", None),
        ("http://", None),
        ("http://host:port/", None),
        ("http://ho st/", None),
        ("http://höst/", None),
        ("http://host/\x01", None),
    ],
)
def test_an_address_that_is_handed_on_has_no_secret(url: str, public: str | None) -> None:
    assert public_url(url) == public


def test_a_login_is_left_out_of_any_address() -> None:
    assert (
        without_login("s3://key:secret@bucket/a@b?c=1") == "s3://bucket/a@b" and without_login("s3://a/b") == "s3://a/b"
    )


def test_a_stage_is_charged_what_no_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("wan.stopwatch.time", SimpleNamespace(perf_counter=lambda: now))
    heard: list[tuple[int, int, str]] = []
    watch = Stopwatch(CPU, 4, lambda step: heard.append((step.index, step.total, step.stage)), done=1)
    with watch.stage("sample"):
        now += 1
        with watch.stage("load"):
            now += 10
            with watch.stage("read"):
                now += 100
        assert watch.on_step is not None
        watch.on_step(Step(3, 4, "sample"))
        with watch.stage("load"):
            now += 20
        now += 2
    with watch.stage("decode"):
        now += 4
    assert watch.seconds == {"read": 100, "load": 30, "sample": 3, "decode": 4}
    assert heard == [
        (1, 4, "sample"),
        (1, 4, "load"),
        (1, 4, "read"),
        (1, 4, "load"),  # goes on
        (1, 4, "sample"),
        (3, 4, "sample"),
        (3, 4, "load"),
        (3, 4, "sample"),
        (3, 4, "decode"),
    ]
    silent = Stopwatch(CPU, 4)
    with silent.stage("sample"):
        now += 1
    assert silent.on_step is None and silent.seconds == {"sample": 1}


# Plans


@pytest.fixture
def planner() -> tuple[Planner, list[Any]]:
    """Plans of a 5B whose sizes are what is asked for, and what was checked."""
    checked: list[Any] = []
    rules: Any = SimpleNamespace(
        config=float32("v2v-5B").variant(sizes=("1280*704",), frame_num=121, sample_neg_prompt="blurred"),
        checkpoint=SimpleNamespace(experts={"model": None}),
        merge=lambda *given, **named: Sampling(given[0] or 50, 5.0, (1.0, 1.0)),
        check_distilled=lambda preset, loras: checked.append(("distilled", preset)),
    )
    owners: Any = SimpleNamespace(check_loras=lambda loras: checked.append(("loras", dict(loras))))
    return Planner(
        rules,
        owners,
        lambda width, height, area: (area, height),
        lambda width, height, frames: Geometry(frames, 32 * height, 32 * (width // 32), (4, 16, 16)),
        lambda plan: checked.append("memory"),
    ), checked


def test_a_plan_takes_what_is_left_open_from_the_model(planner: tuple[Planner, list[Any]]) -> None:
    make, checked = planner
    one = make(footage(9))
    assert one.geometry.frames == 121 and one.geometry.width == 1280 * 704 and one.negative == "blurred"
    assert one.context == Context() and one.sampling.steps == 50 and one.loras == {} and one.anchor is None
    assert checked == [("loras", {}), "memory", ("distilled", "quality")]
    given = make(
        footage(9), max_area=4096, frame_num=17, steps=4, negative="sharp", context=9, loras="a.safetensors:0.5"
    )
    assert given.geometry.frames == 17 and given.geometry.width == 4096 and given.negative == "sharp"
    assert given.context == Context("tail", 9) and given.sampling.steps == 4
    assert given.loras == {"model": (LoraFile(Path("a.safetensors"), 0.5),)}
    assert make(footage(9), context=Context("tail", 5)).context == Context("tail", 5)


def test_a_plan_that_no_clip_is_made_by_is_not_checked(planner: tuple[Planner, list[Any]]) -> None:
    make, checked = planner
    make(footage(9), handoff="no/such/program {frames}", check=False)
    assert checked == []
    with pytest.raises(UserError, match="there is no program 'no/such/program'"):
        make(footage(9), handoff="no/such/program {frames}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cut": True}, "cut: true makes a clip of text alone: give it a prompt"),
        ({"cut": True, "prompt": "x"}, None),
        ({"cut": "picture"}, None),
        ({"context": Context("svi2pro", 5), "anchor": "picture"}, "svi2pro is for I2V-A14B"),
        ({"motion_amplitude": 1.2}, "motion_amplitude is for I2V-A14B"),
        ({"end": "picture", "frame_num": 5}, "a clip with 1 known frame must have 9"),
        ({"end": "picture", "frame_num": 9}, None),
        ({"end": "picture", "frame_num": 5, "cut": True, "prompt": "x"}, None),
    ],
)
def test_a_plan_that_a_model_cannot_follow_is_refused(
    more: dict[str, Any], message: str | None, planner: tuple[Planner, list[Any]]
) -> None:
    make, _ = planner
    if message is None:
        make(footage(9), **more)
    else:
        with pytest.raises(UserError, match=message):
            make(footage(9), **more)


def test_a_model_of_two_experts_makes_no_clip_of_text_alone(planner: tuple[Planner, list[Any]]) -> None:
    make, _ = planner
    make.rules.config = float32("v2v-14B")  # type: ignore[misc]
    with pytest.raises(UserError, match="which I2V-A14B cannot; give a picture to cut to"):
        make(footage(9), cut=True, prompt="x", frame_num=17)


def test_svi_holds_on_to_a_picture_of_the_footage_unless_one_is_given(
    planner: tuple[Planner, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, _ = planner
    monkeypatch.setattr("wan.planning.choose_anchor", lambda footage: "chosen")
    svi = Context("svi2pro", 5)
    given: Any = "given"
    assert make(footage(9), context=svi, check=False).anchor == "chosen"
    assert make(footage(9), context=svi, anchor=given, check=False).anchor == given
    assert make(footage(9), check=False).anchor is None


def test_loras_are_files_or_words_one_or_several() -> None:
    one, other = LoraFile(Path("a.safetensors")), LoraFile(Path("b.safetensors"), 0.5)
    for given, files in (
        ("a.safetensors", (one,)),
        (Path("a.safetensors"), (one,)),
        (one, (one,)),
        ([one, "b.safetensors:0.5"], (one, other)),
        ({"model": "a.safetensors"}, (one,)),
    ):
        assert loras_by_expert(given, ["model"]) == {"model": files}  # type: ignore[arg-type]
    assert loras_by_expert({"high_noise_model": (), "low_noise_model": one}, EXPERTS) == {"low_noise_model": (one,)}
    assert loras_by_expert((), ["model"]) == {}


# Calls after the official ones

COMMON = {"sample_solver": "unipc", "n_prompt": "", "seed": -1, "offload_model": True}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        # source: the signatures of Wan2.2's own classes
        (
            WanI2V.generate,
            {"max_area": 720 * 1280, "frame_num": 81, "shift": 5.0, "sampling_steps": 40, "guide_scale": 5.0, **COMMON},
        ),
        (
            WanTI2V.generate,
            {"img": None, "size": (1280, 704), "max_area": 704 * 1280, "frame_num": 81, "shift": 5.0}
            | {"sampling_steps": 50, "guide_scale": 5.0, **COMMON},
        ),
        (
            WanTI2V.t2v,
            {"size": (1280, 704), "frame_num": 121, "shift": 5.0, "sampling_steps": 50, "guide_scale": 5.0, **COMMON},
        ),
        (
            WanTI2V.i2v,
            {
                "max_area": 704 * 1280,
                "frame_num": 121,
                "shift": 5.0,
                "sampling_steps": 40,
                "guide_scale": 5.0,
                **COMMON,
            },
        ),
        (
            WanT2V.generate,
            {"size": (1280, 720), "frame_num": 81, "shift": 5.0, "sampling_steps": 50, "guide_scale": 5.0, **COMMON},
        ),
        (
            WanV2V5B.v2v,
            dict.fromkeys(
                ("prompt", "max_area", "frame_num", "shift", "sampling_steps", "guide_scale", "custom_prompt")
            )
            | {"num_segments": 8, **COMMON},
        ),
        (
            WanV2V5B.__init__,
            {"device_id": 0, "rank": 0, "t5_fsdp": False, "dit_fsdp": False, "use_sp": False, "t5_cpu": False}
            | {"init_on_cpu": True, "convert_model_dtype": False, "vlm_path": None, "vlm_device": None},
        ),
        (
            WanTI2V.__init__,
            {"device_id": 0, "rank": 0, "t5_fsdp": False, "dit_fsdp": False, "use_sp": False, "t5_cpu": False}
            | {"init_on_cpu": True, "convert_model_dtype": False},
        ),
    ],
)
def test_a_call_as_for_wan_has_wan_s_defaults(function: Any, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    by_place = {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}
    assert {name: value for name, value in by_place.items() if value is not inspect.Parameter.empty} == defaults
    ours = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    usual: dict[str, Any] = {
        **dict.fromkeys(("last_image", "on_step", "fps", "guidance_interval", "cache", "context", "anchor", "end")),
        **dict.fromkeys(("vlm_url", "vlm_fallback", "vram")),
        "preset": "quality",
        "loras": (),
        "prompt_mode": "describe",
        "motion_amplitude": 1.0,
        "best_of": 1,
        "drift_correction": 0.0,
        "vlm_trust_remote_code": False,
        "video_reader": "auto",
        "compile_blocks": True,
        "dit_files": {},
        "part_files": {},
        "host_memory": "auto",
        "share_weights": 1,
        "vlm_question": "Describe this video in detail.",
    }
    assert ours == {name: usual[name] for name in ours}


@pytest.mark.parametrize(
    ("size", "aspect", "box"),
    [
        ((80, 40), (40, 40), (20, 0, 60, 40)),
        ((40, 80), (40, 40), (0, 20, 40, 60)),
        ((40, 40), (40, 40), (0, 0, 40, 40)),
        ((81, 40), (40, 40), (20, 0, 60, 40)),
        ((64, 48), (832, 480), (0, 5, 64, 42)),
    ],
)
def test_the_middle_of_a_picture_has_the_aspect_that_is_asked_for(
    size: tuple[int, int], aspect: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = box
    pixels = torch.rand(3, size[1], size[0], generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert torch.equal(torch.as_tensor(crop_to_aspect(pixels, *aspect)), pixels[:, top:bottom, left:right])
    picture = Image.fromarray(to_uint8(pixels.permute(1, 2, 0)))
    cropped: Any = crop_to_aspect(picture, *aspect)
    assert cropped.tobytes() == picture.crop(box).tobytes()


class Encoding:
    """A VAE whose latents are the means of what it encodes, a latent frame for four frames but for the first."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, pixels: torch.Tensor, placement: Any) -> torch.Tensor:
        self.shapes.append(tuple(pixels.shape))
        means = pixels.mean(dim=(0, 2, 3))
        groups = [means[:1], *(means[first : first + 4] for first in range(1, len(means), 4))]
        return torch.stack([group.mean() for group in groups]).view(1, -1, 1, 1).expand(16, -1, 2, 2).contiguous()


def level(value: float, motion: int = 0) -> Any:
    return torch.full((3, 16, 16), value) if not motion else torch.full((16, motion, 2, 2), value)


def conditioned(kind: str, known: KnownFrames, frames: int = 9, amplitude: float = 1.0) -> tuple[Any, Encoding]:
    vae = Encoding()
    of: Any = SimpleNamespace(shared_vae=vae, device=CPU, config=float32("v2v-14B" if kind == "14b" else "v2v-5B"))
    request: Any = SimpleNamespace(
        known=known, geometry=SimpleNamespace(size=(frames, 16, 16)), motion_amplitude=amplitude
    )
    noise = torch.zeros(16, (frames - 1) // 4 + 1, 2, 2)
    return (WanI2V if kind == "14b" else WanTI2V).condition(of, request, noise, PLACEMENT), vae


def values(latents: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in latents[-1, :, 0, 0].tolist()]


def test_an_a14b_knows_leading_frames_and_an_end_among_grey_ones() -> None:
    one, vae = conditioned("14b", KnownFrames((level(0.5),)))
    assert type(one).__name__ == "ImageChannels" and vae.shapes == [(3, 9, 16, 16)]
    assert values(one.channels) == [0.5, 0, 0] and one.channels[:4, :, 0, 0].tolist() == [[1, 0, 0]] * 4
    ended, _ = conditioned("14b", KnownFrames((level(0.5),), level(1.0)))
    assert values(ended.channels) == [0.5, 0, 0.25] and ended.channels[:4, -1, 0, 0].tolist() == [0, 0, 0, 1]
    several, _ = conditioned("14b", KnownFrames((level(0.5),) * 5))
    assert type(several).__name__ == "HeldImageChannels" and values(several.known) == [0.5, 0.5]
    assert several.channels[0, :, 0, 0].tolist() == [1, 1, 0] and several.train_timesteps == 1000
    graded, _ = conditioned("14b", KnownFrames((level(0.5),) * 5, graded=torch.full((3, 5, 16, 16), 0.7)))
    assert values(graded.known) == [0.5, 0.7] and values(graded.channels) == [0.5, 0.7, 0]  # it grows to the last
    louder, _ = conditioned("14b", KnownFrames((level(0.5),), level(1.0)), amplitude=1.5)
    assert louder.channels.shape == ended.channels.shape


def test_svi_knows_an_anchor_then_motion_then_zeros() -> None:
    still, _ = conditioned("14b", KnownFrames((level(0.5),) * 5, anchor=level(1.0)))
    assert values(still.channels) == [1, 0.5, 0] and still.channels[0, :, 0, 0].tolist() == [1, 0, 0]
    moving, vae = conditioned("14b", KnownFrames(anchor=level(1.0), motion=level(0.25, motion=1)))
    assert values(moving.channels) == [1, 0.25, 0] and vae.shapes == [(3, 1, 16, 16)]
    shot, _ = conditioned("14b", KnownFrames(anchor=level(1.0)))
    assert values(shot.channels) == [1, 0, 0]
    ended, _ = conditioned("14b", KnownFrames(anchor=level(1.0), end=level(-0.5)))
    assert values(ended.channels) == [1, 0, -0.5] and ended.channels[:4, -1, 0, 0].tolist() == [1] * 4
    leading = (level(0.5),) * 5
    graded = torch.full((3, 5, 16, 16), 0.7)
    led, _ = conditioned("14b", KnownFrames(leading, anchor=level(1.0), motion=level(0.25, motion=1), graded=graded))
    assert values(led.channels) == [
        1,
        pytest.approx(0.25 + 0.2),
        0,
    ]  # what grading does to the frames, done to the motion


def test_a_5b_knows_latents_and_an_end_that_four_frames_show() -> None:
    text, vae = conditioned("5b", KnownFrames())
    assert type(text).__name__ == "TextOnly" and vae.shapes == []
    one, vae = conditioned("5b", KnownFrames((level(0.5),)))
    assert values(one.known) == [0.5] and one.end is None and vae.shapes == [(3, 1, 16, 16)]
    several, _ = conditioned("5b", KnownFrames((level(0.5),) * 5, graded=torch.full((3, 5, 16, 16), 0.7)))
    assert values(several.known) == [0.5, 0.7]
    ended, vae = conditioned("5b", KnownFrames(end=level(-0.5)))
    assert ended.known.shape[1] == 0 and values(ended.end) == [-0.5] and vae.shapes == [(3, 5, 16, 16)]
    with pytest.raises(UserError, match="takes no anchor picture; that is A14B's"):
        conditioned("5b", KnownFrames(anchor=level(1.0)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((8.0, True, False, False), "^t5_fsdp keep weights on all GPUs, so no layers come to them: leave out vram"),
        ((8.0, True, True, False), "^t5_fsdp and dit_fsdp keep"),
        ((None, True, False, True), "t5_fsdp slices the text encoder for GPUs, and t5_cpu runs it on the CPU"),
        ((None, False, True, True), None),
        ((None, True, True, False), None),
        ((8.0, False, False, True), None),
    ],
)
def test_slices_of_weights_go_with_what_they_are_for(given: tuple[Any, ...], message: str | None) -> None:
    vram, t5, dit, cpu = given
    config = float32("ti2v-5B")
    if message is None:
        _check_shards(config, vram, t5, dit, cpu)
    else:
        with pytest.raises(UserError, match=message):
            _check_shards(config, vram, t5, dit, cpu)
    if dit and message is None:
        with pytest.raises(UserError, match="dit_fsdp slices bf16 weights, and precision fp8 rounds whole ones"):
            _check_shards(config.variant(low_precision="fp8"), vram, t5, dit, cpu)


def test_experts_go_from_high_noise_to_low_with_their_guidance() -> None:
    low, high = 2.0, 3.0
    two: Any = SimpleNamespace(config=float32("i2v-A14B"), high_noise_model="high", low_noise_model="low")
    first, second = TwoExperts.experts(two, (low, high))
    assert (first.name, first.part, first.guidance, first.load()) == ("high noise", "high_noise_model", high, "high")
    assert (second.name, second.part, second.guidance, second.load()) == ("low noise", "low_noise_model", low, "low")
    assert (first.lowest, second.lowest) == (900, 0)  # source: the official boundary of 0.9
    one: Any = SimpleNamespace(model="one")
    (only,) = OneExpert.experts(one, (low, high))
    assert (only.part, only.guidance, only.lowest, only.load()) == ("model", low, 0, "one")


# Sampling a clip, and what goes wrong


def sampler(experts: Sequence[str] = EXPERTS, loaded: Collection[str] = (), **more: Any) -> Any:
    """A sampler of these experts, and what its models were asked for."""
    asked: list[Any] = []

    @contextmanager
    def loading(names: Any, alone: bool) -> Iterator[Any]:
        asked.append(("loading", list(names), alone))
        yield lambda: asked.append("check")

    models = SimpleNamespace(
        merge_loras=lambda loras: asked.append(("merge", loras)),
        is_loaded=lambda name: name in loaded,
        loading=loading,
        matches={"high_noise_model": [SimpleNamespace(as_json=lambda: {"path": "a"})], "low_noise_model": []},
        checkpoint=SimpleNamespace(
            experts={name: SimpleNamespace(path=f"{name}.safetensors") for name in experts},
            text_encoder=SimpleNamespace(path="t5.pth"),
            vae=SimpleNamespace(path="vae.pth"),
        ),
    )
    team = SimpleNamespace(tokens="tokens", world=SimpleNamespace(size=1), sizes=SimpleNamespace(tokens=2))
    config = float32("i2v-A14B" if len(experts) > 1 else "ti2v-5B")
    one = ClipSampler(config, models, CPU, team, **{"compile_blocks": True, **more})  # type: ignore[arg-type]
    return one, asked


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """For which models, tokens and forwards kernels were chosen."""
    chosen: list[Any] = []
    for name in ("use_fastest_attention", "compile_where_it_pays"):
        monkeypatch.setattr(
            clip_sampler, name, lambda model, *what, name=name: chosen.append((name, model.name, *what[:2]))
        )
    return chosen


def started() -> Any:
    return clip_sampler.ClipStart(torch.zeros(1), TextOnly(), TextContext(torch.zeros(1), torch.zeros(1)))


@pytest.mark.parametrize("compiles", [True, False])
def test_experts_are_prepared_for_all_forwards_of_a_run_and_the_next_one_comes_meanwhile(
    compiles: bool, kernels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    heard: list[Step] = []

    def sample(
        noise: Any, stages: Any, scheduler: Any, condition: Any, text: Any, placement: Any, on_step: Any, *more: Any
    ) -> Any:
        given.append((stages, placement, more))
        on_step(Step(1, 4, "high noise"))
        return torch.ones(2)

    monkeypatch.setattr(clip_sampler, "sample", sample)
    one, asked = sampler(compile_blocks=compiles, loaded=["high_noise_model"])
    models = {name: SimpleNamespace(name=name, kernels={"attention": name}, token_group=None) for name in EXPERTS}
    experts = [Expert("high noise", EXPERTS[0], lambda: models[EXPERTS[0]], 3.0, 900)]  # type: ignore[arg-type,return-value]
    experts += [Expert("low noise", EXPERTS[1], lambda: models[EXPERTS[1]], 2.0, 0)]  # type: ignore[arg-type,return-value]
    request: Any = SimpleNamespace(
        sampling=Sampling(4, 1.0, (2.0, 3.0), "dpm++", (0.3, 0.8)),
        loras={"a": ()},
        geometry=SimpleNamespace(tokens=100),
    )
    watch = Stopwatch(CPU, 4, heard.append)
    made = one.sample(request, started(), experts, lambda: "placed", watch, clips=3)
    assert asked == [("merge", {"a": ()}), ("loading", ["low_noise_model"], True), "check"]
    (stages, placement, (caching, team)) = given[0]
    assert placement == "placed" and team is one.team and caching.cache is None
    assert set(caching.mag_ratios) <= {"high noise", "low noise"}
    assert [(stage.expert.name, stage.timesteps.tolist(), stage.guidance) for stage in stages] == [
        ("high noise", [1000], (1.0,)),  # sigma 1 is beyond the interval
        ("low noise", [750, 500, 250], (2.0, 2.0, 1.0)),
    ]
    # four steps, two of them guided, of three clips
    assert kernels[0] == ("use_fastest_attention", "high_noise_model", 100, 18)
    compiled = ("compile_where_it_pays", "high_noise_model", 50, 18)  # of two ranks each has half of the tokens
    assert (compiled in kernels) == compiles and models[EXPERTS[0]].token_group == "tokens"
    assert made.notes == {"attention": "low_noise_model", "loras": {"high_noise_model": [{"path": "a"}]}}
    assert (
        torch.equal(made.latents, torch.ones(2)) and {"load", "sample"} <= made.seconds.keys() and made.peak_gib is None
    )
    assert [step.stage for step in heard].count("high noise") == 1


@pytest.mark.parametrize(
    ("experts", "text", "condition", "message"),
    [
        (EXPERTS, torch.nan, True, "the text encoder in t5.pth gives numbers that are not finite"),
        (EXPERTS, 0.0, False, "the VAE in vae.pth encodes what is known to numbers that are not finite"),
        (EXPERTS, 0.0, True, "the low noise expert in low_noise_model.safetensors gives .* in step 3"),
        (["low_noise_model"], 0.0, True, "the denoiser in low_noise_model.safetensors gives .* in step 3"),
    ],
)
def test_the_model_that_gave_the_first_nan_is_named(
    experts: list[str], text: float, condition: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = sampler(experts)
    low: Any = Expert("low noise", "low_noise_model", lambda: None, 2.0, 0)  # type: ignore[arg-type,return-value]
    for positive, negative in ((text, 0.0), (0.0, text)):
        known: Any = SimpleNamespace(is_finite=condition)
        prompts = TextContext(torch.tensor([positive]), torch.tensor([negative]))
        start = clip_sampler.ClipStart(torch.zeros(1), known, prompts)
        with pytest.raises(UserError, match=message):
            raise UserError(clip_sampler.why_not_finite(one.models.checkpoint, NotFinite(low, 3), start))


def test_memory_that_ran_out_is_told_with_what_helps(pipeline: WanV2V5B, monkeypatch: pytest.MonkeyPatch) -> None:
    request: Any = SimpleNamespace(geometry="geometry", loras={})
    asked: list[Any] = []

    def advice(*what: Any) -> str:
        asked.append(what)
        return "do"

    budget = SimpleNamespace(check=lambda geometry: None, vram=None, free=None, advice=advice)
    monkeypatch.setattr(pipeline, "budget_for", lambda *what: budget)
    monkeypatch.setattr(pipeline, "host_plan", lambda *what: None)
    monkeypatch.setattr(pipeline, "_make_room", lambda shared: None)
    monkeypatch.setattr("wan.pipeline.total_bytes", lambda device: 80)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "_make", fail)
    for vram, free, capacity in ((None, None, 80), (None, 60, 60), (24, 60, 24)):
        budget.vram, budget.free = vram, free
        error: Exception = torch.OutOfMemoryError("CUDA out of memory.\nTried")
        with pytest.raises(UserError, match=r"^out of GPU memory \(CUDA out of memory.\); do$"):
            pipeline.run(request, offload=True)
        assert asked[-1] == ("geometry", True, capacity)
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        pipeline.run(request)
    monkeypatch.setattr(pipeline, "budget", SimpleNamespace(vram=24))
    with pytest.raises(UserError, match="vram needs offload_model True"):
        pipeline.run(request, offload=False)


def test_the_first_latents_are_drawn_by_the_seed(pipeline: WanV2V5B) -> None:
    request: Any = SimpleNamespace(geometry=Geometry(9, 32, 64, (4, 16, 16)), seed=7)
    expected = torch.randn(pipeline.config.z_dim, 3, 2, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(pipeline.noise(request), expected)
