"""Runs a submitted job on the cluster's head: `heliostat train`, or `tune`, as a child process, with its log kept in storage.

    python -m heliostat.submit.entrypoint JOB.yaml [--attempt ID] [--sweep SWEEP.yaml] [--queue NAME] [--flag=--resume]

A child that is killed, or dies without recording an outcome, is started again, and continues from the newest checkpoint, as often
as the job's `retries` allow (`Again`); after that the run's MLflow status is FAILED, with the reason. A store that is away is
waited for; MLflow is not needed to resume. A command that ends by itself records its end in the run's ledger.

Retries count the deaths in a row: progress resets the count. A successor that fails before it has begun counts as one more death.

The log goes to standard output, which the Jobs API shows, and to `logs/` in the run's folder (`logs`), which outlives the
cluster. `heliostat job stop` makes Ray send SIGTERM to this process and to the training driver; this process waits for the
driver, which saves a checkpoint. It does not wait if the Jobs API lists a marker job that tells this attempt to end now (`stop
--now`): storage may be what does not answer.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import yaml

from heliostat import schema
from heliostat.cluster import dashboard as http
from heliostat.cluster import processes, ray_internals
from heliostat.config import workspace
from heliostat.config.spec import Retries
from heliostat.errors import ConfigError, HeliostatError, StoppedError, TrainingError
from heliostat.redact import Formatter, excepthook
from heliostat.runs import goodput
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.submit.logs import LogCopy
from heliostat.training.driver.recovery import Budget

log = logging.getLogger("heliostat")

UPLOAD_S, POLL_S, QUEUE_S = 20.0, 1.0, 2.0
NOW_S = 5.0  # for the end of the log to reach storage, where the driver was asked to end now
ENDS = "ends"  # in the metadata of the note: the attempt


class Again:
    """Decides on restarts of the command of one run, or one sweep, in `folder`."""

    def __init__(
        self, folder: Location, retries: Retries, sweep: bool = False, pause: Callable[[float], object] | None = None
    ) -> None:
        """Prepares decisions; `pause` waits so many seconds, and raises a HeliostatError if the command is not to go on."""
        self.folder, self.sweep, self._pause = folder, sweep, pause
        self.budget = Budget(retries)
        self._began = time.time()

    def died(self, pid: int, code: int) -> str:
        """Describes how the command died, from its exit code as `Popen` returns it; empty if it ended by itself."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if self.sweep or not code:
            return ""
        try:
            mine = self._attempt(pid)
        except (HeliostatError, OSError) as e:
            log.warning("can't find out how the driver ended: %s", e)
            return ""
        if mine is None:  # it had not begun
            return f"with exit code {code} before it had begun" if self.budget.used and code == 1 else ""
        return f"with exit code {code}" if mine.outcome is None else ""

    def wait_s(self, how: str) -> float:
        """Returns the seconds to wait before the restart; TrainingError if the retries are used up."""
        return self.budget.spend(TrainingError(f"the driver died without an error, {how}"), self._progress())

    def flags(self, flags: list[str], pid: int) -> list[str]:
        """Returns the successor's flags: it resumes what the dead command has begun, but never an earlier run.

        Raises a HeliostatError if it cannot be read whether the command has begun.
        """
        if not self._has_begun(pid):
            return flags
        return [*(f for f in flags if f not in ("--overwrite", "--resume")), "--resume"]

    def _attempt(self, pid: int) -> RecordedAttempt | None:
        """Finds this process's newest attempt in the run's ledger; None if there is none."""
        self.folder.wait_for_store(self._pause)
        mine = [a for a in goodput.read(self.folder) if (a.host, a.pid) == (socket.gethostname(), pid)]
        return max(mine, key=lambda a: a.started, default=None)

    def _has_begun(self, pid: int) -> bool:
        if not self.sweep:
            return self._attempt(pid) is not None
        self.folder.wait_for_store(self._pause)
        try:
            return json.loads(self.folder.join("sweep.json").read())["created"] >= self._began
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def _progress(self) -> int:
        """Returns the newest checkpoint's step, or the number of finished trials of a sweep; -1 if that is not known."""
        try:
            if self.sweep:
                from heliostat.tune import listing

                return listing.progress(self.folder)[0]
            names = [name for name, _ in self.folder.join(run_folder.CHECKPOINTS).files() if name.endswith("/checkpoint.json")]
        except (HeliostatError, OSError) as e:
            log.warning("can't read the run's progress: %s", e)
            return -1
        return max((int(n.removeprefix("step-").partition("/")[0]) for n in names if n.startswith("step-")), default=0)


