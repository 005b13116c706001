"""The two commands: flags -> one clip or a chain, files, exit codes, progress, sidecar json."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import __version__, media
from wan.configs import ModelConfig, config_for
from wan.errors import UserError
from wan.flags import check_world, choose_size, choose_task, continuous_flags, generate_flags, parse
from wan.types import Generation, Request, Step, to_uint8

if TYPE_CHECKING:
    from tqdm import tqdm

    from wan.continuation import Plan, VideoContinuation
    from wan.pipeline import Pipeline

OK, BUG, USER, INTERRUPTED = 0, 1, 2, 130


def generate_main(argv: Sequence[str] | None = None) -> int:
    """`generate.py`: returns the exit code."""
    return run(_generate, argv)


def continuous_main(argv: Sequence[str] | None = None) -> int:
    """`generate_continuous.py`: returns the exit code."""
    return run(_continue, argv)


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """The command's exit code: 2 and one line for what the user can put right, 130 when interrupted.

    A bug keeps its traceback, which makes Python exit with 1.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return command(argv)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _fail(f"{error.strerror}: {error.filename or 'while writing'}; free space or choose another folder")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return _fail(
            f"out of GPU memory ({str(error).splitlines()[0]}); "
            "try --offload_model True, --t5_cpu, --vlm_device cpu, a smaller --size or a smaller --frame_num"
        )


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USER


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


# ---------------------------------------------------------------------------------------------------- one clip


def _generate(argv: Sequence[str] | None) -> int:
    args = parse(generate_flags(), argv)
    check_world(args, dict(os.environ))
    if args.save_file is not None:
        media.check_output(args.save_file)
    folder, config, size = _checkpoint(args, args.image)
    if args.prompt is None and args.video is None:
        raise UserError(f"--task {config.name} needs --prompt")
    stem = Path(args.video or args.image or "").stem or args.prompt
    target = Path(
        args.save_file or f"{config.name}_{size[0]}x{size[1]}_{_slug(stem)}_{time.strftime('%Y%m%d_%H%M%S')}.mp4"
    )
    if args.video is not None and target.exists() and target.samefile(args.video):
        raise UserError(f"--save_file {target} is the input video; give another name")
    media.check_output(target)

    if args.video is not None:
        from wan.continuation import VideoFile
        from wan.pipeline import draw_seed

        footage = VideoFile(args.video, args.video_reader)
        continuation = _open_continuation(args, config, folder)
        plan = _plan(args, continuation, footage, size)
        with Progress(target.name) as progress:
            made = continuation.extend(footage, draw_seed(args.base_seed), plan, progress)
    else:
        pipeline = _open(args, config, folder)
        request = _request(args, pipeline, size)
        with Progress(target.name) as progress:
            made = pipeline.run(request, offload=args.offload_model, on_step=progress)
    record = describe(made, config, folder, args, args.video or args.image)
    _save(made, target, record, args)
    print(target)
    return OK


def _request(args: argparse.Namespace, pipeline: Pipeline, size: tuple[int, int]) -> Request:
    """The request of a t2v, i2v or ti2v run."""
    from wan.image2video import official_size
    from wan.pipeline import draw_seed
    from wan.textimage2video import best_size

    config, image = pipeline.config, None
    if args.image is not None:
        image = media.read_image(args.image)
        rule = official_size if config.model_type == "i2v" else best_size
        size = rule(image.width, image.height, size[0] * size[1])
    return Request(
        args.prompt,
        config.sample_neg_prompt,
        image,
        pipeline.geometry(*size, args.frame_num or config.frame_num),
        pipeline.sampling(
            args.sample_steps or config.sample_steps,
            config.sample_shift if args.sample_shift is None else args.sample_shift,
            args.sample_solver,
            args.sample_guide_scale or config.guidance,
        ),
        draw_seed(args.base_seed),
    )


# ---------------------------------------------------------------------------------------------------- a chain


