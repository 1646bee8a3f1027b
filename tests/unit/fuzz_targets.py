"""What is fuzzed: for every kind of file that heliostat reads, a small right one and the commands' own way of reading it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from heliostat.checkpoint import index as checkpoint_index
from heliostat.checkpoint import layout, retention
from heliostat.cluster import cluster_file as cluster_files
from heliostat.cluster import local, source_code
from heliostat.cluster import review as cluster_check
from heliostat.curation import prepare
from heliostat.data import index, manifest
from heliostat.data.dataset import open_dataset
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
from heliostat.tune import listing, sweep
from heliostat.tune import trial_record as trials
from heliostat.validation import check
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as models_

from tests.unit import build_checkpoint, build_job
from tests.unit.fuzzing import Target, mutate_bytes, mutate_tree, mutated_json, mutated_yaml
from tests.unit.test_curves import event, score
from tests.unit.test_dataset import LENGTH, make_plan
from tests.unit.test_verify import Run

ROOT = Path(__file__).parents[2]
# that a schema's error may name
KEYS = ["model", "train.", "data", "recipe", "job", "space", "tokenizer", "input", "mlflow.", "evaluate"]


def _file(
    pattern: str, mutated: Callable[[random.Random, bytes], bytes], *also: str
) -> Callable[[random.Random, Path], list[str]]:
    """Mutates one of the files that match."""

    def mutate(rng: random.Random, folder: Path) -> list[str]:
        path = rng.choice(sorted(p for p in folder.glob(pattern) if p.is_file()))
        path.write_bytes(mutated(rng, path.read_bytes()))
        return [path.name, *also]

    return mutate


# schemas -------------------------------------------------------------------------------------------------------------


def jobs(folder: Path) -> Target:
    (folder / "text.yaml").write_text(yaml.safe_dump(build_job.raw(**{
        "data.sources": [{"path": "a", "weight": 0.5}, {"path": "s3://b/c", "max_epochs": 2}], "data.lanes": 4,
        "data.mix_schedule": [{"step": 5, "weights": [1, 2]}], "train.precision": "fp32", "card": {"license": "MIT"},
        "checkpoint": {"every": 10, "keep_every": 20, "best": {"metric": "loss"}}, "spike": {"window": 10},
        "workers": {"count": [1, 4], "cpus": 1, "labels": {"a": "b"}}})))  # fmt: skip
    image = yaml.safe_load((ROOT / "jobs" / "quickstart-diffusion.yaml").read_text())
    image["model"]["samples"]["prompts"] = image["model"]["samples"]["prompts"][:2]
    (folder / "image.yaml").write_text(yaml.safe_dump(image))

    def read(copied: Path) -> None:
        for path in sorted(copied.glob("*.yaml")):
            check.check_file(path)

    return Target(folder, _file("*.yaml", mutated_yaml, *KEYS), read)


def pipelines(folder: Path) -> Target:
    for name in ("quickstart", "quickstart-images"):
        (folder / f"{name}.yaml").write_bytes((ROOT / "pipelines" / f"{name}.yaml").read_bytes())
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("words")
    raw = yaml.safe_load((folder / "quickstart.yaml").read_text())
    (folder / "quickstart.yaml").write_text(yaml.safe_dump({**raw, "input": str(folder / "texts"), "labels": {"a": "b"}}))

    def read(copied: Path) -> None:
        for path in sorted(copied.glob("*.yaml")):
            _, found = prepare.load(path, [])
            found.check()
            found.inputs()

    return Target(folder, _file("*.yaml", mutated_yaml, *KEYS), read)


def sweeps(folder: Path) -> Target:
    made = yaml.safe_load((ROOT / "jobs" / "sweeps" / "quickstart.yaml").read_text())
    space = {**made["space"], "train.optimizer.weight_decay": {"choice": [0.0, 0.1]}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**made, "space": space}))

    def read(copied: Path) -> None:
        sweep.load(copied / "sweep.yaml")

    return Target(folder, _file("sweep.yaml", mutated_yaml, *KEYS), read)


def clusters(folder: Path) -> Target:
    for path in (ROOT / "clusters").glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        """One of them; the others are read as they are, once, before the first round."""
        names = _file("*.yaml", mutated_yaml)(rng, copied)
        for path in copied.glob("*.yaml"):
            if path.name not in names:
                path.unlink()
        return names

    def read(copied: Path) -> None:
        for path in sorted(copied.glob("*.yaml")):
            report = cluster_check.check(path)
            found = cluster_files.read(path)
            _ = report.errors or (found.pools, found.namespace, found.local and found.addresses, found.commands)

    return Target(folder, mutate, read)


# datasets ------------------------------------------------------------------------------------------------------------


def _text(place: Location) -> manifest.Manifest:
    """A dataset of 60 documents of letters, with its tokenizer."""
    vocabulary = {chr(i + 97) if i < 26 else f"<{i}>": i for i in range(96)}
    raw = Tokenizer(models_.BPE(vocabulary, [], unk_token="a"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = raw.to_str().encode()
    place.join("tokenizer.json").write(text)
    rng = np.random.default_rng(0)
    (Path(place.path) / "shards").mkdir()
    table = pa.table({"tokens": pa.array([rng.integers(0, 26, 40).tolist() for _ in range(60)], pa.list_(pa.int32()))})
    pq.write_table(table, f"{place.path}/shards/0.parquet", row_group_size=10)
    rows = manifest.read_footer(place, "shards/0.parquet", "tokens")
    rows = [
        {**row, "place": manifest.PLACES // 10 * number + number} for number, row in enumerate(rows)
    ]  # the first may be held out
    meta = {"kind": "tokens", "tokenizer": hashlib.sha256(text).hexdigest(), "vocab_size": 96, "end_of_document": 0, "name": "d",
            "documents": 60}  # fmt: skip
    return manifest.write(place, rows, meta)


def _train_on(copied: Path) -> None:
    """What comes before a run's first step, and reading that step and what is held out."""
    changes = {"data.sources.0.path": str(copied / "data"), "storage": str(copied / "runs"), "data.sequence_length": LENGTH,
               "data.window": 1024,  # where few samples are left, a larger one would be of thousands of epochs
               "mlflow.uri": f"sqlite:///{copied}/mlflow.db", "train.precision": "fp32"}  # fmt: skip
    checked = check.check_stores(*check.check_job(build_job.job(**changes)))
    data = open_dataset(checked.plan)
    data.load(data.order.step(0).ravel())
    data.order.held_out(10)


