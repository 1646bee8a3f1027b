"""Tests that a test with many seeds runs all of them, and names one when it fails."""

import pytest

from tests.seeds import every_seed


def test_each_seed_is_drawn_with_the_fixtures_and_the_first_that_fails_is_named():
    drawn = []

    @every_seed(5)
    def case(seed, given):
        drawn.append((seed, given))
        assert seed < 3

    with pytest.raises(AssertionError) as e:
        case(given="x")
    assert drawn == [(0, "x"), (1, "x"), (2, "x"), (3, "x")] and e.value.__notes__ == ["seed 3"]
