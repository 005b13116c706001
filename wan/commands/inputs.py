"""Settings -> the task, the size and the files that they name, checked before PyTorch is imported."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.chain.storyboard import Scene
from wan.chain.storyboard_file import read_storyboard
from wan.commands.examples import example_of
from wan.commands.flags import check_video_settings
from wan.commands.lines import PROGRESS
from wan.configs import ModelConfig, parse_size, preset_named
from wan.errors import UserError
from wan.kinds import Picture, Video
from wan.options import EXPERT_OF_DIT, EXPERT_OF_LORA, OPTIONS, PART_OF_FILE, V2V_TASKS, Settings
from wan.settings import LoraFile, Sampling

if TYPE_CHECKING:
    from wan.comfy import ComfyFolder
    from wan.sampling_rules import SamplingRules

log = logging.getLogger(__name__)


def take_from(
    comfy: ComfyFolder, settings: Settings, config: ModelConfig, at_hand: Container[str]
) -> tuple[Settings, Path | None]:
    """The settings with the files of the parts that are not at hand, each of which is said; and the tokenizer's."""
    from wan.comfy import as_settings

    experts = ["model"] if config.boundary is None else ["high_noise_model", "low_noise_model"]
    if "model" in at_hand:  # which serves both
        experts = []
    wanted = [part for part in (*experts, "vae", "text_encoder", "tokenizer") if part not in at_hand]
    distilled = preset_named(settings.preset).distilled and not any(lora_files(settings).values())
    files = list(comfy.find(wanted, config.in_channels, config.z_dim, distilled))
    for one in files:
        logging.getLogger(PROGRESS).info(one.line)
    tokenizer = next((one.file for one in files if one.part == "tokenizer"), None)
    return dataclasses.replace(settings, **as_settings(files)), tokenizer


# The settings that a pipeline is built from. LoRAs come and go in its weights.
_OF_MODELS = (
    *("task", "ckpt_dir", "comfy_dir", *EXPERT_OF_DIT, *PART_OF_FILE, "precision", "vae_dtype"),
    *("convert_model_dtype", "t5_cpu", "t5_fsdp", "dit_fsdp", "compile", "vram", "host_memory", "share_weights"),
    *("vlm_path", "vlm_url", "vlm_device", "vlm_trust_remote_code", "video_reader"),
)


def model_settings(settings: Settings) -> tuple[Any, ...]:
    """The values of all settings that a pipeline is built from: where they are equal, it may be the same."""
    return tuple(getattr(settings, name) for name in _OF_MODELS)


def sampling_of(settings: Settings, rules: SamplingRules) -> Sampling:
    """How a clip is sampled, as the settings say. Raises UserError."""
    return rules.merge(
        settings.sample_steps,
        settings.sample_shift,
        settings.sample_solver,
        settings.sample_guide_scale,
        guidance_interval=settings.guidance_interval,
        cache=settings.cache,
        preset=settings.preset,
    )


def read_scenes(settings: Settings) -> tuple[Scene, ...]:
    """What a storyboard, or prompts for some clips in place of one, say of each clip. Raises UserError."""
    if settings.storyboard:
        return read_storyboard(Path(settings.storyboard))
    prompts = dict(settings.prompt_for)
    numbers = range(1, max(prompts, default=0) + 1)
    return tuple(Scene(0, {"prompt": prompts[number]} if number in prompts else {}) for number in numbers)


def read_ends(settings: Settings) -> tuple[str, ...]:
    """The picture files of `end_images`, which are whole, in the order of their names. Raises UserError."""
    if settings.end_images is None:
        return ()
    try:
        files = [file for file in os.scandir(settings.end_images) if not file.name.startswith(".")]
    except OSError as error:
        raise UserError(f"`end_images` {settings.end_images!r} cannot be read: {error.strerror}") from error
    if not files:
        raise UserError(f"`end_images` {settings.end_images!r} holds no pictures")
    for file in files:
        media.read_image(file.path)
    return tuple(file.path for file in sorted(files, key=lambda file: _by_numbers(file.name)))


def _by_numbers(name: str) -> list[Any]:
    """A key for names in which 2 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.casefold())]


def or_example(settings: Settings, task: str) -> Settings:
    """What the task makes when it is given neither a prompt nor an input, as in Wan2.2's script; this is said."""
    if settings.prompt is not None or settings.video is not None or settings.image is not None:
        return settings
    example: Mapping[str, Any] = example_of(task)
    for name, file in example.items():
        if name != "prompt" and not Path(file).is_file():
            raise UserError(f"`task` {task} needs `{name}`; its example lies in a clone of the project, and not here")
    shown = ", ".join(f"`{name}` {value!r}" for name, value in example.items())
    log.warning("neither a prompt nor an input is given: this runs the example of %s, %s", task, shown)
    return dataclasses.replace(settings, **example)


