"""A picture file -> RGB for a standard screen."""

from __future__ import annotations

import os
import stat

from PIL import Image

from wan.errors import UserError
from wan.media.source import open_picture
from wan.pictures import as_shown


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
        found = getattr(error, "strerror", None) or "it is no picture that Pillow knows, or it is damaged"
        raise UserError(f"cannot read image {name!r}: {found}; give a PNG or JPEG file") from error
