"""LoRA files -> which keys change which parameter of a denoiser, and by what scale; whatever a file calls its layers.

Only headers and alphas are read. What a file holds is checked against the model before anything is merged.
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

from wan.denoiser.headers import in_model, key_map
from wan.errors import UserError
from wan.foreign import fit, parse_json, read_json
from wan.options import EXPERT_OF_LORA
from wan.settings import LoraFile
from wan.weights.checkpoint import Checkpoint
from wan.weights.single_file import check_expert
from wan.weights.tensors import FLOATS, Shape, Weights, open_file, stored_types

_LOGGER = logging.getLogger(__name__)

LORA_SETTING: Mapping[str, str] = {expert: f"`{name}`" for name, expert in EXPERT_OF_LORA.items()}

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
    r"(?:(?:lora_)?(?P<half>transformer_[12]|high_noise_model|low_noise_model|pipe\.dit2|dit2)[._]"
    r"|(?:base_model\.model|diffusion\.model|diffusion_model|model|module|transformer|pipe\.dit|dit)\."
    r"|lora_unet__?|lora_transformer_|lycoris_)*"  # VideoX-Fun writes two underscores
)
_COMPILED = re.compile(r"_orig_mod[._]")  # torch.compile puts it before the names of what it wraps
# Which of the two experts a part of a file is for, where one file holds both (ai-toolkit, diffusers, DiffSynth).
_HALVES = {
    "transformer_1": "high",
    "high_noise_model": "high",
    "transformer_2": "low",
    "low_noise_model": "low",
    "pipe.dit2": "low",
    "dit2": "low",
}
# Between role and leaf may stand the name that peft gave the adapter. `diff_m` is the difference of a modulation.
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora(?:[._]|_linear_layer\.)(?P<role>A|B|down|up|mid)(?:\.(?!bias$)[^.]+)?(?:\.weight)?"
    r"|lora[._](?:B|up)(?:\.[^.]+)?\.(?P<bias>bias)"
    r"|(?P<other>alpha|diff|diff_b|diff_m|dora_scale|lora_magnitude_vector|lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]"
    r"|hada_t[12])"
    r"(?:\.[^.]+)?(?:\.weight)?)"
)
_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up", "mid": "mid", "lora_magnitude_vector": "dora_scale"}
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


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


def check_for_experts(loras: Mapping[str, tuple[LoraFile, ...]], checkpoint: Checkpoint, name: str) -> None:
    """Raise UserError for LoRAs, by expert, of experts that a checkpoint lacks; `name` is that of the model."""
    if checkpoint.single and loras.get("high_noise_model", ()) != loras.get("low_noise_model", ()):
        path = checkpoint.experts["high_noise_model"].path
        raise UserError(f"{path} serves both experts; give the same LoRAs with `lora_high` and `lora_low`")
    for expert in loras:
        if expert not in checkpoint.experts:
            takes = " and ".join(LORA_SETTING[one] for one in sorted(checkpoint.experts))
            raise UserError(f"{LORA_SETTING.get(expert, expert)} is not for {name}, which takes {takes}")


def check_headers(loras: Sequence[LoraFile], weights: Weights) -> None:
    """Raise UserError where the headers of files tell what `open_loras` would refuse; needs no PyTorch."""
    for lora in loras:
        _Fitting.of(lora.path, weights)


def open_loras(loras: Sequence[LoraFile], weights: Weights) -> list[OpenedLora]:
    """These LoRAs as they fit the model; reads headers and alphas only. Layers that do not fit are warned of.

    Raises UserError for a file that is none or broken, is for another expert, or does not fit by half or in width.
    """
    opened = [_open(lora, weights) for lora in loras]
    for match in (one.match for one in opened):
        if match.unmatched:
            _LOGGER.warning("%s; left out: %s", match, _listing(match.unmatched))
    return opened


@dataclass(frozen=True)
class LayerKeys:
    """What a file holds for one parameter: keys by role (down, up, bias, diff), and alpha / rank."""

    keys: Mapping[str, str]
    scale: float


@dataclass(frozen=True)
class OpenedLora:
    """A LoRA file that fits: its parts by the name of the parameter in the model."""

    file: Weights
    parts: Mapping[str, LayerKeys]
    match: LoraMatch

    @property
    def size(self) -> int:
        """Bytes of what it holds for the model; a file may hold more."""
        count = sum(math.prod(self.file.shapes[key]) for part in self.parts.values() for key in part.keys.values())
        whole = sum(map(math.prod, self.file.shapes.values()))
        return self.file.path.stat().st_size * count // max(1, whole)

    def has_magnitude(self, name: str) -> bool:
        """Whether what this file holds for a parameter depends on the checkpoint's values (DoRA)."""
        return name in self.parts and "dora_scale" in self.parts[name].keys

    def is_light(self, size: int) -> bool:
        """Whether it holds only products of two factors, and differences, of no more numbers than this each."""
        held = [(role, key) for part in self.parts.values() for role, key in part.keys.items()]
        return all(
            role in ("down", "up", "bias", "diff") and math.prod(self.file.shapes[key]) <= size for role, key in held
        )


