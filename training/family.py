"""The models of the tiny family: their sizes, how they are built, and how they get into the official folders.

The sizes are those of the random checkpoints' maker, so that there is one list of tensor names; the networks are the
ones that the pipelines load; the names between the two are the loaders' own maps, read backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor, nn

from tests.support.tiny_checkpoint import Denoiser, InternVL, TextEncoder, Vae, write_caption_tokenizer
from training import scenes
from wan.captioner.internvl import SYSTEM, native_config, native_tensors
from wan.denoiser import model as denoiser
from wan.denoiser.headers import infer_config
from wan.text import umt5 as text_encoder
from wan.vae import vae
from wan.weights.tensors import Shape, Weights

VAES = {
    "vae21": Vae(z_dim=16, dim=16, decoder_dim=16, nested=False, multiples=(1, 2, 2, 2)),
    "vae22": Vae(z_dim=48, dim=16, decoder_dim=24, nested=True, multiples=(1, 2, 2, 2)),
}
TEXT = TextEncoder(vocab_size=192, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2)
# A token of the 5B holds 48 x 2 x 2 values of noise, which its width must be able to carry.
DENOISERS = {
    "dit5b": Denoiser("ti2v", 48, 48, dim=320, num_heads=8, ffn_dim=960, num_layers=6, text_dim=TEXT.dim),
    "dit14b": Denoiser("i2v", 36, 16, dim=192, num_heads=4, ffn_dim=768, num_layers=6, text_dim=TEXT.dim),
}
CAPTIONER = InternVL(vision_dim=96, vision_layers=3, dim=128, num_layers=4)
QUESTION = "Describe this video in detail."
# What both tokenizers know. The captioner's reads its own prompt as well, and that should not take many tokens.
PROMPT_WORDS = scenes.every_word()
CAPTION_WORDS = "\n".join([scenes.every_word(), *[f"{SYSTEM} system user assistant Frame1: {QUESTION}"] * 8])


def build_vae(sizes: Vae) -> AutoencoderKLWan:
    weights = _weights(sizes.shapes())
    names = {vae.official_to_diffusers(key, weights.shapes): shape for key, shape in weights.shapes.items()}
    return AutoencoderKLWan(**vae.infer_config(weights, names))


def build_denoiser(sizes: Denoiser) -> denoiser.WanModel:
    return denoiser.WanModel(**infer_config(_weights(sizes.shapes(), sizes.config())))


def build_text_encoder(sizes: TextEncoder) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    weights = _weights(sizes.shapes())
    names = {text_encoder._library_name(key): shape for key, shape in weights.shapes.items()}
    config = UMT5Config(**text_encoder._infer_config(weights, names))
    config._attn_implementation = "eager"
    return UMT5EncoderModel(config)


def build_captioner(sizes: InternVL, ids: Mapping[str, int]) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    original = sizes.config(caption_vocabulary(ids), ids)
    config = InternVLConfig(**native_config(original), image_token_id=ids["<IMG_CONTEXT>"])
    return InternVLForConditionalGeneration(config)


def caption_vocabulary(ids: Mapping[str, int]) -> int:
    """Rows of the captioner's embedding table, padded as the published ones are."""
    return -(-len(ids) // 16) * 16


def caption_tokenizer(folder: Path) -> tuple[Any, dict[str, int]]:
    """The captioner's tokenizer, made in `folder` if it is not there, and the id of every token."""
    from transformers import Qwen2Tokenizer

    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_caption_tokenizer(folder, CAPTION_WORDS)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    return tokenizer, tokenizer.get_vocab()


# --- library names -> official names ----------------------------------------------------------------------------------


def vae_names(sizes: Vae) -> dict[str, list[str]]:
    """Official name -> the library's names of what it holds, in order."""
    shapes = sizes.shapes()
    return {key: [vae.official_to_diffusers(key, shapes)] for key in shapes}


def denoiser_names(sizes: Denoiser) -> dict[str, list[str]]:
    converted = convert_wan_transformer_to_diffusers({key: key for key in sizes.shapes()})
    return {key: [name] for name, key in converted.items()}


def text_names(sizes: TextEncoder) -> dict[str, list[str]]:
    return {key: [text_encoder._library_name(key)] for key in sizes.shapes()}


def captioner_names(sizes: InternVL, vocabulary: int) -> dict[str, list[str]]:
    shapes = sizes.shapes(vocabulary)
    return {key: list(native_tensors(key, torch.empty(shape))) for key, shape in shapes.items()}


def official(state: Mapping[str, Tensor], names: Mapping[str, list[str]], shapes: Mapping[str, Shape]) -> Any:
    """The tensors of a trained model in bf16, under their official names and in their official shapes."""
    return {
        key: torch.cat([state[name] for name in parts]).reshape(shapes[key]).to(torch.bfloat16).contiguous()
        for key, parts in names.items()
    }


def library(stored: Mapping[str, Tensor], names: Mapping[str, list[str]], like: nn.Module | None = None) -> Any:
    """What `official` stored, in float32 under the library's names; in the shapes of that module's, if there is one."""
    tensors: dict[str, Tensor] = {}
    for key, parts in names.items():
        tensors |= dict(zip(parts, stored[key].float().chunk(len(parts)), strict=True))
    shapes = {} if like is None else {name: value.shape for name, value in like.state_dict().items()}
    return {name: value.reshape(shapes.get(name, value.shape)).contiguous() for name, value in tensors.items()}


def in_fp8(name: str, dimensions: int) -> bool:
    """Whether that parameter of a denoiser, by its official or the library's name, is stored in fp8."""
    return name.startswith("blocks.") and name.endswith(".weight") and dimensions == 2


def _weights(shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None) -> Weights:
    return Weights(Path("tiny"), (), shapes, config or {})
