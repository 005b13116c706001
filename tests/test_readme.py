"""Every command and program of the README and of docs/ runs, with tiny checkpoints for the released ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.golden import GOLDEN, ROOT
from tests.support.quantized_files import comfyui, gguf_file, official
from tests.support.text_encoders import in_safetensors, sentencepiece_model
from tests.support.tiny_checkpoint import write_all
from wan import cli
from wan.chain.storyboard_file import read_storyboard
from wan.commands import flags as flags_module
from wan.commands.flags import parse
from wan.options import OPTIONS, Command
from wan.text.umt5 import _library_name
from wan.weights.tensors import open_safetensors

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README} | PAGES
# A block after a comment "needs: …" is for what is not here, and is only parsed.
BLOCKS = [
    (bool(needs), kind, text)
    for page in TEXTS.values()
    for needs, kind, text in re.findall(r"(<!-- needs: [^>]*-->\n\n)?```(bash|python)\n(.*?)```", page, re.DOTALL)
]
LINES = [(needs, line) for needs, kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
COMMANDS = list(
    dict.fromkeys(line for needs, line in LINES if line.startswith("python ") and ".py" in line and not needs)
)
PARSED = [line for needs, line in LINES if line.startswith("python ") and ".py" in line and needs]
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# The released sizes would take hours here; a second GPU is not there.
SMALLER = {
    "704*1280": "96*160",
    "1280*704": "160*96",
    "cuda:1": "cpu",
    "--num_videos 12": "--num_videos 2",
    "--output_dir": "--num_videos 2 --output_dir",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the README's reader's."""
    folder = tmp_path_factory.mktemp("reader")
    write_all(folder)
    for name in ("Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"):
        (folder / f"tiny-{name}").rename(folder / name)
        declaration = folder / name / "wan_config.json"
        declaration.write_text(json.dumps(json.loads(declaration.read_text()) | {"frame_num": 5, "sample_steps": 2}))
    (folder / "tiny-InternVL").rename(folder / "InternVL3_5-8B")
    (folder / "input.mp4").symlink_to(ROOT / "examples" / "shapes.mp4")
    (folder / "second.mp4").symlink_to(ROOT / "examples" / "shapes.mp4")
    for side in ("high", "low"):
        expert = folder / "Wan2.2-I2V-A14B" / f"{side}_noise_model"
        rows, columns = open_safetensors(expert, "diffusion_pytorch_model").shapes["blocks.0.self_attn.q.weight"]
        parts = {
            "lora_A.default.weight": torch.ones(2, columns) / 99,
            "lora_B.default.weight": torch.ones(rows, 2) / 99,
        }
        tensors = {f"blocks.0.self_attn.q.{name}": value for name, value in parts.items()}
        save_file(tensors, folder / f"SVI_v2_PRO_{side}.safetensors")
        save_file(tensors, folder / f"fog_{side}.safetensors")
        save_file(tensors, folder / f"lightx2v_{side}.safetensors")
    for side in ("High", "Low"):
        shards = folder / "Wan2.2-I2V-A14B" / f"{side.lower()}_noise_model"
        gguf_file("Q8_0")(official(shards), folder / f"Wan2.2-I2V-A14B-{side}Noise-Q4_K_M.gguf")
    comfyui(official(folder / "Wan2.2-TI2V-5B"), folder / "wan2.2_ti2v_5B_fp8_scaled.safetensors")
    write_comfy_folder(folder / "ComfyUI" / "models", folder / "Wan2.2-TI2V-5B")
    for name in ("harbour.png", "night.png"):
        (folder / name).symlink_to(GOLDEN / "14b" / "image.png")
    (folder / "first.png").symlink_to(GOLDEN / "14b" / "image.png")
    return folder


