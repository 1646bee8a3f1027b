"""Decides which version of a model is served: the one that its alias names now.

A new version loads beside the old one; then what comes goes to it, and the old one ends when its last request is answered.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.errors import HeliostatError, StoppedError
from heliostat.text import brief

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


class Versions:
    """Moves traffic between versions. `use` tells the front of one, and returns the requests that each has under way."""

    def __init__(
        self,
        load: Callable[[str], None],
        use: Callable[[str], dict[str, int]],
        end: Callable[[str], None],
        drain_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.load, self.use, self.end, self.drain_s, self.clock = load, use, end, drain_s, clock
        self.current, self.failed = "", ""
        self.until: dict[str, float] = {}  # of versions that are draining

    def tick(self, wanted: str) -> None:
        """Moves to what is wanted, tells the front, and ends what has drained; HeliostatError if the first does not load."""
        if wanted not in (self.current, self.failed):
            self._move(wanted)
        open_ = self.use(self.current)
        for old, until in list(self.until.items()):
            if not open_.get(old) or self.clock() > until:
                if open_.get(old):
                    log.warning("%s ends with %d requests that did not end in %g s", old, open_[old], self.drain_s)
                del self.until[old]
                self.end(old)
                log.info("%s has ended", old)

    def _move(self, wanted: str) -> None:
        self.failed = ""
        if wanted not in self.until:  # else it was served a moment ago, and still is there
            try:
                self.load(wanted)
            except StoppedError:
                raise
            except HeliostatError as e:
                if not self.current:
                    raise
                self.failed = wanted
                log.error("%s is not served, %s goes on: %s", wanted, self.current, brief(e))
                return
        self.until.pop(wanted, None)
        if self.current:
            self.until[self.current] = self.clock() + self.drain_s
            log.info("requests go to %s now, and %s drains", wanted, self.current)
        self.current = wanted


class NoModel:
    """Stands for the model where an index is served without one."""

    def __init__(self, index: str) -> None:
        self.label = index

    def wanted(self) -> str:
        """Returns the one version that there is."""
        return self.label

    def folder(self, version: str) -> Path | None:
        """Returns that there is no folder."""
        return None


class VersionSource:
    """Finds the version that a model's name means, and its folder. `name`: what clients call it."""

    def __init__(self, model: str, store: str) -> None:
        self.model, self.store = model, store
        self.follows = model.startswith("models:/") and "@" in model
        self.label = Path(model).resolve().name if Path(model).is_dir() else model.removeprefix("models:/").replace("/", "-")
        self.name = re.split("[/@]", model.removeprefix("models:/"))[0] if model.startswith("models:/") else self.label
        self.known = ""
        self.client: MlflowClient | None = None

    def wanted(self) -> str:
        """Returns the version to serve; the last known if the registry does not answer, which is logged."""
        if not self.follows:
            return self.label
        from heliostat.tracking import mlflow_client, registry

        try:
            if self.client is None:
                self.client = mlflow_client.connect(self.store)
            with mlflow_client.asking(self.store):
                version = registry.find(self.client, self.model)
            self.known = f"{version.name}-{version.version}"
        except HeliostatError as e:
            if not self.known:
                raise
            log.warning("%s is still served: %s", self.known, brief(e))
        return self.known

    def folder(self, version: str) -> Path:
        """Finds a version's folder; ConfigError if there is none."""
        from heliostat.tracking.models import resolve

        number = version.rpartition("-")[2]
        return resolve(f"models:/{self.name}/{number}" if self.follows else self.model, self.store)
