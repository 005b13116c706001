"""The plan of every clip: what the command line says, what its scene says, and what is held on to across shots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from wan.chain.plan import LaterPicture, Plan
from wan.chain.storyboard import Scene
from wan.commands import plans
from wan.commands.plans import plans_of
from wan.errors import UserError
from wan.options import Settings
from wan.settings import Context, Sampling
from wan.types import Geometry

SVI: dict[str, Any] = {"continuation": "svi2pro"}


class Job:
    """Makes plans of settings, with the names of picture files for pictures."""

    def __init__(self, *scenes: Scene, ends: tuple[str, ...] = (), **settings: Any) -> None:
        self.settings, self.scenes, self.ends = Settings(**settings), scenes, ends
        self.checked: list[bool] = []
        self.read: list[str] = []

    def plan(self, continuation: Any, footage: Any, settings: Any = None, read: Any = None, **more: Any) -> Plan:
        self.checked.append(more.get("check", True))
        given = settings or self.settings
        pictures = {"anchor": given.anchor_image, "end": given.end_image, "cut": given.cut}
        frames = {name: read(file) if read and isinstance(file, str) else file for name, file in pictures.items()}
        values = {**frames, **{name: value for name, value in more.items() if name != "check"}}
        return Plan(
            Geometry(17, 32, 32, (4, 8, 8)),
            Sampling(4, 5.0, (1.0, 1.0)),
            "",
            given.prompt,
            context=Context.choose(given.continuation, given.context_frames),
            fade=given.fade,
            **values,
        )


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the picture files that were read."""
    read: list[str] = []

    def read_image(file: str) -> str:
        read.append(file)
        return file

    monkeypatch.setattr("wan.media.read_image", read_image)
    return read


def made(job: Any, count: int) -> list[Plan]:
    checks: list[Plan] = []
    available: list[int] = []

    def with_available_context(footage: Any, plan: Plan) -> Plan:
        available.append(plan.number)
        return plan

    continuation: Any = SimpleNamespace(
        frame_for=lambda picture, width, height: f"{picture} at {width}x{height}",
        frames=SimpleNamespace(with_available_context=with_available_context),
        plan=SimpleNamespace(check=checks.append),
    )
    footage: Any = SimpleNamespace(last="last")
    of_clips = plans_of(job, continuation, footage, job.scenes, count)
    assert available == [1] and [(plan.number, plan.count) for plan in of_clips] == [
        (n, count) for n in range(1, count + 1)
    ]
    job.checks = checks
    return of_clips


LAST = "last at 32x32"


def test_without_scenes_all_clips_are_alike_and_the_last_has_the_end() -> None:
    job = Job(prompt="x", end_image="end.png")
    one, two, three = made(job, 3)
    assert [plan.end for plan in (one, two, three)] == [None, None, "end.png"]
    assert {plan.prompt for plan in (one, two, three)} == {"x"} and {plan.likeness for plan in (one, two)} == {LAST}
    assert job.checked == [True]


def test_the_command_s_own_plan_is_checked_where_a_clip_follows_it_alone() -> None:
    for scenes, checked in ((1, True), (2, False)):
        job = Job(*[Scene(n) for n in range(scenes)], prompt="x")
        made(job, 2)
        assert job.checked == [checked] + [True] * scenes


def test_a_scene_says_what_is_different_and_may_have_an_end_of_its_own() -> None:
    job = Job(Scene(1, {"prompt": "y"}), Scene(2, {"end_image": "own.png"}), prompt="x", end_image="end.png")
    assert [(plan.prompt, plan.end) for plan in made(job, 3)] == [
        ("y", None),
        ("x", "own.png at 32x32"),
        ("x", "end.png"),
    ]
    short = Job(Scene(1, {"end_image": "own.png"}), end_image="end.png", prompt="x")
    assert [plan.end for plan in made(short, 1)] == ["own.png at 32x32"]


