"""`WanModel`: the denoiser (DiT), loaded from either folder layout, with the official precision policy.

The architecture and the parameters are diffusers' `WanTransformer3DModel`; the forward is our own. In bf16 the official
code keeps the residual stream, the modulation, the time path and the head in float32, and that is what bounds its error
over 30 or 40 blocks; the stock class rounds them. In float32 ours differs from it in the timestep sinusoid alone, which
the official code computes in float64. The text's keys and values can be computed once for all steps, and the time path
is computed for the timesteps that differ, not for every token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn

from wan.denoiser.fp8 import Lowering, quantize_model
from wan.denoiser.headers import infer_config, key_map
from wan.denoiser.policy import FLOAT32_PARTS, stays_float32
from wan.denoiser.sequence import Share
from wan.device.parallel import Group
from wan.device.sharding import shard
from wan.device.shared import CommonMemory, SharedMemory
from wan.foreign import parsing
from wan.weights.loading import load_into
from wan.weights.tensors import Weights

log = logging.getLogger(__name__)

SIZES = 64  # of clips that blocks are compiled for in one process; PyTorch would give up after eight


class WanModel(WanTransformer3DModel):  # type: ignore[misc]
    """The denoiser, with the library class's configuration and parameter names, and its `forward` by name and order."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        sizes = self.config
        dim = sizes.num_attention_heads * sizes.attention_head_dim
        self.blocks: Any = nn.ModuleList(
            WanBlock(dim, sizes.ffn_dim, sizes.num_attention_heads, sizes.qk_norm, sizes.cross_attn_norm, sizes.eps)
            for _ in range(sizes.num_layers)
        )
        self.condition_embedder.timesteps_proj = _Sinusoid64(sizes.freq_dim)
        self.rounding: torch.dtype | None = None  # what the weights were rounded through when they were loaded
        self.altered: frozenset[str] = frozenset()  # the parameters that are not the checkpoint's, see lora.py
        self.loras: tuple[Any, ...] | None = ()  # what is in them, None while that is being changed
        self.in_common = False  # whether other processes alter the blocks' parameters too, see shared.py
        self.before_layer: Callable[[int], None] | None = None  # see placement.py
        self.low_precision: str | None = None  # what its blocks were lowered to
        self.token_group: Group | None = None  # the ranks that share a forward's tokens, see sequence.py
        self.share: Share | None = None  # of this rank in the forward that is computed

    @classmethod
    def from_weights(
        cls,
        weights: Weights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        convert_model_dtype: bool = False,
        low_precision: str | None = None,
        rounded_on: torch.device | None = None,
        mapped: bool = False,
        shards: Group | None = None,
        shared: SharedMemory | CommonMemory | None = None,
    ) -> WanModel:
        """The model with sizes taken from the tensors' shapes.

        `dtype` is that of the matrix products. `convert_model_dtype` also rounds to it the parameters that stay
        float32, as the official flag of that name does. Linear layers computed in `dtype` whose weights are quantized
        in the file hold them as they are. `low_precision`, of `fp8.PRECISIONS`: blocks compute in 8 bits, their weights
        being rounded one by one as they are read, on the device `rounded_on`. `mapped`, `shared`: as in `load_into`.
        `shards`: the processes of which each keeps a slice of every parameter. Raises UserError when the weights do not
        fit.
        """
        model = cls._empty(weights)
        if shards is not None:
            shard(model, "blocks", lambda name: policy_dtype(name, dtype), device, shards, ["text_keys"])
        model.rounding = dtype if convert_model_dtype else None
        load_into(
            model,
            weights,
            key_map(weights),
            lambda name: policy_dtype(name, dtype),
            device,
            rounding=model.rounding,
            stays_quantized=lambda name: not name.startswith(FLOAT32_PARTS),
            # rounded weights are smaller, and slices lie elsewhere
            layers="" if low_precision or shards is not None else "blocks",
            mapped=mapped,
            shared=shared,
            lower=None if low_precision is None else Lowering(dtype, device, rounded_on or device),
        )
        model.in_common = isinstance(shared, SharedMemory) and shared.memory is not None
        model.to(device).eval()
        if low_precision is not None:
            quantize_model(model, low_precision, rounded_on or device)
        return model

    @classmethod
    def _empty(cls, weights: Weights) -> WanModel:
        config = infer_config(weights)
        # of this thread only, in which one expert may be read while another thread computes with the other
        with torch.device("meta"), parsing(str(weights.path), "download it again"):
            model = cls(**config)
        sizes = model.config
        model.rope = WanRotaryPosEmbed(sizes.attention_head_dim, sizes.patch_size, sizes.rope_max_seq_len)  # numbers
        return model

    def text_keys(self, text: Tensor, keep: bool = True) -> TextKeys:
        """Embedded prompts [B, 512, D] -> what the blocks' cross-attention takes of them, for as many steps as wanted.

        They belong to the prompt and to the weights as they are now. Kept, at 512 rows in bf16, they take 400 MiB of an
        A14B expert and 180 MiB of the 5B.
        """
        embedder = self.condition_embedder.text_embedder
        return TextKeys(embedder(text.to(embedder.linear_1.bias.dtype)), keep)  # weights may be packed

    @property
    def layers(self) -> nn.ModuleList:
        """What can come to a GPU one by one."""
        blocks: nn.ModuleList = self.blocks
        return blocks

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | TextKeys,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents [B, C, F, h, w] -> the predicted flow float32 [B, z, F, h, w], whatever the compute dtype.

        `timestep` [B] or [B, n]: one for each of n equal runs of tokens, so n = F where latent frames differ in it.
        The text is embedded prompts [B, 512, D] or the `text_keys` of them.
        """
        texts = encoder_hidden_states
        if isinstance(texts, Tensor):
            texts = self.text_keys(texts, keep=False)
        embedder = self.condition_embedder
        steps = timestep if timestep.ndim == 2 else timestep[:, None]
        time = embedder.time_embedder(embedder.timesteps_proj(steps.flatten()).unflatten(0, steps.shape))
        modulation = embedder.time_proj(embedder.act_fn(time)).unflatten(-1, (6, -1))  # [B, n, 6, D]

        rotary = cos, sin = self.rope(hidden_states)  # new tensors [1, L, 1, head_dim], the same for both of a pair
        sin[..., 0::2].neg_()
        grid = self.patch_embedding(hidden_states.to(self.patch_embedding.weight.dtype))
        rows: Tensor = grid.flatten(2).transpose(1, 2)
        self.share = share = None if self.token_group is None else Share.of(rows.shape[1], self.token_group)
        runs = None  # the modulation's row of each token, where tokens are shared and rows differ
        if share is not None:
            rows, rotary = share.mine(rows), (share.mine(cos), share.mine(sin))
            runs = share.rows(steps.shape[1], rows.device) if steps.shape[1] > 1 else None
        tokens = rows.float().contiguous()  # the residual stream
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, partial(self._ready, number, block, texts), modulation, rotary, runs, share)

        shift, scale = (self.scale_shift_table + time[:, :, None]).unbind(2)
        patches = self.proj_out(_modulate(self.norm_out(tokens), shift, scale, runs))
        if share is not None:
            patches = share.whole(patches)
        sizes = patches.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid.shape[2:])
        # [B, F, h, w, p_F, p_h, p_w, z] -> [B, z, F, p_F, h, p_h, w, p_w]
        flow = sizes.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)

    def _ready(self, number: int, block: WanBlock, texts: TextKeys) -> tuple[Tensor, Tensor]:
        """Called by a block that is computed: its weights come to the device, its text keys are returned."""
        if self.before_layer is not None:
            self.before_layer(number)
        return texts.of(number, block)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile one block for all of them, when it first runs. If that fails they run as they are, with a warning."""
        if self.blocks[0].compiled is None:
            compiled = _Compiled(backend)
            for block in self.blocks:
                block.compiled = compiled

    @property
    def is_compiled(self) -> bool:
        """Whether the blocks run as a compiler makes them."""
        compiled: _Compiled | None = self.blocks[0].compiled
        return compiled is not None and compiled.works

    @property
    def kernels(self) -> dict[str, Any]:
        """What the blocks run on, as JSON values; nothing where that is what they are made with."""
        kernel = self.blocks[0].attn1.processor.kernel
        attention = {} if kernel is None else {"attention": kernel}
        return attention | ({"compiled": True} if self.is_compiled else {})


