"""What a command's settings become: a pipeline, and the plan of a clip."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.commands import generate
from wan.commands import job as job_module
from wan.commands.generate import _request, _target
from wan.commands.job import Job, _home_of
from wan.configs import WAN_CONFIGS
from wan.device.ranks import World
from wan.errors import UserError
from wan.options import Settings
from wan.settings import Context, LoraFile


def job(command: Any = "continuous", task: str = "v2v-5B", world: World | None = None, **settings: Any) -> Job:
    checkpoint: Any = SimpleNamespace()
    given = Settings(**{"ckpt_dir": "ckpt", **settings})
    return Job(command, given, Path("ckpt"), WAN_CONFIGS[task], (832, 480), checkpoint, world=world or World())


class Planning:
    """Takes the place of a pipeline that continues videos."""

    def __init__(self, described: bool = False) -> None:
        self.asked: list[dict[str, Any]] = []
        self.described, self.opened = described, 0

    def plan(self, footage: Any, **more: Any) -> Any:
        self.asked.append(more)
        return SimpleNamespace(described=self.described)

    @property
    def captioner(self) -> Any:
        self.opened += 1
        return None


def planned(of: Job, settings: Settings | None = None, **more: Any) -> dict[str, Any]:
    pipeline: Any = Planning()
    footage: Any = "footage"
    of.plan(pipeline, footage, settings, lambda file: f"picture {file}", **more)  # type: ignore[arg-type,return-value]
    (asked,) = pipeline.asked
    return dict(asked)


USUAL: dict[str, Any] = {
    "anchor": None,
    "end": None,
    "cut": None,
    "max_area": 832 * 480,
    "frame_num": None,
    "shift": None,
    "solver": None,
    "steps": None,
    "guidance": None,
    "guidance_interval": None,
    "cache": None,
    "preset": "quality",
    "prompt": None,
    "prefix": "continue video",
    "num_segments": 8,
    "offload": True,
    "context": Context(),
    "loras": {},
    "prompt_mode": "describe",
    "motion_amplitude": 1.0,
    "discard": 0,
    "handoff": None,
    "fade": 0,
    "drift_correction": 0.0,
    "colour_carry": 0.0,
    "best_of": 1,
    "keeps_takes": False,
}


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, {}),
        ({"frame_num": 17}, {"frame_num": 17}),
        ({"sample_shift": 3.0}, {"shift": 3.0}),
        ({"sample_solver": "euler"}, {"solver": "euler"}),
        ({"sample_steps": 4}, {"steps": 4}),
        ({"sample_guide_scale": (1.0, 2.0)}, {"guidance": (1.0, 2.0)}),
        ({"guidance_interval": (0.1, 0.9)}, {"guidance_interval": (0.1, 0.9)}),
        ({"cache": "magcache"}, {"cache": "magcache"}),
        ({"preset": "turbo"}, {"preset": "turbo"}),
        ({"prompt": "x"}, {"prompt": "x"}),
        ({"custom_prompt": "now"}, {"prefix": "now"}),
        ({"num_segments": 3}, {"num_segments": 3}),
        ({"offload_model": False}, {"offload": False}),
        ({"continuation": "svi2pro"}, {"context": Context("svi2pro", 5)}),
        ({"context_frames": 9}, {"context": Context("tail", 9)}),
        ({"lora": ("a:0.5",)}, {"loras": {"model": (LoraFile(Path("a"), 0.5),)}}),
        ({"prompt_mode": "continue"}, {"prompt_mode": "continue"}),
        ({"motion_amplitude": 1.2}, {"motion_amplitude": 1.2}),
        ({"discard": 4}, {"discard": 4}),
        ({"handoff_command": "run {frames}"}, {"handoff": "run {frames}"}),
        ({"fade": 4}, {"fade": 4}),
        ({"drift_correction": 0.5}, {"drift_correction": 0.5}),
        ({"colour_carry": 0.5}, {"colour_carry": 0.5}),
        ({"best_of": 3}, {"best_of": 3}),
        ({"takes": 3}, {"best_of": 3, "keeps_takes": True}),
        ({"anchor_image": "a.png"}, {"anchor": "picture a.png"}),
        ({"end_image": "a.png"}, {"end": "picture a.png"}),
        ({"cut": "a.png"}, {"cut": "picture a.png"}),
        ({"cut": True}, {"cut": True}),
    ],
)
def test_every_setting_of_a_clip_reaches_its_plan(settings: dict[str, Any], changed: dict[str, Any]) -> None:
    assert planned(job(**settings)) == USUAL | changed
    scene = Settings(ckpt_dir="ckpt", **{name: value for name, value in settings.items() if name != "offload_model"})
    offload = {"offload": False} if "offload_model" in settings else {}
    assert planned(job(**settings), scene) == USUAL | changed | offload


def test_a_lone_clip_has_no_usual_prefix() -> None:
    assert planned(job("generate", prompt=None))["prefix"] == ""


def test_a_clip_leads_into_the_first_frame_of_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.media.read_first_frame", lambda path: f"first of {path}")
    one = job(until="b.mp4")
    assert planned(one)["end"] == "first of b.mp4"
    assert planned(one, Settings(until="b.mp4", end_image="a.png"))["end"] == "picture a.png"
    assert planned(one, end="another")["end"] == "another" and planned(one, end=None)["end"] is None


@pytest.mark.parametrize(("described", "more", "opened"), [(True, {}, 1), (True, {"check": False}, 0), (False, {}, 0)])
def test_a_captioner_that_is_not_there_is_missed_at_once(described: bool, more: dict[str, Any], opened: int) -> None:
    pipeline: Any = Planning(described)
    footage: Any = "footage"
    job().plan(pipeline, footage, **more)
    assert pipeline.opened == opened


@pytest.mark.parametrize(
    ("size", "settings", "offloads"),
    [
        (1, {}, True),
        (2, {}, False),
        (2, {"vram": 8.0}, True),
        (1, {"offload_model": False}, False),
        (2, {"offload_model": True}, True),
        (1, {"ulysses_size": 4, "dry_run": True}, False),
    ],
)
def test_models_take_turns_on_a_gpu_as_in_wan_s_script(size: int, settings: dict[str, Any], offloads: bool) -> None:
    one = job(world=World(size=size), **settings)
    assert one.offload == one.recorder.offload == offloads


@pytest.mark.parametrize("dry", [False, True])
def test_every_setting_of_a_pipeline_reaches_it(dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def pipeline_class(task: str) -> Any:
        def pipeline(*what: Any, **how: Any) -> int:
            made.append((task, what, how))
            return len(made)

        return pipeline

    monkeypatch.setattr("wan.experts.pipeline_class", pipeline_class)
    expecting: list[Any] = []
    monkeypatch.setattr("wan.commands.gpus.Gpus.expect", lambda gpus, pipeline: expecting.append((gpus, pipeline)))
    imported: list[str] = []
    monkeypatch.setattr(job_module, "import_module", imported.append)
    one = job(world=World(2, 4, 1), dry_run=dry)
    opened: Any = one.open(vlm_path="vlm")
    assert expecting == [(one.gpus, opened)] and opened == 1
    task, (config, folder), how = made[0]
    assert (task, config, folder) == ("v2v-5B", one.config, Path("ckpt"))
    assert imported == ([] if dry else ["wan.clip_sampler"])  # what a plan alone need not wait for
    assert how == {
        "device_id": 1,
        "t5_fsdp": False,
        "dit_fsdp": False,
        "t5_cpu": False,
        "convert_model_dtype": False,
        "dit_files": {},
        "part_files": {},
        "compile_blocks": True,
        "vram": None,
        "host_memory": "auto",
        "share_weights": 1,
        "vlm_path": "vlm",
    }
    given: dict[str, Any] = {
        "t5_fsdp": True,
        "dit_fsdp": True,
        "t5_cpu": True,
        "convert_model_dtype": True,
        "compile": "off",
    }
    files: dict[str, Any] = {"dit": "d.gguf", "vae": "v.pth", "vram": 8.0, "host_memory": 64.0, "share_weights": 3}
    other: Any = job(**given, **files)
    object.__setattr__(other, "tokenizer", Path("tokens"))
    other.open()
    assert made[1][2] == {
        "device_id": 0,
        "t5_fsdp": True,
        "dit_fsdp": True,
        "t5_cpu": True,
        "convert_model_dtype": True,
        "dit_files": {"model": Path("d.gguf")},
        "part_files": {"vae": Path("v.pth"), "tokenizer": Path("tokens")},
        "compile_blocks": False,
        "vram": 8.0,
        "host_memory": 64.0,
        "share_weights": 3,
    }


@pytest.mark.parametrize("dry", [False, True])
def test_other_processes_follow_unless_nothing_is_made(dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[Any] = []
    monkeypatch.setattr("wan.commands.gpus.Gpus.follow", lambda self, pipeline: followed.append(pipeline))
    monkeypatch.setattr(Job, "open", lambda self: "opened")
    ready: Any = "ready"
    one = job(dry_run=dry)
    one.follow()
    one.follow(ready)
    assert followed == ([] if dry else ["opened", "ready"])


def test_footage_says_what_is_dull_at_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[Any] = []

    def video_file(*what: Any) -> str:
        opened.append(what)
        return "footage"

    monkeypatch.setattr("wan.footage.VideoFile", video_file)

    class Dull(SimpleNamespace):
        def __str__(self) -> str:
            return "its end is black"

    one = job(video="a.mp4", video_reader="pyav", from_=2.5)
    for end, line in (
        (None, []),
        (Dull(last_lively=None), ["a.mp4: its end is black"]),
        (Dull(last_lively=1.25), ["a.mp4: its end is black; `from_` 1.250 continues from its last lively frame"]),
    ):
        caplog.clear()
        monkeypatch.setattr("wan.media.find_dull_end", lambda path, until, end=end: end)
        footage: Any = one.footage()
        assert footage == "footage" and caplog.messages == line
    assert opened == [(Path("a.mp4"), "pyav", 2.5)] * 3


# Where the files are


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is (9, 9), one with ComfyUI's files (8, 8), and files of their own are (7, 7)."""
    checkpoint = "wan.weights.checkpoint"
    monkeypatch.setattr(f"{checkpoint}.resolve_folder", lambda folder, at_hand: Path(folder))
    monkeypatch.setattr(f"{checkpoint}.identify", lambda folder, names: (9, 9))
    monkeypatch.setattr(f"{checkpoint}.identify_files", lambda files: (7, 7))
    monkeypatch.setattr(f"{checkpoint}.parts_in", lambda folder, names: {"model"} if folder == Path("whole") else set())
    comfy = lambda root, others: SimpleNamespace(root=root, others=others, kind=lambda continues: (8, int(continues)))  # noqa: E731
    monkeypatch.setattr("wan.comfy.ComfyFolder", comfy)


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(
    ("settings", "folder", "kind"),
    [
        ({"ckpt_dir": "whole"}, "whole", (9, 9)),
        ({"ckpt_dir": "whole", "task": "v2v-5B"}, "whole", (0, 0)),
        ({"ckpt_dir": "whole", "dit": "d"}, "whole", (7, 7)),
        ({"comfy_dir": "comfy"}, "comfy", (8, 0)),
        ({"comfy_dir": "comfy", "video": "a.mp4"}, "comfy", (8, 1)),
        ({"comfy_dir": "comfy", "dit": "d"}, "comfy", (7, 7)),
        ({"comfy_dir": "comfy", "ckpt_dir": "whole"}, "whole", (9, 9)),  # which has the denoiser
        ({"comfy_dir": "comfy", "ckpt_dir": "parts"}, "parts", (8, 0)),
    ],
)
def test_the_kind_of_a_checkpoint_is_that_of_its_denoiser(
    settings: dict[str, Any], folder: str, kind: tuple[int, int]
) -> None:
    home = _home_of(Settings(**settings))
    assert home.folder == Path(folder) and home.kind == kind
    assert home.at_hand == ({"model"} if "dit" in settings else set())
    comfy: Any = home.comfy
    assert (comfy is not None) == ("comfy_dir" in settings)
    if comfy is not None:
        assert comfy.others == ([Path(settings["ckpt_dir"])] if "ckpt_dir" in settings else [])


