"""Loads job files: fills in defaults that depend on the machine, a cluster file, or the datasets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.checkpoint import layout
from heliostat.config import spec
from heliostat.config.defaults import Devices, here
from heliostat.config.spec import Job
from heliostat.data import collection, manifest
from heliostat.data.dataset import make_order, plan
from heliostat.data.manifest import Manifest
from heliostat.errors import DataError, StorageError
from heliostat.storage.locations import Location

if TYPE_CHECKING:
    from heliostat.cluster.cluster_file import ClusterFile


def load_job(
    path: Path, settings: list[str] | None = None, cluster: Path | ClusterFile | None = None, resume: bool = False
) -> Job:
    """Reads a job file, with `key.path=value` settings applied. The ConfigError lists every wrong key.

    `cluster`: the file of the cluster that will run the job, by default this machine. The cluster determines the value of
    `workers.gpus: auto`. `resume`: whether `train.epochs` counts the samples of those dataset versions on which the run already
    trains.
    """
    return make_job(spec.read(path, settings), str(path), cluster, resume)


def make_job(raw: dict[str, Any], where: str, cluster: Path | ClusterFile | None = None, resume: bool = False) -> Job:
    """Makes a job from the content of a job file, with defaults filled in. Reads the datasets if the job has `train.epochs`."""
    return spec.make(raw, where, partial(training_samples, resume=resume), devices_of(cluster))


def devices_of(cluster: Path | ClusterFile | None) -> spec.FindDevices:
    """Returns a function that finds the workers' GPUs, on the cluster in a file or on this machine."""

    def there() -> Devices:
        from heliostat.cluster import cluster_file

        file = cluster_file.read(cluster) if isinstance(cluster, Path) else cluster
        assert file
        has = any(pool.gpus for pool in file.pools if pool.most)
        return Devices(int(has), f"auto: {file.path} has {'' if has else 'no '}GPUs")

    return there if cluster else here


def training_samples(job: Job, resume: bool = False) -> int:
    """Counts the training samples of a job's datasets, without the samples that are held out for evaluation.

    `resume`: whether to count the samples of those dataset versions that the run's newest checkpoint records.
    """
    newest = layout.latest(job.run_folder) if resume else None
    recorded = newest.plan if newest else None
    digests = dict(zip(recorded.uris, recorded.digests, strict=True)) if recorded else {}
    job = collection.expand(job, recorded)
    manifests = [read_manifest(i, location, digests.get(str(location))) for i, location in enumerate(job.sources)]
    return int(make_order(plan(job, manifests, recorded), manifests).epoch_samples.sum())


@contextmanager
def named(key: str) -> Iterator[None]:
    """Puts the job's key at the start of errors about the folder that the key names, within the context."""
    try:
        yield
    except (DataError, StorageError) as e:
        raise type(e)(f"{key}: {e}") from e


def read_manifest(number: int, location: Location, digest: str | None) -> Manifest:
    """Reads the manifest of a job's source. `number`: the number of the source. `digest`: the version to read, if this version
    still exists."""
    with named(f"data.sources.{number}.path"):
        return manifest.share(partial(_version, location, digest))


def _version(location: Location, digest: str | None) -> Manifest:
    """Reads the version of a dataset with this digest. If this version no longer exists, reads the newest version."""
    try:
        return manifest.read(location, digest)
    except DataError:
        if digest is None:
            raise
        return manifest.read(location)
