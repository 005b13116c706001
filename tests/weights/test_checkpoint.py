"""Checkpoint folders: both layouts give the same models, and every broken folder is said in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.golden import GOLDEN, ROOT, float32
from wan import WanTI2V
from wan.configs import WAN_CONFIGS, config_for
from wan.errors import UserError
from wan.weights.checkpoint import Checkpoint, Names, _check_vae, identify, open_checkpoint, resolve_folder
from wan.weights.gguf_files import read_gguf_fields
from wan.weights.loading import _range
from wan.weights.prefetch import ReadAhead, that_fit
from wan.weights.pth import OtherPickleError, _Reader, _Storage, _tensor
from wan.weights.tensors import Weights, listing, open_safetensors

pytestmark = pytest.mark.slow

A14B, FIVE_B = GOLDEN / "14b" / "ckpt", GOLDEN / "5b" / "ckpt"


@pytest.fixture
def five_b(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIVE_B, tmp_path / "ti2v"))


@pytest.fixture
def a14b(tmp_path: Path) -> Path:
    return Path(shutil.copytree(A14B, tmp_path / "i2v"))


def to_diffusers_layout(pipeline: Any, folder: Path, parts: dict[str, Any]) -> Path:
    """The golden checkpoint as diffusers' own save_pretrained writes it, in several shards."""
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    for name, model in parts.items():
        model.save_pretrained(folder / name, max_shard_size="150KB")
    pipeline.vae.model.register_to_config(
        latents_mean=list(pipeline.config.vae_mean), latents_std=list(pipeline.config.vae_std)
    )
    pipeline.vae.model.save_pretrained(folder / "vae")
    pipeline.text_encoder.model.save_pretrained(folder / "text_encoder")
    shutil.copytree(pipeline.checkpoint.tokenizer, folder / "tokenizer")
    return folder


@pytest.mark.parametrize("family", ["14b", "5b"])
def test_the_diffusers_layout_makes_the_same_video(family: str, i2v: Any, ti2v: Any, tmp_path: Path) -> None:
    image = __import__("PIL.Image").Image.open(GOLDEN / family / "image.png").convert("RGB")
    call: dict[str, Any] = {"frame_num": 5, "sampling_steps": 2, "guide_scale": 3.0, "seed": 3}
    if family == "14b":
        official = i2v
        # there, `transformer` is the high-noise expert
        parts = {"transformer": i2v.high_noise_model, "transformer_2": i2v.low_noise_model}
        call["max_area"] = 2304
    else:
        official, parts = ti2v, {"transformer": ti2v.model}
        call["max_area"] = 4096
    folder = to_diffusers_layout(official, tmp_path / "diffusers", parts)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    library = type(official)(float32("i2v-A14B" if family == "14b" else "ti2v-5B"), folder)
    assert library.checkpoint.tokenizer.name == "tokenizer"  # as in that layout
    assert torch.equal(library.generate("a boat", image, **call), official.generate("a boat", image, **call))


def test_folders_are_told_apart_by_their_files() -> None:
    assert identify(A14B, Names()) == (2, 36)
    assert identify(FIVE_B, Names()) == (1, 48)


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))[number]


def truncate(file: Path, share: float = 0.5) -> None:
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(int(size * share))


def edit_shard(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = next(file.parent.glob("*.index.json"))
    listed = json.loads(index.read_text())
    listed["weight_map"] = {key: name for key, name in listed["weight_map"].items() if name != file.name}
    listed["weight_map"] |= dict.fromkeys(tensors, file.name)
    index.write_text(json.dumps(listed))


def drop_bias(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if key.endswith("ffn.0.bias"))]


def add_key(tensors: dict[str, torch.Tensor]) -> None:
    tensors["img_emb.proj.0.weight"] = torch.zeros(3)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("self_attn.q.weight"))
    tensors[key] = tensors[key][:5].contiguous()


def hold(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = shard(folder, 1)
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith("ffn.0.bias"))
        save_file(tensors | {key: tensors[key].to(dtype)}, file)

    return change


def hold_twice(folder: Path) -> None:
    tensors = load_file(shard(folder, 0))
    edit_shard(shard(folder, 1), lambda more: more.update(dict([next(iter(tensors.items()))])))


def whole_numbers(folder: Path) -> None:
    file = folder / "Wan2.2_VAE.pth"
    tensors = torch.load(file)
    torch.save(tensors | {"conv1.bias": tensors["conv1.bias"].int()}, file)


