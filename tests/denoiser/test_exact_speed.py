"""What makes sampling faster changes no number: each shortcut against the way without it, and what it saves counted."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny_denoiser import LATENT, SIZES, build, noise, prompt
from wan.denoiser import attention_backends
from wan.denoiser import model as model_module
from wan.denoiser.attention_backends import compile_where_it_pays, fastest, use_attention, use_fastest_attention
from wan.denoiser.conditioning import Condition, HeldImageChannels, ImageChannels, KnownLatents, TextOnly
from wan.denoiser.model import WanModel
from wan.denoiser.sampling import Expert, Stage, sample, text_keys
from wan.denoiser.schedule import build_scheduler
from wan.denoiser.step_cache import Caching
from wan.device.placement import Placement
from wan.settings import Sampling, StepCache
from wan.types import KnownFrames, Request, TextContext

pytestmark = pytest.mark.slow

CPU = Placement(torch.device("cpu"))
META = torch.device("meta")
BACKENDS = "wan.denoiser.attention_backends"


def expert(name: str, model: Any, guidance: float) -> Expert:
    return Expert(name, name, lambda: model, guidance, 0)


def stages_of(*models: WanModel, guidance: float = 3.0) -> list[Stage]:
    steps = torch.tensor([999, 750, 500, 250])
    return [
        Stage(expert(str(index), model, guidance), mine, (guidance,) * len(mine))
        for index, (model, mine) in enumerate(zip(models, steps.chunk(len(models)), strict=True))
    ]


def made(
    stages: list[Stage], context: TextContext, condition: Condition | None = None, solver: str = "unipc"
) -> Tensor:
    device = stages[0].timesteps.device
    scheduler = build_scheduler(Sampling(4, 5.0, (3.0, 3.0), solver), device)
    return sample(noise().to(device), stages, scheduler, condition or TextOnly(), context, Placement(device))


# Text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_text_keys_give_the_same_bits_as_the_text(dtype: torch.dtype) -> None:
    model, text = build(dtype=dtype), prompt(1)
    whole, kept = (model(noise()[None], torch.tensor([613]), given).sample for given in (text, model.text_keys(text)))
    assert torch.equal(whole, kept) and whole.dtype == torch.float32
    other = model(noise()[None], torch.tensor([613]), model.text_keys(prompt(2))).sample
    assert not torch.equal(whole, other), "the text must matter"


@pytest.mark.parametrize(("guidance", "prompts"), [(3.0, 2), (1.0, 1)])
def test_text_is_embedded_once_for_every_expert_and_branch(guidance: float, prompts: int) -> None:
    models, calls = (build(), build()), []
    for model in models:
        embedder = model.condition_embedder.text_embedder
        embedder.register_forward_hook(lambda module, *_: calls.append(module))
    made(stages_of(*models, guidance=guidance), TextContext(prompt(1), prompt(2)))
    assert calls == [model.condition_embedder.text_embedder for model in models for _ in range(prompts)]


@torch.no_grad()
def test_nothing_of_an_earlier_prompt_or_weight_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    made(stages_of(model), TextContext(prompt(1), prompt(2)))
    fresh = build()
    assert torch.equal(
        made(stages_of(model), TextContext(prompt(3), prompt(2))),
        made(stages_of(fresh), TextContext(prompt(3), prompt(2))),
    )
    for changed in (model, fresh):  # as merging a LoRA does
        changed.blocks[1].attn2.to_v.weight.add_(0.1)
    context = TextContext(prompt(3), prompt(2))
    reused = made(stages_of(model), context)
    assert not torch.equal(reused, made(stages_of(build()), context)), "the weight must matter"
    # the reference embeds the text anew in every forward
    monkeypatch.setattr(
        "wan.denoiser.sampling.text_keys", lambda model, stage, context, keep: [context.positive, context.negative]
    )
    assert torch.equal(reused, made(stages_of(fresh), context))


def test_text_keys_are_gone_before_the_next_expert_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []
    alive_at_end: list[int] = []

    def watched(model: Any, stage: Stage, context: TextContext, keep: bool) -> Any:
        keys = text_keys(model, stage, context, keep)
        kept.extend(weakref.ref(text) for text in keys)
        return keys

    class Watching(Placement):
        @contextmanager
        def on_device(self, model: Any, device: torch.device | None = None) -> Iterator[Any]:
            yield model
            alive_at_end.append(sum(text() is not None for text in kept))

    monkeypatch.setattr("wan.denoiser.sampling.text_keys", watched)
    scheduler = build_scheduler(Sampling(4, 5.0, (3.0, 3.0)), CPU.device)
    context = TextContext(prompt(1), prompt(2))
    sample(noise(), stages_of(build(), build()), scheduler, TextOnly(), context, Watching(CPU.device))
    assert len(kept) == 2 * 2 and alive_at_end == [0, 0]


# Modulation


@torch.no_grad()
def test_a_timestep_a_latent_frame_is_that_of_its_tokens() -> None:
    model, text = build(), prompt(1)
    frames = torch.tensor([[0.0, 613.0, 613.0]])
    by_frame = model(noise()[None], frames, text).sample
    by_token = model(noise()[None], frames.repeat_interleave(16, 1), text).sample
    torch.testing.assert_close(by_frame, by_token, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(by_frame, model(noise()[None], frames[:, 1], text).sample, atol=1e-3)


@pytest.mark.parametrize(
    "timestep", [torch.tensor([613]), torch.tensor([[0.0, 613.0, 613.0]]).repeat_interleave(16, 1)]
)
@torch.no_grad()
def test_the_forward_is_the_librarys_but_for_the_sinusoid(timestep: Tensor) -> None:
    model = build()
    stock = WanTransformer3DModel(in_channels=4, **SIZES)
    stock.load_state_dict(model.state_dict())
    stock.condition_embedder.timesteps_proj = model.condition_embedder.timesteps_proj
    ours, theirs = (each(noise()[None], timestep, prompt(1)).sample for each in (model, stock.eval()))
    assert torch.equal(ours, theirs)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The elements of the largest tensor that an operation makes in the 5B's width of 3072."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and result.ndim and result.shape[-1] % 3072 == 0:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("rows", [31, 27280])
@torch.no_grad()
def test_modulation_is_never_a_row_for_every_token(rows: int) -> None:
    """The 5B at 1280*704 and 121 frames, without values: 27,280 tokens, 31 latent frames."""
    sizes = {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": 1}
    with init_empty_weights():
        model = WanModel(in_channels=48, **SIZES | sizes | {"out_channels": 48})
    model.to(META)
    with Largest() as seen:  # type: ignore[no-untyped-call]
        model(torch.empty(1, 48, 31, 44, 80, device=META), torch.empty(1, rows, device=META), prompt(1).to(META))
    assert seen.elements == 27280 * 3072 * (1 if rows == 31 else 6)


def test_a_factor_is_that_of_the_run_of_a_token() -> None:
    x = torch.arange(1.0, 13.0).view(1, 6, 2)
    factor = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])  # of three runs of two tokens
    by_token = factor[:, [0, 0, 1, 1, 2, 2]]
    runs = torch.tensor([2, 1, 0, 0, 1, 2])
    assert torch.equal(model_module._per_run(x, factor, None), x * by_token)
    assert torch.equal(model_module._per_run(x, factor, runs), x * factor[:, runs])
    shift, scale = factor + 0.5, factor - 0.25
    expected = x * (1 + by_token - 0.25) + by_token + 0.5
    assert torch.equal(model_module._modulate(x, shift, scale, None), expected)
    assert torch.equal(model_module._modulate(x, shift, scale, runs), x * (1 + scale[:, runs]) + shift[:, runs])


def test_rotary_positions_turn_pairs_of_neighbours() -> None:
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(1))
    angles = torch.linspace(0, 3, 5)[:, None] * torch.arange(1.0, 5.0)
    pairs = torch.view_as_complex(x.view(1, 5, 2, 4, 2)) * torch.polar(torch.ones(5, 4), angles)[None, :, None]
    cos, sin = (part(angles).repeat_interleave(2, 1)[None, :, None] for part in (torch.cos, torch.sin))
    sin[..., 0::2].neg_()
    turned = model_module._rotate(x, cos, sin)
    torch.testing.assert_close(turned, torch.view_as_real(pairs).flatten(3))
    assert model_module._rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_the_sinusoid_of_a_timestep_is_that_of_the_official_code() -> None:
    made = model_module._Sinusoid64(8)(torch.tensor([0.0, 613.0]))
    angles = 613.0 * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    assert made.dtype == torch.float32 and made[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(made[1], torch.cat([angles.cos(), angles.sin()]).float())


@pytest.mark.parametrize("keep", [True, False])
def test_a_block_makes_its_text_keys_once_where_they_are_kept(keep: bool) -> None:
    made: list[Tensor] = []

    def text_keys(rows: Tensor) -> tuple[Tensor, Tensor]:
        made.append(rows)
        return rows + len(made), rows

    block: Any = SimpleNamespace(text_keys=text_keys)
    keys = model_module.TextKeys(torch.zeros(1), keep)
    first = keys.of(0, block)[0].item(), keys.of(0, block)[0].item(), keys.of(1, block)[0].item()
    assert first == ((1, 1, 2) if keep else (1, 2, 3)) and len(keys.by_block) == (2 if keep else 0)


def test_layers_come_before_they_are_computed_and_their_names_say_what_runs() -> None:
    model, asked = build(), list[int]()
    assert model.kernels == {} and not model.is_compiled and list(model.layers) == list(model.blocks)
    model.before_layer = asked.append
    with torch.no_grad():
        flow = model(noise()[None], torch.tensor([613]), prompt(1), return_dict=False)
    assert asked == [0, 1, 2] and isinstance(flow, tuple) and flow[0].shape == (1, *LATENT)


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 2), (3, 2, 1)])
@torch.no_grad()
def test_patches_of_any_shape_come_back_to_their_places(patch: tuple[int, int, int]) -> None:
    model = build(patch_size=patch)
    stock = WanTransformer3DModel(in_channels=4, **SIZES | {"patch_size": patch})
    stock.load_state_dict(model.state_dict())
    stock.condition_embedder.timesteps_proj = model.condition_embedder.timesteps_proj
    ours, theirs = (each(noise()[None], torch.tensor([613]), prompt(1)).sample for each in (model, stock.eval()))
    assert ours.shape == (1, *LATENT) and torch.equal(ours, theirs)


# Waiting for the GPU


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations that would wait for a GPU: values read by the host, copies between devices, checks of a solve."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, Tensor)]
        on_gpu = any(tensor.device == META for tensor in tensors)
        if on_gpu and name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_linalg_check_errors"):
            self.operations.append(name)
            raise AssertionError(name)
        result = func(*args, **kwargs or {})
        if name in ("_to_copy", "copy_", "lift_fresh_copy") and {t.device for t in tensors} | {result.device} > {META}:
            self.operations.append(f"{name} between devices")
        return result


def conditions() -> dict[str, Condition]:
    latents = torch.empty(LATENT, device=META)
    channels = ImageChannels(torch.empty(8, *LATENT[1:], device=META))
    return {
        "text": TextOnly(),
        "5b": KnownLatents(latents[:, :1]),
        "a14b": channels,
        "a14b held": HeldImageChannels.hold(channels, latents[:, :2], latents, 1000),
    }


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("name", list(conditions()))
def test_nothing_in_the_loop_waits_for_the_gpu(name: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which as a GPU does not let the host see a value, and which takes host scalars."""
    looked: list[Tensor] = []
    # but for the first and the last step of the expert, whose latents are looked at

    def finite(latents: Tensor) -> bool:
        looked.append(latents)
        return True

    monkeypatch.setattr("wan.denoiser.sampling.is_finite", finite)
    with init_empty_weights():
        model = WanModel(in_channels=12 if "a14b" in name else 4, **SIZES)
    model.to(META)
    (stage,) = stages_of(model)
    scheduler = build_scheduler(Sampling(4, 5.0, (3.0, 3.0), solver), CPU.device)
    context = TextContext(prompt(1).to(META), prompt(2).to(META))
    on_gpu = Stage(stage.expert, stage.timesteps.to(META), stage.guidance)
    with Waits() as waits:
        sample(
            torch.empty(LATENT, device=META), [on_gpu], scheduler, conditions()[name], context, Placement(META, False)
        )
    assert waits.operations == [] and len(looked) == 2


