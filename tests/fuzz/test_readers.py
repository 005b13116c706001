"""Damaged and hostile bytes for every reader of what others wrote: a UserError of one line, or a value. Seeded."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.commands import MADE
from tests.support.golden import DATA, GOLDEN_VLM
from wan import media
from wan.captioner import EndpointCaptioner, InternVLCaptioner, clean_caption, endpoint
from wan.captioner.next_prompt import Memory, fields_of
from wan.captioner.text import refusal
from wan.chain.report import render_report
from wan.chain.run_folder import RunFolder
from wan.chain.storyboard_file import read_storyboard
from wan.configs import config_for
from wan.denoiser.headers import check_denoiser
from wan.denoiser.lora_file import open_loras
from wan.denoiser.model import WanModel
from wan.errors import UserError
from wan.settings import LoraFile
from wan.text.umt5 import PromptTokenizer, TextEncoder
from wan.vae.vae import Wan2_2_VAE
from wan.weights.checkpoint import Names, open_checkpoint
from wan.weights.single_file import open_denoiser
from wan.weights.tensors import Weights, open_file, open_safetensors

pytestmark = pytest.mark.slow

SECONDS, GIB = 60, 2  # of one reader; its memory beyond what it began with
NASTY: list[Any] = [
    None, True, "", "x", "\0", "../../etc/passwd", "/dev/zero", "x" * 10_000, [], {}, [[]], [None], {"": {}}, -1, 0,
    10**400, 2**63, 1e308, -1e308, float("nan"), float("inf"), 0.5, [1e308] * 48, {"0": 1}, "1e400", "\ud800",
]  # fmt: skip
DEEP = ("[" * 5000, '{"a":' * 5000, "[" * 100_000 + "]" * 100_000, "- " * 3000, "{" * 3000, "<think>" * 3000)


def denoiser(weights: Weights) -> WanModel:
    """What is made of weights that pass for a denoiser's."""
    check_denoiser(weights)
    return WanModel._empty(weights)


