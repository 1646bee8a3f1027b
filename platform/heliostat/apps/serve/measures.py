"""Counts what the endpoint does, for Prometheus. No label holds a key; the names of keys are those of the key file."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from heliostat.config.fields import Json

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Measures:
    """Holds the measures of one front, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ours: dict[str, Json] = {"registry": self.registry, "namespace": "heliostat"}
        self.requests = Counter("requests", "Requests that were answered", ["path", "status"], **ours)
        self.seconds = Histogram("request_seconds", "From a request to the end of its answer", ["path"], buckets=SECONDS, **ours)
        self.tokens = Counter("tokens", "Tokens of prompts and of answers", ["key", "kind"], **ours)
        self.images = Counter("images", "Pictures that were drawn", ["key"], **ours)
        self.open = Gauge("open_requests", "Requests under way, by the version that answers them", ["version"], **ours)
        self.retries = Gauge("retried_requests", "Requests that were sent again because a replica died", **ours)
        self.broken = Counter("broken_streams", "Streams that ended in an error event", **ours)

    def counted(self, key: str, usage: dict[str, int]) -> None:
        """Adds the tokens of an answer."""
        for kind in ("prompt", "completion"):
            self.tokens.labels(key, kind).inc(usage.get(f"{kind}_tokens", 0))

    def text(self, open_: dict[str, int], retried: int) -> bytes:
        """Writes all measures in Prometheus' format of text."""
        self.open.clear()
        for version, count in open_.items():
            self.open.labels(version).set(count)
        self.retries.set(retried)
        return generate_latest(self.registry)
