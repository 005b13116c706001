"""What a clip takes of a GPU's memory, stage by stage, told from the headers of a checkpoint before anything loads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from wan.configs import DTYPES, ModelConfig
from wan.denoiser.policy import stays_float32
from wan.device.layers import SLOTS, layers_that_stay
from wan.errors import UserError
from wan.options import LONGEST_CONTEXT
from wan.settings import Geometry
from wan.vae import chunks
from wan.weights.checkpoint import Checkpoint
from wan.weights.tensors import Weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from wan.device.placement import Placement

GIB = 2**30
# What CUDA and its libraries take beside tensors, as the driver counts, and what of it is taken as soon as a process
# has asked what is free: 0.5 to 0.7 GiB were seen (benchmarks/LOG.md).
CONTEXT, BARE_CONTEXT = 0.8 * GIB, 0.5 * GIB
FITTING = 0.94  # of the rest; some is lost between tensors, and estimates err
# Measured on an H200 (benchmarks/LOG.md). Beside what is counted: workspaces, inputs and outputs of a step.
ALWAYS, TEXT = 0.4 * GIB, 0.15 * GIB
# Tensors of a GPU's tokens that are packed for the others, or come from them, where tokens are shared.
EXCHANGED = 4
GATHERED = 5  # layers of slices that are whole at a time: the one in use, the next, and what they come in
# The most that a pass through a VAE holds, in its widest activation (one latent frame): VAE 2.1, VAE 2.2.
DECODING, DECODING_A_FRAME, DECODING_BY_FRAME, ENCODING = (3.1, 4.6), (2.8, 2.8), (4.1, 5.6), (3.6, 3.6)


def for_tensors(vram: int) -> int:
    """Bytes of the `vram` budget left for tensors."""
    return int(FITTING * (vram - CONTEXT))


@dataclass(frozen=True)
class StageMemory:
    """What one stage takes, in bytes: weights, of which `count` layers of `layer` bytes may come one by one."""

    weights: int
    working: int
    layer: int = 0
    count: int = 0
    beside: int = 0  # what is kept as well where all layers stay

    def sliced(self, shards: int) -> StageMemory:
        """With a slice of the weights on each of so many GPUs; some layers and what is no layer are whole at a time."""
        if shards == 1:
            return self
        whole = min(GATHERED, self.count) * self.layer + (self.weights - self.count * self.layer)
        return StageMemory(self.weights // shards + whole, self.working, beside=self.beside)

    def weight_budget(self, budget: int) -> int:
        """What is left of a budget for weights."""
        return budget - self.working - self.beside

    def peak(self, budget: int | None) -> int:
        """The most that is taken at once, as `Placement` keeps a budget."""
        left = None if budget is None else self.weight_budget(budget)
        stay = layers_that_stay(self.weights, self.layer, self.count, left)
        if stay == self.count:
            return self.weights + self.working + self.beside
        return self.weights - (self.count - max(0, stay) - SLOTS) * self.layer + self.working

    @property
    def least(self) -> int:
        """What it takes with all layers coming one by one."""
        coming = max(0, self.count - SLOTS)
        return self.weights - coming * self.layer + self.working + (self.beside if coming else 0)


@dataclass(frozen=True)
class ClipNeeds:
    """What of a clip decides on the memory that it takes; `loras` are bytes by expert."""

    geometry: Geometry
    offload: bool
    loras: Mapping[str, int]


class Device(Protocol):
    """Where a model is to be, as far as an estimate asks; PyTorch's devices are such."""

    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class NamedDevice:
    """A device before PyTorch is there to look for it."""

    type: str


def gpu_limit(vram: float | Literal["auto"], device: torch.device) -> int:
    """Bytes that a process may take of a GPU as the driver counts, given GiB or "auto" for what is free now.

    The GPU's allocator then gives back pages that it does not need, and gives out no more than the GiB leave beside
    CUDA. Raises UserError.
    """
    from wan.device.hardware import grow_segments, hold_to

    if device.type != "cuda":
        raise no_gpu_for_vram()
    if vram == "auto":
        return free_limit(device)
    grow_segments()
    limit = int(vram * GIB)
    hold_to(device, int(limit - CONTEXT))
    return limit


def no_gpu_for_vram() -> UserError:
    """That there is no GPU at all."""
    return UserError("`vram` is for a GPU, and there is none; leave it out")


def free_limit(device: torch.device) -> int:
    """What is free of a GPU, with what this process has taken of it by asking."""
    from wan.device.hardware import free_bytes, grow_segments

    grow_segments()
    return int(free_bytes(device) + BARE_CONTEXT)


