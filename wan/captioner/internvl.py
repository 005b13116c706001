"""InternVL folders of either format, original or transformers, in the one native model class; no remote code."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from wan.captioner.base import LocalModel, Pictures, foreseen_failures, number_frames, read_config, reading
from wan.captioner.decoding import GreedyDecoder, LayeredVlm, fuse_norms
from wan.captioner.frames import build_transform, pixels_of
from wan.device.placement import Placement
from wan.device.streaming import move_in_pieces
from wan.errors import UserError
from wan.files import something_else
from wan.foreign import fit, parsing, shards, uncollected
from wan.weights.prefetch import ReadAhead
from wan.weights.tensors import PLAIN, safetensors_dtypes, safetensors_shapes

log = logging.getLogger(__name__)

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
TURN_END = "<|im_end|>"
LANGUAGE_MODELS = ("qwen2", "qwen3")  # others fuse or name their weights differently

VISION_CONFIG = {  # original name -> native name
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm_type": "norm_type",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
OPTIONAL_VISION_CONFIG = {  # both sides have the same defaults
    "num_channels": "num_channels",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "attention_dropout": "attention_dropout",
}
BOOKKEEPING = ("_name_or_path", "architectures", "auto_map", "torch_dtype", "transformers_version")

WEIGHT_PREFIXES = {  # original -> native
    "vision_model.embeddings.": "model.vision_tower.embeddings.",
    "vision_model.encoder.layers.": "model.vision_tower.encoder.layer.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",  # mlp1.2 is the activation
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
VISION_PARTS = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding": "patch_embeddings.projection",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn": "attention",
    "proj": "projection_layer",
}


_Size = Annotated[int, Field(ge=1, le=10_000_000)]
_Pixels = Annotated[int, Field(ge=1, le=10_000)]
_Layers = Annotated[int, Field(ge=1, le=1000)]


class _Tower(BaseModel):
    """What of one half's config is computed with before the library looks at it, or would take all memory there."""

    model_type: str | None = None
    hidden_size: _Size | None = None
    intermediate_size: _Size | None = None
    vocab_size: _Size | None = None
    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    image_size: _Pixels | Annotated[list[_Pixels], Field(min_length=1, max_length=2)] | None = None
    patch_size: _Pixels | Annotated[list[_Pixels], Field(min_length=1, max_length=2)] = 14


class _Config(BaseModel):
    """config.json, of either format."""

    vision_config: _Tower
    text_config: _Tower | None = None
    llm_config: _Tower | None = None
    image_seq_length: Annotated[int, Field(ge=1, le=100_000)] = 256
    downsample_ratio: Annotated[float, Field(ge=0.01, le=1)] = 0.5
    force_image_size: Annotated[int, Field(ge=0, le=10_000)] | None = None


