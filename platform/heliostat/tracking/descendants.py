"""Finds the runs that have trained on a shard or a dataset. Reads only MLflow and the runs' folders.

Seen(client).answer(shard="part-00017.parquet")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from heliostat.data.ancestry import REFERENCE, WRITER
from heliostat.errors import DataError
from heliostat.runs import consumed
from heliostat.runs.exports import ExportedFolder
from heliostat.tracking import lineage, mlflow_client, tags
from heliostat.tracking.card import ParentModel

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

Taken = Callable[["Run", int | None], int]  # counts the requested samples that a run took, up to a step if it isn't None


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
            data = lineage.data_of(self.client, run)
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
            "models": [f"models:/{v.name}/{v.version}" for v in lineage.versions(self.client, run_id)],
            "exports": lineage.exports_of(run),
            "fault": None,
        }

    def _outdated(self, run: Run, inherited: list[str]) -> list[str]:
        """Lists the run's datasets whose reference model, or the model that wrote their texts, comes from one of the runs in
        `inherited`."""
        sources = [f"data.sources.{n}.path" for p in self._parents(run.info.run_id) if p["run_id"] in inherited
                   for n in re.findall(rf"^data\.sources\.(\d+)\.(?:{REFERENCE}|{WRITER})$", p["key"])]  # fmt: skip
        return lineage.distinct([run.data.params[key] for key in sources])

    def _inherited(self, run_id: str, taken: Taken, known: dict[str, list[str]]) -> list[str]:
        """Lists the run ids of ancestors that have trained on the samples that `taken` counts. For each ancestor, counts only
        the samples up to the step whose checkpoint initialized the run. `known`: the lists of other runs, by id."""
        path = [run_id] if run_id not in known else []
        while path:  # a recursive function would limit the number of generations
            known.setdefault(path[-1], [])
            parents = [(p["run_id"], p["step"]) for p in self._parents(path[-1]) if p["run_id"] and p["run_id"] in self.runs]
            if further := next((parent for parent, _ in parents if parent not in known), None):
                path.append(further)
                continue
            ancestors = [one for parent, step in parents
                         for one in ([parent] if taken(self.runs[parent], step) else []) + known[parent]]  # fmt: skip
            known[path.pop()] = list(dict.fromkeys(ancestors))
        return known[run_id]

    def _parents(self, run_id: str) -> list[ParentModel]:
        if run_id not in self.known_parents:
            self.known_parents[run_id] = lineage.parents_of(self.client, run_id)
        return self.known_parents[run_id]
