"""Runs a pipeline's driver on a virtual cluster, for an input of any size, and reports times, requests, and the driver's cost."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from pydantic import ByteSize, TypeAdapter, ValidationError

from heliostat.curation import pieces, segment
from heliostat.curation.images.fetching import FetchSettings
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.images.sources import is_made
from heliostat.curation.prepare import InputFile, load, sampling
from heliostat.curation.simulation.hosts import WebModel, counted
from heliostat.curation.simulation.measuring import MeasuringCluster
from heliostat.curation.simulation.profile import Profile
from heliostat.curation.simulation.virtual_cluster import DISPATCH_S, KindTimes, SimulatedFaults, VirtualCluster
from heliostat.curation.tally import merge
from heliostat.curation.text import sources
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks.clusters import Cluster
from heliostat.tasks.ray_cluster import RayCluster
from heliostat.tasks.work import Work
from heliostat.text import plural

log = logging.getLogger(__name__)

MOST_FILES = 1_000_000  # input files of a simulation; more would be larger instead
SEGMENTS = 100  # folders of a simulated input, as in a crawl of Common Crawl
MOST_BYTES = 10**15  # of a simulated input: the driver of a larger one would run for hours
MOST_CPUS = 1_000_000
MEMORY_EACH = 4 << 30  # bytes of memory per CPU of a simulated node
HOUR_S = 3600.0


def nodes_of(value: str) -> tuple[int, int]:
    """Parses `NODESxCPUS`, such as `500x32`; ConfigError if it isn't that."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,4})", value.strip())
    if match is None or 0 in (nodes := (int(match[1]), int(match[2]))):
        raise ConfigError(f"--cluster: {value!r} isn't NODESxCPUS. Pass for example 500x32")
    if nodes[0] * nodes[1] > MOST_CPUS:
        raise ConfigError(f"--cluster: {value} has more than {MOST_CPUS:,} CPUs. Pass a smaller cluster")
    return nodes


def bytes_of(value: str) -> int:
    """Parses a size such as `100TB`; ConfigError if it isn't one."""
    try:
        size = TypeAdapter(ByteSize).validate_python(value)
    except (ValidationError, OverflowError):
        size = ByteSize(0)
    if not size:
        raise ConfigError(f"--simulate: {value!r} isn't a size. Pass for example 100TB")
    if size > MOST_BYTES:
        raise ConfigError(f"--simulate: {value} is more than {MOST_BYTES // 10**12:,} TB. Pass a smaller size")
    return size


def simulate(path: Path, settings: list[str], size: int, nodes: tuple[int, int], fraction: float, quiet: bool = False,
             faults: SimulatedFaults | None = None) -> dict[str, Any]:  # fmt: skip
    """Prepares a sample, and then simulates the whole pipeline for `size` bytes of such input on a cluster of (nodes, CPUs)."""
    _, pipeline = load(path, settings)
    if not isinstance(pipeline, TextPipeline | ImagePipeline):
        raise ConfigError(f"--simulate: {type(pipeline).__name__} doesn't support simulations. Use a text or image pipeline")
    if isinstance(pipeline, ImagePipeline) and is_made(pipeline.input):
        raise ConfigError(f"--simulate: input {pipeline.input} has fewer than 2,000 images. Use an input with files")
    if isinstance(pipeline, ImagePipeline) and pipeline.latents:
        raise ConfigError(
            "--simulate: not supported with latents, whose encoders run in actors. Simulate without them: --set latents=null"
        )
    with sampling(pipeline, quiet) as (folder, inputs):
        if size < (least := sum(file.bytes for file in inputs)):
            raise ConfigError(f"--simulate: {size:,} bytes are less than the input's {least:,}. Pass a larger size")
        return simulated(pipeline, folder, inputs, size, nodes, fraction, RayCluster(), faults)


def simulated(pipeline: TextPipeline | ImagePipeline, folder: Location, inputs: list[InputFile], size: int,
              nodes: tuple[int, int], fraction: float, cluster: Cluster,
              faults: SimulatedFaults | None = None) -> dict[str, Any]:  # fmt: skip
    """Prepares a sample on `cluster` in a temporary folder, and then simulates the whole pipeline."""
    measuring, work = MeasuringCluster(cluster), Work(folder.join("work"))
    larger = enlarged(inputs, size, sources.root(pipeline.input).name)
    work.begin(pieces.size(sum(file.bytes for file in larger)))
    predicted = pipeline.predict(folder, inputs, fraction, measuring)
    if isinstance(pipeline, ImagePipeline) and pipeline.fetch:
        measuring.profile.web = web_model(pipeline.fetch, measuring.profile, work, sum(file.bytes for file in larger))
    if pipeline._watch:
        pipeline._watch.doing = f"simulating {pipeline.name}"
    log.info("simulating %s bytes in %s on %s CPUs", f"{size:,}", plural(len(larger), "file"), f"{nodes[0] * nodes[1]:,}")
    virtual = VirtualCluster(*nodes, nodes[1] * MEMORY_EACH, measuring.profile, faults or SimulatedFaults())
    before = psutil.Process().memory_info().rss
    making = pipeline.making(pipeline.flow(Work(work.location), virtual), folder.join("simulated"))
    with _without_warnings():
        rows, _ = making.run(larger)
    memory = psutil.Process().memory_info().rss - before
    return report(virtual, larger, memory) | {"name": pipeline.name, "rows": len(rows), "sample": predicted["sample"]}


