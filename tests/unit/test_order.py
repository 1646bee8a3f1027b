"""Tests the order of samples, a pure function of (chunk sizes, weights, seed, step), by properties over many random orders."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from heliostat.data import mixing, order
from heliostat.data.mixing import Mixture, Shape, choose_shape
from heliostat.data.order import Order, SamplePlaces, permutation
from heliostat.data.split import Split, growing_runs, hash64, runs, whole
from heliostat.errors import ConfigError, DataError

from tests.seeds import every_seed

EPOCHS = 3
WEIGHTS = ([1.0], [1.0, 1.0], [0.7, 0.3], [3.0, 2.0, 1.0], [0.05, 0.9, 0.05], [1.0, 1e-2], [0.123, 0.456, 0.421, 2.0])

# (source, epoch, chunk, row)
GOLDEN_HELD = [[1, 1, 0, 1], [1, 1]]
GOLDEN_START = [[3, 1, 0, 4], [0, 0]]
GOLDEN_PATTERN = [0, 1, 0, 0, 2, 0, 1, 0]
GOLDEN_ORDER = [
    [0, 0, 0, 2], [1, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 4], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 3, 0],
    [1, 0, 0, 3], [0, 0, 3, 3], [0, 0, 3, 1], [1, 0, 1, 1], [0, 0, 3, 5], [0, 0, 3, 2], [1, 0, 1, 2],
    [0, 0, 1, 2], [0, 0, 1, 0], [1, 0, 1, 3], [0, 1, 1, 2], [0, 1, 1, 0], [1, 1, 1, 2], [0, 1, 3, 0],
    [0, 1, 3, 1], [1, 1, 1, 1], [0, 1, 3, 2],
]  # fmt: skip


def split_of(rng: np.random.Generator, chunks: int, fraction: float, largest: int = 30) -> Split:
    """Returns a source with chunks of uneven sizes (some empty), and at least one sample to train on."""
    samples = rng.integers(0, largest, chunks)
    samples[0] = largest
    identity = rng.integers(0, 2**63, chunks).astype(np.uint64)
    if rng.random() < 0.3:
        return whole(samples, np.concatenate([[1.0], rng.random(chunks - 1)]), fraction)
    return (growing_runs if rng.random() < 0.7 else runs)(samples, identity, fraction)


def random_order(seed: int, weights: list[float] | None = None) -> Order:
    """Returns an order with any number of sources, chunks, and virtual ranks. Windows and epochs end at unrelated places."""
    rng = np.random.default_rng(seed)
    weights = weights or WEIGHTS[seed % len(WEIGHTS)]
    splits = [split_of(rng, int(rng.integers(1, 12)), float(rng.choice([0.0, 0.1, 0.3]))) for _ in weights]
    lanes, per_lane, steps_per_block = (int(n) for n in rng.integers(1, 6, 3))
    block = per_lane * steps_per_block
    return Order(splits, [(0, weights)], seed, Shape(lanes * per_lane, lanes, steps_per_block, block * int(rng.integers(1, 8))))


@functools.cache
def located(seed: int) -> tuple[Order, np.ndarray]:
    """Returns a random order, and the first rows of its sequence: EPOCHS of every source, and at least 4000 samples."""
    o = random_order(seed)
    mixture = o.sections[0].mixture
    periods = int(max(EPOCHS * n / share for n, share in zip(o.epoch_samples, mixture.parts, strict=True)) + 2)
    return o, rows(o.locate(np.arange(max(4000, periods * mixture.period))))


def rows(samples: SamplePlaces) -> np.ndarray:
    """Returns (source, epoch, chunk, row) of every sample."""
    return np.stack([samples.source, samples.epoch, samples.chunk, samples.row], axis=1).astype(np.int64)


def in_steps(o: Order, steps: Iterable[int]) -> np.ndarray:
    """Returns the rows of all samples of these steps, in order."""
    return rows(o.locate(np.concatenate([np.zeros(0, np.int64), *(o.step(step).ravel() for step in steps)])))


def training_rows(split: Split) -> set[tuple[int, int]]:
    """Returns (chunk, row) of all samples that aren't held out, from the definition."""
    return {(c, r) for c in range(len(split.samples)) for r in range(split.samples[c])} - held_rows(split)


