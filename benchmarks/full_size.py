"""Checkpoint folders of real size with random weights, in the official layouts, and footage to continue.

Tokenizers have the real vocabularies' sizes, grown from the tiny family's. Values are one buffer of 0.02 N(0, 1) used
again and again, norms are 1. On disk: 5B 34 GB in float32 (24 with its denoiser in bf16), A14B 69 GB in bf16 (126 in
float32), the VLM 17 GB; about 1 GB/s.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan

from wan.vae.vae import official_to_diffusers

Shape: TypeAlias = tuple[int, ...]
Fill: TypeAlias = "str | float | tuple[str, float]"  # "normal", a number, or "scaled" by one
Tensors: TypeAlias = "Mapping[str, tuple[Shape, Fill]]"

MODELS = Path(__file__).resolve().parent.parent / "models"
SHARD = 9_950_000_000
ITEM = {"fp32": 4, "bf16": 2}
NAME = {"fp32": "F32", "bf16": "BF16"}


class Values:
    """Numbers of 0.02 N(0, 1) out of one buffer, ones, or a constant, as bytes."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.count = dtype, (1 << 24) + 43
        self.kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.draw = torch.randn(self.count, generator=torch.Generator().manual_seed(7)).mul_(0.02)
        self.bytes = _bytes(self.draw.to(self.kind))

    def pieces(self, name: str, shape: Shape, fill: Fill) -> Iterator[memoryview]:
        """The bytes of one tensor, piece by piece."""
        size = math.prod(shape)
        if isinstance(fill, int | float):
            yield _bytes(torch.full((size,), float(fill), dtype=self.kind))
            return
        start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % self.count
        if isinstance(fill, tuple):
            part = self.draw.roll(-start).repeat(-(-size // self.count))[:size] * fill[1]
            yield _bytes(part.to(self.kind))
            return
        left, at = size * ITEM[self.dtype], start * ITEM[self.dtype]
        while left:
            piece = self.bytes[at : min(len(self.bytes), at + left)]
            yield piece
            left, at = left - len(piece), 0

    def tensor(self, name: str, shape: Shape, fill: Fill) -> torch.Tensor:
        """The same as a tensor."""
        out = torch.empty(shape, dtype=self.kind)
        flat, at = _bytes(out.view(-1)), 0
        for piece in self.pieces(name, shape, fill):
            flat[at : at + len(piece)] = piece
            at += len(piece)
        return out


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).numpy()  # which is a buffer for mypy from Python 3.12 on
    return memoryview(array).cast("B")


def write_safetensors(path: Path, tensors: Tensors, values: Values) -> None:
    """Tensors by name, written as they are made."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, _) in tensors.items():
        size = ITEM[values.dtype] * math.prod(shape)
        head[name] = {"dtype": NAME[values.dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(head, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, (shape, fill) in tensors.items():
            for piece in values.pieces(name, shape, fill):
                done = 0
                while done < len(piece):
                    done += file.write(piece[done : done + (64 << 20)])


def shards(
    folder: Path, stem: str, tensors: Tensors, dtype: str, limit: int, part: int | None = None, parts: int = 1
) -> None:
    """Shards of at most `limit` bytes and their index; of `parts` writers `part` writes every `parts`-th shard."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, tuple[Shape, Fill]]] = [{}]
    size = total = 0
    for name, (shape, fill) in tensors.items():
        item_bytes = ITEM[dtype] * math.prod(shape)
        if size + item_bytes > limit and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = (shape, fill)
        size, total = size + item_bytes, total + item_bytes
    names = [f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    if not part:
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    values = Values(dtype)
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        if part is None or number % parts == part:
            write_safetensors(folder / name, group, values)


def dit_tensors(dim: int, ffn: int, layers: int, in_dim: int, out_dim: int, text: int = 4096) -> Tensors:
    """A denoiser's tensors by their official names."""
    tensors: dict[str, tuple[Shape, Fill]] = {}
    freq = 256

    def linear(name: str, out: int, into: int) -> None:
        tensors[f"{name}.bias"], tensors[f"{name}.weight"] = ((out,), "normal"), ((out, into), "normal")

    for n in range(layers):
        for kind in ("self_attn", "cross_attn"):
            for which in "qkvo":
                linear(f"blocks.{n}.{kind}.{which}", dim, dim)
            for which in "qk":
                tensors[f"blocks.{n}.{kind}.norm_{which}.weight"] = ((dim,), 1)
        linear(f"blocks.{n}.ffn.0", ffn, dim)
        linear(f"blocks.{n}.ffn.2", dim, ffn)
        tensors[f"blocks.{n}.modulation"] = ((1, 6, dim), "normal")
        tensors[f"blocks.{n}.norm3.bias"], tensors[f"blocks.{n}.norm3.weight"] = ((dim,), "normal"), ((dim,), 1)
    linear("head.head", out_dim * 4, dim)
    tensors["head.modulation"] = ((1, 2, dim), "normal")
    tensors["patch_embedding.bias"] = ((dim,), "normal")
    tensors["patch_embedding.weight"] = ((dim, in_dim, 1, 2, 2), "normal")
    for name, into in (("text", text), ("time", freq)):
        linear(f"{name}_embedding.0", dim, into)
        linear(f"{name}_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    return dict(sorted(tensors.items()))


def dit_config(dim: int, ffn: int, heads: int, layers: int, in_dim: int, out_dim: int, kind: str) -> dict[str, Any]:
    """A denoiser's config.json."""
    sizes = {"dim": dim, "ffn_dim": ffn, "num_heads": heads, "num_layers": layers, "in_dim": in_dim, "out_dim": out_dim}
    return {"_class_name": "WanModel", "eps": 1e-06, "freq_dim": 256, "model_type": kind, "text_len": 512} | sizes


def t5_tensors(vocab: int, dim: int, attn: int, ffn: int, heads: int, layers: int) -> Tensors:
    """The text encoder's tensors by their official names."""
    tensors: dict[str, tuple[Shape, Fill]] = {"token_embedding.weight": ((vocab, dim), "normal")}
    for n in range(layers):
        tensors |= {f"blocks.{n}.norm1.weight": ((dim,), 1), f"blocks.{n}.norm2.weight": ((dim,), 1)}
        tensors |= {f"blocks.{n}.attn.{w}.weight": ((attn, dim), "normal") for w in "qkv"}
        tensors[f"blocks.{n}.attn.o.weight"] = ((dim, attn), "normal")
        tensors |= {f"blocks.{n}.ffn.{w}.weight": ((ffn, dim), "normal") for w in ("gate.0", "fc1")}
        tensors[f"blocks.{n}.ffn.fc2.weight"] = ((dim, ffn), "normal")
        tensors[f"blocks.{n}.pos_embedding.embedding.weight"] = ((32, heads), "normal")
    return tensors | {"norm.weight": ((dim,), 1)}


def vae_tensors(config: dict[str, Any]) -> Tensors:
    """Official names and shapes of a VAE, from those of the library's class and the project's own map of names."""
    with init_empty_weights():
        real = {k: tuple(v.shape) for k, v in AutoencoderKLWan(**config).state_dict().items()}
    both = ("weight", "bias")
    residual = ["residual.0.gamma", "residual.3.gamma"]
    residual += [f"{p}.{w}" for p in ("residual.2", "residual.6", "shortcut") for w in both]
    resample = [f"{p}.{w}" for p in ("resample.1", "time_conv") for w in both]
    names = [f"{p}.{w}" for p in ("conv1", "conv2", "encoder.conv1", "decoder.conv1") for w in ("weight", "bias")]
    for side, stages in (("encoder", "downsamples"), ("decoder", "upsamples")):
        names += [f"{side}.middle.{n}.{r}" for n in (0, 2) for r in residual]
        attention = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")
        names += [f"{side}.middle.1.{r}" for r in attention]
        names += [f"{side}.head.0.gamma", f"{side}.head.2.weight", f"{side}.head.2.bias"]
        if config.get("is_residual"):
            inside = [(i, j, r) for i in range(4) for j in range(4) for r in residual + resample]
            names += [f"{side}.{stages}.{i}.{stages}.{j}.{r}" for i, j, r in inside]
        else:
            names += [f"{side}.{stages}.{i}.{r}" for i in range(16) for r in residual + resample]
    if not config.get("is_residual"):  # the flat list is cut into stages by where the encoder's resamplers are
        blocks = config.get("num_res_blocks", 2)
        names = [
            n
            for n in names
            if not re.match(r"encoder\.downsamples\.\d+\.(resample|time_conv)", n)
            or int(n.split(".")[2]) % (blocks + 1) == blocks
        ]
    matched: dict[str, tuple[str, Shape]] = {}
    for name in names:
        theirs = official_to_diffusers(name, names)
        if theirs in real and theirs not in {t for t, _ in matched.values()}:
            matched[name] = (theirs, real[theirs])
    missing = real.keys() - {t for t, _ in matched.values()}
    assert not missing, sorted(missing)[:5]
    # pictures with the grain of a camera, two levels: strong noise takes an encoder four times as long as footage
    fills: dict[str, Fill] = {"decoder.head.2.weight": ("scaled", 0.02)}
    fills |= {name: 1 for name in matched if name.endswith("gamma")}
    return {name: (shape, fills.get(name, "normal")) for name, (_, shape) in matched.items()}


VAE22: dict[str, Any] = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
VAE22 |= {"temperal_downsample": [False, True, True], "in_channels": 12, "out_channels": 12}
VAE22 |= {"scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}


def save_pth(path: Path, tensors: Tensors, dtype: str) -> None:
    """A .pth file."""
    values = Values(dtype)
    torch.save({name: values.tensor(name, shape, fill) for name, (shape, fill) in tensors.items()}, path)


def tokenizers(where: Path, tiny: Path, kind: str) -> None:
    """A tokenizer folder with a vocabulary of the real size, grown from the tiny one's."""
    where.mkdir(parents=True, exist_ok=True)
    draw, letters = random.Random(3), "etaoinshrdlucmfwypvbgkjqxz"

    def word() -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(3, 8)))

    for file in tiny.iterdir():
        if file.suffix != ".safetensors" and file.is_file() and file.name != "config.json":
            shutil.copy(file, where / file.name)
    saved = json.loads((tiny / "tokenizer.json").read_text())
    if kind == "umt5":
        vocab = saved["model"]["vocab"]
        known = {piece for piece, _ in vocab}
        while len(vocab) < 256300:
            piece = ("▁" if draw.random() < 0.6 else "") + word()
            if piece not in known:
                known.add(piece)
                vocab.append([piece, -10 - len(vocab) * 2e-5])
    else:
        vocab, merges, added = saved["model"]["vocab"], saved["model"]["merges"], saved["added_tokens"]
        text = isinstance(merges[0], str)
        parts = [t for t in vocab if t.isascii() and t.isalpha() and t.islower()] + ["Ġ" + c for c in letters]
        for c in letters:
            if "Ġ" + c not in vocab:
                vocab["Ġ" + c] = len(vocab)
                merges.append(f"Ġ {c}" if text else ["Ġ", c])
        while len(vocab) < 151643:
            one = "Ġ" + draw.choice(letters) if draw.random() < 0.5 else draw.choice(parts)
            two = draw.choice(parts)
            if two.startswith("Ġ") or one + two in vocab:
                continue
            vocab[one + two] = len(vocab)
            merges.append(f"{one} {two}" if text else [one, two])
            if len(one + two) < 5:
                parts.append(one + two)
        ids: dict[str, int] = {}
        for token in added:
            ids[token["content"]] = token["id"] = 151643 + len(ids)
        (where / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        lines = [merge if text else " ".join(merge) for merge in merges]
        (where / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
        (where / "added_tokens.json").write_text(json.dumps(ids))
        settings = json.loads((tiny / "tokenizer_config.json").read_text())
        known_tokens = settings["added_tokens_decoder"].values()
        settings["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in known_tokens}
        (where / "tokenizer_config.json").write_text(json.dumps(settings))
    (where / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False))


def jobs(kind: str) -> list[str]:
    """The parts in which a folder can be made by so many processes."""
    return {"5b": ["0/2", "1/2"], "a14b": ["0/4", "1/4", "2/4", "3/4"], "vlm": ["0/2", "1/2"]}[kind] + (
        ["rest"] if kind == "vlm" else ["t5", "vae", "rest"]
    )


def make(kind: str, folder: Path, part: str | None = None, dtype: str = "fp32", small: bool = False) -> None:
    """A checkpoint "5b" or "a14b", or a "vlm"; of one of its `jobs`, that part.

    `small`: narrow models of two layers, for a machine without a GPU.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    share = tuple(map(int, part.split("/"))) if part and "/" in part else None
    limit = 20_000_000 if small else SHARD
    if kind == "vlm":
        _make_vlm(folder, part, share, small)
        return
    dim, ffn, heads, layers, into, out, model = {
        "5b": (3072, 14336, 24, 30, 48, 48, "ti2v"),
        "a14b": (5120, 13824, 40, 40, 36, 16, "i2v"),
    }[kind]
    text = 4096
    if small:
        dim, ffn, heads, layers, text = 256, 512, 2, 2, 64
    experts = (".",) if kind == "5b" else ("high_noise_model", "low_noise_model")
    for number, expert in enumerate(experts):
        if part is None or (share and share[0] % len(experts) == number):
            tensors = dit_tensors(dim, ffn, layers, into, out, text)
            one, of = (share[0] // len(experts), share[1] // len(experts)) if share else (None, 1)
            shards(folder / expert, "diffusion_pytorch_model", tensors, dtype, limit, one, of)
        if part in (None, "rest"):
            (folder / expert).mkdir(exist_ok=True)
            config = dit_config(dim, ffn, heads, layers, into, out, model)
            (folder / expert / "config.json").write_text(json.dumps(config, indent=2))
    if part in (None, "vae"):
        sizes = dict(VAE22) if kind == "5b" else {}
        if small:
            sizes |= {"base_dim": 16, "decoder_base_dim": 16} if kind == "5b" else {"base_dim": 16}
        save_pth(folder / ("Wan2.2_VAE.pth" if kind == "5b" else "Wan2.1_VAE.pth"), vae_tensors(sizes), "fp32")
    if part in (None, "t5"):
        t5 = t5_tensors(256384, 64, 64, 128, 4, 2) if small else t5_tensors(256384, 4096, 4096, 10240, 64, 24)
        save_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", t5, "bf16")
    if part in (None, "rest"):
        tokenizers(folder / "google/umt5-xxl", MODELS / "tiny-Wan2.2-TI2V-5B" / "google" / "umt5-xxl", "umt5")
        if small:
            (folder / "wan_config.json").write_text(json.dumps({"sizes": ["160*96"], "frame_num": 17}))


def _make_vlm(folder: Path, part: str | None, share: tuple[int, ...] | None, small: bool) -> None:
    config = json.loads((MODELS / "tiny-InternVL" / "config.json").read_text())
    text, vision = config["llm_config"], config["vision_config"]
    text |= {"bos_token_id": 151643, "eos_token_id": 151645, "vocab_size": 151936, "tie_word_embeddings": False}
    if not small:
        text |= {"head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
        text |= {"num_hidden_layers": 36, "num_key_value_heads": 8, "max_window_layers": 36}
        vision |= {"hidden_size": 1024, "image_size": 448, "intermediate_size": 4096, "num_attention_heads": 16}
        vision |= {"num_hidden_layers": 24}
        config |= {"force_image_size": 448}
    h, f = text["hidden_size"], text["intermediate_size"]
    q, kv = (text[f"num_{name}_heads"] * text["head_dim"] for name in ("attention", "key_value"))
    ends = ("lm_head", "model.embed_tokens")
    tensors: dict[str, tuple[Shape, Fill]]
    tensors = {f"language_model.{name}.weight": ((text["vocab_size"], h), "normal") for name in ends}
    for n in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{n}."
        tensors |= {f"{at}{w}_layernorm.weight": ((h,), 1) for w in ("input", "post_attention")}
        tensors |= {f"{at}self_attn.{w}_norm.weight": ((text["head_dim"],), 1) for w in "qk"}
        tensors[f"{at}self_attn.q_proj.weight"] = ((q, h), "normal")
        tensors[f"{at}self_attn.o_proj.weight"] = ((h, q), "normal")
        tensors |= {f"{at}self_attn.{w}_proj.weight": ((kv, h), "normal") for w in "kv"}
        tensors |= {f"{at}mlp.{w}_proj.weight": ((f, h), "normal") for w in ("gate", "up")}
        tensors[f"{at}mlp.down_proj.weight"] = ((h, f), "normal")
    tensors["language_model.model.norm.weight"] = ((h,), 1)
    v, i, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    side = vision["image_size"] // patch
    tensors |= {"mlp1.0.bias": ((4 * v,), "normal"), "mlp1.0.weight": ((4 * v,), 1)}
    for n, into in ((1, 4 * v), (3, h)):
        tensors |= {f"mlp1.{n}.bias": ((h,), "normal"), f"mlp1.{n}.weight": ((h, into), "normal")}
    at = "vision_model.embeddings."
    tensors |= {f"{at}class_embedding": ((1, 1, v), "normal"), f"{at}patch_embedding.bias": ((v,), "normal")}
    tensors[f"{at}patch_embedding.weight"] = ((v, 3, patch, patch), "normal")
    tensors[f"{at}position_embedding"] = ((1, side * side + 1, v), "normal")
    for n in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{n}."
        for name, out, into in (("attn.proj", v, v), ("attn.qkv", 3 * v, v), ("mlp.fc1", i, v), ("mlp.fc2", v, i)):
            tensors |= {f"{at}{name}.bias": ((out,), "normal"), f"{at}{name}.weight": ((out, into), "normal")}
        tensors |= {f"{at}ls{k}": ((v,), 0.1) for k in (1, 2)}
        for k in (1, 2):
            tensors[f"{at}norm{k}.weight"], tensors[f"{at}norm{k}.bias"] = ((v,), 1), ((v,), "normal")
    if part is None or share:
        limit = 20_000_000 if small else 4_990_000_000
        shards(folder, "model", dict(sorted(tensors.items())), "bf16", limit, *(share or (None, 1)))
    if part in (None, "rest"):
        tokenizers(folder, MODELS / "tiny-InternVL", "qwen")
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def video(path: Path, width: int, height: int, frames: int, fps: int) -> None:
    """A moving gradient with a bright square and some grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    grain = np.random.default_rng(0).normal(0, 3, (height + 64, width + 64)).astype(np.float32)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for n in range(frames):
            base = (
                110
                + 70 * np.sin((x + 3 * n) / 90) * np.cos((y + n) / 60)
                + grain[n % 64 :][:height, n % 61 :][:, :width]
            )
            left, top = int(width * (0.1 + 0.6 * n / frames)), int(height * 0.4)
            base[top : top + height // 6, left : left + height // 6] = 230
            rgb = np.stack([base, base * 0.9 + 10, 255 - base], -1).clip(0, 255).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(rgb, "rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