class Mutator:
    """Small and large faults, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def bytes(self, data: bytes) -> bytes:
        """A text or a file of bytes with a fault in it."""
        kind, changed = self.random.randrange(9), bytearray(data)
        at = self.random.randrange(len(changed) + 1)
        if kind == 0:
            return data[:at]
        if kind == 1:
            return self.random.choice(DEEP).encode()
        if kind == 2:
            return bytes(changed[:at]) + self.random.choice((b"\0", b"\xff\xfe", b"9" * 5000, b"[" * 2000)) + data[at:]
        if kind == 3:
            return self.random.randbytes(self.random.choice((0, 1, 8, 500)))
        if kind == 4 and b"{" in data:
            with contextlib.suppress(ValueError, RecursionError):
                return json.dumps(self.value(json.loads(data))).encode()
        if kind == 5:  # a length or an offset that leads far away
            for index in range(at, min(at + 8, len(changed))):
                changed[index] = 0xFF
            return bytes(changed)
        for _ in range(self.random.choice((1, 1, 5, 50))):
            if changed:
                changed[self.random.randrange(min(len(changed), self.random.choice((200, 10**9))))] ^= 1 << kind % 8
        return bytes(changed)

    def value(self, value: Any) -> Any:
        """A JSON value in which one part is another."""
        if isinstance(value, dict) and value and self.random.random() < 0.9:
            key = self.random.choice(list(value))
            if self.random.random() < 0.15:
                return {name: one for name, one in value.items() if name != key}
            return value | {key: self.value(value[key])}
        if isinstance(value, list) and value and self.random.random() < 0.7:
            index = self.random.randrange(len(value))
            return [*value[:index], self.value(value[index]), *value[index + 1 :]]
        return self.random.choice(NASTY)

    def names(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of which one has another name or another shape."""
        name = self.random.choice(list(tensors))
        changed, value = dict(tensors), tensors[name]
        kind = self.random.randrange(5)
        if kind == 0:
            del changed[name]
        elif kind == 1:
            changed[name] = value.flatten()[:1].reshape(self.random.choice(((), (1,), (1, 1, 1, 1, 1), (1, 1)))).clone()
        elif kind == 2:
            changed[name] = torch.zeros(self.random.choice(((0,), (0, 3), (7, 0, 1, 1, 1))))
        else:
            del changed[name]
            number = self.random.choice(("999999999", "x", "-1", "01", "7"))
            changed[re.sub(r"\.\d+\.", f".{number}.", name, count=1) if kind == 3 else f"blocks.{number}.a.weight"] = (
                value
            )
        return changed


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz"))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more seconds and no more memory than a reader may take."""

    def late(*_: object) -> None:
        raise AssertionError(f"a reader took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    held = _memory("VmRSS", reset=True)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert _memory("VmHWM") - held < GIB << 20, "a reader took more than 2 GiB"


def _memory(what: str, reset: bool = False) -> int:
    """KiB of this process; the kernel of Linux counts them."""
    if not os.path.exists("/proc/self/clear_refs"):
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return int(re.findall(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def attack(read: Callable[[int], object], rounds: int, seed: int = 0) -> None:
    """`read(seed)` so many times: nothing but a UserError, whose text is one bearable line, may come out."""
    with bounded():
        for number in range(seed, seed + rounds):
            begun = time.monotonic()
            try:
                read(number)
            except UserError as error:
                assert str(error)
            except Exception as error:
                raise AssertionError(f"seed {number}: {type(error).__name__}: {error}") from error
            assert time.monotonic() - begun < 10, f"seed {number} took long"


# --- checkpoints


def copy(folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(MADE / folder, tmp_path / folder))


def files_attack(path: Path, read: Callable[[], object], rounds: int, seed: int = 0) -> None:
    whole = path.read_bytes()

    def once(number: int) -> None:
        path.write_bytes(Mutator(number).bytes(whole))
        read()

    attack(once, rounds, seed)


def tensors_attack(path: Path, read: Callable[[], object], rounds: int) -> None:
    whole = torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)

    def once(number: int) -> None:
        changed = Mutator(number).names(whole)
        if path.suffix == ".pth":
            torch.save(changed, path)
        else:
            save_file(changed, path)
        read()

    attack(once, rounds)


def test_what_a_checkpoint_declares(tmp_path: Path, rounds: int) -> None:
    folder = copy("ti2v", tmp_path)
    files_attack(folder / "wan_config.json", lambda: config_for("v2v-5B", folder), 30 * rounds)


def test_the_config_of_a_denoiser(tmp_path: Path, rounds: int) -> None:
    folder = copy("ti2v", tmp_path)

    def read() -> None:
        denoiser(open_safetensors(folder, "diffusion_pytorch_model"))

    files_attack(folder / "config.json", read, 8 * rounds)


def test_the_index_of_shards(tmp_path: Path, rounds: int) -> None:
    folder = copy("i2v", tmp_path) / "high_noise_model"
    os.rename(folder / "diffusion_pytorch_model.safetensors", folder / "a.safetensors")
    names = open_file(folder / "a.safetensors").shapes
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    files_attack(index, lambda: open_safetensors(folder, "diffusion_pytorch_model"), 20 * rounds)


@pytest.mark.parametrize("attacker", [files_attack, tensors_attack])
def test_a_denoiser(tmp_path: Path, rounds: int, attacker: Callable[[Path, Callable[[], object], int], None]) -> None:
    folder = copy("ti2v", tmp_path)
    path = folder / "diffusion_pytorch_model.safetensors"

    def read() -> None:
        denoiser(open_safetensors(folder, "diffusion_pytorch_model"))
        denoiser(open_denoiser(path, folder))

    attacker(path, read, 6 * rounds)


def test_a_denoiser_in_gguf(tmp_path: Path, rounds: int) -> None:
    from tests.support.quantized_files import gguf

    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_tensor("patch_embedding.weight", np.zeros((4, 4, 1, 2, 2), np.float32)[0])
    writer.add_tensor("blocks.0.self_attn.q.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files_attack(path, lambda: open_denoiser(path), 20 * rounds)


@pytest.mark.parametrize("attacker", [files_attack, tensors_attack])
def test_weights_in_pth(
    tmp_path: Path, rounds: int, attacker: Callable[[Path, Callable[[], object], int], None]
) -> None:
    folder = copy("ti2v", tmp_path)

    def read() -> Weights:
        return open_checkpoint(folder, in_channels=48, experts=1, names=Names(vae="Wan2.2_VAE.pth")).vae

    def read_vae() -> None:
        vae, row = read(), config_for("v2v-5B", folder)
        Wan2_2_VAE.from_weights(vae, mean=row.vae_mean, std=row.vae_std, device=torch.device("cpu"))

    attacker(folder / "Wan2.2_VAE.pth", read_vae, 4 * rounds)


def test_a_tensor_that_is_larger_than_its_bytes(tmp_path: Path) -> None:
    folder = copy("ti2v", tmp_path)
    path = folder / "Wan2.2_VAE.pth"
    torch.save(torch.load(path, weights_only=True) | {"conv2.weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    with bounded(), pytest.raises(UserError, match="conv2.weight is larger than its bytes"):
        open_checkpoint(folder, in_channels=48, experts=1, names=Names(vae="Wan2.2_VAE.pth"))


@pytest.mark.parametrize("attacker", [files_attack, tensors_attack])
def test_a_text_encoder(
    tmp_path: Path, rounds: int, attacker: Callable[[Path, Callable[[], object], int], None]
) -> None:
    folder = copy("ti2v", tmp_path)
    tokenizer = PromptTokenizer(folder / "google/umt5-xxl")
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"

    def read() -> None:
        names = Names(vae="Wan2.2_VAE.pth")
        weights = open_checkpoint(folder, in_channels=48, experts=1, names=names).text_encoder
        TextEncoder.from_weights(weights, tokenizer, dtype=torch.float32, device=torch.device("cpu"))

    attacker(path, read, 4 * rounds)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer(tmp_path: Path, rounds: int, name: str) -> None:
    folder = copy("ti2v", tmp_path) / "google/umt5-xxl"
    files_attack(folder / name, lambda: PromptTokenizer(folder).count("a red boat"), 8 * rounds)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_captioner(tmp_path: Path, rounds: int, name: str) -> None:
    folder = copy("vlm", tmp_path)

    def read() -> None:
        captioner = InternVLCaptioner(folder, "cpu")
        assert captioner.tokenizer
        if name == "config.json":
            captioner.load()

    files_attack(folder / name, read, 6 * rounds)


@pytest.mark.parametrize("attacker", [files_attack, tensors_attack])
def test_a_lora(tmp_path: Path, rounds: int, attacker: Callable[[Path, Callable[[], object], int], None]) -> None:
    folder = copy("ti2v", tmp_path)
    path = Path(shutil.copy(MADE / "light.safetensors", tmp_path))
    weights = open_safetensors(folder, "diffusion_pytorch_model")
    attacker(path, lambda: open_loras([LoraFile(path, 1.0)], weights), 20 * rounds)


def test_what_a_lora_says_of_itself(tmp_path: Path, rounds: int) -> None:
    weights = open_safetensors(MADE / "ti2v", "diffusion_pytorch_model")
    path, tensors = tmp_path / "a.safetensors", load_file(MADE / "light.safetensors")
    config = {"lora_alpha": 4, "alpha_pattern": {"blocks.0": 3}, "use_rslora": True, "r": 4}

    def once(number: int) -> None:
        header = Mutator(number).bytes(json.dumps(config).encode()).decode(errors="replace")
        save_file(tensors, path, {"lora_adapter_metadata": header})
        open_loras([LoraFile(path, 1.0)], weights)

    attack(once, 20 * rounds)


# --- what the user writes, and the folder of a run


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".txt"])
def test_a_storyboard(tmp_path: Path, rounds: int, suffix: str) -> None:
    clips = [{"prompt": "a", "frames": 5, "steps": 3, "guidance": [1, 2], "context": 5}, {}, {"seed": 4, "shift": 2.5}]
    path = tmp_path / f"story{suffix}"
    path.write_text(json.dumps({"defaults": {"steps": 4}, "clips": clips}))
    if suffix == ".yaml":
        path.write_text("defaults: &a {steps: 4}\nclips:\n  - <<: *a\n    prompt: 'a'\n  - a boat\n  - frames: 9\n")
    files_attack(path, lambda: read_storyboard(path), 40 * rounds)


@pytest.mark.parametrize(
    "name", ["run.json", "video_01_seed3.json", "video_01_seed3.safetensors", "video_02_seed4.mp4"]
)
def test_the_folder_of_a_run(tmp_path: Path, rounds: int, name: str) -> None:
    folder = copy("storyboard_5b", tmp_path)

    def read() -> None:
        with RunFolder(folder) as opened:
            clips = list(opened.clips().values())
            run = opened.run
            for clip in clips:
                Fraction(clip.record["fps"])
                Memory.from_json(clip.record.get("memory") or {})
                assert clip.last.ndim == 3 and clip.dropped >= 0
            records = [{"file": clip.video.name} | dict(clip.record) for clip in clips]
            float(run.get("seconds") or 0)
            facts = run | {"arguments": {}}  # the command's, not those of the file
            render_report(facts, records, [clip.sheet for clip in clips])

    files_attack(folder / name, read, 12 * rounds)


@pytest.mark.parametrize("name", ["h264_faststart.mp4", "vp9.webm", "anim.gif", "mpegts.ts"])
def test_a_video(tmp_path: Path, rounds: int, name: str) -> None:
    path = Path(shutil.copy(DATA / "corpus" / name, tmp_path))

    def read() -> None:
        media.probe(path)
        media.read_last_frame(path)
        media.sample_frames(path, 2)

    files_attack(path, read, 6 * rounds)


def test_a_picture(tmp_path: Path, rounds: int) -> None:
    path = Path(shutil.copy(MADE / "picture.png", tmp_path))
    files_attack(path, lambda: media.read_image(path), 40 * rounds)


# --- answers


def test_an_endpoint(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    whole = json.dumps({"choices": [{"message": {"content": "A cat."}}], "data": [{"id": "m"}]}).encode()
    body = b""
    monkeypatch.setattr(endpoint, "_ask", lambda *_: body)

    def once(number: int) -> None:
        nonlocal body
        body = Mutator(number).bytes(whole)
        answer = EndpointCaptioner("http://127.0.0.1:1/v1").describe(np.zeros((1, 8, 8, 3), np.uint8), "What?")
        clean_caption(answer).encode()

    attack(once, 60 * rounds)


FRAGMENTS = (
    "<think>", "</think>", "<box>", "Frame 1", "Frames 1, 2 and 3", "{", "}", "[", "](", "**", "__", "|", "|---|", "a",
    "the boat ", "...", ".", "\n", "\t", '"prompt":', "prompt:", "I cannot ", "```json", "<", ">", "x=", "。", "\ud800",
)  # fmt: skip


def test_an_answer_in_words(rounds: int) -> None:
    def once(number: int) -> None:
        chance = random.Random(number)
        few = chance.sample(FRAGMENTS, chance.choice((1, 2, 5)))
        text = "".join(chance.choice(few) for _ in range(chance.choice((10, 1000, 20_000))))
        assert "\n" not in clean_caption(text)
        refusal(text)
        fields_of(text[:20_000], ("prompt", "camera"))

    attack(once, 12 * rounds)


def test_every_golden_file_is_still_read() -> None:
    """The readers that are attacked do read what is whole."""
    assert InternVLCaptioner(GOLDEN_VLM / "orig", "cpu").tokenizer
    denoiser(open_safetensors(MADE / "ti2v", "diffusion_pytorch_model"))
    weights = open_safetensors(MADE / "ti2v", "diffusion_pytorch_model")
    assert open_loras([LoraFile(MADE / "light.safetensors", 1.0)], weights)
    assert len(RunFolder(MADE / "storyboard_5b").clips()) == 4
