"""What the first seconds of a command know of its captioner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from wan.commands import start
from wan.options import Settings


def test_a_captioner_is_looked_at_where_a_chain_describes_a_video_by_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl"}))
    settings = Settings(ckpt_dir="x", video="a.mp4", vlm_path=str(tmp_path))
    assert start._vlm_config(settings) == {"model_type": "internvl"}
    assert start._vlm_config(replace(settings, vlm_path=str(tmp_path / "none"))) is None
    for unused in (replace(settings, video=None), replace(settings, vlm_url="http://127.0.0.1:1/v1")):
        assert start._vlm_config(unused) == {}


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, "8"),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "64"}, "1"),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "6", "LOCAL_WORLD_SIZE": "4"}, "6"),
        ({"OMP_NUM_THREADS": "1"}, "1"),
        ({}, None),
    ],
)
def test_a_launchers_processes_share_the_cores(given: dict[str, str], threads: str | None) -> None:
    environment = dict(given)
    start.take_cores(environment, 32)
    assert environment.get("OMP_NUM_THREADS") == threads
