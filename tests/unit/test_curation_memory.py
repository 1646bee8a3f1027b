"""Tests the memory of curation's tasks: a share of their limit, for any documents. Each past cause of excess has its test."""

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from heliostat.curation import comparing, recording, segment, tally
from heliostat.curation.engine import StageEngine
from heliostat.curation.minhash import keep, signatures
from heliostat.curation.prepare import InputFile
from heliostat.curation.stage import Document
from heliostat.curation.stages.c4 import C4
from heliostat.curation.stages.detect_secrets import DetectSecrets
from heliostat.curation.stages.fineweb import FineWeb
from heliostat.curation.stages.fix_text import FixText
from heliostat.curation.stages.gopher_quality import GopherQuality
from heliostat.curation.stages.gopher_repetition import GopherRepetition
from heliostat.curation.stages.length import Length
from heliostat.curation.text import ahead, gathering, making, tasks, tokens
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.storage.locations import Location
from heliostat.tasks import crew, flow, spill
from heliostat.tasks.clusters import TaskKind
from heliostat.tasks.work import Work

from tests.unit.bounded import arrow_peak, python_peak, resident_peak
from tests.unit.build_curation import HereFlow

MB = 1 << 20


def rows(count: int, size: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 1 << 64, count, np.uint64)
    text = "".join(random.Random(seed).choices("abcdefgh ", k=size))
    hashes = [int(k).to_bytes(8, "big") * 4 for k in keys]
    columns = [keys, range(count), hashes, [f"{seed}-{i}" for i in range(count)], [size] * count, [None] * count, [text] * count]
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, segment.RUN, strict=True)], schema=segment.RUN)


def test_a_range_of_many_files_holds_its_own_rows_alone(tmp_path):
    """A task doesn't hold the row groups around its rows: it reads a fiftieth of each of 30 files of 4 MB."""
    folder = Location(str(tmp_path))
    names = [spill.write(folder, rows(400, 10_000, i), ("row",)) for i in range(30)]
    held = arrow_peak(lambda: [t for name in names for t in spill.read(folder, name, *spill.share(20, 50))])
    assert held < 12 * MB, "2.4 MB of rows, and what reading takes"


def test_rows_that_are_made_unique_are_held_twice(tmp_path):
    parts = [rows(500, 10_000, i) for i in range(6)]
    size = sum(part.nbytes for part in parts)
    held = arrow_peak(lambda: gathering.unique([part.take(pa.array(range(len(part)))) for part in parts]))
    assert held < 2.3 * size


def test_a_shards_tokens_are_not_held_twice():
    ids, encoded = [f"d{i}" for i in range(400)], [np.full(5000, i, np.int32) for i in range(400)]
    size = sum(one.nbytes for one in encoded)
    assert python_peak(lambda: tokens.shard(ids, encoded, 50_000)) < 0.5 * size
    whole = tokens.shard(ids, encoded, 50_000)
    assert whole == tokens.shard(ids, [one.copy() for one in encoded], 50_000)
    large = tokens.shard(["a", "b"], [np.zeros(2_000_000, np.int32), np.ones(50, np.int32)], 50_000)
    assert python_peak(lambda: tokens.shard(["a"], [np.zeros(2_000_000, np.int32)], 50_000)) < 2 * 8 * MB and large


def test_texts_wait_for_their_run_as_utf_8(tmp_path):
    """Python's strings take four bytes per character if one character of the text is rare."""
    made = segment.Spiller(Location(str(tmp_path)), 4 * MB)

    def add() -> None:
        for i in range(390):
            made.add(Document(f"d{i}", f"{i} 🙂" + "x" * 9990))

    assert python_peak(add) < 6 * MB and not made.runs
    made.add(Document("last", "x" * 300_000))
    assert len(made.runs) == 1 and made.runs[0].rows == 391


def test_a_run_is_held_as_a_table_while_its_file_is_made(tmp_path):
    """Memory holds the run twice in addition to the file, not three times."""
    made = segment.Spiller(Location(str(tmp_path)), 1 << 40)
    rng = random.Random(0)
    for i in range(400):
        made.add(Document(f"d{i}", rng.randbytes(5000).hex()))
    assert arrow_peak(made.spill) < 2.2 * 4_000_000


