"""The words of a command: which are refused, with what advice, and which settings do not go together."""

from __future__ import annotations

from typing import Any

import pytest

from wan.commands.flags import check_prompts_for, check_together, check_video_settings, parse, parser_of, spell_flag
from wan.errors import UserError
from wan.kinds import Switch
from wan.options import CANDIDATE_STEP, OPTIONS, Settings, options_of

CHAIN = {"ckpt_dir": "a", "video": "a.mp4"}
LAST = 2**63 - 1  # the largest seed that PyTorch takes


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("continuous", {}, None),
        ("generate", {"ckpt_dir": None}, "ckpt_dir or comfy_dir is required"),
        ("generate", {"ckpt_dir": None, "comfy_dir": "b"}, None),
        ("continuous", {"task": "v2v-14B"}, None),
        ("continuous", {"task": "ti2v-5B"}, "task must be one of v2v-14B, v2v-5B; 'ti2v-5B' is not"),
        ("generate", {"task": "ti2v-5B"}, None),
        ("continuous", {"takes": 2}, None),
        ("continuous", {"best_of": 2}, None),
        ("continuous", {"best_of": 2, "takes": 2}, "takes chooses as best_of does"),
        ("continuous", {"base_seed": LAST - 12 - CANDIDATE_STEP, "num_videos": 12}, None),
        ("continuous", {"base_seed": LAST - 11 - CANDIDATE_STEP, "num_videos": 12}, "base_seed .* is too large"),
        ("continuous", {"base_seed": LAST - 12 - 3 * CANDIDATE_STEP, "num_videos": 12, "takes": 3}, None),
        ("continuous", {"base_seed": LAST - 11 - 3 * CANDIDATE_STEP, "num_videos": 12, "takes": 3}, "is too large"),
        ("continuous", {"base_seed": LAST - 11 - 3 * CANDIDATE_STEP, "num_videos": 12, "best_of": 3}, "is too large"),
        ("continuous", {"base_seed": LAST - 10_000 - CANDIDATE_STEP}, None),
        ("continuous", {"base_seed": LAST - 9_999 - CANDIDATE_STEP}, "is too large"),
        ("generate", {"base_seed": LAST}, None),
        ("continuous", {"frame_num": 5}, None),
        ("continuous", {"frame_num": 1}, "frame_num 1: a clip of a chain needs at least 5 frames"),
        ("generate", {"frame_num": 1}, None),
        ("continuous", {"end_images": "ends"}, None),
        ("continuous", {"end_images": "ends", "end_image": "a.png"}, "leave end_image out"),
        ("continuous", {"until": "b.mp4"}, None),
        ("continuous", {"until": "b.mp4", "end_image": "a.png"}, "leave end_image and end_images out"),
        ("continuous", {"until": "b.mp4", "end_images": "ends"}, "leave end_image and end_images out"),
        ("continuous", {"vram": 8.0}, None),
        ("continuous", {"vram": 8.0, "offload_model": True}, None),
        ("continuous", {"vram": 8.0, "offload_model": False}, "vram needs offload_model True"),
        ("continuous", {"offload_model": False}, None),
        ("continuous", {"cache": "taylorseer:2"}, None),
        ("continuous", {"cache": "taylorseer:11"}, "taylorseer computes one step in 2 to 10"),
        ("continuous", {"prompt_for": ((12, "x"),)}, None),
        ("continuous", {"prompt_for": ((13, "x"),)}, "prompt_for 13 is beyond num_videos 12"),
        ("continuous", {"prompt_for": ((13, "x"),), "num_videos": 13}, None),
        ("continuous", {"prompt_for": ((13, "x"),), "end_images": "ends"}, None),  # the folder says how many there are
        ("continuous", {"prompt_for": ((3, "x"),), "end_images": "ends", "num_videos": 2}, "is beyond num_videos 2"),
        ("continuous", {"prompt_for": ((1, "x"),), "storyboard": "s.yaml"}, "write the prompt there"),
        ("continuous", {"storyboard": "s.yaml"}, None),
        ("continuous", {"anchor_image": "a.png"}, "anchor_image goes with continuation svi2pro"),
        ("continuous", {"anchor_image": "a.png", "continuation": "svi2pro"}, None),
        ("continuous", {"keep_following": True}, "keep_following goes with redo"),
        ("continuous", {"keep_following": True, "redo": 1}, None),
        ("batch", {"ckpt_dir": None, "output_dir": "runs/{name}"}, None),  # rows may say it
        ("batch", {"output_dir": "runs"}, r"output_dir runs must hold \{name\}"),
        ("batch", {"output_dir": "runs/{name}", "upload": "s3://a/{name}"}, None),
        ("batch", {"output_dir": "runs/{name}", "upload": "s3://a"}, r"upload must hold \{name\}"),
        ("batch", {"output_dir": "{name}", "ulysses_size": 2}, "ulysses_size: a chain is shared among several GPUs"),
        ("batch", {"output_dir": "{name}", "cfg_size": 2, "t5_fsdp": True}, "cfg_size, t5_fsdp: a chain is shared"),
        ("batch", {"output_dir": "{name}", "ulysses_size": 2, "gpus_per_job": 2}, None),
        (
            "batch",
            {"output_dir": "{name}", "captioners": 1, "vlm_url": "http://a/v1"},
            "vlm_url and captioners each",
        ),
        ("batch", {"output_dir": "{name}", "captioners": 1, "vlm_device": "cpu"}, "vlm_device and captioners each"),
        ("batch", {"output_dir": "{name}", "captioners": 1}, None),
        ("batch", {"output_dir": "{name}", "vlm_url": "http://a/v1"}, None),
    ],
)
def test_settings_go_together(command: Any, given: dict[str, Any], message: str | None) -> None:
    settings = Settings(**{**CHAIN, **given})
    if message is None:
        check_together(command, settings)
    else:
        with pytest.raises(UserError, match=message):
            check_together(command, settings)


