"""One run of a chain: which of its clips are there already, what is made, and what is written about them."""

from __future__ import annotations

import dataclasses
import functools
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
from wan.commands.job import Job
from wan.errors import UserError
from wan.files import file_digest, readable, sampled_digest, write_json, write_text
from wan.options import by_fingerprint_key, options_of
from wan.report import render_report, seam_thumbnails
from wan.run_folder import FinishedClip, RunFolder, fingerprint
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
        source: Footage,
    ) -> None:
        self.job, self.folder, self.plans, self.source = job, folder, plans, source
        self.count = len(plans)
        self._writer = ThreadPoolExecutor(1, "writer")
        self._written: _Written | None = None
        self.started = time.perf_counter()
        found, before = folder.clips(), folder.run
        self.base_seed = _base_seed(job.settings.base_seed, before)
        self.drawn = job.settings.base_seed < 0 and "base_seed" not in before
        self.scripted = {
            number: scene.said["seed"] for number, scene in enumerate(job.scenes, 1) if "seed" in scene.said
        }
        over = {int(number): seed for number, seed in before.get("redone_over", {}).items()}
        self.redone = {  # seeds by --redo, unless the storyboard has another one by now
            int(number): int(seed)
            for number, seed in before.get("seeds", {}).items()
            if over.get(int(number)) == self.scripted.get(int(number))
        }
        # clips that --keep_following vouched for: their fingerprints, and that of the clip that they now go on from
        self.accepted = dict(before.get("accepted") or {})
        if job.settings.redo is not None:
            self._redo(job.settings.redo, found)
        self.seeds = self.scripted | self.redone
        self.settings: dict[int, dict[str, Any]] = {}  # by clip number, counted from 1
        self.clips: dict[int, FinishedClip] = {}
        self.stale: list[int] = []  # clips that are there and are made again
        parent = file_digest(job.video)
        for number, own in enumerate(settings, 1):
            # a new shot depends on nothing before it
            before_it = None if plans[number - 1].is_cut else parent
            wanted = self.settings[number] = own | {"parent": before_it, "seed": self.seed(number)}
            clip = found.get(number)
            if clip is not None and self._counts(clip, wanted):
                self.clips[number] = clip
            elif clip is not None:
                self.stale.append(number)
                if number == min(found) and number != job.settings.redo:
                    self._check_same_run(clip, wanted)
            parent = self.clips[number].fingerprint if number in self.clips else fingerprint(wanted)

    def _counts(self, clip: FinishedClip, wanted: Mapping[str, Any]) -> bool:
        """Whether a clip is what is wanted; --keep_following vouches for it after one other predecessor."""
        if clip.settings == wanted:
            return True
        if dict(clip.settings) | {"parent": wanted["parent"]} != wanted:
            return False
        settings = self.job.settings
        if settings.keep_following and settings.redo is not None and clip.number > settings.redo:
            self.accepted[clip.fingerprint] = wanted["parent"]
        return bool(self.accepted.get(clip.fingerprint) == wanted["parent"])

    def seed(self, number: int) -> int:
        """The seed of a clip: by --redo, by the storyboard, or counted up from the first."""
        seed: int = self.seeds.get(number, self.base_seed + number - 1)
        return seed

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
            raise UserError(f"`redo` {number}: {self.folder.path} holds {there}")
        if number > self.count:
            raise UserError(f"`redo` {number} is beyond `num_videos` {self.count}")
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
            named = [_difference(key, clip.settings.get(key), wanted.get(key)) for key in differ]
            raise UserError(
                f"`output_dir` {self.folder.path} holds a run with other settings ({'; '.join(named[:3])}): "
                f"give another folder, the old settings to go on with it, or `redo` {clip.number} to make it again"
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

        number, job = self.next, self.job
        plan, before = self.plans[number - 1], self.clips.get(number - 1)
        following = self.plans[min(number, self.count - 1)]  # whose captioner will look at this clip
        recent = RECENT_SECONDS if following.prompt_mode == "continue" else None
        record = job.describe(made, str(before.video) if before else job.settings.video, plan)
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
            metadata=not job.settings.no_video_metadata,
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
            "arguments": self._arguments(),
            "clips": records,
        }
        self.folder.write_run(run)
        page, data = render_report(run, records, [clip.sheet for clip in clips])
        write_json(self.folder.path / "report.json", data)
        write_text(self.folder.path / "report.html", page)

    def _arguments(self) -> dict[str, Any]:
        """What the command was told, as JSON values."""
        given = {one.name: getattr(self.job.settings, one.name) for one in options_of("continuous") if one.flag}
        return {name: _plain(value) for name, value in sorted(given.items())}

    def finish(self, status: str) -> Path | None:
        """Join the clips up to the first that is missing, and report."""
        clips = [self.clips[number] for number in sorted(self.clips) if number < self.first_missing]
        joined = self.folder.path / "joined.mp4" if clips else None
        if joined is not None:
            self._join(clips, joined)
        self.report(status, joined)
        return joined

    def _join(self, clips: Sequence[FinishedClip], path: Path) -> None:
        settings = self.job.settings
        videos, drops = [clip.video for clip in clips], [clip.dropped for clip in clips]
        summary = {"clips": [video.name for video in videos], "base_seed": self.base_seed}
        metadata = None if settings.no_video_metadata else summary
        if settings.include_source:
            media.assemble(self.job.video, videos, path, drops=drops, metadata=metadata)
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


