"""The frozen values that cross files. A value that exists is valid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from wan.errors import UserError
from wan.pictures import as_shown
from wan.settings import Geometry as Geometry
from wan.settings import Sampling

UInt8Array = npt.NDArray[np.uint8]
Frame: TypeAlias = Image.Image | Tensor  # a PIL image, which is taken as it is shown, or float32 [3, H, W] in [-1, 1]


@dataclass(frozen=True)
class KnownFrames:
    """What is known of a clip before it is made; nothing at all for text alone.

    `leading`: its first frames, oldest first, 1 or 4n+1. `end`: its last frame. With an `anchor` picture the clip is
    conditioned as in Stable Video Infinity 2.0 Pro: `motion` is the last latent frame [z, 1, h, w] of the clip before,
    or None when it is to be encoded from `leading`; without either, the clip begins a shot. `graded` [3, n, H, W] are
    the leading frames in the colours that the clip should begin with, see `carried`; then `leading` is there beside
    `motion` too.
    """

    leading: tuple[Frame, ...] = ()
    end: Frame | None = None
    anchor: Frame | None = None
    motion: Tensor | None = None
    graded: Tensor | None = None


@dataclass(frozen=True)
class Clip:
    """Pixels between models and files: `frames` float32 [T, H, W, 3] in [-1, 1], `fps` frames per second."""

    frames: Tensor
    fps: Fraction

    @property
    def last(self) -> Tensor:
        """The last frame, float32 [3, H, W] in [-1, 1]."""
        return self.frames[-1].permute(2, 0, 1).contiguous()  # a copy: a view would keep the whole clip in memory

    @property
    def motion(self) -> Tensor | None:
        """Pixels alone hold no latents."""
        return None

    @property
    def colours(self) -> Tensor | None:
        """Pixels alone know no first clip."""
        return None

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """`count` frames uint8 [count, H, W, 3] for a captioner, spread over the clip, or over its last `seconds`.

        The latter end with the last frame, and are fewer where the clip is shorter.
        """
        total = len(self.frames)
        if seconds is None:
            return to_uint8(self.frames[frame_indices(total, count)])
        apart = float(seconds * self.fps) / max(count - 1, 1)
        indices = [total - 1 - round(apart * step) for step in range(count - 1, -1, -1)]
        return to_uint8(self.frames[[index for index in indices if index >= 0]])

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The last frames, up to `count`, float32 [n, H, W, 3], oldest first. `fps` must be the clip's own."""
        if fps != self.fps:
            raise ValueError(f"a clip of {self.fps} frames per second has no tail at {fps}")
        return self.frames[-count:].clone()


class Footage(Protocol):
    """What can be continued: a video file, a clip in memory or a finished one on disk."""

    @property
    def last(self) -> Frame:
        """The last frame."""

    @property
    def motion(self) -> Tensor | None:
        """The last latent frame float32 [z, 1, h, w] where it is known."""

    @property
    def colours(self) -> Tensor | None:
        """`measure_colours` of the end of the first clip of its shot, where they are known."""

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """`count` frames uint8 [count, H, W, 3] spread over it, or evenly over its last `seconds`.

        The latter end with the last frame, and are fewer where it is shorter.
        """

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The last frames at `fps`, up to `count`, float32 [n, H, W, 3] in [-1, 1], oldest first."""


@dataclass(frozen=True)
class Request:
    """One clip to make: what is known of it, and how to sample the rest.

    `loras` are (path, strength) by the attribute name of the expert that they are merged into. `motion_amplitude` is
    how much further than trained A14B's image latents behind the known ones lie from the first, see `amplified`.
    """

    prompt: str
    negative: str
    known: KnownFrames
    geometry: Geometry
    sampling: Sampling
    seed: int
    loras: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    motion_amplitude: float = 1.0


@dataclass(frozen=True)
class TextContext:
    """Encoded prompts, float32 or bf16 [1, 512, D], zeros after the valid tokens."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Step:
    """Where a clip stands: `index` of `total` solver steps are done, and `stage` is what goes on.

    After a solver step `latents` [z, F, h, w] are its result; when a stage begins, or goes on after one inside it, they
    are None. `prompt` is the clip's, when it is first known; `detail` says what is done inside a stage, such as "shard
    2 of 6".
    """

    index: int
    total: int
    stage: str
    latents: Tensor | None = None
    prompt: str | None = None
    detail: str = ""


