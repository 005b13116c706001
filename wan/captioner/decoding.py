"""Greedy decoding in memory that stays where it is, so that on a GPU a token is one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wan.detail import tell_detail
from wan.device.hardware import runs_triton

log = logging.getLogger(__name__)

WARM_UP = 2  # forwards before one is recorded: libraries set themselves up in them
ROUND = 256  # tokens; questions of about one length share a decoder
AT_ONCE = 8  # tokens that are launched before one is looked at; those after the end mark are thrown away


def fuse_norms(model: Any) -> Any:
    """The model with PyTorch's own RMS norm, one kernel, in place of a Qwen model's, which launches eight.

    It computes in float32 too, and rounds to the weights' dtype once where the other does so twice.
    """
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Qwen2RMSNorm", "Qwen3RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def use_own_attention(model: Any) -> None:
    """Let a token's attention run on our kernels on a GPU where they are right; whole prompts keep the library's."""
    language = model.model.language_model
    if not runs_triton(language.device) or isinstance(language.layers[0].self_attn, _OneQuery):
        return
    try:
        error = _error_of_own_attention(language)
    except Exception as reason:  # what Triton raises where it does not fit the machine is its own affair
        log.info("the VLM keeps PyTorch's attention, ours does not run here: %s", reason)
        return
    if not error <= 4 * torch.finfo(language.dtype).eps:  # also when it is NaN
        log.warning("our attention for the VLM is wrong on this machine (error %.1e) and left out", error)
        return
    for layer in language.layers:
        kind = type(layer.self_attn)  # each is changed where it is, so that nothing holds on to it
        layer.self_attn.__class__ = type(kind.__name__, (_OneQuery, kind), {})


class _OneQuery(nn.Module):
    """Before a class of attention of Qwen's: one token is computed by our kernels, more of them by that class."""

    fused: tuple[Tensor, Tensor | None] | None = None  # weight and bias of query, key and value in one
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        from wan.captioner.decode_attention_kernel import attend_with_one_query, place_one_token

        module: Any = self
        cache: Any = None if past_key_values is None else past_key_values.layers[module.layer_idx]
        position = options.get("position_ids")
        here = cache is not None and cache.is_initialized and not cache.is_sliding
        if hidden_states.shape[1] > 1 or not here or position is None or attention_mask is None:
            given = (hidden_states, position_embeddings, attention_mask, past_key_values)
            made: tuple[Tensor, Tensor | None] = super().forward(*given, **options)
            return made
        if self.fused is not None:
            projected = nn.functional.linear(hidden_states, *self.fused)
        else:
            projected = torch.cat([part(hidden_states) for part in (self.q_proj, self.k_proj, self.v_proj)], -1)
        norms = (module.q_norm.weight, module.k_norm.weight) if hasattr(self, "q_norm") else None
        epsilon = module.config.rms_norm_eps
        query = place_one_token(projected, position_embeddings, position, cache.keys, cache.values, norms, epsilon)
        attended = attend_with_one_query(query, cache.keys, cache.values, attention_mask, module.scaling)
        return module.o_proj(attended.flatten(2)), None


def fuse_projections(model: Any) -> None:
    """Let query, key and value of a token be one product, of weights that stay where they are from now on."""
    for layer in model.model.language_model.layers:
        module = layer.self_attn
        if not isinstance(module, _OneQuery) or module.fused is not None:
            continue
        parts = (module.q_proj, module.k_proj, module.v_proj)
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([part.bias for part in parts]) if parts[0].bias is not None else None
        shares = torch.split(weight, [part.out_features for part in parts])
        for part, share in zip(parts, shares, strict=True):
            part.weight = nn.Parameter(share, requires_grad=False)  # the same memory
        module.fused = weight, bias


