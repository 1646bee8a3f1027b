"""Tests fetching images from lists of URLs, with a server on loopback: limits, addresses, robots.txt, rate, retries, and
resuming."""

import contextlib
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import reasons
from heliostat.curation.web import client, lists
from heliostat.curation.web.client import Bounds, FetchError
from heliostat.curation.web.polite import Fetcher
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location

from tests.unit.build_clock import Clock
from tests.unit.build_curation import KilledError
from tests.unit.build_images import Here, image, prepared

HERE = Bounds(1 << 20, 5.0, private=True)


class Server(ThreadingHTTPServer):
    """Serves a test's answers: by path, a body or a function that answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Any] = {}
        self.asked: list[tuple[str, float]] = []
        self.agents: set[str | None] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors, because clients close their connections."""

    def url(self, path: str, host: str = "localhost") -> str:
        return f"http://{host}:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append((path, time.monotonic()))
        self.server.agents.add(self.headers["User-Agent"])
        page = self.server.pages.get(path)
        if callable(page):
            page(self)
        elif page is None:
            self.send_error(404)
        else:
            self.answer(page)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server():
    with running(Server()) as made:
        yield made


def fault(url: str, bounds: Bounds = HERE) -> FetchError:
    with pytest.raises(FetchError) as e:
        client.get(url, bounds)
    return e.value


