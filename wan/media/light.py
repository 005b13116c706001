"""Coded picture <-> light of a screen: tone mapping of HDR, and wide colours for a screen of BT.709."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from wan.media.source import Picture

BT709 = 1  # H.273 colour primaries and matrix
PQ, HLG = 16, 18  # H.273 transfer characteristics
_SRGB, _GAMMA_22, _GAMMA_28 = 13, 4, 5  # H.273 transfer characteristics; all others of SDR are shown with gamma 2.4
_REFERENCE_WHITE_NITS = 203.0  # BT.2408: where HDR puts the white of a standard screen
_BT2020, _DCI_P3, _DISPLAY_P3 = 9, 11, 12
_D65 = (0.3127, 0.3290)
_BT709_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65)
# H.273 colour primaries -> their name and where red, green, blue and white are. Those of standard-definition television
# (5, 6, 7) are a few levels from BT.709 and are often no more than a guess of the tool that wrote the file: they stay.
WIDE = {
    _BT2020: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65)),
    _DCI_P3: ("DCI-P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351))),
    _DISPLAY_P3: ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65)),
}


def tone_map(signal: npt.NDArray[np.uint16], transfer: int, primaries: int = _BT2020) -> Picture:
    """PQ (16) or HLG (18) signal uint16 [H, W, 3] -> sRGB uint8; the white of a standard screen stays white.

    `primaries` is an H.273 number; HDR that does not say which has BT.2020's.
    """
    light = (_PQ_LIGHT if transfer == PQ else _HLG_LIGHT)[signal]  # float32
    if transfer == HLG:  # the display of a 1000 nit mastering room: system gamma 1.2 on luminance
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (np.maximum(luminance, 1e-6) ** np.float32(0.2))[..., None] * (1000 / _REFERENCE_WHITE_NITS)
    if primaries != BT709:
        light = np.maximum(light @ to_709(WIDE.get(primaries, WIDE[_BT2020])[1]).T, 0)
    # Highlights bend towards 1 by the largest channel, so that their hue stays.
    knee = np.float32(0.8)
    peak = np.maximum(light.max(-1, keepdims=True), 1e-6)
    bent = knee + (1 - knee) * -np.expm1(-(np.maximum(peak, knee) - knee) / (1 - knee))
    light *= np.where(peak > knee, bent / peak, 1)
    return cast(Picture, np.rint(_from_light(light, _SRGB) * 255).clip(0, 255).astype(np.uint8))


def narrow(signal: npt.NDArray[np.uint16], primaries: int, transfer: int) -> Picture:
    """SDR signal uint16 [H, W, 3] of wide primaries -> uint8 of BT.709's; what these cannot show is clipped.

    The light of a screen is converted: the signal is as bright as before for an eye, whatever a camera meant by it.
    """
    light = _to_light(np.linspace(0, 1, 65536, dtype=np.float64), transfer)[signal] @ to_709(WIDE[primaries][1]).T
    return cast(Picture, np.rint(_from_light(light.clip(0, 1), transfer) * 255).astype(np.uint8))


def to_709(primaries: Sequence[tuple[float, float]]) -> npt.NDArray[np.float32]:
    """The matrix [3, 3] from linear light, whose red, green, blue and white have these xy, to that of BT.709."""
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # Bradford's
    ours, theirs = _to_xyz(_BT709_PRIMARIES), _to_xyz(primaries)
    gain = (cone @ ours.sum(1)) / (cone @ theirs.sum(1))
    adapted = np.linalg.inv(cone) @ np.diag(gain) @ cone
    return np.asarray(np.linalg.inv(ours) @ adapted @ theirs, np.float32)


def _to_xyz(primaries: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
    red, green, blue, white = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in primaries)
    columns = np.stack([red, green, blue], 1)
    return np.asarray(columns * np.linalg.solve(columns, white))


def _gamma(transfer: int) -> float:
    return {_GAMMA_22: 2.2, _GAMMA_28: 2.8}.get(transfer, 2.4)


def _to_light(signal: npt.NDArray[np.float64], transfer: int) -> npt.NDArray[np.float32]:
    """What a screen makes of a signal in [0, 1]."""
    if transfer == _SRGB:
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    else:
        light = signal ** _gamma(transfer)
    return np.asarray(light, np.float32)


def _from_light(light: npt.NDArray[np.float32], transfer: int) -> npt.NDArray[np.float32]:
    if transfer != _SRGB:
        return light ** np.float32(1 / _gamma(transfer))
    bright = 1.055 * np.maximum(light, 1e-6) ** np.float32(1 / 2.4) - 0.055
    return np.where(light <= 0.0031308, 12.92 * light, bright).astype(np.float32)


def _pq_light() -> npt.NDArray[np.float32]:
    """PQ code value of 16 bits -> light, 1 = reference white (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.linspace(0, 1, 65536, dtype=np.float64) ** (1 / m2)
    nits = 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return np.asarray(nits / _REFERENCE_WHITE_NITS, np.float32)


def _hlg_light() -> npt.NDArray[np.float32]:
    """HLG code value of 16 bits -> scene light in [0, 1] (ARIB STD-B67)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.linspace(0, 1, 65536, dtype=np.float64)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


_PQ_LIGHT, _HLG_LIGHT = _pq_light(), _hlg_light()