def choose_task(settings: Settings, kind: tuple[int, int]) -> str:
    """The task, told from the checkpoint's (experts, input channels) unless it is given. Raises UserError."""
    if settings.task is not None:
        return settings.task
    by_kind = {(2, 36): ("i2v-A14B", "v2v-14B"), (1, 48): ("ti2v-5B", "v2v-5B"), (2, 16): ("t2v-A14B", "t2v-A14B")}
    by_kind |= {(1, channels): by_kind[2, channels] for channels in (36, 16)}  # one denoiser that serves both experts
    given = [f"`{name}` {file}" for name in EXPERT_OF_DIT if (file := getattr(settings, name))]
    folder = "ckpt_dir" if settings.ckpt_dir is not None else "comfy_dir"
    where = " and ".join(given) or f"`{folder}` {getattr(settings, folder)}"
    if kind not in by_kind:
        raise UserError(
            f"no task is for {kind[0]} denoiser(s) with {kind[1]} input channels, which {where} gives; give the "
            "files of I2V-A14B (two), T2V-A14B (two) or TI2V-5B (one)"
        )
    if settings.video is not None and kind[1] == 16:
        raise UserError(f"{where} is T2V-A14B, which takes no `video`; give the files of I2V-A14B or TI2V-5B")
    return by_kind[kind][settings.video is not None]


def check_task(settings: Settings, task: str) -> None:
    """Raise UserError for inputs that the task does not take or lacks."""
    if settings.video is not None and task not in V2V_TASKS:
        raise UserError(f"`task` {task} takes no `video`; use `task` v2v-14B or v2v-5B with their checkpoints")
    if settings.video is None and task in V2V_TASKS:
        raise UserError(f"`task` {task} needs `video`, the clip to continue")
    if settings.image is not None and task not in ("i2v-A14B", "ti2v-5B"):
        raise UserError(f"`task` {task} takes no `image`")
    if settings.image is None and task == "i2v-A14B":
        raise UserError("`task` i2v-A14B needs `image`, the first frame")
    if settings.video is None:
        check_video_settings(settings)
        if settings.prompt is None:
            raise UserError(f"`task` {task} needs `prompt`")


def choose_size(given: str | None, config: ModelConfig, folder: Path) -> tuple[int, int]:
    """(width, height) of `size`, which must be on the task's list. Raises UserError."""
    size = given or config.sizes[0]
    parse_size(size)
    if size not in config.sizes:
        raise UserError(f"`size` {size} is not one of {', '.join(config.sizes)} that {config.name} in {folder} takes")
    return parse_size(size)


def with_dtypes(config: ModelConfig, settings: Settings) -> ModelConfig:
    """The row with what `vae_dtype` and `precision` say in it."""
    if settings.vae_dtype:
        config = config.variant(vae_dtype=settings.vae_dtype)
    if settings.precision == "bf16":
        return config.variant(param_dtype="bfloat16", low_precision=None)
    return config.variant(low_precision=settings.precision or config.low_precision)


def check_files(settings: Settings) -> None:
    """Raise UserError for an input that cannot be read or an output that cannot be written, before any download."""
    for one in OPTIONS.values():
        file = getattr(settings, one.name)
        if file and isinstance(one.kind, Video):
            media.probe(file)
        elif file and isinstance(one.kind, Picture):
            media.read_image(file)
    if settings.save_file:
        media.check_output(settings.save_file)


def dit_files(settings: Settings) -> dict[str, Path]:
    """The denoisers that come from a file of their own, by expert."""
    given = {expert: getattr(settings, name) for name, expert in EXPERT_OF_DIT.items()}
    return {expert: Path(file).expanduser() for expert, file in given.items() if file is not None}


def part_files(settings: Settings) -> dict[str, Path]:
    """The VAE and the text encoder that come from a file of their own."""
    given = {part: getattr(settings, name) for name, part in PART_OF_FILE.items()}
    return {part: Path(file).expanduser() for part, file in given.items() if file is not None}


def lora_files(settings: Settings) -> dict[str, tuple[LoraFile, ...]]:
    """The LoRA files by the expert that they are for."""
    given = {expert: getattr(settings, name) for name, expert in EXPERT_OF_LORA.items()}
    return {expert: tuple(LoraFile.parse(text) for text in texts) for expert, texts in given.items() if texts}
