"""`generate_continuous.py`: a chain of clips that goes on where the last run stopped."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.chain.chain import ChainRun, chain
from wan.chain.dry_run import outline
from wan.chain.fingerprint import clip_settings
from wan.chain.run_folder import RunFolder
from wan.commands.flags import spell_flag
from wan.commands.job import Job
from wan.commands.outputs import check_folder
from wan.commands.progress import Progress, say
from wan.device.ranks import World
from wan.errors import UserError, spell
from wan.types import Footage, Frame, Generation, Step

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from wan.chain.plan import Plan
    from wan.continuation import VideoContinuation


def continue_video(
    job: Job, continuation: VideoContinuation | None = None, watch: Callable[[str, int, bool], Progress] = Progress
) -> None:
    """A folder of clips; prints the joined video's name. Raises UserError.

    `continuation` is a pipeline that is there already, `watch` makes what is told of each step.
    """
    settings = job.settings
    output = Path(settings.output_dir)
    check_folder(job, RunFolder(output))

    footage = job.footage()
    sound = media.find_sound(job.video) if settings.include_source else None  # what is lost of it is said now
    continuation = continuation or job.open_continuation()
    plans = _plans(job, continuation, footage)
    wanted = clip_settings(job.config, continuation, plans)
    if settings.dry_run:
        run = ChainRun(settings, job.scenes, RunFolder(output), plans, wanted, footage, job.describe)
        say(*outline(continuation, plans, run), *_damaged(run), *_shared(job, continuation))
        if settings.include_source:
            say(f"sound of the source: {sound or 'none'}")
        return
    with RunFolder(output, lock=not settings.no_lock) as folder:
        run = ChainRun(settings, job.scenes, folder, plans, wanted, footage, job.describe)
        for line in _damaged(run):
            print(line, file=sys.stderr)
        if run.stale:
            print(
                f"clips {', '.join(map(str, run.stale))} of {output} follow from something else now and are made "
                "again; what was there moves to redone/",
                file=sys.stderr,
            )
        with job.together(continuation), watch("", run.count, settings.quiet) as progress:

            def extend(source: Footage, seed: int) -> Generation:
                number = run.to_make
                progress.begin(f"clip {number}/{run.count}", seed)
                return continuation.extend(
                    source, seed, plans[number - 1], on_step, memory=run.prompt_memory, draft=run.draft(number)
                )

            def on_step(step: Step) -> None:
                run.writer.check()  # a clip that could not be written stops the run now, not a clip later
                progress(step)

            progress.finish_clips(len(run.clips))
            clips = chain(
                footage,
                count=run.count,
                extend=extend,
                seed=run.base_seed,
                finished={number - 1: clip for number, clip in run.clips.items()},
                seeds={number - 1: seed for number, seed in run.seeds.items()},
            )
            try:
                run.begin()
                for made in clips:
                    progress.stage("write")
                    run.write(made, progress.finish)
                run.writer.wait()
            except BaseException as error:
                if said := run.writer.settle():
                    print(said, file=sys.stderr)
                _say_what_is_there(run, error)
                raise
        say(str(run.finish("finished")))


def _plans(job: Job, continuation: VideoContinuation, footage: Footage) -> list[Plan]:
    """The plan of every clip: the command line's, with what the storyboard says. Raises UserError."""
    settings, scenes = job.settings, job.scenes
    count = settings.num_videos or len(scenes) or 12
    if count < len(scenes):
        log.warning("the storyboard has %d clips, `num_videos` makes the first %d of them", len(scenes), count)
    common = job.plan(continuation, footage)

    @functools.cache
    def picture(file: str) -> Frame:
        """A picture file in the clips' size: the file itself may be large."""
        return continuation.frame_for(media.read_image(file), common.geometry.width, common.geometry.height)

    plans: list[Plan] = []
    anchor = common.anchor
    for number in range(1, count + 1):
        # the end image of the command line is where the whole chain ends
        end = common.end if number == count else None
        plan = dataclasses.replace(common, number=number, count=count, end=end, anchor=anchor)
        if number <= len(scenes):
            scene = scenes[number - 1]
            own: dict[str, Any] = {} if "end_image" in scene.said else {"end": end}
            try:
                of_clip = {"anchor": anchor, "number": number, "count": count} | own
                plan = job.plan(continuation, footage, scene.over(settings), picture, **of_clip)
            except UserError as error:
                raise UserError(f"{settings.storyboard}, line {scene.line}: {error.marked}") from error
            if isinstance(scene.said.get("cut"), str) and anchor is not None and not settings.anchor_image:
                anchor = picture(scene.said["cut"])  # what is held on to is the new shot
        plans.append(continuation.with_available_context(footage, plan) if number == 1 else plan)
    return plans


def _shared(job: Job, continuation: VideoContinuation) -> list[str]:
    """A line about how several GPUs would share the work."""
    given = [size for size in (job.settings.ulysses_size, job.settings.cfg_size) if size != "auto"]
    world = job.world if job.world.size > 1 else World(size=math.prod(given))
    if world.size == 1:
        return []
    return [f"{world.size} GPUs: {spell(str(job.sizes(continuation, world)), spell_flag)}"]


def _damaged(run: ChainRun) -> list[str]:
    """A line for each clip that was finished and is not what was written."""
    return [f"clip {number} is made again: {why}" for number, why in run.damaged.items()]


def _say_what_is_there(run: ChainRun, error: BaseException) -> None:
    if not run.clips:
        return
    print(f"{len(run.clips)} of {run.count} clips are finished in {run.folder.path}", file=sys.stderr)
    settings = run.settings
    without = f" without --redo {settings.redo}" if settings.redo else ""
    without += " --keep_following" if settings.keep_following else ""
    print(f"the same command{without} goes on from there", file=sys.stderr)
    try:
        run.finish("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}")
    except (OSError, UserError) as also:  # a full disk, say: what stopped the run is the news, not this
        print(f"they are not joined: {also}", file=sys.stderr)
