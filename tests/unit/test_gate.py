"""Tests access to MLflow's server: clients with a key, and the server's pages in a browser that has presented one."""

import hashlib

import pytest
from heliostat.web.gate import Gate
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

KEY = "sk-a-key-of-the-tests"


@pytest.fixture
def browser():
    gate = Gate(PlainTextResponse("in"), {"a": hashlib.sha256(KEY.encode()).hexdigest()}, "127.0.0.1")
    return TestClient(gate, base_url="http://127.0.0.1:5000")


def cookie(browser) -> str:
    entered = browser.post("/heliostat-key", content=KEY)
    assert entered.status_code == 204
    browser.cookies.clear()
    return entered.headers["set-cookie"].partition(";")[0]


@pytest.mark.parametrize("other", ['theme={"dark":true}', "a b=c", "x=1; y", "=v", 'q="open', ""])
def test_cookies_of_other_servers_of_this_host_do_not_lock_a_browser_out(browser, other):
    ours = cookie(browser)
    for sent in (f"{ours}; {other}", f"{other}; {ours}"):
        assert browser.get("/", headers={"cookie": sent}).text == "in"


def test_a_cookie_is_of_no_use_to_pages_of_other_origins_and_a_wrong_one_of_none(browser):
    ours = cookie(browser)
    for headers in ({"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "http://127.0.0.1:5001"},
                    {"origin": "null"}, {"host": "evil.example.com"}):  # fmt: skip
        assert browser.post("/", headers={"cookie": ours, **headers}).status_code in (401, 403)
    assert browser.get("/", headers={"cookie": f"{ours}x"}).status_code == 401


@pytest.mark.parametrize(
    "path", ["//health", "/health/", "/healthy", "/%68ealth/x", "/health/../api", "/health%2f..%2fapi", "/version"]
)
def test_only_the_health_of_the_server_is_told_without_a_key(browser, path):
    assert browser.get("/health").text == "in"
    assert browser.get(path).status_code == 401
    for method in ("HEAD", "OPTIONS", "POST", "DELETE"):
        assert browser.request(method, "/health").status_code == 401
