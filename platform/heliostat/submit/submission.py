"""Describes a submission: the job that a workspace sends to a cluster. Its record is in `.heliostat/jobs/ID.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from heliostat import schema
from heliostat.cluster.endpoint import Endpoint
from heliostat.config import pretrained, spec, workspace
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.storage.records import Format, closed
from heliostat.validation import check


@closed
@dataclass(frozen=True)
class SubmissionRecord:
    """Holds this workspace's record of a submission.

    `cluster`: the cluster's name as the user wrote it. `job`: the complete job, resolved. `sweep`: the complete sweep; None for a
    single job. For a sweep, `job` is the sweep's base job, `id` is the sweep's name, and `steps` is the number of trials.
    """

    id: str
    cluster: str | None
    run_folder: str
    steps: int
    job: dict[str, object]
    queue: str | None
    sweep: dict[str, object] | None = None

    @classmethod
    def of(cls, job: Job, cluster: str | None, queue: str | None) -> SubmissionRecord:
        return cls(job.name, cluster, str(job.run_folder), job.last_step, job.dump(), queue)

    @property
    def digest(self) -> str:
        """Returns 16 hex digits that identify the job, or the job and the sweep."""
        whole = json.dumps([self.job, self.sweep] if self.sweep else self.job, sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    @staticmethod
    def place(job_id: str) -> Path:
        return workspace.root() / ".heliostat" / "jobs" / f"{workspace.check_name('id', job_id)}.json"

    @staticmethod
    def read(job_id: str) -> SubmissionRecord | None:
        """Reads this workspace's record of a submission; None if there is no record. Raises ConfigError if the record is
        damaged."""
        try:
            return SUBMITTED.read(SubmissionRecord.place(job_id))
        except FileNotFoundError:
            return None

    def write(self) -> None:
        place = SubmissionRecord.place(self.id)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(asdict(self), indent=2))


SUBMITTED = Format(SubmissionRecord, "record of a submission", ConfigError, fix="Delete this file, and pass --cluster")


def standing(record: SubmissionRecord, digest: str | None) -> SubmissionRecord | None:
    """Returns the record of the earlier submission with this id and digest, if that record has the same job as `record`. Else
    returns None.

    An older version of heliostat, whose jobs had fewer keys, computed a different digest for the same job. So this function reads
    the workspace's earlier record with today's keys, and compares the jobs again.
    """
    if digest == record.digest:
        return record
    earlier = SubmissionRecord.read(record.id)
    if earlier is None or earlier.digest != digest:
        return None
    try:
        today = replace(earlier, job=spec.resolve(schema.validate(Job, earlier.job, earlier.id)).dump())
    except ConfigError:
        return None
    return replace(earlier, cluster=record.cluster) if today.digest == record.digest else None


def load(path: Path, settings: list[str], endpoint: Endpoint, resume: bool = False) -> Job:
    """Loads a job for a cluster. With `resume`, `train.epochs` counts epochs of the dataset versions that the run already uses,
    not of newer versions.

    Raises ConfigError if the cluster is on other machines and the job has paths of this workspace.
    """
    raw, devices = spec.read(path, settings), check.devices_of(endpoint.file)
    samples = partial(check.training_samples, resume=resume)
    if not endpoint.here:
        written = schema.validate(Job, spec.complete(raw, str(path), samples, devices)[0], str(path))
        paths = {f"data.sources.{i}.path": s.path for i, s in enumerate(written.data.sources)} | {"storage": written.storage}
        if isinstance(parent := written.model.get("pretrained"), str) and pretrained.is_folder(parent):
            paths["model.pretrained"] = parent
        uri = written.mlflow.uri
        if uri.startswith("sqlite:"):
            raise ConfigError(
                f"mlflow.uri: {uri} is a file on one machine, and a cluster needs a server. Set it to http://HOST:PORT"
            )
        for key, value in paths.items():
            if "://" not in value and not Path(value).is_absolute():
                raise ConfigError(
                    f"{key}: {value!r} is a path of this workspace, which the cluster can't read. Use s3://BUCKET/PREFIX"
                )
    return spec.make(raw, str(path), samples, devices)


def changed(record: SubmissionRecord, settings: list[str], cluster: str | None) -> SubmissionRecord:
    """Returns a copy of an earlier submission's record, for this cluster and with changed settings. Raises ConfigError if the
    record is of a sweep and settings are changed."""
    if record.sweep:
        if settings:
            raise ConfigError(
                f"{record.id}: is a sweep. Change the sweep's file, and use `heliostat sweep run SWEEP.yaml --cluster --resume`"
            )
        return replace(record, cluster=cluster)
    return SubmissionRecord.of(
        check.make_job(spec.apply(schema.renamed(Job, record.job), settings), record.id, resume=True), cluster, record.queue
    )
