"""Reads what the query of an `s3://` URI says of the store: `?endpoint_override=HOST:PORT&scheme=http&region=R&anonymous=true`.

    endpoint_override   HOST:PORT of a store that is not AWS's; else `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, as in boto3
    scheme              https, or http with an endpoint
    region              else `AWS_REGION` or `AWS_DEFAULT_REGION`
    anonymous           true: requests are not signed, whatever credentials there are; for public buckets
    request_payer       requester: the requests are paid by whoever asks; such a bucket is only read

Another key is an error, lest one that is misspelt does nothing.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qs, urlsplit

from heliostat.errors import ConfigError
from heliostat.redact import carries_secret

KEYS = ("endpoint_override", "scheme", "region", "anonymous", "request_payer")
VALUES = {"scheme": ("https", "http"), "anonymous": ("true", "false"), "request_payer": ("requester",)}


@dataclass(frozen=True)
class S3Options:
    """Holds where a store answers and how it is asked."""

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
    """Parses a query; ConfigError for a key that is none, and a value that a key cannot have."""
    found = {key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}
    for key, value in found.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f", did you mean {near[0]!r}?" if near else "; in an object's name write ? as %3F"
            raise ConfigError(f"s3://...?{key}: is no key of an S3 URI ({', '.join(KEYS)}){hint}")
        if value not in VALUES.get(key, (value,)):
            raise ConfigError(f"s3://...?{key}={value}: must be {' or '.join(VALUES[key])}")
    if found.get("anonymous") == "true" and "request_payer" in found:
        raise ConfigError("s3://...?anonymous=true&request_payer: nobody knows who is to pay; remove one of the two")
    return found


def resolve(query: str) -> S3Options:
    """Completes what a query says by what the environment says."""
    options = dict(given(query))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        if carries_secret(endpoint):
            raise ConfigError("AWS_ENDPOINT_URL: must not carry credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        parts = urlsplit(endpoint)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    anonymous, pays = options.get("anonymous") == "true", "request_payer" in options
    return S3Options(options.get("endpoint_override"), options.get("scheme", "https"), region, anonymous, pays)
