"""A video is continued from where it is lively, if the user says so, and the user is told where that is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import Seen, frames_in
from tests.support.media_samples import numbered
from wan import media

RATE, SIZE = 24, (64, 32)


@pytest.fixture
def fading(tmp_path: Path) -> Path:
    """A second of motion, then a second of black."""
    black = [np.zeros((*SIZE[::-1], 3), np.uint8)] * RATE
    media.write_video(tmp_path / "fading.mp4", [*numbered(range(RATE), *SIZE), *black], RATE)
    return tmp_path / "fading.mp4"


def first_frame(seen: Seen) -> float:
    """The mean level of what the first clip starts from, 0 to 255."""
    return (seen.mean(seen.first.known.leading[0]) + 1) * 127.5


def test_the_hint_names_the_flag_that_continues_the_motion(
    command: Callable[..., Seen], fading: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = command(f"--video {fading}")
    assert seen.code == 0 and first_frame(seen) < 5
    (hint,) = re.findall(r"it is black for its last 1\.0 s; `from_` ([\d.]+) continues from", caplog.text)
    caplog.clear()
    folder = seen.folder
    seen = command(f"--video {fading} --from {hint}")
    assert seen.code == 2 and "another video or another --from" in seen.output  # the folder holds another run
    seen = command(f"--video {fading} --from {hint} --include_source --output_dir {folder}_2")
    assert seen.code == 0 and "continues from" not in caplog.text
    expected = media.read_last_frame(fading, float(hint))
    assert np.asarray(expected).mean() > 50
    assert first_frame(seen) == pytest.approx(np.asarray(expected).mean(), abs=1)
    assert frames_in(Path(f"{folder}_2") / "joined.mp4") == RATE + 2 * 8  # none of the black ones


def test_the_captioner_sees_nothing_after_that_moment(command: Callable[..., Seen], fading: Path) -> None:
    seen = command(f"--video {fading} --from 0.958")
    assert seen.code == 0 and seen.shown and min(float(frame.mean()) for frame in seen.shown[0]) > 50


def test_a_video_that_moves_to_its_end_gets_no_hint(
    command: Callable[..., Seen], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    media.write_video(tmp_path / "lively.mp4", numbered(range(RATE), *SIZE), RATE)
    assert command(f"--video {tmp_path / 'lively.mp4'}").code == 0 and "from_" not in caplog.text


@pytest.mark.parametrize(
    ("moment", "message"), [("0", "--from must be a positive number"), ("90", "it ends at 2.00 s; give an earlier")]
)
def test_a_moment_that_is_not_in_the_video_is_refused(
    command: Callable[..., Seen], fading: Path, moment: str, message: str
) -> None:
    seen = command(f"--video {fading} --from {moment}")
    assert seen.code == 2 and message in seen.output and not seen.requests


def test_one_clip_can_start_there_too(command: Callable[..., Seen], fading: Path, tmp_path: Path) -> None:
    words = f"--task v2v-5B --video {fading} --from 0.5 --frame_num 9 --save_file {tmp_path / 'one.mp4'}"
    seen = command(words, generate=True)
    assert seen.code == 0, seen.output
    assert first_frame(seen) > 50
    assert '"from": 0.5' in (tmp_path / "one.json").read_text()