def held_rows(split: Split) -> set[tuple[int, int]]:
    return {(c, (split.start[c] + i) % split.samples[c]) for c in range(len(split.samples)) for i in range(split.held[c])}


@every_seed(40)
def test_every_sample_comes_exactly_once_an_epoch(seed):
    """Each finished epoch of each source is a permutation of its training samples, for any ends of windows."""
    o, found = located(seed)
    for s, split in enumerate(o.splits):
        mine = found[found[:, 0] == s]
        assert np.all(np.diff(mine[:, 1]) >= 0), "an epoch began before the one before it ended"
        for epoch in range(EPOCHS):
            seen = [tuple(x) for x in mine[mine[:, 1] == epoch][:, 2:].tolist()]
            assert len(seen) == len(set(seen)) == o.epoch_samples[s]
            assert set(seen) == training_rows(split)


@every_seed(40)
def test_held_out_samples_never_appear_in_training(seed):
    """Evaluation samples are held-out rows, and training never uses those."""
    o, found = located(seed)
    trained = {tuple(x) for x in found[:4000, [0, 2, 3]].tolist()}
    held = {(s, c, r) for s, split in enumerate(o.splits) for c, r in held_rows(split)}
    assert not trained & held
    for count in (1, 7, 100, 100_000):
        evaluated = [tuple(x) for x in rows(o.held_out(count))[:, [0, 2, 3]].tolist()]
        assert set(evaluated) <= held
        assert len(evaluated) == len(set(evaluated)) <= count
    assert set(evaluated) == held, "asked for more than there are, it gives them all"


@every_seed(40)
def test_global_batch_does_not_depend_on_the_number_of_workers(seed):
    """The parts that N workers take from the blocks of their virtual ranks are together step(t), for every N that divides the
    virtual ranks."""
    o = random_order(seed)
    shape = o.shape
    for workers in (n for n in range(1, shape.lanes + 1) if shape.lanes % n == 0):
        for step in range(2 * shape.steps_per_block + 1):
            number, inner = divmod(step, shape.steps_per_block)
            played = np.full((shape.lanes, shape.per_lane), -1)
            for rank, lane in ((r, lane) for r in range(workers) for lane in range(r, shape.lanes, workers)):
                assert lane % workers == rank
                assert np.all(played[lane] == -1), "two workers play one lane"
                block = o.block(number * shape.lanes + lane)
                played[lane] = block[inner * shape.per_lane : (inner + 1) * shape.per_lane]
            assert np.array_equal(played, o.step(step))


@every_seed(40)
def test_envelopes_and_steps_both_tile_the_sequence(seed):
    """The blocks of S rounds, and their S * K steps, each cover the first S * K * G positions once."""
    o = random_order(seed)
    shape, rounds = o.shape, 3
    every = np.arange(rounds * shape.steps_per_block * shape.batch)
    assert np.array_equal(np.concatenate([o.block(b) for b in range(rounds * shape.lanes)]), every)
    steps = [o.step(t) for t in range(rounds * shape.steps_per_block)]
    assert all(s.shape == (shape.lanes, shape.per_lane) for s in steps)
    assert np.array_equal(np.sort(np.concatenate([s.ravel() for s in steps])), every)


@every_seed(40)
def test_any_subset_is_located_as_in_the_whole(seed):
    """Random access: a position's sample doesn't depend on other positions, their order, or earlier requests."""
    fresh, whole = random_order(seed), located(seed)[1]
    rng = np.random.default_rng(seed)
    for size in (1, 2, 50, 700):
        subset = rng.integers(0, 1500, size)
        found = fresh.locate(subset)
        assert np.array_equal(found.position, subset)
        assert np.array_equal(rows(found), whole[subset])


