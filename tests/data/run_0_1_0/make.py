"""What made the folders here: run once, at commit 6c2e86f (0.1.0), and kept as their documentation.

    python tests/data/run_0_1_0/make.py NEW_FOLDER

It is not run again: later code would put its own fingerprints where those of 0.1.0 must stay. Every command ran in this
folder, so that no record holds a path of the machine. Captions of the endpoint come from `describe` below, and decord
is an empty module, which makes the command warn and read with PyAV.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from examples.make_tiny_checkpoint import (  # noqa: E402
    Denoiser,
    InternVL,
    TextEncoder,
    Vae,
    random_tensors,
    write_denoiser,
    write_internvl,
    write_json,
    write_prompt_tokenizer,
)
from wan import cli  # noqa: E402
from wan.captioner import EndpointCaptioner  # noqa: E402
from wan.media import write_video  # noqa: E402
from wan.run_folder import RunFolder  # noqa: E402

DENOISER = {"dim": 24, "num_heads": 2, "ffn_dim": 32, "num_layers": 2, "freq_dim": 32, "text_dim": 16}
ENCODER = TextEncoder(dim=16, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1)
DECLARED = {"frame_num": 5, "sample_steps": 5, "param_dtype": "float32", "t5_dtype": "float32"}
FIVE_B = ["--ckpt_dir", "ti2v", "--video", "source.mp4"]
A14B = ["--ckpt_dir", "i2v", "--video", "source.mp4"]
LORAS = [
    *("--lora_high", "svi_pro_high.safetensors:0.5", "--lora_high", "light_high.safetensors"),
    *("--lora_low", "svi_pro_low.safetensors", "--lora_low", "light_low.safetensors:-0.25"),
]

# of each folder the flags of the run, and what was made again in it afterwards
RUNS = {
    "storyboard_5b": (
        [
            *(*FIVE_B, "--storyboard", "storyboard_5b.yaml", "--base_seed", "3", "--sample_solver", "dpm++"),
            *("--cache", "taylorseer:2", "--guidance_interval", "0.1", "0.95", "--convert_model_dtype"),
            *("--num_segments", "2", "--vlm_path", "vlm"),
        ],
        [["--redo", "3"]],
    ),
    "tail_14b": (
        [
            *(*A14B, "--num_videos", "3", "--frame_num", "9", "--base_seed", "20"),
            *("--continuation", "tail", "--context_frames", "5", "--drift_correction", "--best_of", "2"),
            *("--vlm_path", "vlm", "--vlm_question", "What is there?", "--num_segments", "3", "--cache", "first_block"),
            *("--sample_steps", "4", "--custom_prompt", "continue the shot"),
        ],
        [["--redo", "2", "--keep_following"]],
    ),
    "continue_14b": (
        [
            *(*A14B, "--storyboard", "continue_14b.yaml", "--base_seed", "5", "--cache", "magcache:0.1", "--t5_cpu"),
            *("--prompt_mode", "continue", "--vlm_url", "http://captions.invalid/v1", "--vlm_path", "a-vlm"),
            *("--vlm_trust_remote_code", "--video_reader", "decord", "--num_segments", "2", "--sample_shift", "3"),
        ],
        [["--redo", "1"]],
    ),
    # --base_seed is drawn
    "svi_14b": (
        [
            *(*A14B, "--num_videos", "2", "--frame_num", "9", "--prompt", "Der Fluß steigt; 水が増える"),
            *("--continuation", "svi2pro", "--anchor_image", "picture.png", "--vae_dtype", "float16", *LORAS),
            *("--preset", "turbo", "--no_video_metadata"),
            *("--dit_high", "i2v/high_noise_model/diffusion_pytorch_model.safetensors", "--precision", "fp8"),
        ],
        [],
    ),
}

STORYBOARD_5B = """\
defaults: {guidance: 4}
clips:
  - prompt: a red square moves to the right
    steps: 6
    shift: 4.5
    guidance: 3
  - cut: picture.png
    prompt: two squares meet
  - prompt: they stop
    seed: 12
    frames: 9
    context: 5
    lora: light.safetensors:0.5
  - cut: true
    prompt: an empty field in the evening
"""
CONTINUE_14B = """\
clips:
  - lora_high: [light_high.safetensors:0.8]
    lora_low: light_low.safetensors
    guidance: [2.5, 4.0]
  - prompt: the square reaches the wall
    end_image: small.png
  - cut: small.png
  - prompt: it goes back
    lora_low: []
