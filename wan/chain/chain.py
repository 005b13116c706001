"""A chain of clips, and one run of it in its folder: which clips are there, what is made, and what is written."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from wan import media
from wan.chain.draft import ClipDraft, discard
from wan.chain.fingerprint import difference, fingerprint
from wan.chain.report import render_report, seam_thumbnails
from wan.chain.run_folder import DATA, JOINED, PAGE, FinishedClip, RunFolder
from wan.chain.storyboard import Scene
from wan.chain.writer import ClipWriter
from wan.errors import UserError
from wan.files import file_digest, write_json, write_text
from wan.options import Settings, options_of
from wan.types import Footage, Generation

if TYPE_CHECKING:
    from wan.chain.plan import Plan

SHEET_FRAMES = 4  # on each side of a seam
Describe: TypeAlias = "Callable[[Generation, str | None, Plan], dict[str, Any]]"  # clip, source, plan -> its record


def chain(
    start: Footage,
    *,
    count: int,
    extend: Callable[[Footage, int], Generation],
    seed: int,
    finished: Mapping[int, Footage] = MappingProxyType({}),
    seeds: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[Generation]:
    """`count` clips, each going on from the one before; clip i, counted from 0, is made with seed + i.

    Every clip is handed out as soon as it is made, and the next one starts from its frames as they are in memory.
    `finished` holds clips, by i, that are there already and are gone on from; `seeds` other seeds than seed + i.
    """
    footage = start
    for index in range(count):
        if index in finished:
            footage = finished[index]
            continue
        made = extend(footage, seeds.get(index, seed + index))
        yield made
        footage = made


class ChainRun:
    """One run in a folder: which of its clips are there already, and what is written about the others.

    A clip that is there counts if it was made with the same settings, seed and predecessor. One whose own settings
    have changed is made again, and so is what follows from it. Raises UserError if the folder holds another run.
    """

    def __init__(
        self,
        settings: Settings,
        scenes: Sequence[Scene],
        folder: RunFolder,
        plans: Sequence[Plan],
        wanted: Sequence[dict[str, Any]],
        source: Footage,
        describe: Describe,
    ) -> None:
        self.settings, self.folder, self.plans, self.source = settings, folder, plans, source
        self.describe = describe
        self.count = len(plans)
        self.writer = ClipWriter(self.save)
        self.started, self.writes = time.perf_counter(), False
        found, before = folder.clips(), folder.run
        self.base_seed = _base_seed(settings.base_seed, before)
        self.joined_of = self._joined_of(before)
        self.joined_here: list[str] = []  # what this run has joined itself
        self.seconds_before = float(before.get("seconds") or 0)
        self.drawn = settings.base_seed < 0 and "base_seed" not in before
        by_number = enumerate(scenes, 1)
        self.scripted = {number: scene.said["seed"] for number, scene in by_number if "seed" in scene.said}
        over = {int(number): seed for number, seed in before.get("redone_over", {}).items()}
        self.redone = {  # seeds by --redo, unless the storyboard has another one by now
            int(number): int(seed)
            for number, seed in before.get("seeds", {}).items()
            if over.get(int(number)) == self.scripted.get(int(number))
        }
        # clips that --keep_following vouched for: their fingerprints, and that of the clip that they now go on from
        self.accepted = dict(before.get("accepted") or {})
        if settings.redo is not None:
            self._redo(settings.redo, found)
        self.seeds = self.scripted | self.redone
        self.wanted: dict[int, dict[str, Any]] = {}  # what each clip is made with, by its number, counted from 1
        self.clips: dict[int, FinishedClip] = {}
        self.stale: list[int] = []  # clips that are there and are made again
        parent = self._source_digest
        for number, own in enumerate(wanted, 1):
            # a new shot depends on nothing before it
            before_it = None if plans[number - 1].is_cut else parent
            asked = self.wanted[number] = own | {"parent": before_it, "seed": self.seed(number)}
            clip = found.get(number)
            if clip is not None and self.is_current(clip, asked):
                self.clips[number] = clip
            elif clip is not None:
                self.stale.append(number)
                if number == min(found) and number != settings.redo:
                    self._check_same_run(clip, asked)
            parent = self.clips[number].fingerprint if number in self.clips else fingerprint(asked)

    def is_current(self, clip: FinishedClip, wanted: Mapping[str, Any]) -> bool:
        """Whether a clip is what is wanted; `keep_following` vouches for it after one other predecessor."""
        if clip.settings == wanted:
            return True
        if dict(clip.settings) | {"parent": wanted["parent"]} != wanted:
            return False
        settings = self.settings
        if settings.keep_following and settings.redo is not None and clip.number > settings.redo:
            self.accepted[clip.fingerprint] = wanted["parent"]
        return bool(self.accepted.get(clip.fingerprint) == wanted["parent"])

    def seed(self, number: int) -> int:
        """The seed of a clip: by --redo, by the storyboard, or counted up from the first."""
        seed: int = self.seeds.get(number, self.base_seed + number - 1)
        return seed

    @property
    def video(self) -> Path:
        """The file that is continued."""
        return Path(self.settings.video or "")

    @property
    def first_missing(self) -> int:
        """The number of the first clip that is missing on disk, one past the last if none is."""
        return next(number for number in range(1, self.count + 2) if number not in self.clips)

    @property
    def to_make(self) -> int:
        """The number of the clip that is to be made now: the first that is neither on disk nor on its way there."""
        there = {*self.clips, self.writer.number}
        return next(number for number in range(1, self.count + 2) if number not in there)

    @property
    def prompt_memory(self) -> Mapping[str, Any]:
        """What the clip before the one to make noted for the prompts to come."""
        before = self.to_make - 1
        if self.writer.made is not None and self.writer.number == before:
            return self.writer.made.prompt_memory
        return self.clips[before].record.get("memory") or {} if before in self.clips else {}

    @functools.cached_property
    def _source_digest(self) -> str:
        """Of the video up to where it is continued from."""
        until = self.settings.from_
        return file_digest(self.video) + ("" if until is None else f" to {until!r} s")

    def _joined_of(self, before: Mapping[str, Any]) -> list[str]:
        """What the joined video is made of: digests of the source, if it is in there, and of its clips.

        Empty where nobody knows. 0.1.0 did not write it down, but joined every clip of a run that it joined at all.
        """
        if "joined_of" in before:
            return list(before["joined_of"])
        if not before.get("joined"):
            return []
        source = [self._source_digest] if (before.get("arguments") or {}).get("include_source") else []
        return source + [str(clip.get("fingerprint")) for clip in before.get("clips", ())]

    def _redo(self, number: int, found: dict[int, FinishedClip]) -> None:
        if number not in found and number not in self.folder.faults:
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
            named = [difference(key, clip.settings.get(key), wanted.get(key)) for key in differ]
            raise UserError(
                f"`output_dir` {self.folder.path} holds a run with other settings ({'; '.join(named[:3])}): "
                f"give another folder, the old settings to go on with it, or `redo` {clip.number} to make it again"
            )

    def begin(self) -> None:
        """Say that the run goes on. Clips of 0.1.0 get their digests."""
        self.clips = {number: self.folder.seal(clip) for number, clip in self.clips.items()}
        self.report("running")

    def draft(self, number: int) -> ClipDraft:
        """Where what is known of an unfinished clip is kept."""
        return ClipDraft(self.folder.path, number, self.wanted[number])

    @property
    def damaged(self) -> dict[int, str]:
        """The clips that are there and are not what was written, and why, by number."""
        return {number: why for number, why in sorted(self.folder.faults.items()) if number <= self.count}

    def write(self, made: Generation, then: Callable[[FinishedClip], None]) -> None:
        """Put the next clip on disk while the one after it is made, and call `then`; the one before is waited for."""
        self.writer.wait()
        self.writes = True
        number = self.first_missing
        self.writer.write(number, made, lambda: then(self.clips[number]))

    def save(self, made: Generation) -> None:
        """Put the next clip on disk, with what was measured of it."""
        from wan.prompting import RECENT_SECONDS
        from wan.quality import measure_look

        number, settings = self.first_missing, self.settings
        plan, before = self.plans[number - 1], self.clips.get(number - 1)
        following = self.plans[min(number, self.count - 1)]  # whose captioner will look at this clip
        recent = RECENT_SECONDS if following.prompt_mode == "continue" else None

        def record() -> dict[str, Any]:
            said = self.describe(made, str(before.video) if before else settings.video, plan)
            return said | {"look": measure_look(made.clip.frames).as_json()}

        tail = (before or self.source).tail(SHEET_FRAMES, made.clip.fps)
        self.clips[number] = self.folder.save(
            number,
            max(2, len(str(self.count))),
            made,
            self.wanted[number],
            record,
            samples=(following.num_segments, recent),
            sheet=seam_thumbnails(tail, made.clip.frames[made.dropped : made.dropped + SHEET_FRAMES]),
            metadata=not settings.no_video_metadata,
        )
        if settings.include_source:  # all of it would be encoded again
            self.report("running")
        else:
            self._renew_joined()

    def report(self, status: str) -> None:
        """`prompts_log.txt`, `run.json` and the report as things stand."""
        clips = [self.clips[number] for number in sorted(self.clips)]
        records = [{"file": clip.video.name} | dict(clip.record) for clip in clips]
        # a run that has nothing to do leaves the time of those that made the clips
        made_in = time.perf_counter() - self.started if self.writes else 0.0
        run = {
            "status": status,
            "clips_finished": len(clips),
            "clips_asked": self.count,
            "base_seed": self.base_seed,
            "seeds": {str(number): seed for number, seed in sorted(self.redone.items())},
            "redone_over": {str(number): self.scripted.get(number) for number in sorted(self.redone)},
            "accepted": dict(sorted(self.accepted.items())),
            "joined": JOINED if self.joined_of else None,
            "joined_of": self.joined_of,
            "seconds": round(self.seconds_before + made_in, 3),
            "arguments": self._arguments(),
            "clips": records,
        }
        self.folder.write_run(run)  # first: it tells that the other files are ours
        self.folder.write_prompts(clips)
        page, data = render_report(run, records, [clip.sheet for clip in clips])
        write_json(self.folder.path / DATA, data)
        write_text(self.folder.path / PAGE, page)

    def _arguments(self) -> dict[str, Any]:
        """What the command was told, as JSON values that may be handed on."""
        given = {
            one.name: one.kind.public(getattr(self.settings, one.name)) for one in options_of("continuous") if one.flag
        }
        return dict(sorted(given.items()))

    def finish(self, status: str) -> Path | None:
        """Join the clips up to the first that is missing, and report."""
        joined = self._renew_joined()
        self.report(status)
        if status == "finished":
            discard(self.folder.path)
        return joined

    def _renew_joined(self) -> Path | None:
        """The joined video of the clips up to the first that is missing; None without a clip."""
        clips = [self.clips[number] for number in range(1, self.first_missing)]
        if not clips:
            return None
        joined = self.folder.path / JOINED
        parts = [clip.fingerprint for clip in clips]
        parts = [self._source_digest, *parts] if self.settings.include_source else parts
        if parts == self.joined_here:
            return joined
        if self.joined_of != parts[: len(self.joined_of)] or not self.joined_of:
            self.folder.set_joined_aside()
        self.joined_of = parts
        self.report("running")  # what a killed run leaves is no more than this says
        self._join(clips, joined)
        self.joined_here = parts
        return joined

    def _join(self, clips: Sequence[FinishedClip], path: Path) -> None:
        settings = self.settings
        videos, drops = [clip.video for clip in clips], [clip.dropped for clip in clips]
        summary = {"clips": [video.name for video in videos], "base_seed": self.base_seed}
        metadata = None if settings.no_video_metadata else summary
        if settings.include_source:
            media.assemble(self.video, videos, path, drops=drops, metadata=metadata, until=settings.from_)
            return
        # one repeated frame is the source's last; more of them are another rendering of what is known
        media.join_videos(videos, path, drops=[0 if drops[0] == 1 else drops[0], *drops[1:]], metadata=metadata)


def _base_seed(given: int, before: dict[str, Any]) -> int:
    """The given seed; for a negative one that of the run so far, or a new one."""
    from wan.pipeline import draw_seed

    return int(before["base_seed"]) if given < 0 and "base_seed" in before else draw_seed(given)
