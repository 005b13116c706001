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
    """Let a token's attention run on our kernel on a GPU where that is right; whole prompts keep the library's."""
    from transformers import AttentionInterface, AttentionMaskInterface

    language = model.model.language_model
    config, name = language.config, "one_query"
    if not runs_triton(language.device):
        return
    from wan.captioner.decode_attention_kernel import attend_with_one_query

    library = AttentionInterface()["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if query.shape[2] > 1 or mask is None:
            return library(module, query, key, value, mask, **options)
        return attend_with_one_query(query, key, value, mask, options["scaling"]), None

    try:
        generator = torch.Generator(language.device).manual_seed(0)
        sizes = config.num_attention_heads, config.num_key_value_heads
        query, key, value = (
            torch.randn(1, heads, rows, config.head_dim, device=language.device, generator=generator).to(language.dtype)
            for heads, rows in ((sizes[0], 1), (sizes[1], ROUND), (sizes[1], ROUND))
        )
        seen = torch.arange(ROUND, device=language.device)[None, None, None] < ROUND // 3
        keys, values = (part.double().repeat_interleave(sizes[0] // sizes[1], 1) for part in (key, value))
        exact = nn.functional.scaled_dot_product_attention(query.double(), keys, values, attn_mask=seen).transpose(1, 2)
        ours = attend_with_one_query(query, key, value, seen, config.head_dim**-0.5)
        error = float((ours - exact).norm() / exact.norm())
    except Exception as reason:  # what Triton raises where it does not fit the machine is its own affair
        log.info("the VLM keeps PyTorch's attention, ours does not run here: %s", reason)
        return
    if not error <= 4 * torch.finfo(language.dtype).eps:  # also when it is NaN
        log.warning("our attention for the VLM is wrong on this machine (error %.1e) and left out", error)
        return
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    language.set_attn_implementation(name)


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
