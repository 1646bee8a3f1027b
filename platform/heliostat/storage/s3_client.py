"""Sends S3 requests that pyarrow's client doesn't support: conditional reads and puts, parallel listings, requester-pays buckets.

The module uses boto3 with the same credentials and endpoints. boto3's errors become OSErrors with pyarrow's wording, so that
`retries.diagnose` can classify them.

The query of an `s3://` URI describes its store: `?endpoint_override=HOST:PORT&scheme=http&region=R&anonymous=true`.

    endpoint_override   HOST:PORT of a store other than AWS; else `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, as in boto3
    scheme              https, or http with an endpoint
    region              else `AWS_REGION` or `AWS_DEFAULT_REGION`
    anonymous           true: requests are not signed, even if there are credentials; for public buckets
    request_payer       requester: the caller pays for requests; such a bucket is read-only

Any other key is an error, so that a misspelled key isn't ignored.
"""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from heliostat.errors import ConfigError
from heliostat.redact import carries_secret
from heliostat.storage.retries import NO_BUCKET

if TYPE_CHECKING:
    from botocore.client import BaseClient

SHORTER = "HTTP status 416"  # answer for a range after an object's end
MISSING = ("NoSuchKey", "404", "NotFound")
PAYER = {"RequestPayer": "requester"}
BINARY = "application/octet-stream"  # as pyarrow's uploads
ONLY_READ = "a requester-pays bucket is read-only"
THREADS = 16
ENOUGH = 64  # number of folders at which the search for more folders ends
LEVELS = 4  # maximum depth of the search for folders
PAGE = 1000  # names per answer of a store
KEYS = ("endpoint_override", "scheme", "region", "anonymous", "request_payer")
VALUES = {"scheme": ("https", "http"), "anonymous": ("true", "false"), "request_payer": ("requester",)}


@dataclass(frozen=True)
class S3Options:
    """Holds the address of a store, and options of requests to it."""

    endpoint: str | None
    scheme: str
    region: str
    anonymous: bool
    requester_pays: bool = False

    @property
    def url(self) -> str | None:
        """Returns the endpoint as a URL."""
        return f"{self.scheme}://{self.endpoint}" if self.endpoint else None


@lru_cache(maxsize=256)
def given(query: str) -> dict[str, str]:
    """Parses a query. Raises ConfigError for an unknown key, or for a value that its key doesn't allow."""
    options = {key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}
    for key, value in options.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f". Did you mean {near[0]!r}?" if near else ". In an object's name, write ? as %3F"
            raise ConfigError(f"s3://...?{key}: unknown key of an S3 URI ({', '.join(KEYS)}){hint}")
        if value not in VALUES.get(key, (value,)):
            raise ConfigError(f"s3://...?{key}={value}: must be {' or '.join(VALUES[key])}")
    if options.get("anonymous") == "true" and "request_payer" in options:
        raise ConfigError("s3://...?anonymous=true&request_payer: an anonymous caller can't pay. Remove one of these options")
    return options


