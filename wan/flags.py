"""The flags of both commands, checked as far as they can be without a model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from wan.configs import PRESETS, WAN_CONFIGS, ModelConfig, parse_size
from wan.errors import UserError
from wan.types import CACHES, CONTINUATIONS, PROMPT_MODES, SOLVERS, Context, StepCache

V2V_TASKS = ("v2v-14B", "v2v-5B")
DIT_FLAGS = {"dit": "model", "dit_high": "high_noise_model", "dit_low": "low_noise_model"}
LORA_FLAGS = {"lora": "model", "lora_high": "high_noise_model", "lora_low": "low_noise_model"}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage; takes no shortened names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def generate_flags() -> Parser:
    """Wan2.2's flags, `--task v2v-*` and what continuing a video needs."""
    parser = Parser(prog="generate.py", description="Make one clip with Wan2.2, or continue a video by one clip.")
    parser.add_argument("--task", choices=tuple(WAN_CONFIGS), help="default: told from --ckpt_dir and --video/--image")
    _add_common(parser)
    parser.add_argument("--video", help="the video to continue (v2v tasks)")
    parser.add_argument("--image", help="the first frame (i2v-A14B, ti2v-5B)")
    parser.add_argument("--frame_num", type=int, help="frames of the clip, 4n+1; default: 81 (14B) or 121 (5B)")
    parser.add_argument("--save_file", help="the .mp4 to write; default: a name made of task, size, input and time")
    return parser


def continuous_flags() -> Parser:
    """The flags of a chain."""
    parser = Parser(
        prog="generate_continuous.py", description="Continue a video by a chain of clips, each on its last."
    )
    parser.add_argument("--task", choices=V2V_TASKS, help="default: told from --ckpt_dir")
    _add_common(parser)
    parser.add_argument("--video", required=True, help="the video to continue")
    parser.add_argument("--num_videos", type=int, help="clips to make; default: the storyboard's, or 12")
    parser.add_argument("--output_dir", default="./continuous_outputs", help="folder for clips, joined video and logs")
    parser.add_argument("--frame_num", type=int, help="frames of each clip, 4n+1; default: 81, or fewer if declared")
    parser.add_argument("--redo", type=int, metavar="K", help="make clip K, counted from 1, again with another seed")
    parser.add_argument("--keep_following", action="store_true", help="with --redo: keep the clips after K as they are")
    parser.add_argument("--storyboard", metavar="FILE", help="what is different in which clip: YAML, JSON or text")
    parser.add_argument("--best_of", type=int, default=1, metavar="N", help="of N candidates keep the best seam's")
    parser.add_argument("--include_source", action="store_true", help="begin the joined video with --video, and sound")
    parser.add_argument("--dry_run", action="store_true", help="print the plan of the run and make nothing")
    parser.add_argument(
        "--custom_prompt",
        default="continue video",
        help="goes before each description, and before --prompt (default: %(default)r)",
    )
    return parser


