"""`Wan2_1_VAE`, `Wan2_2_VAE`: pixels <-> normalised latents, in float32 as in the official code, or in float16."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKLWan
from pydantic import Field
from torch import Tensor, nn

from wan.device.parallel import Group
from wan.errors import UserError
from wan.foreign import fit, parsing
from wan.vae import chunked, chunks
from wan.vae.bands import Band
from wan.weights.loading import check_fit, load_into
from wan.weights.tensors import Weights

log = logging.getLogger(__name__)


class WanVAE(nn.Module):
    """The causal video VAE. One clip at a time, as in the official code: lists in, lists out."""

    mean: Tensor  # [z, 1, 1, 1]
    std: Tensor  # [z, 1, 1, 1]

    def __init__(self, model: AutoencoderKLWan, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, numbers in (("mean", mean), ("std", std)):
            # a library that loads in another thread may have set another dtype for the process
            statistics = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1)
            self.register_buffer(name, statistics, persistent=False)

    @classmethod
    def from_weights(
        cls,
        weights: Weights,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> WanVAE:
        """The VAE with sizes from the tensors' shapes; statistics from the folder's config.json where that has them.

        Raises UserError when the weights or the number of statistics do not fit.
        """
        if "latents_mean" in weights.config:
            mean = fit(list[_Finite], weights.config["latents_mean"], f"latents_mean in {weights.path}/config.json")
            std = fit(list[_Positive], weights.config.get("latents_std"), f"latents_std in {weights.path}/config.json")
        model, source_of = cls._empty(weights)
        if not len(mean) == len(std) == model.config.z_dim:
            raise UserError(f"{weights.path}: the VAE has {model.config.z_dim} latent channels, expected {len(mean)}")
        load_into(model, weights, source_of, lambda name: dtype, device)
        lay_out(model)
        return cls(model.eval(), mean, std).to(device)

    @classmethod
    def check(cls, weights: Weights) -> int:
        """Its latent channels. Raises UserError when the weights do not fit; no tensor is read."""
        model, source_of = cls._empty(weights)
        check_fit(model, weights, source_of)
        return int(model.config.z_dim)

    @staticmethod
    def _empty(weights: Weights) -> tuple[AutoencoderKLWan, dict[str, str]]:
        """The model without memory, and the key in the files of each of its parameters."""
        official = "conv1.weight" in weights.shapes
        renamed = {official_to_diffusers(key, weights.shapes): key for key in weights.shapes}
        source_of = renamed if official else {key: key for key in weights.shapes}
        config = infer_config(weights, {name: weights.shapes[key] for name, key in source_of.items()})
        with torch.device("meta"), parsing(str(weights.path), "download it again"):
            return AutoencoderKLWan(**config), source_of

    def encode(self, videos: Iterable[Tensor], group: Group | None = None) -> list[Tensor]:
        """Pixels [3, T, H, W] in [-1, 1] -> normalised latents float32 [z, F, h, w], the mode of the posterior.

        The ranks of a `group` share the work; each is given all pixels and has all latents.
        """
        scale = self.model.config.scale_factor_spatial
        modes = []
        for video in videos:
            band = _band(group, video.shape[2] // scale)
            through = partial(chunked.encode, band=band)
            modes.append(self._run(through, video, _largest(video.shape[2:], band)))
        # multiplied by the inverse, not divided: that is the official arithmetic to the last bit
        return [(mode - self.mean) * (1.0 / self.std) for mode in modes]

    def decode(
        self, zs: Iterable[Tensor], home: torch.device | None = None, group: Group | None = None
    ) -> list[Tensor]:
        """Normalised latents [z, F, h, w] -> pixels float32 [3, T, H, W], clamped to [-1, 1].

        Pixels go to `home` as they are made, by default to where the latents are. The ranks of a `group` share the
        work; each is given all latents, and the first has the pixels, the others no frame.
        """
        scale = self.model.config.scale_factor_spatial
        decoded = []
        for z in zs:
            band = _band(group, z.shape[2])
            if band is None and group is not None and group.index:  # too few rows to share
                decoded.append(z.new_empty(3, 0, *(side * scale for side in z.shape[2:])))
                continue
            through = partial(chunked.decode, home=home, band=band)
            size = _largest([side * scale for side in z.shape[2:]], band)
            decoded.append(self._run(through, z.float() / (1.0 / self.std) + self.mean, size))
        return decoded

    @torch.no_grad()
    def _run(
        self, through: Callable[[AutoencoderKLWan, Tensor, int], Tensor], x: Tensor, size: Sequence[int]
    ) -> Tensor:
        """The result for one clip, float32; in float32 arithmetic where a number is too large for float16."""
        try:
            return through(self.model, x[None], self._chunk(*size))[0].float()
        except OverflowError:
            log.warning("the VAE's numbers are too large for float16: this clip goes through it in float32")
        self.model.float()
        return through(self.model, x[None], self._chunk(*size))[0].float()

    def _chunk(self, height: int, width: int) -> int:
        """How many latent frames of a clip of that size are computed at a time."""
        channels, patch = len(self.model.decoder.norm_out.gamma), self.model.config.patch_size or 1
        return chunks.chunk_for(chunks.widest(channels, patch, height, width) * self.model.dtype.itemsize)


def _band(group: Group | None, rows: int) -> Band | None:
    """This rank's rows of the latents; None where there are not two for each rank."""
    return None if group is None or rows < 2 * group.size else Band(group, rows)


