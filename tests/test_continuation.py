"""Continuing: the chain, the prompt, the captioner's life, the names and signatures that scripts rely on."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import string
import time
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import wan
from tests.support.golden import DATA, GOLDEN, float32
from wan import WanI2V, WanTI2V, WanV2V, WanV2V5B, media
from wan.chain.chain import chain
from wan.device.host_budget import HostPlan
from wan.errors import UserError
from wan.fitted_frames import FittedFrames
from wan.footage import FramesInMemory, VideoFile
from wan.models import Models
from wan.planning import loras_by_expert
from wan.prompting import CaptionerOwner
from wan.settings import Context, LoraFile, Sampling
from wan.types import Clip, Generation, Geometry, KnownFrames, Request, Step, frame_indices, from_uint8, to_uint8
from wan.weights.checkpoint import default_vlm
from wan.weights.prefetch import ReadAhead

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


class FakeCaptioner:
    """Says how bright the frames are; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], str]] = []
        self.closed = 0

    def describe(self, frames: Any, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        self.asked.append((frames.shape, question))
        return f"A picture of level {int(frames.mean())}. It moves."

    def close(self) -> None:
        self.closed += 1


def grey(level: int, frames: int = 3) -> Clip:
    return Clip(from_uint8(np.full((frames, 4, 6, 3), level, np.uint8)), Fraction(16))


def one_level_brighter(clip: Any, seed: int) -> Generation:
    request = Request(
        "", "", KnownFrames((clip.last,)), Geometry(1, 16, 16, (4, 8, 8)), Sampling(1, 5.0, (1.0, 1.0)), seed
    )
    level = int(to_uint8(clip.last).max())
    return Generation(grey(level + 1), torch.zeros(1), request)


def test_a_chain_continues_from_the_last_frame_with_the_next_seed() -> None:
    made = list(chain(grey(10), count=3, extend=one_level_brighter, seed=7))
    assert [int(to_uint8(clip.clip.frames[-1]).max()) for clip in made] == [11, 12, 13]
    assert [clip.request.seed for clip in made] == [7, 8, 9]


def test_a_chain_of_forty_clips_holds_one_clip_at_a_time() -> None:
    """And the one that it is made from, while it is made."""
    made: list[weakref.ref[Clip]] = []
    alive: list[int] = []

    def extend(clip: Any, seed: int) -> Generation:
        generation = one_level_brighter(clip, seed)
        made.append(weakref.ref(generation.clip))
        alive.append(sum(one() is not None for one in made))
        return generation

    assert sum(1 for _ in chain(grey(10), count=40, extend=extend, seed=7)) == 40
    assert max(alive) == 2


def test_a_chain_hands_out_each_clip_before_the_next_is_begun() -> None:
    begun: list[int] = []

    def extend(clip: Any, seed: int) -> Generation:
        begun.append(seed)
        return one_level_brighter(clip, seed)

    clips = chain(grey(10), count=3, extend=extend, seed=0)
    next(clips)
    assert begun == [0]


def test_pixels_survive_the_way_to_uint8_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert np.array_equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_frames_for_the_captioner_are_chosen_as_officially() -> None:
    assert frame_indices(81, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert frame_indices(8, 8) == [0, 1, 2, 3, 4, 4, 5, 6]
    assert frame_indices(1, 4) == [0, 0, 0, 0]


@pytest.fixture
def v2v() -> Any:
    continuation = WanV2V5B(float32("v2v-5B"), GOLDEN / "5b" / "ckpt")
    continuation.vlm.use(FakeCaptioner())
    return continuation


CALL: dict[str, Any] = {"max_area": 6144, "frame_num": 5, "sampling_steps": 2, "guide_scale": 3.0, "seed": 5}


def test_v2v_makes_what_image_to_video_makes_of_the_last_frame(v2v: Any, ti2v: Any) -> None:
    video, prompt = v2v.v2v(VIDEO, prompt="A cat playing", **CALL)
    assert prompt == "A cat playing" and not v2v.captioner.asked
    image = media.read_last_frame(VIDEO)
    assert torch.equal(video, ti2v.generate("A cat playing", image, **CALL))


def test_v2v_describes_the_video_when_it_has_no_prompt(v2v: Any) -> None:
    _, prompt = v2v.v2v(VIDEO, custom_prompt="continue video", num_segments=4, **CALL)
    (shape, question), *more = v2v.captioner.asked
    assert shape[0] == 4 and question == "Describe this video in detail." and not more
    assert prompt.startswith("continue video A picture of level ")


def test_frames_in_memory_are_used_from_the_very_first_on() -> None:
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert to_uint8(FramesInMemory(frames, 16).tail(9, Fraction(16)))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert to_uint8(FramesInMemory(frames, 16).tail(2, Fraction(8)))[:, 0, 0, 0].tolist() == [1, 3]


def test_files_are_read_while_a_vlm_elsewhere_describes(v2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []

    class Watched(ReadAhead):
        def __init__(self, files: Any, distance: int) -> None:
            read.append([file.name for file in files])
            super().__init__(files, distance)

    monkeypatch.setattr("wan.models.ReadAhead", Watched)
    v2v.v2v(VIDEO, **CALL)  # the VLM is on the CPU and wants the memory itself
    assert not read
    v2v.vlm.url = "http://localhost:1"
    v2v.v2v(VIDEO, prompt="A cat", **CALL)
    assert not read
    v2v.v2v(VIDEO, **CALL)
    assert read == [[]]  # all are loaded
    for name in ("text_encoder", "vae", "model"):
        v2v.models.forget(name)
    v2v.v2v(VIDEO, **CALL)
    parts = v2v.checkpoint.text_encoder, v2v.checkpoint.vae, v2v.checkpoint.experts["model"]
    assert read[1] == [file.name for part in parts for file in part.files]
    monkeypatch.setattr("wan.device.host.host_free_bytes", lambda: 2 * parts[0].files[0].stat().st_size)
    v2v.models.forget("text_encoder")
    v2v.v2v(VIDEO, **CALL)
    assert read[2] == [parts[0].files[0].name]


class Patient(FakeCaptioner):
    """Describes when all that a clip needs first is in memory, or after a while."""

    def __init__(self, models: Models, patience: float) -> None:
        super().__init__()
        self.models, self.patience = models, patience
        self.loaded: list[str] = []

    def describe(self, frames: Any, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        end, names = time.monotonic() + self.patience, ("text_encoder", "vae", "model")
        while time.monotonic() < end and not all(map(self.models.is_loaded, names)):
            time.sleep(0.01)
        self.loaded = [name for name in names if self.models.is_loaded(name)]
        return "A boat."


def test_what_a_clip_needs_first_is_loaded_while_a_vlm_elsewhere_describes(
    v2v: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = Patient(v2v.models, 0.1)
    v2v.vlm.use(vlm)
    made = v2v.v2v(VIDEO, **CALL)[0]  # the VLM is on the CPU and has memory and disk to itself
    assert vlm.loaded == []
    v2v.vlm.url = "http://localhost:1"
    with monkeypatch.context() as patched:
        patched.setattr("wan.device.host_budget.PLANS", (HostPlan(in_turn=True),))
        assert torch.equal(v2v.v2v(VIDEO, **CALL)[0], made)
        assert vlm.loaded == []  # they take turns, and only their files were read
    v2v.models.forget_all()
    vlm.patience = 60.0
    assert torch.equal(v2v.v2v(VIDEO, **CALL)[0], made)
    assert vlm.loaded == ["text_encoder", "vae", "model"]


def test_a_team_s_files_are_read_while_a_vlm_elsewhere_describes(v2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reading: list[list[str]] = []

    class Watched(ReadAhead):
        def __enter__(self) -> ReadAhead:
            reading.append([file.name for file in self.files])
            return super().__enter__()

        def __exit__(self, *raised: Any) -> None:
            super().__exit__(*raised)
            reading.pop()

    during: list[list[list[str]]] = []
    describe = v2v.captioner.describe

    def noted(*asked: Any) -> str:
        during.append([*reading])
        return str(describe(*asked))

    monkeypatch.setattr(v2v.captioner, "describe", noted)
    monkeypatch.setattr("wan.models.ReadAhead", Watched)
    monkeypatch.setattr(v2v, "team", SimpleNamespace(world=SimpleNamespace(size=2)))
    v2v.vlm.url = "http://localhost:1"
    footage = VideoFile(VIDEO)
    plan = v2v.plan(footage, max_area=6144, frame_num=5, steps=1, guidance=1.0)
    assert v2v._caption(footage, plan, {}, None).text
    parts = v2v.checkpoint.text_encoder, v2v.checkpoint.vae, v2v.checkpoint.experts["model"]
    assert during == [[[file.name for part in parts for file in part.files]]] and not v2v.models.loaded


def test_a_caption_takes_the_time_of_its_vlm_too(v2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2v.vlm, "load", lambda pictures: time.sleep(0.2))
    v2v.vlm.url = "http://localhost:1"
    footage = VideoFile(VIDEO)
    plan = v2v.plan(footage, max_area=6144, frame_num=5, steps=1, guidance=1.0)
    assert v2v.extend(footage, 1, plan).seconds["caption"] >= 0.2


def test_the_low_noise_expert_is_loaded_while_the_high_noise_one_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], bool]] = []
    is_loaded: dict[str, bool] = {}
    loading = Models.loading

    def noted(self: Models, names: Any, alone: bool = True) -> Any:
        asked.append((list(names), self.is_loaded("high_noise_model")))
        assert alone
        return loading(self, names, alone)

    def on_step(step: Step) -> None:
        is_loaded.setdefault(f"{step.stage} {step.latents is not None}", model.models.is_loaded("low_noise_model"))

    monkeypatch.setattr(Models, "loading", noted)
    model = WanI2V(float32("i2v-A14B"), GOLDEN / "14b" / "ckpt")
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    request = Request(
        "x", "", KnownFrames((picture,)), model.geometry(64, 64, 5), model.rules.merge(4, guide_scale=1.0), 1
    )
    made = model.run(request, on_step=on_step)
    assert asked == [(["vae", "high_noise_model"], False), (["low_noise_model"], True)]
    assert is_loaded["low noise True"]
    assert {"load", "sample"} < made.seconds.keys()
    model.close()
    model.config = dataclasses.replace(model.config, boundary=1.0)  # unipc's first timestep is 999
    assert torch.equal(model.run(request).latents, model.run(request).latents)
    assert asked[2:4] == [(["vae", "low_noise_model"], False), ([], False)]
    assert not model.models.is_loaded("high_noise_model")


def test_what_is_none_comes_from_the_config(v2v: Any) -> None:
    plan = v2v.plan(VideoFile(VIDEO))
    assert (plan.sampling.steps, plan.sampling.shift, plan.sampling.guidance) == (50, 5.0, (5.0, 5.0))
    assert plan.geometry.frames == 121 and plan.geometry.width * plan.geometry.height <= 1280 * 704
    assert plan.negative == v2v.config.sample_neg_prompt


NINE = CALL | {"prompt": "on", "frame_num": 9}


def test_frames_are_continued_as_the_file_that_they_are_of(v2v: Any) -> None:
    frames = media.read_tail(VIDEO, 9, 24)
    video, prompt = v2v.v2v(VIDEO, **NINE, context=5)
    again, _ = v2v.v2v(frames, **NINE, context=5, fps=24)
    pictures, _ = v2v.v2v([Image.fromarray(one) for one in frames], **NINE, context=5)
    assert prompt == "on" and torch.equal(video, again) and torch.equal(video, pictures)
    slower = FramesInMemory(np.arange(30, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8), 30)
    assert slower.tail(5, Fraction(10))[:, 0, 0, 0].add(1).mul(127.5).round().tolist() == [17, 20, 23, 26, 29]
    assert len(slower.tail(99, Fraction(10))) == 10 and slower.samples(4, 0.3)[:, 0, 0, 0].tolist() == [20, 23, 26, 29]
    wrong: Any
    for wrong in ([], np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.float32)):
        with pytest.raises(UserError, match="^frames must be"):
            v2v.footage(wrong)


def test_loras_are_text_and_contexts_numbers(v2v: Any, tmp_path: Path) -> None:
    assert v2v.plan(VideoFile(VIDEO), context=9).context == Context("tail", 9)
    assert loras_by_expert("a/b.safetensors:0.5", ["model"]) == {"model": (LoraFile(Path("a/b.safetensors"), 0.5),)}
    assert loras_by_expert([Path("c.safetensors")], ["model"]) == {"model": (LoraFile(Path("c.safetensors")),)}
    assert loras_by_expert({"model": ["d"]}, ["model"]) == {"model": (LoraFile(Path("d")),)}
    assert loras_by_expert((), ["model"]) == {}
    with pytest.raises(TypeError, match="contxt"):
        v2v.plan(VideoFile(VIDEO), contxt=9)


def test_closed_models_are_gone_and_come_again(v2v: Any) -> None:
    before, _ = v2v.v2v(VIDEO, **CALL)
    assert v2v.models.loaded
    captioner = v2v.captioner
    v2v.close()
    assert v2v.models.loaded == [] and captioner.closed == 1
    v2v.vlm.use(captioner)
    assert torch.equal(v2v.v2v(VIDEO, **CALL)[0], before)


def test_every_second_of_a_clip_is_in_a_stage_of_its_record(v2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(work: Any) -> Any:
        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(0.6)
            return work(*given, **named)

        return slow

    class Kept:
        prompt = handed = None
        find = staticmethod(lambda seed: None)
        keep = staticmethod(slowly(lambda *_: None))

    monkeypatch.setattr("wan.candidates.correct_drift", slowly(lambda frames, *_, **__: frames))
    monkeypatch.setattr("wan.pipeline.is_finite", slowly(lambda *_: True))
    monkeypatch.setattr(FittedFrames, "known", slowly(FittedFrames.known))
    footage = VideoFile(VIDEO)
    plan = v2v.plan(footage, max_area=6144, frame_num=5, steps=1, guidance=1.0, prefix="go on", drift_correction=1.0)
    start = time.perf_counter()
    made = v2v.extend(footage, 1, plan, draft=Kept())
    whole = time.perf_counter() - start
    assert {"prepare", "keep", "correct"} < made.seconds.keys() and whole - sum(made.seconds.values()) < 0.55


def test_a_chain_describes_the_clip_before_and_keeps_its_size(v2v: Any) -> None:
    footage = VideoFile(VIDEO)
    options = {"frame_num": 5, "steps": 1, "guidance": 1.0, "prefix": "go on"}
    plan = v2v.plan(footage, max_area=6144, **options)
    made = list(chain(footage, count=2, extend=lambda clip, seed: v2v.extend(clip, seed, plan), seed=1))
    assert len(v2v.captioner.asked) == 2
    assert v2v.captioner.asked[1][0][1:3] == (plan.geometry.height, plan.geometry.width)
    assert all(clip.request.prompt.startswith("go on A picture of level") for clip in made)
    assert made[0].clip.frames.shape == made[1].clip.frames.shape
    (leading,) = made[1].request.known.leading
    assert isinstance(leading, torch.Tensor) and torch.equal(leading, made[0].clip.last)
    assert set(made[0].seconds) == {"caption", "prepare", "text", "encode", "load", "sample", "decode"}


def owner(main: str, device: str, captioner: Any) -> CaptionerOwner:
    one = CaptionerOwner(
        "vlm",
        url=None,
        question="?",
        trust_remote_code=False,
        main=torch.device(main),
        device=torch.device(device),
    )
    one.use(captioner)
    return one


def test_the_captioner_is_freed_only_where_it_shares_the_device(v2v: Any) -> None:
    v2v._summarize_video(VIDEO)
    assert v2v.captioner.closed == 0  # on the CPU nothing is short
    v2v.vlm = owner("cuda:0", "cuda:0", v2v.captioner)
    v2v._summarize_video(VIDEO)
    assert v2v.captioner.closed == 1
    v2v.vlm = owner("cuda:0", "cuda:1", v2v.captioner)
    v2v._summarize_video(VIDEO, num_segments=2, question="What?")
    assert v2v.captioner.closed == 1 and v2v.captioner.asked[-1] == ((2, 180, 320, 3), "What?")


def test_a_failing_captioner_stops_the_run_before_sampling(v2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise UserError("the VLM is out of memory; pass --prompt to go on without captioning")

    monkeypatch.setattr(v2v.captioner, "describe", fail)
    monkeypatch.setattr(v2v, "run", lambda *_, **__: pytest.fail("sampling began"))
    with pytest.raises(UserError, match="--prompt"):
        v2v.v2v(VIDEO, **CALL)


def test_a_long_description_is_cut_to_the_text_encoder(v2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "The boat goes over wave ab slowly. "
    names = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=2))
    # another wave and another way, since sentences that differ in one word are a loop
    told = "".join(sentence.replace("ab", name).replace("slowly", f"{name} slowly") for name in names)
    monkeypatch.setattr(v2v.captioner, "describe", lambda *_, **__: told)
    plan = dataclasses.replace(v2v.plan(VideoFile(VIDEO)), prefix="continue video")
    prompt = v2v.build_prompt(VideoFile(VIDEO), plan).text
    assert prompt.startswith("continue video The boat") and prompt.endswith("slowly.")
    assert 512 - v2v.tokenizer.count(sentence) < v2v.tokenizer.count(prompt) <= 512


def test_the_default_vlm_is_in_or_beside_the_checkpoint_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "Wan2.2-TI2V-5B"
    checkpoint.mkdir()
    assert default_vlm(checkpoint) == "OpenGVLab/InternVL3_5-8B"
    (tmp_path / "InternVL3_5-8B").mkdir()
    assert default_vlm(checkpoint) == str(tmp_path / "InternVL3_5-8B")
    (checkpoint / "InternVL3_5-8B").mkdir()
    assert default_vlm(checkpoint) == str(checkpoint / "InternVL3_5-8B")


def test_the_default_vlm_is_beside_a_link_to_the_checkpoint_too(tmp_path: Path) -> None:
    (tmp_path / "disk" / "ckpt").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "ckpt")
    assert default_vlm(tmp_path / "link") == "OpenGVLab/InternVL3_5-8B"
    (tmp_path / "disk" / "InternVL3_5-8B").mkdir()
    assert default_vlm(tmp_path / "link") == str(tmp_path / "disk" / "InternVL3_5-8B")
    (tmp_path / "InternVL3_5-8B").mkdir()
    assert default_vlm(tmp_path / "link") == str(tmp_path / "InternVL3_5-8B")


def test_helpers_keep_their_names(v2v: Any) -> None:
    assert v2v._extract_last_frame(VIDEO).size == (320, 180)
    assert v2v._load_vlm() is v2v.captioner
    tile = v2v._vlm_dynamic_preprocess(Image.new("RGB", (320, 180)), max_num=1, image_size=448)
    assert [t.size for t in tile] == [(448, 448)]
    assert v2v._build_vlm_transform(448)(tile[0]).shape == (3, 448, 448)


SIGNATURES = {
    (WanI2V, "__init__"): "config checkpoint_dir device_id=0 rank=0 t5_fsdp=False dit_fsdp=False use_sp=False "
    "t5_cpu=False init_on_cpu=True convert_model_dtype=False",
    (WanV2V, "__init__"): "config checkpoint_dir device_id=0 rank=0 t5_fsdp=False dit_fsdp=False use_sp=False "
    "t5_cpu=False init_on_cpu=True convert_model_dtype=False vlm_path=None vlm_device=None",
    (WanI2V, "generate"): "input_prompt img max_area=921600 frame_num=81 shift=5.0 sample_solver='unipc' "
    "sampling_steps=40 guide_scale=5.0 n_prompt='' seed=-1 offload_model=True",
    (WanTI2V, "generate"): "input_prompt img=None size=(1280, 704) max_area=901120 frame_num=81 shift=5.0 "
    "sample_solver='unipc' sampling_steps=50 guide_scale=5.0 n_prompt='' seed=-1 offload_model=True",
    (WanV2V, "v2v"): "video_path prompt=None max_area=None frame_num=None shift=None sample_solver='unipc' "
    "sampling_steps=None guide_scale=None n_prompt='' seed=-1 offload_model=True custom_prompt=None num_segments=8",
}


@pytest.mark.parametrize(("owner", "method"), SIGNATURES)
def test_positional_signatures_do_not_change(owner: Any, method: str) -> None:
    parameters = list(inspect.signature(getattr(owner, method)).parameters.values())[1:]
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    written = [
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in positional
    ]
    assert " ".join(written) == SIGNATURES[owner, method]


def test_the_public_names_are_there() -> None:
    from wan.denoiser.model import WanModel
    from wan.vae.vae import Wan2_1_VAE, Wan2_2_VAE
    from wan.video2video import WanV2V as home14
    from wan.wan22video2video5B import WanV2V5B as home5

    assert (wan.WanV2V, wan.WanV2V5B) == (home14, home5)
    assert issubclass(WanV2V, WanI2V) and issubclass(WanV2V5B, WanTI2V)
    continuation = WanV2V(float32("v2v-14B"), GOLDEN / "14b" / "ckpt")
    assert isinstance(continuation.low_noise_model, WanModel) and isinstance(continuation.high_noise_model, WanModel)
    assert isinstance(continuation.vae, Wan2_1_VAE)
    assert isinstance(WanV2V5B(float32("v2v-5B"), GOLDEN / "5b" / "ckpt").vae, Wan2_2_VAE)
    with pytest.raises(AttributeError, match="no attribute 'WanS2V'"):
        wan.WanS2V  # noqa: B018


def test_weights_that_cannot_be_in_common_are_said_to_be_each_process_s_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wan.device.shared._is_open", lambda *facts: False)  # no /proc
    for sliced, why in (False, "this machine does not do it"), (True, "they are rounded or sliced"):
        v2v = WanV2V5B(float32("v2v-5B"), GOLDEN / "5b" / "ckpt", t5_fsdp=sliced, share_weights=2)
        assert v2v.host.sharers == 1 and f"holds its weights by itself, for {why}" in caplog.text
        caplog.clear()
    WanV2V5B(float32("v2v-5B"), GOLDEN / "5b" / "ckpt")
    assert not caplog.records
