"""Tests batches of one source: every virtual rank's share of a step comes from one source, in an order as exact and elastic as
any other."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from heliostat.data import collection, manifest
from heliostat.data.mixing import Mixture, choose_shape
from heliostat.data.order import Order
from heliostat.data.split import whole
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location

from tests.unit.build_job import job


@pytest.mark.parametrize("unit", [1, 2, 5])
def test_a_mixture_of_units_counts_what_it_gives(unit):
    """counts(g) equals a count of the first g positions, and a unit belongs to one source."""
    mixture = Mixture([3.0, 1.0, 0.5], unit)
    sources, _ = mixture.lay_out(0, 400)
    for g in range(400):
        assert mixture.counts(g).tolist() == np.bincount(sources[:g], minlength=3).tolist()
    assert all(len(set(part)) == 1 for part in sources.reshape(-1, unit).tolist())


def order(sizes: list[list[int]], weights: list[float], batch: int, lanes: int, seed: int = 0, caps=None) -> Order:
    splits = [whole(np.array(s), np.ones(len(s)), 0.0) for s in sizes]
    return Order(splits, [(0, weights)], seed, choose_shape(batch, lanes, 400, 200, one_source=True), caps)


@pytest.mark.parametrize(("batch", "lanes"), [(8, 2), (12, 4), (6, 1)])
def test_every_lane_of_every_step_is_of_one_source_and_an_epoch_holds_each_sample_once(batch, lanes):
    """Weights are proportional to the sizes, so that the epochs of all sources end together."""
    sizes = [[30, 42, 48], [60], [20, 20, 20]]
    made = order(sizes, [120.0, 60.0, 60.0], batch, lanes)
    steps = 240 // batch
    found = [made.locate(made.step(t).ravel()) for t in range(steps)]
    for step in found:
        assert all(len(set(lane)) == 1 for lane in step.source.reshape(lanes, -1).tolist())
    whole = made.locate(np.arange(240))  # steps take places from all over their round
    places = list(zip(whole.source.tolist(), whole.epoch.tolist(), whole.chunk.tolist(), whole.row.tolist(), strict=True))
    assert len(set(places)) == 240 and {e for _, e, _, _ in places} == {0}
    assert len({tuple(f.source.reshape(lanes, -1)[:, 0]) for f in found}) > 1 or lanes == 1
    other = order(sizes, [120.0, 60.0, 60.0], batch, lanes, seed=1)
    assert (other.locate(other.step(0).ravel()).row != found[0].row).any()


def test_a_capped_source_never_gives_more_than_its_cap():
    made = order([[40], [200]], [1.0, 1.0], 8, 2, caps=[1.0, None])
    found = [made.locate(made.step(t).ravel()) for t in range(30)]
    counts = np.bincount(np.concatenate([f.source for f in found]), minlength=2)
    assert counts[0] <= 40 and counts[0] > 30


def rows(path: str, groups: int, size: int) -> list[dict]:
    footer = path[:4].encode().hex() * 4
    return [{"path": path, "row_group": g, "rows": size, "tokens": 0, "bytes": 10, "file_bytes": 99, "footer": footer}
            for g in range(groups)]  # fmt: skip


@pytest.fixture
def buckets(tmp_path) -> Path:
    meta = {"name": "pictures", "kind": "rows", "content": "images", "channels": 3,
            "parts": {"8x16": {"size": [8, 16]}, "16x8": {"size": [16, 8]}, "12x12": {"size": [12, 12]}}}  # fmt: skip
    made = rows("8x16/shards/0.parquet", 3, 10) + rows("16x8/shards/0.parquet", 1, 10)
    collection.write(Location(str(tmp_path / "set")), made, meta)
    return tmp_path / "set"


def test_a_collection_is_complete_datasets_and_one_digest(buckets):
    """A part without images doesn't exist. Each part is a dataset, and the whole collection has a digest."""
    whole = manifest.read(Location(str(buckets)))
    assert whole.kind == "collection" and whole.meta["parts"] == {"8x16": 30, "16x8": 10} and whole.rows == 40
    part = manifest.read(Location(str(buckets / "8x16")))
    assert (part.kind, part.rows, part.meta["size"], part.meta["documents"]) == ("rows", 30, [8, 16], 30)
    assert part.chunks["path"].to_pylist() == ["shards/0.parquet"] * 3
    with pytest.raises(DataError):
        manifest.read(Location(str(buckets / "12x12")))
    assert whole.meta["digests"]["8x16"] == part.digest


