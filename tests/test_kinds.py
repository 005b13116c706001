"""Which values each kind of setting takes, how a word becomes one, and who may give which setting."""

from __future__ import annotations

import math
from typing import Any

import pytest

from wan.errors import UserError
from wan.kinds import (
    Address,
    Among,
    Choice,
    Count,
    Cut,
    Encoded,
    Files,
    Frames,
    Gib,
    Guidance,
    Interval,
    Kind,
    Local,
    Name,
    Place,
    Program,
    PromptFor,
    Real,
    Seed,
    SeedOfClip,
    Size,
    Strength,
    Switch,
    TakeOf,
    Unfit,
    Whole,
    Words,
    YesNo,
    read_plain,
    words_in,
)
from wan.options import OPTIONS, Settings, check, options_of, settings_of, usual_clips, words_of

LAST = 2**63 - 1
HALVES = ["\ud800", "\ud83d", "\udfff"]  # of a surrogate pair


@pytest.mark.parametrize(
    ("kind", "takes", "refuses"),
    [
        (Kind(), ["", "x", " ", "off", "\ud7ff", "\ue000"], HALVES),
        (Words(), ["x", "-"], ["", " \n", *HALVES]),
        (Name(), ["fog", "1a", "-1"], ["1", "007", "", " ", "٣"]),
        (
            Local(),
            ["a", "x" * 255, "a/" * 2047 + "b", "é" * 127, "~", "./~x"],
            ["x" * 256, "é" * 128, "a/" * 2048, "a\0"],
        ),
        (Local(), ["a\udcff", ""], ["~nobody_of_this_name/a"]),
        (Encoded(), ["a"], ["a\udcff", "x" * 256]),
        (Files(), [("a", "b:0.5"), ()], [("a\udcff",), ("a", "x" * 256)]),
        (Cut(), ["a.png", True], ["x" * 256]),
        (Program(), ["run {frames}", "a 'b c' {frames}"], ["run", "{frames}", "'a {frames}", "", "a {frames}\0"]),
        (Address(), ["http://a/v1", "https://a:1"], ["ftp://a", "a/v1", "http://", ""]),
        (Place(), ["s3://b/{name}", "file:///a"], ["b/c", "://a", "3://a", "s3://", "s3:/a", "s3://" + "x" * 256]),
        (Choice(None, ("one", "two")), ["one", "two"], ["three", "", None]),
        (Whole(None, 2, 9), [2, 9], [1, 10, True, 2.0, "2", None]),
        (Seed(), [LAST, 0, -1, -(2**70)], [LAST + 1, True, 1.0]),
        (SeedOfClip(), [0, LAST], [-1, LAST + 1, True]),
        (Frames(None, 1, 4093), [1, 5, 81, 4093], [0, 2, 4, 82, 4097, 1.0]),
        (Among(None, numbers=(0, 4, 8)), [0, 4, 8], [1, 12, -4, True, 4.0]),
        (Real(None, 0.5, 2), [0.5, 1, 2.0], [0.49, 2.01, math.nan, math.inf, True, "1", None]),
        (Real(None, 0, 2, above=True), [0.01, 2], [0, -1, 2.01, math.nan, math.inf, True]),
        (Strength(None, 0, 1), [0, 1, 0.5], [-0.1, 1.1]),
        (Switch(), [True, False], [0, 1, "true", None]),
        (Size(), ["832*480"], ["832x480", "832", "0*480", "a*b", ""]),
        (Gib(), ["auto", 1, 4096, 1.5], [0.99, 4096.1, True, "much"]),
        (Count(), ["auto", 1, 4096], [0, 4097, True, "all"]),
        (
            Guidance(),
            [(1.0, 2), [-1000, 1000]],
            [(1.0,), (1, 2, 3), (1001, 1), (1, -1001), (math.inf, 1), (True, 1), 1.0],
        ),
        (Interval(), [(0, 1), (0.3, 0.31)], [(0.5, 0.5), (0.6, 0.5), (-0.1, 1), (0, 1.1), (0,), (True, 1), "ab"]),
        (
            PromptFor(),
            [(), ((1, "a"), (3, "b"))],
            [((1, "a"), (1, "b")), ((0, "a"),), ((1, ""),), ((1,),), [(1, "a")], ("ab", 1)],
        ),
        (TakeOf(), [(), ((1, 2), (3, 1))], [((1, 2), (1, 3)), ((0, 1),), ((1, 0),), ((1, 2, 3),)]),
    ],
)
def test_a_kind_takes_what_is_in_its_range(kind: Kind, takes: list[Any], refuses: list[Any]) -> None:
    for value in takes:
        kind.check(value)
    for value in refuses:
        with pytest.raises(Unfit):
            kind.check(value)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Whole(None, 2, 9, "; no more are made"), 1, "must be at least 2, 1 is not"),
        (Whole(None, 2, 9, "; no more are made"), 10, "must be at most 9, 10 is not; no more are made"),
        (Frames(), 80, "must be 4n+1: 80 is not, 77 and 81 are"),
        (Frames(), 2, "must be 4n+1: 2 is not, 1 and 5 are"),
        (Among(None, numbers=(1, 5, 9)), 2, "must be 1, 5 or 9; 2 is not"),
        (Choice(None, ("unipc", "euler")), "uler", "must be one of unipc, euler; 'uler' is not; did you mean euler?"),
        (Choice(None, ("unipc", "euler")), "heun2", "must be one of unipc, euler; 'heun2' is not"),
        (Real(None, 0, 2, above=True), 0, "must be a positive number, 0 is not"),
        (Real(None, 0, 2, "; why", above=True), 3, "must be from 0 to 2, 3 is not; why"),
        (Interval(), (0.5, 0.25), "must be two sigmas 0 <= LOW < HIGH <= 1, 0.5 0.25 are not"),
        (PromptFor(), ((2, "a"), (2, "b")), "2 is there twice; leave one of them out"),
    ],
)
def test_a_value_out_of_range_is_told_from_those_in_it(kind: Kind, value: Any, message: str) -> None:
    with pytest.raises(Unfit) as refused:
        kind.check(value)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        (Kind(), "-rain", "-rain"),
        (Whole(), "12", 12),
        (Real(), "0.25", 0.25),
        (Gib(), "auto", "auto"),
        (Gib(), "12", 12.0),
        (Count(), "auto", "auto"),
        (Count(), "4", 4),
        (Guidance(), "1,2.5", (1.0, 2.5)),
        (Guidance(), "3", (3.0, 3.0)),
        (TakeOf(), ["2=3", "1=1"], ((2, 3), (1, 1))),
        (PromptFor(), [["2", "a"], ["1", "b"]], ((2, "a"), (1, "b"))),
        *((YesNo(), word, True) for word in ("yes", "True", "T", "y", "1")),
        *((YesNo(), word, False) for word in ("no", "False", "F", "n", "0")),
    ],
)
def test_words_become_a_value(kind: Kind, words: Any, value: Any) -> None:
    assert kind.read(words) == value


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Whole(), "1.5"),
        (Real(), "x"),
        (Gib(), "much"),
        (Count(), "all"),
        (Guidance(), "1,2,3"),
        (Guidance(), "a"),
        (Guidance(), ""),
        (YesNo(), "maybe"),
        (TakeOf(), ["2"]),
        (TakeOf(), ["2=x"]),
        (PromptFor(), [["x", "a"]]),
    ],
)
def test_words_that_mean_no_value_are_refused(kind: Kind, words: Any) -> None:
    with pytest.raises(Unfit, match="must be"):
        kind.read(words)