def _plain(value: Any) -> Any:
    """A setting as a JSON value; bytes of a file's name that are no UTF-8 become backslashes."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return readable(value) if isinstance(value, str) else value


def _difference(key: str, old: Any, new: Any) -> str:
    """What two fingerprints say differently, in the words of the settings."""
    plain = {"parent": "another video", "checkpoint": "another checkpoint", "config": "another wan_config.json"}
    if key in plain:
        return plain[key]
    setting = " or ".join(f"`{one.name}`" for one in by_fingerprint_key().get(key, ()) if one.flag) or key
    return f"{setting} {old!r}, now {new!r}"


def clip_settings(job: Job, continuation: VideoContinuation, plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """What each clip is made with, as JSON values, but for its seed and the clip before.

    The keys are those of the option table, and those of what is no option but changes a result.
    """
    models = _Models(job, continuation)
    clips = [{key: value(models, plan) for key, value in _FINGERPRINTED.items()} for plan in plans]
    plain: list[dict[str, Any]] = json.loads(json.dumps(clips))
    # what is not used is not said, so that a run stays the same run when there is more to be said
    return [{key: value for key, value in one.items() if value is not None or key in _ALWAYS_SAID} for one in plain]


class _Models:
    """What all clips of a run are made with; offloading changes no result and is no part of it."""

    def __init__(self, job: Job, continuation: VideoContinuation) -> None:
        self.job, self.continuation = job, continuation

    @functools.cached_property
    def checkpoint(self) -> str:
        checkpoint = self.continuation.checkpoint
        parts = (*checkpoint.experts.values(), checkpoint.vae, checkpoint.text_encoder)
        return _digest_of(file for weights in parts for file in weights.files)

    @functools.cached_property
    def config(self) -> str:
        # what only one option reads belongs to that option
        row = dataclasses.asdict(self.job.config).items()
        return fingerprint({name: str(value) for name, value in row if name != "mag_ratios"})

    @functools.cached_property
    def vlm(self) -> str:
        """A local VLM by its weights, any other by its name."""
        name = str(self.continuation.vlm_path or "")
        if self.continuation.vlm_url:
            return readable(f"{self.continuation.vlm_url} {name}".strip())
        weights = sorted(Path(name).glob("*.safetensors"))
        return _digest_of(weights) if weights else readable(name)

    @property
    def ratios(self) -> str:
        return fingerprint({"mag_ratios": self.continuation.config.mag_ratios})


_FINGERPRINTED: Mapping[str, Callable[[_Models, Plan], Any]] = {
    "task": lambda models, plan: models.job.config.name,
    "checkpoint": lambda models, plan: models.checkpoint,
    "config": lambda models, plan: models.config,
    "convert_model_dtype": lambda models, plan: models.continuation.convert_model_dtype,
    "device": lambda models, plan: models.continuation.device.type,
    "text_device": lambda models, plan: models.continuation.text_device.type,
    "width": lambda models, plan: plan.geometry.width,
    "height": lambda models, plan: plan.geometry.height,
    "frames": lambda models, plan: plan.geometry.frames,
    "steps": lambda models, plan: plan.sampling.steps,
    "shift": lambda models, plan: plan.sampling.shift,
    "guidance": lambda models, plan: plan.sampling.guidance,
    "solver": lambda models, plan: plan.sampling.solver,
    "guidance_interval": lambda models, plan: plan.sampling.guidance_interval,
    "cache": lambda models, plan: plan.sampling.cache and str(plan.sampling.cache),
    "negative_prompt": lambda models, plan: plan.negative,
    "prompt": lambda models, plan: plan.prompt,
    "custom_prompt": lambda models, plan: plan.prefix,
    "num_segments": lambda models, plan: plan.num_segments if plan.described else None,
    "vlm": lambda models, plan: models.vlm if plan.described else None,
    "vlm_question": lambda models, plan: models.continuation.vlm_question if plan.described else None,
    "continuation": lambda models, plan: plan.context.mode if plan.context.mode != "last_frame" else None,
    "context_frames": lambda models, plan: plan.context.frames if plan.context.mode == "tail" else None,
    "anchor": lambda models, plan: _digest(plan.anchor),
    "end_image": lambda models, plan: _digest(plan.end),
    "cut": lambda models, plan: plan.cut if isinstance(plan.cut, bool) else _digest(plan.cut),
    "mag_ratios": lambda models, plan: models.ratios if plan.sampling.uses("magcache") else None,
    "loras": lambda models, plan: (
        {name: [lora.as_json() for lora in files] for name, files in plan.loras.items()} or None
    ),
    "prompt_mode": lambda models, plan: plan.prompt_mode if plan.prompt_mode != "describe" else None,
    "drift_correction": lambda models, plan: plan.drift_correction or None,
    "best_of": lambda models, plan: plan.best_of if plan.best_of > 1 else None,
    "video_reader": lambda models, plan: (
        "decord" if plan.described and models.continuation.video_reader == "decord" else None
    ),
    "vlm_trust_remote_code": lambda models, plan: (
        (plan.described and models.continuation.vlm_trust_remote_code) or None
    ),
}
_ALWAYS_SAID = {"prompt", "num_segments", "vlm", "vlm_question"}  # 0.1.0 did
_OF_THE_CHAIN = {"parent", "seed"}  # `ChainRun` adds them, clip by clip
_NO_OPTION = {"device", "negative_prompt", "mag_ratios"}

if missing := set(by_fingerprint_key()) ^ (set(_FINGERPRINTED) - _NO_OPTION | _OF_THE_CHAIN):
    raise TypeError(f"keys of the fingerprint that only the option table or only this file knows: {sorted(missing)}")


def _digest_of(files: Iterable[Path]) -> str:
    return fingerprint({"files": [(file.name, sampled_digest(file)) for file in files]})


def _digest(picture: Frame | None) -> str | None:
    """A short digest of a picture."""
    if picture is None:
        return None
    array = picture.numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    return fingerprint({"shape": array.shape, "pixels": hashlib.sha256(array.tobytes()).hexdigest()})
