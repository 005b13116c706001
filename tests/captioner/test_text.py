"""A caption becomes plain sentences, and fits behind the user's text."""

from __future__ import annotations

import logging

import pytest

from wan.captioner import clean_caption, compose_prompt
from wan.errors import UserError


@pytest.mark.parametrize(
    ("said", "clean"),
    [
        ("<think>hm\nwell</think>\n\n**A cat** runs.", "A cat runs."),
        ("the template opened it</think>The dog sits.", "The dog sits."),
        ("<think>and never got to the point", ""),
        ("Frame1: A cat sits. Frame 2: the cat jumps.", "A cat sits. The cat jumps."),
        ("In Frame 3, a cat sits. It runs (Frames 4-6) away.", "A cat sits. It runs away."),
        ("The lens, from Frame 1 through Frame 8, zooms in.", "The lens zooms in."),
        ("The frame rate is 24. A frame hangs there.", "The frame rate is 24. A frame hangs there."),
        ("### Scene\n- A *red* car\n- Two `dogs`.\n\n1. They run!\n---\n", "Scene. A red car. Two dogs. They run!"),
        ("A snake_case word, a _soft_ one and a [link](http://x).", "A snake_case word, a soft one and a link."),
        ("One\x00 two\x1b\u200b three\tfour\r\nfive .", "One two three four five."),
        ("The end </s> is <|im_end|> not <ref>here</ref><box>[[1, 2]]</box>.", "The end is not here."),
        ("A whole one. And one that was cut o", "A whole one."),
        ("一只猫。它在跑！然后", "一只猫。它在跑！"),
        ("only a fragment", "only a fragment"),
    ],
)
def test_caption_is_cleaned(said: str, clean: str) -> None:
    assert clean_caption(said) == clean
    assert clean_caption(clean) == clean


def words(text: str) -> int:
    return len(text.split()) + 1  # and the final </s>


@pytest.mark.parametrize(
    ("limit", "prompt"),
    [
        (99, "Go left. Mr. Fox sits. He jumps!"),
        (8, "Go left. Mr. Fox sits. He jumps!"),
        (7, "Go left. Mr. Fox sits."),
        (6, "Go left. Mr. Fox sits."),
        (5, "Go left. Mr. Fox"),  # not one sentence fits
    ],
)
def test_prompt_is_the_users_text_and_whole_sentences(limit: int, prompt: str) -> None:
    assert compose_prompt("Go left.", "Mr. Fox sits. He jumps!", words, limit) == prompt
    assert words(prompt) <= limit or limit == 99


def test_chinese_is_cut_at_sentences_then_at_characters() -> None:
    assert compose_prompt("", "一只猫在跑。它跳了。", len, 9) == "一只猫在跑。"
    assert compose_prompt("", "一只猫在跑。它跳了。", len, 4) == "一只猫在"


def test_a_long_text_of_the_user_stays_whole_and_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert compose_prompt("a b c d e", "A cat.", words, 3) == "a b c d e"
    assert "no room for the caption: it has 6 of 3 tokens" in caplog.text


def test_a_caption_with_nothing_in_it_stops_the_run() -> None:
    with pytest.raises(UserError, match="no usable text.*or give prompt"):
        compose_prompt("Go left.", "<think>hm", words)
