"""From what a VLM says to what the text encoder reads."""

from __future__ import annotations

import ast
import html
import json
import logging
import re
import unicodedata
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from wan.captioner.base import MOST_CHARACTERS
from wan.captioner.talk import ABOUT_ITSELF, BUT, CLOSING, LEAD_IN, REFUSAL
from wan.errors import UserError
from wan.weights.hub import OFFER

logger = logging.getLogger(__name__)

_CLOSERS = "\"'”’)\\]」』）"
_SENTENCE_END = (
    rf"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)[.!?…]+[{_CLOSERS}]*(?=\s+[^a-z\s]|\s*$)"
    rf"|[。！？।॥؟۔]+[{_CLOSERS}]*"
)
_SENTENCE = re.compile(rf"\S.*?(?:{_SENTENCE_END}|$)")
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # written without spaces, so that a character is as good as a word
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_CHARACTER = re.compile(r"\S")
_BARE_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’-][^\W_{_CJK}]+)*")

_THOUGHT = r"think|thinking|thought|reasoning|reflection|tool_call"
_REASONING = re.compile(rf"<({_THOUGHT})>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(rf"</(?:{_THOUGHT})>", re.IGNORECASE)
_CHANNEL = re.compile(r"<\|channel\|>\s*final\b[^<]{0,60}<\|message\|>")  # gpt-oss's way to begin its answer
_ROLE = re.compile(r"\A\s*(?:(?:assistant|model)\s*\n|\[/INST\])", re.IGNORECASE)  # a template's
_STEPS = re.compile(  # "Thought: … Answer: …"
    r"\A\s*(?:thought|reasoning|analysis)\s*:.*^\s*(?:final )?answer\s*:", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}{1,2}")
_BOX = re.compile(r"<box>.{0,500}?</box>", re.DOTALL)
_SPACES, _LINES = re.compile(r"[^\S\n]+"), re.compile(r"\n(?:[^\S\n]*\n)+")
_RUN = re.compile(
    rf"([.!?…]{{3}}|[{_CLOSERS}]{{3}}|[-*_|`#>:]{{40}})(?:(?<=[.!?…])[.!?…]+|(?<=[{_CLOSERS}])[{_CLOSERS}]+|(?<=[-*_|`#>:])[-*_|`#>:]+)"
)
# </s> in a caption would end the prompt there. "x<y and y>z" is none: an opening tag stands apart from words, and what
# follows its name are attributes.
_TAG = re.compile(
    r"<\|[^|<>]*\|>|</[A-Za-z][\w:-]{0,60}\s*>|<[A-Za-z][\w:-]{0,60}\s*/>"
    r"|(?<!\w)<[A-Za-z][\w:-]{0,60}(?:\s+[\w:-]{1,60}=[^<>\s]{0,200})*\s*/?>"
    r"|<(?:lora|lyco|hypernet):[^<>\s]{1,100}>"
)
_ENTITY = re.compile(r"&(?:[A-Za-z]{2,8}|#\d{2,6}|#x[0-9A-Fa-f]{2,5});")
_WRITTEN_LINE_END = re.compile(r"(?<=[.!?:;,\"])(?:\\n)+|(?:\\n)+\s*\Z")  # as two characters
_FORUM = re.compile(r"\[/?(?:b|i|u|s|url|quote|center|color|size)(?:=[^\]\n]{0,100})?\]", re.IGNORECASE)
_NOTE = re.compile(r"(?<=[\w.,;!?)])\[\d{1,2}\]")  # of a source
_FENCE_OR_RULE = re.compile(r"^\s*(?:```.*|(?:[-*_]\s*){3,})$", re.MULTILINE)
_LINK = re.compile(r"!\[[^\]]{0,300}\]\([^)]{0,500}\)|\[([^\]]{0,300})\]\([^)]{0,500}\)")  # of a picture nothing stays
_ESCAPE = re.compile(r"\x1b\[[0-9;]{0,20}[A-Za-z]")  # a colour of a terminal
_QUOTED = re.compile(r"^\s*(?:>\s?)+")
_BLOCK = re.compile(r"^\s*(?:#{1,6}|[-*+•]|\d{1,2}[.)])\s+")
_EMPHASIS = re.compile(
    r"`+|__|(?<!\d)\*{2,3}|\*{2,3}(?!\d)|(?<![\w)*])[*_](?=\S)|(?<=\S)[*_](?![\w(*])"  # 5*3*2 is no emphasis
)
_TABLE_RULE = re.compile(r"^\s*\|?(?:\s*:?-{2,}:?\s*\|)+(?:\s*:?-{2,}:?\s*)?$", re.MULTILINE)
_TABLE_ROW = re.compile(r"^\s*\|(.+)\|\s*$")
_FRAME = r"frames?\s*[#-]?\s*\d+(?:\s*(?:(?:-|–|to|through|and|&)\s*(?:frames?\s*)?#?|,\s*frames?\s*)\d+)*"
_FRAME_MENTION = re.compile(
    rf",?\s*(?:\(\s*{_FRAME}\s*\)|(?:\b(?:in|from|at|by|on|of|during|until)\s+)?\b{_FRAME}\b"
    r"(?:\s*[:：,，]|\s+(?:shows?|depicts?|captures?|features?)\b)?)\s*(?P<next>\w?)",
    re.IGNORECASE,
)

_JSON_VALUE = re.compile(r'[:\[,]\s*"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*)(?:"(?!\s*:)|$)')

_NUMBER = re.compile(r"\d+(?:st|nd|rd|th)?")
_LONGEST_LOOP = 30  # words that come again and again
_LONGEST_LIST, _OF_A_COUNT = 8, 3  # sentences that are nearly alike: of a list, and that stay of what counts
_FEWEST_WORDS = 8  # of a description that stands beside a refusal


def without_reasoning(text: str) -> str:
    """A VLM's answer without what it thought before answering."""
    # a chat template may have opened the block itself
    answer = _THOUGHT_END.split(_REASONING.sub(" ", _CHANNEL.split(text)[-1]))[-1]
    return _STEPS.sub("", _ROLE.sub("", answer))


def bounded(text: str) -> str:
    """A text of bearable length without long runs of one kind, which patterns would try from each of their places."""
    return _RUN.sub(r"\1", _SPACES.sub(" ", _LINES.sub("\n", text[:MOST_CHARACTERS])))


def bare_words(text: str) -> list[str]:
    """The words of a text in lower case without punctuation; a Chinese or Japanese character is a word."""
    return _BARE_WORD.findall(text.casefold())


def sentences(text: str) -> list[str]:
    """The sentences of a text that is on one line."""
    return [match.group() for match in _SENTENCE.finditer(text)]


def refusal(answer: str) -> str | None:
    """What a VLM says where it declines to describe, on one line of up to 200 characters; None for a description.

    An answer that declines a part and describes the rest is a description.
    """
    text = " ".join(_TAG.sub(" ", _answered(answer)).split())
    first, *rest = sentences(_without_talk(text)) or [""]
    if not first and bare_words(text):  # it talks, and describes nothing
        return shortened(text)
    opening = REFUSAL.match(first.lstrip(_CLOSERS + "*_#¡ "))
    if opening is None or BUT.search(first, opening.end()):
        return None
    described = [one for one in rest if not (REFUSAL.match(one) or CLOSING.match(one) or ABOUT_ITSELF.search(one))]
    if len(bare_words(" ".join(described))) >= _FEWEST_WORDS:
        return None
    return shortened(text)


def shortened(text: str) -> str:
    """A text of up to 200 characters."""
    return text if len(text) <= 200 else f"{text[:197]}..."


def _answered(answer: str) -> str:
    """What a VLM says after thinking: of JSON its words, and what is written with escapes as what it stands for."""
    text = _words_of_json(bounded(without_reasoning(answer)))
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), _WRITTEN_LINE_END.sub(" ", text))


