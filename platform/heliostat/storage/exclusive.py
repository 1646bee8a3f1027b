"""Puts a file only where nothing is: of several processes that try at once, one succeeds.

pyarrow has no such put. On disk it is a hard link to a complete file, so that the file appears whole; where a file system has no
links, a file that only one can open. On S3 it is `If-None-Match: *`, through boto3.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from heliostat.storage import requester_pays, s3_options
from heliostat.storage.s3_client import RewrittenError, client, worded


def put_file(path: str, data: bytes) -> bool:
    """Writes a file if there is none of this name; returns False, and changes nothing, if there is one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data)
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        except OSError:
            return _open_new(target, data)
        return True
    finally:
        partial.unlink(missing_ok=True)


def _open_new(target: Path, data: bytes) -> bool:
    try:
        with target.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def put_object(path: str, query: str, data: bytes, attempts: int, silence_s: float) -> bool:
    """Puts an object on S3 only where none is, and tells whether it did; `path`: BUCKET/KEY, the rest as for pyarrow's file
    system.

    The answer to a put may be lost, and its repetition then returns False: the data must show whose it is.
    """
    if s3_options.resolve(query).requester_pays:
        raise PermissionError(requester_pays.ONLY_READ)
    bucket, _, key = path.partition("/")
    try:
        with worded():
            client(query, attempts, silence_s).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except RewrittenError:
        return False
    return True
