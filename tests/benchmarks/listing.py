"""Measures listing an input on S3: many folders at a time (`Location.tree`) against one stream (`Location.files`).

    python -m tests.benchmarks.listing [--objects 200000] [--folders 200 1] [--delay 0.05] [--times 3]

The store is a process of this machine that only lists, a thousand names per answer. It takes `--delay` seconds for each, like a
distant store (moto takes seconds for ten thousand objects). Each listing is a separate process. Prints of both ways, interleaved,
for objects in so many folders: seconds, requests, CPU seconds of the lister, and the peak of its additional memory.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from bisect import bisect_left, bisect_right
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from statistics import median
from urllib.parse import parse_qs, urlsplit

from heliostat.storage.locations import Location

from tests import stores
from tests.benchmarks import harness

PAGE, END = 1000, "\U0010ffff"


def serve(objects: int, folders: int, delay: float, told: Connection) -> None:
    """Serves listings of a bucket until it is ended; prints its port, and the number of its requests whenever it is asked."""
    keys, requests = sorted(f"in/part={i % folders:05d}/{i:08d}.jsonl" for i in range(objects)), [0]

    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests[0] += 1
            time.sleep(delay)
            query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
            data = page(keys, query.get("prefix", ""), query.get("delimiter"), query.get("continuation-token", ""))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    told.send(server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while told.recv():
        told.send(requests[0])


def page(keys: list[str], prefix: str, delimiter: str | None, after: str) -> bytes:
    """Writes an answer to ListObjectsV2."""
    at, end, found = max(bisect_left(keys, prefix), bisect_right(keys, after)), bisect_right(keys, prefix + END), list[str]()
    last = ""
    while at < end and len(found) < PAGE:
        rest = keys[at][len(prefix) :]
        if delimiter and delimiter in rest:
            folder = prefix + rest.partition(delimiter)[0] + delimiter
            found.append(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>")
            at, last = bisect_right(keys, folder + END), folder + END
        else:
            found.append(
                f"<Contents><Key>{keys[at]}</Key><Size>1</Size><LastModified>2026-11-27T10:00:00Z</LastModified></Contents>"
            )
            at, last = at + 1, keys[at]
    more = f"<NextContinuationToken>{last}</NextContinuationToken>" if at < end else ""
    return (f"<ListBucketResult><KeyCount>{len(found)}</KeyCount><IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}"
            f"{''.join(found)}</ListBucketResult>").encode()  # fmt: skip


def lister(uri: str, way: str) -> tuple[float, float, float, int]:
    """Lists a place; returns (seconds, CPU seconds, MiB, objects)."""
    place = Location(uri)
    place.fs  # noqa: B018 - the client's own libraries are in memory before
    before, start, cpu = harness.memory("VmHWM"), time.monotonic(), time.process_time()
    listed = getattr(place, way)()
    return time.monotonic() - start, time.process_time() - cpu, harness.memory("VmHWM") - before, len(listed)


def measured(store: Connection, uri: str, way: str) -> tuple[float, float, float, int, int]:
    """Returns the seconds, CPU seconds, MiB, objects, and requests of a listing, in a separate process."""
    store.send(True)
    before = store.recv()
    found, _ = harness.apart(lister, uri, way)
    store.send(True)
    return *found, store.recv() - before


def main() -> None:
    given = harness.arguments(__doc__, objects=200_000, folders=[200, 20, 1], delay=0.05, times=3)
    os.environ.update(stores.AWS)
    of = ("requests", "CPU s", "MiB")
    harness.head("folders", "objects", "one stream", *of, "many at a time", *of)
    for folders in given.folders:
        told, theirs = multiprocessing.Pipe()
        store = multiprocessing.Process(target=serve, args=(given.objects, folders, given.delay, theirs), daemon=True)
        store.start()
        uri = f"s3://bucket/in?endpoint_override=127.0.0.1:{told.recv()}&scheme=http"
        ways = {way: lambda way=way, told=told, uri=uri: measured(told, uri, way) for way in ("files", "tree")}
        runs = harness.by_turns(ways, given.times)
        assert {run[3] for found in runs.values() for run in found} == {given.objects}, runs
        cells = [f"{median(run[0] for run in mine):.1f} s | {mine[0][4]:,} | {median(run[1] for run in mine):.1f} | "
                 f"{median(run[2] for run in mine):.0f}" for mine in runs.values()]  # fmt: skip
        harness.row(folders, f"{given.objects:,}", *cells)
        told.send(False)
        store.join()


if __name__ == "__main__":
    main()