def _continue(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(continuous_flags(), argv)
    check_world(args, dict(os.environ))
    folder, config, size = _checkpoint(args, None)
    output = Path(args.output_dir)
    _claim(output)

    from wan.continuation import VideoFile, chain
    from wan.pipeline import draw_seed

    footage = VideoFile(args.video, args.video_reader)
    continuation = _open_continuation(args, config, folder)
    plan = _plan(args, continuation, footage, size, args.custom_prompt)
    seed = draw_seed(args.base_seed)
    output.mkdir(parents=True, exist_ok=True)

    digits = max(2, len(str(args.num_videos)))
    clips: list[Path] = []
    records: list[dict[str, Any]] = []
    progress = Progress("", clips=args.num_videos)
    started = time.perf_counter()

    def extend(source: Any, clip_seed: int) -> Generation:
        progress.begin(f"clip {len(clips) + 1}/{args.num_videos}")
        return continuation.extend(source, clip_seed, plan, progress)

    def finish(status: str) -> Path | None:
        if not clips:
            return None
        joined = output / "joined.mp4"
        summary = {"clips": [clip.name for clip in clips], "base_seed": seed}
        media.join_videos(clips, joined, metadata=None if args.no_video_metadata else summary)
        run_record = {
            "status": status,
            "clips_finished": len(clips),
            "clips_asked": args.num_videos,
            "base_seed": seed,
            "joined": joined.name,
            "seconds": round(time.perf_counter() - started, 3),
            "arguments": vars(args),
            "clips": records,
        }
        _write_json(output / "run.json", run_record)
        return joined

    try:
        with progress:
            for made in chain(footage, count=args.num_videos, extend=extend, seed=seed):
                clip = output / f"video_{len(clips) + 1:0{digits}d}_seed{made.request.seed}.mp4"
                record = describe(made, config, folder, args, str(clips[-1]) if clips else args.video)
                progress.stage("write")
                # the second frame starts a group of its own, so that joining can leave the repeated first one out
                _save(made, clip, record, args, keyframes=frozenset({0, 1}))
                clips.append(clip)
                records.append({"file": clip.name} | record)
                _log_prompt(output / "prompts_log.txt", clip.name, made.request)
                progress.finish_clip()
    except BaseException as error:
        print(f"{len(clips)} of {args.num_videos} clips are finished in {output}", file=sys.stderr)
        if len(clips) < args.num_videos:
            print(f"to go on: {_how_to_go_on(argv, clips, args, seed)}", file=sys.stderr)
        try:
            finish("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}")
        except (OSError, UserError) as also:  # a full disk, say: what stopped the run is the news, not this
            print(f"they are not joined: {also}", file=sys.stderr)
        raise
    print(finish("finished"))
    return OK


def _claim(output: Path) -> None:
    """Refuse a folder that already holds a run: nothing that is made may be lost. Raises UserError."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; give a folder")
    taken = [*output.glob("video_*"), *output.glob("joined.mp4"), *output.glob("run.json")]
    if taken:
        raise UserError(f"--output_dir {output} already holds a run ({taken[0].name}, …); give another folder")
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {output} cannot be made: {parent} is not writable")


def _log_prompt(path: Path, name: str, request: Request) -> None:
    with path.open("a", encoding="utf-8") as log:
        log.write(f"{name}\tseed {request.seed}\t{request.prompt}\n")


def _how_to_go_on(argv: Sequence[str], clips: Sequence[Path], args: argparse.Namespace, seed: int) -> str:
    """The command that makes the clips that are left."""
    changed = {"--base_seed": str(seed + len(clips)), "--num_videos": str(args.num_videos - len(clips))}
    if clips:
        changed |= {"--video": str(clips[-1]), "--output_dir": f"{args.output_dir.rstrip('/')}_2"}
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in changed:
            if not equals:
                next(words)
            continue
        kept.append(word)
    return shlex.join(["python", "generate_continuous.py", *kept, *(part for pair in changed.items() for part in pair)])


# ---------------------------------------------------------------------------------------------------- shared


def _checkpoint(args: argparse.Namespace, image: str | None) -> tuple[Path, ModelConfig, tuple[int, int]]:
    """The checkpoint folder, the row that fits, and the size, before any model library is imported for long."""
    from wan.modules.checkpoint import Names, identify, resolve_folder

    folder = resolve_folder(args.ckpt_dir)
    task = args.task or choose_task(None, identify(folder, Names()), args.video, image)
    task = choose_task(task, (0, 0), args.video, image)
    config = config_for(task, folder)
    return folder, config, choose_size(args.size, config, folder)


def _open(args: argparse.Namespace, config: ModelConfig, folder: Path, **continuing: Any) -> Any:
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
    return getattr(wan, classes[config.name])(
        config, folder, t5_cpu=args.t5_cpu, convert_model_dtype=args.convert_model_dtype, **continuing
    )


def _open_continuation(args: argparse.Namespace, config: ModelConfig, folder: Path) -> VideoContinuation:
    continuation: VideoContinuation = _open(
        args,
        config,
        folder,
        vlm_path=args.vlm_path,
        vlm_device=args.vlm_device,
        vlm_url=args.vlm_url,
        vlm_question=args.vlm_question,
        vlm_trust_remote_code=args.vlm_trust_remote_code,
        video_reader=args.video_reader,
    )
    return continuation


def _plan(
    args: argparse.Namespace,
    continuation: VideoContinuation,
    footage: Any,
    size: tuple[int, int],
    prefix: str = "",
) -> Plan:
    plan = continuation.plan(
        footage,
        max_area=size[0] * size[1],
        frame_num=args.frame_num,
        shift=args.sample_shift,
        solver=args.sample_solver,
        steps=args.sample_steps,
        guidance=args.sample_guide_scale,
        prompt=args.prompt,
        prefix=prefix,
        num_segments=args.num_segments,
        offload=args.offload_model,
    )
    if args.prompt is None:
        continuation.captioner  # noqa: B018  (a wrong --vlm_path is said now, not after an hour)
    return plan


def _save(
    made: Generation,
    target: Path,
    record: Mapping[str, Any],
    args: argparse.Namespace,
    keyframes: frozenset[int] = frozenset({0}),
) -> None:
    """The mp4 and beside it the json; the mp4 first, because that is what took the time."""
    frames = (to_uint8(frame) for frame in made.clip.frames)
    metadata = None if args.no_video_metadata else record
    media.write_video(target, frames, made.clip.fps, keyframes=keyframes, metadata=metadata)
    _write_json(target.with_suffix(".json"), record)


def describe(
    made: Generation, config: ModelConfig, folder: Path, args: argparse.Namespace, source: str | None
) -> dict[str, Any]:
    """The sidecar of a clip: everything that made it, and what it took."""
    from wan.placement import host_peak_gib

    request, geometry = made.request, made.request.geometry
    return {
        "task": config.name,
        "checkpoint": str(folder),
        "source": source,
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "seed": request.seed,
        "width": geometry.width,
        "height": geometry.height,
        "frames": geometry.frames,
        "fps": str(made.clip.fps),
        "sample_solver": request.sampling.solver,
        "sample_steps": request.sampling.steps,
        "sample_shift": request.sampling.shift,
        "sample_guide_scale": list(request.sampling.guidance),
        "param_dtype": str(config.param_dtype).removeprefix("torch."),
        "t5_dtype": str(config.t5_dtype).removeprefix("torch."),
        "convert_model_dtype": args.convert_model_dtype,
        "offload_model": args.offload_model,
        "vlm": None if args.prompt or not args.video else args.vlm_url or args.vlm_path or "default",
        "vlm_question": args.vlm_question,
        "num_segments": args.num_segments,
        "seconds": {stage: round(taken, 3) for stage, taken in made.seconds.items()},
        "peak_gpu_gib": None if made.peak_gib is None else round(made.peak_gib, 3),
        "peak_host_gib": round(host_peak_gib(), 3),
        "versions": versions(),
    }


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _slug(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)[:50].strip("_") or "clip"


class Progress:
    """One bar per clip with stage, step and time left, and above it the clips of a chain. Silent off a terminal."""

    def __init__(self, title: str, clips: int = 0) -> None:
        self.title = title
        self.clips = clips
        self.chain: tqdm[Any] | None = None
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        if self.clips:
            self.chain = self._new(total=self.clips, desc="chain", unit="clip", position=0)
        else:
            self.begin(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (self.bar, self.chain):
            if bar is not None:
                bar.close()

    def begin(self, title: str) -> None:
        """A new clip."""
        self.title = title
        if self.bar is not None:
            self.bar.close()
        self.bar = self._new(desc=title, unit="step", position=1 if self.clips else 0, leave=not self.clips)

    def stage(self, name: str) -> None:
        """What goes on now."""
        if self.bar is not None:
            self.bar.set_description(f"{self.title} {name}")

    def finish_clip(self) -> None:
        """One clip of the chain is on disk."""
        if self.chain is not None:
            self.chain.update()

    def __call__(self, step: Step) -> None:
        if self.bar is None:
            return
        self.bar.total = step.total
        self.stage(step.stage)
        if step.latents is None and step.index == 0:
            self.bar.reset(step.total)  # time left is counted from here, not from loading
        self.bar.update(step.index - self.bar.n)

    @staticmethod
    def _new(**options: Any) -> tqdm[Any]:
        from tqdm import tqdm

        return tqdm(disable=not sys.stderr.isatty(), dynamic_ncols=True, file=sys.stderr, **options)
