"""Options of continuation together: every pair of values is in a run of three clips, with stand-ins for the models.

What must hold is said here once more, from the documents and not from the code: which frames a clip starts from, what
is left out when clips are joined, which seeds are used, and what makes a finished clip another one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.commands import Seen, frames_in
from wan.types import to_uint8

pytestmark = pytest.mark.slow

FRAMES, SEED, NEXT_CANDIDATE = 13, 3, 1_000_000
SVI = ["--lora_high", "svi_pro_high.safetensors", "--lora_low", "svi_pro_low.safetensors"]
RED = torch.tensor([1.0, -1.0, -1.0])


class Chosen(NamedTuple):
    """One value of each option; the cut is at clip 2 of 3, and the end image that of the chain."""

    model: str = "ti2v"
    mode: str = "last_frame"
    end: bool = False
    cut: str = ""
    drift: bool = False
    best_of: int = 1
    prompt_mode: str = "describe"
    goal: bool = False
    include_source: bool = False

    @property
    def refused(self) -> str:
        """What the command says to options that do not go together."""
        for wrong, message in {
            "svi2pro is for I2V-A14B": self.mode == "svi2pro" and self.model == "ti2v",
            "which v2v-14B cannot": self.cut == "text" and self.model == "i2v",
            "must have 17 or more": self.mode == "tail:9" and self.end and self.model == "ti2v",
        }.items():
            if message:
                return wrong
        return ""

    @property
    def words(self) -> list[str]:
        words = [
            "--ckpt_dir",
            self.model,
            "--num_videos",
            "3",
            "--frame_num",
            str(FRAMES),
            "--storyboard",
            "pairs.json",
        ]
        mode, _, known = self.mode.partition(":")
        words += ["--continuation", mode, *(["--context_frames", known] if known else [])]
        words += SVI if self.mode == "svi2pro" and self.model == "i2v" else []  # the 5B takes no such files
        words += ["--end_image", "red.png"] if self.end else []
        words += ["--drift_correction", "0.5"] if self.drift else []
        words += ["--best_of", str(self.best_of), "--prompt_mode", self.prompt_mode]
        words += ["--prompt", "towards-the-sea"] if self.goal else []
        return words + (["--include_source"] if self.include_source else [])

    @property
    def board(self) -> list[dict[str, Any]]:
        cuts: dict[str, dict[str, Any]] = {
            "": {},
            "picture": {"cut": "red.png"},
            "text": {"cut": True, "prompt": "a new scene"},
        }
        return [{}, cuts[self.cut], {}]

    @property
    def repeated(self) -> int:
        """Frames of a clip that repeat the one before."""
        return {"last_frame": 1, "tail:5": 5, "tail:9": 9, "svi2pro": 5}[self.mode]

    def begins_shot(self, number: int) -> bool:
        return bool(self.cut) and number == 2


VALUES: dict[str, tuple[Any, ...]] = {
    "model": ("ti2v", "i2v"),
    "mode": ("last_frame", "tail:5", "tail:9", "svi2pro"),
    "end": (False, True),
    "cut": ("", "picture", "text"),
    "drift": (False, True),
    "best_of": (1, 2),
    "prompt_mode": ("describe", "continue"),
    "goal": (False, True),
    "include_source": (False, True),
}
ALL = [Chosen(*values) for values in itertools.product(*VALUES.values())]


def pairs(chosen: Chosen) -> set[Any]:
    return set(itertools.combinations(chosen._asdict().items(), 2))


def covering() -> Iterator[Chosen]:
    """Few combinations that hold every pair of values which some combination can hold."""
    possible = {chosen: pairs(chosen) for chosen in ALL if not chosen.refused}
    missing = set().union(*possible.values())
    while missing:
        best = max(possible, key=lambda chosen: len(possible[chosen] & missing))
        missing -= possible[best]
        yield best


def description(chosen: Chosen) -> str:
    return "-".join(str(value) for value in chosen if value)


def known_frames(known: Any) -> list[torch.Tensor]:
    return [frame.permute(1, 2, 0) for frame in known.leading]


@pytest.mark.parametrize("chosen", list(covering()), ids=description)
def test_every_pair_of_options_keeps_the_promises_of_both(
    chosen: Chosen, command: Callable[..., Seen], world: Path
) -> None:
    (world / "pairs.json").write_text(json.dumps(chosen.board))
    seen = command(" ".join(chosen.words))
    assert seen.code == 0, seen.output
    records = [clip.record for _, clip in sorted(seen.clips.items())]
    settings = seen.fingerprinted
    assert len(records) == 3
    requests = list(zip(seen.requests, seen.made, strict=True))
    corrections = 0
    before: Any = None  # the clip before as it was handed on
    for number, record in enumerate(records, 1):
        new_shot, end = chosen.begins_shot(number), chosen.end and number == 3
        candidates = 1 if new_shot else chosen.best_of
        ours, requests = requests[:candidates], requests[candidates:]

        # seeds: counted up from the first, candidates a million apart; the least visible seam is taken
        seeds = [SEED + number - 1 + index * NEXT_CANDIDATE for index in range(candidates)]
        assert [request.seed for request, _ in ours] == seeds
        scores = {one["seed"]: one["score"] for one in record.get("candidates", [])}
        assert list(scores) == (seeds if candidates > 1 else [])
        assert record["seed"] == min(scores, key=lambda seed: scores[seed], default=seeds[0])

        # known frames
        corrected = chosen.drift and not new_shot and not end
        corrections += corrected * candidates
        for request, _ in ours:
            known: Any = request.known
            frames = known_frames(request.known)
            assert (known.end is not None) == end
            if end:
                assert torch.allclose(known.end.mean((1, 2)), RED)
            assert (known.anchor is not None) == (chosen.mode == "svi2pro")
            if new_shot:
                assert known.motion is None
                pictures = frames if known.anchor is None else [known.anchor.permute(1, 2, 0)]
                assert len(pictures) == (chosen.cut == "picture")
                assert all(torch.allclose(picture.mean((0, 1)), RED) for picture in pictures)
            elif chosen.mode == "svi2pro" and number > 1:
                assert not frames and torch.equal(known.motion, before["motion"])
                shot_begins_red = bool(chosen.cut) and number > 2
                assert torch.allclose(known.anchor.mean((1, 2)), RED) == shot_begins_red
            else:
                # svi2pro encodes the source's second, 16 frames at the model's rate, of which 13 are 4n+1
                assert len(frames) == (13 if chosen.mode == "svi2pro" else chosen.repeated) and known.motion is None
                if number > 1:
                    assert torch.equal(torch.stack(frames), before["frames"][-chosen.repeated :])

        # the prompt: the user's as it is, or as the goal that the VLM is given
        text, prompted = ours[0][0].prompt, new_shot and chosen.cut == "text"
        described = not prompted and (not chosen.goal or chosen.prompt_mode == "continue")
        assert ("A red square slides" in text) == described
        part = f"part {number} of 3, go only as far as it allows: towards-the-sea"
        asked = any(part in question for _, question in seen.asked)
        assert asked == (described and chosen.goal)
        assert described or ("towards-the-sea" in text) == (chosen.goal and not prompted)
        assert ("a new scene" in text) == prompted

        # what is written down
        assert record["dropped"] == (0 if new_shot else chosen.repeated)
        assert (record["seam"] is None) == new_shot
        clip_settings = settings[number]
        assert clip_settings["seed"] == SEED + number - 1 and (clip_settings["parent"] is None) == new_shot
        assert ("cut" in clip_settings) == new_shot and (clip_settings.get("cut") is True) == prompted
        assert ("end_image" in clip_settings) == end and ("anchor" in clip_settings) == (chosen.mode == "svi2pro")
        mode, _, length = chosen.mode.partition(":")
        assert clip_settings.get("continuation", "last_frame") == mode
        assert clip_settings.get("context_frames") == (int(length) if length else None)
        assert clip_settings.get("drift_correction") == (0.5 if chosen.drift else None)
        assert clip_settings.get("best_of") == (2 if chosen.best_of == 2 else None)
        assert clip_settings.get("prompt_mode", "describe") == chosen.prompt_mode
        assert (clip_settings["vlm"] is not None) == described

        (made,) = (made for request, made in ours if request.seed == record["seed"])
        before = {"frames": made.clip.frames / (2 if corrected else 1), "motion": made.motion}

    assert not requests and seen.corrected == [0.5] * corrections
    # frames that repeat the clip before are shown once; the one that repeats the source is the chain's first
    new = sum(FRAMES - record["dropped"] for record in records)
    if chosen.include_source:  # of 24 frames per second: a new frame comes one of its own times after the last of them
        source = frames_in(world / "source.mp4") - 1
        expected = math.floor(source + (new + 1) * 24 / {"ti2v": 24, "i2v": 16}[chosen.model] + 0.5)
    else:
        expected = new + (records[0]["dropped"] == 1)
    assert frames_in(seen.folder / "joined.mp4") == expected

    again = command(" ".join(chosen.words))
    assert (again.code, again.requests, again.asked) == (0, [], [])


def test_what_the_captioner_sees_is_what_the_clip_goes_on_from(command: Callable[..., Seen], world: Path) -> None:
    (world / "pairs.json").write_text(json.dumps(Chosen(cut="picture").board))
    seen = command(" ".join(Chosen(cut="picture").words))
    source, picture, clip = seen.shown
    assert (picture == [255, 0, 0]).all() and len(picture) == len(clip) == 8
    frames = to_uint8(seen.made[1].clip.frames)
    assert all(any((frame == other).all() for other in frames) for frame in clip)
    assert not any((frame == other).all() for frame in source for other in frames)


REFUSED: dict[str, Chosen] = {}
for one in sorted((one for one in ALL if one.refused), key=lambda one: sum(map(bool, one))):
    REFUSED.setdefault(one.refused, one)


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_made(
    message: str, command: Callable[..., Seen], world: Path
) -> None:
    (world / "pairs.json").write_text(json.dumps(REFUSED[message].board))
    seen = command(" ".join(REFUSED[message].words))
    assert seen.code == 2 and message in seen.output.replace("--", "")
    assert (seen.requests, seen.asked) == ([], []) and not seen.folder.exists()


def test_the_runs_above_hold_every_pair_that_is_possible() -> None:
    runs = list(covering())
    possible = set().union(*(pairs(chosen) for chosen in ALL if not chosen.refused))
    assert set().union(*map(pairs, runs)) == possible and len(runs) < 30
