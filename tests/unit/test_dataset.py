"""Tests reading samples from real shards: exactly the tokens of the order, or an error that names the shard."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.config.spec import Job
from heliostat.data import content, manifest
from heliostat.data.dataset import DataPlan, Dataset, open_dataset, plan
from heliostat.data.mixing import Shape, choose_shape
from heliostat.data.receipt import sample_digests
from heliostat.data.split import split
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location

from tests.unit.build_job import job

LENGTH = 16


def make_dataset(folder: Path, seed: int, shards: int = 3, column: pa.DataType | None = None) -> manifest.Manifest:
    """Writes shards of documents with random lengths, in small row groups with checksummed pages, and their manifest."""
    rng, rows = np.random.default_rng(seed), []
    (folder / "shards").mkdir(parents=True)
    for s in range(shards):
        documents = [rng.integers(0, 60_000, rng.integers(1, 50)).tolist() for _ in range(int(rng.integers(20, 60)))]
        table = pa.table({"tokens": pa.array(documents, column or pa.list_(pa.uint16()))})
        path = f"shards/{s}.parquet"
        pq.write_table(table, folder / path, row_group_size=int(rng.integers(5, 25)), write_page_checksum=True)
        rows += manifest.read_footer(Location(str(folder)), path, "tokens")
    return manifest.write(Location(str(folder)), rows, {"kind": "tokens"})


def make_plan(*sources: manifest.Manifest, seed: int = 5, held: float = 0.1) -> DataPlan:
    return DataPlan(
        uris=tuple(str(s.location) for s in sources),
        digests=tuple(s.digest for s in sources),
        mix=((0, tuple(1.0 + i for i in range(len(sources)))),),
        max_epochs=(None,) * len(sources),
        sequence_length=LENGTH,
        seed=seed,
        held_fraction=held,
        shape=Shape(8, 4, 2, 32),
    )


def naive(source: manifest.Manifest, chunk: int, row: int) -> list[int]:
    """Returns the row-th LENGTH tokens of a row group, by reading the whole file and counting."""
    info = source.chunks.to_pylist()[chunk]
    group = pq.ParquetFile(source.location.join(info["path"]).path).read_row_group(info["row_group"])
    tokens = [t for document in group["tokens"].to_pylist() for t in document]
    return tokens[row * LENGTH : (row + 1) * LENGTH]


@pytest.mark.parametrize("column", [pa.list_(pa.uint16()), pa.list_(pa.int32()), pa.large_list(pa.uint32())], ids=str)
def test_reading_gives_exactly_the_located_tokens(tmp_path, column):
    """Training and held-out samples, over two sources and more than an epoch, equal those of a naive reader."""
    sources = [make_dataset(tmp_path / name, seed, column=column) for name, seed in (("a", 1), ("b", 2))]
    data = Dataset(make_plan(*sources, held=0.3))
    everything = np.arange(2 * int(data.order.epoch_samples.sum()))
    for samples in (data.order.locate(np.random.default_rng(0).permutation(everything)[:400]), data.order.held_out(10_000)):
        got = data.read(samples)
        assert got.dtype == np.int32 and got.shape == (len(samples), LENGTH) and len(samples) > 10
        for i in range(len(samples)):
            assert got[i].tolist() == naive(sources[samples.source[i]], samples.chunk[i], samples.row[i])


def test_an_epoch_and_the_held_out_samples_are_the_whole_dataset(tmp_path):
    """Every complete sequence of every row group is either trained on once or held out once."""
    source = make_dataset(tmp_path / "a", 3)
    data = Dataset(make_plan(source))
    train, held = data.order.locate(np.arange(int(data.order.epoch_samples[0]))), data.order.held_out(10_000)
    expected = [(c, r) for c, n in enumerate(source.chunks["tokens"].to_pylist()) for r in range(n // LENGTH)]
    got = [(int(c), int(r)) for s in (train, held) for c, r in zip(s.chunk, s.row, strict=True)]
    assert len(held) and sorted(got) == expected


def test_a_missing_shard_is_named(tmp_path):
    """DataError has the shard's path, without a traceback of the Parquet library."""
    source = make_dataset(tmp_path / "a", 1)
    data = Dataset(make_plan(source))
    (tmp_path / "a" / "shards" / "1.parquet").unlink()
    with pytest.raises(DataError, match=r"a/shards/1\.parquet: the shard is missing"):
        data.read(data.order.locate(np.arange(int(data.order.epoch_samples[0]))))


