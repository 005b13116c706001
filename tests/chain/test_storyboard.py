"""Storyboards: what every form says, and every mistake with its line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from yaml import ScalarNode

from wan.chain import storyboard_file
from wan.chain.storyboard import Scene, ahead, check_storyboard, said_otherwise
from wan.chain.storyboard_file import read_storyboard
from wan.configs import WAN_CONFIGS
from wan.errors import UserError
from wan.options import Settings, by_scene_key

KEYS = by_scene_key()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, a damaged picture and LoRA files."""
    folder = tmp_path_factory.mktemp("storyboard")
    Image.new("RGB", (8, 6), "red").save(folder / "end.png")
    (folder / "broken.png").write_bytes((folder / "end.png").read_bytes()[:50])
    for name in ("a.safetensors", "b.safetensors", "with:colon.safetensors"):
        (folder / name).touch()
    return folder


@pytest.fixture
def folder(shared: Path) -> Path:
    for file in shared.glob("story*"):
        file.unlink()
    return shared


def write(folder: Path, content: str | bytes, suffix: str = ".yaml") -> Path:
    path = folder / f"story{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def clip(line: int, prompt: str | None = None, **settings: Any) -> Any:
    """What a scene says, by the storyboard's keys; None is left to the command line."""
    return SimpleNamespace(line=line, **dict.fromkeys(KEYS) | {"prompt": prompt} | settings)


def read(folder: Path, content: str | bytes, suffix: str = ".yaml") -> tuple[Any, ...]:
    scenes = read_storyboard(write(folder, content, suffix))
    return tuple(clip(scene.line, **{key: scene.values.get(one.name) for key, one in KEYS.items()}) for scene in scenes)


def refusal(folder: Path, content: str | bytes, suffix: str = ".yaml") -> str:
    path = write(folder, content, suffix)
    with pytest.raises(UserError) as caught:
        read_storyboard(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message.replace(str(path), "FILE").replace(str(folder), "FOLDER")


# What it says


FULL = """\
clips:
  - prompt: the boat turns left
    seed: 12
    frames: 81
    steps: 20
    guidance: [3.5, 4]
    shift: 5.0
    lora_high: [a.safetensors:0.8, b.safetensors]
    lora_low: b.safetensors:-1e-1
    lora: []
    end_image: end.png
    motion_amplitude: 1.25
    continuation: tail
    discard: 8
    fade: 8
    context: 5
    cut: end.png
  - the boat sinks
  - {}
"""


def test_a_clip_says_all_that_can_differ(folder: Path) -> None:
    a, b = (str(folder / name) for name in ("a.safetensors", "b.safetensors"))
    assert read(folder, FULL) == (
        clip(
            line=2,
            prompt="the boat turns left",
            seed=12,
            frames=81,
            steps=20,
            guidance=(3.5, 4.0),
            shift=5.0,
            lora=(),
            lora_high=(f"{a}:0.8", f"{b}:1.0"),
            lora_low=(f"{b}:-0.1",),
            end_image=str(folder / "end.png"),
            motion_amplitude=1.25,
            continuation="tail",
            discard=8,
            fade=8,
            context=5,
            cut=str(folder / "end.png"),
        ),
        clip(18, "the boat sinks"),
        clip(19),
    )


def test_json_says_the_same(folder: Path) -> None:
    content = {
        "defaults": {"steps": 30},
        "clips": [{"prompt": "a", "guidance": 1e1, "lora": ["with:colon.safetensors:.5"], "seed": None}, "b", {}],
    }
    for indent in (None, 2, "\t"):
        first, second, third = read(folder, json.dumps(content, indent=indent), ".json")
        assert (first.prompt, first.guidance, first.steps, first.seed) == ("a", (10.0, 10.0), 30, None)
        assert first.lora == (f"{folder}/with:colon.safetensors:0.5",)
        assert (second.prompt, third.prompt, third.steps) == ("b", None, 30)


def test_a_list_at_the_top_is_the_clips(folder: Path) -> None:
    assert read(folder, "- a\n- prompt: b\n") == (clip(1, "a"), clip(2, "b"))
    assert read(folder, '["a",\n {"prompt": "b"}]', ".json") == (clip(1, "a"), clip(2, "b"))


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".yaml", ""])
def test_anything_else_is_one_prompt_per_line(folder: Path, suffix: str) -> None:
    assert read(folder, "the boat turns\n\n  the boat sinks \n", suffix) == (
        clip(1, "the boat turns"),
        clip(3, "the boat sinks"),
    )


