"""Whole commands in half a second: sampling and captioning are stand-ins, and everything else is what users run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wan import cli
from wan.chain.finished_clip import FinishedClip
from wan.chain.run_folder import RunFolder
from wan.pipeline import Pipeline
from wan.types import Clip, Generation, Request, UInt8Array

DATA = Path(__file__).parent.parent / "data"
MADE = DATA / "run_0_1_0"
PAINT = """import sys
from pathlib import Path
from PIL import Image
for path in Path(sys.argv[1]).glob("*.png"):
    Image.new("RGB", Image.open(path).size, "red").save(path)
"""
# As much of spandrel as is used, for machines without it: every picture twice as large.
SPANDREL = """import enum
import torch
class UnsupportedModelError(Exception): pass
class ModelTiling(enum.Enum): SUPPORTED = 1
class ImageModelDescriptor:
    scale, input_channels, output_channels, tiling = 2, 3, 3, ModelTiling.SUPPORTED
    model = torch.nn.Identity()
    def __call__(self, pixels): return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
def canonicalize_state_dict(state): return state
class ModelLoader:
    def __init__(self, device): pass
    def load_from_state_dict(self, state):
        if "body.0.weight" not in state: raise UnsupportedModelError
        return ImageModelDescriptor()
"""


def nearest_upscaler() -> dict[str, torch.Tensor]:
    """The weights of a Real-ESRGAN Compact that adds nothing to a picture twice as large."""
    sizes = {"body.0": (8, 3, 3, 3), "body.2": (8, 8, 3, 3), "body.4": (12, 8, 3, 3)}
    state = {f"{name}.weight": torch.zeros(size) for name, size in sizes.items()}
    state |= {f"{name}.bias": torch.zeros(size[0]) for name, size in sizes.items()}
    return state | {f"body.{number}.weight": torch.zeros(8) for number in (1, 3)}


def without_start(text: str) -> str:
    """What is said beside the line that PyTorch starts, which comes before a refusal that needs PyTorch."""
    return "".join(line for line in text.splitlines(True) if "PyTorch starts" not in line)


@dataclass
class Seen:
    """What one command did."""

    code: int = -1
    pipeline: Any = None
    requests: list[Request] = field(default_factory=list)
    made: list[Generation] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    opened: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[int, str]] = field(default_factory=list)  # frames and question of each description
    shown: list[UInt8Array] = field(default_factory=list)  # the frames themselves
    readers: list[str] = field(default_factory=list)
    corrected: list[float] = field(default_factory=list)
    folder: Path = Path()
    output: str = ""  # on stdout, or else on stderr
    stderr: str = ""

    @property
    def first(self) -> Request:
        return self.requests[0]

    @property
    def clips(self) -> dict[int, FinishedClip]:
        return RunFolder(self.folder).clips()

    @property
    def fingerprinted(self) -> dict[int, Mapping[str, Any]]:
        return {number: clip.settings for number, clip in self.clips.items()}

    def loras(self, expert: str) -> list[tuple[str, float]]:
        return [(file.path.name, file.strength) for file in self.first.loras.get(expert, ())]

    def mean(self, frame: Any) -> float:
        return float(frame.float().mean())


class Speaking:
    """A captioner that says the same of everything, and what it was asked."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def describe(self, frames: UInt8Array, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        self.seen.asked.append((len(frames), question))
        self.seen.shown.append(frames)
        return "A red square slides to the right."

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints, and for each setting something else to choose."""
    world = tmp_path_factory.mktemp("world")
    for name in ("ti2v", "i2v", "vlm"):
        shutil.copytree(MADE / name, world / name)
    for file in MADE.glob("*.*"):
        shutil.copy(file, world)
    declared = json.loads((world / "ti2v/wan_config.json").read_text()) | {"sizes": ["64*32", "128*64"]}
    (world / "ti2v/wan_config.json").write_text(json.dumps(declared))
    shutil.copytree(world / "ti2v", world / "ti2v_2")
    weights = load_file(world / "ti2v/diffusion_pytorch_model.safetensors")
    weights["head.head.bias"] += 1
    save_file(weights, world / "ti2v_2/diffusion_pytorch_model.safetensors")
    save_file(weights, world / "dit.safetensors")
    for name, pth in (("vae", "Wan2.2_VAE.pth"), ("t5", "models_t5_umt5-xxl-enc-bf16.pth")):
        state = torch.load(world / "ti2v" / pth, weights_only=True)
        biased = next(key for key in state if key.endswith("norm.weight" if name == "t5" else "bias"))
        state[biased] = state[biased] + 1
        save_file({key: value.contiguous() for key, value in state.items()}, world / f"{name}.safetensors")
    shutil.copytree(world / "ti2v", world / "without_vae")
    (world / "without_vae/Wan2.2_VAE.pth").unlink()
    (world / "comfy/vae").mkdir(parents=True)
    shutil.copy(world / "vae.safetensors", world / "comfy/vae/wan2.2_vae.safetensors")
    for noise in ("high", "low"):
        folder = world / "i2v" / f"{noise}_noise_model"
        parts = {
            key: value for shard in sorted(folder.glob("*.safetensors")) for key, value in load_file(shard).items()
        }
        save_file(parts | {"head.head.bias": parts["head.head.bias"] + 1}, world / f"dit_{noise}.safetensors")
    shutil.copytree(world / "vlm", world / "vlm_2")
    for shard in (world / "vlm_2").glob("*.safetensors"):
        save_file({key: value + 1 for key, value in load_file(shard).items()}, shard)
    for name in ("other.mp4", "theirs.mp4"):
        shutil.copy(DATA / "corpus" / "h264_faststart.mp4", world / name)
    Image.new("RGB", (64, 32), "red").save(world / "red.png")
    (world / "ends").mkdir()
    for name, colour in (("10.png", "red"), ("2.png", "black")):  # in this order a sort by letters has them
        Image.new("RGB", (64, 32), colour).save(world / "ends" / name)
    (world / "paint.py").write_text(PAINT)
    (world / "spandrel.py").write_text(SPANDREL)
    save_file(nearest_upscaler(), world / "larger.safetensors")
    (world / "story.yaml").write_text("- the boat sinks\n")
    (world / "cut.yaml").write_text("- {cut: red.png}\n")
    (world / "second.yaml").write_text("- {}\n- {cut: red.png}\n")
    (world / "name.yaml").write_text("- {name: the fog, prompt: it-goes-on}\n- it-goes-on\n")
    (world / "seed.yaml").write_text("- {seed: 77}\n")
    (world / "decord.py").touch()  # enough to be asked for; PyAV reads what it cannot
    return world


def frames_in(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def metadata(video: Path) -> Mapping[str, str]:
    with av.open(str(video)) as container:
        return dict(container.metadata)


@pytest.fixture
def command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Seen]]:
    """Runs a command with what else it needs, and says what it did."""
    now = Seen()

    def sampled(self: Any, request: Request, **options: Any) -> Generation:
        now.pipeline, now.run = self, options
        now.requests.append(request)
        generator = torch.Generator().manual_seed(request.seed)
        frames = torch.rand(*request.geometry.size, 3, generator=generator) * 2 - 1
        latents = torch.zeros(self.config.z_dim, *request.geometry.latent)
        now.made.append(Generation(Clip(frames, Fraction(self.config.sample_fps)), latents, request))
        return now.made[-1]

    def opened(path: Any, **options: Any) -> Speaking:
        now.opened = options | {"path": path}
        return Speaking(now)

    def corrected(frames: torch.Tensor, *_: Any, strength: float, **__: Any) -> torch.Tensor:
        now.corrected.append(strength)
        return frames / 2  # so that what is handed on tells

    import wan.media

    sample_frames = wan.media.sample_frames

    def samples(path: Any, count: int, reader: str = "auto", until: float | None = None) -> UInt8Array:
        now.readers.append(reader)
        return sample_frames(path, count, until=until)

    monkeypatch.setattr(Pipeline, "run", sampled)
    monkeypatch.setattr("wan.commands.start.has_gpu_driver", lambda: True)
    monkeypatch.setattr("wan.pipeline.gpu_limit", lambda vram, device: vram)  # needs a GPU
    monkeypatch.setattr(Pipeline, "geometry", _geometry)  # a budget that is refused is no news
    monkeypatch.setattr("wan.pipeline.check_precision", lambda *_: None)
    monkeypatch.setattr("wan.pipeline.main_device", lambda *_: torch.device("meta"))  # so that "cpu" is another
    monkeypatch.setattr("wan.prompting.open_captioner", opened)
    monkeypatch.setattr("wan.candidates.correct_drift", corrected)
    monkeypatch.setattr("wan.prompting.weight_bytes", lambda *_: 0)
    monkeypatch.setattr("wan.media.sample_frames", samples)
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.chdir(world)

    def run(
        words: str, *, generate: bool = False, weights: str = "--ckpt_dir ti2v", folder: Path = tmp_path / "out"
    ) -> Seen:
        nonlocal now
        now = Seen(folder=folder)
        capsys.readouterr()
        if generate:
            common = [*weights.split(), "--prompt", "x", "--task", "ti2v-5B", "--save_file", "out.mp4"]
            now.code = cli.generate_main([*common, *shlex.split(words)])
        else:
            common = [*weights.split(), "--video", "source.mp4", "--vlm_path", "vlm", "--num_videos", "2"]
            common += ["--frame_num", "9", "--base_seed", "3", "--output_dir", str(now.folder)]
            now.code = cli.continuous_main([*common, *shlex.split(words)])
        output = capsys.readouterr()
        now.output, now.stderr = output.out or without_start(output.err), output.err
        return now

    yield run
    for name, module in list(sys.modules.items()):  # a later test wants the packages themselves
        if str(getattr(module, "__file__", "")).startswith(f"{world}/"):
            del sys.modules[name]


def _geometry(self: Any, width: int, height: int, frames: int) -> Any:
    from wan.types import Geometry

    return Geometry(frames, height, width, self.config.vae_stride, self.config.patch_size)
