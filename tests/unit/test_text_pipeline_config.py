"""Tests the text pipeline's YAML: errors are reported before Ray starts, and which configurations count as equal."""

from pathlib import Path

import pytest
from heliostat.curation.prepare import load, prepare
from heliostat.curation.text import sources, tokens
from heliostat.errors import ConfigError

END = "<|endoftext|>"

GOOD = """
name: t
pipeline: heliostat.pipelines:TextPipeline
input: {tmp}/in
output: {tmp}/out
tokenizer: {{vocab_size: 300}}
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["pipeline=pipelines.text"], "must have the form package.module:Class"),
        (["pipeline=heliostat.curation.text.pipeline:TextPipelin"], "Did you mean 'TextPipeline'"),
        (
            ["pipeline=heliostat.curation.text.pipeline:TokenizerConfig"],
            "'heliostat.curation.text.pipeline:TokenizerConfig' must be a subclass of heliostat.curation.prepare.Pipeline",
        ),
        (["pipeline=null"], "isn't a class"),
        (["chunk_token=5"], "chunk_token: unknown key. Did you mean 'chunk_tokens'"),
        (["normalise=NFD"], "normalise: 'NFD' isn't a choice"),
        (["tokenizer.path=x"], "set either vocab_size"),
        (["tokenizer={path: nowhere}"], "tokenizer.path: 'nowhere': no such file"),
        (
            ["tokenizer={path: TMP/other}"],
            "no folder with a tokenizer.json. Prepare this dataset first: heliostat data prepare a.yaml",
        ),
        (["tokenizer={path: TMP/bad.json}"], "tokenizer.path: the tokenizers library can't read this file"),
        (["tokenizer={path: TMP/tok, end_of_document: </s>}"], "'</s>' isn't in the vocabulary"),
        (["tokenizer.vocab_size=10"], "tokenizer.vocab_size"),
        (
            ["tokenizer.vocab_size=258", "fill_in_the_middle={rate: 0.5}"],
            "no room for the 3 tokens of fill_in_the_middle. Set vocab_size to 260",
        ),
        (["tokenizer={path: TMP/tok}", "fill_in_the_middle={}"], "fill_in_the_middle: the tokenizer has none of the tokens"),
        (["fill_in_the_middle={rate: 2}"], "fill_in_the_middle.rate"),
        (["min_chars=9", "max_chars=3"], "max_chars: 3 is below min_chars 9"),
        (["input=TMP/nothing"], "no such file"),
        (["input=TMP/tok/*.txt"], "no file matches. Supported endings"),
        (["input=TMP/empty"], "the folder is empty. Supported endings"),
        (["memory_limit=5MB"], "memory_limit: '5MB' is too small. Use 64MiB or more"),
        (["stages=[{stage: language, languages: [en, english]}]"], "language: languages: 'english' isn't an ISO 639 code. Write"),
        (
            ["stages=[{stage: c4}, {stage: decontaminate, sets: {a: no.jsonl}}]"],
            "stages.1: decontaminate: sets: can't read",
        ),
        (["input=python:stdlip"], "input: 'python:stdlip' isn't an input that heliostat makes. Did you mean 'python:stdlib'?"),
        (["input=TMP/nothing", "memory_limit=64MiB"], "no such file"),
        (["stages={stage: c4}"], "stages: expected a list, got {'stage': 'c4'}. Write stages: [{stage: c4}]"),
        (["stages=c4"], "stages: expected a list, got 'c4'. Write stages: [{stage: c4}]"),
        (
            ["stages=[{stage: gopher_quality, min_words: 200000}]"],
            "stages.0: gopher_quality: min_words 200,000 is above max_words 100,000. Lower min_words, or raise max_words",
        ),
        (
            ["stages=[{stage: gopher_quality, min_word_length: 12.5}]"],
            "stages.0: gopher_quality: min_word_length 12.5 is above max_word_length 10.0. Lower min_word_length, or raise",
        ),
        (["stages=[{stage: length, min_chars: 9, max_chars: 3}]"], "stages.0: length: min_chars 9 is above max_chars 3. Lower"),
        (["stages=[{stage: minhash, within: dump}]"], "stages.0: minhash: within: 'dump' isn't a column of the documents"),
        (
            ["columns=[dump]", "stages=[{stage: minhash, within: dumps}]"],
            "within: 'dumps' isn't a column of the documents. Did you mean 'dump'",
        ),
        (
            ["columns=[date]", "stages=[{stage: minhash, keep: oldest, column: dat}]"],
            "stages.0: minhash: column: 'dat' isn't a column of the documents. Did you mean 'date'? Correct the name, or add",
        ),
        (
            ["stages=[{stage: c4}, {stage: minhash, keep: best, column: score}]"],
            "stages.1: minhash: column: 'score' isn't a column",
        ),
        (["stages=[{stage: minhash, keep: oldest, column: language}, {stage: language}]"], "column: 'language' isn't a column"),
        (["exclude=['[b-a]']"], "exclude: '[b-a]' is not a valid pattern"),
        (["exclude=['**']"], "exclude: matches every file of the input (1)"),
        (["output=TMP/in/out"], "overlap"),
        (["output=TMP"], "overlap"),
        (["output=TMP/in/a.txt"], "can't write to the folder"),
        (["output=ftp://x/y"], "scheme 'ftp' isn't supported"),
    ],
)
def test_errors_come_before_ray_and_before_warnings(tmp_path, monkeypatch, caplog, settings, message):
    def no_ray(**_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("heliostat.curation.prepare.connect", no_ray)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "tok").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("output: other")
    (tmp_path / "tok" / "tokenizer.json").write_text(tokens.train(["abc"], 257, END))
    path = tmp_path / "p.yaml"
    path.write_text(GOOD.format(tmp=tmp_path))
    with pytest.raises(ConfigError) as e:
        prepare(path, [s.replace("TMP", str(tmp_path)) for s in settings])
    assert message in str(e.value) and not caplog.messages


@pytest.mark.parametrize(
    "settings",
    [
        ["columns=[dump]", "stages=[{stage: minhash, within: dump}]"],
        ["stages=[{stage: code}, {stage: minhash, within: language}]"],
        ["columns=[date]", "stages=[{stage: minhash, keep: oldest, column: date}]"],
    ],
)
def test_a_column_that_documents_can_have_is_no_error(tmp_path, settings):
    (tmp_path / "in").mkdir()
    path = tmp_path / "p.yaml"
    path.write_text(GOOD.format(tmp=tmp_path))
    load(path, settings)[1].check()


def test_identity_knows_contents_and_not_places(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(GOOD.format(tmp=tmp_path))

    def identity(*settings: str):
        return load(path, list(settings))[1].identity()

    assert identity() == identity("input=elsewhere", "output=there")
    assert identity() != identity("chunk_tokens=5")
    assert identity() == identity("exclude=[]") != identity("exclude=[x]") and "exclude" not in identity()  # older datasets stay
    for folder, sample in [("x", "abc"), ("y", "abc"), ("z", "abab" * 9)]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(tokens.train([sample], 260, END))
    x, y, z = (identity(f"tokenizer={{path: {tmp_path / f}}}") for f in "xyz")
    assert x == y != z


def test_quickstart_is_valid():
    target, pipeline = load(Path("pipelines/quickstart.yaml"), [])
    assert target == "heliostat.pipelines:TextPipeline" and pipeline.name == "quickstart"
    pipeline.check()
    paths = {f.path for f in pipeline.inputs()}
    assert "json/decoder.py" in paths and not {"encodings/cp037.py", "pydoc_data/topics.py", "html/entities.py"} & paths


def test_a_glob_may_have_a_colon(tmp_path, monkeypatch):
    """Inputs that heliostat makes, such as python:stdlib, have a colon, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "de:a.txt").write_text("text")
    assert [file.path for file in sources.listing("de:*.txt")] == ["de:a.txt"]
