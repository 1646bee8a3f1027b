"""Tests `heliostat run samples`: the text that a step trained on, and its place in the dataset."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from heliostat.checkpoint import layout
from heliostat.curation.text import tokens
from heliostat.data import manifest, receipt
from heliostat.data.dataset import Bad, DataPlan, open_dataset
from heliostat.errors import ConfigError
from heliostat.runs import consumed, segments
from heliostat.runs.samples import samples
from heliostat.storage.locations import Location
from heliostat.training.worker import unsealed

from tests.unit.build_index import index
from tests.unit.build_job import job
from tests.unit.test_dataset import LENGTH, make_plan
from tests.unit.test_verify import command

END = "<|end|>"
TEXTS = [f"def f{i}(x):\n    return {'x + ' * (i % 7)}{i}  # é [bold]\n" for i in range(120)]
STEPS = 6


def make_text(folder: Path, vocabulary: int = 300) -> manifest.Manifest:
    """Writes a dataset of two text shards like the pipeline; its recorded vocabulary may be smaller than the real one."""
    definition = tokens.train(TEXTS, 300, END)
    tokenizer = tokens.load(definition)
    end = tokens.end_id(tokenizer, END)
    place, rows = Location(str(folder)), []
    place.join("tokenizer.json").write(definition.encode())
    for s in range(2):
        path = f"shards/{s}.parquet"
        texts = TEXTS[s * 60 : (s + 1) * 60]
        place.join(path).write(tokens.shard([str(i) for i in range(60)], tokens.encode(tokenizer, texts, end), 400))
        rows += manifest.read_footer(place, path, "tokens")
    facts = {"tokenizer": hashlib.sha256(definition.encode()).hexdigest(), "vocab_size": vocabulary, "end_of_document": end}
    return manifest.write(place, rows, {"kind": "tokens", **facts})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    return make_text(tmp_path_factory.mktemp("text"))


def make_run(folder: Path, source: manifest.Manifest, *changes: DataPlan) -> Location:
    """Writes a run's folder with one receipt and one checkpoint. The receipt's content doesn't matter here."""
    place = Location(str(folder))
    for plan in (make_plan(source), *changes):
        segments.begin(place, plan, plan.first_step)
    steps = ["00" * 16] * STEPS
    place.join("receipts", f"step-{STEPS:08d}.json").write(
        receipt.seal(0, steps, receipt.extend(receipt.GENESIS, steps), plan.digest)
    )
    model = {"data.sources.0.path": str(source.location), "data.sequence_length": LENGTH, "model.vocab_size": None}
    facts = {"receipt": {"steps": STEPS, "chain": ""}, "data_digest": plan.digest, "job": job(**model).dump()}
    layout.folder(place, STEPS).join(layout.INDEX).write(layout.encode(index(STEPS, **facts)))
    return place


@pytest.fixture
def run(source: manifest.Manifest, tmp_path: Path) -> Location:
    return make_run(tmp_path / "run", source)


def row(source: manifest.Manifest, shard: str, row_group: int, row: int) -> list[int]:
    """Returns a sample's tokens, by counting them in its row group."""
    group = pq.ParquetFile(source.location.join(shard).path).read_row_group(row_group)
    return [t for document in group["tokens"].to_pylist() for t in document][row * LENGTH : (row + 1) * LENGTH]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_every_sample_is_the_text_at_its_place(run, source, step):
    """For a global batch, by virtual rank: the text is that of the named row of the named row group, including end-of-document
    marks."""
    found = samples(run, step)
    assert [(s["lane"], s["place"]) for s in found] == [(lane, place) for lane in range(4) for place in range(2)]
    tokenizer = tokens.load(source.location.join("tokenizer.json").read().decode())
    for sample in found:
        assert sample["source"] == str(source.location) and sample["epoch"] == 0 and sample["replaces"] is None
        content = row(source, sample["shard"], sample["row_group"], sample["row"])
        assert sample["text"] == tokenizer.decode(content, skip_special_tokens=False) != ""
    assert any(END in s["text"] for s in found)


