"""Scores a model on a suite of tasks: `heliostat model benchmark MODEL SUITE.yaml`."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat import extras
from heliostat.curation.watching import PipelineWatch
from heliostat.evaluation import contamination, measures, paired, sandbox, scoring
from heliostat.evaluation.contamination import Examples
from heliostat.evaluation.suite import Result, Row, Suite
from heliostat.evaluation.tasks import EvalTask, build
from heliostat.inference.batch.run import model_digest
from heliostat.recipes import exported
from heliostat.storage.locations import Location
from heliostat.terminal import console

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

log = logging.getLogger(__name__)

PACKAGES = ("lm_eval", "transformers", "torch")


class Benchmark:
    """Contains a suite's tasks, and the contamination of the tasks' examples by training data. Builds the tasks once, and
    measures the contamination once."""

    def __init__(self, suite: Suite, folder: Location, quiet: bool = False) -> None:
        """Builds the tasks. Raises ConfigError if a task is invalid. `quiet`: shows no progress."""
        extras.require("benchmark", "lm_eval", "numba", what="heliostat model benchmark")  # Numba: for the contamination
        self.suite, self.quiet = suite, quiet
        self._cache = tempfile.TemporaryDirectory(prefix="heliostat-benchmark-")
        self._seen: dict[str, object] = {}
        self._examples: Examples | None = None
        with sandbox.held():
            self.tasks: list[EvalTask] = build(suite, folder, Path(self._cache.name))
            self.digests = {task.name: paired.digest(scoring.texts(task, suite)) for task in self.tasks}

    def close(self) -> None:
        """Removes copies of task files and data sets."""
        self._cache.cleanup()

    def score(self, folder: Path) -> Result:
        """Scores the model in a folder on all tasks. Returns the values for the result file."""
        scoring.require_language_model(folder)
        began, rows = time.time(), list[Row]()
        with PipelineWatch(console, f"scoring {folder.name}", self.quiet) as watch:
            seen = self._contamination(folder, watch)
            watch.show("model", "loading it")
            with sandbox.held():
                model = scoring.load(folder, self.suite)
                for number, task in enumerate(self.tasks, 1):
                    watch.show("tasks", f"{task.name}, {number} of {len(self.tasks)}")
                    rows.append(self._row(model, task))
        facts = {"folder": str(folder), "digest": model_digest(folder), **_origin(folder)}
        return {
            "suite": self.suite.model_dump(), "model": facts, "tasks": rows, "average": _average(rows), "contamination": seen,
            "versions": {name: version(name) for name in PACKAGES}, "seconds": round(time.time() - began, 1),
        }  # fmt: skip

    def _row(self, model: HFLM, task: EvalTask) -> Row:
        row, values = scoring.score(model, task, self.suite)
        row["examples_digest"] = self.digests[task.name]
        if self._examples is None or self._seen.get("unknown"):
            return row | {"contamination": None}
        return row | {"contamination": contamination.summary(self._examples.shares(task.name), values, row["score"])}

    def _contamination(self, folder: Path, watch: PipelineWatch) -> dict[str, object] | None:
        """Searches the training data of the first scored model for the examples. Returns None if the suite turns this search
        off."""
        settings = self.suite.contamination
        if not settings.measure or self._seen:
            return self._seen or None
        self._examples = Examples(settings.n)
        with sandbox.held():
            for task in self.tasks:
                self._examples.add(task.name, scoring.texts(task, self.suite))
        self._seen = contamination.measured(
            self._examples,
            folder,
            settings.data,
            lambda done, all_: watch.show("data", f"reading the training data, {done:,} of {all_:,}"),
        )
        return self._seen


def _origin(folder: Path) -> dict[str, object]:
    """Returns the MLflow run and the step of the model. Both are None if the model's folder doesn't record them."""
    if not (folder / exported.RECORD).is_file():
        return {"run_id": None, "step": None}
    origin = dict(exported.record(folder).get("origin", {}))
    return {"run_id": origin.get("run_id"), "step": origin.get("step")}


def _average(rows: list[Row]) -> dict[str, object]:
    """Averages the centered scores. Leaves out tasks without a centered score."""
    known = [row for row in rows if row["centred"] is not None]
    average = measures.average([(row["centred"], row["stderr"], row["chance"]) for row in known])
    return {"centred": average and average[0], "stderr": average and average[1], "tasks": len(known), "of": len(rows)}


def write(result: Result, place: Location) -> None:
    """Writes a result as JSON to the file `place`."""
    place.write((json.dumps(result, indent=1) + "\n").encode())
