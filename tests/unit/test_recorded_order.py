"""Tests that runs recorded under version 1 of the data plan keep every sample, by digests from before version 2."""

import dataclasses
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.data import manifest
from heliostat.data.dataset import DataPlan
from heliostat.data.manifest import Manifest
from heliostat.data.mixing import Shape
from heliostat.data.order import Order
from heliostat.data.split import runs, split
from heliostat.errors import DataError
from heliostat.storage.locations import Location

GOLDEN = {
    0: "223 149b3147a72b3a4886d40feb",
    1: "None 9dc81554faa97891a606d958",
    2: "131 43dd44bf7dab41b28e08eb72",
    3: "None e45c006dce25d1cbb91193e1",
    4: "None e54770cc6a7df9c9336bc8ce",
    6: "None 81e195083eea30f834777401",
    7: "400 accccddeaebd90cd2ad72a78",
    8: "262 791b8cdc6cf4d8659b192e7c",
    9: "None de16db456bb6a8ff6a85f7aa",
    13: "None fea7172954c9e8ce3e61f1b8",
    14: "68 9c6cb7ee5129d0686d81d7a2",
    15: "None 3946dc9ef6b7e0ac819e9a2d",
    16: "None 37c970011d51a4cac477afc5",
    17: "None ea64d6f10ecf7132d0900fc6",
    18: "None d5da40525e27ca0c54b8d76b",
}
STUCK = (21, 51)  # version 1 found no end for these
SPLITS = {"tokens": "3fe1f3ffa78c7a0aeb15be49", "rows": "90f1bc0438057db7f0eba991"}
MANIFESTS = {
    "tokens": "f77c4d29a062f643c55ee4d4643733530fb5297c0e94e8c387efd94e8b974217",
    "rows": "696ce94b0c602a86ad972684028ef112a5b61ed880d5432a8f844948c8cb39d4",
}
PLAN = "a0ab90735568ab6f86c83441df30ef4f"


def case(seed: int) -> tuple:
    """Returns splits, mix, seed, shape, and caps of a random run: changes of weights, sources that run out, and batches of one
    source."""
    rng = np.random.default_rng([seed, 17])
    sources = int(rng.integers(1, 6))
    splits = []
    for _ in range(sources):
        n = int(rng.integers(1, 30))
        samples = rng.integers(0, 200, n)
        samples[0] = 200
        splits.append(runs(samples, rng.integers(0, 2**63, n).astype(np.uint64), float(rng.choice([0.0, 0.05, 0.3]))))
    first = int(rng.choice([0, 7]))
    starts = np.cumsum(rng.integers(1, 40, int(rng.integers(0, 4))))
    mix = [(first + int(s), [round(float(w), int(rng.integers(0, 4))) for w in rng.random(sources)]) for s in (0, *starts)]
    mix = [(s, [max(w, 0.0) if any(ws) else 1.0 for w in ws]) for s, ws in mix]
    caps = [None if rng.random() < 0.6 else float(rng.choice([0.5, 1, 2.25])) for _ in splits]
    lanes, per_lane, steps_per_block = (int(n) for n in rng.integers(1, 6, 3))
    unit = per_lane if rng.random() < 0.4 else 1
    shape = Shape(lanes * per_lane, lanes, steps_per_block, per_lane * steps_per_block * int(rng.integers(1, 8)), unit)
    return splits, mix, seed, shape, caps


def fingerprint(order: Order) -> str:
    """Returns the step at which the data runs out, and a digest of every sample of every step and of the held-out ones."""
    last = order.runs_out if order.runs_out is not None else order.sections[-1].first_step + 150
    h, steps, batch = hashlib.sha256(), range(order.sections[0].first_step, last), order.shape.batch
    found = order.locate(np.concatenate([order.step(step).ravel() for step in steps]))
    for number, step in enumerate(steps):
        for column in (found.source, found.epoch, found.chunk, found.row):
            h.update(column[number * batch :][:batch].astype("<i8").tobytes())
        h.update(order.consumed(step).astype("<i8").tobytes())
    held = order.held_out(50)
    h.update(np.stack([held.source, held.chunk, held.row]).astype("<i8").tobytes())
    return f"{order.runs_out} {h.hexdigest()[:24]}"


