"""Stages `vae21` and `vae22`: the two video autoencoders, on whole clips."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import Tensor, nn

from training import scenes
from training.family import VAES, build_vae
from training.loop import Batch, Settings, half_precision, load, resume, train
from training.whole_clip import WholeClip, compile_pointwise

log = logging.getLogger(__name__)
AT_ONCE = 64  # clips that a trained VAE takes
YOUNG = 2000  # steps
HELD_OUT = 1 << 20  # seeds from here on are never trained on


def train_vae(name: str, settings: Settings) -> None:
    """Train one VAE; its checkpoint also holds the latents' statistics and the PSNR on held-out clips, in dB."""
    device, frames = settings.device, settings.frames or scenes.FRAMES
    torch.manual_seed(settings.seed)
    model = build_vae(VAES[name])
    if not VAES[name].nested:
        let_through(model)
    vae = WholeClip(model).to(device)
    progress = resume(name, vae.vae, settings)
    imported = progress.losses is not None and not progress.steps
    before = (vae.vae.encoder, vae.vae.quant_conv) if settings.decoder_only else ()
    for module in before:
        module.requires_grad_(False)  # latents stay what they are, and so do the denoisers that know them
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        vae.channels_last()
        compile_pointwise()

    def loss_of(batch: Batch) -> Tensor:
        pixels = batch["pixels"]
        with half_precision(device):
            latents = vae.encode(pixels)
            # noise in proportion to each channel: what a denoiser leaves behind must not matter to the decoder
            spread = latents.detach().float().std((0, 2, 3, 4), keepdim=True)
            decoded = vae.decode(latents + spread * batch["level"] * torch.randn_like(latents))
        return reconstruction_loss(decoded.float(), pixels)

    train(
        name,
        vae.vae,
        loss_of,
        clips(settings, progress.steps, frames, 0 if imported else YOUNG - progress.steps),
        settings,
        progress,
        lambda: statistics(vae, device, scenes.FRAMES, 128 if device.type == "cuda" else 1),
    )


def let_through(vae: AutoencoderKLWan) -> None:
    """Initial weights for VAE 2.1, which has no way around its changes of size: pictures pass through from the start.

    The changes of size hand on averages, and the residual blocks begin as nothing. With the usual weights, brightness
    gets through first and takes every channel, and colours never come.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            if isinstance(module.conv_shortcut, nn.Conv3d):
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, WanResample):
            down, picture = module.mode.startswith("down"), module.resample[1].weight
            # halves look at 2 x 2 pixels of the picture, which is padded at its end, and at 2 frames; doubles at one
            _pass_on(picture, [(0, 0), (0, 1), (1, 0), (1, 1)] if down else [(1, 1)])
            if module.mode.endswith("3d"):
                _pass_on(module.time_conv.weight, [(1, 0, 0), (2, 0, 0)] if down else [(2, 0, 0)])


@torch.no_grad()
def _pass_on(weight: Tensor, taps: list[tuple[int, ...]]) -> None:
    """A convolution that hands on the sum of these taps, twice if it has twice as many channels."""
    outputs, inputs = weight.shape[:2]
    if outputs < inputs:
        passed = nn.init.orthogonal_(torch.empty(outputs, inputs)) * math.sqrt(inputs / outputs)
    else:
        passed = torch.eye(inputs).repeat(outputs // inputs, 1)
    nn.init.zeros_(weight)
    for tap in taps:
        at: tuple[int | slice, ...] = (slice(None), slice(None), *tap)
        weight[at] = passed / math.sqrt(len(taps))


def clips(settings: Settings, step: int, frames: int, young: int = 0) -> Iterator[Batch]:
    """Clips, three quarters of them crowds. Some turn grey: so does what tells the A14B which frames are known.

    In some clips the channels are turned round one by one, in many of the next `young` steps: colours are as common as
    brightness then, and no channel can be left for later.
    """
    generator, device = settings.generator(step), settings.device
    times = torch.arange(frames, device=device)
    crowds = settings.batch * 3 // 4
    for batch in scenes.stream(settings.batch - crowds, generator):
        known = 1 + 4 * torch.randint(0, 3, (settings.batch, 1), generator=generator, device=device)
        grey = torch.rand(settings.batch, 1, generator=generator, device=device) < 0.15
        shown = (times < known) | ~grey
        level = 0.1 * torch.rand(settings.batch, 1, 1, 1, 1, generator=generator, device=device)
        turned = torch.rand(settings.batch, 1, generator=generator, device=device) < (0.5 if young > 0 else 0.1)
        sign = 1 - 2 * turned * torch.randint(0, 2, (settings.batch, 3), generator=generator, device=device)
        pixels = torch.cat([batch.draw(times), scenes.crowd(crowds, generator).draw(times)])
        pixels = pixels * sign[:, :, None, None, None]
        young -= 1
        yield {"pixels": pixels * shown[:, None, :, None, None], "level": level}


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """How far pictures are apart, in value and in their differences along time, height and width.

    The squares count for as much as the rest near 41 dB: they are what an outline that melts costs.
    """
    error = decoded - pixels
    loss = error.abs().mean() + 40 * error.square().mean()
    for axis in (2, 3, 4):
        loss = loss + 0.5 * error.diff(dim=axis).abs().mean() if error.shape[axis] > 1 else loss
    return loss


@torch.no_grad()
def statistics(vae: WholeClip, device: torch.device, frames: int, count: int) -> dict[str, object]:
    """Mean and standard deviation of each latent channel, and the mean PSNR in dB, over held-out clips."""
    held_out = scenes.sample(count, torch.Generator(device).manual_seed(HELD_OUT))
    latents, quality = [], []
    for start in range(0, count, 8):
        pixels = held_out[start : start + 8].draw(torch.arange(frames, device=device))
        latents.append(vae.encode(pixels))
        quality.append(psnr(vae.decode(latents[-1]).clamp(-1, 1), pixels))
    values = torch.cat(latents).transpose(0, 1).flatten(1)
    return {
        "mean": values.mean(1).tolist(),
        "std": values.std(1).tolist(),
        "psnr": float(torch.cat(quality).mean()),
    }


def psnr(made: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip [B], for values in [-1, 1]."""
    return -10 * ((made - wanted) / 2).square().flatten(1).mean(1).clamp_min(1e-10).log10()


class Codec:
    """A trained VAE: pixels <-> normalised latents, in batches, not to be trained further."""

    def __init__(self, name: str, settings: Settings) -> None:
        state = load(settings.folder / f"{name}.pt", settings.device)
        model = build_vae(VAES[name])
        model.load_state_dict(state["weights"])
        self.vae = WholeClip(model.requires_grad_(False).eval()).to(settings.device)
        if settings.device.type == "cuda":
            self.vae.channels_last()
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(state["mean"], device=settings.device).view(shape)
        self.std = torch.tensor(state["std"], device=settings.device).view(shape)
        self.device = settings.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] -> float32 [B, z, F, h, w]."""
        with half_precision(self.device):
            latents = torch.cat([self.vae.encode(part).float() for part in torch.split(pixels, AT_ONCE)])
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, F, h, w] -> float32 pixels [B, 3, T, H, W], clamped."""
        with half_precision(self.device):
            parts = [self.vae.decode(part * self.std + self.mean).float() for part in torch.split(latents, AT_ONCE)]
        return torch.cat(parts).clamp(-1, 1)
