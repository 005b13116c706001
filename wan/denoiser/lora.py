"""LoRA files -> the weights of a denoiser: W + strength * alpha / rank * B @ A, whatever the file calls its layers.

Strength and sum are applied in float32 to the checkpoint's own values and rounded once, so that what is merged depends
on the files alone and not on what was merged before; taking a LoRA out reads the checkpoint's values again. A layer
whose weight stays quantized holds the LoRA beside it and does the same sum whenever it is used.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from wan.denoiser.model import WanModel, key_map
from wan.errors import UserError
from wan.foreign import fit, parse_json, read_json
from wan.settings import LoraFile
from wan.weights.checkpoint import Shape, Weights, check_expert, open_file
from wan.weights.quantized import Addition, QuantizedLinear, dequantize

_LOGGER = logging.getLogger(__name__)

# The layers by their official names. A modulation is a parameter by itself, of which a LoRA may hold the difference.
_LAYERS = (
    *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("time_projection.1", "head.head", "head.modulation"),
)
_BLOCK_LAYERS = (
    *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "o", "norm_q", "norm_k")),
    *("norm3", "ffn.0", "ffn.2", "modulation"),
)
# What image-to-video models of Wan2.1 have and Wan2.2 does without.
_LEFTOVER = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder")
_PREFIX = re.compile(
    r"(?:(?:base_model\.model|model|diffusion_model|transformer|transformer_2|pipe\.dit2?|dit)\."
    r"|lora_unet__?|lora_transformer_)*"  # VideoX-Fun writes two underscores
)
# Between role and leaf may stand the name that peft gave the adapter. `diff_m` is the difference of a modulation.
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora[._](?:(?P<role>A|B|down|up)(?:\.[^.]+)?\.weight|(?:B|up)(?:\.[^.]+)?\.(?P<bias>bias))"
    r"|(?P<other>alpha|diff|diff_b|diff_m))"
)
_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up"}


@dataclass(frozen=True)
class LoraMatch:
    """How a LoRA fits a model: `matched` of its `total` layers are there, and the names in the file of the others.

    Layers that only Wan2.1 has are not counted. `ranks` are all that occur, ascending.
    """

    lora: LoraFile
    matched: int
    total: int
    ranks: tuple[int, ...]
    unmatched: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The LoRA and how much of it fits, for a record."""
        return self.lora.as_json() | {"matched": self.matched, "total": self.total}

    def __str__(self) -> str:
        ranks = "/".join(map(str, self.ranks)) or "none"
        return (
            f"{self.lora.path.name}: {self.matched} of {self.total} layers, rank {ranks}, strength {self.lora.strength}"
        )


def open_loras(loras: Sequence[LoraFile], weights: Weights) -> list[OpenedLora]:
    """These LoRAs as they fit the model; reads headers and alphas only. Layers that do not fit are warned of.

    Raises UserError for a file that is none or broken, is for another expert, or does not fit by half or in width.
    """
    opened = [_open(lora, weights) for lora in loras]
    for match in (one.match for one in opened):
        if match.unmatched:
            _LOGGER.warning("%s; left out: %s", match, _listing(match.unmatched))
    return opened


@torch.no_grad()
def merge_loras(model: WanModel, weights: Weights, opened: Sequence[OpenedLora]) -> None:
    """Put these LoRAs, and no others, into the model that was loaded from `weights`; `()` takes all of them out.

    Parameters are changed in place, on the device that they are on, one at a time. Raises UserError for values that
    are not finite; the next merge puts right what such an error left half done.
    """
    loras = tuple(one.match.lora for one in opened)
    if loras == model.loras:
        return
    changed = frozenset(name for file in opened for name in file.parts)
    source_of = key_map(weights)
    name_of = {source_of[name]: name for name in changed | model.altered}
    model.loras, model.altered = None, changed | model.altered  # until all is done
    packed = {name: module for name in name_of.values() if (module := _packed(model, name))}
    for name, linear in packed.items():
        linear.set_loras([addition for file in opened for addition in file.additions(name, linear.weight.device)])
    for key, original in weights.read({key for key, name in name_of.items() if name not in packed}):
        parameter = model.get_parameter(name_of[key])
        value = dequantize(original).to(parameter.device, torch.float32, copy=True).view(parameter.shape)
        for file in opened:
            file.add(name_of[key], value)
        parameter.copy_(value if model.rounding is None else value.to(model.rounding))
    model.loras, model.altered = loras, changed
    for file in opened:
        _LOGGER.info("merged %s", file.match)


