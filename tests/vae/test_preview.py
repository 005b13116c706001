"""Previews: what latents show, and how often there is time for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from wan.chain.finished_clip import REDONE
from wan.chain.run_folder import PREVIEW, RunFolder
from wan.chain.written import Written
from wan.commands.preview import SHARE, Preview
from wan.files import digest_of
from wan.types import Step
from wan.vae.preview import _MAPS, CHANNELS, preview


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_preview_is_a_linear_map_of_the_channels(channels: int) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, channels, 3, 4, 5).mul(0.1)
    assert preview(one).shape == (3, 4, 5, 3)
    nothing = preview(torch.zeros_like(one)).astype(float)
    assert np.ptp(nothing, axis=(0, 1, 2)).max() == 0 and (abs(nothing - 127.5) < 50).all()
    together = preview(one).astype(float) + preview(other) - nothing
    assert abs(together - preview(one + other)).max() <= 2  # both are rounded


def shown_in(folder: Path, before: Mapping[str, Any] | None = None) -> Preview:
    return Preview(folder / PREVIEW, Fraction(16), Written(RunFolder(folder), before or {}))


def test_a_preview_that_the_run_did_not_write_moves_to_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.commands.preview.SHARE", 1e9)  # one at every step
    step = Step(1, 2, "denoise", torch.randn(16, 5, 6, 8))
    (tmp_path / PREVIEW).write_bytes(b"the user's")
    show = shown_in(tmp_path)
    show(step)
    show(replace(step, latents=torch.randn(16, 5, 6, 8)))
    kept = tmp_path / REDONE
    assert [file.read_bytes() for file in kept.iterdir()] == [b"the user's"]
    ours = (tmp_path / PREVIEW).read_bytes()
    known = {"written": {PREVIEW: [digest_of(ours)]}}
    shown_in(tmp_path, known)(step)  # of a later run, whose run.json knows it
    assert len(list(kept.iterdir())) == 1
    (tmp_path / PREVIEW).write_bytes(ours + b"edited")
    shown_in(tmp_path, known)(step)
    assert sorted(file.read_bytes() for file in kept.iterdir()) == sorted([b"the user's", ours + b"edited"])


def test_previews_take_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, list[float]()

    def write(*_: object) -> None:
        nonlocal now
        now += 0.5
        written.append(now)

    monkeypatch.setattr("wan.commands.preview.time.perf_counter", lambda: now)
    monkeypatch.setattr("wan.commands.preview.write_bytes", write)
    show = shown_in(tmp_path)
    for index in range(100):
        now += 5.0  # a step
        show(Step(index, 100, "denoise", torch.zeros(16, 1, 2, 2)))
        show(Step(index, 100, "decode"))
    assert len(written) > 5 and 0.5 * (len(written) - 1) <= SHARE * now


def test_a_preview_moves_at_the_pace_of_the_clip(tmp_path: Path) -> None:
    shown_in(tmp_path)(Step(1, 2, "denoise", torch.randn(16, 5, 6, 8)))
    with Image.open(tmp_path / "preview.webp") as shown:
        assert shown.size == (8, 6) and len(list(ImageSequence.Iterator(shown))) == 5
        shown.seek(1)
        shown.load()
        assert shown.info["duration"] == 250


def test_no_factor_of_a_preview_has_slipped() -> None:
    # a digit that is lost or a sign colours every preview; the sums are those of the published tables
    factors = [torch.tensor(_MAPS[count][0], dtype=torch.float64) for count in (16, 48)]
    assert [round(1e4 * float(table.sum())) for table in factors] == [25810, 2105]
    assert [round(1e4 * float(table.abs().sum())) for table in factors] == [66518, 73741]
