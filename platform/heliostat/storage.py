"""The one way to reach file:// and s3://: a Location is a URI with the few operations that heliostat needs.

Guarantees: a write is atomic (a reader sees the old bytes or the new ones) as long as its source can be read: pyarrow
completes an S3 upload even when the local file breaks off, so readers of uploads compare sizes. Transient failures are
retried with exponential backoff and jitter within a budget of seconds; refused credentials fail at once and say so.
Credentials come from the environment only (`AWS_*`, instance roles); a URI may carry
`?endpoint_override=HOST:PORT&scheme=http`, and `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` is honoured, as in boto3. A
Location pickles as its URI.
"""

from __future__ import annotations

import logging
import os
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from heliostat.errors import ConfigError, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_BUDGET_S = 60.0
REFUSED = ("access denied", "access_denied", "invalidaccesskeyid", "signaturedoesnotmatch", "http status code: 403", "forbidden",
           "invalid_access_key_id", "signature_does_not_match", "unrecognizedclient", "expiredtoken")  # fmt: skip


@lru_cache(maxsize=64)
def _s3(query: str, probe: bool) -> pafs.S3FileSystem:
    options = {k: v[-1] for k, v in parse_qs(query).items()}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        parts = urlsplit(endpoint)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return pafs.S3FileSystem(
        endpoint_override=options.get("endpoint_override"),
        scheme=options.get("scheme", "https"),
        region=region,
        connect_timeout=1.0 if probe else 5.0,
        request_timeout=2.0 if probe else 60.0,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1 if probe else 5),
    )


@dataclass(frozen=True)
class Location:
    """A file or folder at `uri`: an absolute or relative path, `file:///path`, or `s3://bucket/key[?query]`."""

    uri: str

    def __post_init__(self) -> None:
        scheme = urlsplit(self.uri).scheme
        if scheme not in ("", "file", "s3"):
            raise ConfigError(f"{self.uri!r}: scheme {scheme!r} is not supported; use a path, file:// or s3://")
        if not self.uri or (scheme == "s3" and not urlsplit(self.uri).netloc):
            raise ConfigError(f"{self.uri!r}: names no place; use a path, file:///PATH or s3://BUCKET/KEY")
        if scheme == "s3" and "@" in urlsplit(self.uri).netloc:
            raise ConfigError("an s3:// URI must not carry credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")

    def __str__(self) -> str:
        return self.uri

    @property
    def is_s3(self) -> bool:
        return self.uri.startswith("s3://")

    @property
    def fs(self) -> pafs.FileSystem:
        return _s3(self.query, False) if self.is_s3 else pafs.LocalFileSystem()

    @property
    def path(self) -> str:
        """The path as `fs` takes it: `bucket/key` on S3, an absolute path on disk."""
        if self.is_s3:
            return unquote(self.uri.removeprefix("s3://").partition("?")[0]).rstrip("/")
        return str(Path(self.uri.removeprefix("file://")).absolute())

    @property
    def query(self) -> str:
        return self.uri.partition("?")[2] if self.is_s3 else ""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def join(self, *parts: str) -> Location:
        if not self.is_s3:
            return Location("/".join([self.uri.rstrip("/"), *parts]))
        base, mark, query = self.uri.partition("?")  # a key may hold a question mark: escaped, it does not start the query
        return Location("/".join([base.rstrip("/"), *(p.replace("%", "%25").replace("?", "%3F") for p in parts)]) + mark + query)

    def absolute(self, root: Path) -> Location:
        """The same place, with a relative path taken from `root`."""
        return self if urlsplit(self.uri).scheme else Location(str(root / self.uri))

    def open(self) -> pa.NativeFile:
        """A random-access, read-only file; FileNotFoundError if there is none."""
        return self._call(lambda: self.fs.open_input_file(self.path))

    def exists(self) -> bool:
        return self._call(lambda: self.fs.get_file_info(self.path)).type != pafs.FileType.NotFound

    def read(self) -> bytes:
        def get() -> bytes:
            with self.fs.open_input_file(self.path) as f:
                return f.read()

        return self._call(get)

    def write(self, data: bytes) -> None:
        self._call(lambda: self._put(lambda out: out.write(data)))

    def upload(self, local: Path) -> None:
        """Copies a local file here."""

        def copy(out: pa.NativeFile) -> None:
            with local.open("rb") as f:
                while block := f.read(16 << 20):
                    out.write(block)

        self._call(lambda: self._put(copy))

    def _put(self, fill: Callable[[pa.NativeFile], object]) -> None:
        if self.is_s3:  # an object appears whole, when its upload completes
            with self.fs.open_output_stream(self.path) as out:
                fill(out)
            return
        partial = f"{self.path}.{uuid.uuid4().hex[:8]}.partial"
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.fs.open_output_stream(partial) as out:
                fill(out)
            Path(partial).replace(self.path)
        finally:
            Path(partial).unlink(missing_ok=True)

    def files(self) -> list[tuple[str, int]]:
        """All files below this folder as (path relative to it, bytes), sorted; empty if there is no such folder."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = self._call(lambda: self.fs.get_file_info(selector))
        return sorted((i.path[len(self.path) + 1 :], i.size) for i in found if i.type == pafs.FileType.File)

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""
        found = self._call(lambda: self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True)))
        return sorted(i.base_name for i in found if i.type == pafs.FileType.Directory)

    def delete(self) -> None:
        """Deletes the file or the whole folder; nothing happens if it is not there."""

        def remove() -> None:
            kind = self.fs.get_file_info(self.path).type
            if kind == pafs.FileType.Directory:
                self.fs.delete_dir(self.path)
            elif kind == pafs.FileType.File:
                self.fs.delete_file(self.path)

        self._call(remove)

    def probe(self) -> None:
        """One quick request: StorageError within seconds if the store is out of reach, refuses us, or lacks the bucket."""
        if not self.is_s3:
            self._call(lambda: self.fs.get_file_info(self.path), budget_s=0)
            return
        bucket = self.path.split("/", 1)[0]
        if self._call(lambda: _s3(self.query, True).get_file_info(bucket), budget_s=0).type == pafs.FileType.NotFound:
            raise StorageError(f"{self.uri}: there is no bucket {bucket!r}; make it, or check the name and the endpoint")

    def _call(self, operation: Callable[[], T], budget_s: float = RETRY_BUDGET_S) -> T:
        deadline, attempt = time.monotonic() + budget_s, 0
        while True:
            try:
                return operation()
            except FileNotFoundError:
                raise
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as e:
                raise StorageError(f"{self.uri}: a file lies where a folder is needed, or a folder where a file is") from e
            except OSError as e:
                reason = str(e).splitlines()[0] if str(e) else type(e).__name__
                if not self.is_s3 and Path(self.path).is_dir():
                    raise StorageError(f"{self.uri}: is a folder, not a file") from e
                if isinstance(e, PermissionError) or any(word in reason.lower() for word in REFUSED):
                    raise StorageError(
                        f"{self.uri}: access refused; check the credentials and the bucket policy ({reason})"
                    ) from e
                wait = min(8.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.5)
                if time.monotonic() + wait > deadline:
                    raise StorageError(f"{self.uri}: storage failed for {budget_s:.0f} s: {reason}") from e
                log.warning("%s: %s; retrying in %.1f s", self.uri, reason, wait)
                time.sleep(wait)
                attempt += 1
