"""Traces where a model comes from, as one tree of plain data, from MLflow and the run's folder alone.

    lineage(client, uri, "models:/name@champion")    # or NAME/VERSION, a run id, a run's folder

A run's node holds: code, job, machines, attempts (restarts, worker counts), data (segments, sources, ranges of shards, what was
replaced), tokenizers, checkpoints, registered versions, its sweep, and its parents, each with a node of its own.
"""

from __future__ import annotations

import re
from typing import Any

from heliostat.errors import ConfigError, HeliostatError
from heliostat.runs import goodput
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.run_folder import ATTEMPTS
from heliostat.tracking import checkpoint_models, mlflow_client, registry, tags
from heliostat.tracking.reconcile import settle
from heliostat.tracking.run_facts import read_json

DEPTH = 20  # generations of parents


def lineage(client: Any, uri: str, what: str) -> dict[str, Any]:
    """Traces the lineage of a model or a run; ConfigError for a name that leads to no run.

    Returns {model: the registered version or None, run: the run's node}.
    """
    if re.fullmatch(r"[0-9a-f]{32}", what) or _is_folder(what):
        return {"model": None, "run": run_node(client, settle(client, mlflow_client.find(client, what, uri)))}
    if logged := re.fullmatch(r"models:/(m-[0-9a-f]{32})", what):  # a model that was not registered is its run's
        made_by = client.get_logged_model(logged[1]).source_run_id
        return {"model": None, "run": run_node(client, settle(client, mlflow_client.find(client, made_by, uri)))}
    version = registry.find(client, what)
    if not version.run_id:
        raise ConfigError(f"{what}: was registered without a run, so nothing is known of where it comes from")
    run = settle(client, mlflow_client.find(client, version.run_id, uri))
    return {"model": model_node(client, version), "run": run_node(client, run)}


def _is_folder(what: str) -> bool:
    if what.startswith("models:/") or re.fullmatch(r"[^/@]+(/\d+|@[^/@]+)", what):
        return False
    return "/" in what and Location(what).join(run_folder.MLFLOW_RUN).exists()


def model_node(client: Any, version: Any) -> dict[str, Any]:
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


def run_node(client: Any, run: Any, depth: int = DEPTH) -> dict[str, Any]:
    run_id, told = run.info.run_id, run.data.tags
    origins = (read_json(client, run_id, "parents.json") or {}).get("parents", [])
    starts = read_json(client, run_id, ATTEMPTS) or []
    data = data_of(client, run)
    return {
        "run_id": run_id,
        "name": told[tags.NAME],
        "experiment": client.get_experiment(run.info.experiment_id).name,
        "status": run.info.status,
        "reason": told.get(tags.REASON),
        "started": run.info.start_time / 1000,
        "ended": run.info.end_time / 1000 if run.info.end_time else None,
        "sweep": told.get(tags.PARENT_RUN),
        "reproduces": told.get(tags.REPRODUCES),
        "folder": told[tags.FOLDER],
        "recipe": told.get(tags.RECIPE),
        "job": {"artifact": "job.json", "seed": run.data.params.get("train.seed"), "data_seed": run.data.params.get("data.seed")},
        "code": distinct([s["code"] for s in starts]),
        "environments": distinct([s["environment"] for s in starts]),
        "clusters": distinct([s["cluster"] for s in starts if s["cluster"]]),
        "nodes": distinct([n for s in starts for n in s["nodes"]]),
        "attempts": attempts(client, run),
        "changes": [{"start_step": s["start_step"], **s["changes"]} for s in starts if s["changes"]],
        "data": data,
        "tokenizers": distinct([s["tokenizer"] for g in data["segments"] for s in g["sources"] if s["tokenizer"]]),
        "checkpoints": checkpoint_models.history(client, run),
        "models": [model_node(client, v) for v in versions(client, run_id)],
        "parents": [{**p, "run": _parent_node(client, p, depth)} for p in origins],
    }


def _parent_node(client: Any, parent: dict[str, Any], depth: int) -> dict[str, Any] | None:
    """Builds the node of a parent's run; None if no run is known for the parent, or this store does not have it."""
    from mlflow.exceptions import MlflowException

    if not parent["run_id"] or not depth:
        return None
    try:
        run = client.get_run(parent["run_id"])
    except MlflowException:
        return None
    return run_node(client, run, depth - 1) if tags.FOLDER in run.data.tags else None


def attempts(client: Any, run: Any) -> list[dict[str, Any]]:
    """Lists every start of the workers.

    Reads the goodput report in MLflow if the run has ended, else the ledger in the run's folder; empty if neither can be read.
    """
    report = read_json(client, run.info.run_id, "goodput.json") if run.info.status != "RUNNING" else None
    if report is None:
        try:
            report = goodput.read_report(Location(run.data.tags[tags.FOLDER]))
        except (HeliostatError, OSError):
            return []
    keys = ("started", "seconds", "workers", "start_step", "reached", "outcome", "reason", "restart")
    return [{k: a.get(k) for k in keys} for a in report["attempts"]]


