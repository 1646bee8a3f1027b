"""Tests that text of evaluation sets is found wherever it is, and that a classifier learns its examples, independent of the
batch."""

import html
import json
import random
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from heliostat.cli import main
from heliostat.curation import decontamination, linear, registry, training
from heliostat.curation.stage import Document
from heliostat.curation.stages.classifier import Classifier
from heliostat.curation.stages.decontaminate import Decontaminate
from heliostat.errors import ConfigError
from typer.testing import CliRunner

QUESTION = "A train leaves the station at noon and travels for three hours at sixty miles an hour how far has it gone"


@pytest.fixture
def sets(tmp_path):
    path = tmp_path / "gsm.jsonl"
    path.write_text(
        json.dumps({"question": "too short"}) + "\n" + json.dumps({"question": QUESTION, "answer": ["180 miles"]}) + "\n"
    )
    other = tmp_path / "other.txt"
    other.write_text("One paragraph of a text that is used for evaluation and that nobody should ever train on.\n\nShort one.\n")
    return {"gsm": str(path), "other": str(other)}


def words(count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=6)) for _ in range(count)]


def test_hits_are_listed_with_their_place(sets):
    work = Decontaminate(sets=sets).open()
    hidden = " ".join(words(50)) + "\n" + QUESTION.upper().replace(" ", ",\n ") + "\n" + " ".join(words(50, 1))
    clean, found, short = work([Document("a", " ".join(words(500))), Document("b", hidden), Document("c", "a train")])
    assert clean.document and short.document and clean.measures == {"hits": 0, "hit_share": 0.0}
    assert (found.reason, found.detail) == ("contaminated", "gsm#2 at word 51")
    assert found.measures["hits"] == len(QUESTION.split()) - 12
    (part,) = work([Document("d", " ".join(QUESTION.split()[:12]))])
    assert part.document


FRENCH = "Où étiez-vous l'été dernier, quand les élèves ont passé à Noël leur dernière épreuve d'algèbre en 1987 ?"
CHINESE = "小明从家里出发去学校，先走了三百米，又坐了两站公共汽车，最后步行五百米到达。"
HINDI = "राम के पास बारह सेब थे और उसने अपने मित्र को पाँच सेब दिए तो उसके पास कितने सेब बचे"
UNSPACED = "ครูให้นักเรียนอ่านหนังสือเรื่องนี้ก่อนสอบปลายภาค"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("example", [FRENCH, CHINESE, HINDI, UNSPACED], ids=["French", "Chinese", "Hindi", "Thai"])
def test_examples_of_any_script_are_found_in_any_form_of_unicode(tmp_path, example, form):
    """This holds in documents and in sets, with other accents, punctuation, and numbers."""
    path = tmp_path / "set.txt"
    path.write_text(unicodedata.normalize(form, example))
    work = Decontaminate(sets={"e": str(path)}).open()
    written = [example, unicodedata.normalize("NFD", example), example.upper()]
    written += [example.replace("\uff0c", " - ").replace("1987", "12,5")]
    written += [without_accents(example)] if example == FRENCH else []
    outcomes = work([Document(str(i), f"some words {text} and others") for i, text in enumerate(written)])
    assert {o.reason for o in outcomes} == {"contaminated"} and len({o.measures["hits"] for o in outcomes}) == 1


def without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def test_vowel_signs_and_tables_tell_texts_apart(tmp_path):
    """Hindi text with other vowels, and other rows of numbers, are different texts."""
    path = tmp_path / "set.txt"
    path.write_text(HINDI + "\n\n" + " ".join(str(i * 37 % 101) for i in range(40)))
    work = Decontaminate(sets={"e": str(path)}).open()
    other = HINDI.translate({ord("\u0947"): "\u094b"})
    texts = [other, " ".join(str(i * 41 % 103) for i in range(40)), " ".join(str(i * 37 % 101) for i in range(13))]
    assert [bool(o.document) for o in work([Document(str(i), text) for i, text in enumerate(texts)])] == [True, True, False]


