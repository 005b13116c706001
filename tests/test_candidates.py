"""Which frames are compared at a seam, and when that is worked out."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan import candidates, continuation
from wan.candidates import CandidateMaker, score_seam_later, seam_score
from wan.chain.plan import LaterPicture, Plan
from wan.continuation import VideoContinuation
from wan.fitted_frames import FittedFrames
from wan.options import CANDIDATE_STEP
from wan.prompting import ClipPrompt
from wan.settings import Context, Sampling
from wan.types import Clip, Generation, Geometry, KnownFrames, Step


@pytest.mark.parametrize(
    ("dropped", "mode", "old", "known"),
    [
        (1, "last", 13, [0]),
        (9, "tail", 13, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (9, "tail", 4, [5, 6, 7, 8]),  # no more than the footage has
        (5, "svi2pro", 13, [1, 2, 3, 4]),  # whose first frame is its anchor's
    ],
)
def test_a_seam_is_scored_between_the_footage_and_what_is_new(
    dropped: int, mode: str, old: int, known: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def score_seam(before: Any, after: Any, **more: Any) -> Any:
        asked.append((before, after, more))
        return SimpleNamespace(as_json=lambda: {"score": 1.0})

    monkeypatch.setattr(candidates, "score_seam", score_seam)
    before, pixels = -torch.arange(1.0, old + 1), torch.arange(30.0)
    frames: Any = SimpleNamespace(tail=lambda footage, geometry: before)
    plan: Any = SimpleNamespace(is_cut=False, geometry=None, dropped=dropped, context=SimpleNamespace(mode=mode))
    made: Any = SimpleNamespace(clip=SimpleNamespace(frames=pixels))
    later = score_seam_later(frames, None, made, plan)  # type: ignore[arg-type]
    assert not asked
    assert later() == later() == {"score": 1.0} and len(asked) == 1
    shown, new, more = asked[0]
    assert torch.equal(shown, before) and new.tolist() == list(range(dropped, min(dropped + old, 30)))
    assert more["rendered"].tolist() == known and torch.equal(more["known"], before[-len(known) :])


def test_a_new_shot_has_no_seam() -> None:
    plan: Any = SimpleNamespace(is_cut=True)
    assert score_seam_later(None, None, None, plan)() is None  # type: ignore[arg-type]


# How a candidate is made

GEOMETRY = Geometry(17, 32, 32, (4, 8, 8))
CPU = torch.device("cpu")


def plan(**more: Any) -> Plan:
    return Plan(GEOMETRY, Sampling(4, 5.0, (1.0, 1.0)), "blurred", **{"prompt": "x"} | more)


class Runs:
    """In place of `Pipeline.run`: notes what it is given, and makes frames that count up."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def __call__(self, request: Any, **how: Any) -> Generation:
        self.asked.append((request, how))
        frames = torch.arange(17.0)[:, None, None, None].expand(17, 2, 2, 3)
        latents = torch.arange(5.0)[None, :, None, None].expand(1, 5, 1, 1)
        return Generation(Clip(frames, Fraction(16)), latents, request, {"sample": 2.0})


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was led to the colours of the shot, and corrected."""
    done: list[Any] = []

    def lead_to(colours: Any, known: Any, tail: Any, strength: float) -> Any:
        done.append(("led", colours, strength))
        return "led"

    def graded(tail: Any, colours: Any, strength: float) -> Any:
        done.append(("graded", colours, strength))
        return "graded"

    def correct_drift(frames: torch.Tensor, before: Any, *, known: int, strength: float, device: Any) -> torch.Tensor:
        done.append(("corrected", before, known, strength))
        return frames + 100

    for function in (lead_to, graded, correct_drift):
        monkeypatch.setattr(candidates, function.__name__, function)
    return done


def maker(run: Any, of: Plan, colours: Any = None, draft: Any = None) -> CandidateMaker:
    frames: Any = SimpleNamespace(known=lambda footage, plan: "known", tail=lambda footage, geometry: "tail")
    footage: Any = SimpleNamespace(colours=colours)
    handed: Any = "handed"
    return CandidateMaker(run, frames, 4, CPU, footage, ClipPrompt("a boat"), of, None, draft, handed)


def test_a_candidate_is_asked_for_with_all_that_the_plan_says(known: list[Any]) -> None:
    run, loras = Runs(), {"model": ()}
    of = plan(loras=loras, motion_amplitude=1.2, offload=False, best_of=3, number=1, count=5)
    made = maker(run, of).make(7)
    ((request, how),) = run.asked
    assert (request.prompt, request.negative, request.known, request.seed) == ("a boat", "blurred", "known", 7)
    assert (request.geometry, request.sampling, request.loras) == (GEOMETRY, of.sampling, loras)
    assert request.motion_amplitude == 1.2
    assert how == {"offload": False, "on_step": None, "clips": 15, "sampled": None, "on_sampled": None}
    assert len(made.clip.frames) == 17 and made.seconds["sample"] == 2.0 and "prepare" in made.seconds
    assert not known


def test_what_a_draft_has_is_not_made_again_and_what_it_lacks_is_kept(known: list[Any]) -> None:
    kept: list[Any] = []
    draft = SimpleNamespace(find=lambda seed: f"sampled {seed}", keep=lambda *what: kept.append(what))
    run = Runs()
    maker(run, plan(), draft=draft).make(7)
    how = run.asked[0][1]
    assert how["sampled"] == "sampled 7"
    how["on_sampled"]("new")
    assert kept == [(7, "new", ClipPrompt("a boat"), "handed")]


@pytest.mark.parametrize(("discard", "frames", "cells"), [(0, 17, 5), (4, 13, 4), (12, 5, 2)])
def test_what_is_discarded_is_in_neither_frames_nor_latents(
    discard: int, frames: int, cells: int, known: list[Any]
) -> None:
    made = maker(Runs(), plan(discard=discard)).make(7)
    assert made.clip.frames[:, 0, 0, 0].tolist() == list(range(frames)) and made.clip.fps == 16
    assert made.latents[0, :, 0, 0].tolist() == list(range(cells))


@pytest.mark.parametrize(
    ("more", "colours", "steps"),
    [
        ({}, "colours", []),
        ({"colour_carry": 0.5}, "colours", [("led", "colours", 0.5)]),
        ({"colour_carry": 0.5}, None, []),
        ({"colour_carry": 0.5, "cut": True}, "colours", []),  # a new shot has its own
        ({"drift_correction": 0.9}, "colours", [("corrected", "tail", 1, 0.9)]),
        ({"drift_correction": 0.9, "context": Context("tail", 9)}, None, [("corrected", "tail", 9, 0.9)]),
        ({"drift_correction": 0.9, "end": "picture"}, None, []),  # which says itself how the clip ends
        ({"drift_correction": 0.9, "cut": True}, None, []),
        (
            {"drift_correction": 0.9, "colour_carry": 0.5},
            "colours",
            [("led", "colours", 0.5), ("graded", "colours", 0.5), ("corrected", "graded", 1, 0.9)],
        ),
        ({"drift_correction": 0.9, "colour_carry": 0.5}, None, [("corrected", "tail", 1, 0.9)]),
    ],
)
def test_colours_are_led_and_drift_is_corrected_where_a_shot_goes_on(
    more: dict[str, Any], colours: Any, steps: list[Any], known: list[Any]
) -> None:
    run = Runs()
    made = maker(run, plan(**more), colours).make(7)
    assert known == steps
    corrected = any(step[0] == "corrected" for step in steps)
    assert made.clip.frames[0, 0, 0, 0] == (100 if corrected else 0) and ("correct" in made.seconds) == corrected
    assert run.asked[0][0].known == ("led" if steps and steps[0][0] == "led" else "known")


# Which of them is kept


class Going:
    """What `VideoContinuation.extend` asks of its owner, with candidates whose seams have these scores."""

    def __init__(self, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.scores, self.made = scores, list[int]()
        self.run, self.device, self.host_calls = None, CPU, list[Any]()
        self.config = SimpleNamespace(vae_stride=(4, 8, 8))
        self.frames = SimpleNamespace(
            with_available_context=lambda footage, plan: plan,
            hand_off=lambda footage, plan, handed: (f"{footage} handed", "frames" if plan.handoff else None),
        )
        monkeypatch.setattr(continuation, "CandidateMaker", self._maker)
        monkeypatch.setattr(continuation, "score_seam_later", lambda frames, footage, made, plan: made.score_seam)
        monkeypatch.setattr(continuation, "colours_of_shot", lambda footage, made, is_cut: f"colours {is_cut}")

    def _maker(self, *what: Any) -> Any:
        self.given = what
        return SimpleNamespace(make=self._make)

    def _make(self, seed: int) -> Any:
        self.made.append(seed)
        number = (seed - 7) // CANDIDATE_STEP + 1
        score = self.scores.get(number)
        seam = None if score is None else {"score": score}
        request: Any = SimpleNamespace(seed=seed)
        pixels = Clip(torch.zeros(1, 2, 2, 3), Fraction(16))
        seconds, notes = {"sample": 2.0}, {"made": number}
        return Generation(pixels, torch.zeros(1), request, seconds, notes=notes, score_seam=lambda: seam)

    def _caption(self, footage: Any, plan: Plan, memory: Any, on_step: Any) -> ClipPrompt:
        return ClipPrompt("described", {"seen": [1]}, {"noted": True}, 1.5)

    def extend(self, of: Plan, **more: Any) -> Generation:
        itself: Any = self
        footage: Any = "footage"
        return VideoContinuation.extend(itself, footage, 7, of, **more)


def test_a_single_candidate_is_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Step] = []
    going = Going({1: 0.5}, monkeypatch)
    made = going.extend(plan(prompt=None, context=Context("tail", 5)), on_step=steps.append)
    assert going.made == [7] and made.seconds == {"caption": 1.5, "sample": 2.0}
    assert (made.dropped, made.context_frames, made.prompt_memory) == (5, 5, {"seen": [1]})
    assert made.notes == {"noted": True, "made": 1} and made.colours is None and made.handed is None
    assert [(step.index, step.total, step.stage, step.prompt) for step in steps] == [(0, 4, "prompt", "described")]
    assert "caption" not in going.extend(plan()).seconds, "a prompt that was given took no time"


@pytest.mark.parametrize(
    ("scores", "more", "seed"),
    [
        ({1: 0.5, 2: 0.4, 3: 0.6}, {}, 2),
        ({1: 0.5, 2: 0.5, 3: 0.5}, {}, 1),  # of equal ones the first
        ({1: 0.5, 2: 0.6, 3: 0.1}, {}, 3),
        ({1: 0.5, 2: 0.6, 3: 0.1}, {"keeps_takes": True, "take": 2}, 2),  # which was chosen
        ({1: 0.1, 2: 0.6, 3: 0.5}, {"keeps_takes": True, "take": 3}, 3),
        ({}, {"keeps_takes": True, "cut": True}, 1),  # a cut has no seam
    ],
)
def test_of_several_candidates_the_one_with_the_best_seam_is_kept_unless_another_was_chosen(
    scores: dict[int, float], more: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int, Any]] = []
    going = Going(scores, monkeypatch)
    of = plan(best_of=3, **more)
    made = going.extend(of, on_take=lambda number, one: taken.append((number, one.request.seed, one.notes["made"])))
    seeds = [7 + step * CANDIDATE_STEP for step in range(3)]
    assert going.made == seeds and made.request.seed == seeds[seed - 1]
    assert made.notes["candidates"] == [
        {"seed": one, "score": None if of.is_cut else scores[number]} for number, one in enumerate(seeds, 1)
    ]
    assert made.seconds == {"sample": 6.0}, "of all of them"
    assert taken == ([(number, one, number) for number, one in enumerate(seeds, 1)] if of.keeps_takes else [])


def test_what_a_draft_knows_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    going = Going({1: 0.5}, monkeypatch)
    draft: Any = SimpleNamespace(prompt=ClipPrompt("kept", seconds=9.0), handed="kept frames")
    made = going.extend(plan(handoff="run {frames}", colour_carry=0.5), draft=draft)
    assert going.given[5] == ClipPrompt("kept", seconds=9.0) and going.given[4] == "footage handed"
    assert going.given[8] is draft and going.given[9] == "frames" == made.handed and made.colours == "colours False"
    assert going.extend(plan(colour_carry=0.5, cut=True)).colours == "colours True"


def test_a_clip_without_a_seam_has_no_score() -> None:
    with pytest.raises(AssertionError):
        seam_score(Runs()(None))


# What a clip knows

TAIL = torch.rand(20, 4, 4, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1


def fitted() -> FittedFrames:
    as_it_is: Any = lambda frame, width, height: frame  # noqa: E731
    return FittedFrames(as_it_is, Fraction(16))


class Footage:
    """Frames at 16 a second."""

    colours = None

    def __init__(self, frames: torch.Tensor = TAIL, motion: Any = None) -> None:
        self.frames, self.motion = frames, motion
        self.last: Any = frames[-1].permute(2, 0, 1) + 1  # more exact than its tail

    def tail(self, count: int, fps: Fraction) -> torch.Tensor:
        assert fps == 16
        return self.frames[-count:]

    def samples(self, count: int, seconds: float | None = None) -> Any:
        return "samples"


def of_footage(of: Plan, footage: Any = None) -> KnownFrames:
    return fitted().known(footage or Footage(), of)


def rows(frames: Any) -> list[int]:
    """Which of the last 20 frames these are."""
    return [next(n for n in range(20) if torch.equal(one, TAIL[n].permute(2, 0, 1))) for one in frames]


def test_a_clip_knows_the_last_frame_or_as_many_as_its_context_has() -> None:
    one = of_footage(plan())
    assert len(one.leading) == 1 and torch.equal(torch.as_tensor(one.leading[0]), Footage().last) and one.end is None
    assert rows(of_footage(plan(context=Context("tail", 5))).leading) == [15, 16, 17, 18, 19]


def test_svi_knows_its_anchor_and_motion_or_the_tail_to_encode_it_from() -> None:
    anchor = torch.ones(3, 4, 4)
    svi = plan(context=Context("svi2pro", 5), anchor=anchor)
    moving = of_footage(svi, Footage(motion="motion"))
    assert (moving.leading, moving.motion, moving.end) == ((), "motion", None) and torch.equal(moving.anchor, anchor)  # type: ignore
    for frames, used in ((20, 17), (17, 17), (16, 13), (5, 5), (4, 1), (1, 1)):
        still = of_footage(svi, Footage(TAIL[-frames:]))
        assert rows(still.leading) == list(range(20 - used, 20)) and still.motion is None


def test_a_cut_knows_its_picture_alone_and_an_end_is_read_when_its_clip_is_made() -> None:
    picture, end = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    cut = of_footage(plan(cut=picture, end=LaterPicture("digest", lambda: end)))
    assert len(cut.leading) == 1 and cut.anchor is None and torch.equal(torch.as_tensor(cut.end), end)
    shot = of_footage(plan(cut=picture, context=Context("svi2pro", 5)))
    assert shot.leading == () and torch.equal(torch.as_tensor(shot.anchor), picture) and shot.motion is None
    text = of_footage(plan(cut=True, end=end))
    assert text.leading == () and text.anchor is None and torch.equal(torch.as_tensor(text.end), end)
    assert len(of_footage(plan(cut=False)).leading) == 1


@pytest.mark.parametrize(
    ("context", "seen"),
    [(Context(), [19]), (Context("tail", 5), [15, 16, 17, 18, 19]), (Context("svi2pro", 5), [*range(3, 20)])],
)
def test_a_program_sees_the_known_frames_and_what_it_changes_is_gone_on_from(
    context: Context, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.Tensor] = []

    def hand_off(command: str, frames: torch.Tensor) -> torch.Tensor:
        shown.append(frames)
        return frames + (command == "change {frames}")

    monkeypatch.setattr("wan.fitted_frames.hand_off", hand_off)
    footage: Any = Footage(motion="motion")
    anchor = torch.ones(3, 4, 4)
    changing = plan(handoff="change {frames}", context=context, anchor=anchor)
    changed, handed = fitted().hand_off(footage, changing, None)
    expected = TAIL[seen].clone()
    if context.frames == 1:
        expected[-1] = footage.last.permute(1, 2, 0)
    assert torch.equal(shown[0], expected) and handed is not None and torch.equal(handed, expected + 1)
    assert changed.motion is None and changed.samples(1) == "samples"
    tail = changed.tail(17, Fraction(16))
    assert torch.equal(tail[-len(seen) :], handed) and torch.equal(tail[: 17 - len(seen)], TAIL[3 : 20 - len(seen)])
    again, kept = fitted().hand_off(footage, changing, handed)
    assert len(shown) == 1 and kept is handed and torch.equal(again.tail(17, Fraction(16)), tail), "it is asked once"
    same, left = fitted().hand_off(footage, dataclasses.replace(changing, handoff="look {frames}"), None)
    assert same is footage and torch.equal(torch.as_tensor(left), expected)
    for untouched in (plan(context=context, anchor=anchor), plan(handoff="change {frames}", cut=True)):
        assert fitted().hand_off(footage, untouched, None) == (footage, None)
    assert len(shown) == 2
