"""Checks a job for every error that can be found before anything expensive starts. The checks take less than 5 seconds, and don't
use Ray.

    checked = check(load_job(Path("jobs/quickstart.yaml"), ["train.steps=100"]))

There are three checks. `load_job` checks the file, and the rules between keys. `check_setup` checks the recipe, the model, the
machine, and the stores. `check_data` checks the datasets, and the order of their samples. Each function raises one error, which
lists all faults that the function can find. A fault is one line with the key, the value, and the fix.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat import extras, schema
from heliostat.cluster.capacity import require_gpus
from heliostat.config import deepspeed_keys, pretrained, spec
from heliostat.config.defaults import Default
from heliostat.config.fields import LARGEST
from heliostat.config.sections import Benchmarks
from heliostat.config.spec import Job
from heliostat.data import collection, conversations
from heliostat.data.dataset import DataPlan, make_order, plan
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order
from heliostat.errors import ConfigError, HeliostatError, TrackingError
from heliostat.recipes.auditing import Audits, MaskAudit
from heliostat.recipes.conformance import is_language_model, require_abilities
from heliostat.recipes.loading import make, recipe_class
from heliostat.recipes.protocol import Recipe
from heliostat.storage.local_files import require_database
from heliostat.storage.locations import Location
from heliostat.storage.waiting import wait_for_store
from heliostat.text import brief
from heliostat.validation.faults import Faults
from heliostat.validation.loading import devices_of as devices_of
from heliostat.validation.loading import load_job as load_job
from heliostat.validation.loading import make_job as make_job
from heliostat.validation.loading import named, read_manifest
from heliostat.validation.loading import training_samples as training_samples

if TYPE_CHECKING:
    from heliostat.cluster.cluster_file import ClusterFile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    job: Job
    recipe: Recipe
    manifests: list[Manifest]
    plan: DataPlan
    order: Order
    audit: MaskAudit | None = None

    @property
    def sample_tokens(self) -> float:
        """Returns the mean tokens of a sample. 0 if samples have no tokens."""
        return conversations.sample_tokens(self.manifests, self.plan)


def check_path(
    path: Path,
    settings: list[str] | None = None,
    cluster: Path | None = None,
    offline: bool = False,
    settle: Callable[[Job], Job] = lambda job: job,
) -> tuple[Job, Checked | None, list[Default]]:
    """Checks a complete job file in one round: the keys, the rules between keys, the model, the machine, the stores, the
    datasets.

    Returns the job, the result of `check`, and the defaults that were filled in. With `offline`, checks only the file and the
    model, and the result is None. `settle`: resolves `train.parallel: auto`. The error lists every fault that can be found
    although other faults exist.
    """
    raw, faults, checked = spec.read(path, settings), Faults(), None
    draft = spec.draft(raw, devices_of(cluster))
    job, filled = draft.job, draft.filled
    if not draft.faults:
        with faults.part():
            whole, filled = spec.complete(raw, str(path), training_samples, devices_of(cluster))
            job = spec.resolve(schema.validate(Job, whole, str(path)))
    if job:
        with faults.part():
            if offline:
                check_job(job)
            else:
                checked = check(settle(job), cluster)
    known = {line.partition(":")[0] for line in draft.faults}
    if draft.faults and job and job.train.steps == LARGEST:  # a placeholder, because the file has train.epochs, or no length
        known.add("train.steps")
    lines = [*draft.faults, *(line for line in faults.lines if line.partition(":")[0] not in known)]
    if draft.faults or len(lines) > 1:
        raise ConfigError(schema.listed(str(path), list(dict.fromkeys(lines))))
    if faults:
        raise faults.error
    assert job
    return job, checked, filled


def check(job: Job, cluster: Path | None = None) -> Checked:
    """Checks a complete job before its first training. `cluster`: the file of the cluster that will run the job."""
    faults = Faults()
    job, recipe = _check_job(job, faults)
    _check_place(job, cluster, False, faults)
    if recipe is None or faults:
        with faults.part():
            _reach_sources(job, None)
            _manifests(job, recipe, None, None)
        raise faults.error
    return check_data(job, recipe)


def check_setup(job: Job, resume: bool) -> tuple[Job, Recipe]:
    """Checks everything that doesn't depend on the run's progress: the recipe, the model, the machine, and the stores."""
    faults = Faults()
    job, recipe = _check_job(job, faults)
    _check_place(job, None, resume, faults)
    if recipe is None or faults:
        raise faults.error
    return job, recipe


def check_file(path: Path, settings: list[str] | None = None, cluster: Path | ClusterFile | None = None) -> tuple[Job, Recipe]:
    """Loads a job, and checks everything that needs no dataset, store, or machine."""
    return check_job(load_job(path, settings, cluster))


def check_job(job: Job) -> tuple[Job, Recipe]:
    """Checks everything that needs no dataset, store, or machine. Returns the job, with a precision that this machine's CPU
    supports, and the job's recipe."""
    faults = Faults()
    job, recipe = _check_job(job, faults)
    if recipe is None or faults:
        raise faults.error
    return job, recipe


