"""Write small random-weight checkpoints in the official folder layouts, for the demo and for tests.

    python -m tests.support.tiny_checkpoint build/tiny

makes `tiny-Wan2.2-TI2V-5B`, `tiny-Wan2.2-I2V-A14B`, `tiny-Wan2.2-T2V-A14B` and `tiny-InternVL` in that folder. File
names, tensor names, shapes and dtypes are those of the published checkpoints at smaller sizes. One seed makes the same
files everywhere; a tensor depends on the seed, its model and its name only, however it is sharded.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from wan.errors import UserError

Shape = tuple[int, ...]

# What both tokenizers know: enough to read a prompt as words and to caption with words.
CORPUS = (
    "a red ball rolls slowly across the floor and its soft shadow follows. the camera pans to the left over a green "
    "field, then the light changes and a small dog runs after the ball through the tall grass. this video shows a "
    "person walking along the shore at sunset, waves move in the wind, clouds drift above the sea. describe this video "
    "in detail. the scene stays bright and warm, smooth motion, high detail, a wide shot in the style of a film."
)


# --- tensor names and shapes, as in the published files ---------------------------------------------------------------


def _layer(name: str, out: int, *inputs: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    """A linear layer or, with kernel sizes after the input width, a convolution."""
    yield f"{name}.weight", (out, *inputs)
    if bias:
        yield f"{name}.bias", (out,)


@dataclass(frozen=True)
class Denoiser:
    """The sizes of one DiT. `dim` must be a multiple of `num_heads`, and that quotient an even number from 12 on."""

    model_type: str
    in_dim: int
    out_dim: int
    dim: int = 48
    num_heads: int = 2
    ffn_dim: int = 96
    num_layers: int = 2
    freq_dim: int = 256
    text_dim: int = 40

    def shapes(self) -> dict[str, Shape]:
        return dict(self._shapes())

    def _shapes(self) -> Iterator[tuple[str, Shape]]:
        dim = self.dim
        yield from _layer("patch_embedding", dim, self.in_dim, 1, 2, 2)
        yield from _layer("text_embedding.0", dim, self.text_dim)
        yield from _layer("text_embedding.2", dim, dim)
        yield from _layer("time_embedding.0", dim, self.freq_dim)
        yield from _layer("time_embedding.2", dim, dim)
        yield from _layer("time_projection.1", 6 * dim, dim)
        for block in (f"blocks.{index}" for index in range(self.num_layers)):
            yield f"{block}.modulation", (1, 6, dim)
            for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
                for part in "qkvo":
                    yield from _layer(f"{attention}.{part}", dim, dim)
                yield f"{attention}.norm_q.weight", (dim,)
                yield f"{attention}.norm_k.weight", (dim,)
            yield from _layer(f"{block}.norm3", dim)
            yield from _layer(f"{block}.ffn.0", self.ffn_dim, dim)
            yield from _layer(f"{block}.ffn.2", dim, self.ffn_dim)
        yield "head.modulation", (1, 2, dim)
        yield from _layer("head.head", 4 * self.out_dim, dim)

    def config(self) -> dict[str, Any]:
        """The official config.json, which leaves out the text width and the patch size."""
        named = ("model_type", "in_dim", "out_dim", "dim", "num_heads", "ffn_dim", "num_layers", "freq_dim")
        return {"_class_name": "WanModel", "text_len": 512, "eps": 1e-6} | {name: getattr(self, name) for name in named}


@dataclass(frozen=True)
class Vae:
    """The sizes of one VAE: generation 2.1 lists its blocks flat, 2.2 (`nested`) holds them in stages."""

    z_dim: int
    dim: int
    decoder_dim: int
    nested: bool
    multiples: tuple[int, int, int, int] = (1, 2, 4, 4)  # of the width, stage by stage

    def shapes(self) -> dict[str, Shape]:
        return dict(self._shapes())

    def _shapes(self) -> Iterator[tuple[str, Shape]]:
        halves_time = (False, True, True)
        pixels = 12 if self.nested else 3  # 2.2 folds 2x2 pixels into channels
        widths = [self.dim * multiple for multiple in self.multiples]
        yield from _layer("encoder.conv1", widths[0], pixels, 3, 3, 3)
        stages = []
        for index, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            resampler = [_resampler(width, width, width, halves_time[index])] if index < 3 else []
            stages.append([_residual(before, width), _residual(width, width), *resampler])
        yield from self._listed("encoder.downsamples", stages)
        yield from _middle("encoder", widths[-1])
        yield "encoder.head.0.gamma", (widths[-1], 1, 1, 1)
        yield from _layer("encoder.head.2", 2 * self.z_dim, widths[-1], 3, 3, 3)
        yield from _layer("conv1", 2 * self.z_dim, 2 * self.z_dim, 1, 1, 1)
        yield from _layer("conv2", self.z_dim, self.z_dim, 1, 1, 1)

        widths = [self.decoder_dim * multiple for multiple in reversed(self.multiples)]
        yield from _layer("decoder.conv1", widths[0], self.z_dim, 3, 3, 3)
        yield from _middle("decoder", widths[0])
        stages, before = [], widths[0]
        for index, width in enumerate(widths):
            after = width if self.nested else width // 2  # 2.1 halves the width where it doubles the picture
            resampler = [_resampler(width, after, 2 * width, halves_time[2 - index])] if index < 3 else []
            stages.append([_residual(before, width), _residual(width, width), _residual(width, width), *resampler])
            before = after
        yield from self._listed("decoder.upsamples", stages)
        yield "decoder.head.0.gamma", (widths[-1], 1, 1, 1)
        yield from _layer("decoder.head.2", pixels, widths[-1], 3, 3, 3)

    def _listed(self, name: str, stages: list[list[Block]]) -> Iterator[tuple[str, Shape]]:
        """The blocks of all stages under the names of this generation."""
        if self.nested:
            inner = name.rpartition(".")[2]
            places = [f"{name}.{i}.{inner}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
        else:
            places = [f"{name}.{n}" for n in range(sum(map(len, stages)))]
        for place, block in zip(places, (block for stage in stages for block in stage), strict=True):
            for key, shape in block.items():
                yield f"{place}.{key}", shape


Block = Mapping[str, Shape]


def _residual(before: int, width: int) -> Block:
    return {
        "residual.0.gamma": (before, 1, 1, 1),
        **dict(_layer("residual.2", width, before, 3, 3, 3)),
        "residual.3.gamma": (width, 1, 1, 1),
        **dict(_layer("residual.6", width, width, 3, 3, 3)),
        **(dict(_layer("shortcut", width, before, 1, 1, 1)) if before != width else {}),
    }


def _resampler(width: int, after: int, in_time: int, halves_time: bool) -> Block:
    over_time = dict(_layer("time_conv", in_time, width, 3, 1, 1)) if halves_time else {}
    return {**dict(_layer("resample.1", after, width, 3, 3)), **over_time}


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    for place in (0, 2):
        yield from ((f"{name}.middle.{place}.{key}", shape) for key, shape in _residual(width, width).items())
    yield f"{name}.middle.1.norm.gamma", (width, 1, 1)
    yield from _layer(f"{name}.middle.1.to_qkv", 3 * width, width, 1, 1)
    yield from _layer(f"{name}.middle.1.proj", width, width, 1, 1)


@dataclass(frozen=True)
class TextEncoder:
    """The sizes of one UMT5 encoder. `vocab_size` rows, of which the tokenizer may use fewer."""

    vocab_size: int = 256
    dim: int = 40
    dim_attn: int = 48
    dim_ffn: int = 64
    num_heads: int = 4
    num_layers: int = 2

    def shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {"token_embedding.weight": (self.vocab_size, self.dim)}
        for block in (f"blocks.{index}" for index in range(self.num_layers)):
            shapes |= {f"{block}.attn.{part}.weight": (self.dim_attn, self.dim) for part in "qkv"} | {
                f"{block}.attn.o.weight": (self.dim, self.dim_attn),
                f"{block}.ffn.gate.0.weight": (self.dim_ffn, self.dim),
                f"{block}.ffn.fc1.weight": (self.dim_ffn, self.dim),
                f"{block}.ffn.fc2.weight": (self.dim, self.dim_ffn),
                f"{block}.norm1.weight": (self.dim,),
                f"{block}.norm2.weight": (self.dim,),
                f"{block}.pos_embedding.embedding.weight": (32, self.num_heads),
            }
        return shapes | {"norm.weight": (self.dim,)}


@dataclass(frozen=True)
class InternVL:
    """The sizes of one InternVL3.5: a vision transformer, a projector and a Qwen3 language model."""

    image_size: int = 112
    vision_dim: int = 32
    vision_layers: int = 3
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32

    def shapes(self, vocab_size: int) -> dict[str, Shape]:
        return dict(self._shapes(vocab_size))

    def _shapes(self, vocab_size: int) -> Iterator[tuple[str, Shape]]:
        vision, dim = self.vision_dim, self.dim
        yield "vision_model.embeddings.class_embedding", (1, 1, vision)
        yield "vision_model.embeddings.position_embedding", (1, (self.image_size // 14) ** 2 + 1, vision)
        yield from _layer("vision_model.embeddings.patch_embedding", vision, 3, 14, 14)
        for layer in (f"vision_model.encoder.layers.{index}" for index in range(self.vision_layers)):
            yield from ((f"{layer}.{scale}", (vision,)) for scale in ("ls1", "ls2"))
            yield from _layer(f"{layer}.norm1", vision)
            yield from _layer(f"{layer}.norm2", vision)
            yield from _layer(f"{layer}.attn.qkv", 3 * vision, vision)
            yield from _layer(f"{layer}.attn.proj", vision, vision)
            yield from _layer(f"{layer}.mlp.fc1", 2 * vision, vision)
            yield from _layer(f"{layer}.mlp.fc2", vision, 2 * vision)
        yield from _layer("mlp1.0", 4 * vision)  # four neighbouring patches become one token
        yield from _layer("mlp1.1", dim, 4 * vision)
        yield from _layer("mlp1.3", dim, dim)
        yield "language_model.model.embed_tokens.weight", (vocab_size, dim)
        for layer in (f"language_model.model.layers.{index}" for index in range(self.num_layers)):
            heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            yield f"{layer}.input_layernorm.weight", (dim,)
            yield f"{layer}.post_attention_layernorm.weight", (dim,)
            yield f"{layer}.self_attn.q_proj.weight", (heads, dim)
            yield f"{layer}.self_attn.k_proj.weight", (kv_heads, dim)
            yield f"{layer}.self_attn.v_proj.weight", (kv_heads, dim)
            yield f"{layer}.self_attn.o_proj.weight", (dim, heads)
            yield f"{layer}.self_attn.q_norm.weight", (self.head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (self.head_dim,)
            yield f"{layer}.mlp.gate_proj.weight", (2 * dim, dim)
            yield f"{layer}.mlp.up_proj.weight", (2 * dim, dim)
            yield f"{layer}.mlp.down_proj.weight", (dim, 2 * dim)
        yield "language_model.model.norm.weight", (dim,)
        yield "language_model.lm_head.weight", (vocab_size, dim)

    def config(self, vocab_size: int, ids: Mapping[str, int]) -> dict[str, Any]:
        """The original config.json, without the names of the model's own code, which is not part of this folder."""
        return {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": self.image_size,
            "max_dynamic_patch": 12,
            "min_dynamic_patch": 1,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "torch_dtype": "bfloat16",
            "use_thumbnail": True,
            "llm_config": {
                "architectures": ["Qwen3ForCausalLM"],
                "model_type": "qwen3",
                "attention_bias": False,
                "attention_dropout": 0.0,
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
                "head_dim": self.head_dim,
                "hidden_act": "silu",
                "hidden_size": self.dim,
                "initializer_range": 0.02,
                "intermediate_size": 2 * self.dim,
                "max_position_embeddings": 40960,
                "max_window_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_hidden_layers": self.num_layers,
                "num_key_value_heads": self.num_kv_heads,
                "rms_norm_eps": 1e-06,
                "rope_scaling": None,
                "rope_theta": 1000000,
                "sliding_window": None,
                "torch_dtype": "bfloat16",
                "use_cache": False,
                "use_sliding_window": False,
                "vocab_size": vocab_size,
            },
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                "attention_dropout": 0.0,
                "drop_path_rate": 0.1,
                "dropout": 0.0,
                "hidden_act": "gelu",
                "hidden_size": self.vision_dim,
                "image_size": self.image_size,
                "initializer_factor": 0.1,
                "initializer_range": 0.02,
                "intermediate_size": 2 * self.vision_dim,
                "layer_norm_eps": 1e-06,
                "norm_type": "layer_norm",
                "num_attention_heads": 4,
                "num_channels": 3,
                "num_hidden_layers": self.vision_layers,
                "patch_size": 14,
                "qk_normalization": False,
                "qkv_bias": True,
                "torch_dtype": "bfloat16",
                "use_bfloat16": True,
                "use_flash_attn": True,
            },
        }


