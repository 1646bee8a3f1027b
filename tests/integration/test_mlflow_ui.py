"""Tests what a person sees in MLflow's UI, in a real browser: curves, datasets, images, report, model, and the nested trials of a
sweep.

The server is that of `heliostat run ui`. `make test-slow` runs it. Debian: chromium, chromium-driver; pip:
heliostat[browser-test]. The screenshots go to HELIOSTAT_SCREENSHOTS, or pytest's folder.
"""

import getpass
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.chaos.servers import ServerProcess
from heliostat.recipes.protocol import Draws
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.tracking import ui
from heliostat.training.run import train
from heliostat.tune.driver import tune
from mlflow import MlflowClient
from PIL import Image

from tests.integration.browser import MISSING, chromium, shots
from tests.integration.test_tune import grid, sweep_file
from tests.waiting import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(1800),  # minutes, on a machine that is not busy
]

KEY = "sk-a-key-of-the-tests"


class Squares:
    """Provides a gallery without a model: squares of one gray each."""

    count = 4

    def draw(self, model: torch.nn.Module, device: Any, numbers: list[int]) -> list[np.ndarray]:
        return [np.full((32, 32, 3), 60 * n, np.uint8) for n in numbers]

    def judge(self, pictures: list[np.ndarray], progressed: Callable[[], None]) -> tuple[dict[str, float], dict[str, bytes]]:
        out = io.BytesIO()
        Image.fromarray(np.concatenate(pictures, axis=1)).save(out, "PNG")
        return {"grey": float(np.mean(pictures))}, {"squares": out.getvalue()}


class Drawing(CausalLM, Draws):
    def gallery(self) -> Any:
        return Squares()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = chromium(1440, 1080)
    yield driver
    driver.quit()


@pytest.fixture
def server(tracking: str, browser: Any, tmp_path: Path) -> Iterator[ServerProcess]:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    told = ui.environment(tracking, "127.0.0.1", keys)
    with ServerProcess(ui.command("127.0.0.1", "PORT"), "/health", tmp_path / "ui.log", told) as running:
        browser.get(f"http://{running.endpoint}/#key={KEY}")
        until(
            lambda: "This page needs a key" not in said(browser, None), "the UI behind the key", said=lambda: said(browser, None)
        )
        yield running


@pytest.fixture
def look(server: ServerProcess, browser: Any, tmp_path: Path) -> Callable[..., None]:
    """Opens a page, and there presses a button or searches for charts. Waits for the required texts, checks that it has none of
    the forbidden ones, and saves a picture of it under the name."""

    def look_(path: str, name: str, *texts: str, absent: tuple[str, ...] = (), frame: str | None = None, picture: bool = False,
              press: str = "", charts: str = "") -> None:  # fmt: skip
        browser.get("about:blank")
        browser.get(f"http://{server.endpoint}/#{path}")
        if press:
            there(browser, press).click()
        if charts:
            there(browser, "input[placeholder='Search metric charts']").send_keys(charts)
        for text in texts:
            shown = lambda t=text: t.lower() in said(browser, frame).lower()  # noqa: E731
            until(shown, f"{text!r} at {path}", said=lambda: said(browser, frame))
        if picture:
            until(lambda: any(w and w >= 32 for w in widths(browser)), "picture", said=lambda: str(widths(browser)))
        time.sleep(1.0)  # charts are drawn late, and so would be MLflow's assistant, which covers a part of the page
        assert not browser.find_elements("css selector", "button[data-component-id='mlflow.assistant.chat_panel.close']")
        assert [text for text in absent if text.lower() in said(browser, frame).lower()] == []
        file = shots(tmp_path) / f"mlflow-{name}.png"
        browser.save_screenshot(str(file))
        Image.open(file).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)

    return look_