@dataclass(frozen=True)
class _Fitting:
    """The keys of a file by layer and role, and the layers of the model that it has, by their names in the file."""

    file: Weights
    half: str
    layers: Mapping[str, Mapping[str, str]]
    stems: Mapping[str, str]  # of the layers that fit
    shapes: Mapping[str, Shape]  # of the model's parameters

    @classmethod
    def of(cls, path: Path, weights: Weights) -> _Fitting:
        """What headers say of a file, checked against the model and its expert. Raises UserError."""
        _check_path(path)
        check_expert("LoRA ", path, weights.expert, "lora")
        file = open_file(path)
        half, chosen = _half(file, weights.expert)
        layers = _layers(file, chosen)
        shapes = {name: weights.shapes[key] for name, key in key_map(weights).items()}
        spellings = _spellings(shapes)
        known = {layer: spellings[flat] for layer in layers if (flat := layer.replace(".", "_")) in spellings}
        if not known:
            raise UserError(
                f"{file.path} holds no layer of this model (its first is {next(iter(layers))}); is it for Wan?"
            )
        by_telling = sorted(known.items(), key=lambda item: "attn" not in item[1])  # a wrong width is seen there
        known = {layer: stem for layer, stem in by_telling if _fits(file, layers[layer], stem, shapes)}
        if 2 * len(known) < len(layers):
            raise UserError(
                f"{file.path} is for another model: only {len(known)} of its {len(layers)} layers are in this one, "
                f"not {_listing([layer for layer in layers if layer not in known])}"
            )
        return cls(file, half, layers, known, shapes)


def _open(lora: LoraFile, weights: Weights) -> OpenedLora:
    """The file, checked against the model and its expert. Raises UserError."""
    fitting = _Fitting.of(lora.path, weights)
    file, layers, known = fitting.file, fitting.layers, fitting.stems
    lora.digest  # noqa: B018  (of what is read now; when the record is written, the file may be another or gone)
    scales = _scales(file, layers, fitting.half)
    parts: dict[str, LayerKeys] = {}
    for layer, stem in known.items():
        for name, keys in _by_parameter(layers[layer], stem, fitting.shapes).items():
            if name in parts:
                raise UserError(f"{file.path} holds {layer} twice, under two names; merge each once, from its own file")
            parts[name] = LayerKeys(keys, scales[layer])
    ranks = {rank for layer in known if (rank := _rank(file, layers[layer]))}
    unmatched = tuple(layer for layer in layers if layer not in known)
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


