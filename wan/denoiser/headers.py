"""What the headers of a denoiser's files tell of its `WanModel`, without PyTorch: sizes and names of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from wan.errors import UserError
from wan.foreign import count_numbered
from wan.weights.tensors import Shape, Weights, check_shapes

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
_RELEASED_BLOCKS = {1536: 30, 3072: 30, 5120: 40}  # by the width (source: the official configs)
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
        if len(patch) != 3 or min(dim, in_channels, *patch) < 1:
            raise UserError(
                f"{weights.path} is no Wan2.2 denoiser: its patch_embedding.weight is {[dim, in_channels, *patch]}"
            )
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
    except IndexError as error:
        raise UserError(f"{weights.path} is no Wan2.2 denoiser: a weight of it is a single number") from error
    eps = config.get("eps", 1e-6)
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < 1:
        raise UserError(f"{weights.path}/config.json: expected eps between 0 and 1, found {str(eps)[:40]}")
    heads = config.get("num_heads", config.get("num_attention_heads"))
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or dim % (2 * heads):  # pairs are turned
        raise UserError(
            f"{weights.path}/config.json: expected num_heads that divide the width {dim} into even parts, found "
            f"{str(heads)[:40]}"
        )
    layers = count_numbered(shapes, "blocks.", str(weights.path))
    declared = config.get("num_layers")
    usual = _RELEASED_BLOCKS.get(dim, layers) if declared is None else declared
    if usual != layers:  # a conversion that was cut short
        says = "models of its width have" if declared is None else "its config.json says"
        raise UserError(f"{weights.path} has {layers} blocks, and {says} {str(usual)[:40]}; download it again")
    return sizes | {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "num_layers": layers,
        "cross_attn_norm": norm in shapes,
        "eps": eps,
    }


def parameters(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The shape of each parameter of a `WanModel` with these constructor arguments."""
    dim, ffn, patch = (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["ffn_dim"],
        config["patch_size"],
    )

    def linear(name: str, into: int, out: int) -> dict[str, Shape]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (dim, config["in_channels"], *patch),
        "patch_embedding.bias": (dim,),
        "scale_shift_table": (1, 2, dim),
        **linear("condition_embedder.time_embedder.linear_1", config["freq_dim"], dim),
        **linear("condition_embedder.time_embedder.linear_2", dim, dim),
        **linear("condition_embedder.time_proj", dim, 6 * dim),
        **linear("condition_embedder.text_embedder.linear_1", config["text_dim"], dim),
        **linear("condition_embedder.text_embedder.linear_2", dim, dim),
        **linear("proj_out", dim, config["out_channels"] * math.prod(patch)),
    }
    for block in (f"blocks.{number}" for number in range(config["num_layers"])):
        shapes |= {f"{block}.scale_shift_table": (1, 6, dim)}
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            shapes |= {f"{attention}.{norm}.weight": (dim,) for norm in ("norm_q", "norm_k")}
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= linear(f"{attention}.{part}", dim, dim)
        if config["cross_attn_norm"]:
            shapes |= {f"{block}.norm2.{part}": (dim,) for part in ("weight", "bias")}
        shapes |= linear(f"{block}.ffn.net.0.proj", dim, ffn) | linear(f"{block}.ffn.net.2", ffn, dim)
    return shapes


def check_denoiser(weights: Weights) -> None:
    """Raise UserError when the weights are not those of a denoiser; no tensor is read."""
    check_shapes(parameters(infer_config(weights)), weights, key_map(weights))
