"""A browser without a window, for tests of what a person sees."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any


def _missing() -> str:
    absent = [t for t in ("chromium", "chromedriver") if not shutil.which(t)]
    if not importlib.util.find_spec("selenium"):
        absent.append("selenium")
    return f"not on this machine: {', '.join(absent)} (Debian: chromium, chromium-driver; pip: selenium)" if absent else ""


MISSING = _missing()  # why there is no browser here; empty if there is one
FLAGS = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"


def chromium(width: int, height: int) -> Any:
    """Starts one; `quit` it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in f"{FLAGS} disable-sync disable-dev-shm-usage hide-scrollbars window-size={width},{height}".split():
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(120)
    return driver
