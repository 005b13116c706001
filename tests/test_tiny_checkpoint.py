"""The maker of tiny checkpoints writes what the official folders hold: the golden folders are the oracle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from examples.make_example_video import frames
from tests.support.golden import GOLDEN, GOLDEN_VLM, ROOT
from tests.support.tiny_checkpoint import (
    CHECKPOINTS,
    Denoiser,
    InternVL,
    TextEncoder,
    main,
    write_all,
    write_checkpoint,
    write_denoiser,
)
from wan.captioner import InternVLCaptioner, frame_indices
from wan.configs import config_for
from wan.denoiser.model import WanModel
from wan.errors import UserError
from wan.media import probe, sample_frames
from wan.text.umt5 import PromptTokenizer
from wan.text.umt5 import TextEncoder as WanTextEncoder
from wan.vae.vae import WanVAE
from wan.weights.checkpoint import Names, open_checkpoint

EXAMPLE = ROOT / "examples" / "shapes.mp4"
CPU = torch.device("cpu")
TASKS = {"TI2V-5B": "v2v-5B", "I2V-A14B": "v2v-14B", "T2V-A14B": "t2v-A14B"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_all(folder)
    return folder


def safetensors_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return shapes


def pth_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in torch.load(file, weights_only=True).items()}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pth")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("name", "family", "expert"),
    [("TI2V-5B", "5b", "."), ("I2V-A14B", "14b", "low_noise_model"), ("I2V-A14B", "14b", "high_noise_model")],
)
def test_the_denoiser_has_the_official_tensors_and_config(name: str, family: str, expert: str) -> None:
    golden = GOLDEN / family / "ckpt" / expert
    model = CHECKPOINTS[name].denoiser
    assert model.shapes() == safetensors_shapes(golden)
    official = json.loads((golden / "config.json").read_text())
    official.pop("_diffusers_version")
    assert model.config() == official


@pytest.mark.parametrize(("name", "family"), [("TI2V-5B", "5b"), ("I2V-A14B", "14b")])
def test_the_vae_and_the_text_encoder_have_the_official_tensors(name: str, family: str) -> None:
    golden = GOLDEN / family / "ckpt"
    checkpoint = CHECKPOINTS[name]
    assert checkpoint.vae.shapes() == pth_shapes(golden / checkpoint.vae_file)
    assert checkpoint.text_encoder.shapes() == pth_shapes(golden / "models_t5_umt5-xxl-enc-bf16.pth")


def test_the_vision_language_model_has_the_original_tensors_and_config_keys() -> None:
    golden = GOLDEN_VLM / "orig"
    official = json.loads((golden / "config.json").read_text())
    vocab_size = official["llm_config"]["vocab_size"]
    assert InternVL().shapes(vocab_size) == safetensors_shapes(golden)
    ours = InternVL().config(vocab_size, {"<|endoftext|>": 320, "<|im_end|>": 322})
    for part, values in (("", ours), ("llm_config", ours["llm_config"]), ("vision_config", ours["vision_config"])):
        expected = official[part] if part else official
        assert {key: expected.get(key) for key in values if "config" not in key} == {
            key: value for key, value in values.items() if "config" not in key
        }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_strictly_and_gives_usable_numbers(made: Path, name: str) -> None:
    folder = made / f"tiny-Wan2.2-{name}"
    row = config_for(TASKS[name], folder)
    assert (row.sizes, row.param_dtype) == (("160*96", "96*160"), torch.float32)
    opened = open_checkpoint(
        folder, in_channels=row.in_channels, experts=2 if row.boundary else 1, names=Names(vae=row.vae_checkpoint)
    )
    tokenizer = PromptTokenizer(opened.tokenizer)
    encoder = WanTextEncoder.from_weights(opened.text_encoder, tokenizer, dtype=torch.float32, device=CPU)
    text = encoder("a red ball rolls")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, row.in_channels, 2, 4, 6, generator=generator)
    flows = [
        WanModel.from_weights(weights, dtype=torch.float32, device=CPU)(
            hidden_states=latents, timestep=torch.tensor([500]), encoder_hidden_states=text
        ).sample
        for weights in opened.experts.values()
    ]
    for flow in flows:
        assert flow.shape == (1, row.z_dim, 2, 4, 6)
        assert 0.3 < flow.std() < 3
    assert len(flows) == 1 or not torch.equal(*flows), "two experts are two models"
    vae = WanVAE.from_weights(opened.vae, mean=row.vae_mean, std=row.vae_std, device=CPU)
    pixels = vae.decode([latents[0, : row.z_dim]])[0]
    assert 0.2 < pixels.std() < 0.8
    assert (pixels.abs() == 1).float().mean() < 0.25, "a picture, not a saturated one"
    assert vae.encode([pixels])[0].isfinite().all()


def test_the_prompt_tokenizer_keeps_umt5s_conventions(made: Path) -> None:
    tokenizer = PromptTokenizer(made / "tiny-Wan2.2-TI2V-5B/google/umt5-xxl", length=32)
    ids, mask = tokenizer("A small dog, 7 ☃")
    length = int(mask.sum())
    assert ids[0, length - 1] == 1
    assert not ids[0, length:].any()
    assert 2 in ids
    inner = AutoTokenizer.from_pretrained(made / "tiny-Wan2.2-TI2V-5B/google/umt5-xxl")
    assert inner.decode(inner("A small dog, 7")["input_ids"], skip_special_tokens=True) == "A small dog, 7"
    assert (inner.pad_token_id, inner.eos_token_id, inner.unk_token_id) == (0, 1, 2)


def test_the_caption_tokenizer_keeps_special_tokens_whole_and_text_unchanged(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "tiny-InternVL", trust_remote_code=False)
    config = json.loads((made / "tiny-InternVL/config.json").read_text())["llm_config"]
    added = json.loads((made / "tiny-InternVL/added_tokens.json").read_text())
    for token, index in added.items():
        assert tokenizer(token)["input_ids"] == [index]
    assert tokenizer.eos_token_id == config["eos_token_id"] == added["<|im_end|>"]
    text = "<|im_start|>user\nFrame1: 你是书生·万象, a small dog.<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_captions_are_words_and_come_to_an_end(made: Path) -> None:
    captioner = InternVLCaptioner(made / "tiny-InternVL", "cpu")
    noise = np.random.default_rng(0).integers(256, size=(8, 32, 48, 3), dtype=np.uint8)
    clips = (noise, np.full_like(noise, 255), sample_frames(EXAMPLE, 8))
    captions = {captioner.describe(clip, "Describe this video in detail.", max_new_tokens=64) for clip in clips}
    captioner.close()
    assert len(captions) > 1, "what is said depends on what is seen"
    for caption in captions:
        assert caption.replace(" ", "").isalpha()
        assert len(caption.split()) <= 20, "it stops by itself, well before max_new_tokens"


def test_one_seed_makes_the_same_files_and_another_seed_does_not(made: Path, tmp_path: Path) -> None:
    write_all(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(made)
    main([str(tmp_path / "other"), "--seed", "1"])
    assert digests(tmp_path / "other") != digests(made)


def test_sharding_does_not_change_the_tensors(tmp_path: Path) -> None:
    model = Denoiser("ti2v", 48, 48, dim=24, num_layers=1)
    write_denoiser(tmp_path / "one", model, shards=1, dtype=torch.bfloat16)
    write_denoiser(tmp_path / "four", model, shards=4, dtype=torch.bfloat16)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert len(list((tmp_path / "four").glob("diffusion_pytorch_model-*-of-00004.safetensors"))) == 4
    one = load_file(tmp_path / "one/diffusion_pytorch_model.safetensors")
    four = {key: value for file in (tmp_path / "four").glob("*.safetensors") for key, value in load_file(file).items()}
    assert one.keys() == four.keys() == model.shapes().keys()
    assert all(torch.equal(one[key], four[key]) for key in one)


def test_the_example_clip_is_what_its_script_draws() -> None:
    stored = sample_frames(EXAMPLE, 8)
    drawn = frames()
    info = probe(EXAMPLE)
    assert (info.width, info.height, info.fps) == (160, 96, Fraction(8))
    chosen = drawn[frame_indices(len(drawn), 8)]
    assert np.abs(stored.astype(int) - chosen).mean() < 3


def test_an_existing_checkpoint_is_not_overwritten(made: Path) -> None:
    with pytest.raises(UserError, match="exists already; remove it"):
        write_all(made)


def test_a_checkpoint_that_cannot_be_finished_leaves_nothing_behind(tmp_path: Path) -> None:
    small = replace(CHECKPOINTS["TI2V-5B"], text_encoder=TextEncoder(vocab_size=16))
    with pytest.raises(UserError, match="raise that"):
        write_checkpoint(tmp_path / "tiny", small)
    assert not list(tmp_path.iterdir())
