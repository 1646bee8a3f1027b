"""Tests simulations of image pipelines: the driver writes nothing per task, and hosts limit how fast URLs are fetched."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.prepare import InputFile
from heliostat.curation.simulation import images, simulate, tables
from heliostat.curation.simulation.hosts import ANSWER_S, HostCounts, WebModel, counted
from heliostat.curation.simulation.virtual_cluster import SimulatedFaults
from heliostat.curation.web import lists
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import spill

from tests.unit.build_here_cluster import HereCluster
from tests.unit.build_images import folder_of, image
from tests.unit.test_fetching import Server, running

NONE = SimulatedFaults(node_days=1e9, poison=0, slow=0, bursts_per_day=1e-9)
LARGE = {"chunk_images": 1 << 20, "shard_images": 1 << 24}


def make_tars(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i in range(12):
                for suffix, body in (("png", image(40, 40, seed=100 * number + i)), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))


def make_folders(folder: Path) -> None:
    rows = [(f"{i}.png", image(40, 40, seed=i), {"caption": f"caption {i}"}) for i in range(20)]
    for name in "ab":
        folder_of(folder / name, rows)


def simulated(folder: Path, name: str, size: int, **more: Any) -> dict[str, Any]:
    keys = {"name": "n", "input": str(folder / "in"), "output": str(folder / name), "resolution": 16, "duplicates": "exact"}
    pipeline = ImagePipeline.model_validate(keys | more)
    place = Location(str(folder / name))
    return simulate.simulated(pipeline, place, pipeline.inputs(), size, (20, 16), 1.0, HereCluster(), NONE)


def test_latents_and_too_small_sizes_are_rejected_before_the_sample_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample would run for minutes. Without latents, the same pipeline can be simulated."""
    keys = {"name": "n", "pipeline": "heliostat.pipelines:ImagePipeline", "input": str(tmp_path), "output": str(tmp_path / "out"),
            "resolution": 16, "latents": {"autoencoder": "vae"}}  # fmt: skip
    (tmp_path / "p.yaml").write_text(json.dumps(keys))
    monkeypatch.setattr(simulate, "sampling", lambda pipeline, quiet: pytest.fail("prepares the sample"))
    with pytest.raises(
        ConfigError, match=r"^--simulate: not supported with latents.* Simulate without them: --set latents=null$"
    ):
        simulate.simulate(tmp_path / "p.yaml", [], 10**12, (20, 16), 0.1)
    monkeypatch.setattr(simulate, "sampling", lambda pipeline, quiet: contextlib.nullcontext((pipeline.latents, [])))
    monkeypatch.setattr(simulate, "simulated", lambda pipeline, latents, *_: latents)
    assert simulate.simulate(tmp_path / "p.yaml", ["latents=null"], 10**12, (20, 16), 0.1) is None
    monkeypatch.setattr(simulate, "sampling", lambda pipeline, quiet: contextlib.nullcontext((None, [InputFile("a", 9, 1)])))
    with pytest.raises(ConfigError, match=r"^--simulate: 5 bytes are less than the input's 9\. Pass a larger size$"):
        simulate.simulate(tmp_path / "p.yaml", ["latents=null"], 5, (20, 16), 0.1)


@pytest.mark.parametrize("make", [make_tars, make_folders])
def test_the_driver_writes_and_reads_as_much_for_10_tasks_as_for_1000(tmp_path, monkeypatch, make):
    """Its requests would take longer than the tasks: at 30 ms each, 230,000 take two hours."""
    calls, real = Counter[str](), simulate.VirtualCluster
    make(tmp_path / "in")
    for method in ("write", "read", "delete", "files", "open", "info", "exists"):
        before = getattr(Location, method)

        def call(self: Location, *positional: Any, method: str = method, before: Any = before, **named: Any) -> Any:
            calls[method] += 1
            return before(self, *positional, **named)

        monkeypatch.setattr(Location, method, call)
    monkeypatch.setattr(simulate, "VirtualCluster", lambda *positional: calls.clear() or real(*positional))
    found = {}
    for number in (10, 1000):
        monkeypatch.setattr(simulate, "MOST_FILES", number * (1 if make is make_tars else 21))
        report = simulated(tmp_path, f"out-{number}", number << 30, **LARGE)
        (read,) = (kind for kind in report["kinds"] if kind["kind"] == "read")
        assert number * 0.8 <= read["tasks"] <= number * 2
        found[number] = dict(calls)
    assert found[10]["write"] == found[1000]["write"] <= 5
    assert sum(found[1000].values()) - sum(found[10].values()) <= 10


def test_an_image_shard_has_a_row_group_for_each_chunk(tmp_path):
    make_tars(tmp_path / "in")
    report = simulated(tmp_path, "out", 1 << 26, chunk_images=100, shard_images=1000)
    (shards,) = (kind for kind in report["kinds"] if kind["kind"] == "shards")
    (count,) = (kind for kind in report["kinds"] if kind["kind"] == "count")
    assert report["rows"] == pytest.approx(10 * shards["tasks"], rel=0.05) and count["tasks"] > 0
    assert report["fetching"] is None and report["requests"]["output/shards/00"]["total"] >= shards["tasks"]


