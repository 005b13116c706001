"""The table of settings: needs no PyTorch, knows who may set what, and each of its rows does what it says.

The two tests over the whole table run both commands with stand-ins for sampling and captioning. One changes each
setting and looks at the value where it is used; the other at the fingerprints of the clips.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.commands import MADE, Seen, frames_in, metadata
from tests.support.golden import ROOT
from wan.chain.run_folder import RunFolder
from wan.commands.flags import parse, parser_of, reference
from wan.configs import WAN_CONFIGS
from wan.errors import UserError
from wan.kinds import (
    Address,
    Among,
    Gib,
    Guidance,
    Local,
    Output,
    Picture,
    PictureFolder,
    Place,
    Real,
    Seed,
    Strength,
    Unfit,
    Video,
    Whole,
)
from wan.media import read_last_frame
from wan.options import OPTIONS, V2V_TASKS, Option, Settings, check, current, options_of, words_of
from wan.settings import LoraFile
from wan.types import Step

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "diffusers")


# --- without PyTorch


def imported(code: str, *words: str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and the heavy packages that a fresh interpreter has imported after this code."""
    program = f"import sys\n{code}\nprint('IMPORTED', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert last.startswith("IMPORTED"), done.stderr
    return done.returncode, done.stdout + done.stderr, last.split()[1:]


@pytest.mark.parametrize("main", ["generate_main", "continuous_main"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--help", "Prompt and captions"),
        ("--version", "wan-continue "),
        ("--vidoe x", "error: unknown flag --vidoe; did you mean --video? (see --help)"),
        ("--ckpt_dir x --video nowhere.mp4", "error: cannot read video 'nowhere.mp4'"),
    ],
)
def test_what_the_words_alone_tell_needs_no_model_library(main: str, words: str, message: str) -> None:
    code = f"from wan.cli import {main}\ntry:\n    {main}(sys.argv[1:])\nexcept SystemExit:\n    pass"
    _, output, heavy = imported(code, *words.split())
    assert message in output and heavy == []


