"""The trained tiny family really continues clips: looser bars than `benchmarks/quality.py` measures, on fewer clips."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.continued import FOLDERS, Maker, Scene, held_out, open_pipeline
from benchmarks.quality import (
    ChainClip,
    by_colour,
    judge_clip,
    judge_names,
    measure_captioner,
    measure_chains,
    measure_clips,
    measure_vae,
    told_in,
)
from tests.support.golden import ROOT
from training import scenes
from wan.captioner.base import Viewer
from wan.captioner.next_prompt import KEEP
from wan.types import as_picture

pytestmark = pytest.mark.slow

MODELS = ROOT / "models"


@pytest.fixture(scope="module")
def world() -> list[Scene]:
    return held_out(30)


@pytest.fixture(scope="module", params=tuple(FOLDERS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def from_last_frame(task: str, world: list[Scene]) -> dict[str, float]:
    """What `measure_clips` finds of clips that continue a last frame."""
    return measure_clips(world[:2], Maker(MODELS, task, "last_frame"))


def test_the_models_take_30_mb() -> None:
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= 30e6


@torch.no_grad()
def test_the_vae_gives_back_what_it_was_given(task: str, world: list[Scene]) -> None:
    assert measure_vae(open_pipeline(MODELS, task), world[:2])["vae_psnr"] >= 33


@torch.no_grad()
def test_the_captioner_says_what_moves_where(world: list[Scene]) -> None:
    shares = measure_captioner(open_pipeline(MODELS, "v2v-5B"), world)
    assert min(shares["caption_colour"], shares["caption_shape"], shares["caption_direction"]) >= 0.9


def test_a_clip_begins_with_the_frame_that_it_was_given(from_last_frame: dict[str, float]) -> None:
    assert from_last_frame["first_frame_psnr"] >= 35.5


def test_a_clip_goes_on_where_its_footage_ends(
    task: str, world: list[Scene], from_last_frame: dict[str, float]
) -> None:
    assert from_last_frame["direction"] >= 0.75
    errors = measure_clips(world[:2], Maker(MODELS, task, "tail:5"))
    assert errors["position_error"] <= 0.07 and errors["lost_after_1s"] <= 0.2


def test_the_second_clip_of_a_chain_still_has_the_shapes(world: list[Scene]) -> None:
    one_shape = [scene for scene in world if len(scene.shapes) == 1][:2]
    shares = measure_chains(one_shape, Maker(MODELS, "v2v-5B", "tail:5"), 2)
    assert shares["colours_right"] == [1, 1]


def test_the_truth_is_right_in_all_that_is_counted(world: list[Scene]) -> None:
    scene = next(scene for scene in world if len(scene.shapes) == 3)
    frames = scene.truth.draw(torch.arange(-4, 13))[0].transpose(0, 1)
    judged_clip = judge_clip(scene, frames, -4, 8)
    assert judged_clip.colours == judged_clip.all_right == [True]
    assert judged_clip.kinds == judged_clip.areas == [True] * 3
    assert max(judged_clip.errors) < 0.02 and judged_clip.borders == judged_clip.insides == [0]
    for side in (frames[..., :4, :], frames[..., -4:, :], frames[..., :4], frames[..., -4:]):
        side[:, 2] += 0.2  # a view of the frames
        judged_clip = judge_clip(scene, frames, -4, 8)
        assert judged_clip.borders == [pytest.approx(25.5, abs=7)] and judged_clip.insides[0] < 1
        side[:, 2] -= 0.2
    frames[..., :4, :40] += 0.2
    assert judge_clip(scene, frames, -4, 8).borders[0] < 1


def test_a_shape_of_another_kind_or_size_or_one_that_is_gone_is_counted_so(world: list[Scene]) -> None:
    scene = next(scene for scene in world if len(scene.shapes) == 1)
    times = torch.arange(17)

    def judged(**changes: torch.Tensor) -> ChainClip:
        frames = dataclasses.replace(scene.truth, **changes).draw(times)[0].transpose(0, 1)
        return judge_clip(scene, frames, 0, 8)

    other = judged(shape=(scene.truth.shape + 1) % 3, spin=0 * scene.truth.spin)
    assert other.colours == other.areas == [True] and other.kinds == other.all_right == [False]
    assert judged(radius=scene.truth.radius / 1.5, growth=0 * scene.truth.growth).areas == [False]
    gone = judged(present=torch.zeros_like(scene.truth.present))
    assert gone == ChainClip([], [False], [False], [False], [False], [], gone.levels, gone.borders, gone.insides, [])
    assert gone.levels[0] > 0.5 and judged().levels == [0]
    place = scene.truth.positions(torch.tensor([8]))[:, 0]
    aside = torch.where(place[..., :1] < 80, 20, -20) * torch.tensor([1, 0])  # pixels, towards the middle
    [error] = judged(start=place + aside, velocity=0 * scene.truth.velocity).errors
    assert error == pytest.approx(20 / 160, abs=0.01)


def test_a_prompt_that_calls_a_kind_by_another_name_is_counted(world: list[Scene]) -> None:
    scene = next(scene for scene in world if len(scene.shapes) == 2)
    seen = by_colour(scene.source.frames[-1].permute(2, 0, 1))
    assert judge_names(scene, seen, f"continue video {scene.caption}") == [True, True]
    first = scenes.SHAPES[int(scene.truth.shape[0, scene.shapes[0]])]
    other = next(shape for shape in scenes.SHAPES if shape != first)
    assert judge_names(scene, seen, scene.caption.replace(first, other, 1)) == [False, True]
    assert judge_names(scene, {}, scene.caption) == []  # what is not of its kind any more is not asked for


@pytest.mark.parametrize("task", FOLDERS)
def test_four_steps_with_the_loras_go_on_with_a_prompt_of_what_happens_next(task: str, world: list[Scene]) -> None:
    part = "5B" if task == "v2v-5B" else "A14B"
    loras = tuple(sorted((MODELS / "tiny-loras").glob(f"*-{part}-*")))
    assert len(loras) == (1 if task == "v2v-5B" else 2)
    scene = next(scene for scene in world if len(scene.shapes) == 1)
    make = Maker(MODELS, task, "tail:9", preset="turbo", loras=loras, prompt_mode="continue")
    made = make(scene.source, 3)
    assert made.notes["fallback"] is None and made.prompt_memory["prompts"]
    assert made.request.sampling.steps == 4 and made.request.prompt.endswith(KEEP)
    assert judge_clip(scene, made.clip.frames.permute(0, 3, 1, 2), -8, 8).all_right == [True]


def test_each_seed_has_scenes_of_its_own(world: list[Scene]) -> None:
    assert held_out(2)[1].caption == world[1].caption != held_out(2, seed=1)[1].caption


def test_captions_are_read_by_colour() -> None:
    motions = told_in("a red circle moves up and turns, a blue square stays in place and grows; the camera is still.")
    assert motions == {"red": ("circle", "up"), "blue": ("square", "stays")}


@torch.no_grad()
def test_the_captioner_s_eye_knows_a_scene_again_two_seconds_later(world: list[Scene]) -> None:
    """What the report's identity curve is made of."""
    viewer = open_pipeline(MODELS, "v2v-5B").captioner
    assert isinstance(viewer, Viewer)
    before, after = (
        torch.stack([viewer.view(as_picture(scene.source.frames[at].permute(2, 0, 1))) for scene in world[:8]])
        for at in (0, -1)
    )
    likeness = before @ after.T
    assert likeness.argmax(1).tolist() == list(range(8)) and float(likeness.diagonal().min()) > 0.9
