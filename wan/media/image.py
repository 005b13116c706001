"""A picture file -> RGB for a standard screen."""

from __future__ import annotations

import io
import os
import stat
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from wan.errors import UserError
from wan.files import write_bytes
from wan.media.source import open_picture
from wan.pictures import as_shown

if TYPE_CHECKING:  # it needs PyTorch, which reading a file should not wait for
    from wan.types import UInt8Array

_WEBP = {"quality": 70, "method": 2, "loop": 0}


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file as an RGB image in sRGB, turned as its EXIF says, over white where it is transparent.

    Raises UserError.
    """
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # opening a pipe would wait for ever
            raise UserError(f"cannot read image {name!r}: it is not a file; give the name of a picture file")
        with open_picture(name) as image:
            return as_shown(image, name)
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "it is no picture that Pillow knows, or it is damaged"
        raise UserError(f"cannot read image {name!r}: {reason}; give a PNG or JPEG file") from error


def write_png(path: Path, picture: Image.Image) -> None:
    """A picture without loss, whole or not at all; packed loosely, which takes a fifth of the time."""
    data = io.BytesIO()
    picture.save(data, "PNG", compress_level=1)
    write_bytes(path, data.getvalue())


def as_webp(frames: UInt8Array, fps: Fraction) -> bytes:
    """uint8 [F, h, w, 3] RGB frames as the file of a moving picture."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), **_WEBP)
    return data.getvalue()
