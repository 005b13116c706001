"""`generate.py`: one clip."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from wan import media
from wan.commands.finishing import Upscaling
from wan.commands.inputs import lora_files, sampling_of
from wan.commands.job import Job
from wan.commands.outputs import check_file
from wan.commands.progress import Progress, say
from wan.files import file_digest, numbered, write_json
from wan.options import settings_of
from wan.settings import check_end_image, check_motion_amplitude
from wan.sizes import begun_size
from wan.types import KnownFrames, Request, to_uint8

if TYPE_CHECKING:
    from wan.pipeline import Pipeline


def generate(job: Job) -> None:
    """One mp4, its json beside it, and its name printed. Raises UserError."""
    settings = job.settings
    target = _target(job)
    check_file(job, target)

    pipeline: Pipeline
    if settings.video is not None:
        from wan.settings import draw_seed

        footage = job.footage()
        pipeline = continuation = job.open_continuation()
        plan = job.plan(continuation, footage)
        upscaling = None if settings.upscale is None else Upscaling(job, plan.geometry)
        with job.gpus.together(continuation, [plan]), Progress(target.name, quiet=settings.quiet) as progress:
            made = continuation.extend(footage, draw_seed(settings.base_seed), plan, progress)
    else:
        pipeline, plan = job.open(), None
        request = _request(job, pipeline)
        upscaling = None if settings.upscale is None else Upscaling(job, request.geometry)
        with job.gpus.together(pipeline, [request]), Progress(target.name, quiet=settings.quiet) as progress:
            made = pipeline.run(request, offload=job.offload, on_step=progress)
    record = job.recorder.describe(made, settings.video or settings.image, plan)
    # giving tens of GB back takes the system seconds, which the writing takes as well
    with ThreadPoolExecutor(1) as beside:
        freed = beside.submit(pipeline.close)
        frames = (to_uint8(frame) for frame in made.clip.frames)
        metadata = None if settings.no_video_metadata else settings_of(record)
        media.write_video(target, frames, made.clip.fps, metadata=metadata)
        write_json(target.with_suffix(".json"), record | {"digests": {"mp4": file_digest(target)}})
    freed.result()
    say(str(target))
    if upscaling is not None:
        say(str(upscaling.of_clip(target, Progress)))


def _target(job: Job) -> Path:
    """`--save_file`, or a name made of task, size, input and time."""
    settings, (width, height) = job.settings, job.size
    if settings.save_file is not None:
        return Path(settings.save_file)
    source = settings.video or settings.image
    name = Path(source).stem if source else settings.prompt or ""
    # a name may have 255 bytes, of which a character takes up to four
    slug = re.sub(r"[^\w-]+", "_", name)[:50].encode()[:100].decode(errors="ignore").strip("_") or "clip"
    # the process number keeps runs that begin in the same second apart
    name = f"{job.config.name}_{width}x{height}_{slug}_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
    return next(path for free in numbered(name) if not (path := Path(f"{free}.mp4")).exists())


def _request(job: Job, pipeline: Pipeline) -> Request:
    """The request of a t2v, i2v or ti2v run."""
    from wan.settings import draw_seed

    settings, size, config, known = job.settings, job.size, pipeline.config, KnownFrames()
    if settings.image is not None:
        image = media.read_image(settings.image)
        size = begun_size(config.model_type, image.width, image.height, size[0] * size[1])
        known = KnownFrames((image,))
    if settings.end_image is not None:
        check_end_image(config, settings.frame_num or config.frame_num, len(known.leading))
        known = dataclasses.replace(known, end=media.read_image(settings.end_image))
    check_motion_amplitude(settings.motion_amplitude, config)
    loras = lora_files(settings)
    pipeline.models.check_loras(loras)
    pipeline.rules.check_distilled(settings.preset, loras)
    assert settings.prompt is not None  # seen to by the job
    return Request(
        settings.prompt,
        config.sample_neg_prompt,
        known,
        pipeline.geometry(*size, settings.frame_num or config.frame_num),
        sampling_of(settings, pipeline.rules),
        draw_seed(settings.base_seed),
        loras,
        settings.motion_amplitude,
    )
