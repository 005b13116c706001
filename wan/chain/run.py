"""One run of a chain in its folder: which clips are finished, and which are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wan.chain.changes import Change, find_change, other_run
from wan.chain.choices import Choices
from wan.chain.draft import ClipDraft, discard
from wan.chain.fingerprint import fingerprint
from wan.chain.finished_clip import FinishedClip, Told, prune, seal
from wan.chain.joined_video import JoinedVideo
from wan.chain.run_folder import RunFolder
from wan.chain.run_record import RunRecord
from wan.chain.script import Script
from wan.chain.seeds import Seeds
from wan.chain.telling import tell
from wan.chain.writer import ClipWriter
from wan.chain.written import Written
from wan.errors import UserError
from wan.files import file_digest, numbered, readable
from wan.options import Settings
from wan.types import Footage, Generation

if TYPE_CHECKING:
    from wan.chain.plan import Plan

Describe: TypeAlias = "Callable[[Generation, str | None, Plan], dict[str, Any]]"  # clip, source, plan -> its record


class ChainRun:
    """One run in a folder: which of its clips are there already, and which are made.

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
        self.finished, before = folder.clips(), folder.run
        self._source_digest = _source_digest(settings)
        self.seeds = Seeds(settings.base_seed, before)
        self.choices = Choices(settings, before)
        written = Written(folder, before)
        self.joined = JoinedVideo(settings, folder, written, self._source_digest, before)
        self.record = RunRecord(settings, folder, written, float(before.get("seconds") or 0))
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
        self.seeds.follow(script, self._to_redo)
        self._to_redo = None
        self.changes: list[Change] = []  # of clips that are there and not what is asked for
        self.elsewhere: dict[int, FinishedClip] = {}  # the right clips that are not in their places
        wanted, clips = dict[int, dict[str, Any]](), dict[int, FinishedClip]()
        parent, before = self._source_digest, None
        for number, without_place in enumerate(script.wanted, 1):
            if number <= begun:
                wanted[number] = self.wanted[number]
                if number in self.clips:
                    clips[number] = self.clips[number]
            else:
                # a new shot depends on nothing before it
                before_it = None if script.plans[number - 1].is_cut else parent
                asked = {**without_place, "parent": before_it, "seed": self.seeds.of(number)}
                asked = wanted[number] = asked | self._take(number, asked)
                clip, change = self.finished.get(number), None
                if clip is not None and self.choices.accept(clip, asked):
                    clips[number] = clip
                else:
                    if clip is not None:
                        change = find_change(number, clip.settings, asked, before)
                        self.changes.append(change)
                        self._check_same_run(clip, asked)
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
                prune(clip)

    def _elsewhere(self, wanted: Mapping[str, Any]) -> FinishedClip | None:
        """A clip with these settings that is whole and lies under another number, or among those that were replaced."""
        digest = fingerprint(wanted)
        moved = next((clip for clip in self.finished.values() if clip.fingerprint == digest), None)
        return moved or self.folder.elsewhere.find(digest)

    def _take(self, number: int, wanted: Mapping[str, Any]) -> dict[str, int]:
        """The take that was chosen of a clip with these settings."""

        def finished() -> FinishedClip | None:
            clip = self.finished.get(number)
            return clip if clip is not None and clip.settings == wanted else self._elsewhere(wanted)

        return self.choices.take(number, self.script.key(number), wanted, self.plans[number - 1].best_of, finished)

    @property
    def remade(self) -> list[Change]:
        """What a run makes again of what is finished, and was not asked about before: neither by `redo` nor by yes."""
        kept = {clip.fingerprint for clip in self.clips.values()}
        return [
            change
            for change in self.again
            if (clip := self.finished[change.number]).fingerprint not in kept
            and not self.choices.has_given_up(clip)
            and change.root != self.settings.redo
        ]

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
        self._give_up_changed()
        self.report("running")

    def _give_up_changed(self) -> None:
        self.choices.give_up(self.finished[change.number] for change in self.changes)

    @property
    def plans(self) -> Sequence[Plan]:
        """How each clip is made."""
        return self.script.plans

    @property
    def first_missing(self) -> int:
        """The number of the first clip that is missing on disk, one past the last if none is."""
        return next(number for number in range(1, self.count + 2) if number not in self.clips)

    @property
    def to_make(self) -> int:
        """The number of the clip that is to be made now: the first that is neither on disk nor on its way there."""
        begun = {*self.clips, self.writer.number}
        return next(number for number in range(1, self.count + 2) if number not in begun)

    @property
    def prompt_memory(self) -> Mapping[str, Any]:
        """What the clip before the one to make noted for the prompts to come."""
        before = self.to_make - 1
        if self.writer.made is not None and self.writer.number == before:
            return self.writer.made.prompt_memory
        return self.clips[before].record.get("memory") or {} if before in self.clips else {}

    def _check_redo(self, number: int, count: int) -> None:
        if number not in self.finished and number not in self.folder.faults:
            clips = f"clips {min(self.finished)} to {max(self.finished)}" if self.finished else "no finished clip"
            raise UserError(f"`redo` {number}: {self.folder.path} holds {clips}")
        if number > count:
            raise UserError(f"`redo` {number} is beyond `num_videos` {count}")

    def _check_same_run(self, clip: FinishedClip, wanted: Mapping[str, Any]) -> None:
        """Clips of another video, model or size do not go into one folder with these."""
        if other := other_run(clip.settings, wanted, clip.number == 1):
            path = self.folder.path
            raise UserError(
                f"`output_dir` {path} holds a run of {other}: the same command with `output_dir` "
                f"{_free(path.with_name(f'{path.name}_{readable(_video(self.settings).stem)}'))} makes this one"
            )

    def begin(self) -> None:
        """Say that the run goes on. Clips of 0.1.0 get their digests, and each clip comes to its place."""
        self._give_up_changed()
        here = {number: clip for number, clip in self.clips.items() if number not in self.elsewhere}
        self.clips |= {number: seal(clip) for number, clip in here.items()}
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
        aside = {path: self.folder.elsewhere.set_clip_aside(path) for path in moving if path.parent == self.folder.path}
        for number, clip in self.elsewhere.items():
            path = aside.get(clip.record_path, clip.record_path)
            self.clips[number] = self.finished[number] = self.folder.restore(number, self._digits, path)
        self.elsewhere = {}
        self.finished = self.finished | self.clips

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
        self.record.makes_clips = True
        number = self.first_missing
        self.writer.write(number, made, lambda: then(self.clips[number]))

    def save(self, made: Generation) -> None:
        """Put the next clip on disk, with what was measured of it."""
        number = self.first_missing
        self.clips[number] = self.finished[number] = self.folder.save(
            number, self._digits, made, self.wanted[number], self._told_of(number, made)
        )
        self._renew_joined()
        self._prune()

    def keep_take(self, number: int, take: int, made: Generation) -> Path:
        """Put a take of a clip that is being made on disk; returns its mp4."""
        self.writer.wait()  # what it is measured against is there then
        settings = {key: value for key, value in self.wanted[number].items() if key != "take"} | {"take": take}
        return self.folder.elsewhere.save_take(number, self._digits, take, made, settings, self._told_of(number, made))

    def _told_of(self, number: int, made: Generation) -> Told:
        """What is kept of a clip next to its frames and latents."""
        before, settings, plans = self.clips.get(number - 1), self.settings, self.plans
        return tell(
            made,
            plans[number - 1 : number + 1],
            before=before,
            source=self.source,
            describe=lambda plan: self.describe(made, str(before.video) if before else settings.video, plan),
            metadata=not settings.no_video_metadata,
        )

    def report(self, status: str) -> None:
        """What is written about the run, as things stand."""
        clips = [self.clips[number] for number in sorted(self.clips)]
        state = self.seeds.as_json() | self.choices.as_json() | self.joined.as_json()
        self.record.write(status, clips, self.count, state)

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
        return self.joined.renew(
            clips,
            self.script.fades(len(clips)),
            complete=len(clips) == self.count,
            base_seed=self.seeds.base,
            announce=lambda: self.report("running"),
        )


def _free(path: Path) -> Path:
    """The path, or one with a number after it where something is there."""
    return next(free for name in numbered(path.name) if not (free := path.with_name(name)).exists())


def _video(settings: Settings) -> Path:
    """The file that is continued."""
    return Path(settings.video or "")


def _source_digest(settings: Settings) -> str:
    """Of the video up to where it is continued from."""
    until = settings.from_
    return file_digest(_video(settings)) + ("" if until is None else f" to {until!r} s")