class OnStep(Protocol):
    """Called when a stage begins or goes on, and after every solver step: a progress bar, a preview or a stopwatch."""

    def __call__(self, step: Step, /) -> None: ...


@dataclass(frozen=True)
class Sampled:
    """What sampling a clip came to, before it is decoded.

    `latents` float32 [z, F, h, w], normalised, on the CPU; `seconds` per stage; `notes` are JSON values.
    """

    latents: Tensor
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_gib: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """One finished clip and what made it.

    `latents` float32 [z, F, h, w], normalised; `seconds` per stage; `peak_gib` the highest GPU memory in GiB, None on
    a CPU. `context_frames` of the clip before were known, of which `dropped` leading frames repeat that clip.
    `prompt_memory` is for the next clip's prompt, `notes` what else is to be written down; both are JSON values.
    `score_seam` computes `seam`. `handed` float32 [n, H, W, 3] are its known frames where a program has seen them.
    `colours` are as in `Footage`.
    It is the `Footage` that the next clip goes on from.
    """

    clip: Clip
    latents: Tensor
    request: Request
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_gib: float | None = None
    dropped: int = 0
    context_frames: int | None = None
    prompt_memory: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    score_seam: Callable[[], Mapping[str, Any] | None] = lambda: None
    handed: Tensor | None = None
    colours: Tensor | None = None

    @property
    def seam(self) -> Mapping[str, Any] | None:
        """How well the clip goes on from the footage before it, as JSON values; None where nothing goes on."""
        return self.score_seam()

    @property
    def last(self) -> Tensor:
        """The last frame, float32 [3, H, W] in [-1, 1]."""
        return self.clip.last

    @property
    def motion(self) -> Tensor:
        """The last latent frame, float32 [z, 1, h, w]."""
        return self.latents[:, -1:]

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """See `Clip.samples`."""
        return self.clip.samples(count, seconds)

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """See `Clip.tail`."""
        return self.clip.tail(count, fps)

    @property
    def video(self) -> Tensor:
        """The clip as the official code returns it: [3, T, H, W] in [-1, 1]."""
        return self.clip.frames.permute(3, 0, 1, 2)


def frame_indices(count: int, num_segments: int) -> list[int]:
    """The frames out of `count` that InternVL looks at: about the middles of `num_segments` equal parts.

    Indices repeat when the parts are shorter than a frame. Raises UserError.
    """
    if count < 1 or num_segments < 1:
        raise UserError(f"cannot take {num_segments} of {count} frames: both must be at least 1")
    part = (count - 1) / num_segments
    return [int(part / 2 + round(part * index)) for index in range(num_segments)]


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(values).all())


def to_uint8(pixels: Tensor) -> UInt8Array:
    """Float pixels in [-1, 1] -> uint8 in [0, 255] of the same shape, rounded to nearest. Raises ValueError for NaN."""
    levels = pixels.detach().float()
    if bool(levels.isnan().any()):
        raise ValueError("pixels that are NaN are no picture")
    return levels.add(1.0).mul(127.5).round().clamp(0, 255).to("cpu", torch.uint8).numpy()


def from_uint8(levels: UInt8Array) -> Tensor:
    """Uint8 [0, 255] of any shape -> float32 in [-1, 1] as (x / 255 - 0.5) / 0.5, the official arithmetic."""
    return torch.tensor(levels).float().div(255).sub(0.5).div(0.5)


def frame_size(frame: Frame) -> tuple[int, int]:
    """(width, height) of a frame, upright."""
    return (frame.shape[2], frame.shape[1]) if isinstance(frame, Tensor) else as_shown(frame).size


def as_picture(frame: Frame) -> Image.Image:
    """A frame as an 8-bit RGB image, as it is shown."""
    if isinstance(frame, Tensor):
        return Image.fromarray(to_uint8(frame.permute(1, 2, 0)))
    return as_shown(frame)


def image_to_frame(image: Image.Image) -> Tensor:
    """A PIL image, as it is shown -> float32 [3, H, W] in [-1, 1]."""
    return from_uint8(np.asarray(as_shown(image))).permute(2, 0, 1)
