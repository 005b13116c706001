"""The clip benchmark on a tiny model: what it switches off is off, and back afterwards. Times are a GPU's affair.

And the benchmark of seams: the report's threshold tells cut footage from footage that goes on.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import captioning, clip, loading, many_chains, memory, real_size, rehearsal, seams, timing
from tests.support.golden import GOLDEN_VLM
from tests.support.tiny_checkpoint import Denoiser, write_denoiser
from training import scenes
from wan.captioner.internvl import InternVLCaptioner
from wan.types import KnownFrames, Request

pytestmark = pytest.mark.slow


@pytest.fixture
def request_5b(ti2v: Any, monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.setattr("torch.cuda.synchronize", lambda *_: None)
    image = KnownFrames((Image.effect_noise((64, 64), 60).convert("RGB"),))
    return Request("a cat", "", image, ti2v.geometry(64, 64, 5), ti2v.rules.merge(8, guide_scale=3.0), 1)


@pytest.fixture
def seen(ti2v: Any) -> Iterator[dict[str, list[Any]]]:
    """The timesteps' rows of each forward of the denoiser, and the calls of its text embedder."""
    counts: dict[str, list[Any]] = {"rows": [], "embedded": []}
    embedder = ti2v.model.condition_embedder.text_embedder
    hooks = [
        ti2v.model.register_forward_pre_hook(lambda _, inputs: counts["rows"].append(inputs[1].shape[1])),
        embedder.register_forward_pre_hook(lambda *_: counts["embedded"].append(1)),
    ]
    yield counts
    for hook in hooks:
        hook.remove()
    for block in ti2v.model.blocks:  # a kernel stays until another is chosen
        vars(block.attn1.processor).clear()


def test_a_preset_is_timed_beside_the_steps_that_it_takes_the_place_of(
    ti2v: Any, request_5b: Request, seen: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = clip.timed_run(ti2v, request_5b, True, 1)
    assert plain["finite"] and plain["held_exactly"] and len(plain["steps"]) == 7
    with monkeypatch.context() as alone:
        alone.setattr(ti2v.models, "is_loaded", lambda part: False)  # a stage inside one of the same name is no step
        assert len(clip.timed_run(ti2v, request_5b, True, 1)["steps"]) == 7
    seen["rows"].clear()
    run = clip.timed_run
    seconds = {"seconds": {"sample": 6.0}}  # those of a busy machine say nothing
    monkeypatch.setattr(clip, "timed_run", lambda *given: run(*given) | seconds)
    balanced = clip.preset_run(ti2v, request_5b, "balanced:12", True, 1, 0.25)
    turbo = clip.preset_run(ti2v, request_5b, "turbo", True, 1, 0.25)
    assert (balanced["steps_of_quality"], turbo["steps_of_quality"]) == (12, ti2v.config.sample_steps) == (12, 50)
    assert (balanced["sample_over_quality"], turbo["sample_over_quality"]) == (6 / (12 * 0.25), 6 / (50 * 0.25))
    assert len(seen["rows"]) == 2 * 12 + 4  # a forward that is left out is called too
    assert clip.preset_run(ti2v, request_5b, "turbo", True, 1, None)["sample_over_quality"] is None


@pytest.mark.parametrize("name", clip.WITHOUT)
def test_what_a_run_is_without_is_back_after_it(
    name: str, ti2v: Any, request_5b: Request, seen: dict[str, list[Any]]
) -> None:
    whole = clip.timed_run(ti2v, request_5b, True, 1)["latents"]
    compiles = ti2v.compile_blocks
    for count in seen.values():
        count.clear()
    with clip.without(name, ti2v, request_5b.geometry.tokens):
        lacking = clip.timed_run(ti2v, request_5b, True, 1)["latents"]
        assert ti2v.compile_blocks == (compiles and name != "compile")
        assert ti2v.model.kernels == ({"attention": "native"} if name == "probe" else {})
    torch.testing.assert_close(lacking, whole, atol=1e-4, rtol=1e-4)
    assert set(seen["rows"]) == {request_5b.geometry.tokens if name == "rows" else 2}
    assert len(seen["embedded"]) == (2 * 8 if name == "reuse" else 2)
    seen["rows"].clear()
    assert torch.equal(clip.timed_run(ti2v, request_5b, True, 1)["latents"], whole)
    assert set(seen["rows"]) == {2} and ti2v.compile_blocks == compiles


def test_seams_of_footage_that_was_cut_are_visible_and_of_footage_that_goes_on_are_not() -> None:
    shares = seams.told(seams.world_seams(16, seed=3))
    assert shares["goes on"]["seams"] == shares["another scene"]["seams"] == 16
    assert shares["goes on"]["listed"] <= 2 / 16  # one in twenty of many
    assert shares["a second later"]["visible"] >= 15 / 16 and shares["another scene"]["visible"] == 1


def test_where_a_film_is_cut_is_no_place_to_cut_it() -> None:
    still, other = torch.zeros(60, 8, 8, 3), torch.ones(60, 8, 8, 3)
    assert not seams.is_cut(still) and seams.is_cut(torch.cat([still[:9], other[:9]]))
    assert not any(True for _ in seams.film_seams([(torch.cat([still[:20], other[:20]]), 4)], every=1))


def test_one_timer_leaves_out_the_calls_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 5.0, 10.0, 11.0, 20.0, 22.0))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert timing.timed(lambda: calls.append(1), torch.device("cpu"), 2, warm=1) == [1.0, 2.0]
    assert len(calls) == 3


