"""Every way of going on from a clip: what the model is fed, what comes out, what is refused; on golden checkpoints."""

from __future__ import annotations

import dataclasses
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.support.golden import DATA, GOLDEN, float32
from wan import WanV2V, WanV2V5B, media
from wan.chain.chain import chain
from wan.clip_sampler import ClipStart, why_not_finite
from wan.denoiser.conditioning import HeldImageChannels, ImageChannels
from wan.device.placement import Placement
from wan.errors import UserError
from wan.footage import VideoFile, choose_anchor
from wan.image2video import crop_to_aspect
from wan.image2video import preprocess as stretched
from wan.settings import Context, LoraFile
from wan.sizes import exact_size, fills
from wan.stopwatch import Stopwatch
from wan.types import Clip, Generation, KnownFrames, Request, TextContext, from_uint8

pytestmark = pytest.mark.slow

VIDEO = DATA / "corpus" / "h264_faststart.mp4"
AREA = 96 * 64
FRAMES = 21
CPU = Placement(torch.device("cpu"), offload=False)
OPTIONS: dict[str, Any] = {"max_area": AREA, "frame_num": FRAMES, "steps": 2, "prompt": "it goes on"}


@pytest.fixture(scope="module")
def a14b() -> Any:
    return WanV2V(float32("v2v-14B"), GOLDEN / "14b" / "ckpt")


@pytest.fixture(scope="module")
def b5() -> Any:
    return WanV2V5B(float32("v2v-5B"), GOLDEN / "5b" / "ckpt")


def moving(frames: int = 21, width: int = 96, height: int = 64, fps: int = 16) -> Clip:
    """A gradient that moves by two pixels a frame."""
    x = np.arange(width)[None, None, :, None] + 2 * np.arange(frames)[:, None, None, None]
    y = np.arange(height)[None, :, None, None]
    wave = np.concatenate([np.sin(x / 7) + 0 * y, np.cos(y / 5) + 0 * x, np.sin((x + y) / 9)], axis=3)
    return Clip(from_uint8((wave * 90 + 128).astype(np.uint8)), Fraction(fps))


def request_of(pipeline: Any, footage: Any, **more: Any) -> tuple[Request, Any]:
    """The request of the next clip, and its plan."""
    plan = pipeline.plan(footage, **OPTIONS | more)
    return Request(
        "it goes on", "n", pipeline.frames.known(footage, plan), plan.geometry, plan.sampling, 7, plan.loras
    ), plan


@pytest.fixture(scope="module")
def svi(tmp_path_factory: pytest.TempPathFactory, a14b: Any) -> dict[str, tuple[LoraFile, ...]]:
    """A pair of small LoRAs with the names and keys of the published ones."""
    folder = tmp_path_factory.mktemp("svi")
    pair: dict[str, tuple[LoraFile, ...]] = {}
    for seed, (side, expert) in enumerate((("high", "high_noise_model"), ("low", "low_noise_model"))):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in a14b.checkpoint.experts[expert].shapes.items():
            layer = name.removesuffix(".weight")
            if not name.startswith("blocks.") or len(shape) != 2 or "norm" in name or not name.endswith(".weight"):
                continue
            tensors[f"{layer}.lora_A.default.weight"] = torch.randn(2, shape[1], generator=generator) / 9
            tensors[f"{layer}.lora_B.default.weight"] = torch.randn(shape[0], 2, generator=generator) / 9
        path = folder / f"SVI_Wan2.2-I2V-A14B_{side}_noise_lora_v2.0_pro.safetensors"
        save_file(tensors, path)
        pair[expert] = (LoraFile(path),)
    return pair


# The baseline


