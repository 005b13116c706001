"""The training stages start, save themselves and go on; what they learn is measured on a GPU (training/LOG.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

from tests.support.golden import ROOT
from tests.support.tiny_checkpoint import write_prompt_tokenizer
from training import scenes
from training.captioner import IGNORED, Conversations, answer_logits
from training.denoiser import TEXT_ROWS, _forward, _new
from training.export import export
from training.family import (
    CAPTIONER,
    DENOISERS,
    PROMPT_WORDS,
    TEXT,
    VAES,
    build_captioner,
    build_denoiser,
    build_text_encoder,
    build_vae,
    caption_tokenizer,
)
from training.loop import Settings, save
from wan import WanV2V5B
from wan.configs import config_for


def train(stage: str, folder: Path) -> None:
    command = [sys.executable, "-m", "training", stage, "--folder", str(folder), "--steps", "2", "--batch", "1"]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", ["text", "vae22"])
def test_a_stage_goes_on_from_its_own_checkpoint(stage: str, tmp_path: Path) -> None:
    steps = []
    for _ in range(2):
        train(stage, tmp_path)
        found = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
        steps.append(found["steps"])
        assert all(torch.isfinite(value).all() for value in found["weights"].values())
    assert steps == [2, 4]


def test_trained_parts_become_a_folder_that_the_pipelines_load(tmp_path: Path) -> None:
    sizes, shapes = TEXT, VAES["vae22"].shapes()
    runs, models = tmp_path / "runs", tmp_path / "models"
    dit, vae, text = build_denoiser(DENOISERS["dit5b"]), build_vae(VAES["vae22"]), build_text_encoder(sizes)
    save(runs / "dit5b.pt", {"weights": dit.state_dict()})
    save(runs / "vae22.pt", {"weights": vae.state_dict(), "mean": [0.5] * 48, "std": [2.0] * 48})
    save(runs / "text.pt", {"weights": text.state_dict()})
    write_prompt_tokenizer(runs / "prompt_tokenizer", sizes.vocab_size, PROMPT_WORDS)
    [folder] = export(runs, models)
    assert folder == models / "tiny-Wan2.2-TI2V-5B"
    config = config_for("v2v-5B", folder)
    assert (config.vae_mean, config.vae_std, config.frame_num) == ((0.5,) * 48, (2.0,) * 48, 17)
    model = WanV2V5B(config, str(folder))
    loaded = model.model.state_dict()
    for name, value in dit.state_dict().items():
        torch.testing.assert_close(loaded[name].float(), value, rtol=1e-2, atol=1e-3)
    written = torch.load(folder / "Wan2.2_VAE.pth", weights_only=True)
    assert {key: tuple(value.shape) for key, value in written.items()} == shapes


def test_few_rows_of_zeros_train_the_model_that_sees_all_of_them(tmp_path: Path) -> None:
    settings = Settings(tmp_path, torch.device("cpu"), minutes=1, batch=2, rate=0.0)
    model = _new(settings, "dit5b")
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    plain = build_denoiser(DENOISERS["dit5b"])
    plain.load_state_dict(model.state_dict())
    text = torch.randn(2, 64, TEXT.dim)
    text[0, 20:] = 0
    latents, steps = torch.randn(2, 48, 2, 6, 10), torch.tensor([[0.0, 700.0], [300.0, 300.0]])
    with torch.no_grad():
        trained = _forward(model, latents, steps, text)
        used = plain(latents, steps, pad(text, (0, 0, 0, TEXT_ROWS - 64)), return_dict=False)[0]
    torch.testing.assert_close(trained, used, rtol=1e-4, atol=1e-4)


def test_an_answer_does_not_depend_on_the_padding_of_its_row(tmp_path: Path) -> None:
    settings = Settings(tmp_path, torch.device("cpu"), minutes=1, batch=3, rate=0.0)
    tokenizer, ids = caption_tokenizer(tmp_path / "caption_tokenizer")
    torch.manual_seed(0)
    model = build_captioner(CAPTIONER, ids).eval()
    batch = Conversations(tokenizer, ids, settings).batch(scenes.sample(3, settings.generator(0)), 9)
    together = answer_logits(model, batch, ids["<IMG_CONTEXT>"])
    for row in range(3):
        told = int((batch["labels"][row] != IGNORED).sum())
        end = int(batch["where"][row, told - 1]) + 2  # the last answer token stands after the one it is told from
        answer = batch["ids"][row, end - told : end]
        assert torch.equal(answer, batch["labels"][row, :told])
        alone = {
            "pictures": batch["pictures"][row : row + 1],
            "ids": batch["ids"][row : row + 1, :end],
            "where": batch["where"][row : row + 1, :told],
        }
        logits = answer_logits(model, alone, ids["<IMG_CONTEXT>"])
        torch.testing.assert_close(together[row, :told], logits[0], rtol=1e-4, atol=1e-4)
