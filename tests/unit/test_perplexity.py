"""Tests a language model's folder as a stage: the perplexity is the model's own, in any batch, and decides on documents."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from heliostat.curation.engine import segments
from heliostat.curation.registry import parse
from heliostat.curation.stage import Document
from heliostat.errors import ConfigError

from tests.unit.build_curation import curate, left, left_out
from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.unit.build_model import make_model, texts

MOST = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("lm"), BASE["model"], MOST)


def entry(model: Path, **keys) -> dict:
    return {"stage": "perplexity", "model": str(model), "max_tokens": MOST, "max_perplexity": 1e300, **keys}


def plainly(model: Path, given: list[str]) -> list[tuple[float, bool]]:
    """Returns the loss that transformers computes for each text alone."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    found = []
    for text in given:
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            kept = torch.tensor([ids[:MOST]])
            found.append((math.exp(whole(input_ids=kept, labels=kept).loss.item()), len(ids) > MOST))
    return found


def outcomes(stage: dict, given: list[str]) -> list:
    return parse(stage).open()([Document(str(i), text) for i, text in enumerate(given)])


def test_perplexities_are_the_models_own_and_do_not_depend_on_the_batch(model):
    given = [text for text in texts(40) if len(text) > 9]
    made = outcomes(entry(model), given)
    for outcome, (wanted, cut) in zip(made, plainly(model, given), strict=True):
        assert outcome.measures["perplexity"] == pytest.approx(wanted, rel=1e-3) == outcome.document.columns["perplexity"]
        assert outcome.counts.get("cut_to_max_tokens", 0) == cut
    assert {bool(o.counts) for o in made} == {True, False}
    alone = [outcomes(entry(model), [text])[0].measures for text in given]
    assert alone == [o.measures for o in made] == [o.measures for o in outcomes(entry(model), given[::-1])][::-1]
    assert len({o.measures["perplexity"] for o in made}) > 20


def test_documents_go_by_their_perplexity_and_the_others_have_a_bucket(tmp_path, model):
    given = {f"d{i}": text for i, text in enumerate(texts(40))} | {"none": "", "one": "a"}
    made = {id: o.measures.get("perplexity") for id, o in zip(given, outcomes(entry(model), list(given.values())), strict=True)}
    known = sorted(value for value in made.values() if value is not None)
    low, middle, high = known[5], known[20], known[35]
    stages = [{"stage": "length", "min_chars": 0}, entry(model, min_perplexity=low, max_perplexity=high, buckets=[middle])]
    assert [[n for n, _ in part] for part in segments([parse(s) for s in stages])] == [[0], [1]]
    told = []
    for pieces in (1, 7):
        found, here = curate(tmp_path / str(pieces), given, stages, pieces)
        told.append((left(found, here), left_out(found, here)))
    assert told[0] == told[1]
    reasons = {id: reason for id, (_, reason, _) in told[0][1].items()}
    assert {id for id, value in made.items() if value is None} == {id for id, r in reasons.items() if r == "too_short"} != set()
    assert {id for id, r in reasons.items() if r == "low_perplexity"} == {i for i, v in made.items() if v is not None and v < low}
    assert {id for id, r in reasons.items() if r == "high_perplexity"} == {
        i for i, v in made.items() if v is not None and v > high
    }
    kept = outcomes(stages[1], [given[id] for id in told[0][0]])
    assert [o.document.columns["bucket"] for o in kept] == [int(made[id] >= middle) for id in told[0][0]]


def test_a_model_whose_numbers_are_not_finite_is_told_and_its_documents_are_not_called_short(model, tmp_path):
    broken = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    shutil.copytree(model, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ConfigError, match="returns probabilities that aren't finite"):
        outcomes(entry(tmp_path / "broken"), ["some words of a text"])


@pytest.mark.parametrize(("keys", "message"), [
    ({"max_perplexity": None}, "Set min_perplexity, max_perplexity, or buckets"), ({"buckets": [3, 3]}, "must ascend"),
    ({"bucket_column": "perplexity"}, "is the column of the perplexity"), ({"min_perplexity": 0.5}, "0.5 is too small"),
])  # fmt: skip
def test_what_is_wrong_is_said(model, keys, message):
    with pytest.raises(ValueError, match=message):
        parse(entry(model, **keys))


def test_a_folder_that_is_no_language_model_is_refused(tmp_path, model):
    make_model(tmp_path / "bert")
    with pytest.raises(ConfigError, match="is a BertForSequenceClassification, not a causal language model"):
        parse(entry(tmp_path / "bert")).check()
    with pytest.raises(ConfigError, match="max_tokens: 4,096 is above the model's maximum"):
        parse(entry(model, max_tokens=4096)).check()
