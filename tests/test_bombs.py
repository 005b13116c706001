"""Small files that would unpack to gigabytes: one line, before anything is unpacked."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import MADE
from tests.support.golden import DATA
from wan import media, pictures
from wan.errors import UserError
from wan.foreign import parse_json, parsing, read_json
from wan.media import VideoError, source
from wan.weights.checkpoint import Names, open_checkpoint

CORPUS = DATA / "corpus"


def png(width: int, height: int) -> bytes:
    """The beginning of a picture of one colour, all that is looked at."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (13_300, 13_300), (30_000, 30_000), (2**31 - 1, 1)])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError, match="pixels; make it smaller"):
        media.read_image(path)
    assert warned == []  # Pillow's own warning would be more lines


def test_a_large_picture_is_put_over_white_in_bands_with_the_same_values() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 3, 3), np.uint8)
    opacity = np.random.default_rng(1).integers(0, 256, (700, 3, 1), np.uint8)
    share = opacity.astype(np.float32) / 255
    expected = np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8)
    assert np.array_equal(pictures.over_white(pixels, opacity, "a.png"), expected)
    grey = np.random.default_rng(2).integers(0, 2**16, (700, 3), np.uint16)
    assert np.array_equal(pictures.levels(grey)[..., 0], np.rint(grey / 65535 * 255).astype(np.uint8))


@pytest.mark.parametrize("name", ["h264_faststart.mp4", "anim.gif", "anim.webp"])
def test_a_video_of_too_many_pixels_is_refused_by_its_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOST_PIXELS", 1000)
    for read in (media.probe, media.read_last_frame, media.sample_frames):
        with pytest.raises(UserError, match="smaller, .*at most 8192 x 8192") as caught:
            read(CORPUS / name)
        assert "\n" not in str(caught.value)


def test_a_picture_that_is_larger_than_the_header_says_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = source.inspect(CORPUS / "h264_faststart.mp4")
    monkeypatch.setattr(source, "MOST_PIXELS", 1000)
    monkeypatch.setattr(source, "_check_pixels", lambda *_: None)
    assert list(source.Pictures(opened)) == []
    with pytest.raises(VideoError, match="no picture in it can be decoded"):
        media.read_last_frame(CORPUS / "h264_faststart.mp4")


def test_an_animation_that_pillow_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too many pixels; make it smaller"):
        media.probe(CORPUS / "anim.webp")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_compressed_pth_is_refused_before_it_is_unpacked(
    tmp_path: Path, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(MADE / "ti2v", tmp_path / "ti2v"))
    with zipfile.ZipFile(folder / "Wan2.2_VAE.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/version", "3\n")
        file.writestr(f"archive/{member}", b"\0" * 2**22)
    monkeypatch.setattr("torch.load", None)
    with pytest.raises(UserError, match="is compressed, as no weights are, and would take 4194306 bytes"):
        open_checkpoint(folder, in_channels=48, experts=1, names=Names(vae="Wan2.2_VAE.pth"))


def test_a_library_s_panic_is_one_line_and_ctrl_c_is_none() -> None:
    panic = type("PanicException", (BaseException,), {})  # as PyO3 has it
    line = r"it cannot be read, .*; download it again \(no such token\)"
    with pytest.raises(UserError, match=line), parsing("it", "download it again"):
        raise panic("no such\ntoken")
    with pytest.raises(KeyboardInterrupt), parsing("it", "download it again"):
        raise KeyboardInterrupt


def test_json_is_measured_before_it_is_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, message in (
        ("[" * 10**6 + "]" * 10**6, "nested more than 40 deep"),
        (json.dumps({"a": json.loads("[" * 41 + "]" * 41)}), "nested more than 40 deep"),
        ('{"a": ' + "9" * 10**6 + "}", "a number of 1000000 digits"),
        ("9" * 41, "a number of 41 digits"),
    ):
        with pytest.raises(UserError, match=message):
            parse_json(text, "it")
    assert parse_json("9" * 40, "it") == 10**40 - 1
    with path.open("wb") as file:
        file.truncate(1 << 34)  # 16 GiB that take no disk
    with pytest.raises(UserError, match="is larger than 16 MiB; is it the right file"):
        read_json(path)
