"""Tests pairs of texts: those found in code and pages, those left out, and a dataset that is the same for any split of the
input."""

import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from heliostat.curation import pieces
from heliostat.curation.pairs import extracting
from heliostat.curation.pairs.extracting import Pair
from heliostat.curation.pairs.making import PairMaking
from heliostat.curation.pairs.pipeline import PairPipeline
from heliostat.curation.pairs.reading import Least, PairSource
from heliostat.curation.text import sources
from heliostat.curation.text.documents import TextRules
from heliostat.data import manifest, split
from heliostat.data.manifest_table import in_memory
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import flow, merging
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow

BPE = {"vocab_size": 300, "train_bytes": 5000, "path": None, "end_of_document": "<|endoftext|>"}
CODE = '''import os


class Shelf:
    @property
    def size(self):
        """Return the bytes of all
        files. Folders have none.

        More about it."""
        return sum(one.size for one in self.files)

    def bare(self):
        return 1


async def read(path): "Read a whole file."; return open(path).read()
'''
NOTES = """before

# Getting *started* #
Install it, and
begin.

```sh
# no title
~~~
```
## Stopping

Ends it.
#no title either
"""
PAGE = """<html><head><title>T</title><style>h1 {}</style></head><body><nav><h2>Menu</h2></nav>
<h1>How to <em>lend</em> a licence</h1><p>Ask the <b>off</b>ice&nbsp;first.</p><script>if (a < b) h1()</script>
<ul><li>One<li>Two</ul>
<h2></h2>nothing<h3>Then</h3>Return it.</body>"""


def test_docstrings_belong_to_functions_without_them() -> None:
    first, second = sorted(extracting.docstrings(CODE))
    assert first == Pair(5, "Return the bytes of all files.", "    @property\n    def size(self):\n        return "
                         "sum(one.size for one in self.files)\n")  # fmt: skip
    assert second == Pair(17, "Read a whole file.", "async def read(path): return open(path).read()\n")
    (third,) = extracting.docstrings('def f():\n    "Of one."\n    x = "\x0c"\n\x0c\n    return x\n')
    assert third.text == 'def f():\n    x = "\x0c"\n\x0c\n    return x\n'  # a form feed ends no line


def test_titles_belong_to_sections_and_not_to_code() -> None:
    first, second = extracting.markdown(NOTES)
    assert first == Pair(3, "Getting *started*", "Install it, and\nbegin.\n\n```sh\n# no title\n~~~\n```")
    assert second == Pair(11, "Stopping", "Ends it.\n#no title either")


def test_code_in_a_line_opens_no_fence() -> None:
    """A backtick fence has no backticks after it; a tilde fence may."""
    found = list(
        extracting.markdown("```pip install a```\n# One\nfirst\n```sh\n# no\n```\n# Two\n~~~ `a`\n# no\n~~~\n# Three\nlast")
    )
    assert [pair.query for pair in found] == ["One", "Two", "Three"]
    assert found[0].text == "first\n```sh\n# no\n```"
    assert [pair.query for pair in extracting.markdown("```` py\r\n# no\r\n````\r\n# Yes #\r\nnow")] == ["Yes"]


@pytest.mark.parametrize(
    ("line", "title"),
    [("#  a  b ##  ", "a b"), ("# a#", "a#"), ("# #", "#"), ("###### c\t#\t", "c"), ("# C# #", "C#"), ("# a # b", "a # b")],
)
def test_a_title_is_what_stands_between_its_marks(line: str, title: str) -> None:
    ((_, query, text),) = extracting.markdown(f"{line}\nbelow")
    assert " ".join(query.split()) == title and text == "below"


def test_a_title_of_many_blanks_takes_no_longer_than_its_length() -> None:
    start = time.process_time()
    (found,) = extracting.markdown("# " + " " * 200_000 + "x" + " " * 200_000 + "y" + "\t#" * 200_000 + "\nbelow")
    assert found.text == "below" and time.process_time() - start < 1


def test_a_page_may_leave_out_the_end_of_its_head() -> None:
    body = "<h1>Hello there</h1><p>text</p>"
    for page in (f"<html><head><title>T</title><body>{body}</body></html>", f"<head><meta charset=utf-8><title>T</title>{body}",
                 f"<head><script>x</script><body>a<head>{body}"):  # fmt: skip
        assert list(extracting.html(page)) == [Pair(1, "Hello there", "text")]
    assert not list(extracting.html(f"<head><template>{body}</template><title>T</title></head>text"))


def test_headings_of_pages_belong_to_the_text_below_them() -> None:
    assert list(extracting.html(PAGE)) == [Pair(2, "How to lend a licence", "Ask the office first.\nOne\nTwo"),
                                           Pair(4, "Then", "Return it.")]  # fmt: skip
    assert list(extracting.html("<h1>a<h1 <</nav></script>")) != []  # whatever is in a page


