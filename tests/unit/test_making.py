"""Tests making a text dataset in this process, from reading to the manifest's rows: the same in any order, and after any
interruption."""

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import random
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from heliostat.curation import pieces
from heliostat.curation.engine import StageEngine
from heliostat.curation.pieces import FilePart
from heliostat.curation.registry import parse
from heliostat.curation.text import making, repositories, sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.making import TextMaking
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import ConfigError
from heliostat.schema import validate
from heliostat.storage.locations import Location
from heliostat.tasks import flow
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow, KilledError, spelled

ROOT = Path(__file__).parents[2]
BPE = {"vocab_size": 300, "train_bytes": 5000, "path": None, "end_of_document": "<|endoftext|>"}
KNOWN_ROWS = "33fd2c14e3d6725e"  # of the dataset of make_input with STAGES
STAGES = [{"stage": "length", "min_words": 20}, {"stage": "minhash"}, {"stage": "length", "max_words": 118}]


def make_input(folder: Path, count: int = 150) -> None:
    """Writes so many texts, some of them equal: half in a file of lines, a sixth in single files, and the others compressed."""
    rng, texts = random.Random(0), list[str]()
    folder.mkdir()
    for i in range(count):
        words = [f"w{spelled(rng.randrange(900))}" for _ in range(10 + i % 110)]
        texts.append(
            " ".join([*rng.choice(texts).split(), "end"] if i % 9 == 8 else words) if i % 13 else rng.choice(texts or ["a"])
        )
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[: count // 2]))
    for i in range(count // 2, 2 * count // 3):
        (folder / f"{i}.txt").write_text(texts[i])
    with gzip.open(folder / "c.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps({"text": t}) for t in texts[2 * count // 3 :]) + "\n{bad")
    (folder / "d.csv").write_text("url,text\nhttp://a," + " ".join(f"v{i}" for i in range(40)) + "\n")


def text_making(flow, source, output, stages=(), memory_limit: int = 1 << 30, **keys: Any) -> TextMaking:
    """Returns the making of a dataset of texts, with small shards and a small tokenizer."""
    usual: dict[str, Any] = {"tokenizer": BPE, "given_tokenizer": None, "shard_bytes": 4000, "chunk_tokens": 500}
    return TextMaking(flow, source, output, list(stages), memory_limit, **usual | keys)


def make(
    tmp_path: Path, name: str, stages: list[dict[str, Any]], memory_limit: int = 1 << 30, together: Together | None = None,
    shard_bytes: int = 4000, **flow_keys: Any,
) -> Any:  # fmt: skip
    here = HereFlow(Work(Location(f"{tmp_path}/{name}.work")), **flow_keys)
    source = TextSource(str(tmp_path / "in"), TextRules(columns=("url", "repository", "path")))
    parsed = [parse(entry) for entry in stages]
    output = Location(f"{tmp_path}/{name}")
    rows, meta = text_making(here, source, output, parsed, memory_limit, together=together, shard_bytes=shard_bytes).run(
        sources.listing(str(tmp_path / "in"), ["extract"] * bool(stages))
    )
    return (sorted(rows, key=lambda row: (row["path"], row["row_group"])), meta), here  # as the manifest has them


@pytest.mark.parametrize("stages", [[], STAGES], ids=["plain", "stages"])
def test_the_same_dataset_in_any_order_from_any_cut(tmp_path, monkeypatch, stages):
    """Tasks are shuffled and repeated, files are split differently, and the spill limit differs: the rows and metadata are the
    same."""
    make_input(tmp_path / "in")
    (first, here) = make(tmp_path, "first", stages)
    assert len(first[0]) > 8 and first[1]["documents"] > 50
    monkeypatch.setattr(pieces, "size", lambda total: 3000)
    for seed, limit in ((1, 1 << 30), (2, 40_000)):
        again, there = make(tmp_path, f"again{seed}", stages, limit, seed=seed)
        assert again == first
        assert there.done["read"] > here.done["read"] and there.done["lines"] > 3
    assert (first[1]["dropped"].get("1 minhash: near_duplicate", 0) > 5) is bool(stages)


def test_a_making_that_ends_after_any_task_goes_on(tmp_path):
    make_input(tmp_path / "in")
    whole, here = make(tmp_path, "whole", STAGES)
    total = len(here.ran)
    for most in range(0, total, 3):
        with pytest.raises(KilledError):
            make(tmp_path, "cut", STAGES, seed=most, most=1)
    made, there = make(tmp_path, "cut", STAGES)
    assert made == whole and len(there.ran) <= total - total // 3


def test_shards_that_are_done_stay_right_under_another_memory_limit(tmp_path, monkeypatch):
    """A task then writes other shards than the recorded ones. The dataset has each shard once, and none is missing."""
    make_input(tmp_path / "in", 300)
    monkeypatch.setattr(pieces, "size", lambda total: 3000)  # so that the spilled runs are the same
    monkeypatch.setattr(making, "ALONE", 1)
    (tmp_path / "in" / "c.jsonl.gz").unlink()  # which is read as a whole
    limits = 160_000, 200_000  # of 10 and of 12 shards a task, and the same spilled runs
    whole, here = make(tmp_path, "whole", [], limits[0])
    _, other = make(tmp_path, "other", [], limits[1])
    for before, after, total in ((*limits, len(here.ran)), (*limits[::-1], len(other.ran))):
        name = f"from-{before}"
        with pytest.raises(KilledError):
            make(tmp_path, name, [], before, most=total - 1)
        made, there = make(tmp_path, name, [], after)
        assert made == whole and there.done["shards"] > 0


# documents that belong together --------------------------------------------------------------------------------------


def write_repositories(folder: Path) -> dict[str, tuple[str | None, str]]:
    """Writes files of repositories, and some outside any, in random order, some of them equal; returns each text's (repository,
    path)."""
    rng, rows = random.Random(1), list[dict[str, Any]]()
    for i in range(260):
        repository = None if i % 13 == 0 else f"r{min(rng.randrange(40), 20)}"  # half of them are of one
        text = " ".join(f"w{spelled(rng.randrange(900))}" for _ in range(8 + i % 50))
        rows.append({"text": text, "repository": repository, "path": f"src/{rng.randrange(10**6):06}.py"})
    rows += [{**rows[7], "repository": "r3", "path": "zz/copy.py"}, {**rows[8], "repository": "r4"}]
    rng.shuffle(rows)
    folder.mkdir()
    for part in range(3):
        (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(row) for row in rows[part::3]))
    return {f"{part}.jsonl#{n}": (row["repository"], row["path"]) for part in range(3) for n, row in enumerate(rows[part::3], 1)}


def laid(output: Path, rows: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Returns (shard, place, document) of the dataset's documents, in their order."""
    found = list[tuple[str, int, str]]()
    for row in rows:
        names = (
            pq.ParquetFile(output / row["path"]).read_row_group(row["row_group"], columns=["document"])["document"].to_pylist()
        )
        found += [(row["path"], row["place"], name) for name in names if not found or found[-1][2] != name]
    return found


@pytest.mark.parametrize("stages", [[], [{"stage": "length", "min_words": 12}]], ids=["plain", "stages"])
def test_documents_of_a_repository_follow_each_other_by_their_paths(tmp_path, monkeypatch, stages):
    """They are in one shard and at one place, for any tasks. The documents are the same as without grouping."""
    known = write_repositories(tmp_path / "in")
    (apart, _), _ = make(tmp_path, "apart", stages)
    together = Together(column="repository", order="path")
    (rows, meta), _ = make(tmp_path, "together", stages, together=together)
    found = laid(tmp_path / "together", rows)
    assert sorted(name for _, _, name in found) == sorted(name for _, _, name in laid(tmp_path / "apart", apart))
    by = dict[str, list[int]]()
    for number, (_, _, name) in enumerate(found):
        if repository := known[name][0]:
            by.setdefault(repository, []).append(number)
    assert len(by) == 21 and max(map(len, by.values())) > 60
    for numbers in by.values():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len({found[n][:2] for n in numbers}) == 1
        paths = [known[found[n][2]][1] for n in numbers]
        assert paths == sorted(paths)
    assert meta["together"] == {"column": "repository", "order": "path", "groups": 21, "documents": sum(map(len, by.values()))}
    assert meta["duplicates"] == 2 and meta["documents"] == len(found)
    assert len({path for path, _, _ in found}) > 1

    monkeypatch.setattr(pieces, "size", lambda total: 3000)
    for seed, limit in ((1, 1 << 30), (2, 160_000)):
        again, _ = make(tmp_path, f"again{seed}", stages, limit, together, seed=seed)
        assert again == (rows, meta)


def test_files_of_archives_follow_each_other_by_their_paths(tmp_path):
    """Each archive is a repository, with only `together: repository`."""
    (tmp_path / "in").mkdir()
    for name in ("one", "two", "three"):
        with zipfile.ZipFile(tmp_path / "in" / f"{name}.zip", "w") as archive:
            for i in random.Random(name).sample(range(10, 22), 12):
                archive.writestr(f"{name}/src/{i}.py", f"# {name} {i}\n" + f"value_{i} = {i}\n" * i)
    here = HereFlow(Work(Location(str(tmp_path / "work"))))
    source = TextSource(str(tmp_path / "in"), TextRules())
    made = text_making(here, source, Location(str(tmp_path / "out")), shard_bytes=1 << 20, together=Together(column="repository"))
    rows, meta = made.run(repositories.listing(str(tmp_path / "in")))
    found = [name for _, _, name in laid(tmp_path / "out", rows)]
    repository = [name.partition(".zip#")[0] for name in found]
    assert len(found) == 36 and [key for key, _ in itertools.groupby(repository)] == list(dict.fromkeys(repository))
    assert all(sorted(group) == group for group in (found[i : i + 12] for i in (0, 12, 24)))
    assert meta["together"] == {"column": "repository", "order": None, "groups": 3, "documents": 36}


def test_a_value_that_has_more_documents_than_a_task_has_memory_for_is_named(tmp_path):
    """The error comes before a shard is written. The size covers all documents of the value, wherever they were read."""
    known, together = write_repositories(tmp_path / "in"), Together(column="repository")
    texts = {f"{path.name}#{n}": json.loads(line)["text"] for path in (tmp_path / "in").iterdir()
             for n, line in enumerate(path.read_text().splitlines(), 1)}  # fmt: skip
    (rows, _), _ = make(tmp_path, "large", [], together=together)
    kept = [name for _, _, name in laid(tmp_path / "large", rows) if known[name][0] == "r20"]
    size = sum(len(texts[name]) for name in kept)
    told = (rf"together\.column: 'repository': the documents of 'r20' have {size:,} bytes.*more than memory_limit \(40,000\)\. "
            f"Set memory_limit to {6 * size:,}, use a column with smaller groups")  # fmt: skip
    with pytest.raises(ConfigError, match=told):
        make(tmp_path, "out", [], 40_000, together)
    assert len(kept) > 100 and not (tmp_path / "out" / "shards").exists() and (tmp_path / "large" / "shards").exists()
    with pytest.raises(ConfigError, match="r20"):
        make(tmp_path, "out", [], 6 * size - 1, together)
    make(tmp_path, "out", [], 6 * size, together)


def test_what_documents_have_in_common_need_not_be_text_that_can_be_stored(tmp_path):
    """Half a surrogate pair, which JSON may contain, in either column."""
    (tmp_path / "in").mkdir()
    rows = [{"text": f"text {i}", "repository": "\udfff", "path": path} for i, path in enumerate(["b", "\ud800", "a", None, 7])]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    together = Together(column="repository", order="path")
    (found, meta), _ = make(tmp_path, "out", [], together=together)
    assert [int(name[-1]) for _, _, name in laid(tmp_path / "out", found)] == [4, 5, 2, 3, 1]
    assert meta["together"]["groups"] == 1 and meta["documents"] == 5
    with pytest.raises(ConfigError, match=r"the documents of '\\\\udfff' have 30 bytes"):
        make(tmp_path, "small", [], 100, together)


def test_the_funnel_counts_what_came_to_the_shards_with_and_without_the_key(tmp_path):
    write_repositories(tmp_path / "in")
    found = []
    for name, together in (("apart", None), ("together", Together(column="repository"))):
        (_, meta), _ = make(tmp_path, name, [{"stage": "length", "min_words": 2}], together=together)
        found.append(json.loads((tmp_path / name / meta["curation"]["funnel"]).read_text())["shard"])
    assert found[0]["dropped"] == {"duplicate": 2} and found[0]["bytes"] > found[0]["kept_bytes"]
    assert found[0] == found[1]


def test_without_the_key_a_dataset_is_what_it_was(tmp_path):
    """Compares known digests of its shards from before the key existed."""
    make_input(tmp_path / "in", 300)
    (rows, meta), _ = make(tmp_path, "out", STAGES)
    assert "together" not in meta and known(rows) == KNOWN_ROWS


def known(rows: list[dict[str, Any]]) -> str:
    """Returns a digest of the documents' places and tokens."""
    told = [
        [row["path"].split("/")[1], row["row_group"], row["rows"], row["tokens"], row["place"], row["content"]] for row in rows
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def test_a_column_that_documents_do_not_have_is_named(tmp_path):
    told = {"name": "x", "input": str(tmp_path / "in"), "output": str(tmp_path / "out"),
            "tokenizer": {"vocab_size": 300}, "columns": ["repository"]}  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"together\.column: 'repo' isn't a column of the documents\. Columns: repository\. Add"
    ):
        validate(TextPipeline, {**told, "together": "repo"}, "pipeline").check()
    with pytest.raises(ConfigError, match=r"together\.order: 'path' isn't a column"):
        validate(TextPipeline, {**told, "together": {"column": "repository", "order": "path"}}, "pipeline").check()
    asked = validate(TextPipeline, {**told, "together": "repository"}, "pipeline")
    asked.check()
    assert asked.identity()["together"] == {"column": "repository", "order": None}
    assert "together" not in validate(TextPipeline, told, "pipeline").identity()
    validate(TextPipeline, {**told, "columns": [], "repositories": True, "together": "repository"}, "pipeline").check()


def test_an_input_that_grows_keeps_its_pieces(tmp_path):
    """Their size depends on the input's size. Kept work keeps its size until the two differ much."""
    place = Location(str(tmp_path / "work"))
    sizes = [pieces.size(n << 20) for n in (20, 40, 300, 600, 40)]
    assert sizes == [2 << 20, 4 << 20, 32 << 20, 64 << 20, 4 << 20]
    assert [Work(place).begin(size) >> 20 for size in sizes] == [2, 2, 32, 32, 32]
    Work(place).clear()
    assert not (tmp_path / "work").exists()


def test_a_folder_of_other_things_is_no_work_folder(tmp_path):
    """The folder is rejected, and nothing in it, or next to the work, is removed."""
    (tmp_path / "spill").mkdir()
    (tmp_path / "spill/mine").write_text("x")
    work = Work(Location(str(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"work: .*: isn't empty, and isn't a work folder of heliostat\. Set work to another folder"
    ):
        work.begin(1)
    work.clear()
    assert (tmp_path / "spill/mine").exists()
    other = Work(Location(str(tmp_path / "work")))
    other.begin(1)
    (tmp_path / "work/beside").write_text("x")
    other.clear()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["beside"]


def test_a_page_without_extract_is_an_error_that_names_it(tmp_path):
    make_input(tmp_path / "in")
    (tmp_path / "in" / "p.html").write_text("<p>Hello")
    with pytest.raises(ConfigError, match=r"p\.html is (a page|bytes), not text\. Put"):
        make(tmp_path, "out", [{"stage": "minhash"}])


@pytest.mark.parametrize("stages", [[], [{"stage": "length", "min_words": 1}]], ids=["without stages", "with stages"])
def test_every_kind_and_codec_is_read_with_and_without_stages(tmp_path, caplog, stages):
    """The same reader reads a `.csv` or a `.bz2`. Pages need `extract`, so without stages they are dropped and counted."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("of a file")
    (folder / "b.csv").write_text("url,text\nhttp://b,of a row\nhttp://c,\n")
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "of a line"}\n{bad'))
    (folder / "d.txt.xz").write_bytes(lzma.compress(b"of a packed file"))
    (folder / "e.ndjson").write_text('{"text": "of another line"}')
    (folder / "f.py.bz2").write_bytes(bz2.compress(b"print()"))
    if not stages:
        (folder / "g.html").write_text("<p>of a page")
    (rows, meta), _ = make(tmp_path, "out", stages)
    found = {
        id for path in {row["path"] for row in rows} for id in pq.read_table(tmp_path / "out" / path)["document"].to_pylist()
    }
    assert found == {"a.txt", "b.csv#1", "c.jsonl.bz2#1", "d.txt.xz", "e.ndjson#1", "f.py.bz2"} and meta["documents"] == 6
    assert meta["dropped"] == {"empty": 1, "invalid_json": 1}
    assert ("skipping 1 pages or web archives. To read these files, put {stage: extract}" in caplog.text) == (not stages)


def test_pages_alone_are_an_error_that_names_their_stage(tmp_path):
    (tmp_path / "a.html").write_text("<p>a")
    with pytest.raises(ConfigError, match=r"only 1 pages or web archives\. Put {stage: extract} first"):
        sources.listing(str(tmp_path))


MEASURED = """
import resource, sys, threading, time
from heliostat.curation import segment, pieces
from heliostat.curation.text import gathering, tasks
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.gathering import Together
from heliostat.storage.locations import Location
source, limit = tasks.TextSource(sys.argv[1], TextRules()), int(sys.argv[2])
list(source.read(pieces.FilePart("a.jsonl", 0, 0, 0, 1)))
folder = Location(sys.argv[1] + ".work")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = pieces.FilePart(sys.argv[3], 0, 0)
record = segment.over_pieces(folder, [part], source, [], limit // 8, False)
runs = [segment.SpilledRun(*r) for r in record["runs"]]
after_read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = gathering.gather(folder, runs, 0, 1 << 59, False)
print(len(runs), (after_read - before) >> 10, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("name", ["a.jsonl", *(pytest.param(name, marks=pytest.mark.ci) for name in ("b.jsonl.gz", "c.parquet"))])
def test_a_task_takes_its_share_of_memory_whatever_the_file(tmp_path, name):
    """For a file of 160 MB with a limit of 64 MiB: one task reads all of it, and gathers it into a shard of a 32nd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    rng = random.Random(0)
    block = ["".join(rng.choices("abcdefghij klmnop", k=20_000)) for _ in range(50)]
    (tmp_path / "in/a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    rows = [f"{i} {block[i % 50]}" for i in range(8000)]
    with gzip.open(tmp_path / "in" / name, "wt", 0) if name.endswith("gz") else (tmp_path / "in" / name).open("w") as f:
        if not name.endswith("parquet"):
            f.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": rows}), tmp_path / "in" / name, row_group_size=8000)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "in"), str(64 << 20), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    runs, read, gathered = map(int, done.stdout.split())
    most = 256 if name.endswith("parquet") else 64  # more than the limit: docs/benchmarks/curation.md
    assert runs >= 19 and read <= most and gathered <= most + 36, done.stdout


class Told(flow.Flow):
    """Returns records of tasks that never ran."""

    def run(self, kind, function, tasks, cpus=1, valid=lambda record: True, pooled=False):
        for number, task in enumerate(tasks):
            name, examples = f"{task.key[:2]}/{task.key}.parquet", {"empty": [f"{number}#1"] * 3}
            yield number, {"runs": [[name, 5000, 60 << 20]], "left_out": [f"ab/{name}"], "tally": None,
                           "reasons": {"empty": 7, "corrupt": 1}, "examples": examples, "seconds": 1.0}  # fmt: skip


TASKS = 1500


def test_the_driver_holds_little_of_each_task(tmp_path):
    """The limit is 2 KB per task of ten files. A million files in 1e5 tasks take 130 MB (docs/benchmarks/curation.md)."""
    tracemalloc.start()
    parts = ([FilePart(f"f/{i:06d}-{j}.txt", 6 << 20, i) for j in range(10)] for i in range(TASKS))
    engine = StageEngine(Told(Work(Location(str(tmp_path)))), TextSource("in", TextRules()), ["x"], 2 << 30)
    found = engine.curate(parts, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.runs) == TASKS and found.reasons == {"empty": 7 * TASKS, "corrupt": TASKS}
    assert peak < 2000 * TASKS
