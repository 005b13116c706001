"""`report.html` and `report.json`: how a chain came out, seam by seam, and what made it.

Both come from one dictionary of facts: report.json is that, and the page draws it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import PurePath
from statistics import mode
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image
from torch import Tensor

from wan.options import current, words_of
from wan.pages import templates
from wan.quality.metrics import (
    FAITHFUL_DB,
    GOOD_SPEED,
    MILD,
    VISIBLE_COLOUR,
    VISIBLE_DUPLICATE,
    VISIBLE_FLASH,
    VISIBLE_JUMP,
    VISIBLE_SPEED,
    VISIBLE_TURN,
)
from wan.types import to_uint8

if TYPE_CHECKING:
    from jinja2 import Template

SCHEMA = 1
BESIDE = 4  # thumbnails on each side of a seam
VISIBLE = 1.7  # score of a seam that shows, by `python -m benchmarks.seams`; what moves also turns by itself
SEAMLESS = 0.7  # two of its numbers at the edge of their good range
_THUMBNAIL = (160, 200)  # pixels, at most
_NUMBER = re.compile(r"video_0*(\d+)_")

# What a report repeats of a clip's record, and what else is not a setting of it.
_OF_A_CLIP = ("prompt", "seed", "cut", "seam", "look", "candidates", "memory", "answers", "fallback", "identity")
_COSTS = ("seconds", "peak_gpu_gib", "peak_host_gib")
_NO_SETTING = {*_OF_A_CLIP, *_COSTS, "file", "versions", "fingerprint", "source", "dropped", "digests"}
_LOOKS = {"lightness": "Lightness", "contrast": "Contrast", "chroma": "Colour strength", "sharpness": "Sharpness"}


@dataclass(frozen=True)
class Measure:
    """One number of a seam: its ranges `good` and `faint` (beyond which it is visible), and what it means in words."""

    key: str
    name: str
    unit: str
    good: tuple[float, float]
    faint: tuple[float, float]
    below: str
    within: str
    above: str

    def read(self, seam: Mapping[str, Any]) -> dict[str, str]:
        """Name, value, verdict (good, faint, visible or unknown) and words."""
        value = _drawable(seam.get(self.key))
        if value is None:
            return {"name": self.name, "value": "–", "verdict": "unknown", "words": "not measured"}
        ranges = {"good": self.good, "faint": self.faint}
        verdict = next((name for name, (low, high) in ranges.items() if low <= value <= high), "visible")
        words = self.within if verdict == "good" else self.below if value < self.good[0] else self.above
        return {"name": self.name, "value": f"{value:.2f} {self.unit}", "verdict": verdict, "words": words}


MEASURES = (
    Measure(
        "jump_ratio",
        "Change at the seam",
        "× usual",
        (0.7, 1.4),
        (VISIBLE_DUPLICATE, VISIBLE_JUMP),
        "less than between other frames: the picture halts",
        "as between any two frames",
        "more than between other frames: the picture jumps",
    ),
    Measure(
        "speed_ratio",
        "Speed after the seam",
        "× before",
        GOOD_SPEED,
        (1 / VISIBLE_SPEED, VISIBLE_SPEED),
        "the motion slows down at once",
        "the motion keeps its pace",
        "the motion speeds up at once",
    ),
    Measure(
        "later_speed_ratio",
        "Speed a little later",
        "× before",
        GOOD_SPEED,
        (VISIBLE_SPEED**-2, VISIBLE_SPEED**2),
        "the motion dies down",
        "the motion keeps its pace",
        "the motion picks up",
    ),
    Measure(
        "velocity_change",
        "Turn of the motion",
        "of the speed",
        (0, 0.25),
        (0, VISIBLE_TURN),
        "",
        "the motion keeps its direction",
        "the motion changes direction",
    ),
    Measure(
        "colour_step",
        "Colour step",
        "ΔE",
        (0, 0.5),
        (0, VISIBLE_COLOUR),
        "",
        "the colours stay",
        "the colours change at once",
    ),
    Measure(
        "flash",
        "Flash",
        "L*",
        (0, VISIBLE_FLASH / 2),
        (0, VISIBLE_FLASH),
        "",
        "the brightness stays",
        "the picture flickers after the seam",
    ),
    Measure(
        "fidelity_db",
        "Known frames redrawn",
        "dB",
        (30, math.inf),
        (FAITHFUL_DB, math.inf),
        "the clip begins with other pixels than it was given",
        "the clip begins with what it was given",
        "",
    ),
)


def seam_thumbnails(before: Tensor, after: Tensor) -> list[bytes]:
    """The last 4 frames of `before` and the first 4 of `after` as JPEGs of at most 160 x 200 pixels.

    Both are float32 [T, H, W, 3] in [-1, 1]; with fewer frames there are fewer pictures.
    """
    jpegs = []
    for frame in (*before[-BESIDE:], *after[:BESIDE]):
        image = Image.fromarray(to_uint8(frame))
        image.thumbnail(_THUMBNAIL)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        jpegs.append(buffer.getvalue())
    return jpegs


def render_report(
    run: Mapping[str, Any], clips: Sequence[Mapping[str, Any]], sheets: Sequence[Sequence[bytes]]
) -> tuple[str, dict[str, Any]]:
    """The page of a run, which needs no other file, and the same facts as JSON values.

    `run` is what run.json holds, `clips` the record of each clip, `sheets` the JPEGs around its seam (`seam_thumbnails`
    of the frames before it and of its first new ones). What a record lacks is None in the facts and "not measured" on
    the page. The facts:

    - `schema`: 1. Of the run: `status`, `clips_finished`, `clips_asked`, `base_seed`, `joined` (file), `arguments`.
    - `title`: source and model. `run_seconds`: what the runs took that made clips. `video_seconds`: new footage,
      without what repeats the source.
    - `command`: goes on with the run. `thresholds`: `seamless` and `visible`, of a seam's score.
    - `attention`: `clip`, `score`, `warnings` of each seam that can be seen or has a warning that footage which merely
      goes on does not give, the worst first.
    - `common`, `versions`: the settings and packages of most clips.
    - `drift`, a value a clip: `colour`, length of the summed colour steps of the seams so far, in Lab units;
      `lightness`, `contrast`, `chroma`, `sharpness`, change against the first clip in percent; `moving`, percent of the
      picture; `identity`, how like the shot's first picture or its anchor the picture is that the clip goes on from,
      to the captioner's eye (a cosine, at most 1). Also `colour_shift`, the sum itself after the last clip: (L, a, b).
    - `clips`: `number`, `file`, `start` (seconds of new footage before it, None after a gap), `length` (seconds),
      `new_frames`, `fps`, `prompt`, `seed`, `cut`, `seam` (`SeamScore.as_json()`), `look` (`Look.as_json()`),
      `candidates`, `memory`, `answers`, `fallback`, `seconds` by stage, `peak_gpu_gib`, `peak_host_gib`, `settings`
      that are not the common ones, and `redo`, the command that makes it again.
    """
    facts = _facts(_plain(run), [_plain(current(clip)) for clip in clips])
    shown = [_shown(clip, sheet) for clip, sheet in zip(facts["clips"], sheets, strict=True)]
    return _template().render(facts | {"clips": shown}, charts=_charts(facts)), facts


# --- facts


def _facts(run: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    settings = [{name: value for name, value in record.items() if name not in _NO_SETTING} for record in records]
    versions = [record.get("versions") or {} for record in records]
    common, installed = _usual(settings), _usual(versions)
    arguments = run.get("arguments") or {}
    lengths = [_length(record) for record in records]
    clips = []
    for index, record in enumerate(records):
        found = _NUMBER.match(record.get("file") or "")
        number = int(found[1]) if found else index + 1
        before = [length for length in lengths[:index] if length is not None]
        whole = number == index + 1 and len(before) == index
        own = settings[index] | versions[index]
        clip = {
            "number": number,
            "start": sum(before) if whole else None,
            "length": lengths[index],
            "new_frames": _new_frames(record),
            "settings": {name: value for name, value in own.items() if value != (common | installed)[name]},
            "redo": _command(arguments, number),
        }
        clips.append(clip | {name: record.get(name) for name in ("file", "fps", *_OF_A_CLIP, *_COSTS)})
    return {
        "schema": SCHEMA,
        **{name: run.get(name) for name in ("status", "clips_finished", "clips_asked", "base_seed", "joined")},
        "title": _title(arguments, common),
        "run_seconds": run.get("seconds"),
        "video_seconds": sum(length or 0.0 for length in lengths),
        "thresholds": {"seamless": SEAMLESS, "visible": VISIBLE},
        "attention": _attention(clips),
        "drift": _drift(clips),
        "common": common,
        "versions": installed,
        "arguments": arguments,
        "command": _command(arguments),
        "clips": clips,
    }


def _title(arguments: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """Of the page: the source and the model, as far as they are known."""
    source = PurePath(str(arguments.get("video") or "")).name
    return " with ".join(part for part in (source, str(common.get("task") or "")) if part) or "a chain"


def _new_frames(record: Mapping[str, Any]) -> int | None:
    frames: int | None = record.get("frame_num")
    left_out = int(record.get("dropped", 1)) + int(record.get("discard") or 0)
    return None if frames is None else frames - left_out


def _length(record: Mapping[str, Any]) -> float | None:
    """Seconds of new footage."""
    frames, fps = _new_frames(record), record.get("fps")
    return None if frames is None or fps is None else float(frames / Fraction(fps))


def _usual(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each name the value that most of them have."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: json.loads(mode(json.dumps(one[name]) for one in found if name in one)) for name in names}


def _command(arguments: Mapping[str, Any], redo: int | None = None) -> str | None:
    """What to type to go on with the run, or to make one clip again; None when the flags are not known."""
    if not arguments:
        return None
    passing: dict[str, Any] = {
        "redo": redo,
        "keep_following": False,
        "dry_run": False,
        "yes": False,
        "take": [],
    }  # for one run
    return shlex.join(["python", "generate_continuous.py", *words_of({**arguments, **passing})])


def needs_attention(score: float | None, warnings: Iterable[str]) -> bool:
    """Whether a seam can be seen, or has a warning of what footage does not do by itself."""
    return (score or 0.0) >= VISIBLE or not set(MILD).issuperset(warnings)


def _attention(clips: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [
        {"clip": clip["number"], "score": _score(clip), "warnings": (clip["seam"] or {}).get("warnings") or []}
        for clip in clips
    ]
    seen = [one for one in found if needs_attention(one["score"], one["warnings"])]
    return sorted(seen, key=lambda one: -(one["score"] or 0.0))


def _drift(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shift, colour = [0.0, 0.0, 0.0], []
    for clip in clips:
        step = [_drawable(value) for value in (clip["seam"] or {}).get("colour_shift") or ()]
        known = [value for value in step if value is not None]
        whole = len(known) == 3
        shift = [total + value for total, value in zip(shift, known, strict=True)] if whole else shift
        colour.append(math.hypot(*shift) if whole else None)
    looks = [clip["look"] or {} for clip in clips]
    moving = [_drawable(look.get("moving")) for look in looks]
    identity = [_drawable(clip["identity"]) for clip in clips]
    return {
        "colour": colour,
        "colour_shift": shift if any(value is not None for value in colour) else None,
        **{name: _percent_change([_drawable(look.get(name)) for look in looks]) for name in _LOOKS},
        "moving": [None if share is None else 100 * share for share in moving],
        **({"identity": identity} if any(value is not None for value in identity) else {}),
    }


def _percent_change(values: Sequence[float | None]) -> list[float | None]:
    """Against the first, as long as that is known and not 0."""
    first = values[0] if values else None
    return [100 * (value / first - 1) if first and value is not None else None for value in values]


def _score(clip: Mapping[str, Any]) -> float | None:
    return _drawable((clip["seam"] or {}).get("score"))


def _drawable(value: Any) -> float | None:
    """A finite number, of a size that can be drawn."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e12 else None