def test_a_turned_bit_in_any_page_is_noticed_and_the_shard_named(tmp_path):
    """A flipped bit anywhere in a row group's pages raises DataError, and never gives other tokens."""
    source = make_dataset(tmp_path / "a", 1, shards=1)
    data = Dataset(make_plan(source))
    file = tmp_path / "a" / "shards" / "0.parquet"
    raw, rng = file.read_bytes(), np.random.default_rng(0)
    samples = data.order.locate(np.arange(int(data.order.epoch_samples[0])))
    good, footer, refused = data.read(samples), int.from_bytes(raw[-8:-4], "little") + 8, 0
    for _ in range(60):
        damaged = bytearray(raw)
        damaged[4 + int(rng.integers(len(raw) - footer - 4))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(damaged))
        try:
            found = data.read(samples)
        except DataError as e:
            assert "a/shards/0.parquet" in str(e)
            refused += 1
        else:
            assert np.array_equal(found, good)
    assert refused > 40


@pytest.mark.parametrize("documents", [1, 40])
def test_a_shard_that_was_exchanged_is_noticed(tmp_path, documents):
    """For a valid Parquet file with fewer row groups or tokens than in the manifest, DataError names the file."""
    source = make_dataset(tmp_path / "a", 1, shards=1)
    data = Dataset(make_plan(source))
    short = pa.table({"tokens": pa.array([[1]] * documents, pa.list_(pa.uint16()))})
    pq.write_table(short, tmp_path / "a" / "shards" / "0.parquet", row_group_size=1)
    with pytest.raises(DataError, match=r"a/shards/0\.parquet"):
        data.read(data.order.locate(np.arange(int(data.order.epoch_samples[0]))))


def test_a_dataset_that_changed_under_the_run_is_refused(tmp_path):
    """The plan's digest must equal the manifest's. The error has both."""
    source = make_dataset(tmp_path / "a", 1)
    changed = dataclasses.replace(make_plan(source), digests=("0" * 64,))
    with pytest.raises(DataError, match=f"changed during the run \\(digest {source.digest[:12]}, was 000000000000\\)"):
        Dataset(changed)


def test_a_plan_survives_json_and_names_the_sequence(tmp_path):
    """parse(dump()) equals the plan. Its digest depends on everything except the datasets' locations."""
    made = make_plan(make_dataset(tmp_path / "a", 1), make_dataset(tmp_path / "b", 2))
    assert DataPlan.parse(made.dump()) == made and hash(DataPlan.parse(made.dump())) == hash(made)
    moved = dataclasses.replace(made, uris=("s3://x/a", "s3://x/b"))
    assert moved.digest == made.digest and made.differences(moved) == []
    others = [
        dataclasses.replace(made, digests=("0", "1")),
        dataclasses.replace(made, mix=((0, (1.0, 3.0)),)),
        dataclasses.replace(made, sequence_length=17),
        dataclasses.replace(made, seed=6),
        dataclasses.replace(made, held_fraction=0.2),
        *(dataclasses.replace(made, shape=dataclasses.replace(made.shape, **{f.name: 64})) for f in dataclasses.fields(Shape)),
    ]
    assert len({made.digest, *(o.digest for o in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 6}, "data.seed: 5 -> 6"),
        ({"mix": ((0, (2.0,)),)}, "data.sources weights and data.mix_schedule, as [step, weights]: [[0, [1.0]]] -> [[0, [2.0]]]"),
        ({"sequence_length": 32}, "data.sequence_length: 16 -> 32"),
        ({"held_fraction": 0.0}, "evaluate.fraction: 0.1 -> 0.0"),
        ({"digests": ("b",)}, "the datasets' content: ['a'] -> ['b']"),
        ({"shape": Shape(16, 4, 2, 32)}, "train.global_batch_size: 8 -> 16"),
        ({"shape": Shape(8, 8, 2, 32)}, "data.virtual_ranks: 4 -> 8"),
        ({"shape": Shape(8, 4, 1, 32)}, "steps per block: 2 -> 1"),
        ({"shape": Shape(8, 4, 2, 64)}, "data.shuffle_window: 32 -> 64"),
    ],
)
def test_differences_name_what_changed(change, line):
    """One line per change, in the words of the job file, and nothing else."""
    made = DataPlan(("x",), ("a",), ((0, (1.0,)),), (None,), LENGTH, 5, 0.1, Shape(8, 4, 2, 32))
    other = dataclasses.replace(made, **change)
    assert made.differences(other) == [line]
    assert made.differences(made) == []
    assert set(made.differences(dataclasses.replace(other, uris=("y",)))) == {line}