def _check_job(job: Job, faults: Faults) -> tuple[Job, Recipe | None]:
    with faults.part():
        if lines := deepspeed_keys.faults(job):  # not in `spec`, because recorded jobs must stay readable
            raise ConfigError("\n  ".join(lines))
    with faults.part():
        if job.train.compile and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise ConfigError(
                f"train.compile: {str(job.train.compile).lower()} needs a C++ compiler, but this machine has none. "
                "Install g++, or set train.compile to false"
            )
    job, recipe = computable(job, cpu_flags()), None
    with faults.part():
        job = pretrained.pinned(job)
        recipe = make(recipe_class(job), job)
        for line in pretrained.described(job):
            log.info("%s", line)
    if recipe is None:
        return job, None
    with faults.part():
        require_abilities(job, recipe)
    with faults.part():
        if job.evaluate and job.evaluate.benchmarks:
            _check_benchmarks(job.evaluate.benchmarks, recipe)
    if not faults:  # this check builds the model, which may fail because of other faults
        with faults.part():
            recipe.probe()
    return job, recipe


def _check_place(job: Job, cluster: Path | None, resume: bool, faults: Faults) -> None:
    with faults.part():
        check_devices(job, cluster)
    with faults.part():
        check_services(job, resume)


def _check_benchmarks(benchmarks: Benchmarks, recipe: Recipe) -> None:
    """Raises ConfigError if the job's checkpoints can't be scored on tasks. The suite itself is checked when heliostat reads
    it."""
    if not is_language_model(recipe):
        raise ConfigError(
            "evaluate.benchmarks: benchmark tasks need a language model, but this recipe trains another kind of model. "
            "Remove evaluate.benchmarks"
        )
    if not Path(benchmarks.suite).is_file():
        raise ConfigError(
            f"evaluate.benchmarks.suite: {benchmarks.suite}: no such file. Make a suite file: heliostat model make-suite"
        )
    extras.require("benchmark", "lm_eval", what="evaluate.benchmarks")


def computable(job: Job, flags: set[str]) -> Job:
    """Changes a job's precision from bf16 to fp32 if workers use a CPU whose `flags` have no bf16 instructions. On such a CPU,
    bf16 takes 60 times as long."""
    if job.train.precision != "bf16" or job.workers.gpus or not flags or flags & {"avx512bw", "amx_bf16", "bf16"}:
        return job
    log.warning("train.precision: this CPU has no bf16 instructions, so heliostat computes in fp32, which is much faster here")
    return job.model_copy(update={"train": job.train.model_copy(update={"precision": "fp32"})})


