"""What the model is fed for each way of knowing frames, built by hand."""

from __future__ import annotations

import torch

from wan.modules.conditioning import ImageChannels, KnownLatents, TextOnly

LATENTS = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
T = torch.tensor(613)


def test_text_only_passes_the_latents_on() -> None:
    latents, t = TextOnly().model_input(LATENTS, T)
    assert torch.equal(latents[0], LATENTS) and t.tolist() == [613]


def test_image_channels_put_the_mask_before_the_image_latents() -> None:
    image = torch.randn(2, 3, 4, 6)
    latents, t = ImageChannels.from_latents(image).model_input(LATENTS, T)
    assert latents.shape == (1, 2 + 4 + 2, 3, 4, 6) and t.tolist() == [613]
    assert torch.equal(latents[0, :2], LATENTS) and torch.equal(latents[0, 6:], image)
    mask = latents[0, 2:6]
    assert mask[:, 0].eq(1).all() and mask[:, 1:].eq(0).all()


def test_five_known_frames_mark_two_latent_frames() -> None:
    mask = ImageChannels.from_latents(torch.zeros(2, 3, 4, 6), known_frames=5).channels[:4]
    assert mask[:, :2].eq(1).all() and mask[:, 2:].eq(0).all()


def test_known_latents_are_placed_and_their_tokens_get_timestep_0() -> None:
    known = torch.full((2, 1, 4, 6), -1.0)
    condition = KnownLatents(known)
    latents, t = condition.model_input(LATENTS, T)
    assert torch.equal(latents[0, :, :1], known) and torch.equal(latents[0, :, 1:], LATENTS[:, 1:])
    assert t.view(3, 2, 3)[0].eq(0).all() and t.view(3, 2, 3)[1:].eq(613).all()
    assert torch.equal(condition.finish(LATENTS), latents[0])
