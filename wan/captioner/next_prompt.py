"""What happens next: the prompt for the next clip, asked of a VLM that sees how the last one ended, and checked."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from wan.captioner.base import Captioner
from wan.captioner.text import bare_words, bounded, clean_caption, compose_prompt, refusal, sentences, without_reasoning
from wan.errors import UserError
from wan.types import UInt8Array

logger = logging.getLogger(__name__)
T = TypeVar("T")

IDENTITY_TOKENS, PROMPT_TOKENS = 192, 384  # what may be answered; about twice what is asked for
IDENTITY_WORDS, SUBJECT_WORDS, CAMERA_WORDS, END_WORDS = 60, 8, 20, 40
PROMPT_WORDS = range(5, 101)
REMEMBERED = 3  # prompts
ATTEMPTS = 2  # answers that are asked for before the description takes their place
OVERLAP = 0.6  # share of words in common with the prompt before at which a prompt says the same again
KEEP = "Same look, place, light and colours."  # ends a prompt without a goal, which may change any of them

IDENTITY_QUESTION = f"""\
These frames are samples of one video, in order. Reply with JSON only, in English, with these two keys:
"subject": the main subject in at most {SUBJECT_WORDS} words, as a script would name it;
"identity": at most 50 words on what stays the same throughout: how the subject looks and is dressed, with colours, \
then the place, the light and the visual style.
Say only what is visible. No movement, no action, no camera, no mention of frames or of a video."""

PROMPT_QUESTION = """\
These frames end a video. They were taken this many seconds before its end: {times}.
{facts}
Write the prompt from which a video generator makes the next {seconds:g} seconds. It starts at the last frame.
- Begin with {subject}, then say what happens next, starting from the pose, place and speed in the last frame.
- {movement}
- At most two actions, both short enough for {seconds:g} seconds.
- Then one sentence on the camera: {camera} Name one move with its direction and pace, or "static camera".
- Then one short sentence on what moves in the surroundings.
- Do not tell what has happened already, do not repeat an earlier prompt, do not describe looks, clothes or place.
- Nobody and nothing new comes in unless it is wanted. Leave out what the picture does not show, and moods.
- Present tense, plain English sentences, 40 to 80 words. No cut, fade or freeze; never mention frames or a video.
Reply with JSON only, with these three keys:
"prompt": the prompt;
"camera": the camera move in at most 8 words;
"end_state": pose, place, gaze and speed of the subject after those {seconds:g} seconds, in at most 25 words."""

GO_ON = "First continue the movement that is going on; a new action starts only after it."
BEGIN = "Nothing moves at the end: begin a new action that fits the scene and moves clearly."
AGAIN = "\n\nAn earlier answer was rejected because {reasons}. Give a different answer that puts this right."

_THE_VIDEO = re.compile(
    r"\b(?:the|this|next|previous)\s+(?:video|clip|footage)\b"
    r"|\bthe\s+(?:scene|sequence|image|frame|shot)\s+(?:shows?|ends?|begins?|starts?|depicts?|captures?|opens?|closes?)\b",
    re.IGNORECASE,
)
_CUT = re.compile(r"\b(?:cuts? to|fad(?:es?|ing) (?:to|out|in)|freezes?|freeze[- ]frame|still image)\b", re.IGNORECASE)
_PAST_VERB = (
    r"(?:\w{2,}(?<!e)ed|ran|stood|sat|began|went|came|took|fell|rose|held|left|flew|swam|drove|rode|threw|gave|kept)\b"
    r"(?!\s+(?:in|with|by)\b)"  # a participle: dressed in red
)
_IN_MOTION = re.compile(
    r"\b(?:walk|runn|mov|turn|jump|driv|fly|danc|swimm|rotat|spinn|climb|throw|approach)ing\b(?!\s+(?:shoe|boot))",
    re.IGNORECASE,
)
_CAMERA = re.compile(r"\bcamera\b|\bvideo\b|\bframes\b|\b(?:zoom|pann|tilt)(?:s|ing)\b", re.IGNORECASE)
_CAMERA_SENTENCE = re.compile(r"\b(?:camera|shot|lens|viewpoint)\b", re.IGNORECASE)
_MOST_BRACES = 20  # where JSON may begin in an answer: each is read to its end
_ON = r"(?:\s+\w+ly)*(?:\s+to\s+the)?\s+"
_WAY = rf"(?={_ON}(?:left|right|up|down|in|out|back|closer|away|forward|along|across)\b)"
_MOVES = {  # forms that are hardly ever anything else in a sentence on the camera
    "pan": rf"\bpan(?:s|ning)?\b{_WAY}",
    "tilt": r"\btilt(?:s|ing)?\b",
    "zoom": rf"\b(?:zoom(?:s|ing)?|doll(?:y|ies|ying)|push(?:es|ing)?|pull(?:s|ing)?)\b{_WAY}",
    "track": rf"\b(?:track|truck)(?:s|ing)?\b{_WAY}",
    "circle": r"\b(?:orbits?|orbiting|circles|circling)\b",
    "crane": rf"\bcran(?:es?|ing)\b{_WAY}",
    "static": r"\b(?:static|stationary)\b",
}
_DIRECTION = re.compile(rf"(?:{'|'.join(_MOVES.values())}){_ON}(left|right|up|down|in|out)\b", re.IGNORECASE)

_COLOURS = {  # shade -> colour
    shade: colour
    for colour, shades in {
        "red": "red crimson scarlet",
        "yellow": "yellow gold golden blond blonde",
        "blue": "blue navy",
        "purple": "purple violet",
        "grey": "grey gray silver",
    }.items()
    for shade in bare_words(shades)
} | {colour: colour for colour in ("orange", "green", "pink", "brown", "black", "white")}
_STOP = frozenset(
    bare_words(
        "a an and as at by for from he her his in into is it its of on or she so that the their them then they this to "
        "up while who with"
    )
)


@dataclass(frozen=True)
class Memory:
    """What a chain remembers from clip to clip; kept in the sidecar of each.

    `identity` (at most 60 words on looks, place, light and style) and `subject` (at most 8) are fixed at the first
    clip. `camera` and `end_state` are those of the last prompt, `prompts` the last three, oldest first.
    """

    identity: str = ""
    subject: str = ""
    camera: str = ""
    end_state: str = ""
    prompts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return asdict(self) | {"prompts": list(self.prompts)}

    @classmethod
    def from_json(cls, content: object) -> Memory:
        """The memory in a JSON object; a missing key is an empty one. Raises UserError that names what is wrong."""
        if not isinstance(content, Mapping):
            raise UserError(f"the prompt memory is {type(content).__name__}, not a JSON object: start a new chain")
        known = {field.name for field in fields(cls)}
        for name, value in content.items():
            if name not in known:
                raise UserError(f"the prompt memory has an unknown entry {name!r}: start a new chain")
            texts = value if name == "prompts" else [value]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                kind = "a list of texts" if name == "prompts" else "a text"
                raise UserError(f"{name} in the prompt memory is not {kind}: start a new chain")
        return cls(**{**content, "prompts": tuple(content.get("prompts", ()))})


@dataclass(frozen=True)
class NextPrompt:
    """The prompt for the next clip and how it came about."""

    prompt: str
    memory: Memory  # as it is after that clip
    answers: tuple[str, ...]  # all that the VLM said, as it said it, in order
    fallback: str | None  # why the prompt is a description instead, None if it is not


class Rejected(Exception):
    """An answer is of no use; the message says why, in words for the VLM."""


class Repeated(Rejected):
    """A prompt that says the same as the one before, and what was read: of use where the VLM has nothing else to say.

    In a steady scene the same goes on, and the prompt is at least as good as a description (benchmarks/LOG.md).
    """

    def __init__(self, prompt: str, memory: Memory) -> None:
        super().__init__("the prompt says the same as the one before")
        self.answer = prompt, memory


def next_prompt(
    captioner: Captioner,
    frames: UInt8Array,
    times: Sequence[float],
    *,
    motion: str,
    memory: Memory,
    goal: str = "",
    clip: int,
    clips: int,
    seconds: float,
    describe: Callable[[], str],
    still: bool = False,
) -> NextPrompt:
    """The prompt for clip `clip` of `clips`, counted from 1, that goes on for `seconds` from where the frames end.

    Frames uint8 [n, H, W, 3] in order, `times` in seconds relative to the end (negative to 0). `motion` is what was
    measured, in words; `still` says that nothing moves at the end. `goal` is what the user wants of the chain or of
    this clip. A prompt that says the same as the one before is asked for again, and then taken. Where the VLM gives
    nothing useful in two answers, the prompt is the goal and what `describe()` returns, with a warning. Raises what
    `describe` raises, UserError for a VLM that cannot be reached.
    """
    describe = functools.cache(describe)
    answers: list[str] = []

    def ask(question: str, read: Callable[[str], T], max_new_tokens: int) -> T:
        """What `read` makes of the first answer that it does not reject. Raises Rejected, and UserError."""
        reasons: list[str] = []
        for _ in range(ATTEMPTS):
            # greedy decoding: only another question gets another answer
            again = AGAIN.format(reasons="; ".join(reasons)) if reasons else ""
            answers.append(captioner.describe(frames, question + again, max_new_tokens=max_new_tokens))
            try:
                return read(answers[-1])
            except Rejected as error:
                reasons.append(str(error))
        raise Rejected("; ".join(dict.fromkeys(reasons)))

    # A UserError may mean an empty answer or a VLM that is gone; describe() tells, for it asks that VLM as well.
    if not memory.identity:
        try:
            identity, subject = ask(IDENTITY_QUESTION, read_identity, IDENTITY_TOKENS)
            memory = replace(memory, identity=identity, subject=subject)
        except (Rejected, UserError) as error:
            logger.warning(
                "what stays the same is taken from a description, because the VLM's answer failed: %s", error
            )
            memory = replace(memory, identity=first_words(describe(), IDENTITY_WORDS))
    try:
        question = next_prompt_question(times, motion, memory, goal, clip, clips, seconds, still)
        same: list[Repeated] = []

        def read(answer: str) -> tuple[str, Memory]:
            try:
                return read_next_prompt(answer, memory, goal)
            except Repeated as error:
                same.append(error)
                raise

        try:
            prompt, after = ask(question, read, PROMPT_TOKENS)
        except Rejected:
            if not same:
                raise
            prompt, after = same[-1].answer
    except (Rejected, UserError) as error:
        logger.warning("clip %d of %d is prompted with a description, because %s", clip, clips, error)
        return NextPrompt(f"{goal} {describe()}".strip(), replace(memory, end_state=""), tuple(answers), str(error))
    return NextPrompt(prompt, after, tuple(answers), None)


def next_prompt_question(
    times: Sequence[float],
    motion: str,
    memory: Memory,
    goal: str,
    clip: int,
    clips: int,
    seconds: float,
    still: bool,
) -> str:
    """All that is known, then the instruction: a model follows best what it reads last."""
    facts = {
        "Measured motion": motion,
        "Fixed, do not describe it again": memory.identity,
        "The last prompt was meant to end with (the frames decide)": memory.end_state,
        "Earlier prompts, oldest first": " / ".join(memory.prompts),
        f"What is wanted; this is part {clip} of {clips}, go only as far as it allows": goal,
    }
    return PROMPT_QUESTION.format(
        times=", ".join(f"Frame{number} {abs(time):.1f}" for number, time in enumerate(times, 1)),
        facts="\n".join(f"{name}: {text}" for name, text in facts.items() if text),
        seconds=round(seconds, 1),
        subject=f'exactly "{memory.subject}"' if memory.subject else "the main subject in at most 8 words",
        movement=BEGIN if still else GO_ON,
        camera=f'continue "{memory.camera}" unless another move is wanted.' if memory.camera else "go on as it moves.",
    )


def read_identity(answer: str) -> tuple[str, str]:
    """The identity and the subject in an answer. Raises Rejected."""
    fields = fields_of(answer, ("identity", "subject"))
    identity, subject = clean_caption(fields["identity"]), clean_caption(fields["subject"]).rstrip(".")
    faults = {
        "it declines": refusal(fields["identity"]),
        f'"subject" must have 1 to {SUBJECT_WORDS} words': not 1 <= len(bare_words(subject)) <= SUBJECT_WORDS,
        f'"identity" must have 3 to {IDENTITY_WORDS} words': not 3 <= len(bare_words(identity)) <= IDENTITY_WORDS,
        "it is not a text in words": not is_prose(f"{subject} {identity}"),
        "it tells a movement": _IN_MOTION.search(identity),
        "it mentions the camera, the frames or the video": _CAMERA.search(identity),
    }
    reject(faults)
    return identity, subject


def read_next_prompt(answer: str, memory: Memory, goal: str) -> tuple[str, Memory]:
    """The prompt in an answer, and the memory after it. Raises Rejected, Repeated where that is the one fault."""
    fields = fields_of(answer, ("prompt", "camera", "end_state"))
    prompt, camera = clean_caption(fields["prompt"]), first_words(fields["camera"], CAMERA_WORDS).rstrip(".")
    count = len(bare_words(prompt))
    on_camera = " ".join(sentence for sentence in sentences(prompt) if _CAMERA_SENTENCE.search(sentence))
    if not on_camera and (camera or memory.camera):
        prompt = f"{ended(prompt)} Camera: {camera or memory.camera}."
    camera = camera or first_words(on_camera, CAMERA_WORDS).rstrip(".")
    subject = set(bare_words(memory.subject))
    named = subject - _STOP
    before = memory.prompts[-1] if memory.prompts else ""
    doers = "|".join(["he", "she", "it", "they", "who", "then", *[re.escape(memory.subject)] * bool(memory.subject)])
    past = rf"\b(?:was|were|had|did)\b|\b(?:{doers})\s+(?:\w+ly\s+)?{_PAST_VERB}"
    wrong = recoloured(prompt, f"{memory.identity}. {goal}")
    faults = {
        "it declines": refusal(fields["prompt"]),
        f"the prompt has {count} words, not {PROMPT_WORDS[0]} to {PROMPT_WORDS[-1]}": count not in PROMPT_WORDS,
        "the prompt is not a text in words": not is_prose(prompt),
        f'the prompt does not begin with "{memory.subject}"': named and named.isdisjoint(bare_words(prompt)[:12]),
        "the prompt talks about the video instead of the scene": _THE_VIDEO.search(prompt),
        "the prompt asks for a cut, a fade or a freeze": _CUT.search(prompt),
        "the prompt is in the past tense": re.search(past, prompt, re.IGNORECASE),
        "the camera makes more than one move": not one_move(f"{on_camera} {camera}"),
        f"the colours changed ({', '.join(wrong)})": wrong,
    }
    reject(faults)
    whole = f"{ended(prompt)} {'' if goal else KEEP}".strip()
    after = replace(
        memory,
        camera=camera or memory.camera,
        end_state=first_words(fields["end_state"], END_WORDS),
        prompts=(*memory.prompts, prompt)[-REMEMBERED:],
    )
    if overlap(prompt, before, subject) > OVERLAP:
        raise Repeated(whole, after)
    return whole, after


def reject(faults: Mapping[str, object]) -> None:
    """Raises Rejected with the names of those that are true."""
    if present_faults := [fault for fault, present in faults.items() if present]:
        raise Rejected("; ".join(present_faults))


def fields_of(answer: str, names: tuple[str, ...]) -> dict[str, str]:
    """The named texts of an answer in JSON, in JSON that is broken or cut off, or behind labels at a line's start.

    A text without any label is the first field; what is missing is empty.
    """
    answer = re.sub(r"```\w*", "", bounded(without_reasoning(answer)))
    for brace in itertools.islice(re.finditer(r"\{", answer), _MOST_BRACES):
        try:
            whole, _ = json.JSONDecoder(strict=False).raw_decode(answer, brace.start())
        except (ValueError, RecursionError):
            continue  # not JSON from here; perhaps from the next brace, else it is read by its labels
        if names[0] in whole:
            return {name: ended(flat(whole.get(name))) for name in names}
    label = rf"(?:^|[{{,])\s*[\"'“”*]*({'|'.join(names)})[\"'“”*]*\s*:"
    first, *rest = re.split(label, answer, flags=re.IGNORECASE | re.MULTILINE)
    by_name = {name.lower(): text for name, text in zip(rest[::2], rest[1::2], strict=True)}
    by_name.setdefault(names[0], first)
    return {name: bare(by_name.get(name, "")) for name in names}


def flat(value: object) -> str:
    """The texts in a JSON value, one after another."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(ended(flat(item)) for item in value)
    return value if isinstance(value, str) else ""


