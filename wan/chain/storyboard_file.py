"""A storyboard's file: what is different in which clip of a chain. All of it is checked before any model loads.

    defaults: {steps: 30}                # for every clip that does not say otherwise
    clips:
      - the boat turns left              # a text alone is a prompt
      - prompt: the boat sinks           # without one the VLM writes it, as it does without a storyboard
        seed: 12                         # 0 to 2**63-1; clips without one count up from --base_seed
        custom_prompt: ""                # before the prompt; empty for nothing, where it is "continue video" else
        frames: 81                       # 4n+1, at least 5
        steps: 20
        guidance: [3.5, 4.0]             # low noise, high noise; or one number
        shift: 5.0
        lora_high: [light.safetensors:0.8, style.safetensors]    # or one text; [] for none
        lora_low: light_low.safetensors  # the 5B model has `lora` instead of these two
        end_image: end.png               # the last frame
        context: 5                       # known frames of the clip before: 1, 5, 9, 13, 17; fewer than `frames`
        continuation: tail               # last_frame, tail or svi2pro; without svi2pro its LoRAs are left out
        anchor: face.png                 # the picture that svi2pro holds on to from this clip on
        discard: 8                       # of the clip's last frames: 4, 8, 12, 16, 20, 24
        cut: next_scene.png              # a new shot from this picture; `true`: from the text alone (5B)
        motion_amplitude: 1.2            # 1 to 1.5; A14B
        fade: 8                          # frames over which a cut fades in
        takes: 3                         # candidates that are all kept
      - name: the fog                    # by which the clip is known, and keeps its seed, wherever it is moved
      - {}                               # nothing of its own

Every key may be left out, or be null: then the command line says it. A list at the top is `clips`. Files are looked
for in the storyboard's folder. Anchors and merge keys (`<<`) work, tags do not. Text that YAML takes for a number, a
date or yes and no, or with ": " or " #" in it, goes in quotes. A file named .json is JSON of the same structure. In one
named .txt, and in one that is neither a mapping nor a list, each line is a prompt; empty lines and those that begin
with # are left out. All are UTF-8 of up to 1 MiB.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from wan import media
from wan.chain.storyboard import Scene, refuse
from wan.errors import UserError
from wan.foreign import DEEPEST, read_bytes
from wan.kinds import (
    LARGEST_SEED,
    MOST_CLIPS,
    Among,
    Choice,
    Cut,
    Files,
    Frames,
    Guidance,
    Kind,
    Name,
    Picture,
    Real,
    SeedOfClip,
    Unfit,
    Whole,
    Words,
)
from wan.options import Option, by_scene_key
from wan.settings import LoraFile

MOST_BYTES = 2**20
MOST_VALUES = 150_000  # that YAML makes of a file; 10,000 clips with six keys each have as many
_YAML = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,18})")  # not YAML's: 010 is eight there and 1:30 is ninety
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NO_MORE = f"a chain has at most {MOST_CLIPS}, start another from its end"
_BY_LINE = " (a file of one prompt per line is named .txt)"
_STRUCTURE = re.compile(r"""[\s\-\[{"']*(clips|defaults|prompt)["']?\s*:""")


def read_storyboard(path: Path) -> tuple[Scene, ...]:
    """The scenes of a file, at least one, as far as they can be checked without a model.

    Raises UserError with the line of each problem, up to three.
    """
    text, kind = _read(path), path.suffix.lower()
    if kind == ".txt":
        return _prompts(path, text)
    root = compose(path, _json_as_yaml(path, text) if kind == ".json" else text)
    if root is None or (isinstance(root, ScalarNode) and root.tag == _YAML + "str"):
        return _prompts(path, text)
    structure = _Structure(path.parent)
    try:
        scenes = structure.scenes(root)
    except RecursionError as error:  # mappings that are merged into one another by aliases
        raise UserError(f"{path} is nested too deeply") from error
    refuse(path, [*structure.problems, *_names_twice(scenes)])
    return tuple(scenes)


def _names_twice(scenes: Sequence[Scene]) -> Iterator[tuple[int, str]]:
    lines: dict[str, int] = {}
    for scene in scenes:
        if (name := scene.values.get("name")) in lines:
            yield scene.line, f"name {name!r} is there twice, here and in line {lines[name]}"
        elif name is not None:
            lines[name] = scene.line


def _read(path: Path) -> str:
    """The file's text, with "\\n" between its lines."""
    try:
        data = read_bytes(path, MOST_BYTES, "give a .yaml, .json or .txt file")
    except UserError as error:
        raise UserError(f"`storyboard` {error.marked}") from error
    if b"\0" in data:
        raise UserError(f"`storyboard` {path} is no text in UTF-8; is it the right file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8; save the file as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _prompts(path: Path, text: str) -> tuple[Scene, ...]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"`storyboard` {path} holds no clips; write one prompt per line, or YAML")
    structured = "this is YAML or JSON and not a prompt; name the file .yaml or .json"
    if len(lines) > MOST_CLIPS:
        refuse(path, [(lines[MOST_CLIPS][0], f"there are {len(lines)} prompts; {_NO_MORE}")])
    refuse(path, [(number, structured) for number, line in lines if _STRUCTURE.match(line)])
    return tuple(Scene(number, {"prompt": line}) for number, line in lines)


def _json_as_yaml(path: Path, text: str) -> str:
    """The same, line by line, as the part of JSON that YAML's parser reads right: no tabs, and plain characters."""
    try:
        top = json.loads(text, parse_int=str)  # an integer of any length is a problem with its key, not with the file
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: this is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error
    if not isinstance(top, dict | list):
        raise UserError(f"{path}, line 1: a storyboard in JSON is an object or a list")
    return re.sub(
        r'"(?:[^"\\]|\\.)*"|\t', lambda part: " " if part[0] == "\t" else json.dumps(json.loads(part[0])), text
    )


def compose(path: Path, text: str) -> Node | None:
    """The graph of a YAML file's nodes, which know their lines; nothing is constructed. Raises UserError."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line, character = text.count("\n", 0, error.position) + 1, f"U+{ord(text[error.position]):04X}"
        raise UserError(f"{path}, line {line}: YAML takes no character {character}; remove it") from error
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark, begin = error.problem_mark or error.context_mark, error.context_mark
        problem = error.problem or error.context or "this is not YAML"
        if "'\\t'" in problem:
            problem = "YAML takes no tabs here; use spaces"
        elif problem.startswith("mapping values"):
            problem = "a colon where YAML takes none; put text with ': ' in it in quotes, and look at the indentation"
        if mark and begin and begin.line != mark.line:  # an end that is missing is seen far from what it should end
            problem += f" ({error.context}, line {begin.line + 1})"
        hint = "" if path.suffix.lower() in (".yaml", ".yml", ".json") else _BY_LINE
        raise UserError(f"{path}, line {mark.line + 1 if mark else 1}: {problem}{hint}") from error
    except _Excess as error:
        raise UserError(f"{path} {error}") from error
    except (ValueError, OverflowError) as error:  # an escape such as \UFFFFFFFF
        raise UserError(f"{path}, line {loader.line + 1}: YAML cannot read this: {error}") from error
    finally:
        loader.dispose()


class _Excess(Exception):
    """More than a storyboard has. The message goes on after the file's name."""


class _Loader(yaml.SafeLoader):
    """Composes no more than a storyboard may hold: its composer calls itself, and takes a second for 10,000 values."""

    depth = values = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > DEEPEST:
            raise _Excess("is nested too deeply")
        if self.values > MOST_VALUES:
            raise _Excess(f"holds more than {MOST_VALUES} values; is it the right file?")
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Structure:
    """Makes scenes out of YAML nodes. What is wrong is collected in `problems`, and left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[tuple[int, str]] = []
        self._known: dict[int, dict[str, Any]] = {}  # the values of a mapping, by its id: aliases lead there again

    def scenes(self, root: Node) -> list[Scene]:
        clips, defaults = root, {}
        if isinstance(root, MappingNode) and root.tag == _YAML + "map":
            top = self._pairs(root, ("defaults", "clips"), _BY_LINE)
            if "clips" not in top:
                self._add(root, "there is no list of clips; write it as clips:")
                return []
            clips = top["clips"]
            if "defaults" in top and not _is_null(top["defaults"]):
                defaults = self._values(top["defaults"], "defaults must be a mapping such as {steps: 30}")
        items = _items(clips)
        if not items:
            self._add(clips, f"clips must be a list of at least one clip, {_shown(clips)} is not")
            return []
        if len(items) > MOST_CLIPS:
            self._add(items[MOST_CLIPS], f"there are {len(items)} clips; {_NO_MORE}")
            return []
        return [scene for clip in items if (scene := self._scene(clip, defaults))]

    def _scene(self, clip: Node, defaults: Mapping[str, Any]) -> Scene | None:
        if isinstance(clip, ScalarNode) and not _is_null(clip):
            values = self._parsed({"prompt": clip})
        else:
            values = self._values(clip, "a clip must be a prompt or a mapping ({} if it has nothing of its own)")
        try:
            settings = {_KEYS[key].name: value for key, value in {**defaults, **values}.items() if value is not None}
            return Scene(_line(clip), settings)
        except UserError as error:
            self._add(clip, str(error))
            return None

    def _values(self, node: Node, wanted: str) -> dict[str, Any]:
        """The values of a mapping, by key, with what is merged into it."""
        if id(node) in self._known:
            return self._known[id(node)]
        values = self._known[id(node)] = {}  # for a mapping that is merged into itself
        if not isinstance(node, MappingNode) or node.tag != _YAML + "map":
            self._add(node, f"{wanted}, {_shown(node)} is not")
            return values
        pairs = self._pairs(node, (*_KEYS, "<<"), " to merge")
        merged = pairs.pop("<<", None)
        for other in reversed((_items(merged) or [merged]) if merged else []):  # the first one wins
            values |= self._values(other, "<< must be a mapping, or a list of them")
        values |= self._parsed(pairs)
        return values

    def _pairs(self, node: MappingNode, known: Sequence[str], hint: str) -> dict[str, Node]:
        pairs: dict[str, Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else ""
            if name in pairs:
                self._add(key, f"{name} is there twice, here and in line {_line(pairs[name])}")
            elif name in known:
                pairs[name] = value
            else:
                close = difflib.get_close_matches(name[:40], known, 1, cutoff=0.5)
                advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}{hint}"
                self._add(key, f"unknown key {_shown(key)}; {advice}")
        return pairs

    def _parsed(self, pairs: Mapping[str, Node]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, node in pairs.items():
            try:
                values[key] = None if _is_null(node) else _read_value(node, _KEYS[key].kind, self.folder)
            except _UnfitNode as error:
                self._add(error.node, f"{key} {error}")
            except Unfit as error:
                self._add(node, f"{key} {error}")
            except UserError as error:
                self._add(node, f"{key}: {error}")
        return values

    def _add(self, node: Node, problem: str) -> None:
        self.problems.append((_line(node), problem))


class _UnfitNode(Exception):
    """A node that is not what its key takes. The message goes on after the key's name."""

    def __init__(self, node: Node, message: str) -> None:
        super().__init__(message)
        self.node = node


def _must_be(wanted: str, node: Node) -> _UnfitNode:
    return _UnfitNode(node, f"must be {wanted}, {_shown(node)} is not")


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _is_null(node: Node) -> bool:
    return node.tag == _YAML + "null" and isinstance(node, ScalarNode)


def _items(node: Node) -> list[Node] | None:
    """What is in a list; None for anything else."""
    return node.value if isinstance(node, SequenceNode) and node.tag == _YAML + "seq" else None


def _shown(node: Node) -> str:
    """A node as it is named in a message, on one line."""
    kind = node.tag.removeprefix(_YAML)
    if kind not in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value"):
        return f"the tag {node.tag.replace(_YAML, '!!')!r}"
    if not isinstance(node, ScalarNode):
        return ("a list" if node.value else "an empty list") if isinstance(node, SequenceNode) else "a mapping"
    text = node.value if len(node.value) <= 40 else f"{node.value[:37]}..."
    return repr(text) if kind == "str" or not text.isprintable() else text or "nothing"


def _digits(node: Node, form: re.Pattern[str]) -> str | None:
    """The digits of a number that is written as `form`; None for anything else."""
    plain = isinstance(node, ScalarNode) and node.style is None
    fits = plain and node.tag in {_YAML + kind for kind in ("int", "float", "str")}  # YAML 1.1 has 1e3 for a text
    digits: str | None = node.value if fits and form.fullmatch(node.value) else None
    return digits


def _whole(node: Node, kind: Whole, folder: Path) -> int:
    low = kind.fewest_in_chain if isinstance(kind, Frames) else kind.low
    digits = _digits(node, _WHOLE)
    if digits is None or not low <= int(digits) <= kind.high:
        raise _must_be(f"a whole number from {low} to {'2**63-1' if kind.high == LARGEST_SEED else kind.high}", node)
    return int(digits)


def _among(node: Node, kind: Among, folder: Path) -> int:
    digits = _digits(node, _WHOLE)
    if digits is None or int(digits) not in kind.numbers:
        *most, last = map(str, kind.numbers)
        raise _must_be(f"{', '.join(most)} or {last}", node)
    return int(digits)


def _real(node: Node, kind: Kind, folder: Path) -> float:
    digits = _digits(node, _NUMBER)
    if digits is None or not math.isfinite(float(digits)):
        raise _must_be("a number", node)
    if isinstance(kind, Real) and kind.above and float(digits) <= kind.low:
        raise _must_be("a positive number", node)
    return float(digits)


def _guidance(node: Node, kind: Kind, folder: Path) -> tuple[float, float]:
    scales = [_real(item, kind, folder) for item in _items(node) or [node]]
    if len(scales) > 2:
        raise _UnfitNode(node, f"must be one number or [LOW, HIGH], not {len(scales)} numbers")
    return scales[0], scales[-1]


def _text(node: Node, kind: Kind, folder: Path) -> str:
    if not isinstance(node, ScalarNode) or node.tag != _YAML + "str":
        raise _must_be("text (in quotes if YAML takes it for something else)", node)
    try:  # JSON writes what is beyond 16 bits as two escapes
        text = node.value.encode("utf-16", "surrogatepass").decode("utf-16").strip()
    except UnicodeDecodeError as error:
        raise _UnfitNode(node, "holds half of a surrogate pair; write the character itself") from error
    return str(text)


def _words(node: Node, kind: Kind, folder: Path) -> str:
    text = _text(node, kind, folder)
    if not text:
        raise _UnfitNode(node, "is empty; write something or leave the key out")
    return text


def _picture(node: Node, kind: Kind, folder: Path) -> str:
    path = folder / os.path.expanduser(_words(node, kind, folder))
    media.read_image(path)  # all of it: a truncated file is no use after an hour
    return str(path)


def _cut(node: Node, kind: Kind, folder: Path) -> str | bool | None:
    if node.tag != _YAML + "bool":
        return _picture(node, kind, folder)
    if node.value not in ("true", "false"):
        raise _must_be("the name of a picture, or true", node)
    return node.value == "true" or None


def _loras(node: Node, kind: Kind, folder: Path) -> tuple[str, ...]:
    items = _items(node)
    return tuple(_lora(item, kind, folder) for item in ([node] if items is None else items))


def _lora(node: Node, kind: Kind, folder: Path) -> str:
    """PATH:STRENGTH, with the path from the storyboard's folder."""
    try:
        lora = LoraFile.parse(_words(node, kind, folder))
    except UserError as error:
        raise _UnfitNode(node, f"cannot be read: {' '.join(str(error).split())}") from error
    path = folder / lora.path
    if not os.path.isfile(path):
        raise _UnfitNode(node, f"must be a LoRA file in the storyboard's folder, {str(path)!r} is not there")
    return f"{path}:{lora.strength!r}"


def _read_value(node: Node, kind: Kind, folder: Path) -> Any:
    """A node as the value of a setting. Raises _UnfitNode, or Unfit where the kind itself does not take it."""
    value = _READERS[type(kind)](node, kind, folder)
    if value is not None:
        kind.check(value)
    return value


# How YAML writes each kind of value that a storyboard may hold.
_READERS: Mapping[type[Kind], Callable[[Node, Any, Path], Any]] = {
    Kind: _text,
    Words: _words,
    Choice: _words,
    Name: _words,
    Whole: _whole,
    Frames: _whole,
    SeedOfClip: _whole,
    Among: _among,
    Real: _real,
    Guidance: _guidance,
    Files: _loras,
    Picture: _picture,
    Cut: _cut,
}
_KEYS: Mapping[str, Option] = by_scene_key()
