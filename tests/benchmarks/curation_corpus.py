"""Makes a JSONL of real documents for `curation_stages.py` from Debian packages. By hand:

    apt-get download python3.13-doc linux-doc-6.12 wordnet-base; dpkg-deb -x NAME.deb FOLDER
    python -m tests.benchmarks.curation_corpus FOLDER OUT.jsonl --megabytes 10

Documents are sources of documentation (.txt, .rst, plain or .gz), the main text of HTML pages, all text of HTML pages (with menus
and footers), and glosses of WordNet, a hundred lines per document. Files are in the order of their paths' hashes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from tests.benchmarks import harness


def documents(path: Path) -> Iterator[str]:
    name = path.name.removesuffix(".gz")
    if not name.endswith((".txt", ".rst", ".html")) and path.parent.name != "wordnet":
        return
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", "replace")
    if name.endswith(".html"):
        tree = HTMLTree.parse(text)
        yield extract_plain_text(tree, main_content=True)
        yield extract_plain_text(tree, main_content=False)
    elif path.parent.name == "wordnet":
        glosses = [line.partition(" | ")[2].strip() for line in text.splitlines()]
        yield from ("\n".join(glosses[i : i + 100]) for i in range(0, len(glosses), 100))
    else:
        yield text


def main() -> None:
    args = harness.arguments(__doc__, folder=Path, out=Path, megabytes=10.0)
    paths = sorted((p for p in args.folder.rglob("*") if p.is_file()), key=lambda p: hashlib.md5(str(p).encode()).digest())
    count = size = 0
    with args.out.open("w") as out:
        for path in paths:
            for text in documents(path):
                if text.strip() and len(text) < 200_000:
                    out.write(json.dumps({"id": str(path.relative_to(args.folder)), "text": text}) + "\n")
                    count, size = count + 1, size + len(text.encode())
            if size > args.megabytes * 1e6:
                break
    print(f"{count:,} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
