"""Plays the trials of `heliostat check --numerics`, each in processes that are forked from one that has imported the libraries.

    found = trials.run(jobs, folder, faults)      # by name of the job: what `numerics.check` concludes of it

A fault is named by import path, and called with the job's name in the process that hosts its trial, before that starts any other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from heliostat.config.spec import Job

ROOT = Path(__file__).parents[2]
DEADLINE_S = 480


def run(jobs: list[Job], folder: Path, fault: str = "") -> dict[str, dict[str, Any]]:
    """Plays one after another; fails, with what was said, if a process of one failed."""
    from heliostat.data import manifest
    from heliostat.numerics import check, processes

    for job in jobs:
        (mine := folder / job.name).mkdir()
        processes.give(job, [manifest.read(location).digest for location in job.sources], mine, gpus=False)
    env = {**os.environ, **processes.THREADS, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.integration.trials", str(folder), fault, *(job.name for job in jobs)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=DEADLINE_S + 30, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
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


def main(folder: Path, fault: str, names: list[str]) -> int:
    from heliostat.cluster import preloads
    from heliostat.numerics import plain, play, small  # noqa: F401
    from heliostat.train.worker import deepspeed_engine

    deepspeed_engine.prepare_environment(0)
    for module in preloads.modules("heliostat.recipes:CausalLM", {"arch": "llama"}):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()
    until = time.monotonic() + DEADLINE_S
    for name in names:
        if not (child := os.fork()):
            _hosted(folder, name, fault)
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
            time.sleep(0.02)
        if not ended[0]:
            os.killpg(child, signal.SIGKILL)
        if ended[1] or not ended[0]:
            sys.stderr.write(f"{name}: failed, or did not end in time\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
