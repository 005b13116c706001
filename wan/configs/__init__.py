"""The models by task name, the sizes they take, and what a checkpoint folder may declare about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wan.configs.presets import PRESETS, Preset, preset_named
from wan.configs.rows import DTYPES, ModelConfig, i2v_A14B, t2v_A14B, ti2v_5B, v2v_5B, v2v_14B
from wan.errors import UserError
from wan.foreign import read_json

__all__ = [
    "DTYPES",
    "MAX_AREA_CONFIGS",
    "PRESETS",
    "SIZE_CONFIGS",
    "SUPPORTED_SIZES",
    "WAN_CONFIGS",
    "ModelConfig",
    "Preset",
    "config_for",
    "i2v_A14B",
    "parse_size",
    "preset_named",
    "t2v_A14B",
    "ti2v_5B",
    "v2v_14B",
    "v2v_5B",
]

DECLARATION = "wan_config.json"


def parse_size(text: str) -> tuple[int, int]:
    """ "width*height" -> (width, height) in pixels. Raises UserError on anything else."""
    width, star, height = text.partition("*")
    few = len(text) <= 20  # int() takes some thousand digits and no more
    if not (few and star and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"size must look like 1280*720 (width*height), {text[:40]!r} does not")
    return int(width), int(height)


WAN_CONFIGS: Mapping[str, ModelConfig] = MappingProxyType(
    {row.name: row for row in (t2v_A14B, i2v_A14B, ti2v_5B, v2v_14B, v2v_5B)}
)
SUPPORTED_SIZES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: row.sizes for name, row in WAN_CONFIGS.items()}
)
SIZE_CONFIGS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {size: parse_size(size) for row in WAN_CONFIGS.values() for size in row.sizes}
)
MAX_AREA_CONFIGS: Mapping[str, int] = MappingProxyType(
    {size: width * height for size, (width, height) in SIZE_CONFIGS.items()}
)


def config_for(task: str, checkpoint_dir: str | Path) -> ModelConfig:
    """The row of `task` with what the checkpoint folder declares about itself in `wan_config.json`, if it has one.

    The file is a JSON object of row fields, for checkpoints that are not the released ones: `sizes`, `frame_num`,
    `sample_fps`, `sample_steps`, `sample_shift`, `sample_guide_scale`, `boundary`, `vae_mean`, `vae_std`, `mag_ratios`
    (a list by expert, from high noise to low), and the dtypes by name. Raises UserError when the file is not such an
    object.
    """
    row = WAN_CONFIGS[task]
    path = Path(checkpoint_dir) / DECLARATION
    if not path.is_file():
        return row
    declared = read_json(path)
    if {"vae_mean", "vae_std"} & declared.keys():  # other latents are another model, of which no magnitudes are known
        row = row.variant(mag_ratios=())
    return row.variant(**{key: _parse(path, key, value) for key, value in declared.items()})


def _is_number(value: Any) -> bool:
    # JSON has numbers of any length, and Python's reader takes NaN and Infinity for some
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _ratios(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(item) and item > 0 for item in value)


def _parse(path: Path, key: str, value: Any) -> Any:
    """One declared field in the type of the row. Raises UserError with the field's name."""
    if key == "sizes" and isinstance(value, list) and value and all(isinstance(size, str) for size in value):
        for size in value:
            parse_size(size)
        return tuple(value)
    whole = _is_number(value) and isinstance(value, int)
    if key in ("sample_fps", "sample_steps") and whole and 0 < value <= 1000:
        return value
    if key == "frame_num" and whole and 0 < value <= 4093 and value % 4 == 1:
        return value
    if key == "sample_shift" and _is_number(value) and value > 0:
        return float(value)
    if key == "boundary" and _is_number(value) and 0 <= value <= 1:
        return float(value)
    if key == "sample_guide_scale" and _is_number(value):
        return float(value)
    numbers = isinstance(value, list) and bool(value) and all(_is_number(item) for item in value)
    if key == "vae_std" and numbers and min(value) <= 0:
        numbers = False  # latents are divided by them
    if (key == "sample_guide_scale" and numbers and len(value) == 2) or (key in ("vae_mean", "vae_std") and numbers):
        return tuple(float(item) for item in value)
    if key in ("param_dtype", "t5_dtype", "vae_dtype") and isinstance(value, str) and value in DTYPES:
        return value
    if key == "mag_ratios" and isinstance(value, list) and all(_ratios(by) for by in value):
        return tuple(tuple(float(item) for item in by) for by in value)
    known = "sizes, frame_num, sample_fps, sample_steps, sample_shift, sample_guide_scale, boundary, vae_mean, vae_std"
    more = "mag_ratios, param_dtype, t5_dtype, vae_dtype"
    raise UserError(f"{path}: {key} = {json.dumps(value)} is not understood or out of range (known: {known}, {more})")
