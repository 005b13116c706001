"""What both commands share: flags and a checkpoint folder -> a pipeline, a plan, and the record of a clip."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import __version__, media
from wan.configs import ModelConfig, config_for
from wan.flags import DIT_FLAGS, LORA_FLAGS, Parser, check_world, choose_size, choose_task, parse
from wan.types import Context, Footage, Generation

CHAIN_FRAMES = 81  # of each clip of a chain, whatever the task

if TYPE_CHECKING:
    from wan.continuation import VideoContinuation
    from wan.modules.lora import LoraFile
    from wan.plan import Plan


@dataclass(frozen=True)
class Job:
    """The flags, and what they mean with the checkpoint folder: its config row and the size (width, height)."""

    args: argparse.Namespace
    folder: Path
    config: ModelConfig
    size: tuple[int, int]

    @classmethod
    def read(cls, parser: Parser, argv: Sequence[str] | None) -> Job:
        """Flags checked against the checkpoint's files, before any model library is imported. Raises UserError."""
        from wan.modules.checkpoint import Names, identify, identify_files, resolve_folder

        args = parse(parser, argv)
        check_world(args, dict(os.environ))
        _check_files(args)
        image = getattr(args, "image", None)
        files = _dit_files(args)
        by_files = identify_files(files) if files else None
        folder = resolve_folder(args.ckpt_dir, files)  # which may download it
        found = (0, 0) if args.task else by_files or identify(folder, Names())
        config = config_for(choose_task(args.task, found, args.video, image), folder)
        if args.vae_dtype or args.precision:
            config = _with_dtypes(config, args)
        if hasattr(args, "num_videos") and args.frame_num is None:
            args.frame_num = min(CHAIN_FRAMES, config.frame_num)  # a checkpoint may declare that it makes fewer
        return cls(args, folder, config, choose_size(args.size, config, folder))

    def open(self, **continuing: Any) -> Any:
        """The pipeline of the task; its models load when they are used."""
        import transformers

        import wan

        transformers.utils.logging.disable_progress_bar()  # it would be drawn through ours, and into log files
        classes = {
            "t2v-A14B": "WanT2V",
            "i2v-A14B": "WanI2V",
            "ti2v-5B": "WanTI2V",
            "v2v-14B": "WanV2V",
            "v2v-5B": "WanV2V5B",
        }
        args = self.args
        return getattr(wan, classes[self.config.name])(
            self.config,
            self.folder,
            t5_cpu=args.t5_cpu,
            convert_model_dtype=args.convert_model_dtype,
            dit_files=_dit_files(args),
            compile_blocks=args.compile == "auto",
            vram=args.vram,
            **continuing,
        )

    def open_continuation(self) -> VideoContinuation:
        """The pipeline of a v2v task."""
        args = self.args
        continuation: VideoContinuation = self.open(
            vlm_path=args.vlm_path,
            vlm_device=args.vlm_device,
            vlm_url=args.vlm_url,
            vlm_question=args.vlm_question,
            vlm_trust_remote_code=args.vlm_trust_remote_code,
            video_reader=args.video_reader,
        )
        return continuation

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        """The sigmas between which guidance is used, as far as they are given."""
        given = self.args.guidance_interval
        return None if given is None else (given[0], given[1])

    @property
    def loras(self) -> dict[str, tuple[LoraFile, ...]]:
        """The LoRA files by the expert that they are for."""
        from wan.modules.lora import LoraFile

        given = {expert: getattr(self.args, flag) or () for flag, expert in LORA_FLAGS.items()}
        return {expert: tuple(LoraFile.parse(text) for text in texts) for expert, texts in given.items() if texts}

    def plan(self, continuation: VideoContinuation, footage: Footage, prefix: str = "") -> Plan:
        """How the footage is continued. Raises UserError, also for a VLM that is not there."""
        args = self.args
        plan = continuation.plan(
            footage,
            max_area=self.size[0] * self.size[1],
            frame_num=args.frame_num,
            shift=args.sample_shift,
            solver=args.sample_solver,
            steps=args.sample_steps,
            guidance=args.sample_guide_scale,
            guidance_interval=self.guidance_interval,
            cache=args.cache,
            preset=args.preset,
            prompt=args.prompt,
            prefix=prefix,
            num_segments=args.num_segments,
            offload=args.offload_model,
            context=Context.choose(args.continuation, args.context_frames),
            anchor=media.read_image(args.anchor_image) if args.anchor_image else None,
            end=media.read_image(args.end_image) if args.end_image else None,
            loras=self.loras,
            prompt_mode=args.prompt_mode,
            drift_correction=args.drift_correction,
            best_of=getattr(args, "best_of", 1),
        )
        if plan.described:
            continuation.captioner  # noqa: B018  (a wrong --vlm_path is said now, not after an hour)
        return plan

    def describe(self, made: Generation, source: str | None, plan: Plan | None = None) -> dict[str, Any]:
        """The sidecar of a clip: everything that made it, and what it took. `plan` is that of a continuation."""
        from wan.placement import host_peak_gib

        request, geometry = made.request, made.request.geometry
        args, config = self.args, self.config
        record: dict[str, Any] = {
            "task": config.name,
            "checkpoint": readable(self.folder),
            "source": None if source is None else readable(source),
            "prompt": request.prompt,
            "negative_prompt": request.negative,
            "seed": request.seed,
            "size": args.size or config.sizes[0],
            "width": geometry.width,
            "height": geometry.height,
            "frames": geometry.frames,
            "fps": str(made.clip.fps),
            "sample_solver": request.sampling.solver,
            "sample_steps": request.sampling.steps,
            "sample_shift": request.sampling.shift,
            "sample_guide_scale": list(request.sampling.guidance),
            "guidance_interval": request.sampling.guidance_interval and list(request.sampling.guidance_interval),
            "cache": str(request.sampling.cache or "off"),
            "preset": args.preset,
            "param_dtype": str(config.param_dtype).removeprefix("torch."),
            "t5_dtype": str(config.t5_dtype).removeprefix("torch."),
            "low_precision": config.low_precision,
            "vae_dtype": str(config.vae_dtype).removeprefix("torch."),
            "convert_model_dtype": args.convert_model_dtype,
            "t5_cpu": args.t5_cpu,
            "offload_model": args.offload_model,
            "vram": args.vram,
            "end_image": request.known.end is not None,
        }
        if plan is not None:
            record |= {
                "continuation": plan.context.mode,
                "context_frames": plan.context.frames,
                "cut": plan.is_cut,
                "drift_correction": plan.drift_correction,
                "seam": made.seam,
                "prompt_mode": plan.prompt_mode,
                "custom_prompt": plan.prefix,
                "vlm": readable(args.vlm_url or args.vlm_path or "default") if plan.described else None,
                "vlm_device": args.vlm_device,
                "vlm_question": args.vlm_question,
                "num_segments": plan.num_segments,
                "video_reader": args.video_reader,
            }
        if files := _dit_files(args):
            record["dit_files"] = {expert: readable(file) for expert, file in files.items()}
        return record | {
            **made.notes,
            "seconds": {stage: round(taken, 3) for stage, taken in made.seconds.items()},
            "peak_gpu_gib": None if made.peak_gib is None else round(made.peak_gib, 3),
            "peak_host_gib": round(host_peak_gib(), 3),
            "versions": versions(),
        }


