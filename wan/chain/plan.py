"""`Plan`: how a video is continued by one clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from wan.errors import UserError
from wan.options import check
from wan.settings import Context, LoraFile, Sampling
from wan.types import Frame, Geometry


@dataclasses.dataclass(frozen=True)
class LaterPicture:
    """A picture that is read when its clip is made, since a long chain's would fill the memory: of an `end_images`.

    `digest` is that of the picture with which the clip was planned, and `read` raises UserError for another one.
    """

    digest: str | None
    read: Callable[[], Frame]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a video is continued by one clip.

    `prompt` is used as it is; without one the footage is described. With `prompt_mode` "continue" the VLM writes what
    happens next, and `prompt` is the goal that it is given. `prefix` goes before either. `cut` begins a new shot: the
    clip starts from that picture, or with True from the text alone, and not from the footage; over `fade` frames it
    fades in when the clips are joined. `anchor` is the picture that `svi2pro` holds on to, `end` the clip's last frame.
    `motion_amplitude` is as in `Request`. The clip's last `discard` frames are left out. `handoff` is a command that
    may change the known frames. `likeness` is a picture to measure the identity curve against. `preset` is the row that
    `sampling` was made with. `drift_correction` and `colour_carry` are strengths, 0 for none. Of `best_of` candidates
    the one with the least visible seam is taken, or number `take`; `keeps_takes` hands out all of them. Raises
    UserError for what does not go together.
    """

    geometry: Geometry
    sampling: Sampling
    negative: str
    prompt: str | None = None
    prefix: str = ""
    num_segments: int = 8
    offload: bool = True
    context: Context = Context()
    anchor: Frame | None = None
    end: Frame | LaterPicture | None = None
    cut: Frame | bool | None = None
    loras: Mapping[str, tuple[LoraFile, ...]] = dataclasses.field(default_factory=dict)
    prompt_mode: str = "describe"
    preset: str = "quality"
    motion_amplitude: float = 1.0
    discard: int = 0
    handoff: str | None = None
    fade: int = 0
    likeness: Frame | None = None
    drift_correction: float = 0.0
    colour_carry: float = 0.0
    best_of: int = 1
    keeps_takes: bool = False
    take: int | None = None
    number: int = 1  # of `count` clips
    count: int = 1

    def __post_init__(self) -> None:
        for name in (
            "num_segments",
            "best_of",
            "prompt_mode",
            "motion_amplitude",
            "discard",
            "fade",
            "drift_correction",
            "colour_carry",
        ):
            check(name, getattr(self, name))
        if self.context.frames >= self.geometry.frames:
            raise UserError(
                f"`context_frames` {self.context.frames}: a clip of {self.geometry.frames} frames must be longer"
            )
        if self.discard and self.dropped + self.discard >= self.geometry.frames:
            raise UserError(f"`discard` {self.discard} leaves nothing new of a clip of {self.geometry.frames} frames")
        if self.discard and self.end is not None:
            raise UserError("`discard` would leave out the clip's end image; leave one of them out")

    @property
    def dropped(self) -> int:
        """Leading frames of the clip that repeat the footage, and are left out when the clips are joined."""
        return 0 if self.is_cut else self.context.frames

    @property
    def shown(self) -> int:
        """Frames of the clip that are shown where clips are joined."""
        return self.geometry.frames - self.discard - self.dropped

    @property
    def fade_in(self) -> int:
        """Frames over which the clip before fades into this one."""
        return self.fade if self.is_cut and self.number > 1 else 0

    @property
    def leading(self) -> int:
        """Leading frames of the clip that are known: after a cut its picture, or none of a shot of text alone."""
        if self.is_cut:
            return 0 if self.cut is True else 1
        return self.context.frames

    @property
    def is_cut(self) -> bool:
        """Whether the clip begins a new shot."""
        return self.cut is not None and self.cut is not False

    @property
    def candidates(self) -> tuple[int, ...]:
        """The numbers, from 1, of the candidates to be made. A cut has no seam to choose by."""
        if self.keeps_takes:
            return tuple(range(1, self.best_of + 1))
        if self.take is not None:
            return (self.take,)
        return (1,) if self.is_cut else tuple(range(1, self.best_of + 1))

    @property
    def described(self) -> bool:
        """Whether the VLM has a part in the prompt."""
        return self.cut is not True and (self.prompt is None or self.prompt_mode == "continue")