def drip(handler: Handler) -> None:
    """Answers one byte at a time, for a minute."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1200):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def test_a_body_is_got_within_its_bounds(server):
    server.pages |= {
        "/good": b"body", "/a%20b": b"quoted", "/hop": lambda h: h.answer(b"", 302, Location="/good?x=1"),
        "/loop": lambda h: h.answer(b"", 301, Location="/loop"), "/lies": lambda h: h.answer(b"short", Content_Length="9"),
        "/chunks": lambda h: h.answer(b"4\r\nbody\r\n0\r\n\r\n", Transfer_Encoding="chunked"), "/drip": drip,
        "/huge": lambda h: h.answer(b"x" * 100, Content_Length=str(1 << 40)), "/more": lambda h: h.answer(b"x" * 2000),
        "/out": lambda h: h.answer(b"", 302, Location="file:///etc/passwd"),
        "/broken": lambda h: h.answer(b"", 302, Location="http://[x"),
    }  # fmt: skip
    assert client.get(server.url("/good"), HERE) == client.get(server.url("/hop"), HERE) == b"body"
    assert client.get(server.url("/a b"), HERE) == client.get(server.url("/a%20b"), HERE) == b"quoted"
    assert fault(server.url("/none")).reason == "refused" and not fault(server.url("/none")).again
    assert fault(server.url("/loop")).detail == "more than 5 redirects"
    assert fault(server.url("/lies")).reason == "unreachable" and fault(server.url("/lies")).again
    assert fault(server.url("/huge")).reason == "too_large"
    assert fault(server.url("/more"), Bounds(1000, 5.0, True)).reason == "too_large"
    assert fault(server.url("/out")).reason == fault(server.url("/broken")).reason == "bad_url"
    start = time.monotonic()
    assert fault(server.url("/drip"), Bounds(1 << 20, 0.5, True)).reason == "unreachable"
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("url", ["", "x", "ftp://a/b", "http://", "http://user:secret@a/", "http://[::1", "http://a:99999/",
                                 "http://localhost\0x/", "http://a/\ud800", "http://\ud800/"])  # fmt: skip
def test_what_is_no_url_of_the_web_is_not_asked(url):
    assert fault(url).reason == "bad_url"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.9.9", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_known(address):
    assert not client.public(address)
    assert all(client.public(a) for a in ("8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"))


def test_a_private_address_is_not_asked_by_any_way(server):
    """By its number, by a name, in another spelling, or by a redirect: the server receives no request."""
    port = server.server_address[1]
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1"):
        found = fault(f"http://{host}:{port}/", Bounds(1000, 5.0))
        assert found.reason in ("private_address", "unreachable") and (host != "127.0.0.1" or found.reason == "private_address")
    assert server.asked == []


def test_robots_txt_is_followed_and_asked_once(server):
    server.pages |= {"/robots.txt": b"User-agent: heliostat\nDisallow: /private\n\nUser-agent: *\nDisallow: /\n",
                     "/open": b"1", "/private/x": b"2"}  # fmt: skip
    fetch = Fetcher(HERE, 0.0, 0, True)
    assert fetch(server.url("/open")) == fetch(server.url("/open")) == b"1"
    with pytest.raises(FetchError, match="robots"):
        fetch(server.url("/private/x"))
    with pytest.raises(FetchError, match="robots"):
        Fetcher(Bounds(1000, 5.0, True, "other"), 0.0, 0, True)(server.url("/open"))
    assert Fetcher(HERE, 0.0, 0, False)(server.url("/private/x")) == b"2"
    assert [path for path, _ in server.asked] == ["/robots.txt", "/open", "/open", "/robots.txt", "/private/x"]
    assert server.agents == {"heliostat", "other"}


def test_a_robots_txt_that_cannot_be_had_closes_the_host_and_a_missing_one_does_not(server):
    server.pages |= {"/robots.txt": lambda h: h.answer(b"", 503), "/open": b"1"}
    with pytest.raises(FetchError, match="robots"):
        Fetcher(HERE, 0.0, 0, True)(server.url("/open"))
    del server.pages["/robots.txt"]
    assert Fetcher(HERE, 0.0, 0, True)(server.url("/open")) == b"1"
    server.pages["/robots.txt"] = b"User-agent: *\nCrawl-delay: 900\n"
    with pytest.raises(FetchError, match="asks for 900 s between requests"):
        Fetcher(HERE, 0.0, 0, True)(server.url("/open"))


@pytest.mark.parametrize(("delay", "pause"), [("1.5", 2.0), ("3", 3.0), ("0", 0.5), (".1", 1.0)])
def test_a_host_is_asked_no_faster_than_it_wants(server, delay, pause):
    """Several threads take turns. A longer `Crawl-delay` counts, rounded up to seconds."""
    server.pages |= {"/robots.txt": f"User-agent: *\nCrawl-delay: {delay}\n".encode()} | {f"/{i}": b"x" for i in range(5)}
    slept = list[float]()
    fetch = Fetcher(HERE, 0.5, 0, True, slept.append, lambda: 0.0)
    threads = [threading.Thread(target=fetch, args=(server.url(f"/{i}"),)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == [pause * turn for turn in range(1, 6)]
    assert sum(path != "/robots.txt" for path, _ in server.asked) == 5


@pytest.mark.parametrize(
    "text", ["Crawl-delay: ²", "Crawl-delay: " + "9" * 5000, "Crawl-delay: " + "9" * 400 + ".5", "\n" * 200_000]
)
def test_a_robots_txt_with_nonsense_in_it_stops_nothing(server, text):
    server.pages |= {"/robots.txt": f"User-agent: *\n{text}\n".encode(), "/open": b"1"}
    fetch, start = Fetcher(HERE, 0.0, 0, True), time.process_time()
    if "9" in text:
        with pytest.raises(FetchError, match=r"asks for 1e\+09 s between requests"):
            fetch(server.url("/open"))
    else:
        assert fetch(server.url("/open")) == b"1"
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("of", "delay", "pause"), [(1, 3, 3.0), (5, 3, 15.0), (5, 0, 2.5), (5, 60, 300.0)])
def test_tasks_share_the_delay_that_a_host_asks_for(server, of, delay, pause):
    server.pages |= {"/robots.txt": f"User-agent: *\nCrawl-delay: {delay}\n".encode(), "/x": b"x"}
    clock = Clock()
    fetch = Fetcher(HERE, 0.5, 0, True, clock.sleep, clock, of)
    assert [fetch(server.url("/x")) for _ in range(3)] == [b"x"] * 3 and clock.slept == [pause] * 3


def test_a_host_that_no_other_task_fetches_from_has_its_full_rate(server):
    """Also after robots.txt. A redirect to any other host counts as shared, because other tasks may have such redirects."""
    server.pages |= {"/robots.txt": b"User-agent: *\nCrawl-delay: 3\n", "/x": b"x",
                     "/far": lambda h: h.answer(b"", 302, Location=server.url("/x", "127.0.0.1"))}  # fmt: skip
    clock = Clock()
    fetch = Fetcher(HERE, 0.5, 0, True, clock.sleep, clock, of=5)
    fetch.alone.add("localhost")
    assert [fetch(server.url("/x")) for _ in range(2)] == [b"x"] * 2 and clock.slept == [3.0] * 2
    assert fetch(server.url("/far")) == b"x" and clock.slept[2:] == [3.0, 15.0]


def test_a_redirect_is_followed_as_politely_as_a_url(server):
    """It waits for its host's turn, on any port, and has its own robots.txt: rules belong to an origin, the rate to a host."""
    with running(Server()) as other:
        other.pages |= {"/robots.txt": b"User-agent: *\nDisallow: /no\nCrawl-delay: 7\n", "/yes": b"1", "/no": b"2"}
        server.pages |= {"/0": lambda h: h.answer(b"", 302, Location=other.url("/yes")), "/no": b"3",
                         "/1": lambda h: h.answer(b"", 302, Location=other.url("/no")),
                         "/far": lambda h: h.answer(b"", 302, Location=other.url("/yes", "127.0.0.1"))}  # fmt: skip
        clock = Clock()
        fetch = Fetcher(HERE, 2.0, 0, True, clock.sleep, clock)
        assert fetch(server.url("/0")) == b"1"
        assert clock.slept == [2.0, 2.0, 7.0], "robots.txt, the URL, the other robots.txt, what the redirect leads to"
        with pytest.raises(FetchError, match=r"robots\.txt of localhost does not allow it"):
            fetch(server.url("/1"))
        assert fetch(server.url("/no")) == b"3", "its own robots.txt, of another port, says nothing"
        assert [path for path, _ in other.asked] == ["/robots.txt", "/yes"]
        assert clock.slept[3:] == [7.0, 7.0]
        assert fetch(server.url("/far")) == b"1" and clock.slept[5:] == [7.0, 7.0], "another host's turn: robots.txt at once"
        other.pages["/away"] = lambda h: h.answer(b"", 302, Location="http://[x")
        with pytest.raises(FetchError, match="bad_url"):
            fetch(other.url("/away"))