def _packed(model: WanModel, name: str) -> QuantizedLinear | None:
    """The layer that holds this parameter packed, and so takes what is added to it as it is."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return module if leaf == "weight" and isinstance(module, QuantizedLinear) else None


@dataclass(frozen=True)
class _LayerKeys:
    """What a file holds for one parameter: keys by role (down, up, bias, diff), and alpha / rank."""

    keys: Mapping[str, str]
    scale: float


@dataclass(frozen=True)
class OpenedLora:
    """A LoRA file that fits: its parts by the name of the parameter in the model."""

    file: Weights
    parts: Mapping[str, _LayerKeys]
    match: LoraMatch

    def add(self, name: str, value: Tensor) -> None:
        """Add what this file holds for a parameter to its float32 value; no more of the file is read."""
        additions = self.additions(name, value.device)
        for addition in additions:
            addition.add_to(value)
        if additions and not value.sum().isfinite():  # as telling as every value by itself, and far quicker
            raise self._not_finite(name)

    def additions(self, name: str, device: torch.device) -> list[Addition]:
        """What this file adds to a parameter, in the dtypes of the file, on the device. Raises UserError for NaN."""
        part = self.parts.get(name)
        if part is None:
            return []
        read = {key: dequantize(tensor).to(device, copy=True) for key, tensor in self.file.read(part.keys.values())}
        tensors = {role: read[key] for role, key in part.keys.items()}
        if not all(tensor.float().sum().isfinite() for tensor in tensors.values()):
            raise self._not_finite(name)
        strength, found = self.match.lora.strength, []
        if "up" in tensors:
            found.append(Addition(tensors["up"].flatten(1), tensors["down"].flatten(1), strength * part.scale))
        if "bias" in tensors:
            found.append(Addition(tensors["bias"], None, strength * part.scale))
        if "diff" in tensors:
            found.append(Addition(tensors["diff"], None, strength))
        return found

    def _not_finite(self, name: str) -> UserError:
        return UserError(f"{self.file.path} makes {name} infinite or NaN; download it again or lower its strength")


def _open(lora: LoraFile, weights: Weights) -> OpenedLora:
    """The file, checked against the model and its expert. Raises UserError."""
    _check_path(lora.path)
    check_expert("LoRA ", lora.path, weights.expert, "lora")
    file = open_file(lora.path)
    lora.digest  # noqa: B018  (of what is read now; when the record is written, the file may be another or gone)
    layers = _layers(file)
    shapes = {name: weights.shapes[key] for name, key in key_map(weights).items()}
    spellings = _spellings(shapes)
    known = {layer: spellings[layer] for layer in layers if layer in spellings}
    if not known:
        raise UserError(f"{file.path} holds no layer of this model (its first is {next(iter(layers))}); is it for Wan?")
    by_telling = sorted(known.items(), key=lambda item: "attn" not in item[1])  # a wrong width is seen there
    known = {layer: stem for layer, stem in by_telling if _fits(file, layers[layer], stem, shapes)}
    unmatched = tuple(layer for layer in layers if layer not in known)
    if 2 * len(known) < len(layers):
        raise UserError(
            f"{file.path} is for another model: only {len(known)} of its {len(layers)} layers are in this one, "
            f"not {_listing(unmatched)}"
        )
    scales = _scales(file, layers)
    parts: dict[str, _LayerKeys] = {}
    for layer, stem in known.items():
        for name, keys in _by_parameter(layers[layer], stem, shapes).items():
            if name in parts:
                raise UserError(f"{file.path} holds {layer} twice, under two names; merge each once, from its own file")
            parts[name] = _LayerKeys(keys, scales[layer])
    ranks = {file.shapes[layers[layer]["down"]][0] for layer in known if "down" in layers[layer]}
    match = LoraMatch(lora, len(known), len(layers), tuple(sorted(ranks)), unmatched)
    return OpenedLora(file, parts, match)


def _check_path(path: Path) -> None:
    if not path.is_file():
        what = "is a folder; name the .safetensors file in it" if path.is_dir() else "does not exist"
        raise UserError(f"LoRA {path} {what}")
    if path.suffix.lower() != ".safetensors":
        raise UserError(
            f"LoRA {path} is no .safetensors file; others may run code when they are opened: convert it "
            "(torch.load with weights_only=True, then safetensors.torch.save_file) or download it as .safetensors"
        )


def _layers(file: Weights) -> dict[str, dict[str, str]]:
    """The keys of each layer by role: down, up, bias, alpha, diff, diff_b. Raises UserError for what is no LoRA."""
    layers: dict[str, dict[str, str]] = {}
    odd = []
    for key in file.shapes:
        if _LEFTOVER.search(key):
            continue
        match = _KEY.fullmatch(_PREFIX.sub("", key, count=1))
        if match is None:
            odd.append(key)
            continue
        layer, role = match["layer"], match["other"] or match["bias"] or _ROLES[match["role"]]
        if role == "diff_m":
            layer, role = f"{layer}.modulation", "diff"
        keys = layers.setdefault(layer, {})
        if keys.setdefault(role, key) != key:
            raise UserError(f"{file.path} holds {layer} twice, as {keys[role]} and {key}; give each in its own file")
    if odd:
        more = f" and {len(odd) - 1} more like it" if len(odd) > 1 else ""
        raise UserError(f"{file.path} is no plain LoRA, it holds {odd[0]}{more}; LoKr, LoHa, DoRA are not supported")
    layers = {layer: keys for layer, keys in layers.items() if keys.keys() != {"alpha"}}
    if not layers:
        raise UserError(f"{file.path} holds no LoRA for any layer of Wan2.2")
    for layer, keys in layers.items():
        up, down = (file.shapes[keys[role]] if role in keys else None for role in ("up", "down"))
        if any(shape is not None and len(shape) < 2 for shape in (up, down)):
            raise UserError(f"{file.path} is damaged: a half of {layer} is no matrix; download it again")
        if (up is None) != (down is None) or ("bias" in keys and up is None):
            raise UserError(f"{file.path} holds one half of {layer} only; it is damaged, download it again")
        if up and down and not (len(up) == len(down) and math.prod(up[1:]) == down[0]):
            raise UserError(f"{file.path} is damaged: the two halves of {layer} are {up} and {down}; download it again")
    return layers


def _spellings(names: Container[str]) -> dict[str, str]:
    """Every spelling of a layer -> its name in the model: official and diffusers' names, with dots or underscores."""
    blocks = itertools.takewhile(lambda n: f"blocks.{n}.attn1.to_q.weight" in names, itertools.count())
    official = [*_LAYERS, *(f"blocks.{n}.{layer}" for n in blocks for layer in _BLOCK_LAYERS)]
    renamed = convert_wan_transformer_to_diffusers({f"{layer}.weight": layer for layer in official})
    spellings: dict[str, str] = {}
    for name, layer in renamed.items():
        stem = name.removesuffix(".weight")
        if stem in names or name in names:
            spellings |= {spelling: stem for dotted in (layer, stem) for spelling in (dotted, dotted.replace(".", "_"))}
    return spellings


