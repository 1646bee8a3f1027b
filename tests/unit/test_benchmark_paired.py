"""Tests the comparison of two models on the same examples: it needs the same examples, and its interval has 95 % coverage."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from heliostat.errors import ConfigError
from heliostat.evaluation import measures, paired, run, shown, suite
from heliostat.evaluation.suite import Suite
from heliostat.storage.locations import Location

from tests.unit.test_batch_tasks import write_writer
from tests.unit.test_chat_suites import write_suite

SUITE = Suite(name="sums", tasks=["sums"])


def row(values: list[float] | None, texts: list[str]) -> paired.PairedRow:
    return {"task": "sums", "values": values, "examples_digest": paired.digest(texts)}


def result(path: Path, **changes: object) -> Location:
    kept = {"suite": SUITE.model_dump(), "tasks": [row([1, 0], ["1 + 1 = 2", "2 + 2 = 4"])], "average": {}} | changes
    path.write_text(json.dumps(kept))
    return Location(str(path))


def test_the_interval_of_a_difference_contains_the_true_difference_in_95_percent_of_the_cases() -> None:
    """Half of the questions are too hard for both models, so the two models' values are correlated."""
    rng, tries, hits = np.random.default_rng(0), 1000, 0
    for _ in range(tries):
        easy = rng.random(300) < 0.5
        before, after = (np.where(easy, rng.random(300) < share, 0).astype(int).tolist() for share in (0.6, 0.7))
        (one,) = paired.differences([row(after, ["a"])], {"suite": {}, "tasks": [row(before, ["a"])]})
        assert one.difference == pytest.approx(np.mean(after) - np.mean(before))
        assert one.low is not None and one.high is not None and one.higher is not None and one.lower is not None
        assert one.difference == pytest.approx((one.higher - one.lower) / 300)
        hits += one.low <= 0.05 <= one.high
    assert 0.93 < hits / tries < 0.97


def test_only_results_on_the_same_examples_are_compared(tmp_path: Path) -> None:
    same = {"sums": paired.digest(["1 + 1 = 2", "2 + 2 = 4"])}
    place = result(tmp_path / "a.json")
    assert paired.read(place, SUITE, same)["tasks"][0]["values"] == [1, 0]
    for texts in (["2 + 2 = 4", "1 + 1 = 2"], ["1 + 1 = 22", " + 2 = 4"], ["1 + 1 = 2"]):
        with pytest.raises(ConfigError, match=r"^--compare: other examples of sums \(.*a\.json\)\. Score its model with"):
            paired.read(place, SUITE, {"sums": paired.digest(texts)})
    with pytest.raises(ConfigError, match=r"^--compare: scored with other settings \(.*a\.json\)\. Score its model with"):
        paired.read(place, SUITE.model_copy(update={"chat": True}), same)
    with pytest.raises(ConfigError, match=r"^--compare: no such file \(.*b\.json\)\. Pass"):
        paired.read(Location(str(tmp_path / "b.json")), SUITE, same)
    for digests in ({}, {"sums": same["sums"], "words": "0"}):  # as lm-eval's groups change
        with pytest.raises(ConfigError, match=r"^--compare: other examples of (sums|words) "):
            paired.read(place, SUITE, digests)
    with pytest.raises(ConfigError, match=r"^--compare: can't be read .*directory"):
        paired.read(Location(str(tmp_path)), SUITE, same)
    with pytest.raises(
        ConfigError, match=r"c\.json: isn.t a valid result .*values.*Score its model again"
    ):  # of an earlier version
        paired.read(result(tmp_path / "c.json", tasks=[{"task": "sums", "score": 0.5}]), SUITE, same)


def test_values_are_compared_only_if_the_score_is_their_mean() -> None:
    assert measures.averaged(0.5, [1.0, False]) == [1, 0] and measures.averaged(0.4, [0.3, 0.5]) == [0.3, 0.5]
    for score, values in ((2.0, [-1.5, -2.5]), (0.5, [1, "0"]), (1.0, []), (7.0, [(-3.0, 2)])):
        assert measures.averaged(score, values) is None
    (one,) = paired.differences([row(None, ["a"])], {"suite": {}, "tasks": [row([1], ["a"])]})
    assert one.difference is None
    assert shown.difference(one) == "sums: no difference, because the score isn't a mean over examples"


def test_a_written_result_is_compared_with_a_later_result_of_the_same_suite(tmp_path: Path) -> None:
    """The suite's file may move between the two commands."""
    writer, results = write_writer(tmp_path / "writer"), []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        with contextlib.closing(run.Benchmark(*suite.load(write_suite(folder, chat=True)), quiet=True)) as benchmark:
            results.append(benchmark.score(writer))
            run.write(results[0], Location(str(tmp_path / "result.json")))
            other = paired.read(Location(str(tmp_path / "result.json")), benchmark.suite, benchmark.digests)
    (row,) = results[1]["tasks"]
    assert len(row["values"]) == row["examples"] and np.mean(row["values"]) == row["score"]
    assert paired.differences(results[1]["tasks"], other) == [("sums", 0, 0, 0, 0, 0)]