def test_a_text_file_takes_any_line_that_does_not_begin_with_a_hash(folder: Path) -> None:
    text = '\ufeff# a story\r\nNote: the boat\ttilts\r\n  # more\r\n"Go!" #1 & [x]\r123'
    assert [(s.line, s.prompt) for s in read(folder, text, ".txt")] == [
        (2, "Note: the boat\ttilts"),
        (4, '"Go!" #1 & [x]'),
        (5, "123"),
    ]


def test_a_clip_goes_before_the_defaults_and_null_leaves_it_to_the_command_line(folder: Path) -> None:
    content = (
        "defaults: {steps: 30, shift: 3, cut: end.png}\n"
        "clips: [{steps: 20}, {steps: null, cut: false}, {steps: }, {cut: true}]"
    )
    scenes = read(folder, content)
    assert [scene.steps for scene in scenes] == [20, None, None, 30]
    assert [scene.cut for scene in scenes] == [f"{folder}/end.png", None, f"{folder}/end.png", True]
    assert {scene.shift for scene in scenes} == {3.0}
    assert read(folder, "defaults:\nclips: [a]") == (clip(2, "a"),)


def test_anchors_and_merge_keys(folder: Path) -> None:
    content = (
        "- &first {prompt: a, steps: 20}\n"
        "- &second {<<: *first, prompt: b, seed: 7}\n"
        "- <<: [{prompt: c}, *second]\n"
        "- *first\n"
        "- &self {<<: *self, steps: 3}\n"
    )
    scenes = read(folder, content)
    assert [(s.prompt, s.steps, s.seed) for s in scenes] == [
        ("a", 20, None),
        ("b", 20, 7),
        ("c", 20, 7),
        ("a", 20, None),
        (None, 3, None),
    ]


def test_merges_of_merges_take_no_time(folder: Path) -> None:
    lines = ["- &a0 {steps: 3}"] + [f"- &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}" for n in range(1, 200)]
    assert {scene.steps for scene in read(folder, "\n".join(lines))} == {3}


@pytest.mark.parametrize(
    ("written", "prompt"),
    [
        ("|\n    one\n    two\n", "one\ntwo"),
        (">\n    one\n    two\n", "one two"),
        ('"123"', "123"),
        ("'yes: # no'", "yes: # no"),
        ("!!str 123", "123"),
        ("海上的船 🚢", "海上的船 🚢"),
        (r'"\ud83d\udea2 \/ \x41"', "🚢 / A"),
    ],
)
def test_text_in_yaml(folder: Path, written: str, prompt: str) -> None:
    assert read(folder, f"- prompt: {written}")[0].prompt == prompt


@pytest.mark.parametrize(("written", "value"), [("7", 7.0), ("1e1", 10.0), (".5", 0.5), ("2.", 2.0), ("1.5E+0", 1.5)])
def test_numbers(folder: Path, written: str, value: float) -> None:
    scene = read(folder, f"- {{shift: {written}, guidance: [-{written}]}}")[0]
    assert (scene.shift, scene.guidance) == (value, (-value, -value))


def test_the_largest_seed(folder: Path) -> None:
    assert read(folder, f"- seed: {2**63 - 1}")[0].seed == 2**63 - 1
    assert read(folder, "- seed: 0")[0].seed == 0


def test_files_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "story.yaml").write_text(f"- {{end_image: ~/end.png, lora: ~/a.safetensors}}\n- cut: {folder}/end.png")
    first, second = read_storyboard(tmp_path / "story.yaml")
    assert first.values["end_image"] == second.values["cut"] == f"{folder}/end.png"
    assert first.values["lora"] == (f"{folder}/a.safetensors:1.0",)


# What is wrong, and where