# A lone clip


def test_a_clip_without_a_name_gets_one_of_its_task_size_input_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "time", SimpleNamespace(strftime=lambda form: "20260101_120000"))
    monkeypatch.setattr("os.getpid", lambda: 77)
    end = "_20260101_120000_77.mp4"
    for settings, name in (
        ({"save_file": "out/a.mp4"}, "out/a.mp4"),
        ({"prompt": "A boat; sails!"}, f"v2v-5B_832x480_A_boat_sails{end}"),
        ({"video": "in/my film.mov", "prompt": "x"}, f"v2v-5B_832x480_my_film{end}"),
        ({"image": "in/face.png", "prompt": "x"}, f"v2v-5B_832x480_face{end}"),
        ({"prompt": "!!!"}, f"v2v-5B_832x480_clip{end}"),
        ({"prompt": "a" * 60}, f"v2v-5B_832x480_{'a' * 50}{end}"),
        ({"prompt": "舟" * 60}, f"v2v-5B_832x480_{'舟' * 33}{end}"),  # of 100 bytes at most
    ):
        assert _target(job("generate", **settings)) == Path(name)  # type: ignore[arg-type]
    (tmp_path / f"v2v-5B_832x480_x{end}").touch()
    assert _target(job("generate", prompt="x")).name == f"v2v-5B_832x480_x{end}".replace(".mp4", "_2.mp4")


