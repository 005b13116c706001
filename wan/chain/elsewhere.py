"""The clips of a run that are not in their place, and how clips change theirs: `redone/` and `takes/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan.chain.finished_clip import (
    REDONE,
    SUFFIXES,
    TAKES,
    FinishedClip,
    Told,
    read_clip,
    seal,
    settings_in,
    write_clip,
)
from wan.errors import UserError
from wan.files import link_or_copy, numbered, releasing
from wan.foreign import read_json
from wan.types import Generation


class ClipsElsewhere:
    """The clips that were replaced, in `redone/`, and the takes, in `takes/`, of the run in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[Path, str] = {}  # what the records say

    def find(self, digest: str) -> FinishedClip | None:
        """A clip with this fingerprint that was replaced, or is a take, and is whole."""
        for path in self._by_fingerprint.get(digest, ()):
            clip = read_clip(path)
            if isinstance(clip, FinishedClip) and clip.fingerprint == digest and not clip.is_pruned:
                return clip
        return None

    def replaced(self) -> list[FinishedClip]:
        """The clips that were replaced and are whole."""
        clips = [read_clip(path) for path in sorted((self.folder / REDONE).glob("*_seed*.json"))]
        return [seal(clip) for clip in clips if isinstance(clip, FinishedClip)]

    @property
    def _by_fingerprint(self) -> dict[str, list[Path]]:
        """The records of takes, and of clips that were replaced, by what their fingerprints are said to be."""
        records: dict[str, list[Path]] = {}
        for path in sorted([*self.folder.glob(f"{TAKES}/*/take_*.json"), *(self.folder / REDONE).glob("*_seed*.json")]):
            if path not in self._digests:
                try:
                    self._digests[path] = str(read_json(path).get("fingerprint"))
                except UserError:
                    self._digests[path] = ""
            records.setdefault(self._digests[path], []).append(path)
        return records

    def save_take(
        self, number: int, digits: int, take: int, made: Generation, settings: Mapping[str, Any], told: Told
    ) -> Path:
        """Put a take of a clip on disk, as `RunFolder.save` does; returns its mp4. Another of its name is set aside."""
        home = self.folder / TAKES / f"{number:0{digits}d}"
        home.mkdir(parents=True, exist_ok=True)
        stem = home / f"take_{take}_seed{made.request.seed}"
        files = [file for suffix in SUFFIXES if (file := stem.with_suffix(suffix)).exists()]
        if files and settings_in(stem.with_suffix(".safetensors")) != settings:
            self.set_aside(files)
        self._digests.clear()
        write_clip(stem, made, settings, told)
        return stem.with_suffix(".mp4")

    def set_aside(self, files: Sequence[Path]) -> None:
        """Move files of one name to `redone/`, a record last, under a name that none of them has there."""
        free = self._free_in_redone(files)
        for file in sorted(files, key=lambda file: file.suffix == ".json"):
            with releasing(file, "move"):
                file.rename(free.with_name(f"{free.name}{file.suffix}"))

    def set_clip_aside(self, record: Path) -> Path:
        """Move a finished clip to `redone/`, which has it whole before it is gone; returns its record there."""
        free = self._free_in_redone([record.with_suffix(suffix) for suffix in SUFFIXES])
        return self.move(record, free.with_name(f"{free.name}.json"))

    def move(self, record: Path, target: Path, *, keep: bool = False) -> Path:
        """Give a clip another name, or a second one that it is to `keep`; it is finished somewhere at any moment.

        Its record there comes last and the one here goes first.
        """
        for suffix in SUFFIXES:
            link_or_copy(record.with_suffix(suffix), target.with_suffix(suffix))
        for suffix in () if keep else reversed(SUFFIXES):
            with releasing(record.with_suffix(suffix), "move"):
                record.with_suffix(suffix).unlink()
        self._digests.clear()
        return target

    def _free_in_redone(self, files: Sequence[Path]) -> Path:
        """A name in `redone/`, without a suffix, that none of these files, which have one name, has there."""
        home, stem = self.folder / REDONE, files[0].stem
        home.mkdir(exist_ok=True)
        self._digests.clear()
        ends = [file.suffix for file in files]
        return home / next(name for name in numbered(stem) if not any((home / f"{name}{end}").exists() for end in ends))
