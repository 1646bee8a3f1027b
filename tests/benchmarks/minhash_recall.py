"""Measures recall and precision of `minhash` and of datatrove's MinHash on planted pairs: 14 x 8, 5-grams, the same documents.

    python -m tests.benchmarks.minhash_recall corpus.jsonl [--datatrove VENV/bin/python] [--documents 4000] [--pairs 1000]

`curation_corpus.py` makes the corpus. A pair is a document and a copy with some replaced words. The Jaccard similarity of their
5-grams is drawn from 0.5 to 0.97, and its real value is computed from the texts. A pair is found if both are in one cluster.
Precision is the share of pairs at 0.5 or above among all pairs of documents in clusters, planted or not. Each side is a separate
process, and CPU seconds include its start and its reading.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import defaultdict
from itertools import combinations, pairwise
from pathlib import Path

from tests.benchmarks import harness

BUCKETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
LEAST_WORDS, MOST_WORDS = 150, 1500
SHOWN = 60  # documents of a cluster whose pairs are looked at


def grams(text: str) -> set[tuple[str, ...]]:
    """Lists the 5-grams of words, as letters and digits in lower case."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(a: str, b: str) -> float:
    x, y = grams(a), grams(b)
    return len(x & y) / max(1, len(x | y))


def changed(rng: random.Random, text: str, similarity: float) -> str:
    """Replaces words, each in five 5-grams, so that about this similarity remains."""
    words = text.split(" ")
    share = 1 - (2 * similarity / (1 + similarity)) ** (1 / 5)
    return " ".join(f"{rng.choice(words)}x{rng.randrange(999)}" if rng.random() < share else word for word in words)


def plant(corpus: Path, folder: Path, documents: int, pairs: int) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Writes documents and copies as JSON lines; returns texts by id, and the planted pairs."""
    rng, texts = random.Random(0), dict[str, str]()
    for line in corpus.open():
        text = json.loads(line)["text"]
        if LEAST_WORDS <= len(text.split()) <= MOST_WORDS:
            texts[f"d{len(texts)}"] = text
        if len(texts) == documents:
            break
    planted = [(id, f"{id}-copy") for id in rng.sample(sorted(texts), min(pairs, len(texts)))]
    texts |= {copy: changed(rng, texts[id], rng.uniform(0.5, 0.97)) for id, copy in planted}
    order = sorted(texts)
    rng.shuffle(order)
    (folder / "in").mkdir()
    with (folder / "in" / "a.jsonl").open("w") as f:
        for id in order:
            f.write(json.dumps({"id": id, "text": texts[id]}) + "\n")
    return texts, planted


def ours(place: str) -> dict[str, str]:
    """Runs the stage, with its spills and sorts; returns the cluster of each document that has one, by its smallest document."""
    from heliostat.tasks import spill

    from tests.unit.build_curation import curate

    folder = Path(place)
    texts = {row["id"]: row["text"] for row in map(json.loads, (folder / "in" / "a.jsonl").open())}
    found, here = curate(folder / "work", texts, [{"stage": "minhash"}], memory_limit=256 << 20, again=0)
    gone = [row for name in found.left_out for t in spill.read(here.work.spill, name) for row in t.to_pylist()]
    return {row["id"]: row["detail"].rpartition(" (one of")[0] for row in gone}


def theirs(place: str) -> dict[str, str]:
    """Runs datatrove's four steps, one task after another, with reported clusters."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader

    folder, config = Path(place), minhash.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    sigs, buckets, removed = (str(folder / name) for name in ("sigs", "buckets", "removed"))
    documents: list[Document] = []

    def read():
        for document in JsonlReader(str(folder / "in"))():
            documents.append(Document(text="", id=document.id))
            yield document

    minhash.MinhashDedupSignature(output_folder=sigs, config=config).run(read(), 0, 1)
    for bucket in range(14):
        minhash.MinhashDedupBuckets(input_folder=sigs, output_folder=buckets, config=config).run(None, bucket, 14)
    minhash.MinhashDedupCluster(input_folder=buckets, output_folder=removed, config=config, save_cluster_id=True).run(None, 0, 1)
    for _ in minhash.MinhashDedupFilter(input_folder=removed, load_cluster_ids=True).run(iter(documents), 0, 1):
        pass
    found = {d.id: d.metadata.get("minhash_cluster_id", -1) for d in documents}
    return {id: str(cluster) for id, cluster in found.items() if cluster != -1}


def told(clusters: dict[str, str], texts: dict[str, str], similar: dict[tuple[str, str], float]) -> tuple[list[str], str]:
    """Returns the recall of each bucket, and the precision."""
    of = {id: clusters.get(id, id) for id in texts} | {keeper: keeper for keeper in clusters.values() if keeper in texts}
    groups = defaultdict[str, list[str]](list)
    for id, cluster in of.items():
        groups[cluster].append(id)
    recall = []
    for low, high in pairwise(BUCKETS):
        mine = [of[a] == of[b] for (a, b), s in similar.items() if low <= s < high]
        recall.append(f"{sum(mine)} of {len(mine)} ({sum(mine) / max(1, len(mine)):.1%})")
    joined = [jaccard(texts[a], texts[b]) for ids in groups.values() for a, b in combinations(sorted(ids)[:SHOWN], 2)]
    return recall, f"{sum(s >= 0.5 for s in joined) / max(1, len(joined)):.1%} of {len(joined):,}"


def main() -> None:
    asked = harness.arguments(__doc__, corpus=Path, datatrove="", documents=4000, pairs=1000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts, planted = plant(asked.corpus, folder, asked.documents, asked.pairs)
        megabytes = sum(len(text.encode()) for text in texts.values()) / 1e6
        print(f"{len(texts):,} documents, {megabytes:.1f} MB, {len(planted):,} planted pairs", flush=True)
        similar = {pair: jaccard(texts[pair[0]], texts[pair[1]]) for pair in planted}
        sides = {"heliostat": (sys.executable, ours)} | ({"datatrove": (asked.datatrove, theirs)} if asked.datatrove else {})
        rows = {}
        for name, (python, side) in sides.items():
            clusters, seconds = harness.apart(side, temporary, python=python)
            rows[name] = (*told(clusters, texts, similar), f"{seconds / megabytes:.2f}")
    harness.head("Jaccard", "expected", *rows)
    for number, (low, high) in enumerate(pairwise(BUCKETS)):
        curve = [1 - (1 - s**8) ** 14 for s in similar.values() if low <= s < high]
        cells = [recall[number] for recall, _, _ in rows.values()]
        harness.row(f"{low:g} to {high:g}", f"{sum(curve) / max(1, len(curve)):.1%}", *cells)
    harness.row("pairs joined that have 0.5 and more", "", *(precise for _, precise, _ in rows.values()))
    harness.row("CPU s a MB", "", *(seconds for _, _, seconds in rows.values()))


if __name__ == "__main__":
    main()