WHOLE = "must be a whole number from"
TEXT = "must be text (in quotes if YAML takes it for something else)"


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("frames: 80", "frames must be 4n+1: 80 is not, 77 and 81 are"),
        ("frames: 1", f"frames {WHOLE} 5 to 4093, 1 is not"),
        ("frames: 81.0", f"frames {WHOLE} 5 to 4093, 81.0 is not"),
        ("frames: '81'", f"frames {WHOLE} 5 to 4093, '81' is not"),
        ("frames: yes", f"frames {WHOLE} 5 to 4093, yes is not"),
        ("frames: 0x51", f"frames {WHOLE} 5 to 4093, 0x51 is not"),
        ("frames: 0o15", f"frames {WHOLE} 5 to 4093, '0o15' is not"),
        ("frames: 015", f"frames {WHOLE} 5 to 4093, 015 is not"),
        ("frames: 1_3", f"frames {WHOLE} 5 to 4093, 1_3 is not"),
        ("frames: 1:21", f"frames {WHOLE} 5 to 4093, 1:21 is not"),
        ("frames: ٨١", f"frames {WHOLE} 5 to 4093, '٨١' is not"),
        ("frames: [81]", f"frames {WHOLE} 5 to 4093, a list is not"),
        ("frames: {a: 1}", f"frames {WHOLE} 5 to 4093, a mapping is not"),
        ("frames: 2024-01-01", f"frames {WHOLE} 5 to 4093, 2024-01-01 is not"),
        ("frames: " + "9" * 5000, f"frames {WHOLE} 5 to 4093, {'9' * 37}... is not"),
        ("steps: 0", f"steps {WHOLE} 1 to 1000, 0 is not"),
        ("steps: many", f"steps {WHOLE} 1 to 1000, 'many' is not"),
        ("seed: -1", f"seed {WHOLE} 0 to 2**63-1, -1 is not"),
        (f"seed: {2**63}", f"seed {WHOLE} 0 to 2**63-1, {2**63} is not"),
        ("context: 4", "context must be 1, 5, 9, 13 or 17, 4 is not"),
        ("context: 21", "context must be 1, 5, 9, 13 or 17, 21 is not"),
        ("context: true", "context must be 1, 5, 9, 13 or 17, true is not"),
        ("{frames: 9, context: 9}", "context 9 must be fewer than the clip's 9 frames"),
        ("shift: 0", "shift must be a positive number, 0 is not"),
        ("shift: .nan", "shift must be a number, .nan is not"),
        ("shift: -.inf", "shift must be a number, -.inf is not"),
        ("shift: 1e999", "shift must be a number, '1e999' is not"),
        ("shift: 1:30.5", "shift must be a number, 1:30.5 is not"),
        ("guidance: high", "guidance must be a number, 'high' is not"),
        ("guidance: []", "guidance must be a number, an empty list is not"),
        ("guidance: [1, 2, 3]", "guidance must be one number or [LOW, HIGH], not 3 numbers"),
        ("guidance: [1, [2]]", "guidance must be a number, a list is not"),
        ("prompt: 123", f"prompt {TEXT}, 123 is not"),
        ("prompt: yes", f"prompt {TEXT}, yes is not"),
        ("prompt: 2024-01-01", f"prompt {TEXT}, 2024-01-01 is not"),
        ("prompt: [a, b]", f"prompt {TEXT}, a list is not"),
        ("prompt: ' '", "prompt is empty; write something or leave the key out"),
        (r'prompt: "\ud83d"', "prompt holds half of a surrogate pair; write the character itself"),
        ("prompt: !!python/name:os.system", f"prompt {TEXT}, the tag '!!python/name:os.system' is not"),
        ("seed: !mine 5", f"seed {WHOLE} 0 to 2**63-1, the tag '!mine' is not"),
        ("prompt: !!binary aGVsbG8=", f"prompt {TEXT}, the tag '!!binary' is not"),
        ("end_image: none.png", "end_image: cannot read image 'FOLDER/none.png': No such file or directory; give a"),
        ("end_image: broken.png", "end_image: cannot read image 'FOLDER/broken.png': it is no picture that Pillow"),
        ("end_image: .", "end_image: cannot read image 'FOLDER': it is not a file"),
        (r'end_image: "a\0b"', "end_image: cannot read image 'FOLDER/a\\x00b'"),
        ("end_image: true", f"end_image {TEXT}, true is not"),
        ("cut: none.png", "cut: cannot read image 'FOLDER/none.png'"),
        ("cut: yes", "cut must be the name of a picture, or true, yes is not"),
        ("cut: 1", f"cut {TEXT}, 1 is not"),
        (
            "lora: none.safetensors:0.5",
            "lora must be a LoRA file in the storyboard's folder, 'FOLDER/none.safetensors'",
        ),
        ("lora: " + "x" * 300, "lora must be a LoRA file in the storyboard's folder, 'FOLDER/xxx"),
        ("lora_high: a.safetensors:nan", "lora_high cannot be read: "),
        ("lora_low: {a.safetensors: 1}", f"lora_low {TEXT}, a mapping is not"),
        ("lora_low: [a.safetensors, 1]", f"lora_low {TEXT}, 1 is not"),
        ("step: 3", "unknown key 'step'; did you mean steps?"),
        ("sample_steps: 3", "unknown key 'sample_steps'; did you mean steps?"),
        ("context_frames: 5", "unknown key 'context_frames'; did you mean context?"),
        ("frame_num: 5", "unknown key 'frame_num'; did you mean frames?"),
        (
            "zzz: 3",
            "unknown key 'zzz'; known are frames, seed, name, prompt, custom_prompt, steps, shift, guidance,",
        ),
        ("[a, b]: 3", "unknown key a list; known are"),
        ("5: 3", "unknown key 5; known are"),
        ("<<: 5", "<< must be a mapping, or a list of them, 5 is not"),
        ("{steps: 3, steps: 3}", "steps is there twice, here and in line 3"),
        ("!!python/object/new:os.system [ls]", "a clip must be a prompt or a mapping"),
        (
            "!!set {a, b}",
            "a clip must be a prompt or a mapping ({} if it has nothing of its own), the tag '!!set' is not",
        ),
        ("[a, b]", "a clip must be a prompt or a mapping ({} if it has nothing of its own), a list is not"),
        ("", "a clip must be a prompt or a mapping ({} if it has nothing of its own), nothing is not"),
        ("~", "a clip must be a prompt or a mapping ({} if it has nothing of its own), ~ is not"),
        ("123", f"prompt {TEXT}, 123 is not"),
        ("''", "prompt is empty"),
    ],
)
def test_a_wrong_clip_is_said_with_its_line(folder: Path, written: str, problem: str) -> None:
    assert refusal(folder, f"- fine\n\n- {written}\n- fine").startswith(f"FILE, line 3: {problem}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "storyboard FILE holds no clips; write one prompt per line, or YAML"),
        ("# nothing\n", "storyboard FILE holds no clips"),
        ("[]", "FILE, line 1: clips must be a list of at least one clip, an empty list is not"),
        ("\nclips: []", "FILE, line 2: clips must be a list of at least one clip, an empty list is not"),
        ("\nclips:", "FILE, line 2: clips must be a list of at least one clip, nothing is not"),
        ("clips: {a: b}", "FILE, line 1: clips must be a list of at least one clip, a mapping is not"),
        ("5", "FILE, line 1: clips must be a list of at least one clip, 5 is not"),
        (
            "steps: 3\n",
            "FILE, line 1: there is no list of clips; write it as clips:; line 1: unknown key 'steps'; known",
        ),
        (
            "clip: [a]",
            "FILE, line 1: there is no list of clips; write it as clips:; line 1: unknown key 'clip'; did you",
        ),
        (
            "!!python/dict {clips: [a]}",
            "FILE, line 1: clips must be a list of at least one clip, the tag '!!python/dict'",
        ),
        ("clips: !mine [a]", "FILE, line 1: clips must be a list of at least one clip, the tag '!mine' is not"),
        ("!mine [a]", "FILE, line 1: clips must be a list of at least one clip, the tag '!mine' is not"),
        ("clips: [a]\nclips: [b]", "FILE, line 2: clips is there twice, here and in line 1"),
        ("defaults: [a]\nclips: [a]", "FILE, line 1: defaults must be a mapping such as {steps: 30}, a list is not"),
        ("defaults:\n  steps: x\nclips: [a, b]", f"FILE, line 2: steps {WHOLE} 1 to 1000, 'x' is not"),
        ("defaults: {frames: 5}\nclips:\n- a\n- context: 5", "FILE, line 4: context 5 must be fewer than the clip's 5"),
        (
            "- a\n- prompt: the boat: sinks",
            "FILE, line 2: a colon where YAML takes none; put text with ': ' in it in qu",
        ),
        ("- a\n- b: c\n\td: e", "FILE, line 3: YAML takes no tabs here; use spaces"),
        ("- a\n- 'b\n\n", "FILE, line 4: found unexpected end of stream (while scanning a quoted scalar, line 2)"),
        ("- [a\n- b", "FILE, line 2: "),
        (
            "- a\n---\n- b",
            "FILE, line 2: but found another document (expected a single document in the stream, line 1)",
        ),
        ("- a\n- *b", "FILE, line 2: found undefined alias 'b'"),
        ('- a\n- "\\UFFFFFFFF"', "FILE, line 2: YAML cannot read this: "),
        ("- a\n- \x07", "FILE, line 2: YAML takes no character U+0007; remove it"),
        ("- a\n- [" + "[" * 5000, "FILE is nested too deeply"),
        ("- " * 41 + "a", "FILE is nested too deeply"),
        (
            "- <<: [&a0 {}, " + ", ".join(f"&a{n + 1} {{<<: *a{n}}}" for n in range(2000)) + "]",
            "FILE is nested too deeply",
        ),
        ("[" + "a, " * 10_001 + "]", "FILE, line 1: there are 10001 clips; a chain has at most 10000, start another"),
        (b"- a\n- caf\xe9", "FILE, line 2: this is not UTF-8; save the file as UTF-8"),
        ("- a".encode("utf-16"), "storyboard FILE is no text in UTF-8; is it the right file?"),
        (b"#" * (2**20 + 1), "storyboard FILE is larger than 1 MiB; is it the right file?"),
    ],
)
def test_a_wrong_file_is_said_with_its_line(folder: Path, content: str | bytes, problem: str) -> None:
    assert refusal(folder, content).startswith(problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[\n\t"a",\n\t{"steps": 0}\n]', f"FILE, line 3: steps {WHOLE} 1 to 1000, 0 is not"),
        ('[\n{"steps": 2,\n"steps": 3}]', "FILE, line 3: steps is there twice, here and in line 2"),
        ('[\n{"shift": NaN}]', "FILE, line 2: shift must be a number, 'NaN' is not"),
        ('[\n{"seed": ' + "9" * 5000 + "}]", f"FILE, line 2: seed {WHOLE} 0 to 2**63-1, {'9' * 37}... is not"),
        ('[\n"a"\n"b"]', "FILE, line 3: this is not JSON: Expecting ',' delimiter"),
        ("- a", "FILE, line 1: this is not JSON: "),
        ("", "FILE, line 1: this is not JSON: "),
        ('"a"', "FILE, line 1: a storyboard in JSON is an object or a list"),
        ("[null]", "FILE, line 1: a clip must be a prompt or a mapping"),
        ("[" * 100000, "FILE is nested too deeply"),
    ],
)
def test_wrong_json_is_said_with_its_line(folder: Path, content: str, problem: str) -> None:
    assert refusal(folder, content, ".json").startswith(problem)


