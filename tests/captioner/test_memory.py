"""What a VLM works with beside its weights: the estimate against the tensors that live in a forward."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.served import MODELS
from tests.support.tiny_checkpoint import InternVL, write_internvl
from wan.captioner import InternVLCaptioner, memory, working_bytes
from wan.captioner.memory import ALWAYS, ANSWER, WORDS
from wan.device.host import GIB
from wan.prompting import CaptionerOwner


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
                    self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize(
    ("pictures", "sizes"),
    [
        (3, InternVL(448, 64, 1, 256, 2, 2, 1, 64)),  # the language model's layers take the most
        (3, InternVL(448, 256, 1, 32, 1, 2, 1, 16)),  # the vision tower does
        (1, InternVL(448, 64, 1, 128, 4, 8, 8, 64)),  # what stays of each token does
    ],
)
def test_the_estimate_is_what_a_forward_holds(
    pictures: int, sizes: InternVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_internvl(folder := tmp_path / "vlm", sizes)
    monkeypatch.setattr(memory, "ALWAYS", 0)
    monkeypatch.setattr(memory, "WORDS", 128)
    monkeypatch.setattr(memory, "ANSWER", 64)
    captioner = InternVLCaptioner(folder, "cpu")
    frames = torch.zeros(pictures, 40, 60, 3, dtype=torch.uint8).numpy()
    ids, pixels = captioner.prepare(frames, "What happens?")
    _ = captioner.model
    living = Living()
    with living:
        captioner.generate(ids, pixels.bfloat16(), 2)
    estimate = working_bytes(folder, pictures)
    assert 0.9 * living.peak < estimate < 1.7 * living.peak, (living.peak, estimate)


def test_an_8b_vlm_takes_what_was_measured_and_more_pictures_take_more(tmp_path: Path) -> None:
    # benchmarks/LOG.md: a peak of 17.3 GiB with 15.9 of weights, of which 0.65 were logits of the benchmark's own
    assert 0.75 < working_bytes(None, 8) / GIB < 1.5
    sizes = [working_bytes(None, pictures) for pictures in (1, 8, 64, 256)]
    assert sizes == sorted(sizes) and sizes[-1] > 12 * GIB  # a flat 2 GiB ran out of memory there
    tiny = working_bytes(MODELS / "tiny-InternVL", 8)
    assert ALWAYS < tiny < 1.2 * ALWAYS
    # the same sizes in the library's format, whose sides are pairs
    config = {
        "image_seq_length": 256,
        "text_config": memory.TEXT,
        "vision_config": memory.VISION | {"patch_size": [14]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert working_bytes(tmp_path, 8) == working_bytes(None, 8)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": None, "vision_config": {"patch_size": "?"}}))
    assert working_bytes(tmp_path, 8) == working_bytes(None, 8)
    assert WORDS + ANSWER < 8 * 256


def owner(path: Path, vram: int | None = None) -> CaptionerOwner:
    gpu = torch.device("cuda")
    return CaptionerOwner(path, url=None, question="?", trust_remote_code=False, main=gpu, vram=vram)


def test_more_pictures_leave_its_weights_less_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(16 * GIB)  # a hole, which takes no disk
    (tmp_path / "config.json").write_text("{}")
    assert owner(tmp_path, 20 * GIB).device.type == "cuda"
    many = owner(tmp_path, 20 * GIB)
    many.expect(256)
    assert many.device.type == "cpu"

    monkeypatch.setattr("wan.prompting.free_bytes", lambda device: 20 * GIB)
    monkeypatch.setattr("wan.prompting.drop_cache", lambda device: None)
    closed: list[int] = []
    streams = owner(tmp_path)
    assert streams.host_bytes == 0
    before = streams._room()
    captioner: Any = SimpleNamespace(close=lambda: closed.append(1), describe=lambda frames, asked: "A boat.")
    streams.use(captioner)
    frame: Any = None
    streams.describe([frame] * 8)
    assert not closed
    streams.describe([frame] * 200)
    assert closed == [1] and streams._room() < before - 8 * GIB
    assert streams.host_bytes == 16 * GIB  # its layers wait there now


TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
# of three pictures of 4 x 4 patches and 4 tokens: 1036 tokens, 1548 places with an answer, 51 rows of patches
KEPT, PIXELS = 2 * 2 * 2 * 16 * 1548, 2 * 3 * 56 * 56 * 3


@pytest.mark.parametrize(
    ("text", "vision", "more", "numbers"),
    [
        ({}, {}, {}, KEPT + PIXELS + (3 * 128 + 5 * 64) * 1036),
        ({"intermediate_size": 64}, {}, {}, KEPT + PIXELS + (4 * 64 + 6 * 64) * 1036),
        ({}, {"intermediate_size": 9000}, {}, KEPT + PIXELS + (2 * 9000 + 5 * 32) * 51),
        ({"head_dim": None}, {"patch_size": [14, 14]}, {}, KEPT + PIXELS + (3 * 128 + 5 * 64) * 1036),  # 64 / 4
        ({}, {}, {"image_seq_length": 4}, KEPT + PIXELS + (3 * 128 + 5 * 64) * 1036),
        ({}, {}, {"image_seq_length": 104}, 2 * 2 * 2 * 16 * 1848 + PIXELS + (3 * 128 + 5 * 64) * 1336),
        ({}, {}, {"downsample_ratio": 1.0}, 2 * 2 * 2 * 16 * 1584 + PIXELS + (3 * 128 + 5 * 64) * 1072),
    ],
)
@pytest.mark.parametrize("item", [2, 4])
def test_the_estimate_is_the_sum_of_what_stays_and_of_the_widest_layer(
    text: dict[str, Any], vision: dict[str, Any], more: dict[str, Any], numbers: int, item: int, tmp_path: Path
) -> None:
    config = {"vision_config": VISION | vision, **more}
    for key in ("text_config", "llm_config"):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: TEXT | text}))
        assert working_bytes(tmp_path, 3, item) == int(0.4 * 2**30 + item * numbers)
    if item == 2:
        assert working_bytes(tmp_path, 3) == working_bytes(tmp_path, 3, 2)


def test_what_a_config_says_in_other_words_is_taken_from_the_usual_vlm() -> None:
    wanted = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
    assert memory._sizes({"a": 7, "b": [8, 9], "c": [], "d": 0, "e": "x"}, wanted) == {"a": 7, "b": 8}
    assert memory._sizes({"a": -1, "b": (8,), "c": 1.5}, wanted) == {"b": 8}
    assert memory._sizes(None, wanted) == memory._sizes([3], wanted) == {}
