"""Tests mixing: sources are mixed exactly, weights may change, sources may run out, and every run is split into sections."""

import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from heliostat.data.mixing import OWED, Mixture, Shape, proportions, sections
from heliostat.data.order import Order
from heliostat.data.split import whole
from heliostat.errors import ConfigError

from tests.seeds import every_seed
from tests.unit.test_order import WEIGHTS


def random_mixture(seed: int) -> Mixture:
    """Returns random weights, units of several samples, and sources that have had too few or too many samples."""
    rng = np.random.default_rng(seed)
    weights = [round(float(w), int(rng.integers(0, 5))) for w in rng.random(int(rng.integers(1, 8)))]
    weights[0] = weights[0] or 1.0
    owed = [int(d) for d in rng.integers(-4 * OWED, 4 * OWED, len(weights))] if rng.random() < 0.5 else None
    return Mixture(weights, int(rng.choice([1, 1, 3])), owed)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sources_are_mixed_exactly_over_a_period_and_within_one_percent_of_any_ten_thousand(weights):
    """Each source's share of any 10,000 consecutive samples equals its weight within 1 % of the samples."""
    mixture, share = Mixture(weights), np.array(weights) / sum(weights)
    assert np.allclose(mixture.counts(mixture.period) / mixture.period, share, rtol=1e-12, atol=0)
    for start in np.random.default_rng(0).integers(0, 10**9, 300).tolist():
        got = mixture.counts(start + 10_000) - mixture.counts(start)
        assert got.sum() == 10_000 and np.abs(got - 10_000 * share).max() <= 100
    source, _ = mixture.lay_out(0, 50_000)
    prefixes = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(prefixes - np.arange(1, 50_001)[:, None] * share).max() <= len(weights)


@every_seed(60)
def test_any_stretch_is_that_of_the_whole_and_counting_agrees_with_listing(seed):
    """The result doesn't depend on the ends of a range. A source's samples are numbered consecutively."""
    rng, mixture = np.random.default_rng([seed, 1]), random_mixture(seed)
    begin = int(rng.choice([0, 0, 10**9, 10**13]))
    source, item = mixture.lay_out(begin, begin + 3000)
    before = mixture.counts(begin)
    for s in range(len(before)):
        assert np.array_equal(item[source == s], before[s] + np.arange((source == s).sum()))
    for a, b in np.sort(rng.integers(0, 3000, (8, 2)), axis=1).tolist():
        part = mixture.lay_out(begin + a, begin + b + 1)
        assert np.array_equal(part[0], source[a : b + 1]) and np.array_equal(part[1], item[a : b + 1])
        assert np.array_equal(mixture.counts(begin + a), before + np.bincount(source[:a], minlength=len(before)))
    assert mixture.counts(begin).sum() == begin


@every_seed(60)
def test_what_is_owed_is_the_share_less_what_was_taken(seed):
    """The balance is exact to a billionth of a sample, and stays within a few samples."""
    mixture, rng = random_mixture(seed), np.random.default_rng(seed)
    start = np.array(mixture.owed(0)) / OWED
    for units in [0, *rng.integers(0, 10**7, 5).tolist()]:
        position = units * mixture.unit
        owed, taken = np.array(mixture.owed(position)) / OWED, mixture.counts(position) // mixture.unit
        assert np.allclose(owed, start + mixture.shares * units - taken, atol=1e-6)
        if units > 10**5:
            assert np.abs(owed[mixture.shares > 0.01]).max(initial=0) < len(taken) / 2 + 1 + np.abs(start).sum()


def test_the_order_is_by_exact_due_times():
    """Compares a long period with its definition, in integers of any size: the sample with the smallest (2j + 1) / c comes
    first."""
    weights = [0.61803, 0.27183, 0.11014]
    mixture = Mixture(weights)
    due = sorted((Fraction(2 * j + 1, c), s) for s, c in enumerate(mixture.parts) for j in range(c))
    assert mixture.lay_out(0, mixture.period)[0].tolist() == [s for _, s in due]


def test_a_hundred_sources_of_six_digits_take_no_memory_and_no_time():
    """Tables of the period would take 800 MB."""
    rng = np.random.default_rng(0)
    weights = [round(float(w), 6) for w in rng.dirichlet(np.ones(100))]
    tracemalloc.start()
    started = time.process_time()
    mixture = Mixture(weights)
    source, _ = mixture.lay_out(10**12, 10**12 + 8192)
    counts = mixture.counts(10**12)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mixture.period > 900_000 and peak < 8 << 20 and seconds < 2
    assert counts.sum() == 10**12 and len(set(source.tolist())) > 90


