"""What `WanModel` calls the denoiser's parameters, by their official names; told without PyTorch."""

from __future__ import annotations

import re

from wan.weights.tensors import Weights

_EMBEDDER = "condition_embedder"
_OUTSIDE = {
    "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
    "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
    "time_projection.1": f"{_EMBEDDER}.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
# norm2 and norm3 change places
_IN_BLOCK = {"norm2": "norm3", "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
_IN_BLOCK |= {"modulation": "scale_shift_table"}
_ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_IN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_NAME = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<stem>.+?)(?P<leaf>\.weight|\.bias)?")


def in_model(name: str) -> str:
    """The name in `WanModel` of a parameter, or a layer, with this official name; one that is not official stays."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    block, stem, leaf = match["block"] or "", match["stem"], match["leaf"] or ""
    if not block:
        return _OUTSIDE.get(stem, stem) + leaf
    kind, _, part = stem.partition(".")
    if kind in _ATTENTION:
        stem = f"{_ATTENTION[kind]}.{_IN_ATTENTION.get(part, part)}"
    return block + _IN_BLOCK.get(stem, stem) + leaf


def key_map(weights: Weights) -> dict[str, str]:
    """The key in the files of each parameter of `WanModel`."""
    official = "blocks.0.self_attn.q.weight" in weights.shapes
    return {in_model(key) if official else key: key for key in weights.shapes}
