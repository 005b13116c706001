"""`WanT2V`: text-to-video with the A14B experts."""

from __future__ import annotations

from torch import Tensor

from wan.denoiser.conditioning import Condition, TextOnly
from wan.device.placement import Placement
from wan.experts import TwoExperts
from wan.settings import draw_seed
from wan.types import KnownFrames, OnStep, Request


class WanT2V(TwoExperts):
    """Text to video. Attributes as in Wan2.2: `low_noise_model`, `high_noise_model`, `vae`, `text_encoder`."""

    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """A video float32 [3, T, H, W] in [-1, 1] of `size` (width, height). Raises UserError."""
        request = Request(
            input_prompt,
            n_prompt or self.config.sample_neg_prompt,
            KnownFrames(),
            self.geometry(*size, frame_num),
            self.rules.merge(sampling_steps, shift, sample_solver, guide_scale),
            draw_seed(seed),
        )
        return self.video(request, offload=offload_model, on_step=on_step)  # type: ignore[no-any-return]

    def condition(self, request: Request, noise: Tensor, placement: Placement) -> Condition:
        return TextOnly()
