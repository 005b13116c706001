"""The loop, with fakes for models and scheduler."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.denoiser.conditioning import TextOnly
from wan.denoiser.sampling import Expert, NotFinite, plan_stages, sample
from wan.denoiser.schedule import build_scheduler
from wan.denoiser.step_cache import Caching, _differs
from wan.denoiser.timetable import forwards, share_out, step_shares, timesteps_of
from wan.device.placement import Placement
from wan.errors import UserError
from wan.settings import Sampling, StepCache
from wan.types import Geometry, Step, TextContext

CPU = Placement(torch.device("cpu"))
CONTEXT = TextContext(torch.ones(1, 512, 1), torch.zeros(1, 512, 1))


class Fake(nn.Module):
    """Answers with the text's value; remembers the timesteps it was asked for. Its text keys are the text."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, float]] = []

    def text_keys(self, text: Tensor, keep: bool) -> Tensor:
        return text

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.asked.append((int(t), float(text[0, 0, 0])))
        return (torch.full_like(latents, float(text[0, 0, 0])),)


class Adds:
    """A solver that adds the flow."""

    def step(self, output: Tensor, t: Tensor, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (latents + output,)


def expert(name: str, model: Any, guidance: float, lowest: float) -> Expert:
    """An expert with a fake for its model."""
    return Expert(name, name, lambda: model, guidance, lowest)


def stages_of(*experts: Expert) -> Any:
    return plan_stages(torch.tensor([999, 950, 900, 899, 10]), experts)


def test_each_expert_gets_its_share_of_the_schedule_and_its_guidance() -> None:
    high, low = Fake(), Fake()
    steps: list[Step] = []
    stages = stages_of(expert("high", high, 3.0, 900), expert("low", low, 2.0, 0))
    made = sample(torch.zeros(1, 1, 1, 1), stages, Adds(), TextOnly(), CONTEXT, CPU, steps.append)  # type: ignore[arg-type]
    assert [t for t, _ in high.asked[::2]] == [999, 950, 900] and [t for t, _ in low.asked[::2]] == [899, 10]
    # flow = 0 + guidance * (1 - 0)
    assert made.item() == 3 * 3.0 + 2 * 2.0
    assert [(step.index, step.total, step.stage) for step in steps] == [
        *((index, 5, "high") for index in (1, 2, 3)),
        *((index, 5, "low") for index in (4, 5)),
    ]


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 12.0])
def test_timesteps_are_told_without_a_scheduler(solver: str, shift: float) -> None:
    for steps, train in itertools.product((1, 3, 4, 20, 40, 77), (1000, 500)):
        sampling = Sampling(steps, shift, (1.0, 1.0), solver)
        expected = build_scheduler(sampling, torch.device("cpu"), train).timesteps.tolist()
        assert list(timesteps_of(sampling, train)) == expected


