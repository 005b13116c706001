"""A PIL picture that Python hands over is taken as the same picture in a file is, wherever it is handed over."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from tests.media.test_colour import COLOURS, RAMP, STICKER, profile_of_display_p3, stripes
from tests.support.golden import GOLDEN, float32
from wan import WanI2V, WanTI2V, WanV2V, files, image2video, media, textimage2video
from wan.captioner.base import to_images
from wan.captioner.frames import build_transform, dynamic_preprocess
from wan.pictures import as_shown, cover, levels, over_white
from wan.types import Request, frame_size, from_uint8, image_to_frame, to_uint8


def in_memory(picture: Image.Image, **options: Any) -> Image.Image:
    """The picture as a program has it that opened bytes: of no name."""
    held = io.BytesIO()
    picture.save(held, "PNG", **options)
    return Image.open(io.BytesIO(held.getvalue()))


def sideways() -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6
    return in_memory(Image.fromarray(stripes(COLOURS)), exif=exif)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "16-bit grey": lambda: Image.fromarray(stripes(RAMP.astype(np.uint16) * 257)),
    "float grey": lambda: Image.fromarray(stripes((RAMP / 255).astype(np.float32))),
    "transparent": lambda: Image.fromarray(stripes(STICKER)),
    "a colour that is transparent": lambda: in_memory(
        Image.fromarray(stripes(STICKER)).convert("RGB"), transparency=(0, 0, 0)
    ),
    "a phone's profile": lambda: in_memory(Image.fromarray(stripes(COLOURS)), icc_profile=profile_of_display_p3()),
    "a phone's profile, converted": lambda: in_memory(
        Image.fromarray(stripes(COLOURS)), icc_profile=profile_of_display_p3()
    ).convert("RGB"),
    "held upright": sideways,
}


def of_file(name: str, folder: Path) -> npt.NDArray[Any]:
    """What the picture's file is read as."""
    picture = PICTURES[name]()
    kept = {key: picture.info[key] for key in ("icc_profile", "transparency", "exif") if key in picture.info}
    path = folder / ("a.tiff" if picture.mode == "F" else "a.png")
    picture.save(path, **kept)
    return np.asarray(media.read_image(path))


def levels_of(frame: Any) -> npt.NDArray[Any]:
    """[3, H, W] in [-1, 1] -> uint8 [H, W, 3]."""
    return to_uint8(frame.permute(1, 2, 0))


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    files._say.cache_clear()


@pytest.mark.parametrize("name", PICTURES)
def test_every_door_takes_a_picture_as_its_file_is_read(name: str, tmp_path: Path) -> None:
    expected = of_file(name, tmp_path)
    height, width = expected.shape[:2]
    assert not np.array_equal(expected, np.asarray(PICTURES[name]().convert("RGB")))
    picture = PICTURES[name]
    doors = {
        "types": levels_of(image_to_frame(picture())),
        "i2v": levels_of(image2video.preprocess(picture(), width, height)),
        "ti2v": levels_of(textimage2video.preprocess(picture(), width, height)),
        "captioner": np.asarray(to_images([picture()])[0]),
    }
    for door, seen in doors.items():
        assert np.array_equal(seen, expected), door
    assert frame_size(picture()) == (width, height)
    shown = Image.fromarray(expected)
    half = image2video.crop_to_aspect(picture(), height, height)
    assert np.array_equal(np.asarray(half), np.asarray(image2video.crop_to_aspect(shown, height, height)))
    assert torch.equal(build_transform(32)(picture()), build_transform(32)(shown))
    tiles = [dynamic_preprocess(one, image_size=32) for one in (picture(), shown)]
    assert [np.asarray(tile).tolist() for tile in tiles[0]] == [np.asarray(tile).tolist() for tile in tiles[1]]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_was_taken_once_stays_as_it_is(name: str) -> None:
    once = as_shown(PICTURES[name]())
    assert as_shown(once) is once and once.mode == "RGB"


def test_transparency_of_pictures_in_memory_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    picture = PICTURES["transparent"]
    image2video.preprocess(picture(), 80, 16)
    to_images([picture()] * 8)
    assert [record.message for record in caplog.records] == [
        "'picture': the picture is transparent in places; white is put behind it"
    ]


