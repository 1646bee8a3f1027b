"""Tests random numbers that depend only on a seed and a key: the generator's published words, exact normal numbers, and
independence."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from heliostat.recipes import counter_random
from heliostat.recipes.counter_random import normal, uniform, words
from heliostat.recipes.images import rows
from heliostat.recipes.images.noising import NoiseObjective, Process
from heliostat.schema import validate

COUNT = 200_000
# digests of draws
DRAWN = {"time": "ca7eb3eb86373818", "dropped": "cf7605ed1bc735f6", "noise": "1f82d74b1048c825", "posterior": "815285827f3ef3e1"}
ON_HOST = {
    "time": "21e996c7629e3d8f",
    "dropped": "cf7605ed1bc735f6",
    "noise": "d8c48d820a40e5f4",
    "posterior": "8a5f0bb808a40cb7",
}


def gap(values: torch.Tensor, distribution: torch.Tensor) -> float:
    """Computes the Kolmogorov-Smirnov distance times the root of the sample size, for values with a given distribution function.
    It exceeds 2.7 in one of a million samples."""
    n, ordered = len(values), distribution.double().sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())) * math.sqrt(n)


def normal_cdf(values: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(values.double())


def test_words_are_those_of_the_published_generator():
    """Philox4x32-10 in Python integers, which have no limit; and its authors' result for zeros."""

    def reference(seed: int, key: int, stream: int, block: int) -> list[int]:
        counter, low, high = [block, stream, key & 0xFFFFFFFF, key >> 32], seed & 0xFFFFFFFF, seed >> 32
        for _ in range(10):
            one, two = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [two >> 32 ^ counter[1] ^ low, two & 0xFFFFFFFF, one >> 32 ^ counter[3] ^ high, one & 0xFFFFFFFF]
            low, high = low + 0x9E3779B9 & 0xFFFFFFFF, high + 0xBB67AE85 & 0xFFFFFFFF
        return counter

    assert [f"{word:08x}" for word in reference(0, 0, 0, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    keys = [0, 1, 2**32 - 1, 2**32 + 7, 2**62 + 12345, 0x0370734413198A2E]
    for seed, stream in ((0, 0), (2**32 - 1, 3), (0x299F31D0A4093822, 0x85A308D3)):
        right = [[word for block in range(3) for word in reference(seed, key, stream, block)][:10] for key in keys]
        assert words(seed, torch.tensor(keys), stream, 10).tolist() == right


def test_normal_numbers_are_the_inverse_of_the_distribution_at_their_words():
    edges = torch.tensor([0, 1, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
    drawn = torch.cat(
        [words(3, torch.arange(64), 1, 4096).flatten(), edges, 2**31 + 2 ** torch.arange(31), 2 ** torch.arange(32)]
    )
    signed = ((drawn << 1) - counter_random.WORD).double()
    exact = -torch.special.ndtri(signed.abs() / 2**33) * signed.sign()
    assert float(((normal(drawn) - exact).abs() / exact.abs().clamp(min=1)).max()) < 2e-7
    assert normal(edges).abs().max() < 6.34 and torch.equal(normal(edges), -normal(counter_random.WORD - edges))


def test_the_table_is_the_same_where_a_logarithm_rounds_otherwise():
    """So numbers are the same on every machine: heights that differ in some last bits give the same fp32 numbers."""
    exact, rng = counter_random.exact_heights(), np.random.default_rng(0)
    right = counter_random.parabolas(exact)
    for _ in range(20):
        moved = exact * (1 + rng.integers(-4, 5, exact.shape) * 2.0**-53)
        assert np.array_equal(counter_random.parabolas(moved), right)


def test_parts_of_the_numbers_are_those_of_the_whole():
    """A CPU draws some keys, or some numbers of a key, at a time."""
    for keys, count in ((torch.arange(7), 30_000), (torch.arange(2), 2 * counter_random.PART + 6)):
        assert torch.equal(counter_random.normals(3, keys, 1, count), normal(words(3, keys, 1, count)))


def test_draws_are_to_the_last_bit_those_that_runs_were_trained_on():
    """The draws of a version of the rules never change, because a resumed run depends on them."""
    drawn = rows.draw(11, torch.tensor([0, 5, 2**40]), (4, 8, 8), 0.3, 0.1, True).named()
    assert {name: hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] for name, values in drawn.items()} == DRAWN
    host = rows.draw_on_host(11, np.array([0, 5, 2**40]), (4, 8, 8), 0.3, 0.1, True).named()
    assert {name: hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] for name, values in host.items()} == ON_HOST


def test_draws_are_of_a_sample_alone():
    """Other samples of the batch, and their order, don't change any bit."""
    keys = torch.arange(100, 112)
    whole = rows.draw(7, keys, (3, 5, 7), 0.2, 0.1, True).named()
    for numbers in (torch.tensor([4]), torch.tensor([11, 0, 3]), torch.arange(12).flip(0)):
        some = rows.draw(7, keys[numbers], (3, 5, 7), 0.2, 0.1, True).named()
        assert all(torch.equal(some[name], values[numbers]) for name, values in whole.items())
    other = rows.draw(8, keys, (3, 5, 7), 0.2, 0.1, True).named()
    assert not any(torch.equal(other[name][0], whole[name][0]) for name in ("time", "noise", "posterior"))


def test_numbers_are_normal_and_uniform():
    drawn = words(5, torch.arange(100), 1, COUNT // 100).flatten()
    values = normal(drawn).double()
    assert gap(values, normal_cdf(values)) < 2.7 and gap(uniform(drawn), uniform(drawn)) < 2.7
    right = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 6: 15.0}
    spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0, 6: 10170.0}  # variances of the powers
    for power, mean in right.items():
        assert abs(float((values**power).mean()) - mean) < 5 * math.sqrt(spread[power] / COUNT), power
    assert float(uniform(drawn).min()) >= 0 and float(uniform(drawn).max()) < 1
    tail = float((values.abs() > 3).double().mean())
    assert abs(tail - 0.0026998) < 5 * math.sqrt(0.0027 / COUNT)


@pytest.mark.parametrize("apart", [1, 2**31])
def test_neighboring_keys_seeds_and_streams_are_independent(apart):
    """The numbers of two keys, seeds, or streams are uncorrelated, and so are their squares. The same holds for neighbors in one
    sample."""

    def numbers(key: int = 0, seed: int = 0, stream: int = 0) -> torch.Tensor:
        return normal(words(seed, torch.tensor([9 + key]), 1 + stream, COUNT)).flatten().double()

    base = numbers()
    others = [numbers(key=apart), numbers(seed=apart), numbers(stream=apart), base.roll(apart % 9)]
    for other in others:
        for power, spread in ((1, 1.0), (2, 2.0)):
            one, two = base**power, other**power
            assert abs(float(((one - one.mean()) * (two - two.mean())).mean())) < 5 * spread / math.sqrt(COUNT)
    sums = torch.stack([base, *others[:3]]).sum(0) / 2
    assert gap(sums, normal_cdf(sums)) < 2.7


def test_numbers_of_many_keys_are_independent_of_their_order():
    """Draws one number for each of many consecutive keys, like timesteps."""
    drawn = normal(words(3, torch.arange(COUNT), 0, 2))
    for values in (drawn[:, 0], drawn[:, 1]):
        assert gap(values, normal_cdf(values)) < 2.7
        assert abs(float((values[1:] * values[:-1]).mean())) < 5 / math.sqrt(COUNT)
    assert abs(float((drawn[:, 0] * drawn[:, 1]).mean())) < 5 / math.sqrt(COUNT)


OBJECTIVES = {
    "uniform": {"prediction": "flow"},
    "logit-normal": {"prediction": "flow", "timesteps": "logit_normal"},
    "shifted": {"prediction": "flow", "timesteps": "logit_normal", "shift": 3.0},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_times_of_flow_matching_have_the_objectives_density(name):
    objective = OBJECTIVES[name]
    times = Process(validate(NoiseObjective, objective, "")).times(rows.draw(3, torch.arange(COUNT), (1, 1, 1), 0, 0, False).time)
    shift = objective.get("shift", 1.0)
    plain = times.double() / (shift - (shift - 1) * times.double())
    assert gap(times, normal_cdf(torch.logit(plain)) if "timesteps" in objective else plain) < 2.7


def test_steps_of_diffusion_are_uniform_and_captions_are_dropped_as_often_as_asked():
    draws = rows.draw(3, torch.arange(COUNT), (1, 1, 1), 0.2, 0, False)
    times = Process(validate(NoiseObjective, {"steps": 50}, "")).times(draws.time)
    counts = torch.bincount(times, minlength=50).double()
    assert len(counts) == 50 and float(((counts - COUNT / 50) ** 2 / (COUNT / 50)).sum()) < 49 + 5 * math.sqrt(98)
    assert abs(float(draws.dropped.double().mean()) - 0.2) < 5 * math.sqrt(0.16 / COUNT)
    assert abs(float(((draws.time - 0.5) * (draws.dropped.float() - 0.2)).mean())) < 5 * math.sqrt(0.16 / 12 / COUNT)


def test_an_offset_is_the_same_all_over_a_channel():
    plain, moved = (rows.draw(7, torch.arange(3000), (2, 4, 4), 0, share, False).noise for share in (0, 0.5))
    added = moved - plain
    assert float((added - added[:, :, :1, :1]).abs().max()) < 1e-6 and abs(float(added[:, :, 0, 0].std()) - 0.5) < 0.02
    assert abs(float((added[:, 0, 0, 0] * added[:, 1, 0, 0]).mean())) < 5 * 0.25 / math.sqrt(3000)