def test_a_storyboard_is_checked_without_a_model_library(tmp_path: Path) -> None:
    shutil.copy(MADE / "light.safetensors", tmp_path)
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("- {prompt: a boat, lora: light.safetensors:0.5, guidance: 2}\n")
    bad.write_text("- {frames: 80}\n")
    code = (
        "from wan.chain.storyboard import check_storyboard\nfrom wan.configs import v2v_5B\n"
        "from wan.chain.storyboard_file import read_storyboard\n"
        "from pathlib import Path\nfile = Path(sys.argv[1])\n"
        "check_storyboard(file, read_storyboard(file), config=v2v_5B)"
    )
    assert imported(code, str(good))[2] == []
    code = "from wan.cli import continuous_main\nprint(continuous_main(sys.argv[1:]))"
    video = str(MADE / "source.mp4")
    _, output, heavy = imported(code, "--ckpt_dir", "x", "--video", video, "--storyboard", str(bad))
    assert "bad.yaml, line 1: frames must be 4n+1: 80 is not" in output and heavy == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ckpt_dir {empty}", "holds no Wan2.2 checkpoint"),
        ("--ckpt_dir {a14b} --task v2v-5B", "found I2V-A14B (2 expert(s), 36 input channels)"),
        ("--ckpt_dir {5b} --vae {a14b}/Wan2.1_VAE.pth", "has 16 latent channels, the denoiser"),
        ("--ckpt_dir {5b} --t5 {a14b}/Wan2.1_VAE.pth", "is no text encoder of Wan"),
        ("--ckpt_dir {5b} --lora_high x.safetensors", "--lora_high is not for v2v-5B, which takes --lora"),
        ("--ckpt_dir {5b} --lora x.safetensors", "LoRA x.safetensors does not exist"),
        ("--ckpt_dir {5b} --lora {5b}/diffusion_pytorch_model.safetensors", "is no LoRA that can be merged"),
        ("--ckpt_dir {5b} --lora {loras}/tiny-I2V-A14B-4steps-high.safetensors", "width 192, this one is 320"),
        ("--ckpt_dir {5b} --preset turbo", "--preset turbo needs --lora FILE"),
        ("--ckpt_dir {5b} --precision fp8", "and there is none; give --precision bf16"),
        ("--ckpt_dir {5b} --vlm_path {empty}/no", "check --vlm_path, or give --prompt to go on without captioning"),
        ("--ckpt_dir {made} --dit {empty}/cut.safetensors", "does not fit the model: missing blocks.1.ffn.0.bias"),
        ("--ckpt_dir {5b} --vram 12", "--vram is for a GPU, and there is none; leave it out"),
        ("--ckpt_dir {5b} --host_memory 1", "GiB of host memory for 17 frames of 160x96"),
        ("--ckpt_dir {5b} --continuation svi2pro", "svi2pro is for I2V-A14B; use tail with v2v-5B"),
        ("--ckpt_dir {5b} --motion_amplitude 1.2", "--motion_amplitude is for I2V-A14B"),
        ("--ckpt_dir {5b} --frame_num 5 --end_image {picture}", "1 known frame must have 9 or more, 5 is fewer"),
        ("--ckpt_dir {5b} --sample_steps 1 --cache first_block", "leaves nothing out of 1 steps"),
        ("--ckpt_dir {odd}", "config.json: expected num_heads that divide the width 24 into even parts, found 7"),
    ],
)
def test_what_headers_tell_is_refused_before_pytorch_is_imported(words: str, message: str, tmp_path: Path) -> None:
    models = ROOT / "models"
    places = {"empty": tmp_path, "a14b": models / "tiny-Wan2.2-I2V-A14B", "5b": models / "tiny-Wan2.2-TI2V-5B"}
    places |= {
        "loras": models / "tiny-loras",
        "made": MADE / "ti2v",
        "picture": MADE / "small.png",
        "odd": tmp_path / "odd",
    }
    shutil.copytree(MADE / "ti2v", places["odd"])
    (places["odd"] / "config.json").write_text('{"num_heads": 7}')
    numbers = load_file(MADE / "ti2v" / "diffusion_pytorch_model.safetensors")
    save_file({key: one for key, one in numbers.items() if key != "blocks.1.ffn.0.bias"}, tmp_path / "cut.safetensors")
    code = "import wan.device.host as host\nhost.has_gpu_driver = lambda: False\nfrom wan.cli import generate_main\n"
    code += "print(generate_main(sys.argv[1:], own_process=True))"
    _, output, heavy = imported(code, "--video", str(MADE / "source.mp4"), *words.format(**places).split())
    assert message in output and heavy == []


@pytest.mark.parametrize(("main", "words"), [("generate", []), ("continuous", ["--num_videos", "2"])])
def test_a_budget_that_is_too_small_is_refused_before_pytorch_is_imported(main: str, words: list[str]) -> None:
    code = f"import wan.device.host as host\nhost.has_gpu_driver = lambda: True\nfrom wan.cli import {main}_main\n"
    code += f"print({main}_main(sys.argv[1:], own_process=True))"
    folder = str(ROOT / "models" / "tiny-Wan2.2-I2V-A14B")
    given = ["--ckpt_dir", folder, "--video", str(MADE / "source.mp4"), "--vram", "1"]
    _, output, heavy = imported(code, *given, *words)
    assert "error: --vram 1: decoding of 17 frames of 160x80 needs 1.3 GiB; give " in output and heavy == []


def test_a_command_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    models, video = ROOT / "models", str(ROOT / "examples" / "shapes.mp4")
    folders = ["--ckpt_dir", str(models / "tiny-Wan2.2-TI2V-5B"), "--vlm_path", str(models / "tiny-InternVL")]
    target = ["--sample_steps", "1", "--frame_num", "5", "--save_file", str(tmp_path / "o.mp4")]
    # packages that libraries import where they find them; each would end the run
    for name in ("peft", "sklearn", "scipy", "pandas", "torchaudio", "torchvision", "torchao", "bitsandbytes"):
        (tmp_path / "there" / name).mkdir(parents=True)
        (tmp_path / "there" / name / "__init__.py").write_text(f"print('TOOK {name}')\n__version__ = '99.0'\n")
    code = "from wan.cli import generate_program\ngenerate_program()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", "--video", video, *folders, *target],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "there"), str(ROOT)])},
    )
    assert done.returncode == 0, done.stderr
    assert "TOOK" not in done.stdout and done.stdout.endswith("o.mp4\n")
    assert "v2v-5B with" in done.stderr.splitlines()[0]