def resolve(query: str) -> S3Options:
    """Returns the options of a query; options that the query doesn't set come from the environment."""
    options = dict(given(query))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        if carries_secret(endpoint):
            raise ConfigError("AWS_ENDPOINT_URL: must not contain credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        parts = urlsplit(endpoint)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    anonymous, pays = options.get("anonymous") == "true", "request_payer" in options
    return S3Options(options.get("endpoint_override"), options.get("scheme", "https"), region, anonymous, pays)


class RewrittenError(Exception):
    """Reports that an object was overwritten, so its content isn't the expected content."""


@dataclass(frozen=True)
class Listed:
    """Describes a file or folder with the fields of pyarrow's `FileInfo`. `etag`: the object's ETag, if the store has ETags."""

    path: str
    type: pafs.FileType
    size: int = 0
    mtime_ns: int = 0
    etag: str = ""


@dataclass(frozen=True)
class Store:
    """Reads and creates objects in the store that a query describes. Paths are BUCKET/KEY.

    `attempts`: number of attempts per request; `silence_s`: seconds to wait for a byte.
    """

    query: str
    attempts: int
    silence_s: float

    @property
    def client(self) -> BaseClient:
        return client(self.query, self.attempts, self.silence_s)

    @property
    def payer(self) -> dict[str, str]:
        return PAYER if resolve(self.query).requester_pays else {}

    def head(self, path: str) -> Listed:
        """Returns an object's size, time, and ETag. Raises FileNotFoundError if the object is missing."""
        bucket, _, key = path.partition("/")
        with worded():
            answer = self.client.head_object(Bucket=bucket, Key=key, **self.payer)
        return _listed(path, answer["ContentLength"], answer)

    def listing(self, path: str, recursive: bool) -> list[Listed]:
        """Lists the entries directly in a folder, or everything below it."""
        base, entries = path.rstrip("/"), list[Listed]()
        bucket = base.partition("/")[0]
        for page in self.pages(base, recursive):
            entries += [Listed(f"{bucket}/{p['Prefix'].rstrip('/')}", pafs.FileType.Directory)
                      for p in page.get("CommonPrefixes", [])]  # fmt: skip
            entries += [_listed(f"{bucket}/{o['Key']}", o["Size"], o)
                      for o in page.get("Contents", []) if not o["Key"].endswith("/")]  # fmt: skip
        return entries

    def pages(self, path: str, recursive: bool, most: int = 1000) -> Iterator[dict[str, Any]]:
        """Yields the pages of the store's response to a listing request, with at most `most` names each."""
        bucket, _, key = path.partition("/")
        request = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": most, **self.payer}
        request |= {} if recursive else {"Delimiter": "/"}
        while True:
            with worded():
                page = self.client.list_objects_v2(**request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, path: str, begin: int, end: int, etag: str = "") -> bytes:
        """Reads bytes [begin, end) of an object. Raises RewrittenError if `etag` is given and the object has another ETag."""
        bucket, _, key = path.partition("/")
        ask = {"Bucket": bucket, "Key": key, "Range": f"bytes={begin}-{end - 1}", **({"IfMatch": f'"{etag}"'} if etag else {})}
        try:
            with worded():
                answer = self.client.get_object(**ask, **self.payer)
                data = answer["Body"].read()
        except OSError as e:
            if etag and SHORTER in str(e):  # a store that checks the range before the ETag
                raise RewrittenError(str(e)) from e
            raise
        if etag and answer.get("ETag", "").strip('"') not in ("", etag):  # a store that ignores the condition
            raise RewrittenError(f"expected ETag {etag}, got {answer['ETag']}")
        if len(data) != end - begin:
            raise ConnectionError(f"expected {end - begin:,} bytes from the store, got {len(data):,}")
        return data

    def put(self, path: str, data: bytes) -> None:
        """Writes an object with one request. An upload in parts takes three requests or more."""
        if self.payer:
            raise PermissionError(ONLY_READ)
        bucket, _, key = path.partition("/")
        with worded():
            self.client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=BINARY)

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object only if no object exists at the path; returns whether the object was written.

        If the response to a successful write is lost, the repeated write returns False. So the data must contain the writer's
        identity.
        """
        if self.payer:
            raise PermissionError(ONLY_READ)
        bucket, _, key = path.partition("/")
        try:
            with worded():
                self.client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except RewrittenError:
            return False
        return True


def _listed(path: str, size: int, answer: dict[str, Any]) -> Listed:
    modified, etag = answer["LastModified"], answer.get("ETag", "").strip('"')
    etag = "" if etag.startswith("W/") else etag  # a weak ETag: no conditional read matches it
    return Listed(path, pafs.FileType.File, size, round(modified.timestamp() * 1000) * 1_000_000, etag)


@lru_cache(maxsize=16)
def client(query: str, attempts: int, silence_s: float) -> BaseClient:
    """Makes the client of a store, with `attempts` attempts per request, and `silence_s` seconds to wait for a byte."""
    import boto3
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    options = resolve(query)
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


def _time(written: str) -> datetime:
    """Parses a time in ISO format. Uses a fast parser for times in listings, because they are most of a listing's work."""
    from botocore.utils import parse_timestamp

    with suppress(TypeError, ValueError):
        if (moment := datetime.fromisoformat(written)).tzinfo:
            return moment
    return parse_timestamp(written)


