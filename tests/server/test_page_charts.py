"""The charts of the page are those of the report."""

from __future__ import annotations

import sys
from subprocess import run

from wan.server.page_routes import _templates, charts, seam_verdict

DRIFT = {
    "colour": [0.0, 1.0, None],
    "colour_shift": [0.0, 1.0, 0.0],
    **{name: [0.0, 1.0, 2.0] for name in ("lightness", "contrast", "chroma", "sharpness")},
    "moving": [20.0, None, 30.0],
}


def test_the_page_draws_the_curves_of_the_report() -> None:
    report = {"drift": DRIFT, "clips": [{"number": number} for number in (1, 2, 4)]}
    colour, *_, moving = charts(report)
    assert colour.title == "Colour walk, ΔE" and [number for _, number in colour.labels] == [1, 2, 4]
    assert [dot.title for dot in moving.dots] == ["clip 1: 20.00 %", "clip 4: 30.00 %"] and len(moving.missing) == 1
    page = _templates().from_string('{% from "chart.html.jinja" import chart %}{{ chart(plot, "card") }}')
    drawn = page.render(plot=colour)
    assert drawn.count('<line class="curve"') == 1 and drawn.count('<a href="#clip-') == 2
    assert charts({}) == charts({"drift": DRIFT, "clips": [{"number": 1}]}) == []


def test_a_seam_is_judged_as_in_the_report() -> None:
    scores = [0.69, 0.7, 1.69, 1.7]
    assert [seam_verdict({"seam": {"score": score}}) for score in scores] == ["good", "faint", "faint", "visible"]
    assert seam_verdict({"seam": None}) == seam_verdict({"seam": {"score": "x"}}) == "unknown"


def test_charts_need_no_pytorch() -> None:
    code = "import sys, wan.chain.charts; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]).returncode == 0
