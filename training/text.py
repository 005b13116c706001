"""Stage `text`: a UMT5 encoder whose every token knows the phrase that it stands in.

The denoisers look at it with few layers of cross-attention. So the word "red" should already carry where the red shape
goes; that is what the encoder is trained to tell, with heads that are thrown away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from tests.support.tiny_checkpoint import write_prompt_tokenizer
from training import scenes
from training.family import PROMPT_WORDS, TEXT, build_text_encoder
from training.loop import Batch, Settings, load, resume, train
from training.vae import HELD_OUT
from wan.captioner.next_prompt import KEEP
from wan.text.umt5 import PromptTokenizer

LENGTH = 64  # tokens of the longest caption and more
PREFIX = "continue video"  # what a chain puts before each description, unless it is told otherwise
FACTS: tuple[tuple[str, ...], ...] = (
    tuple(scenes.COLOURS),
    scenes.SHAPES,
    tuple(scenes.DIRECTIONS),
    tuple(filter(None, scenes.MODES)),
    ("still", "pans left", "pans right"),
)


def prompt_tokenizer(settings: Settings, length: int = LENGTH) -> PromptTokenizer:
    """The prompt tokenizer, made in the training folder if it is not there."""
    folder = settings.folder / "prompt_tokenizer"
    if not folder.is_dir():
        write_prompt_tokenizer(folder, TEXT.vocab_size, PROMPT_WORDS)
    return PromptTokenizer(folder, length)


def train_text(settings: Settings) -> None:
    """Train the text encoder; its checkpoint also holds how many facts its tokens know on held-out captions."""
    torch.manual_seed(settings.seed)
    tokenizer = prompt_tokenizer(settings)
    model = build_text_encoder(TEXT).to(settings.device)
    progress = resume("text", model, settings)
    heads = nn.Linear(TEXT.dim, sum(len(options) + 1 for options in FACTS)).to(settings.device)
    both = nn.ModuleDict({"model": model, "heads": heads})

    def told(batch: Batch) -> list[tuple[Tensor, Tensor]]:
        rows = model(input_ids=batch["ids"], attention_mask=batch["mask"]).last_hidden_state
        parts = heads(rows).split([len(options) + 1 for options in FACTS], dim=-1)
        return list(zip(parts, batch["facts"].unbind(-1), strict=True))

    def loss_of(batch: Batch) -> Tensor:
        pairs = told(batch)
        return sum((F.cross_entropy(s.flatten(0, 1), f.flatten(), ignore_index=-1) for s, f in pairs), torch.zeros(()))

    def finish() -> dict[str, Any]:
        batch = next(batches(tokenizer, settings, HELD_OUT))
        with torch.no_grad():
            right = [(scores.argmax(-1) == fact)[fact >= 0].float().mean() for scores, fact in told(batch)]
        return {"known": float(torch.stack(right).mean()), "weights": model.state_dict()}

    train(
        "text",
        both,
        loss_of,
        batches(tokenizer, settings, progress.steps),
        replace(settings, graph=False),
        progress,
        finish,
    )


def train_ending(settings: Settings) -> None:
    """Teach a trained text encoder the sentence that `continue` ends prompts with: a word of its own, and that alone.

    Denoisers know the encoder as it is, so nothing else of it changes: with the ending, the tokens of a caption should
    be what they are without. The checkpoint also holds how far they are from that, relative to their own size.
    """
    folder = settings.folder / "prompt_tokenizer"
    index = add_word(folder, KEEP)
    tokenizer = PromptTokenizer(folder, LENGTH)
    torch.manual_seed(settings.seed)
    model = build_text_encoder(TEXT).to(settings.device)
    progress = resume("text", model, settings)
    model.requires_grad_(False)
    words = model.get_input_embeddings().weight
    ending = nn.ParameterDict({"row": words.mean(0)})

    def encoded(ids: Tensor, mask: Tensor) -> Tensor:
        embedded = torch.where((ids == index)[..., None], ending["row"], words[ids])
        hidden: Tensor = model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return hidden

    def loss_of(batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = encoded(batch["plain_ids"], batch["plain_mask"])
        made = encoded(batch["ended_ids"], batch["ended_mask"])
        among = batch["plain_mask"].bool() & batch["plain_mask"].roll(-1, 1).bool()  # all but </s>
        return (made - wanted)[among].square().mean() / wanted[among].square().mean()

    def stream(step: int) -> Iterator[Batch]:
        generator = settings.generator(step)
        while True:
            captions = as_prompts(scenes.sample(settings.batch, generator).captions(), generator)
            batch: Batch = {}
            for name, end in (("plain", ""), ("ended", f" {KEEP}")):
                rows = [tokenizer(caption + end) for caption in captions]
                ids, mask = (torch.cat(parts).to(settings.device) for parts in zip(*rows, strict=True))
                batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
            yield batch

    def finish() -> dict[str, Any]:
        with torch.no_grad():
            apart = float(loss_of(next(stream(HELD_OUT))))
            words[index] = ending["row"]
        return {"apart": apart, "weights": model.state_dict()}

    train("text", ending, loss_of, stream(progress.steps), replace(settings, graph=False), progress, finish)


def add_word(folder: Path, text: str) -> int:
    """The id of a text that the prompt tokenizer in a folder takes for one word; from now on, if it did not."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, lstrip=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    index = tokenizer.token_to_id(text)
    if index is None or index >= TEXT.vocab_size:
        raise ValueError(f"{text!r} is word {index} and the text encoder has {TEXT.vocab_size}")
    return index


