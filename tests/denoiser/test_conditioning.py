"""What the model is fed for each way of knowing frames, built by hand."""

from __future__ import annotations

import pytest
import torch

from wan.denoiser.conditioning import HeldImageChannels, ImageChannels, KnownLatents, TextOnly, carried
from wan.errors import UserError
from wan.settings import Context

LATENTS = torch.arange(2 * 5 * 4 * 6, dtype=torch.float32).view(2, 5, 4, 6)
T = torch.tensor(613)


def mask_of(condition: ImageChannels) -> list[list[float]]:
    """The four mask channels by latent frame; each is the same all over the picture."""
    mask = condition.channels[:4]
    assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))
    return [list(map(float, row)) for row in mask[:, :, 0, 0]]


def test_text_only_passes_the_latents_on() -> None:
    latents, t = TextOnly().model_input(LATENTS, T)
    assert torch.equal(latents[0], LATENTS) and t.tolist() == [613]


def test_image_channels_put_the_mask_before_the_image_latents() -> None:
    image = torch.randn(2, 5, 4, 6)
    condition = ImageChannels.from_latents(image)
    latents, t = condition.model_input(LATENTS, T)
    assert latents.shape == (1, 2 + 4 + 2, 5, 4, 6) and t.tolist() == [613]
    assert torch.equal(latents[0, :2], LATENTS) and torch.equal(latents[0, 6:], image)
    assert mask_of(condition) == [[1, 0, 0, 0, 0]] * 4
    assert condition.finish(LATENTS) is LATENTS


@pytest.mark.parametrize(("known", "row"), [(1, [1, 0, 0, 0, 0]), (5, [1, 1, 0, 0, 0]), (9, [1, 1, 1, 0, 0])])
def test_known_frames_mark_their_latent_frames(known: int, row: list[int]) -> None:
    assert mask_of(ImageChannels.from_latents(torch.zeros(2, 5, 4, 6), known)) == [row] * 4


def test_an_end_image_marks_the_last_pixel_frame_alone() -> None:
    mask = mask_of(ImageChannels.from_latents(torch.zeros(2, 5, 4, 6), 1, end=True))
    assert mask == [[1, 0, 0, 0, 0]] * 3 + [[1, 0, 0, 0, 1]]


def test_the_mask_is_the_official_one_for_any_set_of_known_frames() -> None:
    """The official construction: a flag per pixel frame, the first repeated four times, then folded by four."""
    for known, end in ((1, False), (5, False), (9, True), (17, False)):
        flags = torch.zeros(1, 17, 4, 6)
        flags[:, :known] = 1
        if end:
            flags[:, -1] = 1
        flags = torch.cat([flags[:, :1].repeat(1, 4, 1, 1), flags[:, 1:]], dim=1)
        expected = flags.view(1, 5, 4, 4, 6).transpose(1, 2)[0]
        mask = ImageChannels.from_latents(torch.zeros(2, 5, 4, 6), known, end=end).channels[:4]
        assert torch.equal(mask, expected)


def test_an_anchor_and_motion_are_followed_by_literal_zeros_and_only_the_anchor_is_marked() -> None:
    anchor, motion = torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4, 6)
    condition = ImageChannels.from_anchor(anchor, motion, 5)
    assert mask_of(condition) == [[1, 0, 0, 0, 0]] * 4
    image = condition.channels[4:]
    assert torch.equal(image[:, :1], anchor) and torch.equal(image[:, 1:2], motion)
    assert image[:, 2:].eq(0).all() and image.shape == (2, 5, 4, 6)


