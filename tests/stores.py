"""Runs an S3 server in this process, and creates its buckets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """Yields the server's HOST:PORT.

    It answers one request after another: for a conditional put, moto's threads check and write in two steps, where S3 needs one.
    """
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]: pip install heliostat[s3-test]")
    from werkzeug.serving import make_server

    app, one = server_module.DomainDispatcherApplication(server_module.create_backend_app), threading.Lock()

    def in_turn(environment, start_response):
        with one:
            return app(environment, start_response)

    server = make_server("127.0.0.1", 0, in_turn, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def bucket(endpoint: str, name: str) -> str:
    """Creates a bucket; returns the part after `?` in addresses of its objects."""
    import boto3

    boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1").create_bucket(Bucket=name)
    return f"endpoint_override={endpoint}&scheme=http"
