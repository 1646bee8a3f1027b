"""Runs a submitted job on the cluster's head, as a child process, and copies the job's log to storage.

    python -m heliostat.submit.entrypoint JOB.yaml [--attempt ID] [--sweep SWEEP.yaml] [--queue NAME] [--flag=--resume]

The child is `heliostat train` or `heliostat sweep run`. If the child is killed, or dies without recording an outcome, this
process starts the child again, and the child continues from the newest checkpoint. The job's `retries` limit how often this
process restarts the child (`Again`). After the last retry, the run's MLflow status is FAILED, with the reason. If the storage is
unreachable, this process waits for it. Resuming doesn't need MLflow. A command that ends by itself records its end in the run's
ledger.

`retries` limits the number of consecutive deaths: progress resets the count. If a new child fails before it has begun its work,
this failure counts as another death.

The log goes to standard output, which the Jobs API shows. The copy in `logs/` of the run's folder (`logs`) outlives the
cluster.

`heliostat job stop` makes Ray send SIGTERM to this process and to the training driver. The driver saves a checkpoint, and this
process waits for the driver. With `stop --now`, the Jobs API lists a marker job for this attempt. This process then doesn't wait,
because the storage may not answer.
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
from heliostat.storage.waiting import wait_for_store
from heliostat.submit.logs import LogCopy
from heliostat.training.driver.recovery import Budget

log = logging.getLogger("heliostat")

UPLOAD_S, POLL_S, QUEUE_S = 20.0, 1.0, 2.0
NOW_S = 5.0  # time for the end of the log to reach storage after `stop --now`
ENDS = "ends"  # key of the marker job's metadata; its value is the attempt to end


class Again:
    """Decides whether the command of a run or a sweep is started again. `folder`: the folder of the run or the sweep."""

    def __init__(
        self, folder: Location, retries: Retries, sweep: bool = False, pause: Callable[[float], object] | None = None
    ) -> None:
        """Stores the job's retries. `pause` waits the given number of seconds, or raises a HeliostatError if the command must
        end."""
        self.folder, self.sweep, self._pause = folder, sweep, pause
        self.budget = Budget(retries)
        self._began = time.time()

    def died(self, pid: int, code: int) -> str:
        """Describes how the command died; empty if the command ended by itself. `code`: the command's exit code, as returned by
        `Popen`."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if self.sweep or not code:
            return ""
        try:
            mine = self._attempt(pid)
        except (HeliostatError, OSError) as e:
            log.warning("can't find out how the driver ended, so heliostat doesn't restart the driver: %s", e)
            return ""
        if mine is None:  # the command had not begun
            return f"with exit code {code} before it had begun" if self.budget.used and code == 1 else ""
        return f"with exit code {code}" if mine.outcome is None else ""

    def wait_s(self, how: str) -> float:
        """Returns the seconds to wait before the restart; raises TrainingError if the retries are used up."""
        return self.budget.spend(TrainingError(f"the driver died without an error, {how}"), self._progress())

    def flags(self, flags: list[str], pid: int) -> list[str]:
        """Returns the next command's flags. If the dead command had begun the run, the next command resumes this run. The next
        command never resumes an earlier run.

        Raises HeliostatError if the storage doesn't show whether the command had begun.
        """
        if not self._has_begun(pid):
            return flags
        return [*(f for f in flags if f not in ("--overwrite", "--resume")), "--resume"]

    def _attempt(self, pid: int) -> RecordedAttempt | None:
        """Returns the newest attempt of process `pid` on this host from the run's ledger; None if there is no such attempt."""
        wait_for_store(self.folder, self._pause)
        mine = [a for a in goodput.read(self.folder) if (a.host, a.pid) == (socket.gethostname(), pid)]
        return max(mine, key=lambda a: a.started, default=None)

    def _has_begun(self, pid: int) -> bool:
        if not self.sweep:
            return self._attempt(pid) is not None
        wait_for_store(self.folder, self._pause)
        try:
            return json.loads(self.folder.join("sweep.json").read())["created"] >= self._began
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def _progress(self) -> int:
        """Returns a run's progress as the step of its newest checkpoint, and a sweep's progress as its number of finished trials;
        -1 if the progress is unknown."""
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
    """Runs the command of a submitted job, starts the command again if the command dies, and copies the command's log."""

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
        """Waits for the job's turn in the queue, runs the job's command to the end, and returns the exit code."""
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        if queue:
            self._wait_for_turn(queue)
        if self.stopping.is_set():
            return 128 + signal.SIGTERM
        sender = threading.Thread(target=self._send, daemon=True)  # unreachable storage blocks only this thread
        sender.start()
        try:
            return self._children()
        finally:
            self._over.set()
            sender.join(NOW_S if self._killed else None)

    def _children(self) -> int:
        """Runs the command. If the command dies, runs it again until no retries are left. Returns the last exit code."""
        while True:
            pid, code = self._child()
            how = "" if self.stopping.is_set() else self.again.died(pid, code)
            if how and self._starts_again(pid, how):
                continue
            if how:
                self._settle(how)
            return code if code >= 0 else 128 - code

    def _starts_again(self, pid: int, how: str) -> bool:
        """Waits until the dead command can start again. Returns False if it doesn't start again."""
        try:
            flags = self.again.flags(self.flags, pid)
            wait = self.again.wait_s(how)
            retry = f"retry {self.again.budget.used} of {self.again.budget.retries.max}"
            self._say(f"the driver died without an error, {how}. Starting the driver again in {wait:.0f} s ({retry})")
            self._pause(wait)
        except (HeliostatError, OSError) as e:
            self._say(f"not starting the driver again: {e}")
            return False
        self.flags = flags
        return True

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise StoppedError("the job was stopped on request")

    def _settle(self, how: str) -> None:
        """Records in MLflow that the run has ended, because the dead driver couldn't do so."""
        from heliostat.tracking.reconcile import settle_folder

        try:
            settle_folder(self.run_folder, how)
        except Exception as e:  # noqa: BLE001 (any error of MLflow: the next command that sees the run records it)
            log.warning("MLflow couldn't record the end of the run: %s", e)

    def _child(self) -> tuple[int, int]:
        """Runs the command once, and waits until the command ends. Returns the command's process id and exit code."""
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
        """Writes output to the log's copy and to standard output. Ignores the error if the disk is full. Otherwise, the error
        would close the pipe from the driver."""
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
        """Updates the log's copy in storage, and repeats this until the copy is complete."""
        over = False
        while not over:
            over = self._over.wait(UPLOAD_S)
            try:
                self._log.send()
            except (HeliostatError, OSError) as e:
                log.warning("can't update the log's copy in storage yet: %s", e)

    def _now(self) -> bool:
        """Checks whether the driver must end without waiting for a checkpoint."""
        try:
            jobs = http.get(f"{self.jobs_url()}/api/jobs/", http.own_token())[1] or []
        except Exception as e:  # noqa: BLE001 (any error of Ray: the driver gets its time to end)
            log.warning("can't check for a request to stop: %s", e)
            return False
        return any((j.get("metadata") or {}).get(ENDS) == self.attempt for j in jobs)

    def _wait_for_turn(self, queue: str) -> None:
        """Waits until all jobs of the queue that were submitted before this job have ended."""
        url, token = self.jobs_url(), http.own_token()
        announced = False
        while not self.stopping.is_set():
            ahead = before(self.name, queue, http.get(f"{url}/api/jobs/", token)[1] or [])
            if ahead == []:
                return
            if ahead and not announced:
                log.info("waiting in queue %s until these earlier jobs end: %s", queue, ", ".join(ahead))
                announced = True
            self.stopping.wait(QUEUE_S)


def jobs_url() -> str:
    """Returns the URL of the Jobs API of this process's cluster."""
    return ray_internals.jobs_url(os.environ.get("RAY_ADDRESS", "auto"))


class WaitingJob(TypedDict):
    """Describes a waiting job with the fields that heliostat reads from the Jobs API."""

    submission_id: str
    status: str
    start_time: int
    metadata: dict[str, str] | None


def before(name: str, queue: str, jobs: list[WaitingJob]) -> list[str] | None:
    """Lists the queue's unfinished jobs that were submitted before the job `name`. Returns None if the Jobs API doesn't list
    `name` yet."""
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
