"""The list of a batch: every kind of file, and for each mistake one line that says where it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from wan.batch.rows import KEYS, Row, _plain, read_rows, report_folder
from wan.chain.storyboard_file import compose
from wan.commands.flags import parse
from wan.errors import UserError
from wan.kinds import Unfit, read_plain
from wan.options import NOT_BATCHED, OPTIONS, Settings, options_of
from wan.server.orders import CLIENT, CLIP


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
        (
            "l.csv",
            'video,prompt\na.mp4,x\nb.mov,"y\nz\n',
            ["l.csv, line 4: this is not CSV: unexpected end of data (in a row that begins in line 3)"],
        ),
        ("l.csv", 'video\n"a"b\n', ["l.csv, line 2: this is not CSV: ',' expected after '\"'"]),
        (
            "l.jsonl",
            '{"video": "a.mp4"\n"b.mov"\n',
            ["l.jsonl, line 1: it cannot be read as JSON: Expecting ',' delimiter: column 18"],
        ),
        ("l.jsonl", '{"prompt": "x"}\n3\n', ["line 1: there is no `video`", "line 2: a row is an object, 3 is not"]),
        ("l.jsonl", '{"video": "a.mp4", "redo": 2}\n', ["line 1: 'redo': a row may not set it"]),
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


def test_a_list_may_be_written_on_any_system(folder: Path) -> None:
    for name, text in (
        ("l.csv", "\ufeffvideo,prompt\r\na.mp4,x\r\n\r\nb.mov,y\r\n"),
        ("l.jsonl", '\ufeff{"video": "a.mp4", "prompt": "x"}\r\n\r\n{"video": "b.mov", "prompt": "y"}\r'),
        ("l.YAML", "- {video: a.mp4, prompt: x}\r\n- video: b.mov\r\n  prompt: y\r\n"),
    ):
        (folder / name).write_bytes(text.encode())
        rows, bad = read_rows(settings(name))
        assert [(row.name, row.settings.prompt) for row in rows] == [("a", "x"), ("b", "y")] and bad == []
    (folder / "l.txt").write_bytes(b"a.mp4\r\r\nb.mov\r#c.mp4\r\n  # d.mp4")
    assert [row.where for row in read_rows(settings("l.txt"))[0]] == ["l.txt, line 1", "l.txt, line 3"]


def test_what_is_no_text_is_said_with_its_line(folder: Path) -> None:
    (folder / "l.txt").write_bytes("a.mp4\né\nb.mov\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"^l.txt, line 2: this is not UTF-8; save the file as UTF-8$"):
        read_rows(settings("l.txt"))
    (folder / "l.csv").write_bytes(b"video\n\0\n")
    with pytest.raises(UserError, match=r"^videos l.csv is no text; is it the right file\?$"):
        read_rows(settings("l.csv"))
    assert wrong("l.csv", 'video,prompt\na.mp4,"x\n') == ["l.csv, line 2: this is not CSV: unexpected end of data"]
    assert wrong("l.csv", 'video\n"a"b\n')[0].startswith("l.csv, line 2: this is not CSV:")


def test_a_list_has_so_many_rows_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.batch.rows.MOST_ROWS", 2)
    assert len(rows_of("l.txt", "a.mp4\nb.mov\n")) == 2
    assert wrong("l.txt", "a.mp4\nb.mov\nc.mp4\n") == [
        "videos l.txt has more than 2 rows; make several batches of them"
    ]


def test_a_folder_is_looked_through_for_videos_by_their_endings(folder: Path) -> None:
    (folder / "films/more.mp4").mkdir(parents=True)
    for name in ("b.MKV", "a.webm", "c.txt", "d.gif"):
        (folder / "films" / name).touch()
    rows, bad = read_rows(settings("films"))
    assert [(row.name, row.where) for row in rows] == [("a", "films/a.webm"), ("b", "films/b.MKV")] and bad == []
    assert [row.name for row in read_rows(settings("films/*"))[0]] == ["a", "b", "c", "d"]
    (folder / "films/deep").mkdir()
    (folder / "films/deep/e.mp4").touch()
    assert [row.name for row in read_rows(settings("**/*.mp4"))[0]] == ["a", "e"]
    (folder / "films.txt").mkdir()  # a folder, whatever its name
    with pytest.raises(UserError, match=r"^videos films.txt holds no video; give a pattern such as 'films.txt/\*'"):
        read_rows(settings("films.txt"))


def test_two_videos_of_a_folder_with_one_name_are_told_how_to_be_told_apart(folder: Path) -> None:
    (folder / "a.mov").touch()
    rows, bad = read_rows(settings())
    assert [row.settings.video for row in rows] == [str(folder / "a.mov"), str(folder / "b.mov")]
    assert [str(one) for one in bad] == [
        f"a.mp4: its folder {folder / 'runs/a'} is that of a.mov, too; give one of them another name, in a list"
    ]
    assert wrong("l.txt", "a.mov\na.mp4\n") == [
        f"l.txt, line 2: its folder {folder / 'runs/a'} is that of l.txt, line 1, too; give one of them another name"
    ]


def test_a_row_s_folder_is_not_where_the_report_goes(folder: Path) -> None:
    for name in ("batch.html", "Batch.jsonl"):
        assert wrong("l.jsonl", json.dumps({"video": "a.mp4", "name": name})) == [
            f"l.jsonl, line 1: its folder {folder / 'runs' / name} is where the report goes; give `report_dir` or "
            "another name"
        ]


def test_what_a_batch_alone_has_is_no_chain_s(folder: Path) -> None:
    words = (
        "--workers",
        "3",
        "--max_failures",
        "5",
        "--report_dir",
        "r",
        "--log_file",
        "x.log",
        "--quiet",
        "--dry_run",
    )
    (only,) = rows_of("l.txt", "a.mp4\n", *words, "--upload", "memory://{name}")
    given, plain = only.settings, Settings()
    for name in ("workers", "max_failures", "report_dir", "log_file", "quiet", "dry_run", "upload", "videos"):
        assert getattr(given, name) == getattr(plain, name), name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("-7", -7), ("0", 0), ("007", "007"), ("1:30", "1:30"), ("0x1f", "0x1f"), ("1_000", "1_000"),
        ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), ("1.5e-1", 0.15), ("1.5e3", "1.5e3"),
        ("1e3", "1e3"), ("1e", "1e"), (".", "."),
        ("+7", "+7"), ("true", True), ("False", False), ("yes", "yes"), ("null", None), ("~", None), ("", None),
        ("'7'", "7"), ('"true"', "true"), ("!!str 7", "7"), ("[1, x]", [1, "x"]), ("1" * 20, "1" * 20),
        ("1" * 19, int("1" * 19)), (".inf", ".inf"),
    ],
)  # fmt: skip
def test_yaml_has_no_surprises(text: str, value: Any) -> None:
    whole: Any = compose(Path("l.yaml"), f"[{text or '!!null ~'}]")
    (node,) = whole.value
    read = _plain(node)
    assert read == value and type(read) is type(value)


def test_yaml_has_defaults_and_merges(folder: Path) -> None:
    text = """
        defaults: &all {num_videos: 3, prompt: x}
        rows:
        - {video: a.mp4, prompt: y}
        - {video: b.mov, <<: [{seed: 1, prompt: z}, {seed: 2, num_videos: 4}]}
    """
    first, second = (row.settings for row in rows_of("l.yaml", text))
    assert (first.num_videos, first.prompt) == (3, "y")
    assert (second.num_videos, second.prompt, second.base_seed) == (4, "z", 1)  # the first of them wins
    text = "- {video: a.mp4, seed: 5, <<: {seed: 1, prompt: z}}\n"
    (only,) = (row.settings for row in rows_of("l.yaml", text))
    assert (only.base_seed, only.prompt) == (5, "z")  # and what the row says itself before all


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("l.yaml", "rows: x\n", ["l.yaml, line 1: this is no list of rows; begin each with a dash"]),
        ("l.yaml", "\n\nx\n", ["l.yaml, line 3: this is no list of rows; begin each with a dash"]),
        ("l.yaml", "", ["l.yaml, line 1: this is no list of rows; begin each with a dash"]),
        ("l.yaml", "rows: []\nmore: 1\n", ["l.yaml, line 1: a list has rows: and may have defaults:; or it is the"]),
        ("l.yaml", "rows: []\ndefaults: 3\n", ["l.yaml, line 2: defaults: this must be a video, or a mapping"]),
        ("l.yaml", "- a.mp4\n- {video: b.mov, video: c}\n", ["l.yaml, line 2: video is there twice"]),
        ("l.yaml", "- {[1]: 2}\n", ["l.yaml, line 1: a key must be a word"]),
        ("l.yaml", "- {video: {a: b}}\n", ["l.yaml, line 1: a value must be text, a number, true, false or a list"]),
        ("l.yaml", "- 7\n", ["l.yaml, line 1: `video` must be text"]),
        ("l.csv", "video,seed,seed\na.mp4,1,2\n", ["l.csv, line 1: seed is there twice; leave one of them out"]),
        ("l.csv", "video,name,name\na.mp4,1,2\n", ["l.csv, line 1: name is there twice; leave one of them out"]),
        ("l.csv", "\n\nvideo,seed\n\na.mp4,x\n", ["l.csv, line 5: `base_seed` must be a whole number, 'x' is not"]),
        ("l.csv", "video,name\na.mp4,  \n", []),
        ("l.jsonl", '{"video": "a.mp4", "redo": 2}', ["l.jsonl, line 1: 'redo': a row may not set it"]),
        ("l.jsonl", '{"video": "a.mp4", "from_": 2, "fro": 3}', ["l.jsonl, line 1: 'from_': a row may not set it"]),
        ("l.jsonl", '{"video": "a.mp4", "zzz": 2}', ["l.jsonl, line 1: 'zzz': no row has that"]),
        ("l.jsonl", '{"video": "a.mp4", "nam": "x"}', ["l.jsonl, line 1: 'nam': did you mean name?"]),
        ("l.jsonl", '{"video": "a.mp4", "sed": 1}', ["l.jsonl, line 1: 'sed': did you mean seed?"]),
        ("l.jsonl", '{"video": ""}\n\n[1]', ["l.jsonl, line 1: there is no", "l.jsonl, line 3: a row is an"]),
        ("l.jsonl", '{"video": "a.mp4", "num_videos": null, "seed": {}}', ["l.jsonl, line 1: `base_seed`"]),
        ("l.jsonl", '{"video": "a.mp4", "name": "a/b"}', ["l.jsonl, line 1: name 'a/b' cannot be that of a folder"]),
        ("l.jsonl", '{"video": "a.mp4", "name": ""}', ["l.jsonl, line 1: name "]),
        ("l.jsonl", '{"video": "a.mp4", "name": "a\\u200bb"}', ["l.jsonl, line 1: name 'a\\u200bb' cannot"]),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line(name: str, text: str, lines: list[str]) -> None:
    told = wrong(name, text)
    assert len(told) == len(lines) and all(one.startswith(line) for one, line in zip(told, lines, strict=True)), told


def test_a_name_s_blanks_are_none_of_it(folder: Path) -> None:
    (only,) = rows_of("l.jsonl", '{"video": "a.mp4", "name": "  the sea "}')
    assert (only.name, only.folder) == ("the sea", folder / "runs/the sea")


def test_paths_are_whole_and_those_of_a_list_are_of_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "sub").mkdir()
    (folder / "o").mkdir()  # not what a hub's id means, but it is there
    row = {"video": "~/a.mp4", "ckpt_dir": "o/m", "image": "x/../b.png"} | {"vlm_path": "o"}
    del row["image"]
    (only,) = rows_of("sub/l.jsonl", json.dumps(row), "--lora", "x.safetensors", "--vae", "o")
    of = only.settings
    assert (of.video, of.ckpt_dir, of.vlm_path) == (str(folder / "home/a.mp4"), "o/m", "o")
    assert of.lora == (f"{folder / 'x.safetensors'}:1.0",) and of.vae == str(folder / "o")  # of the command
    assert (of.output_dir, Path(of.output_dir).is_absolute()) == (str(folder / "runs/a"), True)


ODD: list[Any] = [
    *([], [[]], [1], [["a", "b"]], ["a", 1], [None], [{}], True, 1, 1.5, "x", "1 2 3", "1=", [[1, 2, 3]], [[{}, 1]]),
    *("nan", 10**400, [10**400] * 2, -(10**400), {}, {"a": 1}, [["1", 2]], "é\udc80", "\0", math.inf, [math.nan] * 2),
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_no_value_of_a_row_or_a_request_is_more_than_a_line(value: Any) -> None:
    for key, option in (*KEYS.items(), *CLIENT.items(), *CLIP.items()):
        try:
            read_plain(option.kind, value)
        except (Unfit, UserError) as error:
            assert str(error) and "\n" not in str(error), key
    size = wrong("l.jsonl", json.dumps({"video": "a.mp4", "size": value}))
    assert size and size[0].startswith("l.jsonl, line 1: ")
    assert wrong("l.jsonl", '{"video": "a.mp4", "lora": [5]}') == ["l.jsonl, line 1: `lora` must be texts"]
