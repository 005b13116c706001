"""The prompt for the next clip: asked for with what is known, read from untidy answers, checked, remembered."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.golden import GOLDEN_VLM
from wan.captioner import InternVLCaptioner, Memory, NextPrompt, next_prompt
from wan.captioner.next_prompt import (
    KEEP,
    Rejected,
    Repeated,
    bare,
    ended,
    fields_of,
    first_words,
    flat,
    is_prose,
    one_move,
    overlap,
    read_identity,
    read_next_prompt,
    recoloured,
)
from wan.errors import UserError
from wan.types import UInt8Array

FRAMES = np.zeros((3, 8, 8, 3), np.uint8)
TIMES = (-2.0, -1.0, 0.0)
IDENTITY = "A woman with dark hair in a red wool coat. A grey beach at dusk, soft light, photographic."
SUBJECT = "a woman in a red coat"
KNOWN = Memory(IDENTITY, SUBJECT, camera="slow pan left")
WHO = json.dumps({"subject": SUBJECT, "identity": IDENTITY})
WALKS = "A woman in a red coat walks on to the water and slows down. The camera pans left slowly. Waves roll in."
TURNS = "A woman in a red coat turns her head and lifts one hand to wave. The camera pans left slowly. Gulls rise."
SECOND_CHANCE = "A woman in a red coat kneels and picks up a shell. The camera stays static. Grass bends."


class Scripted:
    """Answers as the script says, an exception in it is raised; keeps the questions."""

    def __init__(self, *script: str | UserError) -> None:
        self.script = list(script)
        self.questions: list[str] = []

    def describe(self, frames: UInt8Array, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        self.questions.append(question)
        answer = self.script.pop(0)
        if isinstance(answer, UserError):
            raise answer
        return answer

    def close(self) -> None:
        pass


def description() -> str:
    return "The video shows a woman who walked along a beach. She wears red."


def beat(vlm: Any, memory: Memory = KNOWN, **options: Any) -> NextPrompt:
    known: dict[str, Any] = {"motion": "the main motion goes left", "clip": 2, "clips": 5, "seconds": 81 / 16}
    return next_prompt(vlm, FRAMES, TIMES, memory=memory, **known | {"describe": description} | options)


def reply(prompt: str, camera: str = "slow pan left", end_state: str = "standing at the water") -> str:
    return json.dumps({"prompt": prompt, "camera": camera, "end_state": end_state})


def test_the_question_holds_all_that_is_known() -> None:
    vlm = Scripted(reply(WALKS))
    memory = Memory(IDENTITY, SUBJECT, "slow pan left", "walking to the water", ("She waits.", "She sets off."))
    beat(vlm, memory, goal="she reaches the sea")
    for known in (
        "Frame1 2.0, Frame2 1.0, Frame3 0.0",
        "the next 5.1 seconds",
        "the main motion goes left",
        IDENTITY,
        f'Begin with exactly "{SUBJECT}"',
        'continue "slow pan left"',
        "walking to the water",
        "She waits. / She sets off.",
        "part 2 of 5, go only as far as it allows: she reaches the sea",
        "First continue the movement",
    ):
        assert known in vlm.questions[0]


def test_a_scene_at_rest_gets_a_new_action_and_unknown_facts_are_left_out() -> None:
    vlm = Scripted(reply(WALKS))
    beat(vlm, Memory(IDENTITY), motion="", still=True)
    assert "begin a new action" in vlm.questions[0]
    assert "Begin with the main subject" in vlm.questions[0]
    assert "Earlier prompts" not in vlm.questions[0]
    assert "Measured motion" not in vlm.questions[0]


@pytest.mark.parametrize(
    "answer",
    [
        reply(WALKS),
        f"<think>Let me see {{...}}</think>Sure!\n```json\n{reply(WALKS)}\n```\nI hope that helps.",
        json.dumps({"reply": json.loads(reply(WALKS))}, indent=2),
        json.dumps({"prompt": WALKS.split(". "), "camera": "slow pan left"}),
        "{'prompt': 'WALKS', 'camera': 'slow pan left', 'end_state': 'the sea's edge',}".replace("WALKS", WALKS),
        '{"prompt": "WALKS", "camera": "slow pan left", "end_sta'.replace("WALKS", WALKS),
        f"**Prompt:** {WALKS}\n**Camera:** slow pan left\n",
        f"```\n{WALKS}\n```",
        f'"{WALKS}"',
        '{"prompt": "WALKS"}'.replace("WALKS", WALKS.replace(". ", ".\n")),
        reply(WALKS.removesuffix(".")),
    ],
    ids=range(11),
)
def test_untidy_answers_are_read(answer: str) -> None:
    made = beat(Scripted(answer))
    assert made.prompt == f"{WALKS} {KEEP}"
    assert (made.fallback, made.answers) == (None, (answer,))


def test_the_camera_is_named_even_if_the_prompt_forgets_it() -> None:
    plain = "A woman in a red coat walks on to the water and slows down."
    assert "slows down. Camera: static camera. " in beat(Scripted(reply(plain, "static camera"))).prompt
    assert "slows down. Camera: slow pan left. " in beat(Scripted(plain)).prompt  # as before
    assert "Camera" not in beat(Scripted(plain), Memory(IDENTITY, SUBJECT)).prompt


def test_a_goal_may_change_what_otherwise_stays_the_same() -> None:
    blue = WALKS.replace("slows down", "puts on a blue coat")
    made = beat(Scripted(reply(blue)), goal="she puts on a blue coat")
    assert made.prompt == blue
    assert beat(Scripted(reply(blue), reply(WALKS))).prompt.startswith(WALKS)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "has 0 words"),
        ("A woman walks.", "has 3 words"),
        (
            f"A woman in a red coat {' '.join(f'walks{chr(97 + i // 26)}{chr(97 + i % 26)}' for i in range(99))}.",
            "words",
        ),
        ("A woman 123 456 789 012 345 678 901 234 567 890.", "not a text in words"),
        ("A woman " + "walks and " * 20, "has 4 words"),  # what is said again and again is left out
        ("A woman walks to a walks to and to a woman to walks and a woman walks to a.", "not a text in words"),
        ("I'm sorry, but I can't assist with that request.", "it declines"),
        ("The dog runs along the beach and barks at the waves.", 'begin with "a woman in a red coat"'),
        ("A woman in a red coat walks on until the video ends.", "about the video"),
        ("The scene shows a woman in a red coat at the sea.", "about the video"),
        ("A woman in a red coat sits down, then fade to black.", "cut, a fade"),
        ("A woman in a red coat walked to the water and smiles.", "past tense"),
        ("A woman in a red coat was at the water, she smiles.", "past tense"),
        ("A woman in a red coat sits. Then she slowly turned to the sea.", "past tense"),
        (WALKS.replace("pans left slowly", "pans left, then tilts up"), "more than one move"),
        (WALKS.replace("pans left slowly", "pans slowly to the left, then pans right"), "more than one move"),
        (WALKS.replace("pans left slowly", "zooms slowly in, then zooms out"), "more than one move"),
        (WALKS.replace("slows down", "opens her black coat"), "colours changed (black coat)"),
        (TURNS.replace("one hand", "a hand"), "says the same as the one before"),
    ],
)
def test_a_bad_prompt_is_asked_for_again_with_the_reason(prompt: str, reason: str) -> None:
    vlm = Scripted(reply(prompt), reply(SECOND_CHANCE, "static camera"))
    made = beat(vlm, Memory(IDENTITY, SUBJECT, prompts=(TURNS,)))
    assert made.prompt.startswith(SECOND_CHANCE)
    assert made.fallback is None
    assert len(made.answers) == 2
    assert reason in vlm.questions[1]
    assert vlm.questions[1].startswith(vlm.questions[0])


@pytest.mark.parametrize(
    "prompt",
    [
        "A woman in a red coat dressed in wool walks towards the trained dog.",
        "The woman needs a rest, she heads for the stationary boat and sits down.",
        "A woman in a red coat walks on. The camera pans right, following her past the moving waves.",
        "A woman in a red coat stirs on. The camera stays static on the pan. Steam rises to the right.",
        "A woman in a crimson coat walks on. White gulls and a black dog follow.",
        "一个女人继续走向大海，然后停下来。",
    ],
)
def test_a_good_prompt_is_not_rejected(prompt: str) -> None:
    memory = Memory(IDENTITY, SUBJECT if prompt.isascii() else "")
    assert beat(Scripted(reply(prompt, camera=""), UserError("asked again")), memory).fallback is None


def test_a_camera_field_that_contradicts_the_prompt_is_rejected() -> None:
    vlm = Scripted(reply(WALKS, "static camera"), reply(WALKS))
    assert beat(vlm).memory.camera == "slow pan left"
    assert "more than one move" in vlm.questions[1]


def test_useless_answers_give_way_to_the_goal_and_a_description(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = beat(Scripted("I cannot.", "No."), goal="She swims.")
    assert made.prompt == f"She swims. {description()}"
    assert made.answers == ("I cannot.", "No.")
    assert made.fallback is not None and "has 2 words" in made.fallback
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "clip 2 of 5 is prompted with a description"
    ]
    assert made.memory == KNOWN


def test_a_prompt_that_says_the_same_twice_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = beat(Scripted(reply(TURNS), reply(TURNS)), Memory(IDENTITY, SUBJECT, prompts=(TURNS,)))
    assert made.prompt.startswith(TURNS) and made.fallback is None
    assert len(made.answers) == 2 and made.memory.prompts == (TURNS, TURNS)
    assert not caplog.records
    # what has another fault beside is no good, and neither is an answer that has one after it
    assert beat(Scripted(reply(TURNS), "No."), Memory(IDENTITY, SUBJECT, prompts=(TURNS,))).prompt == made.prompt
    faulty = TURNS.replace("red", "black")
    assert beat(Scripted(reply(faulty), reply(faulty)), Memory(IDENTITY, SUBJECT, prompts=(TURNS,))).fallback


def test_an_empty_answer_falls_back_but_a_vlm_that_is_gone_stops_the_run() -> None:
    made = beat(Scripted(UserError("gave an empty answer")))
    assert (made.prompt, made.fallback) == (description(), "gave an empty answer")

    def gone() -> str:
        raise UserError("connection refused")

    with pytest.raises(UserError, match="connection refused"):
        beat(Scripted(UserError("connection refused")), describe=gone)


def test_what_stays_the_same_is_asked_for_once() -> None:
    vlm = Scripted(WHO, reply(WALKS), reply(TURNS))
    first = beat(vlm, Memory(), clip=1)
    second = beat(vlm, first.memory)
    assert "stays the same throughout" in vlm.questions[0]
    assert (second.memory.identity, second.memory.subject) == (IDENTITY, SUBJECT)
    assert first.answers == (WHO, reply(WALKS))
    assert second.answers == (reply(TURNS),)


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ({"identity": IDENTITY}, '"subject" must have'),
        ({"subject": SUBJECT * 3, "identity": IDENTITY}, '"subject" must have'),
        ({"subject": SUBJECT, "identity": "A woman. " * 31}, '"identity" must have'),
        ({"subject": SUBJECT, "identity": "A woman in red walking on a beach."}, "movement"),
        ({"subject": SUBJECT, "identity": "A woman in red. The camera is low."}, "camera"),
    ],
)
def test_what_stays_the_same_is_checked(who: dict[str, str], reason: str) -> None:
    vlm = Scripted(json.dumps(who), WHO, reply(WALKS))
    assert beat(vlm, Memory()).memory.identity == IDENTITY
    assert reason in vlm.questions[1]


def test_a_description_says_what_stays_the_same_if_the_vlm_does_not(caplog: pytest.LogCaptureFixture) -> None:
    boats, places = "ABCDEFGHIJKLMN", "NMLKJIHGFEDCBA"  # two words differ, so that they count as no loop
    sights = " ".join(f"Boat {boat} in {place}." for boat, place in zip(boats, places, strict=True))
    long = f"A woman in a red coat walks. {sights} Light is soft."
    calls = []

    def describe() -> str:
        calls.append(1)
        return long

    with caplog.at_level(logging.WARNING):
        made = beat(Scripted("?", "?", "?", "?"), Memory(), describe=describe)
    assert made.memory.identity == long[: long.index(" Boat N")]
    assert made.memory.subject == ""
    assert len(calls) == 1
    assert len(caplog.records) == 2


def chain(vlm: Scripted, memory: Memory, clips: range) -> list[NextPrompt]:
    made = []
    for clip in clips:
        made.append(beat(vlm, memory, clip=clip))
        memory = made[-1].memory
    return made


def test_a_chain_remembers_three_prompts_and_resumes_from_json() -> None:
    acts = ["walks to the water", "turns and waves", "kneels by a pool", "lifts a shell high", "throws it far away"]
    script = [reply(f"A woman in a red coat {act}.", "static camera", f"she {act}") for act in acts]
    whole = chain(Scripted(WHO, *script), Memory(), range(1, 6))
    assert [made.fallback for made in whole] == [None] * 5
    assert whole[-1].memory == Memory(
        IDENTITY,
        SUBJECT,
        "static camera",
        "she throws it far away.",
        tuple(f"A woman in a red coat {act}. Camera: static camera." for act in acts[2:]),
    )

    sidecar = json.loads(json.dumps(whole[2].memory.as_json()))
    resumed = chain(Scripted(*script[3:]), Memory.from_json(sidecar), range(4, 6))
    assert resumed == whole[3:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "memory is list, not a JSON object"),
        ({"identity": "a", "mood": "b"}, "unknown entry 'mood'"),
        ({"camera": 3}, "camera in the prompt memory is not a text"),
        ({"prompts": "She waits."}, "prompts in the prompt memory is not a list of texts"),
        ({"prompts": [1]}, "prompts in the prompt memory is not a list of texts"),
    ],
)
def test_a_broken_memory_is_refused_by_name(content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Memory.from_json(content)


def test_a_model_that_babbles_leaves_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real InternVL code with random weights: its answers are garbage."""
    for tokens in ("IDENTITY_TOKENS", "PROMPT_TOKENS"):
        # the package has the function under the name of its module
        monkeypatch.setattr(sys.modules["wan.captioner.next_prompt"], tokens, 24)
    frames = np.load(GOLDEN_VLM / "frames.npy")
    made = next_prompt(
        InternVLCaptioner(GOLDEN_VLM / "hf", "cpu", torch.float32),
        frames,
        np.linspace(-2, 0, len(frames)).tolist(),
        motion="",
        memory=Memory(),
        clip=1,
        clips=1,
        seconds=5,
        describe=description,
    )
    assert made.prompt == made.memory.identity == description()
    assert made.fallback is not None
    assert len(made.answers) == 4


