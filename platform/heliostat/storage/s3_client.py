"""Asks S3 by boto3 for what pyarrow's client cannot, with the same credentials and endpoints.

Faults are OSErrors as pyarrow words them, for `storage.diagnose`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import pyarrow.fs as pafs

from heliostat.storage import s3_options

SHORTER = "HTTP status 416"  # of a range behind an object's end
MISSING = ("NoSuchKey", "404", "NotFound")
PAYER = {"RequestPayer": "requester"}


class RewrittenError(Exception):
    """Reports that an object is not the one that was asked for: it was written again since."""


@dataclass(frozen=True)
class Listed:
    """Describes a file or folder as pyarrow does. `etag`: names what an object holds, if its store gives one."""

    path: str
    type: pafs.FileType
    size: int = 0
    mtime_ns: int = 0
    etag: str = ""


@dataclass(frozen=True)
class Store:
    """Reads objects of the store that a query describes, by `client`; paths are BUCKET/KEY."""

    query: str
    attempts: int
    silence_s: float

    @property
    def client(self) -> Any:
        return client(self.query, self.attempts, self.silence_s)

    @property
    def payer(self) -> dict[str, str]:
        return PAYER if s3_options.resolve(self.query).requester_pays else {}

    def head(self, path: str) -> Listed:
        """Describes an object; FileNotFoundError if there is none."""
        bucket, _, key = path.partition("/")
        with worded():
            found = self.client.head_object(Bucket=bucket, Key=key, **self.payer)
        return _listed(path, found["ContentLength"], found)

    def listing(self, path: str, recursive: bool) -> list[Listed]:
        """Lists what is directly in a folder, or all below it."""
        base, found = path.rstrip("/"), list[Listed]()
        bucket = base.partition("/")[0]
        for page in self.pages(base, recursive):
            found += [Listed(f"{bucket}/{p['Prefix'].rstrip('/')}", pafs.FileType.Directory)
                      for p in page.get("CommonPrefixes", [])]  # fmt: skip
            found += [_listed(f"{bucket}/{o['Key']}", o["Size"], o)
                      for o in page.get("Contents", []) if not o["Key"].endswith("/")]  # fmt: skip
        return found

    def pages(self, path: str, recursive: bool, most: int = 1000) -> Iterator[dict[str, Any]]:
        """Yields the store's answers to the request for a listing."""
        bucket, _, key = path.partition("/")
        asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": most, **self.payer}
        asked |= {} if recursive else {"Delimiter": "/"}
        while True:
            with worded():
                page = self.client.list_objects_v2(**asked)
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, path: str, begin: int, end: int, etag: str = "") -> bytes:
        """Reads a range of an object; RewrittenError if it has another `etag`, where one is given."""
        bucket, _, key = path.partition("/")
        asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={begin}-{end - 1}", **({"IfMatch": f'"{etag}"'} if etag else {})}
        try:
            with worded():
                data = self.client.get_object(**asked, **self.payer)["Body"].read()
        except OSError as e:
            if etag and SHORTER in str(e):  # of a store that looks at the range before the ETag
                raise RewrittenError(str(e)) from e
            raise
        if len(data) != end - begin:
            raise ConnectionError(f"{len(data):,} of {end - begin:,} bytes came")
        return data


def _listed(path: str, size: int, told: dict[str, Any]) -> Listed:
    modified, etag = told["LastModified"], told.get("ETag", "").strip('"')
    etag = "" if etag.startswith("W/") else etag  # a weak one, which no conditional read matches
    return Listed(path, pafs.FileType.File, size, round(modified.timestamp() * 1000) * 1_000_000, etag)


@lru_cache(maxsize=16)
def client(query: str, attempts: int, silence_s: float) -> Any:
    """Makes the client of a store, which tries a request so many times, and waits so long for a byte."""
    import boto3
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    options = s3_options.resolve(query)
    config = Config(
        connect_timeout=min(5.0, silence_s),
        read_timeout=silence_s,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        s3={"addressing_style": "path"} if options.url else None,
        signature_version=UNSIGNED if options.anonymous else None,
        max_pool_connections=32,
    )
    session = botocore.session.get_session()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
    return boto3.session.Session(botocore_session=session).client(
        "s3", endpoint_url=options.url, region_name=options.region, config=config
    )


def _time(told: Any) -> datetime:
    """Parses a time: that of a listing fast, which would be most of what a listing costs."""
    from botocore.utils import parse_timestamp

    with suppress(TypeError, ValueError):
        if (found := datetime.fromisoformat(told)).tzinfo:
            return found
    return parse_timestamp(told)


@contextmanager
def worded() -> Iterator[None]:
    """Raises boto3's errors as OSErrors."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as e:
        code, status = e.response["Error"]["Code"], e.response["ResponseMetadata"].get("HTTPStatusCode")
        if code == "PreconditionFailed" or status == 412:
            raise RewrittenError(str(e)) from e
        if code in MISSING:
            raise FileNotFoundError(e.response["Error"].get("Message", code)) from e
        raise OSError(f"AWS Error {code} (HTTP status {status}): {e.response['Error'].get('Message', '')}") from e
    except NoCredentialsError as e:
        raise PermissionError(str(e)) from e
    except (BotoCoreError, ResponseParserError, HTTPError) as e:  # boto3 passes on answers that are cut, and faults of TLS
        raise ConnectionError(str(e)) from e
