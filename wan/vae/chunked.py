"""A clip through the library's Wan VAE in chunks of any length, with the results of one pass over all of it.

The library goes through a clip one latent frame at a time, and copies around every convolution: padding, earlier
frames, layouts. Here a chunk is as long as memory allows, activations stay in the channels-last layout that the
convolutions' kernels want, and the norm writes where the convolution reads, behind the two frames that it looks back
at. The modules and their weights are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from wan.detail import tell_detail
from wan.device.hardware import runs_triton
from wan.vae.bands import Band
from wan.vae.chunks import FIRST, PER_LATENT

LAYOUT = torch.channels_last_3d


def encode(vae: AutoencoderKLWan, pixels: Tensor, chunk: int, band: Band | None = None) -> Tensor:
    """Pixels [1, 3, T, H, W] in [-1, 1], T = 4n+1 -> the mode of the latents [1, z, n+1, h, w], not normalised.

    `chunk` is how many latent frames are computed at a time, at least one. All is computed in the weights' dtype, norms
    in float32. With a `band` each rank is given all pixels, computes its rows, and has all latents in the end. Raises
    OverflowError for numbers that are too large for that dtype.
    """
    through, chunk = ChunkedVae(band=band), max(1, chunk)
    pixels = patchify(pixels.to(_dtype(vae)), vae.config.patch_size or 1)
    if band is not None:
        pixels = band.mine(pixels)
    lengths = [FIRST + PER_LATENT * (chunk - 1)] + [PER_LATENT * chunk] * (pixels.shape[2] // PER_LATENT)
    parts, frames = [], 0
    for part in _chunks(pixels, lengths):
        parts.append(through.encoder(vae.encoder, part))
        frames += part.shape[2]
        tell_detail(f"{frames} of {pixels.shape[2]} frames")
    modes: Tensor = through.conv(vae.quant_conv, torch.cat(parts, dim=2)).chunk(2, dim=1)[0]
    _check([_finite(modes)], band)
    return modes if band is None else band.whole(modes)


def decode(
    vae: AutoencoderKLWan, latents: Tensor, chunk: int, home: torch.device | None = None, band: Band | None = None
) -> Tensor:
    """Latents [1, z, F, h, w], not normalised -> pixels float32 [1, 3, 4F-3, H, W], clamped to [-1, 1].

    `chunk` as above; 0 is 1 with what comes after the last doubling of frames, the widest part, by single frames.
    Pixels are put on `home`, by default where the latents are. With a `band` each rank is given all latents, computes
    its rows, and the first one has the pixels in the end, the others no frame. Raises OverflowError as above.
    """
    through = ChunkedVae(by_frame=chunk == 0, band=band)
    latents = through.conv(vae.post_quant_conv, latents.to(_dtype(vae)))
    frames, scale = 1 + PER_LATENT * (latents.shape[2] - 1), vae.config.scale_factor_spatial
    frames = frames if band is None or band.group.index == 0 else 0
    size = (1, 3, frames, *(side * scale for side in latents.shape[3:]))
    pixels, finite = HostCopy(torch.empty(size, dtype=torch.float32, device=home or latents.device)), []
    if band is not None:
        latents = band.mine(latents)
    for part in _chunks(latents, [max(1, chunk)] * latents.shape[2]):
        made = unpatchify(through.decoder(vae.decoder, part), vae.config.patch_size or 1)
        finite.append(_finite(made))
        made = made.float().clamp_(-1, 1)
        if band is not None:
            made = band.whole(made)
        if frames:
            pixels.put(made)
            tell_detail(f"{pixels.frames} of {frames} frames")
    _check(finite, band)
    return pixels.done()


class HostCopy:
    """Takes the pixels of one chunk after the other to where they are wanted.

    From a GPU to host memory they go while the next chunk is computed, through two locked buffers.
    """

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.frames = 0
        self.buffers: list[Tensor] = []
        self.waiting: tuple[Tensor, Tensor, torch.cuda.Event] | None = None

    def put(self, pixels: Tensor) -> None:
        """Pixels [1, 3, t, H, W] that come after those before."""
        place = self.whole[:, :, self.frames : self.frames + pixels.shape[2]]
        self.frames += pixels.shape[2]
        if not pixels.is_cuda or place.is_cuda:
            place.copy_(pixels)
            return
        buffer = self.buffers.pop(0) if len(self.buffers) == 2 else None
        if buffer is None or buffer.shape != pixels.shape:  # the first chunk is shorter
            buffer = _locked(pixels)
        buffer.copy_(pixels, non_blocking=True)
        event = torch.cuda.current_stream(pixels.device).record_event()
        self.buffers.append(buffer)
        self._land()
        self.waiting = place, buffer, event

    def done(self) -> Tensor:
        """All of them."""
        self._land()
        return self.whole

    def _land(self) -> None:
        if self.waiting is not None:
            place, buffer, event = self.waiting
            event.synchronize()
            place.copy_(buffer)
            self.waiting = None


def _locked(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _finite(x: Tensor) -> Tensor | None:
    """Whether numbers are finite, without waiting for it. Only float16 ends where this VAE's numbers still go."""
    return x.isfinite().all() if x.dtype == torch.float16 else None


