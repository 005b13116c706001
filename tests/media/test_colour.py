"""Deep, transparent and wide-coloured pictures and films look as they should on a standard screen."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms, features

from tests.support.media_samples import CORPUS, add_video
from wan import files, media
from wan.errors import UserError
from wan.media import VideoError, as_webp, colour, light, source

RAMP = np.array([0, 64, 128, 191, 255])
# Kr and Kb of H.273's matrix coefficients
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
WEIGHTS |= {9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    files._say.cache_clear()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def stripes(values: npt.NDArray[Any], side: int = 16) -> npt.NDArray[Any]:
    """[n] or [n, channels] -> a picture with a stripe of 16 x 16 pixels for each."""
    return np.repeat(np.repeat(values[None], side, 0), side, 1)


def middles(picture: Any) -> npt.NDArray[Any]:
    """What the stripes show, [n, 3]."""
    return np.asarray(picture)[8, 8::16].astype(int)


def film(
    path: Path, picture: npt.NDArray[Any], given: str, codec: str, pixels: str, tags: tuple[int, int, int]
) -> None:
    """Four pictures with these H.273 numbers for primaries, transfer and matrix."""
    primaries, transfer, matrix = tags
    with av.open(str(path), "w") as container:
        height, width = picture.shape[:2]
        stream = add_video(container, codec, rate=10, size=(width, height), pixels=pixels)
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = primaries, transfer, matrix
        for at in range(4):
            if pixels == "yuv444p10le":
                frame = in_yuv(picture, matrix)
            else:
                frame = av.VideoFrame.from_ndarray(picture, given)
                frame = frame.reformat(format=pixels, dst_colorspace=1, interpolation=colour.SWS_FLAGS)
            frame.pts, frame.time_base = at, Fraction(1, 10)
            frame.color_primaries, frame.color_trc = primaries, transfer
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def in_yuv(picture: npt.NDArray[Any], matrix: int) -> av.VideoFrame:
    """RGB as yuv444p10le of limited range, by the definition of its H.273 matrix."""
    red, blue = WEIGHTS[matrix]
    r, g, b = picture.transpose(2, 0, 1) / 255.0
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = luma * 876 + 64, (b - luma) / (1 - blue) * 448 + 512, (r - luma) / (1 - red) * 448 + 512
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], "yuv444p10le")
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((picture.shape[0], plane.line_size // 2), "<u2")
        rows[:, : picture.shape[1]] = np.rint(values)
        plane.update(rows.tobytes())
    return frame


COLOURS = np.array(
    [[220, 60, 60], [60, 200, 60], [60, 60, 220], [220, 220, 60], [100, 110, 120], [245, 245, 245], [200, 150, 120]],
    np.uint8,
)
# The matrices that BT.2087 and the usual tables of Display P3 give, in four digits.
FROM_2020 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
FROM_P3 = [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]


def converted(colours: npt.NDArray[Any], matrix: list[list[float]], gamma: float = 2.4) -> npt.NDArray[Any]:
    screen = (colours / 255.0) ** gamma @ np.array(matrix).T
    levels: npt.NDArray[Any] = np.rint(screen.clip(0, 1) ** (1 / gamma) * 255).astype(int)
    return levels


@pytest.mark.parametrize(
    ("tags", "matrix", "word"),
    [((9, 14, 9), FROM_2020, "BT.2020"), ((9, 1, 9), FROM_2020, "BT.2020"), ((12, 1, 1), FROM_P3, "Display P3")],
)
@pytest.mark.parametrize(
    ("codec", "pixels"), [("ffv1", "yuv444p10le"), ("ffv1", "gbrp10le"), ("libx265", "yuv444p10le")]
)
def test_wide_colours_of_sdr_footage_are_converted(
    codec: str,
    pixels: str,
    tags: tuple[int, int, int],
    matrix: list[list[float]],
    word: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "a.mkv"
    film(path, stripes(COLOURS), "rgb24", codec, pixels, tags if pixels != "gbrp10le" else (*tags[:2], 0))
    expected = converted(COLOURS, matrix)
    assert np.abs(expected - COLOURS).max() > 15
    assert np.abs(middles(media.read_last_frame(path)) - expected).max() <= 2
    assert np.abs(middles(media.sample_frames(path, 1)[0]) - expected).max() <= 2
    assert len([line for line in warnings_in(caplog) if word in line]) == len(warnings_in(caplog)) == 1


def test_display_p3_with_the_curve_of_srgb_is_converted_by_that(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", stripes(COLOURS), "rgb24", "ffv1", "gbrp10le", (12, 13, 0))
    curve = np.where(COLOURS <= 10, COLOURS / 255 / 12.92, ((COLOURS / 255 + 0.055) / 1.055) ** 2.4)
    screen = (curve @ np.array(FROM_P3).T).clip(0, 1)
    expected = 255 * np.where(screen <= 0.0031308, 12.92 * screen, 1.055 * screen ** (1 / 2.4) - 0.055)
    assert np.abs(middles(media.read_last_frame(tmp_path / "a.mkv")) - expected).max() <= 2


@pytest.mark.parametrize("tags", [(1, 1, 1), (6, 6, 6), (5, 6, 5), (2, 2, 1)])
def test_ordinary_colours_stay_as_they_are(
    tags: tuple[int, int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    film(tmp_path / "a.mkv", stripes(COLOURS), "rgb24", "ffv1", "yuv444p10le", tags)
    assert np.abs(middles(media.read_last_frame(tmp_path / "a.mkv")) - COLOURS).max() <= 1
    assert warnings_in(caplog) == []


@pytest.mark.parametrize(
    ("transfer", "coded"), [(8, "linear"), (9, "logarithmic"), (10, "logarithmic"), (17, "of digital cinema")]
)
def test_tones_that_are_not_those_of_a_screen_are_said(
    transfer: int, coded: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    film(tmp_path / "a.mkv", stripes(COLOURS), "rgb24", "ffv1", "gbrp10le", (1, transfer, 0))
    media.read_last_frame(tmp_path / "a.mkv")
    media.read_last_frame(tmp_path / "a.mkv")
    assert len(warnings_in(caplog)) == 1 and f"{coded} and are taken for BT.709's" in caplog.text


def test_primaries_that_are_not_converted_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    film(tmp_path / "a.mkv", stripes(COLOURS), "rgb24", "ffv1", "gbrp10le", (4, 1, 0))
    media.read_last_frame(tmp_path / "a.mkv")
    media.read_last_frame(tmp_path / "a.mkv")
    assert len(warnings_in(caplog)) == 1 and "H.273 number 4" in caplog.text


def test_white_stays_white_for_all_primaries() -> None:
    white = np.full((1, 1, 3), 65535, np.uint16)
    for number in light.WIDE:
        assert (light.narrow(white, number, 1) >= 254).all()
        assert np.abs(light.to_709(light.WIDE[number][1]).sum(1) - 1).max() < 1e-3


def test_hdr_of_other_primaries_is_tone_mapped_by_them() -> None:
    """The same light, coded for BT.2020, Display P3 and BT.709."""
    seen = np.array([0.1, 0.3, 0.05])
    shown = []
    for number, matrix in ((9, FROM_2020), (12, FROM_P3), (1, np.eye(3))):
        nits = np.linalg.solve(np.array(matrix), seen) * 203 / 10000
        power = nits ** (2610 / 16384)
        signal = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
        shown.append(
            light.tone_map(np.rint(signal * 65535).astype(np.uint16)[None, None], 16, number)[0, 0].astype(int)
        )
    assert max(np.abs(one - shown[0]).max() for one in shown) <= 1


# Red whose opacity falls from all to nothing; what lies under the last is black, as most tools leave it.
STICKER = np.array([[200, 40, 40, 255], [200, 40, 40, 128], [0, 0, 0, 0]], np.uint8)
ON_WHITE = np.array([[200, 40, 40], [227, 147, 147], [255, 255, 255]])


def by_pyav(codec: str, pixels: str) -> Callable[[Path], None]:
    return lambda path: film(path, stripes(STICKER), "rgba", codec, pixels, (1, 1, 0 if "y" not in pixels else 1))


def by_pillow(mode: str, **options: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        image = Image.fromarray(stripes(STICKER)).convert(mode)
        image.save(path, save_all=True, append_images=[image.copy()], duration=[100, 100], **options)

    return make


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.webm", by_pyav("libvpx-vp9", "yuva420p")),
        ("a.mkv", by_pyav("ffv1", "yuva420p")),
        ("a.mkv", by_pyav("ffv1", "gbrap16le")),
        ("a.mov", by_pyav("prores_ks", "yuva444p10le")),
        ("a.mov", by_pyav("qtrle", "argb")),
        ("a.mov", by_pyav("png", "rgba")),
        ("a.avi", by_pyav("utvideo", "gbrap")),
        ("a.png", by_pillow("RGBA")),
        ("a.webp", by_pillow("RGBA", lossless=True)),
        pytest.param(
            "a.avif",
            by_pillow("RGBA", quality=100),
            marks=pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_transparent_film_is_shown_on_white(
    name: str, make: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / name)
    for seen in (media.read_last_frame(tmp_path / name), media.sample_frames(tmp_path / name, 2)[0]):
        assert np.abs(middles(seen) - ON_WHITE).max() <= (4 if name in ("a.webm", "a.mov") else 2)
    assert len(warnings_in(caplog)) == 1 and "transparent" in caplog.text


def test_a_transparent_gif_is_shown_on_white(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It knows no half."""
    image = Image.fromarray(stripes(STICKER[[0, 2]]))
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.copy()], duration=[100, 100], disposal=2)
    for seen in (media.read_last_frame(tmp_path / "a.gif"), media.read_image(tmp_path / "a.gif")):
        assert np.abs(middles(seen) - ON_WHITE[[0, 2]]).max() <= 2
    assert len(warnings_in(caplog)) == 1 and "transparent" in caplog.text