"""

IDENTITY = {"subject": "a red square", "identity": "A plain red square on a grey field in soft light."}
SLIDES = "A red square slides to the right and slows down near the edge. The camera stays static."
TURNS = "A red square bounces off, then climbs towards its upper corner. The camera stays static."


def describe(self, frames, question, system=None, max_new_tokens=512):
    """The endpoint's answer to what `--prompt_mode continue` asks; the second prompt is soon one too often."""
    if '"identity"' in question:
        return json.dumps(IDENTITY)
    prompt = TURNS if SLIDES in question else SLIDES
    return json.dumps({"prompt": prompt, "camera": "static camera", "end_state": "near the edge, slow"})


def main(folder: Path) -> None:
    folder.mkdir()
    os.chdir(folder)
    make_inputs()
    EndpointCaptioner.describe = describe
    with tempfile.TemporaryDirectory() as stand_in:
        (Path(stand_in) / "decord.py").touch()
        sys.path.insert(0, stand_in)
        for name, (flags, again) in RUNS.items():
            for more in ([], *again):
                assert cli.continuous_main([*flags, "--output_dir", name, *more]) == 0
            # large, and nothing reads them
            for file in (Path(name) / "report.html", *Path(name, "redone").glob("*.safetensors")):
                file.unlink()
    write_json(Path("runs.json"), {name: {"flags": flags, "again": again} for name, (flags, again) in RUNS.items()})
    made = {name: RunFolder(Path(name)).clips().values() for name in RUNS}
    fingerprints = {
        name: {clip.video.name: {"settings": clip.settings, "fingerprint": clip.fingerprint} for clip in clips}
        for name, clips in made.items()
    }
    write_json(Path("fingerprints.json"), fingerprints)


def make_inputs() -> None:
    write_video("source.mp4", (square(index) for index in range(24)), 24)
    picture = square(30, blue=200)
    Image.fromarray(picture).save("picture.png")
    # of the size that the A14B clips have: how a processor rounds when it resizes must not decide what is found again
    Image.fromarray(picture[::2, ::2]).save("small.png")
    Path("storyboard_5b.yaml").write_text(STORYBOARD_5B, encoding="utf-8")
    Path("continue_14b.yaml").write_text(CONTINUE_14B, encoding="utf-8")
    model = Denoiser("ti2v", 48, 48, **DENOISER)
    write_checkpoint("ti2v", model, ["."], "Wan2.2_VAE.pth", Vae(48, 2, 2, nested=True), ["64*32"])
    write_loras(model, "light")
    model = Denoiser("i2v", 36, 16, **DENOISER)
    experts = ["high_noise_model", "low_noise_model"]
    ratios = [[1.0, 0.99, 0.98], [1.0, 0.97, 0.9]]
    vae = Vae(16, 2, 2, nested=False)
    write_checkpoint("i2v", model, experts, "Wan2.1_VAE.pth", vae, ["32*16"], mag_ratios=ratios)
    write_loras(model, "light_high", "light_low", "svi_pro_high", "svi_pro_low")
    write_internvl(Path("vlm"), InternVL(28, 16, 1, 16, 1, 2, 1, 8), seed="run_0_1_0")


def square(index: int, blue: int = 40) -> np.ndarray:
    """A frame of a red square that moves over a slope of grey, uint8 [32, 64, 3]."""
    frame = np.repeat(np.linspace(90, 170, 64)[None, :, None], 32, axis=0).repeat(3, axis=2).astype(np.uint8)
    frame[10:22, 4 + index : 18 + index] = 210, 60, blue
    return frame


def write_checkpoint(name, model, experts, vae_file, vae, sizes, **declared) -> None:
    folder = Path(name)
    for expert in experts:
        write_denoiser(folder / expert, model, seed=f"{name}/{expert}", shards=1, dtype=torch.bfloat16)
    torch.save(random_tensors(f"{name}/vae", vae.shapes(), torch.bfloat16), folder / vae_file)
    encoder = random_tensors(f"{name}/t5", ENCODER.shapes(), torch.bfloat16)
    torch.save(encoder, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_prompt_tokenizer(folder / "google/umt5-xxl", ENCODER.vocab_size)
    write_json(folder / "wan_config.json", {"sizes": sizes, **DECLARED, **declared})


def write_loras(model: Denoiser, *names: str) -> None:
    shapes = model.shapes()
    for name in names:
        pairs = {}
        for layer in (f"blocks.0.{part}" for part in ("self_attn.q", "cross_attn.o", "ffn.0")):
            out, width = shapes[f"{layer}.weight"]
            pairs |= {f"{layer}.lora_A.weight": (1, width), f"{layer}.lora_B.weight": (out, 1)}
        save_file(random_tensors(name, pairs, torch.bfloat16), f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
