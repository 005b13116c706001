"""One run of a chain in its folder: its clips are put on disk, joined and reported as they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wan.chain.draft import ClipDraft, discard
from wan.chain.finished_clip import FinishedClip, Told, prune
from wan.chain.inventory import Inventory
from wan.chain.joined_video import JoinedVideo
from wan.chain.run_record import RunRecord
from wan.chain.telling import tell
from wan.chain.writer import ClipWriter
from wan.chain.written import Written
from wan.types import Footage, Generation

if TYPE_CHECKING:
    from wan.chain.plan import Plan

Describe: TypeAlias = "Callable[[Generation, str | None, Plan], dict[str, Any]]"  # clip, source, plan -> its record


class ChainRun:
    """Makes the folder what its inventory asks for: the clips that go into it come from outside, one by one.

    `source` is what the first clip goes on from, and `describe` gives what a clip's record says of how it was made.
    """

    def __init__(self, inventory: Inventory, source: Footage, describe: Describe) -> None:
        self.inventory, self.source, self.describe = inventory, source, describe
        self.settings, self.folder = inventory.settings, inventory.folder
        before = self.folder.run
        self.writer = ClipWriter(self.save)
        written = Written(self.folder, before)
        self.joined = JoinedVideo(self.settings, self.folder, written, inventory.source_digest, before)
        self.record = RunRecord(self.settings, self.folder, written, float(before.get("seconds") or 0))

    def before(self, number: int) -> Footage:
        """What a clip goes on from: the clip before as it is in memory, or on disk, or the source."""
        if self.writer.made is not None and self.writer.number == number - 1:
            return self.writer.made
        return self.inventory.clips[number - 1] if number > 1 else self.source

    def give_up(self) -> None:
        """Note that what is now different is to be made again."""
        self.inventory.give_up()
        self.report("running")

    @property
    def to_make(self) -> int:
        """The number of the clip that is to be made now: the first that is neither on disk nor on its way there."""
        begun = {*self.inventory.clips, self.writer.number}
        return next(number for number in range(1, self.inventory.count + 2) if number not in begun)

    @property
    def prompt_memory(self) -> Mapping[str, Any]:
        """What the clip before the one to make noted for the prompts to come."""
        before = self.to_make - 1
        if self.writer.made is not None and self.writer.number == before:
            return self.writer.made.prompt_memory
        clip = self.inventory.clips.get(before)
        return {} if clip is None else clip.record.get("memory") or {}

    def begin(self) -> None:
        """Say that the run goes on. Clips of 0.1.0 get their digests, and each clip comes to its place."""
        self.inventory.give_up()
        self.inventory.seal()
        self.report("running")
        if self.inventory.elsewhere:
            self.inventory.put_in_place()
            self.report("running")
        self._prune()

    def _prune(self) -> None:
        """With `keep_state` last leave out what only making a clip again has need of."""
        if self.settings.keep_state == "last":
            for clip in self.folder.to_prune(self.inventory.clips).values():
                prune(clip)

    def draft(self, number: int) -> ClipDraft:
        """Where what is known of an unfinished clip is kept."""
        return ClipDraft(self.folder.path, number, self.inventory.wanted[number])

    def write(self, made: Generation, then: Callable[[FinishedClip], None]) -> None:
        """Put the next clip on disk while the one after it is made, and call `then`; the one before is waited for."""
        self.writer.wait()
        self.record.makes_clips = True
        number = self.inventory.first_missing
        self.writer.write(number, made, lambda: then(self.inventory.clips[number]))

    def save(self, made: Generation) -> None:
        """Put the next clip on disk, with what was measured of it."""
        number = self.inventory.first_missing
        wanted, told = self.inventory.wanted[number], self._told_of(number, made)
        self.inventory.add(number, self.folder.save(number, self.inventory.digits, made, wanted, told))
        self._renew_joined()
        self._prune()

    def keep_take(self, number: int, take: int, made: Generation) -> Path:
        """Put a take of a clip that is being made on disk; returns its mp4."""
        self.writer.wait()  # what it is measured against is there then
        settings, digits = {**self.inventory.wanted[number], "take": take}, self.inventory.digits
        return self.folder.elsewhere.save_take(number, digits, take, made, settings, self._told_of(number, made))

    def _told_of(self, number: int, made: Generation) -> Told:
        """What is kept of a clip next to its frames and latents."""
        before, settings, plans = self.inventory.clips.get(number - 1), self.settings, self.inventory.plans
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
        inventory = self.inventory
        clips = [inventory.clips[number] for number in sorted(inventory.clips)]
        state = inventory.seeds.as_json() | inventory.choices.as_json() | self.joined.as_json()
        self.record.write(status, clips, inventory.count, state)

    def finish(self, status: str) -> Path | None:
        """Join the clips up to the first that is missing, and report."""
        joined = self._renew_joined()
        self.report(status)
        if status == "finished":
            discard(self.folder.path)
        return joined

    def _renew_joined(self) -> Path | None:
        """The joined video of the clips up to the first that is missing; None without a clip."""
        inventory = self.inventory
        clips = [inventory.clips[number] for number in range(1, inventory.first_missing)]
        return self.joined.renew(
            clips,
            inventory.script.fades(len(clips)),
            complete=len(clips) == inventory.count,
            base_seed=inventory.seeds.base,
            announce=lambda: self.report("running"),
        )
