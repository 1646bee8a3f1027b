"""Tests the selection of the text that trains a tokenizer: the documents with the lowest hashes, up to `train_bytes`."""

import hashlib
import random
from collections import Counter
from itertools import accumulate

import pytest
from heliostat.curation import segment
from heliostat.curation.engine import Curated
from heliostat.curation.stage import Document
from heliostat.curation.text import making, tasks
from heliostat.curation.text.documents import TextRules
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow
from tests.unit.build_making import BPE, text_making


def texts_of(rng: random.Random) -> list[str]:
    """Draws texts of very different sizes; a share of them are copies."""
    texts = [f"{rng.random()} " + "word " * rng.choice([1, 30, 300, rng.randrange(2000)]) for _ in range(rng.randrange(1, 200))]
    return [rng.choice(texts) if rng.random() < 0.4 else text for text in texts]


def expected(texts: list[str], train_bytes: int) -> list[str]:
    """Selects the training text in the simplest way. The last prefix is the first one at which all documents, with their copies,
    have `train_bytes`."""
    prefix = {text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big") for text in texts}
    sizes = Counter[int]()
    for text in texts:
        sizes[prefix[text]] += len(text.encode())
    totals = list(accumulate(sizes[number] for number in sorted(sizes)))
    last = next((number for number, total in zip(sorted(sizes), totals, strict=True) if total >= train_bytes), 1 << 16)
    chosen, taken = list[str](), 0
    for text in sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest()):
        if prefix[text] > last or taken >= train_bytes:
            break
        chosen.append(text)
        taken += len(text.encode())
    return chosen


def curated(flow: HereFlow, texts: list[str], run_bytes: int) -> Curated:
    out = segment.Spiller(flow.work.spill, run_bytes)
    for number, text in enumerate(texts):
        out.add(Document(str(number), text, {}))
    out.record({})
    return Curated(runs=out.runs)


def made(flow: HereFlow, train_bytes: int) -> making.TextMaking:
    source = tasks.TextSource("in", TextRules())
    return text_making(flow, source, flow.work.location, tokenizer=BPE | {"train_bytes": train_bytes})


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.ci) for seed in range(6, 40))])
def test_the_training_text_doesnt_depend_on_files_and_tasks(tmp_path, monkeypatch, seed):
    """For any number of files per task, of files to merge, and of bytes to select. Documents are large next to `train_bytes` in
    some cases, so that the first share of the keys has too little text."""
    rng = random.Random(seed)
    texts = texts_of(rng)
    train_bytes = round(sum(map(len, texts)) * rng.choice([0.001, 0.03, 0.3, 0.9, 2])) + 1
    monkeypatch.setattr(making, "SAMPLES", rng.choice([2, 5, 64]))
    monkeypatch.setattr(making, "SAMPLED_RUNS", rng.choice([1, 3]))
    monkeypatch.setattr(making, "SPARE", rng.choice([0.01, 1.5]))
    monkeypatch.setattr(tasks, "SELECTED_BYTES", rng.choice([500, 8 << 20]))
    flow = HereFlow(Work(Location(str(tmp_path))), seed=seed)
    arguments = made(flow, train_bytes)._training_text(curated(flow, texts, rng.choice([10_000, 50_000])).runs)
    assert len(arguments["samples"]) <= making.SAMPLES
    assert list(tasks.selected(flow.work.spill, **arguments, train_bytes=train_bytes)) == expected(texts, train_bytes)


def test_only_a_small_share_of_a_large_input_is_read(tmp_path, monkeypatch):
    """The bytes that tasks select follow from `train_bytes`, not from the input."""
    monkeypatch.setattr(making, "SAMPLED_RUNS", 4)
    texts = [f"{number} " + "some words " * 100 for number in range(2400)]
    flow = HereFlow(Work(Location(str(tmp_path))), again=0)
    definition = made(flow, 20_000).definition(curated(flow, texts, 30_000))()
    arguments = made(flow, 20_000)._training_text(curated(flow, texts, 30_000).runs)
    assert 20_000 <= arguments["bytes"] < 60_000 and sum(map(len, texts)) > 2_400_000
    assert flow.done["sample"] > 20 and "sizes" not in flow.done
    assert definition == tasks.tokens.train(iter(expected(texts, 20_000)), BPE["vocab_size"], BPE["end_of_document"], ())


def test_a_share_of_the_keys_whose_documents_were_all_dropped_later_has_no_text(tmp_path):
    """A comparison of documents can drop all documents of the tasks' first share."""
    flow, texts = HereFlow(Work(Location(str(tmp_path)))), [f"{number} " + "some words " * 20 for number in range(40)]
    (run,) = curated(flow, texts, 1 << 20).runs
    rows = next(spill.read(flow.work.spill, run.name)).select(["key", "row"]).slice(0, 30)
    run = spill.SpilledRun(run.name, run.rows, run.bytes, (spill.write(flow.work.spill, rows),))
    arguments = made(flow, 500)._training_text([run])
    kept = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[30:]
    assert list(tasks.selected(flow.work.spill, **arguments, train_bytes=500)) == kept[:3]


def test_merging_ends_if_the_files_are_too_large_to_merge(tmp_path, monkeypatch):
    """With a large `train_bytes` and a small `memory_limit`, a merge of large files gives as many files."""
    monkeypatch.setattr(making, "SAMPLES", 2)
    monkeypatch.setattr(making, "SAMPLED_RUNS", 1)
    flow, texts = HereFlow(Work(Location(str(tmp_path)))), [f"{number} " + "some words " * 20 for number in range(200)]
    making_here = made(flow, 1 << 20)
    making_here.memory_limit = 8 << 10
    arguments = making_here._training_text(curated(flow, texts, 8000).runs)
    assert flow.done["sample-merge"] < 20
    assert list(tasks.selected(flow.work.spill, **arguments, train_bytes=1 << 20)) == expected(texts, 1 << 20)
