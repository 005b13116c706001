"""The captioner's device and life, and the prompt of a clip, with captioners that say what a test wants."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wan import prompting
from wan.captioner.next_prompt import Memory
from wan.chain.plan import Plan
from wan.errors import UserError
from wan.prompting import CaptionerOwner, ClipPrompt, Description, PromptBuilder
from wan.settings import Sampling
from wan.types import Geometry

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
GIB = 2**30


class Answers:
    """A captioner that gives these answers in turn."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked, self.closed = list(answers), list[tuple[int, str]](), 0

    def describe(self, frames: Any, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        self.asked.append((len(frames), question))
        return self.answers.pop(0)

    def close(self) -> None:
        self.closed += 1


def owner(captioner: Any = None, path: Any = "vlm", **more: Any) -> CaptionerOwner:
    given = {"url": None, "question": "what?", "trust_remote_code": False, "main": GPU}
    one = CaptionerOwner(path, **{**given, **more})
    if captioner is not None:
        one.use(captioner)
    return one


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What a captioner takes: 10 GiB of weights and 1 GiB beside them, one more above eight pictures."""
    given = {"weights": 10 * GIB, "free": 20 * GIB}
    monkeypatch.setattr(prompting, "weight_bytes", lambda path: given["weights"])
    monkeypatch.setattr(prompting, "working_bytes", lambda folder, pictures: (1 + (pictures > 8)) * GIB)
    monkeypatch.setattr(prompting, "local_folder", lambda path: path)
    monkeypatch.setattr(prompting, "free_bytes", lambda device: given["free"])
    monkeypatch.setattr(prompting, "drop_cache", lambda device: None)
    return given


# Where it lives


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({}, GPU),
        ({"vram": 11 * GIB}, GPU),
        ({"vram": 11 * GIB - 1}, CPU),
        ({"vram": 1, "url": "http://a/v1"}, GPU),  # it takes nothing here
        ({"vram": 1, "path": None}, GPU),
        ({"vram": 1, "device": torch.device("cuda:1")}, torch.device("cuda:1")),
        ({"main": CPU}, CPU),
    ],
)
def test_a_captioner_is_with_the_other_models_as_far_as_it_fits(
    given: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    one = owner(**given)
    assert one.device == device == one.device
    assert len(caplog.messages) == (device == CPU and "vram" in given), "it is said once"
    assert one.leaves_the_disk_alone == (device != CPU or "url" in given)


def test_more_pictures_than_before_leave_weights_less_room() -> None:
    one = owner(vram=11 * GIB)
    assert one.device == GPU
    one.expect(8)
    assert one.device == GPU
    one.expect(9)
    assert one.device == CPU
    captioner = Answers()
    loaded = owner(captioner, vram=12 * GIB)
    loaded.expect(8)
    assert captioner.closed == 0
    loaded.expect(9)
    assert captioner.closed == 1 and loaded.device == GPU, "it loads again with the room that it has then"
    loaded.expect(9)
    loaded.expect(3)
    assert captioner.closed == 1
    owner(on_cpu := Answers(), main=CPU).expect(20)
    assert on_cpu.closed == 0


@pytest.mark.parametrize(
    ("given", "free", "takes"),
    [
        ({"main": CPU}, 20, True),
        ({}, 20, False),
        ({}, 11, False),
        ({}, 10, True),  # layers wait in host memory for their turn
        ({"path": None}, 20, False),
        ({"main": CPU, "path": "no/such/folder"}, 20, False),
        ({"main": CPU, "url": "http://a/v1"}, 20, False),
    ],
)
def test_weights_take_host_memory_where_they_describe_or_wait_there(
    given: dict[str, Any], free: int, takes: bool, tmp_path: Path, sizes: dict[str, int]
) -> None:
    sizes["free"] = free * GIB
    assert owner(**{"path": tmp_path, **given}).host_bytes == (10 * GIB if takes else 0)


def test_a_captioner_of_another_process_takes_nothing_here(tmp_path: Path) -> None:
    ask: Any = "ask"
    shared, endpoint = owner(path=tmp_path, main=CPU), owner(path=None, url="http://a/v1")
    shared.share(ask)
    endpoint.share(ask)
    assert shared.is_elsewhere and shared.host_bytes == 0 and shared._ask == ask
    assert endpoint.is_elsewhere and endpoint._ask is None, "an endpoint is asked itself"
    assert not owner().is_elsewhere
    assert not shared.is_beside and not endpoint.is_beside and owner().is_beside


@pytest.mark.parametrize(("device", "beside"), [("cuda", True), ("cuda:1", False), ("cpu", False)])
def test_a_captioner_is_beside_the_models_where_it_lives_with_them(device: str, beside: bool) -> None:
    assert owner(device=torch.device(device), main=torch.device("cuda:0")).is_beside == beside


@pytest.mark.parametrize(("main", "room"), [(GPU, 19 * GIB), (CPU, None)])
def test_a_captioner_is_opened_when_it_is_first_used(
    main: torch.device, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_captioner(path: Any, **how: Any) -> Any:
        opened.append((path, how))
        return Answers()

    monkeypatch.setattr(prompting, "open_captioner", open_captioner)
    one = owner(main=main, trust_remote_code=True)
    one.forget()
    first: Any = one.captioner
    again: Any = one.captioner
    assert again is first and len(opened) == 1
    path, how = opened[0]
    assert path == "vlm" and (how["url"], how["device"], how["trust_remote_code"]) == (None, main, True)
    assert (how["room"] and how["room"]()) == room
    one.forget()
    assert first.closed == 1
    second: Any = one.captioner
    assert second is not first


# What it says


def test_a_description_is_asked_for_once_more_where_it_is_declined(caplog: pytest.LogCaptureFixture) -> None:
    frames: Any = np.zeros((3, 2, 2, 3), np.uint8)
    declines = "I'm sorry, but I can't help with that."
    willing = Answers("A boat.")
    assert owner(willing).describe(frames) == Description("A boat.", ("A boat.",))
    assert willing.asked == [(3, "what?")]
    assert (
        owner(other := Answers("A boat.")).describe(frames, "where?").text == "A boat."
        and other.asked[0][1] == "where?"
    )
    hesitant = Answers(declines, "A boat.")
    assert owner(hesitant).describe(frames) == Description("A boat.", (declines, "A boat."))
    assert [question for _, question in hesitant.asked] == ["what?", "what?" + prompting.ASK_AGAIN]
    with pytest.raises(UserError, match="the VLM declines to describe the video"):
        owner(Answers(declines, declines)).describe(frames)
    assert not caplog.messages
    kept = owner(Answers(declines, declines), fallback="A harbour.").describe(frames)
    assert kept.text == "A harbour." and kept.answers == (declines, declines)
    assert str(kept.fallback).startswith("the VLM declined: ") and len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("main", "device", "stays", "turns", "leaves"),
    [
        (GPU, None, False, False, True),
        (GPU, None, True, False, False),
        (GPU, None, True, True, True),
        (GPU, torch.device("cuda:1"), False, False, False),
        (GPU, CPU, False, False, False),
        (GPU, CPU, False, True, True),
        (CPU, None, False, False, False),
        (CPU, None, True, True, True),
    ],
)
def test_a_captioner_leaves_where_others_need_its_place(
    main: torch.device, device: torch.device | None, stays: bool, turns: bool, leaves: bool
) -> None:
    captioner = Answers()
    one = owner(captioner, main=main, device=device)
    one.takes_turns = turns
    one.make_room(lambda: stays)
    assert captioner.closed == leaves
    far = owner(elsewhere := Answers(), url="http://a/v1")
    far.takes_turns = True
    far.make_room(lambda: False)
    assert elsewhere.closed == 0


# The prompt of a clip


class Footage:
    last: Any = "last"

    def __init__(self, frames: int = 17) -> None:
        self.frames, self.asked = frames, list[Any]()

    def samples(self, count: int, seconds: float | None = None) -> Any:
        self.asked.append((count, seconds))
        return np.zeros((count, 2, 2, 3), np.uint8)

    def tail(self, count: int, fps: Fraction) -> torch.Tensor:
        return torch.zeros(min(count, self.frames), 8, 8, 3)


def plan(**more: Any) -> Plan:
    return Plan(Geometry(33, 32, 32, (4, 8, 8)), Sampling(4, 5.0, (1.0, 1.0)), "", **{"num_segments": 3, **more})


def build(captioner: Any, of: Plan, footage: Any = None, memory: Any = None, **more: Any) -> ClipPrompt:
    one = owner(captioner, main=CPU, **more)
    builder = PromptBuilder(one, lambda text: len(text.split()), 512, Fraction(16))
    shown: Any = footage or Footage()
    return builder.build(shown, of, lambda: True, memory or {})


def test_a_prompt_that_is_given_is_used_after_its_prefix() -> None:
    captioner = Answers()
    assert build(captioner, plan(prompt="a boat", prefix="continue video")) == ClipPrompt("continue video a boat")
    assert build(captioner, plan(prompt="a boat")).text == "a boat" and captioner.asked == []


def test_a_description_follows_the_prefix_and_is_noted() -> None:
    footage = Footage()
    made = build(Answers("A boat sails."), plan(prefix="continue video"), footage)
    assert made.text == "continue video A boat sails." and made.memory == {}
    assert made.notes == {"answers": ["A boat sails."]} and footage.asked == [(3, None)]
    declines = "I'm sorry, but I can't help with that."
    fallback = build(Answers(declines, declines), plan(), fallback="A harbour.")
    assert fallback.text == "A harbour." and set(fallback.notes) == {"answers", "fallback"}


def test_a_captioner_leaves_also_after_an_error() -> None:
    captioner = Answers()
    one = owner(captioner)
    builder = PromptBuilder(one, len, 512, Fraction(16))
    footage: Any = Footage()
    with pytest.raises(IndexError):
        builder.build(footage, plan(), lambda: False)
    assert captioner.closed == 1


def test_likeness_is_measured_where_the_captioner_can_see(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeing(Answers):
        def view(self, picture: Any) -> torch.Tensor:
            return torch.tensor({"first": [1.0, 0.0], "last": [0.6, 0.8]}[picture])

    monkeypatch.setattr(prompting, "as_picture", lambda frame: frame)
    first: Any = "first"
    assert build(Seeing("A boat."), plan(likeness=first)).notes["identity"] == 0.6
    assert "identity" not in build(Answers("A boat."), plan(likeness=first)).notes
    assert "identity" not in build(Seeing("A boat."), plan()).notes


@pytest.mark.parametrize(("frames", "cut", "still"), [(17, None, False), (17, "picture", False), (1, None, True)])
def test_what_happens_next_is_asked_with_what_was_seen(
    frames: int, cut: Any, still: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def next_prompt(captioner: Any, pictures: Any, times: Any, **more: Any) -> Any:
        asked.append((len(pictures), times, more))
        memory = SimpleNamespace(as_json=lambda: {"seen": [2]})
        return SimpleNamespace(prompt="It sinks.", memory=memory, answers=("a", "b"), fallback=None)

    monkeypatch.setattr(prompting, "next_prompt", next_prompt)
    monkeypatch.setattr(
        prompting,
        "measure_motion",
        lambda tail, fps: SimpleNamespace(sentence=lambda: f"{len(tail)} moved", still=False),
    )
    before = Memory().as_json()
    monkeypatch.setattr(Memory, "from_json", lambda json: f"memory of {json}")
    footage = Footage(frames)
    of = plan(prompt_mode="continue", prompt="the harbour", number=2, count=5, cut=cut)
    made = build(Answers(), of, footage, before)
    assert made.text == "It sinks." and made.memory == {"seen": [2]}
    assert made.notes == {"answers": ["a", "b"], "fallback": None}
    ((count, times, more),) = asked
    seconds = prompting.RECENT_SECONDS
    assert footage.asked == [(3, seconds)] and count == 3
    assert times == pytest.approx([-seconds, -seconds / 2, 0])
    assert (more["goal"], more["clip"], more["clips"], more["seconds"]) == ("the harbour", 2, 5, 33 / 16)
    assert (more["motion"], more["still"]) == ("" if still else "17 moved", still)
    assert more["memory"] == (Memory() if cut else f"memory of {before}"), "an old shot is not kept up"
