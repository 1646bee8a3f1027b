"""Traces lineage backwards: which runs, and so which models, have trained on a shard or a dataset.

Exact, to the sample: computed from the data plans that each run recorded in MLflow, and the datasets' manifests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from heliostat.runs import consumed
from heliostat.tracking import mlflow_client, tags
from heliostat.tracking.lineage import DEPTH, data_of, distinct, versions
from heliostat.tracking.run_facts import read_json

Taken = Callable[[Any, int | None], int]  # of a run, the samples in question that it took; before a step, if one is given


class Seen:
    """Finds the runs that have trained on a shard or a dataset: themselves, or through the models they were initialised from."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.runs = {r.info.run_id: r for r in mlflow_client.runs(client, list(mlflow_client.experiments(client)))}

    def answer(self, shard: str | None = None, digest: str | None = None) -> list[dict[str, Any]]:
        """Finds each run that has trained on the shard, or on datasets whose digest begins with `digest`; newest first.

        Each row holds run_id, name, status, samples, inherited (the ancestors' run ids) and models.
        """

        def taken(run: Any, before: int | None) -> int:
            data = data_of(self.client, run)
            return consumed.of_digest(data, digest, before) if digest else consumed.of_shard(data, str(shard), before)

        return self.rows(taken)

    def rows(self, taken: Taken, only: str | None = None) -> list[dict[str, Any]]:
        """Finds each run, or `only` one, that has taken samples, itself or by inheritance: the rows of `answer`."""
        rows = []
        for run_id, run in self.runs.items():
            if only not in (None, run_id):
                continue
            samples, inherited = taken(run, None), self._inherited(run, taken, DEPTH)
            if samples or inherited:
                models = [f"models:/{v.name}/{v.version}" for v in versions(self.client, run_id)]
                name, status = run.data.tags[tags.NAME], run.info.status
                row = {"run_id": run_id, "name": name, "status": status, "samples": samples}
                rows.append({**row, "inherited": inherited, "models": models})
        return rows

    def _inherited(self, run: Any, taken: Taken, depth: int) -> list[str]:
        """Lists the run ids of ancestors that took samples before the step that the run was initialised from."""
        out: list[str] = []
        for parent in (read_json(self.client, run.info.run_id, "parents.json") or {}).get("parents", []):
            above = self.runs.get(parent["run_id"] or "")
            if above is not None and depth:
                out += ([parent["run_id"]] if taken(above, parent["step"]) else []) + self._inherited(above, taken, depth - 1)
        return distinct(out)