def batches(tokenizer: PromptTokenizer, settings: Settings, step: int) -> Iterator[Batch]:
    generator = settings.generator(step)
    while True:
        captions = as_prompts(scenes.sample(settings.batch, generator).captions(), generator)
        rows = [tokenizer(caption) for caption in captions]
        ids, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
        facts = torch.stack([facts_of(tokenizer, caption, row) for caption, row in zip(captions, ids, strict=True)])
        batch = {"ids": ids, "mask": mask, "facts": facts}
        yield {key: value.to(settings.device) for key, value in batch.items()}


def as_prompts(captions: list[str], generator: torch.Generator) -> list[str]:
    """Captions as the command lines make prompts of them: half with the words of a chain before them."""
    first = torch.rand(len(captions), generator=generator, device=generator.device) < 0.5
    return [f"{PREFIX} {caption}" if is_first else caption for caption, is_first in zip(captions, first, strict=True)]


def facts_of(tokenizer: PromptTokenizer, caption: str, ids: Tensor) -> Tensor:
    """For each token [L], what its phrase says about each of FACTS: the option, 0 for none, -1 after the end."""
    facts = torch.full((len(ids), len(FACTS)), -1)
    tokens = tokenizer._tokenizer.convert_ids_to_tokens(ids.tolist())
    phrases = re.split("[,;]", caption)
    # the camera's direction is no direction of a shape
    told = [
        [_option(phrase, options) if ("camera" in phrase) == (index == 4) else 0 for index, options in enumerate(FACTS)]
        for phrase in phrases
    ]
    place = 0
    for position, token in enumerate(tokens):
        if token in ("</s>", "<pad>"):
            break
        facts[position] = torch.tensor(told[place])
        place += token in (",", ";")
    return facts


def _option(phrase: str, options: tuple[str, ...]) -> int:
    return next((1 + index for index, option in enumerate(options) if option in phrase), 0)


class Prompts:
    """A trained text encoder: prompts -> embeddings as the pipelines make them."""

    def __init__(self, settings: Settings) -> None:
        self.tokenizer = prompt_tokenizer(settings)
        self.model = build_text_encoder(TEXT)
        self.model.load_state_dict(load(settings.folder / "text.pt")["weights"])
        self.model.to(settings.device).requires_grad_(False).eval()
        self.device = settings.device

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """float32 [B, LENGTH, D], zeros after each text; the denoisers take 512 rows, the rest zeros too."""
        rows = [self.tokenizer(text) for text in texts]
        ids, mask = (torch.cat(parts).to(self.device) for parts in zip(*rows, strict=True))
        embedded: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return embedded * mask[..., None]
