"""Twelve hops of a picture: through a file and back, the darkening that other tools add up must not be there."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.torch import load_file, save_file

from tests.support.media_samples import bias, natural
from wan import media
from wan.types import from_uint8, to_uint8

pytestmark = pytest.mark.slow

HOPS = 12


def gradient(width: int = 832, height: int = 480) -> npt.NDArray[Any]:
    """Dark to bright, and saturated colours into each other."""
    x, y = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    red, green, blue = 20 + 215 * x + 0 * y, 30 + 190 * y + 0 * x, 40 + 150 * (1 - x) * (1 - y) + 50 * y
    picture: npt.NDArray[Any] = np.rint(np.stack(np.broadcast_arrays(red, green, blue), -1)).astype(np.uint8)
    return picture


def dark(width: int = 832, height: int = 480) -> npt.NDArray[Any]:
    """A night picture: most of it between 10 and 60."""
    return (natural(width, height, seed=5).astype(np.float64) * 0.25 + 5).astype(np.uint8)


PICTURES: dict[str, Callable[[], npt.NDArray[Any]]] = {
    "cloud": lambda: natural(832, 480),
    "warm": lambda: natural(832, 480, seed=7),
    "gradient": gradient,
    "dark": dark,
}


def psnr(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


def through_a_file(picture: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    media.write_video(path, [picture] * 2, 16)
    tail = media.read_tail(path, 1, Fraction(16))
    assert np.array_equal(tail[0], np.asarray(media.read_last_frame(path)))
    frame: npt.NDArray[Any] = tail[0]
    return frame


def through_the_state(picture: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """As a clip's last frames are kept between clips."""
    save_file({"tail": from_uint8(picture)[None].contiguous()}, path)
    return to_uint8(load_file(path)["tail"][-1])


@pytest.mark.parametrize("name", PICTURES)
def test_twelve_hops_through_files_do_not_drift(name: str, tmp_path: Path) -> None:
    """With the usual readers and writers this ends 12 to 15 levels darker, at 25 dB."""
    first = picture = PICTURES[name]()
    for hop in range(HOPS):
        picture = through_a_file(picture, tmp_path / f"{hop}.mp4")
    assert bias(picture, first) <= 0.5
    assert psnr(picture, first) >= 35


@pytest.mark.parametrize("files", [0, 1, HOPS], ids=["no file", "one file", "all files"])
@pytest.mark.parametrize("name", PICTURES)
def test_noise_of_one_level_on_every_hop_does_not_become_drift(name: str, files: int, tmp_path: Path) -> None:
    """As a model adds it. x264 turns noise into a step of 0.04 levels a hop, so twelve files in a row reach 0.8."""
    rng = np.random.default_rng(0)
    first = picture = PICTURES[name]()
    for hop in range(HOPS):
        noisy = np.rint(picture + rng.standard_normal(picture.shape)).clip(0, 255).astype(np.uint8)
        path = tmp_path / str(hop)
        picture = through_a_file(noisy, path.with_suffix(".mp4")) if hop < files else through_the_state(noisy, path)
    assert bias(picture, first) <= (1.0 if files == HOPS else 0.5)
    assert psnr(picture, first) >= 35