def _add_common(parser: Parser) -> None:
    add = parser.add_argument
    add("--ckpt_dir", required=True, help="checkpoint folder, official or diffusers layout, or a hub id")
    for name, expert in (("dit", "5B"), ("dit_high", "A14B, high noise"), ("dit_low", "A14B, low noise")):
        add(f"--{name}", metavar="FILE", help=f"a .gguf or .safetensors denoiser in place of the folder's ({expert})")
    add("--prompt", help="what happens; when a video is continued the default is its description by the VLM")
    add("--size", help="width*height: the area to fill; the aspect is the input's. Default: the task's first size")
    add("--base_seed", type=int, default=-1, help="seed; negative draws one (default)")
    add("--preset", choices=tuple(PRESETS), default="quality", help="settings that go together; turbo needs LoRAs")
    add("--sample_solver", choices=SOLVERS, help="default: the preset's, or unipc")
    add("--sample_steps", type=int, help="solver steps; default: the preset's, or the model's")
    add("--sample_shift", type=float, help="sigma shift; default: the preset's, or the model's")
    add("--sample_guide_scale", type=_guidance, metavar="G or LOW,HIGH", help="guidance; default: likewise")
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guidance only at sigmas from LOW to HIGH, one forward outside; 0 1: everywhere (default)",
    )
    add(
        "--cache",
        metavar="NAME[:S]",
        help=f"reuse what changes little between steps: off (default), {', '.join(CACHES)}; S: how freely",
    )
    add("--offload_model", type=_flag, default=True, help="keep only the model in use on the GPU (default: True)")
    add("--vram", type=_gib, metavar="GIB", help="keep to so much GPU memory; auto: to what is free now")
    add("--convert_model_dtype", action="store_true", help="round also the float32 parameters to the compute dtype")
    add(
        "--precision",
        choices=("bf16", "fp8", "fp8_attention"),
        help="of the denoiser's matrix products; fp8_attention: and of its attention (default: bf16)",
    )
    add(
        "--vae_dtype",
        choices=("float32", "float16"),
        help="of the VAE; float16 takes half of the time and memory, some 60 dB from float32 (default: float32)",
    )
    add("--compile", choices=("auto", "off"), default="auto", help="auto: compile the denoiser where it saves time")
    add("--t5_cpu", action="store_true", help="run the text encoder on the CPU")
    add("--vlm_path", help="InternVL folder or hub id; default: InternVL3_5-8B in or beside --ckpt_dir, else the hub's")
    add("--vlm_device", help="device of the VLM, for instance cuda:1; default: the main model's")
    add("--vlm_url", help="OpenAI-compatible endpoint to describe with, instead of a local VLM")
    add("--vlm_question", default="Describe this video in detail.", help="what the VLM is asked (default: %(default)r)")
    add("--vlm_trust_remote_code", action="store_true", help="run the code that comes with the VLM's checkpoint")
    add("--prompt_mode", choices=PROMPT_MODES, default="describe", help="what the VLM is asked for (default: describe)")
    add("--continuation", choices=CONTINUATIONS, help="what a clip knows of the one before (default: last_frame)")
    add(
        "--context_frames",
        type=int,
        metavar="K",
        help="frames that are known: 1, or 5, 9, 13, 17 with tail (default: 5)",
    )
    add("--anchor_image", help="the picture that svi2pro holds on to; default: a sharp one from before the end")
    add("--end_image", help="the last frame (of the last clip); A14B")
    for name, expert in (("lora", "5B"), ("lora_high", "A14B, high noise"), ("lora_low", "A14B, low noise")):
        add(
            f"--{name}",
            action="append",
            metavar="PATH[:S]",
            help=f"merge a LoRA with strength S ({expert}); repeatable",
        )
    add(
        "--drift_correction",
        type=float,
        nargs="?",
        const=0.9,
        default=0.0,
        metavar="S",
        help="take out colour drift, with strength S from 0 to 1 (default without S: 0.9)",
    )
    add("--num_segments", type=int, default=8, help="frames the VLM sees (default: 8)")
    add("--video_reader", choices=("auto", "pyav", "decord"), default="auto", help="what samples the VLM's frames")
    add("--no_video_metadata", action="store_true", help="do not write prompt and settings into the mp4")
    add("--ulysses_size", type=int, default=1, help="not supported yet beyond 1")
    add("--t5_fsdp", action="store_true", help="not supported yet")
    add("--dit_fsdp", action="store_true", help="not supported yet")


def _flag(text: str) -> bool:
    """Wan2.2's str2bool."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def _gib(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        size = float(text)
    except ValueError:
        size = 0
    if not 1 <= size < 4096:
        raise argparse.ArgumentTypeError(f"expected auto or a number of GiB, for instance 12, not {text!r}")
    return size


def _guidance(text: str) -> tuple[float, float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if len(scales) not in (1, 2) or not all(math.isfinite(scale) for scale in scales):
        raise argparse.ArgumentTypeError(f"expected one number or LOW,HIGH, not {text!r}")
    return scales[0], scales[-1]


def check_world(args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Refuse what needs several GPUs, until that is there, rather than ignore it. Raises UserError."""
    asked = [f"--ulysses_size {args.ulysses_size}"] if args.ulysses_size != 1 else []
    asked += [f"--{name}" for name in ("t5_fsdp", "dit_fsdp") if getattr(args, name)]
    if environment.get("WORLD_SIZE", "1") not in ("", "0", "1"):  # a launcher such as torchrun sets it
        asked.append(f"WORLD_SIZE={environment['WORLD_SIZE']}")
    if asked:
        raise UserError(f"{', '.join(asked)}: several GPUs are not supported yet; run one process without it")


