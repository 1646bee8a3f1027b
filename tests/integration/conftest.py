"""What the integration tests share: one Ray for the session, and an S3 server in this process."""

import os
from collections.abc import Iterator

import pytest

# before Ray starts: its workers inherit them
os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testing")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray of eight logical CPUs, started once."""
    import ray
    from heliostat.cluster.connect import connect

    connect(cpus=8)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """HOST:PORT of an embedded S3 server, for `?endpoint_override=HOST:PORT&scheme=http`."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]: pip install heliostat[s3-test]")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()