def test_the_watch_for_waits_sees_those_of_the_library() -> None:
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    scheduler = UniPCMultistepScheduler(**options)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    with Waits() as waits:
        scheduler.step(torch.empty(LATENT, device=META), 999, torch.empty(LATENT, device=META))
    assert waits.operations


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (3, 3.0), (8, 8.0), (40, 5.0), (100, 12.0)])
def test_the_solver_gives_the_librarys_bits(steps: int, shift: float) -> None:
    ours = build_scheduler(Sampling(steps, shift, (1.0, 1.0)), CPU.device)
    stock = UniPCMultistepScheduler.from_config(ours.config)  # type: ignore[attr-defined]
    stock.set_timesteps(steps)
    stock.sigmas, stock.timesteps = ours.sigmas, ours.timesteps
    stock.set_begin_index(0)
    one = other = noise()[None]
    for index, t in enumerate(ours.timesteps):
        flow = noise(index + 1)[None] + 0.5 * one
        one = ours.step(flow, t, one, return_dict=False)[0]
        other = stock.step(flow, t, other, return_dict=False)[0]
        assert torch.equal(one, other) and one.isfinite().all(), index


# Kernels


def right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def slow(*inputs: Tensor) -> Tensor:
    time.sleep(0.02)
    return right(*inputs)


