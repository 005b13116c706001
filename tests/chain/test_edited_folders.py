"""Folders of runs that were edited by hand: one line that says what is wrong, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Seen
from wan.chain.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(command: Callable[..., Seen], tmp_path: Path) -> Path:
    """A finished run of two clips."""
    assert command("").code == 0
    return tmp_path / "out"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def contents(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("video_*") if path.is_file()}


DEEP: Any = json.loads("[" * 60 + "]" * 60)
RECORD = [
    (("seed",), -5),
    (("seed",), "3"),
    (("prompt",), 5),
    (("prompt",), None),
    (("dropped",), "x"),
    (("dropped",), -1),
    (("dropped",), 99),
    (("fps",), "0/0"),
    (("fps",), 24),
    (("fps",), "1/0"),
    (("frame_num",), 10**30),
    (("frame_num",), None),
    (("seam",), 7),
    (("seam",), {"warnings": 5}),
    (("seam",), {"colour_shift": ["a"]}),
    (("seam",), {"score": "5"}),
    (("seconds",), {"sample": []}),
    (("seconds",), {"sample": "5"}),
    (("versions",), ["x"]),
    (("memory",), "x"),
    (("candidates",), [3]),
    (("look",), 4),
]
RUN = [
    (("base_seed",), -5),
    (("base_seed",), "3"),
    (("base_seed",), 2**63),
    (("seeds",), {"1": -5}),
    (("seeds",), {"x": 5}),
    (("seeds",), [1]),
    (("redone_over",), 3),
    (("accepted",), [1]),
    (("joined_of",), 3),
    (("arguments",), 3),
    (("clips",), {}),
    (("clips",), [5]),
    (("clips",), DEEP),
    (("base_seed",), 10**400),
    (("seconds",), [None]),
    (("seconds",), "5"),
    (("status",), []),
]


def test_an_edited_record_is_one_line_and_nothing_is_lost(command: Callable[..., Seen], folder: Path) -> None:
    path = next(folder.glob("video_01_*.json"))
    whole = path.read_bytes()
    for keys, value in RECORD:
        edit(path, put(*keys, value=value))
        before = contents(folder)
        seen = command("")
        assert seen.code == 2 and seen.output.count("\n") == 1, (keys, value, seen.output)
        assert f"{path.name}: {keys[0]}" in seen.output and "remove the file to make the clip again" in seen.output
        assert contents(folder) == before and seen.requests == []
        path.write_bytes(whole)
    assert command("").code == 0


def test_an_edited_run_json_is_one_line_and_nothing_is_lost(command: Callable[..., Seen], folder: Path) -> None:
    path = folder / "run.json"
    whole = path.read_bytes()
    for keys, value in RUN:
        edit(path, put(*keys, value=value))
        before = contents(folder)
        seen = command("")
        assert seen.code == 2 and seen.output.count("\n") == 1, (keys, value, seen.output)
        assert "run.json" in seen.output and len(seen.output) < 500
        assert contents(folder) == before and seen.requests == []
        path.write_bytes(whole)
    assert command("").code == 0


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{", "[]", "\0", "9" * 5000, '{"seed": ' + "9" * 400 + "}"]
)
def test_a_record_that_is_none_is_made_again_and_kept(command: Callable[..., Seen], folder: Path, text: str) -> None:
    path = next(folder.glob("video_02_*.json"))
    path.write_text(text)
    before = contents(folder)
    seen = command("")
    assert seen.code == 0 and len(seen.requests) == 1, seen.output
    assert before <= contents(folder)
    path = folder / "run.json"
    path.write_text(text)
    assert command("").code == 2


def test_two_records_of_one_clip_are_one_line_and_nothing_is_lost(command: Callable[..., Seen], folder: Path) -> None:
    brought_back = [
        Path(shutil.copy(path, folder / path.name.replace("seed4", "seed9"))) for path in folder.glob("*_seed4.*")
    ]
    before = contents(folder)
    for more in ("", "--dry_run", "--redo 2"):
        seen = command(more)
        assert seen.code == 2 and seen.output.count("\n") == 1 and seen.requests == []
        assert "two records of clip 2, video_02_seed4.json and video_02_seed9.json" in seen.output
        assert contents(folder) == before
    for path in brought_back:
        path.unlink()
    seen = command("")
    assert seen.code == 0 and seen.requests == []


def test_a_pipe_for_a_record_is_no_clip_and_does_not_hang(command: Callable[..., Seen], folder: Path) -> None:
    for end in ("json", "safetensors"):
        path = next(folder.glob(f"video_02_*.{end}"))
        path.unlink()
        os.mkfifo(path)
        seen = command("")
        assert seen.code == 0 and len(seen.requests) == 1, seen.output


@pytest.mark.parametrize("name", ["redone", "joined.mp4", "run.json", "report.html", "report.json", "prompts_log.txt"])
@pytest.mark.parametrize("dry", ["", "--dry_run"])
def test_a_name_that_a_run_needs_is_looked_at_before_it_begins(
    command: Callable[..., Seen], folder: Path, name: str, dry: str
) -> None:
    path = folder / name
    if path.exists():
        path.unlink()
    if name == "redone":
        path.write_text("mine")
    else:
        path.mkdir()
    seen = command(f"--redo 1 {dry}")
    assert seen.code == 2 and seen.requests == []
    assert f"{path} is no {'folder' if name == 'redone' else 'file'}" in seen.output


def test_a_redo_is_noted_before_it_starts(
    command: Callable[..., Seen], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan.pipeline import Pipeline

    sampled = Pipeline.run

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "run", stopped)
    assert command("--redo 1").code == 130
    seeds = RunFolder(folder).run["seeds"]
    monkeypatch.setattr(Pipeline, "run", sampled)
    seen = command("")
    assert seen.code == 0
    assert [request.seed for request in seen.requests] == [seeds["1"], 4]


def test_what_a_changed_seed_leaves_moves_to_redone(command: Callable[..., Seen], folder: Path, world: Path) -> None:
    for end in ("mp4", "safetensors"):  # as a kill leaves it: a state, or more, and no record
        shutil.copy(next(folder.glob(f"video_02_*.{end}")), folder / f"video_02_seed99.{end}")
    before = contents(folder)
    (world / "second.json").write_text('[{}, {"seed": 8}]')
    assert command("--storyboard second.json").code == 0
    assert {path.name for path in folder.glob("video_02_*.mp4")} == {"video_02_seed8.mp4"}
    assert (folder / "redone" / "video_02_seed99.safetensors").exists()
    assert before <= contents(folder)
