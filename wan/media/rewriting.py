"""A finished video -> another one with its rate and its sound, picture by picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wan.media.colour import to_rgb
from wan.media.reading import first_frame
from wan.media.sound import Sound, choose_track, listen
from wan.media.source import Picture, Pictures, Source, inspect
from wan.media.writing import write_video


def rewrite_video(
    source: str | os.PathLike[str],
    path: Path,
    change: Callable[[Picture], Picture],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Write an mp4 of one of ours, each picture uint8 [H, W, 3] as `change` gives it back; returns the frame count.

    Rate and sound stay as they are. One picture is in memory at a time. Raises UserError as `write_video` does.
    """
    opened = inspect(source)
    frames = (change(to_rgb(frame, opened)) for frame in Pictures(opened))
    return write_video(path, frames, opened.fps, metadata=metadata, sound=_whole_sound(opened))


def _whole_sound(source: Source) -> Sound | None:
    track = choose_track(source)
    hearing = None if track is None else listen(track)
    if track is None or hearing is None:
        return None
    begin = first_frame(source).time
    return Sound(track, hearing, source.start if begin is None else begin, hearing.end)
