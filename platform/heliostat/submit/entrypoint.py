"""Runs a submitted job on the cluster's head: `heliostat train`, or `tune`, as a child process, with its log kept in storage.

    python -m heliostat.submit.entrypoint JOB.yaml [--attempt ID] [--sweep SWEEP.yaml] [--queue NAME] [--flag=--resume]

A child that is killed, or dies without recording an outcome, is started again, and continues from the newest checkpoint, as often
as the job's `retries` allow (`restarts`); after that the run's MLflow status is FAILED, with the reason. A store that is away is
waited for; MLflow is not needed to resume.

The log goes to standard output, which the Jobs API shows, and to `logs/` in the run's folder (`logs`), which outlives the
cluster. `heliostat stop` makes Ray send SIGTERM to this process and to the training driver alike; this process waits for the
driver, which saves a checkpoint. It does not wait if the Jobs API lists a marker job that tells this attempt to end now (`stop
--now`): storage may be what does not answer.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TypedDict

import psutil
import yaml

from heliostat import schema
from heliostat.cluster import dashboard as http
from heliostat.cluster import ray_internals
from heliostat.config import workspace
from heliostat.config.spec import Retries
from heliostat.errors import ConfigError, HeliostatError, StoppedError
from heliostat.redact import Formatter, excepthook
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.submit.logs import LogCopy
from heliostat.submit.restarts import Again

log = logging.getLogger("heliostat")

UPLOAD_S, POLL_S, QUEUE_S = 20.0, 1.0, 2.0
NOW_S = 5.0  # for the end of the log to reach storage, where the driver was told to end now
ENDS = "ends"  # in the metadata of the note: the attempt


class Driver:
    def __init__(self, job: Path, sweep: Path | None, attempt: str, flags: list[str]) -> None:
        raw = schema.read_yaml(job)
        for key in ("name", "storage"):
            if not isinstance(raw.get(key), str):
                raise ConfigError(f"{job}: {key}: {raw.get(key)!r} is none; see docs/job.md")
        self.name, self.attempt = yaml.safe_load(sweep.read_text())["name"] if sweep else raw["name"], attempt
        self.run_folder = Location(raw["storage"]).absolute(workspace.root()).join(self.name)
        self.folder = self.run_folder.join(run_folder.LOGS)
        retries = schema.validate(Retries, raw.get("retries") or {}, f"{job}: retries")
        self.again = Again(self.run_folder, retries, sweep is not None, self._pause)
        what = ["tune", str(sweep)] if sweep else ["train", str(job)]
        self.command, self.flags = [sys.executable, "-m", "heliostat", *what], flags
        self.stopping = threading.Event()
        self.jobs_url = jobs_url
        self._log = LogCopy(self.folder, attempt)
        self._over = threading.Event()
        self._killed = False
        self._stdout, self._unsaid = sys.stdout.fileno(), 0

    def run(self, queue: str | None) -> int:
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        if queue:
            self._wait_for_turn(queue)
        if self.stopping.is_set():
            return 128 + signal.SIGTERM
        sender = threading.Thread(target=self._send, daemon=True)  # a store that is away keeps nobody else waiting
        sender.start()
        try:
            return self._children()
        finally:
            self._over.set()
            sender.join(NOW_S if self._killed else None)

    def _children(self) -> int:
        """Runs the command, again as long as it dies and retries are left; returns the exit code."""
        while True:
            pid, code = self._child()
            how = "" if self.stopping.is_set() else self.again.died(pid, code)
            if how and self._starts_again(pid, how):
                continue
            if how:
                self._settle(how)
            return code if code >= 0 else 128 - code

    def _starts_again(self, pid: int, how: str) -> bool:
        """Waits until the dead child's successor is due; False if there is none."""
        try:
            flags = self.again.flags(self.flags, pid)
            wait = self.again.wait_s(how)
            retry = f"retry {self.again.budget.used} of {self.again.budget.retries.max}"
            self._say(f"the driver died without a word, {how}: starting it again in {wait:.0f} s ({retry})")
            self._pause(wait)
        except (HeliostatError, OSError) as e:
            self._say(f"not started again: {e}")
            return False
        self.flags = flags
        return True

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise StoppedError("the job was told to stop")

    def _settle(self, how: str) -> None:
        """Reports to MLflow that the run is over, which its dead driver could not."""
        from heliostat.tracking.reconcile import settle_folder

        try:
            settle_folder(self.run_folder, how)
        except Exception as e:  # noqa: BLE001 (whatever MLflow raises: the next command that sees the run tells it)
            log.warning("MLflow was not told that the run is over: %s", e)

    def _child(self) -> tuple[int, int]:
        """Runs the command once, to its end, and returns its process id and exit code."""
        source, sink = os.pipe()
        child = subprocess.Popen([*self.command, *self.flags], stdout=sink, stderr=sink)
        os.close(sink)
        reader = threading.Thread(target=self._copy, args=(source,), daemon=True)
        reader.start()
        while (code := child.poll()) is None:
            if self.stopping.wait(POLL_S):
                if self._now():
                    self._kill(child.pid)
                    self._killed = True
                time.sleep(POLL_S)
        reader.join(10)
        return child.pid, code

    def _copy(self, source: int) -> None:
        with os.fdopen(source, "rb", buffering=0) as stream:
            while data := stream.read(1 << 16):
                self._write(data)

    def _say(self, text: str) -> None:
        self._write(f"{time.strftime('%H:%M:%S')} {text}\n".encode())

    def _write(self, data: bytes) -> None:
        """Passes output on, to where there is room: a full disk must not close the pipe that the driver writes to."""
        self._log.add(data)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._stdout, rest) :]
        except OSError as e:
            if not self._unsaid:
                log.warning("standard output takes no more (%s); the log's copy in storage goes on", e)
            self._unsaid += len(rest)

    def _send(self) -> None:
        """Updates the log's copy in storage until it is complete."""
        over = False
        while not over:
            over = self._over.wait(UPLOAD_S)
            try:
                self._log.send()
            except (HeliostatError, OSError) as e:
                log.warning("the log's copy in storage is behind: %s", e)

    def _now(self) -> bool:
        """Checks whether the driver must end without waiting for a checkpoint."""
        try:
            jobs = http.get(f"{self.jobs_url()}/api/jobs/", http.own_token())[1] or []
        except Exception as e:  # noqa: BLE001 (whatever Ray raises: the driver waits on)
            log.warning("whether to end now cannot be seen: %s", e)
            return False
        return any((j.get("metadata") or {}).get(ENDS) == self.attempt for j in jobs)

    def _kill(self, pid: int) -> None:
        try:
            child = psutil.Process(pid)
            for process in [*child.children(recursive=True), child]:
                process.kill()
        except psutil.NoSuchProcess:
            pass

    def _wait_for_turn(self, queue: str) -> None:
        """Waits until no job of the queue that was submitted before this one is left."""
        url, token = self.jobs_url(), http.own_token()
        announced = False
        while not self.stopping.is_set():
            ahead = before(self.name, queue, http.get(f"{url}/api/jobs/", token)[1] or [])
            if ahead == []:
                return
            if ahead and not announced:
                log.info("in queue %s behind %s", queue, ", ".join(ahead))
                announced = True
            self.stopping.wait(QUEUE_S)


