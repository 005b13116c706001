"""Looks at what clients send, in a process of its own with limits: a file that was made to hurt ends that one.

    python -m wan.server.decode inspect FILE PICTURE
    python -m wan.server.decode thumbnail|spritesheet FILE PICTURE

The last line of stdout is JSON.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

import psutil

from wan.errors import UserError
from wan.server.errors import ApiError, public
from wan.server.processes import kill

SECONDS = 120.0  # that one file may take
MEMORY = 8 << 30  # bytes of address space
MOST_PIXELS = 8192 * 8192
LONGEST = 6 * 3600.0  # seconds of a video
THUMBNAIL, TILE = 640, 320  # pixels of the longer side
TILES = (5, 4)  # columns and rows of a sprite sheet

_turns = asyncio.Semaphore(2)


async def decode(what: str, file: Path, picture: Path) -> dict[str, Any]:
    """Run this module as a program. Raises ApiError for a file that cannot be read, or that takes too much."""
    async with _turns:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "wan.server.decode", what, str(file), str(picture)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(), SECONDS)
        except asyncio.TimeoutError as error:  # no TimeoutError before Python 3.11
            raise ApiError("the file takes too long to read; send a shorter or smaller one") from error
        finally:
            if process.returncode is None:
                kill(process)
                await process.wait()
    try:
        facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ApiError("the file cannot be read: it is damaged, or needs too much memory") from error
    if "error" in facts:
        raise ApiError(public(facts["error"]))
    return facts


def main(words: list[str]) -> int:
    """Do what the words say, and print what was found."""
    _limit()
    what, file, picture = words[0], Path(words[1]), Path(words[2])
    try:
        facts = {"inspect": _inspect, "thumbnail": _thumbnail, "spritesheet": _spritesheet}[what](file, picture)
    except UserError as error:
        facts = {"error": str(error).replace(str(file), "the file").replace(repr(str(file)), "the file")}
    print(json.dumps(facts))
    return 0


def _limit() -> None:
    """What this process may use, where the system keeps to it."""
    process = psutil.Process()
    if hasattr(process, "rlimit"):
        process.nice(19)  # a chain that is being made goes first
        for name, limit in {"RLIMIT_CPU": int(SECONDS), "RLIMIT_AS": MEMORY, "RLIMIT_CORE": 0}.items():
            hard = process.rlimit(getattr(psutil, name))[1]
            limit = limit if hard < 0 else min(limit, hard)
            process.rlimit(getattr(psutil, name), (limit, limit))


def _inspect(file: Path, picture: Path) -> dict[str, Any]:
    """Whether it is a picture or a video, and of what size; a picture is written anew as PNG, a video's last frame."""
    from wan import media

    try:
        image = media.read_image(file)
    except UserError as no_picture:
        try:
            info = media.probe(file)
        except UserError as error:
            raise UserError("the file is neither a video nor a picture that can be read") from (error or no_picture)
        if info.width * info.height > MOST_PIXELS or (info.duration or 0) > LONGEST:
            raise UserError("the video is too large or too long") from None
        media.write_png(picture, media.read_last_frame(file))
        seconds = info.duration
        return {
            "kind": "video",
            "width": info.width,
            "height": info.height,
            "seconds": None if seconds is None else float(seconds),
            "fps": float(info.fps),
        }
    if image.width * image.height > MOST_PIXELS:
        raise UserError("the picture is too large")
    media.write_png(picture, image)
    return {"kind": "picture", "width": image.width, "height": image.height, "seconds": 0.0, "fps": 0.0}


def _thumbnail(file: Path, picture: Path) -> dict[str, Any]:
    from PIL import Image

    from wan import media

    frame = Image.fromarray(media.sample_frames(file, 1, max_side=THUMBNAIL)[0])
    frame.save(picture, "WEBP", quality=85)
    return {"width": frame.width, "height": frame.height}


def _spritesheet(file: Path, picture: Path) -> dict[str, Any]:
    from PIL import Image

    from wan import media

    columns, rows = TILES
    frames = media.sample_frames(file, columns * rows, max_side=TILE)
    height, width = frames.shape[1:3]
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(frames) / columns)))
    for index, frame in enumerate(frames):
        sheet.paste(Image.fromarray(frame), (index % columns * width, index // columns * height))
    sheet.save(picture, "JPEG", quality=88)
    return {"width": sheet.width, "height": sheet.height}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