@pytest.mark.parametrize("seed", GOLDEN)
def test_a_run_of_version_1_keeps_its_sequence(seed):
    splits, mix, key, shape, caps = case(seed)
    assert fingerprint(Order(splits, mix, key, shape, caps, version=1)) == GOLDEN[seed]


@pytest.mark.parametrize("seed", STUCK)
def test_what_version_1_could_not_plan_is_planned_by_version_2_and_refused_by_version_1(seed):
    splits, mix, key, shape, caps = case(seed)
    order = Order(splits, mix, key, shape, caps)
    for step in range(mix[0][0], order.runs_out or 300, 7):
        order.step(step)
    with pytest.raises(DataError, match="version 1 of the data plan exceeds a source's max_epochs"):
        Order(splits, mix, key, shape, caps, version=1)


def listed(kind: str) -> Manifest:
    rng = np.random.default_rng(3)
    rows = [{"path": f"shards/{s:05d}.parquet", "row_group": g, "rows": int(rng.integers(1, 400)),
             "tokens": int(rng.integers(0, 9000)),
             "bytes": 7, "file_bytes": 99, "footer": hashlib.sha256(b"%d" % s).hexdigest()[:32]}
            for s in range(20) for g in range(5)]  # fmt: skip
    return Manifest(Location("/nowhere"), pa.Table.from_pylist(rows, schema=manifest.SCHEMA), {"kind": kind})


@pytest.mark.parametrize(("kind", "length"), [("tokens", 64), ("rows", None)])
def test_a_run_of_version_1_keeps_its_held_out_samples_and_its_dataset_its_digest(kind, length, tmp_path):
    """This also holds if the manifest's file was written before places existed."""
    made = listed(kind)
    assert manifest.digest(made.chunks, made.meta) == MANIFESTS[kind]
    written = manifest.write(Location(str(tmp_path)), made.chunks.to_pylist(), made.meta)
    file = tmp_path / manifest.FILE
    pq.write_table(pq.read_table(file).drop_columns(["place"]), file)
    found = manifest.read(written.location)
    assert found.digest == MANIFESTS[kind] and found.chunks.equals(written.chunks) and set(found.places.tolist()) == {-1}
    old = split(found, length, 0.05, version=1)
    assert hashlib.sha256(np.stack([old.samples, old.held, old.start]).astype("<i8").tobytes()).hexdigest()[:24] == SPLITS[kind]


def test_a_plan_without_a_version_is_of_version_1_and_keeps_its_digest():
    """The digest is in the run's receipts and checkpoints."""
    raw = {"uris": ["a"], "digests": ["d"], "mix": [[0, [1.0]]], "max_epochs": [None], "sequence_length": 64, "seed": 1,
           "held_fraction": 0.1, "shape": {"batch": 8, "lanes": 4, "superstep": 2, "window": 16, "unit": 1}}  # fmt: skip
    old = DataPlan.parse(raw)
    assert old.version == 1 and DataPlan.parse(old.dump()) == old and old.digest == PLAN
    new = dataclasses.replace(old, version=2)
    assert new.digest != old.digest and old.differences(new) == ["the version of the data plan: 1 -> 2"]
    for newer in ({"version": 3}, {"version": 3, "stride": 7, "skips": "none"}):  # whatever keys it has
        with pytest.raises(DataError, match=r"x: version 3 isn't supported; this heliostat reads 1 to 2\. Use a newer heliostat"):
            DataPlan.parse(raw | newer, "x")
    with pytest.raises(DataError, match=r"x: written by another version of heliostat \(unknown key 'stride'\)"):
        DataPlan.parse({**raw, "stride": 7}, "x")
    with pytest.raises(DataError, match=r"x: isn't a valid data plan \(version: 0"):
        DataPlan.parse({**raw, "version": 0}, "x")
