"""Puts a file only where nothing is: of several processes that try at once, one succeeds.

pyarrow has no such put. On disk it is a hard link to a complete file, so that the file appears whole; where a file system has no
links, a file that only one can open. On S3 it is `If-None-Match: *`, through boto3, with the credentials and endpoints that
pyarrow uses. Faults are OSErrors as pyarrow words them, for `storage.diagnose`.
"""

from __future__ import annotations

import os
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

from heliostat import s3_options


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
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    bucket, _, key = path.partition("/")
    try:
        _client(query, attempts, silence_s).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as e:
        code, status = e.response["Error"]["Code"], e.response["ResponseMetadata"].get("HTTPStatusCode")
        if code == "PreconditionFailed" or status == 412:
            return False
        raise OSError(f"AWS Error {code} (HTTP status {status}): {e.response['Error'].get('Message', '')}") from e
    except NoCredentialsError as e:
        raise PermissionError(str(e)) from e
    except BotoCoreError as e:
        raise ConnectionError(str(e)) from e
    return True


@lru_cache(maxsize=16)
def _client(query: str, attempts: int, silence_s: float) -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    options = s3_options.resolve(query)
    config = Config(
        connect_timeout=min(5.0, silence_s),
        read_timeout=silence_s,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        s3={"addressing_style": "path"} if options.url else None,
        signature_version=UNSIGNED if options.anonymous else None,
    )
    return boto3.session.Session().client("s3", endpoint_url=options.url, region_name=options.region, config=config)