def choose_task(given: str | None, found: tuple[int, int], video: str | None, image: str | None) -> str:
    """The task, told from the checkpoint's (experts, input channels) unless it is given. Raises UserError."""
    if given is None:
        by_kind = {(2, 36): ("i2v-A14B", "v2v-14B"), (1, 48): ("ti2v-5B", "v2v-5B"), (2, 16): ("t2v-A14B", "t2v-A14B")}
        if found not in by_kind:
            raise UserError(f"--ckpt_dir holds a denoiser with {found[1]} input channels, which no task is for")
        given = by_kind[found][video is not None]
    if video is not None and given not in V2V_TASKS:
        raise UserError(f"--task {given} takes no --video; use --task v2v-14B or v2v-5B with their checkpoints")
    if video is None and given in V2V_TASKS:
        raise UserError(f"--task {given} needs --video, the clip to continue")
    if image is not None and given not in ("i2v-A14B", "ti2v-5B"):
        raise UserError(f"--task {given} takes no --image")
    if image is None and given == "i2v-A14B":
        raise UserError("--task i2v-A14B needs --image, the first frame")
    return given


def choose_size(given: str | None, config: ModelConfig, folder: Path) -> tuple[int, int]:
    """(width, height) of `--size`, which must be on the task's list. Raises UserError."""
    size = given or config.sizes[0]
    parse_size(size)
    if size not in config.sizes:
        raise UserError(f"--size {size} is not one of {', '.join(config.sizes)} that {config.name} in {folder} takes")
    return parse_size(size)


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with numbers in range. Raises UserError."""
    args = parser.parse_args(argv)
    for name in ("num_videos", "redo", "num_segments", "sample_steps", "frame_num", "best_of"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, {value} is not")
    for name in ("prompt", "custom_prompt", "vlm_question"):
        if any("\ud800" <= char <= "\udfff" for char in getattr(args, name, None) or ""):
            raise UserError(f"--{name} is not valid UTF-8; set the terminal to UTF-8 or type it again")
    if args.base_seed + (getattr(args, "num_videos", None) or 1) > 2**63:
        raise UserError(f"--base_seed {args.base_seed} is too large; the largest seed is 2**63-1")
    if hasattr(args, "num_videos") and args.frame_num is not None and args.frame_num < 5:
        raise UserError(f"--frame_num {args.frame_num}: a clip of a chain needs at least 5 frames")
    if not 0 <= args.drift_correction <= 1:
        raise UserError(f"--drift_correction must be from 0 to 1, {args.drift_correction} is not")
    if args.video is None:
        names = ("continuation", "context_frames", "anchor_image", "drift_correction", "prompt_mode")
        if asked := [name for name in names if getattr(args, name) not in (None, 0.0, "describe")]:
            raise UserError(f"--{asked[0]} goes with --video, the clip to continue")
    if args.vram is not None and not args.offload_model:
        raise UserError("--vram needs --offload_model True, with which only the model in use is on the GPU")
    if args.cache is not None:
        StepCache.parse(args.cache)
    context = Context.choose(args.continuation, args.context_frames)
    if args.anchor_image is not None and context.mode != "svi2pro":
        raise UserError("--anchor_image goes with --continuation svi2pro")
    if getattr(args, "keep_following", False) and args.redo is None:
        raise UserError("--keep_following goes with --redo K")
    if args.vlm_url is not None and not args.vlm_url.startswith(("http://", "https://")):
        raise UserError(f"--vlm_url must begin with http:// or https://, {args.vlm_url!r} does not")
    return args