def source(folder: Path) -> PairSource:
    return PairSource(str(folder), TextRules(columns=("query",)), "query", Least(2, 3))


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "code.py").write_text(CODE)
    (folder / "broken.py").write_text("def f(:")
    (folder / "notes.md").write_text(NOTES)
    (folder / "page.html").write_bytes(PAGE.encode())
    (folder / "plain.txt").write_text("no pairs in here")
    rows = [{"query": f"what is number {i % 50}", "text": f"it is the number {i % 40} of them all"} for i in range(200)]
    rows += [{"query": 3, "text": "of no query"}, {"text": "of no query"}, {"query": "one two three", "text": "one two three"}]
    rows += [{"query": "short", "text": "a text of some words"}, {"query": "of a short text", "text": "two words"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(tmp_path: Path, name: str, **keys: Any) -> tuple[list[dict[str, Any]], dict[str, Any], Location]:
    here: flow.Flow = HereFlow(Work(Location(f"{tmp_path}/{name}.work")), **keys)
    output = Location(f"{tmp_path}/{name}")
    making = PairMaking(
        here, source(tmp_path / "in"), output, [], 1 << 30, tokenizer=BPE, given_tokenizer=None, shard_bytes=1500, chunk_pairs=8
    )
    rows, meta = making.run(sources.listing(str(tmp_path / "in"), ("extract", "pdf")))
    return in_memory(rows).to_pylist(), meta, output


def rows_of(chunks: list[dict[str, Any]], output: Location) -> list[list[dict[str, Any]]]:
    """Returns the pairs of each row group."""
    return [pq.ParquetFile(f"{output.path}/{c['path']}").read_row_group(c["row_group"]).to_pylist() for c in chunks]


def test_the_same_pairs_from_any_cut_of_the_input_each_once(tmp_path, monkeypatch) -> None:
    write(tmp_path / "in")
    chunks, meta, output = make(tmp_path, "first")
    found = [row for chunk in rows_of(chunks, output) for row in chunk]
    assert len({(row["query"], row["text"]) for row in found}) == len(found) == meta["documents"]
    assert sum(row["kind"] == "record" for row in found) == 200 == meta["kinds"]["record"]  # pairs of the two numbers
    assert {row["query"]: row["id"] for row in found if row["kind"] == "docstring"} == {
        "Return the bytes of all files.": "code.py#5", "Read a whole file.": "code.py#17"}  # fmt: skip
    assert meta["dropped"] == {"no_pairs": 1, "no_query": 2, "same": 1, "short_query": 3, "short_text": 1, "unparsed": 1}
    monkeypatch.setattr(pieces, "size", lambda total: 3000)
    for name, seed in (("again", 3), ("merged", 4)):
        again, told, _ = make(tmp_path, name, seed=seed)
        assert again == chunks and told == meta
        assert (tmp_path / f"{name}.work" / "done" / "merge").exists() is (name == "merged")
        monkeypatch.setattr(merging, "MANY", 2)


def test_a_text_is_held_out_with_all_of_its_queries(tmp_path) -> None:
    write(tmp_path / "in")
    chunks, meta, output = make(tmp_path, "out")
    facts = {k: v for k, v in meta.items() if k != "listed"} | {"name": "pairs"}
    made = manifest.write(output, chunks, facts)
    for fraction in (0.1, 0.37, 0.5):
        parts = split.split(made, None, fraction)
        sides: tuple[set[str], set[str]] = set(), set()
        for chunk, held in zip(rows_of(chunks, output), parts.held, strict=True):
            sides[bool(held)].update(row["text"] for row in chunk)
        assert not sides[0] & sides[1] and all(sides)


def test_work_and_dataset_follow_from_how_pairs_are_found(tmp_path, monkeypatch) -> None:
    write(tmp_path / "in")
    pipeline = PairPipeline.model_validate({"name": "pairs", "input": str(tmp_path / "in"), "output": str(tmp_path / "out")})
    before = pipeline.identity()
    make(tmp_path, "out")
    tasks = set((tmp_path / "out.work" / "done" / "read").iterdir())
    monkeypatch.setattr(extracting, "VERSION", extracting.VERSION + 1)
    make(tmp_path, "out")
    assert pipeline.identity() != before and set((tmp_path / "out.work" / "done" / "read").iterdir()) > tasks


def test_equal_pairs_are_kept_once_and_counted(tmp_path) -> None:
    write(tmp_path / "in")
    (tmp_path / "in" / "more.jsonl").write_text((tmp_path / "in" / "pairs.jsonl").read_text())
    _, meta, _ = make(tmp_path, "out")
    assert meta["kinds"]["record"] == 200 == meta["duplicates"]


@pytest.mark.parametrize(("keys", "said"), [
    ({"text_column": "query"}, "columns.query: 'query' is also the value of columns.text"),
    ({"exclude": ["[z-a]"]}, "exclude: .* not a valid pattern"),
    ({"output": "in/out"}, "output: .* overlap"),
])  # fmt: skip
def test_a_pipeline_that_makes_no_sense_is_refused(keys, said) -> None:
    with pytest.raises(ConfigError, match=said):
        PairPipeline(**{"name": "pairs", "input": "in", "output": "out", **keys}).check()
