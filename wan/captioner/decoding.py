"""Greedy decoding in memory that stays where it is, so that on a GPU a token is one CUDA graph."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

WARM_UP = 2  # forwards before one is recorded: libraries set themselves up in them
ROUND = 512  # tokens; questions of about one length share a decoder


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


class GreedyDecoder:
    """The likeliest tokens of an image-text-to-text model of transformers, as its `generate` finds them.

    Keys and values of up to `capacity` tokens have a fixed place (the library's static cache), so that what a token
    launches, about a thousand kernels, is recorded once and then launched as one CUDA graph. Launching them one by one
    takes four times as long as they run (benchmarks/LOG.md). Nothing is compiled, so the first answer gains as well.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, needed: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.capacity = -(-needed // ROUND) * ROUND
        self.cache = StaticCache(config=model.config, max_cache_len=self.capacity)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros_like(self.token)
        self.places = torch.arange(self.capacity, device=model.device)
        self.graph = self._record() if model.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, ids: Tensor, pixels: Tensor, max_new_tokens: int, end: int | None) -> Tensor:
        """Token ids [1, L] and pixels of its images -> the new token ids [n], up to the `end` mark and with it."""
        self.cache.reset()
        output = self.model(input_ids=ids, pixel_values=pixels, past_key_values=self.cache, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.position.fill_(ids.shape[1])
        made = [int(self.token)]
        while made[-1] != end and len(made) < max_new_tokens:
            self.advance()
            made.append(int(self.token))
        return torch.tensor(made)

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
