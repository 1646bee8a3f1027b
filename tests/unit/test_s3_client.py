"""What boto3 answers and raises where a store or the connection is unusual, as the rest of heliostat sees it."""

from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp
from heliostat.curation.pieces import FilePart
from heliostat.curation.text import sources
from heliostat.errors import DataError
from heliostat.storage import s3_client
from heliostat.storage.locations import Location, diagnose
from heliostat.storage.s3_client import RewrittenError, Store
from urllib3.exceptions import SSLError


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
    """boto3 has no class of its own for these: they would leave out the rest of the file as unread."""
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
    with pytest.raises(DataError, match="had 9 bytes when it was listed, and has 10 now"):
        sources._as_listed(Location("s3://b/a.jsonl"), FilePart("a.jsonl", 9, 0, etag="abc"))


def test_a_range_behind_the_end_of_an_object_that_became_shorter_tells_that_it_was_written_again(answers):
    answers(None, 10, 416)
    with pytest.raises(RewrittenError):
        Store("", 1, 1.0).read("b/a.jsonl", 20, 30, "abc")
    with pytest.raises(OSError, match="InvalidRange"):
        Store("", 1, 1.0).read("b/a.jsonl", 20, 30)


def test_the_time_of_a_listed_object_is_parsed_without_a_parser_of_any_format(monkeypatch):
    """Which takes 60 of the 90 ms that a page of 1,000 names costs."""
    told = ["2026-11-27T10:00:03.120Z", "Fri, 27 Nov 2026 10:00:03 GMT", "2026-11-27T10:00:03", 1795773603]
    assert [s3_client._time(one) for one in told] == [parse_timestamp(one) for one in told]
    monkeypatch.setattr("botocore.utils.parse_timestamp", lambda told: pytest.fail("slow"))
    assert s3_client._time(told[0]) == datetime(2026, 11, 27, 10, 0, 3, 120_000, UTC)
    parsers = s3_client.client("anonymous=true", 1, 1.0)._endpoint._response_parser_factory
    assert parsers.create_parser("rest-xml")._timestamp_parser is s3_client._time
