"""Finds the origins of a model, and the models that have trained on a shard. Reads only MLflow and the run's folder.

lineage(client, uri, "models:/name@champion")    # or NAME/VERSION, a run id, the folder of a run or of an exported model
Seen(client).answer(shard="part-00017.parquet")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from typing_extensions import TypedDict

from heliostat.cluster.capacity import LivingNode
from heliostat.data.ancestry import REFERENCE, WRITER
from heliostat.errors import ConfigError, DataError, HeliostatError
from heliostat.recipes import exported
from heliostat.runs import consumed, exports, goodput
from heliostat.runs.consumed import Consumed
from heliostat.runs.exports import ExportedFolder
from heliostat.runs.goodput import Outline
from heliostat.storage import run_folder
from heliostat.storage.hub import names
from heliostat.storage.locations import Location
from heliostat.storage.run_folder import ATTEMPTS
from heliostat.text import plural
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
Taken = Callable[["Run", int | None], int]  # counts the requested samples that a run took, up to a step if it isn't None

ROLES = {REFERENCE: "log-probabilities by", WRITER: "answers by"}  # of a parent, by the end of its key
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
        "parents": [{**p, "run": _parent_node(client, p, depth, known_runs)} for p in _parents(client, run_id)],
    }


def _parents(client: MlflowClient, run_id: str) -> list[ParentModel]:
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


class Descendant(TypedDict):
    """Describes a run that has trained on the requested samples. `inherited`: run ids of the run's ancestors that have trained
    on these samples. `outdated`: the run's datasets whose log-probabilities or answers come from a model of such an ancestor.
    `status`: of the run in MLflow, or DELETED."""

    run_id: str
    name: str
    status: str
    inherited: list[str]
    outdated: list[str]
    models: list[str]
    exports: list[ExportedFolder]


class LineageRow(Descendant):
    """Describes a run that has trained on samples. `samples`: number of samples that the run itself has taken. `fault`: why this
    number, or the number of an ancestor, is unknown; None if it is known."""

    samples: int
    fault: str | None


class Seen:
    """Finds the runs that have trained on a shard or a dataset, directly or through a model from which they were initialized.

    The counts of samples are exact. This class computes the counts from the data plans that runs recorded in MLflow, and from
    the manifests.
    """

    def __init__(self, client: MlflowClient) -> None:
        self.client, self.known_parents = client, dict[str, list[ParentModel]]()
        ids = list(mlflow_client.experiments(client, deleted=True))  # a deleted run still has models and descendants
        self.runs = {r.info.run_id: r for r in mlflow_client.runs(client, ids, deleted=True)}

    def answer(self, shard: str | None = None, digest: str | None = None) -> list[LineageRow]:
        """Lists the runs that have trained on the shard, or on datasets whose digest begins with `digest`, newest first. Also
        lists the runs that may have, because their dataset, or an ancestor's, can't be read."""
        faults = dict[str, str]()

        def taken(run: Run, before: int | None) -> int:
            data = data_of(self.client, run)
            try:
                return consumed.of_digest(data, digest, before) if digest else consumed.of_shard(data, str(shard), before)
            except DataError as e:
                faults[run.info.run_id] = str(e)
                return 0

        rows = {row["run_id"]: row for row in self.rows(taken)}
        unsure = self.unsure(faults, self.runs)
        unknown: list[LineageRow] = [{**self.row(run, [], 0), "fault": unsure[run_id]} for run_id, run in self.runs.items()
                                     if run_id in unsure and run_id not in rows]  # fmt: skip
        known: list[LineageRow] = [{**row, "fault": faults.get(run_id)} for run_id, row in rows.items()]
        return known + unknown

    def rows(self, taken: Taken, only: str | None = None) -> list[LineageRow]:
        """Lists the runs that have trained on the samples that `taken` counts, directly or through ancestors. `only`: id of the
        only run to check."""
        rows, inherited = list[LineageRow](), dict[str, list[str]]()
        for run_id, run in self.runs.items():
            if only not in (None, run_id):
                continue
            samples, ancestors = taken(run, None), self._inherited(run_id, taken, inherited)
            if samples or ancestors:
                rows.append(self.row(run, ancestors, samples))
        return rows

    def unsure(self, faults: Mapping[str, str], run_ids: Iterable[str]) -> dict[str, str]:
        """Explains which of these runs may have trained on some samples, by id: runs in `faults`, and their descendants."""
        reasons, known = dict[str, str](), dict[str, list[str]]()
        for run_id in run_ids if faults else ():
            if run_id in faults:
                reasons[run_id] = faults[run_id]
            elif above := self._inherited(run_id, lambda run, before: run.info.run_id in faults, known):
                reasons[run_id] = f"the samples that it inherits from {above[0]} are unknown ({faults[above[0]]})"
        return reasons

    def row(self, run: Run, inherited: list[str], samples: int) -> LineageRow:
        """Describes a run in the list of the runs that have trained on some samples."""
        run_id, deleted = run.info.run_id, run.info.lifecycle_stage == "deleted"
        return {
            "run_id": run_id,
            "name": run.data.tags[tags.NAME],
            "status": "DELETED" if deleted else run.info.status,
            "samples": samples,
            "inherited": inherited,
            "outdated": self._outdated(run, inherited),
            "models": [f"models:/{v.name}/{v.version}" for v in versions(self.client, run_id)],
            "exports": exports_of(run),
            "fault": None,
        }

    def _outdated(self, run: Run, inherited: list[str]) -> list[str]:
        """Lists the run's datasets whose reference model, or the model that wrote their texts, comes from one of the runs in
        `inherited`."""
        sources = [f"data.sources.{n}.path" for p in self._parents(run.info.run_id) if p["run_id"] in inherited
                   for n in re.findall(rf"^data\.sources\.(\d+)\.(?:{REFERENCE}|{WRITER})$", p["key"])]  # fmt: skip
        return distinct([run.data.params[key] for key in sources])

    def _inherited(self, run_id: str, taken: Taken, known: dict[str, list[str]]) -> list[str]:
        """Lists the run ids of ancestors that have trained on the samples that `taken` counts. For each ancestor, counts only
        the samples up to the step whose checkpoint initialized the run. `known`: the lists of other runs, by id."""
        if run_id not in known:
            known[run_id], ancestors = [], list[str]()
            for parent in self._parents(run_id):
                above = self.runs.get(parent_id := parent["run_id"] or "")
                if above is not None:
                    ancestors += [parent_id] if taken(above, parent["step"]) else []
                    ancestors += self._inherited(parent_id, taken, known)
            known[run_id] = distinct(ancestors)
        return known[run_id]

    def _parents(self, run_id: str) -> list[ParentModel]:
        if run_id not in self.known_parents:
            self.known_parents[run_id] = _parents(self.client, run_id)
        return self.known_parents[run_id]


# text for people ------------------------------------------------------------------------------------------------------


def lines(traced: Lineage) -> list[tuple[int, str]]:
    """Formats a lineage as lines of (depth, text)."""
    out: list[tuple[int, str]] = []
    if model := traced["model"]:
        out += _model_lines(model, 0)
    return out + _run_lines(traced["run"], 1 if traced["model"] else 0, set())


def _model_lines(model: TracedModel, depth: int) -> list[tuple[int, str]]:
    aliases = f" ({', '.join('@' + a for a in model['aliases'])})" if model["aliases"] else ""
    scores = "  ".join(f"{k} {v:.5g}" for k, v in model["scores"].items())
    out = [
        (depth, f"model {model['name']} version {model['version']}{aliases}, license {model['license'] or 'unknown'}  {scores}")
    ]
    for entry in model["history"]:
        more = f", in place of version {entry['replaced']}" if entry.get("replaced") else ""
        more += f", version {entry['replaced_by']} took its place" if entry.get("replaced_by") else ""
        more += f", forced in spite of: {'; '.join(entry['overruled'])}" if entry.get("overruled") else ""
        out.append((depth + 1, f"{entry['event']} @{entry['alias']}{more}"))
    return out


def _run_lines(run: Traced, depth: int, shown: set[str]) -> list[tuple[int, str]]:
    """Formats a run. `shown`: the ids of runs that an earlier line describes. The function adds this run's id."""
    shown.add(run["run_id"])
    reason = f": {run['reason']}" if run["reason"] else ""
    out = [(depth, f"run {run['name']} ({run['run_id']}), {run['status']}{reason}")]
    below = depth + 1
    for key, other in (("sweep", run["sweep"]), ("reproduces", run["reproduces"])):
        out += [(below, f"{key}: {other}")] if other else []
    for code in run["code"]:
        dirty = f", with uncommitted changes (code/{code['diff']}.diff)" if code["diff"] else ""
        out.append((below, f"code: {code['commit'] or 'no git commit'}{dirty}"))
    out.append((below, f"job: {run['recipe']}, seed {run['job']['seed']}, data seed {run['job']['data_seed']} (job.json)"))
    for change in run["changes"]:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in ((k, v) for k, v in change.items() if k != "start_step"))
        out.append((below + 1, f"from step {change['start_step'] + 1:,}: {what}"))
    out += [(below, node_line(node)) for node in run["nodes"]]
    for number, a in enumerate(run["attempts"], 1):
        how = "restart" if a["restart"] else "command"
        why = f": {a['reason']}" if a["reason"] else ""
        span = f"steps {a['start_step'] + 1:,} to {a['reached']:,}" if a["reached"] > a["start_step"] else "no step"
        span += f" on {plural(a['workers'], 'worker')}"
        out.append((below, f"attempt {number} ({how}): {span}, {a['outcome'] or 'no recorded end'}{why}"))
    for segment in run["data"]["segments"]:
        out.append((below, f"data of steps {segment['first'] + 1:,} to {segment['end']:,} (plan {segment['digest'][:12]})"))
        out += [(below + 1, _source_line(s)) for s in segment["sources"]]
    if count := run["data"]["replaced_count"]:
        out.append((below, f"{count:,} bad samples were replaced"))
    out += [(below, f"tokenizer {t[:12]}") for t in run["tokenizers"]]
    for c in run["checkpoints"]:
        scores = "  ".join(f"{k} {v:.5g}" for k, v in c["scores"].items())
        out.append((below, f"checkpoint of step {c['step']:,}{' (deleted)' if c['deleted'] else ''}: {c['uri']}  {scores}"))
    for export in run["exports"]:
        what = "adapter" if export["adapter"] else "model"
        out.append((below, f"{what} of step {export['step']:,} exported to {export['folder']}"))
    for parent in run["parents"]:
        at = f", step {parent['step']:,}" if parent["step"] is not None else ""
        changed = f", with {', '.join(keys)} changed" if (keys := parent.get("changed")) else ""
        kind = "a model of the Hugging Face Hub" if names.model(parent["folder"]) else "a folder"
        role = ROLES.get(parent["key"].rpartition(".")[2], "initialized from")
        digest = f", digest {digest}" if (digest := parent.get("digest")) else ""
        if source := parent.get("converted_from"):
            digest += f", converted from {source['file']} {source['digest'][:12]}"
        out.append((below, f"{role} {parent['key']}: {parent['name'] or kind}{at} ({parent['folder']}){digest}{changed}"))
        if parent["run"]:
            out += _run_lines(parent["run"], below + 1, shown)
        elif run_id := parent["run_id"]:
            fix = "see above" if run_id in shown else f"not in this tree; run: heliostat run lineage {run_id}"
            out.append((below + 1, f"run {parent['name']} ({run_id}), {fix}"))
    return out


