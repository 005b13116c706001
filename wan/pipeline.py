"""Request -> pixels, once for all models."""

from __future__ import annotations

import itertools
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wan.configs import ModelConfig, preset_named
from wan.denoiser.attention_backends import compile_where_it_pays, use_fastest_attention
from wan.denoiser.conditioning import Condition
from wan.denoiser.fp8 import check_precision
from wan.denoiser.lora import LoraMatch, check_loras, merge_loras
from wan.denoiser.model import WanModel
from wan.denoiser.sampling import Expert, Stage, plan_stages, sample
from wan.denoiser.schedule import build_scheduler
from wan.denoiser.step_cache import Caching
from wan.device.budget import CONTEXT, FITTING, GIB, StageMemory, denoiser_memory, for_tensors, text_memory, vae_memory
from wan.device.hardware import (
    free_bytes,
    generator_on,
    grow_segments,
    host_bytes,
    main_device,
    peak_gib,
    reset_peak,
    synchronize,
)
from wan.device.placement import Placement, move_home
from wan.errors import UserError
from wan.options import EXPERT_OF_LORA, LONGEST_CONTEXT
from wan.settings import LoraFile, Sampling, StepCache
from wan.text.umt5 import PromptTokenizer, TextEncoder
from wan.types import Clip, Generation, Geometry, OnStep, Request, Step, TextContext
from wan.vae.vae import Wan2_1_VAE, Wan2_2_VAE, WanVAE
from wan.weights.checkpoint import Names, open_checkpoint, resolve_folder
from wan.weights.prefetch import ReadAhead

_LORA_SETTINGS = {expert: f"`{name}`" for name, expert in EXPERT_OF_LORA.items()}


