"""Measures the delivery of a whole dataset, shuffled, to 1, 2, and 4 consumers: heliostat's pipeline and six others.

    python -m tests.benchmarks.ingest [--rounds 3] [--kind tokens] [--store local] [--consumers 2] [--contender ours]

All have the same samples, uncompressed, in each library's own format, and the same batch (32). If a library has shuffle buffers,
they hold as many samples as a window of heliostat. A consumer sums every batch, and counts and sums are checked, so no contender
can skip or repeat samples. Contenders take turns within a round, and the tables show medians of the rounds. The measurement
starts when processes run and libraries are imported (for Ray: a started Ray and the consumer actors).

webdataset and `datasets` come with `pip install -e '.[bench]'`. mosaicml-streaming needs transformers 4, and can't be installed
next to heliostat in the usual way: `pip install --no-deps mosaicml-streaming torchvision catalogue brotli python-snappy cramjam
zstd xxhash`. A missing contender is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from heliostat.chaos.servers import s3_server
from heliostat.storage.locations import Location

from tests import stores
from tests.benchmarks import harness
from tests.benchmarks.ingest_contenders import samples
from tests.benchmarks.ingest_contenders.contenders import CONTENDERS
from tests.benchmarks.ingest_contenders.measure import measure
from tests.benchmarks.ingest_contenders.task import Task

BUCKET = "ingest"
BATCH, LENGTH = 32, 512
WINDOW_BYTES = 32 << 20  # heliostat's default
SAMPLE_BYTES = {"tokens": 4 * LENGTH, "images": 7_400}  # about, of an encoded image

Results = dict[tuple[str, str, int, str], list[dict[str, float]]]  # by kind, store, consumers, contender


def contenders(wanted: list[str]) -> list[str]:
    for name in wanted:
        if not find_spec(CONTENDERS[name].needs):
            print(f"left out: {name} ({CONTENDERS[name].needs} is not installed)", file=sys.stderr)
    return [name for name in wanted if find_spec(CONTENDERS[name].needs)]


def upload(folder: Path, endpoint: str) -> str:
    """Copies a dataset's folder to the store; returns its address."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        there = f"s3://{BUCKET}/{folder.name}/{path.relative_to(folder)}?endpoint_override={endpoint}&scheme=http"
        Location(there).upload(path)
    return f"s3://{BUCKET}/{folder.name}"


def run(options: argparse.Namespace, scratch: Path) -> Results:
    results: Results = {}
    data = options.data or scratch / "data"
    with ExitStack() as stack:
        endpoint = stack.enter_context(s3_server(scratch)).endpoint if "s3" in options.store else None
        if endpoint:
            stores.bucket(endpoint, BUCKET)
        plans = []
        for kind in options.kind:
            count = options.samples // (1 if kind == "tokens" else 4)
            total = samples.make(kind, data / f"{kind}-{count}", count, LENGTH)
            folders = {"local": str(data / f"{kind}-{count}")}
            if endpoint:
                folders["s3"] = upload(data / f"{kind}-{count}", endpoint)
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


def table(results: Results, kind: str, store: str) -> None:
    """Formats medians over the rounds, with every round's rate in brackets.

    Steady: between a quarter and three quarters of the samples, where buffers are as full at the start as at the end.
    """
    unit = "tokens/s a core" if kind == "tokens" else "images/s a core"
    scale = LENGTH if kind == "tokens" else 1
    heads = [f"{kind}, {store}", "consumers", "rows/s, steady", "MB/s, steady", f"{unit}, steady", f"{unit}, in all",
             "first batch, s", "rows/s, in all", "peak MB"]  # fmt: skip
    harness.head(*heads)
    found = {key[2:]: runs for key, runs in results.items() if key[:2] == (kind, store)}
    for consumers, name in sorted(found, key=lambda key: (key[0], list(CONTENDERS).index(key[1]))):
        runs = found[consumers, name]
        steady = [r["steady"] for r in runs]
        cells = [
            CONTENDERS[name].label,
            consumers,
            f"{median(steady):,.0f} ({', '.join(f'{r:,.0f}' for r in steady)})",
            f"{median(steady) * SAMPLE_BYTES[kind] / 1e6:,.0f}",
            f"{median(scale / r['steady_cpu'] for r in runs):,.0f}",
            f"{median(scale * r['count'] / r['cpu'] for r in runs):,.0f}",
            f"{median(r['first'] for r in runs):.2f}",
            f"{median(r['count'] / r['seconds'] for r in runs):,.0f}",
            f"{median(r['peak'] for r in runs) / 1e6:,.0f}",
        ]
        harness.row(*cells)


def draw(results: Results, path: Path) -> None:
    """Draws the rates as bars: a panel for each kind of sample and store, and a group of bars per contender."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "heliostat"
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((kind, store) for kind, store, _, _ in results))
    counts = sorted({consumers for _, _, consumers, _ in results})
    plot, axes = plt.subplots(len(panels), 1, figsize=(7, 2.4 * len(panels)), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        names = [n for n in CONTENDERS if any(key[:2] == panel and key[3] == n for key in results)]
        for i, consumers in enumerate(counts):
            rates = [median(r["steady"] for r in results.get((*panel, consumers, n), [{"steady": 0.0}])) for n in names]
            places = [j + (i - (len(counts) - 1) / 2) * 0.8 / len(counts) for j in range(len(names))]
            axis.barh(places, rates, 0.8 / len(counts), label=f"{consumers} consumer{'s' if consumers > 1 else ''}")
        axis.set_yticks(range(len(names)), [CONTENDERS[n].label for n in names])
        axis.invert_yaxis()
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
        axis.set_title(f"{panel[0]}, {panel[1]}: rows/s", loc="left", fontsize=10)
    axes[0, 0].legend(fontsize=8)
    plot.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    options = harness.arguments(
        __doc__, rounds=3, kind=["tokens", "images"], store=["local", "s3"], consumers=[1, 2, 4], contender=[*CONTENDERS],
        samples={"type": int, "default": 131_072, "help": "token rows of 2 KiB; a quarter as many images"},
        data={"type": Path, "help": "keep the data sets in this folder, and find them there"},
        save={"type": Path, "help": "also write every run's numbers to this JSON file"},
        figure={"type": Path, "help": "also draw the rates to this file (SVG or PNG)"},
    )  # fmt: skip
    os.environ.update(stores.AWS)
    with tempfile.TemporaryDirectory(prefix="ingest-") as scratch:
        results = run(options, Path(scratch))
    if options.save:
        options.save.write_text(json.dumps([[*key, runs] for key, runs in results.items()]))
    for kind in options.kind:
        for store in options.store:
            print()
            table(results, kind, store)
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