class InternVLCaptioner(LocalModel):
    """InternVL 2.5 to 3.5 with a Qwen language model. The folder is checked now, the weights load at the first use.

    `room`: bytes that its weights may take of the device, asked when they load. Language layers that do not fit wait in
    host memory and come one by one in every pass, on the library's kernels, which round otherwise than ours on a GPU:
    so where two words are about equally likely it may be the other one.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device,
        dtype: torch.dtype = torch.bfloat16,
        room: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(path, device, dtype)
        self.room = room
        self._layered: LayeredVlm | None = None
        self._placement = Placement(self.device)
        config = read_config(self.folder / "config.json")
        if config.get("model_type") not in ("internvl", "internvl_chat"):
            raise UserError(f"{self.folder} holds a {config.get('model_type')} model, not InternVL: check `vlm_path`")
        self.original = config["model_type"] == "internvl_chat"
        try:
            fit(_Config, config, f"{self.folder}/config.json")
            self.config = native_config(config) if self.original else config
            language_model = self.config["text_config"]["model_type"]
            patch = self.config["vision_config"].get("patch_size", 14)
        except KeyError as error:
            raise UserError(f"{self.folder}/config.json lacks {error}: download it again") from error
        except (TypeError, AttributeError) as error:  # what the format has is null
            raise UserError(f"{self.folder}/config.json is damaged ({error}): download it again") from error
        if language_model not in LANGUAGE_MODELS:
            raise UserError(
                f"{self.folder} has a language model of type {language_model}; only InternVL with "
                f"{' or '.join(LANGUAGE_MODELS)} works: use InternVL3_5-8B or a smaller one of that family"
            )
        self.quantization = quantization_of(config)
        self.weights = weight_files(self.folder)
        check_tokenizer(self.folder)
        self.tokens_per_frame = int(self.config.get("image_seq_length", 256))
        side = round(math.sqrt(self.tokens_per_frame) / self.config.get("downsample_ratio", 0.5))
        self.image_size = side * (patch if isinstance(patch, int) else patch[0])
        self._decoder: GreedyDecoder | None = None

    def prepare(self, frames: Pictures, question: str, system: str | None = None) -> tuple[Tensor, Tensor]:
        """Frames uint8 [n, H, W, 3] and a question -> token ids [1, L], pixels float32 [n, 3, S, S], on the CPU.

        Both are what the official code makes, exactly.
        """
        pixels = pixels_of(frames, self.image_size)
        slot = f"<img>{'<IMG_CONTEXT>' * self.tokens_per_frame}</img>"
        turns = [("user", number_frames([slot] * len(pixels), question))]
        if system != "":
            turns.insert(0, ("system", SYSTEM if system is None else system))
        text = "".join(f"<|im_start|>{role}\n{words}{TURN_END}\n" for role, words in turns)
        ids = self.tokenizer(f"{text}<|im_start|>assistant\n", return_tensors="pt").input_ids
        return ids, pixels

    @torch.inference_mode()
    def view(self, picture: Image.Image) -> Tensor:
        """See `Viewer.view`: the mean of what the vision tower says of the picture's patches."""
        pixels = build_transform(self.image_size)(picture)[None]
        with foreseen_failures(self.source):
            model = self.model  # which is layered where it does not fit
            with nullcontext() if self._layered is None else self._placement.on_device(self._layered):
                tokens = model.model.vision_tower(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        mean = tokens[0, 1:].float().mean(0)  # the first token is of no place
        return torch.nn.functional.normalize(mean, dim=0).cpu()

    def answer(self, frames: Pictures, question: str, system: str | None, max_new_tokens: int) -> str:
        ids = self.generate(*self.prepare(frames, question, system), max_new_tokens)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def generate(self, ids: Tensor, pixels: Tensor, max_new_tokens: int) -> Tensor:
        """What `prepare` returned -> the new token ids [L], the end mark among them, always the likeliest ones."""
        needed = ids.shape[1] + max_new_tokens
        end = self.tokenizer.convert_tokens_to_ids(TURN_END)
        model = self.model  # which is layered where it does not fit
        if self._layered is not None:
            with self._placement.on_device(self._layered):
                decoder = GreedyDecoder(model, needed, recorded=False)
                return decoder(ids.to(self.device), pixels.to(self.device, self.dtype), max_new_tokens, end)
        if self._decoder is None or self._decoder.capacity < needed:
            self._decoder = None  # its memory first
            # a package's own kernels may not be recorded
            self._decoder = GreedyDecoder(model, needed, recorded=self.quantization is None)
        return self._decoder(ids.to(self.device), pixels.to(self.device, self.dtype), max_new_tokens, end)

    @property
    def waits_in_host_memory(self) -> bool:
        return super().waits_in_host_memory or self._layered is not None

    def close(self) -> None:
        self._decoder = self._layered = None
        super().close()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import Qwen2Tokenizer

        with parsing(f"the tokenizer in {self.folder}", "download it again"), uncollected():
            # this class and not AutoTokenizer, which asks about remote code on stdin
            tokenizer = Qwen2Tokenizer.from_pretrained(self.folder)
            id_of = tokenizer.backend_tokenizer.token_to_id
        for token in ("<|im_start|>", TURN_END, "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>"):
            if id_of(token) is None:
                raise UserError(f"the tokenizer in {self.folder} lacks {token}: download the folder again")
        return tokenizer

    def load(self) -> Any:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        with reading(self.folder):
            if self.original:
                images = self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
                config = InternVLConfig(**self.config, image_token_id=images)
            else:
                config = InternVLConfig.from_pretrained(self.folder)
            with torch.device("meta"):
                declared = sum(one.numel() for one in InternVLForConditionalGeneration(config).parameters())
        held = sum(file.stat().st_size for file in self.weights)
        packed = 8 if self.quantization is not None else 1  # numbers in a byte, at most
        if declared > packed * held:  # the library would make up what the files lack, and take that much memory
            raise UserError(
                f"{self.folder} declares {declared} parameters and has weights of {held} bytes, so config.json is "
                f"damaged or a file truncated: download the folder again"
            )
        options: dict[str, Any] = {"use_safetensors": True}
        if self.original:
            state = native_weights(self.weights)
            options = {"config": config, "state_dict": state}
            if self.quantization is not None:
                config.quantization_config = self._quantized_as_stored(state)
                # transformers leaves what a quantised model holds as numbers in the file's dtype
                half = {name: value for name, value in state.items() if value.dtype in (torch.bfloat16, torch.float16)}
                state |= {name: value.to(self.dtype) for name, value in half.items() if not name.endswith(".scales")}
        room = None if self.room is None else self.room()
        # what stands beside quantised weights does not come layer by layer
        streams = room is not None and held > room and self.quantization is None
        with reading(self.folder), ReadAhead(self.weights, len(self.weights)):
            source = None if self.original else self.folder
            in_pieces = self.device.type != "cpu" and not streams and self.can_be_mapped
            home = torch.device("cpu") if streams or in_pieces else self.device
            model = fuse_norms(self.from_pretrained(InternVLForConditionalGeneration, source, home=home, **options))
            if in_pieces:
                move_in_pieces(model, self.device)  # the library copies from memory that is not pinned
        if streams:
            log.warning(
                "%s does not fit into the free memory of its GPU: its layers come one by one, which is slower",
                self.folder,
            )
            self._layered = LayeredVlm(model)
            smaller = "use a smaller InternVL, fewer `num_segments`, `vlm_device` cpu"
            self._placement = Placement(self.device, weight_budget=room, instead=smaller)
        return model

    @property
    def can_be_mapped(self) -> bool:
        """Whether the library leaves all weights in the files, of which it takes no other numbers than they hold."""
        kinds = {PLAIN.get(kind) for file in self.weights for kind in safetensors_dtypes(file).values()}
        return self.quantization is None and kinds == {str(self.dtype).removeprefix("torch.")}

    def _quantized_as_stored(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """How the weights are quantised, by native names: what is stored as numbers stays so. Raises UserError."""
        if fused := [name for name in state if "vision_tower" in name and name.endswith(_OF_QUANTIZED)]:
            raise UserError(f"{self.folder}: its vision part is quantised too ({fused[0]}); give weights in bf16")
        assert self.quantization is not None
        method = quantization_method(self.quantization)
        plain = {
            name.removesuffix(".weight")
            for name, value in state.items()
            if name.endswith(".weight") and value.ndim == 2 and value.is_floating_point()
        }
        key = "llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert"
        return {"quant_method": method, **self.quantization, key: sorted(plain)}


# The ends of what stands beside a quantised weight: bitsandbytes, AWQ and GPTQ.
_OF_QUANTIZED = (".absmax", ".SCB", ".qweight")


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config says of quantised weights, itself or in its language model's."""
    inside = [config, *(config.get(key) for key in ("llm_config", "text_config"))]
    return next((one["quantization_config"] for one in inside if one and one.get("quantization_config")), None)


def quantization_method(quantization: Mapping[str, Any]) -> str:
    """Its name."""
    return str(
        quantization.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in quantization else "of an unknown kind")
    )


def native_config(original: dict[str, Any]) -> dict[str, Any]:
    """The config.json of an original folder -> arguments of InternVLConfig, all but image_token_id. Raises KeyError."""
    if (shuffle := original.get("ps_version", "v1")) != "v2":
        raise UserError(f"the checkpoint has ps_version {shuffle}, only v2 works: use InternVL 2.5 or newer")
    vision, text = original["vision_config"], original["llm_config"]
    ratio = original.get("downsample_ratio", 0.5)
    side = (original.get("force_image_size") or vision["image_size"]) // vision["patch_size"]
    return {
        "vision_config": {native: vision[name] for name, native in VISION_CONFIG.items()}
        | {native: vision[name] for name, native in OPTIONAL_VISION_CONFIG.items() if name in vision},
        "text_config": {name: value for name, value in text.items() if name not in BOOKKEEPING} | {"use_cache": True},
        "downsample_ratio": ratio,
        "image_seq_length": int((side * ratio) ** 2),
        "vision_feature_layer": original.get("select_layer", -1),
        "tie_word_embeddings": text.get("tie_word_embeddings", False),  # the native default would be True
    }


def native_weights(files: list[Path]) -> dict[str, Tensor]:
    """The weights of an original folder under their native names; mapped from the files, not read yet."""
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (a shard is not iterable)
                weights |= native_tensors(name, shard.get_tensor(name))
    return weights


def native_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One original weight as native ones; a name that is not known stays, to be reported as unexpected."""
    prefix = next((prefix for prefix in WEIGHT_PREFIXES if name.startswith(prefix)), "")
    rest = name.removeprefix(prefix)
    if prefix.startswith("vision_model."):
        rest = ".".join(VISION_PARTS.get(part, part) for part in rest.split("."))
    name = WEIGHT_PREFIXES.get(prefix, "") + rest
    if ".qkv." not in name:
        return {name: tensor}
    return {name.replace(".qkv.", f".{which}_proj."): part for which, part in zip("qkv", tensor.chunk(3), strict=True)}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all there. Raises UserError."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = shards(read_config(index), index)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing[:3])}: download the VLM again, as safetensors")
    for name in names:
        _ = dict(safetensors_shapes(folder / name))  # its header can be read
    return [folder / name for name in names]


def check_tokenizer(folder: Path) -> None:
    """Raises UserError unless there is a tokenizer to read."""
    file = folder / "tokenizer.json"
    if file.is_file():
        if other := something_else(file, text=True):
            raise other
    elif not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise UserError(f"{folder} lacks tokenizer.json (or vocab.json and merges.txt): download the VLM again")