@pytest.mark.parametrize(("known", "end"), [(1, False), (5, False), (1, True)])
def test_an_amplitude_drives_only_what_is_free_away_from_the_first_frame(known: int, end: bool) -> None:
    image = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(known)) * 2
    plain = ImageChannels.from_latents(image, known, end=end)
    driven = ImageChannels.from_latents(image, known, end=end, amplitude=1.5)
    assert torch.equal(driven.channels[:4], plain.channels[:4])
    moved = driven.channels[4:]
    free = range((known - 1) // 4 + 1, 4 if end else 5)
    for j in range(5):
        if j not in free:
            assert torch.equal(moved[:, j], image[:, j])
            continue
        away = image[:, j] - image[:, 0]
        expected = image[:, 0] + (away - away.mean()) * 1.5 + away.mean()
        torch.testing.assert_close(moved[:, j], expected.clamp(-6, 6))
        # half again as far from the first frame, and as light as before
        if expected.abs().max() < 6:
            assert float((moved[:, j] - image[:, 0]).std() / away.std()) == pytest.approx(1.5)
            assert float(moved[:, j].mean()) == pytest.approx(float(image[:, j].mean()), abs=1e-5)
    assert torch.equal(plain.channels[4:], image)


def test_an_amplitude_leaves_no_latent_beyond_what_a_vae_makes() -> None:
    image = torch.full((2, 3, 4, 6), 5.0)
    image[:, 1, 0, 0] = -5.9
    assert float(ImageChannels.from_latents(image, amplitude=1.5).channels[4:].abs().max()) == 6.0


def test_held_frames_are_shown_at_the_noise_level_of_the_others_and_come_out_clean() -> None:
    known, noise = torch.randn(2, 2, 4, 6), torch.randn(2, 5, 4, 6)
    plain = ImageChannels.from_latents(torch.randn(2, 5, 4, 6), 5)
    condition = HeldImageChannels.hold(plain, known, noise, 1000)
    latents, t = condition.model_input(LATENTS, T)
    torch.testing.assert_close(latents[0, :2, :2], (1 - 0.613) * known + 0.613 * noise[:, :2])
    assert torch.equal(latents[0, :2, 2:], LATENTS[:, 2:]) and torch.equal(latents[0, 2:], plain.channels)
    assert t.tolist() == [613]
    assert torch.equal(condition.finish(LATENTS), torch.cat([known, LATENTS[:, 2:]], dim=1))
    pure, _ = condition.model_input(LATENTS, torch.tensor(1000))
    assert torch.equal(pure[0, :2, :2], noise[:, :2])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_known_latents_are_placed_and_their_tokens_get_timestep_0(slots: int) -> None:
    known = torch.full((2, slots, 4, 6), -1.0)
    condition = KnownLatents(known)
    latents, t = condition.model_input(LATENTS, T)
    assert torch.equal(latents[0, :, :slots], known) and torch.equal(latents[0, :, slots:], LATENTS[:, slots:])
    assert t.tolist() == [[0.0] * slots + [613.0] * (5 - slots)]
    assert torch.equal(condition.finish(LATENTS), latents[0])


def test_a_context_is_chosen_from_what_is_said_of_it() -> None:
    assert Context.choose() == Context("last_frame", 1)
    assert Context.choose("tail") == Context.choose(None, 5) == Context("tail", 5)
    assert Context.choose("svi2pro") == Context("svi2pro", 5)
    assert Context("tail", 13).within(11) == Context("tail", 9) and Context("tail", 5).within(3) == Context("tail", 1)
    for mode, frames in (("tail", 4), ("tail", 21), ("last_frame", 5), ("svi2pro", 9), ("head", 1), ("tail", 0)):
        with pytest.raises(UserError):
            Context.choose(mode, frames)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 1.0], [0.0, 0.5, 1.0], [0, 5 / 32, 0.5, 27 / 32, 1]])
def test_known_latents_take_on_other_colours_little_by_little(weights: list[float]) -> None:
    latents, plain = torch.randn(2, len(weights), 4, 6), torch.randn(2, len(weights), 4, 6)
    led = carried(latents, plain, plain + 3)
    torch.testing.assert_close(led, latents + 3 * torch.tensor(weights)[None, :, None, None])


def test_a_change_of_colours_in_one_place_is_smoothed_over_its_neighbours() -> None:
    plain = torch.zeros(1, 1, 5, 5)
    graded = plain.clone()
    graded[0, 0, 2, 2], graded[0, 0, 0, 0] = 9, 0
    led = carried(plain, plain, graded)[0, 0]
    assert torch.equal(led[1:4, 1:4], torch.ones(3, 3)) and led.sum() == 9
    graded[0, 0, 2, 2], graded[0, 0, 0, 0] = 0, 9  # at an edge the picture is taken to go on
    assert carried(plain, plain, graded)[0, 0, 0, 0] == 4
