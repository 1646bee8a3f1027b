"""Sends requests to the Hugging Face Hub, and explains failures in one line each: 401, 403, 404, 429, and no answer.

Temporary failures (429, 5xx, broken connections) are retried for HELIOSTAT_RETRY_BUDGET_S seconds. The settings are Hugging
Face's: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, and the token of `hf auth login`. heliostat writes all
messages itself. So no token, signed URL, or request header reaches a log.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import urlsplit

from heliostat.errors import AccessError, ConfigError, StorageError
from heliostat.redact import redact
from heliostat.storage import retries
from heliostat.storage.hub.names import HubName
from heliostat.storage.retries import Backoff, FailedAttempts

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo

log = logging.getLogger(__name__)
T = TypeVar("T")

BACKOFF = Backoff(0.5, 15.0, jitter=0.3)
AWAY_S = 5.0  # seconds to resolve a name to a commit; after that, the cache is used
ASK_S = 10.0  # seconds to wait for a byte of an answer
RECEIVED = 1 << 20  # bytes per write
PASSES = {408, 425, 429}  # HTTP statuses that may be temporary, in addition to 500 and above
NO_ROOM = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT)


class HubAwayError(StorageError):
    """Reports that the Hub doesn't answer within the budget. `reason`: what failed, without advice."""

    reason = ""


class AbsentFolderError(HubAwayError):
    """Reports that no folder has the name of a model, and that the Hub doesn't answer at the first try either."""

    exit_code = 2  # a wrong path is likely


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cache() -> Path:
    """Returns the folder of Hugging Face's cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def api() -> HfApi:
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings contain signed URLs
    return HfApi(endpoint=endpoint())


def ask(key: str, name: HubName, action: Callable[[], T], budget_s: float | None = None) -> T:
    """Runs a request about a model or dataset, and repeats the request while the Hub fails.

    `key`: the field of the job with which errors begin; `budget_s`: seconds. Raises ConfigError if the Hub rejects the request.
    Raises HubAwayError if the Hub doesn't answer within the budget. If the name may be a wrong path, doesn't wait.
    """

    def judge(error: Exception) -> None:
        if isinstance(error, (ConfigError, StorageError)):
            raise error
        status = _status(error)
        if status is not None and status not in PASSES and status < 500:
            raise ConfigError(f"{key}: {_rejected(name, status, error)}") from error
        if status is None and not _may_pass(error):
            raise _broken(key, name, error) from error
        if _may_be_folder(name) and (_unconnected(error) or Path(name.repo).parent.is_dir()):
            give_up(FailedAttempts(error, 1, 0.0), AbsentFolderError)  # a retry would only delay the error of a wrong path

    def give_up(failure: FailedAttempts, kind: type[HubAwayError] = HubAwayError) -> NoReturn:
        waited = f" (waited {failure.seconds:.0f} s)" if failure.seconds >= 0.5 else ""
        about, reason = _unless_folder(name) or f"{name.repo}: ", f"{_reason(failure.error)}{waited}"
        away = kind(f"{key}: {about}{reason}. {_advice(name, failure.error)}")
        away.reason = reason
        raise away from failure.error

    def report(failure: FailedAttempts, wait: float) -> None:
        log.warning("%s: %s; retrying in %.1f s", name.repo, _reason(failure.error), wait)

    budget_s = retries.retry_budget() if budget_s is None else min(budget_s, retries.retry_budget())
    return retries.retry(action, budget_s, BACKOFF, judge, give_up, report)


def information(name: HubName) -> ModelInfo | DatasetInfo:
    """Requests the Hub's metadata of a model or dataset at the name's revision, such as the commit."""
    if name.kind == "dataset":
        return api().dataset_info(name.repo, revision=name.revision, timeout=ASK_S)
    return api().model_info(name.repo, revision=name.revision, timeout=ASK_S)


def receive(name: HubName, path: str, size: int, partial: Path) -> None:
    """Downloads a file of a pinned name to the path `partial`.

    If `partial` already contains the start of the file, downloads only the rest. `size`: bytes of the complete file.
    """
    from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(name.repo, path, repo_type=name.kind, revision=name.revision, endpoint=endpoint())
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    place = get_hf_file_metadata(url, timeout=ASK_S, endpoint=endpoint()).location
    if urlsplit(place).netloc != urlsplit(endpoint()).netloc:
        headers.pop("authorization", None)  # not for another host, such as the store of large files
    with partial.open("ab") as out:
        if out.tell() > size:
            out.truncate(0)
        if begin := out.seek(0, os.SEEK_END):
            headers["Range"] = f"bytes={begin}-"
        if begin == size:
            return
        with get_session().stream("GET", place, headers=headers, timeout=ASK_S, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if begin and response.status_code == 200:  # the server doesn't support ranges
                out.truncate(0)
            for block in response.iter_bytes(RECEIVED):
                out.write(block)
        if out.tell() < size:
            raise ConnectionError(f"{path}: the connection ended at byte {out.tell():,}")


@contextmanager
def kept(key: str, name: HubName) -> Iterator[None]:
    """Turns an OSError into an error that explains why files can't be written to the cache."""
    try:
        yield
    except OSError as e:
        raise _broken(key, name, e) from e


