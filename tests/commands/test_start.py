"""The first seconds of a command: what they know of its captioner, its clips and its weights."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.chain.storyboard import Scene
from wan.commands import start
from wan.commands.gpus import Gpus
from wan.configs import WAN_CONFIGS
from wan.device.ranks import World
from wan.errors import UserError
from wan.options import Settings


def test_a_captioner_is_looked_at_where_a_chain_describes_a_video_by_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl"}))
    settings = Settings(ckpt_dir="x", video="a.mp4", vlm_path=str(tmp_path))
    assert start._vlm_config(settings) == {"model_type": "internvl"}
    assert start._vlm_config(replace(settings, vlm_path=str(tmp_path / "none"))) is None
    for unused in (replace(settings, video=None), replace(settings, vlm_url="http://127.0.0.1:1/v1")):
        assert start._vlm_config(unused) == {}


def left_out(settings: Settings, monkeypatch: pytest.MonkeyPatch, *imported: str) -> set[str]:
    """The packages that count as absent from here on."""
    modules: dict[str, Any] = dict.fromkeys(imported, "a module")
    monkeypatch.setattr(start, "sys", SimpleNamespace(modules=modules))
    start.leave_out_unused(settings)
    assert all(modules[name] == "a module" for name in imported)
    return {name for name, module in modules.items() if module is None}


QUANTIZED = {"torchao", "bitsandbytes"}
ALWAYS = {"peft", "sklearn", "scipy", "pandas", "matplotlib", "torchaudio"}


@pytest.mark.parametrize(
    ("config", "trusts", "more"),
    [
        ({"model_type": "internvl_chat"}, False, {"torchvision", *QUANTIZED}),
        ({"model_type": "internvl"}, True, {"torchvision", *QUANTIZED}),
        ({"model_type": "internvl_chat", "auto_map": {}}, False, {"torchvision", *QUANTIZED}),
        ({"model_type": "internvl_chat", "auto_map": {}}, True, QUANTIZED),  # its own code may want it
        ({"model_type": "qwen2_vl"}, False, QUANTIZED),
        ({"model_type": "internvl_chat", "quantization_config": {}}, False, {"torchvision"}),
        ({"model_type": "qwen2_vl", "llm_config": {"quantization_config": {}}}, False, set()),
        ({"model_type": "qwen2_vl", "llm_config": {"a": 1}, "b": "quantization_config"}, False, QUANTIZED),
    ],
)
def test_packages_that_a_captioner_does_without_are_not_imported(
    config: dict[str, Any], trusts: bool, more: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = Settings(video="a.mp4", vlm_path=str(tmp_path), vlm_trust_remote_code=trusts)
    assert left_out(settings, monkeypatch) == ALWAYS | more
    assert left_out(settings, monkeypatch, "scipy", "torchao") == (ALWAYS | more) - {"scipy", "torchao"}


def test_packages_of_captioners_are_for_those_who_ask_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = {"torchvision"} | QUANTIZED | ALWAYS
    assert left_out(Settings(image="a.png"), monkeypatch) == every
    assert left_out(Settings(video="a.mp4", vlm_url="http://a/v1"), monkeypatch) == every
    nobody_knows = Settings(video="a.mp4", vlm_path=str(tmp_path / "none"))
    assert left_out(nobody_knows, monkeypatch) == ALWAYS


def test_packages_are_found_when_somebody_looks_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answer = {"PIL": ["pillow"], "yaml": ["PyYAML"]}

    def ask() -> dict[str, list[str]]:
        asked.append(1)
        return answer

    monkeypatch.setattr(importlib.metadata, "packages_distributions", ask)
    start.find_packages_late()
    first, second = importlib.metadata.packages_distributions(), importlib.metadata.packages_distributions()
    assert not asked
    assert first["PIL"] == ["pillow"] and second.get("none", []) == [] and "yaml" in second
    assert dict(first) == answer and len(second) == 2 and asked == [1]


def job(settings: Settings, *scenes: Scene, ends: tuple[str, ...] = (), **more: Any) -> Any:
    return SimpleNamespace(settings=settings, scenes=scenes, ends=ends, **more)


def clips(settings: Settings, *scenes: Scene, ends: tuple[str, ...] = ()) -> list[tuple[int, int | None, bool]]:
    """Line, steps and whether it is the last, of each clip that is looked at."""
    looked = start._clips(job(settings, *scenes, ends=ends))
    return [(scene.line, of_clip.sample_steps, is_last) for scene, of_clip, is_last in looked]


def test_every_clip_of_which_something_is_said_is_looked_at_and_the_others_once() -> None:
    scenes = [Scene(1, {"sample_steps": 4}), Scene(2), Scene(5, {"sample_steps": 6})]
    board = Settings(video="a.mp4", storyboard="story.yaml", sample_steps=9)
    assert clips(board, *scenes) == [(1, 4, False), (2, 9, False), (5, 6, True)]
    assert clips(replace(board, num_videos=2), *scenes) == [(1, 4, False), (2, 9, True)]
    more = replace(board, num_videos=5)
    assert clips(more, *scenes) == [(1, 4, False), (2, 9, False), (5, 6, False), (0, 9, True)]
    plain = replace(board, storyboard=None)
    assert clips(plain) == [(0, 9, True)] == clips(replace(plain, num_videos=1))
    # prompts for some clips are scenes without a storyboard, whose chain is as long as ever
    prompted = [Scene(0, {"prompt": "x"})]
    assert clips(plain, *prompted) == [(0, 9, False), (0, 9, True)]
    assert clips(replace(plain, until="b.mp4"), *prompted) == [(0, 9, True)]
    assert clips(plain, *prompted, ends=("a", "b")) == [(0, 9, False), (0, 9, True)]
    assert clips(plain, *prompted, ends=("a",)) == [(0, 9, True)]


def test_what_is_refused_of_a_scene_names_its_line() -> None:
    one = job(Settings(storyboard="story.yaml"))
    for line, message in ((3, "story.yaml, line 3: too few"), (0, "too few")):
        with pytest.raises(UserError, match=f"^{message}$"), start._saying_where(one, Scene(line)):
            raise UserError("too few")


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, True),
        ({"prompt": "x"}, False),
        ({"prompt": "x", "prompt_mode": "continue"}, True),
        ({"video": None}, False),
        ({"vlm_url": "http://a/v1"}, False),
        ({"cut": True}, False),
        ({"cut": "next.png"}, True),
    ],
)
def test_a_captioner_that_is_not_there_is_missed_where_it_is_asked(settings: dict[str, Any], asked: bool) -> None:
    given = Settings(**{"video": "a.mp4", "vlm_path": "nowhere/at/all", **settings})
    if asked:
        with pytest.raises(UserError, match="there is no VLM folder nowhere/at/all: check vlm_path, .+"):
            start._check_captioner(job(given), given)
    else:
        start._check_captioner(job(given), given)


A14B, TI2V_5B = WAN_CONFIGS["v2v-14B"], WAN_CONFIGS["v2v-5B"]


@pytest.mark.parametrize(
    ("config", "settings", "ends", "is_last", "message"),
    [
        (TI2V_5B, {"continuation": "svi2pro"}, (), True, "svi2pro is for I2V-A14B"),
        (A14B, {"continuation": "svi2pro"}, (), True, None),
        (A14B, {"motion_amplitude": 1.2}, (), True, None),
        (A14B, {"motion_amplitude": 1.2, "continuation": "svi2pro"}, (), True, "motion_amplitude changes"),
        (TI2V_5B, {"motion_amplitude": 1.2}, (), True, "motion_amplitude is for I2V-A14B"),
        # an end needs a latent frame that is free before it
        (TI2V_5B, {"end_image": "a.png", "frame_num": 5}, (), True, "end_image: a clip with 1 known frame"),
        (TI2V_5B, {"end_image": "a.png", "frame_num": 5}, (), False, None),  # it is the last clip's
        (TI2V_5B, {"end_image": "a.png", "frame_num": 9}, (), True, None),
        (TI2V_5B, {"end_image": "a.png", "frame_num": 9, "context_frames": 5}, (), True, "with 5 known frames"),
        (TI2V_5B, {"end_image": "a.png", "frame_num": 5, "cut": True}, (), True, None),
        (TI2V_5B, {"end_image": "a.png", "frame_num": 5, "cut": "b.png"}, (), True, "with 1 known frame"),
        (TI2V_5B, {"frame_num": 5}, ("a.png",), False, "end_images: a clip"),
        (TI2V_5B, {"until": "a.mp4", "frame_num": 5}, (), True, "until: a clip"),
        (TI2V_5B, {"until": "a.mp4", "frame_num": 5}, (), False, None),
        (TI2V_5B, {"video": None, "end_image": "a.png", "frame_num": 5}, (), True, None),
        (TI2V_5B, {"video": None, "image": "b.png", "end_image": "a.png", "frame_num": 5}, (), True, "with 1 known"),
    ],
)
def test_an_end_or_a_way_to_go_on_that_a_model_lacks_is_refused(
    config: Any, settings: dict[str, Any], ends: tuple[str, ...], is_last: bool, message: str | None
) -> None:
    given = Settings(**{"video": "v.mp4", **settings})
    one = job(given, ends=ends, config=config)
    if message is None:
        start._check_frames(one, Scene(0), given, is_last)
    else:
        with pytest.raises(UserError, match=message):
            start._check_frames(one, Scene(0), given, is_last)


def test_an_end_of_a_scene_s_own_is_not_the_last_clip_s_alone() -> None:
    given = Settings(video="v.mp4", end_image="a.png", frame_num=5)
    with pytest.raises(UserError, match="end_image: a clip"):
        start._check_frames(job(given, config=TI2V_5B), Scene(1, {"end_image": "a.png"}), given, False)


@pytest.fixture
def weights(tmp_path: Path) -> Any:
    """A checkpoint of two files, and a VLM of one, of 60 MB, 50 MB and 40 MB; no byte of them is written."""
    for name, size in (("a.safetensors", 60), ("b.safetensors", 50), ("vlm/c.safetensors", 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * 10**6)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    parts = [("model", SimpleNamespace(files=files[:1])), ("vae", SimpleNamespace(files=files[1:]))]
    return SimpleNamespace(folder=tmp_path, parts=parts)


@pytest.mark.parametrize(
    ("settings", "files", "words"),
    [
        ({}, "cab", ", 0.1 GB of weights are read meanwhile"),
        ({"prompt": "x"}, "ab", ", 0.1 GB of weights are read meanwhile"),
        ({"vlm_url": "http://a/v1"}, "ab", ", 0.1 GB of weights are read meanwhile"),
        ({"video": None}, "ab", ", 0.1 GB of weights are read meanwhile"),
        ({"dry_run": True}, "", ""),
        ({"prompt": "x", "host_memory": 1.0}, "ab", ", 0.1 GB of weights are read meanwhile"),
    ],
)
def test_weights_are_read_in_the_order_of_their_use(
    settings: dict[str, Any],
    files: str,
    words: str,
    weights: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[int | None] = []

    def that_fit(files: Any, limit: int | None) -> list[Path]:
        asked.append(limit)
        return list(files)

    started: list[Any] = []
    monkeypatch.setattr(start, "that_fit", that_fit)
    monkeypatch.setattr(start, "ReadingProcess", lambda files: started.append(files))
    caplog.set_level("INFO", "wan.commands.progress")
    given = Settings(**{"video": "v.mp4", "vlm_path": str(weights.folder / "vlm"), **settings})
    one = job(given, checkpoint=weights, world=World(), config=SimpleNamespace(name="v2v-5B"))
    start.read_ahead(one)
    assert [[file.stem for file in files] for files in started] == ([list(files)] if files else [])
    assert caplog.messages == [f"v2v-5B with {weights.folder}: PyTorch starts{words}"]
    assert asked == ([] if given.dry_run else [None if given.host_memory == "auto" else 2**30])
    other = job(given, checkpoint=weights, world=World(rank=1, size=2), config=one.config)
    assert start.read_ahead(other) is None and len(started) == bool(files)


def test_little_is_said_in_megabytes(
    weights: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start, "that_fit", lambda files, limit: list(files)[:1])
    monkeypatch.setattr(start, "ReadingProcess", list)
    caplog.set_level("INFO", "wan.commands.progress")
    given = Settings(image="a.png", prompt="x")
    start.read_ahead(job(given, checkpoint=weights, world=World(), config=SimpleNamespace(name="ti2v-5B")))
    assert caplog.messages[0].endswith("PyTorch starts, 60 MB of weights are read meanwhile")


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, "8"),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "64"}, "1"),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "6", "LOCAL_WORLD_SIZE": "4"}, "6"),
        ({"OMP_NUM_THREADS": "1"}, "1"),
        ({}, None),
    ],
)
def test_a_launchers_processes_share_the_cores(given: dict[str, str], threads: str | None) -> None:
    environment = dict(given)
    start.take_cores(environment, 32)
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("settings", "gpu", "geometry", "limit", "host"),
    [
        ({}, True, (81, 480, 832), None, ("free", False)),
        ({"frame_num": 17}, True, (17, 480, 832), None, ("free", False)),
        ({"vram": 2.0, "host_memory": 4.0, "share_weights": 4}, True, (81, 480, 832), 2 * 2**30, (4.0, True)),
        ({"vram": "auto"}, True, (81, 480, 832), None, ("free", False)),  # what is free is not known yet
        ({"t5_cpu": True}, False, (81, 480, 832), None, ("free", False)),
        ({"video": "v.mp4"}, True, (81, 640, 608), None, ("free", False)),
        ({"image": "a.png"}, True, (81, 640, 608), None, ("free", False)),
    ],
)
def test_a_clip_s_memory_is_checked_before_anything_is_imported(
    settings: dict[str, Any], gpu: bool, geometry: Any, limit: int | None, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def memory(checkpoint: Any, config: Any, device: Any, text_device: Any, vram: int | None) -> Any:
        asked.append((device.type, None if text_device is None else text_device.type, vram))
        return SimpleNamespace(check=lambda geometry: asked.append(geometry.size))

    def of_host(checkpoint: Any, config: Any, limit: Any, given: bool, sharers: int) -> Any:
        assert sharers == settings.get("share_weights", 1)
        asked.append((limit, given))
        return SimpleNamespace(plan=lambda budget, geometry, loras: asked.append((geometry.size, loras)))

    picture = SimpleNamespace(width=950, height=1000)
    monkeypatch.setattr(start, "has_gpu_driver", lambda: gpu)
    monkeypatch.setattr("wan.device.budget.MemoryBudget", memory)
    monkeypatch.setattr("wan.device.host_budget.HostBudget", of_host)
    monkeypatch.setattr("wan.device.host_budget.host_limit", lambda given: "free" if given == "auto" else given)
    monkeypatch.setattr("wan.media.probe", lambda path: picture)
    monkeypatch.setattr("wan.media.read_image", lambda path: picture)
    given = Settings(**{"lora": ("a:0.5",), **settings})
    config = WAN_CONFIGS["v2v-5B"].variant(frame_num=81)
    one = job(given, config=config, size=(832, 480), gpus=Gpus(given, World()), checkpoint=None)
    start.check_budget(one)
    device = "cuda" if gpu else "cpu"
    assert asked == [
        (device, None if given.t5_cpu else device, limit),
        geometry,
        host,
        (geometry, {"model": 0}),  # what LoRAs themselves take is known later
    ]
    asked.clear()
    for gpus in (Gpus(given, World(size=2)), Gpus(Settings(ulysses_size=2, dry_run=True), World())):
        start.check_budget(job(given, config=config, size=(832, 480), gpus=gpus, checkpoint=None))
    assert asked == [], "several GPUs may share a model"


def test_a_budget_of_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "has_gpu_driver", lambda: False)
    with pytest.raises(UserError, match="vram"):
        start.check_budget(job(Settings(vram=8.0), config=WAN_CONFIGS["v2v-5B"], world=World(size=2)))