def test_weights_that_mean_the_same_give_the_same_mixture():
    """Only proportions count, and decimal weights are exact (0.1 is a tenth)."""
    assert proportions([0.1, 0.2]) == proportions([1.0, 2.0]) == [1, 2]
    assert proportions([5.0, 5.0]) == proportions([0.5, 0.5])
    assert proportions([0.7, 0.2, 0.1]) == [7, 2, 1]


@pytest.mark.parametrize("weights", [[1.0, 0.33333333333333331], [1e-300, 1.0], [1.0, 1e9]])
def test_weights_that_cannot_be_honoured_are_refused(weights):
    """They raise one ConfigError, and don't freeze the machine."""
    with pytest.raises(ConfigError, match=r"data\.sources: weights .* have too many digits for exact mixing\. Round them$"):
        Mixture(weights)


def taken(found: list, step: int, shape: Shape, first: int = 0) -> np.ndarray:
    """Returns the samples of each source before a step."""
    last = [s for s in found if s.first_step < max(step, 1)][-1]
    return last.before((step - first) * shape.batch)


def random_run(seed: int) -> tuple[list, list, Shape]:
    """Returns a run of ten sources of several digits, most with a cap, whose weights change a few times. Half of the runs use
    units."""
    rng = np.random.default_rng([seed, 3])
    sources = 10
    starts = np.cumsum(rng.integers(1, 300, int(rng.integers(0, 4))))
    mix = [(int(s), [round(float(w), int(rng.integers(1, 4))) for w in rng.random(sources)]) for s in (0, *starts)]
    caps = [None if rng.random() < 0.2 else int(rng.integers(0, 20_000)) for _ in range(sources)]
    lanes, per_lane, steps_per_block = int(rng.integers(1, 5)), int(rng.integers(1, 64)), int(rng.integers(1, 20))
    shape = Shape(lanes * per_lane, lanes, steps_per_block, per_lane * steps_per_block, per_lane if rng.random() < 0.5 else 1)
    return mix, caps, shape


def test_a_mix_whose_cap_ends_inside_a_round_is_planned():
    """The rest of a section starts where the section stopped. No cap is exceeded, so no source is waited for."""
    shape, caps = Shape(32, 32, 16, 16), [3680, 680, 3060]
    found, end = sections([(0, [0.6, 0.4, 0.9])], caps, shape)
    assert end is not None and sum(caps) - 3 * 32 < end * 32 <= sum(caps)
    assert (taken(found, end, shape) <= caps).all()


@every_seed(40)
def test_max_epochs_is_never_exceeded_and_what_is_left_is_less_than_a_step(seed):
    """Not by one sample at any step, also with batches of one source. The run continues while one source can fill a step."""
    mix, caps, shape = random_run(seed)
    found, end = sections(mix, caps, shape)
    most = np.array([np.iinfo(np.int64).max if c is None else c for c in caps])
    assert (end is None) == any(c is None and mix[-1][1][i] for i, c in enumerate(caps))
    last = end if end is not None else found[-1].first_step + 50
    for section in found:
        stop = section.first_step + section.steps if section.steps else last
        assert (taken(found, stop, shape) <= most).all() and (
            np.diff([taken(found, s, shape) for s in (0, stop)], axis=0) >= 0
        ).all()
    counts = taken(found, last, shape)
    assert counts.sum() == last * shape.batch
    if end is not None and end >= mix[-1][0]:
        room = [c - n for c, n, w in zip(caps, counts.tolist(), mix[-1][1], strict=True) if w]
        assert max(room) <= shape.batch + shape.unit * len(caps), "a source that could fill steps was left out"


def test_batches_of_one_source_keep_their_caps():
    """With virtual ranks of 64 samples, each of one source: none starts that its source can't fill."""
    shape = Shape(256, 4, 5, 640, unit=64)
    splits = [whole(np.full(40, 97), np.ones(40), 0.0) for _ in range(3)]
    order = Order(splits, [(0, [0.5, 0.3, 0.2])], 1, shape, [1.0, 0.7, 2.0])
    assert order.runs_out is not None
    used = np.zeros(3, np.int64)
    for step in range(order.runs_out):
        lanes = order.locate(order.step(step).ravel()).source.reshape(4, 64)
        assert (lanes == lanes[:, :1]).all()
        used += np.bincount(lanes.ravel(), minlength=3)
    assert (used <= np.array([3880, 2716, 7760])).all() and used.sum() == order.runs_out * 256


