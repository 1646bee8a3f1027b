"""Fetches images from the URLs of a list. Sends several requests at a time, and returns the images in the order of the list."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from heliostat.curation.images.pictures import Raw
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.sampled import OF_RECORDS, chosen
from heliostat.curation.stage import Dropped
from heliostat.curation.web import lists
from heliostat.curation.web.client import Bounds, FetchError
from heliostat.curation.web.polite import Fetcher, host_of
from heliostat.schema import Float, Strict
from heliostat.storage.locations import Location

REASONS = {
    "bad_url": "no http or https URL",
    "private_address": "a host in a private network, which fetch.private does not allow",
    "robots": "the host's robots.txt does not allow it, or cannot be had",
    "refused": "the server answered with another status than 200, or redirected without end",
    "unreachable": "no address, no connection, or no whole answer within fetch.seconds, after all retries",
}
VERSION = 2  # increased when the same keys fetch different images


class FetchSettings(Strict):
    """Configures the fetching of images from lists of URLs."""

    column: str = Field("url", min_length=1)
    """Column with the URLs. The lists are `.jsonl`, `.csv`, or `.parquet` files."""
    per_second: Float = Field(1.0, gt=0)
    """Maximum requests per second to one host, from the whole cluster. A `Crawl-delay` in the host's robots.txt
    lowers this rate."""
    seconds: Float = Field(30.0, gt=0)
    """Timeout of a request and its redirects together, in seconds."""
    retries: int = Field(2, ge=0, le=10)
    """Retries of a URL after a temporary failure (timeouts, 429, 5xx), each after a longer pause."""
    robots: bool = True
    """Fetches robots.txt from each host, and obeys its rules."""
    private: bool = False
    """Allows requests to hosts in private networks. Leave this off for lists from other people: such lists may contain
    hosts that only your machines reach."""
    agent: str = Field("heliostat", min_length=1, pattern=r"^[ -~]+$")
    """User agent of requests. robots.txt is matched against the agent's name, which ends at the first slash or space. Set your
    own agent, with a contact address."""
    threads: int = Field(8, ge=1, le=256)
    """Number of concurrent requests per task."""

    def identity(self) -> dict[str, Any]:
        """Returns this module's VERSION, and the settings that decide which images are fetched. Excludes the request rate and the
        retries."""
        return {"version": VERSION, **self.model_dump(mode="json", include={"column", "robots", "private", "agent"})}


@dataclass(frozen=True)
class Fetching:
    """Fetches the images of one task's URLs. `heliostat.curation.web.lists` plans the tasks. `bytes`: maximum bytes of an
    image."""

    config: FetchSettings
    bytes: int

    def read(self, folder: Location, task: dict[str, Any], columns: ImageColumns, rate: float = 1.0) -> Iterator[Raw | Dropped]:
        """Yields the image of each URL of a task, or the reason why the image is missing. `rate`: the share of URLs to fetch."""
        config = self.config
        bounds = Bounds(self.bytes, config.seconds, config.private, config.agent)
        fetcher = Fetcher(bounds, 1 / config.per_second, config.retries, config.robots, of=task["of"])
        with ThreadPoolExecutor(config.threads) as pool:
            waiting = deque[tuple[dict[str, Any], Future[bytes]]]()
            for row, shared in lists.rows(folder, task):
                if rate < 1 and not chosen(row["id"], rate, OF_RECORDS):
                    continue
                if not shared:
                    fetcher.alone.add(host_of(row["url"]))
                waiting.append((row, pool.submit(fetcher, row["url"])))
                if len(waiting) >= 2 * config.threads:
                    yield _read(*waiting.popleft(), columns)
            while waiting:
                yield _read(*waiting.popleft(), columns)


def _read(row: dict[str, Any], answer: Future[bytes], columns: ImageColumns) -> Raw | Dropped:
    kept_columns = json.loads(row["row"])
    try:
        data = answer.result()
    except FetchError as e:
        return Dropped(row["id"], e.reason, f"{row['url'][:500]}: {e.detail}" if e.detail else row["url"][:500])
    caption, label = kept_columns.get(columns.caption), kept_columns.get(columns.label) if columns.label else None
    kept = {**columns.kept(kept_columns), "url": row["url"]} if "url" in columns.others else columns.kept(kept_columns)
    return Raw(row["id"], data, caption if isinstance(caption, str) else None, "" if label is None else str(label), kept)