def _plain(value: Any) -> Any:
    """JSON values that every reader takes: a number that is not finite is None, what JSON does not know is its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


# --- charts


@dataclass(frozen=True)
class Mark:
    """A bar or a dot in percent of the chart's box, from the top left; `kind` is its style."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str
    clip: int


@dataclass
class Chart:
    """A plot over the clips, in percent of its box: it fits any width, and its text keeps its size."""

    title: str
    note: str
    ticks: list[tuple[float, str]]  # y and label
    labels: list[tuple[float, int]]  # x and clip
    bands: list[tuple[float, float, str]] = field(default_factory=list)  # y, height and style
    bars: list[Mark] = field(default_factory=list)
    lines: list[tuple[float, float, float, float]] = field(default_factory=list)  # x, y to x, y
    dots: list[Mark] = field(default_factory=list)
    missing: list[float] = field(default_factory=list)  # x
    legend: list[tuple[str, str]] = field(default_factory=list)  # style and name


class _Axes:
    """From clips and values to places; spans the values and at least `low` to `high`, in round numbers."""

    def __init__(self, numbers: Sequence[int], values: Iterable[float | None], low: float, high: float) -> None:
        found = [value for value in values if value is not None]
        low, high = min([low, *found]), max([high, *found])
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
        levels = [step * index for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
        self.numbers = numbers
        self.low, self.high = levels[0], levels[-1]
        self.ticks = [(self.y(level), f"{level:g}" if abs(level) < 1e4 else f"{level:.2g}") for level in levels]
        every = math.ceil(len(numbers) / 12)
        self.labels = [(self.x(index), number) for index, number in enumerate(numbers) if index % every == 0]

    def x(self, index: int) -> float:
        return round((index + 0.5) / len(self.numbers) * 100, 3)

    def y(self, value: float) -> float:
        return round((self.high - value) / (self.high - self.low) * 100, 3)

    @property
    def bar_width(self) -> float:
        return min(70 / max(len(self.numbers), 1), 8)


def _charts(facts: Mapping[str, Any]) -> dict[str, Any]:
    clips, drift = facts["clips"], facts["drift"]
    numbers = [clip["number"] for clip in clips]
    gpu = any(_drawable(clip["peak_gpu_gib"]) is not None for clip in clips)
    peaks = [_drawable(clip["peak_gpu_gib" if gpu else "peak_host_gib"]) for clip in clips]
    against = "against clip 1"
    return {
        "score": _score_chart(numbers, [_score(clip) for clip in clips]),
        "drift": [
            _line_chart("Colour walk", _walk(drift["colour_shift"]), "ΔE", numbers, drift["colour"], 0, 3),
            *(
                _line_chart(title, against, "%", numbers, drift[name], -5, 5)  # less than that is no drift
                for name, title in _LOOKS.items()
            ),
            _line_chart("Motion", "share of the picture that moves", "%", numbers, drift["moving"], 0, 20),
            *(
                [_line_chart("Identity", "likeness at the clip's start", "cosine", numbers, drift["identity"], 0.9, 1)]
                if "identity" in drift
                else []
            ),
        ],
        "time": _time_chart(numbers, [clip["seconds"] or {} for clip in clips]),
        "memory": _line_chart("Peak memory", "of the GPU" if gpu else "of the host", "GiB", numbers, peaks, 0, 1),
    }


def _score_chart(numbers: Sequence[int], scores: Sequence[float | None]) -> Chart:
    axes = _Axes(numbers, scores, 0, VISIBLE + 0.5)
    chart = Chart("Seam score", f"0 is seamless; from {VISIBLE} on a viewer notices", axes.ticks, axes.labels)
    edges = {"good": (0, SEAMLESS), "faint": (SEAMLESS, VISIBLE), "visible": (VISIBLE, axes.high)}
    chart.bands = [(axes.y(high), axes.y(low) - axes.y(high), kind) for kind, (low, high) in edges.items()]
    chart.legend = [("good", "seamless"), ("faint", "faint"), ("visible", "visible")]
    _fill_bars(chart, axes, [{} if score is None else {_verdict(score): score} for score in scores], "score {:.2f}")
    return chart


def _time_chart(numbers: Sequence[int], found: Sequence[Mapping[str, Any]]) -> Chart:
    stacks = [{name: _drawable(value) or 0.0 for name, value in seconds.items()} for seconds in found]
    kinds = {
        name: f"stage{index % 8}" for index, name in enumerate(dict.fromkeys(name for one in stacks for name in one))
    }
    axes = _Axes(numbers, [sum(stack.values()) for stack in stacks], 0, 1)
    chart = Chart("Time per stage", "seconds", axes.ticks, axes.labels)
    chart.legend = [(kind, name.replace("_", " ")) for name, kind in kinds.items()]
    _fill_bars(chart, axes, stacks, "{:.1f} s", kinds)
    return chart


def _fill_bars(
    chart: Chart,
    axes: _Axes,
    stacks: Sequence[Mapping[str, float]],
    wording: str,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """A stack a clip, of values by name; `kinds` are the names' styles, or the names themselves are."""
    for index, (number, stack) in enumerate(zip(axes.numbers, stacks, strict=True)):
        below = 0.0
        for name, value in stack.items():
            top, bottom = axes.y(below + value), axes.y(below)
            left, height = axes.x(index) - axes.bar_width / 2, max(bottom - top, 0.0)
            title = f"clip {number}: {name.replace('_', ' ')}, {wording.format(value)}"
            kind = kinds[name] if kinds else name
            chart.bars.append(Mark(round(left, 3), top, round(axes.bar_width, 3), height, kind, title, number))
            below += value
        if not stack:
            chart.missing.append(axes.x(index))


def _line_chart(
    title: str, note: str, unit: str, numbers: Sequence[int], values: Sequence[float | None], low: float, high: float
) -> Chart:
    axes = _Axes(numbers, values, low, high)
    chart = Chart(f"{title}, {unit}", note, axes.ticks, axes.labels)
    places = [None if value is None else (axes.x(index), axes.y(value)) for index, value in enumerate(values)]
    chart.lines = [(*first, *second) for first, second in pairwise(places) if first and second]
    chart.missing = [axes.x(index) for index, place in enumerate(places) if place is None]
    for number, value, place in zip(numbers, values, places, strict=True):
        if place and value is not None:
            chart.dots.append(Mark(*place, 0, 0, "dot", f"clip {number}: {value:.2f} {unit}", number))
    return chart


def _walk(shift: Sequence[float] | None) -> str:
    """Where the colours have gone, in words."""
    if shift is None:
        return "sum of the seams' colour steps"
    ways = (("darker", "lighter"), ("greener", "redder"), ("bluer", "yellower"))
    told = [f"{abs(value):.1f} {way[value > 0]}" for value, way in zip(shift, ways, strict=True) if abs(value) >= 0.5]
    return f"so far {', '.join(told)}" if told else "so far no direction"


# --- page


def _verdict(score: float | None) -> str:
    if score is None:
        return "unknown"
    return "good" if score < SEAMLESS else "faint" if score < VISIBLE else "visible"


def _shown(clip: Mapping[str, Any], sheet: Sequence[bytes]) -> dict[str, Any]:
    """A clip with what only the page needs of it."""
    seam = clip["seam"] or {}
    after = len(sheet) if clip["new_frames"] is None else min(BESIDE, clip["new_frames"], len(sheet))
    pictures = []
    for index, jpeg in enumerate(sheet, after - len(sheet)):
        when = "" if clip["fps"] is None else f"{float(index / Fraction(clip['fps'])):.2f} s"
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        pictures.append({"when": when.replace("-", "−"), "source": source})
    return {
        **clip,
        "score": _score(clip),
        "verdict": _verdict(_score(clip)),
        "warnings": seam.get("warnings") or [],
        "measures": [measure.read(seam) for measure in MEASURES] if seam else [],
        "before": pictures[: len(sheet) - after],
        "after": pictures[len(sheet) - after :],
    }


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _clock(seconds: float | None) -> str:
    """12.5 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@cache
def _template() -> Template:
    environment = templates("wan.chain")
    environment.filters |= {"as_text": _as_text, "clock": _clock, "address": lambda file: "./" + quote(file)}
    return environment.get_template("report.html.jinja")
