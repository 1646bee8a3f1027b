"""Compares a FineWeb-like pipeline, from web pages to token shards, with decompressing and parsing the same pages. By hand:

    python -m tests.benchmarks.curation_pages PAGES tokenizer.json --folder FOLDER [--megabytes 20] [--turns 3]

PAGES is a folder with HTML pages, such as Debian's documentation packages (`curation_corpus.py`). The pages become one WARC file
with a gzip member per page. The lower bound reads this file with fastwarc, and builds resiliparse's tree of each page. A second
bound also extracts each page's main content with resiliparse, because every pipeline of pages needs it. Each turn is a separate
process. CPU seconds count. Numbers: docs/benchmarks/curation-stages.md.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import harness
from tests.benchmarks.curation_pipeline import STAGES

HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"


def pages(folder: Path, most: float) -> Iterator[tuple[str, bytes]]:
    """Yields (path, page) of HTML pages in the order of the hashes of their paths, up to `most` bytes."""
    size = 0
    for path in sorted(folder.rglob("*.html"), key=lambda path: hashlib.md5(str(path.relative_to(folder)).encode()).digest()):
        page = path.read_bytes()
        if (size := size + len(page)) > most:
            return
        yield str(path.relative_to(folder)), page


def write(folder: Path, most: float, out: Path) -> tuple[int, int]:
    """Writes pages to a WARC file. Returns the number of pages, and their bytes."""
    count = size = 0
    with out.open("wb") as file:
        for path, page in pages(folder, most):
            body = HTTP + page
            head = (
                f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/{path}\r\n"
                f"WARC-Record-ID: <urn:x:{count}>\r\nWARC-Date: 2026-11-30T00:00:00Z\r\n"
                f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            file.write(gzip.compress(head.encode() + body + b"\r\n\r\n", 6))
            count, size = count + 1, size + len(page)
    return count, size


def parse(path: str, extracts: bool) -> dict[str, Any]:
    """Decompresses and parses each page, and extracts its main content if `extracts` is set. Returns the CPU seconds, and the
    number of pages."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    counted = [0]

    def work() -> None:
        with Path(path).open("rb") as file:
            for record in ArchiveIterator(file, record_types=WarcRecordType.response):
                tree = HTMLTree.parse_from_bytes(record.reader.read(), "utf-8")
                if extracts:
                    extract_plain_text(tree, main_content=True, alt_texts=False)
                counted[0] += 1

    return {"seconds": harness.cpu(work), "pages": counted[0]}


def curate(path: str, output: str, tokenizer: str) -> dict[str, Any]:
    """Makes a dataset from the pages. Returns the CPU seconds by step, of all steps, and the number of documents."""
    from heliostat.curation import reasons

    from tests.unit.build_pipeline import Here, make_dataset

    shutil.rmtree(output, ignore_errors=True)
    stages = [{"stage": "extract"}, *STAGES]
    made = make_dataset(Here(name="a", input=path, output=output, stages=stages, tokenizer={"path": tokenizer}))
    steps = {name: round(seconds, 2) for name, seconds in reasons.seconds(made).items()}
    return {"seconds": sum(steps.values()), "steps": steps, "documents": made.meta["documents"]}


def main() -> None:
    asked = harness.arguments(
        __doc__, pages=Path, tokenizer=str, folder={"type": Path, "required": True}, megabytes=20.0, turns=3
    )
    (folder := asked.folder.absolute()).mkdir(parents=True, exist_ok=True)
    warc = folder / "pages.warc.gz"
    count, size = write(asked.pages, asked.megabytes * 1e6, warc)
    turns = harness.by_turns(
        {
            "decompressing and parsing": partial(harness.apart, parse, str(warc), False),
            "decompressing, parsing, and extracting": partial(harness.apart, parse, str(warc), True),
            "heliostat": partial(harness.apart, curate, str(warc), str(folder / "out"), str(Path(asked.tokenizer).absolute())),
        },
        asked.turns,
    )
    print(f"{count:,} pages, {size / 1e6:.1f} MB; {warc.stat().st_size / 1e6:.1f} MB compressed")
    harness.head("work", "CPU s, median (least to most)", "CPU s of the process", "MB/s of HTML per core")
    for name, made in turns.items():
        seconds = [result["seconds"] for result, _ in made]
        harness.row(
            name, harness.spread(seconds, ".2f"), f"{median(cpu for _, cpu in made):.1f}", f"{size / 1e6 / median(seconds):.1f}"
        )
        print(json.dumps({key: value for key, value in made[0][0].items() if key != "seconds"}))


if __name__ == "__main__":
    main()
