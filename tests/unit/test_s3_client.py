"""Tests requests to S3 through boto3: its URIs, unusual answers and errors, and parallel listings."""

import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow.fs as pafs
import pytest
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp
from heliostat.curation.pieces import FilePart
from heliostat.curation.text import sources
from heliostat.errors import ConfigError, DataError
from heliostat.storage import s3_client
from heliostat.storage.locations import Location, diagnose
from heliostat.storage.s3_client import PAGE, THREADS, RewrittenError, Store, files_below
from urllib3.exceptions import SSLError

Seen = list[tuple[str, bool]]  # method, and whether the request was signed


@pytest.fixture
def store(monkeypatch) -> Iterator[tuple[str, Seen]]:
    """Runs a server without objects that stores none; returns the requests that it got."""
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
            """Logs nothing."""

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http", seen
        server.shutdown()


@pytest.mark.parametrize(("more", "signed"), [("", True), ("&anonymous=false", True), ("&anonymous=true", False)])
def test_anonymous_requests_are_not_signed(store, more, signed):
    """By pyarrow's client, and by boto3's, which reads credentials from files even without keys."""
    query, seen = store
    place = Location(f"s3://bucket/key?{query}{more}")
    with pytest.raises(FileNotFoundError):
        place.read()
    assert place.create(b"x") is False
    assert {method for method, _ in seen} >= {"HEAD", "PUT"} and {by for _, by in seen} == {signed}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("anonymus=true", r"\?anonymus: unknown key of an S3 URI \(.*\)\. Did you mean 'anonymous'\?"),
        ("xyz", r"\?xyz: unknown key of an S3 URI .*\. In an object's name, write \? as %3F"),
        ("anonymous=yes", r"\?anonymous=yes: must be true or false"),
        ("endpoint_override=h:1&scheme=ftp", r"\?scheme=ftp: must be https or http"),
        ("request_payer=me", r"\?request_payer=me: must be requester"),
        ("anonymous=true&request_payer=requester", "an anonymous caller can't pay"),
    ],
)
def test_a_key_that_does_nothing_is_refused(query, message):
    with pytest.raises(ConfigError, match=message):
        Location(f"s3://bucket/key?{query}")


