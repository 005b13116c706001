"""What the settings mean for the files that they name, and what a pipeline is built from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.support.commands import Seen
from wan.batch.rows import Row
from wan.batch.schedule import Task
from wan.chain.storyboard import Scene
from wan.commands.inputs import (
    check_files,
    check_task,
    choose_size,
    choose_task,
    dit_files,
    lora_files,
    model_settings,
    or_example,
    part_files,
    read_ends,
    read_scenes,
    sampling_of,
    take_from,
    with_dtypes,
)
from wan.configs import WAN_CONFIGS
from wan.errors import UserError
from wan.options import Settings
from wan.settings import LoraFile

OTHER: dict[str, Any] = {
    "task": "v2v-5B",
    "ckpt_dir": "a",
    "comfy_dir": "b",
    "dit": "c",
    "dit_high": "d",
    "dit_low": "e",
    "vae": "f",
    "t5": "g",
    "precision": "fp8",
    "vae_dtype": "float16",
    "convert_model_dtype": True,
    "t5_cpu": True,
    "t5_fsdp": True,
    "dit_fsdp": True,
    "compile": "off",
    "vram": 8.0,
    "host_memory": 64.0,
    "share_weights": 2,
    "vlm_path": "h",
    "vlm_url": "http://i/v1",
    "vlm_device": "cpu",
    "vlm_trust_remote_code": True,
    "video_reader": "pyav",
}


@pytest.mark.parametrize("name", OTHER)
def test_another_value_of_what_a_pipeline_is_built_from_is_another_pipeline(name: str) -> None:
    assert model_settings(Settings(**{name: OTHER[name]})) != model_settings(Settings())


def test_what_is_not_built_in_leaves_the_pipeline_alone() -> None:
    other: dict[str, Any] = {
        "prompt": "x",
        "base_seed": 3,
        "sample_steps": 7,
        "size": "832*480",
        "vlm_question": "?",
        "lora": ("a",),
    }
    assert model_settings(Settings(**other)) == model_settings(Settings())


def test_chains_of_a_batch_share_models_by_the_same_rule() -> None:
    keys = {Task(Row("x", "x", Settings(**{name: OTHER[name]}))).key for name in OTHER}
    assert len(keys) == len(OTHER)
    plain, with_lora = (Task(Row("x", "x", Settings(lora=lora))).key for lora in ((), ("a",)))
    assert plain != with_lora and plain[:-1] == with_lora[:-1] == model_settings(Settings())


def test_what_a_storyboard_says_of_every_clip_the_command_need_not_have(
    command: Callable[..., Seen], tmp_path: Path
) -> None:
    story, lora = tmp_path / "story.yaml", Path("light.safetensors").absolute()
    story.write_text(f"- {{prompt: it sails, lora: {lora}}}\n- {{prompt: it sinks, lora: {lora}}}\n")
    words = f"--storyboard {story} --preset turbo --vlm_path {tmp_path / 'no'}"
    seen = command(words)
    assert seen.code == 0 and len(seen.requests) == 2
    for more, message in (
        (f"--num_videos 3 --output_dir {tmp_path}/3", "there is no VLM folder"),
        (f"--num_videos 3 --output_dir {tmp_path}/3 --prompt x", "--preset turbo needs --lora FILE"),
    ):
        seen = command(f"{words} {more}")  # of the third it says nothing
        assert seen.code == 2 and not seen.requests and message in seen.output
    story.write_text(f"- {{prompt: it sails, lora: {lora}}}\n- {{prompt: it sinks}}\n")
    seen = command(f"{words} --output_dir {tmp_path}/4")
    assert seen.code == 2 and f"{story}, line 2: --preset turbo needs --lora FILE" in seen.output


@pytest.mark.parametrize("given", ["--until other.mp4", "--end_images ends", "--end_image red.png"])
def test_an_end_that_leaves_no_frames_names_the_flag_that_was_given(command: Callable[..., Seen], given: str) -> None:
    seen = command(f"{given} --frame_num 5")
    assert seen.code == 2 and not seen.requests
    assert f"{given.split()[0]}: a clip with 1 known frame must have 9 or more, 5 is fewer" in seen.output


# The settings' own files and values


@pytest.mark.parametrize(
    ("kind", "video", "task"),
    [
        ((2, 36), None, "i2v-A14B"),
        ((2, 36), "a.mp4", "v2v-14B"),
        ((1, 36), None, "i2v-A14B"),  # one denoiser that serves both experts
        ((1, 36), "a.mp4", "v2v-14B"),
        ((1, 48), None, "ti2v-5B"),
        ((1, 48), "a.mp4", "v2v-5B"),
        ((2, 16), None, "t2v-A14B"),
        ((1, 16), None, "t2v-A14B"),
    ],
)
def test_the_task_is_told_from_the_checkpoint(kind: tuple[int, int], video: str | None, task: str) -> None:
    assert choose_task(Settings(ckpt_dir="a", video=video), kind) == task
    assert choose_task(Settings(ckpt_dir="a", video=video, task="v2v-5B"), kind) == "v2v-5B"


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"ckpt_dir": "a"}, (2, 48), r"no task is for 2 denoiser\(s\) with 48 input channels, which ckpt_dir a gives"),
        ({"comfy_dir": "b"}, (1, 7), "7 input channels, which comfy_dir b gives"),
        ({"comfy_dir": "b", "ckpt_dir": "a"}, (1, 7), "7 input channels, which ckpt_dir a gives"),
        ({"ckpt_dir": "a", "dit_high": "c", "dit_low": "d"}, (1, 7), "which dit_high c and dit_low d gives"),
        ({"ckpt_dir": "a", "video": "a.mp4"}, (2, 16), "ckpt_dir a is T2V-A14B, which takes no video"),
        ({"ckpt_dir": "a", "video": "a.mp4"}, (1, 16), "ckpt_dir a is T2V-A14B, which takes no video"),
    ],
)
def test_a_checkpoint_of_no_task_is_refused(settings: dict[str, Any], kind: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_task(Settings(**settings), kind)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("ti2v-5B", {"video": "a.mp4"}, "ti2v-5B takes no video"),
        ("v2v-5B", {"prompt": "x"}, "v2v-5B needs video"),
        ("t2v-A14B", {"image": "a.png", "prompt": "x"}, "t2v-A14B takes no image"),
        ("v2v-14B", {"image": "a.png", "video": "a.mp4"}, "v2v-14B takes no image"),
        ("i2v-A14B", {"prompt": "x"}, "i2v-A14B needs image"),
        ("ti2v-5B", {"image": "a.png"}, "ti2v-5B needs prompt"),
        ("ti2v-5B", {"prompt": "x", "context_frames": 5}, "context_frames goes with video"),
        ("v2v-5B", {"video": "a.mp4", "context_frames": 5}, None),
        ("v2v-14B", {"video": "a.mp4"}, None),
        ("ti2v-5B", {"prompt": "x"}, None),
        ("ti2v-5B", {"prompt": "x", "image": "a.png"}, None),
        ("i2v-A14B", {"prompt": "x", "image": "a.png"}, None),
        ("t2v-A14B", {"prompt": "x"}, None),
    ],
)
def test_a_task_has_the_inputs_that_it_takes(task: str, settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        check_task(Settings(**settings), task)
    else:
        with pytest.raises(UserError, match=message):
            check_task(Settings(**settings), task)


def test_only_a_command_without_prompt_and_input_makes_the_example(caplog: pytest.LogCaptureFixture) -> None:
    for given in ({"prompt": "x"}, {"video": "a.mp4"}, {"image": "a.png"}):
        settings = Settings(**given)  # type: ignore[arg-type]
        assert or_example(settings, "v2v-5B") is settings
    assert not caplog.messages
    made = or_example(Settings(base_seed=3), "i2v-A14B")
    assert made.base_seed == 3 and Path(made.image or "").name == "shapes.png" and made.prompt and made.video is None
    assert "this runs the example of i2v-A14B, `prompt` " in caplog.text


def test_an_example_whose_files_lie_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    example = {"prompt": "nowhere", "video": "nowhere/shapes.mp4"}
    monkeypatch.setattr("wan.commands.inputs.example_of", lambda task: example)
    with pytest.raises(UserError, match="v2v-5B needs video; its example lies in a clone of the project"):
        or_example(Settings(), "v2v-5B")
    del example["video"]
    assert or_example(Settings(), "t2v-A14B").prompt == "nowhere"


def test_a_size_is_one_of_the_model_s() -> None:
    config = WAN_CONFIGS["v2v-5B"].variant(sizes=("1280*704", "704*1280"))
    folder = Path("a")
    assert choose_size(None, config, folder) == (1280, 704) and choose_size("704*1280", config, folder) == (704, 1280)
    with pytest.raises(UserError, match=r"size 832\*480 is not one of 1280\*704, 704\*1280 that v2v-5B in a takes"):
        choose_size("832*480", config, folder)


@pytest.mark.parametrize(
    ("row", "settings", "low", "param", "vae"),
    [
        (None, {}, None, "bfloat16", "bfloat16"),
        ("fp8", {}, "fp8", "bfloat16", "bfloat16"),
        (None, {"precision": "fp8"}, "fp8", "bfloat16", "bfloat16"),
        ("fp8", {"precision": "fp8_attention"}, "fp8_attention", "bfloat16", "bfloat16"),
        ("fp8", {"precision": "bf16"}, None, "bfloat16", "bfloat16"),
        (None, {"vae_dtype": "float32"}, None, "bfloat16", "float32"),
    ],
)
def test_dtypes_are_the_row_s_unless_they_are_given(
    row: str | None, settings: dict[str, Any], low: str | None, param: str, vae: str
) -> None:
    config = WAN_CONFIGS["v2v-5B"].variant(low_precision=row, vae_dtype="bfloat16", param_dtype="bfloat16")
    made = with_dtypes(config, Settings(**settings))
    assert (made.low_precision, made.dtype_name("param_dtype"), made.dtype_name("vae_dtype")) == (low, param, vae)
    half = with_dtypes(config.variant(param_dtype="float16"), Settings(**settings))
    assert half.dtype_name("param_dtype") == ("bfloat16" if settings.get("precision") == "bf16" else "float16")


def test_files_are_of_the_part_that_they_are_given_for() -> None:
    given = Settings(dit_low="~/low.safetensors", vae="v.pth", lora_high=("a.safetensors:0.5", "b.safetensors"))
    assert dit_files(given) == {"low_noise_model": Path("~/low.safetensors").expanduser()}
    assert part_files(given) == {"vae": Path("v.pth")}
    files = (LoraFile(Path("a.safetensors"), 0.5), LoraFile(Path("b.safetensors")))
    assert lora_files(given) == {"high_noise_model": files} and dit_files(Settings()) == part_files(Settings()) == {}


def test_prompts_for_some_clips_are_scenes_up_to_the_last_of_them() -> None:
    assert read_scenes(Settings()) == ()
    scenes = read_scenes(Settings(prompt_for=((3, "c"), (1, "a"))))
    assert scenes == (Scene(0, {"prompt": "a"}), Scene(0, {}), Scene(0, {"prompt": "c"}))


def test_ends_are_pictures_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert read_ends(Settings()) == ()
    with pytest.raises(UserError, match="end_images '.*' holds no pictures"):
        read_ends(Settings(end_images=str(tmp_path)))
    for name in ("b10.png", "B2.png", "a3.png"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    (tmp_path / ".hidden").touch()
    assert [Path(file).name for file in read_ends(Settings(end_images=str(tmp_path)))] == [
        "a3.png",
        "B2.png",
        "b10.png",
    ]
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"c\.png"):
        read_ends(Settings(end_images=str(tmp_path)))
    with pytest.raises(UserError, match="end_images '.*' cannot be read: No such file"):
        read_ends(Settings(end_images=str(tmp_path / "none")))


@pytest.mark.parametrize("name", ["video", "image", "end_image", "cut", "anchor_image", "until"])
def test_an_input_is_read_before_anything_is_downloaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"neither a picture nor a video")
    check_files(Settings())
    given: dict[str, Any] = {name: str(tmp_path / "broken")}
    with pytest.raises(UserError, match="broken"):
        check_files(Settings(**given))


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    check_files(Settings(save_file=str(tmp_path / "out.mp4")))
    with pytest.raises(UserError, match="out"):
        check_files(Settings(save_file=str(tmp_path / "no" / "where" / "out.mp4")))


def test_every_setting_of_sampling_reaches_the_rules() -> None:
    given = Settings(
        sample_steps=4,
        sample_shift=3.0,
        sample_solver="euler",
        sample_guide_scale=(1.0, 2.0),
        guidance_interval=(0.1, 0.9),
        cache="magcache",
        preset="turbo",
    )
    rules: Any = SimpleNamespace(merge=lambda *given, **named: (given, named))
    named = {"guidance_interval": (0.1, 0.9), "cache": "magcache", "preset": "turbo"}
    made: Any = sampling_of(given, rules)
    assert made == ((4, 3.0, "euler", (1.0, 2.0)), named)


@pytest.mark.parametrize(
    ("task", "at_hand", "wanted"),
    [
        ("v2v-14B", set(), ["high_noise_model", "low_noise_model", "vae", "text_encoder", "tokenizer"]),
        ("v2v-14B", {"low_noise_model", "vae"}, ["high_noise_model", "text_encoder", "tokenizer"]),
        ("v2v-14B", {"model"}, ["vae", "text_encoder", "tokenizer"]),  # it serves both experts
        ("v2v-5B", {"tokenizer"}, ["model", "vae", "text_encoder"]),
    ],
)
@pytest.mark.parametrize(
    ("settings", "distilled"),
    [({}, False), ({"preset": "turbo"}, True), ({"preset": "turbo", "lora": ("a.safetensors",)}, False)],
)
def test_parts_that_are_not_at_hand_come_from_comfyui_s_folder(
    task: str,
    at_hand: set[str],
    wanted: list[str],
    settings: dict[str, Any],
    distilled: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, asked = WAN_CONFIGS[task], list[Any]()

    def find(*what: Any) -> list[Any]:
        asked.append(what)
        files = {"vae": "v.safetensors", "tokenizer": "tokens"}
        return [
            SimpleNamespace(part=part, file=Path(file), line=f"{part} is {file}", loras=(), strength=1.0)
            for part, file in files.items()
            if part in wanted
        ]

    caplog.set_level("INFO", "wan.commands.progress")
    comfy: Any = SimpleNamespace(find=find)
    made, tokenizer = take_from(comfy, Settings(**settings), config, at_hand)
    assert asked == [(wanted, config.in_channels, config.z_dim, distilled)]
    assert made.vae == ("v.safetensors" if "vae" in wanted else None)
    assert tokenizer == (Path("tokens") if "tokenizer" in wanted else None)
    assert len(caplog.messages) == len({"vae", "tokenizer"} & set(wanted))
