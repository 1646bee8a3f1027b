"""Caches the counts of models (`counts`) in the workspace, so that planning a job again doesn't need torch.

The cache key covers everything that determines a count: the relevant keys of the job, the digests of its datasets, this package's
code, the versions of the libraries, and the machine. If a job has inputs that the key doesn't cover, such as a custom recipe or a
pretrained folder, its model is counted each time. The cache's folder is `.heliostat/cache`, unless HELIOSTAT_CACHE names another
folder. You can delete the folder at any time. An empty HELIOSTAT_CACHE turns the cache off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from heliostat.config import workspace
from heliostat.config.spec import Job
from heliostat.errors import DataError, StorageError
from heliostat.plan.counts import Counts
from heliostat.recipes.protocol import Recipe
from heliostat.storage.locations import Location
from heliostat.storage.records import Format
from heliostat.validation import check

log = logging.getLogger(__name__)

PLACE = "HELIOSTAT_CACHE"
KEPT = 64  # maximum number of counts in the cache (the newest)
LIBRARIES = ("torch", "transformers", "diffusers")
APART = ("name", "storage", "mlflow", "checkpoint", "retries", "evaluate")  # keys of a job that don't affect the counts
APART_TRAIN = ("zero", "steps", "steps_from", "seed", "schedule", "global_batch_size", "grad_clip", "loss_spikes", "sdc_check")
COUNTS = Format(Counts, "count of a model")


def get(job: Job, recipe: Recipe, count: Callable[[], Counts]) -> Counts:
    """Returns the cached counts of a job's model. If the cache has no counts of this model, counts the model, and caches the
    result."""
    folder, name = os.environ.get(PLACE, str(workspace.root() / ".heliostat" / "cache")), key(job, recipe)
    if not folder or name is None:
        return count()
    place = Path(folder, "counts", f"{name}.json")
    try:
        return COUNTS.read(place)
    except FileNotFoundError:
        pass
    except (DataError, OSError) as e:
        log.warning("the cached count of the model is damaged, so heliostat counts the model again: %s", e)
    counts = count()
    try:
        Location(str(place)).write(json.dumps(asdict(counts), default=sorted).encode())
        for old in sorted(place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except (StorageError, OSError) as e:
        log.info("can't cache the model's parameter and activation counts: %s", e)
    return counts


def key(job: Job, recipe: Recipe) -> str | None:
    """Computes the cache key of a job's model, 32 hex digits. Returns None if the counts depend on inputs that the key doesn't
    cover."""
    module = job.recipe.partition(":")[0]
    if workspace.BUILT_IN.get(module, module) != "heliostat.recipes" or any(map(_is_path, _leaves(job.model))):
        return None
    keys = {k: v for k, v in job.dump().items() if k not in APART}
    keys["train"] = {k: v for k, v in keys["train"].items() if k not in APART_TRAIN}
    shared = keys["train"]["parallel"]["sequence"] > 1
    keys["train"]["parallel"] = keys["train"]["parallel"]["tensor"]  # the only kind of parallelism that changes a worker's model
    keys["train"]["optimizer"] = {k: v for k, v in keys["train"]["optimizer"].items() if k != "lr"}
    keys["data"] = {k: v for k, v in keys["data"].items() if k in ("sequence_length", "document_mask")}
    keys["data"]["document_mask"] &= not shared  # in this case, `model_stats` counts no mask of all pairs
    bound = [source.digest for source in getattr(recipe, "sources", [])]
    machine = [platform.machine(), platform.python_version(), sorted(check.cpu_flags())]
    whole = json.dumps([keys, bound, machine, _code()], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, list) else [value]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and ("/" in value or Path(value).exists())


@cache
def _code() -> list[str]:
    """Identifies the code that counts models. Returns the digest of this package's files, and the versions of the libraries that
    this code calls."""
    return [package_digest(Path(__file__).parents[1]), *map(_version, LIBRARIES)]


def package_digest(package: Path) -> str:
    """Computes the digest of a package's files and their names: 64 hex digits. The digest doesn't depend on the package's
    location."""
    files = sorted(p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