def test_config_rows_give_dtypes_and_need_no_pytorch_until_then() -> None:
    code = "from wan.configs import v2v_14B\nv2v_14B.variant(frame_num=5)\n"
    assert imported(code)[2] == []
    assert imported(f"{code}v2v_14B.param_dtype")[2] == ["torch"]
    row = WAN_CONFIGS["v2v-14B"]
    assert (row.param_dtype, row.t5_dtype, row.vae_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    changed = dataclasses.replace(row, param_dtype=torch.float32)
    assert changed.param_dtype == torch.float32 and changed != row
    assert row.variant(param_dtype="float32") == changed
    with pytest.raises(UserError, match="param_dtype must be one of float32, bfloat16, float16; 'int8' is not"):
        row.variant(param_dtype="int8")


def test_the_official_names_are_there() -> None:
    from generate import EXAMPLE_PROMPT
    from wan.configs import i2v_A14B, t2v_A14B, ti2v_5B, v2v_5B, v2v_14B

    rows = (t2v_A14B, i2v_A14B, ti2v_5B, v2v_14B, v2v_5B)
    assert [row.name for row in rows] == list(WAN_CONFIGS) == list(EXAMPLE_PROMPT)
    for task, example in EXAMPLE_PROMPT.items():
        assert example["prompt"]
        assert ("image" in example, "video" in example) == (task == "i2v-A14B", task.startswith("v2v"))
        assert all((ROOT / example[name]).is_file() for name in example if name != "prompt")


# --- the table


def test_an_option_says_what_it_does_to_a_fingerprint_or_it_is_none() -> None:
    row = OPTIONS["sample_steps"]
    with pytest.raises(TypeError, match="must say which keys of the fingerprint"):
        dataclasses.replace(row, fingerprint=())
    with pytest.raises(TypeError, match="must say which keys of the fingerprint"):
        dataclasses.replace(row, same="it is both")


def test_no_remote_client_sets_what_names_something_of_this_machine() -> None:
    with pytest.raises(TypeError, match="no remote client's to choose"):
        Option("x", Local(), None, "Input", "x", same="x", client=True)
    for name in ("ckpt_dir", "vlm_path", "vlm_url", "vlm_trust_remote_code", "output_dir", "save_file", "lora", "dit"):
        assert "client" not in OPTIONS[name].setters
    assert OPTIONS["sample_steps"].setters == {"command line", "storyboard", "client", "row"}
    assert OPTIONS["cut"].setters == {"storyboard"}


def test_settings_are_in_range_wherever_they_come_from() -> None:
    with pytest.raises(UserError) as caught:
        Settings(ckpt_dir="x", sample_steps=0)
    assert caught.value.marked == "`sample_steps` must be at least 1, 0 is not"
    assert str(caught.value) == "sample_steps must be at least 1, 0 is not"
    for name, value in {"vram": 0.5, "drift_correction": 2.0, "frame_num": 6, "base_seed": 2**63}.items():
        with pytest.raises(UserError, match=f"^{name} "):
            check(name, value)


def test_every_number_has_a_limit_and_a_reason_for_it() -> None:
    for one in OPTIONS.values():
        kind = one.kind
        if isinstance(kind, Whole | Real | Guidance) and not isinstance(kind, Among | Seed | Strength):
            assert abs(kind.high) <= 10**6 and kind.reason.startswith("; "), one.name
            value: Any = (kind.high, 2 * kind.high) if isinstance(kind, Guidance) else 2 * kind.high
            with pytest.raises(UserError, match=f"`?{one.name}`? .*{kind.reason}"):
                check(one.name, value)
        elif isinstance(kind, Gib):
            with pytest.raises(UserError, match="GiB from 1 to 4096"):
                check(one.name, 1e9)
    assert Settings(base_seed=2**63 - 1) and OPTIONS["drift_correction"].kind == Strength("S", 0, 1, unsaid=0.9)
    for name, value in (("base_seed", 2**63), ("seed", 2**63), ("context_frames", 10**9), ("drift_correction", 1e300)):
        with pytest.raises(UserError, match=name):
            check(name, value)
    for text in (f"PATH:{strength}" for strength in ("1e300", "-1001", "nan", "inf")):
        with pytest.raises(UserError, match="must be from -1000 to 1000"):
            LoraFile.parse(text)
    with pytest.raises(UserError, match="size must look like"):
        check("size", "9" * 5000 + "*9")


@pytest.mark.parametrize("text", ["-rain", "-5 degrees, it snows", "-1", "-", "--", "-prompt", "--rain"])
def test_a_text_may_begin_with_a_dash(text: str) -> None:
    words = ["--ckpt_dir", "x", "--video", "y"]
    assert parse("continuous", [*words, f"--prompt={text}"]).prompt == text
    if not text.startswith("--"):
        assert parse("continuous", ["--prompt", text, *words]).prompt == text
        assert parse("continuous", [*words, "--prompt", text]).prompt == text
    assert parse("continuous", [*words, "--sample_guide_scale", "-1,2"]).sample_guide_scale == (-1, 2)
    assert parse("continuous", [*words, "--drift_correction", "--prompt", "a"]).drift_correction == 0.9


def test_every_value_can_be_said_on_the_command_line_again() -> None:
    text = "--ckpt_dir m --video -v --sample_guide_scale 1,2.5 --guidance_interval 0.25 1 --vram 6.5 --t5_cpu"
    text += " --lora a:0.5 --lora b --drift_correction --prompt_mode continue"
    settings = parse("continuous", text.replace("--video -v", "--video=-v").split())
    assert settings.drift_correction == 0.9 and settings.lora == ("a:0.5", "b") and settings.vram == 6.5
    as_json = json.loads(json.dumps({one.name: getattr(settings, one.name) for one in options_of("continuous")}))
    assert parse("continuous", words_of(as_json)) == settings


def test_records_of_0_1_0_are_read_with_today_s_keys() -> None:
    old = {"frames": 81, "checkpoint": "m", "low_precision": "fp8", "vlm": "http://x/v1", "seed": 3}
    old |= {"dit_files": {"high_noise_model": "h.gguf"}}
    new = {"frame_num": 81, "ckpt_dir": "m", "precision": "fp8", "vlm_url": "http://x/v1", "vlm_path": None, "seed": 3}
    assert current(old) == new | {"dit_high": "h.gguf"}
    assert current(current(old)) == current(old)


def test_the_reference_page_is_made_from_the_table() -> None:
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == reference()
    assert all(f"`{one.word}" in reference() for one in OPTIONS.values() if one.flag)


def texts_of(file: Path) -> list[str]:
    """The strings of a file that are no docstrings, the pieces of f-strings among them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    owners = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docs = {id(node.body[0].value) for node in owners if node.body and isinstance(node.body[0], ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_no_message_of_the_library_holds_a_flag() -> None:
    homes = [file for file in (ROOT / "wan").rglob("*.py") if "commands" not in file.parts]
    assert len(homes) > 80
    # the words of a command line are written there, for the report's commands to type
    homes.remove(ROOT / "wan" / "options.py")
    flagged = {
        str(file): [text for text in texts_of(file) if re.search(r"(?<![-\w])--(?=[a-z]|$)", text)] for file in homes
    }
    assert {file: texts for file, texts in flagged.items() if texts} == {}


# --- what a setting does


@dataclass(frozen=True)
class Case:
    """Words that change one setting, how the change is seen, and which fingerprint keys it reaches by other ways."""

    words: str
    look: Callable[[Seen], Any]
    value: Any
    base: str = ""
    also: str = ""
    generate: bool = False
    again: bool = False  # in a folder that is finished


SVI = "--ckpt_dir i2v --continuation svi2pro --lora_high svi_pro_high.safetensors --lora_low svi_pro_low.safetensors"
A14B = "--ckpt_dir i2v --frame_num 9"


def previewed(seen: Seen) -> bool:
    """Whether a step's latents become a picture in the folder."""
    seen.run["on_step"](Step(1, 5, "denoise", torch.zeros(48, 2, 2, 4)))
    return (seen.folder / "preview.webp").exists()


CASES: dict[str, Case] = {
    "task": Case("--task v2v-14B", lambda s: s.pipeline.config.name, "v2v-14B", "--ckpt_dir i2v --task v2v-14B"),
    "video": Case("--video other.mp4", lambda s: round(s.mean(s.first.known.leading[0]), 3), ..., also="height width"),
    "from_": Case("--from 0.1", lambda s: round(s.mean(s.first.known.leading[0]), 3), ...),
    "image": Case(
        "--image red.png",
        lambda s: np.asarray(s.first.known.leading[0])[0, 0].tolist(),
        [255, 0, 0],
        "--image picture.png --task ti2v-5B --prompt x",
        generate=True,
    ),
    "until": Case(
        "--until other.mp4",
        lambda s: [one.known.end is not None for one in s.requests] + [frames_in(s.folder / "joined.mp4") > 40],
        [False, True, True],
        "--include_source",
    ),
    "size": Case("--size 128*64", lambda s: s.first.geometry.width * s.first.geometry.height > 3000, True),
    "frame_num": Case("--frame_num 13", lambda s: s.first.geometry.frames, 13),
    "base_seed": Case("--base_seed 9", lambda s: [one.seed for one in s.requests], [9, 10]),
    "seed": Case("--storyboard seed.yaml", lambda s: s.first.seed, 77),
    "storyboard": Case(
        "--storyboard story.yaml",
        lambda s: s.first.prompt,
        "continue video the boat sinks",
        also="prompt num_segments vlm vlm_question",
    ),
    "name": Case(
        "--storyboard name.yaml",
        lambda s: json.loads((s.folder / "run.json").read_text()).get("named"),
        {"the fog": 3},
        "--prompt it-goes-on",
    ),
    "num_videos": Case("--num_videos 3", lambda s: len(s.requests), 3),
    "prompt": Case(
        "--prompt it-goes-on",
        lambda s: s.first.prompt,
        "continue video it-goes-on",
        also="num_segments vlm vlm_question",
    ),
    "prompt_for": Case(
        "--prompt_for 2 it-turns",
        lambda s: s.requests[1].prompt,
        "continue video it-turns",
        also="num_segments vlm vlm_question",
    ),
    "custom_prompt": Case("--custom_prompt now", lambda s: s.first.prompt, "now A red square slides to the right."),
    "prompt_mode": Case("--prompt_mode continue", lambda s: s.asked[0][1] == "Describe this video in detail.", False),
    "vlm_path": Case("--vlm_path vlm_2", lambda s: s.opened["path"], "vlm_2"),
    "vlm_url": Case("--vlm_url http://x/v1", lambda s: s.opened["url"], "http://x/v1"),
    "vlm_question": Case("--vlm_question Why?", lambda s: s.asked[0][1], "Why?"),
    "vlm_fallback": Case("--vlm_fallback boats", lambda s: s.pipeline.vlm.fallback, "boats"),
    "num_segments": Case("--num_segments 3", lambda s: s.asked[0][0], 3),
    "video_reader": Case("--video_reader decord", lambda s: s.readers[0], "decord"),
    "vlm_device": Case("--vlm_device cpu", lambda s: str(s.opened["device"]), "cpu"),
    "vlm_trust_remote_code": Case("--vlm_trust_remote_code", lambda s: s.opened["trust_remote_code"], True),
    "preset": Case("--preset balanced", lambda s: str(s.first.sampling.cache), "taylorseer:2", also="cache"),
    "sample_steps": Case("--sample_steps 7", lambda s: s.first.sampling.steps, 7),
    "sample_shift": Case("--sample_shift 2.5", lambda s: s.first.sampling.shift, 2.5),
    "sample_guide_scale": Case("--sample_guide_scale 1,2", lambda s: s.first.sampling.guidance, (1.0, 2.0), A14B),
    "sample_solver": Case("--sample_solver euler", lambda s: s.first.sampling.solver, "euler"),
    "guidance_interval": Case("--guidance_interval 0.25 1", lambda s: s.first.sampling.guidance_interval, (0.25, 1.0)),
    "cache": Case("--cache first_block:0.2", lambda s: str(s.first.sampling.cache), "first_block:0.2"),
    "continuation": Case("--continuation tail", lambda s: len(s.first.known.leading), 5, also="context_frames"),
    "context_frames": Case(
        "--context_frames 9", lambda s: len(s.first.known.leading), 9, "--continuation tail --frame_num 13"
    ),
    "anchor_image": Case("--anchor_image red.png", lambda s: round(s.mean(s.first.known.anchor), 2), -0.33, SVI),
    "end_image": Case(
        "--end_image red.png", lambda s: [one.known.end is not None for one in s.requests], [False, True], A14B
    ),
    "end_images": Case(
        "--end_images ends",
        lambda s: [round(s.mean(one.known.end), 2) for one in s.requests if one.known.end is not None],
        [-1.0, -0.33],
    ),
    "cut": Case("--storyboard cut.yaml", lambda s: round(s.mean(s.first.known.leading[0]), 2), -0.33, also="parent"),
    "discard": Case("--discard 4", lambda s: [frames_in(clip.video) for clip in s.clips.values()], [5, 5]),
    "handoff_command": Case(
        f"--handoff_command '{sys.executable} paint.py {{frames}}'",
        lambda s: [round(s.mean(one.known.leading[0]), 2) for one in s.requests],
        [-0.33, -0.33],
    ),
    "motion_amplitude": Case("--motion_amplitude 1.25", lambda s: s.first.motion_amplitude, 1.25, A14B),
    "drift_correction": Case("--drift_correction", lambda s: s.corrected, [0.9, 0.9]),
    "colour_carry": Case(
        "--colour_carry",
        lambda s: [one.known.graded is not None for one in s.requests],
        [False, False, True],  # the first clip is what the others are led back to
        "--num_videos 3",
    ),
    "best_of": Case("--best_of 2", lambda s: [one.seed for one in s.requests], [3, 1000003, 4, 1000004]),
    "takes": Case("--takes 2", lambda s: len(list(s.folder.glob("takes/*/*.mp4"))), 4),
    "take": Case("--take 2=1", lambda s: s.requests[-1].seed, 4, "--best_of 2"),
    "redo": Case("--redo 2", lambda s: len(s.requests), 1, again=True, also="seed"),
    "keep_following": Case("--keep_following", lambda s: len(s.requests), 1, "--redo 1", again=True, also="seed"),
    "yes": Case("--yes --sample_steps 7", lambda s: len(s.requests), 2, again=True, also="steps"),
    "review": Case("--review", lambda s: s.code, 2),  # off a terminal
    "offload_model": Case("--offload_model False", lambda s: s.run["offload"], False),
    "vram": Case("--vram 8", lambda s: s.pipeline.budget.vram, 8.0),
    "host_memory": Case("--host_memory 64", lambda s: s.pipeline.host.limit, 64 * 2**30),
    "share_weights": Case(
        "--share_weights 2", lambda s: s.pipeline.host.sharers, 2 if hasattr(os, "memfd_create") else 1
    ),
    "precision": Case("--precision fp8", lambda s: s.pipeline.config.low_precision, "fp8"),
    "vae_dtype": Case("--vae_dtype float16", lambda s: s.pipeline.config.vae_dtype, torch.float16),
    "convert_model_dtype": Case("--convert_model_dtype", lambda s: s.pipeline.convert_model_dtype, True),
    "compile": Case("--compile off", lambda s: s.pipeline.compile_blocks, False),
    "t5_cpu": Case("--t5_cpu", lambda s: s.pipeline.text_device.type, "cpu"),
    "ulysses_size": Case("--ulysses_size 2", lambda s: s.code, 2),
    "ring_size": Case("--ring_size 2", lambda s: s.code, 2),
    "cfg_size": Case("--cfg_size 2", lambda s: s.code, 2),
    "collective_timeout": Case(  # tests/device/test_watch.py waits for it
        "--collective_timeout 60",
        lambda s: json.loads((s.folder / "run.json").read_text())["arguments"]["collective_timeout"],
        60.0,
    ),
    "t5_fsdp": Case("--t5_fsdp", lambda s: s.code, 2),
    "dit_fsdp": Case("--dit_fsdp", lambda s: s.code, 2),
    "ckpt_dir": Case("--ckpt_dir ti2v_2", lambda s: s.pipeline.checkpoint.folder.name, "ti2v_2"),
    "comfy_dir": Case(
        "--ckpt_dir without_vae --comfy_dir comfy",
        lambda s: s.pipeline.checkpoint.vae.path.name,
        "wan2.2_vae.safetensors",
    ),
    "dit": Case("--dit dit.safetensors", lambda s: s.pipeline.checkpoint.experts["model"].path.name, "dit.safetensors"),
    "dit_high": Case(
        "--dit_high dit_high.safetensors",
        lambda s: s.pipeline.checkpoint.experts["high_noise_model"].path.name,
        "dit_high.safetensors",
        A14B,
    ),
    "dit_low": Case(
        "--dit_low dit_low.safetensors",
        lambda s: s.pipeline.checkpoint.experts["low_noise_model"].path.name,
        "dit_low.safetensors",
        A14B,
    ),
    "vae": Case("--vae vae.safetensors", lambda s: s.pipeline.checkpoint.vae.path.name, "vae.safetensors"),
    "t5": Case("--t5 t5.safetensors", lambda s: s.pipeline.checkpoint.text_encoder.path.name, "t5.safetensors"),
    "lora": Case("--lora light.safetensors:0.5", lambda s: s.loras("model"), [("light.safetensors", 0.5)]),
    "lora_high": Case(
        "--lora_high light_high.safetensors",
        lambda s: s.loras("high_noise_model"),
        [("light_high.safetensors", 1.0)],
        A14B,
    ),
    "lora_low": Case(
        "--lora_low light_low.safetensors:2",
        lambda s: s.loras("low_noise_model"),
        [("light_low.safetensors", 2.0)],
        A14B,
    ),
    "overwrite": Case("--save_file theirs.mp4 --overwrite", lambda s: s.output, "theirs.mp4\n", generate=True),
    "upscale": Case(
        "--upscale larger.safetensors",
        lambda s: [read_last_frame(file).size for file in sorted(s.folder.glob("joined*.mp4"))],
        [(64, 32), (128, 64)],
    ),
    "save_file": Case("--save_file mine.mp4", lambda s: s.output, "mine.mp4\n", generate=True),
    "output_dir": Case("--output_dir elsewhere", lambda s: s.output.endswith("elsewhere/joined.mp4\n"), True),
    "fade": Case(
        "--fade 3 --storyboard second.yaml",
        lambda s: frames_in(s.folder / "joined.mp4"),
        15,
        "--storyboard second.yaml",
    ),
    "include_source": Case("--include_source", lambda s: frames_in(s.folder / "joined.mp4") > 20, True),
    "preview": Case("--preview", previewed, True),
    "no_video_metadata": Case("--no_video_metadata", lambda s: "comment" in metadata(s.folder / "joined.mp4"), False),
    "quiet": Case("--quiet", lambda s: "clip 1/2 seed 3" in s.stderr, False),
    "log_file": Case("--log_file said.log", lambda s: Path("said.log").exists(), True),
    "keep_state": Case(
        "--keep_state last",
        lambda s: [clip.is_pruned for clip in s.clips.values()],
        [True, False, False],
        "--num_videos 3",
    ),
    "prune": Case("--prune out", lambda s: s.code, 2),  # with anything else
    "no_lock": Case("--no_lock", lambda s: RunFolder(s.folder).run["arguments"]["no_lock"], True),
    "dry_run": Case("--dry_run", lambda s: (len(s.requests), "clips are still to be made" in s.output), (0, True)),
}


# tests/server and tests/batch have their cases
ELSEWHERE = {name for name, one in OPTIONS.items() if one.only in (("serve",), ("batch",))}


def test_every_setting_has_a_case() -> None:
    assert set(CASES) == set(OPTIONS) - ELSEWHERE


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, bool, bool], Seen]:
    """By words, what they make, and whether in a folder that is finished: each was run once, in a folder of its own."""
    return {}


