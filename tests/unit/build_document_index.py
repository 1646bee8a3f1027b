"""Writes small datasets of text with known places for tests, and indexes of them."""

from pathlib import Path

import numpy as np
from heliostat.apps.search import build
from heliostat.apps.search.search import SearchIndex
from heliostat.apps.search.tasks import IndexSettings
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.inference.batch.run import WORK
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow
from tests.unit.test_samples import END, TEXTS

SETTINGS = IndexSettings(chunk_tokens=16, overlap=4)


def write_dataset(folder: Path, texts: dict[str, str], shards: int = 2, definition: str | None = None) -> manifest.Manifest:
    """Writes a dataset as the pipeline does, in shards of several row groups with known places."""
    definition = definition or tokens.train(TEXTS, 300, END)
    tokenizer = tokens.load(definition)
    end, place, rows = tokens.end_id(tokenizer, END), Location(str(folder)), []
    place.join("tokenizer.json").write(definition.encode())
    for number in range(shards):
        ids = [id for id in texts if int(id.partition("#")[2]) % shards == number]
        encoded = tokens.encode(tokenizer, [texts[id] for id in ids], end)
        data = tokens.shard(ids, encoded, 60, np.arange(len(ids), 0, -1) * 1000 + number)
        path = f"shards/{number:05}/{hash(data) & 0xFFFFFFFF:08x}.parquet"
        place.join(path).write(data)
        rows += manifest.read_footer(place, path, "tokens")
    return manifest.write(place, rows, {"kind": "tokens", "end_of_document": end, "vocab_size": 300})


def named(texts: list[str]) -> dict[str, str]:
    return {f"code.jsonl#{i}": text for i, text in enumerate(texts)}


LONG = "".join(f"line {i} of a long document\n" for i in range(40))
CORPUS = named([*TEXTS[:30], LONG, *TEXTS[30:60], "  \n "])


def index(made: manifest.Manifest, out: Path, embedder: Path | None = None, settings=SETTINGS, **flow) -> dict:
    place, about = Location(str(out)), build.describe(embedder) if embedder else None
    return build.build(HereFlow(Work(place.join(WORK)), **flow), made, place, settings, about, build.what_was(place), 4)


def rows(out: Path | SearchIndex) -> list[dict]:
    """Returns all passages of the version in an index's record, in their own order."""
    found = (out if isinstance(out, SearchIndex) else SearchIndex(Location(str(out)))).table.to_table().to_pylist()
    return sorted(found, key=lambda row: (row["document"], row["number"]))
