"""The trained tiny family really continues clips: looser bars than `benchmarks/quality.py` measures, on fewer clips."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.quality import (
    FOLDERS,
    Scene,
    held_out,
    maker,
    measure_captioner,
    measure_chains,
    measure_clips,
    measure_vae,
    open_pipeline,
    told_in,
)
from tests.support.golden import ROOT
from wan.continuation import VideoContinuation

MODELS = ROOT / "models"
DEFAULTS = argparse.Namespace(sample_steps=None, sample_guide_scale=None, drift_correction=0.0)


@pytest.fixture(scope="module")
def world() -> list[Scene]:
    return held_out(30)


@pytest.fixture(scope="module", params=tuple(FOLDERS))
def pipeline(request: pytest.FixtureRequest) -> VideoContinuation:
    return open_pipeline(MODELS, request.param)


def test_the_models_take_24_mb() -> None:
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= 24e6


def test_the_vae_gives_back_what_it_was_given(pipeline: VideoContinuation, world: list[Scene]) -> None:
    assert measure_vae(pipeline, world[:2])["vae_psnr"] >= 33


def test_the_captioner_says_what_moves_where(world: list[Scene]) -> None:
    found = measure_captioner(open_pipeline(MODELS, "v2v-5B"), world)
    assert min(found["caption_colour"], found["caption_shape"], found["caption_direction"]) >= 0.9


def test_a_clip_goes_on_where_its_footage_ends(pipeline: VideoContinuation, world: list[Scene]) -> None:
    found = measure_clips(world[:3], maker(pipeline, "last_frame", DEFAULTS))
    assert found["first_frame_psnr"] >= 30
    assert found["direction"] >= 0.75
    found = measure_clips(world[:2], maker(pipeline, "tail:5", DEFAULTS))
    assert found["position_error"] <= 0.07 and found["lost_after_1s"] <= 0.2


def test_the_second_clip_of_a_chain_still_has_the_shapes(world: list[Scene]) -> None:
    one_shape = [scene for scene in world if len(scene.shapes) == 1][:2]
    found = measure_chains(one_shape, maker(open_pipeline(MODELS, "v2v-5B"), "tail:5", DEFAULTS), 2)
    assert found["chain_right_at_2"] == 1


def test_captions_are_read_by_colour() -> None:
    said = told_in("a red circle moves up and turns, a blue square stays in place and grows; the camera is still.")
    assert said == {"red": ("circle", "up"), "blue": ("square", "stays")}