class WanBlock(WanTransformerBlock):  # type: ignore[misc]
    """A block of the denoiser. The inputs of its matrix products follow their weights, all else is float32."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.attn1.set_processor(_SelfAttention())
        self.attn2.set_processor(_TextAttention())
        self.ffn.net[0].gelu = _gelu
        self.compiled: _Compiled | None = None

    def text_keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B, 512, D] of the text embedder -> keys and values [B, 512, heads, head_dim]."""
        attention = self.attn2
        keys = attention.norm_k(attention.to_k(rows))
        return keys.unflatten(2, (attention.heads, -1)), attention.to_v(rows).unflatten(2, (attention.heads, -1))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Callable[[], tuple[Tensor, Tensor]],
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        runs: Tensor | None = None,
        share: Share | None = None,
    ) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]. The hooks of a cache are around this, so it is not what is compiled.

        `encoder_hidden_states` gives the text keys of `compute`; where a cache leaves the block out nothing asks for
        them.
        """
        compute = self.compute if self.compiled is None else partial(self.compiled, self)
        return compute(hidden_states, encoder_hidden_states(), temb, rotary_emb, runs, share)

    def compute(
        self,
        hidden_states: Tensor,
        text: tuple[Tensor, Tensor],
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        runs: Tensor | None = None,
        share: Share | None = None,
    ) -> Tensor:
        """Tokens [B, L, D], this block's text keys, modulation [B, n, 6, D] of n equal runs of tokens -> [B, L, D].

        The modulation is broadcast over its run; one row a token would be 2 GB for a clip of the 5B. With a `share`
        the tokens are those of this rank, and `runs` [L] are their rows of the modulation where there are several.
        """
        dtype = self.attn1.to_q.bias.dtype  # weights may be packed
        shift, scale, gate, feed_shift, feed_scale, feed_gate = (self.scale_shift_table + temb).unbind(2)  # [B, n, D]

        normed: Tensor = _modulate(self.norm1(hidden_states), shift, scale, runs).to(dtype)
        tokens: Tensor = hidden_states + _per_run(self.attn1(normed, share, None, rotary_emb), gate, runs)
        normed = self.norm2(tokens).to(dtype)
        tokens = tokens + self.attn2(normed, text)
        normed = _modulate(self.norm3(tokens), feed_shift, feed_scale, runs).to(dtype)
        return tokens + _per_run(self.ffn(normed), feed_gate, runs)


def _per_run(x: Tensor, factor: Tensor, runs: Tensor | None) -> Tensor:
    """Tokens [B, L, D] times the factor [B, n, D] of their run: n equal runs, or that of each token in `runs` [L]."""
    if runs is not None:
        return x * factor[:, runs]
    parts = x.view(*factor.shape[:2], -1, factor.shape[2])  # [B, n, L / n, D]
    return (parts * factor[:, :, None]).view_as(x)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, runs: Tensor | None) -> Tensor:
    """Tokens [B, L, D] scaled by 1 + `scale` and shifted, with the rows [B, n, D] of their runs."""
    if runs is not None:
        return x * (1 + scale[:, runs]) + shift[:, runs]
    parts = x.view(*shift.shape[:2], -1, shift.shape[2])
    return (parts * (1 + scale[:, :, None]) + shift[:, :, None]).view_as(x)


class _Compiled:
    """`WanBlock.compute` as a compiler makes it, for all blocks of a model; as it is once that has failed."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        # one graph a size of clip: kernels for any size are slower
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, SIZES)
        self.compute: Any = torch.compile(WanBlock.compute, backend=backend, fullgraph=True, dynamic=False)
        self.works = True

    def __call__(self, block: WanBlock, *inputs: Any) -> Tensor:
        if self.works:
            try:
                return self.compute(block, *inputs)  # type: ignore[no-any-return]
            except Exception as error:  # what is not the compiler's fault is raised again below
                self.works = False
                reason = " ".join(f"{type(error).__name__}: {error}".split("\n\n")[0].split())  # advice follows it
                log.warning("the denoiser cannot be compiled here and runs as it is, with the same results: %s", reason)
        return block.compute(*inputs)