def plan_of(source: manifest.Manifest, recorded: DataPlan | None = None, **changes) -> DataPlan:
    made: Job = job(**{"data.sources.0.path": str(source.location), "data.sequence_length": LENGTH, **changes})
    return plan(made, [source], recorded)


def test_the_plan_does_not_depend_on_the_number_of_workers(tmp_path):
    """Any number of workers that divides the virtual ranks has the same plan, and so the same samples at every step."""
    source = make_dataset(tmp_path / "a", 1)
    batch = {"train.global_batch_size": 48, "train.micro_batch_size": 2}
    plans = [plan_of(source, **batch, **{"workers.count": n}) for n in (1, 2, 3, 4, 6, 8, 12, 24)]
    assert all(p == plans[0] for p in plans)
    assert plans[0].shape == choose_shape(48, 24, 4 * LENGTH)


def test_a_resumed_run_keeps_its_recorded_cut(tmp_path):
    """Keys that the job leaves open keep the run's values, even if micro_batch_size (and so the default virtual ranks)
    changed."""
    source = make_dataset(tmp_path / "a", 1)
    first = plan_of(source, **{"train.global_batch_size": 48, "train.micro_batch_size": 2, "data.shuffle_window": 999})
    for micro in (1, 2, 4, 8):
        again = plan_of(source, first, **{"train.global_batch_size": 48, "train.micro_batch_size": micro, "workers.count": 2})
        assert again == first and again.digest == first.digest
    with pytest.raises(ConfigError, match=r"workers\.count: 48 doesn't divide the run's 24 virtual ranks"):
        plan_of(source, first, **{"train.global_batch_size": 48, "train.micro_batch_size": 1, "workers.count": 48})


def test_the_split_follows_the_content_not_the_dataset_around_it(tmp_path):
    """A row group has the same held-out rows alone and in a dataset with shards before and after it."""
    whole = make_dataset(tmp_path / "a", 1, shards=4)
    part = dataclasses.replace(whole, row_groups=whole.chunks.slice(5, 6))
    one, other = split(whole, LENGTH, 0.2), split(part, LENGTH, 0.2)
    assert one.held[5:11].tolist() == other.held.tolist() and one.start[5:11].tolist() == other.start.tolist()
    assert other.held.sum() > 0


def test_row_groups_of_one_shard_are_split_independently(tmp_path):
    """A shard has one content digest, but its row groups have different places."""
    (tmp_path / "shards").mkdir()
    table = pa.table({"tokens": pa.array([[7] * LENGTH] * 3000, pa.list_(pa.uint16()))})
    pq.write_table(table, tmp_path / "shards" / "0.parquet", row_group_size=100)
    place = Location(str(tmp_path))
    source = manifest.write(place, manifest.read_footer(place, "shards/0.parquet", "tokens"), {"kind": "tokens"})
    held = split(source, LENGTH, 0.2).held
    assert set(held.tolist()) == {0, 100} and 0 < (held > 0).sum() < 15


