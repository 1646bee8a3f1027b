"""Finds the origins of a model. Reads only MLflow and the run's folder.

lineage(client, uri, "models:/name@champion")    # or NAME/VERSION, a run id, the folder of a run or of an exported model
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from typing_extensions import TypedDict

from heliostat.cluster.capacity import LivingNode
from heliostat.errors import ConfigError, HeliostatError
from heliostat.recipes import exported
from heliostat.runs import exports, goodput
from heliostat.runs.consumed import Consumed
from heliostat.runs.exports import ExportedFolder
from heliostat.runs.goodput import Outline
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.run_folder import ATTEMPTS
from heliostat.tracking import checkpoint_models, mlflow_client, registry, tags
from heliostat.tracking.card import ParentModel, Parents
from heliostat.tracking.checkpoint_models import CheckpointFacts
from heliostat.tracking.mlflow_client import read_json
from heliostat.tracking.reconcile import settle
from heliostat.tracking.registry import HistoryEntry
from heliostat.tracking.run_facts import RecordedStart
from heliostat.tracking.run_table import About, about

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")
DEPTH = 20  # maximum number of generations of parents in one lineage


class TracedModel(TypedDict):
    """Describes a registered model version. `step`: the step of the version's checkpoint."""

    name: str
    version: str
    uri: str
    aliases: list[str]
    license: str | None
    step: int | None
    scores: dict[str, float]
    history: list[HistoryEntry]


class Ancestor(ParentModel):
    """Describes a parent model, with the lineage of the run that trained this parent. The lineage is None if that run isn't
    known, if another parent in the same tree has the lineage, or below DEPTH generations."""

    run: Traced | None


class Traced(About):
    """Describes a run as a node of the lineage: its job, code, data, and checkpoints, and its parent models."""

    sweep: str | None
    reproduces: str | None
    folder: str
    recipe: str | None
    job: dict[str, str | None]  # the name of the job's artifact, and the job's seeds
    code: list[dict[str, str]]
    environments: list[str]
    clusters: list[str]
    nodes: list[LivingNode]
    attempts: list[Outline]
    changes: list[dict[str, Any]]  # start_step, and [old, new] for each changed key of the job
    data: Consumed
    tokenizers: list[str]
    checkpoints: list[CheckpointFacts]
    exports: list[ExportedFolder]
    models: list[TracedModel]
    parents: list[Ancestor]


class Lineage(TypedDict):
    """Holds the result of `lineage`: the registered model version, if one was requested, and the run with its origins."""

    model: TracedModel | None  # None if the question wasn't about a registered version
    run: Traced


def lineage(client: MlflowClient, uri: str, what: str) -> Lineage:
    """Traces the lineage of a model or a run. `what`: any name of the model or the run. Raises ConfigError if no run belongs to
    `what`."""
    version, run_id = None, what
    if exporting := exported.run_of(Path(what)):
        run_id = exporting
    elif logged := re.fullmatch(r"models:/(m-[0-9a-f]{32})", what):  # an unregistered model belongs to its run
        run_id = str(client.get_logged_model(logged[1]).source_run_id)
    elif not re.fullmatch(r"[0-9a-f]{32}", what) and not _is_folder(what):
        version = registry.find(client, what)
        if not (run_id := version.run_id or ""):
            raise ConfigError(
                f"{what}: the version was registered without a run, so its lineage isn't known. Pass a run id, or another version"
            )
    run = settle(client, mlflow_client.find(client, run_id, uri))
    return {"model": model_node(client, version) if version else None, "run": run_node(client, run)}


def _is_folder(what: str) -> bool:
    if what.startswith("models:/") or re.fullmatch(r"[^/@]+(/\d+|@[^/@]+)", what):
        return False
    return "/" in what and Location(what).join(run_folder.MLFLOW_RUN).exists()


def model_node(client: MlflowClient, version: ModelVersion) -> TracedModel:
    """Describes a registered version with its aliases, scores, and history."""
    aliases = client.get_registered_model(version.name).aliases
    return {
        "name": version.name,
        "version": str(version.version),
        "uri": f"models:/{version.name}/{version.version}",
        "aliases": sorted(a for a, v in aliases.items() if str(v) == str(version.version)),
        "license": version.tags.get(tags.LICENSE),
        "step": int(version.tags[tags.STEP]) if tags.STEP in version.tags else None,
        "scores": registry.scores(client, version)[0],
        "history": registry.history(version),
    }


