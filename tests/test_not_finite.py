"""Numbers that are not finite end a clip with the model that gave them, and no clip is left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.golden import DATA, small_checkpoints
from wan import cli
from wan.types import to_uint8

VIDEO = DATA / "corpus" / "h264_faststart.mp4"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    small_checkpoints(tmp_path)
    return tmp_path


def poison(file: Path, part: str, value: float) -> None:
    """Put one value into one tensor whose name has this part."""
    weights = torch.load(file, weights_only=True) if file.suffix == ".pth" else load_file(file)
    name = next(name for name in weights if part in name)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] = value
    torch.save(weights, file) if file.suffix == ".pth" else save_file(weights, file)


def chain(home: Path, name: str, *more: str) -> int:
    flags = ["--ckpt_dir", str(home / name), "--video", str(VIDEO), "--prompt", "x", "--num_videos", "2"]
    return cli.continuous_main([*flags, "--output_dir", str(home / "out"), "--base_seed", "1", *more])


def shard(folder: Path, part: str) -> Path:
    """The file of a folder that holds a tensor."""
    return next(file for file in sorted(folder.glob("*.safetensors")) if any(part in name for name in load_file(file)))


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "ti2v",
        lambda home: poison(shard(home / "ti2v", "blocks.0.ffn"), "blocks.0.ffn", float("nan")),
        "{home}/ti2v/",
    ),
    (
        "i2v",
        lambda home: poison(shard(home / "i2v/low_noise_model", "head.head"), "head.head.weight", float("inf")),
        "{home}/i2v/low_noise_model/",
    ),
    (
        "ti2v",
        lambda home: poison(home / "ti2v/Wan2.2_VAE.pth", "decoder", float("nan")),
        "{home}/ti2v/Wan2.2_VAE.pth holds numbers in decoder",
    ),
    (
        "ti2v",
        lambda home: poison(home / "ti2v/Wan2.2_VAE.pth", "encoder", float("nan")),
        "{home}/ti2v/Wan2.2_VAE.pth holds numbers in encoder",
    ),
    (
        "ti2v",
        lambda home: poison(home / "ti2v/models_t5_umt5-xxl-enc-bf16.pth", "norm", float("nan")),
        "{home}/ti2v/models_t5_umt5-xxl-enc-bf16.pth holds numbers in ",
    ),
]


@pytest.mark.parametrize(
    ("name", "damage", "message"), BROKEN, ids=["denoiser", "expert", "decoder", "encoder", "text"]
)
def test_a_damaged_model_is_named_and_no_clip_is_left(
    home: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(home)
    assert chain(home, name, "--sample_steps", "4") == 2
    error = capsys.readouterr().err
    assert message.format(home=home) in error and "NaN or infinite" in error
    assert not list((home / "out").glob("*.mp4")) and not list((home / "out").glob("video_*.json"))


@pytest.mark.parametrize("flag", ["--sample_guide_scale=1e38", "--sample_shift=1e300"])
def test_settings_that_overflow_are_named(home: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code = chain(home, "ti2v", flag)
    error = capsys.readouterr().err
    assert code == 2 and flag.split("=")[0] in error, error
    assert not list((home / "out").glob("*.mp4"))


def test_a_vae_whose_float16_overflows_is_told_the_way_out(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison(home / "ti2v/Wan2.2_VAE.pth", "decoder.head.2.weight", 1e7)
    assert chain(home, "ti2v", "--vae_dtype", "float16") == 2
    assert "its float16 may overflow: give --vae_dtype float32" in capsys.readouterr().err


@pytest.mark.parametrize("declared", [{"vae_std": [0.0] * 48}, {"sample_shift": float("nan")}, {"param_dtype": []}])
def test_a_declaration_that_would_lead_there_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], declared: dict[str, object]
) -> None:
    path = home / "ti2v" / "wan_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | declared))
    assert chain(home, "ti2v") == 2
    assert f"{next(iter(declared))} = " in capsys.readouterr().err and not os.path.exists(home / "out")


def test_nan_is_no_picture() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.5, float("nan")]))
