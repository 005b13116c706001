"""What every measurement starts from is what it says it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wan.errors import UserError
from wan.quality import vision
from wan.quality.vision import MeasuredFrame, checked, same_size, speeds, spread, top_speed, unit_range


@pytest.mark.parametrize(
    ("size", "measured"),
    [
        ((208, 416), (208, 416)),
        ((416, 832), (208, 416)),
        ((832, 416), (416, 208)),
        ((80, 100), (80, 100)),
        ((100, 800), (64, 416)),
        ((32, 32), (64, 64)),
        ((32, 100), (64, 100)),
        ((63, 64), (64, 64)),
        ((150, 417), (150, 416)),
    ],
)
def test_a_frame_is_measured_at_416_pixels_and_64_at_least(size: tuple[int, int], measured: tuple[int, int]) -> None:
    frame = MeasuredFrame.of(torch.full((*size, 3), 0.5))
    assert frame.rgb.shape == (*measured, 3) and frame.rgb.dtype == np.float32
    assert np.allclose(frame.rgb, 0.75)


def test_a_picture_that_shrinks_is_averaged_and_one_that_grows_is_interpolated() -> None:
    checks = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).repeat(416, 416)[..., None].expand(-1, -1, 3)
    assert np.allclose(MeasuredFrame.of(checks).rgb, 0.5, atol=1e-6)
    ramp = torch.linspace(-1, 1, 32)[None, :, None].expand(32, -1, 3)
    steps = np.diff(MeasuredFrame.of(ramp).rgb[0, 2:-2, 0])
    assert steps == pytest.approx(np.full(59, 1 / 62), rel=1e-3)


def test_pixels_are_shares_of_the_range() -> None:
    given = np.array([-1, -3, 0, 0.5, 1, 7, np.nan, np.inf, -np.inf], np.float32)
    assert unit_range(given).tolist() == [0, 0, 0.5, 0.75, 1, 1, 0.5, 1, 0]


def test_colours_and_luma_are_those_of_bt_709() -> None:
    pure = torch.eye(3) * 2 - 1
    frame = MeasuredFrame.of(
        torch.cat([pure, torch.ones(1, 3)])[None].repeat_interleave(64, 0).repeat_interleave(16, 1)
    )
    assert frame.grey[0, ::16].tolist() == [54, 182, 18, 255] and frame.grey.dtype == np.uint8
    # sRGB's red, green, blue and white in CIE Lab
    lab = [[53.24, 80.09, 67.2], [87.73, -86.18, 83.18], [32.3, 79.19, -107.86], [100, 0, 0]]
    assert np.abs(frame.lab[0, ::16] - lab).max() < 0.1


def test_speeds_are_counted_for_a_picture_416_wide() -> None:
    field = np.zeros((52, 104, 2), np.float32)
    field[...] = 3, 4
    assert np.allclose(speeds(field), 20) and speeds(field).shape == (52, 104)
    assert np.allclose(speeds(field.transpose(1, 0, 2)), 20)
    field = np.zeros((10, 10, 2), np.float32)
    field[3, :, 1] = range(-10, 0)
    assert top_speed(field) == pytest.approx(5.5 * 41.6)  # the fastest tenth


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 8, 8), None), ((3, 3, 8, 8), None), ((0, 8, 8, 3), None), ((3, 0, 8, 3), None), ((3, 8, 8, 3), torch.uint8)],
)
def test_what_is_no_clip_is_refused_with_its_shape(shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    frames = torch.zeros(shape, dtype=dtype)
    kind = "uint8" if dtype else "float32"
    with pytest.raises(
        UserError, match=rf"before must be float frames .*, not {kind} \[{', '.join(map(str, shape))}\]"
    ):
        checked(frames, "before")


def test_clips_of_one_size_are_compared() -> None:
    clip = torch.zeros(1, 48, 64, 3)
    assert checked(clip, "before") is clip
    same_size(clip, torch.zeros(9, 48, 64, 3))
    for other in (torch.zeros(1, 48, 32, 3), torch.zeros(1, 32, 64, 3)):
        with pytest.raises(UserError, match=f"one size, not 64x48 and {other.shape[2]}x{other.shape[1]}"):
            same_size(clip, other)


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert list(spread(5, 5)) == [0, 1, 2, 3, 4] and list(spread(6, 5)) == [0, 1, 2, 4, 5]
    assert list(spread(100, 2)) == [0, 99] and list(spread(3, 9)) == [0, 1, 2] and list(spread(0, 9)) == []
    many = spread(400, 32)
    assert len(many) == 32 and (many[0], many[-1]) == (0, 399) and {12, 13} >= set(np.diff(many).tolist())


def test_the_flow_is_where_points_went() -> None:
    rng = np.random.default_rng(0)
    wide = np.kron(rng.random((24, 34)), np.ones((4, 4)))[..., None].repeat(3, 2).astype(np.float32)
    first, second = (MeasuredFrame(wide[:, left : left + 128]) for left in (4, 2))
    field = vision.flow(first, second)
    assert field.shape == (96, 128, 2) and np.median(field[..., 0]) == pytest.approx(2, abs=0.2)
    assert np.median(field[..., 1]) == pytest.approx(0, abs=0.2)
