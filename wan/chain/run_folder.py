"""A chain's folder: what is finished in it, losslessly, and what each clip was made with.

A clip is files that appear one after the other: a draft with its latents as soon as they are sampled, and then those of
`finished_clip`. Whatever stops a run, the next one finds every finished clip, samples no clip again, and takes nothing
for finished that is not what was written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from wan import media
from wan.chain.draft import discard
from wan.chain.elsewhere import ClipsElsewhere
from wan.chain.finished_clip import (
    REDONE,
    SUFFIXES,
    TAKES,
    FinishedClip,
    Told,
    clip_number,
    read_clip,
    settings_in,
    write_clip,
)
from wan.chain.lock import FolderLock
from wan.chain.records import read_run
from wan.errors import UserError
from wan.files import write_json
from wan.foreign import read_json
from wan.types import Generation

log = logging.getLogger(__name__)

JOINED, RUN, PROMPTS, PAGE, DATA = "joined.mp4", "run.json", "prompts_log.txt", "report.html", "report.json"
UPSCALED = ("joined_upscaled.mp4", "joined_upscaled.json")  # with `upscale`
PREVIEW = "preview.webp"
STOP, PAUSE = "stop", "pause"  # files by which a person leads a run
_OF_THE_RUN = (RUN, JOINED, PROMPTS, PAGE, DATA)


class RunFolder:
    """The folder of one chain, locked while it is open, so that two runs cannot mix. Raises UserError."""

    def __init__(self, path: Path, *, lock: bool = True) -> None:
        self.path = path
        self.elsewhere = ClipsElsewhere(path)
        self._lock = FolderLock(path) if lock else None

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self.check_names()
        if self._lock is not None:
            self._lock.acquire()
            self._remove_leftovers()  # of a run that was killed: others are kept out
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def _remove_leftovers(self) -> None:
        for name in ("video_", ".draft_", f".{JOINED}.", PREVIEW, *UPSCALED, *_OF_THE_RUN):
            for left in self.path.glob(f".{name}*.part"):
                left.unlink()
        for left in self.path.glob(f".{JOINED}.*{media.PIECE}"):
            left.unlink()

    def check_names(self) -> None:
        """Raise UserError where something else stands under a name that a run needs: said now, not after an hour."""
        names = (
            (REDONE, "folder", Path.is_dir),
            (TAKES, "folder", Path.is_dir),
            *((name, "file", Path.is_file) for name in _OF_THE_RUN),
        )
        for name, wanted, fits in names:
            if os.path.lexists(path := self.path / name) and not fits(path):
                raise UserError(f"{path} is no {wanted}, and a run needs that name; move it, or give another folder")

    def writes(self, path: Path) -> bool:
        """Whether a run may write a file or move it away, on systems too that do not tell letters by their case."""
        file = Path(path.name.casefold())
        if _is_folder(path.parent.parent, self.path / TAKES):
            return file.suffix in SUFFIXES and file.name.startswith("take_")
        if not _is_folder(path.parent, self.path):
            return False
        return file.name in (*_OF_THE_RUN, *UPSCALED) or (file.suffix in SUFFIXES and clip_number(file) is not None)

    def foreign(self, *, preview: bool = False, upscaled: bool = False) -> Path | None:
        """A file that a run, with what it is asked for, would replace and that none of ours has made."""
        names = (*_OF_THE_RUN, *([PREVIEW] if preview else []), *(UPSCALED if upscaled else ()))
        existing = [path for name in names if (path := self.path / name).exists()]
        if self.path / RUN in existing:
            run = self.run
            return None if isinstance(run.get("clips"), list) and "base_seed" in run else self.path / RUN
        # a run writes its record first; clips without one are of a run whose record was removed
        return existing[0] if existing and not self.clips() else None

    def clips(self) -> dict[int, FinishedClip]:
        """The finished clips by number, counted from 1; `faults` then says what is wrong with those that are not.

        A clip is finished as long as its files are those that were written: their digests are compared. Raises
        UserError for two records of one number: which of them the user wants, only they know.
        """
        self.faults: dict[int, str] = {}
        clips = {}
        paths = [path for path in sorted(self.path.glob("video_*.json")) if clip_number(path) is not None]
        first: dict[int | None, Path] = {}
        for path in paths:
            if (other := first.setdefault(clip_number(path), path)) is not path:
                raise UserError(
                    f"{self.path} has two records of clip {clip_number(path)}, {other.name} and {path.name}; "
                    f"move the files of one of them elsewhere"
                )
        with ThreadPoolExecutor(4) as readers:  # digests are computed beside each other
            for clip in readers.map(read_clip, paths):
                if isinstance(clip, FinishedClip):
                    clips[clip.number] = clip
                else:
                    self.faults[clip.number] = clip.reason
        return clips

    def to_prune(self, clips: Mapping[int, FinishedClip]) -> dict[int, FinishedClip]:
        """Those of whose state only making a clip again has need: all but the last two, and not before a gap."""
        last = max(clips, default=0)
        return {number: clip for number, clip in clips.items() if number < last - 1 and number + 1 in clips}

    def save(self, number: int, digits: int, made: Generation, settings: Mapping[str, Any], told: Told) -> FinishedClip:
        """Put a clip on disk; it is finished when this returns. An older one of its number goes to `redone/`.

        First comes what cannot be made again in no time, its state; then its record is made with `told.describe`.
        """
        stem = self.path / f"video_{number:0{digits}d}_seed{made.request.seed}"
        self._make_room(number, stem.name)
        record = write_clip(stem, made, settings, told)
        discard(self.path, number)
        return FinishedClip(number, stem.with_suffix(".json"), record, settings)

    def restore(self, number: int, digits: int, record: Path) -> FinishedClip:
        """Bring a clip that is whole and lies elsewhere in the folder to a place; what was there is set aside."""
        target = self.path / f"video_{number:0{digits}d}_seed{read_json(record)['seed']}.json"
        self._make_room(number, "")
        restored = read_clip(self.elsewhere.move(record, target, keep=record.parent.name != REDONE))
        assert isinstance(restored, FinishedClip)  # it was, a moment ago
        return restored

    def _make_room(self, number: int, stem: str) -> None:
        """Move to `redone/` all files of the kinds of a clip's that bear its number, the record last.

        They are an earlier clip, or not ours. Notes and subtitles of that number stay. What a killed run left of this
        very clip is overwritten: it has no record yet, and its state, which is written first, tells whose it is.
        """
        named = [file for file in self.path.glob("video_*") if clip_number(file) == number]
        files = [file for file in named if file.suffix.lower() in SUFFIXES]
        recorded = {file.stem for file in files if file.suffix == ".json"}
        left = stem if stem not in recorded and settings_in(self.path / f"{stem}.safetensors") else None
        for name in sorted({file.stem for file in files} - {left}):
            same = [file for file in files if file.stem == name]
            if name not in recorded:
                for file in same:
                    log.warning("%s has no record of a run; it moves to %s/", file, REDONE)
            self.elsewhere.set_aside(same)

    def set_aside(self, *names: str) -> None:
        """Move those of these files that are there, which have one name before their suffixes, to `redone/`."""
        if files := [file for name in names if (file := self.path / name).exists()]:
            self.elsewhere.set_aside(files)

    @property
    def run(self) -> dict[str, Any]:
        """The record of the run so far, empty before the first."""
        path = self.path / RUN
        return read_run(path) if path.exists() else {}

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Replace the record of the run."""
        write_json(self.path / RUN, record)


def _is_folder(one: Path, folder: Path) -> bool:
    return one.exists() and folder.exists() and one.samefile(folder)