def clean_caption(text: str) -> str:
    """A VLM's answer -> plain sentences on one line, possibly none.

    Reasoning, tags, Markdown, mentions of frames, talk to the reader, control characters and what is said again and
    again go, and so does a last sentence that was cut off, unless it is the only one. Of JSON and of tables the words
    stay, as sentences.
    """
    text = _NOTE.sub("", _FORUM.sub("", _answered(text)))
    text = _ESCAPE.sub("", _TAG.sub(" ", _BOX.sub(" ", _BOXED.sub(r"\1", text))))
    text = "".join(char if _is_text(char) else " " if char in "\t\v\f" else "" for char in text.replace("\r", "\n"))
    text = _LINK.sub(lambda link: link[1] or "", _FENCE_OR_RULE.sub("", _TABLE_RULE.sub("", text)))
    text = " ".join(_plain_line(line) for line in text.split("\n"))
    text = _FRAME_MENTION.sub(_without_mention, " ".join(text.split()))
    text = re.sub(r"(?:(?<=[.!?])\s+|^\s*)\.(?=\s|$)", "", " ".join(text.split()))  # of a sentence that was a mention
    text = re.sub(r"\s+(?=[,.;:!?](?:\s|$))", "", " ".join(text.split()))
    text = _without_loops(_without_talk(text))
    *whole, last = sentences(text) or [""]
    if whole and not re.search(rf"(?:{_SENTENCE_END})$", last):
        text = text[: text.rindex(last)]
    return text.strip()


