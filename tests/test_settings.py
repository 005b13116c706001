"""Values that settings become: each that exists is valid, and says the same wherever it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wan.configs import WAN_CONFIGS
from wan.errors import UserError
from wan.settings import (
    Context,
    Geometry,
    LoraFile,
    Sampling,
    StepCache,
    check_continuation,
    check_end_image,
    check_motion_amplitude,
    draw_seed,
    merge_sampling,
)

A14B, TI2V_5B, T2V = (WAN_CONFIGS[name] for name in ("i2v-A14B", "ti2v-5B", "t2v-A14B"))


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (1, 16, 16, None),
        (5, 16, 32, None),
        (4, 16, 16, r"frame_num must be 4n\+1: 4 is not, 1 and 5 are"),
        (-7, 16, 16, "-7 is not, 1 and 5 are"),
        (5, 8, 16, "height must be a positive multiple of 16 pixels, 8 is not"),
        (5, 24, 16, "height must be"),
        (5, 16, 24, "width must be a positive multiple of 16 pixels, 24 is not"),
        (5, 16, -16, "width must be"),
    ],
)
def test_a_clip_has_whole_latent_cells_and_tokens(frames: int, height: int, width: int, message: str | None) -> None:
    if message is None:
        Geometry(frames, height, width, (4, 8, 8))
    else:
        with pytest.raises(UserError, match=message):
            Geometry(frames, height, width, (4, 8, 8))


def test_a_geometry_counts_cells_and_tokens_of_any_stride() -> None:
    one = Geometry(13, 96, 160, (4, 16, 16), (2, 1, 2))
    assert one.size == (13, 96, 160) and one.latent == (4, 6, 10) and one.tokens == 2 * 6 * 5
    assert Geometry(7, 96, 160, (6, 16, 16)).latent == (2, 6, 10)


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("off", None),
        ("magcache", ("magcache", 0.06)),
        ("first_block:0.25", ("first_block", 0.25)),
        ("first_block:1", ("first_block", 1.0)),
        ("taylorseer:2", ("taylorseer", 2.0)),
        ("taylorseer:10", ("taylorseer", 10.0)),
        *((text, "takes an error above 0, at most 1") for text in ("magcache:0", "first_block:1.01", "magcache:nan")),
        *((text, "computes one step in 2 to 10") for text in ("taylorseer:1", "taylorseer:11", "taylorseer:2.5")),
        ("turbocache", "must be off or one of"),
        ("first_block:much", "must be off or NAME:NUMBER"),
    ],
)
def test_a_cache_is_of_a_kind_and_a_strength(text: str, cache: Any) -> None:
    if isinstance(cache, str):
        with pytest.raises(UserError, match=cache):
            StepCache.parse(text)
        return
    made = StepCache.parse(text)
    assert (None if made is None else (made.kind, made.strength)) == cache
    if made is not None:
        assert StepCache.parse(str(made)) == made


@pytest.mark.parametrize(
    ("cache", "steps", "whole", "computed"),
    [
        # a fifth of the steps, rounded, at least one
        ("magcache", 1, 1, 1),
        ("magcache", 7, 1, 4),
        ("magcache", 8, 2, 5),
        ("magcache", 20, 4, 12),
        ("first_block:0.1", 1, 1, 1),
        ("first_block:0.1", 10, 1, 5),
        ("taylorseer:2", 3, 3, 3),
        ("taylorseer:2", 12, 3, 7),
        ("taylorseer:3", 12, 3, 6),  # of nine one in three
        ("taylorseer:3", 13, 3, 6),
        ("taylorseer:3", 14, 3, 7),
    ],
)
def test_a_cache_computes_its_first_steps_and_some_of_the_others(
    cache: str, steps: int, whole: int, computed: int
) -> None:
    made = StepCache.parse(cache)
    assert made is not None and (made.whole(steps), made.computed(steps)) == (whole, computed)


def test_guidance_is_used_within_its_interval_whose_ends_belong_to_it() -> None:
    one = Sampling(4, 5.0, (1.0, 2.0), guidance_interval=(0.25, 0.75))
    assert [one.guides(sigma) for sigma in (0.24, 0.25, 0.5, 0.75, 0.76)] == [False, True, True, True, False]
    assert Sampling(4, 5.0, (1.0, 2.0)).guides(0.0) and not one.uses("magcache")
    with pytest.raises(UserError, match="guidance 1 has no second forward to leave out"):
        Sampling(4, 5.0, (1.0, 1.0), guidance_interval=(0.25, 0.75))
    with pytest.raises(UserError, match="magcache needs guidance in every step"):
        Sampling(4, 5.0, (1.0, 2.0), guidance_interval=(0.25, 0.75), cache=StepCache("magcache", 0.06))
    cached = Sampling(4, 5.0, (1.0, 2.0), guidance_interval=(0.25, 0.75), cache=StepCache("first_block", 0.1))
    assert cached.uses("first_block") and not cached.uses("magcache")
    plain = {"steps": 4, "shift": 5.0, "guidance": [1.0, 2.0], "solver": "unipc"}
    assert Sampling(4, 5.0, (1.0, 2.0)).as_json() == plain
    assert cached.as_json() == plain | {"guidance_interval": [0.25, 0.75], "cache": "first_block:0.1"}


def test_what_is_asked_for_comes_before_the_preset_and_the_preset_before_the_model() -> None:
    model = merge_sampling(A14B)
    assert (model.steps, model.shift, model.guidance) == (A14B.sample_steps, A14B.sample_shift, A14B.guidance)
    assert (model.solver, model.guidance_interval, model.cache) == ("unipc", None, None)
    turbo = merge_sampling(A14B, preset="turbo")
    assert (turbo.steps, turbo.solver, turbo.guidance) == (4, "euler", (1.0, 1.0))
    asked = merge_sampling(A14B, 6, 3.0, "unipc", [2, 3], preset="turbo")
    assert (asked.steps, asked.shift, asked.solver, asked.guidance) == (6, 3.0, "unipc", (2.0, 3.0))
    balanced = merge_sampling(A14B, preset="balanced")
    assert balanced.cache is not None
    without = merge_sampling(A14B, preset="balanced", cache="off", guidance_interval=(0, 1))
    assert without.cache is None and without.guidance_interval is None
    assert merge_sampling(A14B, guide_scale=2, guidance_interval=(0.1, 1)).guidance_interval == (0.1, 1)


@pytest.mark.parametrize(
    ("config", "scale", "guidance"),
    [
        (A14B, 2, (2.0, 2.0)),
        (A14B, (2, 3.5), (2.0, 3.5)),
        (TI2V_5B, (2, 2), (2.0, 2.0)),
        (TI2V_5B, (2, 3), "this model has one expert and takes one number"),
        (A14B, (1, 2, 3), "must be a number or"),
        (A14B, "2", "must be a number or"),
    ],
)
def test_one_number_is_for_both_experts(config: Any, scale: Any, guidance: Any) -> None:
    if isinstance(guidance, str):
        with pytest.raises(UserError, match=guidance):
            merge_sampling(config, guide_scale=scale)
    else:
        assert merge_sampling(config, guide_scale=scale).guidance == guidance


@pytest.mark.parametrize(
    ("frames", "known", "fits"),
    [
        (9, 1, True),
        (5, 1, False),
        (5, 0, True),
        (13, 5, True),
        (9, 5, False),
        (17, 9, True),
        (13, 9, False),
        (9, 4, True),
    ],
)
def test_between_what_is_known_and_the_end_a_latent_frame_is_free(frames: int, known: int, fits: bool) -> None:
    for config, mode in ((TI2V_5B, "last_frame"), (A14B, "svi2pro")):
        if fits:
            check_end_image(config, frames, known, mode)
        else:
            with pytest.raises(UserError, match=f"a clip with {known} known frame"):
                check_end_image(config, frames, known, mode)
    check_end_image(A14B, frames, known)  # which knows pixels, and takes the last one
    with pytest.raises(UserError, match="until: t2v-A14B makes clips of text alone"):
        check_end_image(T2V, frames, known, name="until")


def test_an_end_that_leaves_too_few_frames_says_how_many_are_needed() -> None:
    for known, words in ((1, "1 known frame must have 9 or more, 5 is fewer"), (2, "2 known frames must have 9")):
        with pytest.raises(UserError, match=words):
            check_end_image(TI2V_5B, 5, known)


def test_svi_and_motion_are_for_the_a14b() -> None:
    check_continuation(A14B, "svi2pro")
    check_continuation(TI2V_5B, "tail")
    with pytest.raises(UserError, match="svi2pro is for I2V-A14B; use tail with ti2v-5B"):
        check_continuation(TI2V_5B, "svi2pro")
    check_motion_amplitude(1.0, TI2V_5B, "svi2pro")
    check_motion_amplitude(1.2, A14B)
    for config, mode in ((TI2V_5B, "last_frame"), (A14B, "svi2pro")):
        with pytest.raises(UserError, match="motion_amplitude"):
            check_motion_amplitude(1.2, config, mode)


@pytest.mark.parametrize(
    ("mode", "frames", "context"),
    [
        (None, None, ("last_frame", 1)),
        (None, 1, ("last_frame", 1)),
        (None, 5, ("tail", 5)),
        ("tail", None, ("tail", 5)),
        ("tail", 1, ("tail", 1)),
        ("tail", 17, ("tail", 17)),
        ("last_frame", None, ("last_frame", 1)),
        ("svi2pro", None, ("svi2pro", 5)),
        ("last_frame", 5, r"last_frame knows 1 frame\(s\), not 5; leave context_frames out"),
        ("svi2pro", 9, r"svi2pro knows 5 frame\(s\), not 9"),
        ("tail", 6, "context_frames must be"),
        ("onwards", None, "continuation must be one of"),
    ],
)
def test_more_than_one_known_frame_is_a_tail(mode: Any, frames: Any, context: Any) -> None:
    if isinstance(context, str):
        with pytest.raises(UserError, match=context):
            Context.choose(mode, frames)
    else:
        made = Context.choose(mode, frames)
        assert (made.mode, made.frames) == context


@pytest.mark.parametrize(("available", "frames"), [(20, 9), (9, 9), (8, 5), (5, 5), (4, 1), (1, 1)])
def test_a_tail_is_no_longer_than_the_footage(available: int, frames: int) -> None:
    assert Context("tail", 9).within(available) == Context("tail", frames)
    assert Context("svi2pro", 5).within(available) == Context("svi2pro", 5)


@pytest.mark.parametrize("strength", [1000, -1000, 0])
def test_a_lora_has_a_strength(strength: float) -> None:
    assert LoraFile(Path("a"), strength).strength == strength and LoraFile(Path("a")).strength == 1
    for wrong in (1000.1, -1000.1, float("nan")):
        with pytest.raises(UserError, match="must be from -1000 to 1000"):
            LoraFile(Path("a"), wrong)


@pytest.mark.parametrize(
    ("name", "is_svi"),
    [
        ("SVI_2.0_Pro.safetensors", True),
        ("svi.safetensors", True),
        ("wan22-svi-high.safetensors", True),
        ("style.safetensors", False),
        ("svirfneblin.safetensors", False),
    ],
)
def test_the_name_of_a_lora_says_whether_it_is_svi_s(name: str, is_svi: bool) -> None:
    assert LoraFile(Path("svi", name)).is_svi == is_svi


def test_a_negative_seed_is_drawn() -> None:
    assert draw_seed(0) == 0 and draw_seed(7) == 7
    drawn = {draw_seed(-1) for _ in range(20)}
    assert len(drawn) == 20 and all(0 <= seed < 2**32 for seed in drawn)  # as Wan2.2's script


def test_rates_of_models_are_those_of_wan() -> None:
    # source: the official configs
    assert [(config.sample_fps, config.frame_num) for config in (A14B, TI2V_5B)] == [(16, 81), (24, 121)]
