"""Tests the images in a run's report: they are few, small, escaped, and complete without JavaScript."""

import base64
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from heliostat.runs.events import Evaluation
from heliostat.tracking import metrics
from heliostat.tracking.report import galleries, page
from heliostat.tracking.report.galleries import Series, Shot
from PIL import Image

from tests.unit.test_page import FACTS


def png(side: int, noise: bool = False, mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (side, side, 4)) if noise else np.full((side, side, 4), 77)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8), "RGBA").convert(mode).save(out, "PNG")
    return out.getvalue()


class Artifacts:
    """Simulates MLflow's artifacts: files by path."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def list_artifacts(self, run_id: str, folder: str) -> list[Any]:
        below = {path[len(folder) + 1 :] for path in self.files if path.startswith(f"{folder}/")}
        names = sorted({name.split("/")[0] for name in below})
        return [SimpleNamespace(path=f"{folder}/{n}", file_size=len(self.files.get(f"{folder}/{n}", b""))) for n in names]

    def download_artifacts(self, run_id: str, path: str, folder: str) -> str:
        place = Path(folder) / Path(path).name
        place.write_bytes(self.files[path])
        return str(place)


def test_a_series_has_the_first_and_the_last_step_and_few_between():
    files = {f"images/samples/step-{step:08d}.png": png(16) for step in range(100, 100_001, 100)}
    files |= {"images/nearest/step-00000100.png": png(16), "images/nearest/step-00000200.png": b"no image"}
    nearest, samples = galleries.gather(Artifacts(files), "r")  # type: ignore[arg-type]
    steps = [shot.step for shot in samples.shots]
    assert len(steps) == galleries.STEPS and steps[0] == 100 and steps[-1] == 100_000 and samples.steps == 1000
    gaps = np.diff(steps)
    assert gaps.min() > 0 and gaps.max() < 1.1 * gaps.mean()
    assert (nearest.steps, len(nearest.shots), nearest.unreadable) == (2, 1, 1)
    assert [galleries.spread(n, 4) for n in (0, 1, 4, 5)] == [[], [0], [0, 1, 2, 3], [0, 1, 3, 4]]


def test_the_newest_image_of_a_series_stays_readable():
    """A grid of pictures keeps its size in the newest step. In earlier steps, it becomes a thumbnail."""
    files = {f"images/held_out/step-{step:08d}.png": png(1600) for step in (1, 2)}
    ((_, shots, *_),) = galleries.gather(Artifacts(files), "r")  # type: ignore[arg-type]
    assert [Image.open(io.BytesIO(shot.data)).width for shot in shots] == [galleries.THUMBNAIL_SIDE, 1600]
    kind, data = galleries.thumbnail(png(1600, noise=True), galleries.NEWEST_SIDE, galleries.NEWEST_BYTES)
    assert kind == "jpeg" and galleries.THUMBNAIL_BYTES < len(data) <= galleries.NEWEST_BYTES


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize(("side", "noise"), [(1, False), (700, False), (900, True)])
def test_a_thumbnail_is_small_and_readable(side, noise, mode):
    kind, data = galleries.thumbnail(png(side, noise, mode))
    image = Image.open(io.BytesIO(data))
    assert len(data) <= galleries.THUMBNAIL_BYTES and image.format.lower() == kind
    assert 1 <= max(image.size) <= galleries.THUMBNAIL_SIDE and image.width == image.height
    assert kind == "jpeg" if noise else image.width == min(side, galleries.THUMBNAIL_SIDE)


@pytest.mark.parametrize("data", [b"", b"\x89PNG", png(40)[:60]])
def test_a_damaged_image_is_an_error_that_the_report_counts(data):
    with pytest.raises(ValueError, match="not a readable image"):
        galleries.thumbnail(data)


def test_without_javascript_the_images_are_a_list_and_names_are_escaped():
    shots = [Shot(1, "png", png(4)), Shot(2000, "jpeg", b"x")]
    (text,) = galleries.figures([Series("<b onload='x'>", shots, 7, 2), Series("empty", [], 0)])
    assert text.index("step 1<") < text.index("step 2,000<") and text.count("<img") == 2 and "hidden" not in text
    assert "<b onload" not in text and "2 of 7 steps, 2 unreadable" in text
    whole = page.page(FACTS)
    assert "&lt;img&gt;" in whole and whole.count("class='shot'") == 2 and "2 of 30 steps, 1 unreadable" in whole
    sources = re.findall("src='data:image/png;base64,(.*?)'", whole)
    assert [base64.b64decode(source) for source in sources] == [b"\x89PNG"] * 2


def test_the_bounds_of_a_score_are_in_the_scores_chart():
    """A score that only ends with `_low` is a score of its own."""
    event = Evaluation(step=7, scores={"kid": 0.2, "kid_low": 0.1, "kid_high": 0.3, "so_low": 1.0}, images={}, at=0.0)
    logged = {p.key: p.value for p in metrics.points(event)}
    assert logged == {"eval/kid": 0.2, "eval/kid_low": 0.1, "eval/kid_high": 0.3, "eval/so_low": 1.0}
    text = page.page({**FACTS, "curves": {key: [(7, value)] for key, value in logged.items() if "kid" in key}})
    assert text.count('class="chart"') == 1 and all(f"{key} <b>" in text for key in logged if "kid" in key)