class Pipeline(ABC):
    """A Wan2.2 model ready to sample.

    The checkpoint is checked in the constructor; each model is loaded when it is first used and kept. Constructor
    arguments are Wan2.2's, and `config` one of `wan.configs.WAN_CONFIGS` (or a `dataclasses.replace` of it).
    `dit_files` are denoisers that come from a file of their own (GGUF, fp8 safetensors) in place of the folder's, by
    attribute name: `model`, or `high_noise_model` and `low_noise_model`. `compile_blocks`: compile the denoiser where
    that saves time, on a GPU and for enough steps. `vram`: GiB of the GPU that a clip may take, or "auto" for what is
    free now; what of a model does not fit comes to it layer by layer (needs offloading). Raises UserError for a
    checkpoint that is not whole or not the one that `config` describes.
    """

    vae_class: type[WanVAE] = Wan2_1_VAE

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
        compile_blocks: bool = True,
        vram: float | Literal["auto"] | None = None,
    ) -> None:
        if t5_fsdp or dit_fsdp or use_sp:
            raise UserError(
                "t5_fsdp, dit_fsdp and use_sp need several GPUs, which is not supported yet; leave them out"
            )
        self.config = config
        self.rank = rank
        self.device = main_device(device_id)
        self.text_device = torch.device("cpu") if t5_cpu else self.device
        self.load_device = torch.device("cpu") if init_on_cpu else self.device
        self.convert_model_dtype = convert_model_dtype
        files = {name: Path(file).expanduser() for name, file in dit_files.items()}
        self.compile_blocks = compile_blocks
        self.vram = None if vram is None else self._budget(vram)
        check_precision(config.low_precision, self.device)
        packed = [file for file in files.values() if file.suffix == ".gguf"]
        if packed and config.low_precision:
            raise UserError(f"{packed[0]}: precision {config.low_precision} is for bf16 and fp8 weights; leave it out")
        self.checkpoint = open_checkpoint(
            resolve_folder(checkpoint_dir, files),
            in_channels=config.in_channels,
            experts=1 if config.boundary is None else 2,
            names=Names(
                low_noise=config.low_noise_checkpoint,
                high_noise=config.high_noise_checkpoint,
                vae=config.vae_checkpoint,
                text_encoder=config.t5_checkpoint,
                tokenizer=config.t5_tokenizer,
            ),
            files=files,
        )
        for name in files:  # anyone makes such files; a folder's shards are said when they load
            WanModel.check(self.checkpoint.experts[name])
        self.tokenizer = PromptTokenizer(self.checkpoint.tokenizer, config.text_len)

    def _budget(self, vram: float | Literal["auto"]) -> int:
        """Bytes of a GPU that may be taken; its allocator then gives pages back that it does not need."""
        if self.device.type != "cuda":
            raise UserError("`vram` is for a GPU, and there is none; leave it out")
        self.load_device = torch.device("cpu")
        grow_segments()
        return free_bytes(self.device) if vram == "auto" else int(vram * GIB)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """UMT5, in host memory until it is used."""
        return TextEncoder.from_weights(
            self.checkpoint.text_encoder, self.tokenizer, dtype=self.config.t5_dtype, device=torch.device("cpu")
        )

    @cached_property
    def vae(self) -> WanVAE:
        """The VAE, in host memory until it is used."""
        config = self.config
        return self.vae_class.from_weights(
            self.checkpoint.vae,
            mean=config.vae_mean,
            std=config.vae_std,
            dtype=config.vae_dtype,
            device=torch.device("cpu"),
        )

    def _load_expert(self, name: str) -> WanModel:
        return WanModel.from_weights(
            self.checkpoint.experts[name],
            dtype=self.config.param_dtype,
            device=self.load_device,
            convert_model_dtype=self.convert_model_dtype,
            low_precision=self.config.low_precision,
            rounded_on=self.device,
        )

    def check_loras(self, loras: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Look at LoRA files, by the expert that they are for, without loading them. Raises UserError."""
        for name, files in loras.items():
            if name not in self.checkpoint.experts:
                there = " and ".join(_LORA_SETTINGS[expert] for expert in sorted(self.checkpoint.experts))
                raise UserError(f"{_LORA_SETTINGS.get(name, name)} is not for {self.config.name}, which takes {there}")
            if (name, files) not in self._fitting:  # a storyboard asks for each of its clips
                check_loras(files, self.checkpoint.experts[name])
                self._fitting.add((name, files))

    @cached_property
    def _fitting(self) -> set[tuple[str, tuple[LoraFile, ...]]]:
        """LoRAs by expert that were looked at and fit."""
        return set()

    @cached_property
    def _merged(self) -> dict[str, list[LoraMatch]]:
        """The LoRAs that are in each expert's weights now."""
        return {}

    def _merge_loras(self, wanted: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Put these LoRAs, by expert, into the weights in place of those that are there."""
        for name in wanted.keys() | self._merged.keys():
            files, there = wanted.get(name, ()), self._merged.get(name, [])
            if files == tuple(match.lora for match in there):
                continue
            weights = self.checkpoint.experts[name]
            try:
                merge_loras(getattr(self, name), weights, files)
            except BaseException:
                self.__dict__.pop(name)  # half merged: it is loaded again when it is next used
                self._merged.pop(name, None)
                raise
            self._merged[name] = check_loras(files, weights)

    @abstractmethod
    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        """The denoisers from high noise to low, with their guidance out of (low, high)."""

    @abstractmethod
    def condition(self, request: Request, noise: Tensor, placement: Placement) -> Condition:
        """What is known of the clip, encoded, on the device; `noise` [z, F, h, w] are the initial latents."""

    def geometry(self, width: int, height: int, frames: int) -> Geometry:
        """The size of a clip for this model. Raises UserError for sizes that it cannot make."""
        geometry = Geometry(frames, height, width, self.config.vae_stride, self.config.patch_size)
        if self.vram is not None:
            stage, part = max(self.parts(geometry).items(), key=lambda item: item[1].least)
            least = part.least / FITTING + CONTEXT
            if least > self.vram:
                raise UserError(
                    f"`vram` {self.vram / GIB:.3g}: {stage} of {frames} frames of {width}x{height} needs "
                    f"{least / GIB:.1f} GiB; {_ADVICE[stage]}"
                )
        return geometry

    def parts(self, geometry: Geometry, known: int | None = None) -> dict[str, StageMemory]:
        """What each stage of making a clip takes of the GPU, beside a VLM; `known` frames, or the most there may be."""
        config, checkpoint = self.config, self.checkpoint
        if known is None:
            known = geometry.frames if config.model_type == "i2v" else min(geometry.frames, LONGEST_CONTEXT)
        encoding, decoding = vae_memory(checkpoint.vae, config.vae_dtype, geometry, known)
        denoising = max(self._denoisers(geometry), key=lambda part: part.least)
        found = {"encoding": encoding, "sampling": denoising, "decoding": decoding}
        if self.text_device == self.device:
            found["text"] = text_memory(checkpoint.text_encoder, config.t5_dtype, config.text_len)
        return found

    def _denoisers(self, geometry: Geometry) -> list[StageMemory]:
        config, in_8_bits = self.config, self.config.low_precision is not None
        return [
            denoiser_memory(weights, config.param_dtype, in_8_bits, geometry.tokens, config.text_len)
            for weights in self.checkpoint.experts.values()
        ]

    def gpu_bytes(self, geometry: Geometry, offload: bool) -> int:
        """The most that the tensors of a clip take of the GPU, beside a VLM."""
        parts = self.parts(geometry)
        if offload and not self._all_fit(geometry):
            budget = None if self.vram is None else for_tensors(self.vram)
            return max(part.peak(budget) for part in parts.values())
        weights = [part.weights for stage, part in parts.items() if stage in ("text", "decoding")]
        weights += [part.weights for part in self._denoisers(geometry)]
        return sum(weights) + max(part.working + part.beside for part in parts.values())

    def _loaded(self) -> list[nn.Module]:
        return [
            self.__dict__[name] for name in ("text_encoder", "vae", *self.checkpoint.experts) if name in self.__dict__
        ]

    def _reading_ahead(self) -> ReadAhead:
        """Reads the files of models that are not loaded yet, in the order of their use, up to half of the budget."""
        parts = {"text_encoder": self.checkpoint.text_encoder, "vae": self.checkpoint.vae}
        parts |= dict(sorted(self.checkpoint.experts.items()))  # high noise first
        files = [file for name, weights in parts.items() if name not in self.__dict__ for file in weights.files]
        sizes = itertools.accumulate(file.stat().st_size for file in files)
        few = sum(size <= host_bytes() / 2 for size in sizes)
        return ReadAhead(files[:few], few)

    def _all_fit(self, geometry: Geometry) -> bool:
        """Whether a budget of memory is enough for all models at once, so that none needs to wait elsewhere."""
        return self.vram is not None and self.gpu_bytes(geometry, False) <= for_tensors(self.vram)

    def _placements(self, geometry: Geometry, offload: bool) -> Callable[[str], Placement]:
        """Where the model of each stage lives, with what the budget of memory leaves for its weights."""
        if self.vram is None:
            return lambda stage: Placement(self.device, offload)
        if self._all_fit(geometry):
            return lambda stage: Placement(self.device, offload=False)
        for model in self._loaded():  # a smaller clip before this one may have left them there
            move_home(model)
        budget, parts = for_tensors(self.vram), self.parts(geometry)
        return lambda stage: Placement(
            self.device, True, parts[stage].weight_budget(budget) if stage in parts else None
        )

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
        """Wan's sampling arguments as one value; one guidance number is for both experts.

        What is None is the preset's, and what that leaves open the model's. An interval of (0, 1) and the cache "off"
        take out what the preset has. Raises UserError, also for a cache that could leave nothing out.
        """
        row, config = preset_named(preset), self.config
        if guide_scale is None:
            guide_scale = config.guidance if row.guidance is None else row.guidance
        if guidance_interval is None:
            guidance_interval = row.guidance_interval
        if isinstance(guide_scale, int | float):
            guide_scale = (guide_scale, guide_scale)
        try:
            low, high = guide_scale
        except (TypeError, ValueError) as error:
            raise UserError(
                f"`sample_guide_scale` must be a number or (low noise, high noise), {guide_scale!r} is not"
            ) from error
        if low != high and self.config.boundary is None:
            raise UserError(f"`sample_guide_scale` {low}, {high}: this model has one expert and takes one number")
        sampling = Sampling(
            _first(steps, row.steps, config.sample_steps),
            _first(shift, row.shift, config.sample_shift),
            (float(low), float(high)),
            _first(solver, row.solver),
            None if guidance_interval == (0, 1) else guidance_interval,
            StepCache.parse(_first(cache, row.cache)),
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
        shares = [steps for steps, _ in self.steps_of(sampling)]
        if all(steps <= cache.whole(steps) for steps in shares):
            raise UserError(
                f"`cache` {cache} leaves nothing out of {' + '.join(map(str, shares))} steps, the first "
                f"{cache.whole(max(shares))} are computed whole; give `cache` off or more `sample_steps`"
            )

    def steps_of(self, sampling: Sampling) -> list[tuple[int, int]]:
        """The steps of each expert, from high noise to low, and how many of them have guidance's second forward."""
        train, boundary = self.config.num_train_timesteps, self.config.boundary
        timesteps = build_scheduler(sampling, torch.device("cpu"), train).timesteps.tolist()
        low, high = sampling.guidance
        shares = [(timesteps, low)]
        if boundary is not None:
            split = sum(t >= boundary * train for t in timesteps)
            shares = [(timesteps[:split], high), (timesteps[split:], low)]
        return [
            (len(share), 0 if scale == 1 else sum(sampling.guides(t / train) for t in share)) for share, scale in shares
        ]

    def forwards(self, sampling: Sampling) -> float:
        """How many forwards of all experts together a clip takes, with a cache about."""
        cache = sampling.cache
        return sum(
            (1 + guided / steps) * (steps if cache is None else cache.computed(steps))
            for steps, guided in self.steps_of(sampling)
            if steps
        )

    def check_distilled(self, preset: str, loras: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Raise UserError where a preset for step-distillation LoRAs has none for an expert."""
        if not preset_named(preset).distilled:
            return
        missing = [name for name in self.checkpoint.experts if all(file.is_svi for file in loras.get(name, ()))]
        if missing:
            needed = " and ".join(f"{_LORA_SETTINGS[name]} FILE" for name in sorted(missing))
            raise UserError(
                f"`preset` {preset} needs {needed}: 4-step distillation LoRAs of {self.config.name}, for A14B "
                "those of lightx2v's Wan2.2-Distill-Loras or Wan2.2-Lightning"
            )

    def run(
        self, request: Request, *, offload: bool = True, on_step: OnStep | None = None, clips: int = 1
    ) -> Generation:
        """Make one clip. `offload` keeps only the model in use on the GPU; it is one of `clips` of a run."""
        if self.vram is not None and not offload:
            raise UserError("`vram` needs `offload_model` True: only then is one model at a time on the GPU")
        placements = self._placements(request.geometry, offload)
        watch = Stopwatch(self.device, request.sampling.steps, on_step)
        reset_peak(self.device)
        with watch.stage("text"):
            context = self._encode_text(request, placements("text"))
        with watch.stage("encode"):
            noise = self.noise(request)
            condition = self.condition(request, noise, placements("encoding"))
        with watch.stage("load"):
            experts = self.experts(request.sampling.guidance)
            self._merge_loras(request.loras)
            scheduler = build_scheduler(request.sampling, self.device, self.config.num_train_timesteps)
            train = self.config.num_train_timesteps
            stages = plan_stages(scheduler.timesteps, experts, lambda t: request.sampling.guides(t / train))
            names = [expert.name for expert in experts]
            caching = Caching(request.sampling.cache, dict(zip(names, self.config.mag_ratios, strict=False)))
            self._choose_kernels(stages, request.geometry.tokens, clips * self.forwards(request.sampling))
        with watch.stage("sample"):
            latents = sample(noise, stages, scheduler, condition, context, placements("sampling"), on_step, caching)
        with watch.stage("decode"), placements("decoding").on_device(self.vae):
            pixels = self.vae.decode([latents], home=torch.device("cpu"))[0]
        clip = Clip(pixels.permute(1, 2, 3, 0), Fraction(self.config.sample_fps))
        loras = {name: [match.as_json() for match in matches] for name, matches in self._merged.items() if matches}
        notes = stages[-1].expert.model.kernels | ({"loras": loras} if loras else {})
        return Generation(clip, latents.cpu(), request, watch.seconds, peak_gib(self.device), notes)

    def _choose_kernels(self, stages: Sequence[Stage], tokens: int, forwards: float) -> None:
        """Let the stages' models run on what is fastest for so many forwards, with the same results."""
        for stage in stages:
            use_fastest_attention(stage.expert.model, tokens, forwards, self.device)
            if self.compile_blocks:
                compile_where_it_pays(stage.expert.model, tokens, forwards, self.device)

    def noise(self, request: Request) -> Tensor:
        """The initial latents float32 [z, F, h, w], drawn on the model's device as in the official code."""
        shape = (self.config.z_dim, *request.geometry.latent)
        generator = generator_on(self.device, request.seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)

    def _encode_text(self, request: Request, placement: Placement) -> TextContext:
        """Both prompts, encoded once for as long as they repeat."""
        texts = (request.prompt, request.negative)
        if any(self.text_encoder.kept(text) is None for text in texts):
            with placement.on_device(self.text_encoder, self.text_device) as encode:
                for text in texts:
                    if encode.kept(text) is None:
                        encode(text)
        positive, negative = (self.text_encoder.kept(text) for text in texts)
        assert positive is not None and negative is not None
        self.text_encoder.keep_only(texts)
        return TextContext(positive.to(self.device), negative.to(self.device))

    def encode_frames(self, frames: Tensor, placement: Placement) -> Tensor:
        """Pixels [3, T, H, W] in [-1, 1] -> normalised latents [z, F, h, w] on the device."""
        with placement.on_device(self.vae):
            return self.vae.encode([frames.to(self.device)])[0]


_ADVICE = {
    "text": "give `t5_cpu`",
    "sampling": "make smaller or shorter clips",
    "encoding": "give `vae_dtype` float16, or smaller clips",
    "decoding": "give `vae_dtype` float16, or smaller clips",
}


class OneExpert(Pipeline):
    """A model with one denoiser (5B)."""

    vae_class = Wan2_2_VAE

    @cached_property
    def model(self) -> WanModel:
        """The denoiser."""
        return self._load_expert("model")

    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        return [Expert("denoise", self.model, guidance[0], 0)]


class TwoExperts(Pipeline):
    """A model with a high-noise and a low-noise denoiser (A14B)."""

    @cached_property
    def low_noise_model(self) -> WanModel:
        """The denoiser for the schedule below the boundary."""
        return self._load_expert("low_noise_model")

    @cached_property
    def high_noise_model(self) -> WanModel:
        """The denoiser for the schedule from the boundary up."""
        return self._load_expert("high_noise_model")

    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        assert self.config.boundary is not None
        low, high = guidance
        boundary = self.config.boundary * self.config.num_train_timesteps
        return [
            Expert("high noise", self.high_noise_model, high, boundary),
            Expert("low noise", self.low_noise_model, low, 0),
        ]


class Stopwatch:
    """Seconds per named stage; the GPU is waited for, so that each stage is charged its own work.

    `on_step` hears of every stage that begins.
    """

    def __init__(self, device: torch.device, steps: int, on_step: OnStep | None = None) -> None:
        self.device = device
        self.steps = steps
        self.on_step = on_step
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.on_step is not None:
            done = self.steps if "sample" in self.seconds else 0
            self.on_step(Step(done, self.steps, name))
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def draw_seed(seed: int) -> int:
    """The seed itself, or a new one for a negative seed, as Wan2.2 does; 32 bits leave room for a chain to count up."""
    return seed if seed >= 0 else random.randrange(2**32)


def fills(width: int, height: int, max_area: int, cell: int) -> bool:
    """Whether a size is on the grid and within the area, and a cell more on both sides would not be.

    What a size rule f makes has this property; where such a size is left as it is, f(f(x)) = f(x).
    """
    on_grid = width % cell == 0 and height % cell == 0
    return on_grid and width * height <= max_area < (width + cell) * (height + cell)