def test_a_home_folder_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert Local().read("~/a") == "/home/x/a" and Local().read("a~") == "a~"
    Local().check("~/a")


def test_only_what_names_something_of_the_machine_is_local() -> None:
    local = (Local(), Encoded(), Files(), Cut(), Program(), Address(), Place())
    assert all(kind.local for kind in local)
    assert not any(kind.local for kind in (Kind(), Words(), Whole(), Real(), Choice(), Guidance(), TakeOf()))


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Whole(), 3, ["3"]),
        (Gib(), 6.5, ["6.5"]),
        (Gib(), "auto", ["auto"]),
        (Guidance(), (1.0, 2.5), ["1.0,2.5"]),
        (Interval(), (0.25, 1.0), ["0.25", "1.0"]),
        (PromptFor(), (2, "a"), ["2", "a"]),
        (TakeOf(), ((2, 3),), ["2=3"]),
        (Files(), ("a", "b:0.5"), ["a", "b:0.5"]),
    ],
)
def test_a_value_is_written_as_it_is_read(kind: Kind, value: Any, words: list[str]) -> None:
    assert kind.write(value) == words


@pytest.mark.parametrize(
    ("kind", "value", "public"),
    [
        (Kind(), ("a", "b"), ["a", "b"]),
        (Whole(), 3, 3),
        (Local(), "/home/x/a.mp4", "a.mp4"),
        (Local(), None, None),
        (Files(), ("/home/x/a.safetensors:0.5",), ["a.safetensors:0.5"]),
        (Program(), "/home/x/restore.sh --token 123 {frames}", "restore.sh {frames}"),
        (Program(), None, None),
        (Address(), "http://user:password@host/v1?key=1", "http://host/v1"),
        (Address(), None, None),
        (Place(), "s3://key:secret@bucket/a", "s3://bucket/a"),
        (Place(), None, None),
        (PromptFor(), ((1, "a"),), [[1, "a"]]),
        (TakeOf(), ((1, 2),), [[1, 2]]),
    ],
)
def test_what_is_handed_on_holds_no_folder_and_no_secret(kind: Kind, value: Any, public: Any) -> None:
    assert kind.public(value) == public


