"""What a clip is prompted with: what the captioner says, unless it declines, and what the storyboard puts before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Seen, Speaking

NO = "I'm sorry, but I can't assist with that request."


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Lets the captioner give these answers, the last one for ever."""

    def script(answers: Sequence[str]) -> None:
        left = list(answers)

        def describe(self: Speaking, frames: Any, question: str, *_: Any, **__: Any) -> str:
            self.seen.asked.append((len(frames), question))
            return left.pop(0) if len(left) > 1 else left[0]

        monkeypatch.setattr(Speaking, "describe", describe)

    return script


def prompts(seen: Seen) -> list[str]:
    return [clip.record["prompt"] for _, clip in sorted(seen.clips.items())]


def test_a_refusal_is_asked_again(command: Callable[..., Seen], says: Callable[[Sequence[str]], None]) -> None:
    says([NO, "A boat turns."])
    seen = command("")
    assert seen.code == 0 and prompts(seen) == ["continue video A boat turns."] * 2
    assert seen.clips[1].record["answers"] == [NO, "A boat turns."]
    assert len({question for _, question in seen.asked[:2]}) == 2  # in other words: decoding is greedy


@pytest.mark.parametrize("mode", ["describe", "continue"])
def test_a_second_refusal_stops_the_run_before_sampling_with_its_text(
    command: Callable[..., Seen], says: Callable[[Sequence[str]], None], mode: str
) -> None:
    says([NO])
    seen = command(f"--prompt_mode {mode}")
    assert seen.code == 2 and not seen.requests
    assert "can't assist with that request" in seen.output and "--vlm_fallback" in seen.output


@pytest.mark.parametrize("mode", ["describe", "continue"])
def test_the_fallback_takes_its_place(
    command: Callable[..., Seen], says: Callable[[Sequence[str]], None], mode: str
) -> None:
    says([NO])
    seen = command(f"--prompt_mode {mode} --vlm_fallback boats")
    assert seen.code == 0
    assert all(prompt.startswith("continue video boats") for prompt in prompts(seen))
    assert NO in seen.clips[1].record["answers"] and "decline" in seen.clips[1].record["fallback"].replace(
        "declined", "declines"
    )
    assert not command(f"--prompt_mode {mode} --vlm_fallback boats").requests  # resumes as it is


def test_a_loop_is_one_sentence_in_every_clip(
    command: Callable[..., Seen], says: Callable[[Sequence[str]], None]
) -> None:
    says(["The sea is calm. " * 125])
    assert prompts(command("")) == ["continue video The sea is calm."] * 2


@pytest.mark.parametrize("words", ["--prompt=", "--vlm_question=", "--vlm_fallback="])
def test_a_text_that_says_nothing_is_refused(command: Callable[..., Seen], words: str) -> None:
    seen = command(words)
    assert seen.code == 2 and f"{words[:-1]} is empty; write something or leave it out" in seen.output


@pytest.mark.parametrize(
    ("board", "expected"),
    [
        ('defaults: {custom_prompt: ""}\nclips: [{}, {custom_prompt: slowly}]', ["{}", "slowly {}"]),
        ('- {custom_prompt: ""}\n- {}', ["{}", "continue video {}"]),
    ],
)
def test_a_storyboard_says_what_goes_before_a_prompt(
    command: Callable[..., Seen], tmp_path: Path, board: str, expected: list[str]
) -> None:
    (tmp_path / "story.yaml").write_text(board)
    seen = command(f"--storyboard {tmp_path / 'story.yaml'}")
    assert prompts(seen) == [one.format("A red square slides to the right.") for one in expected]


def test_a_dry_run_shows_each_whole_prompt(command: Callable[..., Seen], tmp_path: Path) -> None:
    long = " ".join(f"word{number}" for number in range(80))
    (tmp_path / "story.yaml").write_text(f"- {long}\n- the end\n")
    words = f"--storyboard {tmp_path / 'story.yaml'}"
    assert f"continue video {long}\n" in command(f"{words} --dry_run").output
    assert command(f"{words} --num_videos 1").code == 0
    output = command(f"{words} --dry_run").output
    assert f"(finished) continue video {long}\n" in output and "continue video the end\n" in output
