"""InternVL folders of both formats give what the official code gives, and bad folders are refused in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.golden import GOLDEN_VLM
from wan.captioner import InternVLCaptioner, build_transform, dynamic_preprocess, frame_indices, open_captioner
from wan.captioner.base import Viewer
from wan.captioner.decoding import GreedyDecoder, fuse_projections
from wan.captioner.internvl import (
    native_config,
    native_tensors,
    quantization_method,
    quantization_of,
)
from wan.detail import heard_by
from wan.device import streaming
from wan.device.streaming import LayerStreamer, move_in_pieces
from wan.errors import UserError

EXPECTED = json.loads((GOLDEN_VLM / "expected.json").read_text(encoding="utf-8"))
ARRAYS = np.load(GOLDEN_VLM / "expected.npz")
FRAMES = np.load(GOLDEN_VLM / "frames.npy")
QUESTION = EXPECTED["question"]


@pytest.fixture(scope="module", params=["orig", "hf"])
def captioner(request: pytest.FixtureRequest) -> InternVLCaptioner:
    return InternVLCaptioner(GOLDEN_VLM / request.param, "cpu", torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a golden folder that a test may damage."""

    def copy(kind: str) -> Path:
        target = tmp_path / kind
        target.mkdir()
        for path in (GOLDEN_VLM / kind).iterdir():
            shutil.copyfile(path, target / path.name)  # not the mode: the originals may be read-only
        return target

    return copy


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_ids_and_pixels_are_the_official_ones(captioner: InternVLCaptioner) -> None:
    ids, pixels = captioner.prepare(FRAMES, QUESTION)
    assert ids.tolist() == [ARRAYS["input_ids"].tolist()]
    assert np.array_equal(pixels.numpy(), ARRAYS["pixel_values"])


