"""Stage `export`: the trained models into the official folder layouts, weights in bf16.

tiny-Wan2.2-TI2V-5B   dit5b, vae22, text
tiny-Wan2.2-I2V-A14B  dit14b, vae21, text
tiny-InternVL         captioner
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.tiny_checkpoint import (
    CHECKPOINTS,
    Denoiser,
    new_folder,
    write_json,
    write_shards,
)
from training import family, scenes
from training.family import CAPTIONER, DENOISERS, TEXT, VAES, official
from training.loop import load

log = logging.getLogger(__name__)
# What both tiny checkpoints say of themselves. The guidance is low, because the captions leave little to exaggerate.
DECLARED: Mapping[str, Any] = {
    "sizes": [f"{scenes.WIDTH}*{scenes.HEIGHT}"],
    "frame_num": scenes.FRAMES,
    "sample_fps": scenes.FPS,
    "sample_steps": 12,
    "sample_shift": 3.0,
    "sample_guide_scale": 3.0,
    "param_dtype": "float32",
    "t5_dtype": "float32",
}
NEEDS = {
    "tiny-Wan2.2-TI2V-5B": ("dit5b", "vae22", "text"),
    "tiny-Wan2.2-I2V-A14B": ("dit14b", "vae21", "text"),
    "tiny-InternVL": ("captioner",),
}


def export(runs: Path, models: Path) -> list[Path]:
    """Every folder whose parts are trained, in place of an older one; returns them and says what the others lack."""
    made = []
    for name, stages in NEEDS.items():
        missing = [stage for stage in stages if not (runs / f"{stage}.pt").is_file()]
        if missing:
            log.warning("%s: not exported, %s is not trained", name, " and ".join(missing))
            continue
        trained = {stage: load(runs / f"{stage}.pt") for stage in stages}
        complete = models / f".{name}.new"
        shutil.rmtree(complete, ignore_errors=True)
        with new_folder(complete) as folder:
            if name == "tiny-InternVL":
                _write_captioner(folder, trained["captioner"]["weights"], runs / "caption_tokenizer")
            else:
                _write_wan(folder, name.removeprefix("tiny-Wan2.2-"), trained, runs / "prompt_tokenizer")
        shutil.rmtree(models / name, ignore_errors=True)
        complete.rename(models / name)
        made.append(models / name)
        size = sum(file.stat().st_size for file in made[-1].rglob("*") if file.is_file())
        log.info("%s: %.1f MB", made[-1], size / 1e6)
    return made


def _write_wan(folder: Path, kind: str, trained: Mapping[str, Any], tokenizer: Path) -> None:
    layout = CHECKPOINTS[kind]
    dit, vae = next(stage for stage in trained if stage in DENOISERS), next(stage for stage in trained if stage in VAES)
    weights = trained[dit]["weights"]
    for expert in layout.experts:
        prefix = "" if expert == "." else f"{expert.partition('_')[0]}."  # `high_noise_model` was trained as `high`
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        _write_denoiser(folder / expert, DENOISERS[dit], own)
    found, sizes = trained[vae], VAES[vae]
    torch.save(official(found["weights"], family.vae_names(sizes), sizes.shapes()), folder / layout.vae_file)
    text = official(trained["text"]["weights"], family.text_names(TEXT), TEXT.shapes())
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(tokenizer, folder / "google/umt5-xxl")
    statistics = {f"vae_{key}": [round(value, 5) for value in found[key]] for key in ("mean", "std")}
    write_json(folder / "wan_config.json", {**DECLARED, **statistics})


def _write_denoiser(folder: Path, model: Denoiser, weights: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config())
    shapes = model.shapes()
    tensors = official(_library_names(weights), family.denoiser_names(model), shapes)
    write_shards(folder, "diffusion_pytorch_model", shapes, 1, torch.bfloat16, lambda name: tensors[name])


def _write_captioner(folder: Path, weights: Mapping[str, Tensor], tokenizer: Path) -> None:
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    _, ids = family.caption_tokenizer(folder)
    vocabulary = family.caption_vocabulary(ids)
    write_json(folder / "config.json", CAPTIONER.config(vocabulary, ids))
    write_json(folder / "generation_config.json", {"_from_model_config": True})
    shapes = CAPTIONER.shapes(vocabulary)
    tensors = official(weights, family.captioner_names(CAPTIONER, vocabulary), shapes)
    write_shards(folder, "model", shapes, 1, torch.bfloat16, lambda name: tensors[name])


def _library_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the mark that compiling a block leaves in its parameters' names."""
    return {key.replace("._orig_mod", ""): value for key, value in weights.items()}