def test_the_host_that_a_redirect_leads_to_has_the_rest_that_it_asks_for(server):
    tries = itertools.count()

    def busy(handler: Handler) -> None:
        first = next(tries) == 0
        handler.answer(b"" if first else b"1", 503 if first else 200, Retry_After="7")

    server.pages |= {"/hop": lambda h: h.answer(b"", 302, Location=server.url("/busy", "127.0.0.1")), "/busy": busy}
    clock = Clock()
    assert Fetcher(HERE, 1.0, 1, False, clock.sleep, clock)(server.url("/hop")) == b"1" and clock.slept == [1.0, 6.0]


def test_a_robots_txt_may_lie_elsewhere_and_hosts_that_point_to_each_other_end(server):
    with running(Server()) as other:
        server.pages |= {"/robots.txt": lambda h: h.answer(b"", 301, Location=other.url("/robots.txt")), "/x": b"1"}
        other.pages |= {"/robots.txt": b"User-agent: *\nDisallow: /private\n", "/x": b"2"}
        fetch = Fetcher(HERE, 0.0, 0, True)
        assert fetch(server.url("/x")) == b"1"
        with pytest.raises(FetchError, match="does not allow it"):
            fetch(server.url("/private"))
        other.pages["/robots.txt"] = lambda h: h.answer(b"", 301, Location=server.url("/robots.txt"))
        fetch = Fetcher(HERE, 0.0, 0, True)
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(fetch, place.url("/x")) for place in (server, other)]
            assert [f.result(30) for f in found] == [b"1", b"2"], "redirects without end are no robots.txt (RFC 9309)"


def test_waiting_for_a_turn_takes_nothing_of_a_requests_seconds(server):
    server.pages |= {"/hop": lambda h: h.answer(b"", 302, Location="/x"), "/x": b"1"}
    assert Fetcher(Bounds(1000, 1.0, True), 1.2, 0, False)(server.url("/hop")) == b"1"


def test_a_host_of_ipv6_has_a_robots_txt():
    with pytest.raises(FetchError, match="::1 is at ::1"):
        Fetcher(Bounds(1000, 5.0), 0.0, 0, True)("http://[::1]:9/x")


def test_what_is_not_there_just_now_is_asked_for_again(server):
    tries = Counter[str]()

    def busy(handler: Handler) -> None:
        tries["busy"] += 1
        handler.answer(b"late" if tries["busy"] == 3 else b"", 200 if tries["busy"] == 3 else 503, Retry_After="7")

    server.pages |= {"/busy": busy, "/later": lambda h: h.answer(b"", 429, Retry_After="9999")}
    clock = Clock()
    fetch = Fetcher(HERE, 0.5, 2, False, clock.sleep, clock)
    assert fetch(server.url("/busy")) == b"late" and len(clock.slept) == 2 and min(clock.slept) >= 6.9
    with pytest.raises(FetchError, match="HTTP 429"):
        fetch(server.url("/later"))
    assert [path for path, _ in server.asked].count("/later") == 1


def make_lists(folder: Path, server: Server, count: int) -> list[dict[str, Any]]:
    """Writes a list of each kind. Some of its URLs have images, and some have none."""
    folder.mkdir()
    rows = []
    for i in range(count):
        server.pages[f"/{i}.png"] = image(20, 20, seed=i)
        rows.append({"url": server.url(f"/{i}.png"), "caption": f"image number {i}", "license": "CC0"})
    rows += [{"url": server.url("/gone"), "caption": "gone"}, {"url": "nonsense", "caption": "x"}, {"url": None, "caption": "y"}]
    third = len(rows) // 3
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:third])))
    pq.write_table(pa.Table.from_pylist(rows[third : 2 * third]), folder / "b.parquet")
    lines = [f"{row['url'] or ''},{row['caption']},{row.get('license', '')}" for row in rows[2 * third :]]
    (folder / "c.csv").write_text("\n".join(["url,caption,license", *lines]))
    return rows


