"""Text encoders that carry their tokenizer, and those in GGUF: the same ids and weights as from the official folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from tests.support.golden import GOLDEN
from tests.support.text_encoders import in_gguf, in_safetensors, sentencepiece_model
from tests.support.tiny_checkpoint import CORPUS, write_prompt_tokenizer
from tests.weights.test_parts import T5, library_names, open_pipeline, read, same_t5
from wan.errors import UserError
from wan.text.umt5 import PromptTokenizer, clean
from wan.weights.vocabulary import read_vocabulary

TEXTS = [
    "a red ball rolls slowly across the floor",
    "  The   Ball, it RUNS!  ",
    "ｆｕｌｌ width, ﬁ ligature, ½ and №",
    "naïve café ¨a … 小さな犬 🐕 走る",
    "a ▁ mark,<extra_id_1> between and not <s>",
    "色调艳丽，过曝，静态",
    "x",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentencepiece_model()


def ids(tokenizer: PromptTokenizer, text: str) -> list[int]:
    numbers, mask = tokenizer(text)
    return [int(one) for one in numbers[mask.bool()]]


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_tokenizer_that_a_file_carries_gives_the_ids_of_sentencepiece(
    kind: str, model: bytes, tmp_path: Path
) -> None:
    file = tmp_path / f"umt5.{kind}"
    (in_safetensors if kind == "safetensors" else in_gguf)(model, file)
    ours, theirs = PromptTokenizer(file), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        assert ids(ours, text) == [*theirs.encode(clean(text)), 1], text
    assert ours("x")[0].shape == (1, 512) and ours.count("x") == len(ids(ours, "x"))


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_tokenizer_that_a_file_carries_gives_the_ids_of_the_folder(kind: str, model: bytes, tmp_path: Path) -> None:
    """The folder of the tiny checkpoints, its pieces as sentencepiece's model."""
    write_prompt_tokenizer(tmp_path / "folder", 256)
    tokenizer = Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    proto = import_protobuf().ModelProto.FromString(model)
    of_folder = json.loads(tokenizer.to_str())["model"]["vocab"]
    del proto.pieces[:]
    for piece, score in of_folder:
        kept = proto.pieces.add(piece=piece, score=score)
        kept.type = {"<unk>": 2, "<pad>": 3, "</s>": 3}.get(piece, 1)
    file = tmp_path / f"umt5.{kind}"
    (in_safetensors if kind == "safetensors" else in_gguf)(proto.SerializeToString(), file)
    ours, theirs = PromptTokenizer(file), PromptTokenizer(tmp_path / "folder")
    for text in [*TEXTS[:4], CORPUS, *CORPUS.split(". ")]:
        assert ids(ours, text) == ids(theirs, text), text


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_text_encoder_may_be_gguf(kind: str, model: bytes, tmp_path: Path) -> None:
    """Nothing of it comes from the folder, not even the tokenizer."""
    folder = Path(shutil.copytree(GOLDEN / "5b" / "ckpt", tmp_path / "ckpt"))
    state = library_names(read(folder / T5))
    for key, value in state.items():  # wide enough for blocks of 32
        if value.ndim == 2 and value.shape[1] == 40 or value.shape == (40,):
            state[key] = torch.cat([value, value[..., :24]], -1)
    for key in [key for key in state if state[key].ndim == 2 and state[key].shape[0] == 40]:
        state[key] = torch.cat([state[key], state[key][:24]])
    file = tmp_path / f"umt5-xxl-encoder-{kind}.gguf"
    meant = in_gguf(model, file, state, kind)
    shutil.rmtree(folder / "google")
    pipeline = open_pipeline(folder, part_files={"text_encoder": file})
    assert pipeline.checkpoint.tokenizer == file and same_t5(pipeline, meant)
    if kind != "F32":
        assert any(not torch.equal(meant[key], state[key].float()) for key in meant)
    assert pipeline.text_encoder("a boat").isfinite().all()


def test_a_file_that_carries_no_tokenizer_of_umt5_is_refused(model: bytes, tmp_path: Path) -> None:
    def refused(file: Path, message: str) -> None:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            PromptTokenizer(file)
        assert "\n" not in str(caught.value)

    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "none.safetensors")
    refused(tmp_path / "none.safetensors", "carries no tokenizer; give ckpt_dir")
    in_gguf(None, tmp_path / "none.gguf")
    refused(tmp_path / "none.gguf", "carries no tokenizer; give ckpt_dir")
    in_gguf(model, tmp_path / "plain.gguf", characters=False)
    refused(tmp_path / "plain.gguf", "lacks its table of characters")
    refused(in_safetensors(model[:-9], tmp_path / "cut.safetensors"), "cannot be read")
    other = import_protobuf().ModelProto.FromString(model)
    other.pieces[0].piece = "<s>"
    refused(in_safetensors(other.SerializeToString(), tmp_path / "other.safetensors"), "is not UMT5's")
    (tmp_path / "head.gguf").write_bytes((tmp_path / "plain.gguf").read_bytes()[:9000])
    refused(tmp_path / "head.gguf", "head.gguf")


def test_a_folder_without_a_tokenizer_needs_a_file_that_carries_one(model: bytes, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "5b" / "ckpt", tmp_path / "ckpt"))
    shutil.rmtree(folder / "google")
    with pytest.raises(UserError, match="expected the tokenizer folder google/umt5-xxl, found none, and models_t5"):
        open_pipeline(folder)
    state = library_names(read(folder / T5))
    (folder / T5).unlink()
    file = in_safetensors(model, folder / "umt5_xxl_fp16.safetensors", state)
    pipeline = open_pipeline(folder)
    assert pipeline.checkpoint.tokenizer == file and same_t5(pipeline, state)
    assert len(read_vocabulary(file).pieces) == 98 and "spiece_model" in load_file(file)
