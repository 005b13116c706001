"""One run of a chain: which of its clips are there already, what is made, and what is written about them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wan import media
from wan.commands.job import Job, readable
from wan.errors import UserError
from wan.modules.checkpoint import sampled_digest
from wan.report import render_report, seam_thumbnails
from wan.run_folder import (
    FinishedClip,
    RunFolder,
    file_digest,
    fingerprint,
    write_json,
    write_text,
)
from wan.storyboard import Scene
from wan.types import Footage, Frame, Generation

if TYPE_CHECKING:
    from wan.continuation import VideoContinuation
    from wan.plan import Plan


SHEET_FRAMES = 4  # on each side of a seam


@dataclasses.dataclass(frozen=True)
class _Written:
    """A clip that is being put on disk."""

    number: int
    made: Generation
    done: Future[None]


class ChainRun:
    """One run in a folder: which of its clips are there already, and what is written about the others.

    A clip that is there counts if it was made with the same settings, seed and predecessor. One whose own settings
    have changed is made again, and so is what follows from it. Raises UserError if the folder holds another run.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        plans: Sequence[Plan],
        settings: Sequence[dict[str, Any]],
        scenes: Sequence[Scene],
        source: Footage,
    ) -> None:
        self.job, self.folder, self.plans, self.source = job, folder, plans, source
        self.count = len(plans)
        self._writer = ThreadPoolExecutor(1, "writer")
        self._written: _Written | None = None
        self.started = time.perf_counter()
        found, before = folder.clips(), folder.run
        self.base_seed = _base_seed(job.args.base_seed, before)
        self.drawn = job.args.base_seed < 0 and "base_seed" not in before
        self.scripted = {number: scene.seed for number, scene in enumerate(scenes, 1) if scene.seed is not None}
        over = {int(number): seed for number, seed in before.get("redone_over", {}).items()}
        self.redone = {  # seeds by --redo, unless the storyboard has another one by now
            int(number): int(seed)
            for number, seed in before.get("seeds", {}).items()
            if over.get(int(number)) == self.scripted.get(int(number))
        }
        # clips that --keep_following vouched for: their fingerprints, and that of the clip that they now go on from
        self.accepted = dict(before.get("accepted") or {})
        if job.args.redo is not None:
            self._redo(job.args.redo, found)
        self.seeds = self.scripted | self.redone
        self.settings: dict[int, dict[str, Any]] = {}  # by clip number, counted from 1
        self.clips: dict[int, FinishedClip] = {}
        self.stale: list[int] = []  # clips that are there and are made again
        parent = file_digest(Path(job.args.video))
        for number, own in enumerate(settings, 1):
            # a new shot depends on nothing before it
            before_it = None if plans[number - 1].is_cut else parent
            wanted = self.settings[number] = own | {"parent": before_it, "seed": self.seed(number)}
            clip = found.get(number)
            if clip is not None and self._counts(clip, wanted):
                self.clips[number] = clip
            elif clip is not None:
                self.stale.append(number)
                if number == min(found) and number != job.args.redo:
                    self._check_same_run(clip, wanted)
            parent = self.clips[number].fingerprint if number in self.clips else fingerprint(wanted)

    def _counts(self, clip: FinishedClip, wanted: Mapping[str, Any]) -> bool:
        """Whether a clip is what is wanted; --keep_following vouches for it after one other predecessor."""
        if clip.settings == wanted:
            return True
        if dict(clip.settings) | {"parent": wanted["parent"]} != wanted:
            return False
        args = self.job.args
        if args.keep_following and clip.number > args.redo:
            self.accepted[clip.fingerprint] = wanted["parent"]
        return bool(self.accepted.get(clip.fingerprint) == wanted["parent"])

    def seed(self, number: int) -> int:
        """The seed of a clip: by --redo, by the storyboard, or counted up from the first."""
        return self.seeds.get(number, self.base_seed + number - 1)

    @property
    def next(self) -> int:
        """The number of the first clip that is missing on disk."""
        return next(number for number in range(1, self.count + 1) if number not in self.clips)

    @property
    def upcoming(self) -> int:
        """The number of the clip that is to be made now: the first that is neither on disk nor on its way there."""
        written = set(self.clips) | ({self._written.number} if self._written else set())
        return next(number for number in range(1, self.count + 1) if number not in written)

    @property
    def memory(self) -> Mapping[str, Any]:
        """What the clip before the upcoming one noted for the prompts to come."""
        before = self.upcoming - 1
        if self._written and self._written.number == before:
            return self._written.made.notes.get("memory") or {}
        return self.clips[before].record.get("memory") or {} if before in self.clips else {}

    def _redo(self, number: int, found: dict[int, FinishedClip]) -> None:
        if number not in found:
            there = f"clips {min(found)} to {max(found)}" if found else "no finished clip"
            raise UserError(f"--redo {number}: {self.folder.path} holds {there}")
        if number > self.count:
            raise UserError(f"--redo {number} is beyond --num_videos {self.count}")
        self.redone[number] = _base_seed(-1, {})

    def _check_same_run(self, clip: FinishedClip, wanted: dict[str, Any]) -> None:
        """The first clip tells: what is different for it is different for all, and that is another run.

        A later one that only follows another clip now, or is told otherwise by its scene, is made again.
        """
        keys = sorted(wanted.keys() | clip.settings.keys())
        differ = [key for key in keys if wanted.get(key) != clip.settings.get(key)]
        if clip.number > 1 and "parent" in differ:
            differ.remove("parent")
        if clip.number in self.redone and "seed" in differ:
            differ.remove("seed")
        if differ:
            plain = {"parent": "another video", "checkpoint": "another checkpoint", "config": "another wan_config.json"}
            named = [plain.get(key, f"{key} {clip.settings.get(key)!r}, now {wanted.get(key)!r}") for key in differ]
            raise UserError(
                f"--output_dir {self.folder.path} holds a run with other settings ({'; '.join(named[:3])}): "
                f"give another folder, the old settings to go on with it, or --redo {clip.number} to make it again"
            )

    def write(self, made: Generation, then: Callable[[], None]) -> None:
        """Put the next clip on disk while the one after it is made, and call `then`; the one before is waited for.

        An error in it is raised by the `wait` or `check` that follows.
        """
        self.wait()

        def work() -> None:
            self.save(made)
            then()

        self._written = _Written(self.next, made, self._writer.submit(work))

    def wait(self) -> None:
        """Until what is being written is on disk."""
        if self._written is not None:
            try:
                self._written.done.result()
            except Exception:
                self._written = None
                raise
            self._written = None

    def check(self) -> None:
        """Raise the error of a clip that could not be written, without waiting for one that still may be."""
        if self._written is not None and self._written.done.done():
            self.wait()

    def settle(self) -> None:
        """Wait for what is being written when something else went wrong: an error in it is only said."""
        if self._written is not None:
            error = self._written.done.exception()
            if error is not None:
                print(f"clip {self._written.number} could not be written: {error}", file=sys.stderr)
            self._written = None

    def save(self, made: Generation) -> None:
        """Put the next clip on disk, with what was measured of it."""
        from wan.continuation import RECENT_SECONDS
        from wan.quality import measure_look

        number, args = self.next, self.job.args
        plan, before = self.plans[number - 1], self.clips.get(number - 1)
        following = self.plans[min(number, self.count - 1)]  # whose captioner will look at this clip
        recent = RECENT_SECONDS if following.prompt_mode == "continue" else None
        record = self.job.describe(made, str(before.video) if before else args.video, plan)
        record["look"] = measure_look(made.clip.frames).as_json()
        tail = (before or self.source).tail(SHEET_FRAMES, made.clip.fps)
        dropped = int(made.notes["dropped"])
        self.clips[number] = self.folder.save(
            number,
            max(2, len(str(self.count))),
            made,
            self.settings[number],
            record,
            samples=(following.num_segments, recent),
            sheet=seam_thumbnails(tail, made.clip.frames[dropped : dropped + SHEET_FRAMES]),
            metadata=not args.no_video_metadata,
        )
        self.report("running")

    def report(self, status: str, joined: Path | None = None) -> None:
        """`prompts_log.txt`, `run.json` and the report as things stand."""
        clips = [self.clips[number] for number in sorted(self.clips)]
        self.folder.write_prompts(clips)
        records = [{"file": clip.video.name} | dict(clip.record) for clip in clips]
        run = {
            "status": status,
            "clips_finished": len(clips),
            "clips_asked": self.count,
            "base_seed": self.base_seed,
            "seeds": {str(number): seed for number, seed in sorted(self.redone.items())},
            "redone_over": {str(number): self.scripted.get(number) for number in sorted(self.redone)},
            "accepted": dict(sorted(self.accepted.items())),
            "joined": joined.name if joined else None,
            "seconds": round(time.perf_counter() - self.started, 3),
            "arguments": {name: readable(value) if isinstance(value, str) else value for name, value in self._given()},
            "clips": records,
        }
        self.folder.write_run(run)
        page, data = render_report(run, records, [clip.sheet for clip in clips])
        write_json(self.folder.path / "report.json", data)
        write_text(self.folder.path / "report.html", page)

    def _given(self) -> list[tuple[str, Any]]:
        return sorted(vars(self.job.args).items())

    def finish(self, status: str) -> Path | None:
        """Join the clips up to the first that is missing, and report."""
        clips = [self.clips[number] for number in sorted(self.clips) if number < self.first_missing]
        joined = self.folder.path / "joined.mp4" if clips else None
        if joined is not None:
            self._join(clips, joined)
        self.report(status, joined)
        return joined

    def _join(self, clips: Sequence[FinishedClip], path: Path) -> None:
        args = self.job.args
        videos, drops = [clip.video for clip in clips], [clip.dropped for clip in clips]
        summary = {"clips": [video.name for video in videos], "base_seed": self.base_seed}
        metadata = None if args.no_video_metadata else summary
        if args.include_source:
            media.assemble(args.video, videos, path, drops=drops, metadata=metadata)
            return
        # one repeated frame is the source's last; more of them are another rendering of what is known
        media.join_videos(videos, path, drops=[0 if drops[0] == 1 else drops[0], *drops[1:]], metadata=metadata)

    @property
    def first_missing(self) -> int:
        """The number of the first clip that is missing, one past the last if none is."""
        return self.next if len(self.clips) < self.count else self.count + 1