def test_yaml_in_a_text_file_is_no_prompt(folder: Path) -> None:
    yaml = "FILE, line 1: this is YAML or JSON and not a prompt; name the file .yaml or .json"
    assert refusal(folder, "clips:\n- a", ".txt") == yaml
    assert refusal(folder, "- prompt: a", ".txt") == yaml
    assert refusal(folder, '{"clips": [\n"a"]}', ".txt") == yaml
    assert refusal(folder, " \n# a\n", ".txt") == ("storyboard FILE holds no clips; write one prompt per line, or YAML")


def test_prompts_under_another_name_are_told_apart_from_broken_yaml(folder: Path) -> None:
    assert refusal(folder, "a\n# b\nc", ".story").endswith(" (a file of one prompt per line is named .txt)")
    assert refusal(folder, "Note: a\n", ".story").endswith(" (a file of one prompt per line is named .txt)")


def test_three_problems_are_said_at_once_in_the_order_of_the_file(folder: Path) -> None:
    content = "defaults: {shift: 0}\nclips:\n- frames: 80\n  steps: 0\n- seed: x\n- zzz: 1\n"
    assert refusal(folder, content) == (
        "FILE, line 1: shift must be a positive number, 0 is not; line 3: frames must be 4n+1: 80 is not, 77 and 81 "
        f"are; line 4: steps {WHOLE} 1 to 1000, 0 is not; and 2 more"
    )


