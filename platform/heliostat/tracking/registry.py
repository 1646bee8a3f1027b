"""Manages the model registry: finds versions, and moves aliases. A gate rejects a model that is worse than the current model.

    promote(client, "name@candidate", "champion", ["eval/loss<2.1"])

Every move is recorded. Each version that got or lost an alias has a tag with the time, the user, the requirements, and the
replaced version.
"""

from __future__ import annotations

import json
import math
import operator
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict

from heliostat.cluster.source_code import user
from heliostat.errors import ConfigError, HeliostatError, TrackingError
from heliostat.storage.records import Format, open_
from heliostat.text import brief
from heliostat.tracking.tags import HISTORY, SCORE

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
KEPT = 20  # maximum number of entries in a history (the newest)


@open_
class HistoryEntry(TypedDict):
    """Describes an event in a version's history: a registration, a promotion, or a replacement. `at`: seconds since the epoch."""

    event: str
    alias: str
    at: float
    by: NotRequired[str]
    require: NotRequired[list[str]]
    overruled: NotRequired[list[str]]
    replaced: NotRequired[str | None]
    replaced_by: NotRequired[str]


class Promotion(HistoryEntry):
    """Describes the result of a promotion: the moved alias, and the scores of the new version and of the replaced version."""

    name: str
    version: str
    scores: dict[str, float]
    replaced_scores: dict[str, float]


EVENTS = Format(list[HistoryEntry], "history of a model", TrackingError, fix="Delete the tag to start a new history")


class GateError(HeliostatError):
    """Reports that a model doesn't meet the requirements of its promotion."""


@dataclass(frozen=True)
class Term:
    """Holds a requirement of a promotion: `metric OPERATOR value`."""

    metric: str
    sign: str
    value: float

    @staticmethod
    def parse(text: str) -> Term:
        """Parses `METRIC OPERATOR VALUE`, for example `eval/loss<2.1`; raises ConfigError if the text has another form."""
        match = re.fullmatch(r"\s*([^<>=\s]+)\s*(<=|>=|<|>)\s*(\S+)\s*", text)
        try:
            if match:
                return Term(match[1], match[2], float(match[3]))
        except ValueError:
            pass
        raise ConfigError(f"--require: expected for example eval/loss<2.1, with one of {', '.join(OPERATORS)}, got {text!r}")

    def check(self, metrics: dict[str, float]) -> str:
        """Checks whether a model's scores meet the requirement. Returns the problem; empty if there is no problem."""
        if self.metric not in metrics:
            return f"{self.metric} isn't known. Scores: {', '.join(sorted(metrics)) or 'no scores'}"
        holds = OPERATORS[self.sign](metrics[self.metric], self.value)
        return "" if holds else f"{self.metric} is {metrics[self.metric]:.6g}, expected {self.sign} {self.value:g}"


def compare(metric: str, mode: str, new: dict[str, float], present: dict[str, float]) -> str:
    """Compares the new model with the current model by a metric. The new model may replace the current model if its score is
    better or equal.

    `mode`: `min` if lower scores are better. Returns the reason why the new model must not replace the current model; empty if
    the new model may replace it.
    """
    for model_name, scores in (("the new model", new), ("the current model", present)):
        if not math.isfinite(scores.get(metric, math.nan)):
            return f"{model_name} has no {metric}, so the models can't be compared"
    worse = new[metric] > present[metric] if mode == "min" else new[metric] < present[metric]
    return f"its {metric} {new[metric]:.6g} is worse than the current model's {present[metric]:.6g}" if worse else ""


def parse(model: str) -> tuple[str, str, str]:
    """Parses NAME@ALIAS or NAME/VERSION into (name, version, alias). The text may begin with `models:/`."""
    match = re.fullmatch(r"(?:models:/)?([^/@]+)(?:/(\d+)|@([^/@]+))", model)
    if not match:
        raise ConfigError(f"{model}: isn't a registered model's version. Write NAME@ALIAS or NAME/VERSION")
    return match[1], match[2] or "", match[3] or ""


