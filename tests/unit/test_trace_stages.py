"""Tests a document's path through stages that remove text shared by documents, and through unknown stages."""

import dataclasses
import hashlib
import json

import pytest
from heliostat.curation import reasons
from heliostat.curation.forget import forget
from heliostat.curation.text import trace
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

from tests.unit.build_pipeline import Here, make_dataset

SHARED = "what every page of this site says at its end"
TEXTS = [f"the {w} page of some and its own few more words here\n{SHARED}" for w in ("first", "second", "third")]
SHORT = f"too short a page\n{SHARED}"
STAGES = [{"stage": "repeated_lines"}, {"stage": "length", "min_words": 8}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("cut"), STAGES)


def dataset(folder, stages, **keys):
    (folder / "in").mkdir()
    rows = [{"text": text, "url": f"http://h/{i}", "site": "h"} for i, text in enumerate([*TEXTS, SHORT])]
    (folder / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = {"vocab_size": 300, "train_bytes": 5000}
    return make_dataset(Here(name="a", input=f"{folder}/in", output=f"{folder}/out", columns=["url", "site"], stages=stages,
                             tokenizer=tokenizer, **keys))  # fmt: skip


def end(made, url):
    (found,) = trace.find(made, url=url)
    return found


def test_behind_what_was_cut_out_the_record_tells(made):
    """The stored page lacks the shared text, and a page that is read again has it. That isn't a change of the input."""
    told = trace.trace(made, end(made, "http://h/3"))
    assert [(step["stage"], step["did"]) for step in told["stages"]] == [
        ("read", "kept"), ("0 repeated_lines", "came through"), ("1 length", "dropped")]  # fmt: skip
    assert told["end"]["stage"] == "1 length"
    assert [note for note in told["notes"] if "depend on all documents" in note] == told["notes"] != []
    whole = {row["hash"] for table in reasons.ends(made) for row in table.to_pylist()}  # one has kept the line that all have
    changed = next(text for text in TEXTS if hashlib.sha256(text.encode()).hexdigest() not in whole)
    with pytest.raises(ConfigError, match=r"The changes by stage 0 repeated_lines depend on all documents, .* Use --id or --url"):
        trace.find(made, text=changed.encode())


def test_what_a_cut_drops_is_found_by_its_columns(tmp_path):
    made = dataset(tmp_path, [{"stage": "repeated_lines", "max_removed_words": 0.1}])
    gone = [row for table in reasons.ends(made) for row in table.to_pylist() if row["stage"] == "0 repeated_lines"]
    assert len(gone) == 3 and all(end(made, row["columns"]["url"])["id"] == row["id"] for row in map(_read, gone))
    told = trace.trace(made, end(made, _read(gone[0])["columns"]["url"]))
    assert [(step["stage"], step["did"]) for step in told["stages"]] == [("read", "kept"), ("0 repeated_lines", "dropped")]


def _read(row):
    return row | {"columns": json.loads(row["columns"])}


def test_a_stage_that_this_version_does_not_have_is_one_clear_line(made):
    by = reasons.made_by(made)
    by = by | {"stages": [{**by["stages"][1], "gone_key": 3}]}
    with pytest.raises(
        ConfigError, match=r"made with a stage that this version of heliostat doesn't have, or has changed: .*gone_key"
    ):
        list(trace.stages_again(by, dataclasses.replace(trace.read_again(trace.source_of(made, by), "a.jsonl#1"))))


def test_a_forgotten_document_is_in_no_count_of_groups_or_cuts(tmp_path):
    made = dataset(tmp_path, STAGES[1:], together="site", chunk_tokens=16)
    assert made.meta["together"]["documents"] == 4 and made.meta["together"]["groups"] == 1
    left = forget(made, "a.jsonl#1", reasons.end_of(made, "a.jsonl#1"), Location(f"{tmp_path}/left"))
    assert left.meta["documents"] == 3 and left.meta["together"] == {"column": "site", "order": None}
    assert "cuts" in made.meta and "cuts" not in left.meta