def test_an_example_goes_to_the_end_of_its_line_whatever_is_in_its_strings():
    """JSON may contain U+2028, U+2029, and U+0085 unescaped. Windows ends lines with two characters."""
    records = [{"question": "one\u2028two\u2029three\u0085four"}, {"question": "next"}]
    data = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    assert list(decontamination.examples("a.jsonl", data, [])) == [(1, records[0]["question"]), (2, "next")]


def test_planted_n_grams_are_all_found_and_nothing_else():
    draw = random.Random(5)
    evaluation = [" ".join(words(30, seed)) for seed in range(1000, 1100)]
    sets = {"e": ("e.txt", "\n\n".join(evaluation).encode())}
    index, short = decontamination.index(sets, [], 13), decontamination.short(sets, [], 13)
    hits = 0
    assert not short
    for seed in range(400):
        text = words(draw.randint(0, 200), seed)
        at, planted = draw.randint(0, len(text)), draw.randint(0, 1)
        if planted:
            start = draw.randint(0, 17)
            text[at:at] = evaluation[draw.randint(0, 99)].split()[start : start + 13]
        found = index.hits(decontamination.grams([" ".join(text)], 13)[0])
        assert found.tolist() == ([at] if planted else [])
        hits += planted
    assert hits > 100


def test_what_a_set_cannot_be_is_said(sets, tmp_path, caplog):
    Decontaminate(sets=sets).check()
    assert "1 examples of gsm have fewer than 13 words" in caplog.text
    with pytest.raises(ConfigError, match="line 1: none of the fields text"):
        Decontaminate(sets=sets, fields=["text"]).check()
    with pytest.raises(ConfigError, match=r"no example has 99 words or more\. Lower `n`"):
        Decontaminate(sets=sets, n=99).check()
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="line 1: not a JSON object"):
        Decontaminate(sets={"bad": str(tmp_path / "bad.jsonl")}).check()
    with pytest.raises(ConfigError, match=r"sets: can't read '/none'"):
        Decontaminate(sets={"none": "/none"}).check()


def test_the_identity_follows_from_the_content(sets, tmp_path):
    before = Decontaminate(sets=sets).identity()
    moved = tmp_path / "moved.txt"
    moved.write_bytes(Path(sets["other"]).read_bytes())
    assert Decontaminate(sets=sets | {"other": str(moved)}).identity() == before
    moved.write_text("Something else that has at least thirteen words in it so that it can be found here.")
    assert Decontaminate(sets=sets | {"other": str(moved)}).identity() != before


def examples(count, seed):
    draw = random.Random(seed)
    topic = {
        0: ["buy", "cheap", "now", "click", "here", "win", "free", "offer"],
        1: ["theorem", "proof", "lemma", "integral", "history", "chapter", "water"],
    }
    common = ["the", "a", "of", "and", "to", "in", "is", "was", "for", "on"]
    return [
        [" ".join(draw.choices(common, k=40) + draw.choices(topic[kind], k=draw.randint(2, 10))) for _ in range(count)]
        for kind in (1, 0)
    ]


def test_a_classifier_learns_and_reports_on_held_out_documents(tmp_path):
    good, bad = examples(150, 0)
    made, report = linear.train(good, bad, bits=14)
    assert report["held_out_good"] == report["held_out_bad"] == 30 and report["trained_good"] == 120
    assert report["held_out"]["0.5"]["precision"] >= 0.95 and report["held_out"]["0.5"]["recall"] >= 0.9
    made.save(tmp_path / "model", report)
    stage = Classifier(model=str(tmp_path / "model"))
    stage.check()
    fresh_good, fresh_bad = examples(50, 1)
    outcomes = stage.open()([Document(str(i), t) for i, t in enumerate(fresh_good + fresh_bad)])
    right = [bool(o.document) == (i < 50) for i, o in enumerate(outcomes)]
    assert sum(right) >= 95 and all(o.document.columns["quality"] >= 0.5 for o in outcomes if o.document)
    again, same = linear.train(good[::-1], bad, bits=14)
    assert same == report and np.array_equal(again.weights, made.weights)
    before = stage.identity()
    made.weights[0] += 1
    made.save(tmp_path / "model", report)
    assert stage.identity() != before


