"""`generate.py`: one clip."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wan import media
from wan.chain.dry_run import Effort, outline_clip, prompt_of
from wan.commands.finishing import Upscaling
from wan.commands.flags import spell_flag
from wan.commands.inputs import lora_files, sampling_of
from wan.commands.job import Job
from wan.commands.outputs import check_file, upscaled_name
from wan.commands.progress import Progress, counted, say
from wan.errors import spell
from wan.files import file_digest, numbered, write_json
from wan.options import settings_of
from wan.settings import check_end_image, check_motion_amplitude
from wan.sizes import begun_size
from wan.types import Generation, KnownFrames, Request, to_uint8

if TYPE_CHECKING:
    from wan.chain.plan import Plan
    from wan.pipeline import Pipeline


def generate(job: Job) -> None:
    """One mp4, its json beside it, and its name printed; or what that would be. Raises UserError."""
    settings = job.settings
    target = _target(job)
    check_file(job, target)

    one = _continuing(job) if settings.video is not None else _beginning(job)
    pipeline, plan = one.pipeline, one.plan
    upscaling = None if settings.upscale is None else Upscaling(job, one.effort.geometry)
    if settings.dry_run:
        say(*(spell(line, spell_flag) for line in _outline(job, target, one, upscaling)))
        return
    with job.gpus.together(pipeline, [one.effort]), Progress(target.name, quiet=settings.quiet) as progress:
        made = one.make(on_step=progress)
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


@dataclass(frozen=True)
class _Clip:
    """The clip that is asked for, whose models load when it is made: its prompt and known beginning, in words."""

    pipeline: Pipeline
    plan: Plan | None  # of a video that is continued
    effort: Effort
    prompt: str
    known: str
    make: Callable[..., Generation]


def _continuing(job: Job) -> _Clip:
    from wan.settings import draw_seed

    footage, continuation = job.footage(), job.open_continuation()
    plan = job.plan(continuation, footage)
    make = partial(continuation.extend, footage, draw_seed(job.settings.base_seed), plan)
    known = f"{plan.context.mode} {plan.context.frames}"
    return _Clip(continuation, plan, Effort.of(continuation, plan), prompt_of(plan), known, make)


def _beginning(job: Job) -> _Clip:
    pipeline = job.open()
    request = _request(job, pipeline)
    effort = Effort(request.geometry, request.sampling, job.offload, request.loras)
    known = "the image" if request.known.leading else ""
    return _Clip(pipeline, None, effort, request.prompt, known, partial(pipeline.run, request, offload=job.offload))


def _outline(job: Job, target: Path, clip: _Clip, upscaling: Upscaling | None) -> Iterator[str]:
    """The lines of `dry_run`. Raises UserError."""
    geometry, sampling, seed = clip.effort.geometry, clip.effort.sampling, job.settings.base_seed
    size = f"{geometry.width}x{geometry.height}"
    named = "" if job.settings.save_file else ", whose name has the time"
    yield (
        f"a clip of {counted(geometry.frames, 'frame')} of {size} at {clip.pipeline.config.sample_fps} frames per "
        f"second, in {target}{named}"
    )
    drawn = "drawn" if seed < 0 else seed
    known = " and ".join(filter(None, (clip.known, job.settings.end_image and "the end image"))) or "nothing"
    yield f"{counted(sampling.steps, 'step')} of {sampling.solver}, seed {drawn}, known: {known}"
    yield f"prompt: {' '.join(clip.prompt.split())}"
    gpus = job.gpus.outline(clip.pipeline, [clip.effort])  # before memory is told, which it divides
    yield from outline_clip(clip.pipeline, clip.effort)
    yield from gpus
    if upscaling is not None:
        yield upscaling.outline(str(upscaled_name(target)), geometry.frames)


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