def manifests(folder: Path) -> Target:
    _text(Location(str(folder / "data")))

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        """Its bytes; or its rows and metadata, with a digest that is right."""
        path, names = copied / "data" / manifest.FILE, [str(copied / "data"), "data.sources"]
        if rng.random() < 0.3:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
            return names
        before = manifest.read(Location(str(copied / "data")))
        meta_before = {k: v for k, v in before.meta.items() if k != "digest"}
        while True:
            made = mutate_tree(rng, {"rows": before.chunks.to_pylist(), "meta": meta_before})
            try:
                table = pa.Table.from_pylist(made["rows"], schema=manifest.SCHEMA)
                meta = {**made["meta"], "digest": manifest.digest(table, made["meta"])}
                path.write_bytes(manifest._encode(manifest.Manifest(before.location, table, meta)))
            except (pa.ArrowException, TypeError, AttributeError, KeyError, OverflowError, ValueError):
                continue  # Parquet cannot hold it
            return names

    return Target(folder, mutate, _train_on)


def indexes(folder: Path) -> Target:
    _text(Location(str(folder / "data")))
    _text(Location(str(folder / "more")))

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        """A shard of the dataset, or one that is added."""
        at, shards = rng.choice(["new", "0"]), copied / "data" / "shards"
        (copied / "more" / "shards" / "0.parquet").rename(shards / "new.parquet")
        path = shards / f"{at}.parquet"
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return [str(copied / "data")]

    def read(copied: Path) -> None:
        index.index(Location(str(copied / "data")))
        _train_on(copied)

    return Target(folder, mutate, read)


# runs ----------------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> Run:
    """A run of two segments, with its receipts; its dataset stays where it is."""
    one = make_plan(_text(Location(str(folder.parent / f"{folder.name}-data"))))
    other = dataclasses.replace(one, mix=((10, one.mix[0][1]),), seed=9)
    return Run(folder / "run", one, other)


def _read_run(copied: Path) -> None:
    place = Location(str(copied / "run"))
    verify.verify(place)
    consumed.record(place, 23)


def receipts(folder: Path) -> Target:
    _run(folder)
    return Target(folder, _file("run/receipts/*.json", mutated_json, "step "), _read_run)


def plans(folder: Path) -> Target:
    _run(folder)
    return Target(
        folder, _file("run/segments/*.json", mutated_json, "segments", f"{folder.name}-data", "data.sources"), _read_run
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

    return Target(folder, _file("run/ledger/*.json", mutated_json), read)


def curve_files(folder: Path) -> Target:
    place = Location(str(folder / "run"))
    local_curves.write(place, 10, [event(1, 6, sources={"a": {"samples": 2.0}}), event(6, 11), score(10)])
    spike = LossSpike(step=13, loss=9.0, usual=1.0, limit=4.0, at=1e9)
    more = event(11, 21, added={"router_loss": [0.5] * 10})
    local_curves.write(place, 20, [more, spike, Saved(step=20, blocked_s=0.1, at=1e9), score(20)])

    def read(copied: Path) -> None:
        local_curves.missing(Location(str(copied / "run")), {})

    return Target(folder, _file("run/curves/*.json", mutated_json), read)


def checkpoints(folder: Path, older: int | None = None) -> Target:
    """A checkpoint of this format, or of an `older` one."""
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
    """What else a run, a sweep, a submission and a local cluster leave."""
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
    sweep_folder.join("driver.json").write(json.dumps({"host": "h", "pid": 1, "started": 1e9, "at": 1e9}).encode())
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
        return _file(rng.choice(patterns), mutated_json, "space", "train.", "sweep")(rng, copied)

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
    """A language model as `heliostat export` leaves it, and a dataset that it is scored on."""
    from heliostat.recipes import exported
    from heliostat.recipes.text.causal_lm import CausalLM

    place = folder / "model"
    held = _text(Location(str(folder.parent / f"{folder.name}-data")))
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
        _file("model/*", mutated)(rng, copied)
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