def test_four_letters_of_five_and_two_words_of_five_are_enough_for_prose() -> None:
    assert is_prose("abcd1") and not is_prose("abc11")
    assert is_prose("so so so so on") and not is_prose("so so so so so on")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("The camera pans left.", True),
        ("The camera pans left, and goes on panning LEFT.", True),
        ("The camera pans left while it zooms in.", False),
        ("The camera tilts and circles.", False),
        ("The camera pans left and then pans right.", False),
        ("A dog runs.", True),
    ],
)
def test_a_camera_that_moves_in_two_ways_is_known(text: str, is_one: bool) -> None:
    assert one_move(text) is is_one


def test_an_answer_may_have_about_twice_what_is_asked_for() -> None:
    asked: list[int] = []

    class Asked(Scripted):
        def describe(self, frames: Any, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
            asked.append(max_new_tokens)
            return super().describe(frames, question)

    beat(Asked(WHO, reply(WALKS)), Memory())
    assert asked == [192, 384]


def filler(count: int) -> str:
    """Words that are all different."""
    return " ".join("".join(chr(97 + int(digit)) for digit in str(number + 100)) for number in range(count))


@pytest.mark.parametrize(("count", "fits"), [(4, False), (5, True), (100, True), (101, False)])
def test_a_prompt_has_five_to_a_hundred_words(count: int, fits: bool) -> None:
    prompt = f"A woman {filler(count - 2)}."
    memory = Memory(IDENTITY, "")
    if fits:
        assert read_next_prompt(reply(prompt, ""), memory, "")[0] == f"{prompt} {KEEP}"
    else:
        with pytest.raises(Rejected, match=f"^the prompt has {count} words, not 5 to 100$"):
            read_next_prompt(reply(prompt, ""), memory, "")


@pytest.mark.parametrize(("before", "fits"), [(11, True), (12, False)])
def test_the_subject_is_among_the_first_twelve_words(before: int, fits: bool) -> None:
    prompt = f"{filler(before).capitalize()} woman walks on."
    memory = Memory(IDENTITY, "the woman")
    if fits:
        read_next_prompt(reply(prompt, ""), memory, "")
    else:
        with pytest.raises(Rejected, match='does not begin with "the woman"'):
            read_next_prompt(reply(prompt, ""), memory, "")
    # a subject of little words alone is nobody's name
    read_next_prompt(reply(prompt, ""), Memory(IDENTITY, "it"), "")


@pytest.mark.parametrize(
    ("subject", "identity", "fault"),
    [
        ("one", "a grey place", ""),
        ("one two three four five six seven eight", "a grey place", ""),
        ("one two three four five six seven eight nine", "a grey place", '"subject" must have 1 to 8 words'),
        ("", "a grey place", '"subject" must have 1 to 8 words'),
        ("one", "a place", '"identity" must have 3 to 60 words'),
        ("one", filler(60), ""),
        ("one", filler(61), '"identity" must have 3 to 60 words'),
        ("123 456", "789 012 345 678", "it is not a text in words"),
        ("one", "A man is dancing here.", "it tells a movement"),
        ("one", "A man in running shoes.", ""),
    ],
)
def test_what_stays_the_same_has_its_length(subject: str, identity: str, fault: str) -> None:
    answer = json.dumps({"subject": subject, "identity": identity})
    if fault:
        with pytest.raises(Rejected, match=f"^{fault}$"):
            read_identity(answer)
    else:
        assert read_identity(answer) == (f"{identity}." if identity[-1] != "." else identity, subject)


def test_what_words_two_prompts_share_is_told_without_little_ones() -> None:
    assert overlap("The dog runs", "a dog sits", set()) == 1 / 3
    assert overlap("The dog runs", "a dog sits", {"dog"}) == 0
    assert overlap("the", "a", set()) == 0 and overlap("Red dogs", "red DOGS", set()) == 1


@pytest.mark.parametrize(("shared", "is_same"), [(3, False), (4, True)])
def test_a_prompt_says_the_same_where_more_than_six_words_of_ten_do(shared: int, is_same: bool) -> None:
    # 3 of 5 words in all are 0.6, 4 of 6 are more
    common = " ".join(["walks", "slowly", "towards", "rocks"][:shared])
    memory = Memory(IDENTITY, "", prompts=(f"Bo {common}",))
    answer = reply(f"He {common} while she and they go", "")
    if is_same:
        with pytest.raises(Repeated, match="says the same"):
            read_next_prompt(answer.replace("go", "sing"), memory, "")
    else:
        read_next_prompt(answer.replace("go", "sing"), memory, "")


@pytest.mark.parametrize(
    ("prompt", "known", "wrong"),
    [
        ("a red wool coat", "a red coat of wool", []),
        ("a blue wool coat", "a red wool coat", ["blue wool", "blue coat"]),
        ("a blue and warm coat", "a red coat", []),  # in another clause
        ("a blue coat", "a red coat with blue lines", ["blue coat"]),
        ("a navy coat", "a blue coat", []),
        ("a scarlet coat", "a crimson coat", []),
        ("a blue long warm coat", "a red coat", []),  # three words on
        ("blue eyes", "a red coat", []),  # of which nothing is known
        ("a blue red coat", "a red coat", ["blue coat"]),
        ("silver hair; gold rings", "grey hair, yellow rings", []),
    ],
)
def test_a_colour_belongs_to_the_two_words_after_it(prompt: str, known: str, wrong: list[str]) -> None:
    assert recoloured(prompt, known) == wrong


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ('{"a": "One", "b": "Two."}', {"a": "One.", "b": "Two."}),
        ('{"a": ["One", "Two"], "b": {"x": "Three", "y": 4}}', {"a": "One. Two.", "b": "Three. "}),
        ('{"a": "One"}', {"a": "One.", "b": ""}),
        ('{"c": {"a": "One", "b": "Two"}}', {"a": "One.", "b": "Two."}),
        ('{"c": 1} {"a": "One"}', {"a": "One.", "b": ""}),
        ("{" * 19 + '{"a": "One"', {"a": "One.", "b": ""}),
        ("just words", {"a": "just words", "b": ""}),
        ("a: One\nb: Two", {"a": "One", "b": "Two"}),
        ("A: One\n  B: Two", {"a": "One", "b": "Two"}),
        ("b: Two", {"a": "", "b": "Two"}),
        ('"a": "One",\n"b": "Two', {"a": "One.", "b": "Two"}),
        ("{'a': 'One \\\"x\\\"', 'b': 'Two\\nlines'}", {"a": 'One "x.', "b": "Two lines."}),
    ],
)
def test_fields_are_read_from_json_or_by_their_labels(answer: str, read: dict[str, str]) -> None:
    assert fields_of(answer, ("a", "b")) == read


