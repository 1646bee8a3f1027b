"""Tests receipts: every change of a step's training data changes its digest, but the number of workers doesn't."""

import json

import numpy as np
import pyarrow as pa
import pytest
from heliostat.data import receipt
from heliostat.data.order import SamplePlaces

FIELDS = ("source", "epoch", "chunk", "row")
KNOWN = (9819352960676977638, 5785857764399624621, "5ab3303ef98905215510730ba9ba556d", "4cde1d71491ff9197d576d937eb93df0")
OLD_ROWS = [14135654418251853381, 6618300805003389570, 14595473063413581146]


def some(rng: np.random.Generator, n: int, length: int = 8) -> tuple[SamplePlaces, np.ndarray]:
    places = {name: rng.integers(0, 100, n) for name in FIELDS}
    samples = SamplePlaces(np.arange(n), places["source"].astype(np.int16), places["epoch"].astype(np.int32),
                      places["chunk"].astype(np.int32), places["row"])  # fmt: skip
    return samples, rng.integers(0, 50_000, (n, length)).astype(np.int32)


def digests(samples: SamplePlaces, contents: np.ndarray) -> list[int]:
    return receipt.sample_digests(samples, contents).tolist()


@pytest.mark.parametrize("seed", range(10))
def test_any_changed_token_or_place_changes_its_samples_digest_and_no_other(seed):
    """One token, or one of source, epoch, chunk, and row, is changed by 1: exactly that sample's digest differs."""
    rng = np.random.default_rng(seed)
    samples, contents = some(rng, 20)
    before = digests(samples, contents)
    assert len(before) == 20 and len(set(before)) == 20
    for _ in range(30):
        i, j = int(rng.integers(20)), int(rng.integers(8))
        changed = contents.copy()
        changed[i, j] += 1
        assert [n for n, (a, b) in enumerate(zip(before, digests(samples, changed), strict=True)) if a != b] == [i]
    for name in FIELDS:
        i = int(rng.integers(20))
        fields = {f: getattr(samples, f).copy() for f in ("position", *FIELDS)}
        fields[name][i] += 1
        assert [n for n, (a, b) in enumerate(zip(before, digests(SamplePlaces(**fields), contents), strict=True)) if a != b] == [
            i
        ]


def test_a_samples_digest_does_not_depend_on_its_batch():
    """The digests of any subset, in any order and memory layout, equal that subset of all digests."""
    rng = np.random.default_rng(0)
    samples, contents = some(rng, 50)
    whole = receipt.sample_digests(samples, contents)
    for size in (0, 1, 7, 50):
        pick = rng.permutation(50)[:size]
        part = SamplePlaces(**{f: getattr(samples, f)[pick] for f in ("position", *FIELDS)})
        assert np.array_equal(receipt.sample_digests(part, contents[pick]), whole[pick])
        assert np.array_equal(receipt.sample_digests(part, np.asfortranarray(contents[pick])), whole[pick])


def test_a_lanes_digest_depends_on_the_samples_and_their_order():
    """Exchanging two samples, or changing or dropping one, changes it. It fits the int64 tensor that carries it."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        lane = rng.integers(0, 2**63, 6).astype(np.uint64)
        swapped, changed = lane[[1, 0, 2, 3, 4, 5]], lane ^ np.array([0, 0, 1, 0, 0, 0], np.uint64)
        made = [receipt.lane_digest(x) for x in (lane, swapped, changed, lane[:5])]
        assert len(set(made)) == 4
        assert np.array(made, dtype=np.int64).tolist() == made


@pytest.mark.parametrize("lanes", [1, 2, 4, 6, 12])
def test_step_digests_do_not_depend_on_the_number_of_workers(lanes):
    """Digests of virtual ranks, gathered from N workers (rank r processes the virtual ranks r mod N), give the same steps as one
    worker's."""
    rng = np.random.default_rng(lanes)
    steps = [[rng.integers(0, 2**63, 3).astype(np.uint64) for _ in range(lanes)] for _ in range(5)]
    alone = receipt.step_digests(np.array([[receipt.lane_digest(x) for x in step] for step in steps], dtype=np.int64))
    for workers in (n for n in range(1, lanes + 1) if lanes % n == 0):
        gathered = np.zeros((5, lanes), dtype=np.int64)
        for rank in range(workers):
            for lane in range(rank, lanes, workers):
                gathered[:, lane] = [receipt.lane_digest(step[lane]) for step in steps]
        assert receipt.step_digests(gathered) == alone
    if lanes > 1:
        assert receipt.step_digests(gathered[:, ::-1]) != alone, "lanes exchanged and nobody noticed"


def test_the_chain_can_be_extended_in_pieces_and_notices_every_change():
    """A run that resumes anywhere has the chain of an unbroken run. A changed, missing, repeated, or moved step breaks it."""
    rng = np.random.default_rng(0)
    steps = receipt.step_digests(rng.integers(-(2**63), 2**63, (30, 4)))
    whole = receipt.extend(receipt.GENESIS, steps)
    assert receipt.extend("", []) == ""
    for cut in range(31):
        assert receipt.extend(receipt.extend(receipt.GENESIS, steps[:cut]), steps[cut:]) == whole
    for i in range(29):
        for other in (
            steps[:i] + steps[i + 1 :],
            [*steps[:i], steps[i], *steps[i:]],
            [*steps[:i], steps[i + 1], steps[i], *steps[i + 2 :]],
            [*steps[:i], "00" * 16, *steps[i + 1 :]],
        ):
            assert receipt.extend(receipt.GENESIS, other) != whole