@every_seed(40)
def test_a_window_holds_the_samples_of_its_stretch_of_the_stream(seed):
    """The shuffle stays inside a window: its chunks are those of the unshuffled stream at that place, so reads stay few."""
    o = random_order(seed)
    window = o.shape.window
    for number in range(6):
        found = o.locate(np.arange(number * window, (number + 1) * window))
        first, last = (o.sections[0].mixture.counts(n * window) for n in (number, number + 1))
        for s, split in enumerate(o.splits):
            mine = found.source == s
            expected: set[tuple[int, int]] = set()
            for index in range(first[s], last[s]):
                epoch, place = divmod(index, int(o.epoch_samples[s]))
                chunks = permutation(len(split.train), *o.key, order.CHUNKS, s, epoch)
                expected.add((epoch, int(chunks[np.searchsorted(np.cumsum(split.train[chunks]), place, side="right")])))
            assert set(zip(found.epoch[mine].tolist(), found.chunk[mine].tolist(), strict=True)) == expected


@pytest.mark.parametrize("size", [0, 1, 2, 3, 17, 1000, 4097])
def test_a_permutation_is_one_and_its_key_decides_it(size):
    """Every number occurs once, and the same key gives the same permutation. Another seed, purpose, source, epoch, or window
    gives another."""
    keys = list(itertools.product((0, 1, 2**32 - 1), (1, 2), (0, 1), (0, 1)))
    made = [permutation(size, *key) for key in keys]
    assert all(np.array_equal(np.sort(p), np.arange(size)) for p in made)
    assert all(np.array_equal(p, permutation(size, *key)) for p, key in zip(made, keys, strict=True))
    if size >= 17:
        assert len({p.tobytes() for p in made}) == len(keys)


def test_permutations_are_uniform():
    """Over many keys, each element takes each place about equally often (chi-square far from its tail)."""
    size, keys = 12, 6000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permutation(size, 5, key)] += 1
    expected = keys / size
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 6 * np.sqrt(2 * freedom)


def test_different_seeds_and_epochs_give_different_orders():
    """No two of 20 seeds, and no two of a run's 5 epochs, give the same order."""
    split = whole(np.full(10, 20), np.ones(10), 0.0)
    shape = Shape(10, 2, 5, 50)
    orders = [rows(Order([split], [(0, [1.0])], seed, shape).locate(np.arange(1000)))[:, 2:] for seed in range(20)]
    assert len({o.tobytes() for o in orders}) == 20
    assert len({epoch.tobytes() for epoch in orders[0].reshape(5, 200, 2)}) == 5


def test_the_order_is_the_one_that_it_always_was():
    """Compares known numbers. If this fails, earlier runs can no longer be resumed or verified."""
    splits = [
        runs(np.array([5, 3, 0, 6]), np.array([11, 12, 13, 14], np.uint64), 0.2),
        runs(np.array([4, 4]), np.array([2**63 + 1, 7], np.uint64), 0.2),
    ]
    assert [s.held.tolist() for s in splits] == GOLDEN_HELD
    assert [s.start.tolist() for s in splits] == GOLDEN_START
    o = Order(splits, [(0, [2.0, 1.0])], 17, Shape(4, 2, 2, 8))
    assert rows(o.locate(np.arange(24))).tolist() == GOLDEN_ORDER
    assert o.step(3).tolist() == [[10, 11], [14, 15]]
    assert Mixture([5.0, 2.0, 1.0]).lay_out(0, 8)[0].tolist() == GOLDEN_PATTERN


def test_held_out_evaluation_does_not_depend_on_the_seed_or_the_shape():
    """The evaluation set is the same for every data seed, batch, and number of virtual ranks."""
    for seed in range(40):
        o = random_order(seed)
        other = Order(o.splits, [(0, WEIGHTS[seed % len(WEIGHTS)])], seed + 1000, Shape(7, 7, 3, 6))
        assert np.array_equal(rows(o.held_out(50)), rows(other.held_out(50)))


