"""Reads buckets whose requester pays, as a file system of pyarrow's: its own S3 client has no way to say that one pays.

Every request carries `x-amz-request-payer`. Such a bucket is somebody else's, so it is only read.
"""

from __future__ import annotations

import io
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.fs as pafs

from heliostat.storage.s3_client import Listed, Store, worded

ONLY_READ = "a bucket whose requester pays is only read"


def file_system(query: str, attempts: int, silence_s: float) -> pafs.FileSystem:
    """Makes the file system of the store that a query describes."""
    return pafs.PyFileSystem(_Handler(query, attempts, silence_s))


class _Handler(pafs.FileSystemHandler):
    def __init__(self, *store: Any) -> None:
        self.store = Store(*store)

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
        found = [_info(one) for one in self.store.listing(base, selector.recursive)]
        if not found and not selector.allow_not_found and self._info(base).type == pafs.FileType.NotFound:
            raise FileNotFoundError(base)
        return found

    def open_input_file(self, path: str) -> pa.NativeFile:
        info = self._info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(path)
        return pa.PythonFile(_Object(self.store, path, info.size), mode="r")

    open_input_stream = open_input_file

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise PermissionError(ONLY_READ)

    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = delete_root_dir_contents = move = _refuse
    open_append_stream = open_output_stream = _refuse


def _info(found: Listed) -> pafs.FileInfo:
    return pafs.FileInfo(found.path, found.type, size=found.size, mtime_ns=found.mtime_ns) if found.mtime_ns else pafs.FileInfo(
        found.path, found.type)  # fmt: skip


class _Object(io.RawIOBase):
    """Presents an object as a file, of which every read is a request."""

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
