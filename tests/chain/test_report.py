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

from wan.chain.charts import Mark, _time_chart, _walk, charts_of, drift_charts
from wan.chain.measures import MEASURES, Measure, needs_attention
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


def test_a_page_is_named_for_its_source_and_its_model() -> None:
    for arguments, task, title in (
        ({"video": "films/in.mp4"}, "v2v-5B", "in.mp4 with v2v-5B"),
        ({"video": "in.mp4"}, None, "in.mp4"),
        ({}, "v2v-5B", "v2v-5B"),
        ({}, None, "a chain"),
    ):
        records = [clip(1, **({"task": task} if task else {}))]
        assert report(records, arguments=arguments)[1]["title"] == title


def test_new_frames_are_those_that_neither_repeat_nor_are_discarded() -> None:
    _, data = report(
        [clip(1, dropped=5, discard=4), clip(2, discard=None), clip(3, dropped=0), clip(4, fps="24000/1001")]
    )
    assert [one["new_frames"] for one in data["clips"]] == [72, 80, 81, 80]
    assert [one["length"] for one in data["clips"]] == [4.5, 5.0, 5.0625, pytest.approx(80 * 1001 / 24000)]
    assert data["video_seconds"] == pytest.approx(sum(one["length"] for one in data["clips"]))
    assert report([clip(1) | {"frames": None}])[1]["clips"][0]["length"] is None


def test_drift_is_against_the_first_clip_as_long_as_that_is_known() -> None:
    def look(lightness: Any, moving: Any = 0.25) -> dict[str, Any]:
        return {"lightness": lightness, "contrast": 0.0, "chroma": 1.0, "sharpness": 1.0, "moving": moving}

    drift = report([clip(1, look=look(50.0)), clip(2, look=look(None, None)), clip(3, look=look(45.0, 0.5))])[1][
        "drift"
    ]
    assert drift["lightness"] == [0, None, pytest.approx(-10)] and drift["contrast"] == [None] * 3
    assert drift["moving"] == [25, None, 50] and "identity" not in drift
    unknown = report([clip(1, look=look(None)), clip(2, look=look(45.0))])[1]["drift"]
    assert unknown["lightness"] == [None, None]
    alike = report([clip(1, identity=0.9), clip(2, identity=None)])[1]["drift"]
    assert alike["identity"] == [0.9, None]
    unseen = report([clip(1, seam=None)])[1]["drift"]
    assert unseen["colour"] == [None] and unseen["colour_shift"] is None
    steps = report([clip(1, seam=seam() | {"colour_shift": [3.0, 4.0, 0.0]})])[1]["drift"]
    assert steps["colour"] == [5.0] and steps["colour_shift"] == [3.0, 4.0, 0.0]


def test_the_command_of_a_run_that_nobody_typed_is_unknown() -> None:
    _, data = report([clip(1)], arguments={})
    assert data["command"] is None and data["clips"][0]["redo"] is None
    _, data = report([clip(1), clip(7)], arguments={"video": "a.mp4", "yes": True, "take": [[1, 2]], "dry_run": True})
    assert data["command"] == "python generate_continuous.py --video a.mp4"
    assert data["clips"][1]["redo"] == "python generate_continuous.py --video a.mp4 --redo 7"


def plotted(*clips: dict[str, Any]) -> dict[str, Any]:
    """The charts of these clips."""
    return charts_of(report(list(clips))[1])


def test_axes_span_round_numbers_and_each_value_has_its_place() -> None:
    memory = plotted(
        *(clip(number, peak_gpu_gib=value) for number, value in ((1, 3.0), (2, 9.0), (3, None), (4, 0.0)))
    )["memory"]
    assert memory.title == "Peak memory, GiB" and memory.note == "of the GPU"
    assert memory.ticks == [(100.0, "0"), (75.0, "2.5"), (50.0, "5"), (25.0, "7.5"), (0.0, "10")]
    assert memory.labels == [(12.5, 1), (37.5, 2), (62.5, 3), (87.5, 4)]
    assert [(dot.x, dot.y, dot.clip, dot.title) for dot in memory.dots] == [
        (12.5, 70.0, 1, "clip 1: 3.00 GiB"),
        (37.5, 10.0, 2, "clip 2: 9.00 GiB"),
        (87.5, 100.0, 4, "clip 4: 0.00 GiB"),
    ]
    assert {(dot.width, dot.height, dot.kind) for dot in memory.dots} == {(0, 0, "dot")}
    assert memory.lines == [(12.5, 70.0, 37.5, 10.0)] and memory.missing == [62.5]


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (0.5, ["0", "0.25", "0.5", "0.75", "1"]),  # at least up to 1
        (4.0, ["0", "1", "2", "3", "4"]),
        (4.1, ["0", "2", "4", "6"]),
        (40.0, ["0", "10", "20", "30", "40"]),
        (17.0, ["0", "5", "10", "15", "20"]),
        (9999.0, ["0", "2500", "5000", "7500", "1e+04"]),
        (-3.0, ["-3", "-2", "-1", "0", "1"]),
    ],
)
def test_an_axis_has_a_few_round_steps(value: float, labels: list[str]) -> None:
    assert [label for _, label in plotted(clip(1, peak_gpu_gib=value))["memory"].ticks] == labels


