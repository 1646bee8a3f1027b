"""Runs a headless browser, for tests of what a person sees."""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any


def _missing() -> str:
    absent = [t for t in ("chromium", "chromedriver") if not shutil.which(t)]
    if not importlib.util.find_spec("selenium"):
        absent.append("selenium")
    return f"not on this machine: {', '.join(absent)} (Debian: chromium, chromium-driver; pip: selenium)" if absent else ""


MISSING = _missing()  # why there is no browser here; empty if there is one
FLAGS = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"


def shots(folder: Path) -> Path:
    """Returns the folder for pictures: HELIOSTAT_SCREENSHOTS, or the given folder."""
    return Path(os.environ.get("HELIOSTAT_SCREENSHOTS", folder))


def chromium(width: int, height: int) -> Any:
    """Starts a browser; call `quit` on it at the end."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in f"{FLAGS} disable-sync disable-dev-shm-usage hide-scrollbars window-size={width},{height}".split():
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(120)
    return driver


def screen(width: int, scheme: str) -> Any:
    """Returns a browser with a screen of this width, `light` or `dark`."""
    driver = chromium(width, 900)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    return driver


def picture(driver: Any, place: Path) -> None:
    """Takes a picture of the whole page, and checks that it isn't wider than the screen."""
    width, height = (driver.execute_script(f"return {size}") for size in ("innerWidth", "document.documentElement.scrollHeight"))
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    place.write_bytes(base64.b64decode(taken["data"]))
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def loaded(driver: Any) -> set[str]:
    """Returns the addresses from which the page has loaded something."""
    names = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    return {name for name in names if not name.startswith("data:")}
