"""An InternVL3_5-8B of random weights made on the GPU, and the time of its captions; for `benchmarks.clip`.

    python -m benchmarks.captioning [--vlm FOLDER [--room GIB ...] [--tokens N] [--frames N]]
    python -m benchmarks.captioning --vlm FOLDER --loads

With `--vlm` a folder's captions: whole on the GPU, then with as much of it for its weights as each `--room` says, so
that the layers beyond come one by one. Layers that come so run other kernels, which round otherwise, so where the
words part the two must be about as likely: exits with 1 where one is not.

With `--loads` seconds and GB/s of loading the folder, files in the system's cache: twice by the library alone and twice
as a run does it. Exits with 1 where the numbers are not the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor

from benchmarks.real_size import materialise
from benchmarks.timing import timed
from wan.captioner import memory, weight_bytes, working_bytes
from wan.captioner.base import Pictures
from wan.captioner.decoding import ROUND, GreedyDecoder, fuse_norms
from wan.captioner.frames import pixels_of
from wan.captioner.internvl import InternVLCaptioner
from wan.device.hardware import peak_gib, reset_peak
from wan.options import QUESTION

FRAMES, TOKENS_PER_FRAME = 8, 256
WORDS, ANSWER = 110, 128  # tokens of the question with what stands around it, and of the answer
IMAGE = 151671
SIDE = memory.VISION["image_size"]
ABOUT_EQUAL = 0.3  # deviations of a row of logits: the library is up to 0.12 from one pass over all words
VISION = memory.VISION | {"num_hidden_layers": 24, "num_attention_heads": 16, "attention_bias": True}
TEXT = memory.TEXT | {"model_type": "qwen3", "vocab_size": 151936, "use_cache": True}


def build_vlm(device: torch.device, text: dict[str, Any] = TEXT, vision: dict[str, Any] = VISION) -> Any:
    """The model in bf16 on the device."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    with init_empty_weights():
        config = InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=TOKENS_PER_FRAME,
            tie_word_embeddings=False,
        )
        model = InternVLForConditionalGeneration(config)
    return fuse_norms(materialise(model, lambda name: torch.bfloat16, device))


