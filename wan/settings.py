"""How a clip is to be made, as frozen values that need no PyTorch: size, sampling, known frames, LoRA files."""

from __future__ import annotations

import math
import os
import random
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wan.configs import ModelConfig, preset_named
from wan.errors import UserError
from wan.files import sampled_digest
from wan.options import CACHES, check

MAGCACHE_RETAINED = 0.2  # of an expert's steps that come first (source: the paper's setting for Wan2.1 and Wan2.2)
TAYLORSEER_WHOLE = 3
MOST_STRENGTH = 1000  # of a LoRA
_STRENGTH = re.compile(r"(?i)[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)", re.ASCII)


@dataclass(frozen=True)
class Geometry:
    """The size of one clip: pixel frames, height and width, and the VAE and patch strides that divide them."""

    frames: int
    height: int
    width: int
    vae_stride: tuple[int, int, int]  # pixels per latent cell in T, H, W
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent cells per token in F, h, w

    def __post_init__(self) -> None:
        step = self.vae_stride[0]
        if self.frames < 1 or (self.frames - 1) % step:
            low = max((self.frames - 1) // step * step + 1, 1)
            raise UserError(f"frame_num must be {step}n+1: {self.frames} is not, {low} and {low + step} are")
        for name, size, stride, patch in (
            ("height", self.height, self.vae_stride[1], self.patch_size[1]),
            ("width", self.width, self.vae_stride[2], self.patch_size[2]),
        ):
            if size < stride * patch or size % (stride * patch):
                raise UserError(f"{name} must be a positive multiple of {stride * patch} pixels, {size} is not")

    @property
    def size(self) -> tuple[int, int, int]:
        """The pixel grid T, H, W."""
        return self.frames, self.height, self.width

    @property
    def latent(self) -> tuple[int, int, int]:
        """The latent grid F, h, w."""
        t, h, w = self.vae_stride
        return (self.frames - 1) // t + 1, self.height // h, self.width // w

    @property
    def tokens(self) -> int:
        """Tokens L of one clip inside the denoiser."""
        return math.prod(cells // patch for cells, patch in zip(self.latent, self.patch_size, strict=True))


@dataclass(frozen=True)
class StepCache:
    """What is reused from one step in the next, and how freely.

    `magcache` and `first_block` leave out most of a forward while their error stays below `strength`: the first adds up
    what the published magnitudes of the model's residuals say (Ma et al. 2025), the second measures how far the first
    block's residual is from that of the last whole forward. `taylorseer` computes one step in `strength`, a whole
    number, and extrapolates the others from the last two (Liu et al. 2025).
    """

    kind: str
    strength: float

    def __post_init__(self) -> None:
        if self.kind not in CACHES:
            raise UserError(f"`cache` must be off or one of {', '.join(CACHES)}; {self.kind!r} is not")
        if self.kind == "taylorseer" and self.strength not in range(2, 11):
            raise UserError(
                f"`cache` taylorseer computes one step in 2 to 10: taylorseer:2; {self.strength:g} is not one"
            )
        if self.kind != "taylorseer" and not 0 < self.strength <= 1:
            raise UserError(f"`cache` {self.kind} takes an error above 0, at most 1; {self.strength:g} is not")

    @classmethod
    def parse(cls, text: str) -> StepCache | None:
        """`off`, or `NAME[:STRENGTH]`. Raises UserError."""
        if text == "off":
            return None
        kind, colon, number = text.partition(":")
        try:
            return cls(kind, float(number) if colon else CACHES.get(kind, math.nan))
        except ValueError as error:
            raise UserError(f"`cache` must be off or NAME:NUMBER such as first_block:0.1, {text!r} is not") from error

    def __str__(self) -> str:
        return f"{self.kind}:{self.strength:g}"

    def whole(self, steps: int) -> int:
        """How many of an expert's `steps` are computed whole before the first that may be left out."""
        return {
            "magcache": max(int(MAGCACHE_RETAINED * steps + 0.5), 1),
            "first_block": 1,
            "taylorseer": TAYLORSEER_WHOLE,
        }[self.kind]

    def computed(self, steps: int) -> int:
        """How many of an expert's `steps` are computed: told for TaylorSeer, else about half of those that need not
        be, as measured at the default strengths (benchmarks/LOG.md)."""
        whole = min(steps, self.whole(steps))
        interval = int(self.strength) if self.kind == "taylorseer" else 2
        return whole + (steps - whole + interval - 2) // interval


@dataclass(frozen=True)
class Sampling:
    """How to sample: solver steps, sigma shift, classifier-free guidance as (low noise, high noise), solver name.

    `guidance_interval` are the lowest and the highest sigma, in [0, 1], at which guidance is used (Kynkäänniemi et al.
    2024); None is all of them. `cache` leaves out what changes little from step to step.
    """

    steps: int
    shift: float
    guidance: tuple[float, float]
    solver: str = "unipc"
    guidance_interval: tuple[float, float] | None = None
    cache: StepCache | None = None

    def __post_init__(self) -> None:
        check("sample_steps", self.steps)
        check("sample_shift", self.shift)
        check("sample_guide_scale", self.guidance)
        check("sample_solver", self.solver)
        if self.guidance_interval is not None:
            check("guidance_interval", self.guidance_interval)
            if self.guidance == (1, 1):
                raise UserError(
                    "`guidance_interval`: guidance 1 has no second forward to leave out; leave one of them out"
                )
            if self.uses("magcache"):
                # its table is read by counting the forwards of a branch
                raise UserError(
                    "`cache` magcache needs guidance in every step; use first_block with `guidance_interval`"
                )

    def guides(self, sigma: float) -> bool:
        """Whether guidance is used at this sigma; both ends of the interval belong to it."""
        return self.guidance_interval is None or self.guidance_interval[0] <= sigma <= self.guidance_interval[1]

    def uses(self, cache: str) -> bool:
        """Whether this is its cache."""
        return self.cache is not None and self.cache.kind == cache

    def as_json(self) -> dict[str, Any]:
        """What it says, as JSON values; what is not used is left out."""
        values = {"steps": self.steps, "shift": self.shift, "guidance": list(self.guidance), "solver": self.solver}
        if self.guidance_interval is not None:
            values["guidance_interval"] = list(self.guidance_interval)
        return values | ({} if self.cache is None else {"cache": str(self.cache)})


def merge_sampling(
    config: ModelConfig,
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
    take out what the preset has. Raises UserError.
    """
    row = preset_named(preset)
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
    if low != high and config.boundary is None:
        raise UserError(f"`sample_guide_scale` {low}, {high}: this model has one expert and takes one number")
    return Sampling(
        _first(steps, row.steps, config.sample_steps),
        _first(shift, row.shift, config.sample_shift),
        (float(low), float(high)),
        _first(solver, row.solver),
        None if guidance_interval == (0, 1) else guidance_interval,
        StepCache.parse(_first(cache, row.cache)),
    )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def check_end_image(
    config: ModelConfig, frames: int, known: int = 1, mode: str = "last_frame", name: str = "end_image"
) -> None:
    """Raise UserError for a model that cannot end a clip of so many frames, of which `known` lead, on a given one.

    `name` is the setting that gave it.
    """
    if config.model_type == "t2v":
        raise UserError(f"`{name}`: {config.name} makes clips of text alone; use I2V-A14B or TI2V-5B")
    if config.model_type == "ti2v" or mode == "svi2pro":  # it takes a latent frame, and one must be left to be made
        fewest = 4 * ((known - 1) // 4 + 2) + 1
        if frames < fewest:
            count = f"{known} known frame" + ("" if known == 1 else "s")
            raise UserError(f"`{name}`: a clip with {count} must have {fewest} or more, {frames} is fewer")


def check_continuation(config: ModelConfig, mode: str) -> None:
    """Raise UserError for a model that cannot go on in this mode."""
    if mode == "svi2pro" and config.model_type != "i2v":
        raise UserError(f"`continuation` svi2pro is for I2V-A14B; use tail with {config.name}")


def check_motion_amplitude(amplitude: float, config: ModelConfig, mode: str = "last_frame") -> None:
    """Raise UserError where a clip has no image latents that it could act on."""
    if amplitude == 1:
        return
    if config.model_type != "i2v":
        raise UserError(f"`motion_amplitude` is for I2V-A14B; {config.name} has no image latents behind the known ones")
    if mode == "svi2pro":
        raise UserError(
            "`motion_amplitude` changes what svi2pro's LoRAs were trained to find empty; leave it out, or use "
            "`continuation` last_frame or tail for that clip"
        )


@dataclass(frozen=True)
class Context:
    """How a clip goes on from the one before it, and how many of its leading frames repeat that one.

    `last_frame` knows the last frame; `tail` the last `frames` (4n+1); `svi2pro` an anchor picture and the motion in
    the last latent frame, which cover 5 frames of the clip before (source: Stable Video Infinity 2.0 Pro).
    """

    mode: str = "last_frame"
    frames: int = 1

    def __post_init__(self) -> None:
        check("continuation", self.mode)
        fixed = {"last_frame": 1, "svi2pro": 5}.get(self.mode)
        if fixed is not None and self.frames != fixed:
            raise UserError(
                f"`continuation` {self.mode} knows {fixed} frame(s), not {self.frames}; leave `context_frames` out"
            )
        check("context_frames", self.frames)

    @classmethod
    def choose(cls, mode: str | None = None, frames: int | None = None) -> Context:
        """A context from what was said of it: more than one frame means `tail`, and `tail` alone means 5 frames."""
        if mode is None:
            mode = "last_frame" if frames in (None, 1) else "tail"
        if frames is None:
            frames = 1 if mode == "last_frame" else 5
        return cls(mode, frames)

    def within(self, available: int) -> Context:
        """The same with no more known frames than the footage has."""
        if self.mode != "tail" or available >= self.frames:
            return self
        return Context("tail", (available - 1) // 4 * 4 + 1)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it is asked for: a safetensors file, and how much of it."""

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.strength) <= MOST_STRENGTH:
            raise UserError(
                f"the strength of a LoRA must be from -{MOST_STRENGTH} to {MOST_STRENGTH}, {self.strength:g} is not; "
                f"nothing is left of the model by then ({self.path})"
            )

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """`PATH[:S]`; only a number after the last colon is a strength. Raises UserError."""
        path, colon, number = text.rpartition(":")
        if not (colon and _STRENGTH.fullmatch(number)):
            path, number = text, "1"
        if not path:
            raise UserError(f"{text!r} names no LoRA file; write PATH or PATH:STRENGTH")
        return cls(Path(os.path.expanduser(path)), float(number))

    @property
    def is_svi(self) -> bool:
        """Whether its name says that it is one of Stable Video Infinity's."""
        return re.search(r"(?<![a-z])svi(?=pro|[^a-z]|$)", self.path.name.lower()) is not None

    @cached_property
    def digest(self) -> str:
        """A short digest of the file when it was first asked for, see `sampled_digest`."""
        return sampled_digest(self.path)

    def as_json(self) -> dict[str, Any]:
        """The file, its digest and its strength, for a record of what was made with it."""
        return {"file": self.path.name, "digest": self.digest, "strength": self.strength}


def draw_seed(seed: int) -> int:
    """The seed itself, or a new one for a negative seed, as Wan2.2 does; 32 bits leave room for a chain to count up."""
    return seed if seed >= 0 else random.randrange(2**32)