def wrong_in_one_head(*inputs: Tensor) -> Tensor:
    output = right(*inputs)
    output[:, :, 1] *= 1.05
    return output


def blind_to_the_last_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return right(query, key[:, :-16], value[:, :-16])


def not_a_number(*inputs: Tensor) -> Tensor:
    return right(*inputs) * float("nan")


def raising(*inputs: Tensor) -> Tensor:
    raise RuntimeError("no such\ninstruction")


def test_the_fastest_right_kernel_is_chosen_and_the_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "wan.denoiser.attention_backends")
    inputs = torch.randn(3, 1, 256, 2, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    bad = (wrong_in_one_head, blind_to_the_last_keys, not_a_number, raising)
    candidates = {each.__name__: each for each in (slow, *bad, right)}
    assert fastest(candidates, *inputs) == "right"
    assert [record.args[0] for record in caplog.records] == [*(each.__name__ for each in bad), "right"]  # type: ignore
    assert "is left out: no such" in caplog.text and "instruction" not in caplog.text
    assert fastest({"slow": slow, "raising": raising}, *inputs) == "slow"
    assert fastest({"raising": raising, "not_a_number": not_a_number}, *inputs) == "raising", "the default stays"


@pytest.mark.parametrize(
    ("factor", "is_right"), [(1.0, True), (1.012, True), (0.988, True), (1.02, False), (0.98, False)]
)
def test_a_kernel_is_right_within_two_units_of_the_dtype_s_rounding(factor: float, is_right: bool) -> None:
    inputs = torch.randn(3, 1, 128, 2, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    candidates = {"slow": slow, "scaled": lambda *given: (right(*given).float() * factor).bfloat16()}
    assert fastest(candidates, *inputs) == ("scaled" if is_right else "slow")


@pytest.mark.parametrize("row", [0, 99])
def test_the_first_and_the_last_token_of_a_kernel_are_compared(row: int) -> None:
    def wrong_in_a_row(*given: Tensor) -> Tensor:
        output = right(*given)
        output[:, row] = 0
        return output

    inputs = torch.randn(3, 1, 100, 2, 16, generator=torch.Generator().manual_seed(1))
    assert fastest({"slow": slow, "wrong": wrong_in_a_row}, *inputs) == "slow"


def test_a_kernel_s_time_is_its_better_call_of_two() -> None:
    """The first call of a kernel may compile it."""
    calls: list[str] = []

    def warming(*given: Tensor) -> Tensor:
        calls.append("warming")
        time.sleep(0.05 if len(calls) == 2 else 0)  # the first is for its numbers
        return right(*given)

    def steady(*given: Tensor) -> Tensor:
        time.sleep(0.02)
        return right(*given)

    inputs = torch.randn(3, 1, 64, 1, 16, generator=torch.Generator().manual_seed(1))
    assert fastest({"steady": steady, "warming": warming}, *inputs) == "warming" and len(calls) == 3


@pytest.mark.parametrize(
    ("tokens", "head_dim", "heads", "probed"),
    [
        (64, 16, 40, 38),  # 1e7 / (4 * 64 * 64 * 16)
        (64, 16, 12, 12),  # no more than there are
        (1024, 64, 40, 1),  # and at least one
    ],
)
def test_the_probe_takes_as_many_heads_as_its_arithmetic_allows(
    tokens: int, head_dim: int, heads: int, probed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def chosen(candidates: Any, *inputs: Tensor) -> str:
        given.append((list(candidates), [(one.shape, one.dtype) for one in inputs]))
        assert not torch.equal(inputs[0], inputs[1])
        return "native"

    monkeypatch.setattr(f"{BACKENDS}.fastest", chosen)
    monkeypatch.setattr(f"{BACKENDS}.PROBE_FLOP", 1e7)
    attention_backends.fastest_attention.cache_clear()
    what: Any = (torch.device("cpu"), tokens, heads, head_dim, torch.float16)
    for travels in (False, True):
        assert attention_backends.fastest_attention(*what, False, travels) == "native"
    attention_backends.fastest_attention.cache_clear()
    assert [shapes for _, shapes in given] == [[((1, tokens, probed, head_dim), torch.float16)] * 3] * 2
    one_gpu, several = (names for names, _ in given)
    assert "cudnn" not in one_gpu and several == [*one_gpu, "cudnn"]


def test_ranks_that_share_tokens_probe_the_heads_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def probe(*what: Any) -> str:
        asked.append(what)
        return "native"

    monkeypatch.setattr(f"{BACKENDS}.fastest_attention", probe)
    cuda = torch.device("cuda")
    for ulysses, tokens in ((2, 2), (1, 2), (1, 1)):
        team: Any = SimpleNamespace(
            sizes=SimpleNamespace(ulysses=ulysses, tokens=tokens), share=lambda choose: choose()
        )
        use_fastest_attention(build(dtype=torch.float16), 48, 10, cuda, team)
    assert [(heads, travels) for _, _, heads, _, _, _, travels in asked] == [(1, True), (2, True), (2, False)]


def test_8_bit_attention_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{BACKENDS}.fastest_attention", lambda *what: "native")
    for precision, kernels in (("fp8", {"attention": "native"}), ("fp8_attention", {})):
        model = build(dtype=torch.bfloat16)
        model.low_precision = precision
        use_fastest_attention(model, 48, 10, torch.device("cuda"))
        assert model.kernels == kernels


def test_cudnn_attention_is_softmax_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{BACKENDS}.SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
    inputs = torch.randn(3, 1, 12, 2, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention_backends.cudnn_attention(*inputs), right(*inputs))


def test_on_a_cpu_kernels_stay_what_they_are() -> None:
    model = build(dtype=torch.bfloat16)
    use_fastest_attention(model, 48, 10**6, CPU.device)
    compile_where_it_pays(model, 75600, 10**6, CPU.device)
    assert model.kernels == {}


def test_on_a_gpu_self_attention_alone_gets_the_kernel_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def probe(*what: Any) -> str:
        asked.append(what)
        return "_native_cudnn"

    monkeypatch.setattr(f"{BACKENDS}.fastest_attention", probe)
    half, whole = build(dtype=torch.bfloat16), build()
    cuda = torch.device("cuda:0")
    for model in (half, whole):
        use_fastest_attention(model, 48, 10, cuda)
    assert half.kernels == {"attention": "_native_cudnn"} and whole.kernels == {}
    assert asked == [(cuda, 48, 2, 24, torch.bfloat16, False, False)]
    for block in half.blocks:
        assert block.attn1.processor.attend is attention_backends.kernels_there()["_native_cudnn"]
        assert not hasattr(block.attn2.processor, "attend")


@pytest.mark.parametrize(
    ("layers", "heads", "tokens", "forwards", "pays"),
    [
        (40, 40, 32760, 80, True),  # A14B, 480p, 40 steps: saves 18 s
        (40, 40, 32760, 4, False),  # four steps with a distillation LoRA
        (40, 40, 32760, 4 * 12, True),  # a chain of twelve such clips
        (40, 40, 75600, 8, True),
        (30, 24, 27280, 100, True),  # 5B, 704p, 50 steps
        (30, 24, 27280, 20, False),
    ],
)
def test_flash_attention_4_starts_where_the_time_comes_back(
    layers: int, heads: int, tokens: int, forwards: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with init_empty_weights():
        model = WanModel(in_channels=4, **SIZES | {"num_layers": 1})
    model.blocks.to(torch.bfloat16)
    model.register_to_config(num_layers=layers, num_attention_heads=heads, attention_head_dim=128)
    asked: list[Any] = []

    def probe(*what: Any) -> str:
        asked.append(what)
        return "native"

    monkeypatch.setattr(f"{BACKENDS}.fastest_attention", probe)
    use_fastest_attention(model, tokens, forwards, torch.device("cuda"))
    assert asked == [(torch.device("cuda"), tokens, heads, 128, torch.bfloat16, pays, False)]


@pytest.fixture
def flash_4(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The package flash-attn-4, with plain attention for its kernel; what was called."""
    calls: list[str] = []

    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        calls.append("flash_4")
        return right(query, key, value), None

    parent, package = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    parent.__path__ = []
    for module in (parent, package):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    caches = (
        attention_backends.kernels_there,
        attention_backends._flash_attn_func,
        attention_backends.fastest_attention,
    )
    for cached in caches:
        cached.cache_clear()
    yield calls
    for cached in caches:
        cached.cache_clear()


def test_flash_attention_4_is_probed_where_it_is_installed(flash_4: list[str]) -> None:
    probe: Any = (torch.device("cpu"), 64, 2, 64, torch.bfloat16)
    assert list(attention_backends.kernels_there())[-1] == "flash_4"
    attention_backends.fastest_attention(*probe, False)
    assert flash_4 == []
    attention_backends.fastest_attention(*probe, True)
    assert len(flash_4) == 3  # once for its numbers, twice for its time


def test_flash_attention_4_that_is_not_there_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_backends.kernels_there.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed, or broken
    assert list(attention_backends.kernels_there())[:2] == ["native", "_native_cudnn"]
    assert "flash_4" not in attention_backends.kernels_there()
    attention_backends.kernels_there.cache_clear()


@torch.no_grad()
def test_blocks_on_flash_attention_4_are_one_graph(flash_4: list[str]) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, inputs = build(), (noise()[None], torch.tensor([613]), prompt(1))
    wanted = model(*inputs).sample
    for name in ("native", "flash_4"):
        use_attention(model, name)
        torch.testing.assert_close(model(*inputs).sample, wanted, atol=2e-6, rtol=1e-5)
        model.compile_blocks(backend)
        torch.testing.assert_close(model(*inputs).sample, wanted, atol=2e-6, rtol=1e-5)
        assert model.kernels == {"attention": name, "compiled": True}
    assert len(graphs) == 2 and len(flash_4) == 2 * len(model.blocks)


@pytest.mark.parametrize(
    ("layers", "heads", "tokens", "forwards", "pays"),
    [
        (40, 40, 32760, 80, True),  # A14B, 480p, 40 steps: saves 27 s
        (40, 40, 32760, 40, False),  # half of them
        (40, 40, 75600, 4, False),  # 720p with a 4-step LoRA
        (40, 40, 75600, 80, True),
        (30, 24, 27280, 100, False),  # 5B, 704p, 50 steps
        (30, 24, 27280, 200, True),  # two clips of it
    ],
)
def test_blocks_are_compiled_where_the_time_comes_back(
    layers: int, heads: int, tokens: int, forwards: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with init_empty_weights():
        model = WanModel(in_channels=4, **SIZES | {"num_layers": 1})
    model.register_to_config(num_layers=layers, num_attention_heads=heads, attention_head_dim=128)
    compile_where_it_pays(model, tokens, forwards, torch.device("cuda"))
    assert model.kernels == ({"compiled": True} if pays else {})


@torch.no_grad()
def test_one_graph_serves_all_blocks_of_both_experts_whatever_happens_to_their_weights() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    one, other, plain = build(), build(), build()
    frames, text = torch.tensor([[0.0, 613.0, 613.0]]), prompt(1)
    for model in (one, other):
        model.compile_blocks(backend)
    for weights in ("as loaded", "moved", "merged"):
        for model in (one, other, plain):
            weight = model.blocks[1].attn1.to_q.weight
            if weights == "moved":  # as offloading does
                weight.data = weight.data.clone()
            if weights == "merged":  # as LoRAs are
                weight.mul_(1.5)
        results = [model(noise()[None], frames, text).sample for model in (one, other, plain)]
        assert torch.equal(results[0], results[1]), weights
        torch.testing.assert_close(results[0], results[2], atol=2e-6, rtol=1e-5)  # GELU is computed in another way
    assert len(graphs) == 1 and one.kernels == {"compiled": True}


@torch.no_grad()
def test_a_script_may_make_clips_of_many_sizes() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build(num_layers=1)
    model.compile_blocks(backend)
    for width in range(2, 22, 2):
        model(torch.zeros(1, 4, 2, 4, width), torch.tensor([613]), prompt(1))
    assert len(graphs) == 10 and model.is_compiled


def test_compiled_gelu_is_as_exact_as_pytorch_s() -> None:
    compiled: Any = torch.compile(model_module._gelu, backend="eager", fullgraph=True)
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([-1e4, -0.0, 0.0, 1e4])])
    exact = F.gelu(x.double(), approximate="tanh")
    theirs = (F.gelu(x, approximate="tanh") - exact).abs().max()
    assert not torch.equal(compiled(x), F.gelu(x, approximate="tanh"))  # it is the other way
    assert (compiled(x) - exact).abs().max() < 2 * theirs < 1e-6


@torch.no_grad()
def test_a_compiler_that_fails_costs_one_warning_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model = build()
    inputs = (noise()[None], torch.tensor([613]), prompt(1))
    wanted = model(*inputs).sample
    model.compile_blocks(backend)
    assert torch.equal(model(*inputs).sample, wanted) and model.kernels == {}
    model.compile_blocks(backend)
    assert torch.equal(model(*inputs).sample, wanted)
    (warning,) = [record for record in caplog.records if record.name.startswith("wan.")]
    assert "no compiler here" in warning.message
    with pytest.raises(RuntimeError):  # a mistake of ours stays one
        model(inputs[0], torch.zeros(1, 5), inputs[2])


def test_all_forwards_of_a_run_count_for_its_kernels(i2v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class StopError(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise StopError

    for name in ("compile_where_it_pays", "use_fastest_attention"):
        monkeypatch.setattr(f"wan.clip_sampler.{name}", lambda model, *what, name=name: asked.append((name, *what)))
    monkeypatch.setattr("wan.clip_sampler.sample", stop)
    monkeypatch.setattr(i2v, "compile_blocks", True)
    geometry = i2v.geometry(96, 64, 9)
    for cache, steps in ((None, 2 * 12), ("taylorseer:2", 2 * (4 + 5))):  # 5 and 7 steps
        asked.clear()
        image = KnownFrames((Image.new("RGB", (96, 64)),))
        sampling = i2v.rules.merge(12, cache=cache, guide_scale=3.0)
        with pytest.raises(StopError):
            i2v.run(Request("x", "", image, geometry, sampling, 1), clips=3)
        what = (geometry.tokens, 3 * steps, i2v.device)
        assert asked == [("use_fastest_attention", *what, i2v.team), ("compile_where_it_pays", *what)]
    monkeypatch.setattr(i2v, "compile_blocks", False)
    asked.clear()
    with pytest.raises(StopError):
        i2v.run(Request("x", "", image, geometry, sampling, 1))
    assert [name for name, *_ in asked] == ["use_fastest_attention"]  # the other expert comes at its own stage


@pytest.mark.parametrize("cache", ["taylorseer:2", "taylorseer:3", "first_block:1"])
def test_a_cache_leaves_out_compiled_blocks_and_their_weights_too(cache: str) -> None:
    graphs: list[Any] = []
    layers: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Counting(Placement):
        @contextmanager
        def on_device(self, model: Any, device: torch.device | None = None) -> Iterator[Any]:
            model.before_layer = layers.append  # as for layers that come to a GPU one by one
            yield model

    one, other = build(), build()
    one.compile_blocks(backend)
    caching, steps = Caching(StepCache.parse(cache)), 12
    sampled = []
    for model in (one, other, one):
        stage = Stage(
            expert("e", model, 3.0),
            torch.linspace(999, 100, steps).long(),
            (3.0,) * steps,
        )
        scheduler = build_scheduler(Sampling(steps, 5.0, (3.0, 3.0)), CPU.device)
        context = TextContext(prompt(1), prompt(2))
        placement = Counting(CPU.device)
        sampled.append(sample(noise(), [stage], scheduler, TextOnly(), context, placement, caching=caching))
    assert torch.equal(sampled[0], sampled[2])
    torch.testing.assert_close(sampled[0], sampled[1], atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1 and one.is_compiled
    whole = len(one.blocks) * 2 * steps
    assert len(layers) % 3 == 0 and len(layers) // 3 < whole
    if cache.startswith("taylorseer"):
        assert len(layers) // 3 == len(one.blocks) * 2 * StepCache.parse(cache).computed(steps)  # type: ignore