def test_a_list_of_loras_names_the_line_of_the_wrong_one(folder: Path) -> None:
    assert refusal(folder, "- lora:\n  - a.safetensors\n  - none.safetensors").startswith("FILE, line 3: lora must be")


def test_more_than_a_chain_has_is_refused_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 1 MiB can hold half a million values, which take YAML's parser most of a minute."""
    many = "a\n" * 10_001
    assert refusal(folder, many, ".txt").startswith(
        "FILE, line 10001: there are 10001 prompts; a chain has at most 10000"
    )
    monkeypatch.setattr("wan.chain.storyboard_file.MOST_VALUES", 20)
    assert refusal(folder, "- {seed: 1}\n" * 10) == "FILE holds more than 20 values; is it the right file?"


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, problem in (
        ("none.yaml", "cannot be read: No such file"),
        (".", "is no file; give a .yaml, .json or .txt file"),
        ("a\0b", "cannot be read: (stat: )?embedded null (byte|character)"),
    ):
        with pytest.raises(UserError, match=problem):
            read_storyboard(tmp_path / name)


# What depends on the model


@pytest.mark.parametrize(
    ("written", "task", "problem"),
    [
        (
            "motion_amplitude: 1.2",
            "v2v-5B",
            "motion_amplitude is for I2V-A14B; v2v-5B has no image latents behind the known ones",
        ),
        (
            "cut: true",
            "v2v-14B",
            "cut: true makes a clip of text alone, which v2v-14B cannot; give a picture to cut to",
        ),
        ("lora: a.safetensors", "v2v-14B", "v2v-14B has two experts: give lora_high and lora_low instead of lora"),
        ("lora_high: a.safetensors", "v2v-5B", "v2v-5B has one expert: give lora instead of lora_high and lora_low"),
        ("lora_low: a.safetensors", "v2v-5B", "v2v-5B has one expert: give lora instead of lora_high and lora_low"),
        ("guidance: [3, 4]", "v2v-5B", "guidance: v2v-5B has one expert and takes one number"),
    ],
)
def test_what_one_model_cannot_the_other_can(folder: Path, written: str, task: str, problem: str) -> None:
    path = write(folder, f"- fine\n- {written}")
    scenes = read_storyboard(path)
    with pytest.raises(UserError) as caught:
        check_storyboard(path, scenes, config=WAN_CONFIGS[task])
    assert str(caught.value) == f"{path}, line 2: {problem}"
    check_storyboard(path, scenes, config=WAN_CONFIGS["v2v-5B" if task == "v2v-14B" else "v2v-14B"])