def cpu_flags() -> set[str]:
    """Reads the names of the CPU's instruction sets, as Linux lists them. Returns an empty set if they can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def check_stores(job: Job, recipe: Recipe, recorded: DataPlan | None = None, resume: bool = False) -> Checked:
    """Checks the stores, then the datasets."""
    check_services(job, resume)
    return check_data(job, recipe, recorded)


def check_data(job: Job, recipe: Recipe, recorded: DataPlan | None = None, change_at: int | None = None) -> Checked:
    """Checks the datasets, and plans the order of their samples. A resumed run keeps the dataset versions with which it started.
    `change_at`: the step from which the run's data may differ from `recorded`."""
    _reach_sources(job, recorded)
    as_given, job = job, collection.expand(job, recorded if change_at is None else None)
    if job is not as_given:
        recipe = make(type(recipe), job)
    manifests = _manifests(job, recipe, recorded, change_at)
    recipe.bind(manifests)
    audit = recipe.audit() if isinstance(recipe, Audits) else None
    return Checked(job, recipe, manifests, *_ordered(job, manifests, recorded, change_at), audit)


def _reach_sources(job: Job, recorded: DataPlan | None) -> None:
    """Checks that the stores of all datasets answer."""
    faults = Faults()
    for i, location in enumerate(job.sources):
        with faults.part(), named(f"data.sources.{i}.path"):
            wait_for_store(location) if recorded else location.probe()
    if faults:
        raise faults.error


def _manifests(job: Job, recipe: Recipe | None, recorded: DataPlan | None, change_at: int | None) -> list[Manifest]:
    """Reads the manifests of the datasets' recorded versions. With a recipe, checks too that the datasets are of the recipe's
    kind."""
    faults, manifests = Faults(), list[Manifest]()
    versions = dict(zip(recorded.uris, recorded.digests, strict=True)) if recorded and change_at is None else {}
    for i, location in enumerate(job.sources):
        with faults.part():
            shared = read_manifest(i, location, versions.get(str(location)))
            if recipe and shared.kind not in (recipe.kind, collection.KIND):
                dataset = f"a dataset of {recipe.pipeline}" if recipe.pipeline else "another dataset"
                raise ConfigError(
                    f"data.sources.{i}.path: expected a dataset of {recipe.kind!r}, which {job.recipe} trains on, "
                    f"got {shared.kind!r} ({location}). Use {dataset}, or another recipe"
                )
            manifests.append(shared)
    if faults:
        raise faults.error
    return manifests


def check_devices(job: Job, cluster: Path | None) -> None:
    """Checks that the workers fit on the cluster in a file. Without a file, checks that this machine has the GPUs that the
    workers need. Raises ConfigError if a check fails."""
    if cluster is not None:
        from heliostat.cluster import cluster_file
        from heliostat.cluster.capacity import check_pools

        check_pools(job, cluster_file.read(cluster))
    elif job.workers.gpus and not os.environ.get("RAY_ADDRESS"):
        require_gpus(job.workers.least * job.workers.gpus)
        _check_kernels(job)


def _check_kernels(job: Job) -> None:
    """Raises a HeliostatError if this machine doesn't support the job's kernels."""
    from heliostat.recipes.text import attention, float8

    if job.train.attention:
        attention.require_installed(job.train.attention)
    if job.train.fp8:
        float8.require_device()


def check_services(job: Job, resume: bool = False) -> None:
    """Checks that the run's store answers and can be written to, and that MLflow answers.

    A resuming run waits for an unreachable store. An unreachable MLflow doesn't stop a resuming run: the run trains, and keeps
    its metrics until MLflow answers.
    """
    faults = Faults()
    with faults.part(), named("storage"):
        storage = Location(job.storage)
        wait_for_store(storage) if resume else storage.probe()
        storage.require_writable()
    with faults.part():
        try:
            _check_mlflow(job.mlflow.uri)
        except TrackingError as e:
            if not resume:
                raise
            log.warning("%s. The run resumes without MLflow, and keeps its metrics until MLflow answers", e)
    if faults:
        raise faults.error


