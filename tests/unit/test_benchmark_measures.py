"""Tests the numbers next to a score: intervals, chance, centered scores, and their average."""

import math
import random

import pytest
from heliostat.evaluation import measures, shown


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_the_interval_of_a_share_is_wilsons(right, count, low, high):
    """The last two intervals are printed in Newcombe (1998), method 3."""
    assert measures.wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


def test_the_edit_similarity_is_that_of_the_least_changes():
    def distance(a: str, b: str) -> int:
        known = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                known[i, j] = min(known[i - 1, j] + 1, known[i, j - 1] + 1, known[i - 1, j - 1] + (x != y))
        return known[len(a), len(b)]

    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("ab日 ", k=rng.randrange(12))) for _ in range(2))
        assert measures.edit_similarity(a, b) == (1 - distance(a, b) / max(len(a), len(b)) if a or b else 1.0)
    assert measures.edit_similarity("kitten", "sitting") == 1 - 3 / 7


def test_the_interval_covers_the_true_share_as_often_as_it_says():
    rng, hits, tries = random.Random(0), 0, 2000
    for _ in range(tries):
        low, high = measures.wilson(sum(rng.random() < 0.3 for _ in range(60)) / 60, 60)
        hits += low <= 0.3 <= high
    assert 0.93 < hits / tries < 0.97


def test_a_score_that_is_no_share_has_the_interval_of_its_standard_error_or_none():
    assert measures.interval(3.0, 0.5, [-1.5, -2.0]) == pytest.approx((3 - 0.98, 3 + 0.98), abs=1e-3)
    assert measures.interval(3.0, None, [-1.5]) is None
    assert measures.interval(1.0, 0.0, [1, 1, 1]) == measures.wilson(1.0, 3)


def test_a_task_of_one_choice_each_has_nothing_to_gain_over_guessing():
    guessing = measures.chance("multiple_choice", "acc", [(1, 1), (1, 1)])
    assert guessing == 1.0 and measures.centred(1.0, guessing) is None


def test_chance_is_one_of_the_choices_and_nothing_where_there_are_none():
    assert measures.chance("multiple_choice", "acc", [(1, 4), (1, 2)]) == pytest.approx(0.375)
    assert measures.chance("multiple_choice", "acc_norm", [(2, 4)]) == 0.5
    assert measures.chance("generate_until", "exact_match", []) == 0.0 == measures.chance("loglikelihood", "acc", [])
    for kind, metric in (("multiple_choice", "f1"), ("loglikelihood", "perplexity"), ("generate_until", "bleu")):
        assert measures.chance(kind, metric, [(1, 4)]) is None


def test_a_centred_score_is_0_at_chance_and_1_at_best_and_the_average_is_over_tasks():
    assert measures.centred(0.25, 0.25) == 0 and measures.centred(1.0, 0.25) == 1 and measures.centred(0.0, 0.25) < 0
    assert measures.centred(0.5, None) is None
    mean, error = measures.average([(0.5, 0.03, 0.25), (0.1, 0.02, 0.0)])
    assert mean == pytest.approx(0.3) and error == pytest.approx(math.hypot(0.03 / 0.75, 0.02) / 2)
    assert measures.average([(0.5, 0.03, 0.25), (0.1, None, 0.0)]) == (pytest.approx(0.3), None)
    assert measures.average([]) is None


def result(**changes):
    seen = {"compared": 190, "too_short": 10, "contaminated": 0.125, "overlap": 0.1, "clean_examples": 170, "clean_score": 0.4}
    row = {"task": "a_task_of_a_name_longer_than_a_row", "metric": "acc_mutual_info", "score": 0.4125, "low": 0.345,
           "high": 0.4832, "chance": 0.25, "centred": 0.2167, "examples": 14042, "truncated": 3,
           "contamination": seen}  # fmt: skip
    perplexity = row | {"metric": "perplexity", "score": 123456.7, "low": None, "chance": None, "centred": None}
    made = {
        "tasks": [row, perplexity],
        "average": {"centred": 0.2167, "stderr": 0.02, "tasks": 1, "of": 2},
        "contamination": {"n": 13, "datasets": [{"chunks": 1234}], "damaged": 1, "unknown": ""},
        "recorded": {"run_id": "0" * 32, "step": 300, "versions": ["models:/lm/3"], "why_not": ""},
    }
    return made | changes


def test_the_table_fits_into_80_columns_and_what_was_left_out_is_said():
    from heliostat.cli import common

    lines = common.table_lines(shown.rows(result()), (0, 1))
    assert max(map(len, lines)) <= 80, lines
    said = "\n".join(shown.notes(result()))
    for part in ("+0.217 ± 0.039 (1 of 2 tasks)", "1,234 chunks", "20 examples have fewer words", "1 damaged row groups",
                 "3 examples are longer", "at step 300, and of models:/lm/3"):  # fmt: skip
        assert part in said, part
    nothing = {"run_id": None, "step": None, "versions": [], "why_not": "the model's folder names no run"}
    said = "\n".join(shown.notes(result(contamination=None, recorded=nothing)))
    assert "not measured" in said and "not in MLflow: the model's folder names no run" in said