# --- values and files -------------------------------------------------------------------------------------------------


def random_tensor(seed: str, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Weights scaled by their inputs, scales near 1, biases near 0: what goes in with variance 1 comes out about so."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    size = math.prod(shape)
    # Drawing is what takes time in a checkpoint of many GB, so the values of a large tensor repeat.
    drawn = torch.randn(min(size, 1 << 20), generator=generator)
    if name.endswith(".bias"):
        drawn *= 0.05
    elif name.endswith("gamma") or len(shape) == 1:
        drawn = 1 + 0.1 * drawn
    else:
        drawn *= math.prod(shape[1:]) ** -0.5
    drawn = drawn.to(dtype)
    return drawn.repeat(-(-size // drawn.numel()))[:size].view(shape)


def random_tensors(seed: str, shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a small model."""
    return {name: random_tensor(seed, name, shape, dtype) for name, shape in shapes.items()}


def write_shards(
    folder: Path, stem: str, shapes: Mapping[str, Shape], shards: int, dtype: torch.dtype, make: Callable[[str], Tensor]
) -> None:
    """`stem.safetensors`, or that many shards of about equal size with their index; one shard in memory at a time."""
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    parts: list[list[str]] = [[] for _ in range(shards)]
    before = 0
    for name, shape in shapes.items():
        parts[before * shards // total].append(name)
        before += math.prod(shape) * dtype.itemsize
    if not all(parts):
        raise UserError(f"{len(shapes)} tensors cannot be shared out to {shards} files; ask for fewer shards")
    files = [
        f"{stem}-{n:05}-of-{shards:05}.safetensors" if shards > 1 else f"{stem}.safetensors"
        for n in range(1, shards + 1)
    ]
    for file, names in zip(files, parts, strict=True):
        save_file({name: make(name) for name in names}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        listed = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_denoiser(
    folder: Path, model: Denoiser, *, seed: str = "0", shards: int = 2, dtype: torch.dtype = torch.float32
) -> None:
    """One DiT into `folder`, which is made if need be: config.json and `diffusion_pytorch_model` shards."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config())
    shapes = model.shapes()
    write_shards(
        folder,
        "diffusion_pytorch_model",
        shapes,
        shards,
        dtype,
        lambda name: random_tensor(seed, name, shapes[name], dtype),
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that gets its name when it is complete. Raises UserError where there is one already."""
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as hidden:
        filled = Path(hidden) / folder.name
        filled.mkdir()
        yield filled
        filled.rename(folder)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WanCheckpoint:
    """One Wan2.2 checkpoint folder: where its experts lie, its VAE, its text encoder, and what it says of itself.

    `declared` goes into wan_config.json: what differs from the published checkpoint of that name.
    """

    denoiser: Denoiser
    experts: tuple[str, ...]
    vae_file: str
    vae: Vae
    text_encoder: TextEncoder = TextEncoder()
    declared: Mapping[str, Any] = field(
        default_factory=lambda: {
            "sizes": ["160*96", "96*160"],
            "frame_num": 17,
            "sample_steps": 4,
            "param_dtype": "float32",
            "t5_dtype": "float32",
        }
    )


_EXPERTS = ("high_noise_model", "low_noise_model")
_VAE_2_1 = ("Wan2.1_VAE.pth", Vae(z_dim=16, dim=3, decoder_dim=3, nested=False))
_VAE_2_2 = ("Wan2.2_VAE.pth", Vae(z_dim=48, dim=3, decoder_dim=4, nested=True))
CHECKPOINTS: Mapping[str, WanCheckpoint] = {
    "TI2V-5B": WanCheckpoint(Denoiser("ti2v", 48, 48), (".",), *_VAE_2_2),
    "I2V-A14B": WanCheckpoint(Denoiser("i2v", 36, 16), _EXPERTS, *_VAE_2_1),
    "T2V-A14B": WanCheckpoint(Denoiser("t2v", 16, 16), _EXPERTS, *_VAE_2_1),
}


def write_checkpoint(
    folder: Path,
    checkpoint: WanCheckpoint,
    *,
    seed: str = "0",
    shards: int = 2,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A whole checkpoint in the official layout; `dtype` is that of the DiT's files. Raises UserError if it exists."""
    with new_folder(folder) as part:
        for expert in checkpoint.experts:
            write_denoiser(part / expert, checkpoint.denoiser, seed=f"{seed}/{expert}", shards=shards, dtype=dtype)
        vae = random_tensors(f"{seed}/vae", checkpoint.vae.shapes(), torch.float32)
        torch.save(vae, part / checkpoint.vae_file)
        encoder = random_tensors(f"{seed}/t5", checkpoint.text_encoder.shapes(), torch.bfloat16)
        torch.save(encoder, part / "models_t5_umt5-xxl-enc-bf16.pth")
        write_prompt_tokenizer(part / "google/umt5-xxl", checkpoint.text_encoder.vocab_size)
        write_json(part / "wan_config.json", checkpoint.declared)


def write_prompt_tokenizer(folder: Path, vocab_size: int, corpus: str = CORPUS) -> None:
    """A Unigram tokenizer with UMT5's conventions: <pad> 0, </s> 1, <unk> 2, and </s> after every text.

    Its pieces are the characters and words of the corpus by frequency, so there is nothing to train.
    """
    words = Counter(f"▁{word}" for word in re.findall(r"\w+|[^\w\s]", corpus))
    letters = Counter(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-▁" + corpus.replace(" ", "▁")
    )
    total = words.total() + letters.total()
    pieces = [(piece, math.log(count / total)) for piece, count in (letters + words).most_common()]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
    if len(vocabulary) > vocab_size:
        raise UserError(f"the tokenizer has {len(vocabulary)} pieces, more than vocab_size {vocab_size}; raise that")
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        names | {"padding_side": "right", "tokenizer_class": "PreTrainedTokenizerFast"},
    )


def write_internvl(folder: Path, model: InternVL, *, seed: str = "0") -> None:
    """An InternVL folder in the original layout, bf16 in two shards. Raises UserError if it exists.

    What it answers to a picture are random words of CORPUS, and it always comes to an end.
    """
    with new_folder(folder) as part:
        ids = write_caption_tokenizer(part)
        vocab_size = -(-len(ids) // 16) * 16  # padded, as the published embedding tables are
        write_json(part / "config.json", model.config(vocab_size, ids))
        write_json(part / "generation_config.json", {"_from_model_config": True})
        shapes = model.shapes(vocab_size)
        tensors = random_tensors(seed, shapes, torch.float32)
        embedding, head = (tensors[f"language_model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
        _speak_in_words(embedding, head, ids, seed)
        write_shards(part, "model", shapes, 2, torch.bfloat16, lambda name: tensors[name].to(torch.bfloat16))


def _speak_in_words(embedding: Tensor, head: Tensor, ids: Mapping[str, int], seed: str) -> None:
    """Make greedy decoding walk through random words to the end of the message.

    Random weights would write broken bytes for as long as they may. Here every token but the words is out of reach,
    each word calls up its successor, and every twentieth the end. Which word comes first depends on the question and
    the pictures.
    """
    words = [ids[f"Ġ{word}"] for word in sorted(set(re.findall(r"\w+", CORPUS))) if f"Ġ{word}" in ids]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))
    walk = torch.tensor(words)[order]
    end = ids["<|im_end|>"]
    silent = torch.ones(len(head), dtype=torch.bool)
    silent[walk] = False
    head[silent] = 0.0
    embedding *= embedding.shape[1] ** 0.5  # variance 1, so that a token outweighs what attention adds to it,
    embedding[ids["Ċ"]] *= 0.01  # but for the line break before the answer: there, the context decides
    for place, word in enumerate(walk):
        after = end if place % 20 == 19 or place == len(walk) - 1 else walk[place + 1]
        head[after] += embedding[word]


def write_caption_tokenizer(folder: Path, corpus: str = CORPUS) -> dict[str, int]:
    """A byte-level BPE tokenizer with InternVL's special tokens; returns the id of every token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<img>", "</img>", "<IMG_CONTEXT>"]
    special += ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator([corpus], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    write_json(folder / "added_tokens.json", {token: ids[token] for token in special})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "additional_special_tokens": special[1:],
            "add_prefix_space": False,
            "model_max_length": 40960,
            "added_tokens_decoder": {
                str(ids[token]): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in special
            },
        },
    )
    return ids


def write_all(folder: Path, seed: int = 0) -> list[Path]:
    """The three Wan2.2 checkpoints and the vision-language model; returns their folders. Raises UserError."""
    made = []
    for name, checkpoint in CHECKPOINTS.items():
        made.append(folder / f"tiny-Wan2.2-{name}")
        write_checkpoint(made[-1], checkpoint, seed=f"{seed}/{name}")
    made.append(folder / "tiny-InternVL")
    write_internvl(made[-1], InternVL(), seed=f"{seed}/InternVL")
    return made


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write tiny random-weight checkpoints in the official folder layouts.")
    parser.add_argument("folder", type=Path, help="where to put them; it is made if need be")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other weights (default: 0)")
    arguments = parser.parse_args(None if argv is None else list(argv))
    try:
        for made in write_all(arguments.folder, arguments.seed):
            print(made)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
