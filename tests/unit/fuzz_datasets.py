"""Defines the fuzzing targets before a run: jobs, pipelines, sweeps, cluster files, and datasets."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from heliostat.cluster import cluster_file as cluster_files
from heliostat.cluster import review as cluster_check
from heliostat.curation import prepare
from heliostat.data import index, manifest, manifest_table
from heliostat.data.dataset import open_dataset
from heliostat.storage.locations import Location
from heliostat.tune import sweep
from heliostat.validation import check
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as models_

from tests.unit import build_job
from tests.unit.fuzzing import Target, mutate_bytes, mutate_tree, mutated_yaml
from tests.unit.test_dataset import LENGTH

ROOT = Path(__file__).parents[2]
# that a schema's error may name
KEYS = ["model", "train.", "data", "recipe", "job", "space", "tokenizer", "input", "mlflow.", "evaluate"]


def mutating(
    pattern: str, mutated: Callable[[random.Random, bytes], bytes], *also: str
) -> Callable[[random.Random, Path], list[str]]:
    """Returns a mutation of one of the files that match."""

    def mutate(rng: random.Random, folder: Path) -> list[str]:
        path = rng.choice(sorted(p for p in folder.glob(pattern) if p.is_file()))
        path.write_bytes(mutated(rng, path.read_bytes()))
        return [path.name, *also]

    return mutate


# schemas -------------------------------------------------------------------------------------------------------------


def jobs(folder: Path) -> Target:
    (folder / "text.yaml").write_text(yaml.safe_dump(build_job.raw(**{
        "data.sources": [{"path": "a", "weight": 0.5}, {"path": "s3://b/c", "max_epochs": 2}], "data.virtual_ranks": 4,
        "data.mix_schedule": [{"step": 5, "weights": [1, 2]}], "train.precision": "fp32", "card": {"license": "MIT"},
        "checkpoint": {"every": 10, "keep_every": 20, "best": {"metric": "loss"}}, "spike": {"window": 10},
        "workers": {"count": [1, 4], "cpus": 1, "labels": {"a": "b"}}})))  # fmt: skip
    image = yaml.safe_load((ROOT / "jobs" / "quickstart-diffusion.yaml").read_text())
    image["model"]["samples"]["prompts"] = image["model"]["samples"]["prompts"][:2]
    (folder / "image.yaml").write_text(yaml.safe_dump(image))

    def read(copied: Path) -> None:
        for path in sorted(copied.glob("*.yaml")):
            check.check_file(path)

    return Target(folder, mutating("*.yaml", mutated_yaml, *KEYS), read)


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

    return Target(folder, mutating("*.yaml", mutated_yaml, *KEYS), read)


def sweeps(folder: Path) -> Target:
    made = yaml.safe_load((ROOT / "jobs" / "sweeps" / "quickstart.yaml").read_text())
    space = {**made["space"], "train.optimizer.weight_decay": {"choice": [0.0, 0.1]}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**made, "space": space}))

    def read(copied: Path) -> None:
        sweep.load(copied / "sweep.yaml")

    return Target(folder, mutating("sweep.yaml", mutated_yaml, *KEYS), read)


def clusters(folder: Path) -> Target:
    for path in (ROOT / "clusters").glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        """Mutates one of the files. The others are read once, unchanged, before the first round."""
        names = mutating("*.yaml", mutated_yaml)(rng, copied)
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


def text_dataset(place: Location) -> manifest.Manifest:
    """Writes a dataset of 60 documents of letters, with its tokenizer."""
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
    """Does the work before a run's first step, and reads that step and the held-out data."""
    changes = {"data.sources.0.path": str(copied / "data"), "storage": str(copied / "runs"), "data.sequence_length": LENGTH,
               "data.shuffle_window": 1024,  # where few samples are left, a larger one would be of thousands of epochs
               "mlflow.uri": f"sqlite:///{copied}/mlflow.db", "train.precision": "fp32"}  # fmt: skip
    checked = check.check_stores(*check.check_job(build_job.job(**changes)))
    data = open_dataset(checked.plan)
    data.load(data.order.step(0).ravel())
    data.order.held_out(10)


def manifests(folder: Path) -> Target:
    text_dataset(Location(str(folder / "data")))

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        """Mutates the manifest's bytes, or its rows and metadata, with a valid digest."""
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
                meta = {**made["meta"], "digest": manifest_table.digest(table, made["meta"])}
                with path.open("wb") as file:
                    manifest_table.encode(table, meta, file)
            except (pa.ArrowException, TypeError, KeyError, OverflowError, ValueError):
                continue  # Parquet cannot hold it
            return names

    return Target(folder, mutate, _train_on)


def indexes(folder: Path) -> Target:
    text_dataset(Location(str(folder / "data")))
    text_dataset(Location(str(folder / "more")))

    def mutate(rng: random.Random, copied: Path) -> list[str]:
        """Mutates a shard of the dataset, or adds one."""
        at, shards = rng.choice(["new", "0"]), copied / "data" / "shards"
        (copied / "more" / "shards" / "0.parquet").rename(shards / "new.parquet")
        path = shards / f"{at}.parquet"
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return [str(copied / "data")]

    def read(copied: Path) -> None:
        index.index(Location(str(copied / "data")))
        _train_on(copied)

    return Target(folder, mutate, read)
