"""Arguments -> the `Plan` of a clip that continues footage, and whether the model can follow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from wan.chain.plan import LaterPicture, Plan
from wan.errors import UserError
from wan.footage import choose_anchor
from wan.handoff import check_program
from wan.models import Models
from wan.sampling_rules import SamplingRules
from wan.settings import (
    Context,
    Geometry,
    LoraFile,
    check_continuation,
    check_end_image,
    check_motion_amplitude,
)
from wan.types import Footage, Frame, frame_size

log = logging.getLogger(__name__)

OneOrMore: TypeAlias = "LoraFile | str | Path | Sequence[LoraFile | str | Path]"
Loras: TypeAlias = "OneOrMore | Mapping[str, OneOrMore]"


def _lora_files(given: OneOrMore) -> tuple[LoraFile, ...]:
    files = [given] if isinstance(given, LoraFile | str | Path) else given
    return tuple(file if isinstance(file, LoraFile) else LoraFile.parse(str(file)) for file in files)


def loras_by_expert(given: Loras, experts: Sequence[str]) -> dict[str, tuple[LoraFile, ...]]:
    """LoRA files by the expert that they are for, of these. Raises UserError."""
    if not isinstance(given, Mapping):
        first, *others = sorted(experts)
        if given and others:
            raise UserError(f"loras: give them by expert, {{{first!r}: …, {others[0]!r}: …}}")
        given = {first: given}
    return {name: files for name, one in given.items() if (files := _lora_files(one))}


def check_pairing(plan: Plan, experts: Sequence[str]) -> None:
    """SVI's layout needs its LoRAs and they need it; which of its versions a file is, only its name can tell.

    Raises UserError.
    """
    svi = [file.path.name for files in plan.loras.values() for file in files if file.is_svi]
    if plan.context.mode == "svi2pro":
        if not all(plan.loras.get(expert) for expert in experts):
            raise UserError("`continuation` svi2pro needs its pair of LoRAs: give `lora_high` and `lora_low`")
        if not svi:
            log.warning("no name of the LoRAs says SVI; svi2pro makes noise without the 2.0 Pro pair")
        if wrong := [name for name in svi if "pro" not in name.lower()]:
            raise UserError(f"{wrong[0]} is of another SVI version; svi2pro needs the 2.0 Pro pair")
    elif svi:
        raise UserError(f"{svi[0]} is trained for another conditioning; use it with `continuation` svi2pro")


@dataclass(frozen=True)
class Planner:
    """Makes plans for one model.

    `fit` gives (width, height) of a continuation from its footage's and a largest area, `geometry` the size of a clip
    from width, height and frames, and `check_memory` raises UserError for a plan that needs too much.
    """

    rules: SamplingRules
    models: Models
    fit: Callable[[int, int, int], tuple[int, int]]
    geometry: Callable[[int, int, int], Geometry]
    check_memory: Callable[[Plan], None]

    def __call__(
        self,
        footage: Footage,
        *,
        max_area: int | None = None,
        frame_num: int | None = None,
        shift: float | None = None,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | tuple[float, float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        cache: str | None = None,
        preset: str = "quality",
        negative: str = "",
        context: Context | int | None = None,
        anchor: Frame | None = None,
        end: Frame | LaterPicture | None = None,
        cut: Frame | bool | None = None,
        loras: Loras = (),
        prompt: str | None = None,
        prefix: str = "",
        prompt_mode: str = "describe",
        num_segments: int = 8,
        motion_amplitude: float = 1.0,
        discard: int = 0,
        handoff: str | None = None,
        fade: int = 0,
        drift_correction: float = 0.0,
        colour_carry: float = 0.0,
        best_of: int = 1,
        keeps_takes: bool = False,
        offload: bool = True,
        number: int = 1,
        count: int = 1,
        check: bool = True,
    ) -> Plan:
        """A plan that fits the footage: its aspect within `max_area` pixels. None means the preset's or config's value.

        `context` may be a number of known frames. `loras` are files, as `LoraFile` or as text PATH[:STRENGTH]: one or
        several for a model with one denoiser, and by the name of the expert ("high_noise_model", "low_noise_model")
        for one with two. The rest are fields of `Plan`. Without `check` it is a plan that no clip is made by, whose
        fields are of use. Raises UserError.
        """
        config = self.rules.config
        if max_area is None:
            width, height = (int(side) for side in config.sizes[0].split("*"))
            max_area = width * height
        size = self.fit(*frame_size(footage.last), max_area)
        context = Context.choose(None, context) if isinstance(context, int) else context or Context()
        if context.mode == "svi2pro" and anchor is None:
            anchor = choose_anchor(footage)
        plan = Plan(
            self.geometry(*size, config.frame_num if frame_num is None else frame_num),
            self.rules.merge(
                steps,
                shift,
                solver,
                guidance,
                guidance_interval=guidance_interval,
                cache=cache,
                preset=preset,
            ),
            negative or config.sample_neg_prompt,
            context=context,
            anchor=anchor,
            end=end,
            loras=loras_by_expert(loras, list(self.rules.checkpoint.experts)),
            preset=preset,
            prompt=prompt,
            prefix=prefix,
            prompt_mode=prompt_mode,
            num_segments=num_segments,
            motion_amplitude=motion_amplitude,
            discard=discard,
            handoff=handoff,
            fade=fade,
            drift_correction=drift_correction,
            colour_carry=colour_carry,
            best_of=best_of,
            keeps_takes=keeps_takes,
            cut=cut,
            offload=offload,
            number=number,
            count=count,
        )
        if check:
            if handoff is not None:
                check_program(handoff)
            self.check(plan)
        return plan

    def check(self, plan: Plan) -> None:
        """Raise UserError for a plan that this model cannot follow. LoRA files are looked at, not loaded."""
        config = self.rules.config
        two_experts = config.model_type == "i2v"
        check_continuation(config, plan.context.mode)
        if plan.end is not None:
            check_end_image(config, plan.geometry.frames, plan.leading, plan.context.mode)
        check_motion_amplitude(plan.motion_amplitude, config, plan.context.mode)
        if plan.cut is True and two_experts:
            raise UserError("cut: true makes a clip of text alone, which I2V-A14B cannot; give a picture to cut to")
        if plan.cut is True and plan.prompt is None:
            raise UserError("cut: true makes a clip of text alone: give it a prompt")
        self.models.check_loras(plan.loras)
        self.check_memory(plan)  # which LoRAs take as well
        self.rules.check_distilled(plan.preset, plan.loras)
        check_pairing(plan, list(self.rules.checkpoint.experts))