BROKEN_5B: list[tuple[Callable[[Path], Any], str]] = [
    (hold(torch.int64), r"blocks\.\d\.ffn\.0\.bias holds I64 numbers, which are no weights"),
    (hold(torch.complex64), r"holds C64 numbers"),  # a traceback
    (hold(torch.float8_e8m0fnu), r"holds F8_E8M0 numbers"),
    (whole_numbers, r"VAE.pth: conv1.bias holds whole numbers, which are no weights"),
    (hold_twice, r"00002-of-00003.safetensors has what another shard has too \(twice blocks"),
    (lambda f: shard(f, 1).unlink(), r"1 of 3 shards are missing \(diffusion_pytorch_model-00002"),
    (lambda f: truncate(shard(f, 1)), r"may be truncated or damaged; download it again"),
    (lambda f: truncate(shard(f, 2), 0.0), r"may be truncated"),
    (lambda f: truncate(f / "Wan2.2_VAE.pth"), r"Wan2.2_VAE.pth cannot be read, it may be truncated"),
    (
        lambda f: (f / "Wan2.2_VAE.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        r"VAE.pth is a pointer of Git LFS, not the file itself",
    ),
    (lambda f: (f / "Wan2.2_VAE.pth").unlink(), r"expected Wan2.2_VAE.pth, found no such file"),
    (lambda f: (f / "models_t5_umt5-xxl-enc-bf16.pth").unlink(), r"expected models_t5_umt5-xxl-enc-bf16.pth"),
    (lambda f: shutil.rmtree(f / "google"), r"expected the tokenizer folder google/umt5-xxl"),
    (lambda f: (f / "google/umt5-xxl/tokenizer.json").write_text("{"), r"it may be truncated or damaged"),
    (lambda f: next(f.glob("*.index.json")).write_text("{"), r"index.json cannot be read as JSON"),
    (lambda f: next(f.glob("*.index.json")).write_text("{}"), r"weight_map in .*: it is not as it must be"),
    (lambda f: (f / "config.json").write_text("[]"), r"config.json must be a JSON object"),
    (
        lambda f: deque(map(Path.unlink, f.glob("diffusion*"))),
        r"expected diffusion_pytorch_model\*.safetensors in the folder",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_5B)
def test_a_broken_folder_is_refused_before_anything_loads(five_b: Path, damage: Any, message: str) -> None:
    damage(five_b)
    with pytest.raises(UserError, match=message) as raised:
        WanTI2V(WAN_CONFIGS["ti2v-5B"], five_b)
    assert "\n" not in str(raised.value) and str(five_b) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_bias, r"does not fit the model: missing blocks\.\d\.ffn\.0\.bias"),
        (add_key, r"unexpected img_emb\.proj\.0\.weight"),
        (reshape, r"wrong shape blocks\.\d\.self_attn\.q\.weight \(5, 48\) instead of \(48, 48\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(five_b: Path, change: Any, message: str) -> None:
    edit_shard(shard(five_b, 1), change)
    with pytest.raises(UserError, match=message):
        WanTI2V(WAN_CONFIGS["ti2v-5B"], five_b)


def test_a_width_without_heads_is_refused(five_b: Path) -> None:
    (five_b / "config.json").write_text("{}")
    with pytest.raises(UserError, match="expected num_heads that divide the width 48 into even parts, found None"):
        WanTI2V(WAN_CONFIGS["ti2v-5B"], five_b)


@pytest.mark.parametrize(
    ("task", "folder", "message"),
    [
        ("i2v-A14B", FIVE_B, r"low_noise_model and high_noise_model, found TI2V-5B \(1 expert"),
        ("ti2v-5B", A14B, r"in the folder itself, found I2V-A14B \(2 expert"),
        ("t2v-A14B", A14B, r"low_noise_model is I2V-A14B .* expected T2V-A14B"),
        ("i2v-A14B", GOLDEN, r"found no Wan2.2 checkpoint \(files: 14b, 5b"),
    ],
)
def test_the_wrong_task_for_a_folder_says_what_it_is(task: str, folder: Path, message: str) -> None:
    import wan

    classes: dict[str, Any] = {"i2v-A14B": wan.WanI2V, "ti2v-5B": wan.WanTI2V, "t2v-A14B": wan.WanT2V}
    with pytest.raises(UserError, match=message):
        classes[task](WAN_CONFIGS[task], folder)


def test_diffusers_folders_name_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    with pytest.raises(
        UserError, match=r"diffusers layout\): expected .* missing transformer, text_encoder, tokenizer"
    ):
        WanTI2V(WAN_CONFIGS["ti2v-5B"], tmp_path)


def test_no_code_in_a_pth_is_run(five_b: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "trapped",))

    torch.save({"conv1.weight": Trap()}, five_b / "Wan2.2_VAE.pth")
    with pytest.raises(UserError, match=r"Wan2.2_VAE.pth cannot be read"):
        WanTI2V(WAN_CONFIGS["ti2v-5B"], five_b)
    assert not (tmp_path / "trapped").exists()


def test_a_pth_in_the_old_format_is_read(five_b: Path, ti2v: Any) -> None:
    file = five_b / "Wan2.2_VAE.pth"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    old = WanTI2V(float32("ti2v-5B"), five_b)
    video = torch.rand(3, 5, 32, 32) * 2 - 1
    assert torch.equal(old.vae.encode([video])[0], ti2v.vae.encode([video])[0])


def test_names_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        resolve_folder("./nowhere")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is a file; a checkpoint is a folder"):
        resolve_folder(file)

    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(FIVE_B)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_folder("Wan-AI/Wan2.2-TI2V-5B") == FIVE_B
    assert asked == ["Wan-AI/Wan2.2-TI2V-5B"]

    def offline(name: str, **_: object) -> str:
        raise OSError("no network\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="as a hub id it cannot be downloaded: no network"):
        resolve_folder("Wan-AI/Wan2.2-TI2V-5B")


def test_a_folder_may_declare_what_differs_from_the_row(five_b: Path) -> None:
    assert config_for("v2v-5B", five_b) == WAN_CONFIGS["v2v-5B"]
    declared = {"sizes": ["96*64"], "frame_num": 9, "sample_guide_scale": [2, 3], "param_dtype": "float32"}
    (five_b / "wan_config.json").write_text(json.dumps(declared))
    config = config_for("v2v-5B", five_b)
    assert config.sizes == ("96*64",) and config.frame_num == 9
    assert config.sample_guide_scale == (2.0, 3.0) and config.param_dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be a JSON object"),
        ('{"sizes": ["96x64"]}', "size must look like"),
        ('{"sizes": []}', r"sizes = \[\] is not understood"),
        ('{"frame_num": "9"}', 'frame_num = "9" is not understood'),
        ('{"layers": 9}', "layers = 9 is not understood"),
        ('{"param_dtype": "int8"}', 'param_dtype = "int8" is not understood'),
    ],
)
def test_a_wrong_declaration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wan_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        config_for("v2v-5B", tmp_path)


