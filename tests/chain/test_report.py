"""The report: what it says, that it is well-formed and needs nothing else, and that no text can break it."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import time
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from PIL import Image

from wan.chain.charts import _time_chart, _walk
from wan.chain.measures import MEASURES, Measure
from wan.chain.report import _clock, render_report, seam_thumbnails
from wan.commands.flags import parse
from wan.quality import SeamScore

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</pre></details></style></title><svg onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %} &amp; 'quoted' \"twice\"",
    "האישה הולכת \u202eלאורך הרכס",
    "🌬️👩‍🦰 風が強くなる",
    "x" * 2000,
    "",
]


class Page(HTMLParser):
    """Every element with its attributes, the text, and whether all tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def seam(score: float = 0.0, *warnings: str, **fields: Any) -> dict[str, Any]:
    """A seam as it is recorded; `score` is that of its colour step alone."""
    values = {
        "jump_ratio": 1.0,
        "duplicate": False,
        "speed_ratio": 1.0,
        "later_speed_ratio": None,
        "velocity_change": 0.0,
        "colour_shift": (score * 1.5, 0.0, 0.0),
        "colour_step": score * 1.5,
        "flash": 0.0,
        "fidelity_db": None,
        "warnings": warnings,
    }
    return SeamScore(**{**values, **fields}).as_json()


def clip(number: int, **fields: Any) -> dict[str, Any]:
    record = {
        "file": f"video_{number:02d}_seed{number + 6}.mp4",
        "prompt": f"beat {number}",
        "seed": number + 6,
        "width": 832,
        "height": 480,
        "frames": 81,
        "fps": "16",
        "sample_steps": 40,
        "dropped": 1,
        "seam": seam(0.1),
        "look": {"lightness": 50.0 + number, "contrast": 18.0, "chroma": 24.0, "sharpness": 300.0, "moving": 0.4},
        "seconds": {"caption": 10.0, "denoise": 300.0},
        "peak_gpu_gib": 61.0,
        "versions": {"torch": "2.13.0"},
    }
    return record | fields


def run(**fields: Any) -> dict[str, Any]:
    arguments = {"ckpt_dir": "./A14B", "video": "in.mp4", "offload_model": True, "sample_shift": None}
    return {
        "status": "finished",
        "clips_finished": 3,
        "clips_asked": 3,
        "base_seed": 7,
        "joined": "joined.mp4",
        "seconds": 930.0,
        "arguments": arguments,
    } | fields


@cache
def thumbnails() -> list[bytes]:
    return seam_thumbnails(torch.zeros(4, 30, 52, 3), torch.ones(4, 30, 52, 3))


def report(clips: list[dict[str, Any]], **fields: Any) -> tuple[Page, dict[str, Any]]:
    page, data = render_report(run(**fields), clips, [thumbnails() for _ in clips])
    return Page(page), data


def test_thumbnails_are_small_pictures_of_the_frames_next_to_the_seam() -> None:
    before = torch.linspace(-1, 1, 9).view(9, 1, 1, 1).expand(9, 480, 832, 3)
    jpegs = seam_thumbnails(before, before.flip(0))
    pictures = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
    levels = [picture.getpixel((80, 40))[0] for picture in pictures]  # type: ignore[index]
    assert [picture.size for picture in pictures] == [(160, 92)] * 8
    assert levels == pytest.approx([159, 191, 223, 255, 255, 223, 191, 159], abs=2)
    assert len(seam_thumbnails(before[:2], before)) == 6


def test_the_page_is_well_formed_and_needs_no_other_file_and_no_network() -> None:
    page, _ = report([clip(number) for number in (1, 2, 3)])
    targets = [element[name] for _, element in page.elements for name in ("src", "href", "poster") if name in element]
    pictures = [target for target in targets if target.startswith("data:image/jpeg;base64,")]
    links = [target for target in targets if re.fullmatch(r"#clip-\d+|\./(joined|video_\d+_seed\d+)\.mp4", target)]
    assert len(pictures) + len(links) == len(targets)
    assert {"script", "link", "iframe", "form"}.isdisjoint(tag for tag, _ in page.elements)
    assert all(video["preload"] == "none" for video in page.all("video"))
    assert len(page.all("video")) == 4
    assert len(page.all("img")) == 24


def test_every_link_leads_to_a_clip_of_the_page() -> None:
    page, _ = report([clip(1), clip(2, seam=seam(2.0, "colour step"))])
    names = [element["id"] for _, element in page.elements if "id" in element]
    assert names == ["clip-1", "clip-2"]
    assert {link["href"] for link in page.all("a") if link["href"].startswith("#")} == {"#clip-1", "#clip-2"}


