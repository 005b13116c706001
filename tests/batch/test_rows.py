"""The list of a batch: every kind of file, and for each mistake one line that says where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wan.batch.rows import KEYS, Row, read_rows, report_folder
from wan.commands.flags import parse
from wan.errors import UserError
from wan.options import NOT_BATCHED, OPTIONS, Settings, options_of


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two videos, which nothing here opens."""
    for name in ("a.mp4", "b.mov", "notes.doc"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(videos: str = ".", *words: str) -> Settings:
    return parse("batch", ["--videos", videos, "--ckpt_dir", "m", "--output_dir", "runs/{name}", *words])


def rows_of(name: str, text: str, *words: str) -> list[Row]:
    Path(name).write_text(text, encoding="utf-8")
    rows, bad = read_rows(settings(name, *words))
    assert [str(one) for one in bad] == []
    return rows


def wrong(name: str, text: str) -> list[str]:
    Path(name).write_text(text, encoding="utf-8")
    try:
        return [str(one) for one in read_rows(settings(name))[1]]
    except UserError as error:
        return [str(error)]


def test_a_folder_and_a_pattern_name_their_videos(folder: Path) -> None:
    for videos in (".", "*.m[po]*"):
        rows, bad = read_rows(settings(videos, "--num_videos", "3", "--skip_bad"))
        assert bad == [] and [row.name for row in rows] == ["a", "b"]
        assert rows[0].settings == Settings(
            video=str(folder / "a.mp4"), ckpt_dir="m", output_dir=str(folder / "runs/a"), num_videos=3
        )
    for videos, message in (("nowhere", "is no folder and no list"), ("*.avi", "no file has such a name")):
        with pytest.raises(UserError, match=message):
            read_rows(settings(videos))


SAME = {
    "list.csv": "video,name,prompt,seed,num_videos,sample_guide_scale,include_source,from\n"
    'a.mp4,the boat,"a boat, it turns",12,3,"1,2",true,0.5\n\nb.mov,,,,,,,\n',
    "list.jsonl": '{"video": "a.mp4", "name": "the boat", "prompt": "a boat, it turns", "seed": 12, "num_videos": 3, '
    '"sample_guide_scale": [1, 2], "include_source": true, "from": 0.5}\n"b.mov"\n',
    "list.yaml": "defaults: {num_videos: 4}\nrows:\n- {video: a.mp4, name: the boat, prompt: 'a boat, it turns', "
    "seed: 12, num_videos: 3, sample_guide_scale: [1, 2], include_source: true, from: 0.5}\n- {video: b.mov, "
    "num_videos: null}\n",
}


@pytest.mark.parametrize("name", SAME)
def test_a_row_sets_what_the_flags_set(name: str, folder: Path) -> None:
    boat, other = rows_of(name, SAME[name], "--num_videos", "5")
    assert boat.name == "the boat" and boat.settings == Settings(
        video=str(folder / "a.mp4"),
        ckpt_dir="m",
        output_dir=str(folder / "runs/the boat"),
        prompt="a boat, it turns",
        base_seed=12,
        num_videos=3,
        sample_guide_scale=(1.0, 2.0),
        include_source=True,
        from_=0.5,
    )
    assert (other.name, other.settings.num_videos) == ("b", 5)


def test_a_text_has_a_video_a_line() -> None:
    assert [row.where for row in rows_of("list.txt", "# mine\n\na.mp4\nb.mov\n")] == [
        "list.txt, line 3",
        "list.txt, line 4",
    ]


def test_files_are_looked_for_in_the_list_s_folder_and_hub_ids_stay(folder: Path) -> None:
    (folder / "sub/mine").mkdir(parents=True)
    row = {
        "video": "a.mp4",
        "lora": ["x.safetensors:0.5"],
        "storyboard": "s.yaml",
        "ckpt_dir": "mine",
        "vlm_path": "o/n",
    }
    (only,) = rows_of("sub/list.jsonl", json.dumps(row))
    settings, sub = only.settings, folder / "sub"
    assert (settings.video, settings.storyboard, settings.ckpt_dir) == (
        str(sub / "a.mp4"),
        str(sub / "s.yaml"),
        str(sub / "mine"),
    )
    assert settings.lora == (f"{sub / 'x.safetensors'}:0.5",) and settings.vlm_path == "o/n"


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("l.csv", "video,promt\na.mp4,x\n", ["l.csv, line 1: 'promt': did you mean prompt?"]),
        ("l.csv", "prompt\nx\n", ["l.csv, line 1: the first line of a table names its columns, of which one is video"]),
        ("l.csv", "video,seed\na.mp4,x\n", ["l.csv, line 2: `base_seed` must be a whole number, 'x' is not"]),
        ("l.csv", "video\na.mp4,x\n", ["l.csv, line 2: there are 2 cells under 1 names; put text with , in quotes"]),
        (
            "l.csv",
            'video,prompt,frame_num\na.mp4,"two\nlines",6\nb.mov,,7\n',
            ["l.csv, line 2: `frame_num` must be 4n+1: 6 is not", "l.csv, line 4: `frame_num` must be 4n+1: 7 is not"],
        ),
        ("l.jsonl", '{"video": "a.mp4"\n"b.mov"\n', ["l.jsonl, line 1: it cannot be read as JSON"]),
        ("l.jsonl", '{"prompt": "x"}\n3\n', ["line 1: there is no `video`", "line 2: a row is an object, 3 is not"]),
        ("l.jsonl", '{"video": "a.mp4", "redo": 2}\n', ["line 1: 'redo': which a row may not set"]),
        ("l.jsonl", '{"video": "a.mp4", "prompt": 5}\n', ["line 1: `prompt` must be text"]),
        ("l.jsonl", '{"video": "a.mp4", "name": "../x"}\n', ["line 1: name '../x' cannot be that of a folder"]),
        ("l.jsonl", '{"video": "a.mp4", "name": "Aux.1"}\n', ["line 1: name 'Aux.1' cannot be that of a folder"]),
        ("l.jsonl", '{"video": "a.mp4", "name": "sea."}\n', ["line 1: name 'sea.' cannot be that of a folder"]),
        ("l.jsonl", '{"video": "a.mp4", "seed": 1, "base_seed": 2}\n', ["line 1: base_seed is there twice"]),
        ("l.yaml", "- {video: a.mp4, prompts: 3}\n", ["l.yaml, line 1: 'prompts': did you mean prompt?"]),
        ("l.yaml", "clips: []\n", ["l.yaml, line 1: a list has rows: and may have defaults:"]),
        ("l.yaml", "- a.mp4\n- [b]\n", ["l.yaml, line 2: this must be a video, or a mapping"]),
        ("l.yaml", "- {video: a.mp4, name: 7}\n", ["line 1: name must be text, 7 is not; put it in quotes"]),
        ("l.yaml", "- {video: a.mp4, prompt_for: [[13, x]]}\n", ["line 1: `prompt_for` 13 is beyond `num_videos` 12"]),
        ("l.txt", "a.mp4\nsub/A.mov\n", ["l.txt, line 2: its folder", "is that of l.txt, line 1, too"]),
        ("l.txt", "# none\n", ["videos l.txt names no videos"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(name: str, text: str, parts: list[str]) -> None:
    lines = wrong(name, text)
    assert lines and all(any(part in line for line in lines) for part in parts), lines


def test_rows_of_one_folder_are_found_whatever_leads_there(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "runs/b").symlink_to(folder / "runs/a")
    assert "is that of" in wrong("l.txt", "a.mp4\nb.mov\n")[0]


def test_a_batch_says_where_it_is_reported(folder: Path) -> None:
    assert report_folder(settings()) == folder / "runs"
    assert report_folder(settings(".", "--output_dir", "x/run_{name}/y")) == folder / "x"
    assert report_folder(settings(".", "--output_dir", "{name}")) == folder
    assert report_folder(settings(".", "--report_dir", "r")) == folder / "r"
    with pytest.raises(UserError, match="must hold {name}"):
        settings(".", "--output_dir", "runs")
    with pytest.raises(UserError, match="only with gpus_per_job"):
        settings(".", "--cfg_size", "2")
    assert settings(".", "--cfg_size", "2", "--gpus_per_job", "2").cfg_size == 2
    with pytest.raises(UserError, match="required: --videos"):
        parse("batch", ["--output_dir", "{name}", "--ckpt_dir", "m"])


def test_the_table_says_what_a_row_may_set() -> None:
    clients = {name for name, one in OPTIONS.items() if one.client and one.flag}
    assert clients <= {one.name for one in KEYS.values()}
    taken: dict[str, Any] = {one.name: one for one in options_of("batch")}
    assert not NOT_BATCHED & taken.keys() and OPTIONS.keys() >= NOT_BATCHED
    for name in ("redo", "yes", "review", "output_dir", "no_lock", "vram", "videos", "workers", "dry_run", "log_file"):
        assert "row" not in OPTIONS[name].setters
    assert OPTIONS["lora"].setters == {"command line", "storyboard", "row"}
