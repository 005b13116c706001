"""`report.html` and `report.json`: how a chain came out, seam by seam, and what made it.

Both come from one dictionary of facts: report.json is that, and the page draws it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image
from torch import Tensor

from wan.chain.charts import charts_of
from wan.chain.facts import gather_facts
from wan.chain.measures import MEASURES
from wan.chain.scores import score_of, verdict
from wan.pages import templates
from wan.types import to_uint8

if TYPE_CHECKING:
    from jinja2 import Template

BESIDE = 4  # thumbnails on each side of a seam
_THUMBNAIL = (160, 200)  # pixels, at most


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
    facts = gather_facts(run, clips)
    shown = [_shown(clip, sheet) for clip, sheet in zip(facts["clips"], sheets, strict=True)]
    return _template().render(facts | {"clips": shown}, charts=charts_of(facts)), facts


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
        "score": score_of(clip),
        "verdict": verdict(score_of(clip)),
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