@pytest.mark.parametrize("text", NASTY)
def test_no_text_can_become_part_of_the_page(text: str) -> None:
    fields = {
        "prompt": text,
        "answers": [text],
        "memory": {text: text},
        "fallback": text,
        "negative_prompt": text,
        "file": text,
        "seam": seam(2.0, text),
        "seconds": {text: 1.0},
    }
    plain, _ = report([clip(1, answers=["a"], memory={"a": "a"}, negative_prompt="a", file="a", seam=seam(2.0, "a"))])
    page, data = report([clip(1, **fields)], status=text, arguments={"video": text, "prompt": text}, joined=text)
    assert data["clips"][0]["prompt"] == text
    if text:
        assert page.text.count(text) >= 6
        assert not {tag for tag, _ in page.elements} - {tag for tag, _ in plain.elements}
        assert not [name for _, element in page.elements for name in element if name.startswith("on")]
    for link in page.all("a"):
        assert link["href"].startswith(("#clip-", "./"))


def test_worst_seams_come_first() -> None:
    seams = [seam(0.2), seam(1.8), seam(3.0, "colour step"), seam(0.1, "freeze"), None, seam(1.3, "slow start")]
    page, data = report([clip(number, seam=one) for number, one in enumerate(seams, 1)])
    assert [one["clip"] for one in data["attention"]] == [3, 2, 4]
    assert data["attention"][0]["warnings"] == ["colour step"]
    assert "the colours change at once" in page.text


def test_nothing_to_look_at_is_said() -> None:
    page, data = report([clip(1), clip(2)])
    assert data["attention"] == []
    assert "no measured seam can be seen" in page.text
    assert "No seam has been measured" in report([clip(1, seam=None)])[0].text


@pytest.mark.parametrize("missing", sorted(clip(1)))
@pytest.mark.parametrize("absent", [True, False])
def test_what_a_record_lacks_is_no_error(missing: str, absent: bool) -> None:
    records = [clip(1), clip(2), clip(3)]
    for record in records[1:]:
        if absent:
            del record[missing]
        else:
            record[missing] = 1 if missing == "dropped" else None
    _, data = report(records)
    assert len(data["clips"]) == 3


def test_a_record_of_an_older_run_says_not_measured() -> None:
    page, data = render_report({}, [{"prompt": "a", "seed": 3, "frames": 81, "fps": "16"}, {}], [[], []])
    text = Page(page).text
    assert text.count("seam not measured") == 2
    assert data["clips"][0]["seam"] is None
    assert [one["length"] for one in data["clips"]] == [5.0, None]
    assert data["command"] is None


def test_a_run_without_a_clip_yet_has_a_page() -> None:
    page, data = report([], status="running", joined=None)
    assert "running" in page.text
    assert data["video_seconds"] == 0


@pytest.mark.parametrize(
    "values",
    [[5.0], [5.0, 5.0, 5.0], [0.0, 0.0], [None, None], [1.0, None, 3.0], [math.nan, math.inf, 1.0], [-math.inf]]
    + [[1e11, -1e11], [1e300, 1e-300], [1e-12, 2e-12]],
)
def test_plots_stay_in_their_box_whatever_the_values(values: list[float | None]) -> None:
    look = [dict.fromkeys(("lightness", "contrast", "chroma", "sharpness", "moving"), value) for value in values]
    records = [
        clip(
            number,
            look=one,
            seam=seam() | {"score": value, "colour_shift": [value, value, 0.0]},
            seconds={"caption": abs(value) if value else value},
            peak_gpu_gib=value,
        )
        for number, (one, value) in enumerate(zip(look, values, strict=True), 1)
    ]
    page, _ = report(records)
    places = [
        float(value.removesuffix("%"))
        for tag, element in page.elements
        if tag in ("rect", "line", "circle", "text")
        for name, value in element.items()
        if value.endswith("%") and name in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "width", "height")
    ]
    assert places
    assert all(-0.01 <= place <= 100.01 for place in places)


def test_the_report_as_data_survives_a_file() -> None:
    records = [clip(1, peak_gpu_gib=math.nan, loras={"model": ({"strength": math.inf},)}), clip(2)]
    _, data = report(records, arguments={"sample_guide_scale": (3.5, 4.0)})
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema"] == 1
    assert data["clips"][0]["peak_gpu_gib"] is None


def test_times_count_new_frames_only() -> None:
    _, data = report([clip(1), clip(2, dropped=5), clip(3, frames=41)])
    assert [one["start"] for one in data["clips"]] == [0.0, 5.0, 9.75]
    assert data["video_seconds"] == 12.25


def test_after_a_gap_no_time_is_claimed() -> None:
    _, data = report([clip(1), clip(3)])
    assert [(one["number"], one["start"]) for one in data["clips"]] == [(1, 0.0), (3, None)]


def test_the_seam_is_between_old_and_new_frames() -> None:
    sheet = seam_thumbnails(torch.zeros(2, 30, 52, 3), torch.ones(4, 30, 52, 3))
    page = Page(render_report(run(), [clip(1)], [sheet])[0])
    assert [picture["alt"].split()[2] for picture in page.all("img")] == [
        "−0.12",
        "−0.06",
        "0.00",
        "0.06",
        "0.12",
        "0.19",
    ]


