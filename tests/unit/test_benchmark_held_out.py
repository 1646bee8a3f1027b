"""Tests a suite of held-out text: its questions contain their answers, depend only on the seed, and were never trained on.

Also tests the share of examples that is in the training data.
"""

import json
import random
from itertools import chain

import pytest
import yaml
from heliostat.errors import ConfigError, MissingDataError
from heliostat.evaluation import contamination, documents, held_out
from heliostat.evaluation.held_out import WordedDocument

from tests.unit import build_pages

FRACTION = 0.2


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return build_pages.make(tmp_path_factory.mktemp("pages"))


def read(made, chunks):
    return list(chain.from_iterable(documents.Documents(made).texts(chunks)))


def test_documents_come_back_as_they_were_and_each_is_trained_on_or_held_out(pages):
    held, trained = read(pages, documents.held_out(pages, FRACTION)), read(pages, documents.trained(pages, 16, FRACTION))
    assert sorted(held + trained) == sorted(build_pages.texts())
    assert 0.1 < len(held) / len(build_pages.texts()) < 0.3


def lines(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def suite(pages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return folder, held_out.make(str(pages.location), folder, 40, FRACTION, seed=3)


def test_the_same_seed_makes_the_same_files_and_another_one_others(pages, suite, tmp_path):
    folder, told = suite
    for seed, same in ((3, True), (4, False)):
        other = tmp_path / str(seed)
        other.mkdir()
        held_out.make(str(pages.location), other, 40, FRACTION, seed)
        for name in held_out.TASKS:
            assert (lines(folder, name) == lines(other, name)) is same
    assert told["tasks"]["held_out_choice"] == told["tasks"]["held_out_cloze"] == 40 and told["tasks"]["held_out_recall"] > 15
    assert told["digest"] == pages.digest


def test_every_question_goes_on_in_a_held_out_document_and_in_no_other(pages, suite):
    folder, _ = suite
    held, trained = read(pages, documents.held_out(pages, FRACTION)), read(pages, documents.trained(pages, 16, FRACTION))
    for one in lines(folder, "held_out_choice"):
        whole = one["context"] + one["choices"][one["answer"]]
        assert any(whole in text for text in held) and not any(whole in text for text in trained)
        assert len(set(one["choices"])) == 4 and not any(one["context"] + wrong in text for text in held for i, wrong in
                                                         enumerate(one["choices"]) if i != one["answer"])  # fmt: skip
    for one in lines(folder, "held_out_cloze"):
        assert any(one["context"] + one["answer"] in text for text in held) and one["answer"].strip() in one["context"]
    for one in lines(folder, "held_out_recall"):
        found = [t for text in held if (t := text).find(one["context"]) >= 0]
        assert any(text.split(one["context"], 1)[1].lstrip().startswith(one["answer"]) for text in found)
        assert f"{one['context'].split()[-1]} {one['answer']}" in " ".join(one["context"].split())
    answers = [one["answer"] for one in lines(folder, "held_out_choice")]
    assert {answers.count(i) > 2 for i in range(4)} == {True}  # no place is the right one by habit


def test_the_task_files_are_plain_and_the_suite_names_those_that_have_questions(suite):
    folder, told = suite
    assert yaml.safe_load((folder / "suite.yaml").read_text())["tasks"] == list(held_out.TASKS)
    for name in held_out.TASKS:
        task = yaml.safe_load((folder / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name and (folder / task["dataset_kwargs"]["data_files"]["test"]).is_file()
    assert json.loads((folder / "made.json").read_text())["documents"] == told["documents"]


def test_white_space_is_kept():
    code = "def f(x):\n" + "".join(f"    y{i} = f(x)\n" for i in range(30))
    asked = held_out.choice(WordedDocument.of(code), random.Random(0), [WordedDocument.of(code.replace("y", c)) for c in "abc"])
    assert asked and asked["context"] + asked["choices"][asked["answer"]] in code


def test_text_that_is_too_little_or_none_is_refused(pages, tmp_path):
    short = build_pages.make(tmp_path / "short", tuple(f"too short {i}" for i in range(60)))
    with pytest.raises(ConfigError, match=r"holds out only 0 documents of text\. Pass a larger fraction"):
        held_out.make(str(short.location), tmp_path / "out", 10, 0.5, 0)
    plain = build_pages.make(tmp_path / "plain", tuple(" ".join(f"{c}{i}" for i in range(30)) for c in "abcdefghij"))
    with pytest.raises(ConfigError, match="too short for questions"):
        held_out.make(str(plain.location), tmp_path / "out", 10, 0.9, 0)


def test_examples_of_what_was_trained_on_are_found_and_held_out_ones_are_not(pages, tmp_path):
    trained, held = documents.trained(pages, 16, FRACTION), documents.held_out(pages, FRACTION)
    seen, unseen = read(pages, trained)[:9], read(pages, held)[:9]
    known = set(chain.from_iterable(zip(*(t.lower().split()[i:] for i in range(8)), strict=False) for t in read(pages, trained)))
    unseen = [t for t in unseen if not known & set(zip(*(t.lower().split()[i:] for i in range(8)), strict=False))]
    assert len(unseen) > 3
    examples = contamination.Examples(13)
    examples.add("seen", [" ".join(t.split()[5:60]).upper() for t in seen])  # neither case nor white space hides it
    examples.add("unseen", unseen)
    examples.add("mixed", [seen[0], unseen[0], "two words"])
    calls = []
    assert examples.look_through(contamination.Training([(pages, trained)]), lambda *told: calls.append(told)) == []
    assert calls[-1] == (len(trained), len(trained))
    assert examples.shares("seen") == [1.0] * len(seen) and examples.shares("unseen") == [0.0] * len(unseen)
    found = contamination.summary(examples.shares("mixed"), [1, 0, 1], 2 / 3)
    assert found == {"compared": 2, "too_short": 1, "contaminated": 0.5, "overlap": 0.5, "clean_examples": 1, "clean_score": 0.0}
    for values, score in (([(1, 2)] * 3, 0.5), ([-1.0, -2.0, -3.0], 7.4)):  # an F1, a perplexity: no mean
        assert contamination.summary(examples.shares("mixed"), values, score)["clean_score"] is None


def test_a_damaged_chunk_is_counted_and_stops_nothing(tmp_path):
    made = build_pages.make(tmp_path / "data")
    file = tmp_path / "data" / "shards" / "1.parquet"
    raw = bytearray(file.read_bytes())
    raw[200] ^= 0xFF
    file.write_bytes(raw)
    examples = contamination.Examples(13)
    examples.add("a", build_pages.texts()[:20])
    told = contamination.measured(examples, tmp_path, [str(made.location)], lambda done, all_: None)
    assert told["damaged"] == 1 and told["unknown"] == ""
    assert sum(share == 1.0 for share in examples.shares("a")) / 20 > 0.5


def test_what_a_folder_does_not_say_is_not_known_and_what_the_suite_names_must_be_text(tmp_path):
    examples = contamination.Examples(13)
    examples.add("a", ["x"])
    told = contamination.measured(examples, tmp_path, [], lambda done, all_: None)
    assert "the model's folder doesn't name the training data. Set contamination.data" in told["unknown"]
    with pytest.raises(MissingDataError, match="no dataset here"):
        contamination.measured(examples, tmp_path, [str(tmp_path)], lambda done, all_: None)