def test_a_command_line_is_taken_apart_as_its_system_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words_in(r"a 'b c' d\ e") == ["a", "b c", "d e"]
    monkeypatch.setattr("wan.kinds.os.name", "nt")
    assert words_in(r'C:\a\b.exe "c d" {frames}') == [r"C:\a\b.exe", "c d", "{frames}"]


@pytest.mark.parametrize(
    ("kind", "plain", "value"),
    [
        (Kind(), "x", "x"),
        (Words(), "x", "x"),
        (Whole(), "3", 3),
        (Whole(), 3, 3),
        (Size(), "832x480", "832*480"),
        (Interval(), "0.25, 1", (0.25, 1.0)),
        (Interval(), [0.25, 1], (0.25, 1)),
        (Switch(), "On", True),
        (Switch(), "false", False),
        (Switch(), True, True),
        (TakeOf(), "1=2 3=1", ((1, 2), (3, 1))),
        (TakeOf(), [[1, 2]], ((1, 2),)),
        (PromptFor(), [[1, "a"]], ((1, "a"),)),
        (Files(), "a", ("a",)),
        (Files(), ["a", "b"], ("a", "b")),
        (Guidance(), 2, (2, 2)),
        (Guidance(), "1,2", (1.0, 2.0)),
        (Guidance(), [1, 2], (1, 2)),
        (Strength(unsaid=0.9), True, 0.9),
        (Strength(unsaid=0.9), "On", 0.9),
        (Strength(unsaid=0.9), False, 0),
        (Strength(unsaid=0.9), "0.3", 0.3),
    ],
)
def test_a_plain_value_means_the_same(kind: Kind, plain: Any, value: Any) -> None:
    assert read_plain(kind, plain) == value


@pytest.mark.parametrize(
    ("kind", "plain", "message"),
    [
        (Kind(), 3, "must be text"),
        (Words(), ["a"], "must be text"),
        (Words(), {}, "must be text"),
        (Local(), True, "must be text"),
        (Whole(), {}, "must be a plain value"),
        (Files(), {}, "must be a plain value"),
        (PromptFor(), "a", "must be pairs of a clip and its prompt"),
        (Switch(), "perhaps", "must be true or false"),
        (Words(), "", "is empty"),
        (Guidance(), True, "must be two numbers"),
        (Whole(), "x", "must be a whole number"),
        (Strength(), "yes", "must be a number"),
        (Real(), True, "must be from 0 to 1"),
    ],
)
def test_a_plain_value_of_another_kind_is_refused(kind: Kind, plain: Any, message: str) -> None:
    with pytest.raises(Unfit, match=message):
        read_plain(kind, plain)


