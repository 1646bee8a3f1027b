"""Tells from an error of the store or of the operating system whether another attempt is worth it."""

from __future__ import annotations

import errno
import re

from heliostat.text import brief

# what stores answer, in lower case without punctuation: ACCESS_DENIED, AccessDenied and "Access Denied" are one
REFUSED = ("accessdenied", "allaccessdisabled", "expiredtoken", "httpstatus401", "httpstatus403", "invalidaccesskeyid",
           "invalidtoken", "requesttimetooskewed", "signaturedoesnotmatch", "unrecognizedclient")  # fmt: skip
MISSING = ("nosuchkey", "resourcenotfound")
DAMAGED_ON_THE_WAY = ("baddigest", "incompletebody", "invalidpart")  # an upload's, so worth another
NO_BUCKET = "NO_SUCH_BUCKET"  # in the words of the S3 client
HOPELESS = ("nosuchbucket", "httpstatus301", "httpstatus400", "httpstatus405", "httpstatus501")
FINAL = {
    "refused": "access refused; check the credentials and the bucket policy",
    "hopeless": "the store cannot do this; check bucket, credentials, region and endpoint",
}


def diagnose(error: OSError) -> str:
    """Classifies an error: `refused`, `missing`, `hopeless`, `fault` (of the store, so worth a retry) or `content`.

    pyarrow has one class for all of them. Whatever its S3 client reports names AWS or S3, whatever the operating system reports
    has a number; an OSError without either is a Parquet or codec library's, about the bytes.
    """
    _, mark, answer = str(error).rpartition("AWS Error")  # before it stand the names of key and bucket
    words = re.sub(r"[^a-z0-9]", "", answer.lower())
    if isinstance(error, FileNotFoundError) or any(word in words for word in MISSING):
        return "missing"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS or any(word in words for word in REFUSED):
        return "refused"
    if not any(word in words for word in DAMAGED_ON_THE_WAY) and any(word in words for word in HOPELESS):
        return "hopeless"
    known = mark or "S3 bucket" in answer or error.errno is not None or isinstance(error, (TimeoutError, ConnectionError))
    return "fault" if known else "content"


def reason(error: Exception) -> str:
    """Returns the error's first line, or its kind if it has none."""
    return brief(error) or type(error).__name__
