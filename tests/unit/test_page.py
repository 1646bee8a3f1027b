"""Tests the report and its charts: the page contains every record, complete and valid."""

import base64
import hashlib
import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.runs import goodput
from heliostat.runs.events import Steps
from heliostat.tracking import metrics as points
from heliostat.tracking.metrics import METRICS, Metric
from heliostat.tracking.report import page, svg
from heliostat.tracking.report.galleries import Series, Shot
from heliostat.tracking.report.svg import Curve


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


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 20), (5.1, 5.9), (-3, 1e6), (1e-9, 2e-9), (0, 0.30000000000000004), (7, 7), (0, 0), (-2, -2)]
)
def test_ticks_are_round_ascending_around_the_values_and_told_apart(low, high):
    ticks = svg.ticks(low, high)
    assert 3 <= len(ticks) <= 11 and ticks == sorted(ticks)
    assert ticks[0] <= low + 1e-12 and high <= ticks[-1] + 1e-12
    texts = svg.labels(ticks)
    assert len(set(texts)) == len(texts) and all(len(text) <= 8 for text in texts)
    steps = {round((b - a) / 10 ** math.floor(math.log10(b - a) + 1e-9), 6) for a, b in itertools.pairwise(ticks)}
    assert steps <= {1.0, 2.0, 2.5, 5.0}


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([0.0, 500.0, 1000.0, 1500.0], ["0", "500", "1,000", "1,500"]),
        ([0.0, 25_000.0, 50_000.0], ["0", "25k", "50k"]),
        ([0.0, 2.5e6, 5e6], ["0", "2.5M", "5.0M"]),
        ([0.0, 1e-6, 2e-6], ["0", "1e-6", "2e-6"]),
        ([0.0, 5e-5, 1e-4, 1.5e-4], ["0", "0.5e-4", "1.0e-4", "1.5e-4"]),
        ([0.0, 1e15, 2e15], ["0", "1e15", "2e15"]),
    ],
)
def test_labels_have_as_many_digits_as_tell_them_apart(values, texts):
    assert svg.labels(values) == texts


@pytest.mark.parametrize(
    "curve",
    [[(1.0, 5.0)], [(1.0, 5.0), (2.0, 5.0)], [(0.0, 0.0), (1.0, 0.0)], [(1.0, math.nan), (2.0, 3.0), (3.0, math.inf)]],
)
def test_a_chart_of_one_point_of_a_flat_line_or_with_gaps_is_whole(curve):
    root = parsed(svg.lines("a < b", [Curve("x & y", curve)], (0.0, 3.0), "1/s"))
    assert root.tag == "figure" and "nan" not in ET.tostring(root).decode() and root.find("figcaption").text == "a < b "
    assert root.findall(".//circle")  # so few points are dots, too


def test_a_chart_holds_the_values_that_are_shown_below_the_pointer():
    curve = [(float(i), 1 / (i + 1)) for i in range(100)]
    root = parsed(svg.lines("t", [Curve('"x"', curve), Curve("y", [(50.0, 9.0)], mark=True)], (0.0, 100.0)))
    first, second = json.loads(root.get("data-curves"))
    assert first["name"] == '"x"' and second == {"name": "y", "points": [[50.0, 9.0]]}
    assert [tuple(p) for p in first["points"]] == [(x, pytest.approx(y, rel=1e-6)) for x, y in curve]
    assert len(root.findall(".//polyline")) == 1 and len(root.findall(".//circle")) == 1
    assert root.get("data-range") == "0 100"


def test_curves_are_drawn_in_full_colour_order_and_inside_the_plot():
    curves = [Curve(str(i), [(s, random.Random(i).uniform(-1e3, 1e3)) for s in (1.0, 40.0, 80.0)]) for i in range(8)]
    root = parsed(svg.lines("t", curves, (0.0, 80.0)))
    lines = root.findall(".//polyline")
    assert [line.get("class") for line in lines] == [f"ink{i % svg.INKS}" for i in range(8)]
    places = [float(v) for line in lines for v in re.split("[ ,]", line.get("points"))]
    assert all(0 <= v <= 1000 for v in places)


@pytest.mark.parametrize("last", [1, 2, 7, 20, 22, 160, 5000])
def test_steps_are_whole_numbers_on_their_axis(last):
    root = parsed(svg.lines("t", [Curve("a", [(1.0, 1.0), (float(last), 2.0)])], (0.0, float(last))))
    steps = [t.text for t in root.findall(".//text") if t.get("text-anchor") == "middle"]
    assert steps[0] == "0" and len(steps) >= 2 and all(re.fullmatch(r"[\d,]+", step) for step in steps)


def test_nothing_to_draw_is_no_chart():
    empty = [Curve("a", []), Curve("b", [(1.0, math.nan)])]
    assert svg.lines("t", empty, (0.0, 1.0)) == svg.waterfall("t", {"idle": 0.0}, {}) == svg.timeline("t", []) == ""


def test_the_waterfalls_bars_follow_one_another_and_add_up():
    parts = {"computing": 60.0, "data": 30.0, "lost": 10.0, "idle": 0.0}
    bars = [b.get("style") for b in parsed(svg.waterfall("t", parts, goodput.COLOURS)).findall(".//i")]
    ends = [tuple(map(float, re.match(r"left:([\d.]+)%;width:([\d.]+)%", b).groups())) for b in bars]
    assert len(bars) == 3 and all(abs(a + width - b) < 0.02 for (a, width), (b, _) in itertools.pairwise(ends))
    assert sum(ends[-1]) == pytest.approx(100, abs=0.02) and goodput.COLOURS["computing"] in bars[0]