@pytest.mark.parametrize("stage", [GopherRepetition, GopherQuality, FineWeb, C4, Length])
@pytest.mark.parametrize("kind", ["unique words", "few words", "short lines", "one word"])
def test_a_large_document_takes_few_bytes_for_each_of_its_own(stage, kind):
    """This holds for any words and lines."""
    rng = random.Random(0)
    text = {"unique words": lambda: " ".join("".join(rng.choices("abcdefgh", k=8)) for _ in range(250_000)),
            "few words": lambda: " ".join(rng.choices(["some", "words", "of", "a", "list"], k=600_000)),
            "one word": lambda: "".join(rng.choices("ab1./", k=2_000_000)),
            "short lines": lambda: "\n".join(f"line {i}" for i in range(200_000))}[kind]()  # fmt: skip
    keys = (
        {"min_words": 1} if stage is Length else dict.fromkeys((f for f in stage.model_fields if f.startswith("max_dupl")), 1.0)
    )
    work = stage(**keys).open()
    work([Document("first", "some words")])
    assert resident_peak(lambda: work([Document("a", text)])) < 22 * len(text) + MB


@pytest.mark.parametrize("stage, text, most", [
    (FixText(), "Больша́я вода " * 20_000, 12),  # bytes per character; the line is copied a few times
    (DetectSecrets(detectors=["HexHighEntropyString"]), "ab\n" * 20_000, 45),
])  # fmt: skip
def test_repairs_and_secrets_take_few_bytes_for_each_character(stage, text, most):
    work = stage.open()
    work([Document("first", "é ab\n")])
    assert python_peak(lambda: work([Document("a", text)])) < most * len(text) + MB // 8


def test_what_is_left_out_is_spilled_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "LEFT_OUT_ROWS", 2000)  # a tenth of what it is
    made = segment.Spiller(Location(str(tmp_path)), 4 * MB)

    def leave_out() -> None:
        for i in range(6000):
            made.leave_out(f"some/folder/file-{i:06d}.jsonl#{i}", "3 stage", "short", "", {"words": 3.5 + i, "x": 1.25})

    assert python_peak(leave_out) < 1.6 * MB and len(made.spilled) == 3


def test_ends_of_many_small_documents_are_python_objects_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "ENDS", 1000)  # a tenth of what it is
    folder, table = Location(str(tmp_path)), rows(6000, 10).drop_columns("text")
    assert python_peak(lambda: gathering.spill_kept(folder, "shards/x", table, gathering.Duplicates(folder, True))) < 2.4 * MB
    duplicates = gathering.Duplicates(folder, True)
    duplicates.add(table.slice(100, 50).set_column(3, "id", pa.array([f"other-{i}" for i in range(50)])))
    names = gathering.spill_kept(folder, "shards/x", table.slice(0, 300), duplicates)
    found = {row["id"]: row for name in names for t in spill.read(folder, name) for row in t.to_pylist()}
    assert len(found) == 350 and found["other-7"]["detail"] == "0-107" and found["other-7"]["reason"] == "duplicate"
    assert found["0-3"] == {"key": recording.key_of("0-3"), "id": "0-3", "stage": "shard", "reason": "kept", "detail": "shards/x",
                            "measures": None, "hash": table["hash"][3].as_py().hex(), "columns": None}  # fmt: skip


