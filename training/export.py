"""Stages `export` and `import`: the trained models into the official folder layouts, and back.

tiny-Wan2.2-TI2V-5B   dit5b, vae22, text
tiny-Wan2.2-I2V-A14B  dit14b_high, dit14b_low, vae21, text
tiny-InternVL         captioner
tiny-loras            turbo5b, turbo14b_high, turbo14b_low

Weights are stored in bf16, but for the matrices of the denoisers' blocks, which are in fp8.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.tiny_checkpoint import (
    CHECKPOINTS,
    Denoiser,
    new_folder,
    write_json,
    write_shards,
)
from training import family, scenes
from training.denoiser import STAGES
from training.distillation import read_loras, write_loras
from training.family import CAPTIONER, DENOISERS, TEXT, VAES, library, official
from training.loop import load, save

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
EXPERTS = {"dit5b": ".", "dit14b_high": "high_noise_model", "dit14b_low": "low_noise_model"}  # where they lie
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
_WAN = "tiny-Wan2.2-TI2V-5B"
NEEDS = {
    "tiny-Wan2.2-TI2V-5B": ("dit5b", "vae22", "text"),
    "tiny-Wan2.2-I2V-A14B": ("dit14b_high", "dit14b_low", "vae21", "text"),
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
    return made + write_loras(runs, models / "tiny-loras")


def _write_wan(folder: Path, kind: str, trained: Mapping[str, Any], tokenizer: Path) -> None:
    layout = CHECKPOINTS[kind]
    for stage, expert in EXPERTS.items():
        if stage in trained:
            _write_denoiser(folder / expert, DENOISERS[STAGES[stage].sizes], trained[stage]["weights"])
    vae = next(stage for stage in trained if stage in VAES)
    state, sizes = trained[vae], VAES[vae]
    torch.save(official(state["weights"], family.vae_names(sizes), sizes.shapes()), folder / layout.vae_file)
    text = official(trained["text"]["weights"], family.text_names(TEXT), TEXT.shapes())
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(tokenizer, folder / "google/umt5-xxl")
    statistics = {f"vae_{key}": [round(value, 5) for value in state[key]] for key in ("mean", "std")}
    write_json(folder / "wan_config.json", {**DECLARED, **statistics})


def _write_denoiser(folder: Path, model: Denoiser, weights: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config())
    shapes = model.shapes()
    tensors = official(weights, family.denoiser_names(model), shapes)

    def stored(name: str) -> Tensor:
        tensor: Tensor = tensors[name]
        return tensor.to(torch.float8_e4m3fn) if family.in_fp8(name, len(shapes[name])) else tensor

    write_shards(folder, "diffusion_pytorch_model", shapes, 1, torch.bfloat16, stored)


def _write_captioner(folder: Path, weights: Mapping[str, Tensor], tokenizer: Path) -> None:
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    _, ids = family.caption_tokenizer(folder)
    vocabulary = family.caption_vocabulary(ids)
    write_json(folder / "config.json", CAPTIONER.config(vocabulary, ids))
    write_json(folder / "generation_config.json", {"_from_model_config": True})
    shapes = CAPTIONER.shapes(vocabulary)
    tensors = official(weights, family.captioner_names(CAPTIONER, vocabulary), shapes)
    write_shards(folder, "model", shapes, 1, torch.bfloat16, lambda name: tensors[name])


def import_models(models: Path, runs: Path) -> list[str]:
    """Checkpoints of all that is in the folders and of the sizes that are trained here; returns their stages.

    A checkpoint that is there already stays.
    """
    made = []
    for stage, parts in _exported(models):
        path = runs / f"{stage}.pt"
        if path.is_file():
            log.info("%s is there already", path)
            continue
        save(path, {"steps": 0, "seconds": 0.0, "losses": [], **parts})
        made.append(stage)
    for folder, name in (("tiny-InternVL", "caption_tokenizer"), (f"{_WAN}/google/umt5-xxl", "prompt_tokenizer")):
        if (models / folder).is_dir() and not (runs / name).is_dir():
            wanted = [file for file in (models / folder).iterdir() if file.name in TOKENIZER]
            (runs / name).mkdir(parents=True)
            for file in wanted:
                shutil.copy(file, runs / name)
    log.info("%s: %s from %s", runs, ", ".join(made) or "nothing", models)
    return made


def _exported(models: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stage by stage, what its checkpoint holds of the exported model."""
    for stage, factors in read_loras(models / "tiny-loras"):
        yield stage, {"weights": factors}
    for name, stages in NEEDS.items():
        folder = models / name
        if not folder.is_dir():
            continue
        if name == "tiny-InternVL":
            vocabulary = family.caption_vocabulary(family.caption_tokenizer(folder)[1])
            names = family.captioner_names(CAPTIONER, vocabulary)
            yield "captioner", {"weights": library(load_file(folder / "model.safetensors"), names)}
            continue
        for stage in stages:
            if stage in VAES:
                stored = load(folder / CHECKPOINTS[name.removeprefix("tiny-Wan2.2-")].vae_file)
                told = json.loads((folder / "wan_config.json").read_text(encoding="utf-8"))
                weights = library(stored, family.vae_names(VAES[stage]), family.build_vae(VAES[stage]))
                yield stage, {"weights": weights, "mean": told["vae_mean"], "std": told["vae_std"]}
            elif stage == "text":
                stored = load(folder / "models_t5_umt5-xxl-enc-bf16.pth")
                weights = library(stored, family.text_names(TEXT))
                yield stage, {"weights": weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}}
            else:
                sizes = DENOISERS[STAGES[stage].sizes]
                stored = load_file(folder / EXPERTS[stage] / "diffusion_pytorch_model.safetensors")
                if {key: tuple(value.shape) for key, value in stored.items()} != sizes.shapes():
                    log.warning("%s in %s is of other sizes and is not gone on with", stage, folder)
                    continue
                yield stage, {"weights": library(stored, family.denoiser_names(sizes))}
