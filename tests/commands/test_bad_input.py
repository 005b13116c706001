"""Bad input: exit code 2 and one line that says what is wrong, before any model loads, and no file is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import without_start
from tests.support.golden import DATA, GOLDEN, small_checkpoints
from wan.cli import continuous_main, generate_main
from wan.kinds import Address, Local
from wan.options import options_of

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of each kind, videos and non-videos."""
    folder = tmp_path_factory.mktemp("world")
    small_checkpoints(folder, ("96*64", "64*96"))
    for name, source in (("i2v", "14b"), ("ti2v", "5b")):
        shutil.copy(GOLDEN / source / "image.png", folder / f"{name}.png")
    shutil.copytree(GOLDEN / "5b" / "ckpt", folder / "released")
    shutil.copytree(GOLDEN / "5b" / "ckpt", folder / "declares_nonsense")
    (folder / "declares_nonsense" / "wan_config.json").write_text('{"layers": 3}')
    shutil.copytree(GOLDEN / "5b" / "ckpt", folder / "shard_lost")
    next((folder / "shard_lost").glob("*00002-of*")).unlink()
    for name in ("text.mp4", "audio_only.mp4", "zero_length.mp4"):
        shutil.copy(DATA / "corpus" / name, folder / name)
    shutil.copy(VIDEO, folder / "clip.mp4")
    (folder / "joined").mkdir()
    shutil.copy(VIDEO, folder / "joined" / "joined.mp4")
    (folder / "empty").mkdir()
    (folder / "story.yaml").write_text("clips:\n  - a boat\n  - frames: 80\n")
    (folder / "cut.yaml").write_text("clips:\n  - {frames: 9, context: 9}\n")
    (folder / "no_model").mkdir()
    (folder / "no_model" / "config.json").write_text('{"model_type": "internlm2"}')
    (folder / "broken_vlm").mkdir()
    (folder / "broken_vlm" / "config.json").write_text("{")
    return folder


