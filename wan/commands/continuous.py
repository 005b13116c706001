"""`generate_continuous.py`: a chain of clips that goes on where the last run stopped."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan import media
from wan.commands.chain_run import ChainRun, clip_settings, common_settings
from wan.commands.job import Job
from wan.commands.outline import outline
from wan.errors import UserError
from wan.flags import LORA_FLAGS, continuous_flags
from wan.progress import Progress
from wan.run_folder import RunFolder
from wan.storyboard import Scene, check_storyboard, read_storyboard
from wan.types import Context, Footage, Frame, Generation, Step

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from wan.continuation import VideoContinuation
    from wan.plan import Plan


def continue_video(argv: Sequence[str] | None) -> None:
    """Flags -> a folder of clips; prints the joined video's name. Raises UserError."""
    job = Job.read(continuous_flags(), argv)
    args = job.args
    scenes = read_storyboard(Path(args.storyboard)) if args.storyboard else ()
    if scenes:
        check_storyboard(Path(args.storyboard), scenes, config=job.config)
    output = Path(args.output_dir)
    _check_folder(output, Path(args.video))

    from wan.continuation import chain
    from wan.footage import VideoFile

    footage = VideoFile(args.video, args.video_reader)
    sound = media.find_sound(args.video) if args.include_source else None  # what is lost of it is said now
    continuation = job.open_continuation()
    plans = _plans(job, continuation, footage, scenes)
    common = common_settings(job, continuation)
    settings = [clip_settings(common, continuation, plan) for plan in plans]
    if args.dry_run:
        run = ChainRun(job, RunFolder(output), plans, settings, scenes, footage)
        print(*outline(continuation, plans, run), sep="\n")
        if args.include_source:
            print(f"sound of the source: {sound or 'none'}")
        return
    with RunFolder(output) as folder:
        run = ChainRun(job, folder, plans, settings, scenes, footage)
        if run.stale:
            print(
                f"clips {', '.join(map(str, run.stale))} of {output} follow from something else now and are made "
                "again; what was there moves to redone/",
                file=sys.stderr,
            )
        with Progress("", clips=run.count) as progress:

            def extend(source: Footage, seed: int) -> Generation:
                number = run.upcoming
                progress.begin(f"clip {number}/{run.count}")
                return continuation.extend(source, seed, plans[number - 1], on_step, memory=run.memory)

            def on_step(step: Step) -> None:
                run.check()  # a clip that could not be written stops the run now, not a clip later
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
                run.report("running")
                for made in clips:
                    progress.stage("write")
                    run.write(made, progress.finish_clips)
                run.wait()
            except BaseException as error:
                run.settle()
                _say_what_is_there(run, error)
                raise
        print(run.finish("finished"))


def _plans(job: Job, continuation: VideoContinuation, footage: Footage, scenes: Sequence[Scene]) -> list[Plan]:
    """The plan of every clip: the command line's, with what the storyboard says. Raises UserError."""
    from wan.continuation import CANDIDATE_STEP

    count = job.args.num_videos or len(scenes) or 12
    if count < len(scenes):
        log.warning("the storyboard has %d clips, --num_videos makes the first %d of them", len(scenes), count)
    if job.args.base_seed + count + job.args.best_of * CANDIDATE_STEP > 2**63:
        raise UserError(f"--base_seed {job.args.base_seed} is too large; the largest seed is 2**63-1")
    common = job.plan(continuation, footage, job.args.custom_prompt)

    @functools.cache
    def picture(path: Path) -> Frame:
        """A picture file in the clips' size: the file itself may be large."""
        return continuation.frame_for(media.read_image(path), common.geometry.width, common.geometry.height)

    plans: list[Plan] = []
    anchor = common.anchor
    for number in range(1, count + 1):
        # the end image of the command line is where the whole chain ends
        end = common.end if number == count else None
        plan = dataclasses.replace(common, number=number, count=count, end=end, anchor=anchor)
        if number <= len(scenes):
            scene = scenes[number - 1]
            try:
                plan = _staged(continuation, plan, scene, picture)
                continuation.check(plan)
            except UserError as error:
                raise UserError(f"{job.args.storyboard}, line {scene.line}: {error}") from error
            if isinstance(scene.cut, Path) and anchor is not None and not job.args.anchor_image:
                anchor = picture(scene.cut)  # what is held on to is the new shot
        plans.append(continuation.settled(footage, plan) if number == 1 else plan)
    if any(plan.described for plan in plans):
        continuation.captioner  # noqa: B018  (a wrong --vlm_path is said now, not after an hour)
    return plans


def _staged(continuation: VideoContinuation, plan: Plan, scene: Scene, picture: Callable[[Path], Frame]) -> Plan:
    """A plan with what a scene says; `picture` reads a file."""
    old = plan.sampling
    loras = dict(plan.loras)
    for flag, expert in LORA_FLAGS.items():
        if (files := getattr(scene, flag)) is not None:
            loras[expert] = files
    return dataclasses.replace(
        plan,
        geometry=dataclasses.replace(plan.geometry, frames=scene.frames or plan.geometry.frames),
        sampling=continuation.sampling(
            scene.steps or old.steps,
            old.shift if scene.shift is None else scene.shift,
            old.solver,
            old.guidance if scene.guidance is None else scene.guidance,
            guidance_interval=old.guidance_interval,
            cache=str(old.cache or "off"),
        ),
        prompt=plan.prompt if scene.prompt is None else scene.prompt,
        context=plan.context if scene.context is None else Context.choose(None, scene.context),
        end=plan.end if scene.end_image is None else picture(scene.end_image),
        cut=picture(scene.cut) if isinstance(scene.cut, Path) else scene.cut,
        loras={expert: files for expert, files in loras.items() if files},
    )


def _say_what_is_there(run: ChainRun, error: BaseException) -> None:
    if not run.clips:
        return
    print(f"{len(run.clips)} of {run.count} clips are finished in {run.folder.path}", file=sys.stderr)
    without = f" without --redo {run.job.args.redo}" if run.job.args.redo else ""
    without += " --keep_following" if run.job.args.keep_following else ""
    print(f"the same command{without} goes on from there", file=sys.stderr)
    try:
        run.finish("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}")
    except (OSError, UserError) as also:  # a full disk, say: what stopped the run is the news, not this
        print(f"they are not joined: {also}", file=sys.stderr)


def _check_folder(output: Path, video: Path) -> None:
    """Raise UserError for a folder that cannot be written to, or in which a file would be lost."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; give a folder")
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise UserError(f"--output_dir {output} cannot be made: {parent} is a file")
    joined = output / "joined.mp4"
    if joined.exists() and (not (output / "run.json").exists() or (video.exists() and joined.samefile(video))):
        raise UserError(f"{joined} would be overwritten; give another --output_dir")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {output} cannot be used: {parent} is not writable")
