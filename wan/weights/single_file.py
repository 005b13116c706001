"""One part of a model from a file of its own, as ComfyUI, converters and quantizers publish it.

Only headers are read. A denoiser may be GGUF or safetensors, a text encoder that or .pth, a VAE safetensors or .pth;
fp8 has its scales beside the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wan.errors import UserError
from wan.foreign import read_json
from wan.weights.gguf_files import GGUF_TYPES, open_gguf, read_gguf_fields
from wan.weights.tensors import PLAIN, Shape, Weights, open_pth, safetensors_dtypes, safetensors_shapes

VOCABULARY = "spiece_model"  # sentencepiece's model as a tensor, in ComfyUI's text encoders
VOCABULARY_OF_GGUF = tuple(
    f"tokenizer.ggml.{name}" for name in ("model", "tokens", "scores", "token_type", "precompiled_charsmap")
)
# What may stand before the names of each part in a file of its own, or in one that holds several parts (ComfyUI).
_PREFIXES = {
    "denoiser": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae.", "model."),
    "text_encoder": ("text_encoders.umt5xxl.transformer.", "cond_stage_model.transformer.", "transformer."),
}
# By which tensor a part is known; official and library's names.
_KNOWN_BY = {
    "denoiser": ("patch_embedding.weight",),
    "vae": ("decoder.conv1.weight", "decoder.conv_in.weight"),
    "text_encoder": ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight", "token_embd.weight"),
}
SUFFIXES = {"vae": (".safetensors", ".pth"), "text_encoder": (".safetensors", ".pth", ".gguf")}
# What the fp8 files of ComfyUI, its converters and lightx2v hold beside the weights: the factor of a weight; and what
# is for products in fp8 alone (the scale of the inputs) or repeats what the dtypes say.
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = re.compile(r"(?:.*\.)?(?:scaled_fp8|spiece_model)|.*\.(?:scale_input|input_scale|comfy_quant)")
# Other words after high or low, as in low_poly and high-kick, say something else.
_EXPERT = re.compile(
    r"(?<![a-z])(high|low)(?=[ _.-]*(?:noise|expert|model|lora|rank|wan|svi|lightx2v|lightning|distill|rapid|scaled"
    r"|comfy|pro(?![a-z])|steps?(?![a-z])|epoch|[ait]2v|a?14b|fp\d|bf16|i?q\d|[evr]?\d|$))"
)
_RELEASED_HEAD = 128  # the width of an attention head in every released model (source: the official configs)


def check_expert(what: str, path: Path, expert: str, setting: str) -> None:
    """Raise UserError for a file whose name says high or low, and not both, and says the wrong one.

    `what` goes before the path in the message; `setting` is the one that ends in _high or _low.
    """
    asked = expert.removesuffix("_noise_model")
    experts = experts_named(path.stem)
    if asked in ("high", "low") and len(experts) == 1 and asked not in experts:
        word = experts.pop()
        raise UserError(
            f"{what}{path} is for the {word}-noise expert by its name, and is given for {asked} noise; "
            f"give it with `{setting}_{word}`, or rename it if that is not meant"
        )


def experts_named(name: str) -> set[str]:
    """Which of "high" and "low" a name says of experts."""
    return set(_EXPERT.findall(name.lower()))


def open_denoiser(file: Path, beside: Path | None = None) -> Weights:
    """A denoiser from one file: GGUF, or safetensors in fp8 with or without scales, or in any float.

    Its names are the official ones or diffusers', with or without the prefix of ComfyUI. `beside` is the folder whose
    config.json says what no shape tells; without one the heads are as wide as in the released models. Raises
    UserError for a file that is broken, is no Wan denoiser, or is of another size than the configuration.
    """
    weights, kinds, what, known = _open_single(file, "denoiser", (".gguf", ".safetensors"))
    shapes = _with_lost_dimensions(weights.shapes)
    if len(shapes.get("patch_embedding.weight", ())) != 5:
        raise UserError(f"{file} is no Wan denoiser: {what} without a patch_embedding.weight of five dimensions")
    if kinds:
        name, kind = next(iter(kinds.items()))
        raise UserError(f"{file}: {name} is stored as {kind}, which cannot be read; there is {known}")
    config = read_json(beside / "config.json") if beside and (beside / "config.json").is_file() else {}
    width = shapes["patch_embedding.weight"][0]
    expected = config.get("dim", width)
    if expected != width:
        raise UserError(
            f"{file} is of a model of width {width}, {beside} is of one of width {expected}; give one for it"
        )
    if not config.keys() & {"num_heads", "num_attention_heads"}:
        if width % _RELEASED_HEAD and beside is not None:
            raise UserError(f"{file} does not say how many heads there are; put its model's config.json into {beside}")
        config = {**config, "num_heads": width // _RELEASED_HEAD}
    return replace(weights, shapes=shapes, config=config)


def open_part(file: Path, part: str) -> Weights:
    """The "vae" or "text_encoder" from a file of its own: .pth, safetensors in any float or in fp8 with scales.

    A text encoder may be GGUF, too. Of a file that holds several parts, this one. Raises UserError.
    """
    word = {"vae": "VAE", "text_encoder": "text encoder"}[part]
    if file.suffix.lower() == ".pth":
        weights, kinds, known = open_pth(file), dict[str, str](), ""
    else:
        weights, kinds, _, known = _open_single(file, part, SUFFIXES[part])
    if not any(name in weights.shapes for name in _KNOWN_BY[part]):
        raise UserError(f"{file} is no {word} of Wan: it has no {_KNOWN_BY[part][0]}")
    if kinds:
        name, kind = next(iter(kinds.items()))
        raise UserError(f"{file}: {name} is stored as {kind}, which cannot be read; there is {known}")
    beside = file.with_name("config.json")  # of diffusers, which has the statistics of the latents
    if file.stem == "diffusion_pytorch_model" and beside.is_file():
        return replace(weights, config=read_json(beside))
    return weights


def _open_single(file: Path, part: str, suffixes: Sequence[str]) -> tuple[Weights, dict[str, str], str, str]:
    """One part from one file; what of it is stored in a form that cannot be read, what the file is, and what can be."""
    if not file.is_file():
        raise UserError(f"{file} {'is a folder; name the file in it' if file.is_dir() else 'does not exist'}")
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        whose = {"denoiser": "a denoiser", "vae": "a VAE", "text_encoder": "a text encoder"}[part]
        raise UserError(f"{file} is no {' or '.join(suffixes)} file; {whose} of its own is one of them")
    if suffix == ".gguf":
        header = open_gguf(file)
        shapes, what = dict(header.shapes), f"a GGUF file of the architecture {header.architecture}"
        kinds, readable = dict(header.types), (*GGUF_TYPES, *PLAIN)
        scales, known = {}, ", ".join(GGUF_TYPES)
    else:
        shapes, kinds = dict(safetensors_shapes(file)), safetensors_dtypes(file)
        shapes, what = {name: shape for name, shape in shapes.items() if not _BESIDE.fullmatch(name)}, "a file"
        scales = {name: name.removesuffix(end) + ".weight" for end in _SCALES for name in shapes if name.endswith(end)}
        scales = {key: name for name, key in scales.items() if key in shapes}
        for key, name in scales.items():
            if math.prod(shapes.pop(name)) not in (1, *shapes[key][:1]):
                raise UserError(f"{file}: {name} is no scale of a tensor or of its rows; give scaled fp8 or GGUF")
        readable, known = (*PLAIN, "F8_E4M3", "F8_E5M2"), "scaled fp8"
    prefixes = (prefix for prefix in _PREFIXES[part] if any(prefix + name in shapes for name in _KNOWN_BY[part]))
    prefix = next(prefixes, "")
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    kinds = {name: kind for name, kind in kinds.items() if name.removeprefix(prefix) in shapes and kind not in readable}
    scales = {key.removeprefix(prefix): name for key, name in scales.items() if key.startswith(prefix)}
    return Weights(file, (file,), shapes, {}, prefix=prefix, scales=scales), kinds, what, known


def _with_lost_dimensions(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a denoiser as the model has them; writers of GGUF drop a leading 1 or fold dimensions."""
    restored = {
        name: (1, *shape) if len(shape) == 2 and name.endswith(("modulation", "scale_shift_table")) else shape
        for name, shape in shapes.items()
    }
    patch, width = shapes.get("patch_embedding.weight", ()), shapes.get("patch_embedding.bias", (0,))[0]
    if len(patch) == 4 and width and patch[0] % width == 0:  # stable-diffusion.cpp: [D * channels, 1, 2, 2]
        restored["patch_embedding.weight"] = (width, patch[0] // width, *patch[1:])
    return restored


def has_vocabulary(file: Path) -> bool:
    """Whether a text encoder's file carries its vocabulary; only the head is read. Raises UserError."""
    if file.suffix.lower() == ".gguf":
        return read_gguf_fields(file, VOCABULARY_OF_GGUF[:1]) == ["t5"]
    if file.suffix.lower() != ".safetensors":
        return False
    return any(name == VOCABULARY for name, _ in safetensors_shapes(file))