def test_a_part_that_is_not_the_one_that_its_collection_lists_is_refused(buckets):
    """For example, while a `prepare` publishes the parts and then the collection: parts of two versions never mix."""
    place = Location(str(buckets / "8x16"))
    manifest.write(place, rows("shards/1.parquet", 3, 10), manifest.read(place).meta)
    with pytest.raises(
        ConfigError,
        match=r"data.sources: .*set: part 8x16 has digest .*\. A `heliostat data prepare` .* Run `heliostat data prepare` again",
    ):
        collection.expand(job(**{"data.sequence_length": None, "data.sources": [{"path": str(buckets)}]}))


def test_a_run_keeps_the_version_of_a_collection_that_it_began_with(buckets):
    """A later `prepare` doesn't change its parts, their shares, and their digests."""
    from heliostat.data.dataset import plan

    base = {
        "data.sequence_length": None,
        "data.sources": [{"path": str(buckets)}],
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
    }
    began = collection.expand(job(**base))
    recorded = plan(began, [manifest.read(Location(s.path)) for s in began.data.sources])
    place, meta = Location(str(buckets)), manifest.read(Location(str(buckets))).meta
    more = rows("8x16/shards/1.parquet", 9, 10) + rows("12x12/shards/0.parquet", 2, 10)
    kept = {k: v for k, v in meta.items() if k not in ("digest", "digests")}
    sizes = {"8x16": {"size": [8, 16]}, "12x12": {"size": [12, 12]}}
    collection.write(place, more, {**kept, "parts": sizes})
    assert collection.expand(job(**base), recorded) == began
    assert [Path(s.path).name for s in collection.expand(job(**base)).data.sources] == ["12x12", "8x16"]
    manifest.write(place.join("8x16"), rows("shards/2.parquet", 1, 10), manifest.read(place.join("8x16")).meta)  # half published
    assert collection.expand(job(**base), recorded) == began


def test_a_job_gets_a_collections_parts_with_their_share_of_the_weight(buckets, tmp_path):
    base = {"data.sequence_length": None, "train.global_batch_size": 8, "train.micro_batch_size": 4}
    plain = job(**base)
    assert collection.expand(plain) is plain
    sources = [{"path": str(buckets), "weight": 2.0}, {"path": str(tmp_path / "other"), "weight": 1.0, "max_epochs": 3.0}]
    schedule = [{"step": 5, "weights": [0.0, 1.0]}]
    made = collection.expand(job(**base, **{"data.sources": sources, "data.mix_schedule": schedule}))
    assert [(Path(s.path).name, s.weight, s.max_epochs) for s in made.data.sources] == [
        ("16x8", 0.5, None), ("8x16", 1.5, None), ("other", 1.0, 3.0)]  # fmt: skip
    assert made.data.mix_schedule[0].weights == [0.0, 0.0, 1.0] and made.data.one_source_batches
    with pytest.raises(ConfigError, match=r"data\.sources: a collection contains images\. Remove data\.sequence_length"):
        collection.expand(job(**{"data.sources": sources}))


def test_a_micro_batch_must_divide_a_lanes_share(buckets):
    from heliostat.data.dataset import plan

    made = collection.expand(
        job(**{"data.sequence_length": None, "data.sources": [{"path": str(buckets)}], "data.virtual_ranks": 4})
    )
    manifests = [manifest.read(location) for location in made.sources]
    assert plan(made, manifests).shape.unit == 2
    wide = made.model_copy(update={"train": made.train.model_copy(update={"micro_batch_size": 4})})
    with pytest.raises(ConfigError, match=r"train.micro_batch_size: 4 doesn't divide the 2 samples of a virtual rank"):
        plan(wide, manifests)


def test_the_plan_says_when_batches_are_of_one_source(buckets):
    from heliostat.data.dataset import DataPlan, plan

    made = collection.expand(job(**{"data.sequence_length": None, "data.sources": [{"path": str(buckets)}]}))
    manifests = [manifest.read(location) for location in made.sources]
    one = plan(made, manifests)
    mixed = plan(made.model_copy(update={"data": made.data.model_copy(update={"one_source_batches": False})}), manifests)
    assert DataPlan.parse(one.dump()) == one and one.digest != mixed.digest
    assert any("one_source_batches" in line for line in mixed.differences(one))
    assert list(itertools.chain(one.uris)) == [s.path for s in made.data.sources]
