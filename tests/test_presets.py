"""Presets, caches between steps and the guidance interval: what is left out, and that nothing else is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.commands import without_start
from tests.support.golden import DATA, GOLDEN, float32, small_checkpoints
from tests.support.tiny_checkpoint import InternVL, write_internvl
from wan import cli
from wan.configs import PRESETS, WAN_CONFIGS, config_for
from wan.denoiser.schedule import build_scheduler
from wan.errors import UserError
from wan.settings import Sampling, StepCache
from wan.types import KnownFrames, Request
from wan.weights.tensors import open_safetensors

VIDEO = DATA / "corpus" / "h264_faststart.mp4"
IMAGE = Image.open(GOLDEN / "14b" / "image.png").convert("RGB")
BLOCKS = 2  # of each golden denoiser
NAMES = ("high_noise_model", "low_noise_model", "model")


def request_of(pipeline: Any, seed: int = 1, **sampling: Any) -> Request:
    values = {"steps": 12, "shift": 5.0, "guide_scale": 3.0} | sampling
    return Request(
        "a cat", "", KnownFrames((IMAGE,)), pipeline.geometry(64, 64, 5), pipeline.rules.merge(**values), seed
    )


@contextmanager
def counted(pipeline: Any) -> Iterator[dict[str, list[int]]]:
    """The timesteps at which each expert's last block was computed; it is the first that every cache leaves out."""
    seen: dict[str, list[int]] = {}
    hooks = []
    for name in NAMES:
        if name in pipeline.checkpoint.experts:
            block = getattr(pipeline, name).blocks[-1]
            calls = seen.setdefault(name, [])
            hooks.append(block.attn1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(pipeline: Any, request: Request) -> tuple[torch.Tensor, dict[str, int]]:
    with counted(pipeline) as seen:
        latents = pipeline.run(request).latents
    return latents, {name: len(calls) for name, calls in seen.items()}


# what is off changes nothing


def test_quality_is_the_model_s_own_settings(i2v: Any, ti2v: Any) -> None:
    for pipeline in (i2v, ti2v):
        config = pipeline.config
        plain = Sampling(config.sample_steps, config.sample_shift, config.guidance)
        assert pipeline.rules.merge() == plain and PRESETS["quality"].name == "quality"
        # a folder of before there were presets is the same run
        assert plain.as_json() == {
            "steps": config.sample_steps,
            "shift": config.sample_shift,
            "guidance": list(config.guidance),
            "solver": "unipc",
        }


@pytest.mark.parametrize("cache", ["magcache:0.3", "first_block:1", "taylorseer:3"])
def test_a_cache_leaves_blocks_out_and_nothing_of_it_stays(cache: str, i2v: Any) -> None:
    plain, all_blocks = blocks_of(i2v, request_of(i2v))
    first, some_blocks = blocks_of(i2v, request_of(i2v, cache=cache))
    assert all_blocks == {"high_noise_model": 2 * 5, "low_noise_model": 2 * 7}
    for name, count in some_blocks.items():
        steps = all_blocks[name] // 2
        whole = StepCache.parse(cache).whole(steps)  # type: ignore[union-attr]
        assert 2 * min(whole, steps) <= count <= all_blocks[name], name
    assert sum(some_blocks.values()) < sum(all_blocks.values())
    assert not torch.equal(first, plain)
    # another clip of the same models: the cache knows nothing of the first
    again, same_blocks = blocks_of(i2v, request_of(i2v, cache=cache))
    assert torch.equal(first, again) and some_blocks == same_blocks
    after, _ = blocks_of(i2v, request_of(i2v))
    assert torch.equal(after, plain)


def test_an_expert_begins_with_nothing_of_the_one_before(i2v: Any) -> None:
    _, blocks = blocks_of(i2v, request_of(i2v, cache="first_block:1"))
    # at strength 1 all but the first forward of each branch is left out, by both experts
    assert blocks == {"high_noise_model": 2, "low_noise_model": 2}


def test_the_two_branches_of_guidance_are_kept_apart(ti2v: Any) -> None:
    """With everything reused, guidance 1 and the conditional branch of guidance 3 reuse the same residual."""
    one = request_of(ti2v, cache="first_block:1", guide_scale=1.0)
    with counted(ti2v) as seen:
        ti2v.run(one)
    assert len(seen["model"]) == 1
    with counted(ti2v) as seen:
        ti2v.run(request_of(ti2v, cache="first_block:1"))
    assert len(seen["model"]) == 2  # were they one, the second branch would reuse the first's


def test_a_cache_is_taken_off_when_a_run_is_stopped(ti2v: Any) -> None:
    plain, _ = blocks_of(ti2v, request_of(ti2v))

    def stop(step: Any) -> None:
        if step.index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ti2v.run(request_of(ti2v, cache="taylorseer:2"), on_step=stop)
    assert not ti2v.model.is_cache_enabled
    assert torch.equal(blocks_of(ti2v, request_of(ti2v))[0], plain)


def test_taylorseer_computes_one_step_in_so_many(ti2v: Any) -> None:
    _, blocks = blocks_of(ti2v, request_of(ti2v, cache="taylorseer:3"))
    assert blocks == {"model": 2 * (3 + 3)}  # steps 0, 1, 2, then 4, 7, 10
    for strength in (2, 3, 4, 7):
        cache = StepCache("taylorseer", strength)
        for steps in range(1, 41):
            assert cache.computed(steps) == sum(n < 3 or (n - 4) % strength == 0 for n in range(steps))


# guidance in an interval


@pytest.mark.parametrize(
    ("interval", "guided"), [((0.0, 1.0), 12), ((0.0, 0.9), 7), ((0.5, 0.95), 7), ((0.0, 0.01), 0)]
)
def test_outside_the_interval_there_is_one_forward(interval: tuple[float, float], guided: int, i2v: Any) -> None:
    request = request_of(i2v, guidance_interval=interval)
    timesteps = build_scheduler(request.sampling, torch.device("cpu")).timesteps.tolist()
    assert guided == sum(interval[0] <= t / 1000 <= interval[1] for t in timesteps)
    _, blocks = blocks_of(i2v, request)
    assert sum(blocks.values()) == 12 + guided
    assert sum(steps + second for steps, second in i2v.rules.shares(request.sampling)) == 12 + guided


def test_an_interval_of_everything_is_no_interval(ti2v: Any) -> None:
    assert ti2v.rules.merge(guidance_interval=(0, 1)) == ti2v.rules.merge()


# presets and what wins over them


def test_a_preset_s_row_reaches_the_sampler_and_explicit_settings_win(i2v: Any) -> None:
    turbo = i2v.rules.merge(preset="turbo")
    assert turbo == Sampling(4, 5.0, (1.0, 1.0), "euler")
    assert i2v.rules.merge(8, 3.0, "unipc", (1.0, 2.0), preset="turbo") == Sampling(8, 3.0, (1.0, 2.0), "unipc")
    row, balanced = PRESETS["balanced"], i2v.rules.merge(preset="balanced")
    assert str(balanced.cache or "off") == row.cache and balanced.guidance_interval == row.guidance_interval
    assert i2v.rules.merge(cache="off", guidance_interval=(0, 1), steps=40, preset="balanced") == i2v.rules.merge()
    assert i2v.rules.merge(cache="taylorseer:4", guidance_interval=(0, 1), preset="balanced").cache == StepCache(
        "taylorseer", 4
    )


def test_turbo_is_one_forward_a_step_and_two_steps_an_expert(i2v: Any) -> None:
    request = dataclasses.replace(request_of(i2v), sampling=i2v.rules.merge(preset="turbo"))
    assert blocks_of(i2v, request)[1] == {"high_noise_model": 2, "low_noise_model": 2}


def test_euler_has_the_table_of_the_distillation_loras() -> None:
    scheduler = build_scheduler(Sampling(4, 5.0, (1.0, 1.0), "euler"), torch.device("cpu"))
    # published by the LoRAs' authors for 4 steps at shift 5
    assert scheduler.timesteps.tolist() == pytest.approx([1000.0, 937.5001, 833.3333, 625.0], abs=1e-3)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9375, 0.833333, 0.625, 0.0], abs=1e-6)
    latents, flow = torch.full((1, 1), 3.0), torch.full((1, 1), 2.0)
    for t, sigma, after in zip(
        scheduler.timesteps, (1.0, 0.9375, 0.8333333, 0.625), (0.9375, 0.8333333, 0.625, 0), strict=True
    ):
        stepped = scheduler.step(flow, t, latents, return_dict=False)[0]
        torch.testing.assert_close(stepped, latents + (after - sigma) * flow)
        latents = stepped


