"""Tests the report in a real browser: on a wide screen and a phone, light and dark, it is complete, readable, and loads nothing.

Debian: chromium, chromium-driver; pip: heliostat[browser-test]. Pictures go to HELIOSTAT_SCREENSHOTS, or pytest's folder.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heliostat.recipes.images.grids import png
from heliostat.runs import goodput
from heliostat.tracking.report import curation, page
from heliostat.tracking.report.galleries import Series, Shot

from tests.integration.browser import MISSING, loaded, picture, screen, shots
from tests.unit.test_curation_page import told
from tests.unit.test_page import FACTS
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

STEPS = 5000
CURVES = {
    "train/loss": [(s, 2 + 6 / (1 + s / 300) + (s % 7) / 20) for s in range(1, STEPS + 1)],
    "eval/loss": [(s, 2.2 + 6 / (1 + s / 300)) for s in range(500, STEPS + 1, 500)],
    "train/spike": [(1234, 9.5)],
    "eval/perplexity": [(s, 1e6 / s) for s in range(500, STEPS + 1, 500)],
    "train/lr": [(s, 3e-4 * s / STEPS) for s in range(1, STEPS + 1)],
    "train/grad_norm": [(s, 1.0 + (s % 13) / 10) for s in range(1, STEPS + 1)],
    "train/tokens_per_second": [(s, 123_456.0 + s) for s in range(100, STEPS + 1, 100)],
    "train/data/a-source-of-a-rather-long-name/epochs": [(s, s / 1e4) for s in range(100, STEPS + 1, 100)],
    "train/data/bad_samples": [(s, 0.0) for s in range(100, STEPS + 1, 100)],
}
GRAYS = [("png", png(np.full((136, 272, 1), gray, np.uint8))) for gray in (40, 120, 200)]
SERIES = [Series("samples", [Shot(500 * (i + 1), *shot) for i, shot in enumerate(GRAYS)], 9),
          Series("nearest", [Shot(500, *GRAYS[0])], 1, 2)]  # fmt: skip
PARTS = {part: 10.0 + 7 * i for i, part in enumerate(goodput.PARTS)}


@pytest.fixture
def open_(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page on a screen of this width, light or dark, and takes a picture of the whole page."""
    opened = list[Any]()
    file = tmp_path / "report.html"
    facts = {**FACTS, "curves": CURVES, "goodput": {**FACTS["goodput"], "parts": PARTS}, "pictures": SERIES}
    file.write_text(page.page(facts), encoding="utf-8")

    def look(width: int, scheme: str) -> Any:
        opened.append(driver := screen(width, scheme))
        driver.get(file.as_uri())
        picture(driver, shots(tmp_path) / f"report-{width}-{scheme}.png")
        return driver

    yield look
    for driver in opened:
        driver.quit()


OVERLAPS = """
const found = [];
for (const plot of document.querySelectorAll(".plot")) {
  const texts = [...plot.querySelectorAll("text")].filter(t => getComputedStyle(t).display !== "none");
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  const inside = plot.getBoundingClientRect();
  boxes.forEach(([a, r], i) => {
    if (r.left < 0 || r.right > innerWidth) found.push(a + " is cut");
    if (r.left < inside.right - 1 && r.right > inside.left + 1 && r.top < inside.bottom - 1 && r.bottom > inside.top + 1)
      found.push(a + " is on the curves");
    for (const [b, q] of boxes.slice(i + 1))
      if (r.left < q.right && q.left < r.right && r.top < q.bottom && q.top < r.bottom) found.push(a + " overlaps " + b);
  });
}
return found;
"""
SIZES = """
return [...document.querySelectorAll("text, td, dd, dt, pre, .legend, .parts span, .spans span")]
  .filter(e => e.textContent.trim()).map(e => parseFloat(getComputedStyle(e).fontSize));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (400, 1)])
def test_the_report_is_readable_on_a_wide_screen_and_a_phone_by_day_and_by_night(open_, width, columns, scheme):
    browser = open_(width, scheme)
    assert browser.execute_script(OVERLAPS) == [] and min(browser.execute_script(SIZES)) >= 12
    tops = browser.execute_script(
        "return [...document.querySelectorAll('.grid2 .chart')].map(c => c.getBoundingClientRect().top)"
    )
    assert len(tops) == 7 and len([t for t in tops if t == tops[0]]) == columns  # side by side where there is room
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    text = browser.execute_script("return getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert (sum(back) < 100 < 500 < sum(text)) if scheme == "dark" else (sum(text) < 150 < 700 < sum(back))
    assert not browser.get_log("browser")  # neither an error, nor something that the page's policy refused
    assert not loaded(browser)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_a_datasets_making_is_readable_too(open_, width, scheme, tmp_path):
    browser = open_(width, scheme)
    file = tmp_path / "curation.html"
    file.write_text(curation.page(told()), encoding="utf-8")
    browser.get(file.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OVERLAPS) == [] and min(browser.execute_script(SIZES)) >= 12
    hidden, shown = browser.find_element("css selector", "details pre"), browser.find_element("css selector", "summary")
    assert not hidden.is_displayed()
    shown.click()
    assert hidden.is_displayed() and "<script>alert(1)</script>" in hidden.text
    assert not browser.get_log("browser")


def test_a_slider_selects_the_step_of_the_images_and_without_javascript_all_are_shown(open_):
    """The newest step comes first. The arrow keys move the slider too."""
    from selenium.webdriver.common.keys import Keys

    browser = open_(400, "light")

    def shown() -> list[str]:
        return [p.text for p in browser.find_elements("css selector", ".shot p") if p.is_displayed()]

    assert shown() == ["step 1,500", "step 500"]
    (slider,) = browser.find_elements("css selector", "figure.series input")  # one image needs no slider
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown() == ["step 1,000", "step 500"] and slider.get_attribute("aria-valuetext") == "step 1,000"
    slider.send_keys(Keys.HOME)
    assert shown() == ["step 500", "step 500"]
    sizes = browser.execute_script("return [...document.querySelectorAll('.shot img')].map(i => i.complete && i.naturalWidth)")
    assert sizes == [272] * 4 and not browser.get_log("browser")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.refresh()
    assert shown() == ["step 500", "step 1,000", "step 1,500", "step 500"]


def test_the_values_below_the_pointer_are_shown(open_):
    from selenium.webdriver.common.action_chains import ActionChains

    browser = open_(1280, "light")
    plot = browser.find_element("css selector", ".plot")
    tip = plot.find_element("css selector", ".tip")
    assert not tip.is_displayed()
    for share in (0.22, 0.87):
        ActionChains(browser).move_to_element_with_offset(plot, round((share - 0.5) * plot.size["width"]), 0).perform()
        until(tip.is_displayed, "tip", 20)
        head, loss, held_out, spike = tip.text.splitlines()
        step = int(head.removeprefix("step ").replace(",", ""))
        assert abs(step - share * STEPS) < 0.01 * STEPS
        assert float(loss.removeprefix("train/loss ")) == pytest.approx(dict(CURVES["train/loss"])[step], rel=1e-5)
        near = min(CURVES["eval/loss"], key=lambda p: abs(p[0] - share * STEPS))
        assert float(held_out.split()[1]) == pytest.approx(near[1], rel=1e-5) and f"(step {near[0]:,})" in held_out
        assert spike == "train/spike 9.5 (step 1,234)"
        edges = browser.execute_script("const r = arguments[0].getBoundingClientRect(); return [r.left, r.right]", tip)
        assert edges[0] >= 0 and edges[1] <= 1280