def test_recall_is_of_documents_that_were_not_trained_on():
    """Random labels can't be learned, so held-out documents aren't classified better than by chance."""
    draw = random.Random(2)
    texts = [" ".join(words(30, seed)) for seed in range(400)]
    draw.shuffle(texts)
    _, report = linear.train(texts[:200], texts[200:], bits=14)
    assert report["held_out"]["0.5"]["precision"] is None or report["held_out"]["0.5"]["precision"] < 0.75


def test_what_cannot_be_a_classifier_is_said(tmp_path):
    good, bad = examples(20, 0)
    with pytest.raises(ConfigError, match="only 5 different examples of bad documents"):
        linear.train(good, bad[:5])
    with pytest.raises(ConfigError, match="1 documents are in both folders of examples"):
        linear.train(good, [*bad, good[0]])
    with pytest.raises(ConfigError, match="contains no classifier"):
        Classifier(model=str(tmp_path)).check()
    made, report = linear.train(good, bad, bits=10)
    made.save(tmp_path, report)
    about = json.loads((tmp_path / linear.ABOUT).read_text())
    (tmp_path / linear.ABOUT).write_text(json.dumps(about | {"bits": 11}))
    with pytest.raises(ConfigError, match="don't match the keys in"):
        Classifier(model=str(tmp_path)).check()


def test_a_classifier_is_trained_from_two_folders(tmp_path):
    good, bad = examples(40, 0)
    for name, texts in (("good", good), ("bad", bad)):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "all.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[1:]) + "\nbroken\n")
        (tmp_path / name / "one.txt").write_text(texts[0])
    report = training.train(tmp_path / "good", tmp_path / "bad", tmp_path / "model", bits=12)
    assert report["left_out"] == {"invalid_json": 2} and report["trained_good"] + report["held_out_good"] == 40
    assert json.loads((tmp_path / "model" / linear.ABOUT).read_text())["held_out"] == report["held_out"]
    linear.load(tmp_path / "model")
    with pytest.raises(ConfigError, match="contains no files"):
        training.train(tmp_path / "none", tmp_path / "bad", tmp_path / "model")


def test_one_command_trains_on_real_text(tmp_path):
    """Trains on Python's manual against its source, as text files and as pages. The same examples give the same folder."""
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    for i, (name, text) in enumerate(sorted(topics.items())):
        page = f"<html><body><main><p>{html.escape(text)}</p></main></body></html>"
        (tmp_path / "good" / (f"{name}.html" if i % 20 == 0 else f"{name}.txt")).write_text(page if i % 20 == 0 else text)
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:70]:
        (tmp_path / "bad" / f"{path.name}.txt").write_text(path.read_text())
    (tmp_path / "bad" / "picture.png").write_bytes(b"\x89PNG")
    command = ["data", "train-classifier", str(tmp_path / "good"), str(tmp_path / "bad"), "--out"]
    found = CliRunner().invoke(main.app, [*command, str(tmp_path / "model"), "--json"])
    report = json.loads(found.stdout)
    assert found.exit_code == 0 and report["left_out"] == {"unknown_kind": 1} and report["held_out_bad"] == 14
    assert report["trained_good"] + report["held_out_good"] == len(set(topics.values()))
    assert report["held_out"]["0.5"]["precision"] > 0.9 and report["held_out"]["0.5"]["recall"] > 0.9
    said = CliRunner().invoke(main.app, [*command, str(tmp_path / "again")]).stdout
    assert "left out: 1 unknown_kind" in said and f"{report['held_out']['0.5']['recall']:.1%}" in said
    for name in (linear.ABOUT, linear.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    refused = CliRunner().invoke(main.app, [*command, str(tmp_path / "good")])
    assert isinstance(refused.exception, ConfigError) and "--out" in str(refused.exception)


@pytest.mark.parametrize("name", registry.names())
def test_a_stage_has_the_name_of_its_file_and_says_what_its_thresholds_are(name):
    stage = registry.find(name)
    assert stage.named() == name
    assert all(key in stage.model_fields for keys in stage.thresholds.values() for key in keys)
    assert all(meaning for meaning in stage.reasons.values())
    with pytest.raises(ValueError, match=f"{name}: .*no_such_key: unknown key"):
        registry.parse({"stage": name, "no_such_key": 1})
