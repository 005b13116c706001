"""Text encoders in files as they are published, with the tokenizer that they carry."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import import_protobuf

from tests.support.quantized_files import State, finish, gguf, store
from tests.support.tiny_checkpoint import CORPUS


@functools.cache
def sentencepiece_model() -> bytes:
    """A model as Google makes them: Unigram, its own normalization, pieces that stay whole."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*re.split(r"(?<=[.,]) ", CORPUS), "色调艳丽 小さな犬 走る"]),
        model_writer=written,
        vocab_size=98,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["<extra_id_1>", "<extra_id_0>"],
        minloglevel=2,
        num_threads=1,
    )
    return written.getvalue()


def in_safetensors(model: bytes, file: Path, state: State | None = None) -> Path:
    stored = {f"transformer.{key}": value for key, value in (state or {"shared.weight": torch.zeros(2, 2)}).items()}
    save_file(stored | {"spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}, file)
    return file


OF_LAYER = {
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    "0.layer_norm": "attn_norm",
    "1.layer_norm": "ffn_norm",
} | {f"SelfAttention.{one}": f"attn_{one}" for one in "qkvo"}


def gguf_name(key: str) -> str:
    """A library's name in llama.cpp's words."""
    plain = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    if key in plain:
        return plain[key]
    number, inner = re.fullmatch(r"encoder\.block\.(\d+)\.layer\.(.+)\.weight", key).groups()  # type: ignore[union-attr]
    return f"enc.blk.{number}.{next(name for end, name in OF_LAYER.items() if inner.endswith(end))}.weight"


def in_gguf(
    model: bytes | None, file: Path, state: State | None = None, kind: str = "F32", characters: bool = True
) -> State:
    """As llama.cpp writes it, with a vocabulary that is padded to the rows of the embedding; returns what it means."""
    writer, meant = gguf.GGUFWriter(file, "t5encoder"), {}
    if model is not None:
        proto = import_protobuf().ModelProto.FromString(model)
        padding = [f"[PAD{number}]" for number in range(1, 1101)]
        writer.add_tokenizer_model("t5")
        writer.add_token_list([piece.piece for piece in proto.pieces] + padding)
        writer.add_token_scores([piece.score for piece in proto.pieces] + [-1000.0] * len(padding))
        writer.add_token_types([piece.type for piece in proto.pieces] + [5] * len(padding))
        if characters:
            writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)
    wanted = gguf.GGMLQuantizationType[kind]
    for key, value in (state or {"shared.weight": torch.zeros(2, 2)}).items():
        packs = value.ndim == 2 and "bias" not in key and value.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        kept = wanted if packs else gguf.GGMLQuantizationType.F32
        meant[key] = store(writer, gguf_name(key), value.float().numpy(), kept).reshape(value.shape)
    finish(writer)
    return meant
