"""The text encoder's edges: a folder's own code, prompts of exactly its length, the smallest sizes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from tests.support.golden import GOLDEN, float32
from tests.support.text_encoders import in_gguf, sentencepiece_model
from tests.support.tiny_checkpoint import write_prompt_tokenizer
from wan import WanTI2V
from wan.errors import UserError
from wan.text.umt5 import PromptTokenizer, TextEncoder, _from_vocabulary, _infer_config
from wan.weights.tensors import Weights
from wan.weights.vocabulary import Vocabulary, read_vocabulary


def test_a_tokenizer_s_folder_runs_no_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    trusted, from_pretrained = [], AutoTokenizer.from_pretrained

    def watched(source: Any, **options: Any) -> Any:
        trusted.append(options["trust_remote_code"])
        return from_pretrained(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    PromptTokenizer(GOLDEN / "5b" / "ckpt" / "google" / "umt5-xxl")
    assert trusted == [False]


def test_a_tokenizer_that_can_encode_nothing_is_refused_as_it_is_opened(tmp_path: Path) -> None:
    write_prompt_tokenizer(tmp_path / "whole", 256)
    assert PromptTokenizer(tmp_path / "whole", 8)("a")[1].sum() > 1
    file = tmp_path / "whole" / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    del config["pad_token"]
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match=r"the tokenizer in .*whole cannot be read, .*download it again \(.*padding"):
        PromptTokenizer(tmp_path / "whole", 8)


def test_a_vocabulary_s_table_of_characters_and_whole_words_are_used(tmp_path: Path) -> None:
    in_gguf(sentencepiece_model(), tmp_path / "umt5.gguf")
    stored = read_vocabulary(tmp_path / "umt5.gguf")
    assert stored.characters
    with_table = _from_vocabulary(stored)
    without = _from_vocabulary(Vocabulary(stored.pieces, stored.whole, b""))
    assert with_table.tokenize("ｘ") == with_table.tokenize("x") != without.tokenize("ｘ")
    whole = _from_vocabulary(Vocabulary((*stored.pieces, ("ＡＢ", -1.0)), ("ＡＢ",), stored.characters))
    assert "ＡＢ" in whole.tokenize("ＡＢ")  # before characters are replaced


@pytest.mark.parametrize(("tokens", "warned"), [(511, False), (512, False), (513, True)])
def test_only_a_prompt_that_is_cut_is_warned_of(tokens: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Tokenizer:
        length = 512

        def count(self, text: str) -> int:
            return tokens

        def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(1, 512, dtype=torch.int64), torch.ones(1, 512, dtype=torch.int64)

    sizes = {"vocab_size": 8, "d_model": 4, "d_kv": 4, "d_ff": 4, "num_heads": 1, "num_layers": 1}
    encoder = TextEncoder(UMT5EncoderModel(UMT5Config(**sizes)), Tokenizer())  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert encoder("x").shape == (1, 512, 4)
    assert ("its end is cut off" in caplog.text) == warned


def test_the_smallest_encoder_is_one_and_an_empty_one_is_not() -> None:
    attention, feed = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"

    def sizes(heads: int) -> dict[str, Any]:
        shapes: dict[str, tuple[int, ...]] = {
            "shared.weight": (8, 4),
            f"{attention}.relative_attention_bias.weight": (32, heads),
            f"{attention}.q.weight": (4, 4),
            f"{feed}.wi_1.weight": (6, 4),
        }
        return _infer_config(Weights(Path("t5.safetensors"), (), shapes, {}), shapes)

    assert sizes(1)["d_kv"] == 4 and sizes(1)["num_heads"] == 1
    with pytest.raises(UserError, match="a weight of it is empty"):
        sizes(0)


def test_each_layer_is_announced_before_it_is_used() -> None:
    sizes = {"vocab_size": 8, "d_model": 4, "d_kv": 4, "d_ff": 4, "num_heads": 1, "num_layers": 3}
    encoder = TextEncoder(UMT5EncoderModel(UMT5Config(**sizes)), None)  # type: ignore[arg-type]
    numbers: list[int] = []
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    encoder.model(tokens)
    encoder.before_layer = numbers.append
    encoder.model(tokens)
    assert numbers == [0, 1, 2]


def test_weights_that_do_not_fit_are_refused_without_reading_them() -> None:
    weights = WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt").checkpoint.text_encoder
    assert TextEncoder.check(weights) == weights.shapes["token_embedding.weight"][1]
    fewer = dict(weights.shapes)
    del fewer[next(name for name in fewer if name.endswith("norm.weight") or "norm" in name)]
    with pytest.raises(UserError):
        TextEncoder.check(Weights(weights.path, weights.files, fewer, {}))


def test_a_slice_is_taken_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt").checkpoint.text_encoder
    asked: list[Any] = []

    def shard(model: Any, layers: str, dtype_of: Any, device: torch.device, group: Any) -> None:
        asked.append((layers, dtype_of("x"), device, group))

    def load_into(model: Any, weights: Any, *_: Any, layers: str, **__: Any) -> None:
        asked.append(layers)
        raise KeyboardInterrupt

    monkeypatch.setattr("wan.text.umt5.shard", shard)
    monkeypatch.setattr("wan.text.umt5.load_into", load_into)
    cpu, group, how = torch.device("cpu"), object(), {"dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(KeyboardInterrupt):
        TextEncoder.from_weights(weights, None, shards=group, **how)  # type: ignore[arg-type]
    assert asked == [("encoder.block", torch.float32, cpu, group), ""]  # not layer by layer
    with pytest.raises(KeyboardInterrupt):
        TextEncoder.from_weights(weights, None, **how)  # type: ignore[arg-type]
    assert asked[2:] == ["encoder.block"]


def test_weights_without_embeddings_are_no_encoder() -> None:
    weights = WanTI2V(float32("ti2v-5B"), GOLDEN / "5b" / "ckpt").checkpoint.text_encoder
    without = {name: shape for name, shape in weights.shapes.items() if name != "token_embedding.weight"}
    with pytest.raises(UserError, match=r"is no UMT5 encoder: it has no shared\.weight"):
        TextEncoder.check(Weights(weights.path, weights.files, without, {}))
