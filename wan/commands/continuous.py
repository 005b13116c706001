"""`generate_continuous.py`: a chain of clips that goes on where the last run stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.commands.job import Job
from wan.errors import UserError
from wan.flags import continuous_flags
from wan.progress import Progress
from wan.run_folder import FinishedClip, RunFolder, file_digest, fingerprint, sampled_digest
from wan.types import Footage, Generation

if TYPE_CHECKING:
    from wan.continuation import Plan, VideoContinuation


def continue_video(argv: Sequence[str] | None) -> None:
    """Flags -> a folder of clips; prints the joined video's name. Raises UserError."""
    job = Job.read(continuous_flags(), argv)
    output = Path(job.args.output_dir)
    _check_folder(output, Path(job.args.video))

    from wan.continuation import VideoFile, chain

    footage = VideoFile(job.args.video, job.args.video_reader)
    continuation = job.open_continuation()
    plan = job.plan(continuation, footage, job.args.custom_prompt)
    with RunFolder(output) as folder:
        run = ChainRun(job, folder, _settings(job, continuation, plan))
        with Progress("", clips=run.count) as progress:

            def extend(source: Footage, seed: int) -> Generation:
                progress.begin(f"clip {run.next}/{run.count}")
                return continuation.extend(source, seed, plan, progress)

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
                    run.save(made)
                    progress.finish_clips()
            except BaseException as error:
                _say_what_is_there(run, error)
                raise
        print(run.finish("finished"))


def _say_what_is_there(run: ChainRun, error: BaseException) -> None:
    if not run.clips:
        return
    print(f"{len(run.clips)} of {run.count} clips are finished in {run.folder.path}", file=sys.stderr)
    without = f" without --redo {run.job.args.redo}" if run.job.args.redo else ""
    print(f"the same command{without} goes on from there", file=sys.stderr)
    try:
        run.finish("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}")
    except (OSError, UserError) as also:  # a full disk, say: what stopped the run is the news, not this
        print(f"they are not joined: {also}", file=sys.stderr)


