"""What a clip is made with, as JSON values, and the digest that tells whether a finished clip still counts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wan.chain.plan import LaterPicture, Plan
from wan.files import readable, sampled_digest
from wan.handoff import identity
from wan.options import by_fingerprint_key
from wan.public import public_url
from wan.types import Frame

if TYPE_CHECKING:
    from wan.configs import ModelConfig
    from wan.continuation import VideoContinuation


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short digest of JSON values, the same for equal ones."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(key: str, old: Any, new: Any) -> str:
    """What two fingerprints say differently, in the words of the settings."""
    plain = {
        "parent": "another video or another `from_`",
        "checkpoint": "another checkpoint",
        "config": "another wan_config.json, `precision` or `vae_dtype`",
    }
    if key in plain:
        return plain[key]
    setting = " or ".join(f"`{one.name}`" for one in by_fingerprint_key().get(key, ()) if one.flag) or key
    before, now = ("not set" if value is None else repr(value) for value in (old, new))
    return f"{setting} {before}, now {now}"


def clip_settings(config: ModelConfig, continuation: VideoContinuation, plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """What each clip is made with, as JSON values, but for its seed and the clip before.

    The keys are those of the option table, and those of what is no option but changes a result.
    """
    models = _Models(config, continuation)
    clips = [{key: value(models, plan) for key, value in _FINGERPRINTED.items()} for plan in plans]
    plain: list[dict[str, Any]] = json.loads(json.dumps(clips))
    # what is not used is not said, so that a run stays the same run when there is more to be said
    return [{key: value for key, value in one.items() if value is not None or key in _ALWAYS_SAID} for one in plain]


class _Models:
    """What all clips of a run are made with; offloading changes no result and is no part of it."""

    def __init__(self, row: ModelConfig, continuation: VideoContinuation) -> None:
        self.row, self.continuation = row, continuation

    @functools.cached_property
    def checkpoint(self) -> str:
        checkpoint = self.continuation.checkpoint
        parts = (*checkpoint.experts.values(), checkpoint.vae, checkpoint.text_encoder)
        return _digest_of(file for weights in parts for file in weights.files)

    @functools.cached_property
    def config(self) -> str:
        # what only one option reads belongs to that option
        row = dataclasses.asdict(self.row).items()
        return fingerprint({name: str(value) for name, value in row if name != "mag_ratios"})

    @functools.cached_property
    def vlm(self) -> str:
        """A local VLM by its weights, any other by its name."""
        name = str(self.continuation.vlm.path or "")
        if self.continuation.vlm.url:
            return readable(f"{public_url(self.continuation.vlm.url)} {name}".strip())
        weights = sorted(Path(name).glob("*.safetensors"))
        return _digest_of(weights) if weights else readable(name)

    @property
    def ratios(self) -> str:
        return fingerprint({"mag_ratios": self.continuation.config.mag_ratios})


_FINGERPRINTED: Mapping[str, Callable[[_Models, Plan], Any]] = {
    "task": lambda models, plan: models.row.name,
    "checkpoint": lambda models, plan: models.checkpoint,
    "config": lambda models, plan: models.config,
    "convert_model_dtype": lambda models, plan: models.continuation.convert_model_dtype,
    "device": lambda models, plan: models.continuation.device.type,
    "text_device": lambda models, plan: models.continuation.text_device.type,
    "width": lambda models, plan: plan.geometry.width,
    "height": lambda models, plan: plan.geometry.height,
    "frames": lambda models, plan: plan.geometry.frames,
    "steps": lambda models, plan: plan.sampling.steps,
    "shift": lambda models, plan: plan.sampling.shift,
    "guidance": lambda models, plan: plan.sampling.guidance,
    "solver": lambda models, plan: plan.sampling.solver,
    "guidance_interval": lambda models, plan: plan.sampling.guidance_interval,
    "cache": lambda models, plan: plan.sampling.cache and str(plan.sampling.cache),
    "negative_prompt": lambda models, plan: plan.negative,
    "prompt": lambda models, plan: plan.prompt,
    "custom_prompt": lambda models, plan: plan.prefix,
    "num_segments": lambda models, plan: plan.num_segments if plan.described else None,
    "vlm": lambda models, plan: models.vlm if plan.described else None,
    "vlm_question": lambda models, plan: models.continuation.vlm.question if plan.described else None,
    "vlm_fallback": lambda models, plan: models.continuation.vlm.fallback if plan.described else None,
    "continuation": lambda models, plan: plan.context.mode if plan.context.mode != "last_frame" else None,
    "context_frames": lambda models, plan: plan.context.frames if plan.context.mode == "tail" else None,
    "anchor": lambda models, plan: picture_digest(plan.anchor),
    "end_image": lambda models, plan: (
        plan.end.digest if isinstance(plan.end, LaterPicture) else picture_digest(plan.end)
    ),
    "cut": lambda models, plan: plan.cut if isinstance(plan.cut, bool) else picture_digest(plan.cut),
    "mag_ratios": lambda models, plan: models.ratios if plan.sampling.uses("magcache") else None,
    "loras": lambda models, plan: (
        {name: [lora.as_json() for lora in files] for name, files in plan.loras.items()} or None
    ),
    "prompt_mode": lambda models, plan: plan.prompt_mode if plan.prompt_mode != "describe" else None,
    "motion_amplitude": lambda models, plan: plan.motion_amplitude if plan.motion_amplitude != 1 else None,
    "handoff": lambda models, plan: None if plan.handoff is None or plan.is_cut else identity(plan.handoff),
    "discard": lambda models, plan: plan.discard or None,
    "drift_correction": lambda models, plan: plan.drift_correction or None,
    "colour_carry": lambda models, plan: plan.colour_carry or None,
    "best_of": lambda models, plan: plan.best_of if plan.best_of > 1 else None,
    "video_reader": lambda models, plan: (
        "decord" if plan.described and models.continuation.video_reader == "decord" else None
    ),
    "vlm_trust_remote_code": lambda models, plan: (
        (plan.described and models.continuation.vlm.trust_remote_code) or None
    ),
}
_ALWAYS_SAID = {"prompt", "num_segments", "vlm", "vlm_question"}  # 0.1.0 did
_OF_THE_CHAIN = {"parent", "seed", "take"}  # `Inventory` adds them, clip by clip
_NO_OPTION = {"device", "negative_prompt", "mag_ratios"}

if missing := set(by_fingerprint_key()) ^ (set(_FINGERPRINTED) - _NO_OPTION | _OF_THE_CHAIN):
    raise TypeError(f"keys of the fingerprint that only the option table or only this file knows: {sorted(missing)}")


def _digest_of(files: Iterable[Path]) -> str:
    return fingerprint({"files": [(file.name, sampled_digest(file)) for file in files]})


def picture_digest(picture: Frame | None) -> str | None:
    """A short digest of a picture."""
    if picture is None:
        return None
    array = picture.numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    return fingerprint({"shape": array.shape, "pixels": hashlib.sha256(array.tobytes()).hexdigest()})
