"""Request -> pixels, once for all models."""

from __future__ import annotations

import dataclasses
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from wan.configs import ModelConfig, preset_named
from wan.denoiser.attention_backends import compile_where_it_pays, use_fastest_attention
from wan.denoiser.conditioning import Condition
from wan.denoiser.fp8 import check_precision
from wan.denoiser.model import WanModel, infer_config
from wan.denoiser.sampling import Expert, NotFinite, forwards, plan_stages, sample, step_shares
from wan.denoiser.schedule import build_scheduler
from wan.denoiser.step_cache import Caching
from wan.device.budget import MemoryBudget, free_limit, gpu_limit
from wan.device.hardware import (
    drop_cache,
    generator_on,
    is_out_of_memory,
    main_device,
    peak_gib,
    reset_peak,
    total_bytes,
)
from wan.device.host_budget import HostBudget, HostPlan, host_limit
from wan.device.parallel import ALONE, Group, Team, is_met, world_met
from wan.device.placement import Placement
from wan.device.ranks import World, choose_sizes
from wan.errors import UserError
from wan.models import LORA_SETTING, Models, loaders
from wan.settings import LoraFile, Sampling, merge_sampling
from wan.stopwatch import Stopwatch
from wan.text.umt5 import PromptTokenizer, TextEncoder
from wan.types import Clip, Generation, Geometry, KnownFrames, OnStep, Request, Sampled, Step, TextContext, is_finite
from wan.vae.vae import Wan2_1_VAE, Wan2_2_VAE, WanVAE
from wan.weights.checkpoint import Names, open_checkpoint, resolve_folder

NOT_FINITE = "numbers that are not finite (NaN or infinite)"
DAMAGED = ": its file is damaged or of another model; download it again"