def test_held_out_evaluation_is_spread_over_the_dataset():
    """A few samples come from all parts of the dataset, not from its first chunks, and from the sources by weight."""
    splits = [growing_runs(np.full(500, 40), hash64(np.arange(s, 500 + s)), 0.1) for s in (0, 999)]
    found = Order(splits, [(0, [3.0, 1.0])], 0, Shape(1, 1, 1, 1)).held_out(200)
    assert np.bincount(found.source).tolist() == [150, 50]
    for s, count in ((0, 150), (1, 50)):
        tenths = np.bincount(found.chunk[found.source == s] // 50, minlength=10)
        assert np.all(np.abs(tenths - count / 10) <= 3 + count / 50)


def test_a_source_without_training_samples_is_refused():
    """An empty source would be asked for samples forever. The error names it."""
    good, empty = (whole(np.array(n), np.ones(2), 0.0) for n in ([3, 4], [0, 0]))
    with pytest.raises(ConfigError, match=r"data\.sources\.1: no training sample left"):
        Order([good, empty], [(0, [1.0, 1.0])], 0, Shape(1, 1, 1, 1))


def test_the_shape_that_is_chosen_is_sound():
    """Windows are complete blocks of at least the requested size, rounds have 1 to 128 steps, and blocks are megabytes."""
    rng = np.random.default_rng(3)
    for _ in range(2000):
        lanes, per_lane = int(rng.integers(1, 600)), int(rng.integers(1, 70))
        sample_bytes = int(rng.choice([1, 512, 1024, 4096, 32_768, 10**6, 10**8]))
        window = None if rng.random() < 0.5 else int(rng.integers(1, 100_000))
        shape = choose_shape(lanes * per_lane, lanes, sample_bytes, window)
        assert (shape.batch, shape.lanes, shape.per_lane) == (lanes * per_lane, lanes, per_lane)
        assert shape.window % shape.block == 0 and shape.block == shape.steps_per_block * per_lane
        assert 1 <= shape.steps_per_block <= mixing.MAX_STEPS_PER_BLOCK
        assert shape.steps_per_block == 1 or shape.block * sample_bytes <= mixing.BLOCK_BYTES
        wanted = window or mixing.WINDOW_BYTES // sample_bytes
        assert wanted <= shape.window < max(wanted, 1) + shape.block


def changing_order(seed: int) -> Order:
    """Returns an order whose weights change at odd steps, some to zero, with sources that may run out."""
    rng = np.random.default_rng(seed)
    sources = int(rng.integers(1, 4))
    splits = [split_of(rng, int(rng.integers(1, 12)), 0.1) for _ in range(sources)]
    starts = np.cumsum(rng.integers(1, 30, int(rng.integers(1, 5))))
    first = int(rng.integers(0, 50))
    mix = []
    for start in [0, *starts]:
        weights = rng.choice([0.0, 1.0, 2.0, 0.5], sources)
        weights[rng.integers(0, sources)] = 1.0
        mix.append((first + int(start), weights.tolist()))
    epochs = [None if rng.random() < 0.5 else float(rng.choice([0.5, 1, 2, 3.5])) for _ in splits]
    epochs[0] = None if rng.random() < 0.7 else 4.0
    lanes, per_lane, steps_per_block = (int(n) for n in rng.integers(1, 4, 3))
    block = per_lane * steps_per_block
    shape = Shape(lanes * per_lane, lanes, steps_per_block, block * int(rng.integers(1, 8)))
    return Order(splits, mix, seed, shape, epochs)


def last_step(o: Order) -> int:
    """Returns the step at which the data runs out, or else a window starts, so that no window is split."""
    if o.runs_out is not None:
        return o.runs_out
    step = o.sections[-1].first_step + 40
    while (inside := o.round_of(step)).first_step != step or o.blocks(o.window_of(inside.block))[0] != inside.block:
        step += 1
    return step


@every_seed(30)
def test_steps_use_every_position_once_however_weights_change(seed):
    """Rounds tile the steps and the positions. Blocks and windows tile the positions in order."""
    o = changing_order(seed)
    first, last = o.sections[0].first_step, last_step(o)
    step, position, block = first, 0, 0
    while step < last:
        inside = o.round_of(step)
        assert (inside.first_step, inside.begin, inside.block) == (step, position, block)
        found = np.concatenate([o.step(t) for t in range(step, step + inside.steps)], axis=1)
        assert np.array_equal(np.sort(found.ravel()), np.arange(inside.begin, inside.end))
        for lane in range(o.shape.lanes):
            assert np.array_equal(found[lane], o.block(block + lane))
            window = o.window_of(block + lane)
            assert block + lane in o.blocks(window)
            assert {o.window_at(int(p))[0] for p in found[lane]} == {window}
        step, position, block = step + inside.steps, inside.end, block + o.shape.lanes
    windows = [o.blocks(w) for w in range(o.window_of(block - 1))]
    assert [e for w in windows for e in w] == list(range(sum(len(w) for w in windows)))


@every_seed(30)
def test_a_change_of_weights_falls_on_its_step_and_no_sample_is_lost_or_repeated(seed):
    """A step uses only the sources with a weight. Each source's epochs are complete and exact, and caps hold."""
    o = changing_order(seed)
    first, last = o.sections[0].first_step, last_step(o)
    sections = {s.first_step: s for s in o.sections}
    every, current = in_steps(o, range(first, last)), o.sections[0]
    for step, found in zip(range(first, last), every.reshape(-1, o.shape.batch, 4), strict=True):
        current = sections.get(step, current)
        assert set(found[:, 0]) <= set(np.flatnonzero(current.mixture.parts).tolist())
    assert len(np.unique(every, axis=0)) == len(every)
    taken = np.bincount(every[:, 0], minlength=len(o.splits))
    assert np.array_equal(taken, o.consumed(last) if last != o.runs_out else taken)
    for s, split in enumerate(o.splits):
        mine = every[every[:, 0] == s]
        for epoch in range(int(taken[s] // o.epoch_samples[s])):
            assert {tuple(r) for r in mine[mine[:, 1] == epoch][:, 2:].tolist()} == training_rows(split)


@every_seed(30)
def test_a_capped_source_gives_its_epochs_and_no_more(seed):
    """It never exceeds the cap, and less than a step of it stays unused. The other sources continue."""
    rng = np.random.default_rng(seed)
    splits = [split_of(rng, 5, 0.0), split_of(rng, 3, 0.0)]
    cap = float(rng.choice([0.5, 1, 2]))
    shape = Shape(4, 2, int(rng.integers(1, 5)), 0)
    shape = dataclasses.replace(shape, window=3 * shape.block)
    o = Order(splits, [(0, [1.0, 2.0])], seed, shape, [None, cap])
    used = int((o.locate(np.arange(8 * int(o.epoch_samples.sum()))).source == 1).sum())
    assert cap * o.epoch_samples[1] - shape.batch < used <= cap * o.epoch_samples[1]
    assert o.runs_out is None
    both = Order(splits, [(0, [1.0, 2.0])], seed, shape, [1.0, cap])
    assert both.runs_out is not None and both.runs_out * shape.batch <= o.epoch_samples[0] + cap * o.epoch_samples[1]
    with pytest.raises(DataError, match=f"step {both.runs_out + 1}: the data lasts for {both.runs_out} steps"):
        both.step(both.runs_out)


@every_seed(30)
def test_planning_more_never_changes_earlier_steps(seed):
    """A cap that is reached later, or a later change of weights, doesn't change complete windows."""
    splits = changing_order(seed).splits
    even, shape = [1.0] * len(splits), Shape(6, 3, 2, 12)
    mix = [(0, even), (9, [2.0, *even[1:]])]
    o = Order(splits, mix, seed, shape)
    longer = Order(splits, [*mix, (60, [1.0, *[0.0] * (len(splits) - 1)])], seed, shape, [1e6] * len(splits))
    windows = o.window_of(o.round_of(57).block)
    before = [s for s in range(57) if o.window_of(o.round_of(s).block + shape.lanes - 1) < windows]
    assert len(before) > 40
    assert np.array_equal(in_steps(o, before), in_steps(longer, before))
