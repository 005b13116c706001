"""Names and shapes of weights are told from headers, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import save_file

from wan.errors import UserError
from wan.weights.single_file import _with_lost_dimensions, check_expert, experts_named, open_denoiser, open_part
from wan.weights.tensors import Weights, check_shapes, open_pth, open_safetensors


@pytest.mark.parametrize(
    ("name", "is_distilled"),
    [
        ("wan2.2-rapid-mega.safetensors", True),
        ("Wan_Lightning_v1.safetensors", True),
        ("lightx2v.safetensors", True),
        ("distilled.gguf", True),
        ("wan-turbo.gguf", True),
        ("wan_4step.safetensors", True),
        ("wan-8_steps.safetensors", True),
        ("wan 4 steps.safetensors", True),
        ("wan_14steps.safetensors", False),
        ("wan_4stepped.safetensors", False),
        ("wan_40step.safetensors", False),
        ("wan2.2_high.safetensors", False),
    ],
)
def test_a_file_for_few_steps_says_so_by_its_name(name: str, is_distilled: bool, tmp_path: Path) -> None:
    file = tmp_path / name
    file.touch()
    assert Weights(file, (file,), {}, {}).is_distilled is is_distilled
    file.unlink()
    file.mkdir()  # a folder's name says nothing
    assert not Weights(file, (), {}, {}).is_distilled


def test_dtypes_are_told_of_what_is_plain(tmp_path: Path) -> None:
    state = {"x.a": torch.zeros(2), "x.b": torch.zeros(2).half(), "x.c": torch.zeros(2).bfloat16()}
    save_file(state | {"x.d": torch.zeros(2).to(torch.float8_e4m3fn), "a": torch.zeros(1)}, tmp_path / "m.safetensors")
    state = {"x.e": torch.zeros(3).double(), "x.f": torch.zeros(3).half(), "x.g": torch.zeros(0, 4)}  # one of no rows
    torch.save(state, tmp_path / "n.pth")
    files = (tmp_path / "m.safetensors", tmp_path / "n.pth")
    shapes = dict.fromkeys("abcdefg", (2,))
    dtypes = Weights(tmp_path, files, shapes, {}, prefix="x.").stored_dtypes()
    assert dtypes == {"a": "float32", "b": "float16", "c": "bfloat16", "e": "float64", "f": "float16", "g": "float32"}
    scaled = Weights(tmp_path, files, shapes, {}, prefix="x.", scales={"b": "x.a"}).stored_dtypes()
    assert scaled == {key: dtype for key, dtype in dtypes.items() if key != "b"}
    named = Weights(tmp_path, files, shapes, {}, expert="high_noise_model", prefix="x.")
    assert named.place_of("b") == f"{files[0]} (high_noise_model)" and named.place_of("f").startswith(str(files[1]))
    assert Weights(tmp_path, files, shapes, {}, prefix="x.").place_of("b") == str(files[0])


def test_what_does_not_fit_is_named_by_what_the_file_calls_it() -> None:
    target = {"blocks.0.a": (1,), "blocks.1.a": (1,), "b": (2,), "c": (3,), "e": (5,)}
    source_of = {"blocks.0.a": "blocks.0.x", "b": "b", "c": "c", "d": "d"}
    weights = Weights(Path("m"), (), {"blocks.0.x": (1,), "b": (9,), "d": (4,), "z": (7,)}, {})
    with pytest.raises(UserError) as caught:
        check_shapes(target, weights, source_of)
    assert str(caught.value) == (
        "m does not fit the model: missing blocks.1.x, e; missing c; unexpected d; unexpected z; "
        "wrong shape b (9,) instead of (2,)"
    )
    check_shapes({"b": (9,)}, Weights(Path("m"), (), {"x": (9,)}, {}), {"b": "x"})


def test_shards_must_hold_what_their_index_says(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    for name, key in (("1", "a"), ("2", "b")):
        save_file({key: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    opened = open_safetensors(tmp_path, "m")
    assert opened.shapes == {"a": (2,), "b": (2,)} and opened.config == {} and len(opened.files) == 2
    (tmp_path / "config.json").write_text('{"dim": 4}')
    assert open_safetensors(tmp_path, "m").config == {"dim": 4}
    index.write_text('{"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}')
    with pytest.raises(UserError, match=r"the shards and m.safetensors.index.json disagree \(in one only b, c\)"):
        open_safetensors(tmp_path, "m")
    save_file({"a": torch.zeros(2)}, tmp_path / "2.safetensors")
    with pytest.raises(UserError, match=r"2.safetensors has what another shard has too \(twice a\)"):
        open_safetensors(tmp_path, "m")
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards are missing \(2.safetensors\)"):
        open_safetensors(tmp_path, "m")


@pytest.mark.parametrize("value", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64)])
def test_what_no_model_is_kept_in_is_refused(value: torch.Tensor, tmp_path: Path) -> None:
    if not value.is_complex():
        save_file({"a": value}, tmp_path / "m.safetensors")
        with pytest.raises(UserError, match="a holds I64 numbers, which are no weights"):
            open_safetensors(tmp_path, "m")
    torch.save({"a": value}, tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"a holds (whole|complex64) numbers, which are no weights"):
        open_pth(tmp_path / "m.pth")
    torch.save({"a": torch.zeros(2).double()}, tmp_path / "m.pth")
    assert open_pth(tmp_path / "m.pth").shapes == {"a": (2,)}
    with pytest.raises(UserError, match="expected none.pth, found no such file"):
        open_pth(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("wan2.2_high_noise", {"high"}),
        ("Wan-LowNoise-Q8", {"low"}),
        ("high_low_noise", {"low"}),
        ("low-poly", set()),
        ("high-kick", set()),
        ("wan_low", {"low"}),
        ("highnoise_and_lownoise", {"high", "low"}),
        ("shallow_noise", set()),
        ("wan-high-fp8", {"high"}),
    ],
)
def test_a_name_tells_the_expert_by_the_words_around_it(name: str, experts: set[str]) -> None:
    assert experts_named(name) == experts


def test_a_file_of_the_other_expert_is_refused() -> None:
    check_expert("", Path("x_high_noise.safetensors"), "high_noise_model", "dit")
    check_expert("", Path("highnoise_lownoise.safetensors"), "high_noise_model", "dit")
    check_expert("", Path("x_high_noise.safetensors"), "model", "dit")
    with pytest.raises(UserError, match=r"LoRA x_high_noise.safetensors is for the high-noise expert .* dit_high"):
        check_expert("LoRA ", Path("x_high_noise.safetensors"), "low_noise_model", "dit")


def test_dimensions_that_writers_of_gguf_drop_come_back() -> None:
    shapes = {
        "blocks.0.modulation": (6, 8),
        "x.scale_shift_table": (2, 8),
        "head.modulation": (1, 2, 8),
        "other": (6, 8),
        "patch_embedding.weight": (8 * 16, 1, 2, 2),
        "patch_embedding.bias": (8,),
    }
    assert _with_lost_dimensions(shapes) == shapes | {
        "blocks.0.modulation": (1, 6, 8),
        "x.scale_shift_table": (1, 2, 8),
        "patch_embedding.weight": (8, 16, 1, 2, 2),
    }
    for patch, bias in (((8, 16, 1, 2, 2), (8,)), ((130, 1, 2, 2), (8,)), ((128, 1, 2, 2), (0,))):
        kept = {"patch_embedding.weight": patch, "patch_embedding.bias": bias}
        assert _with_lost_dimensions(kept) == kept


def denoiser(folder: Path, width: int = 256, more: Mapping[str, torch.Tensor] = MappingProxyType({})) -> Path:
    file = folder / "d.safetensors"
    save_file({"patch_embedding.weight": torch.zeros(width, 16, 1, 2, 2), **more}, file)
    return file


def test_the_heads_of_a_denoiser_are_those_of_its_config_or_128_wide(tmp_path: Path) -> None:
    assert open_denoiser(denoiser(tmp_path)).config == {"num_heads": 2}
    assert open_denoiser(denoiser(tmp_path), tmp_path).config == {"num_heads": 2}
    assert open_denoiser(denoiser(tmp_path, 100)).config == {"num_heads": 0}
    with pytest.raises(UserError, match=r"does not say how many heads there are; put its model's config.json into"):
        open_denoiser(denoiser(tmp_path, 100), tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 5, "dim": 100}')
    assert open_denoiser(denoiser(tmp_path, 100), tmp_path).config == {"num_attention_heads": 5, "dim": 100}
    with pytest.raises(UserError, match="is of a model of width 256, .* is of one of width 100; give one for it"):
        open_denoiser(denoiser(tmp_path), tmp_path)


@pytest.mark.parametrize(("scale", "fits"), [((1,), True), ((), True), ((4,), True), ((2,), False), ((4, 1), True)])
def test_a_scale_is_of_a_tensor_or_of_its_rows(scale: tuple[int, ...], fits: bool, tmp_path: Path) -> None:
    for end in ("scale_weight", "weight_scale"):
        weight = torch.zeros(4, 3).to(torch.float8_e4m3fn)
        file = denoiser(tmp_path, more={"a.weight": weight, f"a.{end}": torch.ones(scale), f"b.{end}": torch.ones(1)})
        if fits:
            opened = open_denoiser(file)
            assert opened.scales == {"a.weight": f"a.{end}"} and f"a.{end}" not in opened.shapes
            assert f"b.{end}" in opened.shapes  # of nothing that is there
        else:
            with pytest.raises(UserError, match="is no scale of a tensor or of its rows"):
                open_denoiser(file)


def test_a_part_of_several_in_a_file_is_known_by_its_prefix(tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    state = {
        "model.diffusion_model.patch_embedding.weight": torch.zeros(128, 16, 1, 2, 2),
        "first_stage_model.decoder.conv1.weight": torch.zeros(2),
        "first_stage_model.scaled_fp8": torch.zeros(1),
        "text_encoders.umt5xxl.transformer.shared.weight": torch.zeros(3),
        "text_encoders.umt5xxl.spiece_model": torch.zeros(3, dtype=torch.uint8),
    }
    save_file(state, file)
    assert open_denoiser(file).shapes == {"patch_embedding.weight": (128, 16, 1, 2, 2)}
    vae, text = open_part(file, "vae"), open_part(file, "text_encoder")
    assert (vae.shapes, vae.prefix) == ({"decoder.conv1.weight": (2,)}, "first_stage_model.")
    assert (text.shapes, text.prefix) == ({"shared.weight": (3,)}, "text_encoders.umt5xxl.transformer.")
    save_file({"other.weight": torch.zeros(1)}, file)
    for part, word in (("vae", "no VAE of Wan: it has no decoder.conv1.weight"), ("text_encoder", "no text encoder")):
        with pytest.raises(UserError, match=word):
            open_part(file, part)
    with pytest.raises(UserError, match="is no Wan denoiser: a file without a patch_embedding.weight"):
        open_denoiser(file)