def bare(text: str) -> str:
    """A text without the quotes, escapes and braces of broken JSON."""
    closed = text.rstrip(" \t\r\n,}").endswith(('"', "'", "”"))
    text = text.replace("\\n", " ").replace('\\"', '"').strip(" \t\r\n\"'“”*{},")
    return ended(text) if closed else text


def ended(text: str) -> str:
    """A text known to be whole, with a full stop, for a last sentence without one is taken for one that was cut off."""
    return f"{text}." if text[-1:].isalnum() else text


def first_words(text: str, limit: int) -> str:
    """The cleaned text's whole sentences within `limit` words, or its first words; possibly none."""
    text = clean_caption(text)
    return compose_prompt("", text, lambda part: len(bare_words(part)), limit) if text else ""


def is_prose(text: str) -> bool:
    """Whether a text is mostly letters, and does not go round in circles as a model does that has lost its way."""
    solid, words = "".join(text.split()), bare_words(text)
    return sum(map(str.isalpha, solid)) >= 0.8 * len(solid) and len(set(words)) >= 0.4 * len(words)


def one_move(text: str) -> bool:
    """Whether the camera does not move in two ways."""
    moves = [name for name, form in _MOVES.items() if re.search(form, text, re.IGNORECASE)]
    return len(moves) < 2 and len({way.lower() for way in _DIRECTION.findall(text)}) < 2


def overlap(prompt: str, other: str, ignored: set[str]) -> float:
    """The share of words that two texts have in common (Jaccard), 0 to 1, without `ignored` and little words."""
    one, two = (set(bare_words(text)) - ignored - _STOP for text in (prompt, other))
    return len(one & two) / max(len(one | two), 1)


def recoloured(prompt: str, known: str) -> list[str]:
    """What has a colour in the prompt that is not among those that it has in the known text: "blue coat"."""
    allowed: dict[str, set[str]] = {}
    for colour, thing in coloured(known):
        allowed.setdefault(thing, set()).add(colour)
    return [f"{colour} {thing}" for colour, thing in coloured(prompt) if colour not in allowed.get(thing, {colour})]


def coloured(text: str) -> list[tuple[str, str]]:
    """(colour, thing) for the two words after a colour: of "a red wool coat" both wool and coat are red."""
    pairs = []
    for clause in re.split(r"[.,;:]|\band\b|\bwith\b", text):
        words = bare_words(clause)
        for place, word in enumerate(words):
            if colour := _COLOURS.get(word):
                things = words[place + 1 : place + 3]
                pairs += [(colour, thing) for thing in things if thing not in _STOP and thing not in _COLOURS]
    return pairs