def _ordered(job: Job, manifests: list[Manifest], recorded: DataPlan | None, change_at: int | None) -> tuple[DataPlan, Order]:
    data_plan = plan(job, manifests, recorded, change_at)
    order = make_order(data_plan, manifests)
    if order.runs_out is not None and order.runs_out < order.data_step(job.last_step - 1) + 1:
        raise ConfigError(
            f"train.steps: the data lasts for {order.runs_out} steps with max_epochs, but {job.train.steps} are set. Raise a "
            "source's max_epochs, or lower train.steps"
        )
    if job.evaluate:
        for line in held_out_faults(job, order, manifests):
            log.warning("%s", line)
    return data_plan, order


def held_out_faults(job: Job, order: Order, manifests: list[Manifest]) -> list[str]:
    """Lists the differences between the held-out samples and the job's settings, one line each. Raises ConfigError if no sample
    is held out."""
    assert job.evaluate
    wanted, fraction, lines = job.evaluate.samples, job.evaluate.fraction, []
    held_rows, total = ([int(getattr(s, name).sum()) for s in order.splits] for name in ("held", "samples"))
    has_places = [m.kind == "rows" or bool((m.places >= 0).all()) for m in manifests]
    if not sum(held_rows):
        fix = "Raise evaluate.fraction"
        if not all(has_places):
            number = has_places.index(False)
            fix = (
                f"data.sources.{number} has no document boundaries, so only whole row groups can be held out "
                f"({len(order.splits[number].held):,}). "
                f"Prepare the dataset again (`heliostat data prepare --force`), or raise evaluate.fraction"
            )
        raise ConfigError(f"evaluate.fraction: {fraction:g} holds out none of {sum(total):,} samples. {fix}")
    if (count := len(order.held_out(wanted))) < min(wanted, sum(order.held_shares(wanted))):
        lines.append(
            f"evaluate.samples: only {count:,} held-out samples can be scored, not {wanted:,}. evaluate.fraction "
            f"{fraction:g} holds out {sum(held_rows):,} of {sum(total):,} samples. Raise evaluate.fraction, or set "
            f"evaluate.samples to {count}"
        )
    for i, (mine, of, known) in enumerate(zip(held_rows, total, has_places, strict=True)):
        if not fraction / 2 <= mine / of <= 2 * fraction:
            why = (
                "heliostat holds out whole documents and images, and rounds down fractions that aren't exact, unlike 0.01, 0.02, "
                "and 0.05 (docs/data-order.md#exact-fractions)"
                if known
                else "the dataset has no document boundaries, so heliostat holds out whole row groups"
            )
            lines.append(f"evaluate.fraction: {mine / of:.2g} of data.sources.{i} is held out, not {fraction:g}: {why}")
    return lines


def _check_mlflow(uri: str) -> None:
    if uri.startswith("postgresql+psycopg:"):
        extras.require("server", "psycopg", what="mlflow.uri: PostgreSQL")
    if uri.startswith("sqlite:///"):
        place = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        parent = place.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(
                f"mlflow.uri: {uri}: can't create the folder {parent} ({e.strerror}). Use a folder that you can write to"
            ) from e
        require_database("mlflow.uri", place)
    elif uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3).close()
        except urllib.error.HTTPError as e:
            with e:
                said = brief(" ".join(re.sub("<[^>]*>", " ", e.read(4096).decode(errors="replace")).split()))
            kind = TrackingError if e.code >= 500 else HeliostatError
            raise kind(
                f"mlflow.uri: {uri} answers with an error: {e.code} {e.reason}{f' ({said})' if said else ''}. Check the server"
            ) from e
        except (urllib.error.URLError, TimeoutError, OSError) as e:
            raise TrackingError(
                f"mlflow.uri: {uri} doesn't answer ({getattr(e, 'reason', e)}). Start the server: mlflow server"
            ) from e
