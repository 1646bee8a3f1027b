"""Tests the lineage of runs with many generations, of deleted runs, and of runs whose dataset is gone, in an MLflow store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from heliostat.data.dataset import open_dataset
from heliostat.tracking import lineage, lineage_lines, mlflow_client, tags
from heliostat.tracking.descendants import Seen
from mlflow import MlflowClient
from mlflow.entities import Run, RunData, RunInfo

from tests.unit.test_coverage import record_of
from tests.unit.test_dataset import make_dataset, make_plan

ROUNDS = 12


class Store:
    """An MLflow store with the runs of a person who trains each model from the one before."""

    def __init__(self, folder: Path) -> None:
        self.uri, self.folder = f"sqlite:///{folder}/mlflow.db", folder
        self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        self.experiment = self.client.create_experiment("rounds", artifact_location=(folder / "artifacts").as_uri())

    def run(self, name: str, parents: list[str], keys: tuple[str, ...] = ("model.pretrained",), **data: Any) -> str:
        run_id = self.client.create_run(self.experiment, tags={tags.NAME: name, tags.FOLDER: str(self.folder / name)}).info.run_id
        unknown = {"folder": "/models/m", "config": "", "bytes": 0, "license": None}
        listed = [{"key": key, **unknown, "name": "m", "run_id": one, "step": 3} for one in parents for key in keys]
        mlflow_client.write_json(self.client, run_id, {"parents": listed}, "parents.json")
        self.client.log_param(run_id, "data.sources.0.path", "/data/pairs")
        if data:
            mlflow_client.write_json(self.client, run_id, data, "data.json")
        return run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Creating a store takes seconds."""
    return Store(tmp_path_factory.mktemp("store"))


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(client: MlflowClient, run_id: str, *rest: Any) -> Any:
        calls.append(run_id)
        return function(client, run_id, *rest)

    return call


def test_each_run_is_read_and_shown_once_however_many_ways_lead_to_it(store, monkeypatch):
    """Each round of DPO starts from the last model, which is also its reference: 2^12 ways lead to the first run."""
    runs = [store.run("round-0", [])]
    for number in range(1, ROUNDS):
        runs.append(store.run(f"round-{number}", runs[-1:], ("model.pretrained", "data.sources.0.reference")))
    calls: list[str] = []
    monkeypatch.setattr(lineage, "parents_of", counted(lineage.parents_of, calls))
    rows = {row["run_id"]: row for row in Seen(store.client).rows(lambda run, before: int(run.info.run_id == runs[0]))}
    assert [rows[run]["inherited"] for run in runs] == [[], *[runs[:1]] * (ROUNDS - 1)] and len(calls) == ROUNDS
    assert [rows[run]["outdated"] for run in runs] == [[], ["/data/pairs"], *[[]] * (ROUNDS - 2)]
    calls.clear()
    node = lineage.run_node(store.client, store.client.get_run(runs[-1]))
    assert sorted(calls) == sorted(runs)
    shown = [text for _, text in lineage_lines.run_lines(node, 0, set())]
    for run in runs:
        assert sum(f"({run})" in text and "see above" not in text for text in shown) == 1
    assert sum("see above" in text for text in shown) == ROUNDS - 1


def test_what_a_lineage_leaves_out_has_its_command(store):
    runs = [store.run("a", ["f" * 32])]
    runs += [store.run("b", runs[-1:])]
    runs += [store.run("c", runs[-1:])]
    for run, depth, absent in ((runs[2], 1, runs[0]), (runs[0], 5, "f" * 32)):  # too deep, and in another store
        node = lineage.run_node(store.client, store.client.get_run(run), depth)
        shown = [text for _, text in lineage_lines.run_lines(node, 0, set())]
        assert f"run m ({absent}), not in this tree; run: heliostat run lineage {absent}" in shown


def test_a_deleted_run_still_leads_to_its_descendants(store):
    base = store.run("deleted", [])
    child = store.run("child", [base])
    store.client.delete_run(base)
    rows = {row["run_id"]: row for row in Seen(store.client).rows(lambda run, before: int(run.info.run_id == base))}
    assert rows[base]["status"] == "DELETED" and rows[child]["inherited"] == [base]


def test_a_run_whose_dataset_is_gone_is_listed_as_unknown_and_hides_no_other(store, tmp_path):
    a, b = make_dataset(tmp_path / "a", 1), make_dataset(tmp_path / "b", 2)
    runs = [store.run(name, [], **record_of(make_plan(data), 5)) for name, data in (("has-a", a), ("has-b", b))]
    runs += [store.run("after-a", runs[:1]), store.run("after-b", runs[1:])]
    shutil.rmtree(tmp_path / "a")
    open_dataset.cache_clear()
    rows = {row["run_id"]: row for row in Seen(store.client).answer(shard="shards/0.parquet")}
    gone, kept, after, sure = (rows[run] for run in runs)
    assert (gone["samples"], kept["fault"]) == (0, None) and str(tmp_path / "a") in gone["fault"] and kept["samples"] > 0
    assert runs[0] in after["fault"] and after["inherited"] == [] and (sure["fault"], sure["inherited"]) == (None, runs[1:2])
    assert rows.keys() == set(runs)


def test_the_number_of_generations_has_no_limit(store):
    """A loop that trains each model from the last one can have more generations than Python allows nested calls."""
    names, seen = [f"generation-{number}" for number in range(3_000)], Seen(store.client)
    seen.runs = {name: Run(RunInfo(name, "0", "", "FINISHED", 0, 0, "active"), RunData()) for name in names}
    parent: Any = {"key": "model.pretrained", "step": 3}
    seen.known_parents = {name: [parent | {"run_id": before}] for before, name in pairwise(names)} | {names[0]: []}
    assert names[0] in seen.unsure({names[0]: "it is gone"}, names[-1:])[names[-1]]
    seen.known_parents[names[0]] = [parent | {"run_id": names[-1]}]  # a damaged record, which makes a cycle
    assert seen.unsure({names[0]: "it is gone"}, names[-1:]).keys() == {names[-1]}
