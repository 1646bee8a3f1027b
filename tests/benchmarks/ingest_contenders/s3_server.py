"""An S3 server in a process of its own, and the data sets copied to it. moto: quick to read from, slow to write to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from heliostat.storage.locations import Location

BUCKET = "ingest"
SERVE = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("at", ":".join(map(str, server.get_host_and_port())), flush=True)
input()
"""


@contextmanager
def serve() -> Iterator[str]:
    """HOST:PORT of the server, with the bucket made."""
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing", AWS_EC2_METADATA_DISABLED="true")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout
        endpoint = next(line.split()[1] for line in process.stdout if line.startswith("at "))
        boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        process.kill()
        process.wait()


def upload(folder: Path, endpoint: str) -> str:
    """Copies a data set's folder; its address."""
    target = f"s3://{BUCKET}/{folder.name}"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        where = f"{target}/{path.relative_to(folder)}?endpoint_override={endpoint}&scheme=http"
        Location(where).upload(path)
    return target