def test_copies_of_a_text_are_spilled_while_they_are_gathered(tmp_path, monkeypatch):
    """If a text occurs millions of times, the task doesn't hold the ids, but each copy learns which document stays."""
    monkeypatch.setattr(gathering, "HELD_BYTES", 1 << 18)
    folder, runs, each, many = Location(str(tmp_path)), list[segment.SpilledRun](), 8000, 12
    for i in range(many):
        table = rows(each, 10, i)
        same = pa.array([bytes(32)] * each, table.schema.field("hash").type)
        table = table.set_column(0, "key", pa.array(np.zeros(each, np.uint64))).set_column(2, "hash", same)
        runs.append(segment.SpilledRun(spill.write(folder, table, ("row",)), each, 10 * each))
    made = list[Any]()

    def work() -> None:
        kept, duplicates = gathering.gather(folder, runs, 0, spill.ALL, True)
        made.extend([len(kept), duplicates.count, gathering.spill_kept(folder, "shards/x", kept, duplicates)])

    whole = sum(t.drop_columns("text").nbytes for run in runs for t in spill.read(folder, run.name))
    held = arrow_peak(work)
    kept, duplicates, names = made
    assert kept == 1 and duplicates == each * many - 1
    ends = [row for name in names for t in spill.read(folder, name) for row in t.to_pylist()]
    assert len({row["id"] for row in ends}) == len(ends) == each * many
    assert {row["detail"] for row in ends if row["reason"] == "duplicate"} == {"0-0"} and len(names) > 10
    assert held < whole / 2, (held, whole)


def test_near_duplicates_with_large_columns_are_held_some_at_a_time(tmp_path, monkeypatch):
    """Eight files of documents with 32 MB of columns, and all documents in clusters. A task for these has 64 MB of memory."""
    monkeypatch.setattr(segment, "LEFT_OUT_BYTES", 1 << 20)
    folder, runs, each, rng = Location(str(tmp_path)), list[segment.SpilledRun](), 2000, random.Random(0)
    for i in range(8):
        columns = pa.array([rng.randbytes(1000).hex() for _ in range(each)], pa.large_string())
        table = rows(each, 10, i).sort_by("key").set_column(1, "row", pa.array(range(each), pa.uint32()))
        table = table.set_column(table.schema.get_field_index("columns"), "columns", columns)
        runs.append(segment.SpilledRun(spill.write(folder, table, ("row",)), each, 10 * each))
    assert 8 * each * comparing.DOCUMENT_BYTES == 64_000_000
    nodes = np.concatenate([(i << 32) + np.arange(each, dtype=np.uint64) for i in range(8)])
    stars = spill.write(folder, pa.table({"key": nodes, "root": nodes - nodes % np.uint64(4)}))
    made = list[Any]()
    held = arrow_peak(lambda: made.append(keep.candidates(folder, 0, runs, [None] * 8, [None] * 8, "longest", "", [stars])))
    assert held < 40 * MB, held
    names = [keep.choose(folder, 0, 1, [made[0]["candidates"]])["chosen"]]
    held = arrow_peak(lambda: made.append(keep.decide(folder, 0, runs, made[0]["belonging"], "minhash", names)))
    assert held < 40 * MB, held
    assert made[1]["reasons"] == {"minhash: near_duplicate": 6 * each} and [n for _, n, _ in made[1]["decided"]] == [1500] * 8


