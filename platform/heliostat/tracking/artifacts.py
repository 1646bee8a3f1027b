"""Reads a run's artifacts in MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

from pydantic import JsonValue

from heliostat.errors import TrackingError
from heliostat.storage.records import Format

ARTIFACT: Format[Any] = Format(cast(Any, JsonValue), "record in MLflow", TrackingError)


def read_json(client: Any, run_id: str, artifact: str) -> Any:
    """Reads a JSON artifact of a run; None if the run has none of that name."""
    folder = artifact.rpartition("/")[0] or None
    if artifact not in {f.path for f in client.list_artifacts(run_id, folder)}:
        return None
    with tempfile.TemporaryDirectory(prefix="heliostat-") as local:
        return ARTIFACT.parse(Path(client.download_artifacts(run_id, artifact, local)).read_bytes(), f"run {run_id}: {artifact}")
