"""A picture file, however deep, transparent or wide in colour -> RGB for a standard screen."""

from __future__ import annotations

import io
import os
import stat
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from wan.errors import UserError
from wan.files import write_bytes
from wan.media.colour import levels, over_white
from wan.media.source import say_once
from wan.types import UInt8Array

_WEBP = {"quality": 70, "method": 2, "loop": 0}
_ROUNDING = 3  # levels by which a conversion from sRGB to sRGB may differ


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file as an RGB image in sRGB, turned as its EXIF says, over white where it is transparent.

    Raises UserError.
    """
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # opening a pipe would wait for ever
            raise UserError(f"cannot read image {name!r}: it is not a file; give the name of a picture file")
        with Image.open(name) as image:
            return _to_rgb(image, name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        found = getattr(error, "strerror", None) or "it is no picture that Pillow knows, or it is damaged"
        raise UserError(f"cannot read image {name!r}: {found}; give a PNG or JPEG file") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    profile, is_pnm = image.info.get("icc_profile"), image.format == "PPM"
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits and more, which Pillow would clip
        values = np.asarray(image)
        if is_pnm and image.mode == "I":  # Pillow spreads any depth over 16 bits
            values = values.astype(np.uint16)
        image = Image.fromarray(levels(values)[..., 0])
    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))
        image = Image.fromarray(over_white(np.ascontiguousarray(pixels[..., :3]), pixels[..., 3:], name))
    plain = image.convert("RGB")
    return plain if profile is None else _in_srgb(image, plain, profile, name)


def _in_srgb(image: Image.Image, plain: Image.Image, profile: bytes, name: str) -> Image.Image:
    """A picture by its colour profile; `plain` is the picture without it."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        form = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(theirs.profile.xcolor_space.strip())
        if form is None or (form == "CMYK") != (image.mode == "CMYK"):
            return plain  # of another kind than the picture: no tool uses it
        found = ImageCms.profileToProfile(
            image if image.mode == form else plain.convert(form),
            theirs,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        say_once(name, "its colour profile cannot be read; its colours are taken for sRGB's")
        return plain
    if found is None or np.abs(np.asarray(found, np.int16) - np.asarray(plain)).max() <= _ROUNDING:
        return plain
    return found


def write_webp(path: Path, frames: UInt8Array, fps: Fraction) -> None:
    """uint8 [F, h, w, 3] RGB frames as a moving picture that is there whole or not at all."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), **_WEBP)
    write_bytes(path, data.getvalue())
