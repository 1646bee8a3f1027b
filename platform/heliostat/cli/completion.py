"""Completes words in a shell: files of the workspace, runs, models, datasets, sweeps, clusters, and jobs.

The shell waits for a completion at each tab. So this module imports only the standard library, uses no network, and skips
unreadable files.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

RUNS, DATASETS, STORE = Path(".heliostat/runs"), Path(".heliostat/data"), Path(".heliostat/mlflow.db")
VERSIONS = "SELECT name || '/' || version FROM model_versions ORDER BY name, version DESC"
MOST = 200  # maximum number of suggestions


def job_files(incomplete: str) -> list[str]:
    return _matching(incomplete, (p for p in _yaml("jobs") if "sweeps" not in p.parts and "data" not in p.parts))


def pipeline_files(incomplete: str) -> list[str]:
    return _matching(incomplete, [*_yaml("pipelines"), *_yaml("jobs/examples/data")])


def sweep_files(incomplete: str) -> list[str]:
    return _matching(incomplete, _yaml("jobs/sweeps"))


def cluster_files(incomplete: str) -> list[str]:
    return _matching(incomplete, _yaml("clusters"))


def datasets(incomplete: str) -> list[str]:
    return _matching(incomplete, _folders(DATASETS, "manifest.parquet"))


def runs(incomplete: str) -> list[str]:
    return _matching(incomplete, _folders(RUNS, "run.json"))


def sweeps(incomplete: str) -> list[str]:
    return _matching(incomplete, _folders(RUNS, "sweep.json"))


def models(incomplete: str) -> list[str]:
    """Lists registered models, newest version first, and ids of finished runs, from a local MLflow store."""
    run_ids = _query("SELECT run_uuid FROM runs WHERE status = 'FINISHED' ORDER BY start_time DESC")
    return _matching(incomplete, [*(f"models:/{name}" for name in _query(VERSIONS)), *run_ids])


def registered(incomplete: str) -> list[str]:
    """Lists registered models as NAME/VERSION, for `model promote`."""
    return _matching(incomplete, _query(VERSIONS))


def jobs(incomplete: str) -> list[str]:
    """Lists the ids of jobs that this workspace has submitted."""
    return _matching(incomplete, (p.stem for p in sorted(Path(".heliostat/jobs").glob("*.json"))))


def clusters(incomplete: str) -> list[str]:
    """Lists cluster files, and the names of local clusters."""
    local = _folders(Path(".heliostat/clusters"), "state.json")
    return _matching(incomplete, [*_yaml("clusters"), *(folder.name for folder in local)])


def _query(statement: str) -> list[str]:
    """Queries the local MLflow database, and waits at most 0.2 s for processes that write to it. Returns no rows if there is no
    database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    place = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else STORE
    if (uri and not uri.startswith("sqlite:///")) or not place.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"file:{place}?mode=ro", uri=True, timeout=0.2)) as store:
            return [str(row[0]) for row in store.execute(f"{statement} LIMIT {MOST}")]
    except sqlite3.Error:
        return []


def _yaml(folder: str) -> list[Path]:
    return sorted([*Path(folder).rglob("*.yaml"), *Path(folder).rglob("*.yml")])


def _folders(parent: Path, file: str) -> list[Path]:
    """Lists the folders that contain a file, the newest first."""
    marks = [p for p in parent.glob(f"*/{file}") if p.is_file()]
    return [p.parent for p in sorted(marks, key=lambda p: -p.stat().st_mtime)]


def _matching(incomplete: str, words: Iterable[object]) -> list[str]:
    return [word for word in map(str, words) if word.startswith(incomplete)][:MOST]
