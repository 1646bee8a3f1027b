"""Manages jobs on a cluster through Ray's Jobs API: submits, follows, lists, stops, and resumes them.

A submission's id is the run's name. So each run has only one job. If you submit the same job again, you get the earlier
submission. When a cluster ends, the records of its Jobs API are lost. The run's folder keeps the log, the ledger, and the result;
the workspace keeps the `SubmissionRecord`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar

import yaml

from heliostat import schema
from heliostat.cluster import dashboard, source_code, workspace_package
from heliostat.cluster.endpoint import Endpoint
from heliostat.cluster.private_ray import UNTOLD
from heliostat.config import workspace
from heliostat.errors import ClusterError, ConfigError
from heliostat.redact import carries_secret
from heliostat.storage.retries import Backoff, FailedAttempts, retry
from heliostat.submit import submission
from heliostat.submit.entrypoint import ENDS
from heliostat.submit.submission import SubmissionRecord

if TYPE_CHECKING:  # this import takes a second
    from ray.job_submission import JobDetails

log = logging.getLogger(__name__)

T = TypeVar("T")
SUPERVISOR = "_ray_internal_job_actor_{}"  # Ray's name for a job's supervisor actor
JOB_FILE, SWEEP_FILE = "heliostat-job.json", "heliostat-sweep.yaml"
RAYS_LOGS = (  # loggers of Ray's client; two of these loggers set their own level
    "ray._private.runtime_env", "ray.dashboard", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk",
)  # fmt: skip
RETRY_S = 60.0
BACKOFF = Backoff(0.5, 8.0)
STOP_S = 600  # time for the last checkpoint; after that, Ray kills the driver
FOLLOW_S = 1.0
QUIET_S = 30.0  # after this time without a new line, heliostat checks whether the cluster still answers
MONITOR_S = 3.0  # Ray's monitor checks a job once per second
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
# variables without secrets; credentials come from the nodes' environment, from an instance profile, or from a Kubernetes secret
PASSED = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_S3_ENDPOINT_URL",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)


class Submitted(TypedDict):
    """Describes a submission as the cluster reports it. `started` and `ended` are seconds since the epoch."""

    id: str | None
    status: str
    message: str
    metadata: dict[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None


class Jobs:
    """Manages the jobs of one cluster."""

    def __init__(self, endpoint: Endpoint) -> None:
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, *args: Any, **options: Any) -> Any:  # Ray's own requests have no deadline
                return super()._do_request(*args, **{"timeout": 60, **options})

        self.there = endpoint
        for name in RAYS_LOGS:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self.client = Client(endpoint.url, headers=dashboard.headers(endpoint.token))
        except (RuntimeError, ConnectionError) as e:
            raise ClusterError(f"{endpoint.url}: {e}") from e

    # submitting ------------------------------------------------------------------------------------------------------

    def submit(self, record: SubmissionRecord, flags: tuple[str, ...] = ()) -> str:
        """Submits a job and returns the submission's id.

        Submitting the same job again returns the same submission. Raises ConfigError if another job has this name. Raises
        ConfigError, too, if this job failed or was stopped, unless a flag resumes the job or starts it from scratch.
        """
        queue = record.queue
        if earlier := self.find(record.id):
            status = earlier["status"]
            if status not in OVER or (status == "SUCCEEDED" and not flags):
                same = submission.standing(record, earlier["metadata"].get("digest"))
                if same is None:
                    raise ConfigError(
                        f"name: {record.id!r} is a job with other settings on this cluster ({status.lower()}). Use another name"
                    )
                log.info("job %s already exists: %s", record.id, status.lower())
                same.write()
                return record.id
            if not flags:
                raise ConfigError(
                    f"name: job {record.id!r} has already {status.lower()}. Continue with `heliostat job resume "
                    f"{record.id}`, or start from scratch with --overwrite"
                )
            self._forget(record.id)
        record.write()
        attempt = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        metadata = {"run": record.run_folder, "steps": str(record.steps), "digest": record.digest, "attempt": attempt}
        metadata |= {"queue": queue} if queue else {}
        metadata |= {"kind": "sweep"} if record.sweep else {}
        command = ["python", "-m", "heliostat.submit.entrypoint", JOB_FILE, "--attempt", attempt]
        command += ["--sweep", SWEEP_FILE] if record.sweep else []
        command += (["--queue", queue] if queue else []) + [f"--flag={flag}" for flag in flags]
        with tempfile.TemporaryDirectory(prefix="heliostat-submit-") as name:
            work, modules = Path(name) / "work", Path(name) / "modules"
            workspace_package.stage(workspace.root(), work)
            (work / JOB_FILE).write_text(json.dumps(record.job))
            if record.sweep:
                (work / SWEEP_FILE).write_text(yaml.safe_dump({**record.sweep, "job": JOB_FILE}))
            (work / workspace_package.CODE_FILE).write_text(source_code.source().dump())
            environment = {k: os.environ[k] for k in PASSED if k in os.environ}
            if secret := [k for k, v in environment.items() if carries_secret(v)]:
                raise ConfigError(
                    f"{secret[0]}: contains a password, which the cluster would show. Unset this "
                    "variable here, and set it on the nodes"
                )
            environment["HELIOSTAT_CLUSTER"] = record.cluster or self.there.url
            environment[source_code.USER] = source_code.user()
            runtime = {
                "working_dir": str(work),
                "py_modules": [str(workspace_package.stage_package(modules))],
                "env_vars": {**UNTOLD, **environment, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), "PYTHONUNBUFFERED": "1"},
            }

            def send() -> None:
                sent = self.find(record.id)  # the cluster may have the submission: perhaps only the cluster's answer was lost
                if not (sent and sent["metadata"].get("attempt") == attempt):
                    self.client.submit_job(
                        entrypoint=shlex.join(command), submission_id=record.id, runtime_env=runtime, metadata=metadata
                    )

            self._retry(send, "submitting")
        return record.id

    def _forget(self, job_id: str) -> None:
        """Deletes a finished submission, so that its id is free. First waits until the submission's supervisor has ended. Raises
        ClusterError if this takes more than 60 s.

        A moment after a job's end, Ray's monitor looks up the job's supervisor by id. If a new submission had this id, the
        monitor would mistake it for the old submission, and mark it as failed.
        """
        deadline = time.monotonic() + RETRY_S
        while dashboard.actor_alive(self.there.url, self.there.token, SUPERVISOR.format(job_id)):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{job_id}: has ended, but the job's supervisor didn't end within {RETRY_S:.0f} s. Try again later"
                )
            time.sleep(FOLLOW_S)
        time.sleep(MONITOR_S)
        self._retry(lambda: self.client.delete_job(job_id), "deleting the earlier submission")

    def _retry(self, action: Callable[[], T], what: str) -> T:
        """Runs an action. While the cluster fails, retries the action for RETRY_S seconds.

        Raises ClusterError after RETRY_S seconds, or at once if the cluster rejects the request.
        """
        import requests

        passing = (requests.RequestException, ConnectionError, RuntimeError, TimeoutError)

        def judge(error: Exception) -> None:
            if not isinstance(error, passing):
                raise error
            text = _line(error)
            if isinstance(error, RuntimeError) and not any(f"code {c}" in text for c in (500, 502, 503, 504, 429)):
                raise ClusterError(f"{what}: {text[:500]}") from error

        def give_up(failure: FailedAttempts) -> NoReturn:
            raise ClusterError(f"{what}: {_line(failure.error)[:500]}") from failure.error

        def tell(failure: FailedAttempts, wait: float) -> None:
            log.warning("%s: %s; retrying in %.1f s", what, _line(failure.error)[:200], wait)

        return retry(action, RETRY_S, BACKOFF, judge, give_up, tell)

    # looking ---------------------------------------------------------------------------------------------------------

    def list(self) -> list[Submitted]:
        """Lists every submission, newest first."""
        raw = self._retry(self.client.list_jobs, "listing jobs")
        ours = [_plain(j) for j in raw if j.submission_id and ENDS not in (j.metadata or {})]
        return sorted(ours, key=lambda j: j["started"] or 0, reverse=True)

    def find(self, job_id: str) -> Submitted | None:
        """Returns the submission with this id; None if there is no such submission."""
        return next((j for j in self.list() if j["id"] == job_id), None)

    def get(self, job_id: str) -> Submitted:
        """Returns the submission with this id; raises ConfigError if there is no such submission, or if the job wasn't submitted
        with heliostat."""
        job = self.find(job_id)
        if job is None:
            near = schema.nearest(job_id, [str(j["id"]) for j in self.list()])
            raise ConfigError(f"{job_id}: no such job on {self.there.url}{near}")
        if "run" not in job["metadata"]:
            raise ConfigError(f"{job_id}: wasn't submitted with heliostat. Use `ray job`")
        return job

    def follow(self, job_id: str) -> Iterator[str]:
        """Yields new text of the job's log until the job ends. Leaves out the logs of earlier submissions with the same id."""
        attempt = self.get(job_id)["metadata"]["attempt"]
        before: str | None = ""  # the text before the submission's part of the log; None after that part has begun
        for text in self._tail(job_id):
            if before is None:
                yield text
                continue
            before += text
            if (at := _beginning(before, attempt, over=False)) is not None:
                yield before[at:]
                before = None
        if before and (at := _beginning(before, attempt, over=True)) is not None:
            yield before[at:]
        job = self.get(job_id)
        if job["status"] == "FAILED" and job["exit_code"] is None:  # the submission ended before its entrypoint started
            yield job["message"] + "\n"

    def _tail(self, job_id: str) -> Iterator[str]:
        """Yields new text of the log until the job ends. After a broken connection, continues without repeating text."""
        import aiohttp

        came, deadline = 0, time.monotonic() + RETRY_S
        while True:
            skip = came
            try:
                for text in _sync(self.client.tail_job_logs(job_id), lambda: self.get(job_id)):
                    new, skip = text[skip:], max(0, skip - len(text))
                    came, deadline = came + len(new), time.monotonic() + RETRY_S
                    if new:
                        yield new
                if self.get(job_id)["status"] in OVER:
                    return
            except (OSError, RuntimeError, aiohttp.ClientError) as e:
                text = " ".join(str(e).split())[:200]
                if time.monotonic() > deadline:
                    raise ClusterError(f"following the log: {text}") from e
                log.warning("following the log: %s. Trying again", text)
            time.sleep(FOLLOW_S)

    def logs(self, job_id: str) -> str:
        """Returns the complete log of a job, including the logs of earlier submissions that had the same id."""
        return self._retry(lambda: self.client.get_job_logs(job_id), "reading the log")

    # stopping --------------------------------------------------------------------------------------------------------

    def stop(self, job_id: str, now: bool = False) -> Submitted:
        """Stops a job, waits until the job has ended, and returns the ended job. The job saves a checkpoint first, unless `now`
        is set.

        Raises ClusterError if the job doesn't end within 630 s.
        """
        job = self.get(job_id)
        if job["status"] in OVER:
            return job
        note = self._note_to_end(job["metadata"]["attempt"]) if now else None
        self._retry(lambda: self.client.stop_job(job_id), "stopping")
        deadline = time.monotonic() + STOP_S + 30
        while (job := self.get(job_id))["status"] not in OVER:
            if time.monotonic() > deadline:
                raise ClusterError(f"{job_id}: didn't stop within {STOP_S + 30} s. Try again with --now")
            time.sleep(FOLLOW_S)
        if note:
            self._retry(lambda: self.client.delete_job(note), "deleting the stop request")
        return job

    def _note_to_end(self, attempt: str) -> str:
        """Submits a marker job, which does nothing, and returns the marker's id. When the attempt's entrypoint finds the marker's
        metadata, the entrypoint ends.

        This works even if the storage doesn't answer, because the marker needs only the cluster.
        """
        note = f"stop-{attempt}-{uuid.uuid4().hex[:6]}"
        self._retry(
            lambda: self.client.submit_job(entrypoint="true", submission_id=note, metadata={ENDS: attempt}),
            "asking the driver to stop",
        )
        return note