class Driver:
    def __init__(self, job: Path, sweep: Path | None, attempt: str, flags: list[str]) -> None:
        raw = schema.read_yaml(job)
        for key in ("name", "storage"):
            if not isinstance(raw.get(key), str):
                wrong = f"{key}: expected text, got {raw[key]!r}. Write {key}: TEXT" if key in raw else schema.absent(key, "TEXT")
                raise ConfigError(f"{job}: {wrong}")
        self.name, self.attempt = yaml.safe_load(sweep.read_text())["name"] if sweep else raw["name"], attempt
        self.run_folder = Location(raw["storage"]).absolute(workspace.root()).join(self.name)
        self.folder = self.run_folder.join(run_folder.LOGS)
        retries = schema.validate(Retries, raw.get("retries") or {}, f"{job}: retries")
        self.again = Again(self.run_folder, retries, sweep is not None, self._pause)
        what = ["sweep", "run", str(sweep)] if sweep else ["train", str(job)]
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
        sender = threading.Thread(target=self._send, daemon=True)  # a store that is away keeps no other thread waiting
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
            self._say(f"the driver died without an error, {how}. Starting it again in {wait:.0f} s ({retry})")
            self._pause(wait)
        except (HeliostatError, OSError) as e:
            self._say(f"not starting it again: {e}")
            return False
        self.flags = flags
        return True

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise StoppedError("the job was stopped on request")

    def _settle(self, how: str) -> None:
        """Reports to MLflow that the run is over, which its dead driver could not."""
        from heliostat.tracking.reconcile import settle_folder

        try:
            settle_folder(self.run_folder, how)
        except Exception as e:  # noqa: BLE001 (whatever MLflow raises: the next command that sees the run tells it)
            log.warning("MLflow couldn't record the end of the run: %s", e)

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
                    processes.end_tree(child, kill_s=0)
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
                log.warning("can't write to standard output (%s). The log's copy in storage continues", e)
            self._unsaid += len(rest)

    def _send(self) -> None:
        """Updates the log's copy in storage until it is complete."""
        over = False
        while not over:
            over = self._over.wait(UPLOAD_S)
            try:
                self._log.send()
            except (HeliostatError, OSError) as e:
                log.warning("the log's copy in storage is late: %s", e)

    def _now(self) -> bool:
        """Checks whether the driver must end without waiting for a checkpoint."""
        try:
            jobs = http.get(f"{self.jobs_url()}/api/jobs/", http.own_token())[1] or []
        except Exception as e:  # noqa: BLE001 (whatever Ray raises: the driver waits on)
            log.warning("can't check for a request to stop: %s", e)
            return False
        return any((j.get("metadata") or {}).get(ENDS) == self.attempt for j in jobs)

    def _wait_for_turn(self, queue: str) -> None:
        """Waits until no job of the queue that was submitted before this one is left."""
        url, token = self.jobs_url(), http.own_token()
        announced = False
        while not self.stopping.is_set():
            ahead = before(self.name, queue, http.get(f"{url}/api/jobs/", token)[1] or [])
            if ahead == []:
                return
            if ahead and not announced:
                log.info("in queue %s after %s", queue, ", ".join(ahead))
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
    options = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.excepthook = excepthook
    sweep = options.sweep and options.sweep.absolute()
    try:
        return Driver(options.job.absolute(), sweep, options.attempt, options.flag).run(options.queue)
    except HeliostatError as e:
        log.error(e)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