def test_flags_after_two_dashes_are_for_the_command_whose_memory_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[list[str], float | None]] = []

    def run(command: list[str], host: float | None, until: float, warm: bool) -> dict[str, Any]:
        assert warm
        ran.append((command, host))
        return {"code": 0, "gpu_gib": 0.0, "host_gib": 0.0}

    monkeypatch.setattr(memory, "run", run)
    options = ["folder", "--video", "in.mp4", "--whole", "--warm", "--vram", "16", "default", "--host", "32", "64"]
    monkeypatch.setattr("sys.argv", ["memory", *options, "--", "--size", "832*480"])
    assert memory.main() == 1  # no run left an mp4 behind
    assert [host for _, host in ran] == [None, 32, 64]
    assert all(command[command.index("--size") + 1] == "832*480" for command, _ in ran)
    assert ["--vram" in command for command, _ in ran] == [False, True, False]
    assert capsys.readouterr().out.count("FAIL") == 3


def test_memory_is_counted_on_the_gpu_that_runs_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answered(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="1024\n")

    monkeypatch.setattr(subprocess, "run", answered)
    for visible, gpu in (("", "0"), ("1", "1"), ("3,0", "3")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert memory.gpu_bytes() == 2**30 and asked[-1][-1] == f"--id={gpu}"


def test_a_clip_s_row_is_printed_when_its_record_is_there_and_says_what_is_in_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, printed = iter(range(100)), []
    for number in (1, 2):
        seconds = {"caption": 0.5, "encode": 0.25, "sample": 1.0, "decode": 0.25}
        (tmp_path / f"{number}.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            printed.extend(command)
            self.stdout = (
                line
                for line in (
                    "clip 1/2 seed 7\n",
                    "clip 1/2 decode: 0.2 s\n",
                    "clip 2/2 seed 8\n",
                    f"clip 1/2 finished in 2.0 s, seam 0.9: {tmp_path / '1.mp4'}\n",
                    "WARNING: a warning\n",
                    "clip 2/2 decode: 0.2 s\n",
                    f"clip 2/2 finished in 2.0 s: {tmp_path / '2.mp4'}\n",
                )
            )

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(rehearsal, "footage", lambda target, kind: target)
    monkeypatch.setattr(rehearsal, "write_lora", lambda target, expert, rank: target)
    monkeypatch.setattr("benchmarks.rehearsal.subprocess.Popen", Process)
    monkeypatch.setattr("benchmarks.rehearsal.time.perf_counter", lambda: float(next(clock)))
    options = ["chain", str(tmp_path), "--clips", "2", "--place", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["rehearsal", *options, "--", "--vae_dtype", "float16"])
    with pytest.raises(SystemExit) as ended:
        rehearsal.main()
    assert ended.value.code == 0 and printed[-2:] == ["--vae_dtype", "float16"] and "--preset" in printed
    assert printed[printed.index("--size") + 1] == "1280*704"  # what its table is of, and not the task's default
    lines = capsys.readouterr().out.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("clip 1: "))
    assert first < lines.index("WARNING: a warning")
    # from where it begins until the next begins, and the last until it is decoded
    assert "2.00 s; sampling and VAE 75.0 %, and caption 100.0 %, in no stage 0.0 %" in lines[first]
    assert any(line.startswith("clip 2: 3.00 s; sampling and VAE 50.0 %") for line in lines)
    assert any(line.startswith("all 2 clips: 5.00 s; ") and "in no stage 20.0 %" in line for line in lines)


def test_readers_are_compared_by_the_bits_that_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_denoiser(tmp_path / "w", Denoiser("ti2v", 48, 48, dim=24, num_heads=2, ffn_dim=32, num_layers=2), shards=2)

    def of_zeros(weights: Any, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, torch.zeros_like(tensor)) for name, tensor in loading.ours(weights, device))

    def absent(*_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        raise ImportError("no such package")

    assert loading.compare(tmp_path / "w", ["ours", "safetensors"], ["cpu"], cold=True)
    monkeypatch.setitem(loading.READERS, "runai", absent)
    assert loading.compare(tmp_path / "w", ["ours", "runai"], ["cpu"], cold=False)
    monkeypatch.setitem(loading.READERS, "runai", of_zeros)
    assert not loading.compare(tmp_path / "w", ["ours", "runai"], ["cpu"], cold=False)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["reader"], row["cache"]) for row in rows[:4]] == [
        *(("ours", "cold"), ("ours", "warm"), ("safetensors", "cold"), ("safetensors", "warm"))
    ]
    assert rows[5]["not_installed"] == "no such package"