def test_loading_never_holds_more_than_the_model_and_one_shard(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.loading", str(tmp_path / "dit"), "--layers", "12", "--dim", "512"]
    subprocess.run(command, capture_output=True, cwd=ROOT)  # writes
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loaded_gib"] == pytest.approx(result["files_gib"] / 2, rel=0.1)
    slack = 0.03  # what the allocator and the first use of libraries take
    assert result["peak_above_start_gib"] < result["allowed_gib"] + slack < result["files_gib"]


def test_files_are_read_ahead_in_their_order_and_not_too_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / str(number) for number in range(5)]
    for file in files:
        file.write_bytes(b"x" * 100)
    files.insert(1, tmp_path / "not there")
    seen: list[str] = []

    def watched(path: Path, *arguments: Any, **options: Any) -> Any:
        seen.append(path.name)
        return open_file(path, *arguments, **options)

    monkeypatch.setattr("wan.weights.prefetch.READERS", 1)
    open_file = Path.open
    monkeypatch.setattr(Path, "open", watched)

    def settled(count: int) -> list[str]:
        deadline = time.monotonic() + 5
        while len(seen) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)  # for one more, which there must not be
        return seen

    with ReadAhead(files) as ahead:
        assert settled(2) == ["0", "not there"]
        ahead.begin(0)
        ahead.begin(2)
        assert settled(4) == ["0", "not there", "1", "2"]
    assert settled(4) == ["0", "not there", "1", "2"] and not ahead.threads[0].is_alive()


def test_a_vae_of_which_the_size_is_not_told_is_not_taken_for_another_model_s() -> None:
    def weights(**shapes: tuple[int, ...]) -> Weights:
        return Weights(Path("x"), (), {name.replace("__", "."): shape for name, shape in shapes.items()}, {})

    denoiser = weights(patch_embedding__weight=(8, 16, 1, 2, 2), head__head__weight=(64, 8))
    _check_vae(Checkpoint(Path("x"), {"model": denoiser}, weights(), weights(), Path("x")))
    with pytest.raises(UserError, match="has 48 latent channels, the denoiser x has 16"):
        _check_vae(Checkpoint(Path("x"), {"model": denoiser}, weights(conv2__weight=(48, 48)), weights(), Path("x")))


def test_a_gguf_s_long_array_of_numbers_is_read_in_one_piece_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    import gguf

    numbers, file = [float(number) for number in range(5000)], tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    writer.add_array("tokenizer.ggml.scores", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_gguf_fields(file, ("tokenizer.ggml.scores",)) == [numbers]
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"long\.gguf"):
        read_gguf_fields(file, ("tokenizer.ggml.scores",))


