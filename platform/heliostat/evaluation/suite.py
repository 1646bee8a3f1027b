"""Defines the suite file of `heliostat model benchmark`: its tasks, the number of examples, and the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from heliostat.config import file_kinds
from heliostat.config.fields import Name, Positive, Seed
from heliostat.schema import Float, Strict
from heliostat.storage.locations import Location

Result = dict[str, Any]  # scores of a model on a suite, as in the result file
Row = dict[str, Any]  # scores of one task in a result


class SuiteEntry(Strict):
    """Describes a task of the suite, and the settings that override the task's own settings. An entry that is only a name
    overrides nothing."""

    task: Name
    """Name of the task: in a task file below `folder` (its line `task: NAME`), or in lm-eval."""
    fewshot: int | None = Field(None, ge=0, le=1000)
    """Number of few-shot examples before each question. Unset: the value in the task file."""
    metric: str | None = Field(None, min_length=1)
    """Metric that is the task's score, for example `acc_norm`. You can add a filter: `exact_match,strict-match`. Unset: the first
    metric in the task's `metric_list`."""
    chance: Float | None = Field(None, ge=0, lt=1)
    """Score of random guessing. Unset: one divided by the number of choices for accuracies of multiple choice, and 0 for exact
    match and cloze."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"task": value} if isinstance(value, str) else value


class Contamination(Strict):
    """Describes how heliostat searches the training data for the examples."""

    measure: bool = True
    """Checks which examples share text with the training data. Each run reads the training data once for this check."""
    data: list[str] = []
    """Prepared datasets to check, as folders or `s3://` URIs. Unset: the datasets that the model was trained on, without their
    held-out samples."""
    n: int = Field(default=13, ge=2, le=100)
    """Words per n-gram."""


class Suite(Strict):
    """Describes a suite file: the benchmark tasks, and the settings of all tasks."""

    name: Name
    """Name of the suite. Its results are stored under this name."""
    folder: str = Field(".", min_length=1)
    """Folder or `s3://` prefix of the task files and their data sets, relative to the suite's file."""
    tasks: list[SuiteEntry] = Field(min_length=1)
    """Tasks of the suite: names, or mappings with the keys below."""
    examples: Positive | None = None
    """Maximum number of examples per task, from the start of the task. Unset: all examples."""
    fewshot: int | None = Field(None, ge=0, le=1000)
    """Number of few-shot examples before each question. A task that sets 0 itself keeps 0. Unset: the task's value, or 0."""
    seed: Seed = 1234
    """Random seed for the choice of few-shot examples. Unset: lm-eval's seed."""
    batch: int = Field(16, ge=1, le=4096)
    """Number of questions that the model answers in one batch."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation. `auto`: fp32 for a model that heliostat exported, otherwise the precision in the model's
    config.json."""
    chat: bool = False
    """Asks each question as the message of a user, rendered by the model's chat template. Set it for models that were fine-tuned
    on conversations."""
    contamination: Contamination = Contamination()
    """Reports which examples share text with the training data (docs/benchmark.md#contamination)."""
    run_code: bool = False
    """Allows tasks with `unit_tests` to run the model's code, in a sandbox (docs/benchmark.md#unit-tests)."""

    @model_validator(mode="after")
    def _once(self) -> Suite:
        names = [entry.task for entry in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tasks: {twice!r} is listed twice. Remove one of the two")
        return self


def same(kept: object, suite: Suite) -> bool:
    """Returns whether a stored suite equals this suite. A suite from an earlier version of heliostat may lack keys. Missing keys
    have their default values."""
    try:
        return Suite.model_validate(kept) == suite
    except ValidationError:
        return False


def load(path: Path) -> tuple[Suite, Location]:
    """Loads a suite from its file. Returns the suite, and the location of its task files. Raises ConfigError, which names the
    problem, if the file isn't valid."""
    suite = file_kinds.load(Suite, "suite", path)
    return suite, Location(suite.folder).absolute(path.absolute().parent)
