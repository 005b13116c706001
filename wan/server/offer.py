"""What a server makes: its model, the sizes, and the lengths of chains. Held against what clients ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan.commands.flags import check_together
from wan.commands.job import CHAIN_FRAMES
from wan.configs import ModelConfig, parse_size
from wan.errors import UserError
from wan.options import Settings
from wan.server.errors import ApiError, from_user_error
from wan.server.tickets import Ticket
from wan.server.wire import settings_of_chain
from wan.settings import Context

MODELS = {"wan2.2-i2v-a14b": 2, "v2v-14B": 2, "i2v-A14B": 2, "wan2.2-ti2v-5b": 1, "v2v-5B": 1, "ti2v-5B": 1}  # experts


@dataclass(frozen=True)
class Offer:
    """`owner` are the server's settings, `config` its model's row, `experts` how many that has."""

    owner: Settings
    config: ModelConfig
    experts: int

    @property
    def model(self) -> str:
        """The name of the server's model."""
        return "wan2.2-i2v-a14b" if self.experts == 2 else "wan2.2-ti2v-5b"

    @property
    def fps(self) -> float:
        """Frames per second of what is made."""
        return float(self.config.sample_fps)

    def size(self, settings: Mapping[str, Any]) -> str:
        """The size of a chain, WIDTH*HEIGHT."""
        return str(settings.get("size") or self.owner.size or self.config.sizes[0])

    def pixels(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """Its width and height."""
        return parse_size(self.size(settings))

    def check_model(self, model: str | None) -> None:
        """Raise ApiError for a model that this server has not."""
        if model is None:
            return
        known = {name.lower(): experts for name, experts in MODELS.items()}
        if known.get(model.lower()) != self.experts:
            have = ", ".join(name for name, experts in MODELS.items() if experts == self.experts)
            raise ApiError(
                f"this server has no model {model[:60]!r}; it has {have}", param="model", code="model_not_found"
            )

    def check(self, ticket: Ticket, scenes: Sequence[Mapping[str, Any]]) -> None:
        """Raise ApiError for settings that do not go together, or for more than the server makes."""
        of, frames = ticket.settings, 0
        takes = max(of.get("takes") or self.owner.takes, of.get("best_of") or self.owner.best_of)
        for number in range(ticket.base + 1, ticket.count + 1):
            scene = scenes[number - 1] if number <= len(scenes) else {}
            frames += (scene.get("frames") or self._frames(of)) * (scene.get("takes") or takes)
        if frames > self.owner.max_frames:
            raise ApiError(
                f"{frames} frames are more than the {self.owner.max_frames} that this server makes of one chain",
                param="seconds",
            )
        try:
            settings = settings_of_chain(self.owner, {**of, "num_videos": ticket.count, "video": "x"})
            check_together("continuous", settings)
        except UserError as error:
            raise from_user_error(error) from error
        size = settings.size or self.config.sizes[0]
        if size not in self.config.sizes:
            sizes = ", ".join(one.replace("*", "x") for one in self.config.sizes)
            raise ApiError(f"size must be one of {sizes}; {size.replace('*', 'x')} is not", param="size")

    def _frames(self, settings: Mapping[str, Any]) -> int:
        given: int | None = settings.get("frame_num") or self.owner.frame_num
        return given or min(CHAIN_FRAMES, self.config.frame_num)

    def _new(self, settings: Mapping[str, Any]) -> int:
        """Frames that each clip adds."""
        of = settings_of_chain(self.owner, settings)
        return max(self._shown(settings) - Context.choose(of.continuation, of.context_frames).frames, 1)

    def _shown(self, settings: Mapping[str, Any]) -> int:
        """Frames of a clip, without the last ones that are left out."""
        return self._frames(settings) - settings_of_chain(self.owner, settings).discard

    def clips_of(self, settings: Mapping[str, Any], seconds: float, still: bool) -> int:
        """The fewest clips that are so long together."""
        try:
            first = self._shown(settings) if still else self._new(settings)
            rest = math.ceil(seconds * self.fps - 1e-6) - first
            return 1 + max(math.ceil(rest / self._new(settings)), 0)
        except UserError as error:
            raise from_user_error(error) from error

    def seconds_of(self, settings: Mapping[str, Any], count: int, still: bool) -> float:
        """How long so many clips are together."""
        try:
            first = self._shown(settings) if still else self._new(settings)
            return (first + (count - 1) * self._new(settings)) / self.fps
        except UserError as error:
            raise from_user_error(error) from error