def test_a_replaced_sample_says_what_was_there(tmp_path, monkeypatch, capsys):
    """It has the place of the bad sample and its fault. Its own place and text are those that were trained on."""
    source = make_text(tmp_path / "text", vocabulary=290)
    run = make_run(tmp_path / "run", source)
    found = [s for step in range(1, STEPS + 1) for s in samples(run, step)]
    planned = [s["replaces"] or s for s in found]
    bad = [max(row(source, s["shard"], s["row_group"], s["row"])) >= 290 for s in planned]
    assert [s["replaces"] is not None for s in found] == bad and 0 < sum(bad) < len(bad)
    for sample in (s for s in found if s["replaces"]):
        assert max(row(source, sample["shard"], sample["row_group"], sample["row"])) < 290
        assert "a token outside the vocabulary of 290" in sample["replaces"]["reason"]
    _, out, _ = command(monkeypatch, capsys, "run", "samples", str(run), "--step", str(bad.index(True) // 8 + 1))
    assert out.count("\n  in place of shards/") == sum(bad[bad.index(True) // 8 * 8 :][:8])


def test_the_samples_of_all_steps_are_all_different(run):
    """Within an epoch, no place appears twice."""
    places = [(s["shard"], s["row_group"], s["row"]) for step in range(1, STEPS + 1) for s in samples(run, step)]
    assert len(set(places)) == len(places) == STEPS * 8


def test_after_a_change_of_data_the_new_order_is_shown(run, source, tmp_path):
    """A step's samples are those of its segment."""
    before = [samples(run, step) for step in range(1, STEPS + 1)]
    changed = dataclasses.replace(make_plan(source, seed=9), mix=((3, (1.0,)),))
    other = make_run(tmp_path / "changed", source, changed)
    after = [samples(other, step) for step in range(1, STEPS + 1)]
    assert after[:3] == before[:3]
    for step in range(3, STEPS):
        expected = open_dataset(changed).order.locate(open_dataset(changed).order.step(step).ravel())
        assert [s["row"] for s in after[step]] == expected.row.tolist() != [s["row"] for s in before[step]]


def test_a_step_that_has_no_receipt_says_which_have(run):
    """The error has the first step without a receipt, and the steps that Python's API accepts. The line names no option of the
    command line."""
    for step in (STEPS + 1, 0):
        with pytest.raises(ConfigError, match=rf"^step: the run has no step {step}\. Pass a step from 1 to 6\.$"):
            samples(run, step)


def test_a_run_without_a_checkpoint_has_no_recipe(run):
    """Its job is in the checkpoints. One line reports this."""
    layout.folder(run, STEPS).delete()
    with pytest.raises(ConfigError, match=r"has no complete checkpoint, so the run's recipe isn't known\. Try again after"):
        samples(run, 1)


def test_the_command_shows_a_sample_in_two_lines_or_whole(run, monkeypatch, capsys):
    """One line has the place, and one the escaped text. --full prints the text unchanged, and --json prints everything."""
    expected = samples(run, 2)
    code, out, err = command(monkeypatch, capsys, "run", "samples", str(run), "--step", "2")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 16)
    for sample, place, text in zip(expected, lines[::2], lines[1::2], strict=True):
        assert f"/{sample['shard']}, row group {sample['row_group']}, row {sample['row']}, epoch 0" in place
        assert json.loads(text) == sample["text"]
    _, out, _ = command(monkeypatch, capsys, "run", "samples", str(run), "--step", "2", "--full")
    assert all(s["text"] + "\n" in out for s in expected)
    _, out, _ = command(monkeypatch, capsys, "run", "samples", str(run), "--step", "2", "--json")
    assert json.loads(out) == {"step": 2, "samples": expected}


def test_lists_of_replaced_samples_count_steps_from_1_whatever_their_age(tmp_path):
    """Lists of older versions count steps from 0. They are shown like those of new runs."""
    source = make_text(tmp_path / "text")
    data = open_dataset(make_plan(source))
    entry = unsealed.describe(4, Bad(0, 0, 0, 1, "r", (0, 0, 2)), data)
    old = {**entry, "step": 4}
    del old["counted_from"]
    assert entry["step"] == 5 and consumed._from_1(old) == consumed._from_1(entry) == entry