@torch.inference_mode()
def test_features_and_logits_are_the_official_ones(captioner: InternVLCaptioner) -> None:
    ids, pixels = captioner.prepare(FRAMES, QUESTION)
    features = captioner.model.get_image_features(pixels).pooler_output
    logits = captioner.model(input_ids=ids, pixel_values=pixels).logits[0]
    np.testing.assert_allclose(features, ARRAYS["vision_features"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(logits[-1], ARRAYS["prefill_logits_last"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[::8], ARRAYS["prefill_logits_every8"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("system", "prefix", "count"), [(None, "", 40), ("", "nosys_", 12)])
def test_new_tokens_are_the_official_ones(
    captioner: InternVLCaptioner, system: str | None, prefix: str, count: int
) -> None:
    ids, pixels = captioner.prepare(FRAMES, QUESTION, system)
    assert ids.tolist() == [ARRAYS[f"{prefix}input_ids"].tolist()]
    assert captioner.generate(ids, pixels, count).tolist() == EXPECTED[f"{prefix}greedy_ids"]


def test_a_view_is_the_mean_of_the_vision_tower_s_patches(captioner: InternVLCaptioner) -> None:
    picture = Image.fromarray(FRAMES[0])
    view = captioner.view(picture)
    _, pixels = captioner.prepare(FRAMES[:1], QUESTION)
    with torch.inference_mode():
        patches = captioner.model.model.vision_tower(pixel_values=pixels).last_hidden_state[0, 1:]
    torch.testing.assert_close(view, torch.nn.functional.normalize(patches.mean(0), dim=0))
    assert isinstance(captioner, Viewer) and float(view @ view) == pytest.approx(1)


def test_text_is_the_official_one_and_again_after_close(captioner: InternVLCaptioner) -> None:
    texts = []
    for _ in range(2):
        texts.append(captioner.describe(FRAMES, QUESTION, max_new_tokens=40))
        captioner.close()
        assert not captioner.is_loaded
    assert texts == [EXPECTED["chat_text"]] * 2


def test_default_dtype_loads_bfloat16_and_nothing_before_the_first_use() -> None:
    captioner = InternVLCaptioner(GOLDEN_VLM / "orig", "cpu")
    assert not captioner.is_loaded
    assert {weight.dtype for weight in captioner.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["orig", "hf", "tied"])
@torch.inference_mode()
def test_weights_that_go_to_a_device_in_pieces_are_the_library_s(
    name: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PIECE", 5000)  # bytes, so that most tensors go in several
    path = folder("hf") if name == "tied" else GOLDEN_VLM / name
    if name == "tied":
        edit(path / "config.json", lambda config: config.update(tie_word_embeddings=True))
        edit(path / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
        lose_weight(path, "lm_head.weight")
    model, moved = (InternVLCaptioner(path, "cpu").model for _ in range(2))
    details: list[str] = []
    with heard_by(details.append):
        move_in_pieces(moved, torch.device("cpu"))
    assert len(details) > len(list(model.parameters())) and re.fullmatch(r"(\S+) of \1 GB", details[-1])
    for (key, value), (other, copy) in zip(everything(model), everything(moved), strict=True):
        assert key == other and type(value) is type(copy) and value.dtype == copy.dtype and torch.equal(value, copy)
        assert value.requires_grad == copy.requires_grad and value.data_ptr() != copy.data_ptr()
    assert (moved.lm_head.weight is moved.model.language_model.embed_tokens.weight) == (name == "tied")
    assert not moved.training


def everything(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


@pytest.mark.parametrize("name", ["orig", "hf"])
@pytest.mark.parametrize(("dtype", "mapped"), [(torch.bfloat16, True), (torch.float32, False)])
def test_weights_in_their_dtype_go_to_a_device_in_pieces(
    name: str, dtype: torch.dtype, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    load = InternVLCaptioner.from_pretrained

    def watched(self: InternVLCaptioner, *given: Any, home: torch.device, **options: Any) -> Any:
        asked.append(f"library to {home}")
        return load(self, *given, home=home, **options)

    monkeypatch.setattr(InternVLCaptioner, "from_pretrained", watched)
    monkeypatch.setattr(
        "wan.captioner.internvl.move_in_pieces", lambda model, device: asked.append(f"{model.device} to {device}")
    )
    model = InternVLCaptioner(GOLDEN_VLM / name, "meta", dtype).model  # a device that is not the host's memory
    assert asked == (["library to cpu", "cpu to meta"] if mapped else ["library to meta"])
    assert {value.dtype for value in model.parameters()} == {dtype}


def test_settings_in_the_folder_do_not_change_the_answer(folder: Callable[[str], Path]) -> None:
    path = folder("hf")
    edit(path / "generation_config.json", lambda c: c.update(do_sample=True, temperature=5.0, repetition_penalty=9.0))
    captioner = open_captioner(path, device="cpu", dtype=torch.float32)
    assert captioner.describe(FRAMES, QUESTION, max_new_tokens=40) == EXPECTED["chat_text"]


def test_vocab_and_merges_do_without_tokenizer_json(folder: Callable[[str], Path]) -> None:
    path = folder("orig")
    (path / "tokenizer.json").unlink()
    ids, _ = InternVLCaptioner(path, "cpu").prepare(FRAMES, QUESTION)
    assert ids.tolist() == [ARRAYS["input_ids"].tolist()]


def test_a_folder_saved_by_transformers_5_reads_the_same(captioner: InternVLCaptioner, tmp_path: Path) -> None:
    captioner.model.save_pretrained(tmp_path)
    captioner.tokenizer.save_pretrained(tmp_path)
    again = InternVLCaptioner(tmp_path, "cpu", torch.float32)
    assert again.describe(FRAMES, QUESTION, max_new_tokens=40) == EXPECTED["chat_text"]


def test_what_a_config_leaves_out_is_as_the_library_has_it(folder: Callable[[str], Path]) -> None:
    from transformers import InternVLConfig

    path = folder("hf")

    def leave_out(config: dict[str, Any]) -> None:
        del config["image_seq_length"], config["downsample_ratio"], config["vision_config"]["patch_size"]

    edit(path / "config.json", leave_out)
    captioner, usual = InternVLCaptioner(path, "cpu"), InternVLConfig()
    assert captioner.tokens_per_frame == usual.image_seq_length
    assert [captioner.image_size] * 2 == list(usual.vision_config.image_size)


def test_frames_are_sampled_as_officially() -> None:
    for name, indices in EXPECTED["sampling"].items():
        count, segments = map(int, name.split("x"))
        assert frame_indices(count, segments) == indices, name


def test_image_is_cut_into_the_nearest_grid() -> None:
    def sizes(width: int, height: int, **options: Any) -> int:
        tiles = dynamic_preprocess(Image.new("RGB", (width, height)), image_size=56, **options)
        assert {tile.size for tile in tiles} == {(56, 56)}
        return len(tiles)

    assert sizes(560, 280) == 8  # 4x2 and not 2x1: the image fills it
    assert sizes(60, 30) == 2
    assert sizes(560, 280, use_thumbnail=True) == 9
    assert sizes(560, 280, max_num=1, use_thumbnail=True) == 1
    assert sizes(1000, 100, max_num=6) == 6


def test_tiles_come_row_by_row() -> None:
    levels = np.zeros((112, 112, 3), np.uint8)
    levels[:56, 56:] = 80
    levels[56:, :56] = 160
    levels[56:, 56:] = 240
    tiles = dynamic_preprocess(Image.fromarray(levels), min_num=4, max_num=4, image_size=56)
    assert [tile.getpixel((28, 28))[0] for tile in tiles] == [0, 80, 160, 240]  # type: ignore[index]


def test_transform_squashes_and_normalises() -> None:
    pixels = build_transform(28)(Image.new("L", (10, 90), 255))
    assert pixels.shape == (3, 28, 28)
    assert pixels[:, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "config.json", lambda config: config.update(values))


def part(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "config.json", lambda config: config[name].update(values))


def internlm2(path: Path) -> None:
    edit(path / "config.json", lambda config: config["llm_config"].update(model_type="internlm2"))


def delete(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_text(content, encoding="utf-8")

    return damage


def truncate(path: Path) -> None:
    file = next(path.glob("model*1-of-*.safetensors"), path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:50_000])


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("orig", delete("config.json"), "is not a VLM folder, it has no config.json"),
        ("orig", write("config.json", "{"), "config.json cannot be read as JSON"),
        ("orig", write("config.json", "[]"), "must be a JSON object"),
        ("orig", set_config(model_type="llava"), "holds a llava model, not InternVL"),
        ("orig", set_config(ps_version="v1"), "ps_version v1, only v2 works"),
        ("orig", set_config(vision_config={}), "config.json lacks 'patch_size'"),
        ("orig", set_config(vision_config=[]), "config.json: vision_config is not as it must be"),
        ("orig", set_config(llm_config=None), "config.json is damaged"),
        ("orig", set_config(force_image_size="x"), "config.json: force_image_size is not as it must be"),
        ("orig", set_config(ps_version=[]), "only v2 works"),
        ("hf", set_config(text_config=3), "config.json: text_config is not as it must be"),
        ("hf", set_config(image_seq_length=10**9), "config.json: image_seq_length is not as it must be"),
        ("hf", set_config(downsample_ratio=0), "config.json: downsample_ratio is not as it must be"),
        ("hf", part("vision_config", patch_size=[]), "config.json: vision_config.patch_size"),
        ("hf", part("text_config", num_hidden_layers=10**6), "config.json: text_config.num_hidden_layers is not as"),
        ("hf", part("text_config", model_type=[]), "config.json: text_config.model_type is not as"),
        ("orig", write("config.json", "[" * 100_000), "config.json cannot be read as JSON: it is nested more than"),
        ("orig", internlm2, "language model of type internlm2; only InternVL with qwen2 or qwen3"),
        ("orig", delete("model-00002-of-00002.safetensors"), "lacks model-00002-of-00002.safetensors"),
        ("hf", delete("model.safetensors"), "lacks model.safetensors"),
        ("hf", write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
        ("hf", write("model.safetensors", "<!DOCTYPE html><html>"), "model.safetensors is a web page that was saved"),
        ("hf", write("model.safetensors", "Access denied"), "model.safetensors is a text .*Access denied"),
        (
            "orig",
            write("model-00002-of-00002.safetensors", ""),
            "00002.safetensors cannot be read, it may be truncated",
        ),
        ("hf", truncate, "model.safetensors cannot be read, it may be truncated"),
        ("orig", truncate, "cannot be read, it may be truncated"),
        ("hf", write("tokenizer.json", "<html>"), "tokenizer.json is a web page that was saved"),
        ("hf", write("config.json", "<html>"), "config.json is a web page that was saved"),
        ("orig", write("model.safetensors.index.json", "{}"), "weight_map in "),
    ],
)
def test_a_bad_folder_is_refused_before_anything_loads(
    kind: str, damage: Callable[[Path], None], message: str, folder: Callable[[str], Path]
) -> None:
    path = folder(kind)
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        InternVLCaptioner(path, "cpu")
    assert "\n" not in str(caught.value)


DEEP = '{"a":' * 20_000


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (
            "hf",
            part("text_config", hidden_size=100_000),
            "declares .* parameters and has weights of .* bytes, so config.json is damaged",
        ),
        ("hf", part("text_config", hidden_act="x"), "or a file in it cannot be read"),
        ("hf", part("vision_config", norm_type="x"), "or a file in it cannot be read"),
        ("hf", part("vision_config", use_qk_norm=None), "or a file in it cannot be read"),
        ("orig", part("llm_config", rope_scaling={"type": []}), "or a file in it cannot be read"),
        ("hf", write("generation_config.json", DEEP), "or a file in it cannot be read|failed .*generation_config"),
    ],
)
def test_a_damaged_config_is_one_line_where_the_library_reads_it(
    kind: str, damage: Callable[[Path], None], message: str, folder: Callable[[str], Path]
) -> None:
    path = folder(kind)
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        InternVLCaptioner(path, "cpu").load()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_folder_without_a_tokenizer_is_refused(folder: Callable[[str], Path]) -> None:
    path = folder("hf")
    (path / "tokenizer.json").unlink()
    (path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer.json \(or vocab.json and merges.txt\)"):
        InternVLCaptioner(path, "cpu")


def lose_weight(path: Path, *ends: str) -> None:
    from safetensors.torch import load_file, save_file

    file = next(path.glob("model*1-of-*.safetensors"), path / "model.safetensors")
    weights = load_file(file)
    del weights[next(name for name in weights if name.endswith(ends or ("layers.0.ls1", "layer.0.lambda_1")))]
    save_file(weights, file, {"format": "pt"})


def add_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(path.glob("model*1-of-*.safetensors"), path / "model.safetensors")
    save_file(load_file(file) | {"extra.weight": torch.zeros(1)}, file, {"format": "pt"})


def widen(path: Path) -> None:
    edit(path / "config.json", lambda config: config["vision_config"].update(intermediate_size=72))


@pytest.mark.parametrize("kind", ["orig", "hf"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_weight, r"has 1 missing weights \(model.vision_tower.encoder.layer.0.lambda_1\)"),
        (add_weight, r"has 1 unexpected weights \(extra.weight\)"),
        (widen, "has 9 mismatched weights"),
        (write("tokenizer.json", '{"model": {}}'), "the tokenizer in .* cannot be read"),
        (write("tokenizer.json", "not json"), "the tokenizer in .* cannot be read"),
    ],
)
def test_bad_contents_stop_with_one_line_that_offers_prompt(
    kind: str, damage: Callable[[Path], None], message: str, folder: Callable[[str], Path]
) -> None:
    path = folder(kind)
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        InternVLCaptioner(path, "cpu").describe(FRAMES, QUESTION, max_new_tokens=2)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("or give prompt to go on without captioning")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "ran out of memory: use vlm_device cpu"),
        (None, "empty answer"),
    ],
)
def test_a_failed_description_says_why(
    failure: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any) -> str:
        if failure is not None:
            raise failure
        return " \n"

    captioner = InternVLCaptioner(GOLDEN_VLM / "hf", "cpu")
    monkeypatch.setattr(captioner, "answer", answer)
    with pytest.raises(UserError, match=f"{message}.*or give prompt"):
        captioner.describe(FRAMES, QUESTION)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = InternVLCaptioner(GOLDEN_VLM / "hf", "cpu")
    monkeypatch.setattr(captioner, "answer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        captioner.describe(FRAMES, QUESTION)


@pytest.mark.parametrize("frames", [FRAMES.astype(np.float32), FRAMES[0], FRAMES[:0]])
def test_other_than_rgb_bytes_are_refused(captioner: InternVLCaptioner, frames: Any) -> None:
    with pytest.raises(UserError, match="a captioner needs RGB uint8"):
        captioner.describe(frames, QUESTION)


def test_pictures_may_come_as_a_list(captioner: InternVLCaptioner) -> None:
    as_array = captioner.describe(FRAMES, QUESTION, max_new_tokens=6)
    images = [Image.fromarray(frame) for frame in FRAMES]
    assert captioner.describe(images, QUESTION, max_new_tokens=6) == as_array
    assert captioner.describe(list(FRAMES), QUESTION, max_new_tokens=6) == as_array
    wider = [images[0].resize((images[0].width * 2, images[0].height)).convert("RGBA"), *images[1:]]
    assert captioner.describe(wider, QUESTION, max_new_tokens=6)


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the last of these runs it")


@interpreted
def test_our_attention_gives_the_official_tokens(captioner: InternVLCaptioner, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    from wan.captioner import decode_attention_kernel

    calls: list[Any] = []
    attend = decode_attention_kernel.attend_with_one_query

    def counted(*given: Any) -> torch.Tensor:
        calls.append(given)
        return attend(*given)

    monkeypatch.setattr(decode_attention_kernel, "attend_with_one_query", counted)
    monkeypatch.setattr("torch.cuda.device_of", lambda tensor: nullcontext())
    monkeypatch.setattr("wan.captioner.decoding.runs_triton", lambda device: True)
    captioner.close()
    ids, pixels = captioner.prepare(FRAMES, QUESTION)
    assert captioner.generate(ids, pixels, 12).tolist() == EXPECTED["greedy_ids"][:12]
    layers = captioner.config["text_config"]["num_hidden_layers"]
    assert len(calls) >= 1 + 11 * layers  # and a trial; the prompt is not among them
    length = 300  # no multiple of what a program looks at, and parts in which nothing is seen
    query, key, value = (torch.randn(1, heads, rows, 64) for heads, rows in ((12, 1), (4, length), (4, length)))
    seen = (torch.arange(length) < 20)[None, None, None]
    wide = [part.repeat_interleave(3, 1) for part in (key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(query, wide[0], wide[1], attn_mask=seen)
    torch.testing.assert_close(attend(query, key, value, seen, 0.125), exact.transpose(1, 2), atol=1e-5, rtol=1e-4)
    projected, angle = torch.randn(1, 1, 20 * 64).half(), torch.randn(1, 1, 32).repeat(1, 1, 2)
    turn, weights = (angle.cos().half(), angle.sin().half()), (torch.rand(64).half(), torch.rand(64).half())
    rows = projected.view(1, 1, 20, 64).transpose(1, 2)
    for norms in (weights, None):
        parts: list[torch.Tensor] = [rows[:, :12], rows[:, 12:16]]
        if norms is not None:
            parts = [torch.nn.functional.rms_norm(*one, 1e-6) for one in zip(parts, [(64,)] * 2, norms, strict=True)]
        key, value = torch.zeros(2, 1, 4, 20, 64, dtype=torch.half)
        placed = decode_attention_kernel.place_one_token(projected, turn, torch.tensor([[7]]), key, value, norms, 1e-6)
        for made, wanted in zip((placed, key[:, :, 7:8]), apply_rotary_pos_emb(*parts, *turn), strict=True):
            torch.testing.assert_close(made, wanted, atol=2e-3, rtol=1e-3)  # the norm's sum has another order
        assert torch.equal(value[:, :, 7:8], rows[:, 16:])
        assert not value[:, :, 8:].any() and not key[:, :, :7].any()
    before = calls.copy()
    with torch.inference_mode():  # as a decoder is made
        fuse_projections(captioner.model)
    first = captioner.model.model.language_model.layers[0].self_attn
    assert first.q_proj.weight.data_ptr() == first.fused[0].data_ptr()
    assert captioner.generate(ids, pixels, 12).tolist() == EXPECTED["greedy_ids"][:12]
    assert len(calls) == len(before) + 11 * layers


@interpreted
@pytest.mark.parametrize("broken", ["raises", "wrong"])
def test_an_attention_that_does_not_work_here_is_left_out(
    captioner: InternVLCaptioner, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def attend(query: torch.Tensor, *_: Any) -> torch.Tensor:
        if broken == "raises":
            raise RuntimeError("no such machine")
        return query.transpose(1, 2)

    monkeypatch.setattr("wan.captioner.decode_attention_kernel.attend_with_one_query", attend)
    monkeypatch.setattr("wan.captioner.decoding.runs_triton", lambda device: True)
    captioner.close()
    with caplog.at_level("INFO", logger="wan"):
        ids, pixels = captioner.prepare(FRAMES, QUESTION)
        assert captioner.generate(ids, pixels, 5).tolist() == EXPECTED["greedy_ids"][:5]
    assert ("no such machine" if broken == "raises" else "is wrong on this machine") in caplog.text
    captioner.close()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_our_attention_runs_in_triton_s_interpreter() -> None:
    chosen = "our_attention_gives or does_not_work_here"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout


def test_tokens_after_the_end_mark_are_thrown_away(captioner: InternVLCaptioner) -> None:
    ids, pixels = captioner.prepare(FRAMES, QUESTION)
    wanted = EXPECTED["greedy_ids"]
    decoder = GreedyDecoder(captioner.model, ids.shape[1] + 40)
    for count in (1, 2, 11):
        assert decoder(ids, pixels, count, None).tolist() == wanted[:count]
    end = wanted[10]
    assert decoder(ids, pixels, 40, end).tolist() == wanted[: wanted.index(end) + 1]


@pytest.mark.parametrize("name", ["orig", "hf"])
@pytest.mark.parametrize("staying", [0, 1])
def test_a_vlm_whose_layers_come_one_by_one_says_the_same(
    name: str, staying: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = InternVLCaptioner(GOLDEN_VLM / name, "cpu", torch.float32)
    words = whole.describe(FRAMES, QUESTION, max_new_tokens=12)
    tensors = [*whole.model.parameters(), *whole.model.buffers()]
    layers = whole.model.model.language_model.layers
    layer = max(sum(value.nbytes for value in one.state_dict().values()) for one in layers)
    came: list[int] = []
    bring = LayerStreamer.__call__

    def watched(self: LayerStreamer, number: int) -> None:
        came.append(number)
        bring(self, number)

    monkeypatch.setattr(LayerStreamer, "__call__", watched)
    monkeypatch.setattr("wan.device.placement.layers_that_stay", lambda *_: staying)
    streamed = InternVLCaptioner(GOLDEN_VLM / name, "cpu", torch.float32, room=lambda: layer)
    for _ in range(2):
        assert streamed.describe(FRAMES, QUESTION, max_new_tokens=12) == words
    picture = Image.fromarray(FRAMES[0])
    torch.testing.assert_close(streamed.view(picture), whole.view(picture))
    assert came[: len(layers)] == list(range(len(layers))) and len(came) > 12
    assert caplog.text.count("its layers come one by one") == 1
    roomy = InternVLCaptioner(GOLDEN_VLM / name, "cpu", torch.float32, room=lambda: 2 * sum(x.nbytes for x in tensors))
    came.clear()
    assert roomy.describe(FRAMES, QUESTION, max_new_tokens=12) == words and not came
    streamed.close()
    assert not streamed.is_loaded and streamed._layered is None


def test_a_device_without_room_for_two_layers_is_said_with_what_helps() -> None:
    tight = InternVLCaptioner(GOLDEN_VLM / "orig", "cpu", torch.float32, room=lambda: 1000)
    with pytest.raises(UserError) as refused:
        tight.describe(FRAMES, QUESTION, max_new_tokens=12)
    assert (
        "even layer by layer" in str(refused.value)
        and "a smaller InternVL, fewer `num_segments`" in refused.value.marked
    )
    assert "smaller clips" not in str(refused.value)


ORIGINAL: dict[str, Any] = {
    "ps_version": "v2",
    "vision_config": {
        **{name: at for at, name in enumerate(("hidden_size", "num_hidden_layers", "num_attention_heads"), 1)},
        "intermediate_size": 4,
        "image_size": 56,
        "patch_size": 14,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "layer_norm_eps": 1e-5,
        "use_flash_attn": True,
    },
    "llm_config": {"model_type": "qwen3", "torch_dtype": "bfloat16", "hidden_size": 8, "use_cache": False},
}


def test_the_config_of_an_original_folder_is_told_in_native_words() -> None:
    native = native_config(ORIGINAL)
    vision: dict[str, Any] = {
        "hidden_size": 1,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 4,
    }
    vision |= {"intermediate_size": 4, "image_size": 56, "patch_size": 14, "norm_type": "layer_norm"}
    assert native == {
        "vision_config": vision | {"attention_bias": True, "use_qk_norm": False, "layer_norm_eps": 1e-5},
        "text_config": {"model_type": "qwen3", "hidden_size": 8, "use_cache": True},
        "downsample_ratio": 0.5,
        "image_seq_length": 4,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }
    more = {"force_image_size": 112, "downsample_ratio": 0.25, "select_layer": -2}
    changed = native_config(ORIGINAL | more | {"llm_config": {"tie_word_embeddings": True}})
    assert (changed["image_seq_length"], changed["downsample_ratio"]) == (4, 0.25)
    assert (changed["vision_feature_layer"], changed["tie_word_embeddings"]) == (-2, True)
    assert native_config(ORIGINAL | {"force_image_size": 0})["image_seq_length"] == 4
    with pytest.raises(UserError, match="ps_version v1, only v2 works"):
        native_config({key: value for key, value in ORIGINAL.items() if key != "ps_version"})


@pytest.mark.parametrize(
    ("original", "native"),
    [
        ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
        (
            "vision_model.encoder.layers.3.attn.proj.bias",
            "model.vision_tower.encoder.layer.3.attention.projection_layer.bias",
        ),
        ("mlp1.0.weight", "model.multi_modal_projector.layer_norm.weight"),
        ("language_model.model.norm1.weight", "model.language_model.norm1.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("another.attn.weight", "another.attn.weight"),
    ],
)
def test_a_weight_has_its_native_name(original: str, native: str) -> None:
    tensor = torch.arange(6.0)
    [(name, value)] = native_tensors(original, tensor).items()
    assert name == native and value is tensor


def test_query_key_and_value_are_parted() -> None:
    parts = native_tensors("vision_model.encoder.layers.0.attn.qkv.weight", torch.arange(12.0).view(6, 2))
    place = "model.vision_tower.encoder.layer.0.attention"
    assert {name: part[0, 0].item() for name, part in parts.items()} == {
        f"{place}.q_proj.weight": 0,
        f"{place}.k_proj.weight": 4,
        f"{place}.v_proj.weight": 8,
    }


def test_how_weights_are_quantised_is_said_by_the_config_or_its_language_model() -> None:
    one = {"quant_method": "awq"}
    for config in ({"quantization_config": one}, {"llm_config": {"quantization_config": one}}):
        assert quantization_of(config) == quantization_of(config | {"text_config": None}) == one
    assert quantization_of({"text_config": {"quantization_config": one}, "llm_config": {}}) == one
    assert quantization_of({"quantization_config": None, "llm_config": None}) is None
    methods: list[dict[str, Any]] = [one, {"load_in_4bit": False}, {"quant_method": None}]
    assert [quantization_method(method) for method in methods] == ["awq", "bitsandbytes", "of an unknown kind"]


def test_a_decoder_is_kept_while_a_question_fits(captioner: InternVLCaptioner, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, bool]] = []

    class Decoder:
        def __init__(self, model: Any, needed: int, recorded: bool = True) -> None:
            made.append((needed, recorded))
            self.capacity = 256

        def __call__(self, ids: torch.Tensor, pixels: torch.Tensor, most: int, end: int | None) -> torch.Tensor:
            assert end == captioner.tokenizer.get_vocab()["<|im_end|>"]
            return torch.tensor([most])

    monkeypatch.setattr("wan.captioner.internvl.GreedyDecoder", Decoder)
    monkeypatch.setattr(captioner, "_decoder", None)
    ids, pixels = torch.zeros(1, 200, dtype=torch.long), torch.zeros(1, 3, 8, 8)
    assert [captioner.generate(ids, pixels, most).tolist() for most in (9, 56, 57)] == [[9], [56], [57]]
    assert made == [(209, True), (257, True)]
    monkeypatch.setattr(captioner, "quantization", {"quant_method": "awq"})
    captioner.generate(ids, pixels, 57)  # for which a decoder of 256 has no room
    assert made[2:] == [(257, False)]
    captioner.close()
    assert captioner._decoder is None and not captioner.waits_in_host_memory
