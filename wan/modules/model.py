"""`WanModel`: the denoiser (DiT), loaded from either folder layout, with the official precision policy.

The architecture is diffusers' `WanTransformer3DModel`. In bf16 the official code keeps the residual stream, the
modulation, the time path and the head in float32, and that is what bounds its error over 30 or 40 blocks; the stock
class rounds them. The corrections below restore that, and in float32 they change nothing but the timestep sinusoid,
which the official code computes in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from torch import Tensor, nn

from wan.errors import UserError
from wan.modules.checkpoint import Weights, check_fit, fill

# Parameters that stay float32 whatever the compute dtype is.
FLOAT32_PARTS = ("condition_embedder.time_embedder.", "condition_embedder.time_proj.", "proj_out.")
FLOAT32_NAMES = ("scale_shift_table", "norm2.weight", "norm2.bias")


class WanModel(WanTransformer3DModel):  # type: ignore[misc]
    """The denoiser. Call it as the library class: latents [B, C, F, h, w], timestep [B] or [B, L], text [B, 512, D].

    Its float32 output [B, z, F, h, w] is the predicted flow, whatever the compute dtype.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        self.condition_embedder = _ConditionEmbedder(
            dim=dim, time_freq_dim=self.config.freq_dim, time_proj_dim=6 * dim, text_embed_dim=self.config.text_dim
        )
        self.condition_embedder.timesteps_proj = _Sinusoid64(self.config.freq_dim)
        # The inputs of the large matrix products follow their weights; what comes out of the patch embedding is the
        # residual stream, which every block keeps in the dtype that it was given.
        self.patch_embedding.register_forward_pre_hook(_cast_to_weight)
        self.patch_embedding.register_forward_hook(_to_float32)
        for block in self.blocks:
            for part in (block.attn1, block.attn2, block.ffn):
                part.register_forward_pre_hook(_cast_to_weight)
        self.rounding: torch.dtype | None = None  # what the weights were rounded through when they were loaded
        self.altered: frozenset[str] = frozenset()  # the parameters that are not the checkpoint's, see lora.py
        self.loras: tuple[Any, ...] | None = ()  # what is in them, None while that is being changed

    @classmethod
    def from_weights(
        cls, weights: Weights, *, dtype: torch.dtype, device: torch.device, convert_model_dtype: bool = False
    ) -> WanModel:
        """The model with sizes taken from the tensors' shapes.

        `dtype` is that of the matrix products. `convert_model_dtype` also rounds to it the parameters that stay
        float32, as the official flag of that name does. Linear layers computed in `dtype` whose weights are quantised
        in the file hold them as they are. Raises UserError when the weights do not fit.
        """
        model = cls._empty(weights)
        model.rounding = dtype if convert_model_dtype else None
        fill(
            model,
            weights,
            key_map(weights),
            lambda name: policy_dtype(name, dtype),
            device,
            rounding=model.rounding,
            stays_packed=lambda name: not name.startswith(FLOAT32_PARTS),
        )
        model.to(device).eval()
        return model

    @classmethod
    def check(cls, weights: Weights) -> None:
        """Raise UserError when the weights do not fit; no tensor is read."""
        check_fit(cls._empty(weights), weights, key_map(weights))

    @classmethod
    def _empty(cls, weights: Weights) -> WanModel:
        with init_empty_weights():
            return cls(**infer_config(weights))


def key_map(weights: Weights) -> dict[str, str]:
    """The key in the files of each parameter of `WanModel`."""
    keys = {key: key for key in weights.shapes}
    if "blocks.0.self_attn.q.weight" not in keys:
        return keys
    # the converter renames the keys of the dict it is given, whatever the values are, and empties that dict
    renamed: dict[str, str] = convert_wan_transformer_to_diffusers(keys)
    return renamed


def policy_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter by the official precision policy, when matrix products are computed in `dtype`."""
    kept = name.startswith(FLOAT32_PARTS) or name.endswith(FLOAT32_NAMES)
    return torch.float32 if kept else dtype


def infer_config(weights: Weights) -> dict[str, Any]:
    """Constructor arguments of `WanModel` from shapes; only what no shape tells comes from config.json."""
    shapes, config = weights.shapes, weights.config
    official = "blocks.0.self_attn.q.weight" in shapes
    if official:
        text, time, head, ffn = "text_embedding.0", "time_embedding.0", "head.head", "blocks.0.ffn.0"
        norm = "blocks.0.norm3.weight"
    else:
        embedder = "condition_embedder"
        text, time = f"{embedder}.text_embedder.linear_1", f"{embedder}.time_embedder.linear_1"
        head, ffn, norm = "proj_out", "blocks.0.ffn.net.0.proj", "blocks.0.norm2.weight"
    try:
        dim, in_channels, *patch = shapes["patch_embedding.weight"]
        sizes = {
            "patch_size": tuple(patch),
            "in_channels": in_channels,
            "out_channels": shapes[f"{head}.weight"][0] // math.prod(patch),
            "text_dim": shapes[f"{text}.weight"][1],
            "freq_dim": shapes[f"{time}.weight"][1],
            "ffn_dim": shapes[f"{ffn}.weight"][0],
        }
    except KeyError as error:
        raise UserError(f"{weights.path} is no Wan2.2 denoiser: it has no {error.args[0]}") from error
    heads = config.get("num_heads", config.get("num_attention_heads"))
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise UserError(f"{weights.path}/config.json: expected num_heads that divide the width {dim}, found {heads!r}")
    return sizes | {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        "cross_attn_norm": norm in shapes,
        "eps": config.get("eps", 1e-6),
    }


class _Sinusoid64(nn.Module):
    """Timesteps [N] -> float32 [N, dim], cosines first, computed in float64 (source: the official code)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies = dim // 2

    def forward(self, timesteps: Tensor) -> Tensor:
        exponents = torch.arange(self.frequencies, dtype=torch.float64, device=timesteps.device) / self.frequencies
        angles = timesteps.double()[:, None] * torch.pow(10000.0, -exponents)[None]
        return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class _ConditionEmbedder(WanTimeTextImageEmbedding):  # type: ignore[misc]
    """Keeps the time path in float32; the stock class rounds it to the text's dtype."""

    def forward(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: None = None,
        timestep_seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        sinusoid = self.timesteps_proj(timestep)
        if timestep_seq_len is not None:
            sinusoid = sinusoid.unflatten(0, (-1, timestep_seq_len))
        time = self.time_embedder(sinusoid)
        text = self.text_embedder(encoder_hidden_states.to(_compute_dtype(self.text_embedder)))
        return time, self.time_proj(self.act_fn(time)), text, encoder_hidden_states_image


def _cast_to_weight(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook: tensors in the dtype of the weights. The rotary pair, a tuple, stays float32."""
    dtype = _compute_dtype(module)
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in args)


def _compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's parameters, but for weights that stay packed."""
    return next(p.dtype for p in module.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1)


def _to_float32(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()