@contextmanager
def worded() -> Iterator[None]:
    """Turns boto3's errors into OSErrors, and failed conditions into RewrittenError."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
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
        code = NO_BUCKET if code == "NoSuchBucket" else code
        raise OSError(f"AWS Error {code} (HTTP status {status}): {e.response['Error'].get('Message', '')}") from e
    except NoCredentialsError as e:
        raise PermissionError(str(e)) from e
    except ParamValidationError as e:  # for example an invalid name of a bucket, which no store accepts
        raise OSError(f"AWS Error InvalidRequest (HTTP status 400): {' '.join(str(e).split())}") from e
    except (BotoCoreError, ResponseParserError, HTTPError) as e:  # boto3 passes on truncated answers and TLS faults
        raise ConnectionError(str(e)) from e


def files_below(path: str, listed: Callable[[str, bool], list[Listed]]) -> list[Listed]:
    """Lists all files below a folder, sorted by path, with several requests in parallel.

    `listed`: lists the entries directly in a folder or, with True, everything below it.

    A store lists page by page, and each page contains the start of the next page. So a million objects take a thousand answers,
    one after another. To list in parallel, this function first searches for ENOUGH folders. Then it lists each folder separately.
    If there are no folders, or if they are so small that separate requests would be more work, one stream lists everything.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        direct, folders = _split(listed(path, False))
        for _ in range(LEVELS):
            if not 0 < len(folders) < ENOUGH:
                break
            files, folders = _split(i for infos in pool.map(lambda f: listed(f, False), folders) for i in infos)
            direct += files
        if not all(_plain(path, folder) for folder in folders):
            return _sorted(listed(path, True))
        first, rest = folders[:THREADS], folders[THREADS:]
        below = [i for infos in pool.map(lambda f: listed(f, True), first) for i in infos]
        if rest and len(below) * THREADS < PAGE * len(first):  # one stream needs fewer answers than each thread would
            return _sorted(listed(path, True))
        below += [i for infos in pool.map(lambda f: listed(f, True), rest) for i in infos]
    return _sorted([*direct, *below])


def _split(infos: Iterable[Listed]) -> tuple[list[Listed], list[str]]:
    """Splits a listing into files and the paths of folders."""
    entries = list(infos)
    return [i for i in entries if i.type == pafs.FileType.File], [i.path for i in entries if i.type == pafs.FileType.Directory]


def _plain(path: str, folder: str) -> bool:
    """Returns whether a folder can be listed by its path. This fails for keys with empty parts (`a//b`), because a path can't
    have such parts."""
    return folder.startswith(f"{path}/") and all(folder[len(path) + 1 :].split("/"))


def _sorted(infos: list[Listed]) -> list[Listed]:
    return sorted({i.path: i for i in infos if i.type == pafs.FileType.File}.values(), key=lambda i: i.path)


def file_system(query: str, attempts: int, silence_s: float) -> pafs.FileSystem:
    """Makes a pyarrow file system for a requester-pays bucket, which pyarrow's own client doesn't support.

    Every request carries `x-amz-request-payer`. A requester-pays bucket belongs to another account, so it is read-only.
    """
    return pafs.PyFileSystem(_Handler(Store(query, attempts, silence_s)))


class _Handler(pafs.FileSystemHandler):
    def __init__(self, store: Store) -> None:
        self.store = store

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> pafs.FileInfo:
        bucket, _, key = path.partition("/")
        try:
            with worded():
                if not key:
                    self.store.client.head_bucket(Bucket=bucket)
                    return pafs.FileInfo(path, pafs.FileType.Directory)
            return _info(self.store.head(path))
        except FileNotFoundError:
            below = key and next(self.store.pages(path, recursive=True, most=1)).get("KeyCount")
            return pafs.FileInfo(path, pafs.FileType.Directory if below else pafs.FileType.NotFound)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        base = selector.base_dir.rstrip("/")
        infos = [_info(one) for one in self.store.listing(base, selector.recursive)]
        if not infos and not selector.allow_not_found and self._info(base).type == pafs.FileType.NotFound:
            raise FileNotFoundError(base)
        return infos

    def open_input_file(self, path: str) -> pa.NativeFile:
        info = self._info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(path)
        return pa.PythonFile(_Object(self.store, path, info.size), mode="r")

    open_input_stream = open_input_file

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise PermissionError(ONLY_READ)

    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = delete_root_dir_contents = move = _refuse
    open_append_stream = open_output_stream = _refuse


def _info(entry: Listed) -> pafs.FileInfo:
    return pafs.FileInfo(entry.path, entry.type, size=entry.size, mtime_ns=entry.mtime_ns) if entry.mtime_ns else pafs.FileInfo(
        entry.path, entry.type)  # fmt: skip


class _Object(io.RawIOBase):
    """Provides an S3 object as a Python file object. Every read sends one request."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        self._store, self._path, self._size, self._at = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        if self._at >= end:
            return b""
        data = self._store.read(self._path, self._at, end)
        self._at = end
        return data
