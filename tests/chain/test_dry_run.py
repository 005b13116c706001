"""The numbers of a dry run, by hand, and what a plan says of its clip."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.chain.dry_run import Effort, estimate, flops, mp4_bytes, outline, outline_clip, size_in_words, state_bytes
from wan.chain.plan import Plan
from wan.errors import UserError
from wan.settings import Context, Sampling
from wan.types import Geometry

GIB = 2**30
A14B, TI2V_5B = (4, 8, 8), (4, 16, 16)  # strides of the VAEs


def plan(frames: int = 9, width: int = 64, height: int = 32, strides: tuple[int, int, int] = A14B, **more: Any) -> Plan:
    sampling = more.pop("sampling", Sampling(4, 5.0, (1.0, 1.0)))
    return Plan(Geometry(frames, height, width, strides), sampling, "", **more)


def test_a_state_holds_latents_last_frames_and_frames_for_the_captioner() -> None:
    # 16 channels of 3 x 4 x 8 cells and 9 frames in float32, 8 frames of bytes
    assert state_bytes(plan(), 16) == 4 * 16 * 3 * 4 * 8 + 4 * 3 * 9 * 32 * 64 + 3 * 8 * 32 * 64
    assert state_bytes(plan(81, num_segments=3), 16) == 4 * 16 * 21 * 4 * 8 + 4 * 3 * 17 * 32 * 64 + 3 * 3 * 32 * 64
    assert mp4_bytes(plan().geometry) == pytest.approx(0.03 * 9 * 32 * 64)


def test_sizes_are_in_the_unit_that_one_would_say() -> None:
    assert size_in_words(2**29) == "512 MiB" and size_in_words(2**29 + 1) == "0.5 GiB"
    assert size_in_words(1.5 * GIB) == "1.5 GiB" and size_in_words(3.4 * 2**20) == "3 MiB"


class Continuation:
    """An A14B of two blocks of a width of 8, whose budgets are what a test says."""

    def __init__(self) -> None:
        shapes = {
            "patch_embedding.weight": (8, 36, 1, 2, 2),  # no matrix
            "blocks.0.q": (8, 8),
            "blocks.1.q": (8, 8),
            "blocks.1.bias": (8,),
            "head": (64, 8),
        }
        weights = SimpleNamespace(shapes=shapes, path=Path("dit"))
        self.checkpoint = SimpleNamespace(experts={"high": weights, "low": weights})
        self.fps = Fraction(16)
        self.config = SimpleNamespace(z_dim=16)
        self.rules = SimpleNamespace(shares=lambda sampling: [(1, 1), (3, 0)])
        self.vlm = SimpleNamespace(host_bytes=5 * GIB, is_beside=True)
        self.models = SimpleNamespace(lora_bytes=lambda loras: {})
        self.budget = SimpleNamespace(vram=None)
        self.host = SimpleNamespace(given=False, limit=64 * GIB, plan=lambda *what: what[3], need=self._need)
        self.needs_all = 40 * GIB

    def budget_for(self, geometry: Geometry, offload: bool, loras: Any) -> Any:
        def stage(size: float) -> Any:
            return SimpleNamespace(peak=lambda tensors: int(size * GIB * geometry.frames / 9))

        stages = {"encoding": stage(2), "sampling": stage(6), "decoding": stage(3)}
        whole = 6 * GIB * geometry.frames // 9 if offload else self.needs_all
        return SimpleNamespace(vram=None, tensors=None, gpu_bytes=lambda *_: whole, stages=lambda geometry: stages)

    def _need(self, chosen: Any, budget: Any, geometry: Geometry, loras: Any, captioner: int) -> int:
        return 10 * GIB * geometry.frames // 9 + captioner


def inventory(*plans: Plan, clips: Mapping[int, Mapping[str, Any]] | None = None, **more: Any) -> Any:
    """A folder that holds these clips of these plans, by their records."""
    finished = {number: SimpleNamespace(record=record) for number, record in (clips or {}).items()}
    seeds = SimpleNamespace(is_drawn=lambda number: number == 3, of=lambda number: 6 + number)
    return SimpleNamespace(
        plans=plans,
        count=len(plans),
        clips=finished,
        missing=[plan for number, plan in enumerate(plans, 1) if number not in finished],
        folder=SimpleNamespace(path=Path("out")),
        seeds=seeds,
        settings=SimpleNamespace(keep_state="all", **more),
    )


def lines(*plans: Plan, **more: Any) -> list[str]:
    continuation: Any = Continuation()
    return list(outline(continuation, inventory(*plans, **more)))


def test_a_plan_is_a_table_of_clips() -> None:
    shown = lines(
        plan(17, context=Context("tail", 5), prompt="a  boat\nsails"),
        plan(17, prompt=None, prefix="continue video"),
        plan(9, cut=True, prompt="fog", number=3, count=5, fade=4),
        plan(9, prompt_mode="continue", prompt="the harbour", discard=4),
        plan(9, prompt_mode="continue", prompt=None),
        clips={1: {"seed": 99, "prompt": "a boat\nsails"}},
    )
    assert shown[:7] == [
        "5 clips of 64x32 at 16 frames per second, in out",
        "clip  frames   new   from s                 seed  known         prompt",
        "   1      17    12     0.00                   99  tail 5        (finished) a boat sails",
        "   2      17    16     0.75                    8  last_frame 1  continue video <a description by the VLM>",
        "   3       9     5     1.75                drawn  a cut         fog",
        "   4       9     4     2.06                   10  last_frame 1  "
        "<what the VLM says happens next, towards: the harbour>",
        "   5       9     8     2.31                   11  last_frame 1  <what the VLM says happens next>",
    ]
    assert shown[7] == "2.81 s of new video; 4 of 5 clips are still to be made"
    assert shown[9] == "about 0 s of sampling on one H200; elsewhere the first clip will tell"
    # of the longest, with 0.8 GiB of CUDA's own
    assert shown[10] == "about 12.1 GiB of GPU memory (encoding 4.6, sampling 12.1, decoding 6.5), beside the VLM"
    assert shown[11].startswith("about 23.9 GiB of host memory, of 64.0 that are free: ")  # with the captioner
    assert len(shown) == 12


def test_a_finished_run_needs_nothing_more() -> None:
    whole = lines(plan(prompt="x"), clips={1: {"seed": 1, "prompt": "x"}})
    assert len(whole) == 4 and whole[-1] == "0.50 s of new video; 0 of 1 clips are still to be made"
    continuation: Any = Continuation()
    done = estimate(continuation, inventory(plan(), clips={1: {"seed": 1, "prompt": "x"}}))
    assert (done.clips, done.missing, done.work, done.seconds, done.measured, done.disk_bytes) == (1, 0, 0, 0, False, 0)


def test_all_models_at_once_are_told_from_one_after_the_other() -> None:
    line = lines(plan(prompt="x", offload=False))[-2]
    assert line.endswith("(all models at once)") and line.startswith("about 40.")  # and no VLM is asked


def test_memory_that_is_limited_by_what_is_free_says_so() -> None:
    continuation: Any = Continuation()
    plain = continuation.budget_for
    continuation.budget_for = lambda *what: SimpleNamespace(**vars(plain(*what)) | {"vram": 8 * GIB})
    for given, limited in ((None, True), (8 * GIB, False)):
        continuation.budget.vram = given
        line = list(outline(continuation, inventory(plan())))[-2]
        assert (", within the 8.0 that are free, beside the VLM" in line) == limited
    continuation.vlm = SimpleNamespace(host_bytes=0, is_beside=False)  # at an endpoint
    assert list(outline(continuation, inventory(plan())))[-2].endswith(")")
    continuation.host.given = True
    assert "of 64.0 that are given" in list(outline(continuation, inventory(plan(prompt="x"))))[-1]


def test_a_clip_alone_takes_what_one_of_a_chain_takes() -> None:
    continuation: Any = Continuation()
    plain, checked = continuation.budget_for, list[Geometry]()
    continuation.budget_for = lambda *what: SimpleNamespace(**vars(plain(*what)), check=checked.append)
    for one in (plan(81, 1280, 704), plan(81, 1280, 704, prompt="x", offload=False)):
        alone = list(outline_clip(continuation, Effort.of(continuation, one)))
        assert alone[0] == "about 2 MiB of disk" and alone[1].endswith(" of sampling on one H200")
        of_chain = list(outline(continuation, inventory(one)))
        assert alone[2:] == of_chain[-2:] and of_chain[-3].startswith(f"{alone[1]};")
        assert checked.pop() == one.geometry


def test_a_clip_s_arithmetic_is_that_of_its_products_and_its_attention() -> None:
    continuation: Any = Continuation()
    tokens = 3 * 2 * 4
    forward = 2 * (8 * 8 + 8 * 8 + 64 * 8) * tokens + 4 * 2 * 8 * tokens**2
    one = Effort.of(continuation, plan())
    assert flops(continuation, one) == forward * 5  # four steps, of which one is guided
    assert flops(continuation, Effort.of(continuation, plan(best_of=3))) == 3 * flops(continuation, one)


@pytest.mark.parametrize(
    ("clips", "seconds", "measured"),
    [
        ({}, None, False),
        ({1: {"seconds": None}}, None, False),
        ({1: {"seconds": {"load": 3.0}}}, None, False),
        ({1: {"seconds": {"sample": 10.0}}}, 10.0, True),
        (
            {1: {"seconds": {"sample": 10.0}}, 2: {"seconds": {"sample": 30.0}}, 3: {"seconds": {"sample": 20.0}}},
            20.0,
            True,
        ),
    ],
)
def test_time_is_as_finished_clips_took_or_as_on_an_h200(clips: Any, seconds: float | None, measured: bool) -> None:
    continuation: Any = Continuation()
    told = estimate(continuation, inventory(*[plan()] * 4, clips=clips))
    missing = 4 - len(clips)
    assert told.clips == 4 and told.missing == missing and told.measured == measured
    assert told.work == pytest.approx(missing * flops(continuation, Effort.of(continuation, plan())))
    assert told.seconds == pytest.approx(told.work / 5.5e14 if seconds is None else missing * seconds)


def test_time_that_is_measured_is_said_to_be() -> None:
    shown = lines(
        plan(prompt="x"), plan(prompt="x"), clips={1: {"seed": 1, "prompt": "x", "seconds": {"sample": 90.0}}}
    )
    assert "about 90 s of sampling, as its finished clips took" in shown


def test_disk_is_states_videos_twice_and_takes() -> None:
    continuation: Any = Continuation()
    state, video = state_bytes(plan(), 16), mp4_bytes(plan().geometry)
    of = inventory(*[plan()] * 3)
    assert estimate(continuation, of).disk_bytes == pytest.approx(3 * state + 6 * video)
    of.settings.keep_state = "last"
    assert estimate(continuation, of).disk_bytes == pytest.approx(2 * state + 6 * video)
    taken = inventory(plan(best_of=3, keeps_takes=True), plan(best_of=3))
    assert estimate(continuation, taken).disk_bytes == pytest.approx(5 * state + 7 * video)


def test_what_keeping_less_would_save_is_said_from_three_clips_on() -> None:
    def disk(count: int, keep_state: str = "all") -> str:
        continuation: Any = Continuation()
        of = inventory(*[plan(81, 1280, 704, prompt="x")] * count)
        of.settings.keep_state = keep_state
        return next(line for line in outline(continuation, of) if " of disk" in line)

    states = "about 0.6 GiB of disk, of which 0.6 GiB are frames and latents to go on from"
    assert disk(3) == f"{states}; 428 MiB with `keep_state` last"
    assert disk(2) == "about 436 MiB of disk, of which 428 MiB are frames and latents to go on from"
    assert disk(3, "last") == "about 440 MiB of disk, of which 428 MiB are frames and latents to go on from"


# The plan of a clip


@pytest.mark.parametrize(
    ("given", "dropped", "leading", "shown", "is_cut"),
    [
        ({}, 1, 1, 16, False),
        ({"context": Context("tail", 9)}, 9, 9, 8, False),
        ({"context": Context("tail", 9), "discard": 4}, 9, 9, 4, False),
        ({"cut": False}, 1, 1, 16, False),
        ({"cut": True}, 0, 0, 17, True),
        ({"cut": "picture"}, 0, 1, 17, True),
        ({"cut": "picture", "context": Context("tail", 9), "discard": 8}, 0, 1, 9, True),
    ],
)
def test_known_frames_repeat_the_footage_unless_a_shot_begins(
    given: dict[str, Any], dropped: int, leading: int, shown: int, is_cut: bool
) -> None:
    one = plan(17, **given)
    assert (one.dropped, one.leading, one.shown, one.is_cut) == (dropped, leading, shown, is_cut)


def test_only_a_cut_after_the_first_clip_fades_in() -> None:
    fades = [plan(fade=4, cut=cut, number=number, count=3).fade_in for cut, number in ((True, 2), (True, 1), (None, 2))]
    assert fades == [4, 0, 0]


@pytest.mark.parametrize(
    ("given", "candidates"),
    [
        ({}, (1,)),
        ({"best_of": 3}, (1, 2, 3)),
        ({"best_of": 3, "cut": True}, (1,)),
        ({"best_of": 3, "take": 2}, (2,)),
        ({"best_of": 3, "take": 2, "keeps_takes": True}, (1, 2, 3)),
        ({"best_of": 3, "cut": True, "keeps_takes": True}, (1, 2, 3)),
    ],
)
def test_candidates_are_made_where_one_of_them_can_be_chosen(given: dict[str, Any], candidates: Any) -> None:
    assert plan(**given).candidates == candidates


@pytest.mark.parametrize(
    ("given", "described"),
    [
        ({}, True),
        ({"prompt": "x"}, False),
        ({"prompt": ""}, False),
        ({"prompt": "x", "prompt_mode": "continue"}, True),
        ({"prompt": "x", "prompt_mode": "continue", "cut": "picture"}, True),
        ({"prompt": "x", "prompt_mode": "continue", "cut": True}, False),
        ({"cut": True}, False),
    ],
)
def test_the_captioner_is_asked_where_there_is_a_picture_and_something_to_say(
    given: dict[str, Any], described: bool
) -> None:
    assert plan(**given).described == described


def test_a_clip_keeps_something_new() -> None:
    plan(13, context=Context("tail", 9))
    with pytest.raises(UserError, match="context_frames 9: a clip of 9 frames must be longer"):
        plan(9, context=Context("tail", 9))
    assert plan(17, context=Context("tail", 9), discard=4).shown == 4
    with pytest.raises(UserError, match="discard 8 leaves nothing new of a clip of 17 frames"):
        plan(17, context=Context("tail", 9), discard=8)
    with pytest.raises(UserError, match="discard would leave out the clip's end image"):
        plan(17, discard=4, end="picture")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_segments", 0),
        ("best_of", 0),
        ("prompt_mode", "sing"),
        ("motion_amplitude", 9.0),
        ("discard", 3),
        ("fade", -1),
        ("drift_correction", 2.0),
        ("colour_carry", 2.0),
    ],
)
def test_a_plan_that_exists_is_valid(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        plan(17, **{name: value})
