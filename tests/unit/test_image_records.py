"""Tests the records of an image pipeline: what became of every image, and images that are forgotten."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from heliostat.curation import forget, reasons, recording
from heliostat.curation.text import trace
from heliostat.data import ancestry, documents, manifest
from heliostat.errors import ConfigError
from heliostat.tracking.lineage_of_documents import TrainedOnDocument
from heliostat.tracking.report import curation
from PIL import Image

from tests.unit.build_image_pipeline import STAGES, keys, make_input
from tests.unit.build_images import prepared


def test_what_became_of_every_image_is_told(tmp_path):
    """A kept image has its shard. A dropped one has the stage, the reason, and the image that stayed. All images are counted."""
    make_input(tmp_path / "in")
    made, _ = prepared(keys(tmp_path, stages=STAGES))
    ends = {row["id"]: row for table in reasons.ends(made) for row in table.to_pylist()}
    funnel = reasons.funnel(made)
    assert list(funnel) == ["read", "0 length", "1 image_size", "2 similar_images", "finish", "shard"]
    assert len(ends) == funnel["read"]["documents"] == made.rows + sum(made.meta["dropped"].values())
    held = {row["id"]: row for path in set(made.paths) for row in pq.read_table(Path(made.location.path) / path).to_pylist()}
    assert {id for id, row in ends.items() if row["reason"] == "kept"} == held.keys() and len(held) > 30
    for id, row in ends.items():
        told = trace.trace(made, reasons.end_of(made, id)[0])
        assert told["rows"] and told["end"]["reason"] == row["reason"] and told["end"]["what"]
        if row["reason"] == "kept":
            (piece,) = told["shard"]["pieces"]
            file = pq.ParquetFile(Path(made.location.path) / row["detail"])
            assert file.read_row_group(piece["row_group"])["id"][piece["first"]].as_py() == id
            trained = TrainedOnDocument(None, made, id)  # where a run that trains on the collection finds it: in one of its parts
            parts = {name: manifest.read(made.location.join(name)) for name in made.meta["parts"]}
            held_by = {name: found for name, part in parts.items() if (found := trained._pieces(part))}
            ((part, ((path, there),)),) = held_by.items()
            assert f"{part}/{path}" == row["detail"] and (there.row_group, there.first) == (piece["row_group"], piece["first"])
            assert {part.digest for part in parts.values()} < ancestry.related(made.meta)
        elif row["reason"] in ("duplicate", "near_duplicate"):
            assert told["kept"] in held and row["stage"] == "2 similar_images"
        else:
            assert told["kept"] is None and told["shard"] is None
    by_reason = Counter((row["stage"], row["reason"]) for row in ends.values())
    assert (
        by_reason["0 length", "short"] >= 3 and by_reason["1 image_size", "small"] and by_reason["2 similar_images", "duplicate"]
    )
    assert by_reason["read", "no_image"] == by_reason["read", "no_caption"] == 1
    assert by_reason["1 image_size", "undecodable"] == by_reason["finish", "undecodable"] == 1
    near = next(row for row in ends.values() if row["reason"] == "near_duplicate")
    url = json.loads(near["columns"])["url"]
    assert [row["id"] for row in trace.find(made, url=url)] == [near["id"]]
    assert funnel["1 image_size"]["histograms"]["side"] and funnel["2 similar_images"]["largest"]
    page = curation.page(curation.gather(made))
    small = [example for rule in funnel["1 image_size"]["examples"].values() for example in rule]
    assert small and all(len(example) == 6 and example[5] in page for example in small)
    pictures = [Image.open(io.BytesIO(base64.b64decode(example[5]))) for example in small if example[5]]
    assert len(pictures) >= len(small) - 2 and all(max(p.size) <= 96 and p.format == "JPEG" for p in pictures)
    assert page.count('<img alt="" src="data:image/jpeg;base64,') >= len(pictures)
    assert (
        "similar_images" in page and "almost the pixels of another image" in page and "tokens" not in page.partition("</dl>")[0]
    )


def test_what_images_cannot_be_asked_is_one_error(tmp_path):
    make_input(tmp_path / "in", 12)
    made, _ = prepared(keys(tmp_path, stages=STAGES))
    with pytest.raises(ConfigError, match=r"--text: the dataset contains images or conversations\. Pass --id or --url"):
        trace.find(made, text=b"x")


@pytest.mark.parametrize("buckets", [{"step": 8, "max_aspect": 2.0}, None], ids=["collection", "one size"])
def test_an_image_is_forgotten_and_the_others_keep_their_places(tmp_path, buckets):
    """Its shard's other row groups, the other shards, and the parts are equal to the byte."""
    make_input(tmp_path / "in")
    made, _ = prepared(keys(tmp_path, stages=STAGES, buckets=buckets))
    end = next(row for table in reasons.ends(made) for row in table.to_pylist() if row["reason"] == "kept")
    output = made.location.ending("2")
    target, found = forget.one(trace.find(made, id=end["id"]), "--id")
    forget.check(made, output)
    less = forget.forget(made, target, found, output)
    assert manifest.read(output).digest == less.digest != made.digest
    assert (less.rows, less.meta["documents"], less.kind) == (made.rows - 1, made.meta["documents"] - 1, made.kind)
    both = [{row["id"]: row for path in set(m.paths) for row in pq.read_table(Path(m.location.path) / path).to_pylist()}
            for m in (made, less)]  # fmt: skip
    assert both[1] == {id: row for id, row in both[0].items() if id != target}
    (changed,) = set(made.paths) - set(less.paths)
    assert changed == end["detail"] and len(set(made.paths)) - len(set(less.paths)) in (0, 1)
    for name in made.meta.get("parts", {}):
        before, after = (manifest.read(m.location.join(name)) for m in (made, less))
        assert (before.digest == after.digest) is not end["detail"].startswith(f"{name}/"), (
            "parts that it is not in stay the same"
        )
        assert before.meta["size"] == after.meta["size"] and after.file("tokenizer.json").exists()
    assert reasons.funnel(less)["shard"]["kept"] == made.rows - 1
    assert trace.trace(less, trace.find(less, id=target)[0])["end"]["reason"] == "forgotten"


def test_an_images_place_in_a_dataset_without_stages(tmp_path):
    make_input(tmp_path / "in", 20)
    made, _ = prepared(keys(tmp_path, buckets=None))
    path = made.paths[0]
    ids = pq.read_table(Path(made.location.path) / path)["id"].to_pylist()
    found = [documents.pieces(made, path, id) for id in ids]
    assert all(len(pieces) == 1 and pieces[0].tokens == 1 for pieces in found)
    assert documents.pieces(made, path, "no such id") == []


def test_a_sample_of_the_images_is_recorded_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(recording.EVERY, "sample", 4)
    make_input(tmp_path / "in")
    complete, _ = prepared(keys(tmp_path, stages=STAGES))
    made, _ = prepared(keys(tmp_path, "sample", stages=STAGES, record_documents="sample"))
    rows, wanted = ([row for table in reasons.ends(one) for row in table.to_pylist()] for one in (made, complete))
    assert rows == [row for row in wanted if row["key"] % 4 == 0]
    assert {"kept", "duplicate", "short"} <= {row["reason"] for row in rows}
    assert made.meta["dropped"] == complete.meta["dropped"] and made.paths == complete.paths
    assert "one document in 4" in curation.page(curation.gather(made))
    assert "one document in" not in curation.page(curation.gather(complete))