def test_a_clip_shows_only_the_settings_that_are_its_own() -> None:
    _, data = report([clip(1, context_frames=1), clip(2, context_frames=5), clip(3, context_frames=5, sample_steps=20)])
    assert [one["settings"] for one in data["clips"]] == [{"context_frames": 1}, {}, {"sample_steps": 20}]
    assert data["common"] == {"width": 832, "height": 480, "frame_num": 81, "fps": "16", "sample_steps": 40} | {
        "context_frames": 5
    }
    assert data["versions"] == {"torch": "2.13.0"}


def test_drift_adds_up_the_steps_of_the_seams_with_their_sign() -> None:
    shifts = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], None, [-2.0, 0.0, 3.0]]
    seams = [None if shift is None else seam() | {"colour_shift": shift} for shift in shifts]
    page, data = report([clip(number, seam=one) for number, one in enumerate(seams, 1)])
    assert data["drift"]["colour"] == [1.0, 2.0, None, 3.0]
    assert "so far 3.0 yellower" in page.text
    assert data["drift"]["lightness"] == pytest.approx([0, 100 / 51, 200 / 51, 300 / 51])


def test_the_command_is_what_was_typed() -> None:
    arguments = {
        "ckpt_dir": "my models/A14B",
        "video": "it's.mp4",
        "num_videos": 4,
        "prompt": "-5 degrees",
        "base_seed": -1,
        "offload_model": False,
        "t5_cpu": True,
        "sample_guide_scale": [3.5, 4.0],
        "guidance_interval": [0.3, 0.95],
        "lora_high": ["a.safetensors:0.8", "b.safetensors"],
        "redo": 1,
        "keep_following": True,
        "dry_run": False,
    }
    _, data = report([clip(1), clip(2)], arguments=arguments)
    lists = {"sample_guide_scale": (3.5, 4.0), "lora_high": ("a.safetensors:0.8", "b.safetensors")}
    wanted = arguments | lists | {"redo": 2, "keep_following": False, "guidance_interval": (0.3, 0.95)}
    typed = parse("continuous", shlex.split(data["clips"][1]["redo"])[2:])
    assert {name: getattr(typed, name) for name in wanted} == wanted
    assert "--redo" not in data["command"]


def test_a_long_chain_is_reported_quickly() -> None:
    records = [clip(number) for number in range(1, 51)]
    sheets = [thumbnails() for _ in records]
    render_report(run(), records, sheets)  # compiles the template
    start = time.perf_counter()
    render_report(run(), records, sheets)
    assert time.perf_counter() - start < 1.0  # 0.1 s on an idle machine


def test_each_stage_has_a_colour_of_its_own_up_to_eight() -> None:
    names = [f"stage {number}" for number in range(9)]
    chart = _time_chart([1], [dict.fromkeys(names, 1.0)])
    assert [style for style, _ in chart.legend] == [*(f"stage{number}" for number in range(8)), "stage0"]


def test_a_walk_of_colours_is_told_from_half_a_step_on() -> None:
    assert _walk((0.5, -0.49, 0.0)) == "so far 0.5 lighter"
    assert _walk((-0.5, -1, 2)) == "so far 0.5 darker, 1.0 greener, 2.0 yellower"
    assert _walk((0, 0, 0)) == "so far no direction" and _walk(None) == "sum of the seams' colour steps"


def test_the_page_has_no_lines_that_the_template_s_statements_left() -> None:
    page = render_report(run(), [clip(1), clip(2)], [[], []])[0]
    assert not [line for line in page.splitlines() if line and not line.strip()]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "unknown time"),
        (12.5, "12.5 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_a_length_of_time_is_in_the_units_that_one_would_say(seconds: float | None, words: str) -> None:
    assert _clock(seconds) == words


def test_a_number_is_judged_by_its_ranges_whose_ends_belong_to_them() -> None:
    measure = Measure("jump", "Jump", "x", (0.5, 1.5), (0.25, 2.0), "less", "as usual", "more")
    judged = {value: measure.read({"jump": value}) for value in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)}
    verdicts = ["visible", "faint", "good", "good", "good", "faint", "visible"]
    assert [one["verdict"] for one in judged.values()] == verdicts
    assert [one["words"] for one in judged.values()] == ["less"] * 2 + ["as usual"] * 3 + ["more"] * 2
    assert judged[0.25]["value"] == "0.25 x" and measure.read({})["verdict"] == "unknown"


def test_what_is_good_of_a_seam_is_not_faint_and_what_is_faint_has_a_range() -> None:
    for one in MEASURES:
        (low, high), (lowest, highest) = one.good, one.faint
        assert lowest <= low < high <= highest, one.key
