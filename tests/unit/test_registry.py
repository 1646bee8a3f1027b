"""Tests the gate for an alias: its inputs, its decisions, and its messages."""

import math
import re
from types import SimpleNamespace

import pytest
from heliostat.errors import ConfigError, TrackingError
from heliostat.tracking import lineage, registry
from heliostat.tracking.registry import Term, compare, parse


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("eval/loss<2.1", 2.0999, True), ("eval/loss<2.1", 2.1, False), ("eval/loss<=2.1", 2.1, True),
        ("eval/loss > 1e-3", 0.5, True), ("eval/loss>=0.5", 0.49, False), ("eval/loss<2.1", math.nan, False),
    ],
)  # fmt: skip
def test_a_term_holds_or_says_what_the_score_is(text, value, holds):
    said = Term.parse(text).check({"eval/loss": value})
    assert (said == "") is holds
    if not holds:
        sign, limit = re.fullmatch(r"eval/loss ?([<>]=?) ?(\S+)", text).groups()
        assert said == f"eval/loss is {value:g}, expected {sign} {limit}"


@pytest.mark.parametrize("text", ["eval/loss", "eval/loss=2", "<2", "eval/loss<", "eval/loss<two", "a b<2", "eval/loss<<2"])
def test_a_term_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"expected for example eval/loss<2\.1"):
        Term.parse(text)


def test_a_score_that_is_not_there_does_not_meet_a_term_and_those_that_are_there_are_named():
    assert Term.parse("eval/bleu>3").check({"eval/loss": 2.0}) == "eval/bleu isn't known. Scores: eval/loss"


@pytest.mark.parametrize(
    ("mode", "new", "present", "refused"),
    [
        ("min", 2.0, 2.1, False),
        ("min", 2.1, 2.1, False),
        ("min", 2.2, 2.1, True),
        ("max", 2.0, 2.1, True),
        ("max", 2.2, 2.1, False),
    ],
)
def test_a_worse_model_is_refused_and_an_equal_one_is_not(mode, new, present, refused):
    assert bool(compare("eval/loss", mode, {"eval/loss": new}, {"eval/loss": present})) is refused


def test_models_without_the_score_or_with_one_that_is_not_finite_cannot_be_compared():
    for new, present in (({}, {"a": 1.0}), ({"a": 1.0}, {}), ({"a": math.nan}, {"a": 1.0}), ({"a": math.inf}, {"a": 1.0})):
        assert "can't be compared" in compare("a", "min", new, present)


@pytest.mark.parametrize(
    ("model", "parts"),
    [("lm@candidate", ("lm", "", "candidate")), ("models:/lm/3", ("lm", "3", "")), ("models:/a.b-c@x", ("a.b-c", "", "x"))],
)
def test_a_version_is_named_by_number_or_alias(model, parts):
    assert parse(model) == parts


@pytest.mark.parametrize("model", ["lm", "lm/", "lm@", "lm/x", "models:/lm", "a/b/3", "/3", "@x"])
def test_what_names_no_version_is_refused(model):
    with pytest.raises(ConfigError, match="NAME@ALIAS or NAME/VERSION"):
        parse(model)


def test_a_model_that_was_not_registered_leads_to_its_run(monkeypatch):
    """MLflow names it `models:/m-...`, and so does `heliostat train` for a job without mlflow.register."""
    name = f"m-{'a' * 32}"
    client = SimpleNamespace(get_logged_model={name: SimpleNamespace(source_run_id="b" * 32)}.__getitem__)
    monkeypatch.setattr(lineage.mlflow_client, "find", lambda client, run, uri: (run, uri))
    monkeypatch.setattr(lineage, "settle", lambda client, run: run)
    monkeypatch.setattr(lineage, "run_node", lambda client, run: run)
    assert lineage.lineage(client, "uri", f"models:/{name}") == {"model": None, "run": ("b" * 32, "uri")}


def test_a_history_that_is_none_is_one_line():
    version = SimpleNamespace(name="m", version="3", tags={registry.HISTORY: "{"})
    fault = r"^models:/m/3: tag heliostat\.history: isn't a valid history of a model \(Invalid JSON"
    with pytest.raises(TrackingError, match=fault):
        registry.history(version)
