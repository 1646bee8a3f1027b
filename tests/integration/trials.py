"""Runs the trials of `heliostat check --numerics`, each in processes that are forked from that of `ranks`.

    found = trials.run(jobs, folder, faults)      # by name of the job: the conclusion of `numerics.check`

A fault is named by its import path. The process that hosts the trial calls it with the job's name before it starts any other
process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from heliostat.config.spec import Job

from tests.integration.forks import SERVER

DEADLINE_S = 480


def run(jobs: list[Job], folder: Path, fault: str = "") -> dict[str, dict[str, Any]]:
    """Runs trials one after another; fails, with the output, if a process of one failed."""
    from heliostat.data import manifest
    from heliostat.numerics import check, processes

    for job in jobs:
        (mine := folder / job.name).mkdir()
        processes.give(job, [manifest.read(location).digest for location in job.sources], mine, gpus=False)
    done = SERVER.run(f"{__name__}:main", [str(folder), fault, *(job.name for job in jobs)], DEADLINE_S + 30)
    assert done.code == 0, done.err[-5000:]
    return {job.name: check.conclude(folder / job.name) for job in jobs}


def _hosted(folder: Path, name: str, fault: str) -> None:
    from heliostat.numerics import processes

    os.setsid()
    if fault:
        module, _, function = fault.partition(":")
        getattr(importlib.import_module(module), function)(name)
    code = processes.host(folder / name)
    sys.stderr.write((folder / name / "error.json").read_text() if code else "")
    sys.stderr.flush()
    os._exit(code)


def main(given: list[str]) -> int:
    """Runs the trials in forks of this process, one after another; returns 0 if none of them failed."""
    from heliostat.numerics import plain, play, processes, small  # noqa: F401

    os.environ |= {**processes.THREADS, "GLOO_SOCKET_IFNAME": "lo"}
    folder, fault, *names = given
    gc.freeze()
    until = time.monotonic() + DEADLINE_S
    for name in names:
        if not (child := os.fork()):
            _hosted(Path(folder), name, fault)
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # of a trial that failed some wait for the others
        if ended[1] or not ended[0]:
            sys.stderr.write(f"{name}: failed, or did not end in time\n")
            return 1
    return 0