@pytest.mark.parametrize(("name", "pixels"), [("a.webm", "yuva420p"), ("a.mkv", "bgra")])
def test_what_lies_under_transparency_is_not_seen_in_smaller_pictures(name: str, pixels: str, tmp_path: Path) -> None:
    codec = "libvpx-vp9" if name == "a.webm" else "ffv1"
    edge = stripes(np.array([[255, 255, 255, 255], [0, 0, 0, 0]], np.uint8), 31)
    film(tmp_path / name, edge[:30], "rgba", codec, pixels, (1, 1, 1 if "y" in pixels else 0))
    assert media.sample_frames(tmp_path / name, 1, max_side=20).min() >= (225 if name == "a.webm" else 250)


def test_an_opaque_film_with_an_alpha_channel_gives_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solid = np.concatenate([COLOURS, np.full((len(COLOURS), 1), 255, np.uint8)], 1)
    film(tmp_path / "a.mov", stripes(solid), "rgba", "png", "rgba", (1, 1, 0))
    assert (middles(media.read_last_frame(tmp_path / "a.mov")) == COLOURS).all()
    assert warnings_in(caplog) == []


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode in ("RGBA", "LA") for kind in ("png", "webp", "tiff")]
    + [("PA", "png"), ("P", "png"), ("L", "png"), ("RGB", "png")],
)
def test_a_transparent_picture_is_shown_on_white(
    mode: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = Image.fromarray(stripes(STICKER[[0, 2]]))
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    if mode in ("P", "L", "RGB"):  # one colour is named transparent
        options["transparency"] = {"P": 1, "L": 0, "RGB": (0, 0, 0)}[mode]
        plain = picture.convert("RGB").convert(mode)
        if mode == "P":
            plain = Image.fromarray(stripes(np.array([0, 1], np.uint8)), "P")
            plain.putpalette([200, 40, 40, 0, 0, 0])
    else:
        plain = picture.quantize(4) if mode == "PA" else picture.convert(mode)
    plain.save(tmp_path / f"a.{kind}", **options)
    seen = middles(media.read_image(tmp_path / f"a.{kind}"))
    first = ON_WHITE[0] if mode not in ("L", "LA") else np.full(3, 88)
    assert np.abs(seen - [first, ON_WHITE[2]]).max() <= 2
    assert len(warnings_in(caplog)) == 1 and "transparent" in caplog.text


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", RAMP.astype(np.uint16) * 257),
        ("a.tiff", RAMP.astype(np.uint16) * 257),
        ("a.tiff", RAMP.astype(np.int32)),
        ("b.tiff", RAMP.astype(np.int32) * 257),
        ("a.tiff", (RAMP / 255).astype(np.float32)),
        ("b.tiff", (RAMP / 255 * 1.0001).astype(np.float32)),
        ("c.tiff", RAMP.astype(np.float32)),
        ("d.tiff", RAMP.astype(np.float32) * 257),
        ("a.pgm", RAMP.astype(np.uint16) * 257),
        ("a.pfm", (RAMP / 255).astype(np.float32)),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_grey_pictures_of_any_depth_keep_their_levels(name: str, values: npt.NDArray[Any], tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("pgm"):
        path.write_bytes(b"P5 80 16 65535\n" + stripes(values).astype(">u2").tobytes())
    else:
        Image.fromarray(stripes(values)).save(path)
    assert np.abs(middles(media.read_image(path)) - RAMP[:, None]).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(stripes(RAMP.astype(np.uint16))).save(tmp_path / "a.png")
    assert np.asarray(media.read_image(tmp_path / "a.png")).max() == 1
    (tmp_path / "a.pgm").write_bytes(b"P5 80 16 65535\n" + stripes(RAMP).astype(">u2").tobytes())
    assert np.asarray(media.read_image(tmp_path / "a.pgm")).max() == 1


def test_floats_that_are_no_numbers_are_black(tmp_path: Path) -> None:
    Image.fromarray(stripes(np.array([np.nan, 1.0, -3.0], np.float32))).save(tmp_path / "a.tiff")
    assert middles(media.read_image(tmp_path / "a.tiff")).tolist() == [[0] * 3, [255] * 3, [0] * 3]


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("a.mkv", "ffv1", "gray16le"), ("a.mkv", "ffv1", "gray10le"), ("a.mov", "png", "gray16be")],
)
def test_grey_films_of_any_depth_keep_their_levels(name: str, codec: str, pixels: str, tmp_path: Path) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream = add_video(container, codec, rate=10, size=(80, 16), pixels=pixels)
        frame = av.VideoFrame.from_ndarray(stripes(RAMP.astype(np.uint16) * 257), "gray16le")
        for packet in [*stream.encode(frame.reformat(format=pixels)), *stream.encode(None)]:
            container.mux(packet)
    assert np.abs(middles(media.read_last_frame(tmp_path / name)) - RAMP[:, None]).max() <= 1


