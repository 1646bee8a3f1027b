"""Tests a Hugging Face classifier's folder as a stage: its scores, in any batch, and what it rejects."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from heliostat.curation import scoring
from heliostat.curation.engine import segments
from heliostat.curation.registry import parse
from heliostat.curation.stage import Document
from heliostat.errors import ConfigError
from tokenizers import Tokenizer
from transformers import BertForSequenceClassification

from tests.unit.build_curation import curate, left, left_out
from tests.unit.build_model import make_model, texts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def entry(model: Path, **keys) -> dict:
    return {"stage": "hf_classifier", "model": str(model), "label": "good", "max_tokens": 128, **keys}


def test_scores_are_the_models_own_and_do_not_depend_on_the_batch(model):
    given = texts(40)
    made = scoring.Scorer(str(model), "good", 128, 8)(given)
    whole = BertForSequenceClassification.from_pretrained(model).eval()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text, (score, cut) in zip(given, made, strict=True):
        ids = tokenizer.encode(text).ids
        assert cut is (len(ids) > 128)
        kept = ids if not cut else [*ids[:127], ids[-1]]
        with torch.inference_mode():
            wanted = whole(input_ids=torch.tensor([kept])).logits.softmax(-1)[0, 1].item()
        assert score == pytest.approx(wanted, abs=2e-5)
    scorer = scoring.Scorer(str(model), "good", 128, 8)
    assert [scorer([text])[0] for text in given] == made
    assert scorer(given[::-1]) == made[::-1]
    assert len({score for score, _ in made}) > 30


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 32), (32, 32), (33, 48), (49, 64), (65, 96), (97, 128), (128, 128), (130, 130)]
)
def test_lengths_that_texts_are_padded_to(tokens, length):
    assert scoring.padded(tokens, 128) == length


def test_documents_go_by_their_score(tmp_path, model):
    """The stage runs in its own segment, with the same result for any split. The score becomes a column, and a dropped document
    has a reason."""
    given = {f"d{i}": text for i, text in enumerate(texts(60))}
    scores = dict(zip(given, scoring.Scorer(str(model), "good", 128, 8)(list(given.values())), strict=True))
    middle = sorted(score for score, _ in scores.values())[30]
    stages = [
        {"stage": "length", "min_chars": 1},
        entry(model, min_score=middle, column="quality"),
        {"stage": "length", "min_chars": 2},
    ]
    assert [[n for n, _ in part] for part in segments([parse(s) for s in stages])] == [[0], [1], [2]]
    told = []
    for pieces in (1, 9):
        found, here = curate(tmp_path / str(pieces), given, stages, pieces)
        told.append((left(found, here), left_out(found, here)))
        assert here.done["stages-1"] and here.done["stages-2"]
    assert told[0] == told[1]
    dropped = {id for id, (stage, reason, _) in told[0][1].items() if (stage, reason) == ("1 hf_classifier", "low_score")}
    assert dropped == {id for id, (score, _) in scores.items() if score < middle} and len(dropped) == 30
    above = parse(entry(model, max_score=middle)).open()([Document(id, text) for id, text in given.items()])
    assert sum(o.reason == "high_score" for o in above) == 29
    assert sum(o.counts.get("cut_to_max_tokens", 0) for o in above) == sum(cut for _, cut in scores.values()) > 5


def test_a_model_with_one_output_gives_a_grade_and_one_of_many_labels_a_probability_each(tmp_path):
    make_model(tmp_path / "grade", ("LABEL_0",))
    make_model(tmp_path / "many", ("a", "b", "c"), problem_type="multi_label_classification")
    grades = [score for score, _ in scoring.Scorer(str(tmp_path / "grade"), "LABEL_0", 64, 4)(texts(30))]
    assert min(grades) < 0 or max(grades) > 1
    sums = [
        sum(s)
        for s in zip(*([x for x, _ in scoring.Scorer(str(tmp_path / "many"), n, 64, 4)(texts(9))] for n in "abc"), strict=True)
    ]
    assert any(abs(total - 1) > 0.01 for total in sums)


def test_another_model_is_another_stage(tmp_path, model):
    shutil.copytree(model, tmp_path / "copy")
    stage = parse(entry(tmp_path / "copy", min_score=0.5))
    before = stage.identity()
    assert before["model"] == parse(entry(model, min_score=0.5)).identity()["model"]
    about = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(about | {"layer_norm_eps": 0.1}))
    assert stage.identity() != before


def test_what_cannot_be_a_classifier_is_refused_with_the_fix(tmp_path, model):
    def refused(match: str, **keys) -> None:
        with pytest.raises(ConfigError, match=match):
            parse({**entry(tmp_path / "copy", min_score=0.5), **keys}).check()

    shutil.copytree(model, tmp_path / "copy")
    refused(r"'goods' isn't a label of the model \(bad, good.*Did you mean 'good'", label="goods")
    refused("max_tokens: 512 is above the model's maximum. Set max_tokens to 128", max_tokens=512)
    refused("none': no such folder. Set model to a model's folder", model=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="set min_score, max_score, or both"):
        parse(entry(model))
    about = (tmp_path / "copy" / "config.json").read_text()
    (tmp_path / "copy" / "config.json").write_text(json.dumps(json.loads(about) | {"auto_map": {"AutoModel": "x.Y"}}))
    refused("needs its own code")
    (tmp_path / "copy" / "config.json").write_text(about)
    (tmp_path / "copy" / "tokenizer.json").unlink()
    refused(r"has no tokenizer\.json")
    shutil.copy(model / "tokenizer.json", tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    torch.save({}, tmp_path / "copy" / "pytorch_model.bin")
    refused("has no safetensors")
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"can't load .* as a sequence classifier"):
        parse(entry(tmp_path / "copy", min_score=0.5)).open()