def test_what_a_scene_asks_for_in_vain_names_its_line_or_its_clip() -> None:
    for scene, message in (
        (Scene(4, {"anchor_image": "a.png"}), "story.yaml, line 4: anchor goes with .?continuation.? svi2pro"),
        (Scene(0, {"anchor_image": "a.png"}), "clip 1: anchor goes with"),
        (Scene(7, {"context_frames": 17}), "story.yaml, line 7: .*must be longer"),
    ):
        with pytest.raises(UserError, match=message):
            made(Job(scene, storyboard="story.yaml", prompt="x"), 1)
    ended = Scene(3, {"end_image": "own.png"})
    with pytest.raises(UserError, match="line 3: end_image: the last clip ends with the first frame of"):
        made(Job(ended, storyboard="s.yaml", until="b.mp4", prompt="x"), 1)
    assert len(made(Job(ended, storyboard="s.yaml", until="b.mp4", prompt="x"), 2)) == 2, "it is not the last"


def test_svi_holds_on_to_what_was_said_last_or_to_the_picture_of_the_shot(pictures: list[str]) -> None:
    job = Job(
        Scene(1, SVI),
        Scene(2, {**SVI, "anchor_image": "face.png"}),
        Scene(3, SVI),
        Scene(4, {"cut": "next.png"}),
        Scene(5, SVI),
        Scene(6),
        prompt="x",
    )
    of_clips = made(job, 6)
    face, following = "face.png at 32x32", "next.png at 32x32"
    assert [plan.anchor for plan in of_clips] == [None, face, face, face, following, following]
    assert [plan.likeness for plan in of_clips] == [None, face, face, following, following, following]
    assert pictures.count("next.png") == 1 == pictures.count("face.png"), "each is read once"


def test_an_anchor_of_the_command_outlives_a_cut() -> None:
    job = Job(Scene(1, {"cut": "next.png"}), Scene(2), anchor_image="face.png", prompt="x", **SVI)
    assert [plan.anchor for plan in made(job, 3)] == ["face.png"] * 3
    plain = Job(Scene(1, {"cut": "next.png"}), Scene(2, SVI), prompt="x")
    assert [plan.anchor for plan in made(plain, 2)] == [None, "next.png at 32x32"]


def test_after_a_cut_to_text_there_is_nothing_to_be_like() -> None:
    job = Job(Scene(1), Scene(2, {"cut": True}), Scene(3), Scene(4, {"cut": "next.png"}), prompt="x")
    assert [plan.likeness for plan in made(job, 5)] == [LAST, None, None, "next.png at 32x32", "next.png at 32x32"]


def test_each_clip_of_a_folder_of_ends_has_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "picture_digest", lambda frame: f"digest of {frame}")
    job: Any = Job(prompt="x", ends=("a.png", "b.png"))
    ends: Any = [plan.end for plan in made(job, 2)]
    assert [end.digest for end in ends] == ["digest of a.png at 32x32", "digest of b.png at 32x32"]
    assert all(isinstance(end, LaterPicture) for end in ends) and ends[1].read() == "b.png at 32x32"
    assert [plan.end.digest for plan in job.checks] == ["digest of a.png at 32x32"]
    monkeypatch.setattr(plans, "picture_digest", lambda frame: "another")
    with pytest.raises(UserError, match=r"a\.png is another picture than when the run began"):
        ends[0].read()


@pytest.mark.parametrize(
    ("fade", "message"), [(8, None), (9, "fade 9 is more than half of clip 2 or of the one before it")]
)
def test_a_fade_takes_no_more_than_half_of_the_clips_around_it(fade: int, message: str | None) -> None:
    def job(**more: Any) -> Job:
        return Job(Scene(1), Scene(2, {"cut": "next.png"}), prompt="x", fade=fade, **more)  # 16 and 17 new frames

    if message is None:
        assert [plan.fade_in for plan in made(job(), 3)] == [0, fade, 0]
        with pytest.raises(UserError, match="fade is for a joined video without the source in front"):
            made(job(include_source=True), 3)
    else:
        with pytest.raises(UserError, match=message):
            made(job(), 3)


def test_the_source_may_stand_in_front_where_nothing_fades() -> None:
    assert len(made(Job(Scene(1), Scene(2, {"cut": "next.png"}), prompt="x", include_source=True), 2)) == 2
    assert len(made(Job(prompt="x", fade=8, include_source=True), 2)) == 2
