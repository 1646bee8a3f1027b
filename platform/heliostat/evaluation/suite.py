"""Defines the suite file of `heliostat model benchmark`: which tasks, on how many examples, how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from heliostat import schema
from heliostat.config.fields import Name, Positive, Seed
from heliostat.schema import Float, Strict
from heliostat.storage.locations import Location

Result = dict[str, Any]  # of a model on a suite, as its file holds it
Row = dict[str, Any]  # of a result: a task


class SuiteEntry(Strict):
    """Describes a task of the suite, and what of it the suite sets; its name alone leaves everything to the task."""

    task: Name
    """The task's name: of a task file below `folder` (`task: NAME` in it), else one of lm-eval's own."""
    fewshot: int | None = Field(None, ge=0, le=1000)
    """Solved examples before each question, in place of what the task file says."""
    metric: str | None = Field(None, min_length=1)
    """The metric that is the task's score, as `acc_norm`, or with its filter `exact_match,strict-match`; the default is the first
    of the task's `metric_list`."""
    chance: Float | None = Field(None, ge=0, lt=1)
    """The score of guessing; the default is one of the number of choices for accuracies of multiple choice, and 0 for exact match
    and cloze."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"task": value} if isinstance(value, str) else value


class Contamination(Strict):
    """Describes how the examples are looked for in the training data."""

    measure: bool = True
    """Whether they are; each run reads the training data once."""
    data: list[str] = []
    """Prepared datasets that are looked through, folders or `s3://` URIs; the default are those that the model was trained on,
    without what was held out of them."""
    n: int = Field(default=13, ge=2, le=100)
    """The words of an n-gram."""


class Suite(Strict):
    """Describes a suite of benchmarks."""

    name: Name
    """The suite's name, under which its results are kept."""
    folder: str = Field(".", min_length=1)
    """Where the task files are, and their data sets: a folder, from the suite's file on, or an `s3://` prefix."""
    tasks: list[SuiteEntry] = Field(min_length=1)
    """The tasks: names, or mappings with the keys below."""
    examples: Positive | None = None
    """At most so many examples of each task, its first; the default is all."""
    fewshot: int | None = Field(None, ge=0, le=1000)
    """Solved examples before each question, of tasks that do not say 0 themselves; the default is what each task says, or 0."""
    seed: Seed = 1234
    """Of the choice of solved examples. The default is lm-eval's own."""
    batch: int = Field(16, ge=1, le=4096)
    """Questions that the model takes together."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The precision of the weights; `auto` is that of the model's files."""
    contamination: Contamination = Contamination()
    """Which examples share text with the training data (docs/benchmark.md#contamination)."""
    run_code: bool = False
    """Whether tasks may run what the model writes, in a sandbox: those with `unit_tests` (docs/benchmark.md#unit-tests)."""

    @model_validator(mode="after")
    def _once(self) -> Suite:
        names = [entry.task for entry in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tasks: {twice!r} is there twice; name it once")
        return self


def same(kept: object, suite: Suite) -> bool:
    """Tells whether a suite that was written down is this one; keys that were not there yet have their defaults."""
    try:
        return Suite.model_validate(kept) == suite
    except ValidationError:
        return False


def load(path: Path) -> tuple[Suite, Location]:
    """Loads a suite from its file, and locates its folder of task files; ConfigError names what is wrong."""
    suite = schema.load(Suite, "suite", path)
    return suite, Location(suite.folder).absolute(path.absolute().parent)
