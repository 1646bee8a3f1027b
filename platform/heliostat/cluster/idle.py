"""Ends a local cluster after some minutes without a job. `cluster up` starts this module as a process, and `cluster down` ends
the process.

    python -m heliostat.cluster.idle NAME MINUTES

A job is an entry of the Jobs API: a submission, or a program that connected to the cluster without a submission. The cluster's
record is in the workspace of the current folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable

from heliostat.cluster import dashboard, local
from heliostat.redact import Formatter

log = logging.getLogger("heliostat")

POLL_S = 15.0
GONE_S = 600.0  # after this time without an answer, the cluster counts as ended


def busy(url: str, token: str) -> bool | None:
    """Checks whether a job is pending or running. Returns None if the cluster doesn't answer."""
    status, jobs = dashboard.get(f"{url}/api/jobs/", token)
    if status != 200:
        return None
    return any(job["status"] in ("PENDING", "RUNNING") for job in jobs or [])


def wait(look: Callable[[], bool | None], idle_s: float, gone_s: float = GONE_S, poll_s: float = POLL_S) -> bool:
    """Waits until `look` has seen no job for `idle_s` seconds, and returns True. Returns False after `gone_s` seconds without
    an answer.

    `look` returns whether a job is pending or running. It returns None if the cluster doesn't answer, which counts as busy.
    """
    used = answered = time.monotonic()
    while True:
        state, now = look(), time.monotonic()
        if state is None and now - answered > gone_s:
            return False
        if state is not None:
            answered = now
        if state is False and now - used >= idle_s:
            return True
        if state is not False:  # busy, or unknown
            used = now
        time.sleep(poll_s)


def main() -> int:
    parser = argparse.ArgumentParser(prog="heliostat.cluster.idle")
    parser.add_argument("name")
    parser.add_argument("minutes", type=float)
    options = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    state = local.read(options.name)
    if state is None:
        return 0
    token = state.token
    if not wait(lambda: busy(state.url, token), options.minutes * 60):
        log.info("cluster %s no longer answers", options.name)
        return 0
    log.info("cluster %s had no job for %g minutes (idle_timeout_minutes). Ending the cluster", options.name, options.minutes)
    local.down(options.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