def test_what_trains_a_tokenizer_is_read_some_megabytes_at_a_time(tmp_path, monkeypatch):
    """The texts and their order are the same as in one read."""
    monkeypatch.setattr(tasks, "SELECTED_BYTES", 2 * MB)
    folder = Location(str(tmp_path))
    parts = [rows(1000, 8000, i).select(["key", "hash", "id", "bytes", "text"]) for i in range(3)]
    names = [spill.write(folder, tasks.distinct([tasks._once(part)]), ("hash", "id")) for part in parts]
    held, _ = gathering.unique(list(parts))
    wanted = held["text"].to_pylist()
    assert list(tasks.selected(folder, names, spill.ALL, 24_000_000, 1 << 40)) == wanted
    most = 9_000_000
    assert list(tasks.selected(folder, names, spill.ALL, 24_000_000, most)) == wanted[: -(-most // 8000)]

    def read() -> None:
        for _ in tasks.selected(folder, names, spill.ALL, 24_000_000, 1 << 40):
            pass

    assert arrow_peak(read) < 12 * MB < 24_000_000


def test_tasks_use_an_allocator_that_keeps_nothing(tmp_path):
    """Arrow's own allocator keeps several times a task's memory."""
    before = pa.default_memory_pool()
    try:
        work = Work(Location(str(tmp_path)))
        made = flow.execute(
            work, "run", "kind", "key", lambda folder: {"pool": pa.default_memory_pool().backend_name, "files": []}, {}
        )
    finally:
        pa.set_memory_pool(before)
    assert made["pool"] == "system"


GB = 1 << 30


@pytest.mark.parametrize(("memory", "nodes", "cpus", "asked"), [
    (2 * GB, [(4, 8 * GB), (4, 4 * GB)], 1, 2 * GB),
    (2 * GB, [(4, 1 * GB)], 1, 1 * GB),
    (0, [(4, 8 * GB)], 1, None),
    (2 * GB, [], 1, None),
    (2 * GB, [(0, 8 * GB), (4, 1 * GB)], 1, 1 * GB),  # a head without CPUs
    (8 * GB, [(16, 4 * GB), (2, 64 * GB)], 16, 4 * GB),  # not 8 GB, which the node with 16 CPUs has not
])  # fmt: skip
def test_a_task_asks_ray_for_its_memory_and_for_no_more_than_a_node_has(tmp_path, monkeypatch, memory, nodes, cpus, asked):
    there = [{"Alive": True, "Resources": {"CPU": float(have), "memory": float(n)}} for have, n in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    made = flow.Flow(Work(Location(str(tmp_path))), memory=memory)
    assert made.memory_each(cpus) == asked
    working = crew.Crew(made, TaskKind("some", flow.execute, print, cpus))
    assert not working.full and working.memory == asked


@pytest.mark.parametrize("memory", [2 * GB, 0])
def test_a_task_also_asks_for_the_memory_of_its_reads_in_advance(monkeypatch, memory):
    """Only tasks with temporary files in an object store read in advance."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "memory": 16.0 * GB}}])
    made = flow.Flow(Work(Location("s3://bucket/work")), memory=memory)
    assert made.memory_each() == (memory + spill.MEMORY if memory else None)


@pytest.mark.parametrize(("input", "work", "reads", "more"), [
    ("s3://bucket/texts", "work", True, ahead.MEMORY),
    ("s3://bucket/texts", "work", False, 0),
    ("s3://bucket/texts", "s3://bucket/work", True, max(ahead.MEMORY, spill.MEMORY)),
    ("s3://bucket/texts", "s3://bucket/work", False, spill.MEMORY),
    ("texts", "work", True, 0),
])  # fmt: skip
def test_a_task_that_reads_objects_also_asks_for_the_memory_of_its_input(monkeypatch, input, work, reads, more):
    """Such a task has two blocks of the input in memory, in addition to its limit. With a small limit, this is as much again."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "memory": 16.0 * GB}}])
    pipeline = TextPipeline.model_validate({"name": "a", "input": input, "work": work, "output": "out", "memory_limit": "64MiB",
                                            "tokenizer": {"vocab_size": 300}})  # fmt: skip
    made = pipeline.flow()
    assert made.memory_each(reads=reads) == (64 << 20) + more
    if not made.work.location.is_s3:
        working = crew.Crew(made, TaskKind("some", flow.execute, print, reads=reads))
        assert not working.full and working.memory == (64 << 20) + more


def test_the_kinds_of_tasks_that_read_the_input_ask_for_its_memory(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 2000)
    asked = {}

    def run(self, kind, function, tasks, **more):
        asked[kind] = more.get("reads", False)
        results = {"lines": {"lines": 9}, "survey": {"survey": {}}}
        return enumerate([results[kind] for _ in tasks] if kind in results else [])

    monkeypatch.setattr(flow.Flow, "run", run)
    made = flow.Flow(Work(Location(str(tmp_path / "work"))))
    parts = making.pieces_of(made, str(tmp_path), [InputFile("a.jsonl", 28_000, 0)], 9000, 1 << 30)
    StageEngine(made, None, [], 1 << 30).curate(parts, [])
    assert asked == {"lines": True, "read": True}


@pytest.mark.parametrize(("memory", "nodes", "cpus", "told"), [
    (2 * GB, [(8, 5 * GB)], 1, "2048 MiB per task leaves room for 2 tasks at once, but the CPUs could run 8. "
                               "Set memory_limit: 640MiB to run 8 at once, or give the nodes more memory"),
    (2 * GB, [(4, 1 * GB)], 1, "2048 MiB per task leaves room for 1 tasks at once, but the CPUs could run 4. "
                               "Set memory_limit: 256MiB to run 4 at once, or give the nodes more memory"),
    (1 << 26, [(4, 1 << 27)], 1, "64 MiB per task leaves room for 2 tasks at once, but the CPUs could run 4. "
                                 "To run more, give the nodes more memory"),
    (2 * GB, [(4, 8 * GB)], 1, None),
    (2 * GB, [(8, 5 * GB)], 4, None),
    (0, [(8, 5 * GB)], 1, None),
])  # fmt: skip
def test_a_machine_whose_memory_leaves_cpus_idle_is_logged_once_with_the_fix(tmp_path, monkeypatch, caplog, memory, nodes, cpus,
                                                                             told):  # fmt: skip
    there = [{"Alive": True, "Resources": {"CPU": float(have), "memory": float(n)}} for have, n in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    made = flow.Flow(Work(Location(str(tmp_path))), memory=memory)
    for kind in ("some", "others"):
        assert not crew.Crew(made, TaskKind(kind, flow.execute, print, cpus)).full
    assert caplog.messages == ([f"memory_limit: {told}"] if told else [])


def test_tallies_are_summed_one_at_a_time():
    class Seen:
        alive = most = 0

        def __iter__(self):
            for i in range(50):
                yield {"0 x": tally.entry({}, "") | {"documents": i, "counts": {"c": 1}}}

    made = tally.merge(iter(Seen()))
    assert made["0 x"]["documents"] == sum(range(50)) and made["0 x"]["counts"] == {"c": 50}


@pytest.mark.parametrize("text", [" ".join(f"word{i % 5000}" for i in range(25_000)), "x" * 300_000], ids=["words", "one word"])
def test_a_large_text_is_encoded_in_parts(text):
    """Measures Python's memory. A benchmark measures the tokenizer's own memory."""
    tokenizer = tokens.load(tokens.train(["a b c word"], 300, "<|endoftext|>"))
    tokens.encode(tokenizer, ["a"], 0)
    size = 4 * sum(len(one) for one in tokens.encode(tokenizer, [text], 0))
    assert python_peak(lambda: tokens.encode(tokenizer, [text], 0)) < 3 * size + 8 * MB


@pytest.mark.ci
def test_signatures_of_many_short_texts_are_made_some_at_a_time(tmp_path, monkeypatch):
    """Each value is a Python integer for a moment. For 8,000 texts in one row group, with 260 values each, that would be 100
    MB."""
    monkeypatch.setattr(spill, "GROUP_BYTES", 64 * MB)
    folder, table = Location(str(tmp_path)), rows(8000, 1, 0)
    texts = pa.array([f"word{i} and some more words of a short text" for i in range(8000)], pa.large_string())
    table = table.set_column(table.schema.get_field_index("text"), "text", texts)
    run = segment.SpilledRun(spill.write(folder, table, ("row",)), 8000, 1)
    assert python_peak(lambda: signatures.sign(folder, run, signatures.Parameters(20, 13, 5, 1))) < 40 * MB


def test_a_task_reads_about_as_many_documents_as_it_may_hold(tmp_path):
    """Runs with many documents mean fewer runs per task, but at least one. Each run is in one task, in order."""
    here = HereFlow(Work(Location(str(tmp_path))))
    runs = [segment.SpilledRun(str(i), count, 1) for i, count in enumerate([100] * 40 + [9000, 20_000, 5000, 3000, 1])]
    found = [task.arguments for task in comparing.by_runs(here, "test", runs, ["a"], 64 << 20)]
    assert [run for one in found for run in one["runs"]] == runs
    assert [one["first"] for one in found] == [0, 8, 16, 24, 32, 40, 41, 42]
    assert all(sum(r.rows for r in one["runs"]) * comparing.DOCUMENT_BYTES <= 64 << 20 for one in found if len(one["runs"]) > 1)
