"""Listing an input on S3: many folders at a time (`Location.tree`) beside one stream (`Location.files`).

    PYTHONPATH=. python tests/benchmarks/listing.py [--objects 20000] [--folders 50] [--delay 0.05]

A store in this process (moto) behind a proxy that holds each request for `--delay` seconds, as a store some way off does. Prints
the seconds and requests of both, by turns, for objects in so many folders and for all of them in one.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from statistics import median

from heliostat.chaos.proxy import Fault, FaultProxy
from heliostat.storage import Location
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
TIMES = 3


def fill(bucket: str, objects: int, folders: int) -> None:
    """Puts empty objects into a bucket of the store, without a request."""
    store = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    store.create_bucket(bucket, "us-east-1")
    for i in range(objects):
        store.put_object(bucket, f"in/part={i % folders:04d}/{i:08d}.jsonl", b"")


def measured(proxy: FaultProxy, listing: Callable[[], int]) -> tuple[float, int, int]:
    """Returns the seconds, the requests and the number of objects of a listing."""
    before, start = proxy.requests, time.monotonic()
    found = listing()
    return time.monotonic() - start, proxy.requests - before, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--folders", type=int, nargs="+", default=[50, 1])
    parser.add_argument("--delay", type=float, default=0.05)
    given = parser.parse_args()
    os.environ.update(AWS)
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    print("| folders | objects | one stream | requests | many at a time | requests |\n|---|---|---|---|---|---|")
    with FaultProxy(f"{host}:{port}", [Fault("delay", seconds=given.delay)]) as proxy:
        for folders in given.folders:
            bucket = f"listing-{folders}"
            fill(bucket, given.objects, folders)
            place = Location(f"s3://{bucket}/in?endpoint_override={proxy.endpoint}&scheme=http")
            stream, beside = list[tuple[float, int, int]](), list[tuple[float, int, int]]()
            for _ in range(TIMES):
                stream.append(measured(proxy, lambda place=place: len(place.files())))
                beside.append(measured(proxy, lambda place=place: len(place.tree())))
            assert {found for *_, found in stream + beside} == {given.objects}
            cells = [f"{median(s for s, *_ in runs):.1f} s | {runs[0][1]}" for runs in (stream, beside)]
            print(f"| {folders} | {given.objects:,} | {cells[0]} | {cells[1]} |", flush=True)
    server.stop()


if __name__ == "__main__":
    main()
