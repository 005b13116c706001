"""`generate_continuous.py`: a chain of clips that goes on where the last run stopped, and is led while it runs."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.chain.changes import in_words
from wan.chain.dry_run import Estimate, estimate, outline
from wan.chain.fingerprint import clip_settings
from wan.chain.finished_clip import FinishedClip
from wan.chain.inventory import Inventory
from wan.chain.run import ChainRun
from wan.chain.run_folder import PREVIEW, UPSCALED, RunFolder
from wan.chain.script import Script
from wan.chain.storyboard import Scene, ahead, check_storyboard, said_otherwise
from wan.commands.finishing import Upscaling
from wan.commands.flags import spell_flag
from wan.commands.inputs import read_scenes
from wan.commands.job import Job
from wan.commands.lines import PROGRESS
from wan.commands.outputs import check_folder
from wan.commands.plans import plans_of
from wan.commands.preview import Preview
from wan.commands.progress import Progress, say
from wan.commands.steering import Steering, ask, confirm, on_terminal, review
from wan.errors import UserError, spell
from wan.options import Settings, usual_clips
from wan.types import Footage, Generation, Geometry, OnStep, Step
from wan.vae.preview import CHANNELS

log = logging.getLogger(__name__)
told = logging.getLogger(PROGRESS)

if TYPE_CHECKING:
    from wan.continuation import VideoContinuation


def continue_video(job: Job) -> None:
    """A folder of clips; prints the joined video's name. Raises UserError."""
    chain = Chain(job)
    if job.settings.dry_run:
        say(*(spell(line, spell_flag) for line in chain.outline()))
        return
    for _ in chain:
        pass
    if chain.joined is not None:
        say(str(chain.joined))
    if chain.upscaled is not None:
        say(str(chain.upscaled))


