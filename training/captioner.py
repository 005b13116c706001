"""Stage `captioner`: a small InternVL that says what moves where at the end of a clip.

It learns on clips that are drawn and, where the stages that encode clips or make chains have left some, on clips that
denoisers made: chains are made of such. It is asked for a description, and what `--prompt_mode continue` asks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from wan.captioner.next_prompt import AGAIN, IDENTITY_QUESTION, Memory, next_prompt_question
from wan.prompting import RECENT_SECONDS
from wan.types import frame_indices

SEGMENTS = 8
SEEN = "seen"  # folder of the clips that denoisers made
LENGTHS = (9, 17, 17, 33)  # frames of the clips that are described
IGNORED = -100
HELD = {"cuda": 24_000, "cpu": 16}  # clips of either kind, drawn and made, 0.3 MB each
KINDS_COUNT = 3  # times as much as other words: chains go wrong where a kind is called by another's name
HIDDEN = 0.08  # of shapes that a picture lacks
MOST_ANSWERS = 200_000  # whose tokens are kept
Told = dict[str, list[str]]  # of one clip: its caption `now`, those of the clips `before` it, oldest first, and `names`

Ask = Callable[[Told], tuple[list[int] | str, str]]  # a question, in words or tokens, and its answer


def train_captioner(settings: Settings) -> None:
    """Train the captioner; its checkpoint also holds how many held-out captions are right to the last word.

    And how many kinds it takes from what is said to stay, where pictures show others (`kept`).
    """
    torch.manual_seed(settings.seed)
    tokenizer, ids = caption_tokenizer(settings.folder / "caption_tokenizer")
    model = build_captioner(CAPTIONER, ids).to(settings.device)
    progress = resume("captioner", model, settings)
    asked = Conversations(tokenizer, ids, settings)
    weights = torch.ones(model.lm_head.out_features, device=settings.device)
    kinds = [index for shape in scenes.SHAPES for index in tokenizer(f" {shape}").input_ids]
    weights[kinds] = KINDS_COUNT

    def loss_of(batch: Batch) -> Tensor:
        logits = answer_logits(model, batch, ids["<IMG_CONTEXT>"]).flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten(), weights, ignore_index=IGNORED)

    def finish() -> dict[str, Any]:
        world = scenes.sample(256, settings.generator(HELD_OUT))
        other = misread(world, settings.generator(HELD_OUT))

        def right_in(shown: scenes.Scenes, ask: Ask) -> tuple[Tensor, Tensor]:
            batch = asked.rows(asked.pictures(shown, 17), told_of(world, 0), ask)
            with torch.no_grad():
                return answer_logits(model, batch, ids["<IMG_CONTEXT>"]).argmax(-1) == batch["labels"], batch["labels"]

        right, labels = right_in(world, asked.describe)
        kept, expected = right_in(other, asked.remembering)
        of_kinds = torch.isin(expected, torch.tensor(kinds, device=expected.device))
        return {
            "exact": float((right | (labels == IGNORED)).all(1).float().mean()),
            "kept": float(kept[of_kinds].float().mean()),
        }

    train("captioner", model, loss_of, asked.stream(progress.steps), replace(settings, graph=False), progress, finish)


def told_of(world: scenes.Scenes, time: int) -> list[Told]:
    """What there is to say of each scene at that moment."""
    clips = [world.captions(time - back) for back in (48, 32, 16, 0)]
    rows = zip(*clips, world.names(), strict=True)
    return [{"now": [now], "before": list(before), "names": names} for *before, now, names in rows]


def misread(world: scenes.Scenes, generator: torch.Generator) -> scenes.Scenes:
    """The same scenes with other kinds of about half of the shapes that do not turn, and without a few of all shapes.

    Pictures late in a chain may be so. What is lost comes back only if the next prompt names what was.
    """
    slots, device = world.shape.shape, world.shape.device
    changed, hidden = torch.rand(2, *slots, generator=generator, device=device)
    other = torch.randint(1, len(scenes.SHAPES), slots, generator=generator, device=device)
    shape = torch.where((changed < 0.5) & (world.spin == 0), (world.shape + other) % len(scenes.SHAPES), world.shape)
    return replace(world, shape=shape, present=world.present & (hidden > HIDDEN))


class Pool:
    """Clips on the device, the newest in place of the oldest: levels uint8 [N, n, 3, S, S] and what to say of them."""

    def __init__(self, most: int) -> None:
        self.most, self.place = most, 0
        self.levels: Tensor | None = None
        self.told: list[Told] = []

    def put(self, levels: Tensor, told: list[Told], device: torch.device) -> None:
        for start in range(0, len(told), self.most):
            part, answers = levels[start : start + self.most].to(device), told[start : start + self.most]
            if self.levels is None:
                self.levels = torch.empty(self.most, *part.shape[1:], dtype=torch.uint8, device=device)
            if self.place + len(answers) > self.most:
                self.place = 0
            self.levels[self.place : self.place + len(answers)] = part
            self.told[self.place : self.place + len(answers)] = answers
            self.place += len(answers)

    def take(self, count: int, draw: random.Random) -> tuple[Tensor, list[Told]]:
        """That many at random, some of them perhaps twice."""
        assert self.levels is not None
        which = [draw.randrange(len(self.told)) for _ in range(count)]
        return self.levels[torch.tensor(which, dtype=torch.long, device=self.levels.device)], [
            self.told[index] for index in which
        ]


class Conversations:
    """Clips, questions and answers, as the captioner's loader lays them out."""

    def __init__(self, tokenizer: Any, ids: dict[str, int], settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.device = settings.device
        self.draw = random.Random(settings.seed)
        self.end, self.pad = ids[TURN_END], ids["<|endoftext|>"]
        self.words = [index for token, index in ids.items() if not token.startswith("<")]
        slot = f"<img>{'<IMG_CONTEXT>' * tokens_per_frame()}</img>"
        video = number_frames([slot] * SEGMENTS, "")
        self.before = [
            self._encode([f"{system}<|im_start|>user\n{video}"])[0]
            for system in (f"<|im_start|>system\n{SYSTEM}{TURN_END}\n", "")
        ]
        self.question = self._encode([QUESTION])[0]
        self.after = self._encode([f"{TURN_END}\n<|im_start|>assistant\n"])[0]
        self.drawn, self.made = Pool(HELD[self.device.type]), Pool(HELD[self.device.type])
        self.taken: set[Path] = set()
        self.answers: dict[str, list[int]] = {}  # most come again and again

    def stream(self, step: int) -> Iterator[Batch]:
        """Batches for ever: of eight, five ask for descriptions and three, with fewer rows, what `continue` asks.

        In one of those the pictures show other kinds than those that are said to stay.
        """
        self.draw.seed((self.settings.seed << 32) + step)
        generator, batch = self.settings.generator(step), self.settings.batch
        lengths = [length for length in LENGTHS for _ in range(4)]
        while True:
            for number, frames in enumerate(lengths):
                fresh = scenes.sample(batch if not self.drawn.told else max(1, batch // 8), generator, hard=True)
                self.drawn.put(self.levels(fresh, frames), told_of(fresh, 0), self.device)
                if number % 4 == 0:
                    self._take_made()
                ask = {3: self.identity, 5: self.remembering, 7: self.following}.get(number % 8, self.describe)
                count = batch if ask == self.describe else max(1, batch // 4)
                if ask == self.remembering:
                    world = scenes.sample(count, generator, hard=True)
                    levels, told = self.levels(misread(world, generator), frames), told_of(world, 0)
                else:
                    levels, told = self._mixed(count)
                yield self.rows(normalised(levels / 255), told, ask)

    def _mixed(self, count: int) -> tuple[Tensor, list[Told]]:
        """Half of the clips drawn and half made by denoisers, if there are any."""
        if not self.made.told:
            return self.drawn.take(count, self.draw)
        (one, first), (other, second) = (
            self.drawn.take(count - count // 2, self.draw),
            self.made.take(count // 2, self.draw),
        )
        return torch.cat([one, other]), first + second

    def _take_made(self) -> None:
        """The newest file of clips that denoisers made and that was not read yet."""
        new = {*(self.settings.folder / SEEN).glob("*/[0-9]*.pt")} - self.taken
        if new:
            file = max(new, key=lambda file: file.stat().st_mtime)
            self.taken.add(file)
            pool = load(file)
            self.made.put(pool["levels"], pool["told"], self.device)

    def levels(self, world: scenes.Scenes, frames: int) -> Tensor:
        """What these scenes look like over that many frames up to moment 0, as the captioner sees them."""
        times = torch.tensor(frame_indices(frames, SEGMENTS), device=self.device) - (frames - 1)
        return as_levels(world.draw(times).transpose(1, 2)).byte()

    def pictures(self, world: scenes.Scenes, frames: int) -> Tensor:
        return normalised(self.levels(world, frames) / 255)

    def describe(self, told: Told) -> tuple[list[int] | str, str]:
        """A question and its answer; half of the questions are nonsense, since the answer is always the same."""
        if self.draw.random() < 0.5:
            return self.question, told["now"][0]
        return self.draw.choices(self.words, k=self.draw.randrange(80)), told["now"][0]

    def identity(self, told: Told) -> tuple[list[int] | str, str]:
        """What stays the same, which `--prompt_mode continue` asks first."""
        return IDENTITY_QUESTION + self._again(), identity_answer(told["names"])

    def remembering(self, told: Told) -> tuple[list[int] | str, str]:
        """What happens next, where what stays the same is known."""
        return self._next(told, True)

    def following(self, told: Told) -> tuple[list[int] | str, str]:
        """What happens next, as it is asked within a chain: what went before is in the question."""
        return self._next(told, self.draw.random() < 0.9)

    def _next(self, told: Told, known: bool) -> tuple[list[int] | str, str]:
        names, clip = told["names"], self.draw.randrange(1, 13)
        memory = Memory(
            identity=f"{', '.join(names)}." if known else told["before"][-1],
            subject=names[0] if known else "",
            camera=self.draw.choice(CAMERAS) if clip > 1 else "",
            prompts=tuple(map(self._perhaps_astray(), told["before"][-min(3, clip - 1) :])) if clip > 1 else (),
        )
        apart = RECENT_SECONDS / (SEGMENTS - 1)
        question = next_prompt_question(
            [apart * (index + 1 - SEGMENTS) for index in range(SEGMENTS)],
            self._motion(),
            memory,
            "",
            clip,
            self.draw.randrange(clip, 13),
            scenes.FRAMES / scenes.FPS,
            self.draw.random() < 0.1,
        )
        return question + self._again(), next_answer(told["now"][0])

    def _again(self) -> str:
        return AGAIN.format(reasons=self.draw.choice(FAULTS)) if self.draw.random() < 0.3 else ""

    def _perhaps_astray(self) -> Callable[[str], str]:
        """Half of the time, captions whose shapes move in other ways: where one goes is for the pictures to say.

        With true ones alone the captioner goes by what was said before, and passes an error on from clip to clip.
        """
        if self.draw.random() < 0.5:
            return str
        return lambda caption: WAYS.sub(lambda _: self.draw.choice(ANY_WAY), caption)

    def _motion(self) -> str:
        """A sentence on motion as it is measured, true or not: what the pictures show counts."""
        draw = self.draw
        ways = ["right", "left", "up", "down", "up and to the right", "down and to the left"]
        main = (
            f"the main motion goes {draw.choice(ways)} at about {draw.randrange(2, 40)} % of the width per second, in "
        )
        main += draw.choice(["a small part of the picture", f"about {draw.randrange(5, 20)} % of the picture"])
        first = draw.choice([main, main, "what moves goes in different directions", "nothing moves by itself"])
        camera = draw.choice(
            [
                "is still",
                "is still",
                f"moves {draw.choice(ways)} at about {draw.randrange(2, 40)} % of the width per second",
            ]
        )
        return f"{first}; the camera {camera}"

    def rows(self, pictures: Tensor, told: list[Told], ask: Ask) -> Batch:
        """Pictures [B, n, 3, S, S], ids [B, L], labels [B, A] and where [B, A] the tokens before them stand."""
        asked, replies = zip(*map(ask, told), strict=True)
        in_words = [question for question in asked if isinstance(question, str)]
        encoded = iter(self._encode(in_words) if in_words else [])
        if new := [answer for answer in dict.fromkeys(replies) if answer not in self.answers]:
            if len(self.answers) > MOST_ANSWERS:
                self.answers.clear()
                new = list(dict.fromkeys(replies))
            self.answers |= zip(new, ([*answer, self.end] for answer in self._encode(new)), strict=True)
        answers = [self.answers[answer] for answer in replies]
        rows = []
        for question, answer in zip(asked, answers, strict=True):
            before = self.before[self.draw.random() < 0.125]
            rows.append([*before, *(next(encoded) if isinstance(question, str) else question), *self.after, *answer])
        length, answered = max(map(len, rows)), max(map(len, answers))
        # Padded behind: attention is causal, so no token of a row sees its padding, and none needs a mask. Rows padded
        # in front have tokens that may look at nothing; a softmax over nothing is NaN.
        ids = torch.from_numpy(np.array([row + [self.pad] * (length - len(row)) for row in rows]))
        labels = torch.from_numpy(np.array([row + [IGNORED] * (answered - len(row)) for row in answers]))
        first = torch.tensor([len(row) - len(answer) - 1 for row, answer in zip(rows, answers, strict=True)])
        where = (first[:, None] + torch.arange(answered)).clamp_max(length - 1)
        return {
            "pictures": pictures,
            "ids": ids.to(self.device),
            "labels": labels.to(self.device),
            "where": where.to(self.device),
        }

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts).input_ids
        return ids


ANY_WAY = ("moves right", "moves left", "moves up", "moves down", "stays in place")
WAYS = re.compile("|".join(ANY_WAY))
CAMERAS = ("static", "pans left", "pans right")
FAULTS = (
    "the prompt says the same as the one before",
    '"subject" must have 1 to 8 words',
    "it is not a text in words",
)


def identity_answer(names: list[str]) -> str:
    """What the captioner says to IDENTITY_QUESTION."""
    return f'{{"subject": "{names[0]}", "identity": "{", ".join(names)}."}}'


def next_answer(caption: str) -> str:
    """What the captioner says to PROMPT_QUESTION: in this world what goes on is what a description says."""
    camera = next((camera for camera in CAMERAS if camera in caption), CAMERAS[0])
    return f'{{"prompt": "{caption}", "camera": "{camera}"}}'


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