def node_line(node: LivingNode) -> str:
    """Formats a cluster node with its resources in Ray. A private Ray has more CPUs than its machine has cores, because data
    tasks mostly wait for I/O."""
    gpus = f", {node['gpus']:g} GPUs {', '.join(node['accelerators'])}" if node["gpus"] else ""
    return f"node {node['host']} ({node['address']}), {node['cpus']:g} logical CPUs in Ray{gpus}"


def _source_line(s: consumed.ConsumedSource) -> str:
    shown = ", ".join(a if a == b else f"{a} to {b}" for a, b in s["ranges"][:3]) + (" ..." if len(s["ranges"]) > 3 else "")
    forgotten = "".join(
        f", made from version {old['digest'][:12]} without the documents {', '.join(old['ids'])}"
        for old in s.get("forgotten", [])
    )
    names_of = [f"{one['name']} {one['digest'][:12]} of " for one in s.get("made_from", [])]
    origin = "".join(f", made from {name}{place}" for name, place in zip_longest(names_of, s.get("inputs", []), fillvalue=""))
    origin += "".join(f", from {name}" for name in s.get("hub", {}).values())
    weights = ", ".join(f"{w:g}" + (f" from step {step + 1:,}" if step else "") for step, w in s["weights"])
    return (f"{s['name']} {s['digest'][:12]}, weight {weights}: {s['samples']:,} samples, {s['epochs']:.2f} epochs, "
            f"{s['shards']['seen']} of {s['shards']['total']} shards ({shown}) of {s['uri']}{origin}{forgotten}")  # fmt: skip
