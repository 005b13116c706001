"""What a VLM takes of a device beside its weights, told from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.captioner.base import read_config
from wan.device.host import GIB

ALWAYS = 0.4 * GIB  # workspaces, what a recorded step keeps, what is lost between tensors
WORDS, ANSWER = 1024, 512  # tokens of a long question beside its pictures, and of its answer
# InternVL3_5-8B, for a VLM whose config says it otherwise or is not there yet.
TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "image_size": 448, "patch_size": 14}


def working_bytes(path: Path | None, pictures: int, item: int = 2) -> int:
    """Bytes beside the weights for a question with so many pictures; `item`: bytes of a number.

    `path` is a folder, None for one that is not here yet. Of tensors that live at a time, as they were counted in a
    forward (tests/captioner/test_memory.py): in the vision tower the widest layer before and after its activation, in
    the language model the gate, its activation and their product, or queries, keys and values with their rotation, each
    beside what goes on. Keys and values of all tokens stay.
    """
    file = None if path is None else path / "config.json"
    config: Mapping[str, Any] = read_config(file) if file is not None and file.is_file() else {}
    told = _sizes(config.get("text_config") or config.get("llm_config") or config, TEXT)
    text, vision = TEXT | told, VISION | _sizes(config.get("vision_config"), VISION)
    if told and "head_dim" not in told:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    side, patch = vision["image_size"], vision["patch_size"]
    per_picture = config.get("image_seq_length")
    if not isinstance(per_picture, int):
        ratio = config.get("downsample_ratio")
        per_picture = int((side // patch * (ratio if isinstance(ratio, float) else 0.5)) ** 2)
    tokens, patches = pictures * per_picture + WORDS, pictures * ((side // patch) ** 2 + 1)
    places = tokens + ANSWER
    queries = text["num_attention_heads"] * text["head_dim"]
    kept = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * places
    pixels = 2 * 3 * side**2 * pictures
    patch_row = 2 * vision["intermediate_size"] + 5 * vision["hidden_size"]
    layer = max(3 * text["intermediate_size"] + 5 * text["hidden_size"], 4 * text["hidden_size"] + 6 * queries)
    return int(ALWAYS + item * (kept + pixels + max(patch_row * patches, layer * tokens)))


def _sizes(config: Any, wanted: Mapping[str, int]) -> dict[str, int]:
    """Those of the wanted numbers that a config has; of a pair the first. What is wrong in it is told by its reader."""
    if not isinstance(config, Mapping):
        return {}
    firsts = {
        name: value[0] if isinstance(value := config.get(name), list | tuple) and value else value for name in wanted
    }
    return {name: value for name, value in firsts.items() if isinstance(value, int) and value > 0}
