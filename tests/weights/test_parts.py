"""VAE and text encoder from the files that people have; damaged, foreign and half-downloaded weights are refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.golden import GOLDEN
from tests.support.quantized_files import State, gguf_file, official, plain_fp8
from wan import WanI2V, WanTI2V
from wan.commands.inputs import choose_task
from wan.configs import WAN_CONFIGS
from wan.denoiser.headers import infer_config
from wan.denoiser.lora import merge_loras
from wan.denoiser.lora_file import open_loras
from wan.denoiser.model import WanModel
from wan.errors import UserError
from wan.files import unreadable
from wan.foreign import read_json
from wan.options import OPTIONS, Settings
from wan.settings import LoraFile
from wan.text.umt5 import _library_name
from wan.weights.checkpoint import Names, identify
from wan.weights.reading import read_pth
from wan.weights.single_file import open_denoiser
from wan.weights.tensors import Weights

VAES = {"14b": "Wan2.1_VAE.pth", "5b": "Wan2.2_VAE.pth"}
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CPU = torch.device("cpu")


@pytest.fixture(params=["14b", "5b"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / family / "ckpt", tmp_path / "ckpt"))


def open_pipeline(folder: Path, **more: Any) -> Any:
    if (folder / "high_noise_model").is_dir():
        return WanI2V(WAN_CONFIGS["i2v-A14B"], folder, **more)
    return WanTI2V(WAN_CONFIGS["ti2v-5B"].variant(t5_dtype="float32"), folder, **more)


def read(file: Path) -> State:
    return dict(torch.load(file, weights_only=True))


def take(file: Path) -> State:
    """The tensors of a .pth, which is gone then."""
    state = read(file)
    file.unlink()
    return state


def library_names(state: State) -> State:
    return {_library_name(key): value for key, value in state.items()}


def scaled_t5(state: State, file: Path) -> State:
    """As Comfy-Org publishes it; returns what it means."""
    meant, stored = {}, {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    stored["spiece_model"] = torch.arange(99, dtype=torch.uint8)
    for key, value in library_names(state).items():
        name = f"transformer.{key}"
        if value.ndim != 2 or "layer" not in key or "bias" in key:
            stored[name] = meant[key] = value.to(torch.float16)
            continue
        scale = value.abs().max().float() / 448
        stored[name] = (value.float() / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + "scale_weight"] = scale
        meant[key] = stored[name].float() * scale
    save_file(stored, file)
    return meant


def same_vae(pipeline: Any, reference: Any, rounded: torch.dtype) -> bool:
    ours, theirs = pipeline.vae.model.state_dict(), reference.vae.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k].to(rounded).float()) for k in theirs)


def same_t5(pipeline: Any, meant: State) -> bool:
    loaded = pipeline.text_encoder.model.state_dict()
    return all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in meant.items())


@pytest.mark.parametrize(
    ("name", "prefix", "dtype"),
    [
        ("{stem}.safetensors", "", torch.float32),  # DiffSynth
        ("{comfy}_vae.safetensors", "", torch.float16),  # Comfy-Org
        ("VAE/{stem}.safetensors", "", torch.bfloat16),  # QuantStack
        ("vae/Wan_VAE_bf16.safetensors", "model.", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_vae_may_be_safetensors(
    name: str, prefix: str, dtype: torch.dtype, named: bool, family: str, folder: Path
) -> None:
    state = take(folder / VAES[family])
    comfy = {"14b": "wan_2.1", "5b": "wan2.2"}[family]
    file = folder / name.format(stem=VAES[family].removesuffix(".pth"), comfy=comfy)
    if named:
        file = folder.parent / file.name
    file.parent.mkdir(exist_ok=True)
    save_file({prefix + key: value.to(dtype).contiguous() for key, value in state.items()}, file)
    pipeline = open_pipeline(folder, **({"part_files": {"vae": file}} if named else {}))
    assert pipeline.checkpoint.vae.path == file
    assert same_vae(pipeline, open_pipeline(GOLDEN / family / "ckpt"), dtype)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("form", ["official", "library", "scaled", "bundle"])
def test_a_text_encoder_may_be_safetensors(form: str, named: bool, folder: Path) -> None:
    state = {key: value.contiguous() for key, value in take(folder / T5).items()}
    file = folder / "models_t5_umt5-xxl-enc-bf16.safetensors"
    meant = library_names(state)
    if form == "scaled":
        file = folder / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
        file.parent.mkdir()
        meant = scaled_t5(state, file)
    elif form == "bundle":
        file = folder / "all-in-one-t5.safetensors"
        bundled = {f"text_encoders.umt5xxl.transformer.{key}": value for key, value in meant.items()}
        save_file(bundled | {"vae.conv1.weight": torch.ones(3), "model.diffusion_model.x": torch.ones(2)}, file)
    else:
        save_file(state if form == "official" else meant, file)
    if named:
        file = Path(shutil.move(file, folder.parent))
    pipeline = open_pipeline(folder, **({"part_files": {"text_encoder": file}} if named else {}))
    assert pipeline.checkpoint.text_encoder.path == file
    assert same_t5(pipeline, meant)
    assert pipeline.text_encoder("a boat").isfinite().all()


def test_parts_of_one_file_are_read_from_it(tmp_path: Path) -> None:
    """A checkpoint of ComfyUI holds denoiser, VAE and text encoder."""
    folder = Path(shutil.copytree(GOLDEN / "5b" / "ckpt", tmp_path / "ckpt"))
    vae, t5 = take(folder / VAES["5b"]), library_names(take(folder / T5))
    state = {f"model.diffusion_model.{key}": value for key, value in official(folder).items()}
    state |= {f"vae.{key}": value.contiguous() for key, value in vae.items()}
    state |= {f"text_encoders.umt5xxl.transformer.{key}": value.contiguous() for key, value in t5.items()}
    file = tmp_path / "all-in-one.safetensors"
    save_file(state, file)
    pipeline = open_pipeline(folder, dit_files={"model": file}, part_files={"vae": file, "text_encoder": file})
    reference = open_pipeline(GOLDEN / "5b" / "ckpt")
    assert same_vae(pipeline, reference, torch.float32) and same_t5(pipeline, t5)
    ours, theirs = pipeline.model.state_dict(), reference.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def refused(message: str, folder: Path, **more: Any) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_pipeline(folder, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_is_none_is_refused(part: str, tmp_path: Path) -> None:
    folder, file = GOLDEN / "5b" / "ckpt", tmp_path / "part.safetensors"
    refused("does not exist", folder, part_files={part: file})
    save_file(official(folder), file)
    refused(f"{file} is no {'VAE' if part == 'vae' else 'text encoder'} of Wan", folder, part_files={part: file})
    refused("is a folder; name the file in it", folder, part_files={part: folder})
    (tmp_path / "x.bin").touch()
    refused("is no .safetensors or .pth", folder, part_files={part: tmp_path / "x.bin"})
    state = read(folder / (VAES["5b"] if part == "vae" else T5))
    save_file({key: value.to(torch.int8) for key, value in state.items()}, file)
    refused("is stored as I8, which cannot be read", folder, part_files={part: file})


def test_two_files_that_may_be_one_part_are_not_chosen_between(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "5b" / "ckpt", tmp_path / "ckpt"))
    state = take(folder / VAES["5b"])
    refused("expected Wan2.2_VAE.pth, found no such file", folder)
    for name in ("wan2.2_vae", "other_vae"):
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    refused("other_vae.safetensors and wan2.2_vae.safetensors may each be the VAE; name one with vae", folder)


def test_a_vae_of_another_kind_is_refused_at_the_start(tmp_path: Path) -> None:
    fourteen, five = GOLDEN / "14b" / "ckpt", GOLDEN / "5b" / "ckpt"
    refused("latent channels, the denoiser", fourteen, part_files={"vae": five / VAES["5b"]})
    state = {key: value.contiguous() for key, value in read(fourteen / VAES["14b"]).items()}
    for key in ("decoder.head.2.weight", "decoder.head.2.bias"):
        state[key] = state[key].repeat_interleave(4, dim=0)  # a decoder that makes pictures of twice the size
    save_file(state, tmp_path / "Wan2.1_VAE_upscale2x.safetensors")
    refused(
        "takes 3 channels and makes 12", fourteen, part_files={"vae": tmp_path / "Wan2.1_VAE_upscale2x.safetensors"}
    )


# --- damaged values ---------------------------------------------------------------------------------------------------

HIGH = GOLDEN / "14b" / "ckpt" / "high_noise_model"


def zero_block(state: State) -> None:
    for key, value in state.items():
        if key.startswith("blocks.1.") and "norm" not in key:
            value.zero_()


def one_number(number: float, dtype: torch.dtype) -> Callable[[State], None]:
    def change(state: State) -> None:
        state["blocks.1.ffn.0.weight"] = state["blocks.1.ffn.0.weight"].to(dtype)
        state["blocks.1.ffn.0.weight"].view(-1)[7] = number

    return change


def as_it_is(state: State, file: Path) -> State:
    save_file(state, file)
    return state


@pytest.mark.parametrize(
    ("change", "write", "message"),
    [
        (zero_block, as_it_is, "all weights of blocks.1 are zero"),
        (zero_block, plain_fp8, "all weights of blocks.1 are zero"),
        (zero_block, gguf_file("Q8_0"), "all weights of blocks.1 are zero"),
        (zero_block, gguf_file("Q4_0"), "all weights of blocks.1 are zero"),
        (one_number(float("nan"), torch.float32), as_it_is, "blocks.1.ffn.0.weight that are NaN or infinite"),
        (one_number(float("nan"), torch.bfloat16), as_it_is, "blocks.1.ffn.0.weight that are NaN or infinite"),
        (one_number(float("-inf"), torch.float16), as_it_is, "blocks.1.ffn.0.weight that are NaN or infinite"),
        (one_number(float("nan"), torch.float32), plain_fp8, "blocks.1.ffn.0.weight that are NaN or infinite"),
    ],
)
def test_an_expert_with_damaged_values_is_refused(change: Any, write: Any, message: str, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in official(HIGH).items()}
    change(state)
    file = tmp_path / ("x.gguf" if "gguf" in write.__qualname__ else "x.safetensors")
    write(state, file)
    pipeline = open_pipeline(GOLDEN / "14b" / "ckpt", dit_files={"high_noise_model": file})
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        pipeline.high_noise_model  # noqa: B018
    assert f"{file} (high_noise_model)" in str(caught.value)


def test_an_expert_that_holds_large_numbers_of_float16_is_none_of_them(tmp_path: Path) -> None:
    state = {key: value.to(torch.float16) for key, value in official(HIGH).items()}
    state["blocks.1.ffn.0.weight"].fill_(60000)
    state["blocks.0.ffn.0.weight"].zero_()
    save_file(state, tmp_path / "x.safetensors")
    pipeline = open_pipeline(GOLDEN / "14b" / "ckpt", dit_files={"high_noise_model": tmp_path / "x.safetensors"})
    assert pipeline.high_noise_model is not None


# --- GGUF that lost dimensions ----------------------------------------------------------------------------------------


def lost(state: State, patch: bool) -> State:
    flattened = {key: value.squeeze(0) if key.endswith("modulation") else value for key, value in state.items()}
    if patch:
        flattened["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(0, 1)
    return flattened


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_that_lost_dimensions_is_the_model_that_it_was(patch: bool, kind: str, tmp_path: Path) -> None:
    state, loaded = official(HIGH), []
    lora = {"blocks.0.modulation.diff": torch.full((1, 6, 48), 0.25), "patch_embedding.diff_b": torch.full((48,), 0.5)}
    save_file(lora, tmp_path / "lora.safetensors")
    for name, written in (("whole", state), ("lost", lost(state, patch))):
        gguf_file(kind)(written, tmp_path / f"{name}.gguf")
        weights = open_denoiser(tmp_path / f"{name}.gguf", HIGH)
        model = WanModel.from_weights(weights, dtype=torch.float32, device=CPU)
        merge_loras(model, weights, open_loras([LoraFile(tmp_path / "lora.safetensors")], weights))
        loaded.append(model.state_dict())
    whole, read_again = loaded
    assert whole.keys() == read_again.keys() and all(torch.equal(whole[key], read_again[key]) for key in whole)


# --- files that are none ----------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Not found</body></html>" * 9
TEXT = b'{"error": "Access to this model is restricted",\n "code": 403}'


@pytest.mark.parametrize(
    "name", ["diffusion.safetensors", "Wan2.2_VAE.pth", "vae.safetensors", "x.gguf", "lora.safetensors"]
)
def test_pointers_and_pages_are_called_what_they_are(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "5b" / "ckpt", tmp_path / "ckpt"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    file = {"diffusion.safetensors": shard, "Wan2.2_VAE.pth": folder / name}.get(name, tmp_path / name)
    more: dict[str, Any] = {"dit_files": {"model": file}} if name == "x.gguf" else {}
    more |= {"part_files": {"vae": file}} if name == "vae.safetensors" else {}
    for content, message in (
        (POINTER, "is a pointer of Git LFS, not the file itself"),
        (PAGE, "is a web page that was"),
        (TEXT, """is a text ('{"error": "Access to this model is restricted", "code": 403}') that was saved"""),
    ):
        file.write_bytes(content)
        if name == "lora.safetensors":
            with pytest.raises(UserError, match=re.escape(message)):
                open_loras([LoraFile(file)], open_pipeline(folder).checkpoint.experts["model"])
        else:
            refused(f"{file} {message}", folder, **more)


def test_a_denoiser_that_lacks_its_last_block_is_refused(tmp_path: Path) -> None:
    folder, file = GOLDEN / "5b" / "ckpt", tmp_path / "cut.safetensors"
    whole = {name: value for shard in sorted(folder.glob("*.safetensors")) for name, value in load_file(shard).items()}
    save_file({name: value for name, value in whole.items() if not name.startswith("blocks.1.")}, file)
    refused("config.json says 2; download it again", folder, dit_files={"model": file})


@pytest.mark.parametrize(("width", "blocks"), [(1536, 30), (3072, 30), (5120, 40)])
def test_one_of_a_released_width_has_the_released_blocks_unless_its_config_says_otherwise(
    width: int, blocks: int
) -> None:
    def weights(count: int, config: dict[str, Any]) -> Weights:
        shapes = {
            "patch_embedding.weight": (width, 48, 1, 2, 2),
            "text_embedding.0.weight": (width, 4096),
            "time_embedding.0.weight": (width, 256),
            "head.head.weight": (192, width),
            "blocks.0.self_attn.q.weight": (width, width),
            "blocks.0.ffn.0.weight": (4 * width, width),
        } | {f"blocks.{index}.modulation": (1, 6, width) for index in range(count)}
        return Weights(Path("dit.gguf"), (), shapes, {"num_heads": width // 128} | config)

    assert infer_config(weights(blocks, {}))["num_layers"] == blocks
    assert infer_config(weights(20, {"num_layers": 20}))["num_layers"] == 20  # one that was pruned on purpose
    with pytest.raises(UserError, match=f"dit.gguf has 20 blocks, and models of its width have {blocks}; download it"):
        infer_config(weights(20, {}))


def test_weights_of_another_format_are_to_be_renamed(tmp_path: Path) -> None:
    folder, state = GOLDEN / "5b" / "ckpt", {"conv1.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "1.gguf")
    save_file(state, tmp_path / "1.pth")
    torch.save(state, tmp_path / "2.safetensors")
    (tmp_path / "3.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(99))
    for name, kind, suffix, part in (
        ("1.gguf", "safetensors", ".safetensors", "dit"),
        ("1.pth", "safetensors", ".safetensors", "vae"),
        ("2.safetensors", "PyTorch", ".pth", "vae"),
        ("3.safetensors", "GGUF", ".gguf", "dit"),
    ):
        files = {"dit_files": {"model": tmp_path / name}} if part == "dit" else {"part_files": {part: tmp_path / name}}
        refused(f"{name} is a {kind} file by its contents; give it a name that ends in {suffix}", folder, **files)


@pytest.mark.parametrize("content", [b"\0" * 99, b"\x80\x02cos\nsystem\n.", b"\x1f\x8b" + b"x" * 99])
def test_a_pth_that_is_none_gets_no_advice_to_run_its_code(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x.pth cannot be read.*\(it is no file of tensors alone\)"):
        read_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["config.json", "wan_config.json", "diffusion_pytorch_model.safetensors.index.json"])
def test_a_config_that_is_a_pointer_or_a_page_is_called_so(name: str, tmp_path: Path) -> None:
    for content, message in ((POINTER, "is a pointer of Git LFS"), (PAGE, "is a web page that was"), (TEXT, None)):
        (tmp_path / name).write_bytes(content)
        if message is None:
            assert read_json(tmp_path / name)["code"] == 403
        else:
            with pytest.raises(UserError, match=f"{name} {message}"):
                read_json(tmp_path / name)


def test_a_file_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    assert "change its permissions" in str(unreadable(tmp_path, PermissionError("denied")))


@pytest.mark.parametrize("part", ["low_noise_model", "high_noise_model"])
def test_a_download_without_one_expert_is_said(part: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "14b" / "ckpt", tmp_path / "ckpt"))
    shutil.rmtree(folder / part)
    (folder / part).mkdir()
    other = {"low_noise_model": "high_noise_model", "high_noise_model": "low_noise_model"}[part]
    setting = "dit_low" if part.startswith("low") else "dit_high"
    with pytest.raises(UserError, match=f"{other} is there and {part} is not, the download is not") as caught:
        WanI2V(WAN_CONFIGS["i2v-A14B"], folder)
    assert str(caught.value).endswith(f"or give that expert's file with {setting}")
    assert identify(folder, Names()) == (2, 36)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((2, 16), {"dit_high": "h.gguf", "dit_low": "l.gguf"}, "dit_high h.gguf and dit_low l.gguf is T2V-A14B, which"),
        ((2, 16), {}, "ckpt_dir there is T2V-A14B, which takes no video; give the files of I2V-A14B or TI2V-5B"),
        ((1, 20), {"dit": "x.gguf"}, "no task is for 1 denoiser(s) with 20 input channels, which dit x.gguf gives"),
        ((1, 20), {}, "which ckpt_dir there gives"),
    ],
)
def test_a_denoiser_that_no_task_is_for_is_named(shape: tuple[int, int], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        choose_task(Settings(ckpt_dir="there", video="clip.mp4", **given), shape)


@pytest.mark.parametrize("name", ["vlm_path", "video", "ckpt_dir", "vae", "storyboard", "output_dir"])
def test_a_path_may_begin_with_a_tilde_after_an_equals_sign(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert OPTIONS[name].kind.read("~/x") == "/home/somebody/x"


# --- one denoiser for both experts ------------------------------------------------------------------------------------


def test_one_denoiser_serves_both_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, file = GOLDEN / "14b" / "ckpt", tmp_path / "wan2.2-i2v-rapid-aio-v10.safetensors"
    state = official(HIGH)
    save_file({f"model.diffusion_model.{key}": value for key, value in state.items()}, file)
    for name in ("h", "l"):
        save_file(state, tmp_path / f"{name}.safetensors")
    image = Image.open(GOLDEN / "14b" / "image.png").convert("RGB")
    call: dict[str, Any] = {"frame_num": 5, "sampling_steps": 2, "guide_scale": 1.0, "seed": 3, "max_area": 64 * 64}
    single = open_pipeline(folder, dit_files={"model": file})
    assert single.checkpoint.single and single.low_noise_model is single.high_noise_model
    alone = open_pipeline(folder, dit_files={"model": file}, share_weights=2)
    assert alone.host.sharers == 1 and "holds its weights by itself, for one file is both experts" in caplog.text
    pair = {f"{noise}_noise_model": tmp_path / f"{noise[0]}.safetensors" for noise in ("high", "low")}
    two = open_pipeline(folder, dit_files=pair)
    assert not two.checkpoint.single and two.low_noise_model is not two.high_noise_model
    assert torch.equal(single.generate("a boat", image, **call), two.generate("a boat", image, **call))

    lora = tmp_path / "style.safetensors"
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(96)}, lora)
    both = {name: (LoraFile(lora),) for name in pair}
    with pytest.raises(UserError, match="serves both experts; give the same LoRAs with lora_high and lora_low"):
        single.models.check_loras({"high_noise_model": (LoraFile(lora),)})
    single.models.check_loras(both)
    single.models.merge_loras(both)
    bias = single.low_noise_model.get_parameter("blocks.0.ffn.net.0.proj.bias")
    before = state["blocks.0.ffn.0.bias"].float()
    assert torch.equal(bias, (before + 1).to(bias.dtype))
    single.models.merge_loras({})
    assert torch.equal(bias, before.to(bias.dtype))

    single.rules.check_distilled("turbo", {})  # by the name of the file
    with pytest.raises(UserError, match="or a distilled model with dit"):
        two.rules.check_distilled("turbo", {})


def test_the_task_of_one_denoiser_is_that_of_its_channels() -> None:
    assert choose_task(Settings(ckpt_dir="there", dit="rapid.safetensors", video="clip.mp4"), (1, 36)) == "v2v-14B"
    assert choose_task(Settings(ckpt_dir="there", dit="rapid.safetensors", image="a.png"), (1, 36)) == "i2v-A14B"
