"""Provides the only access to file:// and s3://. A Location is a URI with the few operations that heliostat needs.

- A write is atomic: a reader sees the old bytes or the new ones. Exception: if the local file of an S3 upload can't be read to
  its end, pyarrow completes the upload anyway. So readers of uploads compare sizes.
- A store that throttles, fails, hangs, or breaks connections is retried with exponential backoff and jitter. A StorageError is
  raised if the store doesn't answer within HELIOSTAT_RETRY_BUDGET_S seconds (60, read at every call).
- Rejected credentials, and requests that can't succeed, fail at once. The request after that reads the credentials again.
- A missing object raises FileNotFoundError. heliostat never reports damaged content as a fault of the store.

Credentials come from the environment only (`AWS_*`, instance roles). `s3_client` describes the query of a URI. A Location pickles
as its URI.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from heliostat.errors import AccessError, ConfigError, DataError, StorageError
from heliostat.redact import carries_secret
from heliostat.storage import local_files, retries, s3_client
from heliostat.storage.retries import FINAL, NO_BUCKET, Backoff, FailedAttempts, diagnose, patience, reason, retry_budget
from heliostat.storage.s3_client import Listed, Store
from heliostat.text import printable

log = logging.getLogger(__name__)
T = TypeVar("T")

BACKOFF = Backoff(0.2, 8.0, jitter=0.5)
PROBE_S = 3.0  # seconds to repeat a request; a busy store may reject one request and accept the next
LISTINGS = 20  # attempts to list a folder on disk that other processes change meanwhile
UPLOAD_BLOCK = 16 << 20  # bytes per read of a file
UPLOAD_WINDOW = 64 << 20  # bytes that may be in transit to the store before waiting for their arrival
UPLOAD_BYTES_PER_S = 10 << 20  # an upload's budget grows by 1 s per this many bytes; otherwise a long upload could never restart
ONE_REQUEST_BYTES = 5 << 20  # a smaller file is written with one request, and not in parts
# a path that a record must not contain: absolute, with an empty part, `.` or `..`, split by / or \, or with a control character
LEAVES = r"(^|[/\\])\.{0,2}([/\\]|$)|[\x00-\x1f\x7f]"


def is_inside(path: str) -> bool:
    """Returns whether a relative path in a record stays inside the record's folder. Checks only the path's text, not the
    disk."""
    return re.search(LEAVES, path) is None


@lru_cache(maxsize=64)
def _s3(query: str, attempts: int, silence_s: float) -> pafs.FileSystem:
    options = s3_client.resolve(query)
    if options.requester_pays:
        return s3_client.file_system(query, attempts, silence_s)
    return pafs.S3FileSystem(
        endpoint_override=options.endpoint,
        scheme=options.scheme,
        region=options.region,
        anonymous=options.anonymous,
        connect_timeout=min(5.0, silence_s),
        request_timeout=silence_s,  # without a byte in either direction
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        background_writes=True,  # without it, or with allow_delayed_open, a failed upload becomes a truncated object
    )


def _forget_clients() -> None:
    """Drops the clients of all stores, so that the next request reads the credentials again, because they may have expired."""
    _s3.cache_clear()
    s3_client.client.cache_clear()


@dataclass(frozen=True)
class Location:
    """Locates a file or folder. `uri`: an absolute or relative path, `file:///path`, or `s3://bucket/key[?query]`."""

    uri: str

    def __post_init__(self) -> None:
        if carries_secret(self.uri):
            raise ConfigError("a URI must not contain credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if "\0" in self.uri:
            raise ConfigError(f"{printable(self.uri)!r}: contains a null character. Remove this character")
        try:
            scheme = urlsplit(self.uri).scheme
        except ValueError as e:  # brackets around an invalid address
            raise ConfigError(f"{printable(self.uri)!r}: isn't a valid URI ({e}). Use a path, file:// or s3://") from e
        if scheme not in ("", "file", "s3"):
            raise ConfigError(f"{self.uri!r}: scheme {scheme!r} isn't supported. Use a path, file:// or s3://")
        if not self.uri or (scheme == "s3" and not urlsplit(self.uri).netloc):
            raise ConfigError(f"{self.uri!r}: has no path. Use a path, file:///PATH or s3://BUCKET/KEY")
        s3_client.given(self.query)

    def __str__(self) -> str:
        return self.uri

    @property
    def is_s3(self) -> bool:
        return self.uri.startswith("s3://")

    @property
    def fs(self) -> pafs.FileSystem:
        return _s3(self.query, *patience(retry_budget())) if self.is_s3 else pafs.LocalFileSystem()

    @property
    def path(self) -> str:
        """Returns the path for `fs`: `bucket/key` on S3, an absolute path on disk."""
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
        """Returns the location of a path inside this folder. Raises DataError for a part that is absolute or contains `..`.

        Names come from listings and records, and other people may have written these. Percent signs and backslashes are
        ordinary characters of a name: disks and stores don't decode them.
        """
        if leaving := next((p for p in parts if p.startswith("/") or ".." in p.split("/")), None):
            raise DataError(
                f"{self.uri}: {printable(leaving)[:200]!r} is outside this folder. Don't use the file that contains this path"
            )
        if not self.is_s3:
            return Location("/".join([self.uri.rstrip("/"), *parts]))
        base, mark, query = self.uri.partition("?")  # a question mark in a key is escaped, so that it doesn't start the query
        return Location("/".join([base.rstrip("/"), *(p.replace("%", "%25").replace("?", "%3F") for p in parts)]) + mark + query)

    def ending(self, suffix: str) -> Location:
        """Adds the suffix to the location's name, unless the name already ends with it."""
        base, mark, query = self.uri.partition("?") if self.is_s3 else (self.uri, "", "")
        return self if base.lower().endswith(suffix) else Location(base + suffix + mark + query)

    def absolute(self, root: Path) -> Location:
        """Returns the location, with a relative path resolved against `root`."""
        return self if urlsplit(self.uri).scheme else Location(str(root / self.uri))

    def open(self) -> pa.NativeFile:
        """Opens the file for random reads. Raises FileNotFoundError if the file is missing."""
        return self.attempt(lambda: self.fs.open_input_file(self.path))

    def exists(self) -> bool:
        return self.attempt(lambda: self.fs.get_file_info(self.path)).type != pafs.FileType.NotFound

    def read(self, most: int | None = None) -> bytes:
        """Reads the bytes of the file, or at most the first `most` bytes."""

        def get() -> bytes:
            with self.fs.open_input_file(self.path) as f:
                return f.read() if most is None else f.read(min(most, f.size()))

        return self.attempt(get)

    def write(self, data: bytes, synced: bool = False) -> None:
        """Writes the file. With `synced`, the data is on the disk before the file gets its name."""
        if self.is_s3 and len(data) < ONE_REQUEST_BYTES:
            return self.attempt(lambda: self._objects.put(self.path, data))
        return self.send(lambda out: out.write(data), len(data), synced)

    def create(self, data: bytes) -> bool:
        """Writes the file and returns True, if nothing exists at this location; otherwise returns False. Of several concurrent
        calls, only one succeeds.

        If the response to a successful write is lost, the repeated write returns False. So the data must contain the writer's
        identity.
        """
        if self.is_s3:
            return self.attempt(lambda: self._objects.create(self.path, data))
        with self._made():
            return self.attempt(lambda: local_files.put_new(self.path, data))

    def upload(self, local: Path, sent: Callable[[], None] = lambda: None) -> None:
        """Copies a local file to this location. Calls `sent` whenever UPLOAD_WINDOW bytes have arrived."""
        with local.open("rb") as file:
            self.upload_open(file, sent)

    def upload_open(self, file: IO[bytes], sent: Callable[[], None] = lambda: None) -> None:
        """Copies an open local file to this location, from the file's start."""

        def copy(out: pa.NativeFile) -> None:
            window = file.seek(0)
            while block := file.read(min(UPLOAD_BLOCK, UPLOAD_WINDOW)):
                out.write(block)
                window += len(block)
                if window >= UPLOAD_WINDOW:
                    out.flush()  # waits for the parts that are written in the background
                    window = 0
                    sent()

        size = file.seek(0, os.SEEK_END)
        if self.is_s3 and size < ONE_REQUEST_BYTES:
            file.seek(0)
            self.write(file.read())
        else:
            self.send(copy, size)

    def send(self, fill: Callable[[pa.NativeFile], object], size: int, synced: bool = False) -> None:
        """Writes the bytes that `fill` puts into the stream, about `size` bytes. Calls `fill` again if the store has a fault."""
        self.attempt(lambda: self._put(fill, synced), retry_budget() + size / UPLOAD_BYTES_PER_S)

    def _put(self, fill: Callable[[pa.NativeFile], object], synced: bool = False) -> None:
        if self.is_s3:  # an object appears only when its upload is complete
            with self.fs.open_output_stream(self.path) as out:
                fill(out)
            return
        partial = f"{self.path}.{uuid.uuid4().hex[:8]}.partial"
        try:
            with self._opened(partial) as out:
                fill(out)
            if synced:
                with Path(partial).open("rb") as written:
                    os.fsync(written.fileno())
            Path(partial).replace(self.path)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _opened(self, partial: str) -> pa.NativeFile:
        with self._made():
            Path(partial).parent.mkdir(parents=True, exist_ok=True)
            return self.fs.open_output_stream(partial)

    @contextmanager
    def _made(self) -> Iterator[None]:
        """Raises AccessError if a write fails because the folder can't be created, for example below /proc."""
        try:
            yield
        except FileNotFoundError as e:
            raise AccessError(f"{self.uri}: can't create a file here. Use another location", self.uri) from e

    def files(self) -> list[tuple[str, int]]:
        """Lists all files below this folder as (relative path, bytes), sorted; empty if the folder is missing."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        infos = self._listing(selector)
        return sorted((i.path[len(self.path) + 1 :], i.size) for i in infos if i.type == pafs.FileType.File)

    def tree(self) -> list[Listed]:
        """Lists all files below this folder, sorted by path. On a store, lists many folders in parallel, for large inputs."""
        if self.is_s3:
            return s3_client.files_below(
                self.path, lambda path, recursive: self.attempt(lambda: self._objects.listing(path, recursive))
            )
        infos = self._listing(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
        return sorted((_listed(i) for i in infos if i.type == pafs.FileType.File), key=lambda i: i.path)

    def info(self) -> Listed | None:
        """Describes the file (on a disk, also a folder) at this location. Returns None if nothing exists."""
        if self.is_s3:
            try:
                return self.attempt(lambda: self._objects.head(self.path))
            except FileNotFoundError:
                return None
        info = self.attempt(lambda: self.fs.get_file_info(self.path))
        return None if info.type == pafs.FileType.NotFound else _listed(info)

    def read_object(self, begin: int, end: int, etag: str) -> bytes:
        """Reads bytes [begin, end) of the object with this `etag`. Raises RewrittenError if the object was overwritten."""
        return self.attempt(lambda: self._objects.read(self.path, begin, end, etag))

    @property
    def _objects(self) -> Store:
        return Store(self.query, *patience(retry_budget()))

    def folders(self) -> list[str]:
        """Lists the names of the folders directly in this folder, sorted."""
        infos = self._listing(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)

    def _listing(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        for _ in range(LISTINGS):
            try:
                return self.attempt(lambda: self.fs.get_file_info(selector))
            except FileNotFoundError:  # another process has just removed, or created, a file or folder
                continue
        raise StorageError(f"{self.uri}: can't list this folder, because other processes keep changing it. Try again later")

    def delete(self) -> None:
        """Deletes the file, or the folder with its content; does nothing if there is no file or folder at this location."""

        def remove() -> None:
            kind = self.fs.get_file_info(self.path).type
            if kind == pafs.FileType.Directory:
                self.fs.delete_dir(self.path)
            elif kind == pafs.FileType.File:
                self.fs.delete_file(self.path)

        self.attempt(remove)

    def probe(self) -> None:
        """Checks that the store answers. Repeats a failed request for up to PROBE_S seconds.

        Raises StorageError if the store is unreachable. Raises AccessError if it rejects the request, or if a bucket is missing.
        """
        if not self.is_s3:
            self.attempt(lambda: self.fs.get_file_info(self.path), budget_s=0)
            return
        budget_s = min(PROBE_S, retry_budget())
        try:  # no log line per attempt: the error contains how long the store failed
            kind = retries.retry(
                lambda: _s3(self.query, 1, 2.0).get_file_info(self._bucket), budget_s, BACKOFF, self._judge, self._give_up
            ).type
        except FileNotFoundError as e:
            raise self._no_bucket() from e
        if kind == pafs.FileType.NotFound:
            raise self._no_bucket()

    def require_writable(self) -> None:
        """Raises AccessError if no file can be written here. Checks only disks: the folder, or its nearest existing parent."""
        nearest = Path(self.path)
        while not self.is_s3 and not os.path.lexists(nearest):
            nearest = nearest.parent
        if not self.is_s3 and not (nearest.is_dir() and os.access(nearest, os.W_OK) and local_files.takes_files(nearest)):
            raise AccessError(f"{self.uri}: can't write to the folder {nearest}. Use another location")

    def require_file(self) -> None:
        """Raises AccessError if no file can be written at this location, or if the location is a folder. Raises StorageError if
        the store is unreachable."""
        self.probe()
        if not self.is_s3 and Path(self.path).is_dir():
            raise AccessError(f"{self.uri}: is a folder. Use a file in this folder")
        if not self.is_s3:
            Location(str(Path(self.path).parent)).require_writable()

    @property
    def _bucket(self) -> str:
        return self.path.split("/", 1)[0]

    def _no_bucket(self) -> StorageError:
        missing = f"no bucket {self._bucket!r}. Create it, or check the name and the endpoint"
        return AccessError(f"{self.uri}: {missing}", self.uri)

    def attempt(self, operation: Callable[[], T], budget_s: float | None = None) -> T:
        """Runs an operation on this location, such as reading a row group, and repeats the operation while the store fails.

        The operation must be repeatable from its start. FileNotFoundError, and errors about the content, pass through at once.
        Begins a new attempt only if the attempt ends within the budget (seconds), assuming that it takes as long as the last
        attempt.
        """
        budget_s = retry_budget() if budget_s is None else budget_s
        return retries.retry(operation, budget_s, BACKOFF, self._judge, self._give_up, self._tell)

    def _judge(self, error: Exception) -> None:
        """Raises heliostat's error for a failed operation. Returns without an error if a retry can help."""
        if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)):
            raise AccessError(
                f"{self.uri}: a file is in the place of a folder, or a folder in the place of a file. Use another path", self.uri
            ) from error
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
            raise error
        meaning = diagnose(error)
        if meaning == "content":
            raise error
        if meaning == "missing":
            raise FileNotFoundError(self.uri) from error
        if not self.is_s3 and Path(self.path).is_dir():
            raise AccessError(f"{self.uri}: is a folder, not a file. Pass the path of a file", self.uri) from error
        if meaning == "hopeless" and NO_BUCKET in str(error):
            raise self._no_bucket() from error
        if meaning in FINAL:
            _forget_clients()
            raise AccessError(f"{self.uri}: {FINAL[meaning]} ({reason(error)})", self.uri) from error

    def _give_up(self, failure: FailedAttempts) -> NoReturn:
        lasted = f"storage failed for {failure.seconds:.0f} s" if failure.count > 1 else "storage failed at the first request"
        raise StorageError(f"{self.uri}: {lasted}: {reason(failure.error)}") from failure.error

    def _tell(self, failure: FailedAttempts, wait: float) -> None:
        log.warning("%s: %s. Retrying in %.1f s", self.uri, reason(failure.error), wait)


def _listed(info: pafs.FileInfo) -> Listed:
    return Listed(info.path, info.type, info.size or 0, info.mtime_ns or 0)