@pytest.mark.parametrize(("braces", "is_read"), [(19, True), (20, False)])
def test_json_may_begin_at_the_twentieth_brace(braces: int, is_read: bool) -> None:
    answer = "{ " * braces + '{"a": ["One", "Two"], "b": "Three"}'
    assert (fields_of(answer, ("a", "b")) == {"a": "One. Two.", "b": "Three."}) is is_read


def test_texts_are_known_to_end() -> None:
    assert (ended("It stops"), ended("It stops."), ended(""), ended("5"), ended("so)")) == (
        "It stops.",
        "It stops.",
        "",
        "5.",
        "so)",
    )
    assert bare(' "It stops", }') == "It stops." and bare("It stops, }") == "It stops" and bare("“Go”") == "Go."
    assert flat({"a": "One", "b": ["Two.", 3]}) == "One. Two. " and flat(None) == "" and flat("x") == "x"
    assert first_words("One two. Three four.", 3) == "One two." and first_words("One two. Three four.", 4).endswith(
        "four."
    )
    assert first_words("", 3) == "" and first_words("One two three four.", 2) == "One two"


def test_the_memory_after_a_prompt_is_bounded() -> None:
    memory = Memory(IDENTITY, SUBJECT, camera="slow pan left", end_state="before", prompts=("a", "b", "c"))
    end = f"{filler(40)}. {filler(9)}."
    whole, after = read_next_prompt(reply(WALKS, f"pan {filler(25)}", end), memory, "")
    assert whole == f"{WALKS} {KEEP}" and after.prompts == ("b", "c", WALKS)
    assert after.end_state == f"{filler(40)}." and after.camera == f"pan {filler(19)}"
    assert read_next_prompt(reply(WALKS), memory, "she swims")[0] == WALKS  # which may change what stays the same
    plain = "A woman in a red coat walks on to the water and slows down."
    assert read_next_prompt(reply(plain, "", ""), memory, "")[1] == replace(
        memory, end_state="", prompts=("b", "c", f"{plain} Camera: slow pan left.")
    )
    # of a prompt that names it, the memory keeps the camera's sentence
    assert read_next_prompt(reply(WALKS, ""), memory, "")[1].camera == "The camera pans left slowly"


def test_a_fallback_forgets_how_the_clip_was_to_end() -> None:
    memory = replace(KNOWN, end_state="at the water", prompts=("She waits.",))
    made = beat(Scripted("No.", "No."), memory)
    assert made.memory == replace(memory, end_state="") and made.prompt == description()