# The table of settings

RANGES: dict[str, tuple[Any, Any, Any, Any]] = {  # too little, least, most, too much
    "from_": (0, 0.001, 1e6, 1e6 + 1),
    "frame_num": (-3, 1, 4093, 4097),
    "num_videos": (0, 1, 10_000, 10_001),
    "num_segments": (0, 1, 256, 257),
    "sample_steps": (0, 1, 1000, 1001),
    "sample_shift": (0, 0.001, 1000, 1001),
    "sample_guide_scale": ((-1001, 0), (-1000, 0), (0, 1000), (0, 1001)),
    "context_frames": (0, 1, 17, 21),
    "discard": (-4, 0, 24, 28),
    "motion_amplitude": (0.99, 1, 1.5, 1.51),
    "drift_correction": (-0.01, 0, 1, 1.01),
    "colour_carry": (-0.01, 0, 1, 1.01),
    "best_of": (0, 1, 1000, 1001),
    "takes": (0, 1, 1000, 1001),
    "redo": (0, 1, 10_000, 10_001),
    "vram": (0.99, 1, 4096, 4097),
    "host_memory": (0.99, 1, 4096, 4097),
    "share_weights": (0, 1, 64, 65),
    "ulysses_size": (0, 1, 4096, 4097),
    "cfg_size": (0, 1, 2, 3),
    "ring_size": (0, 1, 4096, 4097),
    "collective_timeout": (0.99, 1, 1e6, 1e6 + 1),
    "fade": (-1, 0, 100, 101),
    "port": (-1, 0, 65535, 65536),
    "max_upload": (0, 0.001, 1024, 1025),
    "max_queue": (0, 1, 100_000, 100_001),
    "max_frames": (0, 1, 1_000_000, 1_000_001),
    "gpus_per_job": (0, 1, 64, 65),
    "workers": (0, 1, 10_000, 10_001),
    "captioners": (-1, 0, 1000, 1001),
    "max_failures": (0, 1, 1000, 1001),
    "patience": (0.99, 1, 1e6, 1e6 + 1),
    "base_seed": (2**63, -1, LAST, 2**63),
    "seed": (-1, 0, LAST, 2**63),
}


def test_every_number_has_its_range() -> None:
    numbers = {name for name, one in OPTIONS.items() if isinstance(one.kind, Whole | Real | Gib | Guidance)}
    assert numbers == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_a_setting_takes_the_numbers_of_its_range(name: str) -> None:
    too_little, least, most, too_much = RANGES[name]
    check(name, least)
    check(name, most)
    for value in (too_little, too_much):
        with pytest.raises(UserError, match=f"^{name} "):
            check(name, value)