def test_a_small_weight_that_changes_every_step_gets_its_samples():
    """0.001 of 1,024 steps with 1,000 samples is 1,024 samples, although each step is owed little more than one."""
    weights = [[0.998, 0.001, 0.001], [0.9985, 0.001, 0.0005]]
    mix = [(step, weights[step % 2]) for step in range(1024)]
    shape = Shape(1000, 1, 1, 1000)
    found, end = sections(mix, [None] * 3, shape)
    assert end is None and len(found) == 1024
    counts = found[-1].before(1024 * 1000)
    assert np.abs(counts - [1_022_208, 1024, 768]).max() <= 1


@every_seed(20)
@pytest.mark.ci
def test_a_curriculum_gives_the_sum_of_its_shares(seed):
    """The sum is exact within a few samples at every change, for any number of changes. A paused source keeps its balance."""
    rng = np.random.default_rng(seed)
    sources, batch = int(rng.integers(2, 6)), int(rng.integers(1, 50))
    starts = [0, *np.cumsum(rng.integers(1, 4, 300)).tolist()]
    mix, owed = [], np.zeros(sources)
    for start in starts:
        weights = np.round(rng.random(sources) ** 4, 3) * (rng.random(sources) < 0.9)
        weights[rng.integers(sources)] += 0.001
        mix.append((start, [round(float(w), 3) for w in weights]))
    found, _ = sections(mix, [None] * sources, Shape(batch, 1, 4, 4 * batch))
    for (step, weights), after in zip(mix, [*starts[1:], None], strict=True):
        if after is not None:
            owed += np.array(weights) / sum(weights) * (after - step) * batch
            last = [s for s in found if s.first_step < after][-1]
            counts = last.before(after * batch)
            assert np.abs(counts - owed).max() < sources + 1
            assert all(n == 0 for n, w in zip(counts - last.before(last.begin), weights, strict=True) if not w)


def test_an_order_of_ten_billion_samples_goes_on_for_a_hundred_thousand_epochs():
    """Positions of 1e15 are located in their epochs."""
    splits = [whole(np.full(10_000, 1_000_000), np.ones(10_000), 0.0), whole(np.full(3, 2_000_000_000), np.ones(3), 0.0)]
    shape = Shape(1024, 8, 16, 8192)
    order = Order(splits, [(0, [10.0, 6.0])], 5, shape, [1e5, None])
    sizes = [10**10, 6 * 10**9]
    for epoch in (0, 1, 2, 214, 2147, 99_999):
        step = epoch * 16 * 10**9 // 1024 + 1000
        found, before = order.locate(order.step(step).ravel()), order.consumed(step)
        assert set(found.source.tolist()) == {0, 1} and set(found.epoch.tolist()) == {epoch}
        assert (np.abs(before / step / 1024 - [10 / 16, 6 / 16]) < 1e-3).all()
        for source, size in enumerate(sizes):
            mine = found.source == source
            assert (found.row[mine] < splits[source].samples[0]).all() and (before[source] // size == epoch).all()
            places = list(zip(found.chunk[mine].tolist(), found.row[mine].tolist(), strict=True))
            assert len(set(places)) == len(places)
    assert order.runs_out is None
    end = order.sections[1].first_step  # the first source has had its epochs
    assert order.consumed(end)[0] <= 10**15 and order.consumed(end)[0] > 10**15 - 1024


@pytest.mark.parametrize("samples", [10**9, 22 * 10**8, 10**6])
def test_an_epoch_number_times_a_dataset_s_size_does_not_overflow(samples):
    """1e9 samples in epoch 2, LAION's 2.2e9 at step 0, and 1e6 in epoch 2,147: each exceeds 32 bits."""
    order = Order([whole(np.full(100, samples // 100), np.ones(100), 0.0)], [(0, [1.0])], 0, Shape(64, 2, 1, 64))
    for epoch in (0, 2, 3, 2146, 2147, 2148, 5000):
        found = order.locate(np.arange(epoch * samples, epoch * samples + 64))
        assert set(found.epoch.tolist()) <= {epoch} and len({*zip(found.chunk.tolist(), found.row.tolist(), strict=True)}) == 64


def test_caps_below_a_batch_are_refused():
    with pytest.raises(ConfigError, match=r"max_epochs leaves fewer samples than one train\.global_batch_size"):
        Order([whole(np.full(2, 10), np.ones(2), 0.0)], [(0, [1.0])], 0, Shape(64, 2, 1, 64), [1.0])
