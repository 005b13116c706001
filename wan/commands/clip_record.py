"""The record of a clip: every setting that made it, what it took, and what was installed."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from wan.configs import ModelConfig
from wan.options import Command, Settings, options_of
from wan.public import public_path
from wan.version import __version__

if TYPE_CHECKING:
    from wan.chain.plan import Plan
    from wan.types import Generation


@dataclass(frozen=True)
class Recorder:
    """Writes down the clips of one command, which was given these settings and makes them with this model."""

    command: Command
    settings: Settings
    config: ModelConfig
    offload: bool  # whether only the model in use was on the GPU

    def describe(self, made: Generation, source: str | None, plan: Plan | None = None) -> dict[str, Any]:
        """The sidecar of a clip: everything that made it, and what it took. `plan` is that of a continuation."""
        from wan.device.host import host_peak_gib

        request, config = made.request, self.config
        used = self._used(made, plan)
        return {
            "source": None if source is None else public_path(source),
            "prompt": request.prompt,
            "negative_prompt": request.negative,
            "seed": request.seed,
            "width": request.geometry.width,
            "height": request.geometry.height,
            "fps": str(made.clip.fps),
            "param_dtype": str(config.param_dtype).removeprefix("torch."),
            "t5_dtype": str(config.t5_dtype).removeprefix("torch."),
            **{
                one.record: used[one.name]
                for one in options_of(self.command)
                if one.record and (plan is not None or not one.continues)
            },
            **({} if plan is None else {"seam": made.seam, "dropped": made.dropped}),
            **({"memory": made.prompt_memory} if made.prompt_memory else {}),
            **made.notes,
            "seconds": {stage: round(taken, 3) for stage, taken in made.seconds.items()},
            "peak_gpu_gib": None if made.peak_gib is None else round(made.peak_gib, 3),
            "peak_host_gib": round(host_peak_gib(), 3),
            "versions": versions(),
        }

    def _used(self, made: Generation, plan: Plan | None) -> dict[str, Any]:
        """The settings of a clip as it was made, as JSON values: what was open is what the preset or model chose."""
        settings, config, request = self.settings, self.config, made.request
        sampling = request.sampling
        given = options_of(self.command)
        used = {one.name: one.kind.public(getattr(settings, one.name)) for one in given} | {
            "task": config.name,
            "size": settings.size or config.sizes[0],
            "frame_num": request.geometry.frames,
            "offload_model": self.offload,
            "sample_solver": sampling.solver,
            "sample_steps": sampling.steps,
            "sample_shift": sampling.shift,
            "sample_guide_scale": list(sampling.guidance),
            "guidance_interval": sampling.guidance_interval and list(sampling.guidance_interval),
            "cache": str(sampling.cache or "off"),
            "precision": config.low_precision or settings.precision,
            "vae_dtype": str(config.vae_dtype).removeprefix("torch."),
            "end_image": request.known.end is not None,
            "motion_amplitude": request.motion_amplitude,
        }
        if plan is not None:
            used |= {
                "custom_prompt": plan.prefix,
                "prompt_mode": plan.prompt_mode,
                "vlm_path": used["vlm_path"] if plan.described else None,
                "vlm_url": used["vlm_url"] if plan.described else None,
                "num_segments": plan.num_segments,
                "continuation": plan.context.mode,
                "context_frames": made.context_frames,
                "cut": plan.is_cut,
                "discard": plan.discard,
                "drift_correction": plan.drift_correction,
                "colour_carry": plan.colour_carry,
            }
        return used


def versions() -> dict[str, str]:
    """What is installed of everything that can change a result."""
    import torch

    # torch says which CUDA it was built for; its package's version does not
    installed = {"wan-continue": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers", "av", "pillow", "numpy"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "unknown"
    return installed