def test_an_open_dataset_is_kept(tmp_path):
    """Fetch tasks run many times in a process. Equal plans share one Dataset."""
    made = make_plan(make_dataset(tmp_path / "a", 1))
    assert open_dataset(made) is open_dataset(DataPlan.parse(made.dump()))


def damage(file: Path, group: int) -> None:
    """Flips a bit in the middle of a row group's page."""
    column = pq.ParquetFile(file).metadata.row_group(group).column(0)
    raw = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    raw[start + column.total_compressed_size // 2] ^= 1
    file.write_bytes(bytes(raw))


@pytest.fixture
def damaged(tmp_path) -> tuple[Dataset, Dataset]:
    """Returns a dataset of two sources, and the same dataset with one damaged row group in the first source."""
    for name in ("whole", "broken"):
        sources = [make_dataset(tmp_path / name / s, seed) for s, seed in (("a", 1), ("b", 2))]
    broken = Dataset(make_plan(*sources))
    damage(tmp_path / "broken" / "a" / "shards" / "1.parquet", 0)
    whole = [manifest.read(Location(str(tmp_path / "whole" / s))) for s in "ab"]
    return Dataset(make_plan(*whole)), broken


def test_bad_samples_are_replaced_by_good_ones_of_their_source_and_window(damaged):
    """Every sample of a damaged row group, and no other, is replaced. The list records each replacement."""
    whole, broken = damaged
    positions = np.arange(3 * int(whole.order.epoch_samples.sum()))
    expected, got = whole.load(positions), broken.load(positions)
    replaced = {b.position: b for b in got.bad}
    chunk = {(b.source, b.chunk) for b in got.bad}
    planned = broken.order.locate(positions)
    assert len(chunk) == 1 and not expected.bad
    hit = [i for i in range(len(positions)) if (int(planned.source[i]), int(planned.chunk[i])) in chunk]
    assert sorted(replaced) == hit and hit
    for i in positions.tolist():
        if i not in replaced:
            assert np.array_equal(got.content[i], expected.content[i])
            continue
        by = replaced[i].by
        assert by[:2] not in chunk and by == (got.samples.source[i], got.samples.chunk[i], got.samples.row[i])
        assert got.content[i].tolist() == naive(broken.sources[by[0]], by[1], by[2])
        window = slice(*broken.order.window_at(i)[1:])
        assert by in set(zip(planned.source[window].tolist(), planned.chunk[window].tolist(), planned.row[window].tolist(),
                             strict=True))  # fmt: skip


def test_the_replacement_does_not_depend_on_what_is_read_together(damaged):
    """A resumed run reads only part of a window, and takes the same samples."""
    _, broken = damaged
    positions = np.arange(int(broken.order.epoch_samples.sum()))
    whole = broken.load(positions)
    for start in range(0, len(positions), 7):
        part = broken.load(positions[start : start + 23])
        assert np.array_equal(part.content, whole.content[start : start + 23])
        assert np.array_equal(part.samples.chunk, whole.samples.chunk[start : start + 23])


def test_bad_samples_can_be_refused(damaged):
    """`on_bad_sample: fail` names the shard and the row group."""
    with pytest.raises(DataError, match=r"a/shards/1\.parquet: row group \d+: cannot be read .*on_bad_sample"):
        damaged[1].load(np.arange(3 * int(damaged[1].order.epoch_samples.sum())), replace=False)


def test_a_token_outside_the_vocabulary_makes_its_own_sample_bad(tmp_path):
    """Such a token would crash the embedding. Only its own sample is replaced."""
    source = make_dataset(tmp_path / "a", 1)
    rows = source.chunks.to_pylist()
    made = manifest.write(source.location, rows, {"kind": "tokens", "vocab_size": 59_000})
    data = Dataset(make_plan(made))
    found = data.load(np.arange(int(data.order.epoch_samples[0])))
    assert found.content.max() < 59_000 and found.bad
    for b in found.bad:
        assert max(naive(made, b.chunk, b.row)) >= 59_000 and "outside the vocabulary of 59000" in b.reason


def test_nothing_to_replace_with_is_an_error(tmp_path):
    """If all samples of a window are bad, the error names one of them."""
    source = make_dataset(tmp_path / "a", 1, shards=1)
    data = Dataset(make_plan(source))
    file = tmp_path / "a" / "shards" / "0.parquet"
    for group in range(pq.ParquetFile(file).num_row_groups):
        damage(file, group)
    with pytest.raises(DataError, match="all samples of the shuffle window are bad"):
        data.load(np.arange(40))


def test_a_resumed_run_stays_on_its_version_of_the_dataset(tmp_path):
    """Shards that were added later don't affect a plan with the older digest."""
    old = make_dataset(tmp_path / "a", 1)
    made = make_plan(old)
    before = Dataset(made).read(Dataset(made).order.locate(np.arange(50)))
    manifest.write(old.location, old.chunks.to_pylist()[:5], {"kind": "tokens"})
    assert np.array_equal(before, Dataset(made).read(Dataset(made).order.locate(np.arange(50))))


def test_a_change_of_data_starts_a_new_sequence_with_the_weights_of_its_step(tmp_path):
    """The new sequence starts at the step of the change. Past changes of weights aren't planned again."""
    source = make_dataset(tmp_path / "a", 1)
    schedule = {"data.mix_schedule": [{"step": 10, "weights": [2.0]}, {"step": 30, "weights": [3.0]}]}
    first = plan_of(source, **schedule)
    assert first.mix == ((0, (1.0,)), (10, (2.0,)), (30, (3.0,)))
    made: Job = job(**{"data.sources.0.path": str(source.location), "data.sequence_length": LENGTH, **schedule})
    later = plan(made, [source], first, first_step=20)
    assert later.first_step == 20 and later.mix == ((20, (2.0,)), (30, (3.0,)))
    assert plan(made, [source], later) == later


def test_rows_are_read_replaced_and_hashed_like_tokens(tmp_path):
    """For a dataset of rows, each row of an epoch appears once, as an Arrow table. Valid rows replace those of a damaged row
    group."""
    (tmp_path / "shards").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for s in range(3):
        images = [rng.bytes(int(rng.integers(1, 300))) for _ in range(100)]
        captions = [f"{s}:{i}" for i in range(100)]
        table = pa.table({"image": pa.array(images, pa.binary()), "caption": captions})
        pq.write_table(table, tmp_path / "shards" / f"{s}.parquet", row_group_size=20, write_page_checksum=True)
        rows += manifest.read_footer(Location(str(tmp_path)), f"shards/{s}.parquet", None)
    source = manifest.write(Location(str(tmp_path)), rows, {"kind": "rows"})
    made = dataclasses.replace(make_plan(source, held=0.0), sequence_length=None)
    data = Dataset(made)
    whole = data.load(np.arange(300))
    assert sorted(whole.content["caption"].to_pylist()) == sorted(f"{s}:{i}" for s in range(3) for i in range(100))
    packed = content.unpack(content.pack(content.part(whole.content, slice(7, 19))), 12, tokens=False)
    assert packed.equals(whole.content.slice(7, 12))
    assert len(set(sample_digests(whole.samples, whole.content).tolist())) == 300
    damage(tmp_path / "shards" / "1.parquet", 2)
    again = Dataset(made).load(np.arange(300))
    bad = {b.position for b in again.bad}
    assert len(bad) == 20
    for i in range(300):
        same = again.content.slice(i, 1).equals(whole.content.slice(i, 1))
        assert same == (i not in bad) and again.content["caption"][i].as_py() is not None