def _error_of_own_attention(language: Any) -> float:
    """How far what our kernels make of random numbers is from float64, as a share of it."""
    from wan.captioner.decode_attention_kernel import attend_with_one_query, place_one_token

    config, device, dtype, dim = language.config, language.device, language.dtype, language.layers[0].self_attn.head_dim
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    projected, key, value = (
        draw(1, 1, (heads + 2 * shared) * dim),
        draw(1, shared, ROUND, dim),
        draw(1, shared, ROUND, dim),
    )
    norms, angle = (draw(dim), draw(dim)), draw(1, 1, dim // 2).repeat(1, 1, 2).float()
    turn, at = (angle.cos().to(dtype), angle.sin().to(dtype)), ROUND // 3
    seen = torch.arange(ROUND, device=device)[None, None, None] <= at

    rows = projected.double().view(heads + 2 * shared, dim)
    query, new = rows[:heads], rows[heads : heads + shared]
    query, new = (
        nn.functional.rms_norm(part, (dim,), norm.double(), config.rms_norm_eps)
        for part, norm in ((query, norms[0]), (new, norms[1]))
    )
    cosine, sine = (part[0].double() for part in turn)
    query, new = (
        part * cosine + torch.cat((-part[:, dim // 2 :], part[:, : dim // 2]), 1) * sine for part in (query, new)
    )
    keys, values = key.double(), value.double()
    keys[0, :, at], values[0, :, at] = new, rows[heads + shared :]
    keys, values = (part.repeat_interleave(heads // shared, 1) for part in (keys, values))
    exact = nn.functional.scaled_dot_product_attention(query[None, :, None], keys, values, attn_mask=seen)

    position = torch.full((1, 1), at, device=device)
    placed = place_one_token(projected, turn, position, key, value, norms, config.rms_norm_eps)
    ours = attend_with_one_query(placed, key, value, seen, dim**-0.5)
    return float((ours.transpose(1, 2) - exact).norm() / exact.norm())


class LayeredVlm(nn.Module):
    """An image-text-to-text model whose language layers can come to a GPU one by one, see `Placement`."""

    title = "the VLM"  # where it is spoken of

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.before_layer: Callable[[int], None] | None = None
        for number, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self._before, number))

    @property
    def layers(self) -> nn.ModuleList:
        """Those of the language model."""
        layers: nn.ModuleList = self.model.model.language_model.layers
        return layers

    def _before(self, number: int, *_: Any) -> None:
        if self.before_layer is not None:
            self.before_layer(number)


class GreedyDecoder:
    """The likeliest tokens of an image-text-to-text model of transformers, as its `generate` finds them.

    Keys and values of up to `capacity` tokens have a fixed place (the library's static cache), so that what a token
    launches, about a thousand kernels, is recorded once and then launched as one CUDA graph. Launching them one by one
    takes four times as long as they run (benchmarks/LOG.md). Nothing is compiled, so the first answer gains as well.
    A model whose weights move while it runs is not `recorded`.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, needed: int, recorded: bool = True) -> None:
        from transformers import StaticCache

        use_own_attention(model)
        if recorded and model.device.type == "cuda":
            fuse_projections(model)
        self.model = model
        self.capacity = -(-needed // ROUND) * ROUND
        self.cache = StaticCache(config=model.config, max_cache_len=self.capacity)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros_like(self.token)
        self.places = torch.arange(self.capacity, device=model.device)
        self.made = torch.zeros(self.capacity, dtype=torch.long, device=model.device)  # by position
        # a record would go on reading the memory that weights had
        self.graph = self._record() if recorded and model.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, ids: Tensor, pixels: Tensor, max_new_tokens: int, end: int | None) -> Tensor:
        """Token ids [1, L] and pixels of its images -> the new token ids [n], up to the `end` mark and with it."""
        self.cache.reset()
        output = self.model(input_ids=ids, pixel_values=pixels, past_key_values=self.cache, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        start = ids.shape[1]
        self.position.fill_(start)
        tokens = [int(self.token)]
        while tokens[-1] != end and len(tokens) < max_new_tokens:
            more = min(AT_ONCE, max_new_tokens - len(tokens))
            for _ in range(more):
                self.advance()
            new = self.made[start + len(tokens) :][:more].tolist()  # waits for them
            tokens += new[: new.index(end) + 1] if end in new else new
            tell_detail(f"{len(tokens)} of {max_new_tokens} tokens")
        return torch.tensor(tokens)

    @torch.inference_mode()
    def advance(self) -> None:
        """Put the token after `token` in its place."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def _step(self) -> None:
        seen = (self.places <= self.position)[None, None]
        output = self.model.model.language_model(
            input_ids=self.token, attention_mask=seen, position_ids=self.position, past_key_values=self.cache
        )
        self.token.copy_(self.model.lm_head(output.last_hidden_state).argmax(-1))
        self.position.add_(1)
        self.made.index_copy_(0, self.position[0], self.token[0])

    def _record(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(self.token.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream(self.token.device).wait_stream(aside)
        try:
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            log.warning("the VLM's steps cannot be recorded here and are launched one by one: %s", error)
            return None
        return graph