def compose_prompt(user_text: str, caption: str, count_tokens: Callable[[str], int], limit: int = 512) -> str:
    """The user's text, then as many whole sentences of the cleaned caption as fit into `limit` tokens.

    `count_tokens` counts all the encoder sees, the final </s> too. Where not even one sentence fits, the caption is
    cut at a whole word, and where the first is too long, as in languages without blanks, within it. The user's text is
    never cut: the encoder truncates it. Raises UserError for an empty caption.
    """
    user_text, caption = user_text.strip(), clean_caption(caption)
    if not any(char.isalnum() or unicodedata.category(char) == "So" for char in caption):  # an emoji says something
        raise UserError(f"the caption holds no usable text: ask with another `vlm_question`, {OFFER}")
    for unit in (_SENTENCE, _WORD, _CHARACTER):
        prompts = [f"{user_text} {caption[: match.end()]}".strip() for match in unit.finditer(caption)]
        if fitting := bisect_right(prompts, limit, key=count_tokens):
            return prompts[fitting - 1]
    logger.warning("the prompt leaves no room for the caption: it has %d of %d tokens", count_tokens(user_text), limit)
    return user_text


def _words_of_json(answer: str) -> str:
    """The texts in an answer that is JSON, each as a sentence; any other answer as it is."""
    bare = re.sub(r"^\s*```\w*\s*|\s*```\s*$", "", answer).strip()
    if not bare.startswith(("{", "[")):
        return answer
    try:
        return _said_in(json.loads(bare, strict=False))
    except RecursionError:
        return answer
    except ValueError:  # Python's spelling, or it may have been cut off, in its last text too
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            if isinstance(value := ast.literal_eval(bare), dict | list):
                return _said_in(value)
        texts = [json.loads(f'"{text}"') for text in _JSON_VALUE.findall(bare)]
        return " ".join([*map(_said_in, texts[:-1]), *texts[-1:]]) or answer


def _said_in(value: object, name: str = "") -> str:
    if isinstance(value, dict):
        return " ".join(_said_in(one, str(key)) for key, one in value.items())
    if isinstance(value, list):
        return " ".join(_said_in(one, name) for one in value)
    if value is None:
        return ""
    text = value.strip() if isinstance(value, str) else f"{name} {value}".strip()
    return f"{text}." if text and (text[-1].isalnum() or text[-1] in _CLOSERS) else text