GENERATE: list[tuple[str, str]] = [
    ("--ckpt_dir nobody/nothing --video {text.mp4}", "text.mp4"),  # said before anything is downloaded
    ("--ckpt_dir nobody/nothing --video {clip.mp4} --save_file {empty}/x.avi", "only mp4 files are written"),
    ("--ckpt_dir {ti2v} --task ti2v-5B --prompt x --context_frames 5", "--context_frames goes with --video"),
    ("--ckpt_dir {i2v} --image {i2v.png} --prompt x --lora_high {text.mp4}", "text.mp4"),
    ("--ckpt_dir {i2v} --image {i2v.png} --prompt x --lora {text.mp4}", "--lora is not for i2v-A14B"),
    # flags
    ("", "--ckpt_dir or --comfy_dir is required: where"),
    ("--ckpt_dir {i2v} --xyzzy 9", "unknown flag --xyzzy (see --help)"),
    ("--vidoe {clip.mp4}", "unknown flag --vidoe; did you mean --video? (see --help)"),
    ("--ckpt_dir {ti2v} -video {clip.mp4}", "unknown flag -video; did you mean --video? (see --help)"),
    ("--ckpt_dir {ti2v} --prompt --rain", "unknown flag --rain; if it is the value of --prompt, write --prompt=--rain"),
    ("--ckpt_dir {ti2v} --prompt --vidoe {clip.mp4}", "unknown flag --vidoe; did you mean --video? (see --help)"),
    ("--ckpt_dir {ti2v} --prompt -h", "expected one argument"),
    ("--ckpt-dir {ti2v}", "unknown flag --ckpt-dir; did you mean --ckpt_dir? (see --help)"),
    ("--ckpt_dir {ti2v} --task ti2v-5B --prompt x --vlm_path {i2v}", "--vlm_path goes with --video"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --num_segments 1000000000", "--num_segments must be at most 256"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --sample_steps 10000", "--sample_steps must be at most 1000"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --frame_num 10001", "--frame_num must be at most 4093"),
    (
        "--ckpt_dir {ti2v} --video {clip.mp4} --task v2v-1B",
        "'v2v-1B' is not; did you mean v2v-14B?",
    ),
    (
        "--ckpt_dir {ti2v} --video {clip.mp4} --sample_steps many",
        "must be a whole number, 'many' is not",
    ),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --sample_steps 0", "--sample_steps must be at least 1, 0 is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --sample_shift -1", "sample_shift must be a positive number"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --sample_shift nan", "sample_shift must be a positive number"),
    (
        "--ckpt_dir {ti2v} --video {clip.mp4} --sample_guide_scale high",
        "one number or LOW,HIGH, 'high' is not",
    ),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --sample_guide_scale 1,2,3", "must be one number or LOW,HIGH"),
    (
        "--ckpt_dir {ti2v} --video {clip.mp4} --sample_solver heun",
        "one of unipc, dpm++, euler; 'heun' is not",
    ),
    (
        "--ckpt_dir {ti2v} --video {clip.mp4} --offload_model maybe",
        "must be true or false, 'maybe' is not",
    ),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --frame_num 6", "frame_num must be 4n+1: 6 is not, 5 and 9 are"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --frame_num 0", "--frame_num must be at least 1, 0 is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --num_segments 0", "--num_segments must be at least 1, 0 is not"),
    (
        "--ckpt_dir {ti2v} --video {clip.mp4} --video_reader opencv",
        "one of auto, pyav, decord; 'opencv' is not",
    ),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --vlm_url ftp://x", "--vlm_url must begin with http:// or https://"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --vlm_device tpu", "device 'tpu' is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --vlm_device cuda:77", "device 'cuda:77' is not there"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --prompt caf\udce9", "--prompt is not valid UTF-8"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --base_seed 99999999999999999999", "is too large; the largest seed is"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --prompt x --sample_guide_scale 3,7", "has one expert and takes one number"),
    # several GPUs
    ("--ckpt_dir {ti2v} --video {clip.mp4} --ulysses_size 2", "--ulysses_size 2 needs 2 processes: start"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --dit_fsdp", "--dit_fsdp: weights are shared among GPUs; start the"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --t5_fsdp", "--t5_fsdp: weights are shared among GPUs; start the"),
    # task against inputs and checkpoint
    ("--ckpt_dir {ti2v} --task v2v-5B --prompt x", "--task v2v-5B needs --video"),
    ("--ckpt_dir {ti2v} --task ti2v-5B --video {clip.mp4}", "--task ti2v-5B takes no --video"),
    ("--ckpt_dir {i2v} --task i2v-A14B --prompt x", "--task i2v-A14B needs --image"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --image {ti2v.png}", "--task v2v-5B takes no --image"),
    ("--ckpt_dir {ti2v} --task ti2v-5B --image {ti2v.png}", "--task ti2v-5B needs --prompt"),
    ("--ckpt_dir {ti2v} --task ti2v-5B --prompt x --image {text.mp4}", "cannot read image"),
    ("--ckpt_dir {ti2v} --task ti2v-5B --prompt x --image {nowhere.png}", "nowhere.png': No such file"),
    ("--ckpt_dir {ti2v} --task v2v-14B --video {clip.mp4}", "found TI2V-5B"),
    ("--ckpt_dir {i2v} --task v2v-5B --video {clip.mp4}", "found I2V-A14B"),
    # sizes
    ("--ckpt_dir {ti2v} --video {clip.mp4} --size 64x96", "size must look like 1280*720"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --size 0*96", "size must look like 1280*720"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --size 832*480", "--size 832*480 is not one of 96*64, 64*96"),
    ("--ckpt_dir {released} --video {clip.mp4} --size 96*64", "--size 96*64 is not one of 1280*704, 704*1280"),
    # checkpoints
    ("--ckpt_dir {nowhere} --video {clip.mp4}", "checkpoint folder {nowhere} does not exist"),
    ("--ckpt_dir {clip.mp4} --video {clip.mp4}", "is a file; a checkpoint is a folder"),
    ("--ckpt_dir {empty} --video {clip.mp4}", "holds no Wan2.2 checkpoint"),
    ("--ckpt_dir {shard_lost} --video {clip.mp4}", "1 of 3 shards are missing"),
    ("--ckpt_dir {declares_nonsense} --video {clip.mp4}", "layers = 3 is not understood"),
    # videos
    ("--ckpt_dir {ti2v} --video {nowhere.mp4}", "nowhere.mp4"),
    ("--ckpt_dir {ti2v} --video {empty}", "empty"),
    ("--ckpt_dir {ti2v} --video {text.mp4}", "text.mp4"),
    ("--ckpt_dir {ti2v} --video {audio_only.mp4}", "audio_only.mp4"),
    ("--ckpt_dir {ti2v} --video {zero_length.mp4}", "zero_length.mp4"),
    # the captioner
    ("--ckpt_dir {ti2v} --video {clip.mp4} --vlm_path {nowhere}", "nowhere"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --vlm_path {empty}", "empty"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --vlm_path {broken_vlm}", "broken_vlm"),
    # output
    ("--ckpt_dir {ti2v} --video {clip.mp4} --save_file {out.avi}", "out.avi"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --save_file {nowhere}/out.mp4", "nowhere"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --save_file {clip.mp4}", "which --video needs; give another name"),
]