def test_what_asks_for_nothing_suits_any_model(folder: Path) -> None:
    path = write(folder, "- {lora: [], lora_high: [], lora_low: [], guidance: [3, 3], context: 17, cut: end.png}\n- a")
    for task in ("v2v-5B", "v2v-14B"):
        check_storyboard(path, read_storyboard(path), config=WAN_CONFIGS[task])


def test_one_word_about_known_frames_replaces_all_that_the_command_line_says_of_them() -> None:
    svi = Settings(
        continuation="svi2pro",
        lora_high=("SVI_v2_pro_high.safetensors", "light.safetensors:0.5"),
        lora_low=("SVI_v2_pro_low.safetensors",),
    )
    first = Scene(1, {"continuation": "last_frame"}).over(svi)
    assert (first.continuation, first.lora_high, first.lora_low) == ("last_frame", ("light.safetensors:0.5",), ())
    assert Scene(1, {"context_frames": 9}).over(svi).lora_low == ()
    assert Scene(1, {"continuation": "last_frame", "lora_low": ("x.safetensors",)}).over(svi).lora_low == (
        "x.safetensors",
    )
    assert Scene(1, {"prompt": "x"}).over(svi) == dataclasses.replace(svi, prompt="x")
    tail = Settings(continuation="tail", context_frames=9)
    assert Scene(1, {"continuation": "last_frame"}).over(tail).context_frames is None
    with pytest.raises(UserError, match="last_frame knows 1 frame"):
        Scene(1, {"continuation": "last_frame", "context_frames": 9})
    with pytest.raises(UserError, match="give anchor to the clip after it"):
        Scene(1, {"cut": "a.png", "anchor_image": "b.png"})


def test_a_scene_that_exists_is_valid() -> None:
    with pytest.raises(UserError, match="context 17 must be fewer than the clip's 13 frames"):
        Scene(1, {"frame_num": 13, "context_frames": 17})


# Whatever is written

FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
PIECES = [
    *(
        "- ",
        "\n",
        "\n  ",
        "\n- ",
        ": ",
        ", ",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "#",
        "|\n",
        ">\n",
        "\t",
        "&a ",
        "*a",
        "<<: *a",
    ),
    *("clips:", "defaults:", "prompt: ", "seed: ", "frames: ", "steps: ", "guidance: ", "shift: ", "lora: ", "cut: "),
    *(
        "end_image: ",
        "context: ",
        "81",
        "1e9",
        "-1",
        ".nan",
        "true",
        "null",
        "~",
        "~no/x",
        "a boat",
        "2024-01-01",
        "0x9",
    ),
    *("!!python/object:os.x ", "!!int ", "!a ", "%YAML 1.1\n", "---\n", "...\n", "? ", "\\ud83d", "\\UFFFFFFFF", "\0"),
    *("\u2028", "\x85", "\ufeff", "end.png", "broken.png", "a.safetensors:2"),
]


