"""The report and its charts: nothing that was recorded is lost or broken on its way into one page."""

import itertools
import math
import random
import xml.etree.ElementTree as ET

import pytest
from heliostat.runs import goodput
from heliostat.track import page, svg


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)


def test_thinning_keeps_ends_in_order_and_every_spike():
    rng = random.Random(0)
    points = [(float(i), rng.random()) for i in range(100_000)]
    points[43_210] = (43_210.0, 99.0)
    points[77_777] = (77_777.0, -99.0)
    thin = svg.thin(points)
    assert len(thin) <= svg.MOST and {points[43_210], points[77_777]} <= set(thin)
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    assert svg.thin(points[:50]) == points[:50]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 20), (5.1, 5.9), (-3, 1e6), (1e-9, 2e-9), (0, 0.30000000000000004)])
def test_ticks_are_round_ascending_and_inside(low, high):
    ticks = svg.ticks(low, high)
    assert 2 <= len(ticks) <= 6 and ticks == sorted(ticks)
    assert all(low - 1e-12 <= t <= high * (1 + 1e-9) + 1e-12 for t in ticks)


@pytest.mark.parametrize(
    "curve",
    [[(1.0, 5.0)], [(1.0, 5.0), (2.0, 5.0)], [(0.0, 0.0), (1.0, 0.0)], [(1.0, math.nan), (2.0, 3.0), (3.0, math.inf)]],
)
def test_a_chart_of_one_point_of_a_flat_line_or_with_gaps_is_whole(curve):
    root = parsed(svg.lines("a < b", {"x & y": curve}))
    assert root.tag == "figure" and "nan" not in ET.tostring(root).decode() and root.find("figcaption").text == "a < b"


def test_nothing_to_draw_is_no_chart():
    assert (
        svg.lines("t", {"a": [], "b": [(1.0, math.nan)]}) == svg.waterfall("t", {"idle": 0.0}, {}) == svg.timeline("t", []) == ""
    )


def test_the_waterfalls_bars_follow_one_another_and_add_up():
    parts = {"computing": 60.0, "data": 30.0, "lost": 10.0, "idle": 0.0}
    bars = parsed(svg.waterfall("t", parts, goodput.COLOURS)).findall(".//rect")
    ends = [(float(b.get("x")), float(b.get("x")) + float(b.get("width"))) for b in bars]
    assert len(bars) == 3 and all(abs(a[1] - b[0]) < 0.2 for a, b in itertools.pairwise(ends))
    assert bars[0].get("fill") == goodput.COLOURS["computing"]


FACTS = {
    "row": {"run_id": "a" * 32, "name": "x<y", "experiment": "e&f", "status": "FAILED", "reason": "it <broke>", "started": 0.0,
            "ended": 9.0, "step": 12, "steps": 20, "train_loss": 1.5, "eval_loss": None, "worker_hours": 0.25},
    "node": {"run_id": "a" * 32, "name": "x<y", "experiment": "e&f", "status": "FAILED", "reason": None, "sweep": "s1",
             "reproduces": None, "recipe": "r:R", "job": {"seed": "1", "data_seed": "2"},
             "code": [{"commit": "c0ffee", "diff": "d1"}], "nodes": [], "changes": [], "attempts": [], "tokenizers": [],
             "data": {"segments": [], "replaced_count": 0}, "checkpoints": [], "models": [], "parents": []},
    "spikes": [(7, 9.5, 4.25)],
    "curves": {key: [(1, 3.0), (2, 2.0)] for key in page.CURVES},
    "goodput": None,
    "samples": [("say <b>", "1 < 2 & 3")],
    "pictures": [("images/x/step-1.png", b"\x89PNG")],
}  # fmt: skip


def test_the_page_escapes_whatever_was_said_and_needs_no_network():
    text = page.page(FACTS)
    assert "it &lt;broke&gt;" in text and "1 &lt; 2 &amp; 3" in text and "<broke>" not in text and "say <b>" not in text
    assert "data:image/png;base64,iVBORw==" in text and "http" not in text and "<script" not in text
    assert "sweep: s1" in text and "code/d1.diff" in text and text.count("<svg") == 5
    dense = {**FACTS, "curves": {**FACTS["curves"], "train/router_loss": []}}
    assert page.page(dense).count("<svg") == 4
