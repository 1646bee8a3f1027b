"""Listing an input on S3: many folders at a time (`Location.tree`) beside one stream (`Location.files`).

    PYTHONPATH=. python tests/benchmarks/listing.py [--objects 200000] [--folders 200 1] [--delay 0.05]

The store is a process of this machine that only lists, a thousand names an answer, and takes `--delay` seconds for each, as a
store some way off does (moto's takes seconds for ten thousand objects). Prints seconds and requests of both ways, by turns, for
objects in so many folders.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from statistics import median
from urllib.parse import parse_qs, urlsplit

from heliostat.storage import Location

AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
PAGE, TIMES, END = 1000, 3, "\U0010ffff"


def serve(objects: int, folders: int, delay: float, told: Connection) -> None:
    """Serves listings of a bucket until it is ended; tells its port, and, whenever it is asked, how many requests it had."""
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
            """Says nothing."""

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


def measured(told: Connection, listing: Callable[[], int]) -> tuple[float, int, int]:
    """Returns the seconds, the requests and the number of objects of a listing."""
    told.send(True)
    before, start = told.recv(), time.monotonic()
    found = listing()
    seconds = time.monotonic() - start
    told.send(True)
    return seconds, told.recv() - before, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=200_000)
    parser.add_argument("--folders", type=int, nargs="+", default=[200, 20, 1])
    parser.add_argument("--delay", type=float, default=0.05)
    given = parser.parse_args()
    os.environ.update(AWS)
    print("| folders | objects | one stream | requests | many at a time | requests |\n|---|---|---|---|---|---|")
    for folders in given.folders:
        told, theirs = multiprocessing.Pipe()
        store = multiprocessing.Process(target=serve, args=(given.objects, folders, given.delay, theirs), daemon=True)
        store.start()
        place = Location(f"s3://bucket/in?endpoint_override=127.0.0.1:{told.recv()}&scheme=http")
        stream, beside = list[tuple[float, int, int]](), list[tuple[float, int, int]]()
        for _ in range(TIMES):
            stream.append(measured(told, lambda place=place: len(place.files())))
            beside.append(measured(told, lambda place=place: len(place.tree())))
        assert {found for *_, found in stream + beside} == {given.objects}, (stream, beside)
        cells = [f"{median(s for s, *_ in runs):.1f} s | {runs[0][1]:,}" for runs in (stream, beside)]
        print(f"| {folders} | {given.objects:,} | {cells[0]} | {cells[1]} |", flush=True)
        told.send(False)
        store.join()


if __name__ == "__main__":
    main()
