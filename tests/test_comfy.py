"""ComfyUI's folder of models: every part is found by name and shape, a choice is said, a toss-up is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.commands import Seen
from tests.support.golden import GOLDEN, small_checkpoints
from tests.support.quantized_files import State, comfyui, gguf_file, official
from tests.support.text_encoders import in_gguf, in_safetensors, sentencepiece_model
from tests.weights.test_parts import T5, VAES, library_names, read, same_t5, same_vae
from wan import WanTI2V
from wan.comfy import HIGH, LOW, ComfyFolder, as_settings
from wan.configs import WAN_CONFIGS
from wan.errors import UserError

A14B, FIVE = GOLDEN / "14b" / "ckpt", GOLDEN / "5b" / "ckpt"
EXPERTS = (HIGH, LOW)
I2V, TI2V = (36, 16), (48, 48)  # input channels, latent channels


@pytest.fixture(scope="module")
def parts() -> Mapping[str, State]:
    """The tensors of both tiny models."""
    tensors = {"high": official(A14B / HIGH), "low": official(A14B / LOW), "5b": official(FIVE)}
    tensors |= {f"vae_{name}": read(folder / VAES[name]) for name, folder in (("14b", A14B), ("5b", FIVE))}
    tensors["t5"] = library_names(read(FIVE / T5))
    return {name: {key: value.contiguous() for key, value in state.items()} for name, state in tensors.items()}


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """A folder `models` that knows how many heads the tiny denoisers have."""
    folder = tmp_path / "ComfyUI" / "models"
    for name in ("diffusion_models", "vae", "text_encoders", "loras"):
        (folder / name).mkdir(parents=True)
    for part in EXPERTS:
        (folder / part).mkdir()
        shutil.copy(A14B / part / "config.json", folder / part)
    return folder


def put(state: State, file: Path, dtype: torch.dtype = torch.float16) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.to(dtype) for key, value in state.items()}, file)
    return file


def files_of(
    folder: Path, parts: tuple[str, ...] = EXPERTS, kind: tuple[int, int] = I2V, **more: Any
) -> dict[str, str]:
    return {one.part: str(one.file.relative_to(folder)) for one in ComfyFolder(folder).find(parts, *kind, **more)}


def refused(message: str, folder: Path, parts: tuple[str, ...] = EXPERTS, kind: tuple[int, int] = I2V) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        list(ComfyFolder(folder).find(parts, *kind))
    assert "\n" not in str(caught.value)


RELEASED = "diffusion_models/wan2.2_i2v_{}_noise_14B_{}.safetensors"


def pair(parts: Mapping[str, State], folder: Path, name: str = RELEASED, form: str = "fp16", **more: Any) -> None:
    for expert in ("high", "low"):
        put(parts[expert], folder / name.format(expert, form), **more)


@pytest.mark.parametrize("text", ["safetensors", "gguf"])
def test_every_part_of_a_5b_comes_from_comfyui_s_folder(text: str, parts: Mapping[str, State], comfy: Path) -> None:
    """The tensors are those of the official folder, beside files of other models, through links and sub folders."""
    shutil.copy(FIVE / "config.json", comfy)
    put(parts["5b"], comfy / "unet/wan/wan2.2_ti2v_5B_fp16.safetensors", torch.float32)
    put(parts["vae_5b"], comfy.parent / "elsewhere/wan2.2_vae.safetensors", torch.float32)
    (comfy / "vae/linked").symlink_to(comfy.parent / "elsewhere")
    (comfy.parent / "elsewhere/back").symlink_to(comfy / "vae")
    put(parts["vae_14b"], comfy / "vae/wan_2.1_vae.safetensors")
    put({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, comfy / "vae/ae.safetensors")
    put({"encoder.block.0.x": torch.zeros(2)}, comfy / "text_encoders/t5xxl_fp16.safetensors")
    (comfy / "clip").mkdir()
    if text == "gguf":
        meant = in_gguf(sentencepiece_model(), comfy / "clip/umt5-xxl-encoder-F32.gguf", parts["t5"])
    else:
        in_safetensors(sentencepiece_model(), comfy / "clip/umt5_xxl_fp16.safetensors", parts["t5"])
        meant = parts["t5"]
    folder = ComfyFolder(comfy)
    assert folder.kind(continues=True) == (1, 48)
    taken = {one.part: one for one in folder.find(("model", "vae", "text_encoder", "tokenizer"), *TI2V)}
    assert taken["model"].line == "`comfy_dir`: denoiser unet/wan/wan2.2_ti2v_5B_fp16.safetensors"
    assert taken["vae"].file == comfy / "vae/linked/wan2.2_vae.safetensors"
    assert taken["tokenizer"].file == taken["text_encoder"].file
    files = {name: one.file for name, one in taken.items()}
    files_given: dict[str, Any] = {"dit_files": {"model": files.pop("model")}, "part_files": files}
    row = WAN_CONFIGS["ti2v-5B"].variant(t5_dtype="float32")
    ours, theirs = WanTI2V(row, comfy, **files_given), WanTI2V(row, FIVE)
    assert same_vae(ours, theirs, torch.float32) and same_t5(ours, meant)
    experts = ours.model.state_dict(), theirs.model.state_dict()
    assert all(torch.equal(experts[0][key], experts[1][key]) for key in experts[1])
    assert ours.text_encoder("a boat").isfinite().all()


def test_what_is_nearest_to_the_released_weights_is_taken(parts: Mapping[str, State], comfy: Path) -> None:
    for expert in ("high", "low"):
        put(parts[expert], comfy / RELEASED.format(expert, "fp16"))
        comfyui(parts[expert], comfy / RELEASED.format(expert, "fp8_scaled"))
        put(parts[expert], comfy / f"diffusion_models/smoothMix_i2v_{expert}.safetensors", torch.float32)
    put(parts["5b"], comfy / "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors")
    taken = list(ComfyFolder(comfy).find(EXPERTS, *I2V))
    assert as_settings(taken) == {
        f"dit_{expert}": str(comfy / RELEASED.format(expert, "fp16")) for expert in ("high", "low")
    }
    assert taken[0].line == (
        "`comfy_dir`: high-noise expert diffusion_models/wan2.2_i2v_high_noise_14B_fp16.safetensors, "
        "of 3 that fit the one nearest to the released weights"
    )
    (comfy / RELEASED.format("low", "fp16")).unlink()
    with_low = files_of(comfy)  # a pair of one format comes before one half of more bits
    assert set(with_low) == set(EXPERTS) and "fp16" not in with_low[HIGH] and "fp16" not in with_low[LOW]
    assert with_low[HIGH].replace("High", "Low").replace("high", "low") == with_low[LOW]


def test_of_equal_sizes_the_format_that_is_computed_in_is_taken(parts: Mapping[str, State], comfy: Path) -> None:
    pair(parts, comfy, form="fp16")
    pair(parts, comfy, form="bf16", dtype=torch.bfloat16)
    assert files_of(comfy) == {part: RELEASED.format(part.partition("_")[0], "bf16") for part in EXPERTS}


def test_an_expert_may_be_told_by_its_folder(parts: Mapping[str, State], comfy: Path) -> None:
    for expert in ("high", "low"):
        (comfy / f"unet/{expert}Noise").mkdir(parents=True)
        gguf_file("Q8_0")(parts[expert], comfy / f"unet/{expert}Noise/Wan2.2-I2V-A14B-Q8_0.gguf")
    assert files_of(comfy)[LOW] == "unet/lowNoise/Wan2.2-I2V-A14B-Q8_0.gguf"


def test_one_denoiser_may_serve_both_experts(parts: Mapping[str, State], comfy: Path) -> None:
    put(parts["high"], comfy / "checkpoints/wan2.2-rapid-mega-aio-v10.safetensors")
    taken = list(ComfyFolder(comfy).find(EXPERTS, *I2V))
    assert [one.part for one in taken] == ["model"] and taken[0].line == (
        "`comfy_dir`: denoiser for both experts checkpoints/wan2.2-rapid-mega-aio-v10.safetensors, "
        "distilled by its name"
    )
    pair(parts, comfy)  # which comes before, but for a preset of few steps
    assert set(files_of(comfy)) == set(EXPERTS)


def test_a_distilled_pair_is_for_a_preset_of_few_steps(parts: Mapping[str, State], comfy: Path) -> None:
    pair(parts, comfy)
    pair(parts, comfy, "diffusion_models/wan2.2_i2v_A14b_{}_noise_lightx2v_4step.safetensors")
    assert "lightx2v" not in files_of(comfy)[HIGH] and "lightx2v" in files_of(comfy, distilled=True)[LOW]


def test_a_real_choice_is_refused_with_a_list(parts: Mapping[str, State], comfy: Path) -> None:
    for author in ("smoothMix", "dasiwa"):
        pair(parts, comfy, f"diffusion_models/{author}_i2v_{{}}.safetensors")
    listed = "diffusion_models/dasiwa_i2v_high.safetensors, diffusion_models/smoothMix_i2v_high.safetensors"
    refused(f"{listed} may each be the high-noise expert; name one with dit_high", comfy)
    put(parts["vae_5b"], comfy / "vae/wan2.2_vae.safetensors")
    put(parts["vae_5b"], comfy / "vae/Wan2_2_VAE.safetensors")
    refused("may each be the VAE; name one with vae", comfy, ("vae",), TI2V)
    for folder in "abc":
        put(parts["vae_5b"], comfy / f"vae/{folder}/wan2.2_vae.safetensors")
    with pytest.raises(UserError, match=r": (vae/\S+, ){3}vae/\S+ and more may each be the VAE"):
        list(ComfyFolder(comfy).find(("vae",), *TI2V))
    shutil.copy(FIVE / "config.json", comfy)
    for part in EXPERTS:
        (comfy / part / "config.json").unlink()
    put(parts["5b"], comfy / "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors")
    with pytest.raises(UserError, match="14B.* and .*5B.*; say which is meant with task"):
        ComfyFolder(comfy).kind(continues=True)


def test_what_is_missing_or_does_not_fit_is_said(parts: Mapping[str, State], comfy: Path) -> None:
    no_5b = "no TI2V-5B (1 expert(s), 48 input channels) in diffusion_models, unet, checkpoints"
    refused(no_5b, comfy, ("model",), TI2V)
    put(parts["high"], comfy / RELEASED.format("high", "fp16"))
    refused("no low-noise expert of I2V-A14B", comfy)
    put(parts["vae_14b"], comfy / "vae/qwen_image_vae.safetensors")  # of the same shapes
    refused("no VAE of 16 latent channels in vae, checkpoints", comfy, ("vae",))
    whole = put(parts["vae_14b"], comfy / "vae/wan_2.1_vae.safetensors").read_bytes()
    assert files_of(comfy, ("vae",)) == {"vae": "vae/wan_2.1_vae.safetensors"}
    (comfy / "vae/wan_2.1_vae.safetensors").write_bytes(whole[:-9])
    refused("wan_2.1_vae.safetensors cannot be read, it may be truncated", comfy, ("vae",))
    put(parts["t5"], comfy / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    assert files_of(comfy, ("text_encoder",)) == {"text_encoder": "text_encoders/umt5-xxl-enc-bf16.safetensors"}
    refused("no text encoder carries its tokenizer", comfy, ("text_encoder", "tokenizer"))
    put(parts["low"], comfy / "diffusion_models/wan2.1_i2v_14B_fp16.safetensors")
    refused("no low-noise expert of I2V-A14B", comfy)
    with pytest.raises(UserError, match="has none of the folders clip, diffusion_models, text_encoders, unet, vae"):
        ComfyFolder(comfy / "loras")
    with pytest.raises(UserError, match="does not exist"):
        ComfyFolder(comfy / "nowhere")
    assert ComfyFolder(comfy.parent).root == comfy


# --- whole commands


@pytest.fixture
def filled(parts: Mapping[str, State], comfy: Path) -> Path:
    """All that a 5B needs, with the declaration of small sizes."""
    small_checkpoints(comfy.parent / "small", ("64*32",))
    for name in ("config.json", "wan_config.json"):
        shutil.copy(comfy.parent / "small/ti2v" / name, comfy)
    put(parts["5b"], comfy / "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors")
    put(parts["vae_5b"], comfy / "vae/wan2.2_vae.safetensors")
    in_safetensors(sentencepiece_model(), comfy / "text_encoders/umt5_xxl_fp16.safetensors", parts["t5"])
    return comfy


def test_a_chain_needs_no_checkpoint_folder(filled: Path, command: Callable[..., Seen]) -> None:
    weights = f"--comfy_dir {filled}"
    dry = command("--dry_run --vlm_path vlm", weights=weights)
    lines = [
        "--comfy_dir: denoiser diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
        "--comfy_dir: VAE vae/wan2.2_vae.safetensors",
        "--comfy_dir: text encoder text_encoders/umt5_xxl_fp16.safetensors",
        "--comfy_dir: tokenizer in text_encoders/umt5_xxl_fp16.safetensors",
    ]
    assert dry.code == 0 and dry.stderr.splitlines()[:4] == lines and "2 clips of 64x32" in dry.output
    made = command("--vlm_path vlm", weights=weights)
    assert made.code == 0 and len(made.clips) == 2
    record = made.clips[1].record
    assert (record["dit"], record["vae"]) == ("wan2.2_ti2v_5B_fp16.safetensors", "wan2.2_vae.safetensors")
    assert record["comfy_dir"] == "models" and record["ckpt_dir"] is None
    again = command("--vlm_path vlm", weights=weights)
    assert again.code == 0 and again.requests == []
    put(read_back(filled), filled / "diffusion_models/wan2.2_ti2v_5B_fp32.safetensors", torch.float32)
    changed = command("--vlm_path vlm", weights=weights)
    assert changed.code == 2 and "another checkpoint" in changed.stderr


def read_back(folder: Path) -> State:
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors")


def test_what_is_given_comes_first(filled: Path, command: Callable[..., Seen]) -> None:
    """`ckpt_dir` has all parts but the denoiser, which is in neither file that is given."""
    bare = filled.parent / "small/ti2v"
    for file in bare.glob("diffusion_pytorch_model*"):
        file.unlink()
    seen = command("", weights=f"--comfy_dir {filled} --ckpt_dir {bare}")
    checkpoint = seen.pipeline.checkpoint
    assert seen.code == 0 and checkpoint.folder == bare
    assert checkpoint.experts["model"].path.is_relative_to(filled)
    assert checkpoint.vae.path.parent == checkpoint.text_encoder.path.parent == bare
    assert checkpoint.tokenizer == bare / "google/umt5-xxl"
    other = shutil.copy(filled / "vae/wan2.2_vae.safetensors", filled.parent / "mine.safetensors")
    shutil.rmtree(seen.folder)
    seen = command(f"--vae {other} --quiet", weights=f"--comfy_dir {filled}")
    assert seen.code == 0 and seen.pipeline.checkpoint.vae.path == Path(other) and "--comfy_dir" not in seen.stderr


def test_two_models_in_one_folder_need_the_task(
    filled: Path, parts: Mapping[str, State], command: Callable[..., Seen]
) -> None:
    for part in EXPERTS:  # the tiny denoisers of both are of one width
        shutil.copy(A14B / part / "config.json", filled / part)
    pair(parts, filled)
    seen = command("", weights=f"--comfy_dir {filled}")
    assert seen.code == 2 and seen.stderr.startswith("error: --comfy_dir") and "with --task" in seen.stderr
    assert command("--dry_run --task v2v-5B", weights=f"--comfy_dir {filled}").code == 0