@pytest.mark.parametrize("task", ["ti2v-5B", "i2v-A14B"])
def test_a_model_of_random_weights_is_a_pipeline_like_any_other(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 32}
    monkeypatch.setitem(real_size.DIT, task, real_size.DIT[task] | small)
    widths = {"base_dim": 4, "z_dim": real_size.VAE[task].get("z_dim", 16)}
    widths |= {"decoder_base_dim": 4} if task == "ti2v-5B" else {}
    monkeypatch.setitem(real_size.VAE, task, real_size.VAE[task] | widths)
    text = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    monkeypatch.setattr(real_size, "TEXT", real_size.TEXT | text)
    pipeline: Any = real_size.build(task)
    assert all(pipeline.models.is_loaded(name) for name, _ in pipeline.checkpoint.parts)
    request = clip.make_request(pipeline, 64, 64, 5, 1, 1)
    made = pipeline.run(request)
    assert made.clip.frames.shape == (5, 64, 64, 3)


def test_shapes_are_counted_by_what_is_in_sight_of_them() -> None:
    world = scenes.sample(24, torch.Generator().manual_seed(5))
    still = torch.zeros_like(world.velocity)
    world = dataclasses.replace(world, velocity=still, growth=still[..., 0], pan=still[:, 0, 0])
    behind = world.start.clone()
    behind[:, 0] = behind[:, 1]  # the first one is drawn first, so the second one covers it
    world = dataclasses.replace(world, start=torch.where(world.present[:, 1, None, None], behind, world.start))
    two = world.present[:, 1] & ~world.present[:, 2]
    free = many_chains.in_sight(world, 0.0)
    assert two.sum() > 3 and (free[two, 0] < many_chains.COVERED).all() and (free[two, 1] == 1).all()
    one = ~world.present[:, 1]
    frames = world.draw(torch.arange(3))
    assert one.sum() > 3 and many_chains.in_most(frames, world)[one, 0].all()
    frames[:, :, 1:] = 0
    assert not many_chains.in_most(frames, world).any()


def test_a_vlm_is_loaded_by_the_library_and_as_a_run_does_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, device = GOLDEN_VLM / "hf", torch.device("cpu")
    assert captioning.loads(folder, device)
    rows = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("way") for row in rows] == [None, "library", "ours", "library", "ours"]
    assert all(row["gb_per_s"] >= 0 for row in rows[1:])
    load = InternVLCaptioner.load

    def changed(self: InternVLCaptioner) -> Any:
        model = load(self)
        if self.can_be_mapped:
            model.lm_head.weight.data = model.lm_head.weight.data + 1
        return model

    monkeypatch.setattr(InternVLCaptioner, "load", changed)
    assert not captioning.loads(folder, device)
