"""From what a VLM says to what the text encoder reads."""

from __future__ import annotations

import logging
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable

from wan.captioner.base import OFFER
from wan.errors import UserError

logger = logging.getLogger(__name__)

_CLOSERS = "\"'”’)\\]」』）"
_SENTENCE_END = (
    rf"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)[.!?…]+[{_CLOSERS}]*(?=\s+[^a-z\s]|\s*$)|[。！？]+[{_CLOSERS}]*"
)
_SENTENCE = re.compile(rf"\S.*?(?:{_SENTENCE_END}|$)")
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # written without spaces, so that a character is as good as a word
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_BARE_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’-][^\W_{_CJK}]+)*")

_REASONING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_BOX = re.compile(r"<box>.*?</box>", re.DOTALL)
_TAG = re.compile(r"<\|[^|<>]*\|>|</?[A-Za-z][^<>]{0,60}>")  # </s> in a caption would end the prompt there
_FENCE_OR_RULE = re.compile(r"^\s*(?:```.*|(?:[-*_]\s*){3,})$", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_BLOCK = re.compile(r"^\s*(?:>\s*)?(?:#{1,6}|[-*+•]|\d{1,2}[.)])\s+")
_EMPHASIS = re.compile(r"[*`]+|__|(?<!\w)_(?=\S)|(?<=\S)_(?!\w)")
_FRAME = r"frames?\s*[#-]?\s*\d+(?:\s*(?:(?:-|–|to|through|and|&)\s*(?:frames?\s*)?#?|,\s*frames?\s*)\d+)*"
_FRAME_MENTION = re.compile(
    rf",?\s*(?:\(\s*{_FRAME}\s*\)|(?:\b(?:in|from|at|by|on|of|during|until)\s+)?\b{_FRAME}\b"
    r"(?:\s*[:：,，]|\s+(?:shows?|depicts?|captures?|features?)\b)?)\s*(?P<next>\w?)",
    re.IGNORECASE,
)


def without_reasoning(text: str) -> str:
    """A VLM's answer without what it thought before answering."""
    return _REASONING.sub(" ", text).rpartition("</think>")[2]  # a chat template may have opened the block itself


def bare_words(text: str) -> list[str]:
    """The words of a text in lower case without punctuation; a Chinese or Japanese character is a word."""
    return _BARE_WORD.findall(text.casefold())


def sentences(text: str) -> list[str]:
    """The sentences of a text that is on one line."""
    return [match.group() for match in _SENTENCE.finditer(text)]


def clean_caption(text: str) -> str:
    """A VLM's answer -> plain sentences on one line, possibly none.

    Reasoning, tags, Markdown, mentions of frames and control characters go, and so does a last sentence that was cut
    off, unless it is the only one.
    """
    text = without_reasoning(text)
    text = _TAG.sub(" ", _BOX.sub(" ", text))
    text = "".join(char if _is_text(char) else " " if char in "\t\v\f" else "" for char in text.replace("\r", "\n"))
    text = _LINK.sub(r"\1", _FENCE_OR_RULE.sub("", text))
    text = " ".join(_plain_line(line) for line in text.split("\n"))
    text = _FRAME_MENTION.sub(_without_mention, " ".join(text.split()))
    text = re.sub(r"\s+(?=[,.;:!?](?:\s|$))", "", " ".join(text.split()))
    *whole, last = sentences(text) or [""]
    if whole and not re.search(rf"(?:{_SENTENCE_END})$", last):
        text = text[: text.rindex(last)]
    return text.strip()


def compose_prompt(user_text: str, caption: str, count_tokens: Callable[[str], int], limit: int = 512) -> str:
    """The user's text, then as many whole sentences of the cleaned caption as fit into `limit` tokens.

    `count_tokens` counts all the encoder sees, the final </s> too. Where not even one sentence fits, the caption is
    cut at a whole word. The user's text is never cut: the encoder truncates it. Raises UserError for an empty caption.
    """
    user_text, caption = user_text.strip(), clean_caption(caption)
    if not caption:
        raise UserError(f"the caption holds no usable text: ask with another `vlm_question`, {OFFER}")
    for unit in (_SENTENCE, _WORD):
        prompts = [f"{user_text} {caption[: match.end()]}".strip() for match in unit.finditer(caption)]
        if fitting := bisect_right(prompts, limit, key=count_tokens):
            return prompts[fitting - 1]
    logger.warning("the prompt leaves no room for the caption: it has %d of %d tokens", count_tokens(user_text), limit)
    return user_text


def _is_text(char: str) -> bool:
    """Whether a character is more than control, surrogate or unassigned; joiners shape emoji and some scripts."""
    return char in "\n\u200c\u200d" or unicodedata.category(char)[0] != "C"


def _plain_line(line: str) -> str:
    """A line without Markdown; headings and list items become sentences."""
    plain = _BLOCK.sub("", line)
    is_block = plain != line
    plain = _EMPHASIS.sub("", plain).strip()
    return f"{plain}." if is_block and plain and (plain[-1].isalnum() or plain[-1] in ")\"'”’") else plain


def _without_mention(mention: re.Match[str]) -> str:
    """The letter after a mention of frames, a capital if the mention opened a sentence."""
    before = mention.string[: mention.start()].rstrip()
    opens = not before or before[-1] in ".!?:。！？："
    return f" {mention['next'].upper() if opens else mention['next']}"
