"""Measures a run's time and cost, and detects when the run reaches one of the job's `limits`.

Time and cost are totals of the whole run: the ledger has the totals of earlier commands, and a monotonic clock measures this
command. The time between commands doesn't count. While the ledger can't be read, only this command counts. The cost is the price
of the devices that workers hold, from the price table of `heliostat plan`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from importlib import resources
from typing import Any

import yaml

from heliostat.cluster.capacity import LivingNode, selects
from heliostat.config.spec import Job, Workers
from heliostat.errors import ConfigError
from heliostat.runs.time_ledger import LedgerRecorder

EVERY_S = 5.0  # seconds between two checks
RAYS, ACCELERATOR = "ray.io/", "ray.io/accelerator-type"  # labels that Ray gives nodes


class Spending:
    """Compares a run's time and cost with the job's limits."""

    def __init__(self, job: Job, ledger: LedgerRecorder) -> None:
        self.limits, self.workers, self._ledger = job.limits, job.workers, ledger
        self.reached = ""  # a description of the limit that is reached
        self._rate: float | None = None  # price of a worker's hour, once it is known
        self._next = 0.0

    @property
    def lacks_price(self) -> bool:
        """Returns whether the cost is limited and the price of a worker isn't known yet.

        In this case, call `look` with the nodes.
        """
        return bool(self.limits.cost) and self._rate is None

    def look(self, nodes: Iterable[LivingNode]) -> None:
        """Finds the price per hour of a worker on these nodes (`cluster.nodes.inventory`). Raises ConfigError if the price table
        lacks this price."""
        if self.lacks_price:
            self._rate = hourly(self.workers, nodes)

    def due(self) -> bool:
        """Returns whether to check the limits now: every EVERY_S seconds, if a limit is set and none is reached."""
        if self.reached or not (self.limits.hours or self.limits.cost) or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + EVERY_S
        return True

    def check(self) -> str:
        """Returns a text with the limit that is reached, and the time or cost so far.

        The text is empty if no limit is reached.
        """
        hours, worker_hours = self._ledger.spent()
        spent = worker_hours * (self._rate or 0.0)
        scope = "over all commands" if self._ledger.complete else "in this command; can't read the ledger of earlier commands"
        if self.limits.hours and hours >= self.limits.hours:
            self.reached = f"limits.hours: the limit of {self.limits.hours:g} h is reached ({hours:.2f} h {scope})"
        elif self.limits.cost and spent >= self.limits.cost:
            self.reached = (
                f"limits.cost: the limit of {self.limits.cost:g} {_table()['currency']} is reached ({spent:.2f} {scope})"
            )
        return self.reached

    def require_left(self) -> None:
        """Raises ConfigError if a limit is used up before the command begins. The price of GPUs is known only later."""
        self.look([])
        if reached := self.check():
            self.reached = ""
            raise ConfigError(f"{reached}. Raise the limit to continue")


def hourly(workers: Workers, nodes: Iterable[LivingNode]) -> float | None:
    """Computes the price per hour of a worker, on the most expensive node that may run the worker. Returns None if no node may
    run the worker yet.

    Raises ConfigError if one of these nodes has a GPU that isn't in the price table.
    """
    devices = _table()["devices"]
    if not workers.gpus:
        return workers.cpus * devices["cpu"]["hour"]
    # the nodes don't list Ray's labels
    wanted = {name: value for name, value in workers.labels.items() if not name.startswith(RAYS)}
    fitting = [n for n in nodes if n["gpus"] and selects(wanted, n["labels"])]
    if kind := workers.labels.get(ACCELERATOR):
        fitting = [n for n in fitting if any(selects({ACCELERATOR: kind}, {ACCELERATOR: one}) for one in n["accelerators"])]
    kinds = {kind for node in fitting for kind in node["accelerators"] or ["a GPU whose name Ray doesn't know"]}
    known = {kind: devices.get(kind.split("-")[0]) for kind in kinds}
    if unknown := sorted(kind for kind, device in known.items() if device is None):
        names = ", ".join(sorted(d for d in devices if d != "cpu"))
        raise ConfigError(
            f"limits.cost: the price table has no price for {unknown[0]}. "
            f"The table has prices for {names}. Use limits.hours instead"
        )
    prices = [device["hour"] for device in known.values()]
    return workers.gpus * max(prices) if prices else None


def _table() -> dict[str, Any]:
    return yaml.safe_load(resources.files("heliostat.plan").joinpath("prices.yaml").read_text(encoding="utf-8"))