class ChainRun:
    """One run in a folder: which of its clips are there already, and what is written about the others.

    A clip that is there counts if it was made with the same settings, seed and predecessor. Raises UserError if the
    folder holds another run.
    """

    def __init__(self, job: Job, folder: RunFolder, common: dict[str, Any]) -> None:
        self.job, self.folder = job, folder
        self.count = int(job.args.num_videos)
        self.started = time.perf_counter()
        found, before = folder.clips(), folder.run
        self.base_seed = _base_seed(job.args.base_seed, before)
        self.seeds = {int(number): int(seed) for number, seed in before.get("seeds", {}).items()}  # by --redo
        self.accepted = set(before.get("accepted", []))  # fingerprints that --keep_following vouched for
        if job.args.redo is not None:
            self._redo(job.args.redo, found)
        self.settings: dict[int, dict[str, Any]] = {}  # by clip number, counted from 1
        self.clips: dict[int, FinishedClip] = {}
        parent = file_digest(Path(job.args.video))
        for number in range(1, self.count + 1):
            seed = self.seeds.get(number, self.base_seed + number - 1)
            wanted = self.settings[number] = common | {"parent": parent, "seed": seed}
            clip = found.get(number)
            if clip is not None and (clip.settings == wanted or clip.fingerprint in self.accepted):
                self.clips[number] = clip
            elif clip is not None:
                self._check_same_run(clip, wanted)
            parent = self.clips[number].fingerprint if number in self.clips else fingerprint(wanted)

    @property
    def next(self) -> int:
        """The number of the first clip that is missing."""
        return next(number for number in range(1, self.count + 1) if number not in self.clips)

    def _redo(self, number: int, found: dict[int, FinishedClip]) -> None:
        if number not in found:
            there = f"clips {min(found)} to {max(found)}" if found else "no finished clip"
            raise UserError(f"--redo {number}: {self.folder.path} holds {there}")
        if number > self.count:
            raise UserError(f"--redo {number} is beyond --num_videos {self.count}")
        self.seeds[number] = _base_seed(-1, {})
        if self.job.args.keep_following:
            self.accepted |= {clip.fingerprint for other, clip in found.items() if other > number}
        else:
            self.accepted -= {clip.fingerprint for other, clip in found.items() if other > number}
        self.accepted.discard(found[number].fingerprint)

    def _check_same_run(self, clip: FinishedClip, wanted: dict[str, Any]) -> None:
        """A clip that only follows another clip now is made again; anything else is another run."""
        keys = sorted(wanted.keys() | clip.settings.keys())
        differ = [key for key in keys if wanted.get(key) != clip.settings.get(key)]
        if clip.number > 1 and "parent" in differ:
            differ.remove("parent")
        if clip.number in self.seeds and "seed" in differ:
            differ.remove("seed")
        if differ:
            plain = {"parent": "another video", "checkpoint": "another checkpoint", "config": "another wan_config.json"}
            named = [plain.get(key, f"{key} {clip.settings.get(key)!r}, now {wanted.get(key)!r}") for key in differ]
            raise UserError(
                f"--output_dir {self.folder.path} holds a run with other settings ({'; '.join(named[:3])}): "
                "give another folder, or the old settings to go on with it"
            )

    def save(self, made: Generation) -> None:
        """Put the next clip on disk."""
        number, args = self.next, self.job.args
        before = self.clips.get(number - 1)
        self.clips[number] = self.folder.save(
            number,
            max(2, len(str(self.count))),
            made,
            self.settings[number],
            self.job.describe(made, str(before.video) if before else args.video),
            num_segments=args.num_segments,
            metadata=not args.no_video_metadata,
        )
        self.report("running")

    def report(self, status: str, joined: Path | None = None) -> None:
        """`prompts_log.txt` and `run.json` as things stand."""
        clips = [self.clips[number] for number in sorted(self.clips)]
        self.folder.write_prompts(clips)
        self.folder.write_run(
            {
                "status": status,
                "clips_finished": len(clips),
                "clips_asked": self.count,
                "base_seed": self.base_seed,
                "seeds": {str(number): seed for number, seed in sorted(self.seeds.items())},
                "accepted": sorted(self.accepted),
                "joined": joined.name if joined else None,
                "seconds": round(time.perf_counter() - self.started, 3),
                "arguments": vars(self.job.args),
                "clips": [{"file": clip.video.name} | dict(clip.record) for clip in clips],
            }
        )

    def finish(self, status: str) -> Path | None:
        """Join the clips up to the first that is missing, and report."""
        videos = [self.clips[number].video for number in sorted(self.clips) if number < self.first_missing]
        joined = self.folder.path / "joined.mp4" if videos else None
        if joined is not None:
            summary = {"clips": [video.name for video in videos], "base_seed": self.base_seed}
            media.join_videos(videos, joined, metadata=None if self.job.args.no_video_metadata else summary)
        self.report(status, joined)
        return joined

    @property
    def first_missing(self) -> int:
        """The number of the first clip that is missing, one past the last if none is."""
        return self.next if len(self.clips) < self.count else self.count + 1


def _base_seed(given: int, before: dict[str, Any]) -> int:
    """The given seed; for a negative one that of the run so far, or a new one."""
    from wan.pipeline import draw_seed

    return int(before["base_seed"]) if given < 0 and "base_seed" in before else draw_seed(given)


def _settings(job: Job, continuation: VideoContinuation, plan: Plan) -> dict[str, Any]:
    """What every clip of the run is made with, as JSON values; offloading changes no result and is not among them."""
    described = plan.prompt is None
    checkpoint = continuation.checkpoint
    parts = (*checkpoint.experts.values(), checkpoint.vae, checkpoint.text_encoder)
    files = [(file.name, sampled_digest(file)) for weights in parts for file in weights.files]
    config = {name: str(value) for name, value in dataclasses.asdict(job.config).items()}
    settings = {
        "task": job.config.name,
        "checkpoint": fingerprint({"files": files}),
        "config": fingerprint(config),
        "convert_model_dtype": job.args.convert_model_dtype,
        "device": continuation.device.type,
        "text_device": continuation.text_device.type,
        "width": plan.geometry.width,
        "height": plan.geometry.height,
        "frames": plan.geometry.frames,
        **dataclasses.asdict(plan.sampling),
        "negative_prompt": plan.negative,
        "prompt": plan.prompt,
        "custom_prompt": plan.prefix,
        "num_segments": plan.num_segments if described else None,
        "vlm": (continuation.vlm_url or str(continuation.vlm_path)) if described else None,
        "vlm_question": continuation.vlm_question if described else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


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