def _base_seed(given: int, before: dict[str, Any]) -> int:
    """The given seed; for a negative one that of the run so far, or a new one."""
    from wan.pipeline import draw_seed

    return int(before["base_seed"]) if given < 0 and "base_seed" in before else draw_seed(given)


def common_settings(job: Job, continuation: VideoContinuation) -> dict[str, Any]:
    """What all clips of a run are made with, as JSON values; offloading changes no result and is not among them."""
    checkpoint = continuation.checkpoint
    parts = (*checkpoint.experts.values(), checkpoint.vae, checkpoint.text_encoder)
    files = [file for weights in parts for file in weights.files]
    # what only one option reads belongs to that option
    config = {name: str(value) for name, value in dataclasses.asdict(job.config).items() if name != "mag_ratios"}
    return {
        "task": job.config.name,
        "checkpoint": _digest_of(files),
        "config": fingerprint(config),
        "convert_model_dtype": job.args.convert_model_dtype,
        "device": continuation.device.type,
        "text_device": continuation.text_device.type,
    }


def clip_settings(common: Mapping[str, Any], continuation: VideoContinuation, plan: Plan) -> dict[str, Any]:
    """What a clip is made with, as JSON values, but for its seed and the clip before."""
    described = plan.described
    settings = dict(common) | {
        "width": plan.geometry.width,
        "height": plan.geometry.height,
        "frames": plan.geometry.frames,
        **plan.sampling.as_json(),
        "negative_prompt": plan.negative,
        "prompt": plan.prompt,
        "custom_prompt": plan.prefix,
        "num_segments": plan.num_segments if described else None,
        "vlm": _vlm_of(continuation) if described else None,
        "vlm_question": continuation.vlm_question if described else None,
    }
    # what is not used is not said, so that a run stays the same run when there is more to be said
    options = {
        "continuation": plan.context.mode if plan.context.mode != "last_frame" else None,
        "context_frames": plan.context.frames if plan.context.mode == "tail" else None,
        "anchor": _digest(plan.anchor),
        "end_image": _digest(plan.end),
        "cut": plan.cut if isinstance(plan.cut, bool) else _digest(plan.cut),
        "mag_ratios": _ratios_of(continuation) if plan.sampling.uses("magcache") else None,
        "loras": {name: [lora.as_json() for lora in files] for name, files in plan.loras.items()} or None,
        "prompt_mode": plan.prompt_mode if plan.prompt_mode != "describe" else None,
        "drift_correction": plan.drift_correction or None,
        "best_of": plan.best_of if plan.best_of > 1 else None,
        "video_reader": "decord" if described and continuation.video_reader == "decord" else None,
        "vlm_trust_remote_code": True if described and continuation.vlm_trust_remote_code else None,
    }
    settings |= {name: value for name, value in options.items() if value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _digest_of(files: Iterable[Path]) -> str:
    return fingerprint({"files": [(file.name, sampled_digest(file)) for file in files]})


def _vlm_of(continuation: VideoContinuation) -> str:
    """A local VLM by its weights, any other by its name."""
    name = str(continuation.vlm_path or "")
    if continuation.vlm_url:
        return readable(f"{continuation.vlm_url} {name}".strip())
    weights = sorted(Path(name).glob("*.safetensors"))
    return _digest_of(weights) if weights else readable(name)


def _ratios_of(continuation: VideoContinuation) -> str:
    return fingerprint({"mag_ratios": continuation.config.mag_ratios})


def _digest(picture: Frame | None) -> str | None:
    """A short digest of a picture."""
    if picture is None:
        return None
    array = picture.numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    return fingerprint({"shape": array.shape, "pixels": hashlib.sha256(array.tobytes()).hexdigest()})