def _half(file: Weights, expert: str) -> tuple[str, list[str]]:
    """Which keys of a file are for this expert, and the word for it where the file says one: high or low.

    Raises UserError where they are all for another.
    """
    by_half: dict[str, list[str]] = {}
    for key in file.shapes:
        match = _PREFIX.match(_COMPILED.sub("", key))
        half = _HALVES.get(match["half"], "") if match is not None and match["half"] else ""
        by_half.setdefault(half, []).append(key)
    if by_half.keys() == {"", "low"}:  # diffusers and DiffSynth say nothing of the first expert
        by_half["high"] = by_half.pop("")
    if by_half.keys() <= {""}:
        return "", list(file.shapes)
    asked, plain = expert.removesuffix("_noise_model"), by_half.pop("", [])
    if asked in by_half:
        return asked, by_half[asked] + plain
    if len(by_half) > 1:
        raise UserError(f"{file.path} is for a model of two experts, this one has one; give a LoRA of this model")
    (half,) = by_half
    if asked in ("high", "low"):
        raise UserError(f"{file.path} holds layers of the {half}-noise expert only; give it with `lora_{half}`")
    return half, by_half[half] + plain


def _layers(file: Weights, chosen: Sequence[str]) -> dict[str, dict[str, str]]:
    """The chosen keys of each layer by role. Raises UserError for what is no LoRA.

    Roles: down, up, bias, alpha, diff, diff_b, dora_scale, and the names of the factors of LoKr and LoHa.
    """
    layers: dict[str, dict[str, str]] = {}
    odd = []
    for key in chosen:
        if _LEFTOVER.search(key):
            continue
        match = _KEY.fullmatch(_PREFIX.sub("", _COMPILED.sub("", key), count=1))
        if match is None:
            odd.append(key)
            continue
        layer, role = match["layer"], match["other"] or match["bias"] or match["role"]
        role = _ROLES.get(role, role)
        if role == "diff_m":
            layer, role = f"{layer}.modulation", "diff"
        keys = layers.setdefault(layer, {})
        if keys.setdefault(role, key) != key:
            raise UserError(f"{file.path} holds {layer} twice, as {keys[role]} and {key}; give each in its own file")
    if odd:
        more = f" and {len(odd) - 1} more like it" if len(odd) > 1 else ""
        raise UserError(
            f"{file.path} is no LoRA that can be merged, it holds {odd[0]}{more}; LoRA, DoRA, LoKr, LoHa "
            "and full differences can be"
        )
    layers = {layer: keys for layer, keys in layers.items() if keys.keys() != {"alpha"}}
    if not layers:
        raise UserError(f"{file.path} holds no LoRA for any layer of Wan2.2")
    types = stored_types(file)
    for layer, keys in layers.items():
        if any(0 in file.shapes[key] for key in keys.values()):
            raise UserError(f"{file.path} is damaged: {layer} is empty; download it again")
        kinds = {types[key] for role, key in keys.items() if role != "alpha"}
        if odd_kinds := sorted(kinds - FLOATS):
            raise UserError(f"{file.path} holds {layer} in {odd_kinds[0]} numbers; give one in bf16 or float16")
        factors = [file.shapes[keys[role]] for role in keys if role in ("up", "down")]
        if any(len(shape) < 2 for shape in factors):
            raise UserError(f"{file.path} is damaged: a half of {layer} is no matrix; download it again")
        roles = keys.keys()
        lokr = [one for one in ("lokr_w1", "lokr_w2") if one in roles or {f"{one}_a", f"{one}_b"} <= roles]
        whole = ({"up", "down"} <= roles, roles >= set(LOHA), len(lokr) == 2)
        cores = roles & {"hada_t1", "hada_t2"}
        begun = (
            roles & {"up", "down", "mid", "bias"},
            roles & set(LOHA) or cores,
            any(role.startswith("lokr") for role in roles),
        )
        if any(some and not all_ for some, all_ in zip(begun, whole, strict=True)) or (
            ("dora_scale" in roles and not any(whole))
            or len(cores) == 1
            or ("lokr_t2" in roles and "lokr_w2_a" not in roles)
        ):
            raise UserError(f"{file.path} holds one half of {layer} only; it is damaged, download it again")
        if sum(whole) > 1:
            raise UserError(f"{file.path} holds {layer} in two forms; give each in its own file")
        if not _halves_fit(file, keys):
            shapes = " and ".join(str(file.shapes[key]) for role, key in keys.items() if role not in _ASIDE)
            raise UserError(f"{file.path} is damaged: the two halves of {layer} are {shapes}; download it again")
    return layers