def test_the_ui_shows_the_run_its_data_images_report_and_model(look, browser, job_file, tracking):
    settings = ["recipe=tests.integration.test_mlflow_ui:Drawing", "train.log_every=1", "mlflow.register=seen-lm",
                "mlflow.alias=champion", "mlflow.experiment=seen", "checkpoint.every=5", "checkpoint.keep=2",
                "card.summary=Sees *what* is shown."]  # fmt: skip
    job = job_file("seen")
    result = train(job, settings)
    client, run_id = MlflowClient(tracking_uri=tracking), result["run_id"]
    experiment = client.get_run(run_id).info.experiment_id
    here = f"/experiments/{experiment}/runs/{run_id}"
    genai = ("Judges", "Prompts", "AI Gateway")  # what the UI's other mode lists
    look(f"/experiments/{experiment}", "experiment", "seen", "Model registry", absent=genai)
    assert "/runs?workflowType=machine_learning" in browser.current_url
    internal = ("heliostat.token", "made_of", "No description", "None")
    look(here, "run", "Finished", "train.optimizer.lr", "corpus", "seen-lm", job.name, getpass.getuser(), "Sees what is shown.",
         absent=internal)  # fmt: skip
    look(f"{here}/model-metrics", "sections", "train/time")
    sections = re.findall(r"^(\S+)\n\(\d+\)$", said(browser, None), re.M)
    assert sections == ["eval", "train", "train/checkpoint", "train/data", "train/data/corpus", "train/time"]
    look(f"{here}/model-metrics", "curves", "train/loss", "eval/loss", charts="(train|eval)/loss")
    look(f"{here}/artifacts/report.html", "report", "Where the time went", "Lineage", frame="iframe")
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    assert len(browser.find_elements("css selector", ".plot .tip")) >= 6  # made by the page's script, which may run here too
    browser.switch_to.default_content()
    look(f"{here}/artifacts/images/squares/step-00000020.png", "images", "step-00000020.png", picture=True)
    gone = ("checkpoint-00000005", "checkpoint-00000010")
    look(f"/experiments/{experiment}/models", "checkpoints", "checkpoint-00000015", "checkpoint-00000020", absent=gone)
    look("/models/seen-lm/versions/1", "model", "seen-lm", "champion", "Held-out scores")


def test_the_ui_shows_a_sweep_its_trials_its_plots_and_their_comparison(look, corpus, tracking, tmp_path):
    result = tune(sweep_file(corpus, tracking, tmp_path, name="swept", space=grid(1e-4, 3e-3)))
    client, parent = MlflowClient(tracking_uri=tracking), result["run_id"]
    experiment = client.get_run(parent).info.experiment_id
    trials = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    here = f"/experiments/{experiment}/runs/{parent}"
    unfold = "button[data-component-id*='runnamecellrenderer']"
    look(f"/experiments/{experiment}/runs", "trials", "swept", "swept-0000", "swept-0001", press=unfold)
    look(here, "sweep", "Finished", "swept")
    look(f"{here}/artifacts/parallel_coordinates.png", "sweep-coordinates", "parallel_coordinates.png", picture=True)
    look(f"{here}/artifacts/history.png", "sweep-history", "history.png", picture=True)
    chosen = f"runs={json.dumps([r.info.run_id for r in trials])}&experiments={json.dumps([experiment])}"
    look(f"/compare-runs?{chosen}", "compare", "swept-0000", "swept-0001", "train.optimizer.lr")


def test_the_table_of_runs_shows_its_metrics_at_1280_pixels(look, browser, tracking):
    client = MlflowClient(tracking_uri=tracking)
    experiment = client.create_experiment("columns")
    run = client.create_run(experiment, run_name="a-run").info.run_id
    for name in (*ui.COLUMNS, "train/lr", "train/grad_norm", "eval/loss"):
        client.log_metric(run, name, 1.5)
    client.set_terminated(run)
    browser.set_window_size(1280, 1000)
    try:
        look(f"/experiments/{experiment}/runs", "runs", "a-run", *ui.COLUMNS)
        script = """return [...document.querySelectorAll(".ag-header-cell[col-id^=metrics]")].map(
            cell => [cell.getAttribute("col-id"), cell.getBoundingClientRect().right])"""
        columns = browser.execute_script(script)
    finally:
        browser.set_window_size(1440, 1080)
    assert [name for name, _ in sorted(columns, key=lambda c: c[1])] == [f"metrics.`{name}`" for name in ui.COLUMNS]
    assert max(right for _, right in columns) < 1280


def there(browser: Any, selector: str) -> Any:
    until(lambda: browser.find_elements("css selector", selector), selector, said=lambda: said(browser, None))
    return browser.find_element("css selector", selector)


def said(browser: Any, frame: str | None) -> str:
    """Returns the page's text, or that of its first frame."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By

    try:
        if frame is None:
            return browser.find_element(By.TAG_NAME, "body").text
        browser.switch_to.frame(browser.find_element(By.TAG_NAME, frame))
        return browser.find_element(By.TAG_NAME, "body").text
    except WebDriverException:  # not there yet, or drawn anew
        return ""
    finally:
        browser.switch_to.default_content()


def widths(browser: Any) -> list[int]:
    return browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
