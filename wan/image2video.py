"""`WanI2V`: image-to-video with the A14B experts, its size rule and preprocessing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wan.denoiser.conditioning import Condition, HeldImageChannels, ImageChannels, carried, latent_frames
from wan.device.placement import Placement
from wan.experts import TwoExperts
from wan.pictures import as_shown
from wan.settings import draw_seed
from wan.sizes import continued_size, official_size
from wan.types import Frame, KnownFrames, OnStep, Request, frame_size, image_to_frame


def preprocess(image: Frame, width: int, height: int) -> Tensor:
    """An image, or a frame [3, H, W] in [-1, 1], stretched to float32 [3, height, width].

    Bicubic without antialiasing and without clamping its overshoot, as in the official code, which changes nothing of
    a picture that has the size already.
    """
    frame = (image if isinstance(image, Tensor) else image_to_frame(image)).float().cpu()
    if frame.shape[1:] == (height, width):
        return frame
    return F.interpolate(frame[None], size=(height, width), mode="bicubic")[0]


def crop_to_aspect(image: Frame, width: int, height: int) -> Frame:
    """The middle of an image, or of a frame [3, H, W], with the aspect of width x height; cut to whole pixels."""
    image = image if isinstance(image, Tensor) else as_shown(image)  # turned before it is cut
    here = frame_size(image)
    wide, high = min(here[0], round(here[1] * width / height)), min(here[1], round(here[0] * height / width))
    left, top = (here[0] - wide) // 2, (here[1] - high) // 2
    if isinstance(image, Tensor):
        return image[:, top : top + high, left : left + wide]
    return image if (wide, high) == here else image.crop((left, top, left + wide, top + high))


class WanI2V(TwoExperts):
    """Image to video. Attributes as in Wan2.2: `low_noise_model`, `high_noise_model`, `vae`, `text_encoder`."""

    def generate(
        self,
        input_prompt: str,
        img: Image.Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        *,
        last_image: Image.Image | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """A video float32 [3, T, H, W] in [-1, 1] that starts with the image, and ends with `last_image` if given.

        Its size is the image's aspect within `max_area` by the official rule; `guide_scale` is one number or
        (low noise, high noise). Raises UserError.
        """
        width, height = official_size(*frame_size(img), max_area)
        request = Request(
            input_prompt,
            n_prompt or self.config.sample_neg_prompt,
            KnownFrames((img,), end=last_image),
            self.geometry(width, height, frame_num),
            self.rules.merge(sampling_steps, shift, sample_solver, guide_scale),
            draw_seed(seed),
        )
        return self.video(request, offload=offload_model, on_step=on_step)  # type: ignore[no-any-return]

    def fit(self, width: int, height: int, max_area: int) -> tuple[int, int]:
        """The size of a continuation of a width x height video -> (width, height)."""
        return continued_size("i2v", width, height, max_area)

    def frame_for(self, image: Frame, width: int, height: int) -> Tensor:
        """A picture of a video that is continued in width x height: cropped to that aspect, float32 [3, height, width].

        A frame of that size is returned as it is, bit for bit.
        """
        return preprocess(crop_to_aspect(image, width, height), width, height)

    def condition(self, request: Request, noise: Tensor, placement: Placement) -> Condition:
        known, (frames, height, width) = request.known, request.geometry.size
        leading = [preprocess(frame, width, height) for frame in known.leading]
        if known.anchor is not None:
            anchor = self.shared_vae.encode(preprocess(known.anchor, width, height)[:, None], placement)
            motion = anchor[:, :0]
            if leading:
                plain = motion = self.shared_vae.encode(torch.stack(leading, dim=1), placement)[:, -1:]
            if known.motion is not None:
                motion = known.motion.to(anchor)
            if known.graded is not None:
                motion = carried(motion, plain, self.shared_vae.encode(known.graded, placement)[:, -1:])
            end = None
            if known.end is not None:
                end = self.shared_vae.encode(preprocess(known.end, width, height)[:, None], placement)
            return ImageChannels.from_anchor(anchor, motion, noise.shape[1], end)
        pixels = torch.zeros(3, frames, height, width, device=self.device)
        pixels[:, : len(leading)] = torch.stack(leading, dim=1).to(self.device)
        if known.end is not None:
            pixels[:, -1] = preprocess(known.end, width, height).to(self.device)
        latents = self.shared_vae.encode(pixels, placement)
        # the VAE is causal: these are the latents of the known frames alone
        held = latents[:, : latent_frames(len(leading))]
        if known.graded is not None:
            held = carried(held, held, self.shared_vae.encode(known.graded, placement))
            latents = torch.cat([held, latents[:, held.shape[1] :]], dim=1)
        channels = ImageChannels.from_latents(
            latents, len(leading), end=known.end is not None, amplitude=request.motion_amplitude
        )
        if len(leading) == 1:
            return channels
        return HeldImageChannels.hold(channels, held, noise, self.config.num_train_timesteps)
