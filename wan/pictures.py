"""PIL pictures: however deep, transparent or wide in colour -> RGB for a standard screen; scaled to cover a size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps

from wan.files import say_once

_BAND = 256  # rows that are computed with at a time, so that a large picture takes little more than itself
_HIGHLIGHTS = 16.0  # floats up to here are light, of which 1 is white
_ROUNDING = 3  # levels by which a conversion from sRGB to sRGB may differ


def as_shown(image: Image.Image, name: str = "") -> Image.Image:
    """A picture as a viewer shows it: RGB in sRGB, turned as its EXIF says, over white where it is transparent.

    It comes back without what was followed, so that doing it twice changes nothing. `name` is for messages.
    """
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:
        return image
    name = name or str(getattr(image, "filename", "") or "picture")
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
    shown = plain if profile is None else _in_srgb(image, plain, profile, name)
    shown.info = {}
    return shown


def levels(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Grey values of any depth -> uint8 [H, W, 1].

    Integers span 16 bits, or the 8, 16 or 32 bits that hold them all where their type is wider. Of floats 1 is white,
    unless they go far beyond it: then 255 or 65535 is.
    """
    bands = [values[top : top + _BAND] for top in range(0, len(values), _BAND)]
    most = max(float(np.nan_to_num(band.astype(np.float64)).max()) for band in bands)
    if values.dtype.kind == "f":
        top = 1.0 if most <= _HIGHLIGHTS else 255.0 if most <= 255 else 65535.0
    elif values.dtype.itemsize == 2:
        top = 65535.0
    else:
        top = next(top for top in (255.0, 65535.0, 2.0**32 - 1) if most <= top)
    shown = (np.nan_to_num(band.astype(np.float64)) / top * 255 for band in bands)
    return np.concatenate([np.rint(band).clip(0, 255).astype(np.uint8) for band in shown])[..., None]


def over_white(pixels: npt.NDArray[np.uint8], opacity: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """RGB over white where it is transparent, which is said once; `opacity` is [H, W, 1], opaque at its type's most."""
    top = np.iinfo(opacity.dtype).max
    if opacity.min() == top:
        return pixels
    say_once(name, "the picture is transparent in places; white is put behind it")
    result = np.empty_like(pixels)
    for row in range(0, len(pixels), _BAND):
        band = slice(row, row + _BAND)
        share = opacity[band].astype(np.float32) / top
        result[band] = np.rint(pixels[band] * share + 255 * (1 - share)).astype(np.uint8)
    return result


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image scaled to cover width x height and cropped around its centre."""
    scale = max(width / image.width, height / image.height)
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def _in_srgb(image: Image.Image, plain: Image.Image, profile: bytes, name: str) -> Image.Image:
    """A picture by its colour profile; `plain` is the picture without it."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        form = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(theirs.profile.xcolor_space.strip())
        if form is None or (form == "CMYK") != (image.mode == "CMYK"):
            return plain  # of another kind than the picture: no tool uses it
        converted = ImageCms.profileToProfile(
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
    if converted is None or np.abs(np.asarray(converted, np.int16) - np.asarray(plain)).max() <= _ROUNDING:
        return plain
    return converted
