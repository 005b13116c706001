"""The models at real size with random weights, made on the GPU, and the clips that are measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from wan.configs import WAN_CONFIGS
from wan.continuation import VideoContinuation
from wan.denoiser.fp8 import quantize_model
from wan.denoiser.model import WanModel, policy_dtype
from wan.denoiser.policy import FLOAT32_PARTS
from wan.text.umt5 import TextEncoder
from wan.video2video import WanV2V
from wan.wan22video2video5B import WanV2V5B
from wan.weights.quantized import QuantizedLinear, QuantizedTensor
from wan.weights.tensors import Weights

SCENARIOS: dict[str, tuple[str, int, int, int]] = {
    "a14b-480p-81": ("i2v-A14B", 832, 480, 81),
    "a14b-720p-81": ("i2v-A14B", 1280, 720, 81),
    "5b-704p-121": ("ti2v-5B", 1280, 704, 121),
}
DEVICE = torch.device("cuda:0")
DIT: dict[str, dict[str, Any]] = {
    "i2v-A14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 36, "out_channels": 16},
    "ti2v-5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
}
VAE: dict[str, dict[str, Any]] = {
    "i2v-A14B": {},
    "ti2v-5B": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}
TEXT: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
TOKENIZER = Path(__file__).resolve().parent.parent / "models" / "tiny-Wan2.2-TI2V-5B" / "google" / "umt5-xxl"


def materialise(model: torch.nn.Module, dtype_of: Any, device: torch.device) -> Any:
    """Random weights of a sane scale, made on the GPU (a CPU draw of 14 B numbers takes minutes), moved to `device`."""
    maker = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(maker).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        scale = 1.0 if "norm" in name else 0.02
        value = torch.randn(parameter.shape, device=maker, generator=generator).mul_(scale).to(dtype_of(name))
        model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(value.to(device), requires_grad=False)
    return model.to(device).eval()


class Words:
    """Stands for the tokenizer: as many ids as a long prompt has."""

    length = 512

    def count(self, text: str) -> int:
        return 300

    def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(512)[None] % 1000
        mask = (torch.arange(512)[None] < 300).long()
        return ids, mask


# Where the halfs are in a block of a GGUF type; the other bytes may be anything.
HALFS = {"Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def random_packed(shape: torch.Size, kind: str, device: str) -> QuantizedTensor:
    """A random weight as a quantized file holds it, of about the scale of a real one."""
    if kind == "fp8":
        return QuantizedTensor(
            torch.randn(shape, device=device).to(torch.float8_e4m3fn), torch.tensor(0.02, device=device)
        )
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = torch.randint(0, 256, (shape[0], shape[1] // elements, size), dtype=torch.uint8, device=device)
    for start in HALFS[kind]:
        blocks[..., start], blocks[..., start + 1] = 0, 4  # 2**-14
    return QuantizedTensor(blocks.flatten(1), gguf_type=kind)


def pack(model: WanModel, kind: str, home: torch.device, device: str = "cuda") -> WanModel:
    """The model with its linear layers as a quantized file would fill them, made on a GPU and put on `home`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.startswith(FLOAT32_PARTS):
            packed = random_packed(module.weight.shape, kind, device)
            model.set_submodule(name, QuantizedLinear(module, packed, module.weight.dtype, home))
    return model


def build(task: str, packed: str | None = None, precision: str | None = None) -> VideoContinuation:
    """The pipeline of `task` with its models in host memory, as after loading a checkpoint."""
    cpu = torch.device("cpu")
    config = WAN_CONFIGS[task]
    with init_empty_weights():
        denoiser, vae = WanModel(**DIT[task]), AutoencoderKLWan(**VAE[task])
        text = UMT5Config(**TEXT)
        text._attn_implementation = "eager"
        encoder = UMT5EncoderModel(text)
    denoisers = ("transformer",) if config.boundary is None else ("transformer", "transformer_2")
    with TemporaryDirectory() as folder:  # only its headers are ever looked at: the models are put in below
        checkpoint = Path(folder)
        (checkpoint / "model_index.json").write_text("{}")
        for part in denoisers:
            write_headers(checkpoint / part / "diffusion_pytorch_model.safetensors", denoiser)
            sizes = {"num_attention_heads": DIT[task]["num_attention_heads"]}
            (checkpoint / part / "config.json").write_text(json.dumps(sizes))
        write_headers(checkpoint / "vae" / "diffusion_pytorch_model.safetensors", vae)
        write_headers(checkpoint / "text_encoder" / "model.safetensors", encoder)
        shutil.copytree(TOKENIZER, checkpoint / "tokenizer")
        pipeline: VideoContinuation = (WanV2V if task == "i2v-A14B" else WanV2V5B)(config, checkpoint)

    def filled() -> WanModel:
        with init_empty_weights():
            model = WanModel(**DIT[task])
        materialise(model, lambda name: policy_dtype(name, config.param_dtype), cpu)
        if packed:
            pack(model, packed, cpu)
        if precision:
            quantize_model(model, precision, pipeline.device)
        return model

    for name in pipeline.checkpoint.experts:
        pipeline.models.put(name, filled())
    vae = materialise(vae, lambda name: torch.float32, cpu)
    pipeline.models.put("vae", pipeline.vae_class(vae, config.vae_mean, config.vae_std))
    encoder = materialise(encoder, lambda name: config.t5_dtype, cpu)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    pipeline.models.put("text_encoder", TextEncoder(encoder, Words()))  # type: ignore[arg-type]
    return pipeline


def write_headers(file: Path, model: torch.nn.Module) -> None:
    """A safetensors file with the names and shapes of a model, and a hole, which takes no disk, for its numbers."""
    header, end = dict[str, Any](), 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    file.parent.mkdir(parents=True)
    with file.open("wb") as opened:
        opened.write(len(words).to_bytes(8, "little") + words)
        opened.truncate(8 + len(words) + end)


def headers(model: torch.nn.Module) -> Weights:
    """What the files of a model would say of its shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Weights(Path("."), (), shapes, {})


def commit() -> str:
    """The commit that is measured, from the repository's files: a copied tree need not have git installed."""
    git = Path(__file__).resolve().parent.parent / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        return (git / head.removeprefix("ref: ")).read_text().strip()[:12] if head.startswith("ref: ") else head[:12]
    except OSError:
        return "unknown"
