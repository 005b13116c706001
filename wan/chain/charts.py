"""The charts of a chain: plots over its clips, in percent of their boxes. Needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from wan.chain.scores import LOOKS, SEAMLESS, VISIBLE, drawable, score_of, verdict


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
        known = [value for value in values if value is not None]
        low, high = min([low, *known]), max([high, *known])
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


def charts_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The charts of a report by their names on the page; `drift` are several."""
    clips = facts["clips"]
    numbers = [clip["number"] for clip in clips]
    gpu = any(drawable(clip["peak_gpu_gib"]) is not None for clip in clips)
    peaks = [drawable(clip["peak_gpu_gib" if gpu else "peak_host_gib"]) for clip in clips]
    return {
        "score": _score_chart(numbers, [score_of(clip) for clip in clips]),
        "drift": drift_charts(facts["drift"], numbers),
        "time": _time_chart(numbers, [clip["seconds"] or {} for clip in clips]),
        "memory": _line_chart("Peak memory", "of the GPU" if gpu else "of the host", "GiB", numbers, peaks, 0, 1),
    }


def drift_charts(drift: Mapping[str, Any], numbers: Sequence[int]) -> list[Chart]:
    """The charts of what changes from clip to clip, of a report's `drift` of the clips with these numbers."""
    against = "against clip 1"
    charts = [
        _line_chart("Colour walk", _walk(drift["colour_shift"]), "ΔE", numbers, drift["colour"], 0, 3),
        *(
            _line_chart(title, against, "%", numbers, drift[name], -5, 5)  # less than that is no drift
            for name, title in LOOKS.items()
        ),
        _line_chart("Motion", "share of the picture that moves", "%", numbers, drift["moving"], 0, 20),
    ]
    if "identity" in drift:
        likeness = "likeness at the clip's start"
        charts.append(_line_chart("Identity", likeness, "cosine", numbers, drift["identity"], 0.9, 1))
    return charts


def _score_chart(numbers: Sequence[int], scores: Sequence[float | None]) -> Chart:
    axes = _Axes(numbers, scores, 0, VISIBLE + 0.5)
    chart = Chart("Seam score", f"0 is seamless; from {VISIBLE} on a viewer notices", axes.ticks, axes.labels)
    edges = {"good": (0, SEAMLESS), "faint": (SEAMLESS, VISIBLE), "visible": (VISIBLE, axes.high)}
    chart.bands = [(axes.y(high), axes.y(low) - axes.y(high), kind) for kind, (low, high) in edges.items()]
    chart.legend = [("good", "seamless"), ("faint", "faint"), ("visible", "visible")]
    _fill_bars(chart, axes, [{} if score is None else {verdict(score): score} for score in scores], "score {:.2f}")
    return chart


def _time_chart(numbers: Sequence[int], seconds_of_clips: Sequence[Mapping[str, Any]]) -> Chart:
    stacks = [{name: drawable(value) or 0.0 for name, value in seconds.items()} for seconds in seconds_of_clips]
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
