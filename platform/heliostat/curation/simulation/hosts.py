"""Computes how long fetching takes by the request rates of hosts, from the hosts in a sample's lists of URLs.

Law of extrapolation (Pitman and Yor, The Two-Parameter Poisson-Dirichlet Distribution, 1997): in a sample of n URLs, H hosts have
URLs, and f of them have one URL. With d = f / H, the number of hosts grows as the number of URLs to the power d. A host with c
URLs in the sample has the share (c - d) / n of all URLs. Hosts that aren't in the sample share the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from heliostat.storage.locations import Location
from heliostat.tasks import spill

ANSWER_S = 0.5  # seconds from a request to the end of its answer: an assumption
SHARES = (0.5, 0.9, 0.99, 1.0)  # shares of the URLs for which the report has a time


@dataclass(frozen=True)
class HostCounts:
    """Holds the hosts of a sample: their keys (`lists.ROWS`), as uint64 [hosts], ascending, and their URLs, as int64 [hosts]."""

    keys: np.ndarray
    counts: np.ndarray

    @cached_property
    def urls(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def discount(self) -> float:
        """Returns d of the law: the share of hosts with one URL."""
        return float((self.counts == 1).mean())

    def hosts(self, urls: float) -> int:
        """Estimates the number of hosts in lists of `urls` URLs."""
        return round(len(self.keys) * (urls / self.urls) ** self.discount)

    def sizes(self, urls: float) -> np.ndarray:
        """Estimates the URLs of each host of the sample in lists of `urls` URLs, as float64 [hosts]."""
        return (self.counts - self.discount) * (urls / self.urls)

    def seconds(self, urls: float, per_second: float) -> dict[float, float]:
        """Computes the time after which each of SHARES of the URLs is fetched, if only the hosts' rates limit the fetching."""
        sizes = np.sort(self.sizes(urls))
        before, larger = np.concatenate([[0.0], np.cumsum(sizes)[:-1]]), np.arange(len(sizes), 0, -1)
        rest = urls - sizes.sum()  # URLs of hosts that aren't in the sample
        fetched = rest + before + sizes * larger  # at the moment when each host is finished
        return {share: float(np.interp(share * urls, [rest, *fetched], [0.0, *sizes])) / per_second for share in SHARES}


def counted(folder: Location, names: Iterable[str]) -> HostCounts:
    """Counts the URLs of each host in temporary files of `lists.listed`."""
    tables = [table["key"].to_numpy() for table in spill.read_all(folder, names, columns=["key"])]
    return HostCounts(*np.unique(np.concatenate(tables), return_counts=True))


@dataclass(frozen=True)
class WebModel:
    """Describes the web for a simulation: the hosts of `urls` URLs, and the limits of a task. `bytes_each`: mean bytes of a
    fetched image, per URL."""

    hosts: HostCounts
    urls: float
    per_second: float
    threads: int
    bytes_each: float

    @cached_property
    def sizes(self) -> np.ndarray:
        return self.hosts.sizes(self.urls)

    def limits(self, task: dict[str, Any], network: float) -> dict[str, float]:
        """Computes the seconds that each limit needs for a fetching task (`lists.plan`). `network`: bytes per second."""
        return {
            "hosts": self._largest(task) / self.per_second,
            "answers": task["urls"] * ANSWER_S / self.threads,
            "network": task["urls"] * self.bytes_each / network,
        }

    def _largest(self, task: dict[str, Any]) -> float:
        """Returns the URLs of the task's largest host. If tasks share the host, each has fewer URLs, at a lower rate, so the time
        is the same."""
        keys = self.hosts.keys
        first, stop = (int(np.searchsorted(keys, np.uint64(min(task[end], spill.ALL - 1)))) for end in ("low", "high"))
        sizes, of = self.sizes[first:stop], task["of"]
        mine = (spill.mixed(keys[first:stop]) % np.uint64(of) == task["part"]) | (sizes > task.get("large", np.inf))
        return float(sizes[mine].max(initial=0.0))
