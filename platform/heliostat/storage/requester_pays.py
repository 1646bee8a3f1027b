"""Reads buckets whose requester pays, as a file system of pyarrow's: its own S3 client has no way to say that one pays.

Every request carries `x-amz-request-payer`. Such a bucket is somebody else's, so it is only read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.fs as pafs

from heliostat.storage.s3_client import client, worded

PAYER = {"RequestPayer": "requester"}
ONLY_READ = "a bucket whose requester pays is only read"


def file_system(query: str, attempts: int, silence_s: float) -> pafs.FileSystem:
    """Makes the file system of the store that a query describes."""
    return pafs.PyFileSystem(_Handler(query, attempts, silence_s))


class _Handler(pafs.FileSystemHandler):
    def __init__(self, *store: Any) -> None:
        self.store = store

    @property
    def client(self) -> Any:
        return client(*self.store)

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
                    self.client.head_bucket(Bucket=bucket)
                    return pafs.FileInfo(path, pafs.FileType.Directory)
                found = self.client.head_object(Bucket=bucket, Key=key, **PAYER)
                return pafs.FileInfo(path, pafs.FileType.File, size=found["ContentLength"], mtime=found["LastModified"])
        except FileNotFoundError:
            below = key and next(self._pages(path, recursive=True, most=1)).get("KeyCount")
            return pafs.FileInfo(path, pafs.FileType.Directory if below else pafs.FileType.NotFound)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        base, found = selector.base_dir.rstrip("/"), list[pafs.FileInfo]()
        bucket = base.partition("/")[0]
        for page in self._pages(base, selector.recursive):
            found += [pafs.FileInfo(f"{bucket}/{p['Prefix'].rstrip('/')}", pafs.FileType.Directory)
                      for p in page.get("CommonPrefixes", [])]  # fmt: skip
            found += [pafs.FileInfo(f"{bucket}/{o['Key']}", pafs.FileType.File, size=o["Size"], mtime=o["LastModified"])
                      for o in page.get("Contents", []) if not o["Key"].endswith("/")]  # fmt: skip
        if not found and not selector.allow_not_found and self._info(base).type == pafs.FileType.NotFound:
            raise FileNotFoundError(base)
        return found

    def _pages(self, path: str, recursive: bool, most: int = 1000) -> Iterator[dict[str, Any]]:
        bucket, _, key = path.partition("/")
        asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": most, **PAYER}
        asked |= {} if recursive else {"Delimiter": "/"}
        while True:
            with worded():
                page = self.client.list_objects_v2(**asked)
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def open_input_file(self, path: str) -> pa.NativeFile:
        info = self._info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(path)
        return pa.PythonFile(_Object(self.client, path, info.size), mode="r")

    open_input_stream = open_input_file

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise PermissionError(ONLY_READ)

    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = delete_root_dir_contents = move = _refuse
    open_append_stream = open_output_stream = _refuse


class _Object(io.RawIOBase):
    """Presents an object as a file, of which every read is a request."""

    def __init__(self, client: Any, path: str, size: int) -> None:
        self._client, self._size, self._at = client, size, 0
        self._bucket, _, self._key = path.partition("/")

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
        with worded():
            asked = {"Bucket": self._bucket, "Key": self._key, "Range": f"bytes={self._at}-{end - 1}"}
            data = self._client.get_object(**asked, **PAYER)["Body"].read()
        if len(data) != end - self._at:
            raise ConnectionError(f"{len(data):,} of {end - self._at:,} bytes came")
        self._at = end
        return data
