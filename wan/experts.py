"""Models with one denoiser and with two, and the class of a task."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from wan.pipeline import Pipeline

if TYPE_CHECKING:
    from wan.denoiser.model import WanModel
    from wan.denoiser.sampling import Expert
    from wan.vae.vae import WanVAE


class OneExpert(Pipeline):
    """A model with one denoiser (5B)."""

    @property
    def vae_class(self) -> type[WanVAE]:
        from wan.vae.vae import Wan2_2_VAE

        return Wan2_2_VAE

    @property
    def model(self) -> WanModel:
        """The denoiser."""
        model: WanModel = self.models["model"]
        return model

    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        from wan.denoiser.sampling import Expert

        return [Expert("denoise", "model", lambda: self.model, guidance[0], 0)]


class TwoExperts(Pipeline):
    """A model with a high-noise and a low-noise denoiser (A14B)."""

    @property
    def low_noise_model(self) -> WanModel:
        """The denoiser for the schedule below the boundary."""
        model: WanModel = self.models["low_noise_model"]
        return model

    @property
    def high_noise_model(self) -> WanModel:
        """The denoiser for the schedule from the boundary up."""
        model: WanModel = self.models["high_noise_model"]
        return model

    def experts(self, guidance: tuple[float, float]) -> list[Expert]:
        from wan.denoiser.sampling import Expert

        low, high = guidance
        boundary, lowest = self.config.lowest_timesteps
        return [
            Expert("high noise", "high_noise_model", lambda: self.high_noise_model, high, boundary),
            Expert("low noise", "low_noise_model", lambda: self.low_noise_model, low, lowest),
        ]


# Which module has the pipeline of a task, and under which name.
_CLASSES = {
    "t2v-A14B": ("wan.text2video", "WanT2V"),
    "i2v-A14B": ("wan.image2video", "WanI2V"),
    "ti2v-5B": ("wan.textimage2video", "WanTI2V"),
    "v2v-14B": ("wan.video2video", "WanV2V"),
    "v2v-5B": ("wan.wan22video2video5B", "WanV2V5B"),
}


def pipeline_class(task: str) -> type[Pipeline]:
    """The class of a task's pipeline, by the task's name in `WAN_CONFIGS`."""
    home, name = _CLASSES[task]
    pipeline: type[Pipeline] = getattr(import_module(home), name)
    return pipeline
