"""`joined.mp4`: the clips of a run in one video, renewed after each clip."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan import media
from wan.chain.finished_clip import FinishedClip
from wan.chain.run_folder import JOINED, RunFolder
from wan.chain.written import Written
from wan.files import file_digest, publish
from wan.options import Settings


class JoinedVideo:
    """The joined video of a run in its folder. `source` is the digest of what is continued, and `before` what run.json
    says of the run so far."""

    def __init__(
        self, settings: Settings, folder: RunFolder, written: Written, source: str, before: Mapping[str, Any]
    ) -> None:
        self._settings, self._folder, self._written, self._source = settings, folder, written, source
        # digests of the source, if it is in there, and of the clips
        self.made_of = _made_of(source, before)
        self._made_here: list[str] = []  # what this run has joined itself

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder.path / JOINED

    def as_json(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"joined": JOINED if self.made_of else None, "joined_of": self.made_of}

    def renew(
        self,
        clips: Sequence[FinishedClip],
        fades: Sequence[int],
        *,
        complete: bool,
        base_seed: int,
        announce: Callable[[], None],
    ) -> Path | None:
        """The video of these clips, each of which fades in over so many frames; None without a clip.

        `complete`: they are all of the run. `announce` writes run.json before the file changes. One that somebody has
        changed moves to `redone/`, as one does that the new one does not begin with.
        """
        if not clips:
            return None
        parts = [clip.fingerprint + (f" fade {fade}" if fade else "") for clip, fade in zip(clips, fades, strict=True)]
        parts = [self._source, *parts] if self._settings.include_source else parts
        if self._settings.until is not None and complete:
            parts.append(file_digest(Path(self._settings.until)))
        kept = self._written.keep(JOINED)
        if parts == self._made_here and kept is not None:
            return self.path
        if self.made_of != parts[: len(self.made_of)] or not self.made_of:
            self._folder.set_aside(JOINED)
        new = self.path.with_name(f".{JOINED}.new{media.PIECE}")
        try:
            self._join(new, clips, fades, complete, base_seed)
            self.made_of = parts
            self._written.announce(JOINED, file_digest(new))
            announce()
            publish(new, self.path)
        finally:
            new.unlink(missing_ok=True)  # it has its final name
        self._made_here = parts
        return self.path

    @functools.cached_property
    def _assembly(self) -> media.Assembly:
        """The joined video that begins with the source, of which each picture is encoded once in a run."""
        settings = self._settings
        return media.Assembly(Path(settings.video or ""), self.path, until=settings.from_, into=settings.until)

    def _join(
        self, new: Path, clips: Sequence[FinishedClip], fades: Sequence[int], complete: bool, base_seed: int
    ) -> None:
        videos, drops = [clip.video for clip in clips], [clip.dropped for clip in clips]
        summary = {"clips": [video.name for video in videos], "base_seed": base_seed}
        metadata = None if self._settings.no_video_metadata else summary
        if self._settings.include_source:
            self._assembly.renew(videos, drops, metadata, complete=complete, to=new)
            return
        # one repeated frame is the source's last; more of them are another rendering of what is known
        drops[0] = 0 if drops[0] == 1 else drops[0]
        media.join_videos(videos, new, drops=drops, fades=fades, metadata=metadata)


def _made_of(source: str, before: Mapping[str, Any]) -> list[str]:
    """What the joined video of the run so far is made of; empty where nobody knows.

    0.1.0 did not write it down, but joined every clip of a run that it joined at all.
    """
    if "joined_of" in before:
        return list(before["joined_of"])
    if not before.get("joined"):
        return []
    begin = [source] if (before.get("arguments") or {}).get("include_source") else []
    return begin + [str(clip.get("fingerprint")) for clip in before.get("clips", ())]