@pytest.mark.parametrize("task", ["14b", "5b"])
def test_the_last_frame_is_conditioned_on_bit_for_bit_as_image_to_video_does(
    task: str, a14b: Any, b5: Any, i2v: Any, ti2v: Any
) -> None:
    """The golden tests hold the other side of this equation to the official code."""
    ours, stock = (a14b, i2v) if task == "14b" else (b5, ti2v)
    image = media.read_last_frame(VIDEO)
    request, plan = request_of(ours, VideoFile(VIDEO))
    width, height = plan.geometry.width, plan.geometry.height
    if task == "14b":
        image = image.crop((0, 0, *image.size)).resize((192, 128))  # an aspect that needs no crop
        request, plan = request_of(ours, Still(image))
        width, height = plan.geometry.width, plan.geometry.height
    literal = Request("it goes on", "n", KnownFrames((image,)), plan.geometry, plan.sampling, 7)
    noise = stock.noise(literal)
    assert torch.equal(noise, ours.noise(request)) and (width, height) == (96, 64)
    one, other = ours.condition(request, noise, CPU), stock.condition(literal, noise, CPU)
    assert type(one) is type(other) and not isinstance(one, HeldImageChannels)
    for t in (torch.tensor(999), torch.tensor(3)):
        for a, b in zip(one.model_input(noise, t), other.model_input(noise, t), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(ours.run(request).latents, stock.run(literal).latents)


class Still:
    """A picture as footage."""

    motion = None

    def __init__(self, image: Image.Image) -> None:
        self.last = image

    def samples(self, count: int, seconds: float | None = None) -> Any:
        return np.stack([np.asarray(self.last)] * count)

    def tail(self, count: int, fps: Fraction) -> Tensor:
        return from_uint8(np.asarray(self.last)[None])


@pytest.mark.parametrize("task", ["14b", "5b"])
def test_a_tail_of_one_frame_is_the_baseline(task: str, a14b: Any, b5: Any) -> None:
    pipeline = a14b if task == "14b" else b5
    footage = moving(fps=int(pipeline.fps))
    one = pipeline.extend(footage, 7, pipeline.plan(footage, **OPTIONS))
    other = pipeline.extend(footage, 7, pipeline.plan(footage, context=Context("tail", 1), **OPTIONS))
    assert torch.equal(one.latents, other.latents) and one.dropped == other.dropped == 1


# Motion context


@pytest.mark.parametrize("known", [5, 9, 17])
def test_a14b_knows_the_tail_in_mask_and_latents_and_keeps_it(known: int, a14b: Any) -> None:
    footage = moving()
    request, plan = request_of(a14b, footage, context=Context("tail", known))
    noise = a14b.noise(request)
    condition = a14b.condition(request, noise, CPU)

    pixels = torch.zeros(3, FRAMES, 64, 96)
    pixels[:, :known] = footage.frames[-known:].permute(3, 0, 1, 2)
    latents = a14b.vae.encode([pixels])[0]
    slots = (known - 1) // 4 + 1
    mask = torch.zeros(4, *plan.geometry.latent)
    mask[:, :slots] = 1
    assert torch.equal(condition.channels, torch.cat([mask, latents]))
    # the causal VAE makes the same latents of the tail alone
    torch.testing.assert_close(latents[:, :slots], a14b.vae.encode([pixels[:, :known]])[0], atol=1e-5, rtol=0)
    made = a14b.run(request)
    assert torch.equal(made.latents[:, :slots], latents[:, :slots])
    assert not torch.equal(made.latents[:, slots:], latents[:, slots:])


@pytest.mark.parametrize("known", [5, 9])
def test_5b_knows_the_tail_as_clean_latent_frames_and_keeps_them(known: int, b5: Any) -> None:
    footage = moving(fps=24)
    request, plan = request_of(b5, footage, context=Context("tail", known))
    noise = b5.noise(request)
    condition = b5.condition(request, noise, CPU)
    latents = b5.vae.encode([footage.frames[-known:].permute(3, 0, 1, 2)])[0]
    slots = (known - 1) // 4 + 1
    assert torch.equal(condition.known, latents) and latents.shape[1] == slots
    placed, steps = condition.model_input(noise, torch.tensor(500))
    assert torch.equal(placed[0, :, :slots], latents) and torch.equal(placed[0, :, slots:], noise[:, slots:])
    assert steps.tolist() == [[0.0] * slots + [500.0] * (noise.shape[1] - slots)]
    assert torch.equal(b5.run(request).latents[:, :slots], latents)


def test_a_clip_of_a_chain_says_how_many_there_are(b5: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = WanV2V5B.run

    def counting(self: WanV2V5B, request: Request, **more: Any) -> Generation:
        seen.append(more["clips"])
        return run(self, request, **more)

    monkeypatch.setattr(WanV2V5B, "run", counting)
    footage = moving(fps=24)
    b5.extend(footage, 7, dataclasses.replace(b5.plan(footage, **OPTIONS), number=2, count=4))
    assert seen == [4]


def test_a_tail_chain_goes_on_from_the_last_frames_of_each_clip(b5: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    run = WanV2V5B.run

    def watched(self: WanV2V5B, request: Request, **more: Any) -> Generation:
        seen.append(request)
        return run(self, request, **more)

    monkeypatch.setattr(WanV2V5B, "run", watched)
    footage = moving(fps=24)
    plan = b5.plan(footage, context=Context("tail", 5), **OPTIONS)
    made = list(chain(footage, count=2, extend=lambda clip, seed: b5.extend(clip, seed, plan), seed=1))
    for index, frame in enumerate(seen[1].known.leading):
        assert isinstance(frame, torch.Tensor) and torch.equal(frame, made[0].clip.frames[-5 + index].permute(2, 0, 1))
    assert [clip.dropped for clip in made] == [5, 5]


def test_shorter_footage_is_known_as_far_as_it_goes(b5: Any) -> None:
    footage = moving(frames=7, fps=24)
    made = b5.extend(footage, 1, b5.plan(footage, context=Context("tail", 9), **OPTIONS))
    assert made.dropped == 5 and len(made.request.known.leading) == 5


def test_a_tail_is_taken_at_the_rate_of_the_model(b5: Any) -> None:
    """The file has 30 frames a second, the model 24."""
    footage = VideoFile(VIDEO)
    known = b5.frames.known(footage, b5.plan(footage, context=Context("tail", 5), **OPTIONS))
    expected = media.read_tail(VIDEO, 5, Fraction(24))
    assert len(known.leading) == 5 and np.array_equal(expected[-1], np.asarray(footage.last))
    for frame, picture in zip(known.leading, expected, strict=True):
        width, height = frame.shape[2], frame.shape[1]
        assert torch.equal(frame, b5.frame_for(from_uint8(picture).permute(2, 0, 1), width, height))


# Stable Video Infinity


def test_svi_conditions_on_anchor_motion_and_zeros(a14b: Any, svi: dict[str, tuple[LoraFile, ...]]) -> None:
    anchor = Image.fromarray(np.full((64, 96, 3), (200, 40, 90), np.uint8))
    motion = torch.randn(16, 1, 8, 12)
    footage = moving()
    options = {"context": Context("svi2pro", 5), "anchor": anchor, "loras": svi}
    before = Remembered(footage, motion)
    request, plan = request_of(a14b, before, **options)
    condition = a14b.condition(request, a14b.noise(request), CPU)
    alone = a14b.vae.encode([stretched(anchor, 96, 64)[:, None]])[0]
    zeros = torch.zeros(16, plan.geometry.latent[0] - 2, 8, 12)
    mask = torch.zeros(4, *plan.geometry.latent)
    mask[:, 0] = 1
    expected = torch.cat([mask, torch.cat([alone, motion, zeros], dim=1)])
    assert type(condition) is ImageChannels and torch.equal(condition.channels, expected)

    # from a file the motion is the last latent frame of its last 17 frames
    request, _ = request_of(a14b, footage, **options)
    condition = a14b.condition(request, a14b.noise(request), CPU)
    encoded = a14b.vae.encode([footage.frames[-17:].permute(3, 0, 1, 2)])[0]
    assert torch.equal(condition.channels[4:, 1:2], encoded[:, -1:])


class Remembered:
    """A clip whose last latent frame is known."""

    def __init__(self, clip: Clip, motion: Tensor) -> None:
        self.clip, self.motion, self.last, self.colours = clip, motion, clip.last, clip.colours

    def tail(self, count: int, fps: Fraction) -> Tensor:
        return self.clip.tail(count, fps)

    def samples(self, count: int, seconds: float | None = None) -> Any:
        return self.clip.samples(count, seconds)


def test_a_shot_of_svi_begins_with_its_picture_as_anchor_and_no_motion(
    a14b: Any, svi: dict[str, tuple[LoraFile, ...]]
) -> None:
    picture = torch.full((3, 64, 96), 0.25)
    request, plan = request_of(a14b, moving(), context=Context("svi2pro", 5), loras=svi, cut=picture)
    assert plan.dropped == 0
    channels = a14b.condition(request, a14b.noise(request), CPU).channels
    assert torch.equal(channels[4:, :1], a14b.vae.encode([picture[:, None]])[0]) and channels[4:, 1:].eq(0).all()
    assert channels[:4, 0].eq(1).all() and channels[:4, 1:].eq(0).all()


def test_an_svi_chain_hands_its_latents_on(a14b: Any, svi: dict[str, tuple[LoraFile, ...]]) -> None:
    footage = moving()
    plan = a14b.plan(footage, context=Context("svi2pro", 5), loras=svi, **OPTIONS)
    made = list(chain(footage, count=2, extend=lambda clip, seed: a14b.extend(clip, seed, plan), seed=1))
    motion = made[1].request.known.motion
    assert motion is not None and torch.equal(motion, made[0].latents[:, -1:])
    assert [clip.dropped for clip in made] == [5, 5]


def test_svi_and_its_loras_are_used_together_or_refused(
    a14b: Any, b5: Any, svi: dict[str, Any], tmp_path: Path
) -> None:
    footage = moving()
    pro = Context("svi2pro", 5)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (a14b, {"context": pro}, "needs its pair of LoRAs"),
        (a14b, {"context": pro, "loras": {"high_noise_model": svi["high_noise_model"]}}, "needs its pair"),
        (a14b, {"loras": svi}, "use it with continuation svi2pro"),
        (b5, {"context": pro}, "is for I2V-A14B"),
        (a14b, {"cut": True}, "text alone"),
        (a14b, {"context": Context("tail", 17), "frame_num": 17}, "must be longer"),
    ]
    older = {name: (LoraFile(renamed(files[0].path, tmp_path, "SVI_v2.0")),) for name, files in svi.items()}
    refused.append((a14b, {"context": pro, "loras": older}, "another SVI version"))
    for pipeline, options, message in refused:
        with pytest.raises(UserError, match=message):
            pipeline.plan(moving(fps=int(pipeline.fps)) if pipeline is b5 else footage, **OPTIONS | options)


def renamed(path: Path, folder: Path, stem: str) -> Path:
    side = "high" if "high" in path.name else "low"
    copy = folder / f"{stem}_{side}.safetensors"
    copy.write_bytes(path.read_bytes())
    return copy


def test_the_anchor_is_a_sharp_frame_from_before_the_end() -> None:
    rng = np.random.default_rng(0)
    frames = np.full((64, 8, 12, 3), 128, np.uint8)
    frames[24] = rng.integers(0, 255, (8, 12, 3))  # 2.4 s before the end, at 16 frames a second
    frames[60] = rng.integers(0, 255, (8, 12, 3))
    clip = Clip(from_uint8(frames), Fraction(16))
    looked_at = clip.samples(13, 3.0)
    sharp = max(range(9), key=lambda index: looked_at[index].std())
    assert np.array_equal(np.asarray(choose_anchor(clip)), looked_at[sharp])
    assert np.asarray(choose_anchor(Clip(from_uint8(frames[:1]), Fraction(16)))).shape == (8, 12, 3)


# More motion


@pytest.mark.parametrize("context", [Context(), Context("tail", 5)])
def test_an_amplitude_changes_what_a14b_sees_behind_the_known_frames_and_so_the_clip(
    context: Context, a14b: Any
) -> None:
    footage = moving()
    clips, seen = [], []
    for amplitude in (1.0, 1.3):
        request, plan = request_of(a14b, footage, context=context, motion_amplitude=amplitude)
        made = a14b.extend(footage, 7, plan)
        assert made.request.motion_amplitude == amplitude
        seen.append(a14b.condition(made.request, a14b.noise(request), CPU).channels[4:])
        clips.append(made.clip.frames)
    known = (context.frames - 1) // 4 + 1
    assert torch.equal(seen[0][:, :known], seen[1][:, :known])
    away = [one[:, known:] - one[:, :1] for one in seen]
    assert float(away[1].std() / away[0].std()) == pytest.approx(1.3, abs=0.02)
    assert torch.equal(clips[0][0], clips[1][0]) is (context.frames > 1)  # several known frames are held
    assert not torch.equal(clips[0], clips[1])


def test_an_amplitude_is_refused_where_nothing_is_to_be_amplified(
    a14b: Any, b5: Any, svi: dict[str, tuple[LoraFile, ...]]
) -> None:
    with pytest.raises(UserError, match="motion_amplitude is for I2V-A14B"):
        b5.plan(moving(fps=24), motion_amplitude=1.2, **OPTIONS)
    with pytest.raises(UserError, match="svi2pro's LoRAs were trained to find empty"):
        a14b.plan(moving(), context=Context("svi2pro", 5), loras=svi, motion_amplitude=1.2, **OPTIONS)
    with pytest.raises(UserError, match="motion_amplitude must be from 1 to 1.5, 1.6 is not"):
        a14b.plan(moving(), motion_amplitude=1.6, **OPTIONS)


# The way on, clip by clip


def test_what_is_discarded_is_handed_on_neither_as_pixels_nor_as_latents(a14b: Any) -> None:
    footage = moving()
    whole = a14b.extend(footage, 7, a14b.plan(footage, **OPTIONS))
    made = a14b.extend(footage, 7, a14b.plan(footage, discard=8, **OPTIONS))
    assert torch.equal(made.clip.frames, whole.clip.frames[:-8]) and torch.equal(made.latents, whole.latents[:, :-2])
    assert torch.equal(made.motion, whole.latents[:, -3:-2]) and torch.equal(
        made.last, whole.clip.frames[-9].permute(2, 0, 1)
    )
    for options, problem in (
        ({"discard": 20, "frame_num": 21}, "discard 20 leaves nothing new of a clip of 21 frames"),
        ({"discard": 6}, "discard must be 0, 4, 8"),
        ({"discard": 4, "end": Image.new("RGB", (96, 64))}, "would leave out the clip's end image"),
    ):
        with pytest.raises(UserError, match=problem):
            a14b.plan(footage, **OPTIONS | options)


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("mode", ["last_frame", "tail", "svi2pro"])
def test_what_a_program_leaves_is_known_in_every_mode_and_nothing_else_is_lost(
    mode: str, changes: bool, a14b: Any, svi: dict[str, tuple[LoraFile, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Tensor] = []

    def program(command: str, frames: Tensor) -> Tensor:
        got.append(frames)
        return frames * 0.5 if changes else frames

    monkeypatch.setattr("wan.fitted_frames.hand_off", program)
    before = Remembered(moving(), torch.ones(16, 1, 8, 12))
    loras = svi if mode == "svi2pro" else {}
    plan = a14b.plan(
        before, context=Context.choose(mode), loras=loras, handoff=f"{sys.executable} {{frames}}", **OPTIONS
    )
    start, handed = a14b.frames.hand_off(before, plan, None)
    assert len(got) == 1 and len(got[0]) == {"last_frame": 1, "tail": 5, "svi2pro": 17}[mode]
    known, plain = a14b.frames.known(start, plan), a14b.frames.known(before, plan)
    if not changes:
        assert start is before
    elif mode == "svi2pro":  # its latents are those of what it was
        assert known.motion is None and len(known.leading) == 17
    else:
        assert all(torch.equal(new, 0.5 * old) for new, old in zip(known.leading, plain.leading, strict=True))
    # what is known already is not asked for again, and is measured against what was shown
    again, _ = a14b.frames.hand_off(before, plan, handed)
    assert len(got) == 1 and torch.equal(again.last, start.last)
    cut = dataclasses.replace(plan, cut=before.last)
    assert a14b.frames.hand_off(before, cut, None) == (before, None) and len(got) == 1


# End images and cuts


def test_an_end_image_is_the_last_known_frame(a14b: Any, i2v: Any) -> None:
    footage, end = moving(), Image.fromarray(np.full((64, 96, 3), 77, np.uint8))
    request, plan = request_of(a14b, footage, end=end)
    condition = a14b.condition(request, a14b.noise(request), CPU)
    pixels = torch.zeros(3, FRAMES, 64, 96)
    pixels[:, 0], pixels[:, -1] = footage.last, stretched(end, 96, 64)
    assert torch.equal(condition.channels[4:], a14b.vae.encode([pixels])[0])
    assert condition.channels[3, -1].eq(1).all() and condition.channels[:3, -1].eq(0).all()
    video = i2v.generate("x", end, max_area=AREA, frame_num=5, sampling_steps=1, seed=1, last_image=end)
    assert video.shape == (3, 5, 64, 96)


@pytest.mark.parametrize("context", [Context(), Context("tail", 5)])
def test_the_5b_model_holds_the_last_latent_frame_to_the_end_image(context: Context, b5: Any) -> None:
    footage, end = moving(fps=24), Image.fromarray(np.full((64, 96, 3), 77, np.uint8))
    made = b5.extend(footage, 7, b5.plan(footage, end=end, context=context, **OPTIONS))
    # four frames of it, and not the one that a picture alone is encoded to
    last = b5.vae.encode([b5.frame_for(end, 96, 64)[:, None].repeat(1, 5, 1, 1)])[0][:, -1:]
    assert torch.equal(made.latents[:, -1:], last)
    plain = b5.extend(footage, 7, b5.plan(footage, context=context, **OPTIONS))
    known = (context.frames - 1) // 4 + 1
    assert torch.equal(made.latents[:, :known], plain.latents[:, :known])
    # the frames between are on their way there
    assert not torch.equal(made.latents[:, known:-1], plain.latents[:, known:-1])
    of_text = b5.extend(footage, 7, b5.plan(footage, end=end, cut=True, **OPTIONS))
    assert torch.equal(of_text.latents[:, -1:], last) and not torch.equal(of_text.latents, made.latents)


def test_svi_takes_an_end_image_alone_in_all_channels_of_the_last_latent_frame(
    a14b: Any, svi: dict[str, tuple[LoraFile, ...]]
) -> None:
    footage, end = moving(), Image.fromarray(np.full((64, 96, 3), 77, np.uint8))
    request, _ = request_of(a14b, footage, context=Context("svi2pro", 5), loras=svi, end=end)
    channels = a14b.condition(request, a14b.noise(request), CPU).channels
    assert torch.equal(channels[4:, -1:], a14b.vae.encode([a14b.frame_for(end, 96, 64)[:, None]])[0])
    assert channels[:4, [0, -1]].eq(1).all() and channels[:4, 1:-1].eq(0).all()
    without = dataclasses.replace(request, known=dataclasses.replace(request.known, end=None))
    plain = a14b.condition(without, a14b.noise(request), CPU).channels
    assert torch.equal(channels[:, :-1], plain[:, :-1]) and plain[:, -1].eq(0).all()
    assert not torch.equal(a14b.run(request).latents, a14b.run(without).latents)


def test_an_end_image_leaves_something_to_be_made_or_is_refused(
    a14b: Any, b5: Any, svi: dict[str, tuple[LoraFile, ...]]
) -> None:
    end = Image.new("RGB", (96, 64))
    for pipeline, fewest, more in (
        (b5, 9, {}),
        (b5, 13, {"context": Context("tail", 5)}),
        (b5, 5, {"cut": True}),
        (a14b, 13, {"context": Context("svi2pro", 5), "loras": svi}),
        (a14b, 9, {"context": Context("svi2pro", 5), "loras": svi, "cut": end}),
    ):
        options = OPTIONS | {"end": end} | more
        footage = moving(fps=int(pipeline.fps))
        assert pipeline.plan(footage, **options | {"frame_num": fewest}).end is end
        if fewest > 5:
            with pytest.raises(UserError, match=f"must have {fewest} or more|must be longer"):
                pipeline.plan(footage, **options | {"frame_num": fewest - 4})


def test_a_cut_starts_from_its_picture_and_repeats_nothing(a14b: Any, b5: Any) -> None:
    footage, picture = moving(), Image.fromarray(np.full((64, 96, 3), 77, np.uint8))
    made = a14b.extend(footage, 1, a14b.plan(footage, cut=picture, **OPTIONS))
    assert made.dropped == 0 and made.seam is None
    assert torch.equal(made.request.known.leading[0], stretched(picture, 96, 64))
    plan = b5.plan(moving(fps=24), cut=True, **OPTIONS)
    assert b5.extend(moving(fps=24), 1, plan).request.known == KnownFrames()


# Candidates


def test_the_candidate_with_the_best_seam_is_kept(b5: Any) -> None:
    footage = moving(fps=24)
    plan = b5.plan(footage, best_of=3, **OPTIONS)
    made = b5.extend(footage, 4, plan)
    candidates = made.notes["candidates"]
    assert [one["seed"] for one in candidates] == [4, 1000004, 2000004]
    best = min(candidates, key=lambda one: one["score"])
    assert made.request.seed == best["seed"] and made.seam is not None and made.seam["score"] == best["score"]


# Sizes


def test_a_picture_is_cropped_to_the_aspect_and_never_stretched() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    cropped = np.asarray(crop_to_aspect(Image.fromarray(np.ascontiguousarray(ramp)), 96, 64))
    assert cropped.shape == (100, 150, 3) and cropped[0, 0, 0] == 25
    frame = from_uint8(np.ascontiguousarray(ramp)).permute(2, 0, 1)
    smaller = crop_to_aspect(frame, 96, 64)
    assert isinstance(smaller, torch.Tensor) and smaller.shape == (3, 100, 150)
    image = Image.new("RGB", (192, 128))
    assert crop_to_aspect(image, 96, 64) is image


AREAS = (1280 * 720, 832 * 480, 160 * 96)


@pytest.mark.parametrize("area", AREAS)
def test_the_size_rule_settles_at_once_for_every_size(area: int) -> None:
    """For each of the 16.8 million sizes up to 4096 x 4096: f(f(x)) = f(x)."""
    sides = np.arange(1, 4097)

    def rule(width: Any, height: Any) -> Any:
        return np.sqrt((area * width // height).astype(np.float64)).astype(np.int64) // 16 * 16

    def fills(width: Any, height: Any) -> Any:
        return (width * height <= area) & (area < (width + 16) * (height + 16))

    wide = np.stack([rule(sides, height) for height in sides])  # [height, width]
    high = wide.T.copy()  # the rule is the same for both sides
    wholes = slice(15, None, 16)  # only sizes of whole blocks can fill the area
    width, height = np.meshgrid(sides[wholes], sides[wholes])
    kept = fills(width, height)
    wide[wholes, wholes][kept], high[wholes, wholes][kept] = width[kept], height[kept]
    once, valid = (wide, high), (wide > 0) & (high > 0)
    reached = np.zeros((wide.max() // 16 + 1, high.max() // 16 + 1), bool)
    reached[wide // 16, high // 16] = True
    sizes = 16 * (np.argwhere(reached[1:, 1:]).T + 1)
    assert (fills(*sizes) | ((rule(*sizes) == sizes[0]) & (rule(*sizes[::-1]) == sizes[1]))).all()
    for wide, high in sizes.T[:: max(len(sizes.T) // 500, 1)]:  # the arrays say what the function says
        assert exact_size(int(wide), int(high), area) == (wide, high)
    rng = np.random.default_rng(0)
    for x, y in rng.integers(0, 4096, (3000, 2)):
        if valid[y, x]:
            assert exact_size(int(x) + 1, int(y) + 1, area) == (once[0][y, x], once[1][y, x])


def test_the_5b_size_rule_settles_at_once(b5: Any) -> None:
    sizes = {b5.fit(width, height, 1280 * 704) for width in range(64, 4097, 13) for height in range(64, 2200, 7)}
    assert all(b5.fit(*size, 1280 * 704) == size for size in sizes)
    assert b5.fit(1920, 1080, 1280 * 704) == (1248, 704)


def test_a_size_fills_an_area_up_to_its_last_pixel() -> None:
    assert fills(64, 32, 64 * 32, 16) and not fills(64, 32, 64 * 32 - 1, 16)
    assert fills(64, 32, 80 * 48 - 1, 16) and not fills(64, 32, 80 * 48, 16)
    assert not fills(64, 40, 64 * 40, 16)


def test_denoisers_are_loaded_before_sampling_is_timed(b5: Any) -> None:
    b5.models.forget("model")
    loaded = []
    request, _ = request_of(b5, moving(fps=24))
    b5.run(request, on_step=lambda step: loaded.append((step.stage, b5.models.is_loaded("model"))))
    assert ("sample", True) in loaded


@pytest.mark.parametrize(
    ("task", "expert", "words"), [("14b", "low", "the low expert in "), ("5b", "", "the denoiser in ")]
)
def test_the_model_that_gave_numbers_that_are_not_finite_is_named(
    task: str, expert: str, words: str, a14b: Any, b5: Any
) -> None:
    pipeline = a14b if task == "14b" else b5
    part = "low_noise_model" if expert else "model"
    error: Any = SimpleNamespace(expert=SimpleNamespace(name=expert, part=part), step=3)
    text = TextContext(torch.zeros(1, 512, 8), torch.zeros(1, 512, 8))
    condition: Any = SimpleNamespace(is_finite=True)
    why = why_not_finite(pipeline.checkpoint, error, ClipStart(torch.zeros(1), condition, text))
    assert why.startswith(words) and " in step 3" in why


def test_a_stage_is_charged_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 12.5, 100.0, 101.0])
    monkeypatch.setattr("wan.stopwatch.time.perf_counter", lambda: next(moments))
    watch = Stopwatch(torch.device("cpu"), 4)
    for _ in range(2):
        with watch.stage("decode"):
            pass
    assert watch.seconds == {"decode": 3.5}


@pytest.mark.parametrize("available", range(1, 9))
def test_a_tail_is_no_longer_than_its_footage_and_stays_4n_plus_1(available: int) -> None:
    context = Context("tail", 9).within(available)
    assert context == Context("tail", 5 if available >= 5 else 1) and isinstance(context.frames, int)
    assert Context("tail", 9).within(9).frames == 9 and Context("svi2pro", 5).within(1).frames == 5