def _largest(size: Sequence[int], band: Band | None) -> Sequence[int]:
    """Height and width of the largest band of a picture of that size."""
    height, width = size
    return size if band is None else (height * band.counts[0] // band.rows, width)


def lay_out(model: AutoencoderKLWan) -> None:
    """Lay the weights of convolutions out channels last, as the kernels of a GPU want them."""
    for parameter in model.parameters():
        if parameter.dim() > 3:
            flat = torch.channels_last if parameter.dim() == 4 else chunked.LAYOUT
            parameter.data = parameter.data.contiguous(memory_format=flat)


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Wan2_1_VAE(WanVAE):
    """16 latent channels, strides 4x8x8 (A14B)."""


class Wan2_2_VAE(WanVAE):
    """48 latent channels, strides 4x16x16 (TI2V-5B)."""


_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.gamma$", ".norm_out.gamma"),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.gamma$", ".norm1.gamma"),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.gamma$", ".norm2.gamma"),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    # 2.2: stages that hold their blocks
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)", r"encoder.down_blocks.\1.downsampler.\2"),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)", r"decoder.up_blocks.\1.upsampler.\2"),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    # 2.1: one flat list of blocks
    (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1."),
)


def official_to_diffusers(key: str, keys: Iterable[str]) -> str:
    """The library's name of an official VAE tensor; `keys` are all names of the file."""
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    flat = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key)
    if flat is None:
        return key
    # 2.1 lists, for each stage, one residual block more than the encoder and then the upsampler
    stage, block = divmod(int(flat[1]), _blocks_per_stage(keys) + 2)
    inner = "upsamplers.0" if flat[2].startswith(("resample", "time_conv")) else f"resnets.{block}"
    return f"decoder.up_blocks.{stage}.{inner}.{flat[2]}"


def _blocks_per_stage(keys: Iterable[str]) -> int:
    """Residual blocks before the first downsampler in the flat 2.1 list."""
    matches = [re.match(r"encoder\.downsamples\.(\d+)\.resample", key) for key in keys]
    return min((int(match[1]) for match in matches if match), default=0)


def infer_config(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Constructor arguments of `AutoencoderKLWan` from the shapes of its tensors, named as in the library."""
    try:
        base, in_channels = shapes["encoder.conv_in.weight"][:2]
        z_dim = shapes["post_quant_conv.weight"][0]
        decoder_width = shapes["decoder.norm_out.gamma"][0]
        out_channels = shapes["decoder.conv_out.weight"][0]
    except KeyError as error:
        raise UserError(f"{weights.path} is no Wan VAE: it has no {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{weights.path} is no Wan VAE: a weight of it has other dimensions") from error
    residual = any(key.startswith("encoder.down_blocks.0.resnets.") for key in shapes)
    with parsing(str(weights.path), "download it again"):
        stages = _residual_stages(shapes) if residual else _flat_stages(shapes)
    if base < 1 or not stages or stages[0][1] < 1:
        raise UserError(f"{weights.path} is no Wan VAE: its encoder has no stages")
    widths, temporal = [stage[1] for stage in stages], [stage[2] for stage in stages[:-1]]
    patch = {3: None, 12: 2}.get(in_channels, 1)
    return {
        "base_dim": base,
        "decoder_base_dim": decoder_width * base // widths[0],
        "z_dim": z_dim,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": stages[0][0],
        "temperal_downsample": temporal,
        "is_residual": residual,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": patch,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** len(temporal) * (patch or 1),
    }


Stage = tuple[int, int, bool]  # residual blocks, width, whether it halves time


def _residual_stages(shapes: Mapping[str, tuple[int, ...]]) -> list[Stage]:
    """Stages of the 2.2 encoder: `down_blocks.i.resnets.j` and `down_blocks.i.downsampler`."""
    blocks: dict[int, dict[int, int]] = {}
    for key, shape in shapes.items():
        if match := re.match(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight", key):
            blocks.setdefault(int(match[1]), {})[int(match[2])] = shape[0]
    return [
        (len(widths), widths[max(widths)], f"encoder.down_blocks.{stage}.downsampler.time_conv.weight" in shapes)
        for stage, widths in sorted(blocks.items())
    ]


def _flat_stages(shapes: Mapping[str, tuple[int, ...]]) -> list[Stage]:
    """Stages of the 2.1 encoder: one list `down_blocks.n` in which a resampler ends each stage but the last."""
    stages: list[Stage] = []
    count = width = index = 0
    while True:
        block = f"encoder.down_blocks.{index}."
        if block + "conv2.weight" in shapes:
            count, width = count + 1, shapes[block + "conv2.weight"][0]
        elif block + "resample.1.weight" in shapes:
            stages.append((count, width, block + "time_conv.weight" in shapes))
            count = 0
        else:
            return [*stages, (count, width, False)]
        index += 1
