"""Which clips of a script its folder holds, and which are to be made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.chain.changes import Change, find_change, other_run
from wan.chain.choices import Choices
from wan.chain.fingerprint import fingerprint
from wan.chain.finished_clip import FinishedClip, seal
from wan.chain.run_folder import RunFolder
from wan.chain.script import Script
from wan.chain.seeds import Seeds
from wan.errors import UserError
from wan.files import file_digest, numbered, readable
from wan.options import Settings

if TYPE_CHECKING:
    from wan.chain.plan import Plan


class Inventory:
    """The clips of a folder, as far as they are what a script asks for. Makes nothing.

    A clip that is there counts if it was made with the same settings, seed and predecessor. One that is not what is
    asked for is to be made again, and so is what follows from it, unless the right clip lies elsewhere in the folder.
    Raises UserError if the folder holds a run of something else.
    """

    def __init__(self, settings: Settings, script: Script, folder: RunFolder) -> None:
        self.settings, self.folder = settings, folder
        self.finished, before = folder.clips(), folder.run
        self.source_digest = _source_digest(settings)
        self.seeds = Seeds(settings.base_seed, before)
        self.choices = Choices(settings, before)
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
        parent, before = self.source_digest, None
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

    @property
    def again(self) -> list[Change]:
        """Why what is there is made again, of the clips that are."""
        return [change for change in self.changes if change.number not in self.clips]

    @property
    def moved(self) -> list[str]:
        """A line for each clip that is not made because it lies elsewhere in the folder."""
        places = {number: clip.video.relative_to(self.folder.path) for number, clip in self.elsewhere.items()}
        return [f"clip {number} is there already: it is {place}" for number, place in places.items()]

    @property
    def damaged(self) -> list[str]:
        """A line for each clip that was finished and is not what was written."""
        faults = [(number, why) for number, why in sorted(self.folder.faults.items()) if number <= self.count]
        return [f"clip {number} is made again: {why}" for number, why in faults if number not in self.clips]

    def plan(self, number: int) -> Plan:
        """How a clip is made, with the take that was chosen of it."""
        return replace(self.plans[number - 1], take=self.wanted[number].get("take"))

    def prompt(self, number: int) -> str | None:
        """The prompt of a clip as it was written, None where the VLM writes it."""
        return self.plans[number - 1].prompt

    @property
    def plans(self) -> Sequence[Plan]:
        """How each clip is made."""
        return self.script.plans

    @property
    def first_missing(self) -> int:
        """The number of the first clip that is missing on disk, one past the last if none is."""
        return next(number for number in range(1, self.count + 2) if number not in self.clips)

    @property
    def missing(self) -> list[Plan]:
        """How the clips that are still to be made are made."""
        return [plan for number, plan in enumerate(self.plans, 1) if number not in self.clips]

    @property
    def digits(self) -> int:
        """Of the numbers in the names of files."""
        return max(2, len(str(self.count)))

    def add(self, number: int, clip: FinishedClip) -> None:
        """Take in a clip that is finished now."""
        self.clips[number] = self.finished[number] = clip

    def give_up(self) -> None:
        """Note that what is now different is to be made again."""
        self.choices.give_up(self.finished[change.number] for change in self.changes)

    def seal(self) -> None:
        """Clips of 0.1.0 get their digests."""
        here = {number: clip for number, clip in self.clips.items() if number not in self.elsewhere}
        self.clips |= {number: seal(clip) for number, clip in here.items()}

    def put_in_place(self) -> None:
        """Bring the clips that lie elsewhere in the folder to the places where they are wanted."""
        moving = {clip.record_path for clip in self.elsewhere.values()}
        aside = {path: self.folder.elsewhere.set_clip_aside(path) for path in moving if path.parent == self.folder.path}
        for number, clip in self.elsewhere.items():
            path = aside.get(clip.record_path, clip.record_path)
            self.clips[number] = self.finished[number] = self.folder.restore(number, self.digits, path)
        self.elsewhere = {}
        self.finished = self.finished | self.clips


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