SETTERS: dict[str, str] = {
    "a remote client": (
        "from_ size frame_num base_seed seed name num_videos prompt prompt_for custom_prompt prompt_mode "
        "vlm_question vlm_fallback num_segments preset sample_steps sample_shift sample_guide_scale sample_solver "
        "guidance_interval cache continuation context_frames discard motion_amplitude drift_correction "
        "colour_carry best_of takes take fade include_source no_video_metadata"
    ),
    "only the owner": (
        "image vlm_device vlm_trust_remote_code handoff_command redo keep_following yes review offload_model vram "
        "host_memory share_weights compile t5_cpu ulysses_size cfg_size ring_size collective_timeout t5_fsdp dit_fsdp "
        "upscale save_file overwrite output_dir preview quiet log_file prune no_lock dry_run host port api_key_file "
        "max_upload max_queue max_frames videos gpus_per_job workers captioners address max_failures patience "
        "skip_bad upload report_dir"
    ),
    "a row of a batch too": (
        "task video until storyboard vlm_path vlm_url video_reader anchor_image end_image end_images precision "
        "vae_dtype convert_model_dtype ckpt_dir comfy_dir dit dit_high dit_low vae t5 lora lora_high lora_low "
        "keep_state"
    ),
    "a storyboard": (
        "frame_num seed name prompt custom_prompt sample_steps sample_shift sample_guide_scale continuation "
        "context_frames anchor_image end_image cut discard motion_amplitude takes lora lora_high lora_low fade"
    ),
    "a storyboard alone": ("seed name cut"),
    "where a video is continued": (
        "from_ until custom_prompt prompt_mode vlm_path vlm_url vlm_question vlm_fallback num_segments "
        "video_reader vlm_device vlm_trust_remote_code continuation context_frames anchor_image end_images cut "
        "discard handoff_command drift_correction colour_carry best_of takes take"
    ),
    "recorded": (
        "task from size frame_num custom_prompt prompt_mode vlm_path vlm_url vlm_question vlm_fallback "
        "num_segments video_reader vlm_device preset sample_steps sample_shift sample_guide_scale sample_solver "
        "guidance_interval cache continuation context_frames end_image cut discard motion_amplitude "
        "drift_correction colour_carry offload_model vram host_memory precision vae_dtype convert_model_dtype "
        "t5_cpu ckpt_dir comfy_dir dit dit_high dit_low vae t5"
    ),
}


def test_each_may_give_the_settings_that_are_theirs() -> None:
    """A new setting belongs into these lists: who may choose it, and where it says something."""
    every = OPTIONS.values()
    rows = [one for one in every if "row" in one.setters]
    given = {
        "a remote client": [one.name for one in every if one.client],
        "only the owner": [one.name for one in every if one.flag and not one.client and one not in rows],
        "a row of a batch too": [one.name for one in rows if not one.client],
        "a storyboard": [one.name for one in every if one.scene],
        "a storyboard alone": [one.name for one in every if not one.flag],
        "where a video is continued": [one.name for one in every if one.continues],
        "recorded": [one.record for one in every if one.record],
    }
    assert {who: names.split() for who, names in SETTERS.items()} == given


def test_a_command_has_its_own_settings_and_a_server_and_a_batch_those_of_a_chain() -> None:
    names = {
        command: {one.name for one in options_of(command)} for command in ("generate", "continuous", "serve", "batch")
    }
    assert "save_file" in names["generate"] - names["continuous"] and "output_dir" not in names["generate"]
    assert "takes" in names["continuous"] & names["serve"] & names["batch"] - names["generate"]
    assert "port" in names["serve"] - names["batch"] - names["continuous"]
    assert "videos" in names["batch"] - names["serve"] - names["continuous"]
    for command in ("serve", "batch"):
        assert not names[command] & {"video", "review", "redo", "image", "save_file"}


def test_a_chain_has_twelve_clips_or_one_that_leads_somewhere() -> None:
    assert usual_clips(Settings()) == 12 and usual_clips(Settings(until="b.mp4")) == 1


def test_what_made_the_pictures_names_no_place() -> None:
    record = {"seed": 1, "prompt": "x", "fps": "16", "sample_steps": 4, "ckpt_dir": "a", "vlm_url": "b", "seconds": {}}
    assert settings_of(record | {"end_image": False}) == {
        "seed": 1,
        "prompt": "x",
        "fps": "16",
        "sample_steps": 4,
        "end_image": False,
    }


def test_words_leave_out_what_is_said_by_default() -> None:
    assert words_of({"sample_steps": None, "lora": [], "best_of": 1, "num_segments": 8, "t5_cpu": False}) == []
    given = {"t5_cpu": True, "prompt": "-rain", "offload_model": False, "lora": ["a", "b"], "prompt_for": [[1, "x"]]}
    assert words_of(given) == [
        *("--prompt=-rain", "--prompt_for", "1", "x", "--offload_model", "False", "--t5_cpu"),
        *("--lora", "a", "--lora", "b"),
    ]
    assert words_of({"from_": 1.5}) == ["--from", "1.5"]
    assert words_of({"save_file": "a.mp4"}) == [] and words_of({"save_file": "a.mp4"}, "generate") == [
        "--save_file",
        "a.mp4",
    ]
