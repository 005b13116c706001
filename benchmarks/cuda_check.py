#!/usr/bin/env python3
"""What the tests cannot see without a GPU: the golden runs on CUDA, offloading, and the captioner's memory.

    python -m benchmarks.cuda_check [--vlm_layers 36]

Prints one line per check and exits with 1 if one fails. The captioner is a random-weight InternVL of about the size
of the released 8B (its feed-forward layers are narrower), written to a temporary folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.timing import Timer
from tests.support.tiny_checkpoint import InternVL, write_internvl
from wan import WAN_CONFIGS, WanI2V, WanTI2V, WanV2V5B, cli
from wan.captioner import InternVLCaptioner
from wan.media import sample_frames
from wan.types import Step

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden"
VIDEO = ROOT / "examples" / "shapes.mp4"
failures: list[str] = []


def check(name: str, passed: bool, measured: str) -> None:
    print(f"{'ok  ' if passed else 'FAIL'} {name}: {measured}", flush=True)
    if not passed:
        failures.append(name)


def resident(pipeline: Any) -> list[str]:
    """The models that have tensors on the GPU."""
    names = ("model", "low_noise_model", "high_noise_model", "vae", "text_encoder")
    loaded = {name: pipeline.models[name] for name in names if pipeline.models.is_loaded(name)}
    return [name for name, model in loaded.items() if any(value.is_cuda for value in model.parameters())]


def golden_runs() -> None:
    """The official videos on CUDA in float32 with the official noise; then bf16 against float32."""
    torch.backends.cudnn.allow_tf32 = False
    meta = json.loads((GOLDEN / "meta.json").read_text())
    prompts = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    for family, cls, task in (("5b", WanTI2V, "ti2v-5B"), ("14b", WanI2V, "i2v-A14B")):
        float32 = dataclasses.replace(WAN_CONFIGS[task], param_dtype=torch.float32, t5_dtype=torch.float32)
        for config, limit in ((float32, 1e-4), (WAN_CONFIGS[task], 0.15)):
            pipeline: Any = cls(config, GOLDEN / family / "ckpt")
            for run, spec in meta["families"][family]["runs"].items():
                wanted = load_file(GOLDEN / family / "expected" / f"pipeline_{run}.safetensors")
                call = {key: tuple(value) if isinstance(value, list) else value for key, value in spec["call"].items()}
                if run != "t2v":
                    call["img"] = Image.open(GOLDEN / family / "image.png").convert("RGB")
                negative = "" if spec["n_prompt_index"] == "" else prompts[spec["n_prompt_index"]]
                latents: list[torch.Tensor] = []
                busy: list[list[str]] = []

                def on_step(step: Step, latents: Any = latents, busy: Any = busy, pipeline: Any = pipeline) -> None:
                    if step.latents is not None:
                        latents.append(step.latents)
                        busy.append(resident(pipeline))

                for offload in (True, False) if run == "main" and config is float32 else (True,):
                    pipeline.noise = lambda request, noise=wanted["noise"]: noise.to("cuda")
                    prompt = prompts[spec["prompt_index"]]
                    pipeline.generate(prompt, n_prompt=negative, offload_model=offload, on_step=on_step, **call)
                    reference = wanted["latent_final"]
                    known = 1 if family == "5b" and run != "t2v" else 0
                    final = latents[-1].cpu()[:, known:]
                    error = float((final - reference[:, known:]).norm() / reference[:, known:].norm())
                    name = f"{family} {run} {str(config.param_dtype)[6:]} offload={offload}"
                    check(name, error < limit, f"latents differ by {error:.1e} (relative)")
                    if offload:
                        check(f"{name}, one model at a time", all(len(names) == 1 for names in busy), str(busy[0]))
                        check(f"{name}, none left on the GPU", not resident(pipeline), str(resident(pipeline)))
                    else:
                        check(f"{name}, models stay", {"vae"} < set(resident(pipeline)), str(resident(pipeline)))
                        pipeline = cls(config, GOLDEN / family / "ckpt")


class Speaking(InternVLCaptioner):
    """What random weights say is nothing to read, so the words are given."""

    def answer(self, frames: Any, question: str, system: str | None, max_new_tokens: int) -> str:
        made = self.generate(*self.prepare(frames, question, system), 128)
        return f"A ball rolls. {len(made)} tokens."


def captioner(layers: int, folder: Path) -> None:
    """Time and memory of describing, and that the memory is free before the diffusion model samples."""
    size = InternVL(448, 1024, 24, 4096, layers, 32, 8, 128)
    with Timer(torch.device("cpu")) as watch:
        write_internvl(folder / "vlm", size)
    print(f"     wrote {sum(f.stat().st_size for f in (folder / 'vlm').iterdir()) / 2**30:.1f} GiB "
          f"in {watch.seconds:.0f} s")  # fmt: skip
    frames = sample_frames(VIDEO, 8)
    vlm = Speaking(folder / "vlm", "cuda")
    for turn in ("first", "second", "after close"):
        if turn == "after close":
            vlm.close()
            check("captioner frees the GPU", torch.cuda.memory_allocated() < 2**28, gib(torch.cuda.memory_allocated()))
        with Timer(torch.device("cuda")) as watch:
            answer = vlm.describe(frames, "Describe this video in detail.")
        print(f"     {turn} description: {watch.seconds:.1f} s, {answer}, "
              f"peak {gib(torch.cuda.max_memory_allocated())}")  # fmt: skip
    vlm.close()

    continuation = WanV2V5B(WAN_CONFIGS["v2v-5B"], GOLDEN / "5b" / "ckpt")
    continuation.vlm.use(vlm)
    allocated: list[int] = []

    def on_step(step: Step) -> None:
        if step.latents is not None:
            allocated.append(torch.cuda.memory_allocated())

    video, prompt = continuation.v2v(VIDEO, max_area=64 * 96, frame_num=9, sampling_steps=2, seed=1, on_step=on_step)
    check("v2v with the captioner on the same GPU", bool(torch.isfinite(video).all()), prompt[:60])
    check("the captioner is gone when sampling begins", max(allocated) < 2**28, gib(max(allocated)))


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def resumed_chain() -> None:
    """A chain of three clips in one go, and one that is stopped after each clip: the states bit for bit."""
    for task, family in (("v2v-5B", "5b"), ("v2v-14B", "14b")):
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            shutil.copytree(GOLDEN / family / "ckpt", home / "ckpt")
            (home / "ckpt" / "wan_config.json").write_text(json.dumps({"sizes": ["96*64"], "sample_steps": 2}))
            flags = ["--task", task, "--ckpt_dir", str(home / "ckpt"), "--video", str(VIDEO), "--prompt", "it goes on"]
            flags += ["--frame_num", "13", "--base_seed", "3", "--context_frames", "5"]
            runs = {"whole": (3,), "parts": (1, 2, 3)}
            codes = [
                cli.continuous_main([*flags, "--output_dir", str(home / folder), "--num_videos", str(count)])
                for folder, counts in runs.items()
                for count in counts
            ]
            states = [[load_file(file) for file in sorted((home / folder).glob("*.safetensors"))] for folder in runs]
            same = all(torch.equal(one[key], other[key]) for one, other in zip(*states, strict=True) for key in one)
            check(f"resumed {task} chain", same and not any(codes) and len(states[0]) == 3, f"bit for bit: {same}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm_layers", type=int, default=36)
    args = parser.parse_args()
    golden_runs()
    resumed_chain()
    with tempfile.TemporaryDirectory() as folder:
        captioner(args.vlm_layers, Path(folder))
    print(f"{len(failures)} failed" if failures else "all passed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