# The core that may stand between the factors of a convolution (Tucker), and these.
_CORES = (
    ("mid", "up", "down"),
    ("hada_t1", *LOHA[:2]),
    ("hada_t2", *LOHA[2:]),
    ("", "lokr_w1_a", "lokr_w1_b"),
    ("lokr_t2", "lokr_w2_a", "lokr_w2_b"),
)
_ASIDE = ("alpha", "bias", "diff", "diff_b", "dora_scale")


def _halves_fit(file: Weights, keys: Mapping[str, str]) -> bool:
    """Whether the factors of a layer can be multiplied."""
    shape = {role: file.shapes[key] for role, key in keys.items()}
    for core, left, right in _CORES:
        if left not in keys or right not in keys:
            continue
        one, other = shape[left], shape[right]
        if core in keys:
            # LyCORIS lays the matrices about a core the other way round, except that of a LoRA
            flat = core == "mid" or len(one) == len(other) == 2
            if not (flat and len(shape[core]) > 1):
                return False
            outer = math.prod(one[1:]) if core == "mid" else one[0]
            if shape[core][:2] != (outer, other[0]):
                return False
            continue
        alike = len(one) == len(other) or left != "up"
        if not (one and other and alike and math.prod(one[1:]) == other[0]):
            return False
    return all(len(shape[role]) > 1 for role in keys if role.startswith(("lokr", "hada", "mid")))


def _rank(file: Weights, keys: Mapping[str, str]) -> int:
    """The rank by which alpha is divided; 0 where nothing in a layer has one."""
    roles = ("down", "lokr_w1_b", "lokr_w2_b", "hada_w1_b")
    return next((file.shapes[keys[role]][0] for role in roles if role in keys), 0)


def _change(file: Weights, keys: Mapping[str, str]) -> Shape:
    """The shape of what the factors of a layer stand for; () without any."""

    def factor(role: str) -> Shape:
        if role in keys:
            return file.shapes[keys[role]]
        if (core := role.replace("w", "t")) in keys:
            left, right = (file.shapes[keys[f"{role}_{side}"]] for side in "ab")
            return (left[1], right[1], *file.shapes[keys[core]][2:])
        return (file.shapes[keys[f"{role}_a"]][0], *file.shapes[keys[f"{role}_b"]][1:])

    if "mid" in keys:
        down = file.shapes[keys["down"]]
        return (file.shapes[keys["up"]][0], math.prod(down[1:]), *file.shapes[keys["mid"]][2:])
    if "up" in keys:
        return (file.shapes[keys["up"]][0], *file.shapes[keys["down"]][1:])
    if "hada_w1_a" in keys:
        return factor("hada_w1")
    if "lokr_w1" in keys or "lokr_w1_a" in keys:
        (a, b, *_), (c, d, *rest) = factor("lokr_w1"), factor("lokr_w2")
        return (a * c, b * d, *rest)
    return ()


def _spellings(names: Container[str]) -> dict[str, str]:
    """Every spelling of a layer, with underscores for dots -> its name in the model: official and diffusers' names."""
    blocks = itertools.takewhile(lambda n: f"blocks.{n}.attn1.to_q.weight" in names, itertools.count())
    official = [*_LAYERS, *(f"blocks.{n}.{layer}" for n in blocks for layer in _BLOCK_LAYERS)]
    spellings: dict[str, str] = {}
    for layer in official:
        stem = in_model(layer)
        if stem in names or f"{stem}.weight" in names:
            spellings |= {dotted.replace(".", "_"): stem for dotted in (layer, stem)}
    return spellings


def _by_parameter(keys: Mapping[str, str], stem: str, names: Container[str]) -> dict[str, dict[str, str]]:
    """The keys of a layer by the parameter of the model that they change, and by role."""
    weight = {role: key for role, key in keys.items() if role not in ("alpha", "bias", "diff_b")}
    bias = {new: keys[role] for role, new in (("bias", "bias"), ("diff_b", "diff")) if role in keys}
    parts = {stem if stem in names else f"{stem}.weight": weight, f"{stem}.bias": bias}
    return {name: part for name, part in parts.items() if part}


