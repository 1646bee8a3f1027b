"""Scores a run's checkpoints on tasks while it trains (`evaluate.benchmarks`): by a process of its own, beside the driver.

It is `heliostat benchmark RUN SUITE --follow` on the driver's CPUs, at low priority: no worker waits for it, and if it fails the
run does not.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import psutil

from heliostat.cluster import processes
from heliostat.config.spec import Job
from heliostat.storage.run_folder import BENCHMARKS

log = logging.getLogger(__name__)

NICE = 10
END_S = 10.0
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # the GPUs are the workers'


class Beside:
    """Holds the process that scores, if the job asks for one."""

    def __init__(self, job: Job) -> None:
        self.job, self.asked = job, job.evaluate.benchmarks if job.evaluate else None
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Starts the process, if it is asked for and does not run: with the first checkpoint, and again if it has died."""
        if self.asked is None or (self._process and self._process.poll() is None):
            return
        run = self.job.run_folder
        command = ["benchmark", run.uri, self.asked.suite, "--follow", "--every", str(self.asked.every), "--out",
                   run.join(BENCHMARKS, "followed.json").uri, "--json"]  # fmt: skip
        self._process = subprocess.Popen(
            ["nice", "-n", str(NICE), sys.executable, "-m", "heliostat", *command],
            env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Waits for the last scores, at most `evaluate.benchmarks.wait`; says so if they are not there then."""
        if self.asked is None or self._process is None:
            return
        again = f"heliostat benchmark {self.job.run_folder} {self.asked.suite} --follow"
        try:
            code = self._process.wait(self.asked.wait)
        except subprocess.TimeoutExpired:
            self.end()
            log.warning("evaluate.benchmarks: not all is scored after %g s; `%s` goes on", self.asked.wait, again)
            return
        if code:
            log.warning("evaluate.benchmarks: scoring ended with exit code %d; `%s` goes on", code, again)

    def end(self) -> None:
        """Ends the process; what it has scored stays."""
        if self._process and self._process.poll() is None:
            processes.stop([psutil.Process(self._process.pid)], END_S)
            self._process.wait(END_S)
