"""Defines the fuzzing targets: for every kind of file that heliostat reads, a small valid file and the commands' way of reading
it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from heliostat.checkpoint import index as checkpoint_index
from heliostat.checkpoint import layout, retention
from heliostat.cluster import local, source_code
from heliostat.evaluation.losses import evaluate
from heliostat.inference import generate
from heliostat.inference.export import recipe_of
from heliostat.runs import consumed, goodput, mlflow_id, verify
from heliostat.runs.events import LossSpike, Saved
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.submit import submission
from heliostat.tracking import local_curves, outbox
from heliostat.tracking.card import parents
from heliostat.tune import listing
from heliostat.tune import trial_record as trials

from tests.unit import build_checkpoint, build_job
from tests.unit.build_run import Run
from tests.unit.fuzz_datasets import ROOT, clusters, indexes, jobs, manifests, mutating, pipelines, sweeps, text_dataset
from tests.unit.fuzzing import Target, mutate_bytes, mutate_tree, mutated_json
from tests.unit.test_curves import event, score
from tests.unit.test_dataset import LENGTH, make_plan

# runs ----------------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> Run:
    """Writes a run of two segments, with its receipts. Its dataset stays in the same place."""
    one = make_plan(text_dataset(Location(str(folder.parent / f"{folder.name}-data"))))
    other = dataclasses.replace(one, mix=((10, one.mix[0][1]),), seed=9)
    return Run(folder / "run", one, other)


def _read_run(copied: Path) -> None:
    place = Location(str(copied / "run"))
    verify.verify(place)
    consumed.record(place, 23)


def receipts(folder: Path) -> Target:
    _run(folder)
    return Target(folder, mutating("run/receipts/*.json", mutated_json, "step "), _read_run)


def plans(folder: Path) -> Target:
    _run(folder)
    return Target(
        folder, mutating("run/segments/*.json", mutated_json, "segments", f"{folder.name}-data", "data.sources"), _read_run
    )


def ledgers(folder: Path) -> Target:
    for number, outcome in enumerate(["failed", None]):
        parts = {"starting": 3.0, "computing": 20.0, "data": 1.5}
        began = 1e9 + 100 * number
        marks = [(10, 9.0), (20, 20.0)]
        made = goodput.RecordedAttempt(f"a{number}", began, began + 24.5, began + 25, 0, 2, bool(number),
            "host", 42, outcome, "", "lost",
                               parts, marks)  # fmt: skip
        Location(str(folder)).join("run", run_folder.LEDGER, made.name).write(made.dump())

    def read(copied: Path) -> None:
        found = goodput.read_report(Location(str(copied / "run")))
        goodput.table(found)
        goodput.line(found)

    return Target(folder, mutating("run/ledger/*.json", mutated_json), read)


def curve_files(folder: Path) -> Target:
    place = Location(str(folder / "run"))
    local_curves.write(place, 10, [event(1, 6, sources={"a": {"samples": 2.0}}), event(6, 11), score(10)])
    spike = LossSpike(step=13, loss=9.0, usual=1.0, limit=4.0, at=1e9)
    more = event(11, 21, added={"router_loss": [0.5] * 10})
    local_curves.write(place, 20, [more, spike, Saved(step=20, blocked_s=0.1, at=1e9), score(20)])

    def read(copied: Path) -> None:
        local_curves.missing(Location(str(copied / "run")), {})

    return Target(folder, mutating("run/curves/*.json", mutated_json), read)


def checkpoints(folder: Path, older: int | None = None) -> Target:
    """Writes a checkpoint of the current format, or of an `older` one."""
    run = _run(folder)
    run.location.join("checkpoints").delete()
    job = build_job.job(**{"train.precision": "fp32"}).dump()
    said = {"job": job, "data": run.plan(19).dump(), "data_digest": run.plan(19).digest, "metrics": {"loss": 1.0}}
    receipt = {"steps": 20, "chain": run.chains[20]}
    weights = {"master.w": torch.arange(12, dtype=torch.float32)}
    place = build_checkpoint.save(run.location, 20, [build_checkpoint.slices(weights, r, 2) for r in range(2)], **said,
                                  receipt=receipt)  # fmt: skip
    if older:
        build_checkpoint.age(place, older)
    made = layout.decode((place / layout.INDEX).read_bytes())
    del made["crc32"]
    listed = sorted(p.name for p in place.glob("shard-*.json"))

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        path = copied / "run" / "checkpoints" / "step-00000020" / layout.INDEX
        changed = rng.random()
        if changed < 0.2:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        elif changed < 0.6 or not listed:
            path.write_bytes(layout.encode(mutate_tree(rng, made)))
        else:  # an index of a shard, and what seals it: its checksum holds, and it says something else
            number = rng.randrange(len(listed))
            data = json.dumps(mutate_tree(rng, json.loads((place / listed[number]).read_bytes()))).encode()
            (path.parent / listed[number]).write_bytes(data)
            sealed = copy.deepcopy(made)
            sealed["shards"][number]["index"] = checkpoint_index.seal(data)
            path.write_bytes(layout.encode(sealed))
        return [str(copied / "run" / "checkpoints" / "step-00000020"), "checkpoint.json", "checkpoint 20"]

    def read(copied: Path) -> None:
        place = Location(str(copied / "run"))
        retention.survey(place)
        verify.History(place)
        found = layout.open_checkpoint(place, 20)
        for name in found.names("master"):
            found.read(f"master.{name}")
            list(found.stream(f"master.{name}"))
        recipe_of(found)

    return Target(folder, mutate, read)


def records(folder: Path) -> Target:
    """Writes the other records of a run, a sweep, a submission, and a local cluster."""
    run = _run(folder)
    place = run.location
    place.join(run_folder.MLFLOW_RUN).write(json.dumps({"run_id": "0" * 32, "token": "x", "uri": "sqlite:///x"}).encode())
    bad = {"step": 3, "dataset": "d", "shard": "s", "row_group": 0, "row": 1, "reason": "r",
           "replaced_by": {"dataset": "d", "shard": "s", "row_group": 0, "row": 2}}  # fmt: skip
    place.join("quarantine", "step-00000010.jsonl").write(f"{json.dumps(bad)}\n{json.dumps(bad)}\n".encode())
    place.join(run_folder.UNLOGGED).write(b'["train/loss", 1.0, 1e9, 1]\n["train/loss", 0.5, 1e9, 2]\n')
    swept = yaml.safe_load((ROOT / "jobs" / "sweeps" / "quickstart.yaml").read_text())
    sweep_folder = Location(str(folder / "sweep"))
    sweep_folder.join("sweep.json").write(
        json.dumps({"sweep": swept, "job": build_job.BASE, "run_id": "x", "seconds": 3.0}).encode()
    )
    for number in range(2):
        made = trials.TrialRecord(
            number, {"train.optimizer.lr": 0.1}, status="finished", step=9, steps=9, reports=[(9, 0.5, 1e9)]
        )
        trials.write(sweep_folder, made)
    jobs_folder, cluster_folder = folder / ".heliostat" / "jobs", folder / ".heliostat" / "clusters" / "c"
    jobs_folder.mkdir(parents=True)
    cluster_folder.mkdir(parents=True)
    submitted = submission.SubmissionRecord("j", "c", "runs/j", 10, build_job.BASE, None)
    (jobs_folder / "j.json").write_text(json.dumps(dataclasses.asdict(submitted)))
    with patch.object(local, "home", lambda: folder.parent / "fuzzed" / ".heliostat" / "clusters"):  # of the copy that is read
        node = local.Node("head", "127.0.0.1", str(local._node_folder("c", 0)), 1, 1e9)
    state = local.ClusterState("c", "c.yaml", "http://127.0.0.1:1", [node])
    (cluster_folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    (folder / source_code.CODE_FILE).parent.mkdir(parents=True, exist_ok=True)
    (folder / source_code.CODE_FILE).write_text(json.dumps({"commit": "c", "diff": "d", "untracked": ["a"]}))
    (folder / "model").mkdir()
    made = {
        "recipe": "heliostat.recipes:CausalLM",
        "job": build_job.BASE,
        "origin": {"run_id": "r", "step": 3, "data_digest": "d"},
    }
    (folder / "model" / "heliostat.json").write_text(json.dumps(made))
    (folder / "model" / "config.json").write_text("{}")
    patterns = [
        "run/run.json", "run/quarantine/*", f"run/{run_folder.UNLOGGED}", "sweep/*.json", "sweep/records/*",
        ".heliostat/jobs/*", ".heliostat/clusters/c/*", source_code.CODE_FILE, "model/heliostat.json",
    ]  # fmt: skip

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        return mutating(rng.choice(patterns), mutated_json, "space", "train.", "sweep")(rng, copied)

    def read(copied: Path) -> None:
        os.chdir(copied)  # the workspace; the caller goes back
        place = Location(str(copied / "run"))
        mlflow_id.record(place).get("run_id")
        consumed.record(place, 23)
        sent: list[Any] = []
        outbox.Outbox(place, sent.extend, dict).flush()
        listing.sweeps(Location(str(copied)))
        listing.show(Location(str(copied / "sweep")))
        listing.progress(Location(str(copied / "sweep")))
        listing.best_job(Location(str(copied / "sweep")))
        submission.SubmissionRecord.read("j")
        local.known()
        source_code.source()
        parents(build_job.job(model={"pretrained": str(copied / "model")}))

    return Target(folder, mutate, read)


# models --------------------------------------------------------------------------------------------------------------


def models(folder: Path) -> Target:
    """Writes a language model like `heliostat model export`, and a dataset to score it on."""
    from heliostat.recipes import exported
    from heliostat.recipes.text.causal_lm import CausalLM

    place = folder / "model"
    held = text_dataset(Location(str(folder.parent / f"{folder.name}-data")))
    data = held.location
    job = build_job.job(**{"train.precision": "fp32", "data.sequence_length": LENGTH, "data.sources.0.path": str(data)})
    recipe = CausalLM(job)
    recipe.bind([held])
    place.mkdir()
    torch.manual_seed(0)
    recipe.build().save_pretrained(place)
    recipe.save_config(place)
    exported.write(place, job, {"run_id": "r", "step": 1, "data_digest": held.digest})

    def mutated(rng: random.Random, data: bytes) -> bytes:
        return mutate_bytes(rng, data) if data[:1] != b"{" else mutated_json(rng, data)

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        mutating("model/*", mutated)(rng, copied)
        return [str(copied / "model"), "model", "tokenizer"]

    def read(copied: Path) -> None:
        generate.generate(copied / "model", "a", {"max_tokens": 2}, 0, None)
        evaluate(copied / "model", str(data), 8, None, 0.1)

    return Target(folder, mutate, read)


TARGETS: dict[str, tuple[Callable[[Path], Target], int]] = {  # and rounds in CI
    "jobs": (jobs, 60),
    "pipelines": (pipelines, 40),
    "sweeps": (sweeps, 40),
    "clusters": (clusters, 40),
    "manifests": (manifests, 60),
    "indexes": (indexes, 20),
    "receipts": (receipts, 30),
    "segments": (plans, 40),
    "ledgers": (ledgers, 80),
    "curves": (curve_files, 80),
    "checkpoints": (checkpoints, 60),
    "older checkpoints": (partial(checkpoints, older=3), 40),
    "records": (records, 80),
    "models": (models, 30),
}
