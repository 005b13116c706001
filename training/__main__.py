"""Train one stage of the tiny family, or write the trained models into the official folders.

    python -m training vae21 --folder runs --minutes 5

Stages, each of which resumes from its own checkpoint in the folder: vae21, vae22, text and captioner stand alone, and
ending goes on with text; clips21 and clips22 encode clips with one of the VAEs and the text encoder; dit14b_high and
dit14b_low train on the clips of clips21, dit5b on those of clips22, which may go on beside it; chains21 and chains22
make chains with the denoisers, which the captioner learns from; turbo5b, turbo14b_high and turbo14b_low distil LoRAs on
the clips of their denoisers. `export` writes what is trained to --models, `import`
makes checkpoints of what is there, so that training can go on on any machine.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from training.captioner import train_captioner
from training.chains import MADE_BY, make_chains
from training.denoiser import STAGES as DENOISERS
from training.denoiser import train_denoiser
from training.distillation import TURBOS, train_turbo
from training.encoding import VAE_OF, encode_clips
from training.export import export, import_models
from training.loop import Settings
from training.text import train_ending, train_text
from training.vae import train_vae

STAGES: Mapping[str, tuple[Callable[[Settings], None], int, float]] = {  # what to call, batch, learning rate
    "vae21": (lambda settings: train_vae("vae21", settings), 16, 5e-4),
    "vae22": (lambda settings: train_vae("vae22", settings), 16, 5e-4),
    "text": (train_text, 64, 1e-3),
    "ending": (train_ending, 32, 1e-1),
    "captioner": (train_captioner, 64, 1e-3),
    **{name: (partial(make_chains, name), 128, 0.0) for name in MADE_BY},
    **{name: (partial(encode_clips, name), 256, 0.0) for name in VAE_OF},
    **{name: (partial(train_denoiser, name), 512, 1e-3) for name in DENOISERS},
    **{name: (partial(train_turbo, name), 512, 1e-2) for name in TURBOS},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "export", "import"])
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="checkpoints (default: runs)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="for export and import (default: models)")
    parser.add_argument("--minutes", type=float, default=5, help="wall clock to train for (default: 5)")
    parser.add_argument("--steps", type=int, help="stop after that many steps even if there is time left")
    parser.add_argument("--frames", type=int, help="4n+1 frames of a VAE's training clips; short ones first is quicker")
    parser.add_argument("--batch", type=int, help="clips per step (default: the stage's)")
    parser.add_argument("--rate", type=float, help="learning rate (default: the stage's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoder_only", action="store_true", help="a VAE's latents stay as they are")
    parser.add_argument("--compiler", help="back end of torch.compile for denoisers (default on a GPU: inductor)")
    parser.add_argument("--no_graph", action="store_true", help="launch kernels one by one, not as one CUDA graph")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.stage == "export":
        if not export(arguments.folder, arguments.models):
            parser.error(f"{arguments.folder} holds nothing that can be exported; train the stages first")
        return
    if arguments.stage == "import":
        if not import_models(arguments.models, arguments.folder):
            parser.error(f"{arguments.models} holds nothing of the sizes that are trained here")
        return
    train, batch, rate = STAGES[arguments.stage]
    settings = Settings(
        arguments.folder,
        torch.device(arguments.device),
        arguments.minutes,
        arguments.batch or batch,
        arguments.rate or rate,
        arguments.seed,
        decoder_only=arguments.decoder_only,
        graph=not arguments.no_graph,
        compiler=arguments.compiler or ("inductor" if arguments.device.startswith("cuda") else None),
    )
    if arguments.decoder_only and not arguments.stage.startswith("vae"):
        parser.error("--decoder_only is for the stages vae21 and vae22")
    if arguments.steps:
        settings = replace(settings, steps=arguments.steps)
    if arguments.frames:
        if not arguments.stage.startswith("vae") or arguments.frames % 4 != 1:
            parser.error("--frames is 4n+1, and for the stages vae21 and vae22 only")
        settings = replace(settings, frames=arguments.frames)
    train(settings)


if __name__ == "__main__":
    main()
