"""Tests what robots.txt allows by RFC 9309, and the delay that it requests."""

import time

import pytest
from heliostat.curation.web import robots

ALL = b"User-agent: *\n"


@pytest.mark.parametrize(
    ("text", "target", "allowed"),
    [
        (b"", "/x", True),
        (b"<html>Disallow: /</html>", "/x", True),
        (ALL + b"Disallow: /", "/x", False),
        (b"\xef\xbb\xbf" + ALL + b"Disallow: /", "/x", False),
        (b"user-AGENT : * # all\rDISALLOW:/x # not this\r\n", "/x/y", False),
        (b"Disallow: /\n" + ALL, "/x", True),
        (ALL + b"Disallow:", "/x", True),
        (ALL + b"Disallow: /a", "/b/a", True),
        (ALL + b"Disallow: a", "/a", True),
        (ALL + b"Disallow: /*.jpg$", "/x.jpg", False),
        (ALL + b"Disallow: /*.jpg$", "/x.jpgx", True),
        (ALL + b"Disallow: /*.jpg$", "/x.jpg?y=1", True),
        (ALL + b"Disallow: /*.jpg$", "/.jpg", False),
        (ALL + b"Disallow: /*.jpg", "/x.jpgx", False),
        (ALL + b"Disallow: /x$", "/x", False),
        (ALL + b"Disallow: /x$", "/xx", True),
        (ALL + b"Disallow: /ab*ba$", "/aba", True),
        (ALL + b"Disallow: /ab*ba$", "/ab-ba-ba", False),
        (ALL + b"Disallow: /images/*", "/images/x", False),
        (ALL + b"Disallow: /images/*", "/images/", False),
        (ALL + b"Disallow: /images/*", "/images", True),
        (ALL + b"Disallow: *", "/x", False),
        (ALL + b"Disallow: *?*id=", "/x?a=1&id=2", False),
        (ALL + b"Disallow: /**a***b*", "/1a2b3", False),
        (ALL + b"Disallow: /**a***b*", "/1b2a3", True),
        (ALL + b"Disallow: /a$b", "/a$b", False),
        (ALL + b"Disallow: /a$b", "/a", True),
        (ALL + b"Allow: /\nDisallow: /private/", "/private/x", False),
        (ALL + b"Allow: /\nDisallow: /private/", "/x", True),
        (ALL + b"Disallow: /private/\nAllow: /private/open/", "/private/open/x", True),
        (ALL + b"Disallow: /x\nAllow: /x", "/x", True),
        (ALL + b"Disallow: /x$\nAllow: /x", "/x", False),
        (b"User-agent: ours\nDisallow: /a\n\nUser-agent: *\nDisallow: /b\n\nUser-agent: Ours/2.0\nDisallow: /c", "/a", False),
        (b"User-agent: ours\nDisallow: /a\n\nUser-agent: *\nDisallow: /b\n\nUser-agent: Ours/2.0\nDisallow: /c", "/b", True),
        (b"User-agent: ours\nDisallow: /a\n\nUser-agent: *\nDisallow: /b\n\nUser-agent: Ours/2.0\nDisallow: /c", "/c", False),
        (ALL + b"Disallow: /\nUser-agent: ours\nAllow: /\n", "/x", True),
        (ALL + b"Disallow: /\nUser-agent: ours\n", "/x", True),
        (ALL + b"Disallow: /a\n" + ALL + b"Disallow: /b\n", "/a", False),
        (ALL + b"Disallow: /a\nUser-agent: other\nDisallow: /b\n", "/b", True),
        (b"User-agent: other\n\nSitemap: x\n" + ALL + b"Disallow: /", "/x", False),
        (ALL + b"Crawl-delay: 1\nUser-agent: other\nDisallow: /", "/x", True),
        (ALL + b"Disallow: /our", "/ours", False),
        (b"User-agent: our\nDisallow: /", "/x", True),
        (ALL + b"Disallow: /a%3cd.html", "/a%3Cd.html", False),
        (ALL + b"Disallow: /a%3cd", "/a<d", False),
        (ALL + b"Disallow: /%7Ejoe/", "/~joe/x", False),
        (ALL + b"Disallow: /~joe/", "/%7ejoe/x", False),
        (ALL + b"Disallow: /a%2Fb", "/a/b", True),
        (ALL + "Disallow: /ツ".encode(), "/%e3%83%84", False),
        (ALL + b"Disallow: /\xe4", "/%E4", False),
        (ALL + b"Disallow: /a%2A$", "/a*", False),
        (ALL + b"Disallow: /a%2A$", "/ab", True),
    ],
)  # fmt: skip
def test_what_is_allowed(text, target, allowed):
    assert robots.parse(text, "ours/1.0 (crawler@example.org)").allow(target) is allowed


@pytest.mark.parametrize(
    ("delay", "seconds"),
    [("3", 3.0), ("1.5", 2.0), (".1", 1.0), ("0", 0.0), ("-1", 0.0), ("", 0.0), ("x", 0.0), ("nan", 0.0), ("²", 0.0),
     ("9" * 5000, 1e9), ("9" * 400 + ".5", 1e9), ("inf", 1e9), ("2 # seconds", 2.0)],
)  # fmt: skip
def test_a_delay_is_a_number_of_seconds(delay, seconds):
    assert robots.parse(f"User-agent: *\nCrawl-delay: {delay}\nDisallow: /x".encode(), "ours").delay == seconds


def test_the_longest_delay_of_an_agents_groups_counts():
    text = b"User-agent: ours\nCrawl-delay: 2\nUser-agent: *\nCrawl-delay: 9\nUser-agent: ours\nCrawl-delay: 1\n"
    assert robots.parse(text, "ours").delay == 2.0 and robots.parse(text, "other").delay == 9.0


def test_a_hostile_file_takes_no_long_time():
    size = 512 << 10
    start = time.process_time()
    for text in (b"\n" * size, b" " * size, ALL * (size // 14), ALL + b"Disallow: /" + b"*a" * (size // 2) + b"b",
                 ALL + b"Disallow: /" + b"*" * size + b"b", ALL + b"Disallow: /*a*b*c$\n" * (size // 20)):  # fmt: skip
        robots.parse(text, "ours").allow("/" + "a" * 2000)
    assert time.process_time() - start < 5
