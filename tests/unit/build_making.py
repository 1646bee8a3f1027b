"""Builds text datasets in this process, from reading to the manifest's rows."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

from heliostat.curation.registry import parse
from heliostat.curation.text import sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.making import TextMaking
from heliostat.curation.text.tasks import TextSource
from heliostat.data.manifest_table import in_memory
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow, spelled

BPE = {"vocab_size": 300, "train_bytes": 5000, "path": None, "end_of_document": "<|endoftext|>"}


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
    return (in_memory(rows).to_pylist(), meta), here
