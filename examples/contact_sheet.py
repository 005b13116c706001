#!/usr/bin/env python3
"""Videos as rows of pictures: `python examples/contact_sheet.py OUT.png VIDEO [VIDEO ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from wan.errors import UserError
from wan.media import read_last_frame, sample_frames

WIDTH, COLUMNS, MARGIN, TITLE = 160, 6, 4, 16


def contact_sheet(videos: list[Path]) -> Image.Image:
    """One row a video: five frames spread over it and its last, each WIDTH pixels wide."""
    rows = []
    for video in videos:
        frames = [Image.fromarray(frame) for frame in sample_frames(video, COLUMNS - 1)] + [read_last_frame(video)]
        rows.append([frame.resize((WIDTH, frame.height * WIDTH // frame.width)) for frame in frames])
    height = sum(row[0].height + MARGIN + TITLE for row in rows)
    sheet = Image.new("RGB", (COLUMNS * (WIDTH + MARGIN) - MARGIN, height), "white")
    top = 0
    for video, row in zip(videos, rows, strict=True):
        ImageDraw.Draw(sheet).text((2, top + 2), video.name, fill="black")
        for column, frame in enumerate(row):
            sheet.paste(frame, (column * (WIDTH + MARGIN), top + TITLE))
        top += row[0].height + MARGIN + TITLE
    return sheet


if __name__ == "__main__":
    try:
        contact_sheet([Path(name) for name in sys.argv[2:]]).save(sys.argv[1])
    except (UserError, IndexError) as error:
        sys.exit(f"{error}\n{__doc__}")
