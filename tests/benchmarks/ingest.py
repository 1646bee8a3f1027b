"""Delivering a whole data set, shuffled, to 1, 2 and 4 consumers: heliostat's pipeline and six others.

    python tests/benchmarks/ingest.py [--rounds 3] [--kind tokens] [--store local] [--consumers 2] [--contender ours]

Same samples, uncompressed, in each library's own format; same batch (32) and, as far as each has one, the same number of
samples in its shuffle buffers as heliostat has in a window. A consumer sums every batch; counts and sums are checked, so
nobody can skip or repeat samples. Contenders take turns within a round; the tables show medians of the rounds. What is
measured starts when processes are up and libraries imported (for Ray: a started Ray and the consumer actors).

webdataset and `datasets` come with `pip install -e '.[bench]'`. mosaicml-streaming wants transformers 4 and cannot be
installed beside heliostat by the usual way: `pip install --no-deps mosaicml-streaming torchvision catalogue brotli
python-snappy cramjam zstd xxhash`. Who is missing is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from ingest_contenders import figure, s3_server, samples
from ingest_contenders.measure import measure
from ingest_contenders.task import Task

CONTENDERS = {
    "ours": "heliostat",
    "arrow_loop": "pyarrow loop, not shuffled",
    "mosaic": "mosaicml-streaming py1e",
    "tars": "webdataset",
    "hugging": "datasets streaming, no loader",
    "hugging_loader": "datasets streaming, DataLoader",
    "ray_data": "Ray Data, local shuffle",
}
BATCH, LENGTH = 32, 512
WINDOW_BYTES = 32 << 20  # heliostat's default
SAMPLE_BYTES = {"tokens": 4 * LENGTH, "images": 7_400}  # about, of an encoded image

Results = dict[tuple[str, str, int, str], list[dict[str, float]]]  # by kind, store, consumers, contender


def contenders(wanted: list[str]) -> list[str]:
    found = []
    for name in wanted:
        module = importlib.import_module(f"ingest_contenders.{name}")
        if find_spec(module.NEEDS):
            found.append(name)
        else:
            print(f"left out: {name} ({module.NEEDS} is not installed)", file=sys.stderr)
    return found


def run(options: argparse.Namespace, scratch: Path) -> Results:
    results: Results = {}
    data = options.data or scratch / "data"
    with ExitStack() as stack:
        endpoint = stack.enter_context(s3_server.serve()) if "s3" in options.store else None
        plans = []
        for kind in options.kind:
            count = options.samples // (1 if kind == "tokens" else 4)
            total = samples.make(kind, data / f"{kind}-{count}", count, LENGTH)
            folders = {"local": str(data / f"{kind}-{count}")}
            if endpoint:
                folders["s3"] = s3_server.upload(data / f"{kind}-{count}", endpoint)
            window = min(count // 4, WINDOW_BYTES // SAMPLE_BYTES[kind])
            for store, n in itertools.product(options.store, options.consumers):
                where = (folders[store], endpoint if store == "s3" else None)
                for name in contenders(options.contender):
                    plans.append((store, total, Task(name, kind, *where, n, count, LENGTH, BATCH, window, "")))
        for number in range(options.rounds):
            for store, total, task in plans:
                found = once(task, total, scratch)
                results.setdefault((task.kind, store, task.consumers, task.contender), []).append(found)
                print(number, task.kind, store, task.consumers, task.contender, json.dumps(found), file=sys.stderr, flush=True)
    return results


def once(task: Task, total: int, scratch: Path) -> dict[str, float]:
    empty = Path(tempfile.mkdtemp(dir=scratch))
    try:
        found = measure(dataclasses.replace(task, scratch=str(empty)), scratch / "log.txt")
    finally:
        shutil.rmtree(empty, ignore_errors=True)
    delivered = (found["count"], found["sum"])
    assert delivered == (task.samples, total), f"{task.contender}: (samples, sum) are {delivered}, not {(task.samples, total)}"
    return found


def table(results: Results, kind: str, store: str) -> str:
    """Medians over the rounds, every round's rate in brackets. Steady: between a quarter and three quarters of the samples,
    where buffers are as full at the start as at the end."""
    unit = "tokens/s a core" if kind == "tokens" else "images/s a core"
    scale = LENGTH if kind == "tokens" else 1
    heads = [f"{kind}, {store}", "consumers", "rows/s, steady", "MB/s, steady", f"{unit}, steady", f"{unit}, in all",
             "first batch, s", "rows/s, in all", "peak MB"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = {key[2:]: runs for key, runs in results.items() if key[:2] == (kind, store)}
    for consumers, name in sorted(found, key=lambda key: (key[0], list(CONTENDERS).index(key[1]))):
        runs = found[consumers, name]
        steady = [r["steady"] for r in runs]
        cells = [
            CONTENDERS[name],
            str(consumers),
            f"{median(steady):,.0f} ({', '.join(f'{r:,.0f}' for r in steady)})",
            f"{median(steady) * SAMPLE_BYTES[kind] / 1e6:,.0f}",
            f"{median(scale / r['steady_cpu'] for r in runs):,.0f}",
            f"{median(scale * r['count'] / r['cpu'] for r in runs):,.0f}",
            f"{median(r['first'] for r in runs):.2f}",
            f"{median(r['count'] / r['seconds'] for r in runs):,.0f}",
            f"{median(r['peak'] for r in runs) / 1e6:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=131_072, help="token rows of 2 KiB; a quarter as many images")
    parser.add_argument("--kind", action="append", choices=["tokens", "images"])
    parser.add_argument("--store", action="append", choices=["local", "s3"])
    parser.add_argument("--consumers", action="append", type=int)
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS))
    parser.add_argument("--data", type=Path, help="keep the data sets in this folder, and find them there")
    parser.add_argument("--save", type=Path, help="also write every run's numbers to this JSON file")
    parser.add_argument("--figure", type=Path, help="also draw the rates to this file (SVG or PNG)")
    options = parser.parse_args()
    options.kind, options.store = options.kind or ["tokens", "images"], options.store or ["local", "s3"]
    options.consumers, options.contender = options.consumers or [1, 2, 4], options.contender or list(CONTENDERS)
    with tempfile.TemporaryDirectory(prefix="ingest-") as scratch:
        results = run(options, Path(scratch))
    if options.save:
        options.save.write_text(json.dumps([[*key, runs] for key, runs in results.items()]))
    for kind in options.kind:
        for store in options.store:
            print(f"\n{table(results, kind, store)}", flush=True)
    if options.figure:
        figure.rates({key: [r["steady"] for r in runs] for key, runs in results.items()}, CONTENDERS, options.figure)


if __name__ == "__main__":
    main()
