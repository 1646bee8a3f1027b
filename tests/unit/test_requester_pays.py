"""Tests that requester-pays buckets are read like others, that every request accepts the cost, and that nothing is written to
them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.errors import AccessError
from heliostat.storage.locations import Location

KEYS = {f"in/{folder}/{i:04d}.txt": f"{folder}{i}".encode() for folder in "abc" for i in range(700)}
SINK = pa.BufferOutputStream()
pq.write_table(pa.table({"n": list(range(1000))}), SINK, row_group_size=100)
OBJECTS = KEYS | {"t.parquet": SINK.getvalue().to_pybytes(), "odd name+%#.txt": b"odd"}
PAGE = 500


class Bucket(BaseHTTPRequestHandler):
    """Answers for a bucket; rejects requests that don't accept the cost."""

    refused: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(False)

    def do_PUT(self) -> None:
        self.answer(500, b"", {})

    def do_GET(self, body: bool = True) -> None:
        parts = urlsplit(self.path)
        key, query = unquote(parts.path).removeprefix("/pays").lstrip("/"), {k: v[0] for k, v in parse_qs(parts.query).items()}
        if (key or query) and self.headers.get("x-amz-request-payer") != "requester":
            self.refused.append(self.path)
            self.answer(403, b"", {})
        elif "list-type" in query:
            self.answer(200, self.listing(query), {})
        elif key and key not in OBJECTS:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>" * body, {})
        else:
            data, status = OBJECTS.get(key, b""), 200
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                data, status = data[int(first) : int(last) + 1], 206
            self.answer(status, data, {"Last-Modified": "Fri, 27 Nov 2026 10:00:00 GMT"}, body)

    def listing(self, query: dict[str, str]) -> bytes:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        names = sorted(k for k in OBJECTS if k.startswith(prefix))
        if "delimiter" in query:
            names = sorted({prefix + k[len(prefix) :].partition("/")[0] + "/" * ("/" in k[len(prefix) :]) for k in names})
        names = [n for n in names if n > after]
        most = min(PAGE, int(query.get("max-keys", PAGE)))
        more = f"<NextContinuationToken>{names[most - 1]}</NextContinuationToken>" if len(names) > most else ""
        found = "".join(
            f"<CommonPrefixes><Prefix>{n}</Prefix></CommonPrefixes>" if n.endswith("/") else
            f"<Contents><Key>{n}</Key><Size>{len(OBJECTS[n])}</Size><LastModified>2026-11-27T10:00:00Z</LastModified></Contents>"
            for n in names[:most]
        )  # fmt: skip
        return (f"<ListBucketResult><KeyCount>{len(names[:most])}</KeyCount><IsTruncated>{'true' if more else 'false'}"
                f"</IsTruncated>{more}{found}</ListBucketResult>").encode()  # fmt: skip

    def answer(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if body else b"")

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.fixture
def place(monkeypatch) -> Iterator[Location]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HELIOSTAT_RETRY_BUDGET_S", "1")
    monkeypatch.setattr(Bucket, "refused", [], raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http"
        yield Location(f"s3://pays?{at}&request_payer=requester")
        server.shutdown()


def test_files_are_read_and_listed(place, monkeypatch):
    monkeypatch.setenv(
        "HELIOSTAT_RETRY_BUDGET_S", "20"
    )  # nothing here is refused again and again; a busy machine may take a second
    place.probe()
    assert place.join("in/a/0007.txt").read() == b"a7" and place.join("in/a/0007.txt").read(1) == b"a"
    assert place.join("odd name+%#.txt").read() == b"odd"
    assert [f"in/{path}" for path, _ in place.join("in").files()] == sorted(KEYS)
    assert [i.path for i in place.join("in").tree()] == [f"pays/{key}" for key in sorted(KEYS)]
    assert place.join("in").folders() == ["a", "b", "c"] and place.join("in").exists() and not place.join("inn").exists()
    assert place.join("none").files() == []
    with place.join("t.parquet").open() as source:
        assert pq.ParquetFile(source).read_row_group(7)["n"].to_pylist() == list(range(700, 800))
    with pytest.raises(FileNotFoundError):
        place.join("in/a/none.txt").read()
    assert Bucket.refused == []
    with pytest.raises(AccessError, match="access denied"):
        Location(place.uri.replace("&request_payer=requester", "")).join("in/a/0007.txt").read()
    assert Bucket.refused


@pytest.mark.parametrize("write", [lambda p: p.write(b"x"), lambda p: p.create(b"x"), lambda p: p.delete()],
                         ids=["write", "create", "delete"])  # fmt: skip
def test_nothing_is_written(place, write):
    with pytest.raises(AccessError, match="a requester-pays bucket is read-only"):
        write(place.join("in/a/0007.txt"))