def write_comfy_folder(models: Path, source: Path) -> None:
    """The parts of a tiny 5B as a user of ComfyUI has them."""
    for name in ("diffusion_models", "vae", "text_encoders"):
        (models / name).mkdir(parents=True)
    for name in ("config.json", "wan_config.json"):  # the released models need neither
        shutil.copy(source / name, models)
    comfyui(official(source), models / "diffusion_models/wan2.2_ti2v_5B_fp8_scaled.safetensors")
    vae = torch.load(source / "Wan2.2_VAE.pth", weights_only=True)
    save_file({key: value.contiguous() for key, value in vae.items()}, models / "vae/wan2.2_vae.safetensors")
    encoder = torch.load(source / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    state = {_library_name(key): value.contiguous() for key, value in encoder.items()}
    in_safetensors(sentencepiece_model(), models / "text_encoders/umt5_xxl_fp16.safetensors", state)


def smaller(text: str) -> str:
    for released, tiny in SMALLER.items():
        text = text.replace(released, tiny)
    return text


def test_the_readme_shows_what_it_should() -> None:
    assert len(COMMANDS) >= 15 and len(PROGRAMS) >= 2
    assert all(name in README for name in ("make demo", "make test", "docs/demo.webp"))
    assert (ROOT / "docs" / "demo.webp").is_file()
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("name", TEXTS)
def test_a_page_links_to_what_is_there(name: str) -> None:
    home = ROOT if name == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)#\s]+)(#[^)\s]+)?\)", TEXTS[name])
    missing = [path for path, _ in links if "://" not in path and not (home / path).exists()]
    assert missing == []


@pytest.mark.parametrize("command", PARSED)
def test_commands_that_need_more_are_understood(command: str) -> None:
    _, script, *flags = shlex.split(command)
    commands: dict[str, Command] = {program: name for name, program in flags_module.PROGRAMS.items()}
    settings = parse(commands[script], flags)
    assert script != "generate_batch.py" or settings.videos


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    _, script, *flags = shlex.split(smaller(command))
    main = {"generate.py": cli.generate_main, "generate_continuous.py": cli.continuous_main}[script]
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*.mp4")}
    if script == "generate_continuous.py":
        flags += ["--frame_num", "9"]
    assert main(flags) == 0
    after = {path: path.stat().st_mtime_ns for path in world.rglob("*.mp4")}
    assert after != before or "--dry_run" in flags


def test_the_storyboard_of_the_readme_is_one(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, named = re.findall(r"```yaml\n(.*?)```", PAGES["guide.md"], re.DOTALL)
    (world / "named.yaml").write_text(named, encoding="utf-8")
    assert [scene.values["name"] for scene in read_storyboard(world / "named.yaml")] == ["harbour", "fog", "night"]
    (world / "story.yaml").write_text(text.replace("frames: 81", "frames: 9"), encoding="utf-8")
    flags = ["--ckpt_dir", "Wan2.2-I2V-A14B", "--video", "input.mp4", "--storyboard", "story.yaml"]
    monkeypatch.chdir(world)
    assert cli.continuous_main([*flags, "--frame_num", "9", "--output_dir", "story"]) == 0
    assert len(list((world / "story").glob("video_*.mp4"))) == 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*.mp4")}  # a command of a page may have its name
    exec(program, {})
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*.mp4")} != before


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_of_a_page_exists(name: str) -> None:
    known = {one.word for one in OPTIONS.values() if one.flag} | {"--help", "--version"}
    others = {
        "--local-dir",
        "--exclude",
        "--scenario",
        "--stock",
        "--count",
        "--nproc_per_node",
        "--nnodes",
        "--rdzv_backend",
        "--rdzv_endpoint",
        "--rdzv_id",
        "--nodes",
        "--ntasks-per-node",
        "--head",
        "--gpus-per-node",
        "--cpus-per-task",
        "--signal",
    }
    assert set(re.findall(r"(?<![-\w])--[A-Za-z_0-9]+(?:-[a-z]+)*", TEXTS[name])) - others <= known
