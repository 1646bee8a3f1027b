"""Asks S3 by boto3 for what pyarrow's client cannot, with the same credentials and endpoints.

Faults are OSErrors as pyarrow words them, for `storage.diagnose`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from heliostat.storage import s3_options

MISSING = ("NoSuchKey", "404", "NotFound")


@lru_cache(maxsize=16)
def client(query: str, attempts: int, silence_s: float) -> Any:
    """Makes the client of a store, which tries a request so many times, and waits so long for a byte."""
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
        max_pool_connections=32,
    )
    return boto3.session.Session().client("s3", endpoint_url=options.url, region_name=options.region, config=config)


@contextmanager
def worded() -> Iterator[None]:
    """Raises boto3's errors as OSErrors."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as e:
        code, status = e.response["Error"]["Code"], e.response["ResponseMetadata"].get("HTTPStatusCode")
        if code in MISSING:
            raise FileNotFoundError(e.response["Error"].get("Message", code)) from e
        raise OSError(f"AWS Error {code} (HTTP status {status}): {e.response['Error'].get('Message', '')}") from e
    except NoCredentialsError as e:
        raise PermissionError(str(e)) from e
    except BotoCoreError as e:
        raise ConnectionError(str(e)) from e