@pytest.mark.parametrize(
    ("count", "labelled"),
    [(12, [*range(1, 13)]), (13, [1, 3, 5, 7, 9, 11, 13]), (25, [1, 4, 7, 10, 13, 16, 19, 22, 25])],
)
def test_at_most_twelve_clips_are_labelled(count: int, labelled: list[int]) -> None:
    score = plotted(*(clip(number) for number in range(1, count + 1)))["score"]
    assert [number for _, number in score.labels] == labelled


def test_without_a_gpu_the_host_s_memory_is_drawn() -> None:
    memory = plotted(clip(1, peak_gpu_gib=None, peak_host_gib=7.0))["memory"]
    assert memory.note == "of the host" and [dot.title for dot in memory.dots] == ["clip 1: 7.00 GiB"]


def test_seams_are_bars_over_the_bands_of_their_verdicts() -> None:
    score = plotted(clip(1), clip(2, seam=seam(1.1)), clip(3, seam=None), clip(4, seam=seam() | {"score": 2.0}))[
        "score"
    ]
    assert score.note == "0 is seamless; from 1.7 on a viewer notices"
    assert score.ticks == [(100.0, "0"), (66.667, "1"), (33.333, "2"), (0.0, "3")]
    assert [(round(y, 3), round(height, 3), kind) for y, height, kind in score.bands] == [
        (76.667, 23.333, "good"),  # from 0.7 down
        (43.333, 33.334, "faint"),  # from 1.7
        (0.0, 43.333, "visible"),
    ]
    assert [(bar.x, bar.y, bar.width, round(bar.height, 3), bar.kind, bar.title) for bar in score.bars] == [
        (8.5, 96.667, 8, 3.333, "good", "clip 1: good, score 0.10"),
        (33.5, 63.333, 8, 36.667, "faint", "clip 2: faint, score 1.10"),
        (83.5, 33.333, 8, 66.667, "visible", "clip 4: visible, score 2.00"),
    ]
    assert [bar.clip for bar in score.bars] == [1, 2, 4]
    assert score.missing == [62.5]


def test_bars_of_many_clips_leave_room_between_them() -> None:
    for count, width in ((8, 8), (10, 7.0), (50, 1.4)):
        bars = plotted(*(clip(number) for number in range(1, count + 1)))["score"].bars
        assert [bar.width for bar in bars] == [width] * count
        assert bars[0].x + width / 2 == pytest.approx(50 / count)


def test_stages_are_stacked_in_the_order_in_which_they_came() -> None:
    chart = plotted(clip(1, seconds={"load": 1.0, "vae_encode": 3.0}), clip(2, seconds={"load": 2.0, "write": None}))[
        "time"
    ]
    assert chart.legend == [("stage0", "load"), ("stage1", "vae encode"), ("stage2", "write")]
    assert chart.bars == [
        Mark(21.0, 75.0, 8, 25.0, "stage0", "clip 1: load, 1.0 s", 1),
        Mark(21.0, 0.0, 8, 75.0, "stage1", "clip 1: vae encode, 3.0 s", 1),
        Mark(71.0, 50.0, 8, 50.0, "stage0", "clip 2: load, 2.0 s", 2),
        Mark(71.0, 50.0, 8, 0.0, "stage2", "clip 2: write, 0.0 s", 2),
    ]
    assert not chart.missing and plotted(clip(1, seconds=None))["time"].missing == [50.0]


def test_curves_of_drift_are_flat_within_what_is_no_drift() -> None:
    drift = {
        "colour": [0.0],
        "colour_shift": None,
        **dict.fromkeys(("lightness", "contrast", "chroma", "sharpness"), [0.0]),
        "moving": [20.0],
        "identity": [0.95],
    }
    charts = drift_charts(drift, [1])
    spans = {chart.title: (chart.ticks[0][1], chart.ticks[-1][1]) for chart in charts}
    assert spans == {
        "Colour walk, ΔE": ("0", "3"),
        "Lightness, %": ("-5", "5"),
        "Contrast, %": ("-5", "5"),
        "Colour strength, %": ("-5", "5"),
        "Sharpness, %": ("-5", "5"),
        "Motion, %": ("0", "20"),
        "Identity, cosine": ("0.9", "1"),
    }
    assert [chart.dots[0].y for chart in charts] == [100.0, 50.0, 50.0, 50.0, 50.0, 0.0, 50.0]
    assert len(drift_charts({name: values for name, values in drift.items() if name != "identity"}, [1])) == 6


@pytest.mark.parametrize(
    ("score", "warnings", "needed"),
    [(1.7, (), True), (1.69, (), False), (None, (), False), (None, ("freeze",), True), (0.1, ("slow start",), False)],
)
def test_a_seam_needs_a_look_where_it_shows_or_has_a_warning_that_is_not_mild(
    score: float | None, warnings: tuple[str, ...], needed: bool
) -> None:
    assert needs_attention(score, warnings) == needed


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