def web_model(fetch: FetchSettings, profile: Profile, work: Work, size: int) -> WebModel:
    """Measures the hosts in the sample's lists, and the bytes of its images, for lists of `size` bytes."""
    read_lists, tallies = profile.tasks["lists", 0], [task.record["tally"] for task in profile.tasks["read", 0]]
    hosts = counted(work.spill, [run[0] for task in read_lists for run in task.record["runs"]])
    images = merge(segment.load(work.spill, name) for name in tallies)[segment.READ]
    urls = hosts.urls * size / sum(task.bytes for task in read_lists)
    return WebModel(hosts, urls, fetch.per_second, fetch.threads, images["bytes"] / max(1, images["documents"]))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides the driver's warnings, because lost tasks and dropped documents are only simulated here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def enlarged(files: list[InputFile], size: int, name: str = "") -> list[InputFile]:
    """Returns about `size` bytes of files like the given ones, sorted by path: copies in SEGMENTS folders, with sizes that add up
    to `size`. `name`: the name of an input that is a single file."""
    total = sum(file.bytes for file in files)
    if not total:
        raise ConfigError("--simulate: the input's files are empty. Use an input with documents")
    copies = max(1, min(round(size / total), MOST_FILES // len(files)))
    growth = size / (total * copies)
    return [replace(file, path=f"{folder:02d}/{copy:06d}/{file.path or name}", bytes=round(file.bytes * growth))
            for folder in range(SEGMENTS) for copy in range(folder, copies, SEGMENTS) for file in files]  # fmt: skip


def report(cluster: VirtualCluster, files: list[InputFile], memory: int) -> dict[str, Any]:
    """Summarizes a simulation as JSON values."""
    cpus, seconds = cluster.node_count * cluster.cpus, sum(kind.seconds for kind in cluster.kinds)
    busiest = cluster.requests.busiest()
    return {
        "input": {"files": len(files), "bytes": sum(file.bytes for file in files)},
        "nodes": cluster.node_count,
        "cpus": cpus,
        "wall_hours": cluster.clock / HOUR_S,
        "cpu_hours": seconds / HOUR_S,
        "bound_hours": seconds / cpus / HOUR_S,
        "times_bound": cluster.clock * cpus / max(seconds, 1e-9),
        "driver": {"cpu_seconds": cluster.driver_seconds, "ray_seconds": cluster.ray_seconds, "memory_bytes": memory,
                   "busy": (cluster.driver_seconds + cluster.ray_seconds) / cluster.clock,
                   "dispatchers": len(cluster.dispatchers),
                   "dispatchers_busy": cluster.dispatched * DISPATCH_S / max(1, len(cluster.dispatchers)) / cluster.clock,
                   "seconds_per_task": (cluster.driver_seconds + cluster.ray_seconds)
                   / max(1, sum(kind.starts for kind in cluster.kinds))},
        "kinds": [_kind(kind, cpus) for kind in cluster.kinds if kind.tasks],
        "requests": {prefix: {"total": round(total), "per_second": round(busiest[prefix], 1)}
                     for prefix, total in cluster.requests.totals().items()},
        "fetching": _fetching(cluster),
        "failures": {"lost": cluster.lost, "poisoned": cluster.poisoned, "slow": cluster.stretched, "repeated": cluster.backups,
                     "recorded": sum(kind.tasks for kind in cluster.kinds)},
    }  # fmt: skip


def _fetching(cluster: VirtualCluster) -> dict[str, Any] | None:
    """Returns the facts about fetching URLs; None for a pipeline that fetches none. `limits`: share of the fetching tasks' time
    by the limit that decides a task's time. `hours`: hours after which a share of the URLs is fetched by the hosts' rates."""
    if (web := cluster.profile.web) is None:
        return None
    total = sum(cluster.limited.values())
    hours = {f"{share:.0%}": seconds / HOUR_S for share, seconds in web.hosts.seconds(web.urls, web.per_second).items()}
    return {"urls": round(web.urls), "hosts": web.hosts.hosts(web.urls), "hours": hours, "per_second": web.per_second,
            "bytes": round(web.urls * web.bytes_each), "largest_host": round(float(web.sizes.max())),
            "limits": {name: seconds / total for name, seconds in sorted(cluster.limited.items())}}  # fmt: skip


def _kind(kind: KindTimes, cpus: int) -> dict[str, Any]:
    wall = kind.end - kind.begin
    return {"kind": kind.name, "tasks": kind.tasks, "begin_hours": kind.begin / HOUR_S, "wall_hours": wall / HOUR_S,
            "cpu_hours": kind.seconds / HOUR_S, "busy": kind.seconds / cpus / max(wall, 1e-9),
            "mean_s": kind.seconds / kind.tasks, "longest_s": kind.longest}  # fmt: skip
