"""Tests the key `record_documents`: the counts are exact in each case, and the sample doesn't depend on the tasks."""

import pytest
from heliostat.curation import forget, reasons, recording
from heliostat.curation.registry import parse
from heliostat.curation.text import sources, trace
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.tasks import TextSource
from heliostat.data import manifest
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow
from tests.unit.build_making import STAGES, make_input, text_making

EVERY = 7
LENGTH = [{"stage": "length", "min_words": 20}]  # leaves exact duplicates to the shards
CASES = {
    "near": (STAGES, None, "near_duplicate"),
    "repeated": ([*LENGTH, {"stage": "repeated_lines"}], None, "empty"),
    "exact": (LENGTH, None, "duplicate"),
    "together": (LENGTH, Together(column="path"), "duplicate"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    make_input(folder / "in")
    return folder


def made(texts, name, every, seed=0, memory_limit=1 << 30, together=None, stages=LENGTH):
    """Makes the dataset of the texts. Returns the manifest, and the rows of the list of dropped documents."""
    flow, output = HereFlow(Work(Location(f"{texts}/{name}.work")), seed=seed), Location(f"{texts}/{name}")
    source, parsed = TextSource(str(texts / "in"), TextRules(min_chars=90)), [parse(entry) for entry in stages]
    making = text_making(flow, source, output, parsed, memory_limit, every=every, together=together)
    rows, meta = making.run(sources.listing(str(texts / "in"), ["extract"]))
    listed = [row for path in meta.pop("listed") or [] for row in spill.pq.read_table(f"{output.path}/{path}").to_pylist()]
    return manifest.write(output, rows, {**meta, "name": "texts"}), listed


def record(dataset: Manifest) -> list[dict]:
    return [row for table in reasons.ends(dataset) for row in table.to_pylist()]


@pytest.fixture(scope="module")
def whole(texts):
    return made(texts, "whole", 1)


@pytest.mark.parametrize("every", [EVERY, 0])
@pytest.mark.parametrize("case", CASES)
def test_counts_are_exact_and_the_record_has_the_sample_of_the_complete_record(texts, every, case):
    """With near duplicates, exact duplicates, texts that repeated lines leave empty, short texts, and a bad line."""
    stages, together, reason = CASES[case]
    made_with = [made(texts, f"{case}-{n}", n, stages=stages, together=together) for n in (every, 1)]
    (dataset, listed), (complete, everything) = made_with
    for name, part in reasons.funnel(complete).items():
        same = ("documents", "bytes", "kept", "kept_bytes", "dropped", "counts", "histograms", "examples")
        assert {key: reasons.funnel(dataset)[name][key] for key in same} == {key: part[key] for key in same}
    assert dataset.meta["dropped"] == complete.meta["dropped"] and sum(dataset.meta["dropped"].values()) > 10
    wanted = [row for row in record(complete) if every and row["key"] % every == 0]
    assert record(dataset) == wanted and {"kept", reason} < {row["reason"] for row in record(complete)}
    assert len({row["reason"] for row in everything}) > 1
    assert listed == [row for row in everything if every and recording.key_of(row["id"]) % every == 0]
    assert dataset.paths == complete.paths, "the shards are the same"


def test_the_sample_doesnt_depend_on_the_distribution_of_tasks(texts):
    first, again = made(texts, "first", EVERY)[0], made(texts, "again", EVERY, seed=5, memory_limit=40_000)[0]
    assert record(first) == record(again) and first.digest == again.digest


def test_crashed_and_unread_documents_are_always_recorded():
    for every in (0, 1000):
        assert all(recording.is_recorded(1, reason, every) for reason in ("crashed", "unread"))
        assert recording.rows({"crashed": 3, "unread": 1, "too_short": 5000}, every) == (9 if every else 4)
    assert not recording.is_recorded(1, "too_short", 1000) and recording.is_recorded(3000, "too_short", 1000)
    assert not recording.is_recorded(0, "too_short", 0)


def test_commands_say_that_a_dataset_has_only_a_sample(texts, whole):
    dataset, complete = made(texts, "sample", EVERY)[0], whole[0]
    recorded = {row["id"] for row in record(dataset)}
    lacking = next(row["id"] for row in record(complete) if row["id"] not in recorded)
    only = r"The dataset records only one document in 7 \(record_documents: sample\)"
    with pytest.raises(ConfigError, match=rf"no document has this id.*{only}.*Prepare the dataset with record_documents: all"):
        trace.find(dataset, id=lacking)
    unknown = next(id for id in map(str, range(1000)) if recording.key_of(id) % EVERY == 0)
    with pytest.raises(ConfigError) as failed:
        trace.find(dataset, id=unknown)
    assert "records only" not in str(failed.value), "this document would be in the sample"
    traced = trace.trace(dataset, trace.find(dataset, id=min(recorded))[0])
    assert any("one document in 7" in note for note in traced["notes"])
    assert not any("record_documents" in note for note in trace.trace(complete, trace.find(complete, id=lacking)[0])["notes"])
    with pytest.raises(ConfigError, match=r"the dataset records only one document in 7.*can't find every copy"):
        forget.check(dataset, Location(f"{texts}/left"))
    forget.check(complete, Location(f"{texts}/left"))


def test_a_duplicate_whose_kept_document_isnt_recorded_says_so(texts, whole):
    dataset = made(texts, "duplicates", EVERY)[0]
    recorded = {row["id"] for row in record(dataset)}
    gone = next(row for row in record(dataset) if row["reason"] == "duplicate" and row["detail"] not in recorded)
    traced = trace.trace(dataset, trace.find(dataset, id=gone["id"])[0])
    assert traced["kept"] is None and any(f"The document {gone['detail']} isn't recorded" in note for note in traced["notes"])