def find(client: MlflowClient, model: str) -> ModelVersion:
    """Finds the model version of NAME@ALIAS or NAME/VERSION; raises ConfigError if there is no such version."""
    from mlflow.exceptions import MlflowException

    name, version, alias = parse(model)
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as e:
        raise ConfigError(f"{model}: no such version ({brief(e)}). See the registered models: heliostat run ui") from e


def scores(client: MlflowClient, version: ModelVersion) -> tuple[dict[str, float], dict[str, str]]:
    """Returns a version's scores by name, for example `eval/loss`, and the held-out split (fraction and version) of each
    dataset by its digest."""
    tags = version.tags
    measured = {k.removeprefix(SCORE): float(v) for k, v in tags.items() if k.startswith(SCORE)}
    data = {}
    if version.run_id:
        inputs = client.get_run(version.run_id).inputs
        for dataset_input in inputs.dataset_inputs if inputs else ():
            noted = {t.key: t.value for t in dataset_input.tags}
            how = f"{noted.get('held_out_fraction', '')}, version {noted.get('data_version', 1)}"
            data[noted.get("digest", dataset_input.dataset.digest)] = how
    return measured, data


def history(version: ModelVersion) -> list[HistoryEntry]:
    """Reads a version's history, oldest event first; raises TrackingError if the tag is damaged."""
    where = f"models:/{version.name}/{version.version}: tag {HISTORY}"
    return EVENTS.parse(version.tags.get(HISTORY, "[]").encode(), where)


def record(client: MlflowClient, name: str, version: str, entry: HistoryEntry) -> None:
    """Appends an event to a version's history. The history keeps the newest KEPT events."""
    known = history(client.get_model_version(name, version))
    client.set_model_version_tag(name, version, HISTORY, json.dumps([*known, entry][-KEPT:]))


def promote(client: MlflowClient, model: str, alias: str, require: list[str], metric: str, mode: str, force: bool) -> Promotion:
    """Moves the alias to the model. Raises GateError if the model fails a requirement, or is worse than the model that has the
    alias now.

    The two models are compared by `metric`; `mode` is `min` if lower scores are better. Raises GateError, too, if the models were
    scored on different held-out samples. With `force`, moves the alias in spite of all these problems, and records the problems
    in the history.
    """
    terms = [Term.parse(text) for text in require]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,99}", alias) or re.fullmatch(r"v\d+", alias) or alias == "latest":
        raise ConfigError(
            f"{alias!r} isn't a valid alias. Use letters, digits, and . _ -, but not `latest` or a version such as v1"
        )
    new = find(client, model)
    measured, data = scores(client, new)
    holder = client.get_registered_model(new.name).aliases.get(alias)
    present = client.get_model_version(new.name, holder) if holder else None
    faults = [fault for term in terms if (fault := term.check(measured))]
    before: dict[str, float] = {}
    if present is not None and present.version != new.version:
        before, its_data = scores(client, present)
        if data != its_data:
            faults.append(f"it was scored on other held-out samples than version {present.version}. Score both versions on one "
                "dataset with `heliostat model evaluate`, and use --force")  # fmt: skip
        elif fault := compare(metric, mode, measured, before):
            faults.append(fault)
    if faults and not force:
        raise GateError(f"{new.name} version {new.version} can't become {alias}: {'; '.join(faults)}")
    replaced = str(present.version) if present is not None and present.version != new.version else None
    entry: HistoryEntry = {
        "alias": alias,
        "at": round(time.time(), 3),
        "by": user(),
        "event": "promoted",
        "require": require,
        "overruled": faults,
        "replaced": replaced,
    }
    client.set_registered_model_alias(new.name, alias, new.version)
    record(client, new.name, new.version, entry)
    if replaced:
        before_it: HistoryEntry = {**entry, "event": "replaced", "replaced": None, "replaced_by": str(new.version)}
        record(client, new.name, replaced, before_it)
    return {"name": new.name, "version": str(new.version), **entry, "scores": measured, "replaced_scores": before}
