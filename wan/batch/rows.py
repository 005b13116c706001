"""The list of a batch: a folder, a pattern or a file -> rows, each a chain with its settings. Needs no PyTorch.

    video,name,prompt,seed,num_videos             # .csv; an empty cell says nothing
    boat.mp4,the boat,the boat turns,12,3

    {"video": "boat.mp4", "lora": ["fog.safetensors:0.5"]}                   # .jsonl, a line a row

    defaults: {num_videos: 3}                     # .yaml; or the list of rows alone
    rows:
      - boat.mp4                                  # a text alone is a video
      - {video: sea.mp4, name: the sea, storyboard: sea.yaml}

A .txt has a video a line. Keys are flags without their dashes, `name` for the row's folder (unless it is given the
video's name without its suffix) and `seed`, a shorter word for `base_seed`. Files are looked for in the list's folder.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import glob
import io
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from wan.chain.storyboard_file import compose
from wan.commands.flags import NAME, check_together
from wan.errors import UserError
from wan.files import fits_windows
from wan.foreign import parse_json, read_bytes
from wan.kinds import Files, Local, Picture, PictureFolder, Unfit, Video, Words, read_plain
from wan.options import BATCH, OPTIONS, Option, Settings, by_row_key
from wan.settings import LoraFile

MOST_ROWS = 100_000
MOST_BYTES = 64 << 20  # of a list
LISTS = (".txt", ".csv", ".jsonl", ".yaml", ".yml")
# what a folder is looked through for
VIDEOS = frozenset(
    (".mp4", ".mov", ".mkv", ".webm", ".m4v", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv")
)
PAGE, DATA = "batch.html", "batch.jsonl"

KEYS: Mapping[str, Option] = by_row_key()
_ALSO = {"seed": "base_seed"}
_YAML = "tag:yaml.org,2002:"
_WHOLE, _REAL = re.compile(r"-?(0|[1-9]\d{0,18})"), re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]\d+)?")


@dataclass(frozen=True)
class Row:
    """One chain of a batch: its name, which no other has, where the list says it, all its settings, and its number."""

    name: str
    where: str
    settings: Settings
    number: int = 0  # in the list

    @property
    def folder(self) -> Path:
        """Where its clips are made."""
        return Path(self.settings.output_dir)


@dataclass(frozen=True)
class BadRow:
    """One that cannot be made, and why, in one line."""

    where: str
    reason: str
    number: int = 0  # in the list

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class _Said:
    """What a list says in one place: values by key, as JSON or text has them, or why there are none."""

    where: str
    values: Mapping[str, Any]
    wrong: str = ""


def read_rows(settings: Settings) -> tuple[list[Row], list[BadRow]]:
    """The rows of a batch's `videos`, and those that cannot be made whatever the files are that they name.

    Raises UserError for a list that is none.
    """
    assert settings.videos is not None  # it is required
    source = Path(settings.videos)
    in_list = source.suffix.lower() in LISTS and not source.is_dir()
    folder = source.parent if in_list else Path()
    of_batch = {one.name: one.default for one in OPTIONS.values() if one.group == BATCH} | {
        "log_file": None,
        "quiet": False,
    }
    common = _placed(dataclasses.replace(settings, **of_batch, dry_run=False), Path())
    rows, bad = list[Row](), list[BadRow]()
    taken: dict[str, Row] = {}
    reports = {_key(report_folder(settings) / name) for name in (PAGE, DATA)}
    for count, entry in enumerate(_read_list(source) if in_list else _look_for(settings.videos), 1):
        if count > MOST_ROWS:
            raise UserError(f"`videos` {source} has more than {MOST_ROWS} rows; make several batches of them")
        try:
            row = dataclasses.replace(_row(entry, common, folder.absolute()), number=count)
            if (key := _key(row.folder)) in reports:
                raise UserError(f"its folder {row.folder} is where the report goes; give `report_dir` or another name")
            other = taken.setdefault(key, row)
            if other is not row:
                raise UserError(
                    f"its folder {row.folder} is that of {other.where}, too; give one of them another name"
                    + ("" if in_list else ", in a list")
                )
        except (Unfit, UserError) as error:
            bad.append(BadRow(entry.where, error.marked if isinstance(error, UserError) else str(error), count))
        else:
            rows.append(row)
    if not rows and not bad:
        raise UserError(f"`videos` {source} names no videos; give a folder, a pattern or a list of them")
    return rows, bad


def report_folder(settings: Settings) -> Path:
    """Where a batch is reported."""
    if settings.report_dir is not None:
        return Path(settings.report_dir).expanduser().absolute()
    before = []
    for part in Path(settings.output_dir).expanduser().parts:
        if NAME in part:
            break
        before.append(part)
    return Path(*before).absolute()


def _row(entry: _Said, common: Settings, folder: Path) -> Row:
    """Raises Unfit or UserError for what it cannot be."""
    if entry.wrong:
        raise Unfit(entry.wrong)
    values = dict[str, Any]()
    name = entry.values.get("name")
    for key, value in entry.values.items():
        if key == "name" or value is None:
            continue
        one = KEYS.get(_ALSO.get(key, key))
        if one is None:
            raise Unfit(_unknown(key))
        if one.name in values:
            raise Unfit(f"{key} is there twice, as seed and as base_seed; leave one of them out")
        try:
            values[one.name] = read_plain(one.kind, value)
        except (Unfit, UserError) as error:
            raise UserError(f"`{one.name}` {error}") from error
    if not values.get("video"):
        raise UserError("there is no `video`")
    settings = _placed(dataclasses.replace(common, **values), folder, values)
    name = _name(Path(str(settings.video)).stem if name is None else name)
    settings = dataclasses.replace(settings, output_dir=common.output_dir.replace(NAME, name))
    check_together("continuous", settings)
    return Row(name, entry.where, settings)


def _name(given: Any) -> str:
    if not isinstance(given, str):
        raise Unfit(f"name must be text, {given!r} is not; put it in quotes")
    name: str = given.strip()
    try:
        Words().check(name)
        Local().check(name)
    except Unfit as error:
        raise Unfit(f"name {error}") from error
    if not fits_windows(name) or not name.isprintable():
        raise Unfit(
            f'name {name[:60]!r} cannot be that of a folder on every system; leave out / \\ < > : " | ? * and what is '
            "unprintable, end without a dot, and take no device's name"
        )
    return name


def _unknown(key: str) -> str:
    known = [*KEYS, *_ALSO, "name"]
    close = difflib.get_close_matches(str(key)[:40], known, 1, cutoff=0.6)
    is_flag = key in OPTIONS or f"{key}_" in OPTIONS
    advice = "a row may not set it" if is_flag else f"did you mean {close[0]}?" if close else "no row has that"
    return f"{str(key)[:60]!r}: {advice}"


def _placed(settings: Settings, folder: Path, names: Mapping[str, Any] | None = None) -> Settings:
    """The settings with files of this machine by their whole names, as they are seen from a folder.

    `names` are those that were said there; None are all. What may be a hub's id stays one unless it is there.
    """
    absolute = dict[str, Any]()
    for one in OPTIONS.values() if names is None else (OPTIONS[name] for name in names):
        value = getattr(settings, one.name)
        if not value or not isinstance(one.kind, Local) or value is True:
            continue
        if isinstance(one.kind, Files):
            loras = [LoraFile.parse(text) for text in value]
            absolute[one.name] = tuple(f"{_whole(folder, lora.path)}:{lora.strength!r}" for lora in loras)
        else:
            path = _whole(folder, value)
            needed = isinstance(one.kind, Video | Picture | PictureFolder) or one.name in ("storyboard", "output_dir")
            if needed or path.exists():
                absolute[one.name] = str(path)
    return dataclasses.replace(settings, **absolute)


def _whole(folder: Path, path: str | Path) -> Path:
    return Path(os.path.abspath(folder / os.path.expanduser(path)))


def _key(folder: Path) -> str:
    """Alike for two names of one folder, also on file systems that do not tell letters by their case."""
    return unicodedata.normalize("NFC", os.path.realpath(folder)).casefold()


# --- the list


def _look_for(videos: str) -> Iterator[_Said]:
    """The videos of a folder or of a pattern, by their names."""
    if Path(videos).is_dir():
        videos_found = sorted(
            path for path in Path(videos).iterdir() if path.suffix.lower() in VIDEOS and path.is_file()
        )
        if not videos_found:
            raise UserError(
                f"`videos` {videos} holds no video; give a pattern such as '{videos}/*' if it has other names"
            )
    else:
        videos_found = sorted(Path(path) for path in glob.glob(videos, recursive=True) if os.path.isfile(path))
        if not videos_found:
            lists = ", ".join(LISTS)
            raise UserError(f"`videos` {videos} is no folder and no list ({lists}), and no file has such a name")
    for path in videos_found:
        yield _Said(str(path), {"video": str(path)})


def _read_list(path: Path) -> Iterator[_Said]:
    """What a file says, row by row. Raises UserError."""
    data = read_bytes(path, MOST_BYTES, "give a .txt, .csv, .jsonl or .yaml file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8; save the file as UTF-8") from error
    if "\0" in text:
        raise UserError(f"`videos` {path} is no text; is it the right file?")
    kind = path.suffix.lower()
    if kind == ".csv":
        return _csv(path, text)
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    if kind == ".jsonl":
        return _jsonl(path, lines)
    if kind == ".txt":
        numbered = ((number, line.strip()) for number, line in enumerate(lines.split("\n"), 1))
        return (_Said(_at(path, number), {"video": line}) for number, line in numbered if line and line[0] != "#")
    return _yaml(path, lines)


def _at(path: Path, line: int) -> str:
    return f"{path}, line {line}"


def _csv(path: Path, text: str) -> Iterator[_Said]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    keys: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = _at(path, line), reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if keys is None:
                keys = _columns(where, cells)
            elif len(cells) > len(keys):
                yield _Said(
                    where, {}, f"there are {len(cells)} cells under {len(keys)} names; put text with , in quotes"
                )
            else:
                yield _Said(where, {key: cell for key, cell in zip(keys, cells, strict=False) if cell.strip()})
    except csv.Error as error:
        # a quote that is not closed is seen at the end
        begin = f" (in a row that begins in line {line})" if line != reader.line_num else ""
        raise UserError(f"{_at(path, reader.line_num)}: this is not CSV: {error}{begin}") from error


def _columns(where: str, cells: list[str]) -> list[str]:
    """The keys in the first line of a table. Raises UserError."""
    keys = [cell.strip() for cell in cells]
    if "video" not in keys:
        raise UserError(f"{where}: the first line of a table names its columns, of which one is video")
    for key in keys:
        if key != "name" and _ALSO.get(key, key) not in KEYS:
            raise UserError(f"{where}: {_unknown(key)}")
        if keys.count(key) > 1:
            raise UserError(f"{where}: {key} is there twice; leave one of them out")
    return keys


def _jsonl(path: Path, text: str) -> Iterator[_Said]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = _at(path, number)
        try:
            value = parse_json(line, "it")
            if isinstance(value, dict):
                yield _Said(where, value)
            elif isinstance(value, str):
                yield _Said(where, {"video": value})
            else:
                yield _Said(where, {}, f"a row is an object, {line.strip()[:40]} is not")
        except UserError as error:
            yield _Said(where, {}, str(error))


def _yaml(path: Path, text: str) -> Iterator[_Said]:
    root = compose(path, text)
    rows, defaults = root, dict[str, Any]()
    if isinstance(root, MappingNode):
        top = {key.value: value for key, value in root.value if isinstance(key, ScalarNode)}
        if "rows" not in top or set(top) - {"rows", "defaults"}:
            raise UserError(f"{_at(path, 1)}: a list has rows: and may have defaults:; or it is the list of rows alone")
        rows = top["rows"]
        if "defaults" in top:
            try:
                defaults = _mapping(top["defaults"])
            except Unfit as error:
                raise UserError(f"{_at(path, _line(top['defaults']))}: defaults: {error}") from error
    if not isinstance(rows, SequenceNode):
        raise UserError(
            f"{_at(path, 1 if rows is None else _line(rows))}: this is no list of rows; begin each with a dash"
        )
    for node in rows.value:
        where = _at(path, _line(node))
        try:
            values = {"video": _plain(node)} if isinstance(node, ScalarNode) else _mapping(node)
            yield _Said(where, defaults | values)
        except (Unfit, RecursionError) as error:
            yield _Said(where, {}, str(error))


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _mapping(node: Node) -> dict[str, Any]:
    """Raises Unfit."""
    if not isinstance(node, MappingNode):
        raise Unfit("this must be a video, or a mapping such as {video: boat.mp4}")
    mapping = dict[str, Any]()
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            raise Unfit("a key must be a word")
        if key.value == "<<":
            merged = value.value if isinstance(value, SequenceNode) else [value]
            mapping = {name: one for other in reversed(merged) for name, one in _mapping(other).items()} | mapping
        elif key.value in mapping:
            raise Unfit(f"{key.value[:60]} is there twice; leave one of them out")
        else:
            mapping[key.value] = _plain(value)
    return mapping


def _plain(node: Node) -> Any:
    """A node as JSON would have it, without YAML's surprises: 010 and 1:30 are texts. Raises Unfit."""
    if isinstance(node, SequenceNode):
        return [_plain(one) for one in node.value]
    if not isinstance(node, ScalarNode):
        raise Unfit("a value must be text, a number, true, false or a list")
    text = str(node.value)
    if node.style is not None or node.tag == f"{_YAML}str":
        return text
    if node.tag == f"{_YAML}null":
        return None
    if node.tag == f"{_YAML}bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text
