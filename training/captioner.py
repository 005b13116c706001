"""Stage `captioner`: a small InternVL that says what moves where at the end of a clip.

Where a stage that encodes clips has made some with a denoiser, it learns on these too: chains are made of such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training import scenes
from training.family import CAPTIONER, QUESTION, build_captioner, caption_tokenizer
from training.loop import Batch, Settings, half_precision, load, resume, train
from training.vae import HELD_OUT
from wan.captioner.base import number_frames
from wan.captioner.frames import IMAGENET_MEAN, IMAGENET_STD
from wan.captioner.internvl import SYSTEM, TURN_END
from wan.types import frame_indices

SEGMENTS = 8
SEEN = "seen"  # folder of the clips that denoisers made
NEWEST = 100  # files of these
LENGTHS = (9, 17, 17, 33)  # frames of the clips that are described
IGNORED = -100


def train_captioner(settings: Settings) -> None:
    """Train the captioner; its checkpoint also holds how many held-out captions are right to the last word."""
    torch.manual_seed(settings.seed)
    tokenizer, ids = caption_tokenizer(settings.folder / "caption_tokenizer")
    model = build_captioner(CAPTIONER, ids).to(settings.device)
    progress = resume("captioner", model, settings)
    asked = Conversations(tokenizer, ids, settings)

    def loss_of(batch: Batch) -> Tensor:
        logits = answer_logits(model, batch, ids["<IMG_CONTEXT>"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    def finish() -> dict[str, Any]:
        batch = asked.batch(scenes.sample(256, settings.generator(HELD_OUT)), 17)
        with torch.no_grad():
            right = answer_logits(model, batch, ids["<IMG_CONTEXT>"]).argmax(-1) == batch["labels"]
        return {"exact": float((right | (batch["labels"] == IGNORED)).all(1).float().mean())}

    train("captioner", model, loss_of, asked.stream(progress.steps), replace(settings, graph=False), progress, finish)


class Conversations:
    """Clips, questions and answers, as the captioner's loader lays them out."""

    def __init__(self, tokenizer: Any, ids: dict[str, int], settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.device = settings.device
        self.end, self.pad = ids[TURN_END], ids["<|endoftext|>"]
        self.words = torch.tensor([index for token, index in ids.items() if not token.startswith("<")])
        slot = f"<img>{'<IMG_CONTEXT>' * tokens_per_frame()}</img>"
        video = number_frames([slot] * SEGMENTS, "")
        self.before = [
            self._encode(f"{system}<|im_start|>user\n{video}")
            for system in (f"<|im_start|>system\n{SYSTEM}{TURN_END}\n", "")
        ]
        self.question = self._encode(QUESTION)
        self.after = self._encode(f"{TURN_END}\n<|im_start|>assistant\n")

    def stream(self, step: int) -> Iterator[Batch]:
        generator = self.settings.generator(step)
        while True:
            for frames in LENGTHS:
                yield self.batch(scenes.sample(self.settings.batch, generator), frames)
                if made := self._made(generator):
                    yield made

    def _made(self, generator: torch.Generator) -> Batch | None:
        """Clips of one file that denoisers made, if there is any."""
        files = sorted((self.settings.folder / SEEN).glob("*/*.pt"), key=lambda file: file.name)[-NEWEST:]
        if not files:
            return None
        found = load(files[int(torch.randint(len(files), (), generator=generator, device=generator.device))])
        count = self.settings.batch
        return self.rows(normalised(found["levels"][:count].to(self.device) / 255), found["captions"][:count])

    def batch(self, batch: scenes.Scenes, frames: int) -> Batch:
        """What these scenes look like over that many frames, as `rows`."""
        times = torch.tensor(frame_indices(frames, SEGMENTS), device=self.device) - (frames - 1)
        return self.rows(as_pictures(batch.draw(times).transpose(1, 2)), batch.captions(0))

    def rows(self, pictures: Tensor, captions: list[str]) -> Batch:
        """Pictures [B, n, 3, S, S], ids [B, L], labels [B, A] and where [B, A] the tokens before them stand."""
        rows, answers = [], []
        for caption in captions:
            answers.append([*self._encode(caption), self.end])
            rows.append(self._prompt() + answers[-1])
        length, answer = max(map(len, rows)), max(map(len, answers))
        # Padded behind: attention is causal, so no token of a row sees its padding, and none needs a mask. Rows padded
        # in front have tokens that may look at nothing; a softmax over nothing is NaN.
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        labels = torch.tensor([row + [IGNORED] * (answer - len(row)) for row in answers])
        first = torch.tensor([len(row) - len(told) - 1 for row, told in zip(rows, answers, strict=True)])
        where = (first[:, None] + torch.arange(answer)).clamp_max(length - 1)
        return {
            "pictures": pictures,
            "ids": ids.to(self.device),
            "labels": labels.to(self.device),
            "where": where.to(self.device),
        }

    def _prompt(self) -> list[int]:
        """A prompt as the loader makes it; half of the questions are nonsense: the answer is always the same."""
        kind = int(torch.randint(8, ()))
        if kind < 4:
            question = self.question
        else:
            question = self.words[torch.randint(len(self.words), (int(torch.randint(80, ())),))].tolist()
        return self.before[kind == 7] + question + self.after

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text).input_ids
        return found


def answer_logits(model: Any, batch: Batch, image_token: int) -> Tensor:
    """Logits [B, A, vocabulary] for the tokens of each answer, given those before them."""
    pictures, ids = batch["pictures"], batch["ids"]
    with half_precision(ids.device):
        features = model.model.get_image_features(pictures.flatten(0, 1), return_dict=True).pooler_output
        features = features.reshape(len(ids), -1, features.shape[-1])
        embedded = model.get_input_embeddings()(ids)
        is_image = ids == image_token
        place = (is_image.cumsum(1) - 1).clamp_min(0)[..., None].expand(-1, -1, features.shape[-1])
        embedded = torch.where(is_image[..., None], features.gather(1, place).to(embedded.dtype), embedded)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        where = batch["where"][..., None].expand(-1, -1, hidden.shape[-1])
        logits: Tensor = model.lm_head(hidden.gather(1, where))
    return logits.float()


def as_pictures(frames: Tensor) -> Tensor:
    """Frames [..., 3, H, W] in [-1, 1] -> [..., 3, S, S] as the loader's preprocessing makes them of uint8 frames."""
    return normalised(as_levels(frames) / 255)


def as_levels(frames: Tensor) -> Tensor:
    """Frames [..., 3, H, W] in [-1, 1] -> the pixels [..., 3, S, S] of the captioner's pictures, whole numbers."""
    levels = ((frames.flatten(0, -4) + 1) * 127.5).round()
    size = (CAPTIONER.image_size, CAPTIONER.image_size)
    squashed = F.interpolate(levels, size=size, mode="bicubic", antialias=True).clamp(0, 255).round()
    return squashed.reshape(*frames.shape[:-2], *size)


def normalised(pictures: Tensor) -> Tensor:
    """Pictures [..., 3, S, S] in [0, 1] as the vision tower takes them."""
    mean, std = (torch.tensor(value, device=pictures.device)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (pictures - mean) / std


def tokens_per_frame() -> int:
    """Image tokens of one frame: patches of 14 pixels, four of which make a token."""
    return (CAPTIONER.image_size // 14 // 2) ** 2
