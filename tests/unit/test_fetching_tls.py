"""Tests that fetches over TLS end in time, too."""

import socket
import time

import pytest
from heliostat.curation.web import client
from heliostat.curation.web.client import Bounds, FetchError

from tests.unit.build_tls import UNNAMED, Secure, signed
from tests.unit.test_fetching import drip, running


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with running(Secure(signed(tmp_path))) as made:
        yield made


def test_what_drips_over_tls_ends_in_time(server):
    """In the body, in the headers, and before the handshake."""
    server.pages |= {"/drip": drip, "/slow": lambda h: [h.wfile.write(b"H") and time.sleep(0.1) for _ in range(600)],
                     "/good": b"body"}  # fmt: skip
    silent = socket.create_server(("127.0.0.1", 0))
    assert client.get(server.url("/good"), Bounds(1 << 20, 5.0, private=True)) == b"body"
    for url in (server.url("/drip"), server.url("/slow"), f"https://127.0.0.1:{silent.getsockname()[1]}/"):
        start = time.monotonic()
        with pytest.raises(FetchError, match="unreachable"):
            client.get(url, Bounds(1 << 20, 0.5, private=True))
        assert time.monotonic() - start < 30
    silent.close()


def test_a_certificate_for_other_hosts_is_no_answer(server):
    server.pages["/good"] = b"body"
    with pytest.raises(FetchError, match="CERTIFICATE_VERIFY_FAILED"):
        client.get(server.url("/good", UNNAMED), Bounds(1 << 20, 5.0, private=True))
    assert server.asked == []
