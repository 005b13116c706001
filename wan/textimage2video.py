"""`WanTI2V`: text- and image-to-video with the 5B model, its size rule and preprocessing."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan.denoiser.conditioning import Condition, KnownLatents, TextOnly, carried
from wan.device.placement import Placement
from wan.errors import UserError
from wan.experts import OneExpert
from wan.pictures import as_shown, cover
from wan.settings import draw_seed
from wan.sizes import best_size, continued_size
from wan.types import Frame, KnownFrames, OnStep, Request, frame_size, image_to_frame


def preprocess(image: Frame, width: int, height: int) -> Tensor:
    """An image, or a frame [3, H, W] in [-1, 1], scaled to cover and centre-cropped: float32 [3, height, width].

    LANCZOS as in the official code. A frame that has the size already is taken as it is.
    """
    if isinstance(image, Tensor):
        if image.shape[1:] == (height, width):
            return image.float()
        planes = [Image.fromarray(plane.cpu().float().numpy()) for plane in image]  # mode F keeps the float levels
        covered = np.stack([np.asarray(cover(plane, width, height)) for plane in planes])
        return torch.from_numpy(covered).clamp(-1, 1)  # as the overshoot of an 8-bit image is
    return image_to_frame(cover(as_shown(image), width, height))


class WanTI2V(OneExpert):
    """Text or image to video. Attributes as in Wan2.2: `model`, `vae`, `text_encoder`."""

    def generate(
        self,
        input_prompt: str,
        img: Image.Image | None = None,
        size: tuple[int, int] = (1280, 704),
        max_area: int = 704 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """A video float32 [3, T, H, W] in [-1, 1]: from the image within `max_area`, or of `size` (width, height).

        Raises UserError.
        """
        if img is not None:
            size = best_size(*frame_size(img), max_area)
        request = Request(
            input_prompt,
            n_prompt or self.config.sample_neg_prompt,
            KnownFrames() if img is None else KnownFrames((img,)),
            self.geometry(*size, frame_num),
            self.rules.merge(sampling_steps, shift, sample_solver, guide_scale),
            draw_seed(seed),
        )
        return self.video(request, offload=offload_model, on_step=on_step)  # type: ignore[no-any-return]

    def t2v(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 704),
        frame_num: int = 121,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor:
        """`generate` without an image, under Wan2.2's name."""
        return self.generate(
            input_prompt,
            size=size,
            frame_num=frame_num,
            shift=shift,
            sample_solver=sample_solver,
            sampling_steps=sampling_steps,
            guide_scale=guide_scale,
            n_prompt=n_prompt,
            seed=seed,
            offload_model=offload_model,
        )

    def i2v(
        self,
        input_prompt: str,
        img: Image.Image,
        max_area: int = 704 * 1280,
        frame_num: int = 121,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor:
        """`generate` with an image, under Wan2.2's name."""
        return self.generate(
            input_prompt,
            img,
            max_area=max_area,
            frame_num=frame_num,
            shift=shift,
            sample_solver=sample_solver,
            sampling_steps=sampling_steps,
            guide_scale=guide_scale,
            n_prompt=n_prompt,
            seed=seed,
            offload_model=offload_model,
        )

    def fit(self, width: int, height: int, max_area: int) -> tuple[int, int]:
        """The size of a continuation of a width x height video -> (width, height)."""
        return continued_size("ti2v", width, height, max_area)

    def frame_for(self, image: Frame, width: int, height: int) -> Tensor:
        """A picture of a video that is continued in width x height: cropped to that aspect, float32 [3, height, width].

        A frame of that size is returned as it is, bit for bit.
        """
        return preprocess(image, width, height)

    def condition(self, request: Request, noise: Tensor, placement: Placement) -> Condition:
        known, (_, height, width) = request.known, request.geometry.size
        if known.anchor is not None:
            raise UserError(f"{self.config.name} takes no anchor picture; that is A14B's")
        if not known.leading and known.end is None:
            return TextOnly()
        leading, end = noise[:, :0], None
        if known.leading:
            pixels = torch.stack([preprocess(frame, width, height) for frame in known.leading], dim=1)
            leading = self.shared_vae.encode(pixels, placement)
            if known.graded is not None:
                leading = carried(leading, leading, self.shared_vae.encode(known.graded, placement))
        if known.end is not None:
            # a latent frame of four, which all show it: one that is encoded alone is of another kind, the first
            still = preprocess(known.end, width, height)[:, None].repeat(1, 1 + self.config.vae_stride[0], 1, 1)
            end = self.shared_vae.encode(still, placement)[:, -1:]
        return KnownLatents(leading, end)
