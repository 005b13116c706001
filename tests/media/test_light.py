"""Light and signal follow the standards: values of their tables, and colours that were worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from wan.media import light

CODES = np.arange(65536) / 65535  # of a signal of 16 bits


def test_the_light_of_pq_is_that_of_st_2084() -> None:
    # the constants as the standard prints them
    power = CODES ** (1 / 78.84375)
    nits = 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    np.testing.assert_allclose(light._PQ_LIGHT, nits / 203, rtol=1e-6, atol=1e-12)
    # BT.2408: 58 % of the signal are the white of a standard screen, 75 % are 1000 nits
    assert light._PQ_LIGHT[round(0.5807 * 65535)] == pytest.approx(1, abs=2e-3)
    assert light._PQ_LIGHT[round(0.7518 * 65535)] == pytest.approx(1000 / 203, rel=2e-3)


def test_the_light_of_hlg_is_that_of_b67() -> None:
    seen = [light._HLG_LIGHT[round(code * 65535)] for code in (0, 0.25, 0.5, 0.75, 1)]
    assert seen == pytest.approx([0, 0.0625 / 3, 1 / 12, 0.264963, 1], rel=1e-4, abs=1e-9)
    assert light._HLG_LIGHT.shape == (65536,) and (np.diff(light._HLG_LIGHT) >= 0).all()


def srgb(share: float) -> int:
    """The level of a screen for a share of its light."""
    return round(255 * (12.92 * share if share <= 0.0031308 else 1.055 * share ** (1 / 2.4) - 0.055))


def signal_of(shares: list[float], table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The codes of a pixel with this light."""
    return np.searchsorted(table, shares).astype(np.uint16)[None, None]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.002, 0.01, 0.1, 0.5, 0.79])
def test_what_is_darker_than_the_knee_is_shown_as_it_is(share: float) -> None:
    for primaries in (1, 9):
        seen = light.tone_map(signal_of([share] * 3, light._PQ_LIGHT), 16, primaries)
        assert seen[0, 0].tolist() == [srgb(share)] * 3


@pytest.mark.parametrize(
    ("share", "shown"), [(1.0, 0.8 + 0.2 * (1 - np.exp(-1))), (0.9, 0.8 + 0.2 * (1 - np.exp(-0.5))), (49.0, 1.0)]
)
def test_highlights_bend_towards_white_and_keep_their_hue(share: float, shown: float) -> None:
    seen = light.tone_map(signal_of([share, share / 2, share / 8], light._PQ_LIGHT), 16, 1)[0, 0]
    assert np.abs(seen - [srgb(shown), srgb(shown / 2), srgb(shown / 8)]).max() <= 1


def test_hlg_is_shown_as_a_screen_of_1000_nits_does() -> None:
    scene = np.array([0.06, 0.02, 0.03])
    luminance = 0.2627 * 0.06 + 0.678 * 0.02 + 0.0593 * 0.03
    shown = scene * luminance**0.2 * 1000 / 203
    seen = light.tone_map(signal_of(list(scene), light._HLG_LIGHT), 18, 1)[0, 0]
    assert np.abs(seen - [srgb(one) for one in shown]).max() <= 1
    assert not light.tone_map(np.zeros((1, 1, 3), np.uint16), 18).any()
    white = light.tone_map(signal_of([0.264963] * 3, light._HLG_LIGHT), 18)  # 75 % of HLG is 203 nits
    assert np.abs(white[0, 0].astype(int) - srgb(0.8 + 0.2 * (1 - np.exp(-1)))).max() <= 1


def test_hdr_of_primaries_that_are_not_known_has_those_of_bt_2020() -> None:
    signal = signal_of([0.1, 0.3, 0.2], light._PQ_LIGHT)
    assert (light.tone_map(signal, 16, 2) == light.tone_map(signal, 16, 9)).all()
    assert (light.tone_map(signal, 16) == light.tone_map(signal, 16, 9)).all()
    assert np.abs(light.tone_map(signal, 16, 1).astype(int) - light.tone_map(signal, 16, 9)).max() > 5


@pytest.mark.parametrize(
    ("primaries", "matrix"),
    [
        (9, [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),  # BT.2087
        (12, [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),
        # DCI-P3 with its own greenish white, adapted by Bradford's cones: worked out apart from this code
        (11, [[1.1575, -0.1550, -0.0025], [-0.0415, 1.0456, -0.0041], [-0.0181, -0.0786, 1.0967]]),
    ],
)
def test_wide_colours_become_those_of_bt_709_by_the_known_matrix(primaries: int, matrix: list[list[float]]) -> None:
    assert np.abs(light.to_709(light.WIDE[primaries][1]) - matrix).max() < 5e-4


@pytest.mark.parametrize(("transfer", "gamma"), [(1, 2.4), (4, 2.2), (5, 2.8), (6, 2.4), (14, 2.4)])
def test_each_transfer_has_the_gamma_of_its_screens(transfer: int, gamma: float) -> None:
    colour = np.array([0.6, 0.45, 0.5])
    of_2020 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    expected = (np.array(of_2020) @ colour**gamma) ** (1 / gamma) * 255
    seen = light.narrow(np.rint(colour * 65535).astype(np.uint16)[None, None], 9, transfer)
    assert np.abs(seen[0, 0] - expected).max() <= 0.51


def test_the_dark_end_of_srgb_is_straight() -> None:
    codes = np.array([0, 0.01, 0.04, 0.0404, 0.0405, 0.05, 0.5, 1])
    shares = np.array([0, 0.01 / 12.92, 0.04 / 12.92, 0.0404 / 12.92, 0.0031347, 0.0039359, 0.2140411, 1])
    np.testing.assert_allclose(light._to_light(codes, 13), shares, rtol=1e-4)
    np.testing.assert_allclose(light._from_light(shares.astype(np.float32), 13), codes, rtol=1e-4, atol=1e-7)


def test_what_bt_709_cannot_show_is_clipped() -> None:
    green = np.array([[[0, 65535, 0]]], np.uint16)
    assert light.narrow(green, 9, 1)[0, 0].tolist() == [0, 255, 0]