def _without_talk(text: str) -> str:
    """A text without what a chat model says to the reader before and after its answer."""
    if lead := LEAD_IN.match(text):
        text = text[lead.end() : lead.end() + 1].upper() + text[lead.end() + 1 :]
    sentences = list(_SENTENCE.finditer(text))
    while sentences and CLOSING.match(sentences[-1].group()):
        text = text[: sentences.pop().start()].rstrip()
    return text


def _without_loops(text: str) -> str:
    """A text with each sentence once, and with words once that come three times or more in a row.

    Up to eight sentences that differ in their numbers, or in one word, are a list of what is seen. More of them are a
    model that goes on and on: of those that count the first three stay, of the others the first eight.
    """
    sentences = [
        (text[sentence.start() - 1].isspace(), plain, tuple(bare_words(plain)))
        for sentence in _SENTENCE.finditer(text)
        if (plain := _without_stutter(sentence.group()))
    ]
    alike = Counter(form for words in {words for *_, words in sentences} for form in _forms(words))
    seen, kept = set[tuple[str, ...]](), Counter[tuple[str, ...]]()
    again = ""
    for is_apart, plain, words in sentences:
        forms = _forms(words)
        most = ((form, _OF_A_COUNT if form is forms[0] else _LONGEST_LIST) for form in forms)
        if words and (
            words in seen or any(alike[form] > _LONGEST_LIST and kept[form] >= limit for form, limit in most)
        ):
            continue
        seen.add(words)
        kept.update(forms)
        again += (" " if again and is_apart else "") + plain
    if (lost := len(bare_words(text)) - len(bare_words(again))) > 0:
        logger.warning("the VLM repeats itself: %d words of its answer are left out", lost)
    return again


def _forms(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What sentences have in common that differ in their numbers, and in one word."""
    numbers = tuple("0" if _NUMBER.fullmatch(word) else word for word in words)
    if not 3 <= len(words) <= _LONGEST_LOOP:
        return [numbers]
    return [numbers, *((*words[:index], "", *words[index + 1 :]) for index in range(len(words)))]


def _without_stutter(sentence: str) -> str:
    words = list(_WORD.finditer(sentence))
    bare = [" ".join(bare_words(word.group())) for word in words]
    kept, begin, at, is_cut = "", 0, 0, False  # `is_cut`: it begins with another word than before
    while at < len(words):
        for length in range(1, min(_LONGEST_LOOP, (len(words) - at) // 3) + 1):
            loop, end = bare[at : at + length], at + length
            while any(loop) and bare[end : end + length] == loop:
                end += length
            if end >= at + 3 * length:  # the last time is the one that ends as the sentence does
                kept += sentence[begin : words[at].start()]
                begin = words[end - length].start()
                is_cut = is_cut or at == 0
                at = end - length
                break
        else:
            at += 1
    text = kept + sentence[begin:]
    if is_cut:
        start = words[0].start()
        text = text[:start] + text[start].upper() + text[start + 1 :]
    return text


def _is_text(char: str) -> bool:
    """Whether a character is more than control, surrogate or unassigned; joiners shape emoji and some scripts."""
    return char in "\n\u200c\u200d" or unicodedata.category(char)[0] != "C"


def _plain_line(line: str) -> str:
    """A line without Markdown; headings, list items and rows of a table become sentences."""
    row = _TABLE_ROW.sub(lambda row: ", ".join(cell.strip() for cell in row[1].split("|") if cell.strip()), line)
    unquoted = _QUOTED.sub("", row)
    plain = _BLOCK.sub("", unquoted)
    is_block = plain != unquoted or row != line
    plain = _EMPHASIS.sub("", plain).strip()
    return f"{plain}." if is_block and plain and (plain[-1].isalnum() or plain[-1] in ")\"'”’") else plain


def _without_mention(mention: re.Match[str]) -> str:
    """The letter after a mention of frames, a capital if the mention opened a sentence."""
    before = mention.string[: mention.start()].rstrip()
    opens = not before or before[-1] in ".!?:。！？："
    return f" {mention['next'].upper() if opens else mention['next']}"