def _check(finite: list[Tensor | None], band: Band | None) -> None:
    flags = [one for one in finite if one is not None]
    if not flags:
        return
    good = torch.stack(flags).all()
    if not (good if band is None else band.agrees(good)):
        raise OverflowError("numbers of the VAE are too large for float16")


class ChunkedVae:
    """What one pass remembers from chunk to chunk: the last frames that went into each convolution over time."""

    def __init__(self, by_frame: bool = False, band: Band | None = None) -> None:
        self.band = band
        self.before: dict[nn.Module, Tensor] = {}
        self.is_first = True  # the decoder's first chunk, whose first frame is not doubled
        self.by_frame = by_frame

    def encoder(self, network: Any, x: Tensor) -> Tensor:
        """Pixels -> moments of one chunk."""
        x = self.conv(network.conv_in, x)
        for part in network.down_blocks:
            if isinstance(part, WanResidualBlock):
                x = self.residual(part, x)
            elif isinstance(part, WanResample):
                x = self.resample(part, x)
            elif isinstance(part, WanAttentionBlock):
                x = self.attention(part, x)
            else:
                x = self.stage(part, x, part.downsampler)
        return self.ends(network, self.middle(network.mid_block, x))

    def decoder(self, network: Any, x: Tensor) -> Tensor:
        """Latents -> pixels of one chunk."""
        x = self.middle(network.mid_block, self.conv(network.conv_in, x))
        stages = []
        for part in network.up_blocks:
            upsamplers = getattr(part, "upsamplers", None)
            stages.append((part, upsamplers[0] if upsamplers else getattr(part, "upsampler", None)))
        late = 1 + max(index for index, (_, change) in enumerate(stages) if change and change.mode == "upsample3d")
        for part, change in stages[:late]:
            x = self.stage(part, x, change)
        parts = []
        for frames in torch.split(x, 1 if self.by_frame else x.shape[2], dim=2):  # all frames are there by now
            frames = frames.contiguous(memory_format=LAYOUT)
            for part, change in stages[late:]:
                frames = self.stage(part, frames, change)
            parts.append(self.ends(network, frames))
        self.is_first = False
        return torch.cat(parts, dim=2)

    def stage(self, stage: Any, x: Tensor, change: WanResample | None) -> Tensor:
        """Residual blocks and a change of size; in VAE 2.2 with a way around all of it."""
        around, whole = getattr(stage, "avg_shortcut", None), x
        for block in stage.resnets:
            x = self.residual(block, x)
        if change is not None:
            x = self.resample(change, x)
        if around is None:
            return x
        if not isinstance(around, DupUp3D):
            return x.add_(around(whole.contiguous()))
        if kernels := _kernels(x):
            x = x.contiguous(memory_format=LAYOUT)
            kernels.add_upsampled(x, whole, around.factor_t, around.factor_s)
            return x
        return x.add_(around(whole.contiguous(), first_chunk=self.is_first))

    def middle(self, middle: Any, x: Tensor) -> Tensor:
        first, *others = middle.resnets
        x = self.residual(first, x)
        for attention, block in zip(middle.attentions, others, strict=True):
            x = self.residual(block, self.attention(attention, x))
        return x

    def attention(self, attention: WanAttentionBlock, x: Tensor) -> Tensor:
        """Of each frame's places to all others of it."""
        if self.band is None:
            mixed: Tensor = attention(x)
        else:
            mixed = self.band.mine(attention(self.band.whole(x)))
        return mixed.contiguous(memory_format=LAYOUT)

    def residual(self, block: WanResidualBlock, x: Tensor) -> Tensor:
        short = x if isinstance(block.conv_shortcut, nn.Identity) else self.conv(block.conv_shortcut, x)
        if kernels := _kernels(x):  # they add the biases where a number is read anyway
            inner = self.conv(block.conv1, x, block.norm1, add_bias=False)
            inner = self.conv(block.conv2, inner, block.norm2, block.conv1.bias, add_bias=False)
            inner = inner.contiguous(memory_format=LAYOUT)
            kernels.add(inner, short, block.conv2.bias)
            return inner
        return self.conv(block.conv2, self.conv(block.conv1, x, block.norm1), block.norm2).add_(short)

    def ends(self, network: Any, x: Tensor) -> Tensor:
        return self.conv(network.conv_out, x, network.norm_out)

    def conv(self, conv: Any, x: Tensor, norm: Any = None, bias: Tensor | None = None, add_bias: bool = True) -> Tensor:
        """A causal convolution; if a norm is given, of its input plus that bias, normalised and activated."""
        width, _, height, _, behind, _ = conv._padding
        after = conv.bias if add_bias else None
        if norm is None and not behind and not (height and self.band):
            return F.conv3d(x, conv.weight, after, conv.stride, (0, height, width))
        shape = (*x.shape[:2], behind + x.shape[2], *x.shape[3:])
        whole = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
        now = whole[:, :, behind:]
        if norm is None:
            now.copy_(x)
        else:
            _normalise_and_activate(now, x, bias, norm.gamma)
        if behind:
            before = self.before.get(conv)
            whole[:, :, :behind] = 0 if before is None else before
            self.before[conv] = whole[:, :, -behind:].clone()
        if self.band is not None and height:
            whole, height = self.band.beside(whole, height, height), 0
        convolved: Tensor = F.conv3d(whole, conv.weight, after, conv.stride, (0, height, width))
        return convolved

    def resample(self, module: Any, x: Tensor) -> Tensor:
        """A change of height and width, and in some stages of the frame rate, which leaves the first frame alone."""
        if module.mode == "upsample3d":
            start = int(self.is_first)
            if x.shape[2] > start:
                both = self.conv(module.time_conv, x[:, :, start:]).chunk(2, dim=1)  # twice [1, C, F, h, w]
                shape = (*x.shape[:2], 2 * x.shape[2] - start, *x.shape[3:])
                doubled = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
                doubled[:, :, :start] = x[:, :, :start]
                for parity, frames in enumerate(both):
                    doubled[:, :, start + parity :: 2] = frames
                x = doubled
        x = _by_frame(x, module.resample, self.band)
        if module.mode != "downsample3d":
            return x
        before = self.before.get(module)
        self.before[module] = x[:, :, -1:].clone()
        if before is not None:
            x = torch.cat([before, x], dim=2)
        if x.shape[2] == 1:
            return x
        conv = module.time_conv
        halved = F.conv3d(x, conv.weight, conv.bias, conv.stride)
        return halved if before is not None else torch.cat([x[:, :, :1], halved], dim=2)