def _by_parameter(keys: Mapping[str, str], stem: str, names: Container[str]) -> dict[str, dict[str, str]]:
    """The keys of a layer by the parameter of the model that they change, and by role: down, up, bias, diff."""
    weight = {role: keys[role] for role in ("down", "up", "diff") if role in keys}
    bias = {new: keys[role] for role, new in (("bias", "bias"), ("diff_b", "diff")) if role in keys}
    parts = {stem if stem in names else f"{stem}.weight": weight, f"{stem}.bias": bias}
    return {name: part for name, part in parts.items() if part}


def _fits(file: Weights, keys: Mapping[str, str], stem: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a layer has the model's shape; False where other channels go in or out, as in text-to-video's LoRAs.

    Raises UserError for a LoRA of another width, or of other sizes inside.
    """
    for name, part in _by_parameter(keys, stem, shapes).items():
        here = shapes.get(name, ())
        found = [file.shapes[part[role]] for role in ("diff", "bias") if role in part]
        if "up" in part:
            found.append((file.shapes[part["up"]][0], *file.shapes[part["down"]][1:]))
        for there in found:
            if there == here:
                continue
            width = shapes["patch_embedding.weight"][0]
            if (name, there[:1]) == ("patch_embedding.weight", (width,)) or name.startswith("proj_out"):
                return False
            if "attn" in stem and there[:1] not in ((), (width,)):
                raise UserError(f"{file.path} is for a model of width {there[0]}, this one is {width}; give one for it")
            raise UserError(f"{file.path} is for another model: its {stem} is {there}, here it is {here}")
    return True


def _scales(file: Weights, layers: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """alpha / rank by layer. Where the file says nothing of alpha it is the rank."""
    read = file.read({keys["alpha"] for keys in layers.values() if "alpha" in keys})
    alphas = {key: dequantize(value) for key, value in read}
    adapter = _adapter(file)
    patterns = adapter.get("alpha_pattern") or {}
    scales = {}
    try:
        for layer, keys in layers.items():
            rank = file.shapes[keys["down"]][0] if "down" in keys else 1
            said = (alpha for name, alpha in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{name})", layer))
            alpha = alphas[keys["alpha"]] if "alpha" in keys else next(said, adapter.get("lora_alpha", rank))
            scales[layer] = float(alpha) / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
    except (TypeError, ValueError, RuntimeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise UserError(f"{file.path} says no alpha that can be read ({error}); download it again") from error
    return scales


def _adapter(file: Weights) -> dict[str, Any]:
    """peft's configuration, as diffusers writes it into the header and peft into a file beside its own."""
    header = file.config.get("lora_adapter_metadata")
    if header is None:
        beside = file.path.with_name("adapter_config.json")
        return read_json(beside) if file.path.name == "adapter_model.safetensors" and beside.is_file() else {}
    said = fit(dict[str, Any], parse_json(header, f"the header of {file.path}"), f"the header of {file.path}")
    return {name.removeprefix("transformer."): value for name, value in said.items()}


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