@pytest.mark.ci
def test_urls_are_fetched_as_fast_as_their_hosts_allow(tmp_path):
    """The driver makes as many tasks as for real lists. The report names the limit that decides the time."""
    (tmp_path / "in").mkdir()
    with running(Server()) as server:
        rows = []
        for i in range(120):
            server.pages[f"/{i}.png"] = image(20, 20, seed=i)
            rows.append({"url": server.url(f"/{i}.png", "localhost" if i % 3 else "127.0.0.1"), "caption": f"image {i}"})
        for name, some in (("a", rows[:60]), ("b", rows[60:])):
            (tmp_path / "in" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
        size = 200 * sum(file.stat().st_size for file in (tmp_path / "in").iterdir())
        fetch = {"per_second": 1000, "private": True}
        report = simulated(tmp_path, "out", size, fetch=fetch, **LARGE)
    web = report["fetching"]
    assert web["urls"] == 24_000 and web["hosts"] == 2 and web["largest_host"] == pytest.approx(16_000, rel=0.01)
    (read,) = (kind for kind in report["kinds"] if kind["kind"] == "read")
    (listed,) = (kind for kind in report["kinds"] if kind["kind"] == "lists")
    assert 4 + 8 <= read["tasks"] <= 5 + 9 and listed["tasks"] == 400
    assert web["hours"]["100%"] * 3600 == pytest.approx(16.0, rel=0.01) and max(web["limits"], key=web["limits"].get) == "answers"
    lines = tables.explain(report | {"cost": 1.0, "currency": "USD"})
    assert any("24,000 of about 2 hosts" in line for line in lines) and any("limits of fetching tasks" in line for line in lines)


def zipf(urls: int, hosts: int, exponent: float, seed: int) -> HostCounts:
    """Draws the hosts of some URLs: the share of the host of rank r is proportional to r to the power of -exponent."""
    shares = np.arange(1, hosts + 1) ** -exponent
    drawn = np.bincount(np.random.default_rng(seed).choice(hosts, urls, p=shares / shares.sum()), minlength=hosts)
    seen = np.flatnonzero(drawn)
    return HostCounts(spill.mixed(seen), drawn[seen])


def test_the_law_predicts_the_hosts_of_a_hundred_times_as_many_urls():
    """The number of hosts within a quarter, and the URLs of the largest hosts within a tenth, for a long-tailed web."""
    sample, whole = zipf(20_000, 3_000_000, 1.5, 1), zipf(2_000_000, 3_000_000, 1.5, 2)
    assert sample.hosts(2_000_000) == pytest.approx(len(whole.keys), rel=0.25)
    largest, real = np.sort(sample.sizes(2_000_000))[-5:], np.sort(whole.counts)[-5:]
    assert largest == pytest.approx(real, rel=0.1)


def test_a_host_with_all_urls_needs_a_pause_for_each_of_them():
    alone = HostCounts(np.array([7], np.uint64), np.array([50]))
    assert alone.seconds(5000, 2.0) == {0.5: 1250.0, 0.9: 2250.0, 0.99: 2475.0, 1.0: 2500.0}
    even = HostCounts(np.arange(100).astype(np.uint64), np.full(100, 10))
    assert even.seconds(100_000, 1.0)[1.0] == pytest.approx(1000.0) and even.seconds(100_000, 1.0)[0.5] == pytest.approx(500.0)


def test_a_task_takes_as_long_as_its_narrowest_limit():
    """Hosts that several tasks share count in each of them, other hosts only in their own task."""
    keys = np.sort(spill.mixed(np.arange(40)))
    counts = np.where(np.arange(40) == 3, 900, 10)
    web = WebModel(HostCounts(keys, counts), float(counts.sum()), 2.0, 8, 1e6)
    whole = {"low": 0, "high": spill.ALL, "urls": 300}
    assert web.limits({**whole, "part": 0, "of": 1}, 1e8) == {"hosts": 450.0, "answers": 300 * ANSWER_S / 8, "network": 3.0}
    shared = [web.limits({**whole, "part": part, "of": 4, "large": 500}, 1e8)["hosts"] for part in range(4)]
    own = [web.limits({**whole, "part": part, "of": 4, "large": 5000}, 1e8)["hosts"] for part in range(4)]
    assert shared == [450.0] * 4 and sorted(own) == [5.0, 5.0, 5.0, 450.0]
    assert web.limits({**whole, "high": int(keys[0]), "part": 0, "of": 1}, 1e8)["hosts"] == 0.0


@pytest.mark.parametrize("growth", [0.5, 1.0, 37.3])
def test_a_larger_list_has_more_urls_in_the_same_groups(growth):
    counts = np.zeros(lists.GROUPS, np.int64)
    counts[[5, 9, 60_000]] = 1000, 3, 40_000
    record = {"counts": lists.packed(counts), "runs": [["00/" + "0" * 32 + "-5000.parquet", 41_003, 9_000_000]], "files": []}
    found = images.lists_record(record, "key", growth)
    scaled = lists.unpacked(found["counts"])
    assert scaled.sum() == round(41_003 * growth) and set(np.flatnonzero(scaled)) <= {5, 9, 60_000}
    assert sum(rows for _, rows, _ in found["runs"]) == pytest.approx(scaled.sum(), abs=len(found["runs"]))
    assert all(rows <= lists.SPILLED for _, rows, _ in found["runs"]) and len(found["files"]) == len(found["runs"])


def test_hosts_are_counted_over_all_files_of_a_sample(tmp_path):
    place, hosts = Location(str(tmp_path)), np.array([4, 4, 9], np.uint64)
    drawn = [{"key": int(key), "id": str(n), "url": "u", "row": "{}"} for n, key in enumerate(hosts)]
    names = [spill.write(place, pa.Table.from_pylist(drawn[:stop], lists.ROWS)) for stop in (3, 2)]
    found = counted(place, names)
    assert found.keys.tolist() == [4, 9] and found.counts.tolist() == [4, 1] and found.urls == 5 and found.discount == 0.5