def data_of(client: Any, run: Any) -> dict[str, Any]:
    """Reads what the run has trained on; empty if it has not reached a checkpoint."""
    return read_json(client, run.info.run_id, "data.json") or {"steps": 0, "segments": [], "replaced": [], "replaced_count": 0}


def versions(client: Any, run_id: str) -> list[Any]:
    return sorted(client.search_model_versions(f"run_id = '{run_id}'"), key=lambda v: (v.name, int(v.version)))


def distinct(values: list[Any]) -> list[Any]:
    return [v for i, v in enumerate(values) if v not in values[:i]]


# as a person reads it ------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[tuple[int, str]]:
    """Lays the lineage tree out as lines of text: (depth, text)."""
    out: list[tuple[int, str]] = []
    if model := found["model"]:
        out += _model_lines(model, 0)
    return out + _run_lines(found["run"], 1 if found["model"] else 0)


def _model_lines(model: dict[str, Any], depth: int) -> list[tuple[int, str]]:
    aliases = f" ({', '.join('@' + a for a in model['aliases'])})" if model["aliases"] else ""
    told = "  ".join(f"{k} {v:.5g}" for k, v in model["scores"].items())
    out = [(depth, f"model {model['name']} version {model['version']}{aliases}, license {model['license'] or 'unknown'}  {told}")]
    for entry in model["history"]:
        more = f", in place of version {entry['replaced']}" if entry.get("replaced") else ""
        more += f", version {entry['replaced_by']} took its place" if entry.get("replaced_by") else ""
        more += f", overruled: {'; '.join(entry['overruled'])}" if entry.get("overruled") else ""
        out.append((depth + 1, f"{entry['event']} @{entry['alias']}{more}"))
    return out


def _run_lines(run: dict[str, Any], depth: int) -> list[tuple[int, str]]:
    reason = f": {run['reason']}" if run["reason"] else ""
    out = [(depth, f"run {run['name']} ({run['run_id']}), {run['status']}{reason}")]
    below = depth + 1
    for key in ("sweep", "reproduces"):
        out += [(below, f"{key}: {run[key]}")] if run[key] else []
    for code in run["code"]:
        dirty = f", changed (code/{code['diff']}.diff)" if code["diff"] else ""
        out.append((below, f"code: {code['commit'] or 'no git commit'}{dirty}"))
    out.append((below, f"job: {run['recipe']}, seed {run['job']['seed']}, data seed {run['job']['data_seed']} (job.json)"))
    for change in run["changes"]:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in ((k, v) for k, v in change.items() if k != "start_step"))
        out.append((below + 1, f"from step {change['start_step'] + 1:,}: {what}"))
    for node in run["nodes"]:
        gpus = f", {node['gpus']:g} GPUs {', '.join(node['accelerators'])}" if node["gpus"] else ""
        out.append((below, f"node {node['host']} ({node['address']}), {node['cpus']:g} CPUs{gpus}"))
    for number, a in enumerate(run["attempts"], 1):
        how = "restart" if a["restart"] else "command"
        why = f": {a['reason']}" if a["reason"] else ""
        span = f"steps {a['start_step'] + 1:,} to {a['reached']:,} on {a['workers']} workers"
        out.append((below, f"attempt {number} ({how}): {span}, {a['outcome'] or 'without an end'}{why}"))
    for segment in run["data"]["segments"]:
        out.append((below, f"data of steps {segment['first'] + 1:,} to {segment['end']:,} (plan {segment['digest'][:12]})"))
        out += [(below + 1, _source_line(s)) for s in segment["sources"]]
    if count := run["data"]["replaced_count"]:
        out.append((below, f"{count:,} bad samples were replaced"))
    out += [(below, f"tokenizer {t[:12]}") for t in run["tokenizers"]]
    for c in run["checkpoints"]:
        told = "  ".join(f"{k} {v:.5g}" for k, v in c["scores"].items())
        out.append((below, f"checkpoint of step {c['step']:,}{' (deleted)' if c['deleted'] else ''}: {c['uri']}  {told}"))
    for parent in run["parents"]:
        at = f", step {parent['step']:,}" if parent["step"] is not None else ""
        changed = f", with {', '.join(keys)} changed" if (keys := parent.get("changed")) else ""
        out.append((below, f"initialised from {parent['key']}: {parent['name'] or 'a folder'}{at} ({parent['folder']}){changed}"))
        out += _run_lines(parent["run"], below + 1) if parent["run"] else []
    return out


def _source_line(s: dict[str, Any]) -> str:
    shown = ", ".join(a if a == b else f"{a} to {b}" for a, b in s["ranges"][:3]) + (" ..." if len(s["ranges"]) > 3 else "")
    weights = ", ".join(f"{w:g}" + (f" from step {step + 1:,}" if step else "") for step, w in s["weights"])
    return (f"{s['name']} {s['digest'][:12]}, weight {weights}: {s['samples']:,} samples, {s['epochs']:.2f} epochs, "
            f"{s['shards']['seen']} of {s['shards']['total']} shards ({shown}) of {s['uri']}{_forgotten(s)}")  # fmt: skip


def _forgotten(source: dict[str, Any]) -> str:
    return "".join(f", made of {old['digest'][:12]} without {', '.join(old['ids'])}" for old in source.get("forgotten", []))
