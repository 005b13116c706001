"""What a storyboard says about the clips of a chain. `storyboard_file` reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan.configs import ModelConfig
from wan.errors import UserError
from wan.options import EXPERT_OF_LORA, Settings, by_scene_key
from wan.settings import Context, LoraFile, check_motion_amplitude

SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Scene:
    """What a storyboard says about one clip, which begins at `line`: values by the name of the setting.

    The command line says what is absent. A tuple of LoRAs may be empty, for none. Raises UserError where the known
    frames leave nothing of the clip.
    """

    line: int
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frames, context = self.values.get("frame_num"), self.values.get("context_frames")
        if frames is not None and context is not None and context >= frames:
            raise UserError(f"context {context} must be fewer than the clip's {frames} frames")
        if "continuation" in self.values:
            Context.choose(self.values["continuation"], context)
        if "anchor_image" in self.values and self.values.get("cut") is not None:
            raise UserError("a shot holds on to the picture of its cut; give anchor to the clip after it")

    def over(self, settings: Settings) -> Settings:
        """The settings of the clip: the command line's, with what is said here in their place."""
        values = dict(self.values)
        if values.keys() & {"continuation", "context_frames"}:
            # one frame is the last frame, more are a tail; what the command line says of the other is for its own way
            values = {"continuation": None, "context_frames": None} | values
            if Context.choose(values["continuation"], values["context_frames"]).mode != "svi2pro":
                for name in EXPERT_OF_LORA.keys() - values.keys():
                    files = getattr(settings, name)
                    values[name] = tuple(file for file in files if not LoraFile.parse(file).is_svi)
        return dataclasses.replace(settings, **values)


def ahead(old: Sequence[Scene], new: Sequence[Scene], begun: int) -> tuple[Scene, ...]:
    """What a run of which `begun` clips are made or being made goes on with when its storyboard is another by now.

    The scenes of those clips stay. After them comes what follows the last of them in `new`: by its name where it has
    one that is there, and otherwise by number.
    """
    past = (*old[:begun], *[Scene(0)] * (begun - len(old)))
    names = [scene.values.get("name") for scene in new]
    last = past[-1].values.get("name") if past else None
    return (*past, *new[names.index(last) + 1 if last is not None and last in names else begun :])


def said_otherwise(old: Sequence[Scene], new: Sequence[Scene]) -> dict[int, list[str]]:
    """The clips, counted from 1, of which two storyboards say something else, and the keys by which."""
    keys = {one.name: key for key, one in by_scene_key().items()}
    changed = {}
    for number in range(1, max(len(old), len(new)) + 1):
        before = old[number - 1].values if number <= len(old) else {}
        after = new[number - 1].values if number <= len(new) else {}
        if before != after:
            changed[number] = sorted(
                keys[name] for name in before.keys() | after.keys() if before.get(name) != after.get(name)
            )
    return changed


def check_storyboard(path: Path, scenes: Iterable[Scene], *, config: ModelConfig) -> None:
    """Raise UserError, with line numbers, for what this model cannot do."""
    two_experts, name = config.boundary is not None, config.name
    problems = []
    for scene in scenes:
        rules = {
            f"cut: true makes a clip of text alone, which {name} cannot; give a picture to cut to": (
                scene.values.get("cut") is True and config.model_type == "i2v"
            ),
            f"{name} has two experts: give lora_high and lora_low instead of lora": (
                scene.values.get("lora") and two_experts
            ),
            f"{name} has one expert: give lora instead of lora_high and lora_low": (
                (scene.values.get("lora_high") or scene.values.get("lora_low")) and not two_experts
            ),
            f"guidance: {name} has one expert and takes one number": (
                len(set(scene.values.get("sample_guide_scale", ()))) > 1 and not two_experts
            ),
        }
        problems += [(scene.line, text) for text, broken in rules.items() if broken]
        try:
            check_motion_amplitude(scene.values.get("motion_amplitude", 1.0), config)
        except UserError as error:
            problems.append((scene.line, str(error)))
    refuse(path, problems)


def refuse(path: Path, problems: Iterable[tuple[int, str]]) -> None:
    """Raise UserError for problems by their lines, if there are any: the first three and the number of the others."""
    distinct = sorted(set(problems))  # what is merged into several clips is one problem
    if distinct:
        shown = "; ".join(f"line {line}: {text}" for line, text in distinct[:SHOWN_PROBLEMS])
        more = f"; and {len(distinct) - SHOWN_PROBLEMS} more" if len(distinct) > SHOWN_PROBLEMS else ""
        raise UserError(f"{path}, {shown}{more}")