def _with_dtypes(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """The row with what `--vae_dtype` and `--precision` say in it."""
    import torch

    if args.vae_dtype:
        config = dataclasses.replace(config, vae_dtype=getattr(torch, args.vae_dtype))
    if args.precision == "bf16":
        return dataclasses.replace(config, param_dtype=torch.bfloat16, low_precision=None)
    return dataclasses.replace(config, low_precision=args.precision or config.low_precision)


def _check_files(args: argparse.Namespace) -> None:
    """Raise UserError for an input that cannot be read or an output that cannot be written, before any download."""
    if args.video:
        media.probe(args.video)
    for name in ("image", "end_image", "anchor_image"):
        if getattr(args, name, None):
            media.read_image(getattr(args, name))
    if getattr(args, "save_file", None):
        media.check_output(args.save_file)


def _dit_files(args: argparse.Namespace) -> dict[str, Path]:
    """The denoisers that come from a file of their own, by expert."""
    given = {expert: getattr(args, flag) for flag, expert in DIT_FLAGS.items()}
    return {expert: Path(file).expanduser() for expert, file in given.items() if file is not None}


def readable(path: str | Path) -> str:
    """A path as text: bytes of a file's name that are no UTF-8 become backslashes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def versions() -> dict[str, str]:
    """What is installed of everything that can change a result."""
    import torch

    # torch says which CUDA it was built for; its package's version does not
    found = {"wan-continue": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers", "av", "pillow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