CURVES = {
    name: [(1, 3.0), (2, 2.0)]
    for name in ("train/loss", "eval/loss", "eval/bits_per_byte", "train/router_loss", "train/lr", "train/tokens_per_second",
                 "train/data/<src>/epochs")
}  # fmt: skip
FACTS = {
    "row": {"run_id": "a" * 32, "name": "x<y", "experiment": "e&f", "status": "FAILED", "reason": "it <broke>", "started": 0.0,
            "ended": 9.0, "step": 12, "steps": 20, "train_loss": 1.5, "eval_loss": None, "worker_hours": 0.25,
            "per_second": 3694.9, "goodput": 0.4},
    "node": {"run_id": "a" * 32, "name": "x<y", "experiment": "e&f", "status": "FAILED", "reason": None, "sweep": "s1",
             "reproduces": None, "recipe": "r:R", "job": {"seed": "1", "data_seed": "2"},
             "code": [{"commit": "c0ffee", "diff": "d1"}], "nodes": [], "changes": [], "attempts": [], "tokenizers": [],
             "data": {"segments": [], "replaced_count": 0}, "checkpoints": [], "models": [], "parents": [], "exports": []},
    "spikes": [(7, 9.5, 4.25)],
    "curves": CURVES,
    "goodput": {"goodput": 0.4, "parts": {"computing": 4.0, "idle": 6.0},
                "attempts": [{"started": 0.0, "seconds": 9.0, "start_step": 0, "reached": 12, "workers": 2, "outcome": "failed",
                              "reason": "<gone>"}]},
    "samples": [("say <b>", "1 < 2 & 3")],
    "masks": None,
    "answers": [],
    "pictures": [Series("<img>", [Shot(1, "png", b"\x89PNG"), Shot(20, "png", b"\x89PNG")], 30, 1)],
}  # fmt: skip


def test_the_page_escapes_whatever_was_said_and_needs_no_network():
    text = page.page(FACTS)
    assert "it &lt;broke&gt;" in text and "1 &lt; 2 &amp; 3" in text and "<broke>" not in text and "say <b>" not in text
    assert "<src>" not in text and "<gone>" not in text and "x<y" not in text
    assert "data:image/png;base64,iVBORw==" in text and not re.search(r"https?://|url\(|@import", text)
    assert "sweep: s1" in text and "code/d1.diff" in text


def test_the_page_lets_a_browser_run_its_own_script_alone_and_load_nothing():
    text = page.page({**FACTS, "samples": [("</script><script>alert(1)</script>", "")]})
    policy = re.search('Content-Security-Policy\' content="([^"]+)"', text)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = re.findall("<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules == {"default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'", "base-uri": "'none'",
                     "script-src": f"'sha256-{digest}'", "form-action": "'none'"}  # fmt: skip
    assert "innerHTML" not in script and "fetch" not in script


def test_curves_share_the_charts_that_metrics_declare_in_their_order():
    titles = re.findall('<figure class="chart".*?<figcaption>(.*?)(?: <span>.*?)?</figcaption>', page.page(FACTS))
    assert titles == ["Loss", "Bits per byte", "Router loss", "Learning rate", "Throughput", "Epochs of each source"]


def test_a_metric_is_in_mlflow_and_in_the_report_once_it_is_declared(monkeypatch):
    """No other place needs to know it."""
    made = Metric("train/seconds_per_step", Steps, lambda e: e.seconds / len(e.loss), "Step time", "s", "Speed")
    for module in (points, page):
        monkeypatch.setattr(module, "METRICS", (made, *METRICS))
    event = Steps(first=0, loss=[1.0, 2.0], lr=[0.1, 0.1], grad_norm=[1.0, 1.0], seconds=3.0, at=9.0)
    logged = {p.key: (p.value, p.step) for p in points.points(event)}
    assert logged["train/seconds_per_step"] == (1.5, 2)
    text = page.page({**FACTS, "curves": {"train/seconds_per_step": [(2, 1.5)]}})
    assert text.count('class="chart"') == 1 and "<h3>Speed</h3>" in text and "<figcaption>Step time <span>s</span>" in text


class Store:
    """Simulates MLflow: a run's metrics, under their logged names."""

    def __init__(self, histories: dict[str, list[tuple[int, float]]]) -> None:
        self.histories = histories
        metrics = {key: found[-1][1] for key, found in histories.items()}
        self.run = SimpleNamespace(info=SimpleNamespace(run_id="r"), data=SimpleNamespace(metrics=metrics))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step, value=value) for step, value in self.histories[key]]


def test_a_run_that_was_recorded_under_former_names_and_then_resumed_has_whole_curves():
    store = Store({"data/a/epochs": [(10, 0.1), (20, 0.2)], "train/data/a/epochs": [(30, 0.3)], "train/data_wait": [(10, 0.5)],
                   "goodput/fraction": [(20, 0.4)], "train/loss": [(1, 3.0)]})  # fmt: skip
    assert page._curves(store, store.run) == {
        "train/data/a/epochs": [(10, 0.1), (20, 0.2), (30, 0.3)], "train/data/wait": [(10, 0.5)], "train/loss": [(1, 3.0)],
    }  # fmt: skip