def jobs_url() -> str:
    """Returns the address of the Jobs API, from the state of the cluster that this process runs on."""
    return ray_internals.jobs_url(os.environ.get("RAY_ADDRESS", "auto"))


class WaitingJob(TypedDict):
    """Describes what is read of a job in the answer of the Jobs API."""

    submission_id: str
    status: str
    start_time: int
    metadata: dict[str, str] | None


def before(name: str, queue: str, jobs: list[WaitingJob]) -> list[str] | None:
    """Lists the queue's unfinished jobs that started before the job `name`; None if that is not among them (yet)."""
    waiting = [j for j in jobs if (j.get("metadata") or {}).get("queue") == queue and j["status"] in ("PENDING", "RUNNING")]
    mine = next((j for j in waiting if j["submission_id"] == name), None)
    if mine is None:
        return None
    return sorted(j["submission_id"] for j in waiting if (j["start_time"], j["submission_id"]) < (mine["start_time"], name))


def main() -> int:
    parser = argparse.ArgumentParser(prog="heliostat.submit.entrypoint")
    parser.add_argument("job", type=Path)
    parser.add_argument("--attempt", default=time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--queue")
    parser.add_argument("--flag", action="append", default=[])
    given = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.excepthook = excepthook
    sweep = given.sweep and given.sweep.absolute()
    try:
        return Driver(given.job.absolute(), sweep, given.attempt, given.flag).run(given.queue)
    except HeliostatError as e:
        log.error(e)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