def test_a_gguf_s_vocabulary_is_not_read_element_by_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    slow, asked, file = gguf.GGUFReader._get_field_parts, [], tmp_path / "long.gguf"

    def watched(self: Any, offset: int, kind: int) -> Any:
        asked.append(kind)
        return slow(self, offset, kind)

    words = [f"word {number}" for number in range(5000)]
    writer = gguf.GGUFWriter(file, "wan")
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.setattr(gguf.GGUFReader, "_get_field_parts", watched)
    assert read_gguf_fields(file, ("tokenizer.ggml.tokens",)) == [words]
    assert gguf.GGUFValueType.ARRAY not in asked and asked


def test_the_range_of_scaled_numbers_is_that_of_what_they_stand_for() -> None:
    packed: Any = SimpleNamespace(gguf_type=None, scale=torch.tensor(0.5), data=torch.tensor([1.0, 2.0, 3.0]))
    assert _range(packed) == (3.0, 3.0)
    packed.data = torch.tensor([-2.0, 2.0])  # whose sum says nothing
    assert _range(packed) == (-1.0, 1.0)


@pytest.mark.parametrize(("count", "fits"), [(6, True), (5, False)])
def test_a_tensor_of_a_pth_lies_in_its_storage(count: int, fits: bool) -> None:
    stored = ("FloatStorage", count)
    if fits:
        assert _tensor(stored, 0, (2, 3), (3, 1)).shape == (2, 3)
    else:
        with pytest.raises(OtherPickleError):
            _tensor(stored, 0, (2, 3), (3, 1))


def test_a_link_that_leads_nowhere_is_not_called_missing(tmp_path: Path) -> None:
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.symlink_to("moved.safetensors")
    with pytest.raises(UserError, match=f"{file} is a link that leads nowhere; download it again"):
        open_safetensors(tmp_path, "diffusion_pytorch_model")
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=f"{file} is no file"):
        open_safetensors(tmp_path, "diffusion_pytorch_model")


def test_an_address_is_no_checkpoint_folder() -> None:
    with pytest.raises(UserError, match="is an address; give a folder, or a hub id"):
        resolve_folder("https://example.org/Wan-AI/Wan2.2-TI2V-5B")


def test_a_pth_s_storage_is_as_large_as_its_file_says() -> None:
    reader = _Reader(b"", "archive", {"archive/data/0": 8})
    floats = _Storage("FloatStorage")
    assert reader.persistent_load(("storage", floats, "0", "cpu", 2)) == ("FloatStorage", 2)
    for pid in (("storage", floats, "0", "cpu", 3), ("module", floats, "0", "cpu", 2)):
        with pytest.raises(OtherPickleError):
            reader.persistent_load(pid)


@pytest.mark.parametrize(
    ("keys", "words"),
    [("", ""), ("b", "lacks b"), ("cba", "lacks a, b, c"), ("dcba", "lacks a, b, c and 1 more")],
)
def test_of_many_keys_three_are_named(keys: str, words: str) -> None:
    assert listing("lacks", keys) == words


def test_files_are_read_ahead_as_far_as_half_of_the_free_memory_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("a", "missing", "b", "c")]
    for file in files:
        if file.name != "missing":
            file.write_bytes(bytes(10))
    monkeypatch.setattr("wan.device.host.host_free_bytes", lambda: 40)
    a, _, b, c = files
    assert that_fit(files) == that_fit(files, 99) == [a, b]
    assert that_fit(files, 39) == [a] and that_fit(files, 19) == []
    monkeypatch.setattr("wan.device.host.host_free_bytes", lambda: 60)
    assert that_fit(files) == [a, b, c]


@pytest.mark.parametrize("wrong", ["low_noise_model", "high_noise_model", ""])
def test_both_experts_must_be_for_the_task(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expert(channels: int, width: int = 8) -> Weights:
        return Weights(tmp_path / f"{channels}", (), {"patch_embedding.weight": (width, channels, 1, 2, 2)}, {})

    none = Weights(tmp_path, (), {}, {})
    experts = {name: expert(16 if name == wrong else 36) for name in ("low_noise_model", "high_noise_model")}
    whole = Checkpoint(tmp_path, experts, none, none, tmp_path)
    monkeypatch.setattr("wan.weights.checkpoint._open_official", lambda *_: whole)
    asked: dict[str, Any] = {"in_channels": 36, "experts": 2, "names": Names()}
    if not wrong:
        assert open_checkpoint(tmp_path, **asked) is whole
        return
    with pytest.raises(UserError, match=rf"{wrong} is T2V-A14B \(2 expert\(s\), 16 .*, expected I2V-A14B"):
        open_checkpoint(tmp_path, **asked)
    with pytest.raises(UserError, match=r"16 takes 16 input channels, I2V-A14B .* is expected; give the file"):
        open_checkpoint(tmp_path, **asked, files={wrong: tmp_path})
    experts[wrong] = expert(36, 12)
    with pytest.raises(UserError, match="the experts are of different widths, .* of 8|of 12"):
        open_checkpoint(tmp_path, **asked)