class TextKeys:
    """Rows [B, 512, D] of an expert's text embedder, and what its blocks have made of them.

    A block makes its keys and values [B, 512, heads, head_dim] when it first asks, since its weights may not be on the
    device before; where they are not kept it makes them in every forward.
    """

    def __init__(self, rows: Tensor, keep: bool) -> None:
        self.rows = rows
        self.keep = keep
        self.by_block: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, number: int, block: WanBlock) -> tuple[Tensor, Tensor]:
        """The keys and values of one block."""
        keys = self.by_block.get(number) or block.text_keys(self.rows)
        if self.keep:
            self.by_block[number] = keys
        return keys


class _SelfAttention:
    """The library's attention processor for self-attention, with rotary positions that compile to one kernel."""

    _attention_backend = None  # `set_attention_backend` of the library writes it
    _parallel_config = None
    kernel: str | None = None  # the name of what attention_backends.py has put in place of `attend`

    def __call__(
        self, attn: Any, hidden_states: Tensor, share: Share | None, mask: None, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        shape = (*hidden_states.shape[:2], attn.heads, -1)

        def query() -> Tensor:
            return _rotate(attn.norm_q(attn.to_q(hidden_states)).view(shape), *rotary_emb)

        def key() -> Tensor:
            return _rotate(attn.norm_k(attn.to_k(hidden_states)).view(shape), *rotary_emb)

        def value() -> Tensor:
            return attn.to_v(hidden_states).view(shape)  # type: ignore[no-any-return]

        mixed = self.attend(query(), key(), value()) if share is None else share.attend(self.attend, value, query, key)
        return attn.to_out[0](mixed.flatten(2).type_as(hidden_states))  # type: ignore[no-any-return]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention [B, L, heads, head_dim]; attention_backends.py and fp8.py put others in place of it."""
        mixed: Tensor = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return mixed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B, L, heads, head_dim], neighbouring numbers being a pair (source: the official code).

    `sin` is negative for the first of a pair.
    """
    # in place, or three of these in float32 would be there where nothing is compiled
    return (x * cos).add_(x.view(*x.shape[:-1], -1, 2).flip(-1).view(x.shape) * sin).type_as(x)


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # (1 + tanh(u)) / 2 is sigmoid(2 * u), which takes fewer instructions and rounds as little
    exact = x.float()
    doubled = 2 * math.sqrt(2 / math.pi) * exact * (1 + 0.044715 * exact * exact)
    return (exact * torch.sigmoid(doubled)).type_as(x)


class _TextAttention:
    """The library's attention processor for cross-attention, with keys and values that are there already."""

    _attention_backend = None  # `set_attention_backend` of the library writes it
    _parallel_config = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor], *_: Any
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        mixed: Tensor = dispatch_attention_fn(query, *encoder_hidden_states, backend=self._attention_backend)
        return attn.to_out[0](mixed.flatten(2).type_as(query))  # type: ignore[no-any-return]


def policy_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter by the official precision policy, when matrix products are computed in `dtype`."""
    return torch.float32 if stays_float32(name) else dtype


class _Sinusoid64(nn.Module):
    """Timesteps [N] -> float32 [N, dim], cosines first, computed in float64 (source: the official code)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies = dim // 2

    def forward(self, timesteps: Tensor) -> Tensor:
        exponents = torch.arange(self.frequencies, dtype=torch.float64, device=timesteps.device) / self.frequencies
        angles = timesteps.double()[:, None] * torch.pow(10000.0, -exponents)[None]
        return torch.cat([angles.cos(), angles.sin()], dim=1).float()
