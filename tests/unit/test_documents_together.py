"""Tests documents that belong together, such as a repository's: they follow each other in a shard, by the key `together`."""

import hashlib
import itertools
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from heliostat.curation import pieces
from heliostat.curation.text import repositories
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.curation.text.tasks import TextSource
from heliostat.data.manifest_table import in_memory
from heliostat.errors import ConfigError
from heliostat.schema import validate
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow, spelled
from tests.unit.build_making import STAGES, make, make_input, text_making

KNOWN_ROWS = "33fd2c14e3d6725e"  # of the dataset of make_input with STAGES


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
    found = [name for _, _, name in laid(tmp_path / "out", in_memory(rows).to_pylist())]
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
