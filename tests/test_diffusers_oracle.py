"""Oracle: diffusers' own pipeline, given the official tables, noise and first frame, makes our latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.video_processor import VideoProcessor
from PIL import Image

from tests.support.golden import GOLDEN
from wan.image2video import preprocess as preprocess_14b
from wan.settings import Sampling
from wan.textimage2video import preprocess as preprocess_5b
from wan.types import Generation, KnownFrames, Request

STEPS, SHIFT = 4, 5.0


class OfficialTable(UniPCMultistepScheduler):  # type: ignore[misc]
    """The library's solver with the official sigmas; its pipeline asks for a number of steps only."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        base = np.linspace(float(np.float32(0.999)), 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device=device, sigmas=base)


def stock(model: Any) -> WanTransformer3DModel:
    """The same weights in the library's class."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    twin = WanTransformer3DModel(**config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@pytest.mark.parametrize("family", ["14b", "5b"])
def test_the_library_pipeline_makes_the_same_latents(family: str, i2v: Any, ti2v: Any) -> None:
    ours, preprocess = (i2v, preprocess_14b) if family == "14b" else (ti2v, preprocess_5b)
    image = Image.open(GOLDEN / family / "image.png").convert("RGB")
    low, high = (2.0, 4.0) if family == "14b" else (3.0, 3.0)
    geometry = ours.geometry(64, 32, 5)
    request = Request("a boat", "blurry", KnownFrames((image,)), geometry, Sampling(STEPS, SHIFT, (low, high)), seed=11)
    made: Generation = ours.run(request)

    common = {"tokenizer": None, "text_encoder": None, "image_encoder": None, "image_processor": None}
    scheduler = OfficialTable(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    if family == "14b":
        models = {"transformer": stock(ours.high_noise_model), "transformer_2": stock(ours.low_noise_model)}
        options: dict[str, Any] = {"boundary_ratio": ours.config.boundary, "expand_timesteps": False}
    else:
        models = {"transformer": stock(ours.model), "transformer_2": None}
        options = {"boundary_ratio": None, "expand_timesteps": True}
        ours.vae.model.register_to_config(latents_mean=ours.config.vae_mean, latents_std=ours.config.vae_std)
    pipeline = WanImageToVideoPipeline(vae=ours.vae.model, scheduler=scheduler, **models, **common, **options)
    pipeline.video_processor = VideoProcessor(do_resize=False, do_normalize=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        image=preprocess(image, 64, 32)[None],
        prompt_embeds=ours.text_encoder("a boat"),
        negative_prompt_embeds=ours.text_encoder("blurry"),
        height=32,
        width=64,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=high,
        guidance_scale_2=low if family == "14b" else None,
        latents=ours.noise(request)[None],
        output_type="latent",
    ).frames[0]
    # the library's float32 timestep sinusoid is what is left of a difference
    difference = float((latents - made.latents).norm() / made.latents.norm())
    assert difference < 1e-4