def _sync(source: AsyncIterator[T], beat: Callable[[], object]) -> Iterator[T]:
    """Yields an asynchronous iterator's items. While no item arrives, calls `beat` every 30 s; `beat` may raise an error."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        while True:
            coming: asyncio.Task[T] = loop.create_task(anext(source))  # type: ignore[arg-type]
            while not runner.run(asyncio.wait([coming], timeout=QUIET_S))[0]:
                beat()
            try:
                yield coming.result()
            except StopAsyncIteration:
                return


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _beginning(text: str, attempt: str, over: bool) -> int | None:
    """Returns the position where a submission's part of the log begins: after the line that names the attempt. None if that
    line is missing.

    `over`: whether the submission has ended. If a submission has ended and the line is missing, the submission's entrypoint never
    ran. The position is then 0.
    """
    _, separator, after = text.rpartition(attempt)
    if separator and "\n" in after:
        return len(text) - len(after) + after.index("\n") + 1
    return 0 if over else None


def _plain(details: JobDetails) -> Submitted:
    return {
        "id": details.submission_id,
        "status": str(details.status),
        "message": details.message or "",
        "metadata": details.metadata or {},
        "started": details.start_time / 1000 if details.start_time else None,
        "ended": details.end_time / 1000 if details.end_time else None,
        "exit_code": details.driver_exit_code,
    }


def exit_code(job: Submitted) -> int:
    """Returns the exit code for a command that followed a job: 0 if the job succeeded, 130 if the job was stopped, 2 for invalid
    input, else 1."""
    if job["status"] == "STOPPED":
        return 130
    return 0 if job["status"] == "SUCCEEDED" else 2 if job["exit_code"] == 2 else 1