def test_the_sealed_receipt_holds_all_that_is_needed_to_check_it():
    """It is JSON with its version, the first step, the digests, the chain, and the data's digest, unchanged."""
    steps = receipt.step_digests(np.arange(8, dtype=np.int64).reshape(2, 4))
    chain = receipt.extend("", steps)
    assert json.loads(receipt.seal(40, steps, chain, "ab")) == {
        "first": 40,
        "steps": steps,
        "chain": chain,
        "data_digest": "ab",
        "version": receipt.VERSION,
    }


def test_digests_are_the_ones_that_they_always_were():
    """Compares known numbers. If this fails, earlier receipts can no longer be verified."""
    one = np.array([1], np.int64)
    samples = SamplePlaces(one, one.astype(np.int16), one.astype(np.int32), one.astype(np.int32), one)
    made = receipt.sample_digests(samples, np.array([[1, 2, 3]], np.int32))
    lane = receipt.lane_digest(made)
    (step,) = receipt.step_digests(np.array([[lane]], np.int64))
    assert (int(made[0]), lane, step, receipt.extend(receipt.GENESIS, [step])) == KNOWN


# rows ----------------------------------------------------------------------------------------------------------------


ONE = {
    "a": pa.array([b"x", None, b""], pa.binary()),
    "b": pa.array(["y", "", None]),
    "n": pa.array([1.5, None, -0.0], pa.float32()),
}


def row_digests(columns: dict[str, pa.Array], version: int = receipt.VERSION) -> list[int]:
    zero = np.zeros(3, np.int64)
    samples = SamplePlaces(zero, zero.astype(np.int16), zero.astype(np.int32), zero.astype(np.int32), zero)
    return receipt.sample_digests(samples, pa.table(columns), version).tolist()


@pytest.mark.parametrize(
    ("changed", "rows"),
    [
        ({**ONE, "a": pa.array([b"x", b"", b""], pa.binary())}, [1]),
        ({**ONE, "b": pa.array(["y", None, None])}, [1]),
        ({**ONE, "n": pa.array([1.5, 0.0, -0.0], pa.float32())}, [1]),
        ({**ONE, "n": pa.array([1.5, None, 0.0], pa.float32())}, [2]),
        ({**ONE, "n": ONE["n"].cast(pa.float64())}, [0, 1, 2]),
        ({**ONE, "b": ONE["b"].cast(pa.binary())}, [0, 1, 2]),
        ({**ONE, "a": ONE["a"].cast(pa.string())}, [0, 1, 2]),
        ({"b": ONE["a"], "a": ONE["b"], "n": ONE["n"]}, [0, 1, 2]),
        ({"b": ONE["b"], "a": ONE["a"], "n": ONE["n"]}, [0, 1, 2]),
        ({"c": ONE["a"], "b": ONE["b"], "n": ONE["n"]}, [0, 1, 2]),
        ({**ONE, "z": pa.nulls(3)}, [0, 1, 2]),
    ],
    ids=["null-empty bytes", "empty-null text", "null-zero", "zero's sign", "float64", "text-bytes", "bytes-text",
         "names swapped", "columns swapped", "renamed", "a column of nulls"],
)  # fmt: skip
def test_a_rows_digest_sees_names_types_and_nulls(changed, rows):
    """It also depends on values: exactly the changed rows have another digest."""
    pairs = zip(row_digests(ONE), row_digests(changed), strict=True)
    assert [i for i, (before, after) in enumerate(pairs) if before != after] == rows


def test_a_rows_digest_does_not_depend_on_how_arrow_holds_it():
    """In one chunk or several, as slices, with or without a dictionary; also for nested values and times."""
    when = pa.array([0, None, 10**18], pa.timestamp("ns", tz="Europe/Berlin"))
    nested = pa.array(
        [{"p": [1, None], "q": "x"}, None, {"p": None, "q": ""}], pa.struct({"p": pa.list_(pa.int8()), "q": pa.string()})
    )
    columns = {**ONE, "w": when, "s": nested}
    whole = row_digests(columns)
    table = pa.table(columns)
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 2)])
    assert row_digests(dict(zip(pieces.column_names, pieces.columns, strict=True))) == whole
    assert row_digests({**columns, "b": ONE["b"].dictionary_encode()}) == whole
    assert len(set(whole)) == 3


def test_receipts_of_version_1_have_the_digests_that_they_always_had():
    """Compares known numbers, for rows and for tokens: earlier runs are verified by their records."""
    columns = {"a": pa.array([b"x", None, b""], pa.binary()), "b": pa.array(["y", "", None]), "n": pa.array([1, 2, None])}
    assert row_digests(columns, 1) == OLD_ROWS
    one = np.array([1], np.int64)
    samples = SamplePlaces(one, one.astype(np.int16), one.astype(np.int32), one.astype(np.int32), one)
    tokens = np.array([[1, 2, 3]], np.int32)
    assert receipt.sample_digests(samples, tokens, 1) == receipt.sample_digests(samples, tokens, 2)


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_digests_of_lanes_come_in_the_lanes_order_from_any_number_of_workers(workers):
    """Worker r has the virtual ranks r, r + N, and so on. Together, they form the table of a single worker."""
    table = np.arange(5 * 6, dtype=np.int64).reshape(5, 6)
    assert np.array_equal(receipt.in_lane_order([table[:, rank::workers] for rank in range(workers)]), table)