def test_grey_frames_of_floats_keep_their_levels() -> None:
    opened = source.inspect(CORPUS / "h264_faststart.mp4")
    frame = av.VideoFrame.from_ndarray(stripes((RAMP / 255).astype(np.float32)), "grayf32le")
    assert np.abs(middles(colour.to_rgb(frame, opened)) - RAMP[:, None]).max() <= 1


@pytest.mark.parametrize("pixels", ["grayf16le", "rgbf16le"])
def test_pixel_formats_that_cannot_be_scaled_are_shown(pixels: str) -> None:
    opened = source.inspect(CORPUS / "h264_faststart.mp4")
    assert colour.to_rgb(av.VideoFrame(64, 32, pixels), opened).shape == (32, 64, 3)


def profile_of_display_p3() -> bytes:
    """sRGB's profile with the colorants of Display P3 (X, Y, Z by D50)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    colorants = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189)}
    colorants[b"bXYZ"] = (0.15710, 0.06657, 0.78407)
    for number in range(struct.unpack(">I", data[128:132])[0]):
        tag, at, _ = struct.unpack(">4sII", data[132 + 12 * number : 144 + 12 * number])
        if tag in colorants:
            data[at + 8 : at + 20] = struct.pack(">3i", *(round(value * 65536) for value in colorants[tag]))
    return bytes(data)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_a_picture_with_the_profile_of_a_phone_is_converted_to_srgb(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    picture = Image.fromarray(stripes(COLOURS))
    picture.save(tmp_path / f"a.{kind}", icc_profile=profile_of_display_p3(), **options)
    curve = ((COLOURS / 255 + 0.055) / 1.055) ** 2.4
    screen = (curve @ np.array(FROM_P3).T).clip(0, 1)
    expected = 255 * np.where(screen <= 0.0031308, 12.92 * screen, 1.055 * screen ** (1 / 2.4) - 0.055)
    assert np.abs(middles(media.read_image(tmp_path / f"a.{kind}")) - expected).max() <= 2


def test_a_picture_with_the_profile_of_srgb_stays_bit_for_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert (np.asarray(media.read_image(tmp_path / "a.png")) == pixels).all()


def test_a_broken_profile_is_said_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(stripes(COLOURS)).save(tmp_path / "a.png", icc_profile=b"not a profile" * 20)
    assert (middles(media.read_image(tmp_path / "a.png")) == COLOURS).all()
    assert len(warnings_in(caplog)) == 1 and "profile" in caplog.text


def test_images_are_read_upright_or_refused_in_one_line(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "photo.jpg", exif=exif)
    picture = media.read_image(tmp_path / "photo.jpg")
    assert (picture.mode, picture.size) == ("RGB", (20, 40))
    for bad in (tmp_path, tmp_path / "none.png", CORPUS / "text.mp4", CORPUS / "zero_length.mp4"):
        with pytest.raises(UserError) as caught:
            media.read_image(bad)
        assert "\n" not in str(caught.value)


def test_white_is_adapted_by_bradford_s_cones() -> None:
    # XYZ of D50 -> XYZ of D65, as published by Bruce Lindbloom
    published = np.array(
        [[0.9555766, -0.0230393, 0.0631636], [-0.0282895, 1.0099416, 0.0210077], [0.0122982, -0.0204830, 1.3299098]]
    )
    of_print = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.34567, 0.35850))
    ours = np.linalg.inv(light._to_xyz(light._BT709_PRIMARIES))
    assert np.abs(light.to_709(of_print) - ours @ published @ light._to_xyz(of_print)).max() < 2e-3


def picture_of(**values: Any) -> Any:
    """What the rules read of a picture and of its file."""
    plain: dict[str, Any] = {"width": 64, "height": 32, "colorspace": 2, "color_trc": 2, "color_primaries": 2}
    plain |= {"color_range": 0, "format": SimpleNamespace(name="yuv420p", is_rgb=False, components=[])}
    return SimpleNamespace(**(plain | values))


def file_of(**values: Any) -> Any:
    return SimpleNamespace(**({"path": "a.mp4", "codec_tag": "avc1", "sample_aspect_ratio": Fraction(1)} | values))


@pytest.mark.parametrize(("transfer", "primaries"), [(0, 1), (3, 1), (9, 1), (19, 1), (1, 0), (1, 3), (3, 3)])
def test_numbers_that_are_reserved_or_not_known_are_no_hindrance(transfer: int, primaries: int) -> None:
    frame = in_yuv(stripes(COLOURS), 1)
    tags = frame.colorspace, frame.color_trc, frame.color_primaries = 1, transfer, primaries
    assert np.abs(middles(colour.to_rgb(frame, file_of())) - COLOURS).max() <= 1
    assert (frame.colorspace, frame.color_trc, frame.color_primaries) == tags


@pytest.mark.parametrize("matrix", WEIGHTS)
def test_every_matrix_is_undone_by_its_own_weights(matrix: int) -> None:
    frame = in_yuv(stripes(COLOURS), matrix)
    frame.colorspace = matrix
    assert np.abs(middles(colour.to_rgb(frame, file_of())) - COLOURS).max() <= 1


@pytest.mark.parametrize(
    ("width", "height", "number", "name"),
    [(1279, 576, 5, "601"), (1280, 576, 1, "709"), (720, 577, 1, "709"), (1280, 720, 1, "709"), (64, 32, 5, "601")],
)
def test_the_matrix_of_a_picture_without_tags_follows_its_size(
    width: int, height: int, number: int, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wan")
    for unspecified in (2, 3):
        assert colour._matrix(picture_of(width=width, height=height, colorspace=unspecified), file_of()) == number
    assert [record.levelname for record in caplog.records] == ["INFO"] and f"taken for BT.{name}" in caplog.text


def test_hdr_without_a_matrix_has_that_of_bt_2020_and_an_unknown_one_is_refused() -> None:
    assert [colour._matrix(picture_of(color_trc=trc), file_of()) for trc in (16, 18, 1)] == [9, 9, 5]
    assert colour._matrix(picture_of(colorspace=0), file_of()) == 1
    of_screens = SimpleNamespace(name="rgb24", is_rgb=True, components=[])
    assert colour._matrix(picture_of(colorspace=8, format=of_screens), file_of()) == 1
    with pytest.raises(VideoError, match=r"colour matrix \(H.273 number 8\) is not supported"):
        colour._matrix(picture_of(colorspace=8), file_of())


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("yuv420p", 0, 1),
        ("yuv420p", 1, 1),
        ("yuv420p", 2, 2),
        ("yuvj420p", 1, 2),
        ("gray", 1, 1),
        *((name, 0, 2) for name in ("rgb24", "gray", "gray10le", "ya8", "ya16le", "pal8", "monob")),
    ],
)
def test_the_range_of_levels_is_the_tag_s_or_the_format_s(name: str, stored: int, expected: int) -> None:
    form = SimpleNamespace(name=name, is_rgb=name == "rgb24")
    assert colour._range(picture_of(format=form, color_range=stored)) == expected


@pytest.mark.parametrize(
    ("values", "tag", "refused"),
    [
        ({"colorspace": 15}, "avc1", True),
        ({"colorspace": 2, "color_trc": 2}, "dvh1", True),
        ({"colorspace": 2, "color_trc": 2}, "avc1", False),
        ({"colorspace": 9, "color_trc": 2}, "dvh1", False),  # profile 8: a standard picture with tags
        ({"colorspace": 2, "color_trc": 16}, "dvh1", False),
    ],
)
def test_dolby_vision_is_refused_where_no_standard_picture_is_tagged(
    values: dict[str, int], tag: str, refused: bool
) -> None:
    if refused:
        with pytest.raises(VideoError, match="Dolby Vision"):
            colour._refuse_dolby_vision(picture_of(**values), file_of(codec_tag=tag))
    else:
        colour._refuse_dolby_vision(picture_of(**values), file_of(codec_tag=tag))


def test_primaries_near_bt_709_are_no_word_worth(caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 1, 2, 3, 5, 6, 7, 22):
        assert colour.wide_primaries(picture_of(color_primaries=number), file_of()) is None
    assert not caplog.records
    for number in (9, 11, 12):
        assert colour.wide_primaries(picture_of(color_primaries=number), file_of()) == number
    assert not caplog.records
    for number in (4, 8, 10):
        assert colour.wide_primaries(picture_of(color_primaries=number), file_of()) is None
        assert f"H.273 number {number}" in caplog.records[-1].message


@pytest.mark.parametrize(
    ("ratio", "most", "size"),
    [
        (Fraction(1), None, (720, 576)),
        (Fraction(16, 15), None, (768, 576)),
        (Fraction(1, 2), None, (720, 1152)),
        (Fraction(16, 15), 384, (384, 288)),
        (Fraction(1, 2), 576, (360, 576)),
        (Fraction(1), 720, (720, 576)),
        (Fraction(1), 2000, (720, 576)),
        (Fraction(1), 1, (1, 1)),
    ],
)
def test_the_short_side_is_stretched_to_square_pixels(ratio: Fraction, most: int | None, size: tuple[int, int]) -> None:
    frame, opened = picture_of(width=720, height=576), file_of(sample_aspect_ratio=ratio)
    assert colour._displayed_size(frame, opened, most) == size


def test_a_line_of_pixels_does_not_vanish_when_it_shrinks() -> None:
    for width, height, size in ((1000, 1, (10, 1)), (1, 1000, (1, 10))):
        assert colour._displayed_size(picture_of(width=width, height=height), file_of(), 10) == size


@pytest.mark.parametrize(
    ("matrix", "steps"),
    [
        ((1, 0, 0, 1), (False, False, False)),
        ((-1, 0, 0, 1), (False, True, False)),
        ((1, 0, 0, -1), (False, False, True)),
        ((-1, 0, 0, -1), (False, True, True)),
        ((0, 1, -1, 0), (True, True, False)),  # a quarter to the right, as of a phone that is held upright
        ((0, -1, 1, 0), (True, False, True)),
        ((0, 1, 1, 0), (True, False, False)),
        ((0, -1, -1, 0), (True, True, True)),
    ],
)
def test_a_display_matrix_is_turned_into_steps(
    matrix: tuple[int, int, int, int], steps: tuple[bool, bool, bool]
) -> None:
    a, b, c, d = (65536 * one for one in matrix)
    stored = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], np.int32).tobytes()
    assert colour.orientation(picture_of(side_data={"DISPLAYMATRIX": stored})) == steps
    # what is at x, y goes to a x + c y, b x + d y, counted from the other end where that is negative
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)[..., None].repeat(3, 2)
    upright = colour._upright(pixels, steps)
    for y, x in np.ndindex(2, 3):
        to_x, to_y = matrix[0] * x + matrix[2] * y, matrix[1] * x + matrix[3] * y
        left, top = (-1 if matrix[0] + matrix[2] < 0 else 0), (-1 if matrix[1] + matrix[3] < 0 else 0)
        assert upright[to_y + top, to_x + left, 0] == pixels[y, x, 0]


def test_conversion_is_bicubic_with_full_chroma_and_accurate_rounding() -> None:
    # SWS_BICUBIC, SWS_FULL_CHR_H_INT, SWS_FULL_CHR_H_INP and SWS_ACCURATE_RND of libswscale/swscale.h
    assert colour.SWS_FLAGS == (1 << 2) | (1 << 13) | (1 << 14) | (1 << 18)


def test_an_interlaced_picture_is_made_of_those_of_its_size() -> None:
    opened = source.inspect(CORPUS / "interlaced_tff.mp4")
    frames = list(source.Pictures(opened))[-3:]
    other = av.VideoFrame(64, 32, "yuv420p")
    one = colour.to_rgb(colour.deinterlace(frames), opened)
    assert (one == colour.to_rgb(colour.deinterlace([other, *frames]), opened)).all()
    assert not (one == colour.to_rgb(frames[-1], opened)).all()
    assert not (one == colour.to_rgb(colour.deinterlace(frames[-1:]), opened)).all()
    assert colour.deinterlace([*frames, other]) is other


@pytest.mark.parametrize(("transfer", "word"), [(16, "HDR (PQ)"), (18, "HDR (HLG)")])
def test_hdr_is_said_by_its_name(transfer: int, word: str, caplog: pytest.LogCaptureFixture) -> None:
    frame = in_yuv(stripes(COLOURS), 9)
    frame.colorspace, frame.color_primaries, frame.color_trc = 9, 9, transfer
    seen = colour.to_rgb(frame, file_of())
    assert len(caplog.records) == 1 and f"{word} video is tone mapped" in caplog.text
    signal = np.rint(stripes(COLOURS) / 255 * 65535).astype(np.uint16)
    assert np.abs(seen.astype(int) - light.tone_map(signal, transfer, 9)).max() <= 2


def test_a_moving_picture_for_a_page_shows_its_frames_in_their_time_for_ever() -> None:
    frames = np.stack([np.full((32, 48, 3), level, np.uint8) for level in (40, 120, 200)])
    with Image.open(io.BytesIO(as_webp(frames, Fraction(16)))) as image:
        assert (image.format, image.size, image.info["loop"]) == ("WEBP", (48, 32), 0)
        assert getattr(image, "n_frames", 1) == 3
        for number, level in enumerate((40, 120, 200)):
            image.seek(number)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - level).max() <= 3
            assert image.info["duration"] == 62  # of 62.5


def test_what_is_no_picture_is_refused_with_the_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (
        ("pipe.png", "it is not a file; give the name of a picture file"),
        ("none.png", "No such file or directory; give a PNG or JPEG file"),
        ("text.png", "it is no picture that Pillow knows, or it is damaged; give a PNG or JPEG file"),
    ):
        with pytest.raises(UserError, match=f"cannot read image '.*{name}': {reason}$"):
            media.read_image(tmp_path / name)


def test_a_written_png_holds_every_level(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    media.write_png(tmp_path / "a.png", Image.fromarray(pixels))
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and (np.asarray(image) == pixels).all()