class Spoils(Adds):
    """Gives NaN from a step on."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, output: Tensor, t: Tensor, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.left -= 1
        return (latents * (torch.nan if self.left < 1 else 1),)


@pytest.mark.parametrize(
    ("spoiled", "name", "step"),
    [
        (1, "high", 1),
        (2, "high", 3),
        (3, "high", 3),
        (4, "low", 4),
        (5, "low", 5),
    ],  # the first and last of each are looked at
)
def test_numbers_that_are_not_finite_are_known_by_their_expert_and_step(spoiled: int, name: str, step: int) -> None:
    """Of each expert the first and the last step are looked at."""
    heard: list[Step] = []
    stages = stages_of(expert("high", Fake(), 3.0, 900), expert("low", Fake(), 2.0, 0))
    solver: Any = Spoils(spoiled)
    with pytest.raises(NotFinite, match=f"the {name} expert's latents are not finite after step {step}") as raised:
        sample(torch.ones(1, 1, 1, 1), stages, solver, TextOnly(), CONTEXT, CPU, heard.append)
    assert (raised.value.expert.name, raised.value.step) == (name, step) and len(heard) == step - 1


def test_each_half_of_a_team_computes_one_of_the_two_forwards() -> None:
    for half, text in ((0, 1.0), (1, 0.0)):
        model, gathered = Fake(), list[float]()

        def gather(flow: Tensor, gathered: list[float] = gathered) -> list[Tensor]:
            gathered.append(flow.item())
            return [torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)]  # that of the prompt comes first

        guidance = SimpleNamespace(index=half, gather=gather)
        team: Any = SimpleNamespace(guidance=guidance, tokens=None)
        stages = stages_of(expert("", model, 3.0, 0))
        solver: Any = Adds()
        made = sample(torch.zeros(1, 1, 1, 1), stages, solver, TextOnly(), CONTEXT, CPU, team=team)
        assert made.item() == 5 * 3.0 and gathered == [text] * 5 and [asked for _, asked in model.asked] == [text] * 5


@pytest.mark.parametrize(("change", "differs"), [(0.9, False), (1.0, False), (1.1, True)])
def test_ranks_ask_of_all_tokens_whether_to_compute_on(change: float, differs: bool) -> None:
    """Where the first block's residual has changed by more than an eighth, in the mean of two ranks."""
    before = torch.ones(1, 3, 4)
    before[:, 2] = 1000  # filling
    residual = before.clone()
    residual[:, 0] += 0.25 * change  # of four numbers out of eight
    residual[:, 2] = 0
    state = SimpleNamespace(head_block_residual=None)
    hook = SimpleNamespace(threshold=0.125, state_manager=SimpleNamespace(get_state=lambda: state))
    model = SimpleNamespace(share=SimpleNamespace(real=2))
    group: Any = SimpleNamespace(gather=lambda sums: [sums, torch.tensor([change, 8.0])])
    assert _differs(hook, model, group, residual), "in the first step there is nothing to compare"
    vars(state)["head_block_residual"] = before
    assert _differs(hook, model, group, residual) == differs


def test_guidance_stays_within_its_interval() -> None:
    model = Fake()
    solver: Any = Adds()
    stages = plan_stages(torch.tensor([999, 600, 300]), [expert("", model, 3.0, 0)], lambda t: t == 600)
    assert stages[0].guidance == (1.0, 3.0, 1.0)
    sample(torch.zeros(1, 1, 1, 1), stages, solver, TextOnly(), CONTEXT, CPU)
    assert model.asked == [(999, 1.0), (600, 1.0), (600, 0.0), (300, 1.0)]


def test_timesteps_are_those_of_the_official_schedules() -> None:
    """sigma' = shift * sigma / (1 + (shift - 1) * sigma), by hand."""
    assert timesteps_of(Sampling(4, 5.0, (1.0, 1.0), "euler")) == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert timesteps_of(Sampling(2, 1.0, (1.0, 1.0), "dpm++")) == (1000, 500)
    assert timesteps_of(Sampling(2, 3.0, (1.0, 1.0), "dpm++")) == (1000, 750)
    assert timesteps_of(Sampling(2, 3.0, (1.0, 1.0), "unipc")) == (999, 749)  # from 0.999


def test_a_timestep_is_for_the_first_expert_that_works_at_it() -> None:
    assert share_out([999, 900, 899, 1], [900, 0]) == [[999, 900], [899, 1]]
    assert share_out([999, 950], [900, 0]) == [[999, 950], []]
    assert share_out([800, 10], [900, 0]) == [[], [800, 10]]
    assert share_out([800, 10], [0]) == [[800, 10]]


@pytest.mark.parametrize(
    ("guidance", "interval", "lowest", "shares"),
    [
        ((2.0, 3.0), None, [900, 0], [(1, 1), (3, 3)]),
        ((1.0, 3.0), None, [900, 0], [(1, 1), (3, 0)]),  # (low noise, high noise)
        ((2.0, 1.0), None, [900, 0], [(1, 0), (3, 3)]),
        ((2.0, 1.0), None, [0], [(4, 4)]),  # one expert has the first
        ((1.0, 3.0), None, [0], [(4, 0)]),
        ((2.0, 3.0), (0.3, 0.8), [900, 0], [(1, 0), (3, 2)]),  # at 0.75 and 0.5
    ],
)
def test_steps_of_each_expert_are_counted_with_those_that_are_guided(
    guidance: tuple[float, float], interval: tuple[float, float] | None, lowest: list[float], shares: Any
) -> None:
    sampling = Sampling(4, 1.0, guidance, "dpm++", guidance_interval=interval)  # at 1000, 750, 500, 250
    assert step_shares(sampling, lowest, 1000) == shares