def only_user_errors(path: Path) -> None:
    try:
        scenes = read_storyboard(path)
        assert scenes
        for task in ("v2v-5B", "v2v-14B"):
            check_storyboard(path, scenes, config=WAN_CONFIGS[task])
    except UserError as error:
        assert "\n" not in str(error)
        str(error).encode()


@FUZZ
@given(st.binary(max_size=60), st.sampled_from([".yaml", ".json", ".txt", ""]))
def test_bytes_are_read_or_refused(folder: Path, content: bytes, suffix: str) -> None:
    only_user_errors(write(folder, content, suffix))


@FUZZ
@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join),
    st.sampled_from([".yaml", ".yaml", ".json", ".txt", ""]),
)
@example("- &a\n  <<: *a", ".yaml")
@example("&a [*a]", ".yaml")
@example("clips: &a\n- *a", ".yaml")
@example("? {*a: b}", ".yaml")
@example("- lora: ~nobody-here/x:2", ".yaml")
@example('- lora: "a\\nb:nan"', ".yaml")
@example("%YAML 1." + "9" * 5000, ".yaml")
@example('- "\\n\\r": 1\n- !<x\ty> a', ".yaml")
def test_text_is_read_or_refused(folder: Path, content: str, suffix: str) -> None:
    only_user_errors(write(folder, content.encode("utf-8", "surrogatepass"), suffix))


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@FUZZ
@given(st.lists(st.dictionaries(st.sampled_from([*KEYS, "line", "<<", "zz"]), VALUES, max_size=4) | VALUES, max_size=4))
def test_values_of_any_type_are_read_or_refused(folder: Path, clips: list[Any]) -> None:
    only_user_errors(write(folder, json.dumps({"clips": clips}), ".json"))


@FUZZ
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, 2, "\t"]),
)
def test_json_gives_every_prompt_back(folder: Path, prompts: list[str], plain: bool, indent: Any) -> None:
    clips = [prompt if len(prompt) % 2 else {"prompt": prompt} for prompt in prompts]
    scenes = read(folder, json.dumps({"clips": clips}, ensure_ascii=plain, indent=indent), ".json")
    assert [scene.prompt for scene in scenes] == [prompt.strip() for prompt in prompts]


@pytest.mark.parametrize(("length", "shown"), [(40, "x" * 40), (41, "x" * 37 + "...")])
def test_a_message_shows_forty_characters_of_a_text(length: int, shown: str) -> None:
    assert storyboard_file._shown(ScalarNode("tag:yaml.org,2002:str", "x" * length)) == repr(shown)


# What a storyboard says by now


def of_names(*names: str | None) -> list[Scene]:
    return [Scene(line, {} if name is None else {"name": name}) for line, name in enumerate(names, 1)]


@pytest.mark.parametrize(
    ("old", "new", "begun", "followed"),
    [
        ((None, None), (None, None, None), 1, [1, 12, 13]),  # by their numbers
        (("a", "b"), ("x", "a", "b"), 1, [1, 13]),  # after the name of the last that is begun
        (("a", "b"), ("b", "a"), 1, [1]),
        (("a", "b"), ("x", "y", "z"), 1, [1, 12, 13]),  # which is not there any more
        (("a", "b", "c"), ("a", "b", "x"), 2, [1, 2, 13]),
        ((), (None, None, None), 2, [0, 0, 13]),  # clips of which nothing was said
        (("a",), ("a", "b"), 0, [11, 12]),
    ],
)
def test_after_the_clips_that_are_begun_comes_what_follows_the_last_of_them(
    old: Any, new: Any, begun: int, followed: list[int]
) -> None:
    now = [dataclasses.replace(scene, line=scene.line + 10) for scene in of_names(*new)]
    assert [scene.line for scene in ahead(of_names(*old), now, begun)] == followed