def test_the_size_of_a_clip_is_that_of_the_upright_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the official classes' `generate`, and of a plan's own pictures and footage."""
    asked: list[Request] = []

    def note(self: Any, request: Request, **more: Any) -> Any:
        asked.append(request)
        return SimpleNamespace(video=None)

    monkeypatch.setattr("wan.pipeline.Pipeline.run", note)
    area = 64 * 128
    for kind, folder, task in ((WanI2V, "14b", "i2v-A14B"), (WanTI2V, "5b", "ti2v-5B")):
        kind(float32(task), GOLDEN / folder / "ckpt").generate("a boat", sideways(), max_area=area, frame_num=5)
    assert all(one.geometry.height > one.geometry.width for one in asked) and len(asked) == 2

    continuation = WanV2V(float32("v2v-14B"), GOLDEN / "14b" / "ckpt")
    footage = SimpleNamespace(last=sideways(), motion=None, samples=None, tail=None)
    plan = continuation.plan(
        footage, max_area=area, frame_num=5, prompt="a boat", end=PICTURES["transparent"](), cut=sideways()
    )
    assert plan.geometry.height > plan.geometry.width
    known = continuation.frames.known(footage, plan)
    size = plan.geometry.width, plan.geometry.height
    shown = from_uint8(np.asarray(as_shown(sideways()))).permute(2, 0, 1)
    assert torch.equal(torch.as_tensor(known.leading[0]), continuation.frame_for(shown, *size))
    end = from_uint8(np.asarray(as_shown(PICTURES["transparent"]()))).permute(2, 0, 1)
    assert known.end is not None and torch.equal(torch.as_tensor(known.end), continuation.frame_for(end, *size))


@pytest.mark.parametrize(
    ("size", "left", "top"),
    [((40, 20), 10, 0), ((20, 40), 0, 10), ((20, 20), 0, 0), ((80, 40), 10, 0), ((41, 20), 10, 0)],
)
def test_a_picture_covers_a_size_and_is_cropped_around_its_centre(size: tuple[int, int], left: int, top: int) -> None:
    across = np.linspace(0, 255, size[0]).astype(np.uint8)
    down = np.linspace(0, 255, size[1]).astype(np.uint8)
    pixels = np.stack([*np.broadcast_arrays(across[None], down[:, None]), np.zeros((size[1], size[0]), np.uint8)], -1)
    picture = Image.fromarray(pixels)
    covered = cover(picture, 20, 20)
    assert covered.size == (20, 20)
    scale = max(20 / size[0], 20 / size[1])
    whole = np.asarray(picture.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(covered), whole[top : top + 20, left : left + 20])


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0, 65535]], np.uint16), [0, 255]),
        (np.array([[0, 255]], np.int32), [0, 255]),
        (np.array([[0, 256]], np.int32), [0, 1]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 2**31 - 1]], np.int32), [0, 127]),
        (np.array([[0.0, 0.5, 1.0, 16.0]], np.float32), [0, 128, 255, 255]),  # of light 1 is white
        (np.array([[0.0, 16.1, 255.0]], np.float32), [0, 16, 255]),
        (np.array([[0.0, 255.1]], np.float32), [0, 1]),
        (np.array([[np.nan, -1.0, 1.0]], np.float32), [0, 0, 255]),
    ],
)
def test_grey_of_any_depth_is_shown_in_its_range(values: Any, shown: list[int]) -> None:
    assert levels(values).dtype == np.uint8 and levels(values)[0, :, 0].tolist() == shown


def test_tall_pictures_are_computed_in_bands_without_a_seam(caplog: pytest.LogCaptureFixture) -> None:
    tall = np.tile(np.arange(600, dtype=np.uint16)[:, None] * 100, (1, 2))
    assert np.array_equal(levels(tall)[..., 0], np.rint(tall / 257).astype(np.uint8))
    pixels = np.full((600, 2, 3), 100, np.uint8)
    opacity = np.full((600, 2, 1), 255, np.uint8)
    assert over_white(pixels, opacity, "opaque") is pixels and not caplog.messages
    opacity[300:] = 0
    opacity[0] = 51
    shown = over_white(pixels, opacity, "tall.png")
    assert (shown[1:300] == 100).all() and (shown[300:] == 255).all() and (shown[0] == 224).all()
    assert "'tall.png': the picture is transparent in places" in caplog.text
    deep = np.full((1, 1, 1), 65535 // 2, np.uint16)
    assert over_white(np.zeros((1, 1, 3), np.uint8), deep, "deep")[0, 0].tolist() == [128] * 3


@pytest.mark.parametrize(("step", "is_taken"), [(0, False), (3, False), (-3, False), (4, True), (-4, True)])
def test_a_profile_that_changes_no_more_than_rounding_changes_nothing(
    step: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageCms

    plain = np.full((2, 2, 3), 100, np.uint8)
    converted = plain.copy()
    converted[1, 1, 2] = 100 + step
    asked: list[Any] = []

    def profile_to_profile(image: Image.Image, *what: Any, **how: Any) -> Image.Image:
        asked.append((image.mode, what[-1], how["flags"]))
        return Image.fromarray(converted)

    monkeypatch.setattr(ImageCms, "profileToProfile", profile_to_profile)
    held = in_memory(Image.fromarray(plain), icc_profile=profile_of_display_p3())
    shown = np.asarray(as_shown(held))
    assert np.array_equal(shown, converted if is_taken else plain)
    assert asked == [("RGB", "RGB", ImageCms.Flags.BLACKPOINTCOMPENSATION)]