class RandomCaptioner:
    """Stands for the captioner in a chain: as much work as a description of `ANSWER` tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model: Any = build_vlm(device)
        self.decoder: GreedyDecoder | None = None
        self.seconds: list[float] = []

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Token ids [1, L] of eight frames and a question, and pixels [8, 3, 448, 448]."""
        words = torch.arange(1000, 1000 + WORDS)
        ids = torch.cat([words[: WORDS // 2], torch.full((FRAMES * TOKENS_PER_FRAME,), IMAGE), words[WORDS // 2 :]])
        pixels = torch.randn(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        return ids[None].to(self.device), pixels.to(self.device, torch.bfloat16)

    def tokens(self, count: int) -> Tensor:
        """So many new tokens."""
        ids, pixels = self.inputs()
        if self.decoder is None:
            self.decoder = GreedyDecoder(self.model, ids.shape[1] + 512)
        return self.decoder(ids, pixels, count, None)

    def describe(self, frames: Pictures, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        """Other words every time, after the time that a caption takes."""
        self.seconds += timed(partial(self.tokens, ANSWER), self.device)
        return f"A ball rolls over a wooden floor while the camera follows it, for the {len(self.seconds)}th time."

    def close(self) -> None:
        """The chain keeps it: there is room for both."""


@torch.inference_mode()
def captions(device: torch.device) -> dict[str, Any]:
    """Seconds of a caption with what the first one sets up, and of later ones; the library's `generate` beside it."""
    captioner = RandomCaptioner(device)
    with patch("wan.captioner.decoding.fuse_projections"):
        captioner.tokens(ANSWER)
    apart = per_token(captioner, device)
    captioner.decoder = None
    reset_peak(device)
    (first,) = timed(lambda: captioner.tokens(ANSWER), device)
    alone, whole = (timed(partial(captioner.tokens, count), device)[0] for count in (1, ANSWER))
    ids, pixels = captioner.inputs()
    (vision,) = timed(lambda: captioner.model.model.get_image_features(pixels), device, warm=1)
    options = {"do_sample": False, "min_new_tokens": ANSWER, "max_new_tokens": ANSWER, "pad_token_id": 0}

    def library() -> Tensor:
        made: Tensor = captioner.model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **options
        )
        return made[0, ids.shape[1] :].cpu()

    theirs = timed(library, device, 2)
    recorded, decoder = captioner.tokens(ANSWER), captioner.decoder
    assert decoder is not None
    profile = kernels(decoder)
    words = library()[:ANSWER]
    whole_pass = torch.cat([ids, words[None].to(device)], dim=1)
    logits = captioner.model(input_ids=whole_pass, pixel_values=pixels).logits[0, ids.shape[1] - 1 : -1].float().cpu()
    ours = forced(decoder, ids, pixels, words)
    graph, decoder.graph = decoder.graph, None
    launched = captioner.tokens(ANSWER)
    return {
        "caption_first": round(first, 3),
        "caption": round(whole, 3),
        "prefill": round(alone, 3),
        "vision_in_it": round(vision, 4),
        "pictures_before_it": round(_pictures(), 3),
        "ms_per_token": round(1000 * (whole - alone) / (ANSWER - 1), 2),
        "ms_per_token_with_projections_apart": round(apart, 2),
        "library_caption": [round(taken, 3) for taken in theirs],
        "ms_per_token_library": round(1000 * (theirs[1] - alone) / (ANSWER - 1), 2),
        "recorded": graph is not None,
        "kernels": profile,
        "recorded_equals_launched": torch.equal(recorded, launched),
        # below the likeliest token of one pass over all of them, in deviations of its logits: ours, the library's
        "worst_choice": [round(worst_choice(logits, chosen), 3) for chosen in (ours, words)],
        "peak_gib": peak_gib(device),
    }


def per_token(captioner: RandomCaptioner, device: torch.device) -> float:
    """Milliseconds of each token after the first."""
    alone, whole = (timed(partial(captioner.tokens, count), device)[0] for count in (1, ANSWER))
    return 1000 * (whole - alone) / (ANSWER - 1)


def kernels(decoder: GreedyDecoder, tokens: int = 16) -> dict[str, Any]:
    """What runs on the GPU for a token, by the profiler: how many kernels, their milliseconds, the longest."""
    decoder.position.fill_(ROUND)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(tokens):
            decoder.advance()
        torch.cuda.synchronize()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    counts, times = Counter[str](), Counter[str]()
    for event in events:
        if "CUDA" in str(event.device_type()):
            counts[event.name()[:70]] += 1
            times[event.name()[:70]] += event.duration_ns() / 1e6
    return {
        "count": counts.total() / tokens,
        "ms": round(times.total() / tokens, 3),
        "longest": {name: (counts[name] / tokens, round(ms / tokens, 3)) for name, ms in times.most_common(16)},
    }


def _pictures() -> float:
    """Seconds in which the CPU makes frames of 832x480 what the vision tower takes."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (FRAMES, 480, 832, 3), np.uint8)
    return timed(lambda: pixels_of(frames, SIDE), torch.device("cpu"), warm=1)[0]


def forced(decoder: GreedyDecoder, ids: Tensor, pixels: Tensor, words: Tensor) -> Tensor:
    """What the decoder chooses at each token when those before it are given."""
    chosen = [int(decoder(ids, pixels, 1, None))]
    for word in words[:-1]:
        decoder.token.fill_(int(word))
        decoder.advance()
        chosen.append(int(decoder.token))
    return torch.tensor(chosen)


def worst_choice(logits: Tensor, chosen: Tensor) -> float:
    """The most that a chosen token's logit is below the highest, in standard deviations of its row."""
    below = logits.amax(1) - logits.gather(1, chosen[:, None])[:, 0]
    return float((below / logits.std(1)).max())


@torch.inference_mode()
def streamed(folder: Path, rooms: list[float], tokens: int, pictures: int, device: torch.device) -> bool:
    """A row for a VLM that is whole on the device and for each GiB that its weights may take there: the same words?"""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (pictures, 480, 832, 3), np.uint8)
    estimated = ((weight_bytes(folder) or 0) + working_bytes(folder, pictures)) / 2**30
    resident, right = 0.0, True
    for room in (None, *rooms):
        reset_peak(device)
        limit = None if room is None else partial(int, room * 2**30)
        captioner = InternVLCaptioner(folder, device, room=limit)
        begun = time.perf_counter()
        _ = captioner.model
        loaded = time.perf_counter() - begun
        ids, pixels = captioner.prepare(frames, QUESTION)
        captioner.generate(ids, pixels, tokens)  # sets up what the next ones find
        alone, taken = (timed(partial(captioner.generate, ids, pixels, count), device)[0] for count in (1, tokens))
        words, peak = captioner.generate(ids, pixels, tokens).cpu(), peak_gib(device)
        if room is None:
            first, resident = words, taken
            logits = one_pass(captioner, ids, pixels, words)
        same = int((words != first[: len(words)]).int().cumsum(0).eq(0).sum())
        below = worst_choice(logits[same : same + 1], words[same : same + 1]) if same < len(words) else 0.0
        made = {
            "room_gib": room,
            "load": round(loaded, 1),
            "one_token": round(alone, 3),
            "seconds": round(taken, 3),
            "tokens": len(words),
            "ms_per_token": round(1000 * (taken - alone) / max(1, len(words) - 1), 1),
            "over_resident": round(taken / resident, 2),
            "peak_gib": peak,
            "estimated_gib": round(estimated, 2),
            "same_words": same,
            "next_below": round(below, 3),  # the likeliest one, in deviations
        }
        print(made, flush=True)
        right = right and below < ABOUT_EQUAL
        captioner.close()
        del captioner  # its memory is not the next one's
    return right


def loads(folder: Path, device: torch.device) -> bool:
    """A row for its tokenizer and each way of loading its weights; whether all make the same numbers."""
    captioner, size, sums = InternVLCaptioner(folder, device), (weight_bytes(folder) or 0) / 1e9, set[int]()
    for file in captioner.weights:
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass
    torch.zeros(1, device=device)  # what CUDA takes is not the loading's
    print({"tokenizer": round(timed(lambda: captioner.tokenizer, device)[0], 2)}, flush=True)
    for way in ("library", "ours") * 2:  # the first one imports the model's code
        with patch.object(InternVLCaptioner, "can_be_mapped", way == "ours"):
            (taken,) = timed(captioner.prepare_weights, device)
        tensors = [*captioner.model.parameters(), *captioner.model.buffers()]
        sums.add(sum(int(tensor.view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors))
        print({"way": way, "seconds": round(taken, 2), "gb_per_s": round(size / taken, 2)}, flush=True)
        del tensors
        captioner.close()
    return len(sums) == 1


def one_pass(captioner: InternVLCaptioner, ids: Tensor, pixels: Tensor, words: Tensor) -> Tensor:
    """The logits [L, vocabulary] of an answer's words [L], float32 on the CPU."""
    whole = torch.cat([ids, words[None]], dim=1).to(captioner.device)
    made = captioner.model(input_ids=whole, pixel_values=pixels.to(captioner.device, captioner.dtype))
    logits: Tensor = made.logits[0, ids.shape[1] - 1 : -1].float().cpu()
    return logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", type=Path)
    parser.add_argument("--room", type=float, nargs="*", default=[12, 8, 4], metavar="GIB")
    parser.add_argument("--tokens", type=int, default=ANSWER)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--loads", action="store_true")
    parser.add_argument("--device", default="cuda:0")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.loads:
        return not loads(args.vlm, device)
    if args.vlm:
        return not streamed(args.vlm, args.room, args.tokens, args.frames, device)
    print(captions(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