# what cannot do anything is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "fast"}, "preset must be one of quality, balanced, turbo; 'fast' is not"),
        ({"cache": "tea"}, "cache must be off or one of magcache, first_block, taylorseer; 'tea' is not"),
        ({"cache": "first_block:x"}, "cache must be off or NAME:NUMBER such as first_block:0.1"),
        ({"cache": "first_block:0"}, "cache first_block takes an error above 0, at most 1; 0 is not"),
        ({"cache": "taylorseer:1"}, "cache taylorseer computes one step in 2 to 10: taylorseer:2; 1 is not one"),
        (
            {"cache": "taylorseer", "steps": 4},
            "cache taylorseer:2 leaves nothing out of 2 [+] 2 steps, the first 3 are",
        ),
        ({"cache": "first_block", "steps": 1}, "cache first_block:0.1 leaves nothing out of 1 [+] 0 steps"),
        ({"cache": "magcache", "guidance_interval": (0.3, 1.0)}, "cache magcache needs guidance in every step"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval must be two sigmas 0 <= LOW < HIGH <= 1, 0.5 0.5 are"),
        ({"guidance_interval": (0.5, float("nan"))}, "guidance_interval must be two sigmas"),
        ({"guidance_interval": (0.3, 1.0), "preset": "turbo"}, "guidance_interval: guidance 1 has no second forward"),
    ],
)
def test_what_makes_no_sense_is_refused(values: Any, message: str, i2v: Any) -> None:
    with pytest.raises(UserError, match=message):
        i2v.rules.merge(**values)