def _fits(file: Weights, keys: Mapping[str, str], stem: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a layer has the model's shape; False where other channels go in or out, as in text-to-video's LoRAs.

    Raises UserError for a LoRA of another width, or of other sizes inside.
    """
    for name, part in _by_parameter(keys, stem, shapes).items():
        here = shapes.get(name, ())
        shapes_in_file = [file.shapes[part[role]] for role in ("diff", "bias") if role in part]
        if change := _change(file, part):
            shapes_in_file.append(change)
        if "dora_scale" in part and math.prod(file.shapes[part["dora_scale"]]) not in here[:2]:
            magnitude = file.shapes[part["dora_scale"]]
            raise UserError(f"{file.path} is damaged: the magnitude of {stem} is {magnitude}; download it again")
        for shape in shapes_in_file:
            if shape[:1] == here[:1] and math.prod(shape) == math.prod(here):
                continue
            width = shapes["patch_embedding.weight"][0]
            if (name, shape[:1]) == ("patch_embedding.weight", (width,)) or name.startswith("proj_out"):
                return False
            if "attn" in stem and shape[:1] not in ((), (width,)):
                raise UserError(f"{file.path} is for a model of width {shape[0]}, this one is {width}; give one for it")
            raise UserError(f"{file.path} is for another model: its {stem} is {shape}, here it is {here}")
    return True


def _scales(file: Weights, layers: Mapping[str, Mapping[str, str]], half: str) -> dict[str, float]:
    """alpha / rank by layer. Where the file says nothing of alpha, or a layer has no rank, it is 1."""
    from wan.weights.quantized import dequantize  # of PyTorch, which headers need not wait for

    read = file.read({keys["alpha"] for keys in layers.values() if "alpha" in keys})
    alphas = {key: dequantize(value) for key, value in read}
    adapter = _adapter(file, half)
    scales = {}
    try:
        for layer, keys in layers.items():
            # peft's LoKr divides by a rank that its factors may not show
            rank = _rank(file, keys) or _by_pattern(adapter, "rank_pattern", layer) or adapter.get("r") or 0
            if not rank or ("alpha" in keys and not _rank(file, keys)):
                scales[layer] = 1.0
                continue
            pattern_alpha = _by_pattern(adapter, "alpha_pattern", layer)
            alpha = alphas[keys["alpha"]] if "alpha" in keys else pattern_alpha
            if alpha is None:
                alpha = adapter.get("lora_alpha", adapter.get("alpha", rank))
            scales[layer] = float(alpha) / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
    except (TypeError, ValueError, RuntimeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise UserError(f"{file.path} says no alpha that can be read ({error}); download it again") from error
    if scales and not any(scales.values()):
        raise UserError(
            f"{file.path} changes nothing: each alpha in it is 0; save it with an alpha, as large as its rank"
        )
    return scales


def _by_pattern(adapter: Mapping[str, Any], pattern: str, layer: str) -> Any:
    """What one of peft's tables of name patterns says about a layer, or None."""
    table = adapter.get(pattern) or {}
    return next((value for name, value in table.items() if re.fullmatch(rf"(?:.*\.)?(?:{name})", layer)), None)


def _adapter(file: Weights, half: str) -> dict[str, Any]:
    """peft's configuration, as diffusers writes it into the header and peft into a file beside its own."""
    header = file.config.get("lora_adapter_metadata")
    if header is None:
        beside = file.path.with_name("adapter_config.json")
        return read_json(beside) if file.path.name == "adapter_model.safetensors" and beside.is_file() else {}
    metadata = fit(dict[str, Any], parse_json(header, f"the header of {file.path}"), f"the header of {file.path}")
    order = ("transformer_2.", "transformer.") if half == "low" else ("transformer.", "transformer_2.")
    model = next((one for one in order if any(name.startswith(one) for name in metadata)), "")
    return {name.removeprefix(model): value for name, value in metadata.items() if name.startswith(model)}


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