class Chain:
    """A chain of clips in its folder, as `generate_continuous.py` makes it: every setting, and what is there is kept.

        with wan.Chain(wan.Settings(video="in.mp4", ckpt_dir="Wan2.2-TI2V-5B", output_dir="out", yes=True)) as chain:
            for clip in chain:
                print(clip.number, clip.video, clip.record["prompt"])

    Iterating makes the clips and hands out each when it is on disk, those that were there first. A loop that is left
    early, like `stop`, leaves a folder that the same lines go on with. `on_step` hears of stages and solver steps.
    `pipeline` is one that is there already, and `watch` makes what is told of clips, in place of bars and lines.
    Raises UserError before any model loads for what cannot be made.
    """

    def __init__(
        self,
        settings: Settings | Job,
        *,
        on_step: OnStep | None = None,
        pipeline: VideoContinuation | None = None,
        watch: Callable[[str, int, bool], Progress] = Progress,
    ) -> None:
        self.job = job = settings if isinstance(settings, Job) else Job.read("continuous", settings)
        self._is_commands = isinstance(settings, Job) and pipeline is None  # which makes nothing after this
        self.folder = Path(job.settings.output_dir)
        self.joined: Path | None = None  # the joined video, once the loop has ended
        self.upscaled: Path | None = None  # and the larger one, with `upscale`, when all clips are there
        self._on_step = on_step
        self._steering = Steering(self.folder)
        check_folder(job, RunFolder(self.folder))
        if not job.settings.dry_run:
            self._steering.check()
            if job.settings.review and not on_terminal():
                raise UserError("`review` asks after each clip, which needs a terminal; leave it out")
        self._footage = job.footage()
        # what is lost of it is said now
        self._sound = media.find_sound(job.video) if job.settings.include_source else None
        self._pipeline = job.open_continuation() if pipeline is None else pipeline
        self._watch = watch
        self._scripts = _Scripts(job, self._pipeline, self._footage)
        self._upscaling = None if job.settings.upscale is None else Upscaling(job, self._scripts.geometry)
        _check_preview(job)
        self._preview: Preview | None = None

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of the models; they are loaded again when they are next used."""
        self._pipeline.close()

    @property
    def status(self) -> str:
        """What the folder says of its last run: "finished", say; nothing before the first."""
        return str(RunFolder(self.folder).run.get("status") or "")

    def stop(self) -> None:
        """Stop after the clip that is being made; may be called from another thread or from `on_step`."""
        self._steering.stop()

    def outline(self) -> Iterator[str]:
        """The lines of `dry_run`: what would be made, how long that takes, and whether it fits."""
        job, inventory = self.job, self._scripts.inventory(RunFolder(self.folder))
        gpus = job.gpus.outline(self._pipeline, inventory.missing)
        yield from outline(self._pipeline, inventory)
        yield from (*inventory.damaged, *inventory.moved, *in_words(inventory.again))
        yield from gpus
        if self._upscaling is not None:
            # the frames of the source are not counted
            frames = sum(plan.shown - plan.fade_in for plan in inventory.plans)
            yield self._upscaling.outline(UPSCALED[0], frames)
        if job.settings.include_source:
            yield f"sound of the source: {self._sound or 'none'}"

    def estimate(self) -> Estimate:
        """What is still to be made, when all was checked that a run checks before its first clip. Raises UserError."""
        inventory = self._scripts.inventory(RunFolder(self.folder))
        _agree(inventory)
        return estimate(self._pipeline, inventory)

    def __iter__(self) -> Iterator[FinishedClip]:
        with closing(self.steps()) as steps:
            for clip in steps:
                if clip is not None:
                    yield clip

    def steps(self) -> Generator[FinishedClip | None, None, None]:
        """As iterating, with None where all is computed and only files are still to be written.

        From there another thread may go on, while this one uses the pipeline for another chain. With `upscale`, which
        computes until the end, there is no None.
        """
        settings = self.job.settings
        # what cannot be made is refused before there is a folder
        script = None if self.folder.exists() else self._scripts.inventory(RunFolder(self.folder)).script
        with RunFolder(self.folder, lock=not settings.no_lock) as folder:
            inventory = self._scripts.inventory(folder, script)
            for line in inventory.damaged:
                print(line, file=sys.stderr)
            _agree(inventory)
            run = ChainRun(inventory, self._footage, self.job.recorder.describe)
            with ExitStack() as team:
                team.enter_context(self.job.gpus.together(self._pipeline, inventory.missing))
                with (
                    self._watch("", inventory.count, settings.quiet) as progress,
                    self._steering.listening(),
                    _saying_what_is_there(run, progress),
                ):
                    handed_out = yield from self._make(run, progress)
                    team.close()
                    if self._upscaling is None:
                        yield None
                    run.writer.wait()
                    yield from (inventory.clips[number] for number in range(handed_out + 1, inventory.first_missing))
            missing = inventory.first_missing <= inventory.count
            if missing:
                _say_how_to_go_on(inventory)
            self.joined = run.finish("stopped" if missing else "finished")
            if self._upscaling is not None and not missing:
                self.upscaled = self._upscaling.of_chain(run, self._watch)

    def _make(self, run: ChainRun, progress: Progress) -> Generator[FinishedClip, None, int]:
        """Make what is missing; hands out each clip that nobody has a say in any more, and says how many those were."""
        handed_out, inventory = 0, run.inventory
        if self.job.settings.preview:
            self._preview = Preview(self.folder / PREVIEW, self._pipeline.fps, run.record.written)
        run.begin()
        progress.finish_clips(len(inventory.clips))
        while True:
            while handed_out + 1 in inventory.clips:
                handed_out += 1
                yield inventory.clips[handed_out]
            if run.to_make > inventory.count or not self._steering.goes_on():
                break
            self._scripts.read_again(run)
            progress.clips = inventory.count
            if (number := run.to_make) > inventory.count:
                break
            made = self._extend(run, number, progress)
            progress.stage("write")
            run.write(made, progress.finish)
            if self.job.settings.review:
                run.writer.wait()
                progress.rest()
                if not self._scripts.review(run, number):
                    self._steering.stop()
                if number not in inventory.clips:
                    progress.take_back()
        if self._is_commands:
            # giving tens of GB back takes the system seconds, which the last clip's writing takes too
            self._pipeline.close()
        return handed_out

    def _extend(self, run: ChainRun, number: int, progress: Progress) -> Generation:
        inventory = run.inventory

        def on_step(step: Step) -> None:
            run.writer.check()  # a clip that could not be written stops the run now, not a clip later
            for listener in (progress, self._preview, self._on_step):
                if listener is not None:
                    listener(step)

        def on_take(take: int, made: Generation) -> None:
            progress.stage("write")
            kept = run.keep_take(number, take, made)
            score = "" if made.seam is None else f", seam {made.seam['score']:.2f}"
            told.info("clip %d/%d take %d%s: %s", number, inventory.count, take, score, kept)

        progress.begin(f"clip {number}/{inventory.count}", inventory.seeds.of(number))
        return self._pipeline.extend(
            run.before(number),
            inventory.seeds.of(number),
            inventory.plan(number),
            on_step,
            memory=run.prompt_memory,
            draft=run.draft(number),
            on_take=on_take,
        )


def _check_preview(job: Job) -> None:
    if job.settings.preview and job.config.z_dim not in CHANNELS:
        known = " and ".join(map(str, CHANNELS))
        raise UserError(f"`preview` shows latents of {known} channels, this model has {job.config.z_dim}; leave it out")


class _Scripts:
    """What each clip of a run is to be, from the command line, the storyboard as it is now, and edited prompts."""

    def __init__(self, job: Job, continuation: VideoContinuation, footage: Footage) -> None:
        self.job, self.continuation, self.footage = job, continuation, footage
        self.read = self.scenes = job.scenes  # as the storyboard has them, and as the run follows them

    @property
    def geometry(self) -> Geometry:
        """The shape of the clips, of which each may have other frames."""
        return self.job.plan(self.continuation, self.footage, check=False).geometry

    def inventory(self, folder: RunFolder, script: Script | None = None) -> Inventory:
        """What a folder holds of the script, which is worked out unless it is known. Raises UserError."""
        job = self.job
        if script is None:
            script = self.script(_edited(self.scenes, folder.run.get("edited") or {}, job.settings.prompt))
        return Inventory(job.settings, script, folder)

    def script(self, scenes: Sequence[Scene], begun: int = 1) -> Script:
        """The plan of every clip, of which there are at least `begun`. Raises UserError."""
        settings = self.job.settings
        by_scenes = len(scenes) if settings.storyboard else 0
        ends = self.job.ends
        count = settings.num_videos or max(begun, by_scenes or len(ends) or usual_clips(settings))
        if ends and len(ends) != count:
            raise UserError(
                f"`end_images` {settings.end_images} holds {len(ends)} pictures, and {count} clips are to be made; "
                "give one for each"
            )
        if count < by_scenes:
            log.warning("the storyboard has %d clips, `num_videos` makes the first %d of them", by_scenes, count)
        plans = plans_of(self.job, self.continuation, self.footage, scenes[:count], count)
        return Script(scenes[:count], plans, clip_settings(self.job.config, self.continuation, plans))

    def read_again(self, run: ChainRun) -> None:
        """Follow the storyboard as it is now for the clips that are still to be begun, and say what is different."""
        settings = self.job.settings
        if not settings.storyboard:
            return
        begun, inventory = run.to_make - 1, run.inventory
        try:
            scenes = read_scenes(settings)
            if not (changed := said_otherwise(self.read, scenes)):
                return
            check_storyboard(Path(settings.storyboard), scenes, config=self.job.config)
            following = ahead(self.scenes, scenes, begun)
            script = self.script(_edited(following, inventory.choices.edited, settings.prompt), begun)
        except UserError as error:
            log.warning("%s; the run goes on with what the storyboard said before", error.marked)
            return
        run.writer.wait()
        before = inventory.script
        try:
            inventory.follow(script, begun)
        except UserError as error:
            inventory.follow(before, begun)
            log.warning("%s; the run goes on with what the storyboard said before", error.marked)
            return
        if len(remade := inventory.remade) > 1:
            inventory.follow(before, begun)
            log.warning(
                "the storyboard has changed, and finished clips would be made again (%s): that waits for the next run",
                "; ".join(in_words(remade)),
            )
        else:
            self.scenes = following
            self._say(changed, begun)
            for line in inventory.moved:
                told.info(line)
            inventory.put_in_place()
        self.read = scenes

    def _say(self, changed: Mapping[int, Sequence[str]], begun: int) -> None:
        past = [number for number in changed if number <= begun]
        told.info(
            "the storyboard has changed: %s",
            ", ".join(f"clip {number} ({', '.join(keys)})" for number, keys in changed.items()),
        )
        if past:
            told.info("clips up to %d are made already; what changed of them waits for the next run", begun)

    def review(self, run: ChainRun, number: int) -> bool:
        """Ask what is to become of a clip that was just made; whether the run goes on."""
        inventory = run.inventory
        clip = inventory.clips[number]
        answer = review(f"clip {number}/{inventory.count} {clip.video}")
        if answer == "edit":
            text = ask(f"the prompt was: {inventory.prompt(number) or clip.record['prompt']}\nthe new one:")
            if text:
                key, over = inventory.script.key(number), self._usual_prompt(number)
                inventory.choices.edited |= {key: {"prompt": text, "over": over}}
                scenes = _edited(self.scenes, inventory.choices.edited, self.job.settings.prompt)
                inventory.follow(self.script(scenes, number), number - 1)
        elif answer == "again":
            inventory.seeds.draw_again(number)
            inventory.follow(inventory.script, number - 1)
        if answer in ("edit", "again"):
            run.give_up()
        return answer != "stop"

    def _usual_prompt(self, number: int) -> str | None:
        """The prompt of a clip as the command line or the storyboard has it."""
        values: Mapping[str, Any] = self.scenes[number - 1].values if number <= len(self.scenes) else {}
        prompt: str | None = values.get("prompt", self.job.settings.prompt)
        return prompt


def _edited(scenes: Sequence[Scene], edited: Mapping[str, Any], usual: str | None) -> tuple[Scene, ...]:
    """The scenes with prompts that were edited in a review, as long as they are over the same ones."""
    count = max([len(scenes), *(int(key) for key in edited if key.isdecimal())])
    followed = []
    for number in range(1, count + 1):
        scene = scenes[number - 1] if number <= len(scenes) else Scene(0)
        one = edited.get(scene.values.get("name") or str(number))
        if one is not None and one["over"] == scene.values.get("prompt", usual):
            scene = dataclasses.replace(scene, values={**scene.values, "prompt": one["prompt"]})
        followed.append(scene)
    return tuple(followed)


def _agree(inventory: Inventory) -> None:
    """Say which finished clips are made again, and why; ask where there are several. Raises UserError."""
    path, remade = inventory.folder.path, inventory.remade
    asks = len(remade) > 1 and not inventory.settings.yes
    advice = "the old settings keep them, and another `output_dir` leaves them as they are"
    if asks and not on_terminal():
        raise UserError(
            f"{len(remade)} finished clips of {path} would be made again ({'; '.join(in_words(remade))}): give "
            f"`yes` for that; {advice}"
        )
    lines = [*inventory.moved, *(spell(line, spell_flag) for line in in_words(inventory.again))]
    if asks:
        lines = [f"{len(remade)} finished clips of {path} would be made again:", *(f"  {line}" for line in lines)]
    if inventory.changes:
        lines.append("what is replaced moves to redone/")
    for line in lines:
        print(line, file=sys.stderr)
    if asks and not confirm("make them again?"):
        raise UserError(f"nothing was made; {advice}")


def _say_how_to_go_on(inventory: Inventory) -> None:
    print(f"{len(inventory.clips)} of {inventory.count} clips are finished in {inventory.folder.path}", file=sys.stderr)
    settings = inventory.settings
    without = f" without --redo {settings.redo}" if settings.redo else ""
    without += " --keep_following" if settings.keep_following else ""
    print(f"the same command{without} goes on from there", file=sys.stderr)


@contextmanager
def _saying_what_is_there(run: ChainRun, progress: Progress) -> Iterator[None]:
    """Whatever stops the block: what was made of the run is written down, joined and said."""
    try:
        yield
    except BaseException as error:
        if fault := run.writer.settle():
            print(fault, file=sys.stderr)
        progress.rest()  # what is said next is the last, and in no bar's line
        _say_what_is_there(run, error)
        raise


def _say_what_is_there(run: ChainRun, error: BaseException) -> None:
    if not run.inventory.clips:
        return
    _say_how_to_go_on(run.inventory)
    statuses = {KeyboardInterrupt: "interrupted", GeneratorExit: "stopped"}  # the latter where a loop is left
    try:
        run.finish(statuses.get(type(error), f"failed: {type(error).__name__}"))
    except (OSError, UserError) as also:  # a full disk, say: what stopped the run is the news, not this
        print(f"they are not joined: {also}", file=sys.stderr)
