"""Tests the held-out split: complete documents, by the hash of their text, for any sequence length, fraction, and other data."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.data.dataset import DataPlan, Dataset
from heliostat.data.manifest import Manifest
from heliostat.data.mixing import Shape
from heliostat.data.split import growing_runs, hash64, runs, split, whole
from heliostat.storage.locations import Location

from tests.seeds import every_seed

PARTS = (0.01, 0.05, 0.1, 0.2, 0.5)


def text_hash(number: int) -> str:
    return hashlib.sha256(b"document %d" % number).hexdigest()


def prepared(folder: Path, documents: int, chunk_tokens: int = 900, shards: int = 3) -> Manifest:
    """Writes a dataset like `prepare`, in which all tokens of document n are n."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, documents)
    order = sorted(range(documents), key=text_hash)
    rows = []
    for shard in range(shards):
        mine = [n for n in order if int(text_hash(n)[:13], 16) * shards >> 52 == shard]
        places = np.array([manifest.place(text_hash(n)) for n in mine])
        data = tokens.shard([str(n) for n in mine], [np.full(lengths[n], n, np.int32) for n in mine], chunk_tokens, places)
        place = Location(str(folder)).join(f"shards/{shard:05d}.parquet")
        place.write(data)
        rows += manifest.read_footer(Location(str(folder)), f"shards/{shard:05d}.parquet", "tokens")
    return manifest.write(Location(str(folder)), rows, {"kind": "tokens"})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepared(tmp_path_factory.mktemp("documents"), 2000)


def sides(source: Manifest, length: int, fraction: float, version: int = 2) -> tuple[set[int], set[int]]:
    """Returns (documents that are trained on, held-out documents), from the tokens."""
    plan = DataPlan((str(source.location),), (source.digest,), ((0, (1.0,)),), (None,), length, 5, fraction, Shape(8, 4, 2, 32),
                    version=version)  # fmt: skip
    data = Dataset(plan)
    train = data.read(data.order.locate(np.arange(int(data.order.epoch_samples[0]))))
    return set(train.ravel().tolist()), set(data.read(data.order.held_out(10**6)).ravel().tolist())


@pytest.mark.parametrize("fraction", PARTS)
def test_no_held_out_token_is_of_a_document_that_is_trained_on(source, fraction):
    """The two sides share no document. The held-out ones are exactly those whose hash is below the fraction, at any sequence
    length."""
    below = {n for n in range(2000) if manifest.place(text_hash(n)) < fraction * manifest.PLACES}
    for length in (16, 64, 256):
        train, held = sides(source, length, fraction)
        assert held and held <= below and not train & below
        assert len(train | held) > 1900 or length > 64
    held_chunks = {length: (split(source, length, fraction).held > 0).tolist() for length in (4, 8, 16)}
    assert len({str(h) for h in held_chunks.values()}) == 1
    assert abs(len(below) - 2000 * fraction) < 5 * np.sqrt(2000 * fraction)


def test_the_split_of_version_1_held_out_parts_of_documents_that_were_trained_on(tmp_path):
    """The same check shows the fault that the split by document fixed."""
    source = prepared(tmp_path, 400)
    train, held = sides(source, 16, 0.05, version=1)
    assert len(held & train) > len(held) / 2


def test_what_is_held_out_at_one_length_is_not_trained_on_at_another(source):
    """Documents held out at 16 tokens and 0.05 are also held out at 256 tokens, and at every larger fraction."""
    _, held = sides(source, 16, 0.05)
    for length, fraction in ((256, 0.05), (64, 0.1), (256, 0.2), (33, 0.07)):
        train, _ = sides(source, length, fraction)
        assert not train & held


def test_a_document_stays_on_its_side_when_others_come_and_chunks_are_cut_otherwise(tmp_path):
    small, large = prepared(tmp_path / "a", 800), prepared(tmp_path / "b", 2000, chunk_tokens=2500, shards=7)
    for fraction in PARTS:
        (train, held), (more_train, more_held) = sides(small, 16, fraction), sides(large, 16, fraction)
        assert not train & more_held and not held & more_train


@every_seed(20)
def test_what_a_fraction_holds_out_every_larger_one_does(seed):
    """For complete row groups and for runs of rows. A larger fraction doesn't cause samples to be trained on twice."""
    rng = np.random.default_rng(seed)
    samples, identity = rng.integers(0, 40, 50), rng.integers(0, 2**63, 50).astype(np.uint64)
    for make, key in ((whole, rng.random(50)), (growing_runs, identity)):
        before: set[tuple[int, int]] = set()
        for fraction in (0.001, 0.01, 0.013, 0.1, 0.5, 0.99):
            made = make(samples, key, fraction)
            chunk = np.repeat(np.arange(50), made.held)
            held = set(zip(chunk.tolist(), made.held_rows(chunk, _numbers(made.held)).tolist(), strict=True))
            chunk = np.repeat(np.arange(50), made.train)
            train = set(zip(chunk.tolist(), made.train_rows(chunk, _numbers(made.train)).tolist(), strict=True))
            assert before <= held and not held & train and len(held) + len(train) == samples.sum()
            assert {r < samples[c] for c, r in held | train} == {True}
            before = held


def _numbers(sizes: np.ndarray) -> np.ndarray:
    """Returns 0 to n-1 for each size."""
    return np.concatenate([np.arange(n) for n in sizes])


def test_held_out_samples_stay_when_chunks_are_appended():
    """If a dataset grows, or is listed in another order, every old row group keeps its split."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        samples, identity = rng.integers(0, 500, 60), rng.integers(0, 2**63, 60).astype(np.uint64)
        fraction = float(rng.choice([0.001, 0.01, 0.2, 0.9]))
        whole, old = growing_runs(samples, identity, fraction), growing_runs(samples[:40], identity[:40], fraction)
        assert np.array_equal(whole.held[:40], old.held) and np.array_equal(whole.start[:40], old.start)
        mixed = rng.permutation(60)
        other = growing_runs(samples[mixed], identity[mixed], fraction)
        assert np.array_equal(other.held, whole.held[mixed]) and np.array_equal(other.start, whole.start[mixed])


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("make", [growing_runs, runs])
def test_the_held_out_share_is_right_however_small_the_chunks(fraction, size, make):
    """Over many row groups, the held-out total is the fraction of all samples, within five standard deviations."""
    n = 40_000
    held = make(np.full(n, size), hash64(np.arange(n)), fraction).held.sum()
    assert abs(held - n * size * fraction) < 5 * np.sqrt(n * 0.25)
