"""The facts of a chain's report, as JSON values: each clip, the seams to look at, drift, and what made it all."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import PurePath
from statistics import mode
from typing import Any

from wan.chain.measures import needs_attention
from wan.chain.scores import LOOKS, SEAMLESS, VISIBLE, drawable, score_of
from wan.options import current, words_of

SCHEMA = 1
_NUMBER = re.compile(r"video_0*(\d+)_")

# What a report repeats of a clip's record, and what else is not a setting of it.
_OF_A_CLIP = ("prompt", "seed", "cut", "seam", "look", "candidates", "memory", "answers", "fallback", "identity")
_COSTS = ("seconds", "peak_gpu_gib", "peak_host_gib")
_NO_SETTING = {*_OF_A_CLIP, *_COSTS, "file", "versions", "fingerprint", "source", "dropped", "digests"}


def gather_facts(run: Mapping[str, Any], clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that a report says, see `wan.chain.report.render_report`, of what run.json holds and the clips' records."""
    return _facts(_plain(run), [_plain(current(clip)) for clip in clips])


def _facts(run: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    settings = [{name: value for name, value in record.items() if name not in _NO_SETTING} for record in records]
    versions = [record.get("versions") or {} for record in records]
    common, installed = _usual(settings), _usual(versions)
    arguments = run.get("arguments") or {}
    lengths = [_length(record) for record in records]
    clips = []
    for index, record in enumerate(records):
        file_name = _NUMBER.match(record.get("file") or "")
        number = int(file_name[1]) if file_name else index + 1
        before = [length for length in lengths[:index] if length is not None]
        whole = number == index + 1 and len(before) == index
        used = settings[index] | versions[index]
        clip = {
            "number": number,
            "start": sum(before) if whole else None,
            "length": lengths[index],
            "new_frames": _new_frames(record),
            "settings": {name: value for name, value in used.items() if value != (common | installed)[name]},
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


def _usual(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each name the value that most of them have."""
    names = dict.fromkeys(name for one in records for name in one)
    return {name: json.loads(mode(json.dumps(one[name]) for one in records if name in one)) for name in names}


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


def _attention(clips: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    seams = [
        {"clip": clip["number"], "score": score_of(clip), "warnings": (clip["seam"] or {}).get("warnings") or []}
        for clip in clips
    ]
    seen = [one for one in seams if needs_attention(one["score"], one["warnings"])]
    return sorted(seen, key=lambda one: -(one["score"] or 0.0))


def _drift(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shift, colour = [0.0, 0.0, 0.0], []
    for clip in clips:
        step = [drawable(value) for value in (clip["seam"] or {}).get("colour_shift") or ()]
        known = [value for value in step if value is not None]
        whole = len(known) == 3
        shift = [total + value for total, value in zip(shift, known, strict=True)] if whole else shift
        colour.append(math.hypot(*shift) if whole else None)
    looks = [clip["look"] or {} for clip in clips]
    moving = [drawable(look.get("moving")) for look in looks]
    identity = [drawable(clip["identity"]) for clip in clips]
    return {
        "colour": colour,
        "colour_shift": shift if any(value is not None for value in colour) else None,
        **{name: _percent_change([drawable(look.get(name)) for look in looks]) for name in LOOKS},
        "moving": [None if share is None else 100 * share for share in moving],
        **({"identity": identity} if any(value is not None for value in identity) else {}),
    }


def _percent_change(values: Sequence[float | None]) -> list[float | None]:
    """Against the first, as long as that is known and not 0."""
    first = values[0] if values else None
    return [100 * (value / first - 1) if first and value is not None else None for value in values]


def _plain(value: Any) -> Any:
    """JSON values that every reader takes: a number that is not finite is None, what JSON does not know is its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
