"""Simulates image pipelines on a large cluster, from a small measured sample: WebDataset tars, or lists of URLs.

    python -m tests.benchmarks.simulated_images --files 23000 --gb 1               # so many tars of so many GB
    python -m tests.benchmarks.simulated_images --urls 1e6 1e8 --per-second 10     # lists of so many URLs

The sample's images come from noise, as JPEGs of 640 x 480 pixels and 110 KB. For URLs, a server on loopback serves them under the
addresses 127.*, one for each host, and a Zipf distribution draws a URL's host. `store` counts what the driver asks of the store
during the simulation.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from heliostat.curation.simulation import simulate, tables
from heliostat.storage.locations import Location
from PIL import Image

from tests.benchmarks import harness
from tests.unit.test_fetching import Handler, Server, running

TARS, IMAGES = 4, 64  # of the sample
LISTS, ROWS = 4, 50_000
STORE = ("read", "write", "delete", "files", "open", "info", "exists")


def noise(seed: int) -> bytes:
    rng, out = np.random.default_rng(seed), io.BytesIO()
    smooth = Image.fromarray(rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).astype(int) + rng.integers(-20, 20, (480, 640, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def make_tars(folder: Path) -> None:
    for number in range(TARS):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for i in range(IMAGES):
                for suffix, body in (("jpg", noise(IMAGES * number + i)), ("txt", f"image {i} of tar {number}".encode())):
                    info = tarfile.TarInfo(f"{i:06}.{suffix}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))


def serve(handler: Handler) -> None:
    handler.answer(noise(int(handler.path.strip("/").partition(".")[0])))


class Everywhere(Server):
    """Serves an image under every path, and under every address 127.*."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages()

    def server_bind(self) -> None:
        self.server_address = ("0.0.0.0", 0)
        super().server_bind()


class Pages(dict[str, Any]):
    def get(self, path: str, default: Any = None) -> Any:
        return serve if path.endswith(".jpg") else default


def make_lists(folder: Path, port: int, hosts: int, exponent: float) -> None:
    shares = np.arange(1, hosts + 1) ** -exponent
    ranks = np.random.default_rng(0).choice(hosts, LISTS * ROWS, p=shares / shares.sum())
    for number in range(LISTS):
        with (folder / f"{number}.jsonl").open("w") as file:
            for n in range(number * ROWS, (number + 1) * ROWS):
                host = 1 + int(ranks[n])
                address = f"127.{host >> 16}.{host >> 8 & 255}.{host & 255}"
                file.write(
                    json.dumps({"url": f"http://{address}:{port}/{n}.jpg", "caption": f"a picture with number {n}"}) + "\n"
                )


@contextmanager
def counting(calls: Counter[str]) -> Iterator[None]:
    """Counts the driver's calls to the store, from the start of the simulation on."""
    methods, real = {name: getattr(Location, name) for name in STORE}, simulate.VirtualCluster

    def wrap(name: str) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            calls[name] += 1
            return methods[name](*positional, **named)

        return call

    def cluster(*positional: Any) -> Any:
        calls.clear()
        return real(*positional)

    for name in STORE:
        setattr(Location, name, wrap(name))
    simulate.VirtualCluster = cluster  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        simulate.VirtualCluster = real  # type: ignore[misc]
        for name, method in methods.items():
            setattr(Location, name, method)


def show(name: str, pipeline: Path, size: int, cluster: str, fraction: float) -> None:
    calls, began = Counter[str](), time.process_time()
    with counting(calls):
        report = simulate.simulate(pipeline, [], size, simulate.nodes_of(cluster), fraction, quiet=True)
    print(f"\n## {name}\n")
    for table in (tables.of_kinds(report), tables.of_requests(report)):
        harness.head(*table[0])
        for cells in table[1:]:
            harness.row(*cells)
        print()
    for line in tables.explain(report | {"cost": 0.0, "currency": ""}):
        print(f"- {line}")
    print(f"- store: {dict(calls)}")
    print(f"- simulated in {time.process_time() - began:,.0f} CPU seconds", flush=True)


def main() -> None:
    options = harness.arguments(__doc__, files=0, gb=1.0, urls={"type": float, "nargs": "+", "default": []}, per_second=10.0,
                                hosts=2_000_000, exponent=1.1, cluster="500x32", fraction=0.002, memory="2GiB")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="heliostat-images-") as place:
        folder = Path(place)
        (folder / "in").mkdir()
        keys = {"name": "images", "pipeline": "heliostat.pipelines:ImagePipeline", "input": str(folder / "in"),
                "output": str(folder / "out"), "resolution": 256, "encoding": "jpeg", "duplicates": "exact",
                "memory_limit": options.memory, "stages": [{"stage": "length", "min_chars": 5}]}  # fmt: skip
        pipeline = folder / "pipeline.yaml"
        if options.files:
            make_tars(folder / "in")
            pipeline.write_text(json.dumps(keys))
            simulate.MOST_FILES = options.files
            show(f"{options.files:,} tars", pipeline, round(options.files * options.gb * 1e9), options.cluster, 1.0)
            return
        with running(Everywhere()) as server:
            make_lists(folder / "in", server.server_address[1], options.hosts, options.exponent)
            pipeline.write_text(json.dumps(keys | {"fetch": {"per_second": options.per_second, "private": True}}))
            each = sum(file.stat().st_size for file in (folder / "in").iterdir()) / (LISTS * ROWS)
            for urls in options.urls:
                show(f"{urls:,.0f} URLs", pipeline, round(urls * each), options.cluster, options.fraction)


if __name__ == "__main__":
    main()