@dataclass(frozen=True)
class MemoryBudget:
    """What a checkpoint's models take of a GPU, and what of them fits within `vram` bytes (None: no limit).

    `free`: the limit of clips that need more than that with one whole model at a time, where there is no other limit.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    device: Device
    text_device: Device | None  # None: another
    vram: int | None = None
    free: int | None = None
    token_ranks: int = 1  # GPUs that share a clip's tokens
    ring_ranks: int = 1  # of which so many have keys of the same heads
    dit_shards: int = 1  # of which each keeps a slice of the denoisers
    t5_shards: int = 1
    loras: Mapping[str, int] = field(default_factory=dict)  # bytes of the LoRAs of each expert

    def for_clip(self, geometry: Geometry, offload: bool, loras: Mapping[str, int] | None = None) -> MemoryBudget:
        """The budget of a clip: where it was not given one and its models take turns, what is free if that is less.

        `loras` are bytes by expert: they lie beside weights that stay packed.
        """
        if loras is not None:
            return replace(self, loras=loras).for_clip(geometry, offload)
        if self.vram is not None or self.free is None or not offload:
            return self
        within = replace(self, vram=self.free)
        return self if self.gpu_bytes(geometry, True) <= for_tensors(self.free) else within

    @property
    def tensors(self) -> int | None:
        """Bytes of the budget left for tensors."""
        return None if self.vram is None else for_tensors(self.vram)

    def stages(self, geometry: Geometry, known: int | None = None) -> dict[str, StageMemory]:
        """What each stage of making a clip takes, beside a VLM; `known` frames, or the most there may be."""
        config, checkpoint = self.config, self.checkpoint
        if known is None:
            known = geometry.frames if config.model_type == "i2v" else min(geometry.frames, LONGEST_CONTEXT)
        encoding, decoding = vae_memory(checkpoint.vae, config.dtype_name("vae_dtype"), geometry, known)
        denoising = max(self._denoisers(geometry), key=lambda stage: stage.least)
        stages = {"encoding": encoding, "sampling": denoising, "decoding": decoding}
        if self.text_device == self.device:
            text = text_memory(checkpoint.text_encoder, config.dtype_name("t5_dtype"), config.text_len)
            stages["text"] = text.sliced(self.t5_shards)
        return stages

    def _denoisers(self, geometry: Geometry) -> list[StageMemory]:
        config, in_8_bits = self.config, self.config.low_precision is not None
        return [
            denoiser_memory(
                weights,
                config.dtype_name("param_dtype"),
                in_8_bits,
                geometry.tokens,
                config.text_len,
                self.loras.get(name, 0),
                self.token_ranks,
                self.ring_ranks,
            ).sliced(self.dit_shards)
            for name, weights in self.checkpoint.experts.items()
        ]

    def gpu_bytes(self, geometry: Geometry, offload: bool) -> int:
        """The most that the tensors of a clip take of the GPU, beside a VLM."""
        stages = self.stages(geometry)
        if offload and not self.holds_all(geometry):
            return max(stage.peak(self.tensors) for stage in stages.values())
        weights = [stage.weights for name, stage in stages.items() if name in ("text", "decoding")]
        weights += [stage.weights for stage in self._denoisers(geometry)]
        return sum(weights) + max(stage.working + stage.beside for stage in stages.values())

    @property
    def limit(self) -> int | None:
        """Bytes that a clip may take: those that are given, or free."""
        return self.free if self.vram is None else self.vram

    def fits(self, clips: Iterable[ClipNeeds], limit: int | None) -> bool:
        """Whether a GPU of so many bytes (None: any) is enough for clips, with layers one by one where they may be."""
        if limit is None:
            return True
        pairs = [(replace(self, loras=clip.loras), clip) for clip in clips]
        return all(
            budget._least(clip.geometry)[1] <= limit
            if clip.offload
            else budget.gpu_bytes(clip.geometry, False) <= for_tensors(limit)
            for budget, clip in pairs
        )

    @property
    def holds_whole_experts(self) -> bool:
        """Whether an expert may be loaded to the GPU at once: nothing may say that its layers come one by one."""
        if self.vram is not None or self.free is None:
            return self.vram is None
        dtype, in_8_bits = self.config.dtype_name("param_dtype"), self.config.low_precision is not None
        least = [denoiser_memory(one, dtype, in_8_bits, 0, 0) for one in self.checkpoint.experts.values()]
        return max(one.weights for one in least) <= for_tensors(self.free)

    def holds_all(self, geometry: Geometry) -> bool:
        """Whether the budget is enough for all models at once, so that none needs to wait elsewhere."""
        return self.tensors is not None and self.gpu_bytes(geometry, False) <= self.tensors

    def check(self, geometry: Geometry) -> None:
        """Raise UserError for a clip that needs more, however its layers come."""
        if self.vram is None:
            return
        name, least = self._least(geometry)
        if least > self.vram:
            given = self.vram != self.free
            free = "" if given else f", {self.vram / GIB:.1f} are free"
            limit = f"`vram` {self.vram / GIB:.3g}: " if given else ""
            raise UserError(
                f"{limit}{name} of {_words(geometry)} needs {least / GIB:.1f} GiB{'' if given else ' of GPU memory'}"
                f"{free}; {self.advice(geometry, True, self.vram)}"
            )

    def _least(self, geometry: Geometry) -> tuple[str, float]:
        """The stage that needs the most of a GPU with all layers coming one by one, and how much of it that is."""
        name, stage = max(self.stages(geometry).items(), key=lambda item: item[1].least)
        return name, stage.least / FITTING + CONTEXT

    def advice(self, geometry: Geometry, offload: bool, capacity: int) -> str:
        """The first of the settings, in words, that by the estimate need no more than `capacity` bytes of a GPU.

        Those that leave the result as it is come first.
        """
        open_ = replace(self, vram=None, free=None)
        least, also = open_._least(geometry)[1], "" if offload else "`offload_model` True and "
        if not offload and open_.gpu_bytes(geometry, True) <= for_tensors(capacity):
            return "give `offload_model` True"
        if self.vram is None and least <= 0.9 * capacity:  # below it, in case that the estimate was too low
            return f"give {also}`vram` {_half_gib(0.9 * capacity)}"
        changed: dict[str, MemoryBudget] = {}
        if self.text_device == self.device:
            changed["`t5_cpu`"] = replace(open_, text_device=None)
        if DTYPES[self.config.dtype_name("vae_dtype")] > 2:
            half = replace(open_, config=self.config.variant(vae_dtype="float16"))
            changed["`vae_dtype` float16"] = half
            if "`t5_cpu`" in changed:
                changed["`t5_cpu` and `vae_dtype` float16"] = replace(half, text_device=None)
        for words, budget in changed.items():
            if budget._least(geometry)[1] <= min(capacity, 0.99 * least):
                return f"give {also}{words}"
        for words, budget in {"": open_, **changed}.items():
            for frames in range(geometry.frames - 4, 4, -4):
                if budget._least(replace(geometry, frames=frames))[1] <= min(capacity, 0.99 * least):
                    return f"give {also}{words}{' and ' if words else ''}`frame_num` {frames}"
        return f"give {also}a smaller `size`"

    def placements(self, geometry: Geometry, offload: bool, mapped: bool = False) -> Callable[[str], Placement]:
        """Where the model of each stage lives, with what the budget leaves for its weights.

        `mapped`: the weights of experts and of the text encoder may lie in their files.
        """
        import torch

        from wan.device.placement import Placement

        assert isinstance(self.device, torch.device)
        device = self.device
        if self.tensors is None:
            return lambda name: Placement(device, offload, mapped=mapped)
        if self.holds_all(geometry):
            return lambda name: Placement(device, offload=False)
        left = {name: stage.weight_budget(self.tensors) for name, stage in self.stages(geometry).items()}
        return lambda name: Placement(device, True, left.get(name), mapped)

    def fits_now(self, geometry: Geometry, offload: bool, loaded: Iterable[nn.Module]) -> bool:
        """Whether the GPU has room for a clip beside what else is there, with a tenth to spare: estimates err so much.

        `loaded` are the clip's own models, wherever they are.
        """
        import torch

        from wan.device.hardware import drop_cache, free_bytes
        from wan.device.placement import bytes_on

        assert isinstance(self.device, torch.device)
        drop_cache(self.device)
        room = free_bytes(self.device, self.tensors)
        own_bytes = sum(bytes_on(model, self.device) for model in loaded)
        return 1.1 * self.gpu_bytes(geometry, offload) + GIB <= room + own_bytes


def _words(geometry: Geometry) -> str:
    frames, height, width = geometry.size
    return f"{frames} frames of {width}x{height}"


def _half_gib(size: float) -> str:
    """Bytes in GiB, down to a half."""
    return f"{math.floor(2 * size / GIB) / 2:g}"


def text_memory(weights: Weights, dtype: str, length: int) -> StageMemory:
    """The text encoder on a prompt of `length` tokens."""
    sizes = weight_sizes(weights, lambda name: dtype)
    return _layered(sizes, int(TEXT + length * 1e5))


def denoiser_memory(
    weights: Weights,
    dtype: str,
    in_8_bits: bool,
    tokens: int,
    text: int,
    loras: int = 0,
    ranks: int = 1,
    ring: int = 1,
) -> StageMemory:
    """One expert on a clip of so many tokens, which `ranks` GPUs share, in rings of `ring`; `text`: rows of the prompt,
    `loras`: bytes of what is added to it.

    Per token a block holds the residual stream in float32 and at its widest either queries, keys, values and their
    rotation, in a ring also the keys and values of the others, or the feed-forward layer before and after its
    activation.
    """
    official = "blocks.0.self_attn.q.weight" in weights.shapes
    feed = "blocks.0.ffn.0.weight" if official else "blocks.0.ffn.net.0.proj.weight"
    width, item = _shape(weights, "patch_embedding.weight")[0], DTYPES[dtype]
    hidden = _shape(weights, feed)[0]
    gathered = 2 * ring * item if ring > 1 else 0
    a_token = max((12 + 4.5 * item + gathered) * width, 2 * hidden * item + (4 + 1.5 * item) * width)
    if ranks > 1:
        a_token += EXCHANGED * item * width
    working = -(-tokens // ranks) * a_token
    part = _layered(weight_sizes(weights, denoiser_dtypes(dtype), in_8_bits, packs=True), int(ALWAYS + working))
    beside = 4 * text * width * item * part.count  # keys and values of two prompts
    held = beside_packed(weights, dtype, loras)
    layer = part.layer + held // max(1, part.count)
    return StageMemory(part.weights + held, part.working, layer, part.count, beside)


def vae_memory(weights: Weights, dtype: str, geometry: Geometry, known: int) -> tuple[StageMemory, StageMemory]:
    """Encoding `known` frames, and decoding a clip, whose pixels go to host memory."""
    size = sum(weight_sizes(weights, lambda name: dtype).values())
    frames, height, width = geometry.size
    official = "decoder.head.0.gamma"
    channels = _shape(weights, official if official in weights.shapes else "decoder.norm_out.gamma")[0]
    first = "encoder.conv1.weight" if official in weights.shapes else "encoder.conv_in.weight"
    patch = 2 if _shape(weights, first)[1] == 12 else 1
    widest = chunks.widest(channels, patch, height, width) * DTYPES[dtype]
    chunk = min(chunks.chunk_for(widest), geometry.latent[0])
    decoding = DECODING[patch - 1] + DECODING_A_FRAME[patch - 1] * chunk if chunk else DECODING_BY_FRAME[patch - 1]
    at_once = min(known, chunks.PER_LATENT * max(1, chunk)) / chunks.PER_LATENT
    return (
        StageMemory(size, int(ALWAYS + 24 * known * height * width + ENCODING[patch - 1] * at_once * widest)),
        StageMemory(size, int(ALWAYS + decoding * widest)),
    )


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    if name not in weights.shapes:
        raise UserError(f"{weights.path} lacks {name}: download it again")
    return weights.shapes[name]


def denoiser_dtypes(dtype: str) -> Callable[[str], str]:
    """The dtype of each parameter of a denoiser that computes in this one, by name."""
    return lambda name: "float32" if stays_float32(name) else dtype


def weight_sizes(
    weights: Weights, dtype_of: Callable[[str], str], in_8_bits: bool = False, packs: bool = False
) -> dict[str, int]:
    """Bytes of each tensor in memory. A model that `packs` holds weights that are quantized in its file as they are."""
    smaller, sizes = _stored_item(weights) if packs else math.inf, {}
    for name, shape in weights.shapes.items():
        item: float = DTYPES[dtype_of(name)]
        if len(shape) == 2 and LAYER.search(name):
            item = min(item, smaller)
            if in_8_bits and not _TEXT_KEYS.search(name):
                item = min(item, 1.0)
        sizes[name] = int(math.prod(shape) * item)
    return sizes


def beside_packed(weights: Weights, dtype: str, loras: int) -> int:
    """Bytes of LoRAs that lie beside an expert: those that its file holds packed; into others they are merged."""
    return loras if _stored_item(weights) < DTYPES[dtype] else 0


def _stored_item(weights: Weights) -> float:
    """Bytes of a number in the file of its own that holds a model; infinite for a folder."""
    if weights.path.is_file() and weights.path.suffix in (".gguf", ".safetensors"):
        return weights.path.stat().st_size / sum(map(math.prod, weights.shapes.values()))
    return math.inf


_TEXT_KEYS = re.compile(r"\.(?:cross_attn\.[kv]|attn2\.to_[kv])\.weight$")  # computed once a clip, in bf16 too
LAYER = re.compile(r"(?:^|\.)blocks?\.(\d+)\.")


def _layered(sizes: dict[str, int], working: int) -> StageMemory:
    by_layer: dict[int, int] = {}
    for name, size in sizes.items():
        if match := LAYER.search(name):
            by_layer[int(match[1])] = by_layer.get(int(match[1]), 0) + size
    return StageMemory(sum(sizes.values()), working, max(by_layer.values(), default=0), len(by_layer))