def test_a_prompt_is_for_a_clip_that_there_is() -> None:
    settings = Settings(prompt_for=((1, "a"), (4, "d"), (5, "e")))
    check_prompts_for(settings, 5)
    with pytest.raises(UserError, match="prompt_for 4 is beyond num_videos 3"):
        check_prompts_for(settings, 3)


def test_what_is_about_a_video_goes_with_one() -> None:
    check_video_settings(Settings(prompt="x", base_seed=3))
    continuing = [one for one in options_of("generate") if one.continues]
    assert len(continuing) > 10
    values: dict[str, Any] = {"num_segments": 4, "context_frames": 5, "from_": 1.0, "vlm_path": "vlm"}
    for name, value in values.items():
        with pytest.raises(UserError, match=f"{name} goes with video"):
            check_video_settings(Settings(**{name: value}))


def words(*more: str) -> list[str]:
    return ["--ckpt_dir", "a", "--video", "a.mp4", *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sample_step", "4"], r"^unknown flag --sample_step; did you mean --sample_steps\? \(see --help\)$"),
        (["--sample-steps=4"], r"^unknown flag --sample-steps; did you mean --sample_steps\?"),
        (["-prompt", "x"], r"^unknown flag -prompt; did you mean --prompt\?"),
        (["--zzzz"], r"^unknown flag --zzzz \(see --help\)$"),
        (["--prompt", "--zzzz"], r"^unknown flag --zzzz; if it is the value of --prompt, write --prompt=--zzzz \(see"),
        (["--t5_cpu", "--zzzz"], r"^unknown flag --zzzz \(see --help\)$"),  # which takes no value
        (["--" + "z" * 60], rf"^unknown flag --{'z' * 38} \(see --help\)$"),
        (["--prompt", "--" + "z" * 60], rf"write --prompt=--{'z' * 38} \(see"),
        (["x"], r"unrecognized arguments: x \(see --help\)"),
    ],
)
def test_an_unknown_word_is_named_with_what_is_near(more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse("continuous", words(*more))


def test_what_begins_with_a_dash_and_a_number_is_a_value() -> None:
    assert parse("continuous", words("--base_seed", "-1")).base_seed == -1
    assert parse("continuous", words("--prompt", "-5 degrees")).prompt == "-5 degrees"


def test_flags_end_at_two_dashes() -> None:
    with pytest.raises(UserError, match="unrecognized arguments: .*--zzzz"):
        parse("continuous", words("--", "--zzzz"))


def test_the_help_and_the_version_come_before_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    for word, shown in (("-h", "usage:"), ("--help", "usage:"), ("--version", "wan-continue ")):
        with pytest.raises(SystemExit) as left:
            parse("continuous", ["--zzzz", word])
        assert left.value.code == 0 and capsys.readouterr().out.startswith(shown)


def test_what_a_command_must_be_told_may_be_missing_where_it_prunes() -> None:
    with pytest.raises(UserError, match="the following arguments are required: --video"):
        parse("continuous", ["--ckpt_dir", "a"])
    for given in (["--prune", "out"], ["--prune=out"]):
        assert parse("continuous", given).prune == "out"
    with pytest.raises(UserError, match="prune is given alone; it makes no clips"):
        parse("continuous", ["--prune", "out", "--t5_cpu"])
    with pytest.raises(UserError, match=r"unknown flag --prune; it is one of generate_continuous.py \(see"):
        parse("generate", ["--ckpt_dir", "a", "--prune", "out"])


def test_a_flag_of_other_commands_is_told_with_them() -> None:
    with pytest.raises(UserError, match=r"^unknown flag --no_lock; it is one of generate_continuous.py and gen"):
        parse("generate", ["--ckpt_dir", "a", "--no_lock"])


def test_the_help_says_what_a_flag_is_by_default() -> None:
    shown = " ".join(parser_of("continuous").format_help().split())
    assert "usage: generate_continuous.py --video FILE --ckpt_dir DIR [flags]" in shown
    helps = {one.dest: str(one.help) for one in parser_of("continuous")._actions}
    switches = [one for one in options_of("continuous") if type(one.kind) is Switch and one.default is False]
    assert len(switches) > 5 and not [one.name for one in switches if "default" in helps[one.name]]
    assert helps["compile"].endswith(f"(default: {OPTIONS['compile'].default})")
    assert f"(default: {OPTIONS['base_seed'].default})" in shown and "%(default" not in shown
    (video,) = (one for one in parser_of("continuous")._actions if one.dest == "video")
    assert video.required and "default" not in helps["video"]
    assert not any(one.required for one in parser_of("continuous", whole=False)._actions)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--lora", "a", "--lora", "b:0.5"], "lora", ("a", "b:0.5")),
        (["--guidance_interval", "0.25", "1"], "guidance_interval", (0.25, 1.0)),
        (["--prompt_for", "2", "x", "--prompt_for", "1", "y"], "prompt_for", ((2, "x"), (1, "y"))),
        (["--drift_correction"], "drift_correction", 0.9),
        (["--drift_correction", "0.5"], "drift_correction", 0.5),
        (["--t5_cpu"], "t5_cpu", True),
        (["--offload_model", "False"], "offload_model", False),
        (["--take", "2=3"], "take", ((2, 3),)),
    ],
)
def test_words_become_values(given: list[str], name: str, value: Any) -> None:
    assert getattr(parse("continuous", words(*given)), name) == value


def test_a_value_out_of_range_names_its_setting() -> None:
    with pytest.raises(UserError, match="^sample_steps must be"):
        parse("continuous", words("--sample_steps", "0"))
    with pytest.raises(UserError, match="^guidance_interval "):
        parse("continuous", words("--guidance_interval", "0.5", "x"))


def test_a_setting_is_spelled_as_its_flag_where_it_has_one() -> None:
    assert (spell_flag("from_"), spell_flag("t5_cpu"), spell_flag("no setting")) == ("--from", "--t5_cpu", "no setting")
    in_storyboards = [one.name for one in OPTIONS.values() if not one.flag]
    assert in_storyboards and all(spell_flag(name) == name for name in in_storyboards)