def test_the_environment_completes_a_query(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:1")
    assert s3_client.resolve("") == s3_client.S3Options("h:1", "http", "us-east-1", False)
    assert s3_client.resolve("region=eu-west-1&endpoint_override=i:2") == s3_client.S3Options("i:2", "https", "eu-west-1", False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@h:1")
    with pytest.raises(ConfigError, match="must not contain credentials") as e:
        s3_client.resolve("")
    assert "hunter2" not in str(e.value)


class Fake:
    """Answers for a store: with an ETag, if any, and with a status instead of a range."""

    def __init__(self, etag: str | None, size: int = 10, status: int = 0) -> None:
        self.told = {"LastModified": datetime(2026, 11, 27, tzinfo=UTC), **({"ETag": etag} if etag else {})}
        self.size, self.status = size, status

    def head_object(self, **_: Any) -> dict[str, Any]:
        return {**self.told, "ContentLength": self.size}

    def list_objects_v2(self, **_: Any) -> dict[str, Any]:
        return {"Contents": [{**self.told, "Key": "a.jsonl", "Size": self.size}]}

    def get_object(self, **_: Any) -> dict[str, Any]:
        answer = {"Error": {"Code": "InvalidRange"}, "ResponseMetadata": {"HTTPStatusCode": self.status}}
        raise ClientError(answer, "GetObject")  # type: ignore[arg-type]


@pytest.fixture
def answers(monkeypatch):
    return lambda *told: monkeypatch.setattr(s3_client, "client", lambda *store: Fake(*told))


@pytest.mark.parametrize("error", [ResponseParserError("invalid XML"), SSLError("bad record mac")])
def test_a_fault_of_the_connection_is_worth_a_retry_and_is_not_taken_for_the_files(error):
    """boto3 has no class of its own for these errors. They would leave out the rest of the file as unread."""
    with pytest.raises(ConnectionError) as e, s3_client.worded():
        raise error
    assert diagnose(e.value) == "fault"


@pytest.mark.parametrize(("etag", "known"), [('"abc-5"', "abc-5"), ('W/"abc"', ""), (None, "")])
def test_a_weak_etag_is_not_compared_as_no_conditional_read_would_match_it(answers, etag, known):
    answers(etag)
    store = Store("", 1, 1.0)
    assert store.head("b/a.jsonl").etag == known and [i.etag for i in store.listing("b", True)] == [known]


def test_a_store_that_gives_an_etag_in_listings_alone_is_read_by_it(answers):
    answers(None)
    assert sources._as_listed(Location("s3://b/a.jsonl"), FilePart("a.jsonl", 10, 0, etag="abc")) == 10
    with pytest.raises(DataError, match="had 9 bytes at the start, and has 10 bytes now"):
        sources._as_listed(Location("s3://b/a.jsonl"), FilePart("a.jsonl", 9, 0, etag="abc"))


def test_a_range_behind_the_end_of_an_object_that_became_shorter_tells_that_it_was_written_again(answers):
    answers(None, 10, 416)
    with pytest.raises(RewrittenError):
        Store("", 1, 1.0).read("b/a.jsonl", 20, 30, "abc")
    with pytest.raises(OSError, match="InvalidRange"):
        Store("", 1, 1.0).read("b/a.jsonl", 20, 30)


def test_the_time_of_a_listed_object_is_parsed_without_a_parser_of_any_format(monkeypatch):
    """A general parser takes 60 of the 90 ms that a page of 1,000 names costs."""
    told = ["2026-11-27T10:00:03.120Z", "Fri, 27 Nov 2026 10:00:03 GMT", "2026-11-27T10:00:03", 1795773603]
    assert [s3_client._time(one) for one in told] == [parse_timestamp(one) for one in told]
    monkeypatch.setattr("botocore.utils.parse_timestamp", lambda told: pytest.fail("slow"))
    assert s3_client._time(told[0]) == datetime(2026, 11, 27, 10, 0, 3, 120_000, UTC)
    parsers = s3_client.client("anonymous=true", 1, 1.0)._endpoint._response_parser_factory
    assert parsers.create_parser("rest-xml")._timestamp_parser is s3_client._time


class PagedStore:
    """Provides an object store that counts the pages of each listing, with a thousand names per page."""

    def __init__(self, keys: set[str]) -> None:
        self.keys, self.pages, self.longest = sorted(keys), 0, 0

    def listed(self, path: str, recursive: bool) -> list[pafs.FileInfo]:
        below = [key for key in self.keys if key.startswith(f"{path}/")]
        if not recursive:
            names = {key[len(path) + 1 :].partition("/") for key in below}
            folders = {f"{path}/{name}" for name, mark, _ in names if mark}
            below = [f"{path}/{name}" for name, mark, _ in names if not mark]
            infos = [pafs.FileInfo(folder, pafs.FileType.Directory) for folder in folders]
        else:
            infos = []
        pages = max(1, -(-(len(below) + len(infos)) // PAGE))
        self.pages, self.longest = self.pages + pages, max(self.longest, pages)
        return infos + [pafs.FileInfo(key, pafs.FileType.File) for key in below]


def listed(keys: set[str]) -> tuple[list[str], PagedStore]:
    store = PagedStore(keys)
    return [i.path for i in files_below("b", store.listed)], store


@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_one_stream(seed, monkeypatch):
    """For any shape and any method. Pages are small, so that all methods run."""
    monkeypatch.setattr(s3_client, "PAGE", 5)
    rng = random.Random(seed)
    names = [str(n) for n in range(rng.choice([1, 3, 30, 200]))]
    keys = {"/".join(["b", *(rng.choice(names) for _ in range(rng.randrange(1, 7))), f"f{i}"]) for i in range(400)}
    assert listed(keys)[0] == sorted(keys)


def test_names_that_are_empty_are_found_too():
    keys = {"b//x", "b/a//y", "b/a/z"}
    assert listed(keys)[0] == sorted(keys)
    assert listed(set())[0] == []


def test_large_folders_are_listed_beside_one_another_and_small_ones_in_one_stream():
    large = {f"b/{folder:03d}/{i}" for folder in range(100) for i in range(400)}
    found, store = listed(large)
    assert found == sorted(large) and store.longest == 1 and store.pages == 1 + 100, "one page a folder"
    small = {f"b/{folder:04d}/x" for folder in range(3000)}
    found, store = listed(small)
    assert found == sorted(small) and store.pages == 3 + THREADS + 3, "a request a folder would be a thousand times as many"
    deep = {f"b/year={y}/month={m}/{i}" for y in range(4) for m in range(12) for i in range(900)}
    found, store = listed(deep)
    assert found == sorted(deep) and store.longest == 1 and store.pages <= 1 + 4 + 48 + 48
