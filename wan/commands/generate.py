"""`generate.py`: one clip."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan import media
from wan.commands.job import Job
from wan.errors import UserError
from wan.flags import generate_flags
from wan.progress import Progress
from wan.run_folder import write_json
from wan.types import Known, Request, to_uint8

if TYPE_CHECKING:
    from wan.pipeline import Pipeline


def generate(argv: Sequence[str] | None) -> None:
    """Flags -> one mp4, its json beside it, and its name printed. Raises UserError."""
    job = Job.read(generate_flags(), argv)
    args, config = job.args, job.config
    if args.prompt is None and args.video is None:
        raise UserError(f"--task {config.name} needs --prompt")
    target = _target(job)
    media.check_output(target)
    if args.video is not None and target.exists() and Path(args.video).exists() and target.samefile(args.video):
        raise UserError(f"--save_file {target} is the input video; give another name")

    if args.video is not None:
        from wan.footage import VideoFile
        from wan.pipeline import draw_seed

        footage = VideoFile(args.video, args.video_reader)
        continuation = job.open_continuation()
        plan = job.plan(continuation, footage)
        with Progress(target.name) as progress:
            made = continuation.extend(footage, draw_seed(args.base_seed), plan, progress)
    else:
        pipeline, plan = job.open(), None
        request = _request(job, pipeline)
        with Progress(target.name) as progress:
            made = pipeline.run(request, offload=args.offload_model, on_step=progress)
    record = job.describe(made, args.video or args.image, plan)
    frames = (to_uint8(frame) for frame in made.clip.frames)
    media.write_video(target, frames, made.clip.fps, metadata=None if args.no_video_metadata else record)
    write_json(target.with_suffix(".json"), record)
    print(target)


def _target(job: Job) -> Path:
    """`--save_file`, or a name made of task, size, input and time."""
    args, (width, height) = job.args, job.size
    if args.save_file is not None:
        return Path(args.save_file)
    name = Path(args.video or args.image).stem if args.video or args.image else args.prompt
    slug = re.sub(r"[^\w-]+", "_", name)[:50].strip("_") or "clip"
    # the process number keeps runs that begin in the same second apart
    name = f"{job.config.name}_{width}x{height}_{slug}_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
    names = (Path(f"{name}{again}.mp4") for again in ("", *(f"_{n}" for n in range(2, 1000))))
    return next(path for path in names if not path.exists())


def _request(job: Job, pipeline: Pipeline) -> Request:
    """The request of a t2v, i2v or ti2v run."""
    from wan.image2video import official_size
    from wan.pipeline import draw_seed
    from wan.textimage2video import best_size

    args, size, config, known = job.args, job.size, pipeline.config, Known()
    if args.image is not None:
        image = media.read_image(args.image)
        rule = official_size if config.model_type == "i2v" else best_size
        size = rule(image.width, image.height, size[0] * size[1])
        known = Known((image,))
    if args.end_image is not None:
        if config.model_type != "i2v":
            raise UserError(f"--end_image is for I2V-A14B; {config.name} knows no last frame")
        known = dataclasses.replace(known, end=media.read_image(args.end_image))
    pipeline.check_loras(job.loras)
    pipeline.check_distilled(args.preset, job.loras)
    return Request(
        args.prompt,
        config.sample_neg_prompt,
        known,
        pipeline.geometry(*size, args.frame_num or config.frame_num),
        pipeline.sampling(
            args.sample_steps,
            args.sample_shift,
            args.sample_solver,
            args.sample_guide_scale,
            guidance_interval=job.guidance_interval,
            cache=args.cache,
            preset=args.preset,
        ),
        draw_seed(args.base_seed),
        job.loras,
    )