def test_magcache_needs_the_model_s_own_magnitudes(tmp_path: Path) -> None:
    from wan import WanI2V

    shutil.copytree(GOLDEN / "14b" / "ckpt", tmp_path / "own")
    other = {"vae_mean": [0.0] * 16, "vae_std": [1.0] * 16}
    (tmp_path / "own" / "wan_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="needs this model's mag_ratios in its wan_config.json"):
        WanI2V(config_for("i2v-A14B", tmp_path / "own"), tmp_path / "own").rules.merge(cache="magcache")
    measured = [[1.0, 0.99], [1.0, 0.98, 0.9]]
    (tmp_path / "own" / "wan_config.json").write_text(json.dumps(other | {"mag_ratios": measured}))
    config = config_for("i2v-A14B", tmp_path / "own")
    assert config.mag_ratios == ((1.0, 0.99), (1.0, 0.98, 0.9))
    assert WanI2V(config, tmp_path / "own").rules.merge(cache="magcache").uses("magcache")


def test_the_released_models_have_magnitudes_for_each_expert() -> None:
    for row in WAN_CONFIGS.values():
        assert len(row.mag_ratios) == (1 if row.boundary is None else 2)
        assert sum(map(len, row.mag_ratios)) == row.sample_steps
        assert all(ratios[0] == 1 and min(ratios) > 0.7 and max(ratios) < 1.1 for ratios in row.mag_ratios)


# the commands


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    small_checkpoints(folder, sample_steps=8)
    for name in ("i2v", "ti2v"):
        write_internvl(folder / name / "InternVL3_5-8B", InternVL())
    dim = open_safetensors(folder / "i2v" / "high_noise_model", "diffusion_pytorch_model").shapes[
        "blocks.0.self_attn.q.weight"
    ][0]
    for name in ("high", "low", "SVI_v2_PRO"):
        halves = {"A": torch.ones(1, dim), "B": torch.full((dim, 1), 0.01)}
        tensors = {f"blocks.0.self_attn.q.lora_{half}.weight": value for half, value in halves.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "none.yaml").write_text("clips:\n  - a boat\n  - {prompt: a boat, lora_high: []}\n")
    (folder / "short.yaml").write_text("clips:\n  - a boat\n  - {prompt: a boat, steps: 2}\n")
    return folder


LORAS = "--lora_high {high.safetensors} --lora_low {low.safetensors:0.5}"
SVI = "--continuation svi2pro --lora_high {SVI_v2_PRO.safetensors} --lora_low {SVI_v2_PRO.safetensors}"
CHAIN = f"--prompt x --num_videos 2 --frame_num 9 --output_dir {{out}} --video {VIDEO} --ckpt_dir"


def words(text: str, world: Path) -> list[str]:
    """The words of a command; what is in braces is a file of this world, maybe with a strength."""
    return [str(world / word[1:-1]) if word[0] == "{" else word for word in text.split()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "{i2v} --preset turbo",
            "--preset turbo needs --lora_high FILE and --lora_low FILE: 4-step distillation LoRAs",
        ),
        ("{i2v} --preset turbo --lora_high {high.safetensors}", "--preset turbo needs --lora_low FILE: 4-step"),
        ("{ti2v} --preset turbo", "--preset turbo needs --lora FILE: 4-step distillation LoRAs of v2v-5B"),
        # Stable Video Infinity's are no distillation
        (f"{{i2v}} --preset turbo {SVI}", "--preset turbo needs --lora_high FILE and --lora_low FILE"),
        (f"{{i2v}} --preset turbo {LORAS} --storyboard {{none.yaml}}", "line 3: --preset turbo needs --lora_high FILE"),
        (
            "{i2v} --cache first_block --storyboard {short.yaml}",
            "line 3: --cache first_block:0.1 leaves nothing out of 1 + 1",
        ),
        (f"{{i2v}} --preset turbo {LORAS} --cache taylorseer", "leaves nothing out of 2 + 2 steps"),
        ("{ti2v} --cache tea", "cache must be off or one of"),
        ("{ti2v} --guidance_interval 0.9 0.3", "guidance_interval must be two sigmas"),
        ("{ti2v} --guidance_interval 0.9", "argument --guidance_interval: expected 2 arguments"),
        ("{ti2v} --preset fast", "--preset must be one of quality, balanced, turbo; 'fast' is not"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    flags: str, message: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("denoiser.model.WanModel", "vae.vae.WanVAE", "text.umt5.TextEncoder"):
        monkeypatch.setattr(f"wan.{name}.from_weights", lambda *_, **__: pytest.fail("a model was loaded"))
    assert cli.continuous_main(words(f"{CHAIN} {flags}", world)) == 2
    error = without_start(capsys.readouterr().err)
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_generate_refuses_turbo_without_its_loras(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(GOLDEN / "14b" / "image.png")
    flags = ["--ckpt_dir", str(world / "i2v"), "--image", image, "--prompt", "x", "--preset", "turbo"]
    assert cli.generate_main(flags) == 2
    assert "--preset turbo needs --lora_high FILE and --lora_low FILE" in capsys.readouterr().err


def test_turbo_with_its_loras_is_in_the_clip_s_record(world: Path, tmp_path: Path) -> None:
    flags = words(f"--ckpt_dir {{i2v}} --video {VIDEO} --prompt x --preset turbo {LORAS}", world)
    target = tmp_path / "out.mp4"
    assert cli.generate_main([*flags, "--sample_steps", "3", "--save_file", str(target)]) == 0
    record = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    assert (record["preset"], record["sample_solver"], record["sample_guide_scale"]) == ("turbo", "euler", [1.0, 1.0])
    assert (record["sample_steps"], record["cache"], record["guidance_interval"]) == (3, "off", None)
    assert [lora["strength"] for lora in record["loras"]["low_noise_model"]] == [0.5]


def test_a_resumed_chain_knows_its_cache_and_interval(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--ckpt_dir", str(world / "ti2v"), "--video", str(VIDEO), "--prompt", "x", "--frame_num", "9"]
    common += ["--output_dir", str(tmp_path), "--base_seed", "3"]
    cached = ["--cache", "first_block:0.5", "--guidance_interval", "0.3", "1"]
    assert cli.continuous_main([*common, *cached, "--num_videos", "1"]) == 0
    record = json.loads(next(tmp_path.glob("video_01*.json")).read_text(encoding="utf-8"))
    assert record["cache"] == "first_block:0.5" and record["guidance_interval"] == [0.3, 1.0]
    assert cli.continuous_main([*common, "--num_videos", "2", "--dry_run"]) == 0
    stdout = capsys.readouterr().out
    assert "clip 1: --cache 'first_block:0.5', now not set, --guidance_interval [0.3, 1.0], now not set" in stdout
    assert cli.continuous_main([*common, *cached, "--num_videos", "2"]) == 0
    assert len(list(tmp_path.glob("video_*.mp4"))) == 2


def test_v2v_takes_a_preset_and_its_solver(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wan import WanV2V
    from wan.settings import LoraFile

    pipeline = WanV2V(dataclasses.replace(float32("v2v-14B"), sizes=("96*64",)), world / "i2v")
    asked: list[Sampling] = []

    def run(self: Any, request: Request, **_: Any) -> Any:
        asked.append(request.sampling)
        raise InterruptedError

    monkeypatch.setattr("wan.pipeline.Pipeline.run", run)
    loras = {
        "high_noise_model": [LoraFile(world / "high.safetensors")],
        "low_noise_model": [LoraFile(world / "low.safetensors")],
    }
    for more in ({}, {"sample_solver": "dpm++", "sampling_steps": 6}):
        with pytest.raises(InterruptedError):
            pipeline.v2v(VIDEO, prompt="x", frame_num=5, preset="turbo", loras=loras, **more)  # type: ignore[arg-type]
    assert asked == [Sampling(4, 5.0, (1.0, 1.0), "euler"), Sampling(6, 5.0, (1.0, 1.0), "dpm++")]
