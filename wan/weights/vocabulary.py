"""The vocabulary that a text encoder's own file carries: ComfyUI's as sentencepiece's model, GGUF's in its head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wan.errors import UserError
from wan.foreign import parsing
from wan.weights.gguf_files import read_gguf_fields
from wan.weights.quantized import dequantize
from wan.weights.reading import read_tensors
from wan.weights.single_file import VOCABULARY, VOCABULARY_OF_GGUF, has_vocabulary

_CONTROL, _OWN = 3, 4  # kinds of pieces that are never made of others (source: sentencepiece's model proto)
_FIRST = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a Unigram tokenizer with UMT5's conventions, and how it reads characters."""

    pieces: tuple[tuple[str, float], ...]  # by id, with their log probabilities
    whole: tuple[str, ...]  # those that are found before a text is cut into pieces
    characters: bytes  # sentencepiece's table of what a character is read as; empty: as it is


def read_vocabulary(file: Path) -> Vocabulary:
    """The vocabulary of a text encoder's file. Raises UserError for one that has none, or another model's."""
    if not has_vocabulary(file):
        raise UserError(f"{file} carries no tokenizer; give `ckpt_dir` with the folder google/umt5-xxl of Wan2.2")
    vocabulary = _of_gguf(file) if file.suffix.lower() == ".gguf" else _of_model(file)
    if tuple(piece for piece, _ in vocabulary.pieces[:3]) != _FIRST:
        raise UserError(f"the tokenizer in {file} is not UMT5's, whose first pieces are {', '.join(_FIRST)}")
    return vocabulary


def _of_model(file: Path) -> Vocabulary:
    from transformers.convert_slow_tokenizer import import_protobuf

    stored = dict(read_tensors(file, {VOCABULARY}))[VOCABULARY]
    with parsing(f"the tokenizer in {file}", "download it again"):
        model = import_protobuf().ModelProto()
        model.ParseFromString(bytes(dequantize(stored).numpy()))
        pieces = tuple((one.piece, one.score) for one in model.pieces)
        whole = [one.piece for one in model.pieces if one.type in (_CONTROL, _OWN)]
        return Vocabulary(pieces, _without_first(whole), model.normalizer_spec.precompiled_charsmap)


def _of_gguf(file: Path) -> Vocabulary:
    _, tokens, scores, kinds, characters = read_gguf_fields(file, VOCABULARY_OF_GGUF)
    if not characters:
        raise UserError(
            f"the tokenizer in {file} lacks its table of characters; give `ckpt_dir` with the folder google/umt5-xxl"
        )
    with parsing(f"the tokenizer in {file}", "download it again"):
        pieces = tuple(zip(tokens, map(float, scores), strict=True))
        whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _OWN)]
        return Vocabulary(pieces, _without_first(whole), bytes(characters))


def _without_first(pieces: list[str]) -> tuple[str, ...]:
    return tuple(piece for piece in pieces if piece not in _FIRST)
