"""Tests the search space: drawn values depend on seed and number, are within their bounds, and every corner is found."""

import itertools

import numpy as np
import pytest
from heliostat.errors import ConfigError
from heliostat.schema import Strict, validate
from heliostat.tune import space as spaces
from heliostat.tune.space import ALL, Domain, Space

LR = {"loguniform": [1e-4, 1e-2]}


class Holder(Strict):
    space: Space


def made(**domains) -> Space:
    """Returns a space; `__` stands for the dots in its keys."""
    return validate(Holder, {"space": {k.replace("__", "."): v for k, v in domains.items()}}, "test").space


@pytest.mark.parametrize(
    ("domain", "needle"),
    [
        ({}, "set exactly one of uniform"),
        ({"uniform": [0, 1], "choice": [1]}, "; found uniform and choice"),
        ({"uniform": [1, 1]}, "is an empty range. The first number must be below the second"),
        ({"loguniform": [0, 1]}, "must have a lower bound above 0"),
        ({"quniform": [0, 1, 2]}, "the step must be above 0, and fit between the bounds"),
        ({"qrandint": [0, 8, 0]}, "the step must be above 0"),
        ({"choice": []}, "[] is too short. Write 1 or more items"),
        ({"grid": [1, 2, 1]}, "grid [1, 2, 1] contains a value twice. Remove one"),
        ({"randint": [1.5, 3]}, "test: space.a.randint.0: expected an integer, got 1.5"),
        ({"logunifrom": [1, 2]}, "Did you mean 'loguniform'"),
    ],
)
def test_a_bad_domain_is_one_clear_error(domain, needle):
    with pytest.raises(ConfigError, match=r"space\.a") as caught:
        made(a=domain)
    assert needle in str(caught.value)


def test_draws_follow_from_seed_and_number_alone():
    space = made(a=LR, b={"choice": [1, 2, 3]}, c={"randint": [0, 9]})
    drawn = [spaces.draw(space, 7, n) for n in range(20)]
    assert [spaces.draw(space, 7, n) for n in reversed(range(20))] == drawn[::-1]
    assert [spaces.draw(space, 8, n) for n in range(20)] != drawn
    assert len({d["a"] for d in drawn}) == 20


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        ({"randint": [2, 5]}, {2, 3, 4, 5}),  # bounds are inclusive
        ({"qrandint": [2, 9, 3]}, {2, 5, 8}),
        ({"quniform": [0.1, 0.4, 0.1]}, {0.1, 0.2, 0.3, 0.4}),
        ({"choice": ["x", "y"]}, {"x", "y"}),
    ],
)
def test_every_value_of_a_domain_comes_up_and_no_other(domain, values):
    space = made(a=domain)
    assert {spaces.draw(space, 0, n)["a"] for n in range(300)} == values


def test_loguniform_is_uniform_in_the_logarithm():
    logs = np.log10([spaces.draw(made(a=LR), 3, n)["a"] for n in range(2000)])
    assert logs.min() >= -4 and logs.max() <= -2
    assert abs(np.mean(logs) + 3) < 0.03 and abs(np.mean(logs < -3.5) - 0.25) < 0.03


def test_a_condition_leaves_the_key_out_and_moves_nothing_else():
    space = made(s={"choice": ["wsd", "cosine"]}, d={"uniform": [0.1, 0.4], "when": {"s": "wsd"}}, z={"uniform": [0, 1]})
    plain = made(s={"choice": ["wsd", "cosine"]}, d={"uniform": [0.1, 0.4]}, z={"uniform": [0, 1]})
    for n in range(50):
        drawn = spaces.draw(space, 1, n)
        assert ("d" in drawn) == (drawn["s"] == "wsd")
        assert drawn["z"] == spaces.draw(plain, 1, n)["z"]
    assert spaces.faults(space) == []


def test_a_condition_must_name_an_earlier_key_and_a_value_that_it_may_have():
    space = made(d={"uniform": [0, 1], "when": {"s": 1}}, s={"choice": [1, 2]}, e={"uniform": [0, 1], "when": {"s": 3}})
    assert spaces.faults(space) == [
        "space.d.when: 's' must be an earlier key of the space",
        "space.e.when: s never has the value 3. Its values are [1, 2]",
    ]


def test_a_grid_is_every_combination_once_and_a_key_that_does_not_count_doubles_nothing():
    space = made(a={"grid": [1, 2]}, b={"grid": [1, 2, 3], "when": {"a": 2}}, c={"grid": ["x"]})
    assert spaces.grid(space) == [
        {"a": 1, "c": "x"},
        {"a": 2, "b": 1, "c": "x"},
        {"a": 2, "b": 2, "c": "x"},
        {"a": 2, "b": 3, "c": "x"},
    ]


def test_corners_are_all_combinations_of_extremes():
    space = made(a=LR, b={"choice": [1, 2, 3]}, c={"qrandint": [1, 8, 2]})
    assert spaces.corners(space) == [{"a": a, "b": b, "c": c} for a, b, c in itertools.product((1e-4, 1e-2), (1, 2, 3), (1, 7))]


def test_of_a_large_space_every_pair_of_keys_has_its_corners():
    space = made(**{f"k{i}": {"uniform": [0, 1]} for i in range(20)})
    found = spaces.corners(space)
    assert len(found) < ALL
    for i, j in itertools.combinations(range(20), 2):
        assert {(p[f"k{i}"], p[f"k{j}"]) for p in found} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_exploring_stays_near_and_inside():
    space = made(a=LR, b={"choice": [1, 2, 4, 8]}, c={"randint": [1, 10]})
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        near = spaces.explore(space, {"a": 9e-3, "b": 4, "c": 10}, rng, resample=0.0)
        assert near["a"] in (pytest.approx(7.2e-3), 1e-2)  # 1.2 times would be outside
        assert near["b"] in (2, 8) and near["c"] in (8, 10)
        seen.add((near["b"], near["c"]))
    assert len(seen) == 4
    anew = [spaces.explore(space, {"a": 9e-3, "b": 4, "c": 10}, rng, resample=1.0)["a"] for _ in range(100)]
    assert min(anew) < 2e-4 < 5e-3 < max(anew)


def test_a_domain_tells_its_kind():
    assert Domain(loguniform=[1.0, 2.0]).kind == "loguniform" and Domain(grid=[1]).listed
