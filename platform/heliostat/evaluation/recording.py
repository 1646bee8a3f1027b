"""Records a result in MLflow, on the run that trained the model.

Metrics are recorded at the model's step, and the complete result is recorded as an artifact. If the model of that step is
registered in MLflow, its versions get the scores too, for `heliostat model promote --require 'bench/TASK>0.4'`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from heliostat.config.sections import BENCHMARK
from heliostat.evaluation.suite import Result
from heliostat.text import brief
from heliostat.tracking import mlflow_client, tags
from heliostat.tracking.metrics import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient

AVERAGE = f"{BENCHMARK}average_centred"
ARTIFACTS = "benchmarks"


def metrics(result: Result) -> dict[str, float]:
    """Returns a result's metrics by name. These are each task's score, standard error, and edit similarity, and the mean centered
    score."""
    scores = {f"{BENCHMARK}{row['task']}": row["score"] for row in result["tasks"]}
    scores |= {f"{BENCHMARK}{row['task']}_stderr": row["stderr"] for row in result["tasks"] if row["stderr"] is not None}
    similar = {f"{BENCHMARK}{row['task']}_edit_similarity": row.get("edit_similarity") for row in result["tasks"]}
    scores |= {name: value for name, value in similar.items() if value is not None}
    if result["average"]["centred"] is not None:
        scores[AVERAGE] = result["average"]["centred"]
    return {name: float(value) for name, value in scores.items() if math.isfinite(value)}


def record(uri: str, result: Result) -> dict[str, object]:
    """Records a result. Returns the run, the step, and the model versions that got the scores. If the result isn't recorded,
    returns the reason.

    Raises TrackingError if MLflow doesn't answer.
    """
    run_id, step = result["model"]["run_id"], result["model"]["step"]
    if run_id is None or step is None:
        return unrecorded("the model's folder names no run")
    with mlflow_client.asking(uri):
        client = mlflow_client.connect(uri)
        if (fault := _unknown(client, run_id)) is not None:
            return unrecorded(f"run {run_id} isn't in {uri}: {fault}")
        scores, now = metrics(result), time.time()
        mlflow_client.send(client, run_id, [Point(name, value, now, step) for name, value in scores.items()])
        artifact = f"{ARTIFACTS}/{result['suite']['name']}-{step:08d}.json"
        client.log_dict(run_id, result, artifact)
        versions = _versions(client, run_id, {step: scores})[step]
        return {"run_id": run_id, "step": step, "artifact": artifact, "versions": versions, "why_not": ""}


def tag(uri: str, run_id: str, results: Mapping[int, Result]) -> dict[int, list[str]]:
    """Adds a run's recorded scores to the run's registered model versions. Returns the versions' names by step. `results`: the
    recorded results by step.

    Raises TrackingError if MLflow doesn't answer.
    """
    with mlflow_client.asking(uri):
        return _versions(mlflow_client.connect(uri), run_id, {step: metrics(result) for step, result in results.items()})


def unrecorded(why: str) -> dict[str, object]:
    """Returns the record of a result that isn't in MLflow. `why`: the reason."""
    return {"run_id": None, "step": None, "artifact": None, "versions": [], "why_not": why}


def _unknown(client: MlflowClient, run_id: str) -> str | None:
    """Returns MLflow's error message if MLflow doesn't know the run. Returns None if MLflow knows the run."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return brief(e)
    return None


def _versions(client: MlflowClient, run_id: str, scores: Mapping[int, dict[str, float]]) -> dict[int, list[str]]:
    """Adds the scores to the versions that the run registered at these steps. Returns the versions' names by step."""
    names: dict[int, list[str]] = {step: [] for step in scores}
    by_tag = {str(step): step for step in scores}
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if (step := by_tag.get(version.tags.get(tags.STEP, ""))) is None:
            continue
        for name, value in scores[step].items():
            if version.tags.get(tag_ := f"{tags.SCORE}{name}") != repr(value):
                client.set_model_version_tag(version.name, version.version, tag_, repr(value))
        names[step].append(f"models:/{version.name}/{version.version}")
    return names