def _normalise_and_activate(out: Tensor, x: Tensor, bias: Tensor | None, gamma: Tensor) -> None:
    """RMS norm over the channels of [1, C, T, H, W] and a scale, in float32, then SiLU (source: the official code)."""
    if kernels := _kernels(x):
        kernels.norm_silu(out, x, bias, gamma.flatten())
        return
    assert bias is None
    out.copy_(F.silu(F.normalize(x.float(), dim=1) * (x.shape[1] ** 0.5 * gamma.float())))


def _kernels(x: Tensor) -> ModuleType | None:
    """Our kernels, where they run: Triton comes with PyTorch for CUDA, on Linux."""
    if not runs_triton(x.device):
        return None
    from wan.vae import kernels

    return kernels


def _by_frame(x: Tensor, change: nn.Sequential, band: Band | None) -> Tensor:
    """The two-dimensional layers of a change of size, on each frame of [1, C, T, H, W]."""
    before, conv = change[0], cast(nn.Conv2d, change[1])
    kernels = _kernels(x)
    grows = isinstance(before, nn.Upsample)
    if kernels and grows:
        frames = kernels.double_sides(x).transpose(1, 2).flatten(0, 1)
    else:
        frames = x.transpose(1, 2).flatten(0, 1)  # a view of what is laid out channels last
        if grows:  # its own forward goes through float32
            frames = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
    if band is None:
        made: Tensor = conv(frames if grows else before(frames))
    elif grows:
        frames = band.beside(frames, 1, 1)
        made = F.conv2d(frames, conv.weight, conv.bias, conv.stride, (0, 1))
    else:  # a column and a row of zeros on the right and below
        frames = F.pad(band.beside(frames, 0, 1), (0, 1))
        made = conv(frames)
    return made[None].transpose(1, 2)


def _chunks(x: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """Pieces of these lengths along the frames, channels last, as far as there are frames."""
    start = 0
    for length in lengths:
        if start >= x.shape[2]:
            return
        yield x[:, :, start : start + length].contiguous(memory_format=LAYOUT)
        start += length


def _dtype(vae: AutoencoderKLWan) -> torch.dtype:
    dtype: torch.dtype = vae.post_quant_conv.weight.dtype
    return dtype