def run_node(client: MlflowClient, run: Run, depth: int = DEPTH, known_runs: set[str] | None = None) -> Traced:
    """Describes a run with its origins: at most `depth` generations of parents, and each run once.

    `known_runs`: ids of the runs that the tree has already. The function adds the ids of its runs.
    """
    known_runs = set() if known_runs is None else known_runs
    known_runs.add(run.info.run_id)
    run_id, known, params = run.info.run_id, run.data.tags, run.data.params
    starts = read_json(client, run_id, ATTEMPTS, list[RecordedStart]) or []
    data = data_of(client, run)
    return {
        **about(run, client.get_experiment(run.info.experiment_id).name),
        "sweep": known.get(tags.PARENT_RUN),
        "reproduces": known.get(tags.REPRODUCES),
        "folder": known[tags.FOLDER],
        "recipe": known.get(tags.RECIPE),
        "job": {"artifact": "job.json", "seed": params.get("train.seed"), "data_seed": params.get("data.seed")},
        "code": distinct([s["code"] for s in starts]),
        "environments": distinct([s["environment"] for s in starts]),
        "clusters": distinct([s["cluster"] for s in starts if s["cluster"]]),
        "nodes": distinct([n for s in starts for n in s["nodes"]]),
        "attempts": attempts(client, run),
        "changes": [{"start_step": s["start_step"], **s["changes"]} for s in starts if s["changes"]],
        "data": data,
        "tokenizers": distinct([s["tokenizer"] for g in data["segments"] for s in g["sources"] if s["tokenizer"]]),
        "checkpoints": checkpoint_models.history(client, run),
        "exports": exports_of(run),
        "models": [model_node(client, v) for v in versions(client, run_id)],
        "parents": [{**p, "run": _parent_node(client, p, depth, known_runs)} for p in parents_of(client, run_id)],
    }


def parents_of(client: MlflowClient, run_id: str) -> list[ParentModel]:
    """Reads the models from which a run was initialized, or that made its datasets; empty if the run has no such record."""
    return (read_json(client, run_id, "parents.json", Parents) or {"parents": []})["parents"]


def _parent_node(client: MlflowClient, parent: ParentModel, depth: int, known_runs: set[str]) -> Traced | None:
    """Builds the node of a parent's run. Returns None if the parent's run isn't known, if this MLflow store doesn't contain the
    parent's run, or if the tree has it already."""
    from mlflow.exceptions import MlflowException

    if not parent["run_id"] or not depth or parent["run_id"] in known_runs:
        return None
    try:
        run = client.get_run(parent["run_id"])
    except MlflowException:
        return None
    return run_node(client, run, depth - 1, known_runs) if tags.FOLDER in run.data.tags else None


def goodput_of(client: MlflowClient, run: Run) -> goodput.GoodputReport | None:
    """Reads the goodput report: from MLflow if the run has ended, else from the ledger in the run's folder. Returns None if
    neither the report nor the ledger is readable."""
    report = read_json(client, run.info.run_id, "goodput.json", goodput.GoodputReport) if run.info.status != "RUNNING" else None
    try:
        return report or goodput.read_report(Location(run.data.tags[tags.FOLDER]))
    except (HeliostatError, OSError):
        return None


def attempts(client: MlflowClient, run: Run) -> list[Outline]:
    """Lists every start of the run's workers; empty if the record of the starts is missing or unreadable."""
    report = goodput_of(client, run)
    return [cast(Outline, {k: a.get(k) for k in Outline.__annotations__}) for a in report["attempts"]] if report else []


def data_of(client: MlflowClient, run: Run) -> Consumed:
    """Reads the record of the run's training data; an empty record if the run hasn't reached a checkpoint."""
    recorded = read_json(client, run.info.run_id, "data.json", Consumed)
    return recorded or {"steps": 0, "segments": [], "replaced": [], "replaced_count": 0}


def exports_of(run: Run) -> list[ExportedFolder]:
    """Lists the folders to which the run's checkpoints were exported; empty if the run's folder isn't readable."""
    try:
        return exports.read(Location(run.data.tags[tags.FOLDER]))
    except (HeliostatError, OSError):
        return []


def versions(client: MlflowClient, run_id: str) -> list[ModelVersion]:
    """Lists the registered versions of a run, by name and number."""
    return sorted(client.search_model_versions(f"run_id = '{run_id}'"), key=lambda v: (v.name, int(v.version)))


def distinct(values: list[T]) -> list[T]:
    """Removes repeated values, and keeps the order of the values."""
    return [v for i, v in enumerate(values) if v not in values[:i]]