def keys(folder: Path, output: str = "out", **more: Any) -> dict[str, Any]:
    return {"name": "x", "input": str(folder / "in"), "output": str(folder / output), "resolution": 16,
            "columns": {"others": ["url", "license"]}, "stages": [{"stage": "length", "min_chars": 1}],
            "fetch": {"per_second": 1000, "private": True}, **more}  # fmt: skip


def test_images_of_a_list_are_fetched_once_and_told_of(tmp_path, server, monkeypatch):
    """After a kill, the run doesn't repeat requests of finished tasks. Missing images are reported with their URLs."""
    monkeypatch.setattr(lists, "URLS", 7)
    rows = make_lists(tmp_path / "in", server, 40)
    killed = 0
    for most in (6, 8, 100):
        try:
            made, flow = prepared(keys(tmp_path), most=most, again=0.0)
        except KilledError:
            killed += 1
    asked = Counter(path for path, _ in server.asked)
    assert killed == 2 and made.rows == 40 and flow.kept["read"] >= 4
    assert sum(n - 1 for path, n in asked.items() if path.endswith(".png")) <= killed * 7
    assert made.meta["dropped"] == {"bad_url": 2, "refused": 1}
    ends = {row["id"]: row for table in reasons.ends(made) for row in table.to_pylist()}
    assert len(ends) == len(rows)
    gone = next(row for row in ends.values() if row["reason"] == "refused")
    assert gone["detail"] == f"{server.url('/gone')}: HTTP 404"
    kept = next(row for row in ends.values() if row["reason"] == "kept")
    assert json.loads(kept["columns"])["license"] == "CC0" and json.loads(kept["columns"])["url"].endswith(".png")
    assert prepared(keys(tmp_path, "again"), seed=5)[0].digest == made.digest


def test_a_url_that_no_file_can_hold_is_told_with_its_line(tmp_path, server):
    server.pages["/1.png"] = image(20, 20, seed=1)
    (tmp_path / "in").mkdir()
    rows = [{"url": server.url("/1.png"), "caption": "one"}, {"url": "http://a/\ud800", "caption": "two"},
            {"url": "http://\ud800/", "caption": "three"}]  # fmt: skip
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made, _ = prepared(keys(tmp_path))
    assert made.rows == 1 and made.meta["dropped"] == {"bad_url": 2}
    told = {row["id"]: row["detail"] for table in reasons.ends(made) for row in table.to_pylist() if row["reason"] == "bad_url"}
    assert set(told) == {"a.jsonl#2", "a.jsonl#3"} and r"half a surrogate pair: http://a/\ud800" in told["a.jsonl#2"]


def test_a_list_that_cannot_be_read_or_has_no_urls_is_one_error(tmp_path, server):
    make_lists(tmp_path / "in", server, 4)
    with pytest.raises(ConfigError, match=r"no column 'link' of URLs\. Set fetch\.column .*\. The row's columns: "):
        prepared(keys(tmp_path, fetch={"column": "link"}))
    (tmp_path / "in" / "a.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"input: a\.jsonl: can't read this file"):
        prepared(keys(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"the folder is empty\. fetch reads lists of URLs"):
        Here.model_validate(keys(tmp_path) | {"input": str(tmp_path / "none")}).inputs()


def test_private_addresses_are_refused_unless_they_are_allowed(tmp_path, server):
    make_lists(tmp_path / "in", server, 3)
    with pytest.raises(DataError, match=r"nothing is left; dropped: \{'bad_url': 2, 'private_address': 4\}"):
        prepared(keys(tmp_path, fetch={"per_second": 1000}))
    assert server.asked == []


def test_a_dry_run_fetches_a_share_of_the_urls(tmp_path, server, monkeypatch):
    """It reads some complete lists, and predicts the images and the hours of the whole input from a share of the URLs."""
    monkeypatch.setattr(lists, "URLS", 7)
    make_lists(tmp_path / "in", server, 90)
    pipeline = Here.model_validate(keys(tmp_path))
    found = pipeline.predict(Location(str(tmp_path / "trial")), pipeline.inputs(), 0.4)
    asked = {path for path, _ in server.asked if path.endswith(".png")}
    assert 20 <= len(asked) <= 55 and found["documents"] == pytest.approx(90, rel=0.4)
    assert found["sample"]["read_bytes"] == pytest.approx(0.4 * found["input"]["bytes"], rel=0.05)
    spent = sum(json.loads(record.read_text())["seconds"] for record in (tmp_path / "trial/work/done/lists").iterdir())
    assert pipeline._made.seconds["lists"] == pytest.approx(0.4 * spent, rel=0.05, abs=1e-3), "complete lists were read"
