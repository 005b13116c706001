"""A chain of clips, and one run of it in its folder: which clips are there, what is made, and what is written."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from wan import media
from wan.chain.changes import Change, find_change, other_run
from wan.chain.draft import ClipDraft, discard
from wan.chain.fingerprint import fingerprint
from wan.chain.report import render_report, seam_thumbnails
from wan.chain.run_folder import DATA, JOINED, PAGE, FinishedClip, RunFolder, Told
from wan.chain.storyboard import Scene
from wan.chain.writer import ClipWriter
from wan.errors import UserError
from wan.files import file_digest, numbered, readable, write_json, write_text
from wan.options import CANDIDATE_STEP, Settings, options_of
from wan.types import Footage, Generation, from_uint8

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


@dataclass(frozen=True)
class Script:
    """What each clip of a run is to be: scenes as far as there are any, the plan of every clip, and what it is made
    with but for its seed and the clip before it, as JSON values."""

    scenes: Sequence[Scene]
    plans: Sequence[Plan]
    wanted: Sequence[Mapping[str, Any]]

    def name(self, number: int) -> str | None:
        """The name that a storyboard gives a clip, counted from 1."""
        return self.scenes[number - 1].said.get("name") if number <= len(self.scenes) else None


class ChainRun:
    """One run in a folder: which of its clips are there already, and what is written about the others.

    A clip that is there counts if it was made with the same settings, seed and predecessor. One that is not what is
    asked for is made again, and so is what follows from it, unless the right clip lies elsewhere in the folder.
    Raises UserError if the folder holds a run of something else.
    """

    def __init__(
        self, settings: Settings, script: Script, folder: RunFolder, source: Footage, describe: Describe
    ) -> None:
        self.settings, self.folder, self.source = settings, folder, source
        self.describe = describe
        self.writer = ClipWriter(self.save)
        self.started, self.writes = time.perf_counter(), False
        self.found, before = folder.clips(), folder.run
        self.base_seed = _base_seed(settings.base_seed, before)
        self.joined_of = self._joined_of(before)
        self.joined_here: list[str] = []  # what this run has joined itself
        self.seconds_before = float(before.get("seconds") or 0)
        self.drawn = settings.base_seed < 0 and "base_seed" not in before
        over = before.get("redone_over", {})
        # seeds by --redo, with those of the storyboard that they are in place of
        self._redone = {int(number): (int(seed), over.get(number)) for number, seed in before.get("seeds", {}).items()}
        # seeds of clips with a name, which they keep wherever they are moved
        self.named: dict[str, int] = dict(before.get("named") or {}) if self._goes_on(before) else {}
        # clips that --keep_following vouched for: their fingerprints, and that of the clip that they now go on from
        self.accepted = dict(before.get("accepted") or {})
        self._given_up = set(before.get("given_up") or ())
        # the takes that were chosen, with the fingerprint of the clip without that choice, by `key`
        self.takes = {key: (int(take), str(of)) for key, (take, of) in (before.get("takes") or {}).items()}
        # prompts that were edited in a review, with those that they are in place of, by `key`
        self.edited: dict[str, dict[str, str | None]] = dict(before.get("edited") or {})
        self.clips: dict[int, FinishedClip] = {}
        self.wanted: dict[int, dict[str, Any]] = {}  # what each clip is made with, by its number, counted from 1
        self._to_redo = settings.redo  # until another seed was drawn for it
        if settings.redo is not None:
            self._check_redo(settings.redo, len(script.plans))
        for number, take in settings.take:
            if number > len(script.plans):
                raise UserError(f"`take` {number}={take} is beyond `num_videos` {len(script.plans)}")
        self.follow(script)

    def follow(self, script: Script, begun: int = 0) -> None:
        """Take from a script what the clips after number `begun` are to be, and find those that are there already."""
        self.script, self.count = script, len(script.plans)
        self.scripted = {
            number: scene.said["seed"] for number, scene in enumerate(script.scenes, 1) if "seed" in scene.said
        }
        if self._to_redo is not None:
            self.draw_again(self._to_redo)
            self._to_redo = None
        self._name_seeds()
        self.changes: list[Change] = []  # of clips that are there and not what is asked for
        self.elsewhere: dict[int, FinishedClip] = {}  # the right clips that are not in their places
        wanted, clips = dict[int, dict[str, Any]](), dict[int, FinishedClip]()
        parent, before = self._source_digest, None
        for number, own in enumerate(script.wanted, 1):
            if number <= begun:
                wanted[number] = self.wanted[number]
                if number in self.clips:
                    clips[number] = self.clips[number]
            else:
                # a new shot depends on nothing before it
                before_it = None if script.plans[number - 1].is_cut else parent
                asked = {**own, "parent": before_it, "seed": self.seed(number)}
                asked = wanted[number] = asked | self._take(number, asked)
                there, change = self.found.get(number), None
                if there is not None and self.is_current(there, asked):
                    clips[number] = there
                else:
                    if there is not None:
                        change = find_change(number, there.settings, asked, before)
                        self.changes.append(change)
                        self._check_same_run(there, asked)
                    if (right := self._elsewhere(asked)) is not None:
                        clips[number] = self.elsewhere[number] = right
                before = change
            parent = clips[number].fingerprint if number in clips else fingerprint(wanted[number])
        self.wanted, self.clips = wanted, clips
        self._check_states(begun)

    def _check_states(self, begun: int) -> None:
        """Raise UserError for a clip to be made after one whose state was left out."""

        def can_be_made(number: int) -> bool:
            before = self.clips.get(number - 1)
            return number == 1 or self.plans[number - 1].is_cut or (before is not None and not before.is_pruned)

        for number in range(begun + 1, self.count + 1):
            if number not in self.clips and number - 1 in self.clips and not can_be_made(number):
                first = next(one for one in range(number - 1, 0, -1) if can_be_made(one))
                raise UserError(
                    f"clip {number} would be made after clip {number - 1}, whose frames were left out (`keep_state` "
                    f"last or `prune`): `redo` {first} makes the chain again from there"
                )

    def _prune(self) -> None:
        """With `keep_state` last leave out what only making a clip again has need of."""
        if self.settings.keep_state == "last":
            for clip in self.folder.to_prune(self.clips).values():
                self.folder.prune(clip)

    def _elsewhere(self, wanted: Mapping[str, Any]) -> FinishedClip | None:
        """A clip with these settings that is whole and lies under another number, or among those that were replaced."""
        digest = fingerprint(wanted)
        moved = next((clip for clip in self.found.values() if clip.fingerprint == digest), None)
        return moved or self.folder.find(digest)

    def _take(self, number: int, wanted: Mapping[str, Any]) -> dict[str, int]:
        """The take that was chosen of a clip with these settings; nothing where it is the one with the best seam."""
        digest, key = fingerprint(wanted), self.key(number)
        take, of = self.takes.get(key, (0, digest))
        take = dict(self.settings.take).get(number, take if of == digest else 0)
        if not take:
            return {}
        if take > (most := self.plans[number - 1].best_of):
            raise UserError(f"`take` {number}={take}: the clip has {most} of them; `takes` makes more")
        self.takes[key] = take, digest
        there = self.found.get(number)
        best = there if there is not None and there.settings == wanted else self._elsewhere(wanted)
        is_best = best is not None and best.record["seed"] == wanted["seed"] + (take - 1) * CANDIDATE_STEP
        return {} if is_best else {"take": take}

    @property
    def remade(self) -> list[Change]:
        """What a run makes again of what is finished, and was not asked about before: neither by `redo` nor by yes."""
        kept = {clip.fingerprint for clip in self.clips.values()}
        return [
            change
            for change in self.again
            if (there := self.found[change.number].fingerprint) not in kept
            and there not in self._given_up
            and change.root != self.settings.redo
        ]

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

    @property
    def redone(self) -> dict[int, int]:
        """Seeds that were drawn for clips to be made again, unless the storyboard has another one by now."""
        return {number: seed for number, (seed, over) in self._redone.items() if over == self.scripted.get(number)}

    def seed(self, number: int) -> int:
        """The seed of a clip: drawn again, by the storyboard, of its name, or counted up from the first."""
        counted = self.named.get(self.script.name(number) or "", self.base_seed + number - 1)
        seed: int = self.redone.get(number, self.scripted.get(number, counted))
        return seed

    def is_drawn(self, number: int) -> bool:
        """Whether the seed of a clip is known only when the run begins."""
        return self.drawn and number not in self.redone and number not in self.scripted

    def draw_again(self, number: int) -> None:
        """Give a clip another seed."""
        seed, name = _base_seed(-1, {}), self.script.name(number)
        if name is not None and number not in self.scripted:
            self.named[name] = seed
        else:
            self._redone[number] = seed, self.scripted.get(number)

    def _name_seeds(self) -> None:
        """A clip with a new name gets the seed of its place, or one beside it that no other name has."""
        for number in range(1, self.count + 1):
            if (name := self.script.name(number)) is not None and name not in self.named:
                seed = self.base_seed + number - 1
                while seed in self.named.values():
                    seed += 1
                self.named[name] = seed

    def _goes_on(self, before: Mapping[str, Any]) -> bool:
        return bool(before.get("base_seed") == self.base_seed)

    def key(self, number: int) -> str:
        """By which a clip is known from run to run: its name, or its number."""
        return self.script.name(number) or str(number)

    def plan(self, number: int) -> Plan:
        """How a clip is made, with the take that was chosen of it."""
        return replace(self.plans[number - 1], take=self.wanted[number].get("take"))

    def prompt(self, number: int) -> str | None:
        """The prompt of a clip as it was written, None where the VLM writes it."""
        return self.plans[number - 1].prompt

    def before(self, number: int) -> Footage:
        """What a clip goes on from: the clip before as it is in memory, or on disk, or the source."""
        if self.writer.made is not None and self.writer.number == number - 1:
            return self.writer.made
        return self.clips[number - 1] if number > 1 else self.source

    def give_up(self) -> None:
        """Note that what is now different is to be made again."""
        self._given_up = {self.found[change.number].fingerprint for change in self.changes}
        self.report("running")

    @property
    def plans(self) -> Sequence[Plan]:
        """How each clip is made."""
        return self.script.plans

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
    def _assembly(self) -> media.Assembly:
        """The joined video that begins with the source, of which each picture is encoded once in a run."""
        return media.Assembly(
            self.video, self.folder.path / JOINED, until=self.settings.from_, into=self.settings.until
        )

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

    def _check_redo(self, number: int, count: int) -> None:
        if number not in self.found and number not in self.folder.faults:
            there = f"clips {min(self.found)} to {max(self.found)}" if self.found else "no finished clip"
            raise UserError(f"`redo` {number}: {self.folder.path} holds {there}")
        if number > count:
            raise UserError(f"`redo` {number} is beyond `num_videos` {count}")

    def _check_same_run(self, clip: FinishedClip, wanted: Mapping[str, Any]) -> None:
        """Clips of another video, model or size do not go into one folder with these."""
        if other := other_run(clip.settings, wanted, clip.number == 1):
            path = self.folder.path
            raise UserError(
                f"`output_dir` {path} holds a run of {other}: the same command with `output_dir` "
                f"{_free(path.with_name(f'{path.name}_{readable(self.video.stem)}'))} makes this one"
            )

    def begin(self) -> None:
        """Say that the run goes on. Clips of 0.1.0 get their digests, and each clip comes to its place."""
        self._given_up = {self.found[change.number].fingerprint for change in self.changes}  # as in `give_up`
        here = {number: clip for number, clip in self.clips.items() if number not in self.elsewhere}
        self.clips |= {number: self.folder.seal(clip) for number, clip in here.items()}
        self.report("running")
        if self.elsewhere:
            self.put_in_place()
            self.report("running")
        self._prune()

    @property
    def again(self) -> list[Change]:
        """Why what is there is made again, of the clips that are."""
        return [change for change in self.changes if change.number not in self.clips]

    @property
    def moved(self) -> list[str]:
        """A line for each clip that is not made because it lies elsewhere in the folder."""
        places = {number: clip.video.relative_to(self.folder.path) for number, clip in self.elsewhere.items()}
        return [f"clip {number} is there already: it is {place}" for number, place in places.items()]

    def put_in_place(self) -> None:
        """Bring the clips that lie elsewhere in the folder to the places where they are wanted."""
        moving = {clip.record_path for clip in self.elsewhere.values()}
        aside = {path: self.folder.set_clip_aside(path) for path in moving if path.parent == self.folder.path}
        for number, clip in self.elsewhere.items():
            path = aside.get(clip.record_path, clip.record_path)
            self.clips[number] = self.found[number] = self.folder.restore(number, self._digits, path)
        self.elsewhere = {}
        self.found = self.found | self.clips

    @property
    def _digits(self) -> int:
        return max(2, len(str(self.count)))

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
        number = self.first_missing
        self.clips[number] = self.found[number] = self.folder.save(
            number, self._digits, made, self.wanted[number], self._told_of(number, made)
        )
        self._renew_joined()
        self._prune()

    def keep_take(self, number: int, take: int, made: Generation) -> Path:
        """Put a take of a clip that is being made on disk; returns its mp4."""
        self.writer.wait()  # what it is measured against is there then
        settings = {key: value for key, value in self.wanted[number].items() if key != "take"} | {"take": take}
        return self.folder.save_take(number, self._digits, take, made, settings, self._told_of(number, made))

    def _told_of(self, number: int, made: Generation) -> Told:
        """What is kept of a clip next to its frames and latents."""
        from wan.prompting import RECENT_SECONDS
        from wan.quality import measure_look

        plan, before = self.plans[number - 1], self.clips.get(number - 1)
        plans = self.plans  # which may be others by the next line
        following = plans[min(number, len(plans) - 1)]  # whose captioner will look at this clip
        recent = RECENT_SECONDS if following.prompt_mode == "continue" else None

        def record() -> dict[str, Any]:
            said = self.describe(made, str(before.video) if before else self.settings.video, plan)
            return said | {"look": measure_look(made.clip.frames).as_json()}

        fps, fades = made.clip.fps, (plan.fade_in, plans[number].fade_in if number < len(plans) else 0)
        cuts = {fades[0], len(made.clip.frames) - fades[1]}
        if before is not None and before.is_pruned:  # the clip begins a shot, and these are only looked at
            tail = from_uint8(media.read_tail(before.video, SHEET_FRAMES, fps))
        else:
            tail = (before or self.source).tail(SHEET_FRAMES, fps)
        return Told(
            record,
            samples=(following.num_segments, recent),
            sheet=seam_thumbnails(tail, made.clip.frames[made.dropped : made.dropped + SHEET_FRAMES]),
            metadata=not self.settings.no_video_metadata,
            keyframes=frozenset(cuts) if any(fades) else frozenset(),
        )

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
            **({"named": self.named} if self.named else {}),
            **({"edited": self.edited} if self.edited else {}),
            **({"takes": self.takes} if self.takes else {}),
            **({"given_up": sorted(self._given_up)} if self._given_up else {}),
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
        parts = [
            clip.fingerprint + (f" fade {fade}" if fade else "")
            for clip, fade in zip(clips, self._fades(len(clips)), strict=True)
        ]
        parts = [self._source_digest, *parts] if self.settings.include_source else parts
        if self.settings.until is not None and len(clips) == self.count:
            parts.append(file_digest(Path(self.settings.until)))
        if parts == self.joined_here:
            return joined
        if self.joined_of != parts[: len(self.joined_of)] or not self.joined_of:
            self.folder.set_joined_aside()
        self.joined_of = parts
        self.report("running")  # what a killed run leaves is no more than this says
        self._join(clips, joined)
        self.joined_here = parts
        return joined

    def _fades(self, count: int) -> list[int]:
        """Over how many frames each of the first clips fades in."""
        return [plan.fade_in for plan in self.plans[:count]]

    def _join(self, clips: Sequence[FinishedClip], path: Path) -> None:
        settings = self.settings
        videos, drops = [clip.video for clip in clips], [clip.dropped for clip in clips]
        summary = {"clips": [video.name for video in videos], "base_seed": self.base_seed}
        metadata = None if settings.no_video_metadata else summary
        if settings.include_source:
            self._assembly.renew(videos, drops, metadata, complete=len(clips) == self.count)
            return
        # one repeated frame is the source's last; more of them are another rendering of what is known
        drops[0] = 0 if drops[0] == 1 else drops[0]
        media.join_videos(videos, path, drops=drops, fades=self._fades(len(clips)), metadata=metadata)


def _free(path: Path) -> Path:
    """The path, or one with a number after it where something is there."""
    return next(free for name in numbered(path.name) if not (free := path.with_name(name)).exists())


def _base_seed(given: int, before: dict[str, Any]) -> int:
    """The given seed; for a negative one that of the run so far, or a new one."""
    from wan.pipeline import draw_seed

    return int(before["base_seed"]) if given < 0 and "base_seed" in before else draw_seed(given)
