"""Request -> pixels, once for all models."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from wan.configs import ModelConfig
from wan.denoiser.conditioning import Condition
from wan.denoiser.fp8 import check_precision
from wan.denoiser.headers import check_denoiser, infer_config
from wan.denoiser.timetable import share_out, timesteps_of
from wan.device.budget import ClipNeeds, MemoryBudget, free_limit, gpu_limit
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
from wan.device.parallel import ALONE, Team, is_met, world_met
from wan.device.placement import Placement
from wan.device.ranks import USUAL, Sizes, World, choose_sizes, possible_sizes
from wan.device.shared import CommonLayers, sharers
from wan.encoding import PromptEmbeddings, SharedVae
from wan.errors import UserError
from wan.models import Models, loaders
from wan.sampling_rules import SamplingRules
from wan.settings import LoraFile, Sampling
from wan.stopwatch import Stopwatch
from wan.text.umt5 import PromptTokenizer, TextEncoder
from wan.types import Clip, Generation, Geometry, KnownFrames, OnStep, Request, Sampled, TextContext, is_finite
from wan.weights.checkpoint import Names, open_checkpoint, resolve_folder

if TYPE_CHECKING:
    # diffusers, whose import takes seconds, is for what computes: a plan is made without it
    from wan.denoiser.sampling import Expert
    from wan.vae.vae import WanVAE


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
    that is too little for all models, they take turns in it and are read again. `share_weights`: so many processes of
    this machine use the same weights and LoRAs, whose layers lie in its memory once. `use_sp`: all processes share a
    clip, as in Wan2.2 (Ulysses); `t5_fsdp`, `dit_fsdp`: each keeps a slice of the weights. For these each calls
    `torch.distributed.init_process_group` before, and makes the same calls, which give the video in the process of
    rank 0 and None in the others. Raises UserError for a checkpoint that is not whole or not the one that `config`
    describes.
    """

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
        share_weights: int = 1,
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
            check_denoiser(weights)
        self.tokenizer = PromptTokenizer(self.checkpoint.tokenizer, config.text_len)
        free = free_limit(self.device) if limit is None and self.device.type == "cuda" else None
        self.budget = MemoryBudget(self.checkpoint, config, self.device, self.text_device, limit, free)
        why_not = "one file is both experts" if self.checkpoint.single else ""
        if self.sharded or config.low_precision:
            why_not = "they are rounded or sliced"
        together = sharers(share_weights, why_not)
        self.host = HostBudget(
            self.checkpoint, config, host_limit(host_memory), given=host_memory != "auto", sharers=together
        )
        self.rules = SamplingRules(config, self.checkpoint)
        self.embeddings = PromptEmbeddings(lambda: self.text_encoder, self.text_device, self.device)
        # layers that come one by one wait in host memory
        home = torch.device("cpu") if init_on_cpu or not self.budget.holds_whole_experts else self.device
        load = loaders(
            self.checkpoint,
            config,
            self.tokenizer,
            lambda: self.vae_class,
            device=self.device,
            load_device=home,
            convert_model_dtype=convert_model_dtype,
            shards=lambda name: self.team.node if name in self.sharded else None,
            machine=lambda: self.team.machine,
        )
        needs_gpu = home.type != "cpu" or config.low_precision is not None or bool(self.sharded & experts)
        numbers = [str(config.param_dtype), str(config.t5_dtype), convert_model_dtype]
        common = CommonLayers({name: weights.files for name, weights in self.checkpoint.parts}, numbers)
        self.models = Models(
            config.name,
            self.checkpoint,
            load,
            in_threads=not needs_gpu,
            device=self.device,
            common=common if together > 1 else None,
        )
        if use_sp or ((t5_fsdp or dit_fsdp) and is_met()):
            world = world_met(rank, self.device.index or 0)
            self.join(world, cfg=1 if use_sp else None, ulysses=world.size if use_sp else None)

    def close(self) -> None:
        """Free the memory of the models, on the GPU and beside it; they are loaded again when they are next used."""
        self.models.forget_all()
        self.embeddings.clear()
        drop_cache(self.device)

    @property
    def heads(self) -> int:
        """Attention heads of the denoisers."""
        return min(int(infer_config(weights)["num_attention_heads"]) for weights in self.checkpoint.experts.values())

    def join(
        self,
        world: World,
        guided: float = 1.0,
        clips: Sequence[ClipNeeds] = (),
        *,
        cfg: int | None = None,
        ulysses: int | None = None,
        ring: int | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Make clips together with the other processes of a launcher, each of which calls this, too.

        `cfg`, `ulysses` and `ring` are sizes that are given (see `Sizes`), `guided` the share of steps that have
        guidance. The first process chooses the other sizes, for the `clips` that it is about to make. Then it calls
        `run`, the others `follow`, and the first `release` in the end. Raises UserError.
        """
        possible = possible_sizes(world.size, self.heads, guided, cfg=cfg, ulysses=ulysses, ring=ring)

        def choose(team: Team) -> Sizes:
            # none of them counts with more of its GPU than another one has
            limits = zip(*team.told_by_all((self.budget.vram, self.budget.free)), strict=True)
            vram, free = (min((one for one in told if one is not None), default=None) for told in limits)
            self.budget = replace(self.budget, vram=vram, free=free)
            node = 1 if team.node is None else team.node.size
            return team.share(lambda: self.choose_sizes(possible, guided, clips, node, self.budget.limit))

        self.team = Team.start(world, choose, self.device, timeout)
        self.share_memory(self.team.sizes, 1 if self.team.node is None else self.team.node.size)

    def choose_sizes(
        self, possible: Sequence[Sizes], guided: float, clips: Sequence[ClipNeeds], node: int, limit: int | None
    ) -> Sizes:
        """The best of the sizes for these clips, with `node` processes a machine and `limit` bytes of each GPU."""
        tokens = max((clip.geometry.tokens for clip in clips), default=USUAL)
        return choose_sizes(possible, guided, tokens, lambda sizes: self._budget_of(sizes, node).fits(clips, limit))

    def share_memory(self, sizes: Sizes, node: int) -> None:
        """Count with what one of several processes takes, of which `node` share a machine."""
        self.budget = self._budget_of(sizes, node)
        self.host = replace(self.host, elsewhere=frozenset(self.sharded))

    def _budget_of(self, sizes: Sizes, node: int) -> MemoryBudget:
        return replace(
            self.budget,
            token_ranks=sizes.tokens,
            ring_ranks=sizes.ring,
            dit_shards=node if self.sharded - {"text_encoder"} else 1,
            t5_shards=node if "text_encoder" in self.sharded else 1,
        )

    def follow(self, count: int | None = None) -> None:
        """In all processes but the first: make this one's share of `count` clips, or until that one calls `release`."""
        for _ in itertools.count() if count is None else range(count):
            if (shared := self.team.hear()) is None:
                return
            placements = self._make_room(shared)
            self.models.keep_experts(shared.experts)
            watch = Stopwatch(self.device, shared.request.sampling.steps)
            sampled = self._sample(shared.request, placements, watch, shared.clips)
            self.shared_vae.decode(sampled.latents, placements("decoding"), self.team.all_)

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

    @property
    def vae_class(self) -> type[WanVAE]:
        """The class of its VAE."""
        from wan.vae.vae import Wan2_1_VAE

        return Wan2_1_VAE

    @property
    def shared_vae(self) -> SharedVae:
        """The VAE as the processes of the team run it."""
        return SharedVae(lambda: self.vae, self.device, self.team)

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
        budget = self.budget_for(request.geometry, offload, request.loras)
        budget.check(request.geometry)
        shared = _Shared(request, offload, clips, self.host_plan(request.geometry, request.loras))
        try:
            return self._make(shared, self._make_room(shared), on_step, sampled, on_sampled)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            capacity = budget.vram or budget.free or total_bytes(self.device)
            advice = budget.advice(request.geometry, offload, capacity)
        # outside of the handler, whose traceback holds what was on the GPU
        raise UserError(f"out of GPU memory ({reason}); {advice}")

    def budget_for(self, geometry: Geometry, offload: bool, loras: Mapping[str, tuple[LoraFile, ...]]) -> MemoryBudget:
        """What a clip with these LoRAs may take of the GPU, and what it does. Raises UserError."""
        return self.budget.for_clip(geometry, offload, self.models.lora_bytes(loras))

    def host_plan(self, geometry: Geometry, loras: Mapping[str, tuple[LoraFile, ...]], captioner: int = 0) -> HostPlan:
        """How models live in host memory while a clip is made; `captioner`: bytes of one there. Raises UserError."""
        return self.host.plan(self.budget, geometry, self.models.lora_bytes(loras), captioner)

    def _make(
        self,
        shared: _Shared,
        placements: Callable[[str], Placement],
        on_step: OnStep | None,
        sampled: Sampled | None,
        on_sampled: Callable[[Sampled], None] | None,
    ) -> Generation:
        """In the first process: the stages of a clip. `_sample` has the first three; then it is kept and decoded."""
        request = shared.request
        watch = Stopwatch(self.device, request.sampling.steps, on_step)
        reset_peak(self.device)
        group = None if sampled is not None else self.team.all_
        if sampled is None:
            # pictures are encoded here and sent as latents
            experts, without_pictures = self.models.experts_to_keep(), replace(request, known=KnownFrames())
            if self.team.world.size > 1:
                self.models.keep_experts(experts)
            self.team.tell(replace(shared, request=without_pictures, experts=experts))
            sampled = self._sample(request, placements, watch, shared.clips)
            if on_sampled is not None:
                with watch.stage("keep"):
                    on_sampled(sampled)
        with watch.stage("decode"):
            pixels = self.shared_vae.decode(sampled.latents, placements("decoding"), group)
            finite = is_finite(pixels)
        if not finite:
            from wan.clip_sampler import DAMAGED, NOT_FINITE

            of_half = (
                "; its float16 may overflow: give `vae_dtype` float32" if self.config.vae_dtype.itemsize < 4 else ""
            )
            raise UserError(f"the VAE in {self.checkpoint.vae.path} gives {NOT_FINITE}{of_half or DAMAGED}")
        clip = Clip(pixels.permute(1, 2, 3, 0), Fraction(self.config.sample_fps))
        peaks = [peak for peak in (sampled.peak_gib, peak_gib(self.device)) if peak is not None]
        seconds = dict(sampled.seconds) | watch.seconds
        return Generation(clip, sampled.latents, request, seconds, max(peaks, default=None), notes=sampled.notes)

    def _make_room(self, shared: _Shared) -> Callable[[str], Placement]:
        """Where the model of each stage lives while a clip is made; those that are in the way leave."""
        self.models.live_by(shared.host)
        geometry = shared.request.geometry
        budget = self.budget_for(geometry, shared.offload, shared.request.loras)
        if budget.vram is not None and not budget.holds_all(geometry):
            self.models.wait_at_home()  # a smaller clip before this one may have left them on the GPU
        return budget.placements(geometry, shared.offload, shared.host.mapped)

    def _sample(
        self, request: Request, placements: Callable[[str], Placement], watch: Stopwatch, clips: int
    ) -> Sampled:
        """In all processes: the prompts and what is known of the clip are encoded, and its latents are sampled."""
        from wan.clip_sampler import ClipSampler, ClipStart

        def encode() -> TextContext:
            return self.embeddings.context(request.prompt, request.negative, placements("text"))

        def begin() -> tuple[Tensor, Condition]:
            noise = self.noise(request)
            return noise, self.condition(request, noise, placements("encoding"))

        experts = self.experts(request.sampling.guidance)
        with self._loading(request.loras, "vae", self.first_expert(request.sampling)):
            with watch.stage("text"):  # a sliced encoder needs all of them
                text = encode() if "text_encoder" in self.sharded else self.team.share(encode, self.device)
            with watch.stage("encode"):
                noise, condition = self.shared_vae.share(begin, placements("encoding"))
        sampler = ClipSampler(self.config, self.models, self.device, self.team, self.compile_blocks)
        start = ClipStart(noise, condition, text)
        return sampler.sample(request, start, experts, lambda: placements("sampling"), watch, clips)

    def first_expert(self, sampling: Sampling) -> str:
        """The denoiser that takes the first step; all steps may be for the second one, as with a boundary of 1."""
        config = self.config
        shares = share_out(timesteps_of(sampling, config.num_train_timesteps), config.lowest_timesteps)
        experts = self.experts(sampling.guidance)
        return next(expert.part for expert, share in zip(experts, shares, strict=True) if share)

    def _loading(self, loras: Mapping[str, tuple[LoraFile, ...]], *names: str) -> AbstractContextManager[Any]:
        """Load models while the block computes; processes of a team load them together later, and read their files."""
        self.models.expect_loras(loras)
        return self.models.loading(names, self.team.world.size == 1)

    def noise(self, request: Request) -> Tensor:
        """The initial latents float32 [z, F, h, w], drawn on the model's device as in the official code."""
        shape = (self.config.z_dim, *request.geometry.latent)
        generator = generator_on(self.device, request.seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)


@dataclass(frozen=True)
class _Shared:
    """What the first process tells the others to sample; the clip is one of `clips`.

    `host` is how its models live in host memory, and `experts` are those that are in memory: in all alike, since they
    are loaded together.
    """

    request: Request
    offload: bool
    clips: int
    host: HostPlan
    experts: frozenset[str] = frozenset()


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