def test_forwards_are_one_a_step_and_one_more_where_it_is_guided() -> None:
    assert forwards([(1, 1), (3, 0)], None) == 5 and forwards([(0, 0), (4, 4)], None) == 8
    cache = StepCache("taylorseer", 2)
    assert forwards([(20, 10), (0, 0)], cache) == 1.5 * cache.computed(20)


@pytest.mark.parametrize(
    ("cache", "fewest", "config"),
    [
        # sources: MagCache's settings for Wan2.1 and Wan2.2, and diffusers' documentation of its hooks
        ("magcache:0.06", 2, {"threshold": 0.06, "max_skip_steps": 2, "retention_ratio": 0.2}),
        ("first_block:0.1", 2, {"threshold": 0.1}),
        (
            "taylorseer:3",
            4,
            {
                "cache_interval": 3,
                "disable_cache_before_step": 3,
                "use_lite_mode": True,
                "taylor_factors_dtype": torch.float32,
            },
        ),
    ],
)
def test_a_cache_is_on_for_an_expert_s_steps_alone(cache: str, fewest: int, config: dict[str, Any]) -> None:
    events: list[Any] = []

    class Model:
        cache_context = "branch"

        def enable_cache(self, config: Any) -> None:
            events.append(config)

        def disable_cache(self) -> None:
            events.append("off")

    ratios = [1.0, *(1 - 0.01 * step for step in range(1, 10))]
    caching = Caching(StepCache.parse(cache), {"low": ratios})
    with caching.of(Model(), "low", 10) as branch:
        assert branch == "branch" and len(events) == 1  # type: ignore[comparison-overlap]
    with pytest.raises(KeyboardInterrupt), caching.of(Model(), "low", 10):
        raise KeyboardInterrupt
    assert events[1] == events[3] == "off"
    assert {name: getattr(events[0], name) for name in config} == config
    if "magcache" in cache:
        assert events[0].num_inference_steps == 10 and events[0].mag_ratios.tolist() == pytest.approx(ratios)
    events.clear()
    for steps in (fewest - 1, fewest):
        with caching.of(Model(), "low", steps):
            pass
    assert len(events) == 2  # nothing is put on where all steps are whole
    with Caching().of(Model(), "low", 10) as branch, branch("cond"):
        assert len(events) == 2


def test_guidance_1_needs_no_second_forward() -> None:
    model = Fake()
    sample(torch.zeros(1, 1, 1, 1), stages_of(expert("", model, 1.0, 0)), Adds(), TextOnly(), CONTEXT, CPU)  # type: ignore[arg-type]
    assert [text for _, text in model.asked] == [1.0] * 5


def test_an_expert_without_timesteps_is_never_moved() -> None:
    low = expert("low", Fake(), 1.0, 0)
    assert [
        stage.expert for stage in plan_stages(torch.tensor([500, 100]), [expert("high", Fake(), 1.0, 900), low])
    ] == [low]


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (80, 64, 64, "frame_num must be 4n[+]1: 80 is not, 77 and 81 are"),
        (0, 64, 64, "frame_num must be 4n[+]1: 0 is not, 1 and 5 are"),
        (81, 60, 64, "height must be a positive multiple of 16 pixels, 60 is not"),
        (81, 64, 0, "width must be a positive multiple of 16 pixels, 0 is not"),
    ],
)
def test_a_geometry_that_exists_is_valid(frames: int, height: int, width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Geometry(frames, height, width, (4, 8, 8))


def test_geometry_counts_latents_and_tokens() -> None:
    # the token counts of gpu benchmarks: 14B 480p and 5B 704p
    assert Geometry(81, 480, 832, (4, 8, 8)).latent == (21, 60, 104)
    assert Geometry(81, 480, 832, (4, 8, 8)).tokens == 32760
    assert Geometry(121, 704, 1280, (4, 16, 16)).tokens == 27280


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 5.0, (1.0, 1.0), "unipc"), "sample_steps must be at least 1"),
        ((4, 0.0, (1.0, 1.0), "unipc"), "sample_shift must be a positive number"),
        ((4, float("nan"), (1.0, 1.0), "unipc"), "sample_shift must be a positive number"),
        ((4, 5.0, (float("inf"), 1.0), "unipc"), "sample_guide_scale must be finite"),
        ((4, 5.0, (1.0, 1.0), "heun"), "sample_solver must be one of unipc, dpm"),
    ],
)
def test_sampling_that_exists_is_valid(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(*values)
