"""Prompts -> embeddings, with the official cleaning, padding and weights."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from wan.device.parallel import Group
from wan.device.sharding import shard
from wan.device.shared import CommonMemory
from wan.errors import UserError
from wan.foreign import count_numbered, parsing, uncollected
from wan.weights.loading import check_fit, load_into
from wan.weights.tensors import Weights
from wan.weights.vocabulary import Vocabulary, read_vocabulary

log = logging.getLogger(__name__)


def clean(text: str) -> str:
    """The official 'whitespace' cleaning: mojibake, HTML entities (twice), runs of whitespace."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", repaired.strip()).strip()


class PromptTokenizer:
    """Prompts -> ids of the text encoder.

    `source` is the tokenizer's folder, or a text encoder's file that carries its vocabulary. Raises UserError.
    """

    def __init__(self, source: Path, length: int = 512) -> None:
        from transformers import AutoTokenizer

        self.length = length
        vocabulary = None if source.is_dir() else read_vocabulary(source)
        with parsing(f"the tokenizer in {source}", "download it again"), uncollected():
            if vocabulary is None:
                self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            else:
                self._tokenizer = _from_vocabulary(vocabulary)
            self("a")  # one that is damaged in its inner parts fails at the first text

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [1, length]: cleaned, cut so that the final </s> stays, padded."""
        encoded = self._tokenizer(
            [clean(text)],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def count(self, text: str) -> int:
        """Tokens of the cleaned text with its final </s>, however many."""
        return len(self._tokenizer(clean(text), add_special_tokens=True)["input_ids"])


def _from_vocabulary(vocabulary: Vocabulary) -> Any:
    from transformers import AddedToken, T5Tokenizer

    characters = vocabulary.characters or None
    tokenizer = T5Tokenizer(vocab=list(vocabulary.pieces), extra_ids=0, _spm_precompiled_charsmap=characters)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in vocabulary.whole])
    return tokenizer


class TextEncoder(nn.Module):
    """UMT5."""

    def __init__(self, model: Any, tokenizer: PromptTokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.before_layer: Callable[[int], None] | None = None  # see placement.py
        for number, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self._before, number))

    @property
    def layers(self) -> nn.ModuleList:
        """What can come to a GPU one by one."""
        blocks: nn.ModuleList = self.model.encoder.block
        return blocks

    def _before(self, number: int, *_: Any) -> None:
        if self.before_layer is not None:
            self.before_layer(number)

    @classmethod
    def from_weights(
        cls,
        weights: Weights,
        tokenizer: PromptTokenizer,
        *,
        dtype: torch.dtype,
        device: torch.device,
        mapped: bool = False,
        shards: Group | None = None,
        shared: CommonMemory | None = None,
    ) -> TextEncoder:
        """The encoder with sizes from the tensors' shapes, its weights in `dtype`. Raises UserError.

        `shards`: the processes of which each keeps a slice of every parameter. `shared`: as in `load_into`.
        """
        model, source_of = cls._empty(weights)
        model.encoder.embed_tokens = model.shared
        if shards is not None:
            shard(model, "encoder.block", lambda name: dtype, device, shards)
        layers = "encoder.block" if shards is None else ""
        load_into(model, weights, source_of, lambda name: dtype, device, layers=layers, mapped=mapped, shared=shared)
        return cls(model.to(device).eval(), tokenizer)

    @classmethod
    def check(cls, weights: Weights) -> int:
        """The width of its embeddings. Raises UserError when the weights do not fit; no tensor is read."""
        model, source_of = cls._empty(weights)
        check_fit(model, weights, source_of)
        return int(model.config.d_model)

    @staticmethod
    def _empty(weights: Weights) -> tuple[Any, dict[str, str]]:
        """The model without memory, and the key in the files of each of its parameters."""
        from transformers import UMT5Config, UMT5EncoderModel

        source_of = {_library_name(key): key for key in weights.shapes}
        tied = "encoder.embed_tokens.weight"  # one tensor under two names; files hold either or both
        if "shared.weight" not in source_of and tied in source_of:
            source_of = {"shared.weight": source_of.pop(tied), **source_of}
        sizes = _infer_config(weights, {name: weights.shapes[k] for name, k in source_of.items()})
        with torch.device("meta"), parsing(str(weights.path), "download it again"):
            # eager attention is bit-equal to the official code; sdpa is 1.5e-2 away from it in bf16
            config = UMT5Config(**sizes)
            config._attn_implementation = "eager"
            model = UMT5EncoderModel(config)
        source_of.setdefault(tied, source_of["shared.weight"])
        return model, source_of

    def forward(self, text: str) -> Tensor:
        """A prompt -> [1, 512, D] in host memory: the encoder's rows of its tokens, then zeros.

        The denoiser attends to the zero rows as well, so there are always 512 (source: the official code).
        """
        length, limit = self.tokenizer.count(text), self.tokenizer.length
        if length > limit:
            log.warning("the prompt has %d tokens and the text encoder takes %d: its end is cut off", length, limit)
        device = self.model.shared.weight.device
        ids, mask = (value.to(device) for value in self.tokenizer(text))
        with torch.no_grad():
            rows = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        padded: Tensor = (rows * mask[..., None].to(rows.dtype)).cpu()
        return padded


_RENAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    # GGUF
    (r"^token_embd\.", "shared."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


def _library_name(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _infer_config(weights: Weights, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    attention, feed = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    try:
        vocab, d_model = shapes["shared.weight"]
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        inner, d_ff = shapes[f"{attention}.q.weight"][0], shapes[f"{feed}.wi_1.weight"][0]
    except KeyError as error:
        raise UserError(f"{weights.path} is no UMT5 encoder: it has no {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{weights.path} is no UMT5 encoder: a weight of it has other dimensions") from error
    if min(vocab, d_model, buckets, heads, d_ff) < 1:
        raise UserError(f"{weights.path} is no UMT5 encoder: a weight of it is empty")
    return {
        "vocab_size": vocab,
        "d_model": d_model,
        "d_kv": inner // heads,
        "d_ff": d_ff,
        "num_heads": heads,
        "num_layers": count_numbered(shapes, "encoder.block.", str(weights.path)),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
    }
