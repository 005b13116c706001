#!/usr/bin/env python3
"""Videos, the seams of a chain and the ends of its clips as one picture.

python examples/contact_sheet.py OUT.png VIDEO [VIDEO ...] [--seams CHAIN_FOLDER] [--ends CHAIN_FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

from wan.chain.finished_clip import FinishedClip
from wan.chain.run_folder import RunFolder
from wan.errors import UserError
from wan.media import probe, read_last_frame, read_tail, sample_frames

Frame = Image.Image
ACROSS, MARGIN, TITLE = 980, 4, 16  # pixels
COLUMNS = 6  # frames of a video
BESIDE = 2  # frames on each side of a seam
ALL = 10_000  # frames, more than a clip has


def video_row(video: Path) -> tuple[str, list[Frame]]:
    """Five frames spread over a video and its last."""
    return video.name, [*map(Image.fromarray, sample_frames(video, COLUMNS - 1)), read_last_frame(video)]


def seam_rows(clips: list[FinishedClip]) -> list[tuple[str, list[Frame]]]:
    """For each seam of a chain the last frames before it and the first ones after it."""
    rows = []
    for before, after in pairwise(clips):
        new = _frames(after.video)[int(after.record["dropped"]) :]
        title = f"end of clip {before.number} | start of clip {after.number}"
        rows.append((title, [*_frames(before.video)[-BESIDE:], *new[:BESIDE]]))
    return rows


def ends_row(clips: list[FinishedClip]) -> tuple[str, list[Frame]]:
    """The last frame of each clip of a chain."""
    return f"a chain of {len(clips)}: the last frame of each clip", [read_last_frame(clip.video) for clip in clips]


def contact_sheet(rows: list[tuple[str, list[Frame]]]) -> Image.Image:
    """Each row's frames under its title, as large as fits across."""
    drawn = []
    for title, frames in rows:
        width = (ACROSS + MARGIN) // len(frames) - MARGIN
        drawn.append((title, [frame.resize((width, frame.height * width // frame.width)) for frame in frames]))
    height = sum(pictures[0].height + MARGIN + TITLE for _, pictures in drawn)
    sheet = Image.new("RGB", (ACROSS, height), "white")
    top = 0
    for title, pictures in drawn:
        ImageDraw.Draw(sheet).text((2, top + 2), title, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * (picture.width + MARGIN), top + TITLE))
        top += pictures[0].height + MARGIN + TITLE
    return sheet


def _frames(video: Path) -> list[Frame]:
    return [Image.fromarray(frame) for frame in read_tail(video, ALL, probe(video).fps)]


def _clips(folder: Path) -> list[FinishedClip]:
    found = list(RunFolder(folder).clips().values())
    if not found:
        raise UserError(f"{folder} holds no finished clip; name the folder of a chain")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--seams", type=Path, help="the folder of a chain whose seams are shown")
    parser.add_argument("--ends", type=Path, help="the folder of a chain of which each clip's last frame is shown")
    arguments = parser.parse_args()
    rows = [video_row(video) for video in arguments.videos]
    if arguments.seams:
        rows += seam_rows(_clips(arguments.seams))
    if arguments.ends:
        rows.append(ends_row(_clips(arguments.ends)))
    contact_sheet(rows).save(arguments.out, optimize=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