CONTINUOUS: list[tuple[str, str]] = [
    ("--ckpt_dir {ti2v}", "the following arguments are required: --video"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --num_videos 0", "--num_videos must be at least 1, 0 is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --task ti2v-5B", "--task must be one of v2v-14B, v2v-5B; 'ti2v-5B' is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --keep_following", "--keep_following goes with --redo"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --frame_num 1", "a clip of a chain needs at least 5 frames"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --output_dir {clip.mp4}/x", "clip.mp4 is a file"),
    ("--ckpt_dir {ti2v} --video {joined/joined.mp4} --output_dir {joined}", "joined.mp4 would be overwritten"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --redo 0", "--redo must be at least 1, 0 is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --output_dir {clip.mp4}", "is a file; give a folder"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --frame_num 80", "frame_num must be 4n+1: 80 is not"),
    ("--ckpt_dir {ti2v} --video {text.mp4}", "text.mp4"),
    ("--ckpt_dir {i2v} --task v2v-5B --video {clip.mp4}", "found I2V-A14B"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --context_frames 6", "context_frames must be 1, 5, 9, 13 or 17; 6 is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --continuation last_frame --context_frames 5", "knows 1 frame(s), not 5"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --frame_num 9 --continuation svi2pro", "svi2pro is for I2V-A14B"),
    ("--ckpt_dir {i2v} --video {clip.mp4} --continuation svi2pro --frame_num 13", "needs its pair of LoRAs"),
    ("--ckpt_dir {i2v} --video {clip.mp4} --anchor_image {i2v.png}", "--anchor_image goes with --continuation svi2pro"),
    (
        "--ckpt_dir {ti2v} --video {clip.mp4} --end_image {i2v.png}",
        "with 1 known frame must have 9 or more, 5 is fewer",
    ),
    ("--ckpt_dir {i2v} --video {clip.mp4} --end_image {text.mp4}", "cannot read image"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --drift_correction 2", "--drift_correction must be from 0 to 1, 2.0 is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --best_of 0", "--best_of must be at least 1, 0 is not"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --lora nowhere.safetensors --prompt x", "nowhere.safetensors"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --lora {text.mp4} --prompt x", "text.mp4"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --storyboard nowhere.yaml", "nowhere.yaml"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --storyboard {story.yaml} --prompt x", "story.yaml, line 3: frames must be"),
    ("--ckpt_dir {ti2v} --video {clip.mp4} --storyboard {cut.yaml} --prompt x", "cut.yaml, line 2: context"),
]

CASES = [(generate_main, *case) for case in GENERATE] + [(continuous_main, *case) for case in CONTINUOUS]


def load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as a model is loaded."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    for name in ("denoiser.model.WanModel", "vae.vae.WanVAE", "text.umt5.TextEncoder"):
        monkeypatch.setattr(f"wan.{name}.from_weights", loaded)


@pytest.mark.parametrize(
    ("main", "flags", "message"), CASES, ids=[ascii(f"{case[0].__name__} {case[1]}") for case in CASES]
)
def test_bad_input_is_one_line_and_exit_code_2(
    main: Any,
    flags: str,
    message: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    before = {entry.name for entry in world.iterdir()}

    def fill_in(text: str) -> str:
        for part in text.split("{")[1:]:
            name = part.split("}")[0]
            text = text.replace(f"{{{name}}}", str(world / name))
        return text

    assert main([fill_in(word) for word in flags.split()]) == 2
    output = capsys.readouterr()
    lines = without_start(output.err).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), output.err
    assert fill_in(message) in lines[0]
    assert output.out == ""
    assert {entry.name for entry in world.iterdir()} == before
    assert not list(tmp_path.iterdir())


NO_NAME = {
    "x" * 256: "is too long",
    "a\0b": "zero byte",
    "~no_such_user/x": "is of a user that is not there",
    "/proc/x": "",
}


@pytest.mark.parametrize(
    ("main", "name"),
    [
        (main, one.name)
        for main in (generate_main, continuous_main)
        for one in options_of("generate" if main is generate_main else "continuous")
        if one.flag and isinstance(one.kind, Local) and not isinstance(one.kind, Address) and one.name != "vlm_device"
    ],
)
def test_a_name_that_no_file_has_is_refused_before_anything_loads(
    main: Any,
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    load_nothing(monkeypatch)
    of_a14b = name in ("dit_high", "dit_low", "lora_high", "lora_low", "anchor_image", "end_image")
    given = {"ckpt_dir": str(world / ("i2v" if of_a14b else "ti2v")), "prompt": "x", "video": str(world / "clip.mp4")}
    if name in ("vlm_path", "image"):
        del given["prompt" if name == "vlm_path" else "video"]
        given |= {"prompt": "x", "task": "ti2v-5B"} if name == "image" else {}
    if name == "prune":
        given = {}
    if name == "anchor_image":
        given |= {"continuation": "svi2pro", "lora_high": "a.safetensors", "lora_low": "a.safetensors"}
    no_file = {} if name in ("ckpt_dir", "vlm_path", "output_dir") else {str(world / "empty"): ""}
    for value, message in (NO_NAME | no_file).items():
        words = [f"--{key}={one}" for key, one in (given | {name: value}).items()]
        assert main(words) == 2, value
        output = capsys.readouterr()
        error = without_start(output.err)
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, output.err
        assert len(error) < 500 and output.out == "" and not list(tmp_path.iterdir())
