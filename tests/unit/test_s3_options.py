"""What the query of an S3 URI says of a store is checked, and reaches both clients."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from heliostat.errors import ConfigError
from heliostat.storage import s3_options
from heliostat.storage.locations import Location

Seen = list[tuple[str, bool]]  # method, and whether the request was signed


@pytest.fixture
def store(monkeypatch) -> Iterator[tuple[str, Seen]]:
    """A server that has no object and takes none, and what it was asked."""
    seen: Seen = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            seen.append((self.command, "Authorization" in self.headers))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(412 if self.command == "PUT" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = answer

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http", seen
        server.shutdown()


@pytest.mark.parametrize(("more", "signed"), [("", True), ("&anonymous=false", True), ("&anonymous=true", False)])
def test_anonymous_requests_are_not_signed(store, more, signed):
    """By pyarrow's client, and by boto3's, which puts files where none is."""
    query, seen = store
    place = Location(f"s3://bucket/key?{query}{more}")
    with pytest.raises(FileNotFoundError):
        place.read()
    assert place.create(b"x") is False
    assert {method for method, _ in seen} >= {"HEAD", "PUT"} and {by for _, by in seen} == {signed}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("anonymus=true", r"\?anonymus: is no key of an S3 URI \(.*\), did you mean 'anonymous'\?"),
        ("xyz", r"\?xyz: is no key of an S3 URI .*; in an object's name write \? as %3F"),
        ("anonymous=yes", r"\?anonymous=yes: must be true or false"),
        ("endpoint_override=h:1&scheme=ftp", r"\?scheme=ftp: must be https or http"),
        ("request_payer=me", r"\?request_payer=me: must be requester"),
        ("anonymous=true&request_payer=requester", "nobody knows who is to pay"),
    ],
)
def test_a_key_that_does_nothing_is_refused(query, message):
    with pytest.raises(ConfigError, match=message):
        Location(f"s3://bucket/key?{query}")


def test_the_environment_completes_a_query(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:1")
    assert s3_options.resolve("") == s3_options.S3Options("h:1", "http", "us-east-1", False)
    assert s3_options.resolve("region=eu-west-1&endpoint_override=i:2") == s3_options.S3Options(
        "i:2", "https", "eu-west-1", False
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@h:1")
    with pytest.raises(ConfigError, match="must not carry credentials") as e:
        s3_options.resolve("")
    assert "hunter2" not in str(e.value)