def missing(key: str, name: HubName, what: str) -> ConfigError:
    """Makes the error for files that aren't in the cache and can't be downloaded, because HF_HUB_OFFLINE is set."""
    fix = f"Unset HF_HUB_OFFLINE, or run this command on a machine with a network and copy that machine's cache: {name.command}"
    return ConfigError(f"{key}: {_unless_folder(name)}{cache()} lacks {what} of {name.repo} (HF_HUB_OFFLINE is set). {fix}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    """Returns the HTTP status of the Hub's response; None if the Hub sent no response."""
    for one in _chain(error):
        if (response := getattr(one, "response", None)) is not None:
            return int(response.status_code)
    return None


def _code(error: Exception) -> str:
    responses = (getattr(one, "response", None) for one in _chain(error))
    return next((r.headers.get("X-Error-Code") or "" for r in responses if r is not None), "")


def _rejected(name: HubName, status: int, error: Exception) -> str:
    page = f"{endpoint()}/{'datasets/' if name.kind == 'dataset' else ''}{name.repo}"
    code = _code(error)
    if status == 403 or code == "GatedRepo":
        fix = f"Accept the terms at {page}, then log in: hf auth login, or set HF_TOKEN"
        return f"{name.repo}: the Hub denies access ({status}). {fix}"
    if status == 401 and code != "RepoNotFound":
        return f"{name.repo}: the Hub doesn't accept the token (401). Log in again: hf auth login, or set HF_TOKEN"
    if code == "RevisionNotFound":
        return f"{name.repo} has no revision {name.revision!r} (404). Use a branch, a tag, or a commit of {page}/commits/main"
    if code == "EntryNotFound":
        return f"{name.repo}@{name.revision} lacks a file that the Hub lists (404). Try again, or use another revision"
    if status in (401, 404):
        absent = f"{_unless_folder(name)}no {name.kind} {name.repo!r} on the Hub ({status})"
        return f"{absent}. Check the name; if the repository is private, log in: hf auth login"
    return f"{name.repo}: the Hub rejects the request ({status}). See {page}"


def _may_be_folder(name: HubName) -> bool:
    """Returns whether the user may have meant a name as a relative path, although this path doesn't exist."""
    return name.kind == "model" and not name.pinned


def _unless_folder(name: HubName) -> str:
    """Returns the start of an error for a name that the user may have meant as a path. Returns "" for other names."""
    return f"no folder {str(name).partition('@')[0]!r} here, and " if _may_be_folder(name) else ""


def _unconnected(error: Exception) -> bool:
    """Returns whether the connection failed: no network, no such host, or no server."""
    return _is_a(error, {"ConnectError", "ConnectionRefusedError", "gaierror"})  # the HTTP library has the first class


def _may_pass(error: Exception) -> bool:
    """Returns whether an error comes from the network. Call this function only for errors without an HTTP response from the
    Hub."""
    return _is_a(error, {"TransportError", "ConnectionError", "TimeoutError"})  # the first is a class of the HTTP library


def _is_a(error: Exception, kinds: set[str]) -> bool:
    return any(base.__name__ in kinds for one in _chain(error) for base in type(one).__mro__)


def _broken(key: str, name: HubName, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        why = error.strerror or "no space"
        return AccessError(
            f"{key}: {name.repo} can't be written to {cache()} ({why}). Free some space there, or set HF_HOME to another folder"
        )
    return ConfigError(f"{key}: {name.repo}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Describes an error of a request to the Hub in a few words, without the request's URL or headers."""
    status = _status(error)
    if status == 429:
        return "the Hub limits requests (429)"
    if status is not None:
        return f"the Hub fails ({status})"
    if _may_pass(error):
        kinds = [type(one).__name__ for one in _chain(error)]
        return f"no answer from {endpoint()} ({kinds[-1]})"
    return redact(retries.reason(error)).partition("?")[0]


def _advice(name: HubName, error: Exception) -> str:
    if _status(error) == 429:
        return "Wait some minutes, or log in for a higher limit: hf auth login"
    if _may_be_folder(name):
        return f"Correct the path. For a model of the Hub, run on a machine with a network and copy {cache()}: {name.command}"
    return f"Without a network, run this on a machine with a network, and copy {cache()}: {name.command}"