class Pipeline(ABC):
    """A Wan2.2 model ready to sample.

    The checkpoint is checked in the constructor; each model is loaded when it is first used and kept. Constructor
    arguments are Wan2.2's, and `config` one of `wan.configs.WAN_CONFIGS` (or a `dataclasses.replace` of it).
    `dit_files` are denoisers that come from a file of their own (GGUF, fp8 safetensors) in place of the folder's, by
    attribute name: `model` (which serves both of two experts), or `high_noise_model` and `low_noise_model`.
    `part_files` are "vae" and "text_encoder" from files of their own (.safetensors, .pth, a text encoder's .gguf), and
    "tokenizer", a folder or a text encoder's file that carries it. `compile_blocks`: compile the denoiser where
    that saves time, on a GPU and for enough steps. `vram`: GiB of the GPU that a clip may take, or "auto" for what is
    free now; what of a model does not fit comes to it layer by layer (needs offloading). Without it, that is so where a
    clip needs more than what is free. `host_memory`: GiB that the process may take, or "auto" for what is free; where
    that is too little for all models, they take turns in it and are read again. `use_sp`: all processes share a clip,
    as in Wan2.2 (Ulysses); `t5_fsdp`, `dit_fsdp`: each keeps a slice of the weights. For these each calls
    `torch.distributed.init_process_group` before, and makes the same calls, which give the video in the process of
    rank 0 and None in the others. Raises UserError for a checkpoint that is not whole or not the one that `config`
    describes.
    """

    vae_class: type[WanVAE] = Wan2_1_VAE
    team = ALONE

    def __init__(
        self,
        config: ModelConfig,
        checkpoint_dir: str | Path,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_sp: bool = False,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
        convert_model_dtype: bool = False,
        *,
        dit_files: Mapping[str, str | Path] = MappingProxyType({}),
        part_files: Mapping[str, str | Path] = MappingProxyType({}),
        compile_blocks: bool = True,
        vram: float | Literal["auto"] | None = None,
        host_memory: float | Literal["auto"] = "auto",
    ) -> None:
        _check_shards(config, vram, t5_fsdp, dit_fsdp, t5_cpu)
        self.config = config
        self.sharded = {"text_encoder"} if t5_fsdp else set[str]()
        self.device = main_device(device_id)
        self.text_device = torch.device("cpu") if t5_cpu else self.device
        self.convert_model_dtype = convert_model_dtype
        self.compile_blocks = compile_blocks
        files = {name: Path(file).expanduser() for name, file in dit_files.items()}
        parts = {name: Path(file).expanduser() for name, file in part_files.items()}
        limit = None if vram is None else gpu_limit(vram, self.device)
        check_precision(config.low_precision, self.device)
        packed = [file for file in files.values() if file.suffix == ".gguf"]
        if packed and config.low_precision:
            raise UserError(
                f"{packed[0]}: `precision` {config.low_precision} is for bf16 and fp8 weights; leave it out"
            )
        self.checkpoint = open_checkpoint(
            resolve_folder(checkpoint_dir, files | parts),
            in_channels=config.in_channels,
            experts=1 if config.boundary is None else 2,
            names=Names.of(config),
            files=files | parts,
        )
        experts = self.checkpoint.experts.keys()
        if dit_fsdp:
            self.sharded |= experts
        for weights in self.checkpoint.experts.values():
            if weights.path.is_file():  # anyone makes such files; a folder's shards are said when they load
                WanModel.check(weights)
        self.tokenizer = PromptTokenizer(self.checkpoint.tokenizer, config.text_len)
        free = free_limit(self.device) if limit is None and self.device.type == "cuda" else None
        self.budget = MemoryBudget(self.checkpoint, config, self.device, self.text_device, limit, free)
        self.host = HostBudget(self.checkpoint, config, host_limit(host_memory), given=host_memory != "auto")
        self.embeddings: dict[str, Tensor] = {}  # of prompts [1, 512, D]; a chain and the negative one repeat
        # layers that come one by one wait in host memory
        home = torch.device("cpu") if init_on_cpu or not self.budget.holds_whole_experts else self.device
        load = loaders(
            self.checkpoint,
            config,
            self.tokenizer,
            self.vae_class,
            device=self.device,
            load_device=home,
            convert_model_dtype=convert_model_dtype,
            shards=lambda name: self.team.node if name in self.sharded else None,
            machine=lambda: self.team.machine,
        )
        self.models = Models(
            config.name, self.checkpoint, load, in_threads=home.type == "cpu" and not self.sharded & experts
        )
        if use_sp or ((t5_fsdp or dit_fsdp) and is_met()):
            world = world_met(rank, self.device.index or 0)
            self.join(world, **{"cfg": 1, "ulysses": world.size} if use_sp else {})

    def close(self) -> None:
        """Free the memory of the models, on the GPU and beside it; they are loaded again when they are next used."""
        self.models.forget_all()
        self.embeddings = {}
        drop_cache(self.device)

    @property
    def heads(self) -> int:
        """Attention heads of the denoisers."""
        return min(int(infer_config(weights)["num_attention_heads"]) for weights in self.checkpoint.experts.values())

    def join(
        self,
        world: World,
        guided: float = 1.0,
        *,
        cfg: int | None = None,
        ulysses: int | None = None,
        ring: int | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Make clips together with the other processes of a launcher, each of which calls this, too.

        `cfg`, `ulysses` and `ring` are the sizes of `choose_sizes` where they are given, `guided` the share of steps
        that have guidance. Then the first process calls `run`, the others `follow`, and the first `release` in the end.
        Raises UserError.
        """
        sizes = choose_sizes(world.size, self.heads, guided, cfg=cfg, ulysses=ulysses, ring=ring)
        self.team = Team.start(world, sizes, self.device, timeout)
        shards = 1 if self.team.node is None else self.team.node.size
        self.budget = dataclasses.replace(
            self.budget,
            token_ranks=sizes.tokens,
            dit_shards=shards if self.sharded - {"text_encoder"} else 1,
            t5_shards=shards if "text_encoder" in self.sharded else 1,
        )
        self.host = dataclasses.replace(self.host, elsewhere=frozenset(self.sharded))

    def follow(self, count: int | None = None) -> None:
        """In all processes but the first: make this one's share of `count` clips, or until that one calls `release`."""
        for _ in itertools.count() if count is None else range(count):
            if (call := self.team.hear()) is None:
                return
            budget = self.budget.for_clip(call.request.geometry, call.offload)
            self.models.live_by(call.host)
            self.models.keep_experts(call.experts)
            placements = self._placements(call.request, budget, call.offload, call.host.mapped)
            watch = Stopwatch(self.device, call.request.sampling.steps)
            sampled = self._sample(call.request, placements, watch, call.clips)
            self._decode(sampled.latents, placements, self.team.all_)

    def release(self) -> None:
        """In the first process: let the others go."""
        if self.team.is_first:
            self.team.tell(None)

    @property
    def text_encoder(self) -> TextEncoder:
        """UMT5, in host memory until it is used."""
        encoder: TextEncoder = self.models["text_encoder"]
        return encoder

    @property
    def vae(self) -> WanVAE:
        """The VAE, in host memory until it is used."""
        vae: WanVAE = self.models["vae"]
        return vae

    @abstractmethod
    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        """The denoisers from high noise to low, with their guidance out of (low, high)."""

    @abstractmethod
    def condition(self, request: Request, noise: Tensor, placement: Placement) -> Condition:
        """What is known of the clip, encoded, on the device; `noise` [z, F, h, w] are the initial latents."""

    def geometry(self, width: int, height: int, frames: int) -> Geometry:
        """The size of a clip for this model. Raises UserError for sizes that it cannot make."""
        geometry = Geometry(frames, height, width, self.config.vae_stride, self.config.patch_size)
        self.budget.check(geometry)
        return geometry

    def sampling(
        self,
        steps: int | None = None,
        shift: float | None = None,
        solver: str | None = None,
        guide_scale: float | tuple[float, float] | list[float] | None = None,
        *,
        guidance_interval: tuple[float, float] | None = None,
        cache: str | None = None,
        preset: str = "quality",
    ) -> Sampling:
        """Wan's sampling arguments as one value, see `merge_sampling`. Raises UserError.

        A cache that could leave nothing out is refused as well.
        """
        sampling = merge_sampling(
            self.config,
            steps,
            shift,
            solver,
            guide_scale,
            guidance_interval=guidance_interval,
            cache=cache,
            preset=preset,
        )
        self._check_cache(sampling)
        return sampling

    def _check_cache(self, sampling: Sampling) -> None:
        cache = sampling.cache
        if cache is None:
            return
        if sampling.uses("magcache") and len(self.config.mag_ratios) != len(self.checkpoint.experts):
            raise UserError(
                "`cache` magcache needs this model's mag_ratios in its wan_config.json (python -m benchmarks.presets "
                "measures them); use first_block, which needs none"
            )
        shares = [steps for steps, _ in self.shares(sampling)]
        if all(steps <= cache.whole(steps) for steps in shares):
            raise UserError(
                f"`cache` {cache} leaves nothing out of {' + '.join(map(str, shares))} steps, the first "
                f"{cache.whole(max(shares))} are computed whole; give `cache` off or more `sample_steps`"
            )

    def shares(self, sampling: Sampling) -> list[tuple[int, int]]:
        """The steps of each expert, from high noise to low, and how many of them have guidance's second forward."""
        return step_shares(sampling, self.config.lowest_timesteps, self.config.num_train_timesteps)

    def check_distilled(self, preset: str, loras: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Raise UserError where a preset for step-distillation LoRAs has none for an expert."""
        if not preset_named(preset).distilled:
            return
        missing = [
            name
            for name, weights in self.checkpoint.experts.items()
            if all(file.is_svi for file in loras.get(name, ())) and not weights.is_distilled
        ]
        if missing:
            needed = " and ".join(f"{LORA_SETTING[name]} FILE" for name in sorted(missing))
            raise UserError(
                f"`preset` {preset} needs {needed}: 4-step distillation LoRAs of {self.config.name}, for A14B "
                "those of lightx2v's Wan2.2-Distill-Loras or Wan2.2-Lightning; or a distilled model with `dit`"
            )

    def video(self, request: Request, *, offload: bool, on_step: OnStep | None) -> Any:
        """Make one clip -> its video float32 [3, T, H, W]; None in all processes of a team but the first."""
        if self.team.is_first:
            return self.run(request, offload=offload, on_step=on_step).video
        self.follow(1)
        return None

    def run(
        self,
        request: Request,
        *,
        offload: bool = True,
        on_step: OnStep | None = None,
        clips: int = 1,
        sampled: Sampled | None = None,
        on_sampled: Callable[[Sampled], None] | None = None,
    ) -> Generation:
        """Make one clip. `offload` keeps only the model in use on the GPU; it is one of `clips` of a run.

        `sampled` is what sampling it came to, where that is known; `on_sampled` gets it before it is decoded. Raises
        UserError, also where a model gives numbers that are not finite.
        """
        if self.budget.vram is not None and not offload:
            raise UserError("`vram` needs `offload_model` True: only then is one model at a time on the GPU")
        budget = self.budget.for_clip(request.geometry, offload)
        budget.check(request.geometry)
        host = self.host_plan(request.geometry, request.loras)
        self.models.live_by(host)
        try:
            return self._run(request, budget, host, offload, on_step, clips, sampled, on_sampled)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            there = budget.vram or budget.free or total_bytes(self.device)
            advice = budget.advice(request.geometry, offload, there)
        # outside of the handler, whose traceback holds what was on the GPU
        raise UserError(f"out of GPU memory ({reason}); {advice}")

    def host_plan(self, geometry: Geometry, loras: Mapping[str, tuple[LoraFile, ...]], captioner: int = 0) -> HostPlan:
        """How models live in host memory while a clip is made; `captioner`: bytes of one there. Raises UserError."""
        merged = {expert for expert, files in loras.items() if files}
        return self.host.plan(self.budget, geometry, merged, captioner)

    def _run(
        self,
        request: Request,
        budget: MemoryBudget,
        host: HostPlan,
        offload: bool,
        on_step: OnStep | None,
        clips: int,
        sampled: Sampled | None,
        on_sampled: Callable[[Sampled], None] | None,
    ) -> Generation:
        placements = self._placements(request, budget, offload, host.mapped)
        watch = Stopwatch(self.device, request.sampling.steps, on_step)
        reset_peak(self.device)
        group = None if sampled is not None else self.team.all_
        if sampled is None:
            # pictures are encoded here and sent as latents
            experts = self.models.experts_to_keep()
            if self.team.world.size > 1:
                self.models.keep_experts(experts)
            self.team.tell(_Call(dataclasses.replace(request, known=KnownFrames()), offload, clips, host, experts))
            sampled = self._sample(request, placements, watch, clips)
            if on_sampled is not None:
                with watch.stage("keep"):
                    on_sampled(sampled)
        with watch.stage("decode"):
            pixels = self._decode(sampled.latents, placements, group)
            finite = is_finite(pixels)
        if not finite:
            of_half = (
                "; its float16 may overflow: give `vae_dtype` float32" if self.config.vae_dtype.itemsize < 4 else ""
            )
            raise UserError(f"the VAE in {self.checkpoint.vae.path} gives {NOT_FINITE}{of_half or DAMAGED}")
        clip = Clip(pixels.permute(1, 2, 3, 0), Fraction(self.config.sample_fps))
        peaks = [peak for peak in (sampled.peak_gib, peak_gib(self.device)) if peak is not None]
        seconds = dict(sampled.seconds) | watch.seconds
        return Generation(clip, sampled.latents, request, seconds, max(peaks, default=None), notes=sampled.notes)

    def _decode(self, latents: Tensor, placements: Callable[[str], Placement], group: Group | None) -> Tensor:
        """Latents [z, F, h, w] -> pixels [3, T, H, W] in host memory, in the first process of a `group`."""
        with placements("decoding").on_device(self.vae):
            return self.vae.decode([latents.to(self.device)], home=torch.device("cpu"), group=group)[0]

    def _placements(
        self, request: Request, budget: MemoryBudget, offload: bool, mapped: bool
    ) -> Callable[[str], Placement]:
        if budget.vram is not None and not budget.holds_all(request.geometry):
            self.models.wait_at_home()  # a smaller clip before this one may have left them on the GPU
        return budget.placements(request.geometry, offload, mapped)

    def _sample(
        self, request: Request, placements: Callable[[str], Placement], watch: Stopwatch, clips: int
    ) -> Sampled:
        with watch.stage("text"):
            if "text_encoder" in self.sharded:  # all encode together
                context = self._encode_text(request, placements("text"))
            else:
                context = self.team.share(lambda: self._encode_text(request, placements("text")), self.device)
        with watch.stage("encode"):
            noise, condition = self._begin(request, placements("encoding"))
        with watch.stage("load"):
            experts = self.experts(request.sampling.guidance)
            self.models.merge_loras(request.loras)
            count = forwards(self.shares(request.sampling), request.sampling.cache)

            def ready(expert: Expert) -> WanModel:
                """It may have left host memory for another model, and then it is a new one."""
                with nullcontext() if self.models.is_loaded(expert.part) else watch.stage("load"):
                    model = expert.load()
                model.token_group = self.team.tokens
                self._choose_kernels(model, request.geometry.tokens, clips * count)
                return model

            experts = [replace(expert, load=partial(ready, expert)) for expert in experts]
            scheduler = build_scheduler(request.sampling, self.device, self.config.num_train_timesteps)
            train = self.config.num_train_timesteps
            stages = plan_stages(scheduler.timesteps, experts, lambda t: request.sampling.guides(t / train))
            names = [expert.name for expert in experts]
            caching = Caching(request.sampling.cache, dict(zip(names, self.config.mag_ratios, strict=False)), self.team)
            stages[0].expert.load()
        later = [part for stage in stages[1:] if not self.models.is_loaded(part := stage.expert.part)]
        try:
            # the next expert is loaded while this one computes
            with watch.stage("sample"), self.models.loading(later) as check:

                def on_step(step: Step) -> None:
                    check()
                    if watch.on_step is not None:
                        watch.on_step(step)

                placement = placements("sampling")
                latents = sample(noise, stages, scheduler, condition, context, placement, on_step, caching, self.team)
                latents = latents.cpu()
        except NotFinite as error:
            raise UserError(self._why_not_finite(error, context, condition)) from error
        loras = {
            name: [match.as_json() for match in matches] for name, matches in self.models.matches.items() if matches
        }
        notes = stages[-1].expert.load().kernels | ({"loras": loras} if loras else {})
        return Sampled(latents, dict(watch.seconds), peak_gib(self.device), notes)

    def _why_not_finite(self, error: NotFinite, context: TextContext, condition: Condition) -> str:
        """Which model gave the first numbers that are not finite, and what may be the cause."""
        if not (is_finite(context.positive) and is_finite(context.negative)):
            return f"the text encoder in {self.checkpoint.text_encoder.path} gives {NOT_FINITE}{DAMAGED}"
        if not condition.is_finite:
            return f"the VAE in {self.checkpoint.vae.path} encodes what is known to {NOT_FINITE}{DAMAGED}"
        name = error.expert.part
        which = f"{error.expert.name} expert" if len(self.checkpoint.experts) > 1 else "denoiser"
        return (
            f"the {which} in {self.checkpoint.experts[name].path} gives {NOT_FINITE} in step {error.step}{DAMAGED}, if "
            "`sample_guide_scale`, `sample_shift` and the LoRAs' strengths are usual ones"
        )

    def _choose_kernels(self, model: WanModel, tokens: int, forwards: float) -> None:
        """Let a denoiser run on what is fastest for so many forwards, with the same results."""
        use_fastest_attention(model, tokens, forwards, self.device, self.team)
        if self.compile_blocks:
            compile_where_it_pays(model, tokens // self.team.sizes.tokens, forwards, self.device)

    def _begin(self, request: Request, placement: Placement) -> tuple[Tensor, Condition]:
        """The initial latents and what is known, of the first process in all; they encode its pictures together."""

        def make() -> tuple[Tensor, Condition]:
            noise = self.noise(request)
            return noise, self.condition(request, noise, placement)

        if self.team.is_first:
            return self.team.share(make)
        while isinstance(heard := self.team.hear(self.device), _Pictures):
            self._encode(torch.empty(heard.shape, device=self.device), placement)
        noise, condition = heard
        return noise, condition

    def noise(self, request: Request) -> Tensor:
        """The initial latents float32 [z, F, h, w], drawn on the model's device as in the official code."""
        shape = (self.config.z_dim, *request.geometry.latent)
        generator = generator_on(self.device, request.seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)

    def _encode_text(self, request: Request, placement: Placement) -> TextContext:
        """Both prompts, encoded once for as long as they repeat."""
        texts = (request.prompt, request.negative)
        if new := [text for text in dict.fromkeys(texts) if text not in self.embeddings]:
            with placement.on_device(self.text_encoder, self.text_device) as encode:
                self.embeddings |= {text: encode(text) for text in new}
        self.embeddings = {text: self.embeddings[text] for text in texts}
        positive, negative = (self.embeddings[text] for text in texts)
        return TextContext(positive.to(self.device), negative.to(self.device))

    def encode_frames(self, frames: Tensor, placement: Placement) -> Tensor:
        """Pixels [3, T, H, W] in [-1, 1] -> normalised latents [z, F, h, w] on the device."""
        self.team.tell(_Pictures(frames.shape))
        return self._encode(frames.to(self.device, torch.float32).contiguous(), placement)

    def _encode(self, frames: Tensor, placement: Placement) -> Tensor:
        """The same, of the first process's pixels on the device, by all."""
        self.team.send(frames)
        with placement.on_device(self.vae):
            return self.vae.encode([frames], group=self.team.all_)[0]


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """That pixels of this shape are encoded next."""

    shape: torch.Size


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the first process tells the others to sample.

    `host` is how its models live in host memory, and `experts` are those that are in memory: in all alike, since they
    are loaded together.
    """

    request: Request
    offload: bool
    clips: int
    host: HostPlan
    experts: frozenset[str]


def _check_shards(config: ModelConfig, vram: float | str | None, t5: bool, dit: bool, t5_cpu: bool) -> None:
    """Raise UserError for what goes with no slices of weights on each GPU."""
    names = ["`t5_fsdp`"] * t5 + ["`dit_fsdp`"] * dit
    if names and vram is not None:
        raise UserError(f"{' and '.join(names)} keep weights on all GPUs, so no layers come to them: leave out `vram`")
    if t5 and t5_cpu:
        raise UserError("`t5_fsdp` slices the text encoder for GPUs, and `t5_cpu` runs it on the CPU: leave out one")
    if dit and config.low_precision:
        raise UserError(
            f"`dit_fsdp` slices bf16 weights, and `precision` {config.low_precision} rounds whole ones: leave out one; "
            "in 8 bits they take half of the memory"
        )


class OneExpert(Pipeline):
    """A model with one denoiser (5B)."""

    vae_class = Wan2_2_VAE

    @property
    def model(self) -> WanModel:
        """The denoiser."""
        model: WanModel = self.models["model"]
        return model

    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        return [Expert("denoise", "model", lambda: self.model, guidance[0], 0)]


class TwoExperts(Pipeline):
    """A model with a high-noise and a low-noise denoiser (A14B)."""

    @property
    def low_noise_model(self) -> WanModel:
        """The denoiser for the schedule below the boundary."""
        model: WanModel = self.models["low_noise_model"]
        return model

    @property
    def high_noise_model(self) -> WanModel:
        """The denoiser for the schedule from the boundary up."""
        model: WanModel = self.models["high_noise_model"]
        return model

    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        low, high = guidance
        boundary, lowest = self.config.lowest_timesteps
        return [
            Expert("high noise", "high_noise_model", lambda: self.high_noise_model, high, boundary),
            Expert("low noise", "low_noise_model", lambda: self.low_noise_model, low, lowest),
        ]


def draw_seed(seed: int) -> int:
    """The seed itself, or a new one for a negative seed, as Wan2.2 does; 32 bits leave room for a chain to count up."""
    return seed if seed >= 0 else random.randrange(2**32)


# Which module has the pipeline of a task, and under which name.
_CLASSES = {
    "t2v-A14B": ("wan.text2video", "WanT2V"),
    "i2v-A14B": ("wan.image2video", "WanI2V"),
    "ti2v-5B": ("wan.textimage2video", "WanTI2V"),
    "v2v-14B": ("wan.video2video", "WanV2V"),
    "v2v-5B": ("wan.wan22video2video5B", "WanV2V5B"),
}


def pipeline_class(task: str) -> type[Pipeline]:
    """The class of a task's pipeline, by the task's name in `WAN_CONFIGS`."""
    home, name = _CLASSES[task]
    found: type[Pipeline] = getattr(import_module(home), name)
    return found