@pytest.fixture
def once(
    runs: dict[tuple[str, bool, bool], Seen], command: Callable[..., Seen], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Seen]:
    """What a command did, whichever of the tests below has run it; they only look at it."""

    def run(words: str, *, generate: bool = False, again: bool = False) -> Seen:
        key = (words.strip(), generate, again)
        if key not in runs:
            folder = tmp_path_factory.mktemp("once") / "out"
            if again:
                command("", folder=folder)
            runs[key] = command(words, generate=generate, folder=folder)
        return runs[key]

    return run


@pytest.mark.parametrize("name", CASES)
def test_a_setting_reaches_the_place_where_it_is_used(name: str, once: Callable[..., Seen]) -> None:
    case = CASES[name]
    before = once(case.base, generate=case.generate, again=case.again)
    assert before.code == 0, before.output
    usual = None if name == "task" else case.look(before)
    seen = once(f"{case.base} {case.words}", generate=case.generate, again=case.again)
    value = case.look(seen)
    assert value != usual
    assert case.value in (value, ...), (value, seen.output)


def test_a_task_that_is_given_is_not_guessed(command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.weights.checkpoint.identify", lambda *_: pytest.fail("the task was given"))
    assert command("--task v2v-5B").code == 0


@pytest.mark.parametrize("name", [one.name for one in options_of("continuous")])
def test_a_setting_that_changes_a_result_changes_the_fingerprint(name: str, once: Callable[..., Seen]) -> None:
    case, one = CASES[name], OPTIONS[name]
    # a checkpoint of another task is the only way to another task
    base, words = ("", "--ckpt_dir i2v") if name == "task" else (case.base, f"{case.base} {case.words}")
    usual = once("" if case.again else base).fingerprinted
    seen = once(words, again=case.again)
    if name in (
        "review",
        "prune",
        "ulysses_size",
        "cfg_size",
        "ring_size",
        "t5_fsdp",
        "dit_fsdp",
        "dry_run",
    ):  # refused, or nothing is made
        assert seen.code == (0 if name == "dry_run" else 2)
        return
    assert seen.code == 0, seen.output
    made = dataclasses.replace(seen, folder=Path("elsewhere")) if name == "output_dir" else seen
    clips = made.fingerprinted
    assert clips
    changed = {
        key
        for number, settings in clips.items()
        for key in settings.keys() | usual.get(number, {}).keys()
        if number in usual
        and settings.get(key) != usual[number].get(key)
        and (key != "parent" or number == 1)  # what follows another clip has another parent
    }
    if one.fingerprint:
        assert changed & set(one.fingerprint)
        if name != "task":
            assert changed <= set(one.fingerprint) | set(case.also.split())
    else:
        assert changed == set(case.also.split()), one.same


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("clip:1.mp4", "clip:1.mp4"),
        (r"D:\out\a:b.mp4", "a:b.mp4"),
        ("out?/clip.mp4", "out?"),
        (r"C:\out\Aux.mp4", "Aux.mp4"),
        ("com1", "com1"),
        ("out./clip.mp4", "out."),
    ],
)
def test_a_name_that_windows_has_no_file_for_is_refused_there(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Output().check(name)  # other systems have such files
    with monkeypatch.context() as windows, pytest.raises(Unfit) as caught:
        windows.setattr(os, "name", "nt")
        Output().check(name)
    assert str(caught.value).startswith(f"has {part!r} in it, which no file of Windows is called")


# What is read, listened at or run; pictures and videos are read too, and a store has names of its own.
READ = {
    *("storyboard", "vlm_path", "ckpt_dir", "comfy_dir", "dit", "dit_high", "dit_low", "vae", "t5", "lora"),
    *("lora_high", "lora_low", "api_key_file", "videos", "vlm_device", "host", "address", "upscale", "handoff_command"),
}


def test_all_that_is_written_has_a_name_that_its_system_can_have() -> None:
    local = {name for name, option in OPTIONS.items() if option.kind.local}
    elsewhere = (Picture, PictureFolder, Video, Address, Place)
    written = {name for name in local - READ if not isinstance(OPTIONS[name].kind, elsewhere)}
    assert written == {"save_file", "output_dir", "log_file", "prune", "report_dir"}
    assert all(isinstance(OPTIONS[name].kind, Output) for name in written)  # a new name belongs to one of the two


def test_names_of_windows_are_taken_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        for name in ("C:/out/a.mp4", r"..\out put\{name}\a.mp4", r"\\server\share\a.mp4", "./a.mp4", r"\\?\C:\a.mp4"):
            Output().check(name)


def test_the_help_names_the_tasks_that_a_command_has() -> None:
    shown = {}
    for command in ("continuous", "generate"):
        (shown[command],) = (str(one.metavar) for one in parser_of(command)._actions if one.dest == "task")
    assert shown["continuous"] == f"{{{','.join(V2V_TASKS)}}}" and len(shown["generate"]) > len(shown["continuous"])


@pytest.mark.parametrize("value", [2.5, True, "3", None])
def test_a_whole_number_is_one(value: Any) -> None:
    with pytest.raises(Unfit, match="must be a whole number"):
        Whole().check(value)


def test_memory_is_from_one_gib_on() -> None:
    for value in (1, 1.0, 4096, "auto"):
        Gib().check(value)
    for wrong in (0.99, 4096.1, True, "much", None):
        with pytest.raises(Unfit, match="GiB from 1 to 4096"):
            Gib().check(wrong)