def test_what_a_storyboard_says_otherwise_is_told_by_its_keys() -> None:
    old = [Scene(1, {"prompt": "a", "sample_steps": 4}), Scene(2), Scene(3, {"prompt": "c"})]
    new = [Scene(5, {"prompt": "b", "sample_steps": 4}), Scene(6), Scene(7, {"end_image": "e"}), Scene(8, {"seed": 7})]
    assert said_otherwise(old, new) == {1: ["prompt"], 3: ["end_image", "prompt"], 4: ["seed"]}
    assert said_otherwise(new, old).keys() == {1, 3, 4} and said_otherwise(old, old) == {}


def test_a_scene_s_way_to_go_on_takes_the_place_of_the_command_s() -> None:
    settings = Settings(context_frames=9, lora_high=("SVI_2.0_Pro.safetensors", "style.safetensors"), sample_steps=4)
    plain = Scene(1, {"prompt": "x"}).over(settings)
    assert plain == dataclasses.replace(settings, prompt="x")
    last = Scene(1, {"continuation": "last_frame"}).over(settings)
    assert (last.continuation, last.context_frames, last.lora_high) == ("last_frame", None, ("style.safetensors",))
    five = Scene(1, {"context_frames": 5}).over(
        dataclasses.replace(settings, continuation="svi2pro", context_frames=None)
    )
    assert (five.continuation, five.context_frames) == (None, 5) and five.lora_high == ("style.safetensors",)
    svi = Scene(1, {"continuation": "svi2pro"}).over(settings)
    assert svi.lora_high == settings.lora_high and svi.context_frames is None
    named = Scene(1, {"continuation": "tail", "lora_high": ("svi.safetensors",)}).over(settings)
    assert named.lora_high == ("svi.safetensors",), "what it says itself stays"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frame_num": 9, "context_frames": 9}, "context 9 must be fewer than the clip's 9 frames"),
        ({"frame_num": 13, "context_frames": 9}, None),
        ({"continuation": "last_frame", "context_frames": 5}, "last_frame knows 1 frame"),
        ({"anchor_image": "a.png", "cut": "b.png"}, "a shot holds on to the picture of its cut"),
        ({"anchor_image": "a.png", "cut": None}, None),
    ],
)
def test_what_a_scene_says_goes_together(values: dict[str, Any], message: str | None) -> None:
    if message is None:
        Scene(1, values)
    else:
        with pytest.raises(UserError, match=message):
            Scene(1, values)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("v2v-14B", {"cut": True}, "cut: true makes a clip of text alone, which v2v-14B cannot"),
        ("v2v-5B", {"cut": True}, None),
        ("v2v-14B", {"cut": "a.png"}, None),
        ("v2v-14B", {"lora": ("a",)}, "v2v-14B has two experts: give lora_high and lora_low instead of lora"),
        ("v2v-14B", {"lora": ()}, None),
        ("v2v-5B", {"lora": ("a",)}, None),
        ("v2v-5B", {"lora_high": ("a",)}, "v2v-5B has one expert: give lora instead"),
        ("v2v-5B", {"lora_low": ("a",)}, "v2v-5B has one expert: give lora instead"),
        ("v2v-14B", {"lora_low": ("a",)}, None),
        ("v2v-5B", {"sample_guide_scale": (1.0, 2.0)}, "guidance: v2v-5B has one expert and takes one number"),
        ("v2v-5B", {"sample_guide_scale": (2.0, 2.0)}, None),
        ("v2v-14B", {"sample_guide_scale": (1.0, 2.0)}, None),
        ("v2v-5B", {"motion_amplitude": 1.2}, "motion_amplitude is for I2V-A14B"),
        ("v2v-14B", {"motion_amplitude": 1.2}, None),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_its_line(model: str, values: Any, message: str | None) -> None:
    path, config = Path("story.yaml"), WAN_CONFIGS[model]
    if message is None:
        check_storyboard(path, [Scene(3, values)], config=config)
        return
    with pytest.raises(UserError, match=f"story.yaml, line 3: {message}"):
        check_storyboard(path, [Scene(3, values)], config=config)
    three = [Scene(line, values) for line in (1, 2, 3)]
    with pytest.raises(UserError) as refused:
        check_storyboard(path, [*three, Scene(3, values)], config=config)  # the last is merged from elsewhere
    assert "more" not in str(refused.value) and str(refused.value).count("line ") == 3
    with pytest.raises(UserError, match="; and 2 more$"):
        check_storyboard(path, [*three, Scene(4, values), Scene(5, values)], config=config)