def test_a_request_has_all_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = SimpleNamespace(width=960, height=576)
    monkeypatch.setattr("wan.media.read_image", lambda file: picture if file == "a.png" else f"picture {file}")
    checked: list[Any] = []
    config = WAN_CONFIGS["ti2v-5B"]
    pipeline: Any = SimpleNamespace(
        config=config,
        geometry=lambda *what: what,
        models=SimpleNamespace(check_loras=checked.append),
        rules=SimpleNamespace(
            check_distilled=lambda preset, loras: checked.append(preset), merge=lambda *_, **__: "sampling"
        ),
    )
    given: dict[str, Any] = {"prompt": "x", "base_seed": 7, "lora": ("a:0.5",), "motion_amplitude": 1.0}
    made: Any = _request(job("generate", "ti2v-5B", **given), pipeline)
    assert (made.prompt, made.negative, made.seed, made.sampling) == ("x", config.sample_neg_prompt, 7, "sampling")
    assert made.geometry == (832, 480, config.frame_num) and made.known.leading == () and made.known.end is None
    assert made.loras == {"model": (LoraFile(Path("a"), 0.5),)} and checked == [made.loras, "quality"]
    begun: Any = _request(
        job("generate", "ti2v-5B", image="a.png", end_image="b.png", frame_num=17, prompt="x"), pipeline
    )
    assert begun.known.leading == (picture,) and begun.known.end == "picture b.png"
    width, height, frames = begun.geometry
    assert frames == 17 and width / height == pytest.approx(960 / 576, rel=0.1) and width * height <= 832 * 480
    with pytest.raises(UserError, match="end_image: a clip with 1 known frame must have 9"):
        _request(job("generate", "ti2v-5B", image="a.png", end_image="b.png", frame_num=5, prompt="x"), pipeline)
    text: Any = _request(job("generate", "ti2v-5B", end_image="b.png", frame_num=5, prompt="x"), pipeline)
    assert text.known.leading == () and text.known.end == "picture b.png"
    with pytest.raises(UserError, match="motion_amplitude is for I2V-A14B"):
        _request(job("generate", "ti2v-5B", motion_amplitude=1.2, prompt="x"), pipeline)
